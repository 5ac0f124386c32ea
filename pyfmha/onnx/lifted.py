"""Products of tensors whose heads lie within the batch, where Softmax has them on an axis of their own: as BLOOM's."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from pyfmha.onnx.calls import LeftAloneError
from pyfmha.onnx.facts import Facts
from pyfmha.onnx.sizes import Size
from pyfmha.onnx.tensors import Shape

Lift = tuple[ir.Value, ir.Value, int]
"""What stands for a tensor with an axis of heads, that tensor [batch * heads, ...], and how many heads there are."""


def is_joined(apart: Shape | None, joined: Shape | None) -> bool:
    """Whether the one shape is [batch, heads, ...], the other [batch * heads, ...], and heads are a number."""
    if apart is None or joined is None or len(apart) != 4 or len(joined) != 3 or apart[1].number is None:
        return False
    return apart[0] * apart[1] == joined[0] and apart[2:] == joined[1:]


def lifted(facts: Facts, value: ir.Value, heads: int, lifts: list[Lift]) -> ir.Value:
    """A tensor [batch * heads, ...] as [batch, heads, ...]; one that has no such axis is broadcast as it is.

    Args:
        facts: of the graph; it learns the shape.
        value: the tensor.
        heads: how many.
        lifts: to which it is added.

    Raises:
        LeftAloneError: it is not proven to be such a tensor.
    """
    shape = facts.shape(value)
    if shape is not None and (len(shape) < 3 or shape[0].number == 1):
        return value
    batch = None if shape is None or len(shape) != 3 else shape[0].over(heads)
    if shape is None or batch is None:
        raise LeftAloneError(f"the heads of {value.name} lie within its batch, and it is not proven how many there are")
    made = ir.Value(name=f"{value.name}_with_heads", type=value.type)
    facts.learn(made, (batch, Size.of(heads), *shape[1:]))
    lifts.append((made, value, heads))
    return made


def raised(op: Any, lifts: Sequence[Lift]) -> dict[ir.Value, ir.Value]:
    """Nodes for the stand-ins."""
    from pyfmha.onnx.emit import constant

    real = {}
    for made, value, heads in lifts:
        sizes = op.Slice(op.Shape(value), *(constant(op, [number]) for number in (1, 3, 0)))
        real[made] = op.Reshape(value, op.Concat(constant(op, [-1, heads]), sizes, axis=0))
    return real
