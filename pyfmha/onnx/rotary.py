"""Rotated positions in ONNX's elementwise operators.

TensorRT's parser knows ONNX's RotaryEmbedding, but refuses one whose angles are those of a single sequence while the
batch is free, which is what PyTorch's exporter writes of a model without position ids. ONNX Runtime's it does not know.
"""

from typing import Any

import onnx_ir as ir

from pyfmha.onnx.contrib import DOMAIN
from pyfmha.onnx.contrib_beside import counted
from pyfmha.onnx.emit import constant, length
from pyfmha.onnx.facts import Facts
from pyfmha.onnx.standard import optional
from pyfmha.onnx.tensors import attribute


def turned(op: Any, rows: Any, angles: tuple[Any, Any], half: int, size: int | None, paired: bool) -> Any:
    """A tensor of four axes, whose last is turned.

    Args:
        op: the rewriter's builder.
        rows: the tensor.
        angles: cosines and sines, of as many axes; the last of size `half`.
        half: how many pairs of numbers are turned.
        size: of the last axis; None where it is not known.
        paired: whether a pair are neighbours; else they lie `half` apart.
    """
    cosines, sines = angles
    one, other = _pair(op, rows, half, paired)
    first = op.Sub(op.Mul(one, cosines), op.Mul(other, sines))
    second = op.Add(op.Mul(one, sines), op.Mul(other, cosines))
    whole = _joined(op, first, second, half) if paired else op.Concat(first, second, axis=3)
    if size == 2 * half:
        return whole
    return op.Concat(whole, _columns(op, rows, 2 * half, (1 << 63) - 1 if size is None else size), axis=3)


def _columns(op: Any, rows: Any, first: int, last: int, step: int = 1) -> Any:
    return op.Slice(rows, *(constant(op, [number]) for number in (first, last, 3, step)))


def _pair(op: Any, rows: Any, half: int, paired: bool) -> tuple[Any, Any]:
    if paired:
        return _columns(op, rows, 0, 2 * half, 2), _columns(op, rows, 1, 2 * half, 2)
    return _columns(op, rows, 0, half), _columns(op, rows, half, 2 * half)


def _joined(op: Any, first: Any, second: Any, half: int) -> Any:
    """Pairs as neighbours again."""
    flat = (op.Reshape(part, constant(op, [0, 0, -1, 1])) for part in (first, second))
    return op.Reshape(op.Concat(*flat, axis=3), constant(op, [0, 0, -1, 2 * half]))


def is_refused(facts: Facts, node: ir.Node) -> bool:
    """Whether TensorRT's parser refuses a RotaryEmbedding, and it can be written out."""
    return _is_known(facts, node) if node.domain == DOMAIN else _is_of_one_sequence(facts, node)


def _is_known(facts: Facts, node: ir.Node) -> bool:
    """Whether what ONNX Runtime's needs is known: docs/ContribOperators.md."""
    shapes = [facts.shape(value) for value in node.inputs if value is not None]
    if len(shapes) != 4 or None in shapes or not shapes[2][1].number:  # type: ignore[index]
        return False
    if attribute(node, "is_packed_batching", 0) or attribute(node, "scale", 1.0) != 1.0 or len(shapes[1] or ()) > 2:
        return False
    return len(shapes[0] or ()) == 4 or (len(shapes[0] or ()) == 3 and _heads_of(facts, node) is not None)


def _heads_of(facts: Facts, node: ir.Node) -> int | None:
    """The number of heads in a row of ONNX Runtime's, which need not say it where whole heads are turned."""
    shape, angles = facts.shape(node.inputs[0]) or (), facts.shape(node.inputs[2]) or ()  # type: ignore[arg-type]
    if attribute(node, "num_heads", 0):
        return int(attribute(node, "num_heads", 0))
    heads = shape[2].over(2 * (angles[1].number or 0))
    return None if heads is None else heads.number


def _picked(op: Any, facts: Facts, node: ir.Node, axis: int) -> tuple[Any, Any]:
    """Cosines and sines of ONNX Runtime's positions: those of each row, or the first of all sequences."""
    rows, at, *tables = (optional(node, index) for index in range(4))
    assert rows is not None
    assert at is not None
    if len(facts.shape(at) or ()) < 2:
        at = op.Reshape(op.Add(counted(op, length(op, rows, axis)), at), constant(op, [1, -1]))
    return op.Gather(tables[0], at, axis=0), op.Gather(tables[1], at, axis=0)


def _is_of_one_sequence(facts: Facts, node: ir.Node) -> bool:
    rows, cosines, positions = (optional(node, index) for index in (0, 1, 3))
    if rows is None or cosines is None or positions is not None:
        return False
    shape, angles = facts.shape(rows), facts.shape(cosines)
    if shape is None or angles is None or len(angles) != 3 or not angles[2].number:
        return False
    known = len(shape) == 4 or (len(shape) == 3 and bool(attribute(node, "num_heads", 0)))
    return known and angles[0].number == 1 and shape[0] != angles[0]


def written_out(op: Any, facts: Facts, node: ir.Node) -> Any:
    """Such a RotaryEmbedding in elementwise operators."""
    rows, theirs = node.inputs[0], node.domain == DOMAIN
    shape, angles = facts.shape(rows) or (), facts.shape(node.inputs[2]) or ()  # type: ignore[arg-type]
    half, paired = angles[-1].number or 0, bool(attribute(node, "interleaved", 0))
    tables = _picked(op, facts, node, len(shape) - 2) if theirs else (node.inputs[1], node.inputs[2])
    if len(shape) == 4:  # [batch, heads, seq, head size]
        wide = tuple(op.Unsqueeze(table, constant(op, [1])) for table in tables)
        return turned(op, rows, (wide[0], wide[1]), half, shape[3].number, paired)
    heads = (_heads_of(facts, node) if theirs else attribute(node, "num_heads", 0)) or 0
    size = shape[2].over(heads)
    apart = op.Reshape(rows, constant(op, [0, 0, heads, -1]))
    wide = tuple(op.Unsqueeze(table, constant(op, [2])) for table in tables)
    result = turned(op, apart, (wide[0], wide[1]), half, None if size is None else size.number, paired)
    return op.Reshape(result, op.Shape(rows))
