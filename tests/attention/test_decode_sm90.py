"""The Hopper kernel of decoding in the emulator: its numbers, its barriers, and what its programs put in each other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decode_runs import COPIED, EIGHT, EVEN, FETCHED, LONG, PADDED, PARTS, RANGE, WINDOW, check, loud_start, run
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from sm90_runs import TOLERANCE, altered, is_noticed, largest, largest_bf16, loud

from pyfmha.attention.reference import relative_error

BOTH = pytest.mark.parametrize("source", [FETCHED, COPIED], ids=["fetched", "copied"])


@BOTH
@pytest.mark.parametrize("kv_len", [1, 5, 63, 64, 65, 300])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_share_any_number_of_keys(source: Path, ranks: int, kv_len: int) -> None:
    check(source=source, seed=kv_len, ranks=ranks, kv_len=kv_len)


def no_queries(q: Any, k: Any, v: Any) -> None:
    q[...] = 0


@BOTH
@pytest.mark.parametrize(
    "problem",
    [
        {"heads": 1},
        {"heads": 8, "kv_heads": 2, "batch": 2},
        {"heads": 8, "dtype": "bf16"},
        {"heads": 9, "ranks": 4},
        {"heads": 24, "kv_heads": 2, "batch": 2, "ranks": 1},
        {"heads": 18, "kv_heads": 2, "layout": "bshd", "dtype": "bf16"},
        {"head_size": 8, "ranks": 8},
        {"head_size": 40, "layout": "bshd", "batch": 2},
        {"head_size": 72, "block_d": 128, "ranks": 4},
        {"head_size": 96, "block_d": 128, "dtype": "bf16", "layout": "bshd", "heads": 12, "kv_heads": 3},
        {"block_d": 128, "block_n": 64, "kv_len": 300, "ranks": 8},
        {"block_d": 256, "block_n": 64, "kv_len": 70, "dtype": "bf16"},
        {"block_n": 128, "stages": 4, "kv_len": 1500, "ranks": 2},
        {"stages": 1, "kv_len": 200},
        {"stages": 3, "kv_len": 200, "ranks": 1},
        {"sm_scale": -0.125},
        {"sm_scale": -0.125, "dtype": "bf16"},
        {"sm_scale": 0.0},
        {"sm_scale": 0.0, "dtype": "bf16", "kv_lengths": [37]},
        {"sm_scale": 3e38, "scale": 2.0**-70, "dtype": "bf16"},
        {"change": no_queries, "dtype": "bf16"},
    ],
    ids=lambda problem: str({name: getattr(value, "__name__", value) for name, value in problem.items()}),
)
def test_heads_layouts_and_settings(source: Path, problem: dict[str, Any]) -> None:
    check(source=source, **problem)


@BOTH
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (20, -1), (33, 0), (0, 0), (-1, 21), (5, 40), (2**31 - 1, 0)])
@pytest.mark.parametrize("bottom_right", [False, True])
def test_windows(source: Path, window: tuple[int, int], bottom_right: bool) -> None:
    lengths = [100, 50, 16, 1, 0]

    check(source=source, window=window, bottom_right=bottom_right, kv_lengths=lengths, batch=5, heads=1)


@BOTH
def test_the_widest_windows_do_not_overflow(source: Path) -> None:
    check(source=source, window=(2**31 - 1, 2**31 - 1), kv_len=40)


@BOTH
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_what_lies_beyond_a_length_changes_nothing(source: Path, dtype: str, ranks: int) -> None:
    lengths = [0, 1, 16, 31, 70, 100, 101, 2**31 - 1, -1, -(2**31)]
    problem = {"dtype": dtype, "ranks": ranks, "kv_lengths": lengths, "batch": len(lengths), "heads": 1}

    check(source=source, **problem)
    out, lse, _, _ = run(source=source, **problem)
    for b in (0, 8, 9):
        assert (out[b] == 0).all()
        assert np.isneginf(lse[b]).all()


@BOTH
def test_lse_may_be_left_out(source: Path) -> None:
    out, lse, wanted, _ = run(source=source, lse=False)

    assert relative_error(out, wanted) < TOLERANCE["fp16"]
    assert (lse == 7).all()


@BOTH
@pytest.mark.parametrize(("dtype", "value"), [("fp16", 65504.0), ("bf16", 255 * 2.0**120)])
@pytest.mark.parametrize("sm_scale", [1.0, -1.0, 3.4e38])
def test_the_largest_inputs_stay_finite(source: Path, dtype: str, value: float, sm_scale: float) -> None:
    """A row of the largest scores, one of the smallest, and one of both."""

    def change(q: Any, k: Any, v: Any) -> None:
        q[:, :, 0], k[...], v[...] = value, value, value
        q[:, 1] *= -1
        k[:, :, ::3] *= -1
        v[..., 1::2] *= -1

    out, lse, wanted, _ = run(source=source, dtype=dtype, sm_scale=sm_scale, change=change, kv_len=70, heads=2)

    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()
    assert relative_error(out, wanted) < TOLERANCE[dtype]


@BOTH
@pytest.mark.parametrize(("dtype", "scale"), [("fp16", 2.0**13), ("bf16", 2.0**125)])
def test_of_large_inputs_the_best_key_is_found(source: Path, dtype: str, scale: float) -> None:
    out, lse, wanted, _ = run(source=source, dtype=dtype, scale=scale, ranks=4)

    assert np.isfinite(out).all()
    assert not np.isnan(lse).any()
    assert relative_error(out, wanted) < TOLERANCE[dtype]


@BOTH
def test_bf16_products_may_leave_the_range(source: Path) -> None:
    check(source=source, dtype="bf16", sm_scale=2.0**-20, change=loud, head_size=32)


@BOTH
@pytest.mark.parametrize(("dtype", "change"), [("fp16", largest), ("bf16", largest_bf16)])
def test_a_mean_of_the_largest_values_is_not_rounded_to_infinity(
    source: Path, dtype: str, change: Callable[..., None]
) -> None:
    check(source=source, dtype=dtype, change=change)


@BOTH
def test_nan_stays_in_its_head(source: Path) -> None:
    def change(q: Any, _k: Any, _v: Any) -> None:
        q[0, 1, 0, 3] = np.nan

    out, lse, wanted, wanted_lse = run(source=source, heads=3, change=change)

    assert np.isnan(out[0, 1]).all()
    assert np.isnan(lse[0, 1])
    assert relative_error(out[0, ::2], wanted[0, ::2]) < TOLERANCE["fp16"]
    np.testing.assert_allclose(lse[0, ::2], wanted_lse[0, ::2], rtol=1e-4, atol=1e-4)


@BOTH
@examples(15)
@given(data=st.data())
def test_any_problem(source: Path, data: st.DataObject) -> None:
    batch, kv_heads, kv_len = (data.draw(st.integers(1, most)) for most in (2, 2, 200))
    lengths = st.none() | st.lists(st.integers(-2, kv_len + 2), min_size=batch, max_size=batch)
    bounds = st.just(-1) | st.integers(0, 220)
    check(
        source=source,
        seed=data.draw(st.integers(0, 1000)),
        ranks=data.draw(st.sampled_from([1, 2, 4, 8])),
        batch=batch,
        kv_heads=kv_heads,
        heads=kv_heads * data.draw(st.integers(1, 12)),
        kv_len=kv_len,
        kv_lengths=data.draw(lengths),
        window=(data.draw(bounds), data.draw(bounds)),
        bottom_right=data.draw(st.booleans()),
        dtype=data.draw(st.sampled_from(["fp16", "bf16"])),
        stages=data.draw(st.integers(1, 4)),
        layout=data.draw(st.sampled_from(["bhsd", "bshd"])),
        head_size=8 * data.draw(st.integers(1, 8)),
        sm_scale=data.draw(st.floats(-0.5, 0.5, width=32)),
    )


# What is replaced by what, and the problem that shows it.
MUTANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "no fence makes Q visible": ("    fence_async_shared()\n    gl.barrier()\n\n", "    gl.barrier()\n\n", {}),
    "no barrier follows Q": ("    fence_async_shared()\n    gl.barrier()\n\n", "    fence_async_shared()\n\n", {}),
    "no fence makes the weights visible": (
        "        fence_async_shared()\n        gl.barrier()\n        acc",
        "        gl.barrier()\n        acc",
        {},
    ),
    "no barrier follows the weights": (
        "        fence_async_shared()\n        gl.barrier()\n        acc",
        "        fence_async_shared()\n        acc",
        {},
    ),
    "a stage is fetched again before it is read": (
        "        gl.barrier()\n        if turn +",
        "        if turn +",
        LONG,
    ),
    "a block too many is fetched": ("turn + STAGES < count", "turn + STAGES <= count", LONG),
    "a block too many is fetched at first": (
        "v_smem.index(s), pred=s < count",
        "v_smem.index(s), pred=s <= count",
        {"kv_len": 8},
    ),
    "another block is fetched": ("begin + (turn + STAGES) * BLOCK_N", "begin + (turn + 1) * BLOCK_N", LONG),
    "fewer bytes are expected": (
        "mbarrier.expect(ready[i].index(stage), BYTES",
        "mbarrier.expect(ready[i].index(stage), 64",
        LONG,
    ),
    "more bytes are expected of TMA": ("BLOCK_N * BLOCK_D * 2", "BLOCK_N * BLOCK_D * 4", {}),
    "K is not waited for": ("        mbarrier.wait(k_ready.index(stage), phase)\n", "", {}),
    "V is not waited for": ("        mbarrier.wait(v_ready.index(stage), phase)\n", "", {}),
    "the phase is that of the first round": ("phase = (turn // STAGES) & 1", "phase = 0", LONG),
    "the padding of V is kept": ("if (end < kv_len) & (left < BLOCK_N):", "if left < 0:", PADDED),
    "a row of padding is kept": ("gl.where((rows < left)[", "gl.where((rows <= left)[", PADDED),
    "a key too many": ("(keys < left)[:, None]", "(keys <= left)[:, None]", {}),
    "a key too few": ("(keys < left)[:, None]", "(keys < left - 1)[:, None]", {}),
    "lengths may be beyond the tensor": (
        "gl.minimum(gl.maximum(gl.load(kv_lengths + batch), 0), kv_len)",
        "gl.maximum(gl.load(kv_lengths + batch), 0)",
        {"kv_lengths": [105]},
    ),
    "the right end of the window is off by one": ("window_right + 1, kv_n", "window_right, kv_n", WINDOW),
    "the left end of the window is off by one": ("diagonal - window_left, 0", "diagonal - window_left + 1, 0", WINDOW),
    "the window ends at the tensor's end": ("bottom_right != 0, kv_n - 1", "bottom_right != 0, kv_len - 1", WINDOW),
    "programs begin a block apart": ("begin += rank * share * BLOCK_N", "begin += rank * BLOCK_N", {}),
    "blocks that are no whole share are lost": ("(blocks + ranks - 1) >> halvings", "blocks >> halvings", {}),
    "the first programs take all": ("gl.maximum(blocks - rank * share, 0), share)", "blocks, blocks)", {}),
    "halves are counted as in a cluster of 2": ("+ (ranks > 4).to(gl.int32)", "+ 0", EIGHT),
    "no maximum is kept": ("m_new = gl.maximum(m, ", "m_new = gl.maximum(LOWEST, ", {"change": loud_start}),
    "the output is not rescaled": ("acc = acc * alpha[None, :]\n", "acc = acc\n", {}),
    "the sums are not rescaled": ("sums = sums * alpha[None, :] + p", "sums = sums + p", {}),
    "a negative scale is taken for positive": ("        q = -q\n", "        q = q\n", {"sm_scale": -0.125}),
    "bf16 is not shifted": ("gl.constexpr(24.0)", "gl.constexpr(0.0)", {"dtype": "bf16", "change": largest_bf16}),
    "Lse is shifted": (" + shift) * LN_2", ") * LN_2", {"dtype": "bf16"}),
    "large bf16 queries stay large": ("return (wide * down[:, None]", "return (wide", RANGE),
    "fp16 beyond the largest becomes infinite": ("gl.where(out > most, most", "gl.where(out > most, out", EVEN),
    "all parts take the first heads": ("first_head = kv_head % parts * HEADS", "first_head = 0", PARTS),
    "parts and key heads are mixed up": ("kv_head = kv_head // parts", "kv_head = kv_head % parts", PARTS),
    "the last part has 8 heads": (" & (first_head + column < group)", "", PARTS),
    "queries beyond the last are read": ("(q_rows < group)[:, None]", "(q_rows >= 0)[:, None]", PARTS),
    "columns beyond the head size are read": ("(q_columns < head_size)[", "(q_columns >= 0)[", {"head_size": 40}),
    "columns beyond the head size are written": ("mask=inside & (d < head_size)", "mask=inside", {"head_size": 40}),
    "the cluster is not waited for": ("    _join(thread)\n", "", {}),
    "a lone program's threads do not meet": ("    if ranks == 1:\n        gl.barrier()\n", "", {"ranks": 1}),
    "a lone program sends itself what it keeps": ("gl.where(ranks > 1, 1, 2)", "1", {"ranks": 1}),
    "what is put is not waited for": ("    _receive(thread * 0 + barrier, thread)\n", "", {}),
    "fewer bytes are expected of the cluster": (
        "ranks > 1, 4 * (BLOCK_D * HEADS + ranks * STATISTICS)",
        "ranks > 1, 4 * (BLOCK_D * HEADS)",
        {},
    ),
    "the bytes of the largest cluster are expected": (
        "ranks > 1, 4 * (BLOCK_D * HEADS + ranks * STATISTICS)",
        "ranks > 1, 4 * (BLOCK_D * HEADS + RANKS * STATISTICS)",
        {},
    ),
    "a program counts its own bytes only": ("every + to[:, None], acc", "every + rank, acc", {}),
    "programs put into one place": ("slot = rank * rows_each + row", "slot = row", {}),
    "statistics are put into one place": ("HEADS + rank * STATISTICS", "HEADS + STATISTICS", {}),
    "the factors are not sent": ("wanted = (kind < 3)", "wanted = (kind < 2)", {}),
    "statistics are sent beyond the cluster": (" & (row % RANKS < ranks)[:, None]", "", {}),
    "the barrier lies among the statistics": ("+ RANKS * STATISTICS)\n    expected", "+ 24)\n    expected", {}),
    "what follows the room is not aligned": (" + 1023) // 1024 * 1024", ")", {}),
    "the last program counts for those missing": ("gl.where(other < ranks, ", "gl.where(other < RANKS, ", {}),
    "the first program's maxima count for all": ("4 * (sender * STATISTICS +", "4 * (0 * sender +", {}),
    "programs beyond their rows write": ("(place < values) & ", "", EIGHT),
    "all programs write the first rows": ("d = rank * (BLOCK_D >> halvings) + ", "d = ", {}),
}


@pytest.mark.parametrize("seed", range(3))
def test_the_kernel_is_right_where_faults_are_noticed(seed: int) -> None:
    for problem in {str(problem): problem for _, _, problem in MUTANTS.values()}.values():
        check(seed=seed, **problem)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_faulty_kernel_is_noticed(mutant: str, tmp_path: Path) -> None:
    """The emulator would find what it is there to find."""
    right, wrong, problem = MUTANTS[mutant]
    assert is_noticed(check, altered(FETCHED, right, wrong, tmp_path), problem), "no interleaving showed the fault"
