"""Rescaling where it is due, and one product at a time, of the Hopper kernel in the emulator."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import some_of
from sm90_runs import KERNEL, LOUD, altered, check, is_noticed

# What the kernel is compiled with.
SETTINGS: dict[str, dict[str, Any]] = {
    "two consumers": {"head_size": 64, "ping_pong": False},
    "in turns": {"block_d": 128, "head_size": 128, "v_stages": 3, "q_slots": 1, "longest_first": True},
    "two parts": {"block_d": 64, "head_size": 192, "two_parts": True},
    "one product at a time": {
        "block_d": 32, "head_size": 96, "two_parts": True, "serial": True, "consumers": 3, "ping_pong": False,
        "block_n": 128, "stages": 3, "v_stages": 3,
    },
}  # fmt: skip
PROBLEM: dict[str, Any] = {
    "lazy": True, "producer_first": True, "heads": 2, "kv_heads": 1, "q_len": 200, "kv_len": 330, "programs": 2,
}  # fmt: skip


def problem(setting: str, causal: bool | str = False) -> dict[str, Any]:
    found = {**PROBLEM, **SETTINGS[setting]}
    return {**found, "causal": causal, "longest_first": bool(found.get("longest_first") and causal)}


@pytest.mark.parametrize(
    ("setting", "causal", "dtype"), some_of(SETTINGS, [False, True, "bottom-right"], ["fp16", "bf16"])
)
def test_numbers(setting: str, causal: bool | str, dtype: str) -> None:
    check(dtype, **problem(setting, causal))


def growing(factors: Any) -> Any:
    """Keys go from right to left: scores of each row grow by its factor in every block."""

    def change(q: Any, k: Any, _v: Any) -> None:
        q[...] = np.abs(q) * factors(np.arange(q.shape[2]))[:, None]
        k[...] = np.abs(k) * (1.0 + (k.shape[2] - np.arange(k.shape[2])) // 64)[:, None]

    return change


ROWS = {
    "all by little": lambda rows: 0.02 + 0 * rows,
    "all by much": lambda rows: 1.0 + 0 * rows,
    "one of a warp": lambda rows: np.where(rows % 16 == 5, 1.0, 0.01),
    "every other warp": lambda rows: np.where(rows // 16 % 2 == 0, 1.0, 0.01),
}


@pytest.mark.parametrize(("rows", "setting"), some_of(ROWS, SETTINGS))
def test_rows_that_grow_are_rescaled(rows: str, setting: str) -> None:
    check(**problem(setting), change=growing(ROWS[rows]))


@pytest.mark.parametrize("setting", SETTINGS)
def test_rows_that_leave_the_fast_range_are_computed_again(setting: str) -> None:
    loud = {**LOUD, "head_size": problem(setting)["head_size"], "q_len": 70, "kv_len": 20}
    check(**{**problem(setting, True), **loud})


@pytest.mark.parametrize("setting", ["two consumers", "one product at a time"])
def test_the_largest_values_stay_finite(setting: str) -> None:
    """Weights are above 1 where a reference lags behind; of values near the end of the range they must not be."""

    def change(q: Any, k: Any, v: Any) -> None:
        growing(lambda rows: 0.02 + 0 * rows)(q, k, v)
        v[...] = np.float32(2.0**127)

    check("bf16", **problem(setting), change=change)


FAULTS = {
    "sums are not rescaled": ("acc = times_where(acc, alpha, due)", "acc = times_where(acc, alpha, due * 0)"),
    "row sums are rescaled where sums are not": (
        "m_new, due = kept(m, m_new)\n            alpha = gl.exp2(m - m_new)",
        "m_new, due = kept(m, m_new)",
    ),
    "references are the largest scores, sums those of others": (
        "m_new, due = kept(m, m_new)\n            alpha",
        "_unused, due = kept(m, m_new)\n            alpha",
    ),
    "only one of two parts is rescaled": (
        "part_times_where(acc[0], factor, due), part_times_where(acc[1], factor, due)",
        "part_times_where(acc[0], factor, due), acc[1]",
    ),
    "one product at a time: sums are not rescaled": (
        "return times_where(acc, alpha, due), pack",
        "return times_where(acc, alpha, due * 0), pack",
    ),
    "one product at a time: scores are read too early": (
        "scores = warpgroup_mma_wait(0, deps=(scores,))\n    mbarrier.arrive(k_free.index(stage)",
        "scores = warpgroup_mma_wait(1, deps=(scores,))\n    mbarrier.arrive(k_free.index(stage)",
    ),
    "one product at a time: values are given back before they are used": (
        "acc, p, m = wait_for_products(acc, p, m)\n    mbarrier.arrive(v_free.index(before), count=1)",
        "mbarrier.arrive(v_free.index(before), count=1)\n    acc, p, m = wait_for_products(acc, p, m)",
    ),
}


@pytest.mark.parametrize("fault", some_of(FAULTS))
def test_a_faulty_kernel_is_noticed(fault: str, tmp_path: Path) -> None:
    faulty = altered(KERNEL, *FAULTS[fault], tmp_path)
    setting = "one product at a time" if fault.startswith("one") else "two parts"

    def grow(source: Path = KERNEL, seed: int = 0, limit: float = 1.0) -> None:
        small = {**problem(setting), "heads": 1, "q_len": 70, "kv_len": 520, "stages": 2, "v_stages": 2}
        for factor in (0.15, 0.02):
            check(source=source, seed=seed, limit=limit, **small, change=growing(lambda rows, f=factor: f + 0 * rows))

    assert is_noticed(grow, faulty, {})
