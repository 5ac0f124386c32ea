"""Attention on numpy arrays, end to end: through a built library on a GPU, or under Triton's interpreter on the CPU."""

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyfmha.attention.first import KERNEL, Attention, kernel_path
from pyfmha.bfloat16 import STORAGE, bf16_from_float, float_from_bf16
from pyfmha.e4m3 import e4m3_from_float, float_from_e4m3
from pyfmha.errors import SpecError
from pyfmha.interpreter.kernel import Tensor
from pyfmha.interpreter.process import run_in_subprocess
from pyfmha.runtime.device import Device, DeviceArray, Event, Stream, device_arrays
from pyfmha.runtime.library import Function

Array = NDArray[Any]


@dataclass(frozen=True)
class Result:
    """What one attention gave.

    Attributes:
        out: [batch, heads, seq, head size] in the storage type of its dtype.
        row_sum, row_max: float32 [batch * heads, seq]; the kernel's L and M.
        variant: the variant that ran; empty under the interpreter.
        microseconds: median time on the GPU, or None where it was not measured.
    """

    out: Array
    row_sum: Array
    row_max: Array
    variant: str = ""
    microseconds: float | None = None


def to_storage(values: Array, dtype: str) -> Array:
    """Round floats to a dtype, in the type numpy stores it in."""
    if dtype == "e4m3":
        return e4m3_from_float(values)
    return bf16_from_float(values) if dtype == "bf16" else values.astype(STORAGE[dtype])


def to_float(stored: Array, dtype: str) -> Array:
    """The float64 values of stored ones."""
    if dtype == "e4m3":
        return float_from_e4m3(stored).astype(np.float64)
    return (float_from_bf16(stored) if dtype == "bf16" else stored).astype(np.float64)


def random_inputs(dtype: str, shape: tuple[int, int, int, int], seed: int) -> tuple[Array, Array, Array]:
    """Q, K, V: standard normal [batch, heads, seq, head size], in the storage type of a dtype."""
    generator = np.random.default_rng(seed)
    q, k, v = (to_storage(generator.standard_normal(shape, np.float32), dtype) for _ in range(3))
    return q, k, v


def check_inputs(member: Attention, q: Array, k: Array, v: Array) -> tuple[int, int, int]:
    """Batch, heads and seq of inputs that a member of the family serves.

    Raises:
        SpecError: shapes, types or layout do not fit.
    """
    for name, array in (("Q", q), ("K", k), ("V", v)):
        if array.dtype != STORAGE[member.dtype] or array.ndim != 4 or array.shape[3] != member.head_size:
            raise SpecError(
                f"{name} is {array.dtype} {list(array.shape)}; {member.name} takes {np.dtype(STORAGE[member.dtype])}"
                f" [batch, heads, seq, {member.head_size}]"
            )
        if array.shape != q.shape:
            raise SpecError(f"{name} is {list(array.shape)}, Q is {list(q.shape)}: they must be alike")
    batch, heads, seq, _ = q.shape
    return batch, heads, seq


def attention_on_cpu(member: Attention, q: Array, k: Array, v: Array, sm_scale: float) -> Result:
    """Run the kernel's source under Triton's interpreter, in a process of its own. Slow: for small sizes.

    Args:
        member: which kernel.
        q, k, v: [batch, heads, seq, head size], in storage type.
        sm_scale: factor of the scores.

    Raises:
        SpecError: the inputs do not fit the member.
        InterpreterError: Triton is missing or failed.
    """
    batch, heads, seq = check_inputs(member, q, k, v)
    out = np.zeros_like(q)
    row_sum, row_max = (np.zeros((batch * heads, seq), np.float32) for _ in range(2))
    spec = member.specs()[0]
    scalars = {"sm_scale": sm_scale, "batch_size": batch, "num_heads": heads, "seq_len": seq}
    x, y, z = (
        expression.evaluate({name: int(scalars[name]) for name in expression.names()})
        for expression in spec.grid_expressions
    )
    tensors = {"Out": out, "L": row_sum, "M": row_max, "Q": q, "K": k, "V": v}
    kinds = dict(spec.prototype)
    arguments = {name: Tensor(np.ascontiguousarray(array), kinds[name][1:]) for name, array in tensors.items()}
    if out.size:
        constants = {name: value for name, value in spec.constants if isinstance(value, int | float | str | None)}
        run_in_subprocess(kernel_path(), KERNEL, (x, y, z), {**arguments, **scalars}, constants)
    return Result(out, row_sum, row_max)


def attention_on_gpu(
    function: Function,
    member: Attention,
    device: Device,
    q: Array,
    k: Array,
    v: Array,
    sm_scale: float,
    *,
    repeats: int = 0,
) -> Result:
    """Run a built kernel.

    Args:
        function: the member's function, loaded in the device's context.
        member: which kernel.
        device: whose context is current.
        q, k, v: [batch, heads, seq, head size], in storage type.
        sm_scale: factor of the scores.
        repeats: timed launches after the one whose result is returned.

    Raises:
        SpecError: the inputs do not fit the member.
        DriverError, LaunchError: the GPU could not do it.
    """
    batch, heads, seq = check_inputs(member, q, k, v)
    statistic = (batch * heads, seq)
    made = [
        DeviceArray(q.shape, q.dtype),
        *(DeviceArray(statistic, np.float32) for _ in range(2)),
        *map(DeviceArray.of, (q, k, v)),
    ]
    with device_arrays(*made) as arrays:
        for array in arrays[:3]:
            array.fill(0xFF)  # NaN in every dtype: what the kernel leaves unwritten cannot pass for a result
        device.synchronize()
        stream = Stream()
        arguments = (*(array.pointer for array in arrays), sm_scale, batch, heads, seq)
        variant = function.variant(*arguments)
        function(stream.handle, *arguments)
        stream.synchronize()
        out, row_sum, row_max = (array.to_host() for array in arrays[:3])
        microseconds = _time(function, stream, arguments, repeats) if repeats else None
        stream.close()
    return Result(out, row_sum, row_max, variant, microseconds)


def _time(function: Function, stream: Stream, arguments: tuple[Any, ...], repeats: int) -> float:
    """Median of single launches, each between two events; the data stays in the GPU's cache where it fits."""
    times = []
    begin, end = Event(), Event()
    for _ in range(repeats):
        begin.record(stream)
        function(stream.handle, *arguments)
        end.record(stream)
        times.append(1e3 * end.milliseconds_since(begin))
    begin.close()
    end.close()
    return statistics.median(times)
