"""The part of a GPU that ``fake_cuda.c`` lacks: memory, streams, events, graphs, and what the kernel computes.

Device memory is host memory, but work on a stream waits, in order, until somebody waits for it: who reads before, reads
garbage. Contexts, modules and launches are ``fake_cuda.c``'s; a launch is taken from its records, and its effect on
memory is computed by :func:`emulated_attention` (numpy, float32) from the very arguments that reached the driver,
*not* by the kernel, unless ``FAKE_GPU_KERNEL=interpreter``, which runs the first kernel's source under Triton's
interpreter. ``FAKE_GPU_KERNEL=wrong`` makes Out wrong by 1 %, ``wrong_lse`` Lse by 0.01. Times are made up.
"""

import ctypes
import json
import os
import re
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fake_cuda import FakeCuda, Launch

from pyfmha.attention import biased, fp8
from pyfmha.attention.biased import Biased
from pyfmha.attention.decode import Decode
from pyfmha.attention.first import Attention
from pyfmha.attention.forward import ARGUMENTS, Forward
from pyfmha.attention.fp8 import DESCALES, Fp8
from pyfmha.attention.reference import attend
from pyfmha.attention.run import attention_on_cpu, to_float, to_storage
from pyfmha.bfloat16 import STORAGE
from pyfmha.e4m3 import float_from_e4m3
from pyfmha.runtime.find import library_path

SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, INVALID_HANDLE, ILLEGAL_ADDRESS = 0, 1, 2, 400, 700
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 900, 901
GARBAGE = 0xA5
MEMORY = 1 << 32
KERNEL_MS, COPY_MS = 0.05, 0.01

Work = Callable[[], float]
"""Does something and says how many milliseconds it took."""


Formulas = Callable[[Callable[..., Any], dict[str, Any]], dict[str, Any]]
"""Gives ``score`` and ``seen`` of the reference from memory and the arguments of a launch."""


class Fault(Exception):
    """What a GPU answers with an illegal-address error."""


@dataclass(frozen=True)
class Kernel:
    """What a piece of machine code is, by its library's manifest."""

    member: Attention | Forward | Biased | Fp8 | Decode
    combines: bool = False  # the second of decoding's two
    function: str = ""  # the user's, where it is one with a function
    arguments: tuple[tuple[str, str], ...] = ()  # of that


def emulated_attention(q: Any, k: Any, v: Any, scale: float, causal: bool) -> tuple[Any, Any, Any]:
    """Out, L and M in float32: whole matrices at once, not the way of :mod:`pyfmha.attention.reference`."""
    q, k, v = (np.asarray(x, np.float32) for x in (q, k, v))
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) * np.float32(scale)
    if causal:
        scores = scores + np.triu(np.full(scores.shape[-2:], -np.inf, np.float32), 1)
    row_max = scores.max(-1)
    weights = np.exp(scores - row_max[..., None])
    row_sum = weights.sum(-1)
    return np.einsum("bhqk,bhkd->bhqd", weights, v) / row_sum[..., None], row_sum, row_max


def _given(launch: Launch, arguments: Sequence[tuple[str, str]] = ARGUMENTS) -> dict[str, Any]:
    """The arguments by name."""
    kinds = ["Q" if kind.startswith("*") else {"fp32": "f", "i32": "i", "i64": "q"}[kind] for _, kind in arguments]
    values = [struct.unpack(f"<{kind}", raw[: struct.calcsize(kind)])[0] for kind, raw in zip(kinds, launch.params)]  # noqa: B905
    return dict(zip((name for name, _ in arguments), values, strict=True))


def _workspace(memory: Callable[..., Any], given: dict[str, Any], padded: int) -> tuple[Any, Any, Any, Any]:
    """Partial [queries, splits, padded head size] of decoding; of Statistics, maxima and sums [queries, splits], and
    factors [queries].
    """
    splits, queries = given["ragged"], given["batch_size"] * given["num_heads"] * given["q_len"]
    partial = memory(given["cu_seqlens_q"], (queries, splits, padded), np.float32)
    statistics = memory(given["cu_seqlens_kv"], ((2 * splits + 1) * queries,), np.float32)
    maxima, sums = statistics[: 2 * splits * queries].reshape(2, queries, splits)
    return partial, maxima, sums, statistics[2 * splits * queries :]


def emulated_split(memory: Callable[..., Any], launch: Launch, member: Decode) -> None:
    """What ``fmha_split_*`` writes, but that every part has an equal share of the result."""
    given = _given(launch)
    partial, maxima, sums, factors = _workspace(memory, given, member.padded)
    splits, size = given["ragged"], given["head_size"]
    given |= {"cu_seqlens_q": 0, "cu_seqlens_kv": 0, "ragged": 0}
    _, exact, lse = _computed(memory, given, member.dtype)
    flat = exact.reshape(-1, size)
    empty = np.isneginf(lse.reshape(-1))
    partial[:, :, size:] = np.nan  # not to be read
    partial[:, :, :size] = flat[:, None] / splits
    maxima[...] = np.where(empty, -1e30, lse.reshape(-1))[:, None]
    sums[...] = np.where(empty, 0, 1 / splits)[:, None]
    factors[...] = 1.0


def emulated_combine(memory: Callable[..., Any], launch: Launch, member: Decode) -> None:
    """What ``fmha_combine_*`` makes of what :func:`emulated_split` writes, and of nothing else."""
    given = _given(launch)
    partial, maxima, sums, _ = _workspace(memory, given, member.padded)
    size = given["head_size"]
    given["ragged"] = 0  # where the number of parts was
    shape = given["batch_size"], given["num_heads"], given["q_len"]
    out = _tensor(memory, given, "Out", given["num_heads"], given["q_len"], member.dtype)
    out[...] = to_storage(partial[:, :, :size].sum(1).reshape(*shape, size), member.dtype)
    if given["Lse"]:
        lse = np.where(sums.sum(1) > 0, maxima.max(1), -np.inf)
        memory(given["Lse"], shape, np.float32)[...] = lse.reshape(shape)


def emulated_forward(
    memory: Callable[..., Any],
    launch: Launch,
    dtype: str,
    arguments: Sequence[tuple[str, str]] = ARGUMENTS,
    formulas: Formulas | None = None,
) -> None:
    """What ``fmha_fwd_*``, ``fmha_biased_*`` or ``fmha_fp8_*`` writes, by the reference, from the arguments that
    reached the driver.

    Args:
        memory: gives the array at an address.
        launch: with the kernel's parameters.
        dtype: of Out, and of Q, K and V unless these are of e4m3.
        arguments: the function's.
        formulas: what a user's function is.
    """
    given = _given(launch, arguments)
    out, exact, lse = _computed(memory, given, dtype, {} if formulas is None else formulas(memory, given))
    mode = os.environ.get("FAKE_GPU_KERNEL")
    exact, lse = exact * (1.01 if mode == "wrong" else 1.0), lse + (0.01 if mode == "wrong_lse" else 0.0)
    out[...] = to_storage(exact.transpose(1, 0, 2)[None] if given["ragged"] else exact, dtype)
    if given["Lse"]:
        memory(given["Lse"], lse.shape, np.float32)[...] = lse


def _tensor(memory: Callable[..., Any], given: dict[str, Any], name: str, heads: int, rows: int, dtype: str) -> Any:
    """[batch, heads, rows, head size] through the strides; one batch where it is ragged."""
    steps = [given[f"{name.lower()}_stride_{axis}"] for axis in "bhs"]
    size = given.get("v_head_size", given["head_size"]) if name in ("V", "Out") else given["head_size"]
    shape = (1 if given["ragged"] else given["batch_size"], heads, rows, size)
    storage = np.uint8 if name != "Out" and "q_descale_stride_b" in given else STORAGE[dtype]
    return _strided(memory, given[name], shape, [*steps, 1], storage)


def _numbers(memory: Callable[..., Any], given: dict[str, Any], name: str, tensor: Any, dtype: str) -> Any:
    """Q, K or V, times its factor."""
    if "q_descale_stride_b" not in given:
        return to_float(np.ascontiguousarray(tensor), dtype)
    exact, factor = float_from_e4m3(tensor), DESCALES["QKV".index(name)]
    if not given[factor]:
        return exact
    batch, heads = (tensor.shape[0], given["num_kv_heads"])
    steps = [given[f"{factor}_stride_{axis}"] for axis in "bh"]
    factors = _strided(memory, given[factor], (batch, heads), steps, np.float32)
    return exact * np.repeat(factors, tensor.shape[1] // heads, 1)[:, :, None, None]


def _strided(memory: Callable[..., Any], address: int, shape: Sequence[int], steps: Sequence[int], dtype: Any) -> Any:
    last = sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) if all(shape) else -1
    flat = memory(address, (last + 1,), dtype)
    return np.lib.stride_tricks.as_strided(flat, shape, [flat.itemsize * step for step in steps])


def _beside(memory: Callable[..., Any], given: dict[str, Any], dtype: str, lengths: dict[str, Any]) -> dict[str, Any]:
    """Bias, mask and sinks, where there are any, as the reference takes them."""
    seen = [given["q_len"], given["kv_len"]]
    if given["ragged"]:
        seen = [max(np.diff(lengths[name])) for name in ("cu_seqlens_q", "cu_seqlens_kv")]
    shape = given["batch_size"], given["num_heads"], *seen
    found = {}
    for argument, kind in (
        ("Bias", dtype),
        ("BiasFp32", "fp32"),
        ("Mask", ""),
        ("Sinks", dtype),
        ("SinksFp32", "fp32"),
    ):
        if not given.get(argument):
            continue
        name = argument.removesuffix("Fp32").lower()
        storage = STORAGE[kind] if kind else np.dtype(np.bool_)
        sizes, steps = shape, [given.get(f"{name}_stride_{axis}") for axis in "bhqk"]
        if name == "sinks":
            sizes, steps = shape[1:2], [1]
        array = np.ascontiguousarray(_strided(memory, given[argument], sizes, steps, storage))
        found[name] = to_float(array, kind) if kind else array
    return found


def _computed(
    memory: Callable[..., Any], given: dict[str, Any], dtype: str, formulas: dict[str, Any] | None = None
) -> tuple[Any, Any, Any]:
    """Out's memory, and what Out and Lse should be."""
    batch, ragged = given["batch_size"], given["ragged"]

    def tensor(name: str, heads: int, rows: int) -> Any:
        return _tensor(memory, given, name, heads, rows, dtype)

    heads, kv_heads = given["num_heads"], given["num_kv_heads"]
    q = tensor("Q", heads, given["q_len"])
    k, v = (tensor(name, kv_heads, given["kv_len"]) for name in "KV")
    out = tensor("Out", heads, given["q_len"])
    lengths = {
        name: memory(given[name], (batch + ragged,), np.int32).tolist()
        for name in ("q_lengths", "kv_lengths", "cu_seqlens_q", "cu_seqlens_kv")
        if given[name]
    }
    numbers = [_numbers(memory, given, name, x, dtype) for name, x in zip("QKV", (q, k, v), strict=True)]
    if ragged:
        numbers = [x[0].transpose(1, 0, 2) for x in numbers]
    exact, lse = attend(
        *numbers, sm_scale=given["sm_scale"], softcap=given["softcap"], window_left=given["window_left"],
        window_right=given["window_right"], bottom_right=bool(given["bottom_right"]), **lengths,
        **_beside(memory, given, dtype, lengths), **(formulas or {}),
    )  # fmt: skip
    return out, exact, lse


class Gpu:
    """One process's fake GPU memory and queues."""

    def __init__(self, path: Path) -> None:
        self.cuda = FakeCuda(path)
        self.lock = threading.RLock()
        self.memory: dict[int, tuple[Any, int]] = {}
        self.owners: dict[int, int | None] = {}  # of memory and streams, the context that they go with
        self.streams: dict[int, list[Work]] = {}
        self.captures: dict[int, list[Work]] = {}
        self.capturing: dict[int, int] = {}  # by stream, the thread
        self.broken: set[int] = set()
        self.graphs: dict[int, list[Work]] = {}
        self.events: dict[int, float | None] = {}
        self.clock = 0.0
        self.error = SUCCESS  # of the process: after a fault on one device none of them works, as two H200 showed
        self._launches = 0
        self._handles = 0x5000
        self._kernels: dict[str, Kernel] = {}
        self.formulas: dict[str, Formulas] = {}  # of users' functions, by name
        self.replays = 0
        self.visible = [0, 1]  # which of the machine's devices it sees, in its order
        self.retained = 0  # primary contexts, through cuda-python

    def handle(self) -> int:
        self._handles += 16
        return self._handles

    def live(self) -> dict[str, int]:
        """How much of each kind was not given back."""
        return {
            "memory": len(self.memory),
            "streams": len(self.streams),
            "graphs": len(self.graphs),
            "events": len(self.events),
            "modules": self.cuda.modules_loaded(),
            "contexts": self.retained,
        }

    # -------------------------------------------------------------- memory

    def allocate(self, size: int) -> int:
        if size < 1 or size > MEMORY:
            return 0
        block = ctypes.create_string_buffer(bytes([GARBAGE]) * (size + 256), size + 256)
        address = -(-ctypes.addressof(block) // 256) * 256
        self.memory[address] = (block, size)
        context, device = self.current()
        self.owners[address] = context
        self.cuda.set_memory(address, size, device)
        return address

    def free(self, address: int) -> bool:
        """Whether it was an allocation's beginning."""
        self.owners.pop(address, None)
        if self.memory.pop(address, None) is None:
            return False
        self.cuda.set_memory(address, 0)
        return True

    def current(self) -> tuple[int | None, int]:
        """The current context, and the device of it."""
        context, device = ctypes.c_void_p(), ctypes.c_int()
        self.cuda.c.cuCtxGetCurrent(ctypes.byref(context))
        if context.value:
            self.cuda.c.cuCtxGetDevice(ctypes.byref(device))
        return context.value, device.value

    def forget(self, context: int) -> None:
        """A context is destroyed, with its memory, its streams, and the work that waits in them."""
        self.drain()
        for handle in [handle for handle, owner in self.owners.items() if owner == context]:
            self.free(handle)
            if self.streams.pop(handle, None) is not None:
                self.cuda.set_stream(handle, None)
        self.cuda.destroy(context)

    def array(self, address: int, shape: tuple[int, ...], dtype: Any) -> Any:
        """Device memory as an array, if it is all inside one allocation."""
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        for start, (_, length) in self.memory.items():
            if start <= address and address + size <= start + length:
                raw = (ctypes.c_ubyte * size).from_address(address)
                return np.frombuffer(raw, dtype).reshape(shape) if size else np.empty(shape, dtype)
        raise Fault(f"{size} bytes at {address:#x}")

    # -------------------------------------------------------------- queues

    def push(self, stream: int, work: Work) -> int:
        self.drain()
        return self.error or self._push(stream, work)

    def _push(self, stream: int, work: Work) -> int:
        if stream in self.captures:
            self.captures[stream].append(work)
        elif stream in self.streams:
            self.streams[stream].append(work)
        else:
            return INVALID_HANDLE
        return SUCCESS

    def drain(self) -> None:
        """Take over what was launched since."""
        count = self.cuda.launch_count()
        while self._launches < count:
            launch = self.cuda._launch(self._launches)
            self._launches += 1
            if self._push(launch.stream, lambda launch=launch: self._run_kernel(launch)) != SUCCESS:
                raise AssertionError(f"a launch on stream {launch.stream:#x}, which is none of the program's")

    def finish(self, stream: int) -> int:
        """Do all that waits on a stream."""
        self.drain()
        queue = self.streams.get(stream)
        if queue is None:
            return INVALID_HANDLE
        while queue:
            work = queue.pop(0)
            if self.error == SUCCESS:
                try:
                    self.clock += work()
                except Fault:
                    self.lose()
        return self.error

    def lose(self) -> None:
        """As after a fault: everything fails in this process, whatever context is current, until it ends."""
        self.error = ILLEGAL_ADDRESS
        for name in ("cuLaunchKernel", "cuLaunchKernelEx", "cuModuleLoadData"):
            self.cuda.fail(name, ILLEGAL_ADDRESS)

    def finish_all(self) -> int:
        for stream in list(self.streams):
            self.finish(stream)
        return self.error

    def forbidden(self) -> bool:
        """Whether this thread captures, so that waiting and allocating break the capture."""
        mine = {stream for stream, thread in self.capturing.items() if thread == threading.get_ident()}
        self.broken |= mine
        return bool(mine)

    # -------------------------------------------------------------- kernels

    def learn(self, manifest: Path) -> None:
        """Read which machine code of a library is which attention."""
        for function in json.loads(manifest.read_text())["functions"]:
            found = re.fullmatch(
                r"fmha_(fwd_|split_|combine_|biased_|fp8_|with_\w+_)?d(\d+)_(fp16|bf16|fp32)(_tf32)?(_full)?",
                function["name"],
            )
            own = re.fullmatch(r"fmha_with_(\w+)_d(\d+)_(fp16|bf16|fp32)", function["name"])
            if found is None and own is None:
                continue
            kinds = {"fwd_": Forward, "biased_": Biased, "fp8_": Fp8, "split_": Decode, "combine_": Decode}
            if own is not None:
                arguments = tuple((name, kind) for name, kind in function["arguments"])
                known = Kernel(Biased(own[3], int(own[2])), False, own[1], arguments)
            elif found is not None and found[1]:
                known = Kernel(kinds[found[1]](found[3], int(found[2])), found[1] == "combine_")
            elif found is not None:
                first = Attention(found[3], int(found[2]), not found[5], "tf32" if found[4] else "tf32x3")
                known = Kernel(first)
            for algorithm in function["algorithms"]:
                for variant in algorithm:
                    for image in variant["images"]:
                        self._kernels[image["sha256"]] = known

    def _run_kernel(self, launch: Launch) -> float:
        if launch.image_sha256 not in self._kernels:
            self.learn(library_path().with_name("manifest.json"))
        known = self._kernels[launch.image_sha256]
        member = known.member
        if isinstance(member, Decode):
            (emulated_combine if known.combines else emulated_split)(self.array, launch, member)
            return KERNEL_MS
        if isinstance(member, Biased) and known.function:
            formulas = self.formulas.get(known.function)  # one without is taken to change nothing
            emulated_forward(self.array, launch, member.dtype, known.arguments, formulas)
            return KERNEL_MS
        if isinstance(member, Biased | Fp8):
            kind = biased if isinstance(member, Biased) else fp8
            emulated_forward(self.array, launch, member.dtype, kind.ARGUMENTS)
            return KERNEL_MS
        if isinstance(member, Forward):
            emulated_forward(self.array, launch, member.dtype)
            return KERNEL_MS
        numbers = [int.from_bytes(value, "little") for value in launch.params]
        scale = float(np.frombuffer(launch.params[6], np.float32)[0])
        batch, heads, seq = numbers[7:10]
        shape = (batch, heads, seq, member.head_size)
        storage = STORAGE[member.dtype]
        q, k, v = (self.array(address, shape, storage) for address in numbers[3:6])
        out = self.array(numbers[0], shape, storage)
        row_sum, row_max = (self.array(address, (batch, heads, seq), np.float32) for address in numbers[1:3])
        mode = os.environ.get("FAKE_GPU_KERNEL", "numpy")
        if mode == "interpreter":
            result = attention_on_cpu(member, q.copy(), k.copy(), v.copy(), scale)
            out[:] = result.out
            row_sum[:], row_max[:] = (x.reshape(batch, heads, seq) for x in (result.row_sum, result.row_max))
        else:
            values = [to_float(x, member.dtype) for x in (q, k, v)]
            exact, row_sum[:], row_max[:] = emulated_attention(*values, scale, member.causal)
            out[:] = to_storage(exact * (1.01 if mode == "wrong" else 1.0), member.dtype)
        return KERNEL_MS


_current: list[Gpu] = []


def gpu() -> Gpu:
    """This process's, made at first use from the fake driver that ``PYFMHA_LIBCUDA`` names.

    Its devices are sm_90, two of them, or those of ``FAKE_GPU_DEVICES``: compute capabilities with commas between. As
    with the real one, ``CUDA_VISIBLE_DEVICES`` chooses among them and orders them.
    """
    if not _current:
        made = Gpu(Path(os.environ["PYFMHA_LIBCUDA"]))
        made.cuda.reset()
        capabilities = [int(text) for text in os.environ.get("FAKE_GPU_DEVICES", "90,90").split(",") if text]
        order = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(len(capabilities))))
        made.visible = [int(text) for text in order.split(",") if text]
        made.cuda.set_device_count(len(made.visible))
        for device, physical in enumerate(made.visible):
            made.cuda.set_device(device, capabilities[physical])
        _current.append(made)
    return _current[0]


def use(made: Gpu | None) -> None:
    """Make one the process's; None for a new one at the next use."""
    _current[:] = [] if made is None else [made]
