"""The Hopper kernel with sinks alone, in the emulator: numbers, rows that see nothing, planted faults."""

from typing import Any

import numpy as np
import pytest
from helpers import few_of
from sm90_biased_runs import SINKS, check, run
from sm90_runs import altered, is_noticed

PLAIN = SINKS.with_name("fmha_sm90.py")
COMMON: dict[str, Any] = {"sinks_alone": True, "heads": 4, "kv_heads": 2}
PROBLEMS: dict[str, dict[str, Any]] = {
    "full": {"q_len": 100, "kv_len": 200, "sinks": "own", "causal": False},
    "causal, one consumer": {"q_len": 200, "sinks": "fp32", "causal": True, "block_n": 128, "programs": 3},
    "causal, two consumers": {"q_len": 200, "sinks": "own", "causal": True, "consumers": 2, "dtype": "bf16"},
    "rescaled where it is due": {
        "q_len": 70, "kv_len": 330, "sinks": "fp32", "causal": False, "consumers": 2, "lazy": True,
    },
    "three consumers, longest first": {
        "q_len": 400, "sinks": "own", "causal": True, "consumers": 3, "longest_first": True, "programs": 2,
        "block_n": 128,
    },
    "handed on": {
        "q_len": 700, "sinks": "own", "causal": True, "consumers": 2, "longest_first": True, "programs": 2,
        "block_n": 128, "lazy": True, "threes": True, "handed": True, "producer_first": True, "ping_pong": False,
    },
    "blocks that are no power of two": {
        "q_len": 100, "kv_len": 200, "sinks": "own", "causal": False, "consumers": 2, "block_n": 80, "lazy": True,
        "threes": True, "producer_first": True,
    },
    "rows without keys": {"q_len": 150, "kv_len": 40, "sinks": "own", "causal": True, "bottom_right": True},
    "none": {"q_len": 70, "sinks": "", "causal": True},
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_numbers(name: str) -> None:
    check(**COMMON, **PROBLEMS[name])


def test_a_row_without_keys_has_the_sink() -> None:
    out, lse, _, wanted = run(**COMMON, **PROBLEMS["rows without keys"])
    assert (out[:, :, :110] == 0).all()
    assert np.isfinite(wanted[:, :, :110]).all()
    np.testing.assert_allclose(lse[:, :, :110], wanted[:, :, :110], rtol=1e-6)


def loud(*, q: Any, k: Any, **_: Any) -> None:
    q *= 2.0**66
    k *= 2.0**62


@pytest.mark.parametrize("causal", [True, False])
def test_rows_that_leave_the_fast_range_are_computed_again_with_sinks(causal: bool) -> None:
    check("bf16", sm_scale=2.0**-20, head_size=32, change=loud, q_len=64, sinks="own", causal=causal, **COMMON)


FAULTS: dict[str, tuple[Any, str, str, str]] = {
    "no sink": (PLAIN, "load_sink(plain, head % num_heads)", "load_sink(plain, 0) - 99.0", "full"),
    "that of another head": (PLAIN, "load_sink(plain, head % num_heads)", "load_sink(plain, 0)", "full"),
    "the log-sum-exp without": (PLAIN, "lse = sunk", "lse += 0", "causal, one consumer"),
    "rows without keys": (PLAIN, "gl.where(some, m, NOTHING)", "gl.where(some, m, -NOTHING)", "rows without keys"),
}


@pytest.mark.parametrize("name", few_of(FAULTS, lambda name: name == "rows without keys"))
def test_a_fault_is_noticed(name: str, tmp_path: Any) -> None:
    file, right, wrong, problem = FAULTS[name]
    altered(file, right, wrong, tmp_path)
    copy = tmp_path / SINKS.name
    copy.write_text(SINKS.read_text())
    assert is_noticed(check, copy, COMMON | PROBLEMS[problem])
