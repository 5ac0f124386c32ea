"""The inputs that an engine with a user's function has: names, types and shapes, as the library's plugin tells them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from pyfmha.errors import EngineError, PluginError
from pyfmha.operators.description import TYPE_NAMES
from pyfmha.operators.expressions import Scope
from pyfmha.operators.forms import AxisForm, Shape, TensorForm
from pyfmha.runtime.library import Library
from pyfmha.trt.attention.config import EngineConfig
from pyfmha.trt.attention.functions import Asked, FunctionInputs, check_held, extension_of, operator_for


class OwnInput(NamedTuple):
    """One input of the network.

    Attributes:
        type: as TensorRT calls it, ``"FLOAT"``.
        least, most: its smallest and its largest shape.
    """

    type: str
    least: Shape
    most: Shape


class OwnInputs(NamedTuple):
    """All of them.

    Attributes:
        tensors: by the names that they have in the network, ``"alibi_slopes"``.
        names: what the function calls those, and their names in the network.
        numbers: the function's numbers that no shape tells.
    """

    tensors: dict[str, OwnInput]
    names: dict[str, str]
    numbers: dict[str, Any]


NONE = OwnInputs({}, {}, {})


def own_inputs(config: EngineConfig, library: Library) -> OwnInputs:
    """What a configuration's functions take.

    Args:
        config: an engine's.
        library: which must hold the functions.

    Raises:
        EngineError: a number, a shape or a size is missing, unknown, or of another kind.
        LibraryError: the library has not the function.
    """
    asked = Asked(config.score, config.mask_function)
    if not asked:
        return NONE
    problem = config.problem
    operator = operator_for(asked, library, problem.dtype, problem.padded_size)
    inputs = FunctionInputs(operator)
    given = dict(config.function_inputs)
    numbers = {name: given.pop(name) for name in inputs.numbers if name in given}
    shapes = {name: given.pop(name) for name in inputs.tensors if name in given}
    missing = [name for name in inputs.numbers if name not in numbers]
    if missing:
        raise EngineError(f"function_inputs lack {', '.join(missing)}, numbers that {inputs.name} takes")
    try:
        made = replace(problem, extension=extension_of(operator, inputs, numbers))
        check_held(asked, made, library)
    except PluginError as error:
        raise EngineError(str(error)) from None
    base = [len(form.axes) for form in problem.forms().inputs]
    ranks = [len(shapes[name]) if name in shapes else -1 for name in inputs.tensors]
    forms = made.forms(*base, *ranks).inputs[len(base) :]
    sizes = _Sizes(config, inputs.name, given, made.instance.scope.values)
    tensors = {}
    for name, form in zip(inputs.tensors, forms, strict=True):
        least, most = sizes.shapes(name, form, shapes.get(name))
        tensors[form.name] = OwnInput(TYPE_NAMES[form.type or ""], least, most)
    sizes.check_all_used()
    return OwnInputs(tensors, dict(inputs.tensors), numbers)


class _Sizes:
    """The axes of the function's tensors: those that attention knows, and those that the user gives."""

    def __init__(
        self, config: EngineConfig, function: str, given: Mapping[str, Any], attributes: Mapping[str, Any]
    ) -> None:
        self._attributes = attributes
        self._function = function
        self._given = {f"{function}_{name}": size for name, size in given.items()}
        self._used: set[str] = set()
        self._most = {
            "batch": config.max_batch_size,
            f"{function}_queries": config.max_seq_len,
            f"{function}_keys": config.max_kv_len,
        }

    def shapes(self, name: str, form: TensorForm, shape: Shape | None) -> tuple[Shape, Shape]:
        """The smallest and the largest shape of a tensor."""
        if _is_free(form):
            if shape is None:
                raise EngineError(
                    f"function_inputs lack the shape of {name}, of which {self._function} says none: give"
                    f" function_inputs={{{name!r}: (sizes...)}}"
                )
            return tuple(shape), tuple(shape)
        if shape is not None:
            raise EngineError(
                f"function_inputs have the shape of {name}; {self._function} says it:"
                f" [{', '.join(axis.label for axis in form.axes)}]"
            )
        least, most = (tuple([self._size(axis, end) for axis in form.axes]) for end in (False, True))
        return least, most

    def _size(self, axis: AxisForm, most: bool) -> int:
        if axis.size is not None:
            return axis.size
        known = {name: size if most else 1 for name, size in self._most.items()}
        for name in axis.unknown:
            if name in known or name in self._attributes:
                continue
            if name not in self._given:
                plain = name.removeprefix(f"{self._function}_")
                raise EngineError(f"function_inputs lack {plain}, the size of an axis of {self._function}'s tensors")
            self._used.add(name)
        return int(axis.expression.evaluate(Scope({**self._attributes, **known, **self._given})))

    def check_all_used(self) -> None:
        """Refuse what no axis is called."""
        more = [name.removeprefix(f"{self._function}_") for name in self._given if name not in self._used]
        if more:
            raise EngineError(f"function_inputs have {', '.join(more)}, which {self._function} does not take")


def _is_free(form: TensorForm) -> bool:
    """Whether the function says nothing of a tensor's shape: then its axes are called by their numbers."""
    return all(axis.unknown == {f"{form.name}_{index}"} for index, axis in enumerate(form.axes))
