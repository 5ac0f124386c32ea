"""The Hopper kernel of decoding that copies K and V in the emulator: its numbers, its copies, its barriers."""

from pathlib import Path
from typing import Any

import pytest
from decode_runs import COPIED, EIGHT, EVEN, LONG, PADDED, PARTS, RANGE, WINDOW, check, loud_start
from sm90_runs import altered, is_noticed, largest_bf16

# What is replaced by what, and the problem that shows it.
MUTANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "no fence makes Q and K visible": ("        fence_async_shared()  # at first for the queries, too\n", "", {}),
    "no barrier follows Q and K": ("queries, too\n        gl.barrier()\n", "queries, too\n", {}),
    "no fence makes the weights visible": (
        "        fence_async_shared()\n        gl.barrier()\n        acc",
        "        gl.barrier()\n        acc",
        {},
    ),
    "no barrier follows the weights": (
        "        fence_async_shared()\n        gl.barrier()\n        acc",
        "        fence_async_shared()\n        acc",
        {},
    ),
    "a stage is fetched again before it is read": (
        "        gl.barrier()\n        _fetch(k_rows",
        "        _fetch(k_rows",
        LONG,
    ),
    "other programs' keys are fetched": ("last = gl.minimum(begin + count * BLOCK_N, end)", "last = end", LONG),
    "another block is fetched": (
        "_fetch(k_rows, k_smem, stage, begin + (turn + STAGES)",
        "_fetch(k_rows, k_smem, stage, begin + (turn + 1)",
        LONG,
    ),
    "another stage is fetched": (
        "_fetch(v_rows, v_smem, stage, ",
        "_fetch(v_rows, v_smem, (turn + 1) % STAGES, ",
        LONG,
    ),
    "K is not waited for": ("        async_copy.wait_group(2 * STAGES - 1)\n", "", {}),
    "K is waited for too late": ("async_copy.wait_group(2 * STAGES - 1)", "async_copy.wait_group(2 * STAGES)", {}),
    "V is not waited for": ("        async_copy.wait_group(2 * STAGES - 2)\n", "", {}),
    "V is waited for too late": ("async_copy.wait_group(2 * STAGES - 2)", "async_copy.wait_group(2 * STAGES - 1)", {}),
    "keys beyond the last are not zeros": ("(key + keys < end)[:, None]", "(key + keys < end + 1)[:, None]", PADDED),
    "columns beyond the head size are fetched": (" & inside[None, :])", ")", {"head_size": 40}),
    "a key too many": ("(keys < left)[:, None]", "(keys <= left)[:, None]", {}),
    "a key too few": ("(keys < left)[:, None]", "(keys < left - 1)[:, None]", {}),
    "lengths may be beyond the tensor": (
        "gl.minimum(gl.maximum(gl.load(kv_lengths + batch), 0), kv_len)",
        "gl.maximum(gl.load(kv_lengths + batch), 0)",
        {"kv_lengths": [105]},
    ),
    "the right end of the window is off by one": ("window_right + 1, kv_n", "window_right, kv_n", WINDOW),
    "the left end of the window is off by one": ("diagonal - window_left, 0", "diagonal - window_left + 1, 0", WINDOW),
    "the window ends at the tensor's end": ("bottom_right != 0, kv_n - 1", "bottom_right != 0, kv_len - 1", WINDOW),
    "programs begin a block apart": ("begin += rank * share * BLOCK_N", "begin += rank * BLOCK_N", {}),
    "blocks that are no whole share are lost": ("(blocks + ranks - 1) >> halvings", "blocks >> halvings", {}),
    "the first programs take all": ("gl.maximum(blocks - rank * share, 0), share)", "blocks, blocks)", {}),
    "halves are counted as in a cluster of 2": ("+ (ranks > 4).to(gl.int32)", "+ 0", EIGHT),
    "no maximum is kept": ("m_new = gl.maximum(m, ", "m_new = gl.maximum(LOWEST, ", {"change": loud_start}),
    "the output is not rescaled": ("acc = acc * alpha[None, :]\n", "acc = acc\n", {}),
    "the sums are not rescaled": ("sums = sums * alpha[None, :] + p", "sums = sums + p", {}),
    "a negative scale is taken for positive": ("        q = -q\n", "        q = q\n", {"sm_scale": -0.125}),
    "bf16 is not shifted": ("gl.constexpr(24.0)", "gl.constexpr(0.0)", {"dtype": "bf16", "change": largest_bf16}),
    "Lse is shifted": (" + shift) * LN_2", ") * LN_2", {"dtype": "bf16", "ranks": 1}),
    "large bf16 queries stay large": ("return (wide * down[:, None]", "return (wide", RANGE),
    "fp16 beyond the largest becomes infinite": (
        "gl.where(out > most, most",
        "gl.where(out > most, out",
        {"ranks": 1, **EVEN},
    ),
    "all parts take the first heads": ("first_head = kv_head % parts * HEADS", "first_head = 0", PARTS),
    "parts and key heads are mixed up": ("kv_head = kv_head // parts", "kv_head = kv_head % parts", PARTS),
    "the last part has 8 heads": (" & (first_head + column < group)", "", PARTS),
    "queries beyond the last are read": ("(q_rows < group)[:, None]", "(q_rows >= 0)[:, None]", PARTS),
    "columns beyond the head size are read": ("(q_columns < head_size)[", "(q_columns >= 0)[", {"head_size": 40}),
    "columns beyond the head size are written": ("mask=inside & (d < head_size)", "mask=inside", {"head_size": 40}),
    "a lone program stores padding": ("row < head_size)[:, None]", "row >= 0)[:, None]", {"ranks": 1, "head_size": 40}),
    "a lone program stores all of 8 heads": ("(column < group)[None", "(column < 8)[None", {"ranks": 1}),
    "a lone program's Lse is that of a weight": ("_log_sum(m * factor, ", "_log_sum(m, ", {"ranks": 1}),
    "without keys 0 is divided by 0": (
        "gl.where(row_sum != 0, out, 0.0)",
        "out",
        {
            "ranks": 1,
            "batch": 2,
            "kv_lengths": [0, 30],
        },
    ),
    "fewer bytes are expected of the cluster": (
        "same + 4 * (BLOCK_D * HEADS + ranks * STATISTICS)",
        "same + 4 * (BLOCK_D * HEADS)",
        {},
    ),
    "the bytes of the largest cluster are expected": (
        "same + 4 * (BLOCK_D * HEADS + ranks * STATISTICS)",
        "same + 4 * (BLOCK_D * HEADS + RANKS * STATISTICS)",
        {},
    ),
}


@pytest.mark.parametrize("seed", range(3))
def test_the_kernel_is_right_where_faults_are_noticed(seed: int) -> None:
    for problem in {str(problem): problem for _, _, problem in MUTANTS.values()}.values():
        check(source=COPIED, seed=seed, **problem)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_faulty_kernel_is_noticed(mutant: str, tmp_path: Path) -> None:
    """The emulator would find what it is there to find."""
    right, wrong, problem = MUTANTS[mutant]
    assert is_noticed(check, altered(COPIED, right, wrong, tmp_path), problem), "no interleaving showed the fault"
