"""Soft caps in the Hopper kernel, in the emulator."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gluon_emulator import Machine
from gluon_language import load_kernel
from gluon_values import product_of, tensor
from helpers import examples, some_of
from hypothesis import given
from hypothesis import strategies as st
from sm90_runs import KERNEL, LOUD, altered, check, check_values, is_noticed, run

from pyfmha.attention import hopper

SLOW, POWERS = (KERNEL.with_name(f"sm90_{name}.py") for name in ("slow", "powers"))
# What the kernel is compiled with.
SETTINGS: dict[str, dict[str, Any]] = {
    "head size 64": {"consumers": 1, "block_n": 128},
    "head size 128": {"consumers": 1, "block_d": 128, "v_stages": 3, "head_size": 120},
    "head size 256": {"block_d": 256, "head_size": 136, "q_slots": 1, "v_stages": 3, "dtype": "bf16"},
}
PLAIN: dict[str, dict[str, Any]] = {
    **{name: SETTINGS[name] for name in ("head size 64", "head size 256")},
    "head size 128, short": SETTINGS["head size 128"],
    "head size 128": {"consumers": 2, "block_n": 128, "block_d": 128, "v_stages": 3, "head_size": 128, "dtype": "bf16"},
}
PROBLEM: dict[str, Any] = {"general": True, "heads": 2, "kv_heads": 1, "q_len": 140, "kv_len": 200, "softcap": 2.0}


@pytest.mark.parametrize(("setting", "softcap"), some_of(SETTINGS, [1e-38, 0.01, 1.0, 30.0, hopper.LARGEST_CAP]))
def test_caps_of_every_size(setting: str, softcap: float) -> None:
    check(**SETTINGS[setting], **{**PROBLEM, "softcap": softcap, "q_len": 70, "kv_len": 130, "scale": 4.0})


@pytest.mark.parametrize(
    ("setting", "causal", "softcap"),
    some_of(PLAIN, [False, True, "bottom-right"], [0.01, 30.0, float(hopper.LARGEST_CAP)]),
)
def test_caps_without_lengths_and_windows(setting: str, causal: bool | str, softcap: float) -> None:
    sizes = {"q_len": 140, "kv_len": 200, "heads": 2, "kv_heads": 1}
    check(**PLAIN[setting], **sizes, causal=causal, softcap=softcap, scale=4.0)


@examples(15)
@given(
    setting=st.sampled_from(sorted(SETTINGS)),
    softcap=st.sampled_from([0.5, 7.0, 50.0]),
    sizes=st.tuples(st.integers(1, 150), st.integers(1, 200)),
    window=st.sampled_from([(-1, -1), (-1, 0), (40, 9)]),
    lengths=st.booleans(),
    bottom_right=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_capped_problem(setting, softcap, sizes, window, lengths, bottom_right, seed) -> None:
    (q_len, kv_len), rng = sizes, np.random.default_rng(seed)
    given_lengths = {
        "batch": 2, "q_lengths": rng.integers(-1, q_len + 2, 2).tolist(),
        "kv_lengths": rng.integers(-1, kv_len + 2, 2).tolist(),
    }  # fmt: skip
    check(
        **SETTINGS[setting], general=True, softcap=softcap, q_len=q_len, kv_len=kv_len, window=window, seed=seed,
        bottom_right=bottom_right, scale=2.0, **(given_lengths if lengths else {}),
    )  # fmt: skip


@pytest.mark.parametrize("sm_scale", [2.0**-20, 2.0**-128])
@pytest.mark.parametrize("consumers", [1, 2])
def test_products_beyond_float32_are_capped_like_others(consumers: int, sm_scale: float) -> None:
    # Their sign is lost where sums overflow on the way: so the slow arithmetic takes them.
    check(**{**LOUD, **PROBLEM, "q_len": 70, "kv_len": 90, "sm_scale": sm_scale, "consumers": consumers})


def given(softcap: float) -> tuple[Any, Any]:
    return tensor(1.0, np.float32), tensor(softcap, np.float32)


def factors_of(softcap: float) -> tuple[Any, Any]:
    """Of scores of a scale of 1: that of tanh, and that of a product."""
    return load_kernel(SLOW, Machine(0))["score_factors"](given(softcap), True)


def capped(scores: Any, softcap: float, polynomials: int, before: float = -1e6) -> Any:
    """The fast arithmetic's scores, of which a thread holds as many as there are columns; `before` is the largest one
    of the blocks before, in units of log2."""
    kernel = load_kernel(POWERS, Machine(0))
    factors = kernel["tanh_factors"](given(softcap), factors_of(softcap), 0.0, polynomials)
    m = tensor(np.full(len(scores), before), np.float32)
    found, _largest = kernel["tanh_of"](tensor(scores, np.float32), factors, m, scores.shape[1], polynomials, 0.0)
    return np.asarray(found, np.float64) * float(factors[0]) * np.log(2)


def capped_slowly(scores: Any, softcap: float) -> Any:
    to_log2, bend = factors_of(softcap)
    found = load_kernel(SLOW, Machine(0))["bent"](tensor(np.float32(scores), np.float32), bend)
    return np.asarray(found, np.float64) * float(to_log2) * np.log(2)


CAPS = [1.0, 50.0, float(hopper.LARGEST_CAP)]


BOTH = pytest.mark.parametrize("polynomials", [1, 2])


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("way", ["slow", "large scores beside them", "large scores before"])
@BOTH
def test_the_error_of_tanh_is_little_of_a_cap(way: str, softcap: float, polynomials: int) -> None:
    scores = np.linspace(-4 * softcap, 4 * softcap, 64 * 562).reshape(64, -1).T.astype(np.float32)
    exact = softcap * np.tanh(scores.astype(np.float64) / softcap)
    if way == "slow":
        found = capped_slowly(scores, softcap)
    else:
        found = capped(scores, softcap, polynomials, 1e6 if "before" in way else -1e6)
    error = (found - exact) / (softcap * 2.0**-22)

    assert np.abs(error).max() <= 1.2
    # Of scores that are small beside the cap, as most are.
    assert np.sqrt(np.mean(error[np.abs(exact) < 0.2 * softcap] ** 2)) <= (0.2 if way == "slow" else 0.1)


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize(("polynomials", "factor"), [(1, 1), (2, 1), (2, 2)])
def test_the_error_of_small_scores_is_that_of_their_products(polynomials: int, factor: int, softcap: float) -> None:
    """Where no score of a warp is beyond BOUND, or twice that, tanh is a polynomial."""
    bound = factor * float(load_kernel(POWERS, Machine(0))["BOUND"][polynomials - 1]) * softcap
    scores = np.linspace(-0.9999 * bound, 0.9999 * bound, 64 * 562).reshape(64, -1).T.astype(np.float32)
    exact = softcap * np.tanh(scores.astype(np.float64) / softcap)
    error = (capped(scores, softcap, polynomials) - exact) / np.abs(exact) * 2.0**24

    assert np.abs(error).max() <= 8.0  # with what the factors are rounded by
    assert np.sqrt(np.mean(error**2)) <= 3.0


@BOTH
def test_powers_are_taken_at_once_only_where_polynomials_end(polynomials: int) -> None:
    """Else rows whose largest score is within them would lose by it."""
    kernel = load_kernel(POWERS, Machine(0))
    bound = polynomials * float(kernel["BOUND"][polynomials - 1])
    most = float(kernel["tanh_factors"](given(50.0), factors_of(50.0), 24.0, polynomials)[3]) - 24

    assert 0.999 < most * np.log(2) / (50 * np.tanh(bound)) <= 1


@pytest.mark.parametrize("count", [32, 64])
@pytest.mark.parametrize("sign", [1, -1])
@BOTH
def test_a_score_beyond_the_bound_is_seen_wherever_it_is(count: int, sign: int, polynomials: int) -> None:
    """Each row here is a warp with one such score; the polynomials are far off there."""
    scores = np.full((2 * count, count), 0.1)
    np.fill_diagonal(scores[:count], sign * 1.5)
    np.fill_diagonal(scores[count:], sign * 0.7)
    found = capped(scores, 1.0, polynomials)

    np.testing.assert_allclose(found, np.tanh(np.float32(scores).astype(np.float64)), rtol=0, atol=2.0**-22)


@BOTH
def test_scores_far_beyond_the_cap_are_the_cap(polynomials: int) -> None:
    """Four share a reciprocal: none of them may be lost to what is beside it."""
    scores = np.array([(0.5, 40.0, 2e37, 88.0), (-0.5, -40.0, -2e37, -88.0), (2e37, -2e37, 44.0, -44.0)])

    np.testing.assert_allclose(capped(scores, 1.0, polynomials), np.tanh(scores), rtol=0, atol=2.0**-22)


@BOTH
def test_what_is_no_finite_product_is_not_capped(polynomials: int) -> None:
    scores = np.array([(np.nan, 0.5, 1.0, 0.2), (0.1, np.inf, 0.2, 0.3), (0.1, 0.2, 0.3, -np.inf)])
    found = capped(scores, 1.0, polynomials)

    assert (np.isnan(found) == ~np.isfinite(scores)).all(), "they must show, and nothing else"


@pytest.mark.parametrize(("setting", "general"), some_of(SETTINGS, [False, True]))
def test_blocks_of_small_scores_beside_blocks_with_a_large_one(setting: str, general: bool) -> None:
    def change(q: Any, k: Any, _v: Any) -> None:
        k[:, :, 150] *= 40.0

    cut = {**SETTINGS[setting], **({"general": True, "window": (-1, 0)} if general else {"causal": True})}
    check(**cut, q_len=180, kv_len=180, heads=1, softcap=20.0, scale=1.0, change=change)


@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_nan_shows_in_its_row_alone(scale: float) -> None:
    def change(q: Any, _k: Any, _v: Any) -> None:
        q[0, 0, 3, 1] = np.nan

    problem = {**SETTINGS["head size 64"], "q_len": 40, "kv_len": 150, "softcap": 20.0, "scale": scale}
    out, lse, wanted, wanted_lse = run(**problem, change=change)
    assert np.isnan(out[0, 0, 3]).all()
    assert np.isnan(lse[0, 0, 3])
    others = np.arange(40) != 3
    check_values(*(x[0, 0, others] for x in (out, lse, wanted, wanted_lse)), "fp16", 1.0)


def test_scales_near_the_largest_number() -> None:
    def small(q: Any, k: Any, _v: Any) -> None:
        q *= 2.0**-64
        k *= 2.0**-64

    large = {"dtype": "bf16", "sm_scale": 2e38, "softcap": 16.0, "change": small, "scale": 2.0}
    check(**{**PROBLEM, "q_len": 70, "kv_len": 90, **large})


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_emulator_adds_up_what_overflows_in_the_order_of_the_instructions(sign: float) -> None:
    """The first 16 products overflow one way, all 32 together the other way."""
    row = np.repeat([sign * 2.0**66, -sign * 2.0**67], 16).astype(np.float32)[None]
    column = np.full((32, 1), 2.0**62, np.float32)

    assert product_of(row, column) == sign * np.inf
    assert product_of(row[:, ::-1], column) == -sign * np.inf
    assert product_of(row, column, np.float32([[-sign * np.inf]])) == -sign * np.inf
    # Nothing overflows on the way, though it could in another order.
    small = np.tile(np.float32([sign * 2.0**65, -sign * 2.0**65]), 16)[None]
    assert product_of(small, column, np.float32([[5.0]])) == 5


def test_powers_are_taken_at_once_where_either_row_of_a_thread_has_had_a_large_score() -> None:
    """A thread holds two rows, of which all threads of a warp go the same way. Powers are off otherwise than the
    polynomial is, by which it shows."""
    scores = np.tile(np.linspace(0.01, 0.3, 128, dtype=np.float32), (64, 1))
    kernel = load_kernel(POWERS, Machine(0))
    factors = kernel["tanh_factors"](given(1.0), factors_of(1.0), 0.0, 2)

    def found(*large: int) -> Any:
        m = np.where(np.isin(np.arange(64), large), 1e6, -1e6).astype(np.float32)
        capped, _largest = kernel["tanh_of"](tensor(scores, np.float32), factors, tensor(m, np.float32), 64, 2, 0.0)
        return np.asarray(capped)

    small, all_of_them = found(), found(*range(64))
    assert (small != all_of_them).any(1).all()
    for row in (3, 8, 15):  # rows of a thread are eight apart
        others = {row, row + 8 if row < 8 else row - 8}
        np.testing.assert_array_equal(found(row)[sorted(others)], all_of_them[sorted(others)])


# Of kernels with two polynomials, and of those with one.
FAULTS = {
    "overflow is not noticed": ('f"mul.f32 {of}, {of}, 0f00000000;"', 'f"mov.b32 {of}, 0f00000000;"'),
    "the cap is left out": (
        "        scores, peaks = tanh_of(scores, scale, m, BLOCK_N // 2, CAPPED, shift)",
        "        scores = scores * (scale[1] / scale[0])\n        peaks = scores",
    ),
    "a power of another score": (
        'f"fma.rn.f32 rest, {y}, {inverse}, rest;"',
        'f"fma.rn.f32 rest, a, {inverse}, rest;"',
    ),
    "a reciprocal of two instead of one": ("mul.f32 d1, rest, d1;", "mul.f32 d1, rest, c1;"),
    "large scores by the first polynomial": ('"max.s32 bits, bits, other_bits;"', '"mov.b32 bits, 0f00000000;"'),
    "scores far below 0 by the first polynomial": (
        '*largest_in_chains("bits", [f"i{i}" for i in range(count)], "max.u32", 4),',
        '"mov.b32 bits, other_bits;",',
    ),
    "large scores by the second polynomial": ('"setp.gt.u32 large, bits, limit;"', '"setp.gt.u32 large, bits, bits;"'),
    "a wrong coefficient": ("3173.96704", "973.96704"),
    "a wrong coefficient of the second polynomial": ("0f4294C9E6", "0fC294C9E6"),
    "powers of another unit": ('f"mul.f32 all, all, {constant};"', 'f"mul.f32 all, all, {2 * constant};"'),
    "powers of another factor": ('f"mov.b32 factor, {whole_bend};"', 'f"mov.b32 factor, {bend};"'),
    "the slow rows' cap is left out": ("score = bent(score, row_bend)", "score = score * row_bend"),
    "tanh of half": ("sm_scale / softcap * (2 * LOG2_E)", "sm_scale / softcap * LOG2_E"),
    "the score keeps the scale": ("gl.minimum(softcap * LOG2_E, FLOAT_MAX), bend", "sm_scale * LOG2_E, bend"),
}
FAULTS_OF_ONE = {
    "a wrong coefficient of a lone polynomial": ("-62.4697762", "62.4697762"),
    "the constants of the other": ("return values[polynomials - 1]", "return values[2 - polynomials]"),
}


@pytest.mark.parametrize("fault", some_of([*FAULTS, *FAULTS_OF_ONE]))
def test_a_faulty_kernel_is_noticed(fault: str, tmp_path: Path) -> None:
    faulty = altered(KERNEL, *(FAULTS | FAULTS_OF_ONE)[fault], tmp_path)
    consumers = 2 if fault in FAULTS_OF_ONE else 1

    def both(source: Path = KERNEL, seed: int = 0, limit: float = 1.0) -> None:
        run = {"source": source, "seed": seed, "limit": limit, "consumers": consumers}
        check(**run, **{**PROBLEM, "q_len": 20, "kv_len": 140, "scale": 3.0})
        check(**run, **{**PROBLEM, "q_len": 20, "kv_len": 40, "scale": 1.0})  # what stays within the fast range
        check(**run, **{**PROBLEM, "q_len": 20, "kv_len": 140, "scale": 0.7, "softcap": 3.0})  # what polynomials take
        check(**run, **{**LOUD, **PROBLEM, "q_len": 20, "kv_len": 40, "sm_scale": 2.0**-128})

    assert is_noticed(both, faulty, {})
