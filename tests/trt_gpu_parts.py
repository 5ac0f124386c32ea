"""What ``trt_gpu.py`` is made of: a report, plugins as an execution context has them, guarded memory, loops in C."""

import ctypes
import functools
import gc
import json
import math
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from trt_double import BUILD, FLOAT32, INT32, RUNTIME, Calls, Field, Tensor
from trt_double.vtable import RealCalls, pointers

import pyfmha.trt
from pyfmha.attention.reference import attention_float64, relative_error
from pyfmha.attention.run import random_inputs, to_float
from pyfmha.bfloat16 import STORAGE
from pyfmha.errors import PyfmhaError
from pyfmha.runtime.device import Device, DeviceArray, Stream
from pyfmha.trt.tables import descs_of

TYPE_IDS = {"fp32": 0, "fp16": 1, "bf16": 7}
"""``int(trt.DataType)``."""

CALL_MANY = Path(__file__).parent / "trt_double" / "call_many.c"
_RUNTIME_PART, _ON_SHAPE_CHANGE, _ENQUEUE = 3, 5, 6  # position of IPluginV3OneRuntime, slots of its functions
_GUARD, _PATTERN = 256, 0xA5
_SILENCE = 5.0  # seconds without a line, after which there is one about progress


class Report:
    """Checks as they are made, printed at once, and what was measured.

    Args:
        path: JSON file, written after each check, each part and each line about progress: a kill loses little.
        about: what everything is measured on and with.

    Attributes:
        results: what goes to the JSON file; ``passed`` there means that it is finished, too.
    """

    def __init__(self, path: Path | None = None, **about: Any) -> None:
        self._path = path
        self._start = self._spoken = time.monotonic()
        self._end, self._stopped = math.inf, False
        self.results: dict[str, Any] = {**about, "checks": [], "skipped": [], "parts": {}, "finished": False}

    @contextmanager
    def part(self, name: str, seconds: float) -> Iterator[None]:
        """A block that has so much time, whose exceptions are failed checks; writes the file at its end."""
        begun = self.seconds()
        self._end, self._stopped = begun + seconds, False
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.check(name, False, repr(error))
        if self._stopped:
            self.check(f"{name}: all of it within {seconds:.0f} s", False, "stopped before its end")
        self._end = math.inf
        self.results["parts"][name] = round(self.seconds() - begun, 1)
        self.save()

    def late(self) -> bool:
        """Whether the part's time is over: it is to stop then, which is a failed check of its own."""
        over = self.seconds() > self._end
        self._stopped |= over
        return over

    def progress(self, text: str) -> None:
        """Say how far it is, if nothing was said for some seconds: a hang is seen by silence."""
        if time.monotonic() - self._spoken >= _SILENCE:
            self.line(f"...  {self.seconds():6.1f}s  {text}")
            self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self.results |= {"seconds": round(self.seconds(), 1), "passed": self.results["finished"] and self.passed}
        if self._path is not None:
            written = self._path.with_name(f"{self._path.name}.part")
            written.write_text(json.dumps(self.results, indent=1) + "\n")
            written.replace(self._path)

    def check(self, name: str, passed: bool, detail: object = "") -> None:
        """Record a check."""
        self.results["checks"].append({"name": name, "passed": bool(passed), "detail": str(detail)})
        self.line(f"{'ok  ' if passed else 'FAIL'} {self.seconds():6.1f}s  {name}  {detail}")
        self.save()

    def skip(self, name: str, reason: str) -> None:
        """Record a check that cannot be made here."""
        self.results["skipped"].append({"name": name, "reason": reason})
        self.line(f"skip {self.seconds():6.1f}s  {name}: {reason}")

    def line(self, text: str) -> None:
        """Print a line at once."""
        self._spoken = time.monotonic()
        print(text, flush=True)

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    @property
    def passed(self) -> bool:
        """Whether every check made was passed."""
        return all(entry["passed"] for entry in self.results["checks"])


@functools.lru_cache(maxsize=64)
def random_case(dtype: str, shape: tuple[int, int, int, int], causal: bool, seed: int) -> tuple[Any, Any]:
    """Random Q, K, V and what attention of them is in float64, with the scale 1 / sqrt(head size)."""
    inputs = random_inputs(dtype, shape, seed)
    exact = attention_float64(*(to_float(x, dtype) for x in inputs), sm_scale=shape[3] ** -0.5, causal=causal).out
    return inputs, exact


def error_of(out: Any, dtype: str, exact: Any) -> float:
    """Relative error of an output in its storage type."""
    return relative_error(to_float(out, dtype), exact)


def last_error() -> PyfmhaError:
    """What the plugin raised inside the binding's call that just failed."""
    failure = pyfmha.trt.last_failure()
    assert failure is not None, "a call failed without a failure of the plugin"
    return failure.error


class Attached:
    """A plugin of an execution context: created by the registry's creator, serialised, loaded, attached, with a tactic.

    Attributes:
        plugin: the binding's object.
        tactics: the ids that it offers.
    """

    def __init__(
        self, calls: Calls, creator: Any, dtype: str, heads: int, size: int, causal: bool, tactic: int = 0
    ) -> None:
        self.calls, self.dtype, self.heads, self.size, self.causal = calls, dtype, heads, size, causal
        self.scale = 1 / math.sqrt(size)
        numbers = {"num_heads": heads, "head_size": size, "type_id": TYPE_IDS[dtype], "causal": int(causal)}
        fields = [Field(name, INT32, 1, np.int32(value).tobytes()) for name, value in numbers.items()]
        fields.append(Field("softmax_scale", FLOAT32, 1, np.float32(self.scale).tobytes()))
        layer = f"{dtype} d{size}"
        built = calls.create(creator, layer, fields, BUILD)
        gc.collect()  # what the plugin does not keep is gone when the engine is written
        stored = calls.stored_fields(built)
        assert stored is not None
        loaded = calls.create(creator, layer, stored.read(), RUNTIME)
        self.tactics = calls.tactics(loaded) or []
        self.plugin: Any = calls.attach(loaded)
        assert self.plugin is not None
        assert calls.set_tactic(self.plugin, tactic) == 0
        self._kept = built, loaded

    def shape(self, batch: int, seq: int) -> tuple[int, int, int, int]:
        """Of each tensor."""
        return batch, self.heads, seq, self.size

    def tensors(self, batch: int, seq: int) -> list[Tensor]:
        """Q, K, V and Out."""
        return [Tensor(self.shape(batch, seq), TYPE_IDS[self.dtype])] * 4

    def prepare(self, batch: int, seq: int) -> None:
        """``on_shape_change``; raises what it raised."""
        tensors = self.tensors(batch, seq)
        if self.calls.on_shape_change(self.plugin, tensors[:3], tensors[3:]):
            raise last_error()

    def workspace_bytes(self, batch: int, seq: int) -> int:
        """``get_workspace_size``."""
        tensors = self.tensors(batch, seq)
        return self.calls.workspace(self.plugin, tensors[:3], tensors[3:])

    def enqueue(self, inputs: list[int], out: int, workspace: int, stream: int) -> None:
        """Launch; raises what ``enqueue`` raised."""
        if self.calls.enqueue(self.plugin, inputs, [out], workspace, stream):
            raise last_error()

    def prepared_enqueue(self, inputs: list[int], out: int, workspace: int, stream: int) -> Callable[[], int]:
        """A function that enqueues and returns the status; on a double and on a real binding."""
        made: Callable[[], int] = self.calls.prepared_enqueue(self.plugin, inputs, [out], workspace, stream)
        return made

    def close(self) -> None:
        """Give the loaded code back."""
        self.plugin.destroy()


class Guarded:
    """Device memory with guard bytes on both sides, ``shift`` bytes past a multiple of 256."""

    def __init__(self, nbytes: int, shift: int = 0) -> None:
        self._begin, self._nbytes = _GUARD + shift, nbytes
        self._array = DeviceArray((2 * _GUARD + shift + nbytes,), np.uint8)
        self._array.fill(_PATTERN)

    @classmethod
    def of(cls, values: Any, shift: int = 0) -> "Guarded":
        """A copy of a host array."""
        made = cls(values.nbytes, shift)
        made._array.write(values, made._begin)
        return made

    @property
    def pointer(self) -> int:
        """Where the part between the guards begins."""
        return self._array.pointer + self._begin

    def read(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """The part between the guards."""
        return self._array.read(self._begin, shape, dtype)

    def intact(self) -> bool:
        """Whether the guards are as they were."""
        end = self._begin + self._nbytes
        guards = [(0, self._begin), (end, self._array.nbytes - end)]
        return all((self._array.read(at, (count,), np.uint8) == _PATTERN).all() for at, count in guards)

    def free(self) -> None:
        """Give it back."""
        self._array.free()


def run_once(
    attached: Attached, batch: int, seq: int, seed: int, device: Device, stream: Stream, misaligned: bool = False
) -> tuple[float, bool]:
    """One launch for a shape on random input: its error against float64, and whether no byte outside was written.

    Misaligned: Q begins one element past a multiple of 256 bytes.
    """
    shape = attached.shape(batch, seq)
    arrays, exact = random_case(attached.dtype, shape, attached.causal, seed)
    attached.prepare(batch, seq)
    q, k, v = arrays
    inputs = [Guarded.of(q, q.itemsize if misaligned else 0), Guarded.of(k), Guarded.of(v)]
    out, workspace = Guarded(q.nbytes), Guarded(attached.workspace_bytes(batch, seq))
    everything = [*inputs, out, workspace]
    try:
        device.synchronize()  # the stream does not wait for the copies
        attached.enqueue([memory.pointer for memory in inputs], out.pointer, workspace.pointer, stream.handle)
        stream.synchronize()
        error = error_of(out.read(shape, STORAGE[attached.dtype]), attached.dtype, exact)
        return error, all(memory.intact() for memory in everything)
    finally:
        for memory in everything:
            memory.free()


class Loops:
    """``call_many.c``, compiled into a folder: the host's time for a call through a real binding, from C.

    Each result is the best of some rounds, in microseconds; ``between`` is called after each, to empty the queue.
    """

    def __init__(self, folder: Path, between: Callable[[], object]) -> None:
        from pyfmha.aot.c_compiler import find_compiler

        path = folder / "call_many.so"
        options = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
        subprocess.run([*find_compiler(), *options, str(CALL_MANY), "-o", str(path)], check=True)
        self._c = ctypes.CDLL(str(path))  # releases the GIL: TensorRT does not hold it either
        self._between = between
        for name in ("enqueue_many", "shape_change_many", "launch_many"):
            getattr(self._c, name).restype = ctypes.c_double

    def _best(self, name: str, *arguments: Any, count: int = 200, rounds: int = 60) -> float:
        times = []
        for _ in range(rounds):
            times.append(float(getattr(self._c, name)(*arguments, count)))
            self._between()
        if min(times) < 0:
            raise last_error()
        return min(times)

    def enqueue(self, plugin: Any, inputs: list[int], out: int, workspace: int, stream: int) -> float:
        """``enqueue`` of a real binding's object."""
        sources, targets = (ctypes.c_void_p * 3)(*inputs), (ctypes.c_void_p * 1)(out)
        function, this = _virtual(plugin, _ENQUEUE)
        descs = descs_of([Tensor((1,) * 4)] * 4)
        return self._best(
            "enqueue_many", function, this, descs, sources, targets, _address(workspace), _address(stream)
        )

    def shape_change(self, plugin: Any, first: list[Tensor], second: list[Tensor]) -> float:
        """``on_shape_change`` of a real binding's object, by turns to two shapes."""
        function, this = _virtual(plugin, _ON_SHAPE_CHANGE)
        return self._best("shape_change_many", function, this, descs_of(first), descs_of(second))

    def launch(self, function: Any, packed: bytes) -> float:
        """``X_packed`` of the launch library, without Python."""
        return self._best("launch_many", ctypes.cast(function.launch_packed, ctypes.c_void_p), packed)


def _address(value: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(value)


def _virtual(plugin: Any, slot: int) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """A virtual function of a plugin's IPluginV3OneRuntime, and the object to call it with."""
    this = pointers(plugin, 4)[_RUNTIME_PART]
    table = ctypes.cast(ctypes.cast(this, ctypes.POINTER(ctypes.c_void_p))[0], ctypes.POINTER(ctypes.c_void_p))
    return ctypes.c_void_p(table[slot]), ctypes.c_void_p(this)


def is_real(calls: Calls) -> bool:
    """Whether the calls go through a real binding's C++ code."""
    return isinstance(calls, RealCalls)
