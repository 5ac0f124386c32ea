"""The part of torch that the benchmark uses, on the fake GPU's memory.

It computes with numpy, at once, though time passes on the stream.

``install`` puts it in the place of torch. Which backends serve what is made up: FlashAttention refuses float32.
"""

import sys
import warnings
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from pyfmha.attention.reference import attend
from pyfmha.bfloat16 import bf16_from_float, float_from_bf16
from pyfmha.e4m3 import float_from_e4m3


class Tensor:
    """Numbers with the name of a dtype; bfloat16 as float32 that it was rounded to."""

    def __init__(self, values: Any, dtype: str) -> None:
        self.values, self.dtype = values, dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self.values, dtype)

    def view(self, dtype: str) -> "Tensor":
        if dtype == "float8_e4m3fn":
            assert self.dtype == "|u1"
            return Tensor(self.values, dtype)
        assert (self.dtype, dtype) == ("<i2", "bfloat16")
        return Tensor(float_from_bf16(self.values.view(np.uint16)), "bfloat16")

    def to(self, dtype: str) -> "Tensor":
        return Tensor(self.values, dtype)

    def __getitem__(self, index: Any) -> "Tensor":
        return Tensor(self.values[index], self.dtype)

    def __eq__(self, other: object) -> Any:
        return self.values == np.asarray(other)

    __hash__ = None  # type: ignore[assignment]

    def transpose(self, one: int, other: int) -> "Tensor":
        return Tensor(self.values.swapaxes(one, other), self.dtype)

    def double(self) -> "Tensor":
        return Tensor(self.values.astype(np.float64), "float64")

    def cpu(self) -> "Tensor":
        return self

    def numpy(self) -> Any:
        return self.values


class Computed(np.ndarray):
    """What torch's functions return in the place of a tensor."""

    def int(self) -> Any:
        return self.astype(np.int32)


class Log:
    """What was called."""

    def __init__(self) -> None:
        self.backend: list[str] = []
        self.streams: list[int] = []
        self.options: list[dict[str, Any]] = []
        self.replays = 0
        self.flash3_strides: list[tuple[int, ...]] = []
        self.graphs: list[Any] = []
        self.ragged: list[tuple[Any, ...]] = []
        self.compiled: list[tuple[str, dict[str, Any]]] = []


def install(monkeypatch: Any, gpu: Any) -> Log:
    """Put the double in the place of torch."""
    log = Log()
    torch: Any = ModuleType("torch")
    attention: Any = ModuleType("torch.nn.attention")

    def as_tensor(memory: Any, device: str) -> Tensor:
        assert device == "cuda"
        found = memory.__cuda_array_interface__
        assert found["version"] == 3
        return Tensor(gpu.array(found["data"][0], found["shape"], found["typestr"]), found["typestr"])

    @contextmanager
    def stream(external: Any) -> Any:
        log.streams.append(external.pointer)
        try:
            yield
        finally:
            log.streams.pop()

    @contextmanager
    def sdpa_kernel(backend: str) -> Any:
        log.backend.append(backend)
        try:
            yield
        finally:
            log.backend.pop()

    @contextmanager
    def graph(made: Any, stream: Any) -> Any:
        assert log.streams[-1] == stream.pointer
        log.graphs.append(made)
        yield

    def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        log.options.append({"backend": log.backend[-1], "stream": log.streams[-1], **options})
        if log.backend[-1] == "FLASH" and q.dtype == "<f4":
            warnings.warn("Flash attention kernel not used because:", stacklevel=1)
            warnings.warn("Expected query, key and value to be half (Triggered internally)", stacklevel=1)
            raise RuntimeError("No available kernel. Aborting execution.")
        assert options.get("enable_gqa", False) == (q.shape[1] != k.shape[1])
        right, beside = 0 if options["is_causal"] else -1, options.get("attn_mask")
        assert beside is None or not options["is_causal"], "torch takes one of both"
        kind = "mask" if beside is not None and beside.dtype == "|b1" else "bias"
        gpu.push(log.streams[-1], lambda: 0.07)
        more = {} if beside is None else {kind: beside.values}
        out, _ = attend(q.values, k.values, v.values, sm_scale=options["scale"], window_right=right, **more)
        rounded = float_from_bf16(bf16_from_float(out)) if q.dtype == "bfloat16" else out.astype(q.values.dtype)
        return Tensor(rounded, q.dtype)

    def flash3(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, softcap: float
    ) -> tuple[Tensor, None]:
        """[batch, sequence, heads, head size]; its package has no kernels for fp16."""
        if q.dtype == "float8_e4m3fn":
            q, k, v = (Tensor(float_from_e4m3(x.values), "bfloat16") for x in (q, k, v))
        if q.dtype != "bfloat16":
            raise RuntimeError("This flash attention build does not support FP16.\nException raised from run_mha_fwd")
        gpu.push(log.streams[-1], lambda: 0.08)
        log.flash3_strides.append(q.values.strides)
        heads_first = [tensor.values.swapaxes(1, 2) for tensor in (q, k, v)]
        mask = {"window_right": 0 if causal else -1}
        out, _ = attend(*heads_first, sm_scale=softmax_scale, softcap=softcap, **mask)
        return Tensor(float_from_bf16(bf16_from_float(out)), q.dtype).transpose(1, 2), None

    def flash3_decoding(q: Tensor, *rest: Any, cache_seqlens: Any = None, **options: Any) -> Tensor:
        """Which takes one query, or how many keys count, and returns no pair."""
        if cache_seqlens is None:
            assert q.values.shape[1] == 1
            return flash3(q, *rest, **options)[0]
        gpu.push(log.streams[-1], lambda: 0.08)
        heads_first = [tensor.values.swapaxes(1, 2) for tensor in (q, *rest)]
        out, _ = attend(*heads_first, sm_scale=options["softmax_scale"], kv_lengths=cache_seqlens.values)
        return Tensor(float_from_bf16(bf16_from_float(out)), q.dtype).transpose(1, 2)

    def flash3_ragged(q: Tensor, k: Tensor, v: Tensor, *ends: Any, softmax_scale: float, causal: bool, softcap: float):  # type: ignore[no-untyped-def]
        """[tokens, heads, head size]; returns no pair."""
        log.ragged.append((q.shape, *(end.values.tolist() for end in ends[:2]), *ends[2:]))
        gpu.push(log.streams[-1], lambda: 0.08)
        lengths = {"cu_seqlens_q": ends[0].values, "cu_seqlens_kv": ends[1].values}
        right = 0 if causal else -1
        out, _ = attend(q.values, k.values, v.values, sm_scale=softmax_scale, window_right=right, **lengths)
        return Tensor(float_from_bf16(bf16_from_float(out)), q.dtype)

    def compiled(function: Any, **options: Any) -> Any:
        log.compiled.append((function.__name__, options))
        return function

    def create_block_mask(mask: Any, *sizes: Any, device: str) -> Any:
        assert device == "cuda"
        return mask

    def flex_attention(q: Tensor, k: Tensor, v: Tensor, score_mod: Any, block_mask: Any, scale: float) -> Tensor:
        gpu.push(log.streams[-1], lambda: 0.09)
        out, _ = attend(q.values, k.values, v.values, sm_scale=scale, score=score_mod, seen=block_mask)
        return Tensor(out.astype(q.values.dtype), q.dtype)

    def replay() -> None:
        gpu.push(log.streams[-1], lambda: 0.06)
        log.replays += 1

    torch.Tensor, torch.float16, torch.bfloat16 = Tensor, "float16", "bfloat16"
    torch.float8_e4m3fn, torch.compile = "float8_e4m3fn", compiled
    torch._dynamo = SimpleNamespace(config=SimpleNamespace(recompile_limit=8))
    torch.log2, torch.floor = np.log2, np.floor
    torch.where = lambda *given: np.where(*given).view(Computed)
    torch.as_tensor = as_tensor
    torch.full_like = lambda tensor, value: Tensor(np.full_like(tensor.values, value), tensor.dtype)
    torch.empty = lambda *shape, device: Tensor(np.empty(shape, np.float32), "float32")
    torch.randn = lambda *shape, device: Tensor(np.zeros((1, 1)), "float32")
    torch.empty_like = lambda tensor: tensor
    torch.mm = lambda a, b, out: gpu.push(log.streams[-1], lambda: 2.0)
    torch.backends = SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 91900))
    torch.cuda = SimpleNamespace(
        is_available=lambda: True, ExternalStream=lambda pointer: SimpleNamespace(pointer=pointer), stream=stream,
        CUDAGraph=lambda: SimpleNamespace(replay=replay), graph=graph, synchronize=gpu.finish_all,
        empty_cache=lambda: None,
    )  # fmt: skip
    attention.sdpa_kernel = sdpa_kernel
    attention.SDPBackend = SimpleNamespace(
        CUDNN_ATTENTION="CUDNN", FLASH_ATTENTION="FLASH", EFFICIENT_ATTENTION="EFFICIENT", MATH="MATH"
    )
    torch.nn = SimpleNamespace(functional=SimpleNamespace(scaled_dot_product_attention=sdpa), attention=attention)
    interface: Any = ModuleType("fa3_fwd_interface")
    interface.flash_attn_func, interface.flash_attn_with_kvcache = flash3, flash3_decoding
    interface.flash_attn_varlen_func = flash3_ragged
    flex: Any = ModuleType("torch.nn.attention.flex_attention")
    flex.flex_attention, flex.create_block_mask = flex_attention, create_block_mask
    monkeypatch.setitem(sys.modules, flex.__name__, flex)
    interface.__spec__ = ModuleSpec(interface.__name__, None)
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    for name, module in (("torch", torch), ("torch.nn", torch.nn), ("torch.nn.attention", attention)):
        monkeypatch.setitem(sys.modules, name, module)
    return log
