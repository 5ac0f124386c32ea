"""Decoding with bias, mask and sinks: both kernels under Triton's interpreter, against float64, and planted faults."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import biased_runs
import numpy as np
import pytest
from biased_runs import Placed, Problem, broadcast, check_guards, expected, judge, place
from forward_runs import GUARD, LARGEST, LIMITS, nan_buffer
from helpers import few_of
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import default_rng

from pyfmha.attention.biased import BiasedCall
from pyfmha.attention.biased_decode import (
    ARGUMENTS,
    COMBINE_KERNEL,
    KERNEL_FILE,
    POINTERS,
    SPLIT_KERNEL,
    BiasedDecode,
    biased_decode_family,
    biased_decoding_for,
)
from pyfmha.attention.decode import Decoding
from pyfmha.attention.families import library_specs
from pyfmha.attention.forward import kernel_path
from pyfmha.attention.run import to_float, to_storage
from pyfmha.interpreter.kernel import Null, Tensor, run_interpreted

FULL = (2, 2, 3, 40)
PAIR = Problem(batch=2, heads=2, kv_heads=1, q_len=3, kv_len=40, head_size=40, v_head_size=24)


def decode(problem: Problem, made: Placed, splits: int) -> tuple[Any, Any]:
    """Out as float64 and Lse of both launches, all guards checked."""
    p = problem
    call = BiasedCall(
        p.batch, p.heads, p.kv_heads, p.q_len, p.kv_len, p.head_size, p.sm_scale, p.softcap,
        *(made.steps[name][:3] for name in ("Q", "K", "V", "Out")), p.left, p.right, p.bottom_right, False,
        p.v_head_size, broadcast(p, made, "bias"), broadcast(p, made, "mask"),
        *(getattr(p, name)[2:] if getattr(p, name) else None for name in ("bias", "mask")),
    )  # fmt: skip
    pair = BiasedDecode(p.dtype, max(p.head_size, p.v_head_size))
    decoding = Decoding(call, pair.padded, splits)
    types = dict(ARGUMENTS)
    args: dict[str, Any] = {name: Null(types[name][1:].replace("T", p.dtype)) for name in POINTERS}
    lse = nan_buffer("fp32", p.batch * p.heads * p.q_len)
    workspace = {
        name: nan_buffer("fp32", getattr(decoding, f"{name.lower()}_bytes") // 4) for name in ("Partial", "Statistics")
    }
    args |= {name: made.pointers[name] for name in ("Out", "Q", "K", "V")}
    args |= {name: Tensor(array, "fp32", GUARD) for name, array in workspace.items()}
    if p.with_lse:
        args["Lse"] = Tensor(lse, "fp32", GUARD)
    for name, values in (("q_lengths", p.q_lengths), ("kv_lengths", p.kv_lengths)):
        if values is not None:
            args[name] = np.array(values, np.int32)
    for name in {"bias", "mask", "sinks"} & set(made.pointers):
        wide = name != "mask" and made.pointers[name].dtype != p.dtype
        args[name.capitalize() + "Fp32" * wide] = made.pointers[name]
    args |= dict(zip([name for name, _ in ARGUMENTS][len(POINTERS) :], decoding.scalars(), strict=True))
    integers = {name: value for name, value in args.items() if isinstance(value, int)}
    split, _, combine = pair.specs()
    for spec, kernel, smaller in ((split, SPLIT_KERNEL, {"BLOCK_N": 16}), (combine, COMBINE_KERNEL, {"SPLITS": 2})):
        grid = tuple(expression.evaluate(integers) for expression in spec.grid_expressions)
        path = biased_runs.kernel_path().with_name(KERNEL_FILE)
        run_interpreted(path, kernel, grid, args, dict(spec.constants) | smaller)
    check_guards(p, made, lse)
    for array in workspace.values():
        raw = array.view(np.uint8)
        assert (np.concatenate([raw[: 4 * GUARD], raw[-4 * GUARD :]]) == 0xFF).all(), "wrote outside the workspace"
    found = lse[GUARD:-GUARD].reshape(p.batch, p.heads, p.q_len).astype(np.float64)
    return to_float(made.values["Out"], p.dtype), found if p.with_lse else None


def check(problem: Problem, splits: int = 2, edit: Any = None) -> np.ndarray:
    made = place(problem, edit)
    return judge(problem, *decode(problem, made, splits), *expected(problem, made))


def broadcasts(given_axes: Any, *sizes: int) -> Any:
    return None if given_axes is None else tuple(n if own else 1 for own, n in zip(given_axes, sizes, strict=True))


axes = st.none() | st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans())


@settings(max_examples=4, deadline=None)
@given(
    dtype=st.sampled_from(list(LIMITS)),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 2)]),
    batch=st.integers(1, 2),
    q_len=st.sampled_from([1, 2, 5]),
    kv_len=st.sampled_from([1, 15, 17, 50]),
    splits=st.integers(1, 5),
    sizes=st.sampled_from([(64, 64), (1, 72), (40, 24)]),
    q_lengths=st.none() | st.tuples(st.integers(-2, 9), st.integers(0, 7)),
    kv_lengths=st.none() | st.tuples(st.integers(-2, 90), st.integers(0, 70)),
    bias=axes,
    mask=axes,
    options=st.fixed_dictionaries(
        {
            "left": st.sampled_from([-1, -1, 0, 7, 40]),
            "right": st.sampled_from([-1, 0, 7]),
            "bottom_right": st.booleans(),
            "softcap": st.sampled_from([0.0, 2.0]),
            "bias_dtype": st.sampled_from(["own", "fp32"]),
            "share": st.sampled_from([0.0, 0.1, 0.6, 1.0]),
            "gap": st.sampled_from([0, 3]),
            "sinks": st.sampled_from(["", "own", "fp32"]),
            "with_lse": st.booleans(),
            "layout": st.sampled_from(["bhsd", "bshd"]),
            "seed": st.integers(0, 9),
        }
    ),
)
def test_any_problem(
    dtype: str, heads: Any, batch: int, q_len: int, kv_len: int, splits: int, sizes: Any, q_lengths: Any,
    kv_lengths: Any, bias: Any, mask: Any, options: Any,
) -> None:  # fmt: skip
    shape = batch, heads[0], q_len, kv_len
    check(
        Problem(
            dtype=dtype, batch=batch, heads=heads[0], kv_heads=heads[1], q_len=q_len, kv_len=kv_len,
            head_size=sizes[0], v_head_size=sizes[1], q_lengths=q_lengths and q_lengths[:batch],
            kv_lengths=kv_lengths and kv_lengths[:batch], bias=broadcasts(bias, *shape), mask=broadcasts(mask, *shape),
            **options,
        ),
        splits,
    )  # fmt: skip


BOTH = [("fp16", "mask"), ("bf16", "bias"), ("fp32", "mask"), ("fp16", "bias"), ("bf16", "mask"), ("fp32", "bias")]


@pytest.mark.parametrize(("dtype", "by"), few_of(BOTH, lambda case: case in BOTH[:2]))
def test_what_is_masked_may_be_anything(dtype: str, by: str) -> None:
    problem = replace(PAIR, dtype=dtype, sinks="own", **{by: FULL})
    hidden = default_rng(0).random(FULL) < 0.4
    hidden[..., 3] = hidden[..., 30] = True
    hidden[1, 1] = True  # rows that see nothing

    def hide(values: Any) -> None:
        infinity = to_storage(np.float32([-np.inf]), dtype)
        values[by][...] = ~hidden if by == "mask" else np.where(hidden, infinity, values[by])
        for name, poison in (("K", np.nan), ("V", np.inf), ("V", np.nan)):
            values[name][:, :, 30 if poison == np.inf else 3] = to_storage(np.float32([poison]), dtype)

    made = place(problem, hide)
    out, lse = decode(problem, made, 4)
    clean = place(problem, hide)
    for name in "KV":
        clean.values[name][:, :, [3, 30]] = 0
    judge(problem, out, lse, *expected(problem, clean))
    assert (out[1, 1] == 0).all()
    np.testing.assert_allclose(lse[1, 1], to_float(made.values["sinks"], dtype)[1], atol=4e-6)


def test_nan_that_a_row_sees_reaches_it_alone() -> None:
    problem = replace(PAIR, mask=FULL)

    def edit(values: Any) -> None:
        values["mask"][...] = 1
        values["mask"][:, :, 1:, 7] = 0
        values["V"][0, :, 7, 0] = to_storage(np.float32([np.nan]), "fp16")

    out, _ = decode(problem, place(problem, edit), 3)
    assert np.isnan(out[0, :, 0, 0]).all()
    assert np.isfinite(out[0, :, 1:]).all()
    assert np.isfinite(out[1]).all()


@pytest.mark.parametrize("dtype", few_of(LIMITS, lambda dtype: dtype == "bf16"))
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_finite_input_never_gives_nan_or_infinity(dtype: str, softcap: float) -> None:
    beside = {"bias": FULL, "bias_dtype": "fp32", "mask": FULL, "sinks": "fp32"}
    problem = replace(PAIR, dtype=dtype, softcap=softcap, scale=1.0, **beside)

    def edit(values: Any) -> None:
        for name, kind in (("Q", dtype), ("K", dtype), ("V", dtype), ("bias", "fp32"), ("sinks", "fp32")):
            choices = [LARGEST[kind], -LARGEST[kind], LARGEST[kind] / 2, 1.0, 0.0]
            drawn = default_rng(ord(name[0])).choice(choices, values[name].shape).astype(np.float32)
            values[name][...] = to_storage(drawn, kind)

    out, lse = decode(problem, place(problem, edit), 4)
    assert np.isfinite(out).all()
    assert not np.isnan(lse).any()


@pytest.mark.parametrize("beside", ["bias", "mask"])
def test_nothing_is_read_past_the_end(beside: str) -> None:
    check(replace(PAIR, **{beside: (2, 2, 2, 21)}))
    check(replace(PAIR, **{beside: (2, 1, 1, 21)}))


FAULTS = {
    "the bias twice": ("score = _bounded(score) + bias", "score = _bounded(score) + 2 * bias", "bias"),
    "the mask the other way round": ("in_mask, 0) != 0)", "in_mask, 0) == 0)", "mask"),
    "the bias of the first head": ("wide_head * bias_stride_h", "0 * bias_stride_h", "bias"),
    "a sink in each part": ("SPLITS):\n        split =", "SPLITS):\n        row_sum += 1.0\n        split =", "sinks"),
    "sinks without the shift": ("tl.exp2(sink - top)", "tl.exp2(sink + shift - top)", "sinks"),
    "sinks of queries that are not there": ("where(counts, _load", "where(counts | True, _load", "sinks"),
    "rows past the end": ("_count_of(Bias, BiasFp32, bias_stride_q, bias_rows)", "q_len", "short"),
    "keys past the end": ("_count_of(Bias, BiasFp32, bias_stride_k, bias_columns)", "kv_len", "short"),
    "values of Q's head size": ("v_head_size)[None, :], other", "head_size)[None, :], other", "mask"),
}  # fmt: skip
PROBLEMS = {
    "bias": replace(PAIR, bias=FULL),
    "mask": replace(PAIR, mask=FULL, head_size=24, v_head_size=40),
    "sinks": replace(PAIR, sinks="own", dtype="bf16", q_lengths=(3, 1), kv_lengths=(40, 0)),
    "short": replace(PAIR, bias=(2, 2, 2, 21)),
}


QUICK = ("sinks without the shift", "keys past the end")


@pytest.mark.parametrize("name", few_of(FAULTS, lambda name: name in QUICK))
def test_a_planted_fault_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, problem = FAULTS[name]
    check(PROBLEMS[problem])
    for source in kernel_path().parent.glob("*.py"):
        shutil.copy(source, tmp_path)
    file = tmp_path / KERNEL_FILE
    assert right in file.read_text()
    file.write_text(file.read_text().replace(right, wrong))
    monkeypatch.setattr(biased_runs, "kernel_path", lambda: tmp_path / "fmha_fwd.py")
    with pytest.raises(AssertionError):
        check(PROBLEMS[problem])


def test_they_come_with_the_family_and_run_where_decoding_does() -> None:
    names = {spec.name for spec in library_specs(["biased"], ["fp16"], [100])}
    assert names == {"fmha_biased_d128_fp16", "fmha_biased_split_d128_fp16", "fmha_biased_combine_d128_fp16"}
    assert len(biased_decode_family()) == 9

    def call(q_len: int, keys: int, **options: Any) -> BiasedCall:
        return BiasedCall(2, 8, 2, q_len, keys, 64, 0.125, **options)

    assert biased_decoding_for(call(1, 511)) is None
    assert biased_decoding_for(call(17, 1100)) is None
    found = biased_decoding_for(call(16, 1100, v_head_size=128))
    assert found is not None
    assert (found.padded, found.splits) == (128, 9)


@pytest.mark.parametrize(
    ("batch", "key_heads", "keys", "pair"),
    [
        (1, 32, 4096, 34.9),
        (1, 8, 4096, 17.0),
        (1, 8, 32768, 60.3),
        (4, 32, 4096, None),
        (16, 32, 4096, None),
        (16, 8, 4096, None),
        (64, 8, 4096, None),
        (16, 8, 32768, None),
    ],
)
def test_the_pair_runs_where_it_was_the_faster_one(batch: int, key_heads: int, keys: int, pair: float | None) -> None:
    """Of 32 heads of 64 on an H200; us of the pair, where it was."""
    found = biased_decoding_for(BiasedCall(batch, 32, key_heads, 1, keys, 64, 0.125))
    assert (found is not None) == (pair is not None)
