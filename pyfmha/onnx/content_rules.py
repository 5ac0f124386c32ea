"""The contents of small tensors: of shapes, of axes and of scales, which exporters compute at run time."""

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from pyfmha.onnx.shape_rules import axes_of, slices, splits
from pyfmha.onnx.sizes import Size
from pyfmha.onnx.tensors import Content, attribute, constant, objects

if TYPE_CHECKING:
    from pyfmha.onnx.facts import Facts

_FLOATS = {1, 10, 11, 16}  # ir.DataType: FLOAT, FLOAT16, DOUBLE, BFLOAT16


def _first(facts: "Facts", node: ir.Node) -> Content | None:
    return facts.content(node.inputs[0])


def _shape(facts: "Facts", node: ir.Node) -> Content | None:
    shape = facts.input_shape(node, 0)
    if shape is None:
        return None
    start, end = attribute(node, "start", 0), attribute(node, "end", None)
    return objects(shape[start:end], [-1])


def _size(facts: "Facts", node: ir.Node) -> Content | None:
    shape = facts.input_shape(node, 0)
    if shape is None:
        return None
    total = Size.of(1)
    for size in shape:
        total *= size
    return objects([total], [])


def _gather(facts: "Facts", node: ir.Node) -> Content | None:
    data, indices = _first(facts, node), constant(node.inputs[1])
    if indices is None and (known := facts.content(node.inputs[1])) is not None:
        numbers = facts.numbers(node.inputs[1])
        indices = None if numbers is None else np.asarray(numbers).reshape(known.shape)
    if data is None or indices is None:
        return None
    try:
        return objects_of(np.take(data, indices, axis=attribute(node, "axis", 0)))
    except IndexError:
        return None


def objects_of(array: Any) -> Content:
    """An object array, also where numpy answered with the element itself."""
    return array if isinstance(array, np.ndarray) else objects([array], [])


def _concat(facts: "Facts", node: ir.Node) -> Content | None:
    found = [facts.content(value) for value in node.inputs]
    parts = [part for part in found if part is not None]
    return None if len(parts) < len(found) else np.concatenate(parts, axis=attribute(node, "axis", 0))


def _reshape(facts: "Facts", node: ir.Node) -> Content | None:
    data, shape = _first(facts, node), facts.numbers(node.inputs[1])
    if data is None or shape is None or 0 in shape:
        return None
    return data.reshape(shape)


def _unsqueeze(facts: "Facts", node: ir.Node) -> Content | None:
    data = _first(facts, node)
    axes = attribute(node, "axes", None) or facts.numbers(node.inputs[1] if len(node.inputs) > 1 else None)
    return None if data is None or axes is None else np.expand_dims(data, tuple(axes))


def _squeeze(facts: "Facts", node: ir.Node) -> Content | None:
    data = _first(facts, node)
    if data is None:
        return None
    axes = axes_of(facts, node, data.ndim)
    return objects_of(data.squeeze(None if axes is None else tuple(axes)))


def _slice(facts: "Facts", node: ir.Node) -> Content | None:
    data, found = _first(facts, node), slices(facts, node)
    if data is None or found is None:
        return None
    for axis, (first, count, step) in found.items():
        if first.number is None or count.number is None:
            return None
        data = np.take(data, range(first.number, first.number + count.number * step, step), axis=axis)
    return data


def _split(facts: "Facts", node: ir.Node) -> Content | None:
    data, found = _first(facts, node), splits(facts, node)
    if data is None or found is None or found[1][0].number is None:
        return None
    return np.take(data, range(found[1][0].number), axis=found[0])


def _transpose(facts: "Facts", node: ir.Node) -> Content | None:
    """As the older exporter turns the widths of a Pad around."""
    data = _first(facts, node)
    return None if data is None else np.transpose(data, attribute(node, "perm", None))


def _cast(facts: "Facts", node: ir.Node) -> Content | None:
    data, kind = _first(facts, node), int(attribute(node, "to", 0))
    if data is None:
        return None
    elements = [_as_float(x) if kind in _FLOATS else _as_whole(x, kind) for x in data.flat]
    return None if None in elements else objects(elements, data.shape)


def _as_float(element: Any) -> float | Size | None:
    """A size without a number stays what it is: what exporters compute with floats, such as floor(seq / 2), comes of
    whole numbers, and no rule for floats takes it."""
    if isinstance(element, Size):
        return None if element.number is None else float(element.number)
    return float(element)


def _as_whole(element: Any, kind: int) -> Size | None:
    if kind == int(ir.DataType.BOOL):
        number = element.number if isinstance(element, Size) else element
        return None if number is None else Size.of(int(number != 0))
    if isinstance(element, Size):
        return element
    return Size.of(int(element)) if math.isfinite(element) else None


def _elementwise(act: Callable[..., Any]) -> Callable[["Facts", ir.Node], Content | None]:
    def rule(facts: "Facts", node: ir.Node) -> Content | None:
        found = [facts.content(value) for value in node.inputs if value is not None]
        parts = [part for part in found if part is not None]
        if len(parts) < len(found):
            return None
        grids = np.broadcast_arrays(*parts)
        elements = [act(*values) for values in zip(*(grid.flat for grid in grids), strict=True)]
        return None if any(element is None for element in elements) else objects(elements, grids[0].shape)

    return rule


def _sums(act: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def of(a: Any, b: Any) -> Any:
        return act(a, b) if isinstance(a, Size) == isinstance(b, Size) else None

    return of


def _divided(a: Any, b: Any) -> Any:
    if isinstance(a, Size) and isinstance(b, Size):
        if a.number is not None and b.number:
            return Size.of(int(a.number / b.number))
        whole = a.over(b)
        return Size.of(f"<{a}/{b}>") if whole is None else whole
    return None if isinstance(a, Size) or isinstance(b, Size) or b == 0 else a / b


def _power(a: Any, b: Any) -> Any:
    if isinstance(a, Size) or isinstance(b, Size):
        base, power = (x.number if isinstance(x, Size) else x for x in (a, b))
        if base is None or power is None or power < 0:
            return None
        result = base**power
        return Size.of(int(result)) if isinstance(a, Size) else float(result)
    return float(a) ** b if a >= 0 else None


def _remainder(a: Any, b: Any) -> Any:
    """Of numbers that are not negative, for which both kinds of Mod are one, and of multiples."""
    if not isinstance(a, Size) or not isinstance(b, Size) or b.number == 0:
        return None
    if a.number is not None and b.number is not None:
        return Size.of(a.number % b.number) if a.number >= 0 and b.number > 0 else None
    return Size() if a.over(b) is not None else None


def _float_only(act: Callable[[float], float]) -> Callable[[Any], Any]:
    def of(a: Any) -> Any:
        try:
            return None if isinstance(a, Size) else act(a)
        except (ValueError, ZeroDivisionError, OverflowError):
            return None

    return of


def _compared(act: Callable[[int | float, int | float], bool]) -> Callable[[Any, Any], Any]:
    def of(a: Any, b: Any) -> Any:
        left, right = (x.number if isinstance(x, Size) else x for x in (a, b))
        return None if left is None or right is None else Size.of(int(act(left, right)))

    return of


def _equal(a: Any, b: Any) -> Any:
    if a == b:
        return Size.of(1)
    if isinstance(a, Size) and isinstance(b, Size):
        difference = a - b
        # What cannot be 0: a size is never -1, which exporters ask when they expand.
        if (difference - 1).at_least_0({}) or (-difference - 1).at_least_0({}):
            return Size()
    return _compared(operator.eq)(a, b)


def _chosen(condition: Any, a: Any, b: Any) -> Any:
    if not isinstance(condition, Size) or condition.number is None:
        return None
    return a if condition.number else b


def _extreme(of_numbers: Callable[..., Any], larger: bool) -> Callable[..., Any]:
    def of(a: Any, b: Any) -> Any:
        if isinstance(a, Size) and isinstance(b, Size):
            if (a - b).at_least_0({}):
                return a if larger else b
            return (b if larger else a) if (b - a).at_least_0({}) else None
        return None if isinstance(a, Size) or isinstance(b, Size) else of_numbers(a, b)

    return of


def _constant_of_shape(facts: "Facts", node: ir.Node) -> Content | None:
    shape = facts.numbers(node.inputs[0])
    if shape is None or math.prod(shape) > 64:
        return None
    tensor = attribute(node, "value", None)
    value: Any = 0.0 if tensor is None else tensor.numpy().reshape(-1)[0]
    element = Size.of(int(value)) if isinstance(value, (np.integer, np.bool_)) else float(value)
    return objects([element] * math.prod(shape), shape)


def _range(facts: "Facts", node: ir.Node) -> Content | None:
    bounds = [facts.numbers(value) for value in node.inputs]
    if None in bounds:
        return None
    ((start,), (limit,), (step,)) = [bound for bound in bounds if bound is not None]
    if not step or (limit - start) // step > 64:
        return None
    numbers = [Size.of(number) for number in range(start, limit, step)]
    return objects(numbers, [len(numbers)])


CONTENTS: dict[str, Callable[["Facts", ir.Node], Content | None]] = {
    "Shape": _shape, "Size": _size, "Gather": _gather, "Concat": _concat, "Reshape": _reshape, "Slice": _slice,
    "Unsqueeze": _unsqueeze, "Squeeze": _squeeze, "Split": _split, "Cast": _cast, "Identity": _first,
    "Transpose": _transpose,
    "ConstantOfShape": _constant_of_shape, "Range": _range, "Where": _elementwise(_chosen),
    "Add": _elementwise(_sums(operator.add)), "Sub": _elementwise(_sums(operator.sub)),
    "Mul": _elementwise(_sums(operator.mul)), "Div": _elementwise(_divided), "Pow": _elementwise(_power),
    "Mod": _elementwise(_remainder),
    "Neg": _elementwise(operator.neg), "Sqrt": _elementwise(_float_only(math.sqrt)),
    "Reciprocal": _elementwise(_float_only(lambda x: 1 / x)), "Equal": _elementwise(_equal),
    "Min": _elementwise(_extreme(min, False)), "Max": _elementwise(_extreme(max, True)),
    "Less": _elementwise(_compared(operator.lt)), "Greater": _elementwise(_compared(operator.gt)),
    "LessOrEqual": _elementwise(_compared(operator.le)), "GreaterOrEqual": _elementwise(_compared(operator.ge)),
    "Not": _elementwise(lambda a: None if not isinstance(a, Size) or a.number is None else Size.of(1 - a.number)),
}  # fmt: skip
"""How an operator computes, where that can be followed. Numpy's broadcasting is ONNX's."""
