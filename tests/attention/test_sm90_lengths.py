"""Lengths without windows in the Hopper kernel, in the emulator: cut as plain attention is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import examples, some_of
from hypothesis import given
from hypothesis import strategies as st
from sm90_runs import KERNEL, LOUD, altered, check, is_noticed

# What the kernel is compiled with.
SETTINGS: dict[str, dict[str, Any]] = {
    "head size 64": {"consumers": 1, "block_n": 128, "threes": True},
    "head size 64, long": {"consumers": 3, "block_n": 128, "threes": True},
    "head size 96": {"block_d": 32, "head_size": 96, "block_n": 128, "stages": 3, "v_stages": 3, "two_parts": True},
    "head size 128": {"block_d": 128, "head_size": 120, "block_n": 128, "v_stages": 3, "lazy": True},
    "head size 192": {"head_size": 192, "dtype": "bf16", "two_parts": True, "lazy": True},
    "head size 256": {"block_d": 256, "head_size": 136, "q_slots": 1, "dtype": "bf16", "lazy": True},
    "head size 256, causal": {
        **{"block_d": 256, "head_size": 136, "q_slots": 1, "dtype": "bf16", "lazy": True},
        **{"threes": True, "apart": True, "early": True},
    },
    "head size 256, 80 keys": {
        **{"block_d": 256, "head_size": 136, "q_slots": 1, "dtype": "bf16", "lazy": True},
        **{"block_n": 80, "threes": True, "producer_first": True, "direct": True},
    },
    "head size 96, 112 keys": {
        **{"block_d": 32, "head_size": 96, "block_n": 112, "two_parts": True, "dtype": "bf16", "lazy": True},
        **{"producer_first": True},
    },
}
# Lengths of a batch of 70 queries and 200 keys each: none, one, the borders of blocks, all, and beyond.
ODD: dict[str, Any] = {
    **{"lengths": True, "batch": 13, "heads": 1, "q_len": 70, "kv_len": 200},
    "q_lengths": (70, 70, 64, 65, 1, 2**31 - 1, 63, 69, 0, 70, -3, 66, 71),
    "kv_lengths": (0, 1, 63, 64, 65, 127, 128, 129, 200, 201, 199, -5, 2**31 - 1),
}
FEW: dict[str, Any] = {
    **{"lengths": True, "batch": 3, "q_len": 100, "kv_len": 200},
    **{"q_lengths": (30, 80, 100), "kv_lengths": (150, 61, 200)},
}
LOUD_FEW = {**FEW, **LOUD, "q_len": 40, "q_lengths": (30, 0, 40), "kv_len": 30, "kv_lengths": (20, 30, 5)}
KEYS_ALONE = {"q_lengths": None}
HALVES: dict[str, Any] = {**FEW, **KEYS_ALONE, **SETTINGS["head size 64"], "causal": True, "q_len": 200}


@pytest.mark.parametrize(
    ("setting", "causal", "given"),
    some_of(SETTINGS, [False, True, "bottom-right"], ["q_lengths", "kv_lengths", "both"]),
)
def test_odd_lengths(setting: str, causal: bool | str, given: str) -> None:
    """Padding is NaN, and neither read nor written to."""
    kept = {name: ODD[name] if given in (name, "both") else None for name in ("q_lengths", "kv_lengths")}
    check(**{**ODD, **SETTINGS[setting], **kept}, causal=causal, programs=2)


@pytest.mark.parametrize("heads", [1, 3])
def test_the_longest_may_come_first(heads: int) -> None:
    check(**{**ODD, "heads": heads, "kv_heads": 1}, causal=True, longest_first=True, programs=3)


@examples(18)
@given(data=st.data())
def test_any_lengths(data: st.DataObject) -> None:
    q_len, kv_len = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    batch = data.draw(st.integers(1, 3))

    def lengths(total: int) -> Any:
        near = st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129, total - 1, total])
        return data.draw(st.none() | st.lists(near | st.integers(-1, total + 1), min_size=batch, max_size=batch))

    check(
        **{"lengths": True, "batch": batch, "heads": 1, "q_len": q_len, "kv_len": kv_len},
        **{"q_lengths": lengths(q_len), "kv_lengths": lengths(kv_len)},
        **SETTINGS[data.draw(st.sampled_from(sorted(SETTINGS)))],
        causal=data.draw(st.sampled_from([False, True, "bottom-right"])),
        programs=data.draw(st.integers(1, 3)),
        seed=data.draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_padding_takes_no_slow_arithmetic(causal: bool, tmp_path: Path) -> None:
    """Which is hundreds of times slower."""
    fast = altered(KERNEL, "    Out, Lse, Q, K, V = tensors\n", "    assert False, 'slow'\n", tmp_path)
    for padding in (np.nan, np.inf):
        check(source=fast, **ODD, causal=causal, padding=padding)


@pytest.mark.parametrize("causal", [False, "bottom-right"])
def test_slow_rows_have_lengths_too(causal: bool | str) -> None:
    check(**LOUD_FEW, causal=causal)


# What is replaced by what, and the problem that shows it.
FAULTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a row of V behind the length is read": (
        "sequence[1] - SHAPE.BLOCK_N)",
        "sequence[1] + 1 - SHAPE.BLOCK_N)",
        {**FEW, **KEYS_ALONE},
    ),
    "the last block ends a key early": ("sequence[1] - SHAPE.BLOCK_N)", "sequence[1] - 1 - SHAPE.BLOCK_N)", FEW),
    "the producer loads the last block where it would begin": (
        "first_key(end_block - 1 - block, sequence, SHAPE)",
        "(end_block - 1 - block) * SHAPE.BLOCK_N",
        {**FEW, **KEYS_ALONE},
    ),
    "consumers mask the last block where it would begin": (
        "key = first_key(block, sequence, SHAPE)\n    if LENGTHS",
        "key = block * BLOCK_N\n    if LENGTHS",
        FEW,
    ),
    "keys of two blocks count twice": ("rows * 0 + block * BLOCK_N", "rows * 0", FEW),
    "a key of two blocks counts twice": ("rows * 0 + block * BLOCK_N", "rows * 0 + block * BLOCK_N - 1", FEW),
    "the first key of the last block is lost": ("rows * 0 + block * BLOCK_N", "rows * 0 + block * BLOCK_N + 1", FEW),
    "all sequences have the keys of the first": ("kv_lengths + batch", "kv_lengths + 0 * batch", FEW),
    "all sequences have the queries of the first": ("q_lengths + batch", "q_lengths + 0 * batch", FEW),
    "lengths beyond the tensor are taken": (
        "gl.maximum(gl.load(kv_lengths + batch), 0), kv_len)",
        "gl.maximum(gl.load(kv_lengths + batch), 0), kv_len + 9)",
        {**FEW, "kv_lengths": (150, 61, 230)},
    ),
    "half of a last block is left out": (
        "half & (key == block * BLOCK_N)",
        "half",
        {**HALVES, "kv_lengths": (150, 61, 200), "causal": "bottom-right"},
    ),
    "Out is stored before the buffer is free": (
        "                mbarrier.wait(plain[1].index(0), ((turn * CONSUMERS + CONSUMER) & 1) ^ 1)\n",
        "",
        {**FEW, **SETTINGS["head size 256, causal"], "causal": True, "programs": 1},
    ),
    "a query behind the length is written": ("some & (rows < q_n)", "some & (rows <= q_n)", {**FEW, "padding": 1.0}),
    "padding of Q reaches Out": ("if CAUSAL or LENGTHS:", "if CAUSAL:", FEW),
    "slow rows behind their sequence see keys": ("visible = rows < q_n", "visible = rows < q_len", LOUD_FEW),
}


@pytest.mark.parametrize("fault", some_of(FAULTS))
def test_a_faulty_kernel_is_noticed(fault: str, tmp_path: Path) -> None:
    right, wrong, problem = FAULTS[fault]
    assert is_noticed(check, altered(KERNEL, right, wrong, tmp_path), problem), "no interleaving showed the fault"
