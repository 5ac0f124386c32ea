"""Blocks of keys that are no power of two in the Hopper kernel, in the emulator, which does what the text of its wgmma
says."""

from pathlib import Path
from typing import Any

import pytest
from helpers import some_of
from hypothesis import given, settings
from hypothesis import strategies as st
from sm90_runs import KERNEL, LOUD, altered, check, is_noticed

WIDE: dict[str, Any] = {"lazy": True, "producer_first": True, "threes": True, "dtype": "bf16"}
# What the kernel is compiled with: two tensors for a block and three, panels of 64 columns and of 32.
SETTINGS: dict[str, dict[str, Any]] = {
    "head size 192, 96 keys": {
        **{**WIDE, "block_n": 96, "two_parts": True, "block_d": 64, "head_size": 192, "q_slots": 1, "apart": True},
    },
    "head size 192, 112 keys": {
        **{**WIDE, "block_n": 112, "two_parts": True, "block_d": 64, "head_size": 136, "q_slots": 1, "threes": False},
    },
    "head size 96, 144 keys": {
        **{**WIDE, "block_n": 144, "two_parts": True, "block_d": 32, "head_size": 96, "dtype": "fp16"},
    },
    "head size 128, 80 keys": {**WIDE, "block_n": 80, "block_d": 128, "head_size": 104, "ping_pong": False},
}
PROBLEM: dict[str, Any] = {"heads": 2, "kv_heads": 1, "q_len": 140, "kv_len": 300}


@pytest.mark.parametrize(("setting", "causal", "layout"), some_of(SETTINGS, [False, "bottom-right"], ["bhsd", "bshd"]))
def test_all_keys_and_columns_are_multiplied(setting: str, causal: bool | str, layout: str) -> None:
    check(**PROBLEM, **SETTINGS[setting], causal=causal, layout=layout)


@settings(max_examples=6)
@given(
    setting=st.sampled_from(sorted(SETTINGS)),
    causal=st.sampled_from([False, True, "bottom-right"]),
    sizes=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    handed=st.booleans(),
    programs=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_problem(setting, causal, sizes, handed, programs, seed) -> None:
    q_len, kv_len = sizes
    order = {"longest_first": True, "handed": True} if handed and causal else {}
    check(
        **SETTINGS[setting], **order, heads=1, q_len=q_len, kv_len=kv_len, programs=programs, causal=causal, seed=seed
    )


@pytest.mark.parametrize("setting", ["head size 192, 96 keys"])
def test_rows_that_leave_the_fast_range_are_computed_again(setting: str) -> None:
    check(**{**PROBLEM, **SETTINGS[setting], **LOUD, "head_size": 136, "q_len": 70, "kv_len": 120})


FAULTS = {
    "columns of a panel are those of the one before": (
        '_descriptor("b", "k", (i * block_n * panel + column) * 2)',
        '_descriptor("b", "k", (max(i - 1, 0) * block_n * panel + column) * 2)',
    ),
    "queries of the second part are those of the first": (
        "part, place = (0, i) if i < first_panels else (1, i - first_panels)",
        "part, place = (0, i) if i < first_panels else (0, i - first_panels)",
    ),
    "values of other keys": ('_descriptor("b", "v", first * panel * 2)', '_descriptor("b", "v", 0 * panel * 2)'),
    "panels of values are one": (
        "or.b32 v, v, {block_n * panel * 2 // 16 << 16:#x}",
        "or.b32 v, v, {0 * panel * 2 // 16 << 16:#x}",
    ),
    "the second tensor is masked as the first": (
        "second = _masked(scores[1], begins, ends, key)",
        "second = _masked(scores[1], begins, ends, key - scores[0].shape[1])",
    ),
    "the second tensor has no sums": (
        "sums += gl.convert_layout(of_part,",
        "sums += 0 * gl.convert_layout(of_part,",
    ),
    "fewer bytes are waited for": (
        "mbarrier.expect(ready, SHAPE.BLOCK_N * PANELS * PANEL * 2)",
        "mbarrier.expect(ready, SHAPE.BLOCK_N * (PANELS - 1) * PANEL * 2)",
    ),
    "scores are read before they are there": (
        "warpgroup_mma_wait(1, deps=scores)",
        "warpgroup_mma_wait(2, deps=scores)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_kernel_is_noticed(fault: str, tmp_path: Path) -> None:
    faulty = altered(KERNEL, *FAULTS[fault], tmp_path)
    small = {**SETTINGS["head size 96, 144 keys"], "heads": 1, "q_len": 70, "kv_len": 300, "scale": 3.0}

    def run(source: Path = KERNEL, seed: int = 0, limit: float = 1.0) -> None:
        check(source=source, seed=seed, limit=limit, causal="bottom-right", **small)

    assert is_noticed(run, faulty, {})
