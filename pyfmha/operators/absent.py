"""What the inputs that are there do not tell: types and axes that only an absent one has.

A type that no tensor has is the first of its names: kernels are compiled for each. But an output whose type or size
nothing tells contradicts the description, for these attributes.
"""

from collections.abc import Iterable, Iterator

from pyfmha.errors import PluginError
from pyfmha.operators.expressions import Scope
from pyfmha.operators.names import twice
from pyfmha.operators.program import Axis, Form, Program, TensorProgram
from pyfmha.operators.scopes import holds


class UntoldError(PluginError):
    """No input that is there tells the type or an axis of a tensor, or two of one name are there."""


def absent_types(program: Program, scope: Scope) -> dict[str, str]:
    """What the types stand for that neither an attribute nor a tensor has.

    Args:
        program: of the operator.
        scope: of the attributes, with what is defined by them.

    Raises:
        UntoldError: an output has such a type, or a tensor an axis that no input tells; or two of one name are there.
    """
    for kind, tensors in (("inputs", program.inputs), ("outputs", program.outputs)):
        repeated = twice(tensor.name for tensor in tensors if holds(tensor.when, scope))
        if repeated:
            raise UntoldError(f"two {kind} are called {min(repeated)} for these attributes")
    inputs = list(_there(program.inputs, scope))
    outputs = list(_there(program.outputs, scope))
    had = {form.type for _, form in inputs}
    absent = {name: kinds.names[0] for name, kinds in program.types.items() if not kinds.attribute and name not in had}
    for tensor, form in outputs:
        if form.type in absent:
            having = [one.name for one in program.inputs if any(other.type == form.type for other in one.forms)]
            raise _untold(f"type {form.type}", tensor, having)
    told = _told(program, [form for _, form in inputs])
    for tensor, form in (*inputs, *outputs):
        for name in (name for axis in form.axes for name in _names(program, axis)):
            if name not in told:
                raise _untold(f"axis {name}", tensor, _having(program, name))
    return absent


def _there(tensors: Iterable[TensorProgram], scope: Scope) -> Iterator[tuple[str, Form]]:
    for tensor in tensors:
        if holds(tensor.when, scope):
            yield from ((tensor.name, form) for form in tensor.forms if holds(form.condition, scope))


def _names(program: Program, axis: Axis) -> list[str]:
    """The axes that the size of one reads."""
    return [] if axis.fixed else [name for name in program.axes if name in axis.expression.names()]


def _told(program: Program, forms: Iterable[Form]) -> set[str]:
    """The axes that forms tell: those that stand alone, then, in order, the only unknown one of an expression."""
    axes = [axis for form in forms for axis in form.axes]
    told = {axis.name for axis in axes if axis.name is not None}
    for axis in axes:
        unknown = set(_names(program, axis)) - told
        if len(unknown) == 1:
            told |= unknown
    return told


def _having(program: Program, name: str) -> list[str]:
    return [
        tensor.name
        for tensor in program.inputs
        if any(name in _names(program, axis) for form in tensor.forms for axis in form.axes)
    ]


def _untold(what: str, tensor: str, having: Iterable[str]) -> UntoldError:
    would = ", ".join(dict.fromkeys(having))
    return UntoldError(f"nothing tells the {what} of {tensor} for these attributes; {would} would")
