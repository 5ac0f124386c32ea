"""The tensors of one plugin: the forms of its operator with the values of its attributes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyfmha.errors import PluginError
from pyfmha.operators.arithmetic import LIMIT, NO_VALUE, EvaluationError
from pyfmha.operators.description import DATA_TYPES, ITEM_SIZES
from pyfmha.operators.expressions import Expression, Scope
from pyfmha.operators.program import Axis

Shape = tuple[int, ...]


@dataclass(frozen=True)
class AxisForm:
    """One axis.

    Attributes:
        label: how messages call it.
        size: its size where attributes tell; else None.
        expression: its size in terms of names.
        name: the axis that it gives by itself; None for an expression.
    """

    label: str
    size: int | None
    expression: Expression
    name: str | None

    @classmethod
    def of(cls, axis: Axis, scope: Scope) -> "AxisForm":
        """An axis for some attributes."""
        size = axis.expression.evaluate(scope) if axis.fixed else None
        return cls(axis.label, size, axis.expression, axis.name)

    @property
    def unknown(self) -> frozenset[str]:
        """The names that must be known for its size."""
        return frozenset() if self.size is not None else self.expression.names()


@dataclass(frozen=True)
class TensorForm:
    """One tensor of a plugin.

    Attributes:
        name: for messages.
        type: a type of :data:`pyfmha.operators.description.DATA_TYPES`; None where it follows from what is given.
        variable: the name of the type in the description, such as ``"T"``.
        axes: in the order of its dimensions.
    """

    name: str
    type: str | None
    variable: str
    axes: tuple[AxisForm, ...]

    def __str__(self) -> str:
        return f"{self.name} [{', '.join(axis.label if axis.size is None else str(axis.size) for axis in self.axes)}]"

    def named(self) -> str:
        """Its axes by name, as ``[rows, cols]``."""
        return f"[{', '.join(axis.label for axis in self.axes)}]"

    @property
    def type_id(self) -> int | None:
        """``int(trt.DataType)``; None where it is not known."""
        return None if self.type is None else DATA_TYPES[self.type]

    @property
    def item_size(self) -> int:
        """Bytes of an element."""
        return ITEM_SIZES[self.type or "fp32"]


@dataclass(frozen=True)
class Forms:
    """All tensors of a plugin, in TensorRT's order; of inputs, those whose values are read come last.

    Attributes:
        inputs, outputs: tensors in memory.
        shapes: inputs whose values are read, by name, with how many values each has.
    """

    inputs: tuple[TensorForm, ...]
    outputs: tuple[TensorForm, ...]
    shapes: tuple[tuple[str, int], ...] = ()

    @property
    def all(self) -> tuple[TensorForm, ...]:
        """Inputs, then outputs."""
        return self.inputs + self.outputs

    def check_count(self, inputs: Sequence[Any], outputs: Sequence[Any] | None = None) -> None:
        """Refuse any other number of tensors.

        Raises:
            PluginError: saying which they are.
        """
        given = len(self.outputs) if outputs is None else len(outputs)
        counts = {len(self.inputs), len(self.inputs) + len(self.shapes)}
        if len(inputs) not in counts or given != len(self.outputs):
            names = " and ".join([*(form.name for form in self.inputs), *(name for name, _ in self.shapes)])
            results = " and ".join(form.name for form in self.outputs)
            raise PluginError(
                f"{len(inputs)} inputs, {given} outputs; it has the inputs {names or 'none'}, the outputs {results}"
            )


def mismatch(forms: Forms, shapes: Sequence[Shape]) -> PluginError:
    """The error for shapes that are not those of the forms."""
    got = ", ".join(f"{form.name} {list(shape)}" for form, shape in zip(forms.all, shapes, strict=True))
    wanted = ", ".join(map(str, forms.all))
    alike = "; a name stands for the same size wherever it is"
    return PluginError(f"shapes are {got}; they must be {wanted}: numbers as the plugin was created{alike}")


def no_value(shapes: Mapping[str, Shape]) -> PluginError:
    """The error where something has no value for the shapes of tensors, by name."""
    for name, shape in shapes.items():
        if math.prod(shape) >= LIMIT:
            return PluginError(f"{NO_VALUE}: {name} {list(shape)} has more elements than 64 bits hold")
    return PluginError(f"{NO_VALUE}: shapes are {listed(shapes)}")


def listed(shapes: Mapping[str, Shape]) -> str:
    """Shapes of tensors, by name, as messages have them."""
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())


def measure(
    forms: Forms, inputs: Sequence[Shape], outputs: Sequence[Shape], values: Mapping[str, Any]
) -> dict[str, int]:
    """The sizes of all axes by name.

    Names that stand alone come first; then what an expression with one unknown name tells of it; then all is compared.

    Args:
        forms: of the tensors.
        inputs, outputs: their shapes.
        values: of attributes and definitions.

    Raises:
        PluginError: there are too many or too few tensors, or their shapes are not those of the forms.
    """
    forms.check_count(inputs, outputs)
    shapes = [tuple(shape) for shape in (*inputs[: len(forms.inputs)], *outputs)]
    found: dict[str, int] = {}
    pairs = list(zip(forms.all, shapes, strict=True))
    if any(len(form.axes) != len(shape) or min(shape, default=0) < 0 for form, shape in pairs):
        raise mismatch(forms, shapes)
    sized = [(axis, size) for form, shape in pairs for axis, size in zip(form.axes, shape, strict=True)]
    for axis, size in sized:
        if axis.size is None and axis.name is not None:
            found.setdefault(axis.name, size)
    for axis, size in sized[: sum(len(form.axes) for form in forms.inputs)]:
        unknown = axis.unknown - set(found) - set(values)
        if axis.size is None and len(unknown) == 1:
            (name,) = unknown
            solved = solve(axis.expression, name, size, {**values, **found})
            if solved is None:
                raise mismatch(forms, shapes)
            found[name] = solved
    known = Scope({**values, **found})
    of_inputs = sum(len(form.axes) for form in forms.inputs)
    for index, (axis, size) in enumerate(sized):
        if axis.size is None and not axis.unknown <= set(known.values):
            if index < of_inputs:
                raise mismatch(forms, shapes)
            continue  # of an output, by a definition: see Instance.measure
        if size != _size(axis, known):
            raise mismatch(forms, shapes)
    return found


def _size(axis: AxisForm, known: Scope) -> int | None:
    if axis.size is not None:
        return axis.size
    try:
        size: int = axis.expression.evaluate(known)
    except EvaluationError:
        return None
    return size


def solve(expression: Expression, name: str, size: int, known: Mapping[str, Any]) -> int | None:
    """The value of a name for which an expression has a size; None where no size of an axis does."""
    return solved(lambda value: expression.evaluate(Scope({**known, name: value})), size)


def solved(at: Callable[[int], int], size: int) -> int | None:
    """The number of axis elements for which a function has a value; None where it has for none.

    The function is taken to be a * number + b, and the number is tried.
    """
    try:
        offset = at(0)
        factor = at(1) - offset
        if factor == 0 or (size - offset) % factor:
            return None
        value = (size - offset) // factor
        return value if value >= 0 and at(value) == size else None
    except EvaluationError:
        return None


def shape_values(forms: Forms, outputs: Sequence[Shape]) -> dict[str, tuple[int, ...]]:
    """The values of inputs that are read, as far as an output's axis shows them; -1 for the others."""
    values = {name: [-1] * count for name, count in forms.shapes}
    for form, shape in zip(forms.outputs, outputs, strict=True):
        for axis, size in zip(form.axes, shape, strict=True):
            node = axis.expression.node
            if node.kind == "item" and node.value in values and node.parts[0].kind == "constant":
                values[node.value][node.parts[0].value] = size
    return {name: tuple(found) for name, found in values.items()}
