"""Values of a smaller head size than Q and K in the Hopper kernel, in the emulator."""

from pathlib import Path
from typing import Any

import pytest
from helpers import examples, few_of, some_of
from hypothesis import given
from hypothesis import strategies as st
from sm90_biased_runs import VALUES, check
from sm90_runs import altered, is_noticed

SETTINGS: dict[str, dict[str, Any]] = {
    "a buffer for Out": {"consumers": 2, "block_n": 128, "q_slots": 1, "apart": True, "dtype": "bf16"},
    "one consumer": {"consumers": 1, "q_slots": 1},
    "longest first": {"consumers": 2, "block_n": 128, "q_slots": 1, "apart": True, "longest_first": True},
    "evenly": {
        **{"consumers": 2, "block_n": 128, "q_slots": 1, "apart": True, "handed": True, "brief": True, "even": 2},
        **{"threes": True, "producer_first": True},
    },
}
PROBLEM: dict[str, Any] = {
    "values_alone": True, "block_v": 128, "late": False, "heads": 2, "kv_heads": 1, "q_len": 140, "kv_len": 200,
    "head_size": 192, "v_head_size": 128, "sm_scale": 0.07,
}  # fmt: skip


def problem(setting: str, **changes: Any) -> dict[str, Any]:
    return PROBLEM | SETTINGS[setting] | changes


@pytest.mark.parametrize(("setting", "causal", "layout"), some_of(SETTINGS, [False, True], ["bhsd", "bshd"]))
def test_values_have_columns_of_their_own(setting: str, causal: bool, layout: str) -> None:
    causal = causal or setting != "a buffer for Out"
    check(**problem(setting, causal=causal, layout=layout))


@pytest.mark.parametrize(("size", "values"), [(192, 8), (136, 64), (160, 96), (192, 120), (136, 128)])
def test_what_a_head_lacks_of_the_columns_is_neither_read_nor_written(size: int, values: int) -> None:
    check(**problem("a buffer for Out", head_size=size, v_head_size=values, causal=True, layout="bshd"))


@examples(12)
@given(
    setting=st.sampled_from(sorted(SETTINGS)),
    sizes=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    columns=st.tuples(st.integers(17, 24), st.integers(1, 16)),
    bottom_right=st.booleans(),
    programs=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_problem(setting, sizes, columns, bottom_right, programs, seed) -> None:
    """Bottom right, one consumer passes over blocks that the other sees."""
    (q_len, kv_len), (size, values) = sizes, columns
    shape = {"q_len": q_len, "kv_len": kv_len, "head_size": 8 * size, "v_head_size": 8 * values, "heads": 1}
    check(**problem(setting, **shape, bottom_right=bottom_right, programs=programs, seed=seed), causal=True)


def loud(*, q: Any, k: Any, **_: Any) -> None:
    q *= 2.0**66
    k *= 2.0**62


LOUD: dict[str, Any] = {"dtype": "bf16", "sm_scale": 2.0**-20, "change": loud, "q_len": 70, "kv_len": 20}


@pytest.mark.parametrize("values", [128, 72])
def test_rows_that_leave_the_fast_range_are_computed_again_in_their_columns(values: int) -> None:
    check(**problem("a buffer for Out", **LOUD, v_head_size=values, head_size=136, causal=values == 72))


FAULTS = {
    "fewer bytes of values are waited for": ("2 if SHAPE.TWO_PARTS else 1", "1 if SHAPE.TWO_PARTS else 1"),
    "more bytes of values are waited for": ("2 if SHAPE.TWO_PARTS else 1", "3 if SHAPE.TWO_PARTS else 1"),
    "a slot is free before the last scores": (
        "        m = gl.full([ROWS], shift - FAST_LIMIT",
        "        if SHAPE.APART:\n            mbarrier.arrive(q_free.index(slot), count=1)\n"
        "        m = gl.full([ROWS], shift - FAST_LIMIT",
    ),
    "the buffer is not waited for": (
        "mbarrier.wait(plain[1].index(0), ((turn * CONSUMERS + CONSUMER) & 1) ^ 1)",
        "turn += 0",
    ),
    "the buffer is free before Out has left it": (
        "            tma.store_wait(0)\n            mbarrier.arrive(plain[1]",
        "            mbarrier.arrive(plain[1]",
    ),
    "the buffer is never free again": ("if turn > 0:  # the other consumer may wait", "if turn < 0:  # the other"),
    "Out is stored from the slot of its rows": (
        "first_row, plain[0], 0, len(acc), SHAPE)", "first_row, q_smem, slot, len(acc), SHAPE)"
    ),
    "the slow rows have the columns of Q": ("v_columns < v_head_size[0]", "v_columns < head_size"),
    "the slow rows lack columns": ("V_COLUMNS: gl.constexpr = 2 * SHAPE", "V_COLUMNS: gl.constexpr = 1 * SHAPE"),
}  # fmt: skip
SMALL: dict[str, Any] = {"heads": 1, "q_len": 260, "kv_len": 130, "programs": 1}


def both(source: Path = VALUES, seed: int = 0, limit: float = 1.0) -> None:
    run = {"source": source, "seed": seed, "limit": limit}
    check(**run, **problem("a buffer for Out", **SMALL))
    check(**run, **problem("a buffer for Out", **LOUD | {"q_len": 20, "v_head_size": 120}, layout="bshd"))


@pytest.mark.parametrize(
    "fault", few_of(FAULTS, lambda name: name in ("the buffer is not waited for", "the slow rows lack columns"))
)
def test_a_faulty_kernel_is_noticed(fault: str, tmp_path: Path) -> None:
    assert is_noticed(both, altered(VALUES, *FAULTS[fault], tmp_path), {})
