"""The rows that need PyTorch: its attention backends (cuDNN and others) and the first kernel by Triton's JIT.

Torch sees the very inputs that ours read, and launches on the same stream. Nothing here imports it before a row asks.
"""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from pyfmha.attention.first import KERNEL, kernel_path
from pyfmha.attention.tiles import tile_for
from pyfmha.bench.cells import Cell
from pyfmha.bench.clock import Clock
from pyfmha.bench.inputs import DeviceInputs
from pyfmha.bench.ours import first_kernel_serves
from pyfmha.bench.protocol import Floats, MissingError, refuse
from pyfmha.bfloat16 import STORAGE
from pyfmha.runtime.device import Stream
from pyfmha.spec.advice import install_command

BACKENDS = {
    "cudnn": ("CUDNN_ATTENTION", "torch, cuDNN"),
    "flash": ("FLASH_ATTENTION", "torch, FlashAttention-2"),
    "efficient": ("EFFICIENT_ATTENTION", "torch, memory-efficient"),
    "math": ("MATH", "torch, math"),
}

MOST_SCORES = 8 << 30
"""Bytes of the scores up to which the math backend, which keeps all of them several times, is asked."""

MATMUL = 8192
"""Rows, columns and depth of the product that stands for what the tensor cores reach."""


def find_torch() -> Any:
    """The module; raises MissingError where it is not installed or sees no GPU."""
    try:
        import torch
    except ImportError:
        raise MissingError("torch is not installed: pip install torch") from None
    if not torch.cuda.is_available():
        raise MissingError("this torch sees no GPU")
    return torch


class _DeviceMemory:
    """Memory of ours as torch takes it over: the CUDA array interface, version 3, which has no bfloat16."""

    def __init__(self, pointer: int, shape: tuple[int, ...], dtype: str) -> None:
        plain = {"bf16": np.int16, "int32": np.int32, "bool": np.bool_}
        kind = np.dtype(plain.get(dtype) or STORAGE[dtype]).str
        self.__cuda_array_interface__ = {"shape": shape, "typestr": kind, "data": (pointer, False), "version": 3}


def tensors_of(torch: Any, inputs: DeviceInputs) -> list[list[Any]]:
    """Q, K and V of each set, [batch, heads, sequence, head size], as torch's tensors on the same memory."""
    cell = inputs.cell

    def tensor(index: int, name: str) -> Any:
        batch, heads, seq, size = cell.shape(name)
        shape = (batch, heads, seq, size) if cell.layout == "bhsd" else (batch, seq, heads, size)
        found = _tensor(torch, inputs.pointer(index, name), shape, cell.dtype_of(name))
        return found if cell.layout == "bhsd" else found.transpose(1, 2)

    return [[tensor(index, name) for name in "QKV"] for index in range(inputs.count)]


def extras_of(torch: Any, inputs: DeviceInputs) -> dict[str, Any]:
    """What the cell has beside Q, K and V by name, as torch's tensors on the same memory."""
    kinds = {"bias": inputs.cell.dtype, "mask": "bool", "seen": "bool"}
    found = {}
    for name, array in inputs.extra.items():
        kind = kinds.get(name, "int32" if array.dtype == np.int32 else "fp32")
        found[name] = _tensor(torch, array.pointer, array.shape, kind)
    return found


def _tensor(torch: Any, pointer: int, shape: tuple[int, ...], kind: str) -> Any:
    found = torch.as_tensor(_DeviceMemory(pointer, shape, kind), device="cuda")
    views = {"bf16": "bfloat16", "e4m3": "float8_e4m3fn"}
    return found.view(getattr(torch, views[kind])) if kind in views else found


class PreparedTorch:
    """A call of torch; see :class:`pyfmha.bench.protocol.Prepared`.

    Args:
        torch: the module.
        stream: where it launches.
        call: computes a set of inputs and returns Out, [batch, heads, sequence, head size].
        inputs: the sets.
        settings: makes a context that the calls need.
    """

    variant, shift = "", 0

    def __init__(
        self, torch: Any, stream: Stream, call: Callable[[int], Any], inputs: DeviceInputs,
        settings: Callable[[], AbstractContextManager[Any]],
    ) -> None:  # fmt: skip
        self.stream, self.sets, self._call, self._torch = stream, inputs.count, call, torch
        self._cell = inputs.cell
        self._external = torch.cuda.ExternalStream(stream.handle)
        self._settings = settings
        self._graph: Any = None
        self._out: Any = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Our stream is torch's current one, and the backend is chosen: neither is part of a launch."""
        with self._torch.cuda.stream(self._external), self._settings():
            yield

    def launch(self, index: int) -> None:
        """Queue it."""
        self._out = self._call(index)

    def rows(self, batch: int, head: int, rows: list[int]) -> Floats:
        """See the protocol."""
        batch, rows = self._cell.place(batch, rows)
        found: Floats = self._out[batch, head, rows].double().cpu().numpy()
        return found

    def capture(self) -> Callable[[], object]:
        """See the protocol."""
        self._graph = self._torch.cuda.CUDAGraph()
        with self._settings(), self._torch.cuda.graph(self._graph, stream=self._external):
            self._out = self._call(0)

        return self._graph.replay  # type: ignore[no-any-return]

    def close(self) -> None:
        """Give torch's memory back, for the other contenders."""
        self._out = self._graph = None
        self._torch.cuda.synchronize()
        self._torch.cuda.empty_cache()


class Sdpa:
    """``torch.nn.functional.scaled_dot_product_attention`` by one backend.

    Args:
        key: of :data:`BACKENDS`.
        stream: where to launch.
    """

    strictness = 10.0
    """Others may round more than ours: the math backend keeps the weights in 16 bits."""

    def __init__(self, key: str, stream: Stream) -> None:
        self.key = key
        self._backend, self.title = BACKENDS[key]
        self._stream = stream

    def prepare(self, cell: Cell, inputs: DeviceInputs) -> PreparedTorch:
        """See the protocol."""
        torch = find_torch()
        refuse(cell, "torch's scaled_dot_product_attention", "kv_lengths", "bias", "mask", "values")
        if cell.softcap:
            raise MissingError("torch's scaled_dot_product_attention has no soft cap")
        from torch.nn.attention import SDPBackend, sdpa_kernel

        scores = 2 * cell.batch * cell.heads * cell.seq * cell.kv_seq
        if self.key == "math" and scores > MOST_SCORES:
            raise MissingError(f"left out: its scores take {scores / 2**30:.0f} GiB")
        tensors = tensors_of(torch, inputs)
        attention = torch.nn.functional.scaled_dot_product_attention
        options: dict[str, Any] = {"is_causal": cell.causal, "scale": cell.sm_scale}
        if cell.heads != cell.kv_heads:
            options["enable_gqa"] = True
        added = extras_of(torch, inputs)
        beside = [name for name in ("seen", "bias", "mask") if name in added]
        if beside:  # of key lengths, causal is in the mask
            options |= {"attn_mask": added[beside[0]], "is_causal": False}

        def call(index: int) -> Any:
            return attention(*tensors[index], **options)

        prepared = PreparedTorch(
            torch, self._stream, call, inputs, lambda: sdpa_kernel(getattr(SDPBackend, self._backend))
        )
        with _explained(), prepared.active():
            prepared.launch(0)
        return prepared


@contextmanager
def nothing() -> Iterator[None]:
    """No setting."""
    yield


@contextmanager
def _explained() -> Iterator[None]:
    """Torch's error for a backend that does not serve a problem says nothing; its warnings say why."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except RuntimeError as error:
            said = [str(warning.message).splitlines()[0] for warning in caught]
            why = [line for line in said if "not used because" not in line and "disabled" not in line]
            raise MissingError(why[0] if why else (str(error).splitlines() or ["torch failed"])[0]) from error


class Jit:
    """The first kernel, compiled and launched by Triton at run time."""

    key, title, strictness = "jit", "first kernel, Triton JIT", 1.0

    def __init__(self, stream: Stream, arch: str) -> None:
        self._stream, self._arch = stream, arch

    def prepare(self, cell: Cell, inputs: DeviceInputs) -> PreparedTorch:
        """See the protocol."""
        torch = find_torch()
        if importlib.util.find_spec("triton") is None:
            raise MissingError(f"triton is not installed: {install_command('aot')}")
        member = first_kernel_serves(cell)
        tile = tile_for(cell.dtype, cell.head_size, self._arch, cell.causal, member.precision)
        kernel = _load_kernel()
        tensors = tensors_of(torch, inputs)
        rows = cell.batch * cell.heads
        out = torch.full_like(tensors[0][0], float("nan"))
        row_sum, row_max = (torch.empty(rows, cell.seq, device="cuda") for _ in range(2))
        grid = (-(-cell.seq // tile.block_m), min(rows, 65535), -(-rows // 65535))
        constants = {
            "BLOCK_M": tile.block_m, "BLOCK_DMODEL": cell.head_size, "BLOCK_N": tile.block_n, "CAUSAL": cell.causal,
            "PRECISION": member.precision, "num_warps": tile.num_warps, "num_stages": tile.num_stages,
        }  # fmt: skip
        numbers = (cell.sm_scale, cell.batch, cell.heads, cell.seq)

        def call(index: int) -> Any:
            kernel[grid](out, row_sum, row_max, *tensors[index], *numbers, **constants)
            return out

        torch.cuda.synchronize()
        return PreparedTorch(torch, self._stream, call, inputs, nothing)


def _load_kernel() -> Any:
    found = importlib.util.spec_from_file_location("fmha_triton", kernel_path())
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return getattr(module, KERNEL)


def matmul_tflops(clock: Clock, dtype: str) -> float:
    """10**12 operations a second of a product of two random square matrices of :data:`MATMUL`, by torch.

    Raises:
        MissingError: there is no torch.
        RuntimeError: it failed.
    """
    torch = find_torch()
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    external = torch.cuda.ExternalStream(clock.stream.handle)
    with torch.cuda.stream(external):
        a, b = (torch.randn(MATMUL, MATMUL, device="cuda").to(kind) for _ in range(2))
        multiply = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
        clock.cold_us(multiply, clock.stream, 3)
        times = sorted(clock.cold_us(multiply, clock.stream, 15))
        del a, b, multiply
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return 2 * MATMUL**3 / times[len(times) // 2] / 1e6
