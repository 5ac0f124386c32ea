"""The Hopper kernel with bias, mask, sinks and functions, in the emulator: numbers, order of events, planted faults."""

from typing import Any

import numpy as np
import pytest
from gluon_values import BARRIERS
from helpers import few_of, some_of
from sm90_biased_runs import KERNEL, check, lists_of, run
from sm90_runs import TOLERANCE, altered, is_noticed

from pyfmha.attention.reference import relative_error

TWO = {"consumers": 2, "q_slots": 1}
"""Consumers that take turns."""


def by_distance(score: Any, _batch: Any, head: Any, query: Any, key: Any) -> Any:
    """A score function."""
    return score + (head + 1) * 0.125 * (key - query)


def near(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
    """A mask function, of a window."""
    return (query - key < 40) & (key <= query)


def near_bounds(_batch: Any, _head: Any, first_query: Any, last_query: Any, _kv_len: Any) -> Any:
    return first_query - 39, last_query + 1


def prefix(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
    return (key <= query) | (key < 70)


def prefix_bounds(_batch: Any, _head: Any, first_query: Any, last_query: Any, _kv_len: Any) -> Any:
    return 0, np.maximum(last_query + 1, 70), 0, np.maximum(first_query + 1, 70)


def wide(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
    """A window with blocks that are seen whole between two that are cut."""
    return (query - key < 300) & (key <= query)


def wide_bounds(_batch: Any, _head: Any, first_query: Any, last_query: Any, _kv_len: Any) -> Any:
    return first_query - 299, last_query + 1, last_query - 299, first_query + 1


PROBLEMS: dict[str, dict[str, Any]] = {
    "neither": {"q_len": 100, "kv_len": 200},
    "bias": {"q_len": 100, "kv_len": 200, "bias": (1, 2, 100, 200)},
    "bias, one block in flight": {"q_len": 100, "kv_len": 400, "bias": (1, 2, 100, 400), "x_stages": 1},
    "bias of one head, two consumers": {**TWO, "dtype": "bf16", "q_len": 130, "kv_len": 136, "bias": (1, 1, 130, 136)},
    "bias of keys": {"batch": 2, "kv_len": 200, "bias": (2, 1, 1, 200), "sinks": "own"},
    "bias, batches side by side": {"batch": 2, "q_len": 130, "heads": 3, "bias": (1, 3, 130, 130), "programs": 2},
    "mask, causal": {"batch": 2, "q_len": 70, "kv_len": 136, "mask": (2, 1, 70, 136), "window": (-1, 0)},
    "mask of keys": {"batch": 2, "q_len": 70, "kv_len": 136, "mask": (2, 1, 1, 136), "sinks": "fp32"},
    "mask, lengths": {
        **{"batch": 2, "q_len": 130, "kv_len": 150, "mask": (1, 2, 130, 150)},
        **{"q_lengths": (40, 0), "kv_lengths": (150, 60)},
    },
    "sinks, lengths": {
        **{"batch": 2, "q_len": 70, "kv_len": 136, "mask": (1, 1, 1, 136), "sinks": "own"},
        **{"q_lengths": (40, 0), "kv_lengths": (130, 60)},
    },
    "window, sinks, two consumers": {
        **TWO, "q_len": 200, "kv_len": 260, "heads": 4, "kv_heads": 2, "window": (90, 3), "bottom_right": True,
        "sinks": "own", "dtype": "bf16",
    },
    "a bias that ends early": {"batch": 2, "q_len": 130, "kv_len": 200, "bias": (2, 1, 70, 136)},
    "a bias of fewer keys": {"kv_len": 200, "bias": (1, 2, 1, 90), "sinks": "own"},
    "a mask that ends early": {"q_len": 130, "kv_len": 200, "mask": (1, 2, 70, 136)},
    "a mask of fewer keys": {"kv_len": 200, "mask": (1, 1, 1, 90)},
    "a row without keys, sinks": {"q_len": 70, "kv_len": 136, "mask": (1, 2, 70, 136), "sinks": "fp32"},
    "values of half": {"q_len": 70, "kv_len": 140, "v_head_size": 32, "block_v": 32},
    "a score function": {"q_len": 70, "kv_len": 140, "score": by_distance, "window": (-1, 0)},
    "a mask function": {"q_len": 130, "kv_len": 140, "seen": near},
    "a mask function with bounds": {**TWO, "q_len": 200, "seen": near, "bounds": near_bounds},
    "bounds of what is seen whole": {"q_len": 200, "seen": prefix, "bounds": prefix_bounds, "score": by_distance},
}  # fmt: skip


PLAIN = {"block_n": 128, "late": False}
"""As variants without lengths and windows are cut."""
PROBLEMS |= {
    "plain, neither, causal": {**PLAIN, "q_len": 200, "kv_len": 300, "causal": True, "bottom_right": True},
    "plain, a row without keys, sinks": {**PLAIN, "q_len": 70, "mask": (1, 2, 70, 70), "sinks": "own", "causal": False},
    "plain, bias": {**PLAIN, "q_len": 100, "kv_len": 400, "bias": (1, 2, 100, 400), "causal": False},
    "plain, bias, causal": {**PLAIN, **TWO, "q_len": 200, "bias": (1, 2, 200, 200), "causal": True, "dtype": "bf16"},
    "plain, bias of keys": {**PLAIN, "q_len": 70, "kv_len": 300, "bias": (1, 2, 1, 300), "causal": False},
    "plain, mask": {**PLAIN, **TWO, "q_len": 200, "kv_len": 400, "mask": (1, 1, 200, 400), "causal": False},
    "plain, mask, causal": {**PLAIN, "batch": 2, "q_len": 200, "mask": (2, 1, 200, 200), "causal": True},
    "plain, mask, causal, two consumers": {
        **PLAIN, **TWO, "block_n": 64, "q_len": 330, "kv_len": 330, "mask": (1, 1, 330, 330), "causal": True,
    },
    "plain, window, two consumers": {
        **PLAIN, **TWO, "block_n": 64, "q_len": 500, "seen": wide, "bounds": wide_bounds, "causal": False,
    },
    "plain, mask of keys, causal": {
        **PLAIN, **TWO, "batch": 2, "q_len": 200, "mask": (2, 1, 1, 200), "causal": True, "sinks": "own",
    },
    "plain, a function, causal": {**PLAIN, "q_len": 200, "score": by_distance, "causal": True},
    "plain, bounds": {**PLAIN, **TWO, "q_len": 200, "seen": prefix, "bounds": prefix_bounds, "causal": False},
}  # fmt: skip


THREE = {"consumers": 3}
FIRST = {"consumers": 2, "producer_first": True, "ping_pong": False}
"""The producer before two consumers that take no turns."""
PROBLEMS |= {
    "plain, bias, three consumers": {
        **PLAIN, **THREE, "q_len": 200, "kv_len": 140, "bias": (1, 2, 200, 140), "causal": False, "programs": 3,
    },
    "plain, bias loaded late": {
        **PLAIN, **THREE, "tile_after": True, "q_len": 200, "kv_len": 440, "bias": (1, 2, 200, 440), "causal": False,
        "threes": True, "programs": 3, "ping_pong": False,
    },
    "plain, bias loaded late, two consumers": {
        **PLAIN, **TWO, "tile_after": True, "threes": True, "q_len": 200, "kv_len": 440, "bias": (1, 1, 200, 440),
        "causal": False,
    },
    "plain, bias loaded late, causal": {
        **PLAIN, **TWO, "tile_after": True, "threes": True, "q_len": 330, "bias": (1, 2, 330, 330), "causal": True,
    },
    "plain, mask loaded late, causal": {
        **PLAIN, "tile_after": True, "threes": True, "q_len": 200, "mask": (1, 2, 200, 200), "causal": True,
    },
    "plain, mask loaded late, the producer first": {
        **PLAIN, **FIRST, "tile_after": True, "threes": True, "q_len": 200, "kv_len": 440, "mask": (1, 2, 200, 440),
        "causal": False,
    },
    "plain, mask loaded late": {
        **PLAIN, **THREE, "tile_after": True, "q_len": 200, "kv_len": 440, "mask": (1, 1, 200, 440), "causal": False,
    },
    "plain, bias of keys in a product, three consumers": {
        **PLAIN, **THREE, "in_product": True, "batch": 2, "kv_len": 300, "bias": (2, 1, 1, 300), "causal": False,
        "sm_scale": 0.0883883,
    },
    "plain, mask of keys in a product, causal": {
        **PLAIN, **FIRST, "in_product": True, "q_len": 300, "mask": (1, 2, 1, 300), "causal": True, "sinks": "own",
    },
    "plain, bias, three consumers, blocks used again": {
        **PLAIN, **THREE, "threes": True, "q_len": 200, "kv_len": 440, "bias": (1, 2, 200, 440),
        "causal": False, "programs": 3,
    },
    "plain, mask, the producer first": {
        **PLAIN, **FIRST, "threes": True, "q_len": 200, "kv_len": 440, "mask": (1, 2, 200, 440), "causal": False,
    },
    "plain, bias of keys, longest first": {
        **PLAIN, **FIRST, "longest_first": True, "threes": True, "batch": 2, "q_len": 300, "bias": (2, 1, 1, 300),
        "causal": True, "programs": 2, "dtype": "bf16",
    },
    "plain, a window in blocks of 64": {
        **PLAIN, "block_n": 64, "q_len": 300, "seen": near, "bounds": near_bounds, "causal": False, "programs": 3,
    },
    "plain, a window in blocks of 64, causal": {
        "block_n": 64, "stages": 3, "v_stages": 3, "q_len": 300, "seen": near, "bounds": near_bounds, "causal": True,
        "programs": 2,
    },
    "plain, causal, longest first": {
        **PLAIN, **FIRST, "longest_first": True, "q_len": 700, "causal": True, "programs": 2, "threes": True,
    },
    "plain, places handed on": {
        **PLAIN, **FIRST, "handed": True, "longest_first": True, "batch": 2, "q_len": 700, "causal": False,
        "programs": 2, "threes": True, "seen": wide, "bounds": wide_bounds, "block_n": 64,
    },
    "plain, bounds that begin with the first key": {
        **PLAIN, **FIRST, "handed": True, "from_first": True, "longest_first": True, "q_len": 700, "kv_len": 730,
        "causal": False, "programs": 2, "threes": True, "seen": prefix, "bounds": prefix_bounds,
    },
    "plain, places handed on, bias": {
        **PLAIN, **TWO, "handed": True, "tile_after": True, "threes": True, "batch": 3, "q_len": 200, "kv_len": 440,
        "bias": (1, 2, 200, 440), "causal": False, "programs": 2,
    },
    "plain, bounds, longest first": {
        **PLAIN, **TWO, "longest_first": True, "q_len": 700, "causal": False, "programs": 2, "threes": True,
        "seen": prefix, "bounds": prefix_bounds,
    },
}  # fmt: skip


def unlike_neighbours(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
    """A mask function that shows keys which causal attention hides, and keys past the end."""
    return (query // 3 + key // 5) % 4 != 0


PROBLEMS |= {
    "plain, a mask function alone, keys past the end": {
        **PLAIN, "q_len": 70, "kv_len": 300, "seen": unlike_neighbours, "causal": False, "threes": True,
    },
    "plain, a mask function alone, causal": {
        **PLAIN, **TWO, "q_len": 330, "seen": unlike_neighbours, "causal": True, "bottom_right": True, "kv_len": 400,
    },
}  # fmt: skip


def by_bucket(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    """A relative function that is no line, and hides keys."""
    distance = np.asarray(key - query)
    term = np.sin(0.7 * distance) * (head + 1) + batch
    return score + np.where(distance % 11 == 3, -np.inf, term).astype(np.float32).view(type(score))


def capped(score: Any, _batch: Any, head: Any, _query: Any, _key: Any) -> Any:
    return (2 + head) * np.tanh(score / (2 + head))


CAPPED = {"score": capped, "cap": lambda _batch, head: 2.0 + head}
PROBLEMS |= {
    "a soft cap of each head, lengths": {
        **CAPPED, "batch": 2, "q_len": 70, "kv_len": 136, "q_lengths": (40, 0), "kv_lengths": (130, 60),
        "window": (90, 3),
    },
    "plain, a soft cap of each head": {**PLAIN, **CAPPED, "threes": True, "q_len": 70, "kv_len": 300, "causal": False},
    "plain, a soft cap, causal": {**PLAIN, **CAPPED, "threes": True, "q_len": 200, "causal": True, "dtype": "bf16"},
    "plain, a soft cap, blocks of 64": {**CAPPED, "v_stages": 3, "q_len": 200, "causal": True, "sinks": "own"},
}  # fmt: skip
RELATIVE = {"score": by_bucket, "relative": True}
PROBLEMS |= {
    "relative": {**RELATIVE, "q_len": 100, "kv_len": 300, "bottom_right": True},
    "relative, lengths": {
        **RELATIVE, "batch": 2, "q_len": 130, "kv_len": 150, "q_lengths": (130, 7), "kv_lengths": (40, 140),
        "bottom_right": True,
    },
    "relative, bounds": {**RELATIVE, "q_len": 200, "seen": prefix, "bounds": prefix_bounds, "programs": 2},
    "plain, relative": {**PLAIN, **RELATIVE, "q_len": 100, "kv_len": 700, "causal": False, "sinks": "own"},
    "plain, relative, causal": {**PLAIN, **TWO, **RELATIVE, "batch": 2, "q_len": 300, "causal": True},
    "plain, relative, bf16": {**PLAIN, **RELATIVE, "dtype": "bf16", "q_len": 70, "kv_len": 300, "causal": False},
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_numbers(name: str) -> None:
    check(**PROBLEMS[name])


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 8))
@pytest.mark.parametrize("name", PROBLEMS)
def test_numbers_in_other_orders(name: str, seed: int) -> None:
    check(seed=seed, **PROBLEMS[name])


@pytest.mark.parametrize("consumers", [1, 2])
@pytest.mark.parametrize("beside", [{}, {"bias": (1, 2, 300, 300)}, {"mask": (1, 2, 300, 300)}])
def test_every_barrier_is_used(consumers: int, beside: dict[str, Any]) -> None:
    """The compiler lends the memory of one that is only initialised to what is set aside after it, such as blocks that
    TMA fills: PTX leaves undefined what such memory then does."""
    check(q_len=300, consumers=consumers, q_slots=1, **beside)
    assert all(any(barrier.used for barrier in array.reshape(-1)) for array in BARRIERS)


def nan_where_unseen(*, k: Any, v: Any, bias: Any, mask: Any, **_: Any) -> None:
    k[:, :, 10:14] = np.nan
    v[:, :, 10:14] = np.inf
    if mask is not None:
        mask[..., 10:14] = 0
    if bias is not None:
        bias[..., 10:14] = -np.inf


SMALL = {"heads": 1, "q_len": 32, "kv_len": 136}
HIDDEN: dict[str, dict[str, Any]] = {
    "bias": {**SMALL, "bias": (1, 1, 32, 136)},
    "bias of keys": {**SMALL, "bias": (1, 1, 1, 136), "sinks": "own"},
    "mask, causal": {**SMALL, "mask": (1, 1, 32, 136), "window": (-1, 0), "bottom_right": True},
    "mask of keys": {**SMALL, "mask": (1, 1, 1, 136)},
    "plain, bias": {**PLAIN, **SMALL, "bias": (1, 1, 32, 136), "causal": False},
    "plain, bias of keys": {**PLAIN, **SMALL, "bias": (1, 1, 1, 136), "causal": False},
    "plain, mask": {**PLAIN, **SMALL, "mask": (1, 1, 32, 136), "causal": False},
    "plain, bias of keys in a product": {
        **PLAIN, **SMALL, "consumers": 2, "in_product": True, "bias": (1, 1, 1, 136), "causal": False,
    },
    "plain, mask of keys, causal": {
        **PLAIN, **SMALL, "mask": (1, 1, 1, 136), "causal": True, "bottom_right": True, "sinks": "own",
    },
}  # fmt: skip


@pytest.mark.parametrize("problem", HIDDEN)
def test_nan_in_what_is_masked_has_no_effect(problem: str) -> None:
    check(**HIDDEN[problem], change=nan_where_unseen)


def nan_in_one_column(*, v: Any, mask: Any, **_: Any) -> None:
    v[:, :, 10:14, 37] = np.nan
    mask[..., 10:14] = 0


def nan_where_nothing_is_seen(*, v: Any, mask: Any, **_: Any) -> None:
    """Of rows that all see nothing none is computed again."""
    v[:, :, 10:14] = np.nan
    mask[...] = 0


def a_row_without_keys(*, mask: Any, **_: Any) -> None:
    mask[:, :, 14] = 0


FAULTS_OF_ENDS: dict[str, tuple[str, str, Any]] = {
    "half of the sums are not looked at": (
        "add.f32 {name}, {name}, {further};", "mov.b32 {name}, {name};", nan_in_one_column,
    ),
    "rows without keys have what NaN makes": ('"@all bra DONE;"', '"bra.uni DONE;"', nan_where_nothing_is_seen),
    "rows beside one without keys are zeros": (
        "{factors[place][0]}, {NONE};", "{factors[1][0]}, {NONE};", a_row_without_keys,
    ),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", FAULTS_OF_ENDS)
def test_a_fault_at_the_end_of_a_tile_is_noticed(name: str, tmp_path: Any) -> None:
    right, wrong, change = FAULTS_OF_ENDS[name]
    problem = {**PLAIN, "heads": 1, "q_len": 32, "kv_len": 136, "mask": (1, 1, 32, 136), "causal": False}
    check(**problem, change=change)
    assert is_noticed(check, altered(KERNEL, right, wrong, tmp_path), {**problem, "change": change})


def lowest_of_bf16(*, bias: Any, **_: Any) -> None:
    bias[..., 70:] = -3.3895313892515355e38
    bias[:, :, 3] = -3.3895313892515355e38  # all keys of a row, which sees them
    bias[:, :, 4] = -np.inf


def test_the_lowest_finite_bias_hides_no_key() -> None:
    out, lse, wanted, _ = run(dtype="bf16", q_len=64, kv_len=128, bias=(1, 2, 64, 128), change=lowest_of_bf16)
    assert relative_error(out, wanted) < TOLERANCE["bf16"]
    assert (lse[:, :, 3] < -1e37).all()
    assert np.isneginf(lse[:, :, 4]).all()
    assert (out[:, :, 4] == 0).all()


def loud(*, q: Any, k: Any, **_: Any) -> None:
    q *= 2.0**66
    k *= 2.0**62


@pytest.mark.parametrize(
    "shapes",
    [{"bias": (1, 2, 64, 64)}, {"mask": (1, 2, 64, 64)}, {"bias": (1, 2, 40, 24)}, {"mask": (1, 1, 40, 24)}],
)
def test_products_beyond_float32_are_computed_again(shapes: dict[str, Any]) -> None:
    check("bf16", sm_scale=2.0**-20, head_size=32, change=loud, **shapes)


def low_keys(first: int) -> Any:
    """64 keys whose products overflow downwards, beside keys of ordinary products."""

    def change(*, q: Any, k: Any, bias: Any, **_: Any) -> None:
        q[...] = np.abs(q) * 2.0**66
        loud = -np.abs(k[:, :, first : first + 64]) * 2.0**62
        k *= 2.0**-66
        k[:, :, first : first + 64] = loud
        if bias is not None:
            bias[:, :, 84:94, first + 5] = 2.0**115  # more than the scores, in another tile

    return change


def some_see_low_keys(first: int) -> Any:
    def seen(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
        return (query >= 10) | ((key >= first) & (key < first + 64))

    return seen


OVERFLOWING: dict[str, dict[str, Any]] = {
    "mask function": {},
    "plain, a mask function": {**PLAIN, **FIRST, "causal": False, "threes": True},
    "bias": {"bias": (1, 2, 128, 192)},
    "bias, a scale of which products are far": {"bias": (1, 2, 128, 192), "sm_scale": 2.0**-110},
    "plain, bias": {**PLAIN, "bias": (1, 2, 128, 192), "causal": False, "threes": True},
    "plain, bias of keys": {**PLAIN, "bias": (1, 2, 1, 192), "causal": False, "threes": True},
    "plain, relative": {**PLAIN, "score": by_distance, "relative": True, "causal": False, "threes": True},
    "score function": {"score": by_distance},
}


def check_overflowing(name: str, first: int, **options: Any) -> None:
    problem = {"sm_scale": 2.0**-20, **OVERFLOWING[name], "seen": some_see_low_keys(first), **options}
    check("bf16", q_len=128, kv_len=192, head_size=32, change=low_keys(first), **problem)


@pytest.mark.parametrize(("name", "first"), some_of(OVERFLOWING, [0, 128]))
def test_products_that_overflow_count_as_low(name: str, first: int) -> None:
    """Ten rows see no others: they are computed again, with their tile, and no rows without keys."""
    check_overflowing(name, first)


BEYOND: dict[str, dict[str, Any]] = {
    "bias": {"bias": (1, 2, 128, 192), "seen": some_see_low_keys(0)},
    "bias, causal": {"bias": (1, 2, 128, 192), "causal": True},
    "mask": {"mask": (1, 2, 128, 192), "causal": True},
    "a bias of keys that outweighs them": {"bias": (1, 2, 1, 192), "causal": True, "sm_scale": 2.0**-10},
}


@pytest.mark.parametrize("name", BEYOND)
def test_rows_of_scores_beyond_float32_tell_them_apart(name: str) -> None:
    """Some -2**131, where rows see no others: the largest has all the weight. The log-sum-exp is as low as it gets."""

    def change(*, bias: Any, **others: Any) -> None:
        low_keys(0)(bias=None, **others)
        if bias is not None and bias.shape[2] == 1:
            bias[..., :64:3] = 2.0**124

    out, lse, wanted, wanted_lse = run(
        **{"dtype": "bf16", "q_len": 128, "kv_len": 192, "head_size": 32, "change": change, **BEYOND[name]}
    )
    for rows in (slice(0, 10), slice(10, None)):
        assert relative_error(out[:, :, rows], wanted[:, :, rows]) < TOLERANCE["bf16"]
    held = np.abs(wanted_lse) < 2.0**127
    np.testing.assert_allclose(lse[held], wanted_lse[held], rtol=1e-4, atol=1e-4)
    assert (lse[~held & np.isfinite(wanted_lse)] < -(2.0**127)).all()


FAULTS_OF_LIMITS: dict[str, tuple[str, str, str]] = {
    "low products hide keys": ('"@low bra LOW;", "bra.uni DONE;"', '"bra.uni DONE;"', "bias"),
    "low products hide all keys of a row": ('COUNTED = "0fF149F2CA"', 'COUNTED = "0fFF7FFFFF"', "mask function"),
    "a bias does not make up for them": (
        "None if is_natural(SHAPE) or has_terms(SHAPE) else m",
        "m",
        "bias",
    ),
    "the limit of a scale of which products are far": (
        '"add.f32 lowest, lowest, least;"',
        '"mov.b32 lowest, lowest;"',
        "bias, a scale of which products are far",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", FAULTS_OF_LIMITS)
def test_a_fault_of_limits_is_noticed(name: str, tmp_path: Any) -> None:
    right, wrong, problem = FAULTS_OF_LIMITS[name]
    source = altered(KERNEL, right, wrong, tmp_path)
    assert is_noticed(lambda **options: check_overflowing(problem, 0, **options), source, {})


def test_blocks_outside_of_bounds_are_not_loaded() -> None:
    """Were they, NaN in them would have the rows computed again, which sees them by the function alone."""

    def nan_outside(*, k: Any, v: Any, **_: Any) -> None:
        k[:, :, 64:] = v[:, :, 64:] = np.nan

    def shows_all(_batch: Any, _head: Any, _query: Any, key: Any) -> Any:
        return key >= 0

    def first_block(*_: Any) -> Any:
        return 0, 64

    out, _, _, _ = run(q_len=64, kv_len=320, seen=shows_all, bounds=first_block, change=nan_outside)
    assert np.isfinite(out).all()


def test_bounds_that_begin_elsewhere_are_no_bounds_from_the_first_key() -> None:
    problem = PROBLEMS["plain, window, two consumers"]
    check(**problem)
    with pytest.raises(AssertionError):
        check(**problem, from_first=True)


def striped(batch: Any, head: Any, query: Any, key: Any) -> Any:
    """Of another pattern for each head, with holes and with whole blocks."""
    return (query // 100 + key // 140 + head) % 2 == 0


LISTED: dict[str, dict[str, Any]] = {
    "two tiles": {"q_len": 200, "kv_len": 500},
    "blocks of the lists' size": {"q_len": 140, "kv_len": 300, "block_n": 128, "programs": 2},
    "lengths": {"q_len": 140, "kv_len": 300, "batch": 2, "q_lengths": [70, 140], "kv_lengths": [200, 90]},
    "causal, a window": {"q_len": 300, "window": (150, 0)},
}


def lists_for(shows: Any, problem: dict[str, Any]) -> Any:
    """With all that masks."""
    batch, q_len = problem.get("batch", 1), problem["q_len"]
    kv_len, (left, right) = problem.get("kv_len", q_len), problem.get("window", (-1, -1))
    query, key = np.arange(q_len)[:, None], np.arange(kv_len)[None, :]
    seen = np.zeros((batch, 2, q_len, kv_len))
    for b, h in np.ndindex(batch, 2):
        shown = shows(b, h, query, key) & (key < problem.get("kv_lengths", [kv_len] * batch)[b])
        shown = shown & ((left < 0) | (key >= query - left)) & ((right < 0) | (key <= query + right))
        seen[b, h] = np.where(query < problem.get("q_lengths", [q_len] * batch)[b], shown, np.nan)
    return lists_of(seen)


@pytest.mark.parametrize("name", few_of(LISTED, lambda name: name in ("two tiles", "lengths")))
def test_blocks_on_lists(name: str) -> None:
    problem = LISTED[name]
    entries = lists_for(striped, problem)
    check(**problem, seen=striped, entries=entries)
    at = np.argwhere(entries[..., 0] > 0)[-1]
    entries[(*at, 0)] -= 1
    with pytest.raises(AssertionError):
        check(**problem, seen=striped, entries=entries)


def test_blocks_on_no_list_are_not_loaded_and_whole_ones_not_asked() -> None:
    """The second and the last block are on no list, and NaN would show; the function hides what is asked for."""

    def nan_outside(*, k: Any, v: Any, **_: Any) -> None:
        for tensor in (k, v):
            tensor[:, :, 128:256] = tensor[:, :, 384:] = np.nan

    def first(_batch: Any, _head: Any, _query: Any, key: Any) -> Any:
        return key < 64

    entries = np.int32([[[[1, 1, 0, -7, -7, 2]]]])
    out, lse, _, _ = run(q_len=128, kv_len=512, seen=first, entries=entries, change=nan_outside)
    assert np.isfinite(out).all()
    _, wanted, _, _ = run(q_len=128, kv_len=512, seen=lambda b, h, i, j: (j < 64) | ((j >= 256) & (j < 384)))
    np.testing.assert_allclose(lse, wanted, rtol=1e-5)


def infinite(*, bias: Any, **_: Any) -> None:
    bias[..., 3::5] = -np.inf
    bias[..., 40] = -60000
    bias[..., 41] = 900


@pytest.mark.parametrize("sm_scale", [0.125, 0.0883883, 1e-6])
def test_terms_in_a_product_keep_infinity(sm_scale: float) -> None:
    """The inverse of the scale has one part, or more; or is infinite in 16 bits: then all rows are computed again."""
    problem = {**PLAIN, "consumers": 2, "in_product": True, "kv_len": 140, "bias": (1, 2, 1, 140), "causal": False}
    check(**problem, sm_scale=sm_scale, change=infinite)


HANDED = "plain, places handed on"
FAULTS: dict[str, tuple[str, str, str]] = {
    "a product of nothing": (
        "columns < 3, part, 0.0",
        "columns < 0, part, 0.0",
        "plain, bias of keys in a product, three consumers",
    ),
    "keys that do not wait for their terms": (
        "count=2 if IN_PRODUCT else 1",
        "count=1",
        "plain, bias of keys in a product, three consumers",
    ),
    "no fence between a load and TMA": (
        "    fence_async_shared()  # here rather",
        "    pass  # here rather",
        "plain, bias, three consumers, blocks used again",
    ),
    "the bias twice": ("scores += tile.to(gl.float32)", "scores += 2 * tile.to(gl.float32)", "bias"),
    "a mask the other way round": ("scores = shown(scores, tile)", "scores = shown(scores, tile == 0)", "mask, causal"),
    "terms of the step before": (
        "terms, step + 1, CONSUMER, SHAPE), lag",
        "terms, step, CONSUMER, SHAPE), lag",
        "plain, relative",
    ),
    "terms of another row": (
        "newest_query, newest_query - first_query,",
        "newest_query, (newest_query - first_query) // 2,",
        "plain, relative",
    ),
    "keys past the end that a mask function shows": (
        "if key + SHAPE.BLOCK_N <= reach:",
        "if key <= reach:",
        "plain, a mask function alone, keys past the end",
    ),
    "keys that causal attention hides and a mask function shows": (
        "reach = gl.minimum(first_row + newest + 1, kv_n)",
        "reach = kv_n",
        "plain, a mask function alone, causal",
    ),
    "the place of another tile": ("hand_on_keys(notes[1], slot, (row", "hand_on_keys(notes[1], 0, (row", HANDED),
    "the bounds of nothing": ("(first_block, end_block), whole)", "(end_block, end_block), whole)", HANDED),
    "all seen whole": ("_of_each(whole[1]),\n        _of_each", "_of_each(blocks[1]),\n        _of_each", HANDED),
    "one place for all terms": ("step % 2 * SHAPE.CONSUMERS + CONSUMER", "CONSUMER", "plain, relative"),
    "terms of the first consumer": (
        "step % 2 * SHAPE.CONSUMERS + CONSUMER",
        "step % 2 * SHAPE.CONSUMERS",
        "plain, relative, causal",
    ),
    "terms loaded before all are there": (
        "            gl.barrier()\n            if BEGUN",
        "            if BEGUN",
        "plain, relative",
    ),
    "terms without the scale": ("product = term * undo", "product = term", "plain, relative"),
    "terms that are added twice": ("if has_terms(SHAPE) and not BEGUN", "if has_terms(SHAPE)", "plain, relative"),
    "distances the other way round": (
        "gl.maximum(-distance, 0), gl.maximum(distance, 0)",
        "gl.maximum(distance, 0), gl.maximum(-distance, 0)",
        "relative",
    ),
    "the bias of the first keys": ("first_row + c * ROWS, key]", "first_row + c * ROWS, 0]", "bias"),
    "the bias of the first consumer": (
        "first_row + c * ROWS, key]",
        "first_row, key]",
        "bias of one head, two consumers",
    ),
    "the bias of another head": ("head * x_of_head", "0 * x_of_head", "bias"),
    "a broadcast axis as one that is not": (
        "of_head = (stride_h != 0)",
        "of_head = (stride_h == 0)",
        "bias of one head, two consumers",
    ),
    "a bias given back before it was read": (
        "        mbarrier.wait(x_ready.index(stage), (step // SHAPE.X_STAGES) & 1)\n",
        "",
        "bias",
    ),
    "the place of a bias taken before it was given back": (
        "mbarrier.wait(x_free.index(step % STAGES * CONSUMERS + c), ((step // STAGES) & 1) ^ 1)\n",
        "pass\n",
        "bias, one block in flight",
    ),
    "sinks without the shift": ("gl.exp2(sink - top)", "gl.exp2(sink + shift - top)", "window, sinks, two consumers"),
    "the window forgotten": (
        "(block >= whole_to) | (block < whole_from) if MASKED else False",
        "False",
        "window, sinks, two consumers",
    ),
    "bounds of one row": ("gl.minimum(first_row + TILE, q_n) - 1", "first_row", "a mask function with bounds"),
    "what is seen whole begins too early": (
        "(whole_begin + (BLOCK_N - 1)) // BLOCK_N",
        "0",
        "window, sinks, two consumers",
    ),
    "keys past the end of a mask": ("gl.minimum(kv_n, columns)", "kv_n", "a mask of fewer keys"),
    "keys past the end of a bias": ("gl.minimum(kv_n, columns)", "kv_n", "a bias of fewer keys"),
    "the next keys' bias": ("place, key - SHAPE.BLOCK_N, kv_n", "place, key, kv_n", "bias of keys"),
    "a mask of keys that adds nothing": ("gl.where(vector != 0, 0.0", "gl.where(vector != 9, 0.0", "mask of keys"),
    "a causal mask of one key more": (
        "gl.minimum(rows + (newest + 1), kv_n)",
        "rows + (newest + 2)",
        "plain, mask, causal",
    ),
    "the loop without masks begins too early": (
        "to_mask = block - gl.maximum(whole_to, first_block)",
        "to_mask = block - gl.maximum(whole_to + 1, first_block)",
        "plain, mask, causal, two consumers",
    ),
    "what bounds mask on the left without masks": (
        "block - gl.maximum(whole_from, first_block), 0), to_left)",
        "block - first_block, 0), to_left)",
        "plain, window, two consumers",
    ),
    "values of the first block": ("step // SHAPE.STAGES) & 1)\n    if PING_PONG", "0) & 1)\n    if PING_PONG", "bias"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name: str, tmp_path: Any) -> None:
    right, wrong, problem = FAULTS[name]
    assert is_noticed(check, altered(KERNEL, right, wrong, tmp_path), PROBLEMS[problem])
