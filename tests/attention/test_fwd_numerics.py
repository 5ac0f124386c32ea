"""The production kernel, from its own source under Triton's interpreter, against float64: every feature, odd shapes."""

import mmap
from dataclasses import replace

import numpy as np
import pytest
from forward_runs import GUARD, LARGEST, LIMITS, Problem, check, expected, fill, launch, place
from helpers import examples, some_of
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng

from pyfmha.attention.reference import relative_error
from pyfmha.attention.run import to_float, to_storage
from pyfmha.interpreter.kernel import Tensor

DTYPES = tuple(LIMITS)
KINDS = (*((dtype, "tf32x3") for dtype in DTYPES), ("fp32", "fp16x3"))
"""dtype, and how fp32 is multiplied."""

lengths = st.sampled_from([0, 1, 2, 15, 16, 17, 31, 32, 33, 48, 49, 65, 70])
heads = st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2), (6, 2)])
bounds = st.sampled_from([-1, -1, 0, 1, 7, 16, 40, 2**31 - 1])
common = {
    "kind": st.sampled_from(KINDS),
    "heads": heads,
    "head_size": st.sampled_from([1, 3, 16, 32, 40, 72, 80, 96, 100]),
    "left": bounds,
    "right": bounds,
    "bottom_right": st.booleans(),
    "softcap": st.sampled_from([0.0, 0.0, 2.0, 50.0]),
    "with_lse": st.booleans(),
    "blocks": st.sampled_from([(16, 16), (16, 32), (32, 16), (32, 32)]),
    "seed": st.integers(0, 9),
}


def make(given_heads: tuple[int, int], kind: tuple[str, str], **options: object) -> Problem:
    return Problem(heads=given_heads[0], kv_heads=given_heads[1], dtype=kind[0], precision=kind[1], **options)


@examples(40)
@given(
    batch=st.integers(1, 2),
    q_len=lengths,
    kv_len=lengths,
    layout=st.sampled_from(["bhsd", "bshd", "packed"]),
    q_lengths=st.none() | st.tuples(st.integers(-2, 90), st.integers(0, 70)),
    kv_lengths=st.none() | st.tuples(st.integers(-2, 90), st.integers(0, 70)),
    **common,
)
def test_dense(batch, q_len, kv_len, layout, q_lengths, kv_lengths, heads, **options) -> None:
    check(
        make(
            heads, batch=batch, q_len=q_len, kv_len=kv_len, layout=layout,
            q_lengths=None if q_lengths is None else q_lengths[:batch],
            kv_lengths=None if kv_lengths is None else kv_lengths[:batch], **options,
        )
    )  # fmt: skip


ends = st.lists(st.integers(-3, 80), min_size=1, max_size=6)


@examples(25)
@given(
    q_len=lengths,
    kv_len=lengths,
    cu_q=ends,
    cu_kv=ends,
    layout=st.sampled_from(["bhsd", "bshd", "packed"]),
    ordered=st.booleans(),
    **common,
)
def test_ragged(cu_q, cu_kv, heads, ordered, **options) -> None:
    count = min(len(cu_q), len(cu_kv))
    cu_q, cu_kv = cu_q[:count], cu_kv[:count]
    if ordered:
        cu_q, cu_kv = sorted(cu_q), sorted(cu_kv)
    check(make(heads, cu_q=cu_q, cu_kv=cu_kv, **options))


@pytest.mark.parametrize(
    "problem",
    [
        Problem(q_len=1, kv_len=70, right=0, bottom_right=True, heads=8, kv_heads=2),  # decode
        Problem(q_len=50, kv_len=20, right=0),  # more queries than keys, both ways
        Problem(q_len=50, kv_len=20, right=0, bottom_right=True),
        Problem(q_len=20, kv_len=50, right=0),
        Problem(q_len=50, kv_len=20, left=0, right=0, bottom_right=True),
        Problem(q_len=50, kv_len=20, left=3),  # the last queries are past all keys
        Problem(left=0, right=0, q_len=40, kv_len=40),
        Problem(left=2**31 - 1, right=2**31 - 1, bottom_right=True),
        Problem(q_len=40, kv_len=0),
        Problem(q_len=0, kv_len=40),
        Problem(batch=0),
        Problem(head_size=256, q_len=18, kv_len=35, right=0),
        Problem(head_size=129, dtype="bf16"),
        Problem(head_size=250, dtype="fp32", softcap=5.0, softcap_mode="always"),
        Problem(head_size=250, dtype="fp32", softcap=5.0, softcap_mode="always", precision="fp16x3"),
        Problem(softcap_mode="never", left=9, right=2, dtype="fp32", q_len=65, kv_len=70),
        Problem(softcap_mode="always", softcap=1e-3, scale=3.0),
        Problem(softcap_mode="always", softcap=3e38, dtype="fp32"),
        Problem(scale=-0.4, softcap=1.5),
        Problem(scale=0.0, right=0),
        Problem(scale=-0.4, right=0),
        Problem(batch=2, extra_tiles=3, right=0),
        Problem(cu_q=[0, 33], cu_kv=[0, 33], extra_tiles=5, right=0),
        Problem(cu_q=[0, 9, 33], cu_kv=[0, 15, 33], segments=128),  # as compiled
        Problem(cu_q=[20], cu_kv=[20]),  # no sequence at all
        Problem(cu_q=[33, 0], cu_kv=[0, 33]),  # one that is empty, all rows before it
        Problem(cu_q=[0, 0, 0, 33, 33], cu_kv=[0, 9, 9, 9, 33]),  # queries without keys, keys without queries
        Problem(cu_q=[2**31 - 1, -(2**31)], cu_kv=[-(2**31), 2**31 - 1]),
    ],
    ids=str,
)
def test_chosen(problem: Problem) -> None:
    check(problem)


def test_many_sequences_take_several_looks() -> None:
    ends = np.cumsum(default_rng(0).integers(0, 3, 40)) + 2
    check(Problem(q_len=50, kv_len=50, cu_q=ends.tolist(), cu_kv=(ends // 2).tolist(), right=0, segments=16))


def test_offsets_and_lengths_are_those_of_the_sequence() -> None:
    # What a ragged batch gives is what each sequence gives alone.
    packed = Problem(
        q_len=60, kv_len=60, cu_q=[0, 25, 60], cu_kv=[0, 30, 60], right=0, bottom_right=True, layout="bshd"
    )
    made = place(packed)
    fill(packed, made)
    both = launch(packed, made)[0]
    for first, last, kv_first, kv_last in ((0, 25, 0, 30), (25, 60, 30, 60)):
        alone = replace(packed, cu_q=None, cu_kv=None, q_len=last - first, kv_len=kv_last - kv_first)
        own = place(alone)
        own.views["Q"][...] = made.views["Q"][:, :, first:last]
        for name in "KV":
            own.views[name][...] = made.views[name][:, :, kv_first:kv_last]
        np.testing.assert_array_equal(launch(alone, own)[0], both[:, :, first:last])


def test_keys_that_no_query_sees_are_not_read() -> None:
    # NaN there would show: in V, even with a weight of zero.
    problem = Problem(q_len=16, kv_len=70, left=4, right=3, bottom_right=True, dtype="fp32")
    made = place(problem)
    fill(problem, made)
    for name in "KV":
        made.views[name][:, :, : 70 - 16 - 4] = np.nan
    out, _ = launch(problem, made)
    clean = place(problem)
    fill(problem, clean)
    np.testing.assert_array_equal(out, launch(problem, clean)[0])


MASKS = {
    "causal": {"right": 0, "q_len": 40, "kv_len": 25, "bottom_right": True},
    "window": {"left": 5, "right": 5},
    "padding": {"kv_lengths": [20], "q_lengths": [30]},
    "ragged": {"cu_q": [2, 20, 33], "cu_kv": [0, 11, 30], "right": 0},
}


@pytest.mark.parametrize(("mask", "softcap", "dtype", "precision"), some_of(MASKS, [0.0, 30.0], KINDS))
def test_finite_input_never_gives_nan_or_infinity(mask, softcap, dtype, precision) -> None:
    problem = Problem(dtype, heads=2, head_size=40, softcap=softcap, scale=1.0, precision=precision, **MASKS[mask])
    made = place(problem)
    fill(problem, made)
    choices = [LARGEST[dtype], -LARGEST[dtype], LARGEST[dtype] / 2, 1.0, 0.0]
    for name in "QKV":
        view = made.views[name]
        values = to_storage(default_rng(ord(name)).choice(choices, view.shape).astype(np.float32), dtype)
        view[...] = np.where(np.isnan(to_float(view, dtype)), view, values)
    out, lse = launch(problem, made)
    assert np.isfinite(out).all()
    assert not np.isnan(lse).any()
    assert (np.abs(out) <= LARGEST[dtype]).all()
    empty = np.isneginf(expected(replace(problem, dtype=dtype), made)[1])
    assert (np.isneginf(lse) == empty).all()
    if softcap:  # the cap bounds the logarithm of the sum too
        assert (np.abs(lse[~empty]) <= softcap + np.log(70)).all()


@pytest.mark.parametrize(("dtype", "precision"), KINDS[1:])
def test_capped_scores_are_right_where_products_overflow(dtype, precision) -> None:
    # q . k is beyond float32, so its tanh is 1 or -1; a partial sum may overflow the other way than the whole.
    problem = Problem(dtype=dtype, precision=precision, q_len=16, kv_len=16, softcap=3.0, scale=1.0)
    made = place(problem)
    fill(problem, made)
    for name in "QK":
        signs = np.sign(default_rng(ord(name)).standard_normal(made.views[name].shape))
        made.views[name][...] = to_storage((signs * 2.0**120).astype(np.float32), dtype)
    out, lse = launch(problem, made)
    exact_out, exact_lse = expected(problem, made)
    assert relative_error(out, exact_out) <= LIMITS[dtype]
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "precision"), KINDS)
def test_large_scores_without_cap_take_the_safe_way(dtype, precision) -> None:
    # Scores near 1e7: the hot loop refuses them. Each query has one key far above the rest, and one query has none.
    problem = Problem(
        dtype=dtype, precision=precision, q_len=20, kv_len=19, head_size=24, right=0, bottom_right=True, scale=1e5
    )
    made = place(problem)
    fill(problem, made)
    out, lse = launch(problem, made)
    exact_out, exact_lse = expected(problem, made)
    assert (out[0, 0, 0] == 0).all()
    assert relative_error(out, exact_out) <= LIMITS[dtype]
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-5)


def test_heads_may_spill_into_the_third_grid_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    import forward_runs

    real = forward_runs.run_interpreted

    def other_grid(path, kernel, grid, *rest) -> None:
        assert grid[1:] == (6, 1)
        real(path, kernel, (grid[0], 4, 2), *rest)

    monkeypatch.setattr(forward_runs, "run_interpreted", other_grid)
    check(Problem(batch=2, heads=3, kv_heads=1))


@pytest.mark.parametrize("strides", [(2**40, 2**31, 32), (2**40, 32, 2**27)], ids=["heads", "rows"])
def test_offsets_beyond_two_to_the_31_elements(strides) -> None:
    # The arrays are that large in address space only: untouched pages cost no memory.
    problem = Problem(heads=2, kv_heads=2, q_len=17, kv_len=17)
    made = place(problem)
    fill(problem, made)
    near, _ = launch(problem, made)
    far = place(problem)
    for name in "QKV":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which has no name before Python 3.13
        store = np.frombuffer(mmap.mmap(-1, 2 * (2**31 + 1024), flags=flags), np.float16)
        steps = tuple(2 * step for step in strides)
        np.lib.stride_tricks.as_strided(store, (1, 2, 17, 32), (*steps, 2))[...] = made.views[name]
        far.pointers[name], far.strides[name] = Tensor(store, "fp16"), strides
    np.testing.assert_array_equal(launch(problem, far)[0], near)


def test_strides_may_be_negative() -> None:
    problem = Problem(heads=2, kv_heads=2, q_len=17, kv_len=17)
    made = place(problem)
    fill(problem, made)
    straight, _ = launch(problem, made)
    flipped = place(problem)
    for name in "QKV":
        flipped.views[name][...] = made.views[name][:, ::-1]
        flipped.strides[name] = (0, -17 * 32, 32)
        flipped.pointers[name] = replace(flipped.pointers[name], offset=GUARD + 17 * 32)
    np.testing.assert_array_equal(launch(problem, flipped)[0], straight)
