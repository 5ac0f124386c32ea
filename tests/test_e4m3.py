"""e4m3 in numpy against its definition."""

import numpy as np

from pyfmha.e4m3 import e4m3_from_float, float_from_e4m3

BITS = np.arange(256, dtype=np.uint8)


def test_every_number_keeps_its_bits() -> None:
    values = float_from_e4m3(BITS)
    numbers = ~np.isnan(values)
    assert list(BITS[~numbers]) == [0x7F, 0xFF]
    assert (e4m3_from_float(values[numbers]) == BITS[numbers]).all()


def test_known_numbers() -> None:
    assert list(float_from_e4m3(np.array([0x01, 0x08, 0x38, 0x7E, 0xB8]))) == [2.0**-9, 2.0**-6, 1.0, 448.0, -1.0]


def test_rounding_is_to_nearest_and_of_ties_to_even() -> None:
    values = float_from_e4m3(BITS[:127]).astype(np.float64)
    middles = (values[:-1] + values[1:]) / 2
    even = BITS[:126] + BITS[:126] % 2
    assert (e4m3_from_float(middles) == even).all()
    assert (e4m3_from_float(np.nextafter(middles.astype(np.float32), np.float32(0))) == BITS[:126]).all()
    assert (e4m3_from_float(-np.nextafter(middles.astype(np.float32), np.float32(999))) == BITS[1:127] + 128).all()


def test_what_is_too_large_becomes_the_largest_and_nan_stays() -> None:
    assert list(e4m3_from_float([449, 1e30, np.inf, -np.inf])) == [0x7E, 0x7E, 0x7E, 0xFE]
    assert np.isnan(float_from_e4m3(e4m3_from_float([np.nan, -np.nan]))).all()
