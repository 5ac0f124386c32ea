"""The attention kernel, from its own source under Triton's interpreter, against float64."""

import mmap
from dataclasses import dataclass

import numpy as np
import pytest
from helpers import examples, some_of
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.random import default_rng

from pyfmha.attention.first import KERNEL, kernel_path
from pyfmha.attention.reference import attention_float64, relative_error
from pyfmha.attention.run import to_float, to_storage
from pyfmha.bfloat16 import STORAGE
from pyfmha.interpreter.kernel import Tensor, run_interpreted

LIMITS = {"fp16": 5e-4, "bf16": 4e-3, "fp32": 1e-5}
LARGEST = {"fp16": 65504.0, "bf16": 3.3895313892515355e38, "fp32": 3.4028234663852886e38}
# Small blocks, so that short sequences already have several: unmasked ones, diagonal ones and a tail.
BLOCK_M, BLOCK_N = 32, 16
GUARD = 64
DTYPES = tuple(LIMITS)


@dataclass(frozen=True)
class Run:
    """What the kernel wrote, as floats: out [B, H, S, D], row_sum and row_max [B, H, S]."""

    out: np.ndarray
    row_sum: np.ndarray
    row_max: np.ndarray


def guarded(size: int, storage: type) -> np.ndarray:
    """An array with guards on both sides, all of it a pattern that no result has."""
    array = np.empty(size + 2 * GUARD, storage)
    array.view(np.uint8)[...] = 0xFF  # a NaN that arithmetic does not produce
    return array


def attend(dtype, q, k, v, scale, causal, *, blocks=(BLOCK_M, BLOCK_N), heads_grid=None, extra_tiles=0) -> Run:
    """Runs the kernel on stored arrays and checks that it wrote every result and nothing else."""
    batch, heads, seq, head_size = q.shape
    sizes = {"Out": q.size, "L": batch * heads * seq, "M": batch * heads * seq}
    stores = {name: guarded(size, STORAGE[dtype] if name == "Out" else np.float32) for name, size in sizes.items()}
    args = {name: Tensor(store, dtype if name == "Out" else "fp32", GUARD) for name, store in stores.items()}
    # Inputs lie between NaNs: a load out of bounds that mattered would show.
    for name, array in (("Q", q), ("K", k), ("V", v)):
        nan = to_storage(np.full(GUARD, np.nan, np.float32), dtype)
        args[name] = Tensor(np.concatenate([nan, array.ravel(), nan]), dtype, GUARD)
    grid = (-(-seq // blocks[0]) + extra_tiles, *(heads_grid or (batch * heads, 1)))
    run_interpreted(
        kernel_path(),
        KERNEL,
        grid,
        {**args, "sm_scale": float(scale), "batch_size": batch, "num_heads": heads, "seq_len": seq},
        {"BLOCK_M": blocks[0], "BLOCK_DMODEL": head_size, "BLOCK_N": blocks[1], "CAUSAL": causal},
    )
    for name, store in stores.items():
        raw = store.view(np.uint8).reshape(store.size, -1)
        outside = np.concatenate([raw[:GUARD], raw[-GUARD:]])
        assert (outside == 0xFF).all(), f"wrote outside {name}"
        assert not (raw[GUARD:-GUARD] == 0xFF).all(axis=1).any(), f"left part of {name} unwritten"
    inner = {name: store[GUARD:-GUARD] for name, store in stores.items()}
    out = to_float(inner["Out"], dtype).reshape(q.shape)
    return Run(out, *(inner[name].astype(np.float64).reshape(q.shape[:3]) for name in ("L", "M")))


def normal(dtype, shape, seed, factor=1.0):
    return [to_storage(factor * default_rng([seed, i]).standard_normal(shape, np.float32), dtype) for i in range(3)]


def check(dtype, q, k, v, scale, causal, **options) -> Run:
    """Kernel against float64: out, and L and M, whose meaning is L * exp(M), the sum of exp(score)."""
    run = attend(dtype, q, k, v, scale, causal, **options)
    exact = attention_float64(*(to_float(x, dtype) for x in (q, k, v)), sm_scale=np.float32(scale), causal=causal)
    assert relative_error(run.out, exact.out) <= LIMITS[dtype]
    size = 1 + np.abs(exact.row_max)
    assert (np.abs(run.row_max - exact.row_max) <= 2e-6 * size).all()
    assert (np.abs(run.row_sum / exact.row_sum - 1) <= 4e-6 * size).all()
    return run


lengths = st.one_of(
    st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 97, 127, 128, 129]), st.integers(1, 140)
)


@examples(60)
@given(
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    seq=lengths,
    head_size=st.sampled_from([32, 64, 128, 256]),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.3, -0.2]),
    blocks=st.sampled_from([(32, 16), (16, 32), (64, 64), (32, 32)]),
    seed=st.integers(0, 9),
)
@example("fp16", 1, 1, 1, 64, True, None, (32, 16), 0)
@example("fp16", 1, 2, 17, 64, False, None, (32, 16), 0)
@example("bf16", 1, 1, 129, 64, True, None, (64, 64), 0)
@example("fp32", 1, 1, 127, 128, False, None, (16, 32), 0)
def test_kernel_matches_float64(dtype, batch, heads, seq, head_size, causal, scale, blocks, seed) -> None:
    q, k, v = normal(dtype, (batch, heads, seq, head_size), seed)
    check(dtype, q, k, v, head_size**-0.5 if scale is None else scale, causal, blocks=blocks)


@pytest.mark.parametrize(
    ("scale", "causal", "dtype"), some_of([0.0, -0.0, 1e-40, -1e-30, -0.125, 1.5], [True, False], DTYPES)
)
def test_any_scale(dtype, causal, scale) -> None:
    check(dtype, *normal(dtype, (1, 2, 49, 32), 1), scale, causal)


@pytest.mark.parametrize(("scale", "causal", "dtype"), some_of([1e6, -1e6, 1e20, 1e30, -3e38], [True, False], DTYPES))
def test_huge_scores_pick_the_largest(dtype, causal, scale) -> None:
    # Small integers: the dot products are exact, so that the winner, ties included, is certain.
    rng = default_rng(2)
    q, k = (to_storage(rng.integers(-2, 3, (1, 2, 49, 32)).astype(np.float32), dtype) for _ in range(2))
    v = normal(dtype, (1, 2, 49, 32), 3)[2]
    run = attend(dtype, q, k, v, scale, causal)
    exact = attention_float64(*(to_float(x, dtype) for x in (q, k, v)), sm_scale=np.float32(scale), causal=causal)
    assert relative_error(run.out, exact.out) <= LIMITS[dtype]
    np.testing.assert_allclose(run.row_sum, exact.row_sum, rtol=1e-6)
    if abs(scale) < 1e34:  # beyond, M may stop early
        np.testing.assert_allclose(run.row_max, exact.row_max, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_large_scores_are_still_accurate(dtype, causal) -> None:
    q, k, v = normal(dtype, (1, 2, 65, 64), 4, factor=3.0)
    check(dtype, q, k, v, 0.5 if dtype == "fp32" else 2.0, causal)


def test_one_row_beyond_the_fast_range_leaves_the_others_accurate() -> None:
    for dtype in DTYPES:
        q, k, v = normal(dtype, (1, 1, 65, 32), 5)
        q[0, 0, 40] = to_storage(np.full(32, 3e4, np.float32), dtype)  # this row's tile is computed again, safely
        run = attend(dtype, q, k, v, 40.0, True)
        exact = attention_float64(*(to_float(x, dtype) for x in (q, k, v)), sm_scale=40.0, causal=True)
        assert abs(exact.row_max[0, 0, 40]) > 2**20
        assert relative_error(run.out, exact.out) <= 4 * LIMITS[dtype]


@examples(40)
@given(
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    extreme=st.sets(st.sampled_from("qkv"), min_size=1),
    scale=st.sampled_from([1.0, 0.125, -0.3, 0.0, 1e-40, 1e30, -3.4e38]),
    fractions=st.lists(st.sampled_from([1.0, -1.0, 0.0, 1 / 3, -0.999, 1e-3, 1e-30, 1e-38]), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
@example("fp32", False, {"v"}, 0.125, [1.0, -1.0], 0)
@example("bf16", True, {"q", "k", "v"}, 0.0, [1.0, -1.0], 0)
@example("fp16", False, {"q", "k", "v"}, -3.4e38, [1.0, -1.0, 0.0], 0)
def test_finite_input_never_gives_nan(dtype, causal, extreme, scale, fractions, seed) -> None:
    values = LARGEST[dtype] * np.array(fractions)
    tensors = dict(zip("qkv", normal(dtype, (1, 2, 49, 32), seed), strict=True))
    for name in sorted(extreme):
        chosen = default_rng([seed, ord(name)]).choice(values, (1, 2, 49, 32))
        tensors[name] = to_storage(chosen.astype(np.float32), dtype)
    q, k, v = tensors.values()
    run = attend(dtype, q, k, v, scale, causal)
    assert np.isfinite(run.out).all()
    assert np.isfinite(run.row_max).all()
    assert (run.row_sum >= 0.99).all()
    assert (run.row_sum <= 49.01).all()
    largest = np.abs(to_float(v, dtype)).max()
    assert (np.abs(run.out) <= largest * (1 + 2**-7)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_of_the_largest_values_is_the_largest(dtype) -> None:
    q, k, v = normal(dtype, (1, 1, 49, 32), 6)
    v[...] = to_storage(np.full(v.shape, LARGEST[dtype], np.float32), dtype)
    run = attend(dtype, q, k, v, 1.0, False)
    np.testing.assert_allclose(run.out, LARGEST[dtype], rtol=2 * LIMITS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_in_the_input_reaches_the_output(dtype, which) -> None:
    tensors = dict(zip("qkv", normal(dtype, (1, 2, 49, 32), 7), strict=True))
    tensors[which][0, 1, 20, 3] = to_storage(np.full(1, np.nan, np.float32), dtype)[0]
    run = attend(dtype, *tensors.values(), 0.2, True)
    hit = np.isnan(run.out)
    expected = {"q": hit[0, 1, 20], "k": hit[0, 1, 20:], "v": hit[0, 1, 20:, 3]}[which]
    assert expected.all()
    assert not hit[0, 0].any()  # the other head
    if which == "v":  # rows before the key's own weigh it with 0, which times NaN is NaN, but in that column only
        assert not np.delete(hit[0, 1], 3, axis=1).any()
    else:
        assert not hit[0, 1, :20].any()
    if which == "q":
        assert np.isnan(run.row_sum[0, 1, 20])
        assert not np.isnan(np.delete(run.row_sum[0, 1], 20)).any()


@pytest.mark.parametrize("heads_grid", [(5, 1), (2, 3), (1, 5), (3, 2), (4, 4)])
def test_heads_may_spill_into_the_third_grid_dimension(heads_grid) -> None:
    # As 70000 heads would, on a grid whose second dimension ends at 65535; programs past the last head do nothing.
    q, k, v = normal("fp16", (1, 5, 33, 32), 8)
    check("fp16", q, k, v, 0.2, True, heads_grid=heads_grid)


@pytest.mark.parametrize("causal", [True, False])
def test_a_grid_with_too_many_tiles_is_harmless(causal) -> None:
    q, k, v = normal("fp16", (1, 2, 33, 32), 8)
    check("fp16", q, k, v, 0.2, causal, extra_tiles=3)


def test_offsets_beyond_two_to_the_31_elements() -> None:
    # Head 1 begins 2**31 elements in. The arrays are that large in address space only: untouched pages cost no memory,
    # and a causal grid of one tile touches just the first rows of each head.
    seq, head_size, rows = 2**25, 64, BLOCK_M
    q, k, v = normal("fp16", (1, 2, rows, head_size), 9)

    def sparse(elements, storage):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which has no name before Python 3.13
        return np.frombuffer(mmap.mmap(-1, elements * np.dtype(storage).itemsize, flags=flags), storage)

    def far(x):
        array = sparse((seq + rows) * head_size, np.float16).reshape(-1, head_size)
        array[:rows], array[seq : seq + rows] = x[0]
        return array

    args = {"Out": far(np.zeros_like(q)), "Q": far(q), "K": far(k), "V": far(v)}
    args |= {name: sparse(seq + rows, np.float32) for name in "LM"}
    run_interpreted(
        kernel_path(),
        KERNEL,
        (1, 2, 1),
        {**args, "sm_scale": 0.2, "batch_size": 1, "num_heads": 2, "seq_len": seq},
        {"BLOCK_M": BLOCK_M, "BLOCK_DMODEL": head_size, "BLOCK_N": BLOCK_N, "CAUSAL": True},
    )
    near = attend("fp16", q, k, v, 0.2, True)
    for head, start in ((0, 0), (1, seq)):
        here = slice(start, start + rows)
        np.testing.assert_array_equal(args["Out"][here], near.out[0, head])
        np.testing.assert_array_equal(args["M"][here], near.row_max[0, head])
        np.testing.assert_array_equal(args["L"][here], near.row_sum[0, head])
