"""Soft caps whose warps take the same way, in the emulator: kernels/sm90_capped.py."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gluon_emulator import Machine
from gluon_language import load_kernel
from gluon_values import INT32, Shared, tensor
from helpers import examples, some_of
from hypothesis import given
from hypothesis import strategies as st
from sm90_runs import KERNEL, LOUD, altered, check, check_values, is_noticed, run

from pyfmha.attention import hopper

CAPPED, SLOW = (KERNEL.with_name(f"sm90_{name}.py") for name in ("capped", "slow"))
# What the kernel is compiled with.
SETTINGS: dict[str, dict[str, Any]] = {
    "one consumer": {"consumers": 1, "block_d": 128, "v_stages": 3, "head_size": 120, "lazy": True},
    "two consumers": {
        "consumers": 2, "block_n": 128, "block_d": 128, "v_stages": 3, "head_size": 128, "ping_pong": False,
        "lazy": True, "dtype": "bf16",
    },
    "head size 256": {"block_d": 256, "head_size": 136, "q_slots": 1, "dtype": "bf16", "lazy": True},
    "80 keys": {"block_n": 80, "block_d": 256, "head_size": 192, "q_slots": 1, "dtype": "bf16", "lazy": True},
}  # fmt: skip
WAYS = {"five": 0, "nine": 1, "powers": 3}
"""With the level from which on all take it."""


@pytest.mark.parametrize(
    ("setting", "causal", "softcap"),
    some_of(SETTINGS, [False, True, "bottom-right"], [1e-38, 0.01, 24.0, 50.0, float(hopper.LARGEST_CAP)]),
)
def test_caps_of_every_size(setting: str, causal: bool | str, softcap: float) -> None:
    sizes = {"q_len": 140, "kv_len": 200, "heads": 2, "kv_heads": 1, "programs": 2}
    check(**SETTINGS[setting], **sizes, levels=True, causal=causal, softcap=softcap, scale=4.0)


@pytest.mark.parametrize("deviation", [1.0, 3.0, 7.0])
@pytest.mark.parametrize(("block_n", "block_d"), [(112, 128), (80, 256)])
def test_tiles_from_the_longest_that_the_producer_finds(block_n: int, block_d: int, deviation: float) -> None:
    cut = {"block_n": block_n, "block_d": block_d, "longest_first": True, "handed": True, "lazy": True, "levels": True}
    sizes = {"q_len": 300, "kv_len": 300, "heads": 3, "kv_heads": 1, "head_size": block_d, "programs": 2}
    slots = 1 if block_d == 256 else 2
    kept = {"v_stages": 5 - slots, "q_slots": slots, "ping_pong": block_d == 256, "dtype": "bf16"}
    check(**cut, **sizes, **kept, causal=True, softcap=50.0, scale=deviation**0.5, sm_scale=block_d**-0.5)


@examples(12)
@given(
    setting=st.sampled_from(sorted(SETTINGS)),
    softcap=st.sampled_from([7.0, 30.0, 50.0]),
    sizes=st.tuples(st.integers(1, 150), st.integers(1, 200)),
    causal=st.sampled_from([False, True, "bottom-right"]),
    deviation=st.sampled_from([0.01, 1.0, 3.0, 7.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_any_capped_problem(setting, softcap, sizes, causal, deviation, seed) -> None:
    problem = {"q_len": sizes[0], "kv_len": sizes[1], "heads": 1, "levels": True, "seed": seed, "sm_scale": 0.09}
    check(**SETTINGS[setting], **problem, softcap=softcap, causal=causal, scale=deviation**0.5)


# Root mean square of the log-sum-exp's error, of kernels before: sm90_products.py and sm90_powers.py.
BEFORE = {1.0: 4.2e-7, 2.0: 5.4e-7, 3.0: 8.8e-7, 5.0: 1.5e-6, 7.0: 2.5e-6, 30.0: 3.1e-6}


@pytest.mark.parametrize(("setting", "deviation"), some_of(["two consumers", "head size 256"], BEFORE))
def test_errors_are_as_before(setting: str, deviation: float) -> None:
    size = SETTINGS[setting]["block_d"]
    problem = {**SETTINGS[setting], "head_size": size, "heads": 1, "q_len": 128, "kv_len": 512, "levels": True}
    out, lse, wanted, wanted_lse = run(**problem, softcap=50.0, scale=deviation**0.5, sm_scale=size**-0.5)
    check_values(out, lse, wanted, wanted_lse, "bf16", 0.6)

    # Products are rounded here, where tensor cores cut off, by which slopes are greater than they would be best here.
    assert np.sqrt(np.mean((lse - wanted_lse) ** 2)) <= 1.4 * BEFORE[deviation]


def arrays(softcap: float, source: Path = CAPPED) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """The functions, and what they take of a scale of 1."""
    given_factors = tensor(1.0, np.float32), tensor(softcap, np.float32)
    kernel = load_kernel(source, Machine(0))
    factors = load_kernel(SLOW, Machine(0))["score_factors"](given_factors, True)
    return kernel, kernel["capped_factors"](given_factors, factors, tensor(0, np.int32), 0.0)


def exponents(
    products: Any, softcap: float, m: Any = -1e6, level: int = 0, *, begins: bool = True, source: Path = CAPPED
) -> tuple[Any, ...]:
    """Scores in natural units of a warpgroup, from weights; and references, in log2; sums; and the word of the level,
    which no tile has had before."""
    kernel, factors = arrays(softcap, source)
    word = word_of(0)
    weights, references, sums, _, _ = kernel["weigh_capped"](
        (tensor(products, np.float32),), tensor(np.full(64, m), np.float32), tensor(np.zeros((64, 4)), np.float32),
        (factors, word, tensor(0, np.int32)), 0.0, tensor(np.where(np.arange(128) % 32 == 0, level, 0), np.int32),
        None, 0, False, products.shape[1], True, begins, False,
    )  # fmt: skip
    references = np.asarray(references, np.float64)
    with np.errstate(divide="ignore"):
        scores = (np.log2(np.asarray(weights[0], np.float64)) + references[:, None]) * np.log(2)
    return scores, references, np.asarray(sums), int(np.asarray(kernel["seen"](word)).max())


def spread(largest: float, lowest: float = 0.0) -> Any:
    return np.linspace(lowest, largest, 64 * 64).reshape(64, 64)[:, np.random.default_rng(0).permutation(64)]


@pytest.mark.parametrize("softcap", [24.0, 50.0, float(hopper.LARGEST_CAP)])
@pytest.mark.parametrize(("way", "level"), some_of(WAYS, [0, 1, 2, 3]))
def test_each_way_is_the_cap(way: str, level: int, softcap: float) -> None:
    """In the way that scores take, and in those above."""
    kernel, _ = arrays(softcap)
    bound = {"five": kernel["FIVE"], "nine": kernel["NINE"], "powers": 2.5}[way] * softcap * 0.999
    products = np.repeat(spread(bound, -bound / 4).reshape(1, -1)[:, ::64], 64, 0)
    products = np.where(np.arange(64)[:, None] % 2 == 0, products, products * 0.9).astype(np.float32)
    scores, _, _, reached = exponents(products, softcap, level=level)
    exact = softcap * np.tanh(products.astype(np.float64) / softcap)
    error = (scores - exact)[exact > exact.max() - 80]  # whose weights are numbers

    lowest = max(level, int(softcap < kernel["SMALLEST_OF_FIVE"]))
    assert reached == (way != "five") or WAYS[way] < lowest
    limit = 2.0**-22 * softcap if way == "powers" or level == 3 else 2.0**-23 * np.abs(exact).max()
    assert np.abs(error).max() <= 3 * limit
    assert np.sqrt(np.mean(error**2)) <= limit


@pytest.mark.parametrize("softcap", [24.0, 50.0, float(hopper.LARGEST_CAP)])
@pytest.mark.parametrize("way", WAYS)
def test_scores_far_below_weigh_what_they_should(way: str, softcap: float) -> None:
    """Polynomials are off there, but not by what a sum would notice."""
    kernel, _ = arrays(softcap)
    bound = {"five": kernel["FIVE"], "nine": kernel["NINE"], "powers": 2.5}[way] * softcap * 0.999
    below = -np.geomspace(bound, 1e4 * softcap, 64 * 63).reshape(64, 63)
    for largest in (bound, 0.0, kernel["LOWEST_FIVE"] * softcap * 0.99, kernel["LOWEST_NINE"] * softcap * 0.99):
        products = np.concatenate([np.full((64, 1), largest), below], 1).astype(np.float32)
        scores, *_ = exponents(products, softcap)
        exact = softcap * np.tanh(products.astype(np.float64) / softcap)
        most = exact.max(1, keepdims=True)
        error = np.exp(scores - most) - np.exp(exact - most)
        assert np.abs(error).max() <= 3.5e-6  # with that of the slope, of the largest itself


@pytest.mark.parametrize("softcap", [24.0, 30.0, 50.0])
def test_many_scores_far_below_one_add_up_to_what_they_should(softcap: float) -> None:
    """As where a first token draws all attention: 8191 keys with the same score, of which 63 stand here."""
    for largest in (0.0, 0.15 * softcap):
        for below in np.linspace(0.05, 1.2, 47) * softcap:
            products = np.full((64, 64), largest - below, np.float32)
            products[:, 11] = largest
            scores, *_ = exponents(products, softcap)
            exact = softcap * np.tanh(products.astype(np.float64) / softcap)
            sums = [np.exp(x[0, 11] - exact[0, 11]) + 8191 * np.exp(x[0, 0] - exact[0, 11]) for x in (scores, exact)]
            assert abs(np.log(sums[0] / sums[1])) <= 1e-5


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_large_score_is_seen_wherever_it_is(sign: int, begins: bool) -> None:
    """In every place of a thread and in every thread; in the reference above all."""
    for large in (5.0, 20.0, 60.0):
        for shift in range(0, 64, 5):
            products = np.full((64, 64), 0.1, np.float32)
            rows = np.arange(64)
            products[rows, (rows * 7 + shift) % 64] = sign * large
            scores, references, *_ = exponents(products, 50.0, m=0.0 if not begins else -1e6, begins=begins)
            exact = 50 * np.tanh(products.astype(np.float64) / 50)
            counted = exact > -1
            np.testing.assert_allclose(scores[counted], exact[counted], rtol=0, atol=50 * 2.0**-21)
            assert (references * np.log(2) >= exact.max(1) - 1.0).all()
            assert (scores[~counted] < -4.9).all()


@pytest.mark.parametrize("begins", [False, True])
def test_rows_whose_scores_are_all_far_below_take_powers(begins: bool) -> None:
    products = -np.linspace(20.0, 90.0, 4096).reshape(64, 64).astype(np.float32)
    scores, references, _, reached = exponents(products, 50.0, begins=begins)
    exact = 50 * np.tanh(products.astype(np.float64) / 50)

    np.testing.assert_allclose(scores, exact, rtol=0, atol=50 * 2.0**-20)
    np.testing.assert_allclose(references * np.log(2), exact.max(1), rtol=0, atol=1e-4)
    assert reached == 0, "others need not do as they do"


@pytest.mark.parametrize("largest", [1.0, 15.0, 60.0])
def test_what_is_no_number_shows_in_its_row(largest: float) -> None:
    for value in (np.nan, -np.nan, np.inf):
        products = spread(largest).astype(np.float32)
        products[5, 9] = value
        scores, *_ = exponents(products, 50.0)
        assert np.isnan(scores[5]).any()
        assert not np.isnan(np.delete(scores, 5, 0)).any()


def word_of(value: int) -> Any:
    return Shared(np.full((1, 1), value, np.int32), INT32).index(0)


def test_warps_agree_on_the_highest_way() -> None:
    """One raises it, all see it, and it never falls within a tile."""
    kernel, factors = arrays(50.0)
    word, turn = word_of(3 * 4), tensor(3, np.int32)

    def seen() -> int:
        found = np.asarray(kernel["seen"](word)).reshape(4, 32)
        assert (found[:, 1:] == 0).all(), "all lanes ask"
        return int(found[:, 0].max())

    assert seen() == 0
    for way, expected in ((0, 0), (1, 1), (0, 1), (1, 1)):
        reached = np.where(np.arange(128) // 32 == 2, way, 0).astype(np.int32)
        kernel["reach"](word, turn, tensor(reached, np.int32))
        assert seen() == expected
    row_sum = tensor(np.zeros((64, 4)), np.float32)

    def ended(turn: int, m: Any, held: Any) -> tuple[int, Any]:
        held = kernel["reach_next"](word, tensor(turn, np.int32), held, tensor(m, np.float32), row_sum, factors, 0.0)
        return seen(), held

    m = np.full(64, 0.3 * 50, np.float32)
    level, held = ended(3, m, kernel["not_held"]())
    assert level == 1, "the next tile begins with what this one came to"
    level, held = ended(4, m * 0.1, held)
    assert level == 0
    lone = np.where(np.arange(64) == 37, 70.0, m)
    level, held = ended(5, lone, held)
    assert level == 2, "the others need not take powers for one"
    two = np.where(np.arange(64) == 3, 70.0, lone)
    levels = []
    for turn in range(6, 13):
        level, held = ended(turn, two if turn == 6 else m, held)
        levels.append(level)
    assert levels == [3] * kernel["HELD"] + [1] * (7 - kernel["HELD"])


@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_nan_shows_in_its_row_alone(scale: float) -> None:
    def change(q: Any, _k: Any, _v: Any) -> None:
        q[0, 0, 3, 1] = np.nan

    problem = {**SETTINGS["two consumers"], "q_len": 40, "kv_len": 150, "softcap": 30.0, "scale": scale, "levels": True}
    out, lse, wanted, wanted_lse = run(**problem, change=change)
    assert np.isnan(out[0, 0, 3]).all()
    assert np.isnan(lse[0, 0, 3])
    others = np.arange(40) != 3
    check_values(*(x[0, 0, others] for x in (out, lse, wanted, wanted_lse)), "bf16", 1.0)


@pytest.mark.parametrize("sm_scale", [2.0**-20, 2.0**-128])
@pytest.mark.parametrize("setting", SETTINGS)
def test_products_beyond_float32_are_capped_like_others(setting: str, sm_scale: float) -> None:
    problem = {**SETTINGS[setting], **LOUD, "levels": True, "softcap": 30.0, "heads": 1, "q_len": 70, "kv_len": 90}
    check(**{**problem, "sm_scale": sm_scale})


def test_blocks_of_small_scores_beside_blocks_with_a_large_one() -> None:
    def change(_q: Any, k: Any, _v: Any) -> None:
        k[:, :, 150] *= 40.0
        k[:, :, 70] *= 9.0

    for setting in SETTINGS.values():
        for causal in (False, True):
            problem = {"q_len": 180, "kv_len": 180, "heads": 1, "softcap": 30.0, "change": change, "levels": True}
            check(**setting, **problem, causal=causal)


def worst(source: Path = CAPPED) -> float:
    """The largest error of rows in all ways, of 2**-22 of the cap, where weights count."""
    found = 0.0
    rows = np.where(np.arange(64) // 8 % 2 == 0, 1.0, 0.9)[:, None]  # of a thread they are eight apart
    for begins in (False, True):
        for largest in (0.14, 0.5, 2.5):
            products = np.linspace(largest * 50, -0.3 * largest * 50, 64) * rows
            for places in (slice(None), slice(None, None, -1)):  # the largest of a row is in any column
                scores, *_ = exponents(
                    products[:, places], 50.0, 0.0 if not begins else -1e6, begins=begins, source=source
                )
                exact = 50 * np.tanh(np.float32(products[:, places]).astype(np.float64) / 50)
                off = np.abs(scores - exact)[exact > exact.max(1, keepdims=True) - 15]
                found = max(found, off.max() if np.isfinite(off).all() else np.inf)
    low = -np.linspace(15.0, 60.0, 4096).reshape(64, 64)
    scores, *_ = exponents(low, 50.0, source=source)
    with np.errstate(invalid="ignore"):
        off = np.abs(scores - 50 * np.tanh(low / 50))[:, :8]
    return max(found, off.max() if np.isfinite(off).all() else np.inf) / (50 * 2.0**-22)


FAULTS_OF_WAYS = {
    "a coefficient of degree 5": ("-0.3333084135379764", "-0.3433084135379764"),
    "a coefficient of degree 9": ('"fma.rn.f32 all, z, k9, even;"', '"fma.rn.f32 all, z, s9, even;"'),
    "large scores by degree 5": (
        '"setp.gt.s32 way, most, limit5;",\n        "setp.gt.or',
        '"setp.gt.s32 way, most, limit9;",\n        "setp.gt.or',
    ),
    "large scores by degree 9": (
        '"setp.gt.s32 way, most, limit9;",\n            "setp.gt.or.f32',
        '"setp.gt.f32 way, u, u;",\n            "setp.gt.or.f32',
    ),
    "large scores of a first block by degree 9": (
        '"setp.gt.or.s32 way, most, limit9, way;",', '"mov.b32 most, u;",'
    ),
    "low rows by a polynomial": ('"setp.lt.f32 way, z, least9;"', '"setp.lt.f32 way, u, m0;"'),
    "a power of another score": ('(("cd", "b"), ("cd", "a")', '(("cd", "a"), ("cd", "b")'),
    "the cap is rounded": ('f"add.f32 n{row}, n{row}, rest;"', 'f"add.f32 n{row}, n{row}, cap;"'),
    "twice the cap": ("to_log2 * -2.0,", "to_log2 * -2.001,"),
    "references of another row": ('f"fma.rn.f32 {x}, {x}, all, n{i % 4 // 2};"', 'f"fma.rn.f32 {x}, {x}, all, n0;"'),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS_OF_WAYS)
def test_a_faulty_way_is_noticed(fault: str, tmp_path: Path) -> None:
    altered(KERNEL, *FAULTS_OF_WAYS[fault], tmp_path)

    assert worst() <= 4
    assert worst(tmp_path / CAPPED.name) > 16


# Of the whole kernel.
FAULTS = {
    "references that the threads of a row do not share": (
        "    for distance in (1, 2):\n        for row in range(2):\n            lines += [f\"shfl",
        "    for distance in (1,):\n        for row in range(2):\n            lines += [f\"shfl",
    ),
    "sums are not rescaled": ('"mov.b32 due, 1;"', '"mov.b32 due, 0;"'),
    "sums before are not rescaled": ('f"ex2.approx.ftz.f32 alpha{row}, u;"', 'f"mov.b32 alpha{row}, 0f3F800000;"'),
    "powers show what is masked": ('"selp.f32 z, 0fFF800000, z, way;"', '"selp.f32 z, z, z, way;"'),
    "what is masked is seen": (
        "    return gl.where(columns[None, :] < (ends - key)[:, None], products, value)", "    return products"
    ),
    "overflow is not noticed": ('f"fma.rn.f32 z, {x}, 0f00000000, n{row};"', 'f"mov.b32 z, n{row};"'),
    "sums of one half": ('f"add.f32 sum{row}0, sum{row}0, sum{row}1;"', 'f"add.f32 sum{row}0, sum{row}0, sum{row}0;"'),
}  # fmt: skip


@pytest.mark.parametrize("fault", some_of(FAULTS))
def test_a_faulty_kernel_is_noticed(fault: str, tmp_path: Path) -> None:
    faulty = altered(KERNEL, *FAULTS[fault], tmp_path)
    cut = {**SETTINGS["two consumers"], "heads": 1, "levels": True}

    def all_of_them(source: Path = KERNEL, seed: int = 0, limit: float = 1.0) -> None:
        run = {**cut, "source": source, "seed": seed, "limit": limit}
        check(**run, q_len=70, kv_len=300, softcap=30.0, scale=6.0)
        check(**run, q_len=70, kv_len=70, softcap=30.0, scale=6.0, causal=True)
        check(**{**run, **LOUD, "q_len": 20, "kv_len": 40, "softcap": 30.0, "sm_scale": 2.0**-128})

    assert is_noticed(all_of_them, faulty, {})
