"""float32 as parts in fp16 (kernels/fp16x3.py) under the interpreter, in the production kernel: sizes that differ."""

import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from forward_runs import LARGEST, LIMITS, Problem, Tensors, check, expected, fill, launch, place
from helpers import examples, some_of
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng

from pyfmha.attention.reference import relative_error

PROBLEM = Problem(
    dtype="fp32", precision="fp16x3", q_len=34, kv_len=70, head_size=48, blocks=(32, 32), softcap_mode="never"
)
FLOAT32 = 2e-6
"""What float32 may leave of such a problem, relative to the norm of a row of Out; half of it is usual."""


def made(problem: Problem, q: object = 1.0, k: object = 1.0, v: object = 1.0) -> Tensors:
    """Normal numbers, times factors that broadcast to [batch, heads, seq, head size]."""
    tensors = place(problem)
    fill(problem, tensors)
    for name, factor in (("Q", q), ("K", k), ("V", v)):
        tensors.views[name][...] *= np.asarray(factor, np.float32)
    return tensors


def row_errors(out: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Of each row of Out, relative to its norm."""
    norm = np.linalg.norm(exact, axis=-1)
    return np.linalg.norm(out - exact, axis=-1) / np.where(norm == 0, 1, norm)


@pytest.fixture
def safely(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one element for each tile that leaves the fast range."""
    launch(replace(PROBLEM, q_len=1, kv_len=1), made(replace(PROBLEM, q_len=1, kv_len=1)))  # loads the kernel
    kernel = sys.modules["_interpreted_fmha_fwd"]
    calls: list[int] = []

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        return lambda *args, **named: calls.append(1) or real(*args, **named)

    for name in ("attend_safely", "compute_safely"):
        monkeypatch.setattr(kernel, name, counted(getattr(kernel, name)))
    return calls


# exponents of what Q, K and V are multiplied by; float32 holds 2**-126 to 2**127.
powers = st.integers(-110, 110)


@examples(15)
@given(
    q=powers,
    score=st.integers(-8, 1),
    v=st.integers(-100, 120),
    softcap=st.sampled_from([0.0, 0.0, 3.0, 1e4, 1e30]),
    mode=st.sampled_from(["any", "own"]),
    scale=st.sampled_from([0.125, -0.3, 1e-20, 1e12]),
    seed=st.integers(0, 9),
)
def test_powers_of_two_change_nothing(q, score, v, softcap, mode, scale, seed) -> None:
    # Whatever the sizes of Q, K, V and the scale, as long as scores are moderate.
    own = "always" if softcap else "never"
    problem = replace(PROBLEM, softcap=softcap, softcap_mode=own if mode == "own" else mode, seed=seed, scale=scale)
    k = score - q - round(np.log2(abs(scale)))
    tensors = made(problem, 2.0**q, 2.0 ** max(min(k, 120), -120), 2.0**v)
    out, lse = launch(problem, tensors)
    exact, exact_lse = expected(problem, tensors)
    assert relative_error(out, exact) <= FLOAT32
    np.testing.assert_allclose(lse, exact_lse, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("softcap", [1e20, 1e27, 1e38])
@pytest.mark.parametrize("size", [0.3, 0.01, 1e-4])
def test_a_soft_cap_beyond_all_scores_is_none(softcap, size) -> None:
    problem = replace(PROBLEM, softcap=softcap, softcap_mode="always")
    tensors = made(problem, size, size)
    out, lse = launch(problem, tensors)
    exact, exact_lse = expected(problem, tensors)
    assert relative_error(out, exact) <= FLOAT32
    np.testing.assert_allclose(lse, exact_lse, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("right", [-1, 0])
def test_ordinary_input_stays_in_the_fast_loop(softcap, right, safely) -> None:
    problem = replace(PROBLEM, softcap=softcap, softcap_mode="any", right=right, bottom_right=True)
    for factors in ({}, {"q": 30.0}, {"k": 2.0**-60, "q": 2.0**60}, {"v": 0}, {"v": 1e-36}, {"v": 1e36}, {"q": 0}):
        tensors = made(problem, **factors)
        out, _ = launch(problem, tensors)
        assert relative_error(out, expected(problem, tensors)[0]) <= FLOAT32
    assert not safely


@pytest.mark.parametrize("ratio", [1e3, 1e6, 1e9])
def test_channels_of_v_of_very_different_size(ratio, safely) -> None:
    # float32 is right for each channel by itself. Parts in fp16 are off by 2**-39 of the largest element besides.
    large = np.arange(48) % 7 == 0
    tensors = made(PROBLEM, v=np.where(large, ratio, 1.0))
    out, _ = launch(PROBLEM, tensors)
    exact, _ = expected(PROBLEM, tensors)
    assert row_errors(out, exact).max() <= FLOAT32
    small = row_errors(out[..., ~large], exact[..., ~large])
    size = np.abs(tensors.views["V"]).max() / np.linalg.norm(exact[..., ~large], axis=-1)
    assert (small <= FLOAT32 + 2.0**-39 * np.sqrt((~large).sum()) * size).all()
    assert not safely


def test_channels_that_are_large_in_k_and_small_in_q(safely) -> None:
    # Products of the channels are alike, so float32 loses nothing; a block's largest element alone would decide here.
    for spread in (1, 3, 8):
        factor = np.exp2(spread * default_rng(5).standard_normal(48))
        tensors = made(PROBLEM, q=1 / factor, k=factor)
        out, lse = launch(PROBLEM, tensors)
        exact, exact_lse = expected(PROBLEM, tensors)
        assert relative_error(out, exact) <= FLOAT32, spread
        np.testing.assert_allclose(lse, exact_lse, rtol=4e-6)
        assert bool(safely) == (spread == 8)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_values_that_only_other_queries_of_the_tile_see(softcap, safely) -> None:
    # Key 0 is seen by the first queries alone, and so large that the others' values vanish beside it.
    problem = replace(PROBLEM, q_len=64, kv_len=64, left=20, right=0, softcap=softcap, softcap_mode="any")
    rows = np.ones((1, 1, 64, 1))
    rows[:, :, 0] = 1e8
    tensors = made(problem, v=rows)
    out, _ = launch(problem, tensors)
    assert row_errors(out, expected(problem, tensors)[0]).max() <= FLOAT32
    assert len(safely) == 1


def small_weights() -> tuple[Problem, Tensors, float]:
    """Weights of 2**-30 to 2**-29 of values of 2**30 beside one key of weight 1 and value 1; and the error that float32
    may leave of it.

    A score is a product of one channel, exact; to become a weight it is multiplied by a constant of 24 bits, rounded
    and subtracted: of a weight exp(-s), each rounding is s * 2**-24.
    """
    problem = replace(PROBLEM, scale=1.0, q_len=16)
    rows = np.full((1, 1, 70, 1), 2.0**30)
    rows[:, :, 7] = 1.0
    tensors = made(problem, v=rows)
    for name in "QK":
        tensors.views[name][...] = 0
    tensors.views["Q"][..., 0] = 1
    scores = np.log(2) * np.linspace(-30, -29, 70)
    scores[7] = 0
    tensors.views["K"][..., 0] = scores
    return problem, tensors, FLOAT32 + 4 * 30 * np.log(2) * 2.0**-24


def test_values_so_large_that_their_small_weight_counts(safely) -> None:
    # A part in fp16 has few bits of such a weight.
    problem, tensors, limit = small_weights()
    out, _ = launch(problem, tensors)
    assert row_errors(out, expected(problem, tensors)[0]).max() <= limit
    assert len(safely) == 1


def test_small_weights_that_count_are_wrong_in_the_fast_loop(safely, monkeypatch) -> None:
    # What the test above would see, were such rows not told.
    kernel = sys.modules["_interpreted_fmha_fwd"]
    monkeypatch.setattr(kernel, "precise_rows", lambda acc, row_sum, *rest: row_sum == row_sum)
    problem, tensors, limit = small_weights()
    out, _ = launch(problem, tensors)
    assert row_errors(out, expected(problem, tensors)[0]).max() > 10 * limit
    assert not safely


@pytest.mark.parametrize(("softcap", "bad", "name"), some_of([0.0, 5.0], [np.nan, np.inf, -np.inf], ["K", "V"]))
def test_nan_and_infinity_show_where_they_take_part_and_nowhere_else(name, bad, softcap) -> None:
    problem = replace(PROBLEM, q_len=64, kv_len=64, right=0, softcap=softcap, softcap_mode="any", with_lse=False)
    clean = launch(problem, made(problem))[0]
    tensors = made(problem)
    tensors.views[name][0, 0, 40, 3] = bad  # seen from query 40 on: in the second tile of 32
    out = launch(problem, tensors)[0]
    np.testing.assert_array_equal(out[:, :, :32], clean[:, :, :32])
    usual = launch(replace(problem, precision="tf32x3"), tensors)[0]
    np.testing.assert_array_equal(np.isnan(out), np.isnan(usual))
    np.testing.assert_array_equal(np.abs(out) == LARGEST["fp32"], np.abs(usual) == LARGEST["fp32"])
    if name == "V" or np.isnan(bad):  # an infinite score may weigh 0, or be capped
        assert (np.isnan(out) | (np.abs(out) == LARGEST["fp32"]))[0, 0, 40:, 3].all()


def test_scores_beyond_the_range_of_parts_are_right(safely) -> None:
    # Two keys far above the rest, nearly alike: their difference takes all the bits of float32.
    problem = replace(PROBLEM, scale=1.0)
    tensors = made(problem, q=1000.0, k=1000.0)
    out, lse = launch(problem, tensors)
    exact, exact_lse = expected(problem, tensors)
    assert relative_error(out, exact) <= LIMITS["fp32"]
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-5)
    assert len(safely) == 2


WIDE = replace(PROBLEM, head_size=200)
"""Beyond head size 128 the sums are kept in parts of 64 columns."""


@examples(8)
@given(
    head_size=st.sampled_from([129, 192, 193, 200, 256]),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    heads=st.sampled_from([(1, 1), (4, 2)]),
    layout=st.sampled_from(["bhsd", "bshd"]),
    mask=st.sampled_from([(-1, -1, False), (-1, 0, False), (-1, 0, True), (9, 3, True)]),
    softcap=st.sampled_from([0.0, 3.0]),
    with_lse=st.booleans(),
    seed=st.integers(0, 9),
)
def test_sums_in_parts(head_size, sizes, heads, layout, mask, softcap, with_lse, seed) -> None:
    (q_len, kv_len), (left, right, bottom_right) = sizes, mask
    out = check(
        Problem(
            dtype="fp32", precision="fp16x3", q_len=q_len, kv_len=kv_len, head_size=head_size, heads=heads[0],
            kv_heads=heads[1], layout=layout, left=left, right=right, bottom_right=bottom_right, softcap=softcap,
            softcap_mode="always" if softcap else "never", with_lse=with_lse, seed=seed, blocks=(32, 32),
        )
    )  # fmt: skip
    assert out.shape[-1] == head_size


def test_sums_in_parts_of_ragged_and_padded_batches(safely) -> None:
    ragged = replace(WIDE, heads=2, q_len=80, kv_len=90, cu_q=(2, 7, 7, 75), cu_kv=(0, 40, 41, 90), right=0)
    check(ragged)
    check(replace(WIDE, batch=3, q_lengths=(34, 0, 5), kv_lengths=(3, 70, 0)))
    assert not safely


@pytest.mark.parametrize("part", range(4))
def test_parts_share_one_unit(part, safely) -> None:
    # Whichever part holds the largest values, all of Out has float32's error, relative to a row.
    problem = replace(WIDE, head_size=256)
    tensors = made(problem, v=np.where(np.arange(256) // 64 == part, 1e6, 1.0))
    out, _ = launch(problem, tensors)
    assert row_errors(out, expected(problem, tensors)[0]).max() <= FLOAT32
    assert not safely


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("lengths", [None, (29,)])
def test_a_tile_of_parts_is_computed_again_row_by_row(softcap, lengths, safely) -> None:
    # One query beyond the fast range sends its whole tile to the safe loop: rows of other tiles, padding and the
    # log-sum-exp included.
    problem = replace(
        WIDE, q_len=70, heads=2, right=0, bottom_right=True, softcap=softcap, softcap_mode="any", q_lengths=lengths
    )
    tensors = made(problem)
    tensors.views["Q"][0, 1, 20] *= 1e9
    out, lse = launch(problem, tensors)
    exact, exact_lse = expected(problem, tensors)
    assert row_errors(out, exact).max() <= LIMITS["fp32"]
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-5, atol=5e-6)
    assert len(safely) == 1


def test_the_largest_values_in_every_part_stay_finite(safely) -> None:
    tensors = made(WIDE)
    for view in tensors.views.values():
        view[...] = LARGEST["fp32"]
    out, lse = launch(WIDE, tensors)
    np.testing.assert_allclose(out, LARGEST["fp32"], rtol=1e-6)
    assert np.isfinite(lse).all()
    assert safely
