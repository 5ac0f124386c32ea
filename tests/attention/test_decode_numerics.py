"""Both kernels of decoding, one after the other under Triton's interpreter, against float64."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import pytest
from forward_runs import (
    GUARD,
    LARGEST,
    LIMITS,
    Problem,
    Tensors,
    check_guards,
    check_values,
    expected,
    fill,
    nan_buffer,
    place,
)
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st

from pyfmha.attention.decode import (
    ARGUMENTS,
    COMBINE_KERNEL,
    KERNEL_FILE,
    SPLIT_KERNEL,
    Decode,
    Decoding,
    decoding_for,
    most_workspace_bytes,
)
from pyfmha.attention.forward import Call, kernel_path
from pyfmha.attention.reference import relative_error
from pyfmha.attention.run import to_float
from pyfmha.errors import SpecError
from pyfmha.interpreter.kernel import Null, Tensor, run_interpreted


@contextmanager
def dependent_launch(wait: str) -> Iterator[list[int]]:
    """The two instructions of programmatic dependent launch, which the interpreter lacks, and a memory that must not be
    touched before `wait`; yields how many programs have called it."""
    cuda = pytest.importorskip("triton.language").extra.cuda
    builder = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder
    load, store, start = builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx
    open_for, waits = [wait != "gdc_wait"], [0]

    def called() -> None:
        waits[0] += 1
        open_for[0] = True

    def starting(self: Any, *index: int) -> None:
        open_for[0] = wait != "gdc_wait"
        start(self, *index)

    def loading(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        assert open_for[0] or not mask.data.any(), "read before the wait"
        return load(self, pointers, mask, *rest)

    def storing(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        assert open_for[0] or not mask.data.any(), "written before the wait"
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(cuda, wait, called),
        mock.patch.multiple(builder, create_masked_load=loading, create_masked_store=storing, set_grid_idx=starting),
    ):
        yield waits


def decode(problem: Problem, splits: int, factor: float = 1.0, pdl: bool = False) -> tuple[Any, Any, Tensors]:
    """Out and Lse of both launches, and what was attended to; all guards checked."""
    p = problem
    made = place(p)
    fill(p, made, factor)
    call = Call(
        p.batch, p.heads, p.kv_heads, p.q_len, p.kv_len, p.head_size, p.sm_scale, p.softcap, made.strides["Q"],
        made.strides["K"], made.strides["V"], made.strides["Out"], p.left, p.right, p.bottom_right,
    )  # fmt: skip
    padded = Decode(p.dtype, p.head_size).padded
    decoding = Decoding(call, padded, splits)
    lse = nan_buffer("fp32", p.batch * p.heads * p.q_len)
    workspace = {name: nan_buffer("fp32", getattr(decoding, f"{name.lower()}_bytes") // 4) for name in WORKSPACE}
    args: dict[str, Any] = {
        **made.pointers,
        **{name: Tensor(array, "fp32", GUARD) for name, array in workspace.items()},
        "Lse": Tensor(lse, "fp32", GUARD) if p.with_lse else Null("fp32"),
    }
    for name, values in (("q_lengths", p.q_lengths), ("kv_lengths", p.kv_lengths)):
        args[name] = Null("i32") if values is None else np.array(values, np.int32)
    args |= dict(zip([name for name, _ in ARGUMENTS][9:], decoding.scalars(), strict=True))
    integers = {name: value for name, value in args.items() if isinstance(value, int)}
    *_, split, _, combine = Decode(p.dtype, p.head_size).specs()
    for spec, kernel, smaller, word in (
        (split, SPLIT_KERNEL, {"BLOCK_N": 16}, "gdc_launch_dependents"),
        (combine, COMBINE_KERNEL, {"SPLITS": 2}, "gdc_wait"),
    )[: len(Decode(p.dtype, p.head_size).names(splits))]:
        grid = tuple(expression.evaluate(integers) for expression in spec.grid_expressions)
        path = kernel_path().with_name(KERNEL_FILE)
        with dependent_launch(word) if pdl else nullcontext([int(np.prod(grid))]) as said:
            run_interpreted(path, kernel, grid, args, dict(spec.constants) | smaller | {"PDL": pdl})
        assert said == [np.prod(grid)], "every program says it, once"
    check_guards(p, made, lse)
    for array in workspace.values():
        assert (array.view(np.uint8)[: 4 * GUARD] == 0xFF).all(), "wrote before the workspace"
        assert (array.view(np.uint8)[-4 * GUARD :] == 0xFF).all(), "wrote past the workspace"
    shape = (p.batch, p.heads, p.q_len)
    return to_float(made.views["Out"], p.dtype), lse[GUARD:-GUARD].reshape(shape), made


WORKSPACE = ("Partial", "Statistics")


def check(problem: Problem, splits: int, factor: float = 1.0) -> None:
    out, lse, made = decode(problem, splits, factor)
    check_values(problem, made, out, lse if problem.with_lse else None)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("splits", [1, 3, 7])
def test_one_query_of_grouped_heads(dtype: str, splits: int) -> None:
    check(Problem(dtype, 1, 8, 2, 1, 70, 64, right=0, bottom_right=True), splits)


@pytest.mark.parametrize("dtype", LIMITS)
def test_launched_early_it_touches_nothing_before_the_wait(dtype: str) -> None:
    problem = Problem(dtype, 2, 4, 2, 3, 70, 40, q_lengths=(2, 3))

    out, lse, made = decode(problem, 5, pdl=True)

    check_values(problem, made, out, lse)
    usual_out, usual_lse, _ = decode(problem, 5)
    assert (out == usual_out).all()
    assert (lse == usual_lse).all()


@examples(15)
@given(
    dtype=st.sampled_from(list(LIMITS)),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 2), (3, 3)]),
    batch=st.integers(1, 2),
    q_len=st.sampled_from([1, 2, 5, 17]),
    kv_len=st.sampled_from([1, 15, 16, 17, 50, 70]),
    splits=st.integers(1, 5),
    head_size=st.sampled_from([1, 40, 64, 72]),
    layout=st.sampled_from(["bhsd", "bshd"]),
    q_lengths=st.none() | st.tuples(st.integers(-2, 20), st.integers(0, 20)),
    kv_lengths=st.none() | st.tuples(st.integers(-2, 90), st.integers(0, 70)),
    left=st.sampled_from([-1, 0, 7, 2**31 - 1]),
    right=st.sampled_from([-1, 0, 3]),
    bottom_right=st.booleans(),
    softcap=st.sampled_from([0.0, 2.0, 50.0]),
    with_lse=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_problem(batch, heads, q_lengths, kv_lengths, splits, **options) -> None:
    lengths = {"q_lengths": q_lengths and q_lengths[:batch], "kv_lengths": kv_lengths and kv_lengths[:batch]}
    check(Problem(batch=batch, heads=heads[0], kv_heads=heads[1], **lengths, **options), splits)


@pytest.mark.parametrize("dtype", LIMITS)
def test_the_largest_inputs_stay_finite(dtype: str) -> None:
    problem = Problem(dtype, 1, 4, 2, 1, 60, 64, seed=1)

    out, lse, made = decode(problem, 3, LARGEST[dtype] / 8)
    exact_out, _ = expected(problem, made)

    assert np.isfinite(out).all()
    assert not np.isnan(lse).any()
    assert relative_error(out / LARGEST[dtype], exact_out / LARGEST[dtype]) <= LIMITS[dtype]


def test_no_keys_give_zeros() -> None:
    check(Problem(batch=2, heads=2, kv_heads=1, q_len=3, kv_len=20, kv_lengths=(0, 20), head_size=40), 2)


@pytest.mark.parametrize(
    ("q_len", "kv_len", "batch", "splits"),
    [
        (1, 4096, 1, 32),  # 8 key heads: as many splits as there are pieces of 128 keys
        (1, 32768, 1, 33),  # 264 programs
        (1, 32768, 16, 2),
        (1, 32768, 400, 1),
        (16, 4096, 1, 8),
    ],
)
def test_splits_fill_the_device(q_len: int, kv_len: int, batch: int, splits: int) -> None:
    decoding = decoding_for(Call(batch, 32, 8, q_len, kv_len, 128, 0.1))

    assert decoding is not None
    assert decoding.splits == splits


@pytest.mark.parametrize(
    "call",
    [
        Call(1, 32, 8, 17, 4096, 128, 0.1),
        Call(1, 32, 8, 1, 511, 128, 0.1),
        Call(1, 32, 8, 0, 4096, 128, 0.1),
        Call(0, 32, 8, 1, 4096, 128, 0.1),
        Call(1, 32, 8, 1, 4096, 128, 0.1, ragged=True),
    ],
    ids=["many queries", "few keys", "no queries", "no batch", "ragged"],
)
def test_what_is_not_split(call: Call) -> None:
    assert decoding_for(call) is None


def test_functions_are_those_of_the_next_padded_size() -> None:
    assert Decode("bf16", 72).split_name == "fmha_split_d128_bf16"
    assert Decode("fp16", 1).combine_name == "fmha_combine_d64_fp16"
    with pytest.raises(SpecError, match="257"):
        Decode("fp16", 257)


@given(
    heads=st.sampled_from([(32, 8), (8, 8), (64, 1), (6, 2), (1, 1)]),
    batch=st.integers(1, 300),
    q_len=st.integers(1, 64),
    kv_len=st.integers(512, 40000),
    head_size=st.integers(1, 256),
)
def test_the_workspace_of_the_largest_sizes_suffices_for_smaller_ones(heads, batch, q_len, kv_len, head_size) -> None:
    decoding = decoding_for(Call(batch, *heads, q_len, kv_len, head_size, 0.1))

    if decoding is not None:
        needed = -(-decoding.partial_bytes // 16) * 16 + decoding.statistics_bytes
        for more in (0, 100):
            assert needed <= most_workspace_bytes(batch + more, heads[0], q_len + more, head_size)
