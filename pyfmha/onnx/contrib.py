"""ONNX Runtime's operators: ``MultiHeadAttention``, ``GroupQueryAttention`` and ``Attention`` of domain com.microsoft.

Their meaning is that of ONNX Runtime's documentation (docs/ContribOperators.md) and of its CPU implementation.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from pyfmha.onnx.calls import Call, Laid, LeftAloneError, Visible
from pyfmha.onnx.contrib_beside import Real, Step, attention_bias, chained, padding, stand_in, total_of
from pyfmha.onnx.emit import constant
from pyfmha.onnx.facts import Facts
from pyfmha.onnx.sizes import Size
from pyfmha.onnx.standard import check_past, heads_of, optional, past_of, used
from pyfmha.onnx.tensors import Shape, attribute

DOMAIN = "com.microsoft"
Past = tuple[ir.Value, ir.Value] | None
Parts = tuple[Laid, Laid, Laid]


def refuse(node: ir.Node, known: Sequence[int], inputs: dict[int, str], outputs: dict[int, str]) -> None:
    """Refuse inputs that are not among the known ones, and outputs that are read.

    Raises:
        LeftAloneError: naming the first.
    """
    for index, value in enumerate(node.inputs):
        if value is not None and index not in known:
            what = inputs.get(index, f"{value.name}, which is number {index},")
            raise LeftAloneError(f"its input {what} is given: the plugin's node is not proven to do the same")
    for index, what in outputs.items():
        if used(node, index):
            raise LeftAloneError(f"its output {what} is read")


def check_attributes(node: ir.Node, allowed: dict[str, Any]) -> None:
    """Refuse attributes that are not known here, and those that must have one value and have another.

    Raises:
        LeftAloneError: naming the first.
    """
    for name in sorted(node.attributes):
        if name not in allowed:
            raise LeftAloneError(f"its attribute {name} is not known here")
        wanted, value = allowed[name], attribute(node, name, None)
        if wanted is not None and value != wanted:
            raise LeftAloneError(f"its attribute {name} is {value}, which the plugin's node does not do")


def scale_of(node: ir.Node, size: Size) -> float:
    """Of the scores: 0 is none, as in ONNX Runtime.

    Raises:
        LeftAloneError: the head size is no number.
    """
    scale = attribute(node, "scale", 0.0)
    if scale:
        return float(scale)
    if not size.number:
        raise LeftAloneError(f"the head size, {size}, must be a number")
    return 1 / math.sqrt(size.number)


def name_of(node: ir.Node) -> str:
    """A node's name, or that of its first output."""
    return node.name or node.outputs[0].name or ""


def parts_of(value: ir.Value, shape: Shape, heads: tuple[int, int, int], hidden: Sequence[Size]) -> Parts:
    """Q, K and V in one tensor [batch, seq, columns], of so many heads and columns each.

    Raises:
        LeftAloneError: the columns are not proven to be those of the heads.
    """
    first, parts = 0, list[Laid]()
    for count, columns in zip(heads, hidden, strict=True):
        size = columns.over(count)
        if size is None or size.number is None or columns.number is None:
            raise LeftAloneError(f"its packed input has {shape[2]} columns, which are not proven to be heads {heads}")
        parts.append(Laid(value, "bsH", (shape[0], Size.of(count), shape[1], size), first, part=True))
        first += columns.number
    if shape[2].number != first:
        raise LeftAloneError(f"its packed input has {shape[2]} columns, not the {first} of Q, K and V")
    q, k, v = parts
    return q, k, v


def read_multi_head(facts: Facts, node: ir.Node) -> Call:
    """Understand a ``MultiHeadAttention``.

    Raises:
        LeftAloneError: it does something that is not proven to be what the plugin computes.
    """
    check_attributes(node, {"num_heads": None, "mask_filter_value": None, "scale": None, "unidirectional": None})
    refuse(node, range(8), {8: "past_sequence_length", 9: "cache_indirection"}, {3: "qk"})
    heads = attribute(node, "num_heads", 0)
    query, key, value = (optional(node, index) for index in range(3))
    bias = optional(node, 3)
    past, present = past_of(node, 6), used(node, 1) or used(node, 2)
    if query is not None and (key is None or value is None):
        if bias is not None:
            raise LeftAloneError("it has a bias, and Q, K and V in one tensor")
        laid, steps = _interleaved(facts, node, query, key)
    else:
        q = heads_of(facts, query, heads, "Q")
        k, v = heads_of(facts, key, heads, "K"), heads_of(facts, value, heads, "V")
        laid, steps = ((q, k, v), list[Step]()) if bias is None else _with_bias((q, k, v), bias)
    call = Call(
        name_of(node), *laid, scale_of(node, laid[0].sizes[3]), visible=_causal(node, past), out_order="bsH",
        past=past, present=present,
    )  # fmt: skip
    return _with_masks(facts, node, call, (4, 5), steps)


def _with_masks(facts: Facts, node: ir.Node, call: Call, at: tuple[int, int], steps: list[Step]) -> Call:
    """With the mask and the bias that two inputs are, and all nodes that come before."""
    past = None
    if call.past is not None:
        past = call.past[0]
        check_past(facts, call.past, call.k)
    extras, more = padding(facts, node, at[0], call.q.sizes[0], total_of(call.k, past))
    return replace(call, extras=[*extras, *attention_bias(facts, node, at[1])], before=chained([*steps, *more]))


def _with_bias(real: Parts, bias: ir.Value) -> tuple[Parts, list[Step]]:
    """Q, K and V with the bias of their projection."""
    if any(laid.order != "bsH" for laid in real):
        raise LeftAloneError("it has a bias, and K and V of four axes")
    q, k, v = (replace(laid, value=stand_in(f"{laid.value.name}_biased", laid.value.dtype)) for laid in real)

    def step(op: Any, _: Real) -> Real:
        first, made = 0, {}
        for laid, other in zip(real, (q, k, v), strict=True):
            count = (laid.sizes[1].number or 0) * (laid.sizes[3].number or 0)
            ends = (constant(op, [number]) for number in (first, first + count, 0))
            made[other.value] = op.Add(laid.value, op.Slice(bias, *ends))
            first += count
        return made

    return (q, k, v), [step]


def _interleaved(facts: Facts, node: ir.Node, query: ir.Value, key: ir.Value | None) -> tuple[Parts, list[Step]]:
    """Q, K and V as [batch, seq, heads, 3, head size], or Q by itself and K and V as [batch, seq, heads, 2, head size].

    Each part is taken out before the node: their heads do not lie behind each other, as the plugin's one tensor has it.
    """
    held, count = (query, 3) if key is None else (key, 2)
    shape = facts.shape(held)
    heads = Size.of(attribute(node, "num_heads", 0))
    if shape is None or len(shape) != 5 or shape[2] != heads or shape[3] != Size.of(count):
        given = "not known" if shape is None else [str(size) for size in shape]
        raise LeftAloneError(f"its packed input's shape is {given}, not [batch, seq, {heads}, {count}, head size]")
    sizes = (shape[0], shape[2], shape[1], shape[4])
    taken = [stand_in(f"{held.name}_{part}", held.dtype) for part in "QKV"[-count:]]
    parts = [Laid(value, "bshd", sizes) for value in taken]
    if key is not None:
        parts = [heads_of(facts, query, heads.number, "Q"), *parts]

    def step(op: Any, _: Real) -> Real:
        at = [op.Constant(value=ir.tensor(np.asarray(index, np.int64))) for index in range(count)]
        return {value: op.Gather(held, index, axis=3) for value, index in zip(taken, at, strict=True)}

    q, k, v = parts
    return (q, k, v), [step]


def _causal(node: ir.Node, past: Past = None) -> Visible:
    """``unidirectional`` is aligned to the first key of this step: with earlier ones, to the last query and key."""
    return Visible(causal=bool(attribute(node, "unidirectional", 0)), bottom_right=past is not None)


def read_attention(facts: Facts, node: ir.Node) -> Call:
    """Understand an ``Attention`` with the projection in it.

    Raises:
        LeftAloneError: it does something that is not proven to be what the plugin computes.
    """
    allowed = {"num_heads": None, "unidirectional": None, "scale": None, "mask_filter_value": None, "do_rotary": 0}
    check_attributes(node, {**allowed, "qkv_hidden_sizes": None, "past_present_share_buffer": 0})
    refuse(node, range(6), {6: "past_sequence_length"}, {})
    heads = attribute(node, "num_heads", 0)
    tokens, weights, bias = (optional(node, index) for index in range(3))
    shapes = [None if value is None else facts.shape(value) for value in (tokens, weights)]
    if tokens is None or weights is None or shapes[0] is None or shapes[1] is None or len(shapes[0]) != 3:
        raise LeftAloneError("the shapes of its input and weights are not known")
    packed = stand_in(f"{tokens.name}_projected", tokens.dtype)
    shape = (*shapes[0][:2], shapes[1][1])
    hidden = [Size.of(size) for size in attribute(node, "qkv_hidden_sizes", None) or ()]
    hidden = hidden or [shape[2].over(3) or shape[2]] * 3
    q, k, v = parts_of(packed, shape, (heads, heads, heads), hidden)

    def projected(op: Any, _: Real) -> Real:
        product = op.MatMul(tokens, weights)
        return {packed: product if bias is None else op.Add(product, bias)}

    past, steps = _halves(facts, node, optional(node, 4))
    scale = scale_of(node, q.sizes[3])
    call = Call(
        name_of(node), q, k, v, scale, visible=_causal(node, past), out_order="bsH",
        packed=(packed, scale), past=past, present=used(node, 1), stacked=True,
    )  # fmt: skip
    return _with_masks(facts, node, call, (3, 5), [projected, *steps])


def _halves(facts: Facts, node: ir.Node, past: ir.Value | None) -> tuple[Past, list[Step]]:
    """The keys and values of earlier steps, which are one tensor [2, batch, heads, past, head size]."""
    if past is None:
        return None, []
    shape = facts.shape(past)
    if shape is None or len(shape) != 5:
        raise LeftAloneError(f"its past {past.name} is not known to have five axes")
    halves = tuple(stand_in(f"{past.name}_{half}", past.dtype) for half in ("key", "value"))
    for half in halves:
        facts.learn(half, shape[1:])

    def step(op: Any, _: Real) -> Real:
        at = [op.Constant(value=ir.tensor(np.asarray(index, np.int64))) for index in range(2)]
        return {half: op.Gather(past, index, axis=0) for half, index in zip(halves, at, strict=True)}

    return (halves[0], halves[1]), [step]
