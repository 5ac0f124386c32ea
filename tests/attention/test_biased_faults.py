"""Faults planted in the kernel with biases and masks: each is noticed by a problem that passes without it."""

import shutil
from pathlib import Path

import biased_runs
import pytest
from biased_runs import Problem, check
from helpers import some_of

from pyfmha.attention.biased import KERNEL_FILE
from pyfmha.attention.forward import kernel_path

FULL = (2, 2, 33, 49)
PAIR = Problem(batch=2, heads=2, kv_heads=1, q_len=33, kv_len=49)
BIAS = Problem(**{**vars(PAIR), "bias": FULL})
MASK = Problem(**{**vars(PAIR), "mask": FULL, "share": 0.03})
CAPPED = Problem(**{**vars(BIAS), "softcap": 1.5, "bias_dtype": "fp32"})
SINKS = Problem(**{**vars(MASK), "sinks": "own", "dtype": "bf16"})
CAUSAL = Problem(**{**vars(BIAS), "right": 0, "bottom_right": True})
LARGE = Problem(**{**vars(BIAS), "scale": 1e5, "mask": FULL, "share": 0.03})
RAGGED = Problem(
    heads=2, kv_heads=2, q_len=40, kv_len=50, cu_q=[3, 20, 37], cu_kv=[0, 30, 50], bias=(2, 2, 40, 50), sinks="own"
)
SHORT = Problem(**{**vars(PAIR), "bias": (2, 2, 20, 30)})
SHORT_MASK = Problem(**{**vars(PAIR), "mask": (2, 2, 20, 30)})
VALUES = Problem(**{**vars(PAIR), "v_head_size": 24, "head_size": 32})

SCORES, SAFE, OWN = "biased_scores.py", "biased_safe.py", KERNEL_FILE
FAULTS = {
    "the bias is multiplied": (
        SCORES,
        'score += bias\n        seen &= bias != float("-inf")\n    if SCORE',
        'score += 2 * bias\n        seen &= bias != float("-inf")\n    if SCORE',
        BIAS,
    ),
    "the mask is the other way round": (SCORES, "given, 0) != 0", "given, 0) == 0", MASK),
    "rows past the end of a bias": (OWN, "_count_of(Bias, BiasFp32, bias_stride_q, bias_rows)", "q_len", SHORT),
    "keys past the end of a bias": (OWN, "tl.minimum(end, bias_keys)", "end", SHORT),
    "rows past the end of a mask": (OWN, "_count_of(Mask, Mask, mask_stride_q, mask_rows)", "q_len", SHORT_MASK),
    "keys past the end of a mask": (OWN, "tl.minimum(end, mask_keys)", "end", SHORT_MASK),
    "keys past the end of a mask, in blocks without masks": (
        OWN,
        "full_end = tl.minimum(full_end, mask_keys)",
        "full_end += 0",
        SHORT_MASK,
    ),
    "keys and queries of the bias exchanged": (
        SCORES,
        "rows[:, None] * stride_q + keys.to(tl.int64)[None, :] * stride_k",
        "rows[:, None] * stride_k + keys.to(tl.int64)[None, :] * stride_q",
        BIAS,
    ),
    "the window forgotten": (
        SCORES,
        "seen = visible_to(keys, tile.row_first, tile.row_last)",
        "seen &= keys[None, :] <= tile.last_key",
        CAUSAL,
    ),
    "the bias of another head": (OWN, "wide_head * bias_stride_h", "(wide_head + 1) % num_heads * bias_stride_h", BIAS),
    "the bias of the first tile": (OWN, "+ first_row * bias_stride_q", "", BIAS),
    "the bias of the first sequence": (OWN, "sequence.to(tl.int64) * bias_stride_b", "0 * bias_stride_b", RAGGED),
    "the bias before the soft cap": (
        OWN,
        "score = biased(score * scale,",
        "score = biased(score * scale * 0.9,",
        CAPPED,
    ),
    "no fp32 bias": (OWN, "_is_given(BiasFp32),", "_is_given(Bias),", CAPPED),
    "the sink without the shift": (OWN, "tl.exp2(sink - top)", "tl.exp2(sink + shift - top)", SINKS),
    "sinks of rows of no sequence": (
        OWN,
        "tl.where((sequence >= 0) & (sequence < batch_size), out_rows, 0)",
        "out_rows",
        RAGGED,
    ),
    "rows that see nothing": (
        OWN,
        "out_rows, v_head_size, out_stride_s, sees)",
        "out_rows, v_head_size, out_stride_s, rows < rows_left)",
        MASK,
    ),
    "the safe loop without the mask": (SAFE, 'seen = score != float("-inf")', "seen = score == score", LARGE),
    "values of Q's head size": (
        OWN,
        "tl.arange(0, BLOCK_V), out_rows, v_head_size,",
        "tl.arange(0, BLOCK_V), out_rows, head_size,",
        VALUES,
    ),
    "begin not aligned": (
        OWN,
        "begin = tl.minimum(begin, kv_n) // BLOCK_N * BLOCK_N",
        "begin = (tl.minimum(begin, kv_n) + BLOCK_N - 1) // BLOCK_N * BLOCK_N",
        Problem(**{**vars(BIAS), "left": 5, "right": 3}),
    ),
}


@pytest.mark.parametrize("name", some_of(FAULTS))
def test_a_planted_fault_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, right, wrong, problem = FAULTS[name]
    for source in kernel_path().parent.glob("*.py"):
        shutil.copy(source, tmp_path)
    text = (tmp_path / file).read_text()
    assert right in text
    (tmp_path / file).write_text(text.replace(right, wrong))
    monkeypatch.setattr(biased_runs, "kernel_path", lambda: tmp_path / "fmha_fwd.py")

    with pytest.raises(AssertionError):
        check(problem)


@pytest.mark.parametrize("problem", {id(p): p for *_, p in FAULTS.values()}.values(), ids=str)
def test_the_problems_pass_without_faults(problem: Problem) -> None:
    check(problem)
