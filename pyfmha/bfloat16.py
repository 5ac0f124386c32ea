"""bfloat16 in numpy, which has no such type: the bits in uint16, the upper half of a float32."""

from typing import Any

import numpy as np
import numpy.typing as npt


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
