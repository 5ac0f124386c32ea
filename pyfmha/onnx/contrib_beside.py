"""What ONNX Runtime's attention operators add to the scores: padding masks, biases and sinks.

Their forms are those of ONNX Runtime's documentation (docs/ContribOperators.md). It refuses at run time what is of
another shape, so a shape that is not proven here is still the one that it takes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from pyfmha.onnx.calls import Extra, Laid, LeftAloneError
from pyfmha.onnx.emit import constant, length, scalar
from pyfmha.onnx.facts import Facts
from pyfmha.onnx.sizes import Size
from pyfmha.onnx.standard import optional
from pyfmha.onnx.tensors import attribute

Real = dict[ir.Value, ir.Value]
"""The values of stand-ins, as far as they are made."""
Step = Callable[[Any, Real], Real]
"""Adds nodes that come before the plugin's, and tells the values of more stand-ins."""
Beside = tuple[list[Extra], list[Step]]
Lengths = Sequence[tuple[ir.Value, int]]
"""Tensors and their axes, whose sizes together are the number of keys."""


def chained(steps: Sequence[Step]) -> Callable[[Any], Real] | None:
    """All steps as :attr:`pyfmha.onnx.calls.Call.before` has them; None where there are none."""

    def of(op: Any) -> Real:
        real: Real = {}
        for step in steps:
            real |= step(op, real)
        return real

    return of if steps else None


def stand_in(name: str, kind: ir.DataType | None) -> ir.Value:
    """What a tensor is called before the nodes that give it are there."""
    return ir.Value(name=f"{name}_for_attention", type=None if kind is None else ir.TensorType(kind))


def total_of(k: Laid, past: ir.Value | None) -> Lengths:
    """Where the number of all keys is read from."""
    own = [(k.value, 1 if k.order in ("bsH", "bshd") else 2)]
    return own if past is None else [(past, 2), *own]


def counted(op: Any, count: Any) -> Any:
    """0, 1, ... as INT64: as many as a vector of one element says."""
    scalars = op.Constant(value=ir.tensor(np.asarray(0, np.int64))), op.Constant(value=ir.tensor(np.asarray(1)))
    return op.Range(scalars[0], op.Reshape(count, op.Constant(value=ir.tensor(np.zeros(0, np.int64)))), scalars[1])


def attention_bias(facts: Facts, node: ir.Node, index: int) -> list[Extra]:
    """An input [batch or 1, heads or 1, queries, keys] that is added to the scores.

    Raises:
        LeftAloneError: it is not known to have four axes.
    """
    bias = optional(node, index)
    if bias is None:
        return []
    shape = facts.shape(bias)
    if shape is None or len(shape) != 4:
        raise LeftAloneError(f"its attention_bias {bias.name} is not known to have four axes")
    return [Extra("bias", bias, "it has an attention_bias")]


def padding(facts: Facts, node: ir.Node, index: int, batch: Size, keys: Lengths) -> Beside:
    """A mask of whole numbers: of keys, of queries and keys, or where each sequence ends, and perhaps begins.

    A key that is hidden gets ``mask_filter_value`` added to its score, as ONNX Runtime does: a query whose keys are
    all hidden sees them all.

    Raises:
        LeftAloneError: it is not proven which form it has, or ONNX Runtime's CPU has no such form.
    """
    mask = optional(node, index)
    if mask is None:
        return [], []
    shape, name = facts.shape(mask), f"{node.op_type} {mask.name}"
    if shape is None or not 1 <= len(shape) <= 3:
        raise LeftAloneError(f"its mask {mask.name} is not known to have one, two or three axes")
    if len(shape) == 1 and shape[0] not in (batch, batch * 2):
        raise LeftAloneError(
            f"its mask {mask.name} is of shape [{shape[0]}], which is not proven to be batch or twice that"
        )
    low = float(attribute(node, "mask_filter_value", -10000.0))
    made = stand_in(name, ir.DataType.FLOAT)

    def step(op: Any, real: Real) -> Real:
        zero = op.Constant(value=ir.tensor(np.asarray(0, np.int32)))
        if len(shape) == 1:
            shown = _between(op, mask, shape[0] != batch, _summed(op, real, keys), real)
        else:
            shown = op.Greater(mask, zero)
        added = op.Where(shown, scalar(op, 0.0), scalar(op, low))
        if len(shape) == 3:  # one more axis behind the first
            sizes = op.Shape(mask)
            first, rest = (op.Slice(sizes, *(constant(op, [at]) for at in ends)) for ends in ((0, 1, 0), (1, 3, 0)))
            return {made: op.Reshape(added, op.Concat(first, constant(op, [1]), rest, axis=0))}
        return {made: op.Reshape(added, constant(op, [0, 1, 1, -1]))}

    return [Extra("bias", made, "it has a padding mask")], [step]


def _summed(op: Any, real: Real, keys: Lengths) -> Any:
    first, *others = (length(op, real.get(value, value), axis) for value, axis in keys)
    return op.Add(first, *others) if others else first


def _between(op: Any, mask: ir.Value, starts: bool, total: Any, real: Real) -> Any:
    """Which keys lie before the end of a sequence, and behind its start: [batch, keys]."""
    at, given = counted(op, total), op.Cast(mask, to=int(ir.DataType.INT64))
    columns = op.Reshape(given, constant(op, [2, -1, 1] if starts else [-1, 1]))
    if not starts:
        return op.Less(at, columns)
    end, start = (op.Gather(columns, op.Constant(value=ir.tensor(np.asarray(half))), axis=0) for half in (0, 1))
    return op.And(op.Less(at, end), op.Not(op.Less(at, start)))


def sinks(facts: Facts, node: ir.Node, index: int, heads: int) -> Beside:
    """``head_sink`` [heads], or a sink of 0 for each with ``smooth_softmax``.

    Raises:
        LeftAloneError: it is not proven to be of that shape.
    """
    sink = optional(node, index)
    if sink is not None:
        shape = facts.shape(sink)
        if shape is not None and shape != (Size.of(heads),):
            raise LeftAloneError(f"its head_sink {sink.name} is of shape {[*map(str, shape)]}, not [{heads}]")
        return [Extra("sinks", sink, "it has a head_sink")], []
    if attribute(node, "smooth_softmax", 0) != 1:
        return [], []
    made = stand_in(f"{node.op_type} {node.outputs[0].name} sinks", ir.DataType.FLOAT)

    def step(op: Any, real: Real) -> Real:
        return {made: op.Constant(value=ir.tensor(np.zeros(heads, np.float32)))}

    return [Extra("sinks", made, "it has smooth_softmax")], [step]
