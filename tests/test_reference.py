"""The reference against plain loops, and the conversions against every value there is."""

import math

import numpy as np
import pytest
from numpy.random import default_rng

from pyfmha import reference
from pyfmha.bfloat16 import bf16_from_float, float_from_bf16


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [0.4, -0.7, 0.0])
def test_attention_matches_plain_loops(causal: bool, scale: float) -> None:
    rng = default_rng(0)
    q, k, v = (rng.standard_normal((2, 2, 5, 3)) for _ in range(3))
    result = reference.attention_float64(q, k, v, sm_scale=scale, causal=causal)
    for b, h, i in np.ndindex(2, 2, 5):
        keys = range(i + 1) if causal else range(5)
        scores = [scale * sum(q[b, h, i, d] * k[b, h, j, d] for d in range(3)) for j in keys]
        weights = [math.exp(score - max(scores)) for score in scores]
        assert result.row_max[b, h, i] == pytest.approx(max(scores), abs=1e-12)
        assert result.row_sum[b, h, i] == pytest.approx(sum(weights), rel=1e-12)
        for d in range(3):
            mean = sum(w * v[b, h, j, d] for w, j in zip(weights, keys, strict=True)) / sum(weights)
            assert result.out[b, h, i, d] == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_do_not_change_the_result(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = default_rng(1)
    q, k, v = (rng.standard_normal((1, 2, 37, 4)) for _ in range(3))
    whole = reference.attention_float64(q, k, v, sm_scale=0.5, causal=causal)
    monkeypatch.setattr(reference, "_ROWS", 8)
    parts = reference.attention_float64(q, k, v, sm_scale=0.5, causal=causal)
    np.testing.assert_allclose(parts.out, whole.out, rtol=1e-13)
    np.testing.assert_allclose(parts.row_max, whole.row_max, rtol=1e-13)
    np.testing.assert_allclose(parts.row_sum, whole.row_sum, rtol=1e-13)


def test_lengths_of_queries_and_keys_may_differ() -> None:
    q, k, v = np.zeros((1, 1, 2, 4)), np.ones((1, 1, 3, 4)), np.eye(3, 4)[None, None]
    out = reference.attention_float64(q, k, v, sm_scale=1.0, causal=False).out
    np.testing.assert_allclose(out[0, 0], np.tile([1 / 3, 1 / 3, 1 / 3, 0], (2, 1)))


@pytest.mark.parametrize(
    ("q", "k"), [((1, 2, 3), (1, 2, 3)), ((1, 1, 3, 4), (1, 1, 3, 8)), ((1, 2, 3, 4), (2, 1, 3, 4))]
)
def test_shapes_that_do_not_fit_are_refused(q: tuple[int, ...], k: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        reference.attention_float64(np.zeros(q), np.zeros(k), np.zeros(k), sm_scale=1.0, causal=True)


def test_relative_error() -> None:
    assert reference.relative_error([3.0, 4.1], [3.0, 4.0]) == pytest.approx(0.1 / 5)
    assert reference.relative_error([1e308, 0.0], [1e308, 1e308]) == pytest.approx(math.sqrt(0.5))
    assert reference.relative_error([1e-300], [2e-300]) == pytest.approx(0.5)
    assert reference.relative_error([0.0], [0.0]) == 0
    assert reference.relative_error([1.0], [0.0]) == math.inf
    assert math.isnan(reference.relative_error([math.nan], [1.0]))


def test_every_bfloat16_survives_a_round_trip() -> None:
    bits = np.arange(65536, dtype=np.uint16)
    values = float_from_bf16(bits)
    back = bf16_from_float(values)
    nan = np.isnan(values)
    np.testing.assert_array_equal(back[~nan], bits[~nan])
    assert np.isnan(float_from_bf16(back[nan])).all()
    np.testing.assert_array_equal(back[nan] >> 15, bits[nan] >> 15)


def test_bfloat16_rounds_to_nearest_ties_to_even() -> None:
    finite = np.arange(0x7F7F, dtype=np.uint16)  # all pairs of neighbours from zero to the largest
    low, high = float_from_bf16(finite).astype(np.float64), float_from_bf16(finite + 1).astype(np.float64)
    even = np.where(finite % 2 == 0, finite, finite + 1)
    for sign, flag in ((1.0, 0), (-1.0, 0x8000)):
        middle = (sign * (low + high) / 2).astype(np.float32)
        np.testing.assert_array_equal(bf16_from_float(middle), even | flag)
        below, above = np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(sign * np.inf))
        np.testing.assert_array_equal(bf16_from_float(below), finite | flag)
        np.testing.assert_array_equal(bf16_from_float(above), (finite + 1) | flag)


def test_bfloat16_special_values() -> None:
    given = np.array([np.inf, -np.inf, 0.0, -0.0, 3.4e38, -3.4e38], np.float32)
    np.testing.assert_array_equal(bf16_from_float(given), [0x7F80, 0xFF80, 0, 0x8000, 0x7F80, 0xFF80])
    # A NaN whose set bits all lie in the half that is cut off.
    hidden = np.array([0x7F800001, 0xFF800001], np.uint32).view(np.float32)
    assert np.isnan(float_from_bf16(bf16_from_float(hidden))).all()
