"""Maxima of three scores at a time, and places that the producer hands on, of the Hopper kernel in the emulator."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gluon_emulator import Machine
from gluon_language import load_kernel
from gluon_values import tensor
from helpers import some_of
from sm90_runs import KERNEL, altered, check, is_noticed

SETTINGS: dict[str, dict[str, Any]] = {
    "one consumer": {"consumers": 1, "block_n": 128, "longest_first": True},
    "two consumers": {"lazy": True, "producer_first": True, "ping_pong": False, "longest_first": True, "handed": True},
    "a buffer for Out": {
        "lazy": True, "producer_first": True, "q_slots": 1, "apart": True, "longest_first": True, "handed": True,
    },
    "three consumers": {"consumers": 3, "block_n": 128, "longest_first": True, "handed": True, "dtype": "bf16"},
    "one product at a time": {
        "block_d": 32, "head_size": 96, "two_parts": True, "serial": True, "lazy": True, "producer_first": True,
        "consumers": 3, "ping_pong": False, "block_n": 128, "longest_first": True, "handed": True,
    },
    "lazy, one consumer": {"consumers": 1, "lazy": True, "dtype": "bf16"},
    "a soft cap": {"consumers": 1, "lazy": True, "softcap": 3.0},
}  # fmt: skip
PROBLEM: dict[str, Any] = {"threes": True, "heads": 3, "kv_heads": 1, "q_len": 200, "kv_len": 230, "programs": 1}


def below_0(q: Any, k: Any, _v: Any) -> None:
    q[...] = np.abs(q)
    k[...] = -np.abs(k)


def above_0_later(q: Any, k: Any, v: Any) -> None:
    """Keys go from right to left."""
    below_0(q, k, v)
    k[:, :, 100] *= -1.0


SCORES = {"of both signs": lambda q, k, v: None, "below 0": below_0, "above 0 later": above_0_later}


@pytest.mark.parametrize(("setting", "scores"), some_of(SETTINGS, SCORES))
def test_numbers(setting: str, scores: str) -> None:
    check(**{**PROBLEM, **SETTINGS[setting]}, causal="bottom-right", change=SCORES[scores])


@pytest.mark.parametrize("columns", [64, 128])
def test_the_largest_of_each_row(columns: int) -> None:
    """Rows of a warp are 16, of which a thread holds two, and compares floats where either has had none above 0."""
    scores = np.random.default_rng(0).standard_normal((64, columns)).astype(np.float32)
    scores[:8] = -np.abs(scores[:8]) - 1
    m = np.where(np.arange(64) < 16, -5.0, 3.0).astype(np.float32)
    scores[20] = -2.0
    found = load_kernel(KERNEL.with_name("sm90_maxima.py"), Machine(0))["largest"](
        tensor(scores, np.float32), tensor(m, np.float32), 2.0
    )

    rows = np.arange(64) != 20
    np.testing.assert_array_equal(np.asarray(found)[rows], scores.max(1)[rows])
    assert np.asarray(found)[20] <= 0


FAULTS = {
    "floats are not compared where none is above 0": ('"@below bra BELOW;"', '"mov.b32 least, least;"'),
    "a thread's second row is its first": (
        'f"i{i}" for i in range(count) if i % 4 // 2 == row] for row in range(2))\n    lines',
        'f"i{i}" for i in range(count) if i % 4 // 2 == 0] for row in range(2))\n    lines',
    ),
    "only one row has to be below 0": ('f"min.f32 least, {m}, {other_m};"', 'f"max.f32 least, {m}, {other_m};"'),
    "a score is left out": ("for name in names[2:]]", "for name in names[3:]]"),
    "the place of another tile": (
        "hand_on_tile(notes[1], slot, row_tile, head)", "hand_on_tile(notes[1], slot, 0, head)"
    ),
    "a place is read before it is there": (
        "mbarrier.wait(ready, phase)\n    return given_tile", "return given_tile"
    ),
    "a place of another head": ("_of_each(row_tile), _of_each(head)]", "_of_each(row_tile), _of_each(row_tile)]"),
}  # fmt: skip


@pytest.mark.parametrize("fault", some_of(FAULTS))
def test_a_faulty_kernel_is_noticed(fault: str, tmp_path: Path) -> None:
    faulty = altered(KERNEL, *FAULTS[fault], tmp_path)

    def both(source: Path = KERNEL, seed: int = 0, limit: float = 1.0) -> None:
        for change in SCORES.values():
            run = {**PROBLEM, **SETTINGS["two consumers"], "scale": 4.0, "q_len": 140}
            check(source=source, seed=seed, limit=limit, **run, causal=True, change=change)

    assert is_noticed(both, faulty, {})
