"""The kernel with biases and masks, from its own source under Triton's interpreter, against float64."""

from dataclasses import replace

import numpy as np
import pytest
from biased_runs import Problem, check, expected, judge, launch, place
from forward_runs import LARGEST, LIMITS
from helpers import examples, some_of
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng

from pyfmha.attention.run import to_storage

lengths = st.sampled_from([1, 2, 15, 16, 17, 31, 33, 48, 65])
bounds = st.sampled_from([-1, -1, -1, 0, 1, 7, 40])
axes = st.none() | st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans())
common = {
    "dtype": st.sampled_from(list(LIMITS)),
    "head_size": st.sampled_from([1, 16, 40, 72]),
    "v_head_size": st.sampled_from([1, 8, 40, 72]),
    "left": bounds,
    "right": bounds,
    "bottom_right": st.booleans(),
    "softcap": st.sampled_from([0.0, 0.0, 2.0]),
    "bias_dtype": st.sampled_from(["own", "fp32"]),
    "share": st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    "gap": st.sampled_from([0, 0, 3]),
    "sinks": st.sampled_from(["", "own", "fp32"]),
    "with_lse": st.booleans(),
    "blocks": st.sampled_from([(16, 16), (16, 32), (32, 16)]),
    "seed": st.integers(0, 9),
}
heads = st.sampled_from([(1, 1), (3, 3), (4, 2), (6, 2)])


def broadcast(given_axes, *sizes):
    return None if given_axes is None else tuple(n if own else 1 for own, n in zip(given_axes, sizes, strict=True))


@examples(16)
@given(
    batch=st.integers(1, 2),
    q_len=lengths,
    kv_len=lengths,
    heads=heads,
    layout=st.sampled_from(["bhsd", "bshd"]),
    q_lengths=st.none() | st.tuples(st.integers(-2, 90), st.integers(0, 70)),
    kv_lengths=st.none() | st.tuples(st.integers(-2, 90), st.integers(0, 70)),
    bias=axes,
    mask=axes,
    **common,
)
def test_dense(batch, q_len, kv_len, heads, q_lengths, kv_lengths, bias, mask, **options) -> None:
    sizes = batch, heads[0], q_len, kv_len
    check(
        Problem(
            batch=batch, q_len=q_len, kv_len=kv_len, heads=heads[0], kv_heads=heads[1],
            q_lengths=q_lengths and q_lengths[:batch], kv_lengths=kv_lengths and kv_lengths[:batch],
            bias=broadcast(bias, *sizes), mask=broadcast(mask, *sizes), **options,
        )
    )  # fmt: skip


@examples(8)
@given(
    q_len=lengths,
    kv_len=lengths,
    cu_q=st.lists(st.integers(-3, 80), min_size=2, max_size=5),
    cu_kv=st.lists(st.integers(-3, 80), min_size=2, max_size=5),
    heads=heads,
    bias=axes,
    mask=axes,
    **common,
)
def test_ragged(q_len, kv_len, cu_q, cu_kv, heads, bias, mask, **options) -> None:
    count = min(len(cu_q), len(cu_kv))
    sizes = count - 1, heads[0], q_len, kv_len
    check(
        Problem(
            q_len=q_len, kv_len=kv_len, cu_q=sorted(cu_q[:count]), cu_kv=cu_kv[:count], heads=heads[0],
            kv_heads=heads[1], bias=broadcast(bias, *sizes), mask=broadcast(mask, *sizes), **options,
        )
    )  # fmt: skip


FULL = (1, 2, 33, 65)
PAIR = Problem(heads=2, kv_heads=2, q_len=33, kv_len=65)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(
    ("known", "options"),
    [
        (("never", "own", "never"), {"bias": FULL}),
        (("never", "own", "never"), {"bias": (1, 1, 1, 65), "right": 0}),
        (("never", "never", "always"), {"mask": FULL}),
        (("never", "never", "always"), {"mask": (1, 1, 1, 65), "left": 9, "right": 20}),
        (("never", "never", "never"), {"sinks": "own", "right": 0, "bottom_right": True, "v_head_size": 16}),
    ],
    ids=["bias", "bias of keys, causal", "mask", "mask of keys, window", "sinks"],
)
def test_what_variants_promise(dtype, known, options) -> None:
    check(replace(PAIR, dtype=dtype, known=known, blocks=(32, 16), **options))


SHORT = {
    "ragged": {"cu_q": [3, 20, 40], "cu_kv": [0, 30, 50], "q_len": 40, "kv_len": 50},
    "ragged, window": {"cu_q": [0, 33], "cu_kv": [0, 65], "left": 20, "right": 0, "bottom_right": True},
    "dense": {},
}


@pytest.mark.parametrize("known", [("any", "any", "any"), ("never", "own", "never"), ("never", "never", "always")])
@pytest.mark.parametrize("problem", SHORT)
def test_nothing_is_read_past_the_end_of_a_bias_or_mask(problem, known) -> None:
    """Whose lengths only the device knows. Past the end lie the next row or head, and then NaN, or bytes that show."""
    batch = len(SHORT[problem].get("cu_q", [0, 1])) - 1
    shape = (batch, 2, 13, 21)
    beside = {
        **({"bias": shape, "bias_dtype": "fp32" if known[1] == "any" else "own"} if known[1] != "never" else {}),
        **({"mask": shape} if known[2] != "never" else {}),
    }
    check(replace(PAIR, dtype="fp16", known=known, **SHORT[problem], **beside))
    check(replace(PAIR, known=known, **SHORT[problem], **{name: (1, 1, 1, 17) for name in beside if name[-1] != "e"}))


def test_one_row_sees_what_the_definition_says() -> None:
    """By hand: two keys seen of three, equal scores but for a bias of log 3, a sink of log 4."""
    problem = Problem(q_len=1, kv_len=3, head_size=1, v_head_size=2, bias=(1, 1, 1, 3), mask=(1, 1, 1, 3), sinks="fp32",
                      dtype="fp32", bias_dtype="fp32")  # fmt: skip

    def edit(values) -> None:
        values["Q"][...] = 0
        values["V"][0, 0] = [[8.0, 0.0], [0.0, 16.0], [1e30, 1e30]]
        values["bias"][0, 0, 0] = [np.log(3.0), 0.0, 50.0]
        values["mask"][0, 0, 0] = [1, 1, 0]
        values["sinks"][0] = np.log(4.0)

    made = place(problem, edit)
    out, lse = launch(problem, made)

    np.testing.assert_allclose(out[0, 0, 0], [3.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(lse[0, 0, 0], np.log(8.0), rtol=1e-6)


@pytest.mark.parametrize(("dtype", "poison", "by"), some_of(LIMITS, [np.nan, np.inf, -np.inf], ["mask", "bias"]))
def test_what_is_masked_may_be_anything(dtype, poison, by) -> None:
    """NaN and infinity in K, V, and the bias where a row does not see them change nothing: each row sees other keys."""
    problem = replace(PAIR, dtype=dtype, blocks=(16, 16), **{by: FULL, "share": 0.5})
    if by == "mask":
        problem = replace(problem, bias=FULL)
    hidden = default_rng(0).random(FULL) < 0.4
    hidden[..., 3] = True
    hidden[:, :, :16, 20:40] = True  # a block that no query of a tile sees

    def hide(values, clean: bool) -> None:
        if by == "mask":
            values["mask"][...] = ~hidden
            values["bias"][...] = np.where(
                hidden & (not clean), to_storage(np.float32([poison]), dtype), values["bias"]
            )
        else:
            values["bias"][...] = np.where(hidden, to_storage(np.float32([-np.inf]), dtype), values["bias"])
        if not clean:
            for name in "KV":
                values[name][:, :, 3] = to_storage(np.float32([poison]), dtype)

    poisoned = place(problem, lambda values: hide(values, False))
    out, lse = launch(problem, poisoned)
    judge(problem, out, lse, *expected(problem, place(problem, lambda values: hide(values, True))))


def test_nan_that_a_row_sees_reaches_it_alone() -> None:
    problem = replace(PAIR, mask=FULL)

    def edit(values) -> None:
        values["mask"][...] = 1
        values["mask"][0, :, 5:, 7] = 0
        values["V"][0, :, 7, 0] = to_storage(np.float32([np.nan]), "fp16")

    out, _ = launch(problem, place(problem, edit))

    assert np.isnan(out[0, :, :5, 0]).all()
    assert np.isfinite(out[0, :, 5:]).all()


@pytest.mark.parametrize(("dtype", "least"), some_of(LIMITS, ["finfo.min", "-1e4", "-inf"]))
def test_masks_by_large_negative_biases(dtype, least) -> None:
    """As models write them. A row of the least finite numbers sees all its keys alike, one of -inf none."""
    problem = replace(PAIR, dtype=dtype, bias=(1, 1, 33, 65), bias_dtype="own", sinks="")
    value = {"finfo.min": -LARGEST[dtype], "-1e4": -1e4, "-inf": -np.inf}[least]

    def edit(values) -> None:
        hidden = default_rng(1).random((33, 65)) < 0.5
        hidden[4] = True
        values["bias"][0, 0] = to_storage(np.where(hidden, value, 0).astype(np.float32), dtype)

    made = place(problem, edit)
    out, lse = launch(problem, made)
    exact_out, exact_lse = expected(problem, made)

    rest = [i for i in range(33) if i != 4]
    judge(problem, out[:, :, rest], lse[:, :, rest], exact_out[:, :, rest], exact_lse[:, :, rest])
    # float32 knows a score of -1e4 to 2**-11 of 1 and one of -65504 to 2**-9, and weights are off as much.
    np.testing.assert_allclose(out[:, :, 4], exact_out[:, :, 4], atol=0.004)
    assert (np.abs(out[0, :, 4]).max() == 0) == (least == "-inf")
    assert np.isneginf(lse[0, :, 4]).all() == (least == "-inf")


@pytest.mark.parametrize(
    ("sink", "dtype", "mask"), some_of([-np.inf, -1e30, 0.0, 5.0, 1e30], LIMITS, [None, ((1, 1, 33, 65),)])
)
def test_sinks_of_any_size(dtype, sink, mask) -> None:
    problem = replace(PAIR, dtype=dtype, sinks="fp32", mask=mask, right=0, bottom_right=True)

    def edit(values) -> None:
        values["sinks"][...] = sink
        if mask:
            values["mask"][0, 0, 11] = 0

    made = place(problem, edit)
    out, lse = launch(problem, made)
    exact_out, exact_lse = expected(problem, made)

    assert np.isfinite(out).all()
    if sink < 100:
        judge(problem, out, lse, exact_out, exact_lse)
    else:
        assert (out == 0).all()
        np.testing.assert_allclose(lse, exact_lse, rtol=1e-6)
    if mask:
        assert (lse[0, :, 11] == (sink if np.isneginf(sink) else lse[0, :, 11])).all()
        assert (out[0, :, 11] == 0).all()


def test_rows_of_no_sequence_have_no_sink() -> None:
    problem = Problem(q_len=40, kv_len=40, cu_q=[3, 20, 31], cu_kv=[0, 0, 40], sinks="own", heads=2, kv_heads=1)
    made = place(problem)
    out, lse = launch(problem, made)

    judge(problem, out, lse, *expected(problem, made))
    assert np.isneginf(lse[0, :, :3]).all()
    assert np.isneginf(lse[0, :, 31:]).all()
    sinks = made.values["sinks"].astype(np.float64)
    np.testing.assert_allclose(lse[0, :, 3:20], np.broadcast_to(sinks[:, None], (2, 17)), rtol=1e-6)


@pytest.mark.parametrize(("dtype", "softcap", "bias"), some_of(LIMITS, [0.0, 30.0], [None, (FULL,)]))
def test_finite_input_never_gives_nan_or_infinity(dtype, softcap, bias) -> None:
    problem = replace(PAIR, dtype=dtype, softcap=softcap, scale=1.0, bias=bias, bias_dtype="fp32", mask=FULL)

    def edit(values) -> None:
        for name, kind in (("Q", dtype), ("K", dtype), ("V", dtype), ("bias", "fp32")):
            if name in values:
                choices = [LARGEST[kind], -LARGEST[kind], LARGEST[kind] / 2, 1.0, 0.0]
                drawn = default_rng(ord(name[0])).choice(choices, values[name].shape).astype(np.float32)
                values[name][...] = to_storage(drawn, kind)

    made = place(problem, edit)
    out, lse = launch(problem, made)

    assert np.isfinite(out).all()
    assert not np.isnan(lse).any()
    empty = ~(made.values["mask"] != 0).any(axis=-1)
    assert (np.isneginf(lse) == empty).all()


@pytest.mark.parametrize(("dtype", "scale"), some_of(LIMITS, [0.0, -0.4, 1e30, -3e38, 1e-38]))
def test_scales_of_any_size(dtype, scale) -> None:
    problem = replace(PAIR, dtype=dtype, scale=scale, mask=FULL, right=0, bottom_right=True)
    made = place(problem)
    out, lse = launch(problem, made)
    if abs(scale) < 1:
        judge(problem, out, lse, *expected(problem, made))
    else:
        assert np.isfinite(out).all()
        seen = (made.values["mask"] != 0) & (np.arange(65) <= np.arange(33)[:, None] + 32)
        assert (np.isneginf(lse) == ~seen.any(axis=-1)).all()


def test_bias_strides_may_be_any() -> None:
    """Transposed in memory, and running backwards."""
    problem = replace(PAIR, bias=(1, 2, 33, 65))
    made = place(problem)
    straight, _ = launch(problem, made)
    other = place(problem)
    turned = np.full(2 * 33 * 65 + 200, np.nan, np.float16)
    view = turned[100 : 100 + 2 * 33 * 65].reshape(2, 65, 33)
    view[...] = made.values["bias"][0].transpose(0, 2, 1)[:, ::-1]
    other.pointers["bias"] = replace(other.pointers["bias"], array=turned, offset=100 + 64 * 33)
    other.steps["bias"] = (0, 33 * 65, 1, -33)

    np.testing.assert_array_equal(launch(problem, other)[0], straight)
