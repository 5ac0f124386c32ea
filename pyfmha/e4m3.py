"""e4m3 in numpy, which has no such type: 4 bits of exponent, 3 of fraction, no infinity, the bits in uint8.

The type that PyTorch calls ``float8_e4m3fn`` and TensorRT ``FP8`` (Micikevicius et al., "FP8 Formats for Deep
Learning", 2022).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

LARGEST = 448.0
_NAN = 0x7F


def _magnitudes() -> npt.NDArray[np.float32]:
    bits = np.arange(128)
    exponent, fraction = bits >> 3, bits & 7
    normal = np.ldexp(1 + fraction / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(fraction / 8, -6), normal)
    values[_NAN] = np.nan
    return values.astype(np.float32)


_VALUES = np.concatenate([_magnitudes(), -_magnitudes()])


def e4m3_from_float(values: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Rounds to e4m3, to nearest, ties to even, as the GPU's ``cvt.rn.satfinite`` does.

    Args:
        values: any shape; converted to float32 first (exactly, unless they are float64).

    Returns:
        The bits, uint8, of the same shape. What is larger than 448, infinity too, becomes 448; NaN stays NaN.
    """
    given = np.asarray(values, dtype=np.float32)
    magnitude = np.minimum(np.abs(given), np.float32(LARGEST)).astype(np.float64)
    step = np.ldexp(1.0, np.clip(np.frexp(magnitude)[1] - 1, -6, 8) - 3)
    rounded = np.rint(magnitude / step) * step
    bits = np.searchsorted(_VALUES[:_NAN], np.where(np.isnan(rounded), 0, rounded))
    return np.asarray(np.where(np.isnan(given), _NAN, bits) | (np.signbit(given) << 7), dtype=np.uint8)


def float_from_e4m3(bits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The float32 values, exact, of e4m3 bits (uint8, any shape)."""
    return np.asarray(_VALUES[np.asarray(bits, dtype=np.uint8)])
