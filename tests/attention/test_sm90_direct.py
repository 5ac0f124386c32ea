"""Out of the Hopper kernel stored from registers, in the emulator."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gluon_emulator import Machine
from gluon_language import load_kernel
from gluon_values import FP16, tensor
from helpers import examples, some_of
from hypothesis import given
from hypothesis import strategies as st
from sm90_runs import KERNEL, LOUD, altered, check, is_noticed, largest_bf16

DIRECT = KERNEL.with_name("sm90_direct.py")
# What the kernel is compiled with: one slot for queries and two, one consumer and several, blocks of both kinds.
SETTINGS: dict[str, dict[str, Any]] = {
    "head size 64": {"consumers": 1, "block_n": 128, "head_size": 56, "direct": True, "early": True},
    "three consumers": {"consumers": 3, "block_n": 128, "direct": True, "ping_pong": False},
    "head size 128": {"block_d": 128, "block_n": 128, "head_size": 120, "lazy": True, "early": True, "direct": True},
    "head size 256": {
        **{"block_d": 256, "block_n": 80, "head_size": 200, "q_slots": 1, "dtype": "bf16", "lazy": True},
        **{"threes": True, "producer_first": True, "direct": True},
    },
}
FEW: dict[str, Any] = {"heads": 3, "kv_heads": 1, "batch": 2, "q_len": 140, "kv_len": 300}


@pytest.mark.parametrize("columns", [64, 128, 256])
def test_a_thread_gets_eight_columns_beside_each_other(columns: int) -> None:
    rows = load_kernel(DIRECT, Machine(0))["_rows"]
    values = np.random.default_rng(columns).integers(-99, 99, (64, columns)).astype(np.float32)

    assert np.array_equal(np.asarray(rows(tensor(values, np.float32), FP16)), values)


@pytest.mark.parametrize(
    ("setting", "causal", "layout"), some_of(SETTINGS, [False, True, "bottom-right"], ["bhsd", "bshd"])
)
def test_all_rows_and_columns_are_stored(setting: str, causal: bool | str, layout: str) -> None:
    check(**FEW, **SETTINGS[setting], causal=causal, layout=layout, programs=2)


@examples(10)
@given(data=st.data())
def test_any_problem(data: st.DataObject) -> None:
    causal = data.draw(st.sampled_from([False, True, "bottom-right"]))
    order = {"longest_first": True, "handed": True} if causal and data.draw(st.booleans()) else {}
    setting = SETTINGS[data.draw(st.sampled_from(sorted(SETTINGS)))]
    sizes = {"q_len": data.draw(st.integers(1, 300)), "kv_len": data.draw(st.integers(1, 300))}
    check(**{**setting, **order, **sizes}, causal=causal, programs=data.draw(st.integers(1, 3)), heads=2)


def test_no_value_becomes_infinite() -> None:
    check(**SETTINGS["head size 256"], **LARGEST)


@pytest.mark.parametrize("setting", ["head size 256"])
def test_rows_that_leave_the_fast_range_are_computed_again(setting: str) -> None:
    check(**{**SETTINGS[setting], **LOUD, "head_size": 136, "q_len": 70, "kv_len": 120})


LARGEST: dict[str, Any] = {"batch": 1, "q_len": 64, "kv_len": 64, "causal": False, "change": largest_bf16}
FAULTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a row behind the sequence is stored": ("(rows < count)", "(rows <= count)", {}),
    "the last row is not stored": ("(rows < count)", "(rows < count - 1)", {}),
    "columns behind the head size are stored": ("(columns < head_size)[None, :]", "(columns < 999)[None, :]", {}),
    "all sequences are stored as the first": ("(head // num_heads).to", "(head * 0).to", {}),
    "all heads are stored as the first": ("(head % num_heads).to", "(head * 0).to", {}),
    "all tiles are stored as the first": ("Out += token.to(gl.int64) *", "Out += 0 *", {}),
    "threads do not tell whose columns they give": ("gl.where(low, odd, even)", "gl.where(low, even, odd)", {}),
    "two threads do not exchange": ("second, fourth = _exchanged(odd, 2)", "second, fourth = _exchanged(odd, 1)", {}),
    "pairs are in another order": (
        "gl.join(gl.join(first, third), gl.join(second, fourth))",
        "gl.join(gl.join(first, second), gl.join(third, fourth))",
        {},
    ),
    "values become infinite": ('f"cvt.rn.satfinite.{kind}', 'f"cvt.rn.{kind}', LARGEST),
    "a slot is given away before its last scores": (
        "        if SHAPE.APART or SHAPE.DIRECT:\n            mbarrier.arrive(q_free.index(slot), count=1)\n",
        "",
        {},
    ),
}
EARLY = "        to_left = uniform(block - first_block)\n"


@pytest.mark.parametrize("fault", some_of(FAULTS))
def test_a_faulty_kernel_is_noticed(fault: str, tmp_path: Path) -> None:
    right, wrong, change = FAULTS[fault]
    faulty = altered(KERNEL, right, wrong, tmp_path)
    if "given away" in fault:
        arrives = "        mbarrier.arrive(q_free.index(slot), count=1)\n"
        faulty.write_text(faulty.read_text().replace(EARLY, arrives + EARLY))
    problem = {**FEW, **SETTINGS["head size 256"], "causal": "bottom-right", "layout": "bshd", **change}
    assert is_noticed(check, faulty, problem), "no interleaving showed the fault"
