"""An element of a computed tensor as an expression of its index: how masks made at run time are understood."""

import math
import operator
from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from pyfmha.onnx import formulas as f
from pyfmha.onnx import patterns
from pyfmha.onnx.facts import Facts
from pyfmha.onnx.formulas import Data, mapped
from pyfmha.onnx.sizes import Size
from pyfmha.onnx.tensors import STANDARD, Shape, attribute, constant
from pyfmha.onnx.views import Bounds, broadcast_index, moved

_WHOLE = {2, 3, 4, 5, 6, 7, 12, 13}  # ir.DataType of the integers
_NUMBERS: dict[str, Callable[..., Any]] = {
    "Add": f.added, "Sub": f.subtracted, "Mul": f.multiplied, "Div": f.divided, "Abs": f.absolute,
    "Neg": operator.neg,
}  # fmt: skip
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "GreaterOrEqual": f.at_least, "Greater": f.above, "Equal": f.equal,
    "LessOrEqual": lambda a, b: f.at_least(b, a), "Less": lambda a, b: f.above(b, a),
}  # fmt: skip


class Elements:
    """Reads elements of values.

    Args:
        facts: of the graph.
        bounds: of the index symbols that are used; more are added.

    Attributes:
        cells: for each symbol that stands for an element of a tensor of whole numbers, that tensor and the index.
    """

    def __init__(self, facts: Facts, bounds: Bounds) -> None:
        self.facts, self.bounds = facts, bounds
        self.cells: dict[str, tuple[ir.Value, Shape]] = {}
        self._known: dict[tuple[ir.Value, Shape], Any] = {}

    def at(self, value: ir.Value, index: Shape) -> Any:
        """One element: a :class:`Size`, a float, a condition, a choice, or :class:`Data`."""
        key = value, index
        if key not in self._known:
            self._known[key] = self._cell(value, index)  # what a circle would answer
            self._known[key] = f.settled(self._found(value, index), self.bounds)
        return self._known[key]

    def _found(self, value: ir.Value, index: Shape) -> Any:
        content = self.facts.content(value)
        if content is not None and content.size == 1:
            (element,) = content.flat
            return f.as_condition(element) if value.dtype == ir.DataType.BOOL else element
        array = constant(value)
        if array is not None:
            if array.ndim != len(index):
                return Data(value.name or "")
            return patterns.element(array, index, self.bounds, value.name or "")
        further = moved(self.facts, value, index, self.bounds)
        if further is not None:
            return self.at(*further)
        node = value.producer()
        if node is None or node.domain not in STANDARD:
            return self._cell(value, index)
        return self._computed(node, value, index)

    def _computed(self, node: ir.Node, value: ir.Value, index: Shape) -> Any:
        op = node.op_type
        rule = _RULES.get(op)
        if rule is not None:
            found = rule(self, node, index)
            return self._cell(value, index) if found is None else found
        if op not in _NUMBERS and op not in _COMPARISONS and op not in _LOGIC:
            return self._cell(value, index)
        inputs = self._inputs(node, value, index)
        if inputs is None:
            return self._cell(value, index)
        if op in _LOGIC:
            return _LOGIC[op](*inputs)
        act = _NUMBERS.get(op) or _COMPARISONS[op]
        return mapped(act, *map(f.as_number, inputs))

    def _inputs(self, node: ir.Node, value: ir.Value, index: Shape) -> list[Any] | None:
        """The elements of the inputs of an elementwise operator."""
        out, found = self.facts.shape(value), []
        for operand in node.inputs:
            shape = None if operand is None else self.facts.shape(operand)
            at = None if shape is None else broadcast_index(index, out, shape)
            if operand is None or at is None:
                return None
            found.append(self.at(operand, at))
        return found

    def _cell(self, value: ir.Value, index: Shape) -> Any:
        name = value.name or ""
        if value.dtype is None or int(value.dtype) not in _WHOLE:
            return Data(name)
        symbol = f"@{name}[{', '.join(map(str, index))}]"
        self.cells[symbol] = value, index
        return Size.of(symbol)

    # ------------------------------------------------------------------ operators with a rule of their own

    def _cast(self, node: ir.Node, index: Shape) -> Any:
        source = node.inputs[0]
        assert source is not None
        element = self.at(source, index)
        if int(attribute(node, "to", 0)) == int(ir.DataType.BOOL):
            return f.as_condition(element)
        number = f.as_number(element)
        return mapped(_cut, number) if int(attribute(node, "to", 0)) in _WHOLE else number

    def _trilu(self, node: ir.Node, index: Shape) -> Any:
        source = node.inputs[0]
        k = Size() if len(node.inputs) < 2 or node.inputs[1] is None else self._only(node.inputs[1])
        if source is None or k is None:
            return None
        row, column = index[-2:]
        # Upper: column - row >= k; lower: column - row <= k.
        kept = f.at_least(column - row, k) if attribute(node, "upper", 1) else f.at_least(k, column - row)
        element = self.at(source, index)
        return f.chosen(kept, element, False if f.is_condition(element) else _zero(element))

    def _only(self, value: ir.Value) -> Size | None:
        content = self.facts.content(value)
        if content is None or content.size != 1:
            return None
        (element,) = content.flat
        return element if isinstance(element, Size) else None

    def _constant_of_shape(self, node: ir.Node, index: Shape) -> Any:
        tensor = attribute(node, "value", None)
        if tensor is None:
            return 0.0
        number = tensor.numpy().reshape(-1)[0]
        return patterns._plain(number)

    def _range(self, node: ir.Node, index: Shape) -> Any:
        start, _, delta = node.inputs
        if start is None or delta is None:
            return None
        first, step = self._only(start), self._only(delta)
        return None if first is None or step is None else first + index[0] * step

    def _gather(self, node: ir.Node, index: Shape) -> Any:
        data, indices = node.inputs[:2]
        shape = None if data is None else self.facts.shape(data)
        inner = None if indices is None else self.facts.shape(indices)
        if data is None or indices is None or shape is None or inner is None:
            return None
        axis = attribute(node, "axis", 0) % len(shape)
        at = self.at(indices, index[axis : axis + len(inner)])
        # A negative index counts from the end, so one that may be negative is not followed.
        if not isinstance(at, Size) or not at.at_least_0(self.bounds):
            return None
        return self.at(data, (*index[:axis], at, *index[axis + len(inner) :]))

    def _gather_nd(self, node: ir.Node, index: Shape) -> Any:
        data, indices = node.inputs[:2]
        shape = None if data is None else self.facts.shape(data)
        inner = None if indices is None else self.facts.shape(indices)
        if data is None or indices is None or shape is None or inner is None or attribute(node, "batch_dims", 0):
            return None
        count, outer = inner[-1].number or 0, len(inner) - 1
        found = [self.at(indices, (*index[:outer], Size.of(axis))) for axis in range(count)]
        if not count or not all(isinstance(at, Size) and at.at_least_0(self.bounds) for at in found):
            return None
        return self.at(data, (*found, *index[outer:]))

    def _concat(self, node: ir.Node, index: Shape) -> Any:
        """The part that an index falls into; a choice, where that depends on the index."""
        parts = [(value, self.facts.shape(value)) for value in node.inputs if value is not None]
        if any(shape is None for _, shape in parts):
            return None
        axis = attribute(node, "axis", 0) % len(index)
        pieces, first = [], Size()
        for value, shape in parts:
            at = (*index[:axis], index[axis] - first, *index[axis + 1 :])
            pieces.append((first, value, at))
            first += (shape or ())[axis]
        result = None
        for first, value, at in pieces:  # the last that begins at or before the index
            begun = f.settled(f.at_least(index[axis], first), self.bounds)
            if begun is False:
                break
            element = self.at(value, at)
            result = element if result is None or begun is True else f.chosen(begun, element, result)
        return result

    def _cumsum(self, node: ir.Node, index: Shape) -> Any:
        """Sums of zeros, which are zeros wherever they are taken."""
        source, axes = node.inputs[0], self.facts.numbers(node.inputs[1])
        shape = None if source is None else self.facts.shape(source)
        if source is None or shape is None or axes is None:
            return None
        axis, symbol = axes[0] % len(index), f"{node.outputs[0].name}+"
        self.bounds[symbol] = shape[axis]
        element = self.at(source, (*index[:axis], Size.of(symbol), *index[axis + 1 :]))
        return element if element in (Size(), 0.0) else None

    def _where(self, node: ir.Node, index: Shape) -> Any:
        inputs = self._inputs(node, node.outputs[0], index)
        if inputs is None:
            return None
        condition, yes, no = inputs
        if isinstance(condition, Data):
            return yes if yes == no else condition
        return f.chosen(condition, yes, no)


def _cut(number: Any) -> Any:
    """A float as a whole number, towards 0."""
    if isinstance(number, Size):
        return number
    return Size.of(int(number)) if math.isfinite(number) else f.Data(str(number))


def _zero(element: Any) -> Any:
    return Size() if isinstance(element, Size) else 0.0


def _logical(act: Callable[[Any, Any], Any], settles: bool) -> Callable[..., Any]:
    def of(a: Any, b: Any) -> Any:
        left, right = map(f.as_condition, (a, b))
        if left is settles or right is settles:
            return settles
        return act(left, right)

    return of


_LOGIC: dict[str, Callable[..., Any]] = {
    "And": _logical(f.both, False), "Or": _logical(f.either, True), "Not": f.negated_element,
}  # fmt: skip
_RULES: dict[str, Callable[[Elements, ir.Node, Shape], Any]] = {
    "Cast": Elements._cast, "Trilu": Elements._trilu, "ConstantOfShape": Elements._constant_of_shape,
    "Range": Elements._range, "Gather": Elements._gather, "GatherND": Elements._gather_nd, "Where": Elements._where,
    "Concat": Elements._concat, "CumSum": Elements._cumsum,
}  # fmt: skip
