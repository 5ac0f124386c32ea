"""Head sizes of two parts in the Hopper kernel, in the emulator."""

from pathlib import Path
from typing import Any

import pytest
from helpers import some_of
from hypothesis import given, settings
from hypothesis import strategies as st
from sm90_runs import KERNEL, LOUD, altered, check, is_noticed

# What the kernel is compiled with; boxes have a third of the columns.
SETTINGS: dict[str, dict[str, Any]] = {
    "head size 96": {"block_d": 32, "block_n": 128, "stages": 3, "v_stages": 3},
    "head size 96, short": {"block_d": 32, "consumers": 1, "v_stages": 3},
    "head size 192": {"block_d": 64, "dtype": "bf16"},
    "head size 192, a buffer for Out": {
        **{"block_d": 64, "dtype": "bf16", "stages": 3, "q_slots": 1, "apart": True, "lazy": True, "threes": True},
    },
}
PROBLEM: dict[str, Any] = {"two_parts": True, "heads": 2, "kv_heads": 1, "q_len": 140, "kv_len": 200}
COLUMNS = {32: (96, 72), 64: (192, 136)}


def problem(setting: str, whole: bool = True) -> dict[str, Any]:
    """A setting, with a head size that fills its parts, or the smallest one that it serves."""
    found = {**PROBLEM, **SETTINGS[setting]}
    return {**found, "head_size": COLUMNS[found["block_d"]][not whole]}


@pytest.mark.parametrize(
    ("setting", "causal", "layout"), some_of(SETTINGS, [False, True, "bottom-right"], ["bhsd", "bshd"])
)
def test_both_parts_are_multiplied_and_stored(setting: str, causal: bool | str, layout: str) -> None:
    check(**problem(setting), causal=causal, layout=layout)


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_a_head_lacks_of_the_second_part_is_neither_read_nor_written(setting: str) -> None:
    check(**problem(setting, whole=False), causal=True, layout="bshd")


@settings(max_examples=8)
@given(
    setting=st.sampled_from(sorted(SETTINGS)),
    whole=st.booleans(),
    causal=st.sampled_from([False, True, "bottom-right"]),
    sizes=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    programs=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_problem(setting, whole, causal, sizes, programs, seed) -> None:
    q_len, kv_len = sizes
    given_sizes = {"q_len": q_len, "kv_len": kv_len, "heads": 1, "programs": programs}
    check(**{**problem(setting, whole), **given_sizes}, causal=causal, seed=seed)


@pytest.mark.parametrize("setting", SETTINGS)
def test_rows_that_leave_the_fast_range_are_computed_again_in_all_columns(setting: str) -> None:
    loud = {**LOUD, "head_size": problem(setting)["head_size"], "q_len": 70, "kv_len": 20}
    check(**{**problem(setting), **loud})


FAULTS = {
    "halves of the first part are loaded the other way round": (
        "to.slice(half * BLOCK_D, BLOCK_D, dim=3)",
        "to.slice((1 - half) * BLOCK_D, BLOCK_D, dim=3)",
    ),
    "scores are read before the product with the second part": (
        "warpgroup_mma_wait(len(acc), deps=(scores,))",
        "warpgroup_mma_wait(len(acc) + 1, deps=(scores,))",
    ),
    "the second part is the first again": (
        "tma.async_load(desc, [batch, head, row, 2 * BLOCK_D]",
        "tma.async_load(desc, [batch, head, row, 1 * BLOCK_D]",
    ),
    "fewer bytes are waited for": ("(3 if TWO_PARTS else 2", "(2 if TWO_PARTS else 2"),
    "the scores are those of the second part": ("use_acc=part > 0", "use_acc=False"),
    "the second part is not scaled": (
        "_times(acc[0], factor), _times(acc[1], factor)",
        "_times(acc[0], factor), acc[1]",
    ),
    "the second part is not stored": (
        "tma.async_store(desc, [batch, head, row, 2 * BLOCK_D]",
        "tma.async_store(desc, [batch, head, row, 3 * BLOCK_D]",
    ),
    "halves of the first part are stored the other way round": (
        "tma.async_store(desc, place, rows.slice(half * BLOCK_D, BLOCK_D, dim=3), cache_policy=ONCE)",
        "tma.async_store(desc, place, rows.slice((1 - half) * BLOCK_D, BLOCK_D, dim=3), cache_policy=ONCE)",
    ),
    "the slow rows lack columns": ("4 * SHAPE.BLOCK_D if SHAPE.TWO_PARTS", "2 * SHAPE.BLOCK_D if SHAPE.TWO_PARTS"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_kernel_is_noticed(fault: str, tmp_path: Path) -> None:
    faulty = altered(KERNEL, *FAULTS[fault], tmp_path)
    small = {**problem("head size 96"), "block_n": 64, "heads": 1, "q_len": 70, "kv_len": 130}

    def both(source: Path = KERNEL, seed: int = 0, limit: float = 1.0) -> None:
        run = {"source": source, "seed": seed, "limit": limit}
        check(**run, **{**small, "scale": 3.0})
        check(**run, **{**small, **LOUD, "head_size": 96, "q_len": 20, "kv_len": 20})

    assert is_noticed(both, faulty, {})
