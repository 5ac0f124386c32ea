"""bfloat16 in numpy, which has no such type: the bits in uint16, the upper half of a float32."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

STORAGE = {"fp16": np.float16, "bf16": np.uint16, "fp32": np.float32, "e4m3": np.uint8}
"""How numpy holds each dtype of Q, K, V and Out; e4m3 is of the former three alone."""


def bf16_from_float(values: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """Rounds to bfloat16, to nearest, ties to even.

    Args:
        values: any shape; converted to float32 first (exactly, unless they are float64).

    Returns:
        The bits, uint16, of the same shape. What rounds past the largest bfloat16 becomes infinite; NaN stays NaN,
        quiet, with its sign.
    """
    with np.errstate(over="ignore"):
        bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    nearest = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    quiet_nan = (bits >> 16) | 0x40
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, quiet_nan, nearest).astype(np.uint16)


def float_from_bf16(bits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The float32 values, exact, of bfloat16 bits (uint16, any shape)."""
    return (np.asarray(bits, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)


@contextmanager
def exact_bfloat16(interpreter: Any) -> Iterator[None]:
    """Within it, Triton's interpreter computes bfloat16 in float32 and rounds to nearest, as a GPU does.

    Triton 3.9 multiplies the bits as if they were integers, and converts from float32 by cutting off. So the operations
    that see bfloat16 are replaced, on the one object that holds them, and put back at the end.

    Args:
        interpreter: the module ``triton.runtime.interpreter``, which this one does not import.
    """
    builder, bf16, fp32 = interpreter.interpreter_builder, interpreter.tl.bfloat16, interpreter.tl.float32

    def is_bf16(handle: Any) -> bool:
        return bool(handle.dtype.scalar == bf16)

    def widen(handle: Any) -> Any:
        return interpreter.TensorHandle(float_from_bf16(handle.data), fp32) if is_bf16(handle) else handle

    def narrow(handle: Any) -> Any:
        return interpreter.TensorHandle(bf16_from_float(handle.data), bf16)

    def elementwise(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*operands: Any) -> Any:
            handles, op = operands[:-1], operands[-1]
            if not any(is_bf16(handle) for handle in handles):
                return original(*operands)
            result = original(*map(widen, handles), op)
            return narrow(result) if result.data.dtype == np.float32 else result

        return wrapped

    def cast(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(source: Any, dtype: Any, *rest: Any) -> Any:
            if dtype.scalar == bf16 and not is_bf16(source):
                return narrow(original(source, fp32, *rest) if source.data.dtype != np.float32 else source)
            if is_bf16(source) and dtype.scalar != bf16:
                return widen(source) if dtype.scalar == fp32 else original(widen(source), dtype, *rest)
            return original(source, dtype, *rest)

        return wrapped

    def dot(a: Any, b: Any, *rest: Any) -> Any:
        return type(builder).create_dot(builder, widen(a), widen(b), *rest)

    replaced = {name: elementwise(getattr(builder, name)) for name in ("unary_op", "binary_op", "ternary_op")}
    replaced |= {name: cast(getattr(builder, name)) for name in ("cast_impl", "create_fp_to_fp")}
    replaced["create_dot"] = dot
    for name, function in replaced.items():
        setattr(builder, name, function)
    try:
        yield
    finally:
        for name in replaced:
            delattr(builder, name)
