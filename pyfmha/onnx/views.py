"""Operators that only move elements, followed backwards: which element of the input an element of the output is."""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from pyfmha.onnx.facts import Facts
from pyfmha.onnx.shape_rules import axes_of, slices, splits
from pyfmha.onnx.sizes import Size, product
from pyfmha.onnx.tensors import STANDARD, Shape, attribute

Origin = tuple[ir.Value, Shape]
"""A value and the index of one of its elements."""
Bounds = dict[str, Size]


def origin(facts: Facts, value: ir.Value, index: Shape, bounds: Bounds) -> Origin | None:
    """Where an element of an operator's output comes from; None where it is computed, or that is not proven."""
    node = value.producer()
    if node is None or node.domain not in STANDARD or node.op_type not in _MOVES:
        return None
    source = node.inputs[0]
    shape = None if source is None else facts.shape(source)
    if source is None or shape is None:
        return None
    return _MOVES[node.op_type](facts, node, index, bounds)


def _same(facts: Facts, node: ir.Node, index: Shape, bounds: Bounds) -> Origin | None:
    return _source(node), index


def _source(node: ir.Node) -> ir.Value:
    source = node.inputs[0]
    assert source is not None
    return source


def _shape(facts: Facts, node: ir.Node) -> Shape:
    shape = facts.input_shape(node, 0)
    assert shape is not None
    return shape


def _transpose(facts: Facts, node: ir.Node, index: Shape, bounds: Bounds) -> Origin | None:
    order = attribute(node, "perm", None) or range(len(index))[::-1]
    found: list[Size] = list(index)
    for at, axis in enumerate(order):
        found[axis] = index[at]
    return _source(node), tuple(found)


def _unsqueeze(facts: Facts, node: ir.Node, index: Shape, bounds: Bounds) -> Origin | None:
    axes = axes_of(facts, node, len(index))
    if axes is None:
        return None
    return _source(node), tuple(at for axis, at in enumerate(index) if axis not in axes)


def _squeeze(facts: Facts, node: ir.Node, index: Shape, bounds: Bounds) -> Origin | None:
    shape = _shape(facts, node)
    axes = axes_of(facts, node, len(shape))
    if axes is None or len(axes) + len(index) != len(shape):
        return None
    rest = iter(index)
    return _source(node), tuple(Size() if axis in axes else next(rest) for axis in range(len(shape)))


def broadcast_index(index: Shape, out: Shape | None, shape: Shape) -> Shape | None:
    """The index into an input that is broadcast; None where it is not proven along which axes it is."""
    if out is None or len(shape) > len(out) or len(index) != len(out):
        return None
    found = []
    for at, size, own in zip(index[len(out) - len(shape) :], out[len(out) - len(shape) :], shape, strict=True):
        if own == size:
            found.append(at)
        elif own.number == 1:
            found.append(Size())
        else:
            return None
    return tuple(found)


def _expand(facts: Facts, node: ir.Node, index: Shape, bounds: Bounds) -> Origin | None:
    found = broadcast_index(index, facts.shape(node.outputs[0]), _shape(facts, node))
    return None if found is None else (_source(node), found)


def _tile(facts: Facts, node: ir.Node, index: Shape, bounds: Bounds) -> Origin | None:
    shape, out = _shape(facts, node), facts.shape(node.outputs[0])
    found = []
    for own, size, at in zip(shape, out or (), index, strict=False):
        halves = (Size(), Size()) if own.number == 1 else (Size(), at) if own == size else at.split(own, bounds)
        if halves is None:
            return None
        found.append(halves[1])
    return (_source(node), tuple(found)) if len(found) == len(shape) else None


def _slice(facts: Facts, node: ir.Node, index: Shape, bounds: Bounds) -> Origin | None:
    found = slices(facts, node)
    if found is None:
        return None
    whole = {axis: (first, step) for axis, (first, _, step) in found.items()}
    return _source(node), tuple(
        at * whole[axis][1] + whole[axis][0] if axis in whole else at for axis, at in enumerate(index)
    )


def _split(facts: Facts, node: ir.Node, index: Shape, bounds: Bounds, output: int = 0) -> Origin | None:
    found = splits(facts, node)
    if found is None:
        return None
    axis, parts = found
    before = sum(parts[:output], Size())
    return _source(node), (*index[:axis], index[axis] + before, *index[axis + 1 :])


def _gather(facts: Facts, node: ir.Node, index: Shape, bounds: Bounds) -> Origin | None:
    """One element of an axis; lists of indices are :mod:`pyfmha.onnx.elements`'."""
    indices = node.inputs[1]
    numbers, shape = facts.numbers(indices), None if indices is None else facts.shape(indices)
    if numbers is None or len(numbers) != 1 or shape is None:
        return None
    source = _shape(facts, node)
    axis = attribute(node, "axis", 0) % len(source)
    at = Size.of(numbers[0]) if numbers[0] >= 0 else source[axis] + numbers[0]
    return _source(node), (*index[:axis], at, *index[axis + len(shape) :])


def _reshape(facts: Facts, node: ir.Node, index: Shape, bounds: Bounds) -> Origin | None:
    out = facts.shape(node.outputs[0])
    found = None if out is None else reshaped(index, out, _shape(facts, node), bounds)
    return None if found is None else (_source(node), found)


def reshaped(index: Shape, out: Shape, shape: Shape, bounds: Bounds) -> Shape | None:
    """The index before a Reshape from ``shape`` to ``out``, by the smallest groups of axes of one product."""
    result: list[Size] = []
    left = right = 0
    while left < len(out) or right < len(shape):
        ends = _group(out, shape, left, right)
        if ends is None:
            return None
        flat = Size()
        for axis in range(left, ends[0]):
            flat = flat * out[axis] + index[axis]
        flat, part = flat.joined(), []
        for axis in range(ends[1] - 1, right, -1):
            halves = (flat, Size()) if shape[axis].number == 1 else flat.split(shape[axis], bounds)
            if halves is None:
                return None
            flat, rest = halves
            part.append(rest)
        if right < ends[1]:
            part.append(flat)
        result += reversed(part)
        left, right = ends
    return tuple(result)


def _group(out: Shape, shape: Shape, left: int, right: int) -> tuple[int, int] | None:
    """The ends of the smallest groups of axes, from given ones on, that hold as many elements."""
    candidates = [(a, b) for a in range(left, len(out) + 1) for b in range(right, len(shape) + 1)]
    for a, b in sorted(candidates, key=sum):
        if (a, b) != (left, right) and product(out[left:a]) == product(shape[right:b]):
            # Axes of size 1 that follow belong to no other group.
            if (a < len(out) and b == len(shape)) or (b < len(shape) and a == len(out)):
                rest = (*out[a:], *shape[b:])
                if all(size.number == 1 for size in rest):
                    return len(out), len(shape)
            return a, b
    return None


_MOVES: dict[str, Callable[[Facts, ir.Node, Shape, Bounds], Origin | None]] = {
    "Identity": _same, "Transpose": _transpose, "Unsqueeze": _unsqueeze, "Squeeze": _squeeze, "Expand": _expand,
    "Tile": _tile, "Slice": _slice, "Gather": _gather, "Reshape": _reshape, "Flatten": _reshape,
}  # fmt: skip


def moved(facts: Facts, value: ir.Value, index: Shape, bounds: Bounds) -> Origin | None:
    """As :func:`origin`, with the parts of a Split."""
    node = value.producer()
    if node is not None and node.op_type == "Split" and node.domain in STANDARD:
        output = value.index()
        if facts.input_shape(node, 0) is None or output is None:
            return None
        return _split(facts, node, index, bounds, output)
    return origin(facts, value, index, bounds)


def chain(facts: Facts, value: ir.Value, index: Shape, bounds: Bounds) -> list[Any]:
    """All origins of an element, one behind the other, the value itself first."""
    found = [(value, index)]
    while (further := moved(facts, *found[-1], bounds)) is not None:
        found.append(further)
    return found
