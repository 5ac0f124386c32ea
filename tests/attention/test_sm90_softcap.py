"""Soft caps in the Hopper kernel, in the emulator."""

from dataclasses import dataclass
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

SLOW, POWERS, PRODUCTS = (KERNEL.with_name(f"sm90_{name}.py") for name in ("slow", "powers", "products"))
# What the kernel is compiled with.
SETTINGS: dict[str, dict[str, Any]] = {
    "head size 64": {"consumers": 1, "block_n": 128},
    "head size 128": {"consumers": 1, "block_d": 128, "v_stages": 3, "head_size": 120},
    "head size 256": {"block_d": 256, "head_size": 136, "q_slots": 1, "v_stages": 3, "dtype": "bf16"},
}
PLAIN: dict[str, dict[str, Any]] = {
    **{name: SETTINGS[name] for name in ("head size 64", "head size 256")},
    "head size 128, short": SETTINGS["head size 128"],
    "longest first": {**SETTINGS["head size 128"], "programs": 2},
    "head size 128": {"consumers": 2, "block_n": 128, "block_d": 128, "v_stages": 3, "head_size": 128, "dtype": "bf16"},
}
WITH_THREES = ("head size 64", "head size 128")
PROBLEM: dict[str, Any] = {"general": True, "heads": 2, "kv_heads": 1, "q_len": 140, "kv_len": 200, "softcap": 2.0}


@pytest.mark.parametrize(("setting", "softcap"), some_of(SETTINGS, [1e-38, 0.01, 1.0, 30.0, hopper.LARGEST_CAP]))
def test_caps_of_every_size(setting: str, softcap: float) -> None:
    problem = {**SETTINGS[setting], **PROBLEM, "softcap": softcap, "q_len": 70, "kv_len": 130, "scale": 4.0}
    check(**problem, threes=setting == "head size 64")


@pytest.mark.parametrize(
    ("setting", "causal", "softcap"),
    some_of(PLAIN, [False, True, "bottom-right"], [0.01, 30.0, float(hopper.LARGEST_CAP)]),
)
def test_caps_without_lengths_and_windows(setting: str, causal: bool | str, softcap: float) -> None:
    sizes = {"q_len": 140, "kv_len": 200, "heads": 2, "kv_heads": 1}
    cut = {**PLAIN[setting], "longest_first": setting == "longest first" and bool(causal)}
    check(**cut, **sizes, causal=causal, softcap=softcap, scale=4.0, threes=setting in WITH_THREES)


@examples(15)
@given(
    setting=st.sampled_from(sorted(SETTINGS)),
    softcap=st.sampled_from([0.5, 7.0, 50.0]),
    sizes=st.tuples(st.integers(1, 150), st.integers(1, 200)),
    window=st.sampled_from([(-1, -1), (-1, 0), (40, 9)]),
    lengths=st.booleans(),
    bottom_right=st.booleans(),
    seed=st.integers(0, 99),
    threes=st.booleans(),
)
def test_any_capped_problem(setting, softcap, sizes, window, lengths, bottom_right, seed, threes) -> None:
    (q_len, kv_len), rng = sizes, np.random.default_rng(seed)
    given_lengths = {
        "batch": 2, "q_lengths": rng.integers(-1, q_len + 2, 2).tolist(),
        "kv_lengths": rng.integers(-1, kv_len + 2, 2).tolist(),
    }  # fmt: skip
    check(
        **SETTINGS[setting], general=True, softcap=softcap, q_len=q_len, kv_len=kv_len, window=window, seed=seed,
        bottom_right=bottom_right, scale=2.0, threes=threes, **(given_lengths if lengths else {}),
    )  # fmt: skip


@pytest.mark.parametrize("sm_scale", [2.0**-20, 2.0**-128])
@pytest.mark.parametrize(("consumers", "threes"), some_of([1, 2], [False, True]))
def test_products_beyond_float32_are_capped_like_others(consumers: int, threes: bool, sm_scale: float) -> None:
    # Their sign is lost where sums overflow on the way: so the slow arithmetic takes them.
    check(**{**LOUD, **PROBLEM, "q_len": 70, "kv_len": 90, "sm_scale": sm_scale, "consumers": consumers}, threes=threes)


def scale_and_cap(softcap: float) -> tuple[Any, Any]:
    return tensor(1.0, np.float32), tensor(softcap, np.float32)


def factors_of(softcap: float) -> tuple[Any, Any]:
    """Of scores of a scale of 1: that of tanh, and that of a product."""
    return load_kernel(SLOW, Machine(0))["score_factors"](scale_and_cap(softcap), True)


@dataclass(frozen=True)
class Tanh:
    """The fast arithmetic: how many polynomials, and whether of products as they are."""

    polynomials: int
    threes: bool

    def kernel(self) -> dict[str, Any]:
        return load_kernel(PRODUCTS if self.threes else POWERS, Machine(0))

    def factors(self, softcap: float, shift: float = 0.0) -> tuple[Any, ...]:
        """The first: of what :meth:`of` gives; the fourth: the maximum from which on powers are taken."""
        if self.threes:
            return self.kernel()["product_factors"](
                scale_and_cap(softcap), factors_of(softcap), shift, self.polynomials
            )
        return self.kernel()["tanh_factors"](factors_of(softcap), shift, self.polynomials)

    def of(self, scores: Any, softcap: float, m: Any, held: int) -> Any:
        """`held`: how many scores a thread holds."""
        operands = tensor(scores, np.float32), self.factors(softcap), tensor(m, np.float32), held
        if self.threes:
            return self.kernel()["tanh_and_largest"](*operands, self.polynomials, 0.0)[0]
        return self.kernel()["tanh_of"](*operands, self.polynomials)

    def bound(self) -> float:
        return float(self.kernel()["BOUND"][self.polynomials - 1])


def capped(scores: Any, softcap: float, tanh: Tanh, before: float = -1e6) -> Any:
    """The fast arithmetic's scores, of which a thread holds as many as there are columns; `before` is the largest one
    of the blocks before, in units of log2."""
    found = tanh.of(scores, softcap, np.full(len(scores), before), scores.shape[1])
    return np.asarray(found, np.float64) * float(tanh.factors(softcap)[0]) * np.log(2)


def capped_slowly(scores: Any, softcap: float) -> Any:
    to_log2, bend = factors_of(softcap)
    found = load_kernel(SLOW, Machine(0))["bent"](tensor(np.float32(scores), np.float32), bend)
    return np.asarray(found, np.float64) * float(to_log2) * np.log(2)


CAPS = [1.0, 50.0, float(hopper.LARGEST_CAP)]


WAYS = [Tanh(polynomials, threes) for polynomials in (1, 2) for threes in (False, True)]
EACH = pytest.mark.parametrize("tanh", WAYS)


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("way", ["slow", "large scores beside them", "large scores before"])
@EACH
def test_the_error_of_tanh_is_little_of_a_cap(way: str, softcap: float, tanh: Tanh) -> None:
    scores = np.linspace(-4 * softcap, 4 * softcap, 64 * 562).reshape(64, -1).T.astype(np.float32)
    exact = softcap * np.tanh(scores.astype(np.float64) / softcap)
    if way == "slow":
        found = capped_slowly(scores, softcap)
    else:
        found = capped(scores, softcap, tanh, 1e6 if "before" in way else -1e6)
    error = (found - exact) / (softcap * 2.0**-22)

    assert np.abs(error).max() <= (1.2 if tanh.threes else 1.15)
    # Of scores that are small beside the cap, as most are.
    assert np.sqrt(np.mean(error[np.abs(exact) < 0.2 * softcap] ** 2)) <= (0.2 if way == "slow" else 0.1)


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize(("tanh", "factor"), [*((way, 1) for way in WAYS), *((way, 2) for way in WAYS[2:])])
def test_the_error_of_small_scores_is_that_of_their_products(tanh: Tanh, factor: int, softcap: float) -> None:
    """Where no score of a warp is beyond BOUND, or twice that, tanh is a polynomial."""
    bound = factor * tanh.bound() * softcap
    scores = np.linspace(-0.9999 * bound, 0.9999 * bound, 64 * 562).reshape(64, -1).T.astype(np.float32)
    exact = softcap * np.tanh(scores.astype(np.float64) / softcap)
    error = (capped(scores, softcap, tanh) - exact) / np.abs(exact) * 2.0**24

    assert np.abs(error).max() <= 8.0  # with what the factors are rounded by
    assert np.sqrt(np.mean(error**2)) <= 3.0


@EACH
def test_powers_are_taken_at_once_only_where_polynomials_end(tanh: Tanh) -> None:
    """Else rows whose largest score is within them would lose by it."""
    bound = tanh.polynomials * tanh.bound()
    most = float(tanh.factors(50.0, 24.0)[3]) - 24

    assert 0.999 < most * np.log(2) / (50 * np.tanh(bound)) <= 1


@pytest.mark.parametrize("count", [32, 64])
@pytest.mark.parametrize("sign", [1, -1])
@EACH
def test_a_score_beyond_the_bound_is_seen_wherever_it_is(count: int, sign: int, tanh: Tanh) -> None:
    """Each row here is a warp with one such score; the polynomials are far off there."""
    scores = np.full((2 * count, count), 0.1)
    np.fill_diagonal(scores[:count], sign * 1.5)
    np.fill_diagonal(scores[count:], sign * 0.7)
    found = capped(scores, 1.0, tanh)

    np.testing.assert_allclose(found, np.tanh(np.float32(scores).astype(np.float64)), rtol=0, atol=2.0**-22)


@EACH
def test_scores_far_beyond_the_cap_are_the_cap(tanh: Tanh) -> None:
    """Four share a reciprocal: none of them may be lost to what is beside it."""
    scores = np.array([(0.5, 40.0, 2e37, 88.0), (-0.5, -40.0, -2e37, -88.0), (2e37, -2e37, 44.0, -44.0)])

    np.testing.assert_allclose(capped(scores, 1.0, tanh), np.tanh(scores), rtol=0, atol=2.0**-22)


@EACH
def test_what_is_no_finite_product_is_not_capped(tanh: Tanh) -> None:
    scores = np.array([(np.nan, 0.5, 1.0, 0.2), (0.1, np.inf, 0.2, 0.3), (0.1, 0.2, 0.3, -np.inf)])
    found = capped(scores, 1.0, tanh)

    assert (np.isnan(found) == ~np.isfinite(scores)).all(), "they must show, and nothing else"


@pytest.mark.parametrize(("setting", "general"), some_of(SETTINGS, [False, True]))
def test_blocks_of_small_scores_beside_blocks_with_a_large_one(setting: str, general: bool) -> None:
    def change(q: Any, k: Any, _v: Any) -> None:
        k[:, :, 150] *= 40.0

    threes = setting in WITH_THREES
    cut = {
        **SETTINGS[setting],
        "threes": threes,
        **({"general": True, "window": (-1, 0)} if general else {"causal": True}),
    }
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


@pytest.mark.parametrize("tanh", WAYS[2:])
def test_powers_are_taken_at_once_where_either_row_of_a_thread_has_had_a_large_score(tanh: Tanh) -> None:
    """A thread holds two rows, of which all threads of a warp go the same way. Powers are off otherwise than the
    polynomial is, by which it shows."""
    scores = np.tile(np.linspace(0.01, 0.3, 128, dtype=np.float32), (64, 1))

    def found(*large: int) -> Any:
        m = np.where(np.isin(np.arange(64), large), 1e6, -1e6).astype(np.float32)
        return np.asarray(tanh.of(scores, 1.0, m, 64))

    small, all_of_them = found(), found(*range(64))
    assert (small != all_of_them).any(1).all()
    for row in (3, 8, 15):  # rows of a thread are eight apart
        others = {row, row + 8 if row < 8 else row - 8}
        np.testing.assert_array_equal(found(row)[sorted(others)], all_of_them[sorted(others)])


# Of kernels with two polynomials, and of those with one: of powers as they are, and of both.
FAULTS = {
    "overflow is not noticed": ('f"fma.rn.f32 {of}, {of}, 0f00000000, rest;"', 'f"mov.b32 {of}, rest;"'),
    "the cap is left out": ("tanh_of(scores, scale, m, BLOCK_N // 2, CAPPED)", "scores * (scale[1] * 404275.0)"),
    "a power of another score": (
        'f"fma.rn.f32 rest, {y}, {inverse}, rest;"',
        'f"fma.rn.f32 rest, a, {inverse}, rest;"',
    ),
    "a reciprocal of two instead of one": ("mul.f32 d1, rest, d1;", "mul.f32 d1, rest, c1;"),
    "large scores by the first polynomial": ('"and.b32 bits, bits, 0x40000000;"', '"and.b32 bits, bits, 0x00000000;"'),
    "large scores by the second polynomial": ('"setp.geu.f32 large, all, 0f40800000;', '"setp.gt.f32 large, all, all;'),
    "a wrong coefficient": ("0f45465F79", "0f45065F79"),
    "a wrong coefficient of the second polynomial": ("0f4294C9E6", "0fC294C9E6"),
    "powers of another unit": ("UNIT.value[polynomials - 1], None)", '"0f4A800000", None)'),
    "powers of another factor": ("TO_LOG2.value[polynomials - 1]", "TO_LOG2.value[2 - polynomials]"),
    "powers at once of another factor": (
        'f"mov.b32 factor, {whole_bend};",\n        f"max',
        'f"mov.b32 factor, {bend};",\n        f"max',
    ),
    "the slow rows' cap is left out": ("score = bent(score, row_bend)", "score = score * row_bend"),
    "tanh of half": ("sm_scale / softcap * (2 * LOG2_E)", "sm_scale / softcap * LOG2_E"),
    "the score keeps the scale": ("gl.minimum(softcap * LOG2_E, FLOAT_MAX), bend", "sm_scale * LOG2_E, bend"),
}
FAULTS_OF_ONE = {
    "a wrong coefficient of a lone polynomial": ("0fC279E10D", "0f4279E10D"),
    "the constants of the other": ("return values[polynomials - 1]", "return values[2 - polynomials]"),
}
# Of products as they are.
FAULTS_OF_PRODUCTS = {
    "overflow of a product": ('f"mul.f32 {of}, {of}, 0f00000000;"', 'f"mov.b32 {of}, 0f00000000;"'),
    "no cap of products": (
        "        scores, peaks = tanh_and_largest(scores, scale, m, BLOCK_N // 2, CAPPED, shift)",
        "        scores = scores * (scale[1] / scale[0])\n        peaks = scores",
    ),
    "large products by the first polynomial": ('"max.s32 bits, bits, other_bits;"', '"mov.b32 bits, 0f00000000;"'),
    "products far below 0 by the first polynomial": (
        '*largest_in_chains("bits", [f"i{i}" for i in range(count)], "max.u32", 4),',
        '"mov.b32 bits, other_bits;",',
    ),
    "large products by the second polynomial": (
        '"setp.gt.u32 large, bits, limit;"',
        '"setp.gt.u32 large, bits, bits;"',
    ),
    "a coefficient of products": ("24.7232609, 3173.96704, 0.0", "24.7232609, 973.96704, 0.0"),
    "a coefficient of the second polynomial of products": ('"mul.f32 all, all, again;", f"mul', 'f"mul'),
    "powers of products of another unit": (
        'large(names[i : i + 4], constant, "again")',
        'large(names[i : i + 4], 2 * constant, "again")',
    ),
    "powers of products of another factor": (
        '[f"mov.b32 factor, {whole_bend};", "mov.b32 third',
        '[f"mov.b32 factor, {bend};", "mov.b32 third',
    ),
}
FAULTS_OF_ONE_OF_PRODUCTS = {
    "a coefficient of a lone polynomial": ("-62.4697762, 1231482.88)", "62.4697762, 1231482.88)"),
}
ONE = FAULTS_OF_ONE | FAULTS_OF_ONE_OF_PRODUCTS
ALL = FAULTS | ONE | FAULTS_OF_PRODUCTS


@pytest.mark.parametrize("fault", some_of(ALL))
def test_a_faulty_kernel_is_noticed(fault: str, tmp_path: Path) -> None:
    faulty = altered(KERNEL, *ALL[fault], tmp_path)
    consumers = 2 if fault in ONE else 1
    threes = fault in FAULTS_OF_PRODUCTS | FAULTS_OF_ONE_OF_PRODUCTS

    def both(source: Path = KERNEL, seed: int = 0, limit: float = 1.0) -> None:
        run = {"source": source, "seed": seed, "limit": limit, "consumers": consumers, "threes": threes}
        check(**run, **{**PROBLEM, "q_len": 20, "kv_len": 140, "scale": 3.0})
        check(**run, **{**PROBLEM, "q_len": 20, "kv_len": 40, "scale": 1.0})  # what stays within the fast range
        check(**run, **{**PROBLEM, "q_len": 20, "kv_len": 140, "scale": 0.7, "softcap": 3.0})  # what polynomials take
        check(**run, **{**LOUD, **PROBLEM, "q_len": 20, "kv_len": 40, "sm_scale": 2.0**-128})

    assert is_noticed(both, faulty, {})
