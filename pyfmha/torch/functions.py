"""Score and mask functions of a user's on PyTorch's tensors: which plugin of the library they are; and on the CPU."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from pyfmha.attention.biased import ARGUMENTS
from pyfmha.attention.function_operator import KINDS, UserFunction, function_operator
from pyfmha.errors import PluginError
from pyfmha.runtime.library import Library
from pyfmha.torch import launch
from pyfmha.torch.settings import DTYPES
from pyfmha.trt.attention.functions import Asked, FunctionInputs, extension_of, operator_for
from pyfmha.trt.attention.problem import Extension, Problem

TYPES = {
    "int8": torch.int8, "uint8": torch.uint8, "int32": torch.int32, "int64": torch.int64, "bool": torch.bool,
    "fp8": torch.float8_e4m3fn,
    "fp32": torch.float32, **{name: dtype for dtype, name in DTYPES.items()},
}  # fmt: skip
"""PyTorch's types by the names that operators have for them."""


class Own(NamedTuple):
    """Functions, and what they are given, as the operator takes them.

    Attributes:
        score, mask: name and digest of each, ``"alibi:0123456789abcdef"``, or its name in the library; empty for none.
        tensors, numbers: in the order of the plugin's inputs and attributes.
    """

    score: str
    mask: str
    tensors: tuple[torch.Tensor, ...] = ()
    numbers: tuple[int | float, ...] = ()

    @property
    def asked(self) -> Asked:
        """The functions, by name."""
        return Asked(self.score or None, self.mask or None)

    @property
    def form(self) -> tuple[Any, ...]:
        """All that a launch is prepared by."""
        return self.score, self.mask, self.numbers, *((x.shape, x.dtype, x.get_device()) for x in self.tensors)


is_on_gpu: Callable[[torch.Tensor], bool] = torch.Tensor.is_cuda.__get__
_held: dict[tuple[str, str], Asked] = {}
"""Functions themselves by what the operator calls them, for the CPU, where no library has them."""


def own_of(asked: Asked, q: torch.Tensor, head_size: int) -> Own:
    """Functions as the operator takes them.

    Args:
        asked: as of :func:`pyfmha.torch.attention`.
        q: of the type and on the device of Q.
        head_size: that kernels are compiled for.

    Raises:
        PluginError: an input is missing, unknown, or no number where it must be one.
        LibraryError: on a GPU, the library has not the function, or one of another source.
    """
    own = Own(*_names(asked.score, asked.mask))
    inputs = _inputs(own, q, head_size)
    values = inputs.named(asked)
    _check(inputs, [values[name] for name in inputs.tensors], q)
    numbers = dict(extension_of(inputs.operator, inputs, values).attributes)
    return own._replace(
        tensors=tuple(values[name] for name in inputs.tensors),
        numbers=tuple(numbers[source] for source in inputs.numbers.values()),  # type: ignore[misc]  # no text
    )


def extended(problem: Problem, own: Own, q: torch.Tensor, *, of_library: bool = False) -> Problem:
    """The problem with functions.

    Args:
        problem: without.
        own: the functions, and what they are given.
        q: of the type and on the device of Q.
        of_library: whether the library must have the functions, wherever Q is.

    Raises:
        PluginError: a tensor is of another type or on another device than it must be.
        LibraryError: as :func:`own_of`.
    """
    inputs = _inputs(own, q, problem.padded_size, of_library)
    if (len(own.tensors), len(own.numbers)) != (len(inputs.tensors), len(inputs.numbers)):
        raise PluginError(
            f"{inputs.name} takes the tensors ({', '.join(inputs.tensors)}) and the numbers"
            f" ({', '.join(inputs.numbers)}); given are {len(own.tensors)} and {len(own.numbers)}"
        )
    _check(inputs, own.tensors, q)
    numbers = dict(zip(inputs.numbers, own.numbers, strict=True))
    return replace(problem, extension=extension_of(inputs.operator, inputs, numbers))


def _check(inputs: FunctionInputs, tensors: Sequence[Any], q: torch.Tensor) -> None:
    """Refuse tensors that are none, of another type, or on another device."""
    for (name, source), tensor in zip(inputs.tensors.items(), tensors, strict=True):
        kind = TYPES[inputs.kind(source)]
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != kind:
            got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise PluginError(f"{inputs.name}: input {name} is of {got}; it must be a tensor of {kind}")
        if tensor.device != q.device:
            raise PluginError(f"{inputs.name}: input {name} is on {tensor.device}, Q on {q.device}; give both on one")


def named_tensors(problem: Problem, own: Own) -> dict[str, torch.Tensor]:
    """The functions' tensors by the names that the plugin has for them."""
    assert problem.extension is not None
    return dict(zip(FunctionInputs(problem.extension.operator).tensors.values(), own.tensors, strict=True))


def node_attributes(extension: Extension | None) -> dict[str, Any]:
    """What a node of an ONNX model says of functions: what they were, so that another version of one refuses it."""
    if extension is None:
        return {}
    kept = {name: kind.default for name, kind in extension.operator.attributes if name in KINDS.values()}
    return {**kept, **dict(extension.attributes)}


@lru_cache(maxsize=64)
def _names(score: Any, mask: Any) -> tuple[str, str]:
    """What the operator calls functions: reading their source takes a while."""
    said = Asked(score, mask).identities()
    found = said.get(KINDS["score"], ""), said.get(KINDS["mask"], "")
    if all(one is None or not isinstance(one, str) for one in (score, mask)):
        _held[found] = Asked(score, mask)
    return found


def _inputs(own: Own, q: torch.Tensor, head_size: int, of_library: bool = False) -> FunctionInputs:
    """What the functions take: by the library, on a CPU by themselves, where they were given."""
    if not of_library and (own.score, own.mask) in _held and not is_on_gpu(q):
        return _inputs_of(own.score, own.mask)
    return _library_inputs(launch.library(), own.score, own.mask, DTYPES[q.dtype], head_size)


@lru_cache(maxsize=64)
def _library_inputs(library: Library, score: str, mask: str, dtype: str, head_size: int) -> FunctionInputs:
    asked = _held.get((score, mask), Own(score, mask).asked)
    return FunctionInputs(operator_for(asked, library, dtype, head_size))


@lru_cache(maxsize=64)
def _inputs_of(score: str, mask: str) -> FunctionInputs:
    held = _held[score, mask]
    both = [one for one in (held.score, held.mask) if one is not None]
    if len(both) == 1:
        return FunctionInputs(function_operator(UserFunction.of(both[0].__pyfmha__())))
    from pyfmha.functions import score_and_mask

    name = "_".join(one.__pyfmha__()["name"] for one in both)
    return FunctionInputs(function_operator(UserFunction.of(score_and_mask(name, *both).__pyfmha__())))


Evaluated = Callable[[torch.Tensor, int, int], tuple[torch.Tensor, torch.Tensor]]
"""Scores [query heads, queries, keys] of a sequence, its number, and the position of its first query: what the
functions make of the scores, and which keys they show."""


def on_cpu(problem: Problem, own: Own, shapes: Sequence[tuple[int, ...]]) -> Evaluated:
    """The functions on the CPU: their own source, in float64, under Triton's interpreter.

    Args:
        problem: with them.
        own: what they are given.
        shapes: of all inputs, and of the outputs.

    Raises:
        PluginError: they are known by name only, or an input does not fit.
    """
    held = _held.get((own.score, own.mask))
    if held is None:
        named = " and ".join(one for one in (own.score, own.mask) if one)
        raise PluginError(f"{named} is given by name; on a CPU a function is computed from its source: give it itself")
    assert problem.extension is not None
    instance = problem.instance
    count = len(problem.forms().inputs)
    *_, step = instance.plan(instance.measure(shapes[:count], shapes[count:])).steps
    inputs = FunctionInputs(problem.extension.operator)
    numbers = step.arguments[len(ARGUMENTS) :]
    values = dict(zip(inputs.order, numbers, strict=False))
    values |= {name: _array(tensor) for name, tensor in zip(inputs.tensors, own.tensors, strict=True)}
    functions = [one for one in (held.score, held.mask) if one is not None]
    return partial(_evaluated, functions, values)


def _array(tensor: torch.Tensor) -> Any:
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _evaluated(
    functions: Sequence[Any], values: Mapping[str, Any], scores: torch.Tensor, number: int, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    from pyfmha.functions import evaluate as evaluation
    from pyfmha.functions.family import Declared

    # As many, so that the function is told the sequence's number.
    made = torch.zeros((number + 1, *scores.shape), dtype=torch.float64).numpy()
    made[number] = scores.double().numpy()
    seen = torch.ones(scores.shape, dtype=torch.bool)
    for function in functions:
        declared = Declared.of(function)
        given = {name: values[name] for name, _ in declared.inputs}
        made, shown = evaluation.evaluate(declared, made, given, first_position=first)
        seen &= torch.from_numpy(shown[number])
    of_one = torch.from_numpy(made[number])
    return of_one, seen & ~of_one.isneginf()
