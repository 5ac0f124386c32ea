"""Masks that are added to scores of another shape: the windows of an image by themselves, as Swin's shifted ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from pyfmha.onnx.facts import Facts
from pyfmha.onnx.lifted import Lift, raised
from pyfmha.onnx.tensors import STANDARD


@dataclass(frozen=True)
class Regrouped:
    """Scores [groups * windows, ...] that are [groups, windows, ...] while something is added, and back.

    Attributes:
        scores: as they are before and after.
        added: for each mask its stand-in, of the shape of the scores or 1 an axis, and itself.
        windows: how many there are in a group.
    """

    scores: ir.Value
    added: tuple[tuple[ir.Value, ir.Value], ...]
    windows: int


def regrouped(facts: Facts, node: ir.Node) -> Regrouped | None:
    """What a Reshape ends; None where it is something else."""
    whole = facts.shape(node.outputs[0])
    found = _sums(facts, node.inputs[0], 4)
    if found is None or whole is None:
        return None
    scores, masks = found
    shape = None if node.inputs[0] is None else facts.shape(node.inputs[0])
    if shape is None or facts.shape(scores) != whole or len(shape) != len(whole) + 1 or not masks:
        return None
    windows = shape[1].number
    if windows is None or shape[0] * windows != whole[0] or shape[2:] != whole[1:]:
        return None
    added = []
    for mask in masks:
        own = facts.shape(mask)
        sizes = [] if own is None else [size.number for size in own]
        # Of the groups and the windows it has an axis of 1 and all: then it is repeated for each group.
        if len(sizes) != len(shape) or None in sizes or sizes[:2] != [1, windows]:
            return None
        made = ir.Value(name=f"{mask.name}_of_all", type=mask.type)
        facts.learn(made, (whole[0], *(own or ())[2:]))
        added.append((made, mask))
    return Regrouped(scores, tuple(added), windows)


def _sums(facts: Facts, value: ir.Value | None, depth: int) -> tuple[ir.Value, list[ir.Value]] | None:
    """Through sums back to a Reshape: its input, and what is added."""
    node = None if value is None else value.producer()
    if node is None or value is None or node.domain not in STANDARD or not depth:
        return None
    if node.op_type == "Reshape" and node.inputs[0] is not None:
        return node.inputs[0], []
    if node.op_type != "Add":
        return None
    left, right = node.inputs
    for side, mask in ((left, right), (right, left)):
        if side is None or mask is None or facts.shape(side) != facts.shape(value) or mask.dtype != side.dtype:
            continue
        found = _sums(facts, side, depth - 1)
        if found is not None:
            return found[0], [*found[1], mask]
    return None


def nodes_before(
    facts: Facts,
    q: ir.Value,
    times: tuple[ir.Value, Sequence[ir.Value]],
    parts: Sequence[Regrouped],
    lifts: Sequence[Lift],
) -> Callable[[Any], dict[ir.Value, ir.Value]] | None:
    """As :attr:`pyfmha.onnx.calls.Call.before`: Q times factors, and the masks of all windows of a batch.

    Args:
        facts: of the graph.
        q: a tensor whose first axis is that of the scores.
        times: what stands for Q times factors, and these.
        parts: what was added where.
        lifts: tensors whose heads lie within the batch.
    """
    if not times[1] and not parts and not lifts:
        return None

    def nodes(op: Any) -> dict[ir.Value, ir.Value]:
        from pyfmha.onnx.emit import constant, length

        real = raised(op, lifts)
        value = real.get(q, q)
        for factor in times[1]:
            value = real[times[0]] = op.Mul(value, real.get(factor, factor))
        for part in parts:
            groups = op.Div(length(op, real.get(q, q), 0), constant(op, [part.windows]))
            for made, mask in part.added:
                inner = [size.number or 0 for size in (facts.shape(mask) or ())[2:]]
                wide = op.Expand(mask, op.Concat(groups, constant(op, [part.windows, *inner]), axis=0))
                real[made] = op.Reshape(wide, constant(op, [-1, *inner]))
        return real

    return nodes
