"""ONNX's own operator ``Attention``, of opset 23 and later."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from pyfmha.onnx import masks
from pyfmha.onnx.calls import DTYPES, Call, Extra, Laid, LeftAloneError, Visible
from pyfmha.onnx.elements import Elements
from pyfmha.onnx.emit import constant, length
from pyfmha.onnx.facts import Facts
from pyfmha.onnx.laid import DEPTH, alike, operand, packed, with_heads
from pyfmha.onnx.masks import BATCH, HEAD, KEY, NOTHING_HIDDEN, QUERY, Seen
from pyfmha.onnx.sizes import Size
from pyfmha.onnx.tensors import attribute
from pyfmha.onnx.views import broadcast_index

KNOWN = {
    *("is_causal", "kv_num_heads", "left_window_size", "q_num_heads", "qk_matmul_output_mode", "right_window_size"),
    *("scale", "softcap", "softmax_precision"),
}
"""The attributes of opsets 23 to 25. A later opset may have more, which mean something that is not known here."""


def optional(node: ir.Node, index: int) -> ir.Value | None:
    """An input, where the node has it."""
    return node.inputs[index] if index < len(node.inputs) else None


def used(node: ir.Node, index: int) -> bool:
    """Whether somebody reads an output."""
    if index >= len(node.outputs):
        return False
    value = node.outputs[index]
    return bool(value.uses()) or value.is_graph_output()


def heads_of(facts: Facts, value: ir.Value | None, heads: int | None, what: str) -> Laid:
    """Q, K or V, of four axes, or of three with the heads in the last.

    Raises:
        LeftAloneError: its shape is not known, or its heads are not.
    """
    shape = None if value is None else facts.shape(value)
    if value is None or shape is None:
        raise LeftAloneError(f"the shape of {what} is not known")
    if len(shape) == 4:
        return Laid(value, "bhsd", (shape[0], shape[1], shape[2], shape[3]))
    if len(shape) != 3 or not heads:
        raise LeftAloneError(f"{what} has {len(shape)} axes and {heads or 'no'} heads; give 4 axes, or 3 and heads")
    size = shape[2].over(heads)
    if size is None:
        raise LeftAloneError(f"the last axis of {what}, {shape[2]}, is not proven to be {heads} heads")
    return Laid(value, "bsH", (shape[0], Size.of(heads), shape[1], size))


def read(facts: Facts, node: ir.Node) -> Call:
    """Understand an ``Attention``.

    Raises:
        LeftAloneError: it does something that is not proven to be what the plugin computes.
    """
    unknown = sorted(set(node.attributes) - KNOWN)
    if unknown:
        raise LeftAloneError(f"its attribute {', '.join(unknown)} is not known here")
    if used(node, 3):
        raise LeftAloneError("its output qk_matmul_output is read, which a fused kernel never has")
    heads, kv_heads = attribute(node, "q_num_heads", None), attribute(node, "kv_num_heads", None)
    q = heads_of(facts, optional(node, 0), heads, "Q")
    k = heads_of(facts, optional(node, 1), kv_heads, "K")
    v = heads_of(facts, optional(node, 2), kv_heads, "V")
    past = past_of(node, 4)
    if past is not None:
        check_past(facts, past, k)
    total = k.sizes[2] + (facts.shape(past[0]) or ())[2] if past else k.sizes[2]
    size = q.sizes[3].number
    scale = attribute(node, "scale", None)
    if scale is None:
        if not size:
            raise LeftAloneError(f"the head size, {q.sizes[3]}, must be a number")
        scale = 1 / math.sqrt(size)
    visible, extras = _visible(facts, node, q, total, past)
    before = None
    if extras and (facts.shape(extras[0].value) or ())[-1] != total:
        extras, before = _filled_up(node, extras[0], past)
    order, packed, present = q.order, None, used(node, 1) or used(node, 2)
    if past is None and not present:  # the keys of all steps must be those that the operator has
        (q, k, v), scale, packed = _looked_through(facts, q, k, v, total, scale)
    return Call(
        node.name or node.outputs[0].name or "",
        q, k, v,
        scale=scale,
        softcap=attribute(node, "softcap", 0.0),
        visible=visible,
        out_order=order,
        extras=extras,
        before=before,
        past=past,
        present=present,
        packed=packed,
    )  # fmt: skip


def _looked_through(
    facts: Facts, q: Laid, k: Laid, v: Laid, total: Size, scale: float
) -> tuple[tuple[Laid, Laid, Laid], float, tuple[ir.Value, float] | None]:
    """Q, K and V where they really lie, the scale that goes with it, and the tensor that they are parts of."""
    if q.order != "bhsd":
        return (q, k, v), scale, None
    bounds = {BATCH: q.sizes[0], HEAD: q.sizes[1], QUERY: q.sizes[2], KEY: total, DEPTH: q.sizes[3]}
    first, second, third = (
        operand(facts, laid.value, "bhsd", laid.sizes[1], row, bounds | {HEAD: laid.sizes[1]})
        for laid, row in ((q, QUERY), (k, KEY), (v, KEY))
    )
    first, (second, third) = with_heads(first, q.sizes[1]), alike(second, third)
    if third.scale != 1:
        return (q, k, v), scale, None
    joint = packed(first, second, third, facts, scale)
    return (first.laid, second.laid, third.laid), scale * first.scale * second.scale, joint


def past_of(node: ir.Node, index: int) -> tuple[ir.Value, ir.Value] | None:
    """The keys and values of earlier steps, which are inputs from an index on; None where there are none.

    Raises:
        LeftAloneError: there is one without the other.
    """
    key, value = optional(node, index), optional(node, index + 1)
    if key is None and value is None:
        return None
    if key is None or value is None:
        raise LeftAloneError("it has one of past_key and past_value without the other")
    return key, value


def check_past(facts: Facts, past: tuple[ir.Value, ir.Value], k: Laid) -> None:
    """Refuse keys and values of earlier steps that are not proven to be of K's batch and heads, and of one shape.

    Raises:
        LeftAloneError: they are not.
    """
    for name, value in zip(("past_key", "past_value"), past, strict=True):
        shape = facts.shape(value)
        if shape is None or len(shape) != 4:
            raise LeftAloneError(f"the shape of {name} is not known")
        for what, mine, theirs in (("batch", shape[0], k.sizes[0]), ("heads", shape[1], k.sizes[1])):
            if mine != theirs:
                raise LeftAloneError(f"{name} has {what} {mine}, K has {theirs}")
    if (facts.shape(past[0]) or ())[:3] != (facts.shape(past[1]) or ())[:3]:
        raise LeftAloneError("past_key and past_value are not proven to be of one batch, heads and length")


def _visible(
    facts: Facts, node: ir.Node, q: Laid, total: Size, past: tuple[ir.Value, ir.Value] | None
) -> tuple[Visible, list[Extra]]:
    """Which keys count: causal, windows and lengths together with what a mask is proven to say."""
    rows, lengths = q.sizes[2], optional(node, 6)
    if lengths is not None and past is not None:
        raise LeftAloneError("it has nonpad_kv_seqlen and past_key, which exclude each other")
    elements = Elements(facts, {BATCH: q.sizes[0], HEAD: q.sizes[1], QUERY: rows, KEY: total})
    offset = (facts.shape(past[0]) or ())[2] if past else Size()
    seen = NOTHING_HIDDEN
    if lengths is not None:
        shape = facts.shape(lengths)
        if shape is None or len(shape) != 1 or shape[0] != q.sizes[0]:
            raise LeftAloneError("the shape of its nonpad_kv_seqlen is not proven to be [batch]")
        count = elements.at(lengths, (Size.of(BATCH),))
        if not isinstance(count, Size) or count.symbol not in elements.cells:
            raise LeftAloneError(f"its nonpad_kv_seqlen {lengths.name} is computed in a way that is not followed")
        lengths, offset = elements.cells[count.symbol or ""][0], count - rows
        seen = masks.joined(seen, Seen(masks.below(Size.of(KEY), count)))
    query, key = Size.of(QUERY) + offset, Size.of(KEY)
    left, right = attribute(node, "left_window_size", -1), attribute(node, "right_window_size", -1)
    if attribute(node, "is_causal", 0):
        right = 0 if right < 0 else min(right, 0)
    if right >= 0:
        seen = masks.joined(seen, Seen(masks.not_above(key, query + right)))
    if left >= 0:
        seen = masks.joined(seen, Seen(masks.not_above(query - left, key)))
    seen, extras = _with_mask(facts, node, elements, seen, (q.sizes[0], q.sizes[1], rows, total))
    # The operator itself gives zeros for a query whose keys are all hidden by minus infinity, as the plugin does.
    return masks.visible(seen, elements, rows, total, guarded=not seen.finite, within=True), extras


def _with_mask(
    facts: Facts, node: ir.Node, elements: Elements, seen: Seen, sizes: tuple[Size, Size, Size, Size]
) -> tuple[Seen, list[Extra]]:
    mask = optional(node, 3)
    if mask is None:
        return seen, []
    index = tuple(map(Size.of, (BATCH, HEAD, QUERY, KEY)))
    shape = facts.shape(mask)
    kind = "mask" if mask.dtype == ir.DataType.BOOL else "bias"
    dtype = DTYPES.get(q.dtype, "fp32") if (q := node.inputs[0]) is not None and q.dtype is not None else "fp32"
    if shape and (shape[-1] - sizes[3] - 1).at_least_0({}):
        raise LeftAloneError(f"its attn_mask {mask.name} is for {shape[-1]} keys, of which there are {sizes[3]}")
    at = None if not shape else broadcast_index(index, sizes, (*shape[:-1], sizes[3]))
    if at is None:
        raise LeftAloneError(f"its attn_mask {mask.name} is not proven to fit the scores")
    try:
        if (shape or ())[-1] != sizes[3]:
            raise LeftAloneError("its attn_mask is not proven to be as long as the keys")
        element = elements.at(mask, at)
        found = masks.of_condition(element) if kind == "mask" else masks.of_number(element, dtype)
        together = masks.joined(seen, found)
        # A rule that the plugin has no words for, or that it is not proven for, is read as the tensor that it is.
        masks.visible(together, elements, sizes[2], sizes[3], guarded=not together.finite, within=True)
        return together, []
    except LeftAloneError as why:
        return seen, [Extra(kind, mask, str(why))]


def _filled_up(
    node: ir.Node, extra: Extra, past: tuple[ir.Value, ir.Value] | None
) -> tuple[list[Extra], Callable[[Any], dict[ir.Value, ir.Value]]]:
    """A mask that may be shorter than the keys: those behind its end are hidden, also behind one of one element."""
    mask, keys = extra.value, node.inputs[1]
    whole = ir.Value(name=f"{mask.name}_filled_up", type=mask.type)

    def with_all_keys(op: Any) -> dict[ir.Value, ir.Value]:
        assert keys is not None
        count = length(op, keys, -2)
        missing = op.Sub(count if past is None else op.Add(length(op, past[0], 2), count), length(op, mask, -1))
        hides = False if extra.feature == "mask" else -np.inf
        rest = op.Slice(op.Shape(mask), *(constant(op, [number]) for number in (0, -1, 0)))
        kind = np.bool_ if mask.dtype is None else mask.dtype.numpy()
        nothing = op.Constant(value=ir.tensor(np.asarray(hides).astype(kind)))
        return {whole: op.Concat(mask, op.Expand(nothing, op.Concat(rest, missing, axis=0)), axis=-1)}

    return [replace(extra, value=whole)], with_all_keys
