"""What :mod:`two_gpus` is made of: CUDA contexts, attention problems with their float64 results, and plugins to run."""

import ctypes
import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from trt_double import BF16, BUILD, FLOAT32, HALF, INT32, RUNTIME, Field, Tensor
from trt_double.binding import DoubleCalls, make_binding
from trt_double.library_calls import LibraryCalls
from trt_double.vtable import RealCalls

from pyfmha.attention.operator import NAME
from pyfmha.attention.reference import LIMITS, attention_float64, relative_error
from pyfmha.attention.run import random_inputs, to_float
from pyfmha.errors import PyfmhaError
from pyfmha.runtime.device import Device, DeviceArray, Stream, _call
from pyfmha.runtime.libcuda import libcuda
from pyfmha.runtime.library import Library
from pyfmha.trt import register

NUM_HEADS, NUM_KV_HEADS = 8, 2
SCALE = 0.125
Array = np.ndarray[Any, Any]


class Failed(Exception):
    """A check that did not hold."""


class NotRun(Exception):
    """A check that cannot be made here, and why."""


def hold(condition: bool, text: str) -> None:
    """Fail with a text unless a condition holds; an ``assert`` that is not optimised away."""
    if not condition:
        raise Failed(text)


class OwnContext:
    """A context of this program's own on a device, current on this thread: not the primary one that others share."""

    def __init__(self, ordinal: int) -> None:
        _call("cuInit", 0)
        device = _call("cuDeviceGet", ordinal)
        try:
            self.handle = _call("cuCtxCreate", None, 0, device)  # cuda-bindings 13
        except TypeError:
            self.handle = _call("cuCtxCreate", 0, device)  # 12

    def make_current(self) -> None:
        """For this thread."""
        _call("cuCtxSetCurrent", self.handle)

    def close(self) -> None:
        """Destroy it, with everything in it."""
        _call("cuCtxDestroy", self.handle)


def open_context(ordinal: int, *, own: bool) -> "OwnContext | Device":
    """One that is current on this thread: the device's primary one, or a new one."""
    return OwnContext(ordinal) if own else Device(ordinal)


# ------------------------------------------------------------------ problems


@dataclass(frozen=True)
class Problem:
    """What one plugin serves.

    Attributes:
        dtype: of Q, K, V and Out.
        head_size: of all.
        newer: by ``fmha_fwd_*`` with grouped heads and full, not by the first kernel, which is causal here.
    """

    dtype: str
    head_size: int
    newer: bool

    @property
    def function(self) -> str:
        """The main C function."""
        return f"fmha_{'fwd_' if self.newer else ''}d{self.head_size}_{self.dtype}"

    def fields(self) -> list[Field]:
        """Of the plugin's creator."""
        numbers: dict[str, float] = {
            "num_heads": NUM_HEADS,
            "head_size": self.head_size,
            "type_id": HALF if self.dtype == "fp16" else BF16,
            "softmax_scale": SCALE,
            "causal": 0 if self.newer else 1,
        }
        if self.newer:
            numbers["num_kv_heads"] = NUM_KV_HEADS
        return [
            Field(name, FLOAT32, 1, np.float32(value).tobytes())
            if name == "softmax_scale"
            else Field(name, INT32, 1, np.int32(value).tobytes())
            for name, value in numbers.items()
        ]

    def cases(self) -> list["Case"]:
        """Shapes: one tile, several, odd, and few queries over many keys."""
        sizes = [(2, 65, 130), (1, 1, 4096), (3, 128, 128)] if self.newer else [(2, 65, 65), (1, 1, 1), (1, 300, 300)]
        return [_case(self, *size) for size in sizes]


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs of one shape, in two sets, and what comes out.

    Attributes:
        inputs: of each set Q, K and V, in storage type.
        expected: of each set Out, float64.
    """

    problem: Problem
    inputs: tuple[tuple[Array, ...], ...]
    expected: tuple[Array, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """Q, K, V and Out."""
        q, k, v = (array.shape for array in self.inputs[0])
        kind = HALF if self.problem.dtype == "fp16" else BF16
        return [Tensor(tuple(shape), kind, largest=tuple(shape)) for shape in (q, k, v, q)]

    def check(self, out: Array, number: int, what: str, dry: bool) -> None:
        """Compare with float64."""
        if dry:
            return
        error = relative_error(to_float(out, self.problem.dtype), self.expected[number])
        limit = LIMITS[self.problem.dtype]
        hold(error <= limit, f"{what}, {self.problem.function} {out.shape}: relative error {error:.2e}, limit {limit}")


@cache
def _case(problem: Problem, batch: int, queries: int, keys: int) -> Case:
    inputs, expected = [], []
    for number in range(2):
        heads = NUM_KV_HEADS if problem.newer else NUM_HEADS
        q, _, _ = random_inputs(problem.dtype, (batch, NUM_HEADS, queries, problem.head_size), seed=queries + number)
        k, v, _ = random_inputs(problem.dtype, (batch, heads, keys, problem.head_size), seed=keys + 100 + number)
        wide = (to_float(x, problem.dtype).repeat(NUM_HEADS // heads, axis=1) for x in (k, v))
        exact = attention_float64(to_float(q, problem.dtype), *wide, sm_scale=SCALE, causal=not problem.newer)
        inputs.append((q, k, v))
        expected.append(exact.out)
    return Case(problem, tuple(inputs), tuple(expected))


def problems_of(library: Library) -> list[Problem]:
    """Of each function that the library holds for one head size: those that this program knows to drive."""
    found = []
    for newer in (False, True):
        for dtype in ("fp16", "bf16"):
            sizes = [Problem(dtype, size, newer) for size in (64, 128, 32, 256)]
            found += [one for one in sizes if one.function in library][:1]
    return found


# ------------------------------------------------------------------- plugins


@dataclass(frozen=True)
class Kind:
    """A way in which plugins come about: the calls of TensorRT's C++ side, and a creator."""

    name: str
    calls: Any
    creator: Any


def kinds_of(library: Library) -> list[Kind]:
    """The plugin in C through its tables of functions, the one in Python with a double of the binding, and that with
    the real binding where there is one."""
    c = LibraryCalls(library.path)
    double = make_binding()
    found = [
        Kind("C plugin", c, c.named(NAME)),
        Kind("Python plugin", DoubleCalls(double), register(double, namespace="two_gpus", library=library)),
    ]
    try:
        lean = importlib.import_module("tensorrt_lean")
        lean.IPluginV3  # noqa: B018  # not of a double that runs engines only
        if lean.__name__ == "tensorrt_lean" and not os.environ.get("TRT_DOUBLE_VERSION"):
            creator = register(lean, namespace="two_gpus", library=library)
            found.append(Kind("Python plugin, tensorrt_lean", RealCalls(lean), creator))
    except (ImportError, AttributeError, PyfmhaError) as error:
        print(f"without tensorrt_lean: {error}", flush=True)
    return found


class Runner:
    """One plugin of an execution context, brought about as by an engine, in the current CUDA context."""

    def __init__(self, kind: Kind, problem: Problem) -> None:
        self.kind, self.problem = kind, problem
        calls = kind.calls
        built = calls.create(kind.creator, "layer", problem.fields(), BUILD)
        hold(built is not None, f"{kind.name}: {problem} is refused")
        stored = calls.stored_fields(built)
        loaded = calls.create(kind.creator, "layer", stored.read(), RUNTIME)
        self.plugin = calls.attach(loaded)
        hold(self.plugin is not None, f"{kind.name}: attach_to_context failed: {self.error()}")
        hold(calls.set_tactic(self.plugin, 0) == 0, f"{kind.name}: set_tactic failed: {self.error()}")
        self._workspace: DeviceArray | None = None

    def error(self) -> str:
        """What the plugin said last."""
        calls = self.kind.calls
        if isinstance(calls, LibraryCalls):
            return calls.error()
        return "; ".join(getattr(calls, "errors", [])[-1:])

    def prepare(self, case: Case) -> None:
        """Set a shape, with its workspace."""
        calls, tensors = self.kind.calls, case.tensors
        needed = calls.workspace(self.plugin, tensors[:3], tensors[3:])
        if self._workspace is None or self._workspace.nbytes < needed:
            if self._workspace is not None:
                self._workspace.free()
            self._workspace = DeviceArray((max(needed, 1),), np.uint8)
        status = calls.on_shape_change(self.plugin, tensors[:3], tensors[3:])
        hold(status == 0, f"{self.kind.name}: on_shape_change failed: {self.error()}")

    def prepared(self, pointers: Sequence[int], stream: int) -> Any:
        """A function that enqueues and returns the status; ``pointers`` are those of Q, K, V and Out."""
        workspace = 0 if self._workspace is None else self._workspace.pointer
        return self.kind.calls.prepared_enqueue(self.plugin, pointers[:3], pointers[3:], workspace, stream)

    def enqueue(self, pointers: Sequence[int], stream: int) -> None:
        """Launch; fails where the plugin does."""
        hold(self.prepared(pointers, stream)() == 0, f"{self.kind.name}: enqueue failed: {self.error()}")

    def close(self, *, free: bool = True) -> None:
        """As TensorRT destroys it; ``free`` its workspace too, which a destroyed context took with it."""
        if self._workspace is not None and free:
            self._workspace.free()
        if hasattr(self.plugin, "delete"):
            self.plugin.delete()
        else:
            self.plugin.destroy()


class Buffers:
    """Q, K, V and Out of one case on the device, filled and read in a stream's order: nothing waits for other streams,
    which other threads may be capturing."""

    def __init__(self, case: Case, stream: Stream) -> None:
        self.case, self._stream = case, stream
        q, k, v = case.inputs[0]
        self._out = np.full(q.shape, 0xFFFF if q.dtype == np.uint16 else np.nan, q.dtype)
        self.arrays = [DeviceArray(x.shape, x.dtype) for x in (q, k, v, self._out)]
        self.pointers = [array.pointer for array in self.arrays]

    def send(self, number: int) -> None:
        """Write a set of inputs, and NaN into Out."""
        for array, values in zip(self.arrays, (*self.case.inputs[number], self._out), strict=True):
            array.send(values, self._stream)

    def check(self, number: int, what: str, dry: bool) -> None:
        """Wait, and compare Out with float64."""
        got = self.arrays[3].fetch(self._out.shape, self._out.dtype, self._stream)
        self._stream.synchronize()
        self.case.check(got, number, what, dry)

    def close(self) -> None:
        """Free them."""
        for array in self.arrays:
            array.free()


@contextmanager
def buffers_of(case: Case, stream: Stream) -> Iterator[Buffers]:
    """Freed at the end of the block."""
    made = Buffers(case, stream)
    try:
        yield made
    finally:
        made.close()


class Direct:
    """Launches of the first kernel's function, without a plugin, in the current context, where it is loaded first."""

    def __init__(self, library: Library, case: Case, *, load: bool = True) -> None:
        self.function = library[case.problem.function]
        self._loaded = load
        if load:
            self.function.load()
        batch, heads, seq, _ = case.inputs[0][0].shape
        self._sums = [DeviceArray((batch * heads, seq), np.float32) for _ in range(2)]
        self.sizes = (batch, heads, seq)

    def arguments(self, pointers: Sequence[int], stream: int) -> tuple[Any, ...]:
        """Of the function, the stream first."""
        q, k, v, out = pointers
        return (stream, out, *(array.pointer for array in self._sums), q, k, v, SCALE, *self.sizes)

    def launch(self, pointers: Sequence[int], stream: int) -> None:
        """Raises LaunchError."""
        self.function(*self.arguments(pointers, stream))

    def close(self) -> None:
        """Undo the load."""
        for array in self._sums:
            array.free()
        if self._loaded:
            self.function.unload()


def resident_bytes() -> int:
    """Of this process in the host's memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_bytes() -> int:
    """Of the current context's device."""
    return int(_call("cuMemGetInfo")[0])


def device_count() -> int:
    """That this process sees."""
    _call("cuInit", 0)
    return int(_call("cuDeviceGetCount"))


def device_id(ordinal: int) -> str:
    """The same for the same GPU, whatever its number."""
    found = _call("cuDeviceGetUuid", _call("cuDeviceGet", ordinal))
    return bytes(found.bytes if hasattr(found, "bytes") else found).hex()


def may_access(ordinal: int, other: int) -> bool:
    """Whether one device can be let into the other's memory."""
    return bool(_call("cuDeviceCanAccessPeer", *(_call("cuDeviceGet", number) for number in (ordinal, other))))


def access_to(pointer: int) -> str:
    """What the driver says of memory: whose it is, the access flags, and whether kernels of the current context find it
    (cuda-bindings 13.3 reads device 0 for every owner: asked without it)."""
    said = []
    for attribute, name in ((9, "device"), (16, "access flags"), (3, "address for kernels")):
        value = ctypes.c_uint64()
        status = libcuda().cuPointerGetAttribute(ctypes.byref(value), attribute, ctypes.c_uint64(pointer))
        found = "its own" if attribute == 3 and value.value == pointer else value.value
        said.append(f"{name} {found if status == 0 else 'none'}")
    return ", ".join(said)
