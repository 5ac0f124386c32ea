"""What TensorRT's descriptors and expressions say of a plugin's tensors."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pyfmha.errors import PluginError
from pyfmha.operators.arithmetic import EvaluationError
from pyfmha.operators.expressions import Expression, Node
from pyfmha.operators.forms import AxisForm, Forms, Shape, TensorForm
from pyfmha.operators.instance import Instance
from pyfmha.operators.scopes import AttributeScope

_OPERATIONS = {
    "add": "SUM",
    "sub": "SUB",
    "mul": "PROD",
    "div": "FLOOR_DIV",  # sizes are not negative
    "floordiv": "FLOOR_DIV",
    "cdiv": "CEIL_DIV",
    "min": "MIN",
    "max": "MAX",
}
_LATE = {"size", "stride", "numel", "least", "serves", "itemsize"}


def check_types(instance: Instance, forms: Iterable[TensorForm], descs: Iterable[Any]) -> None:
    """Compare the types of tensors' ``PluginTensorDesc`` with their forms'.

    Raises:
        PluginError: one is of another type.
    """
    for form, desc in zip(forms, descs, strict=False):
        kind = int(desc.type)
        if kind != form.type_id:
            raise PluginError(instance.type_error(form, kind, instance.types))


def check_expressions(forms: Forms, inputs: Sequence[Any]) -> None:
    """Compare what is known of the inputs' ``DimsExprs`` while a network is built.

    Raises:
        PluginError: one has not as many dimensions as its form, or a known size that is not the plugin's, or not that
            of the same axis of another.
    """
    found: dict[str, tuple[str, int]] = {}
    for form, dims in zip(forms.inputs, inputs, strict=True):
        if len(dims) != len(form.axes):
            raise PluginError(f"{form.name} has {len(dims)} dimensions; it must be {form.named()}")
        for expression, axis in zip(dims, form.axes, strict=True):
            if expression is None or not expression.is_constant():
                continue
            got = expression.get_constant_value()
            if axis.size not in (None, got):
                raise PluginError(f"{form.name} has {axis.label} {got}, the plugin was created for {axis.size}")
            # By what it is: two axes may be called alike.
            other, size = found.setdefault(axis.expression.text, (form.name, got))
            if size != got:
                raise PluginError(f"{form.name} has {axis.label} {got}, {other} has {size}; they must be the same")


class Symbols:
    """Sizes of axes in TensorRT's expressions, while a network is built.

    Args:
        trt: the TensorRT module.
        instance: the plugin's.
        builder: an ``IExprBuilder``.
    """

    def __init__(self, trt: Any, instance: Instance, builder: Any) -> None:
        self._trt, self._scope, self._builder = trt, instance.scope, builder
        self._definitions = {name: expression.node for name, expression in instance.program.late}
        self._known: dict[str, Any] = {}
        self._axes: list[tuple[AxisForm, Any]] = []
        self._values: dict[str, Sequence[Any]] = {}

    def outputs(self, forms: Forms, inputs: Sequence[Any], shape_inputs: Sequence[Any]) -> list[list[Any]]:
        """The ``DimsExprs`` of the outputs as lists: each size that of an input's axis of the same name, or computed.

        Raises:
            PluginError: TensorRT has no such expression.
        """
        self._values = {name: list(values) for (name, _), values in zip(forms.shapes, shape_inputs, strict=True)}
        axes = [
            (axis, expression)
            for form, dims in zip(forms.inputs, inputs, strict=True)
            for axis, expression in zip(form.axes, dims, strict=True)
        ]
        for axis, expression in axes:
            if axis.size is None and axis.name is not None:
                self._known.setdefault(axis.name, expression)
        self._axes = axes
        known: dict[str, Any] = {}
        for axis, expression in axes:
            known.setdefault(axis.expression.text, expression)
        return [[self._sized(form, axis, known) for axis in form.axes] for form in forms.outputs]

    def _sized(self, form: TensorForm, axis: AxisForm, known: Mapping[str, Any]) -> Any:
        try:
            return self._size(axis, known)
        except EvaluationError:
            raise PluginError(f"{form.name}: its size {axis.label} cannot be computed from these inputs") from None

    def _size(self, axis: AxisForm, known: Mapping[str, Any]) -> Any:
        if axis.size is not None:
            return known[axis.expression.text] if axis.expression.text in known else self._builder.constant(axis.size)
        return self._of(axis.expression.node)

    def _solve(self, name: str) -> None:
        """What an axis without other unknown names tells of a name: of a * name + b, (size - b) / a."""
        for axis, size in self._axes:
            if axis.size is None and axis.unknown - set(self._known) - set(self._scope.values) == {name}:
                self._known[name] = self._builder.constant(0)
                offset = self._of(axis.expression.node)
                self._known[name] = self._builder.constant(1)
                factor = self._operation("SUB", self._of(axis.expression.node), offset)
                self._known[name] = self._operation("FLOOR_DIV", self._operation("SUB", size, offset), factor)
                return

    def _operation(self, name: str, left: Any, right: Any) -> Any:
        if name in ("FLOOR_DIV", "CEIL_DIV") and right.is_constant() and right.get_constant_value() == 0:
            raise EvaluationError
        return self._builder.operation(getattr(self._trt.DimensionOperation, name), left, right)

    def _of(self, node: Node) -> Any:
        if _is_early(node, self._scope):
            return self._builder.constant(Expression("", node).evaluate(self._scope))
        if node.kind == "name" and node.value in self._definitions:
            return self._of(self._definitions[node.value])
        if node.kind == "name":
            if node.value not in self._known:
                self._solve(node.value)
            if node.value in self._known:
                return self._known[node.value]
        if node.kind == "item" and node.value in self._values and node.parts[0].kind == "constant":
            values, index = self._values[node.value], node.parts[0].value
            if index < len(values):
                return values[index]
        if node.kind == "if" and _is_early(node.parts[0], self._scope):
            chosen = 1 if Expression("", node.parts[0]).evaluate(self._scope) else 2
            return self._of(node.parts[chosen])
        if node.kind == "binary" and node.value in _OPERATIONS:
            return self._operation(_OPERATIONS[node.value], *map(self._of, node.parts))
        if node.kind == "binary" and node.value == "mod":
            left, right = map(self._of, node.parts)
            whole = self._operation("PROD", self._operation("FLOOR_DIV", left, right), right)
            return self._operation("SUB", left, whole)
        raise EvaluationError


def _is_early(node: Node, scope: AttributeScope) -> bool:
    if node.kind in ("name", "item") and node.value not in scope.values:
        return False
    if node.kind == "ask" and node.value in _LATE:
        return False
    return all(_is_early(part, scope) for part in node.parts if isinstance(part, Node))


def sizes(dims: Any) -> Shape:
    """The sizes in a ``Dims``. A slice, because the binding makes a tuple of it in one step: 0.6 us instead of 6."""
    return tuple(dims[:])


def largest(desc: Any) -> Shape:
    """The upper bounds of a ``DynamicPluginTensorDesc``; its own sizes where those are known and bounds are not."""
    own, bounds = sizes(desc.desc.dims), sizes(desc.max)
    return tuple(map(max, own, bounds)) if len(own) == len(bounds) else bounds or own


def smallest(desc: Any) -> Shape:
    """The lower bounds of a ``DynamicPluginTensorDesc``, -1 where one is not known."""
    own, bounds = sizes(desc.desc.dims), sizes(desc.min)
    if len(own) != len(bounds):
        return own or bounds
    return tuple(bound if size < 0 else min(size, bound) for size, bound in zip(own, bounds, strict=True))


def least_sizes(forms: Forms, descs: Sequence[Any]) -> dict[str, int]:
    """The lower bounds of the axes that inputs give by themselves, -1 where one is not known."""
    found: dict[str, int] = {}
    for form, desc in zip(forms.inputs, descs, strict=False):
        low = smallest(desc)
        if len(low) == len(form.axes):
            found |= {axis.name: size for axis, size in zip(form.axes, low, strict=True) if axis.name is not None}
    return found
