"""Tiles of biases, masks and functions dealt out evenly, and their slots given back early, in the emulator."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sm90_biased_runs import KERNEL, check
from sm90_runs import altered, is_noticed

TWO: dict[str, Any] = {
    **{"consumers": 2, "producer_first": True, "ping_pong": False, "block_n": 128, "v_stages": 3, "threes": True},
    **{"late": False, "handed": True, "brief": True, "even": 2},
}
ONE: dict[str, Any] = {
    "block_n": 128, "late": False, "threes": True, "handed": True, "brief": True, "even": 2,
}  # fmt: skip


def up_to_the_query(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
    return key <= query


def bounds_of_it(_batch: Any, _head: Any, first_query: Any, last_query: Any, _kv_len: Any) -> Any:
    return 0, last_query + 1, 0, first_query + 1


def prefix(_batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (key <= query) | (key < 70 + 100 * head)


def prefix_bounds(_batch: Any, head: Any, first_query: Any, last_query: Any, _kv_len: Any) -> Any:
    return 0, np.maximum(last_query + 1, 70 + 100 * head), 0, np.maximum(first_query + 1, 70 + 100 * head)


def by_bucket(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    """A relative function that is no line, and hides keys."""
    distance = np.asarray(key - query)
    term = np.sin(0.7 * distance) * (head + 1) + batch
    return score + np.where(distance % 11 == 3, -np.inf, term).astype(np.float32).view(type(score))


CAUSAL = {"causal": False, "from_first": True, "seen": up_to_the_query, "bounds": bounds_of_it}
PREFIX = {"causal": False, "from_first": True, "seen": prefix, "bounds": prefix_bounds}
RELATIVE = {"causal": True, "score": by_bucket, "relative": True}
SECTIONS = {"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 300, "programs": 3}
FEWER = {"heads": 3, "q_len": 300, "kv_len": 140, "bottom_right": True, "programs": 2}
MORE = {"heads": 3, "q_len": 200, "kv_len": 270, "bottom_right": True}
PROBLEMS: dict[str, dict[str, Any]] = {
    "causal by function": {**TWO, **CAUSAL, **SECTIONS},
    "causal by function, more keys": {**TWO, **CAUSAL, **MORE},
    "causal by function, fewer keys": {**TWO, **CAUSAL, **FEWER, "dtype": "bf16"},
    "prefix": {**TWO, **PREFIX, "q_len": 700, "kv_len": 730, "programs": 2},
    "prefix, whole blocks": {**TWO, **PREFIX, "q_len": 450, "kv_len": 300, "programs": 3},
    "prefix, one consumer": {**ONE, **PREFIX, "q_len": 330, "programs": 2},
    "relative": {**TWO, **RELATIVE, "v_stages": 2, "batch": 2, "q_len": 300, "programs": 2, "sinks": "own"},
    "relative, bf16": {**TWO, **RELATIVE, "dtype": "bf16", **MORE},
    "relative, one consumer": {**ONE, **RELATIVE, "q_len": 330, "programs": 2},
    "neither": {**TWO, "causal": True, **SECTIONS},
    "neither, fewer keys": {**TWO, "causal": True, **FEWER},
    "keys in a product": {**TWO, "in_product": True, "q_len": 300, "mask": (1, 2, 1, 300), "causal": True},
    "bias of keys, bf16": {
        **TWO, "batch": 3, "q_len": 300, "bias": (3, 1, 1, 300), "causal": True, "programs": 2, "dtype": "bf16",
    },
    "bias, batches side by side": {
        **ONE, "batch": 3, "q_len": 200, "bias": (1, 2, 200, 200), "causal": True, "programs": 2,
    },
    "mask": {**TWO, "q_slots": 1, "tile_after": True, "q_len": 330, "mask": (1, 1, 330, 330), "causal": True},
}  # fmt: skip


def loud(*, q: Any, k: Any, **_: Any) -> None:
    q *= 2.0**66
    k *= 2.0**62


AGAIN: dict[str, Any] = {
    **{"dtype": "bf16", "sm_scale": 2.0**-20, "change": loud, "head_size": 32},
    **{"heads": 5, "q_len": 300, "programs": 2},
}
"""All rows leave the range of the fast arithmetic."""
PROBLEMS |= {
    "causal by function, computed again": {**TWO, **CAUSAL, **AGAIN},
    "causal, computed again": {**TWO, **AGAIN, "causal": True},
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_numbers(name: str) -> None:
    check(**PROBLEMS[name])


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("name", PROBLEMS)
def test_numbers_in_other_orders(name: str, seed: int) -> None:
    check(seed=seed, **PROBLEMS[name])


FAULTS: dict[str, tuple[str, str, str]] = {
    "tiles are counted as from the longest": (
        "return EVENLY.value\n    if shape.LONGEST_FIRST", "return LONGEST_FIRST.value\n    if shape.LONGEST_FIRST",
        "causal by function",
    ),
    "the producer stays where it began": (
        "row_tile, unit, state = even_place(state, row_tiles, heads, section)",
        "row_tile, unit, _next = even_place(state, row_tiles, heads, section)",
        "causal by function",
    ),
    "a slot is given back before its rows have left it": (
        "        tma.store_wait(0)\n        mbarrier.arrive(q_free.index((turn - 1) % SHAPE.Q_SLOTS",
        "        mbarrier.arrive(q_free.index((turn - 1) % SHAPE.Q_SLOTS",
        "causal by function",
    ),
    "tiles computed again are others": (
        "even_row_tile, even_unit, state = even_place(state, row_tiles, all_heads, section)",
        "even_row_tile, even_unit, state = even_place(even_begin(), row_tiles, all_heads, section)",
        "causal by function, computed again",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault: str, tmp_path: Path) -> None:
    right, wrong, name = FAULTS[fault]
    assert is_noticed(check, altered(KERNEL, right, wrong, tmp_path), PROBLEMS[name])
