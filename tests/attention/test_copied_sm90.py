"""The Hopper kernel of decoding that copies K and V in the emulator: its numbers, its copies, its barriers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gluon_cluster import ClusterMachine
from gluon_language import load_kernel
from gluon_values import DTYPES, FP32, INT32, Pointer
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from sm90_runs import TOLERANCE, altered, check_values, is_noticed, largest, largest_bf16, loud, make

from pyfmha.attention.hopper import COPIED_KERNEL_FILE, DECODE_KERNEL
from pyfmha.attention.reference import attend, relative_error

KERNEL = Path(__file__).parents[2] / "kernels" / COPIED_KERNEL_FILE


def run(
    *,
    source: Path = KERNEL,
    seed: int = 0,
    ranks: int = 2,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    kv_len: int = 100,
    kv_lengths: Sequence[int] | None = None,
    head_size: int | None = None,
    window: tuple[int, int] = (-1, -1),
    bottom_right: bool = True,
    dtype: str = "fp16",
    layout: str = "bhsd",
    block_d: int = 64,
    block_n: int = 16,
    stages: int = 2,
    sm_scale: float = 0.125,
    scale: float = 1.0,
    lse: bool = True,
    change: Callable[[Any, Any, Any], None] = lambda q, k, v: None,
) -> tuple[Any, Any, Any, Any]:
    """Run the kernel; returns Out, Lse and what they should be, without the axis of queries. `change` may write other
    values to Q, K and V. Keys beyond their lengths are NaN."""
    rng = np.random.default_rng(seed)
    head_size = head_size or block_d
    (q_memory, q), (k_memory, k), (v_memory, v), (out_memory, out) = (
        make(rng, (batch, h, s, head_size), dtype, layout, scale)
        for h, s in ((heads, 1), (kv_heads, kv_len), (kv_heads, kv_len), (heads, 1))
    )
    change(q, k, v)
    for b, length in enumerate(kv_lengths or ()):
        k[b, :, max(length, 0) :] = v[b, :, max(length, 0) :] = np.nan
    out_memory[...] = np.nan
    lse_memory = np.full(batch * heads + 32, 7.0, np.float32)
    lengths = None if kv_lengths is None else np.array(kv_lengths, np.int32)
    element, machine = DTYPES[dtype], ClusterMachine(seed)
    machine.launch(
        load_kernel(source, machine)[DECODE_KERNEL],
        (ranks, kv_heads * -(-heads // kv_heads // 8), batch),
        Pointer(out_memory, element, 16),
        Pointer(lse_memory if lse else None, FP32, 16),
        *(Pointer(memory, element, 16) for memory in (q_memory, k_memory, v_memory)),
        *(Pointer(array, INT32) for array in (None, lengths, None, None)),
        sm_scale,
        0.0,
        *(batch, heads, kv_heads, 1, kv_len, head_size),
        *(np.int64(stride // 4) for array in (q, k, v, out) for stride in array.strides[:3]),
        *(*window, int(bottom_right), 0),
        BLOCK_D=block_d,
        BLOCK_N=block_n,
        WARPS=4,
        STAGES=stages,
    )
    for memory, guard in ((out_memory, np.nan), (lse_memory, 7.0)):
        np.testing.assert_array_equal(memory[:16], guard)
        np.testing.assert_array_equal(memory[-16:], guard)
    left, right = window
    wanted, wanted_lse = attend(
        *(q, k, v),
        **{"sm_scale": sm_scale, "kv_lengths": kv_lengths, "bottom_right": bottom_right},
        **{"window_left": left, "window_right": right},
    )
    return out[:, :, 0], lse_memory[16:-16].reshape(batch, heads), wanted[:, :, 0], wanted_lse[:, :, 0]


def check(dtype: str = "fp16", limit: float = 1.0, **problem: Any) -> None:
    check_values(*run(dtype=dtype, **problem), dtype, limit)


@pytest.mark.parametrize("kv_len", [1, 5, 63, 64, 65, 300])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_share_any_number_of_keys(ranks: int, kv_len: int) -> None:
    check(seed=kv_len, ranks=ranks, kv_len=kv_len)


def no_queries(q: Any, k: Any, v: Any) -> None:
    q[...] = 0


@pytest.mark.parametrize(
    "problem",
    [
        {"heads": 1},
        {"heads": 8, "kv_heads": 2, "batch": 2},
        {"heads": 8, "dtype": "bf16"},
        {"heads": 9, "ranks": 4},
        {"heads": 24, "kv_heads": 2, "batch": 2, "ranks": 1},
        {"heads": 18, "kv_heads": 2, "layout": "bshd", "dtype": "bf16"},
        {"head_size": 8, "ranks": 8},
        {"head_size": 40, "layout": "bshd", "batch": 2},
        {"head_size": 72, "block_d": 128, "ranks": 4},
        {"head_size": 96, "block_d": 128, "dtype": "bf16", "layout": "bshd", "heads": 12, "kv_heads": 3},
        {"block_d": 128, "block_n": 64, "kv_len": 300, "ranks": 8},
        {"block_d": 256, "block_n": 64, "kv_len": 70, "dtype": "bf16"},
        {"block_n": 128, "stages": 4, "kv_len": 1500, "ranks": 2},
        {"stages": 1, "kv_len": 200},
        {"stages": 3, "kv_len": 200, "ranks": 1},
        {"sm_scale": -0.125},
        {"sm_scale": -0.125, "dtype": "bf16"},
        {"sm_scale": 0.0},
        {"sm_scale": 0.0, "dtype": "bf16", "kv_lengths": [37]},
        {"sm_scale": 3e38, "scale": 2.0**-70, "dtype": "bf16"},
        {"change": no_queries, "dtype": "bf16"},
    ],
    ids=lambda problem: str({name: getattr(value, "__name__", value) for name, value in problem.items()}),
)
def test_heads_layouts_and_settings(problem: dict[str, Any]) -> None:
    check(**problem)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (20, -1), (33, 0), (0, 0), (-1, 21), (5, 40), (2**31 - 1, 0)])
@pytest.mark.parametrize("bottom_right", [False, True])
def test_windows(window: tuple[int, int], bottom_right: bool) -> None:
    lengths = [100, 50, 16, 1, 0]

    check(window=window, bottom_right=bottom_right, kv_lengths=lengths, batch=5, heads=1)


def test_the_widest_windows_do_not_overflow() -> None:
    check(window=(2**31 - 1, 2**31 - 1), kv_len=40)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_what_lies_beyond_a_length_changes_nothing(dtype: str, ranks: int) -> None:
    lengths = [0, 1, 16, 31, 70, 100, 101, 2**31 - 1, -1, -(2**31)]
    problem = {"dtype": dtype, "ranks": ranks, "kv_lengths": lengths, "batch": len(lengths), "heads": 1}

    check(**problem)
    out, lse, _, _ = run(**problem)
    for b in (0, 8, 9):
        assert (out[b] == 0).all()
        assert np.isneginf(lse[b]).all()


def test_lse_may_be_left_out() -> None:
    out, lse, wanted, _ = run(lse=False)

    assert relative_error(out, wanted) < TOLERANCE["fp16"]
    assert (lse == 7).all()


@pytest.mark.parametrize(("dtype", "value"), [("fp16", 65504.0), ("bf16", 255 * 2.0**120)])
@pytest.mark.parametrize("sm_scale", [1.0, -1.0, 3.4e38])
def test_the_largest_inputs_stay_finite(dtype: str, value: float, sm_scale: float) -> None:
    """A row of the largest scores, one of the smallest, and one of both."""

    def change(q: Any, k: Any, v: Any) -> None:
        q[:, :, 0], k[...], v[...] = value, value, value
        q[:, 1] *= -1
        k[:, :, ::3] *= -1
        v[..., 1::2] *= -1

    out, lse, wanted, _ = run(dtype=dtype, sm_scale=sm_scale, change=change, kv_len=70, heads=2)

    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()
    assert relative_error(out, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize(("dtype", "scale"), [("fp16", 2.0**13), ("bf16", 2.0**125)])
def test_of_large_inputs_the_best_key_is_found(dtype: str, scale: float) -> None:
    out, lse, wanted, _ = run(dtype=dtype, scale=scale, ranks=4)

    assert np.isfinite(out).all()
    assert not np.isnan(lse).any()
    assert relative_error(out, wanted) < TOLERANCE[dtype]


def test_bf16_products_may_leave_the_range() -> None:
    check(dtype="bf16", sm_scale=2.0**-20, change=loud, head_size=32)


@pytest.mark.parametrize(("dtype", "change"), [("fp16", largest), ("bf16", largest_bf16)])
def test_a_mean_of_the_largest_values_is_not_rounded_to_infinity(dtype: str, change: Callable[..., None]) -> None:
    check(dtype=dtype, change=change)


def test_nan_stays_in_its_head() -> None:
    def change(q: Any, _k: Any, _v: Any) -> None:
        q[0, 1, 0, 3] = np.nan

    out, lse, wanted, wanted_lse = run(heads=3, change=change)

    assert np.isnan(out[0, 1]).all()
    assert np.isnan(lse[0, 1])
    assert relative_error(out[0, ::2], wanted[0, ::2]) < TOLERANCE["fp16"]
    np.testing.assert_allclose(lse[0, ::2], wanted_lse[0, ::2], rtol=1e-4, atol=1e-4)


@examples(15)
@given(data=st.data())
def test_any_problem(data: st.DataObject) -> None:
    batch, kv_heads, kv_len = (data.draw(st.integers(1, most)) for most in (2, 2, 200))
    lengths = st.none() | st.lists(st.integers(-2, kv_len + 2), min_size=batch, max_size=batch)
    bounds = st.just(-1) | st.integers(0, 220)
    check(
        seed=data.draw(st.integers(0, 1000)),
        ranks=data.draw(st.sampled_from([1, 2, 4, 8])),
        batch=batch,
        kv_heads=kv_heads,
        heads=kv_heads * data.draw(st.integers(1, 12)),
        kv_len=kv_len,
        kv_lengths=data.draw(lengths),
        window=(data.draw(bounds), data.draw(bounds)),
        bottom_right=data.draw(st.booleans()),
        dtype=data.draw(st.sampled_from(["fp16", "bf16"])),
        stages=data.draw(st.integers(1, 4)),
        layout=data.draw(st.sampled_from(["bhsd", "bshd"])),
        head_size=8 * data.draw(st.integers(1, 8)),
        sm_scale=data.draw(st.floats(-0.5, 0.5, width=32)),
    )


def loud_start(_q: Any, k: Any, _v: Any) -> None:
    k[:, :, :8] *= 1000


LONG: dict[str, Any] = {"kv_len": 150}
RANGE = {"dtype": "bf16", "sm_scale": 2.0**-20, "change": loud, "head_size": 32}
EVEN = {"change": largest}
PADDED = {"kv_lengths": [37]}
EIGHT = {"ranks": 8, "heads": 8, "kv_len": 300}
PARTS = {"heads": 18, "kv_heads": 2}
WINDOW = {"window": (30, 0), "kv_lengths": [70]}

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
        check(seed=seed, **problem)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_faulty_kernel_is_noticed(mutant: str, tmp_path: Path) -> None:
    """The emulator would find what it is there to find."""
    right, wrong, problem = MUTANTS[mutant]
    assert is_noticed(check, altered(KERNEL, right, wrong, tmp_path), problem), "no interleaving showed the fault"
