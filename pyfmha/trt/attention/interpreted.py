"""Attention on the CPU: the kernels' source under Triton's interpreter, on numpy arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyfmha.attention.families import library_specs
from pyfmha.attention.function_operator import UserFunction, function_operator
from pyfmha.errors import PluginError
from pyfmha.functions import AttentionFunction
from pyfmha.functions.evaluate import named_inputs
from pyfmha.functions.family import Declared, WithFunction
from pyfmha.interpreter.operators import TYPE_OF, run_instance
from pyfmha.operators.description import DATA_TYPES, TYPE_NAMES
from pyfmha.spec.kernel import KernelSpec
from pyfmha.trt.attention.beside import beside_of
from pyfmha.trt.attention.causal import says_causal
from pyfmha.trt.attention.functions import Asked, FunctionInputs, extension_of, split_mask
from pyfmha.trt.attention.problem import INPUTS, Problem
from pyfmha.trt.attention.requested import lengths_of, problem_of
from pyfmha.trt.attention.words import Align, Causal, Layout

Array = NDArray[Any]
Inputs = Sequence[Array | float] | Mapping[str, Array | float]
"""What a function takes of its own."""


class _Kind(int):
    """``int(trt.DataType)``, which messages call by its name."""

    def __str__(self) -> str:
        return next(TYPE_NAMES[name] for name, number in DATA_TYPES.items() if number == self)


class _Described(NamedTuple):
    """What a network would know of an array."""

    shape: tuple[int, ...]
    dtype: int


@says_causal("interpret_attention", PluginError)
def interpret_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: Causal,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    align: Align | None = None,
    softcap: float = 0.0,
    layout: Layout | None = None,
    q_lengths: Array | None = None,
    kv_lengths: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_kv: Array | None = None,
    bias: Array | None = None,
    mask: Array | AttentionFunction | tuple[Array, AttentionFunction] | None = None,
    sinks: Array | None = None,
    score: AttentionFunction | None = None,
    score_inputs: Inputs = (),
    mask_inputs: Inputs = (),
    return_lse: bool = False,
) -> Any:
    """softmax(scale * Q K^T) V by the portable production kernels, under Triton's interpreter. Slow: for small sizes.

    Needs Triton; neither a GPU nor TensorRT nor a library.

    Args:
        q, k, v: float16, float32, or bfloat16 as uint16; shapes as :func:`pyfmha.add_attention`.
        causal, scale, window, align, softcap, layout: as there.
        q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv: int32, as there.
        bias, mask, sinks: of Q's type or float32, bool, of Q's type or float32, as there.
        score: a function of :func:`pyfmha.score_function` or :func:`pyfmha.score_and_mask`, of a file; ``mask`` may be
            one of :func:`pyfmha.mask_function`, as there, without a library. One of them.
        score_inputs, mask_inputs: what it takes of its own, in its order or by name: numpy arrays and numbers, without
            those that shapes tell, as there, or with them.
        return_lse: whether to return Lse, too.

    Returns:
        Out, of Q's type; with ``return_lse`` a pair of Out and Lse, float32.

    Raises:
        PluginError: the arrays do not fit.
        SpecError: the function's inputs do not.
        InterpreterError, KernelSourceError: Triton is missing, or the function failed.
    """
    arrays = dict(zip(INPUTS, (q, k, v), strict=True))
    seen, function = split_mask(mask)
    lengths, beside = lengths_of(q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv), beside_of(bias, seen, sinks)
    values: Any = score_inputs, mask_inputs
    asked = Asked(score, function, *values)
    declared, user, own = _declared(asked)
    if declared is not None and not beside:
        beside = {"mask": np.ones((1, 1, 1, 1), np.bool_)}  # functions are in the kernels that take one
    problem = problem_of(
        *({name: _described(name, array) for name, array in group.items()} for group in (arrays, lengths, beside, {})),
        causal=causal, scale=scale, window=window, align=align, softcap=softcap, layout=layout, return_lse=return_lse,
    )  # fmt: skip
    tensors, more = {**arrays, **lengths, **beside}, {}
    if user is not None and not user.unserved():
        problem, own_tensors = _extended(problem, user, own)
        tensors |= own_tensors
    elif own:
        more = {"inputs": tuple(own.values())}
    found = run_instance(problem.instance, tensors, kernels=_kernels(problem, declared), more=more)
    return (found["Out"], found["Lse"]) if return_lse else found["Out"]


def _declared(asked: Asked) -> tuple[Declared | None, UserFunction | None, dict[str, Any]]:
    """The function that is asked for, also as its plugin has it, and its inputs by name."""
    asked.identities()
    if asked.score is not None and asked.mask is not None:
        raise PluginError(
            "score and mask are two functions; make one of them, pyfmha.score_and_mask, and give it as score"
        )
    if not asked:
        return None, None, {}
    function = asked.mask if asked.score is None else asked.score
    given = asked.mask_inputs if asked.score is None else asked.score_inputs
    declared, user = Declared.of(function), UserFunction.of(function.__pyfmha__())
    told = {} if user.unserved() else user.told()
    if isinstance(given, Sequence):
        names = [name for name, _ in declared.inputs]
        wanted = names if len(given) == len(names) else [name for name in names if name not in told]
        if len(given) != len(wanted):
            raise PluginError(f"{declared.name} takes {', '.join(names) or 'no inputs'}; {len(given)} are given")
        given = dict(zip(wanted, given, strict=True))
    return declared, user, named_inputs(declared, dict(given), told)  # type: ignore[arg-type]  # it refuses others


def _extended(problem: Problem, user: UserFunction, values: dict[str, Any]) -> tuple[Problem, dict[str, Array]]:
    """The function's plugin, which checks shapes and writes lists where it has some, and its tensors."""
    inputs = FunctionInputs(function_operator(user))
    extension = extension_of(inputs.operator, inputs, values)
    arrays = {source: values[name].array for name, source in inputs.tensors.items()}
    return replace(problem, extension=extension), arrays


def _described(name: str, array: Any) -> _Described:
    kind = TYPE_OF.get(str(getattr(array, "dtype", "")))
    if kind is None:
        raise PluginError(f"{name} is {getattr(array, 'dtype', type(array).__name__)}; give a numpy array of float16,"
                          " float32 or, for bfloat16, uint16; lengths are int32, a mask is bool")  # fmt: skip
    return _Described(tuple(array.shape), _Kind(DATA_TYPES[kind]))


def _kernels(problem: Problem, function: Declared | None) -> dict[str, KernelSpec]:
    """The generic variants of the kernels that are Triton's, by function; with a function of the user's, that one."""
    if function is not None:
        made = WithFunction(problem.dtype, problem.padded_size, function=function)
        if problem.extension is None:
            return {problem.function_name: made.specs()[-1]}
        return {spec.name: spec for spec in made.specs()}  # of one name, the last serves everything
    specs = library_specs(("forward", "biased"), (problem.dtype,), (problem.padded_size,))
    return {spec.name: spec for spec in specs if not spec.archs}
