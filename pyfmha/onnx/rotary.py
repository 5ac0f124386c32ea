"""Rotated positions in ONNX's elementwise operators.

TensorRT's parser knows ONNX's RotaryEmbedding, but refuses one whose angles are those of a single sequence while the
batch is free, which is what PyTorch's exporter writes of a model without position ids.
"""

from typing import Any

import onnx_ir as ir

from pyfmha.onnx.emit import constant
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
    """Whether TensorRT's parser refuses a RotaryEmbedding of ONNX for its angles, and it can be written out."""
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
    rows, tables = node.inputs[0], (node.inputs[1], node.inputs[2])
    shape, angles = facts.shape(rows) or (), facts.shape(tables[0]) or ()  # type: ignore[arg-type]
    half, paired = angles[2].number or 0, bool(attribute(node, "interleaved", 0))
    if len(shape) == 4:  # [batch, heads, seq, head size]
        wide = tuple(op.Unsqueeze(table, constant(op, [1])) for table in tables)
        return turned(op, rows, (wide[0], wide[1]), half, shape[3].number, paired)
    heads = attribute(node, "num_heads", 0)
    size = shape[2].over(heads)
    apart = op.Reshape(rows, constant(op, [0, 0, heads, -1]))
    wide = tuple(op.Unsqueeze(table, constant(op, [2])) for table in tables)
    result = turned(op, apart, (wide[0], wide[1]), half, None if size is None else size.number, paired)
    return op.Reshape(result, op.Shape(rows))
