"""The reference against plain loops, and the conversions against every value there is."""

import math

import numpy as np
import pytest
from numpy.random import default_rng

from pyfmha.attention import reference
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


def by_the_letter(q, k, v, visible, sm_scale, softcap):
    """One query head, q [m, d], k and v [n, d], with the set of keys of each query: plain Python."""
    out, lse = [[0.0] * len(v[0]) if len(v) else [0.0] * len(q[0]) for _ in q], [-math.inf] * len(q)
    for i, keys in enumerate(visible):
        scores = {j: sm_scale * sum(a * b for a, b in zip(q[i], k[j], strict=True)) for j in keys}
        if softcap:
            scores = {j: softcap * math.tanh(score / softcap) for j, score in scores.items()}
        if scores:
            total = sum(math.exp(score) for score in scores.values())
            lse[i] = math.log(total)
            out[i] = [sum(math.exp(s) * v[j][d] for j, s in scores.items()) / total for d in range(len(v[0]))]
    return out, lse


# Queries, keys, options, and which keys each query sees, counted by hand.
VISIBLE = [
    (3, 3, {}, [{0, 1, 2}] * 3),
    (3, 3, {"window_right": 0}, [{0}, {0, 1}, {0, 1, 2}]),
    (2, 4, {"window_right": 0}, [{0}, {0, 1}]),
    (2, 4, {"window_right": 0, "bottom_right": True}, [{0, 1, 2}, {0, 1, 2, 3}]),
    (4, 2, {"window_right": 0, "bottom_right": True}, [set(), set(), {0}, {0, 1}]),
    (4, 2, {"window_left": 1}, [{0, 1}, {0, 1}, {1}, set()]),
    (3, 5, {"window_left": 0, "window_right": 0}, [{0}, {1}, {2}]),
    (3, 5, {"window_left": 0, "window_right": 0, "bottom_right": True}, [{2}, {3}, {4}]),
    (3, 5, {"window_left": 1, "window_right": 2}, [{0, 1, 2}, {0, 1, 2, 3}, {1, 2, 3, 4}]),
    (2, 0, {"window_right": 0}, [set(), set()]),
]


@pytest.mark.parametrize(("m", "n", "options", "visible"), VISIBLE)
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_attend_matches_plain_loops_over_keys_counted_by_hand(m, n, options, visible, softcap) -> None:
    rng = default_rng(3)
    q, k, v = rng.standard_normal((1, 4, m, 3)), *rng.standard_normal((2, 1, 2, n, 3))
    out, lse = reference.attend(q, k, v, sm_scale=0.7, softcap=softcap, **options)
    for h in range(4):
        exact = by_the_letter(q[0, h], k[0, h // 2], v[0, h // 2], visible, 0.7, softcap)
        np.testing.assert_allclose(out[0, h], exact[0], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(lse[0, h], exact[1], rtol=1e-12)


def test_attend_with_lengths_ignores_padding() -> None:
    rng = default_rng(4)
    q, k, v = (rng.standard_normal((4, 2, 6, 3)) for _ in range(3))
    for x, name in ((q, "q"), (k, "k"), (v, "k")):
        for b, n in enumerate((4, 0, 6, 6) if name == "q" else (5, 6, 0, 6)):
            x[b, :, n:] = np.nan
    out, lse = reference.attend(q, k, v, sm_scale=0.5, q_lengths=[4, -7, 6, 99], kv_lengths=[5, 6, 0, 2**31])
    assert (out[0, :, 4:] == 0).all() and np.isneginf(lse[0, :, 4:]).all()  # noqa: PT018
    assert (out[1:3] == 0).all() and np.isneginf(lse[1:3]).all()  # noqa: PT018
    for b, m, n in ((0, 4, 5), (3, 6, 6)):
        for h in range(2):
            exact = by_the_letter(q[b, h, :m], k[b, h, :n], v[b, h, :n], [set(range(n))] * m, 0.5, 0.0)
            np.testing.assert_allclose(out[b, h, :m], exact[0], rtol=1e-12)
            np.testing.assert_allclose(lse[b, h, :m], exact[1], rtol=1e-12)


@pytest.mark.parametrize(
    ("cu_q", "cu_kv", "spans"),
    [
        ([0, 2, 5], [0, 3, 6], [(0, 2, 0, 3), (2, 5, 3, 6)]),
        ([1, 4, 4, 5], [2, 2, 3, 5], [(1, 4, 2, 2), (4, 5, 3, 5)]),
        ([0, 4, 2, 99], [-5, 3, 99, 1], [(0, 4, 0, 3), (4, 6, 6, 6)]),
        ([3], [3], []),
    ],
)
def test_attend_ragged(cu_q, cu_kv, spans) -> None:
    rng = default_rng(5)
    q, k, v = rng.standard_normal((6, 2, 3)), *rng.standard_normal((2, 6, 1, 3))
    out, lse = reference.attend(q, k, v, sm_scale=0.5, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv)
    exact_out, exact_lse = np.zeros(q.shape), np.full((2, 6), -np.inf)
    for a, b, c, d in spans:
        for h in range(2):
            rows = by_the_letter(q[a:b, h], k[c:d, 0], v[c:d, 0], [set(range(d - c))] * (b - a), 0.5, 0.0)
            exact_out[a:b, h], exact_lse[h, a:b] = rows
    np.testing.assert_allclose(out, exact_out, rtol=1e-12)
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-12)


@pytest.mark.parametrize(
    ("q", "k", "ragged"),
    [
        ((1, 3, 4, 5), (1, 2, 4, 5), False),
        ((1, 2, 4, 5), (2, 2, 4, 5), False),
        ((1, 2, 4, 5), (1, 2, 4, 6), False),
        ((1, 2, 4, 5), (1, 0, 4, 5), False),
        ((4, 2, 5), (4, 2, 5), False),
        ((1, 4, 2, 5), (1, 4, 2, 5), True),
    ],
)
def test_attend_refuses_shapes_that_do_not_fit(q, k, ragged) -> None:
    options = {"cu_seqlens_q": [0, 4], "cu_seqlens_kv": [0, 4]} if ragged else {}
    with pytest.raises(ValueError, match=r"no attention|do not fit"):
        reference.attend(np.zeros(q), np.zeros(k), np.zeros(k), sm_scale=1.0, **options)
