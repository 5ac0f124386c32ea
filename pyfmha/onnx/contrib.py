"""ONNX Runtime's operators: ``MultiHeadAttention``, ``GroupQueryAttention`` and ``Attention`` of domain com.microsoft.

Their meaning is that of ONNX Runtime's documentation (docs/ContribOperators.md) and of its CPU implementation.
"""

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from pyfmha.onnx.calls import Call, Laid, LeftAloneError, Visible
from pyfmha.onnx.emit import constant
from pyfmha.onnx.facts import Facts
from pyfmha.onnx.sizes import Size
from pyfmha.onnx.standard import check_past, heads_of, optional, past_of, used
from pyfmha.onnx.tensors import Shape, attribute

DOMAIN = "com.microsoft"
Past = tuple[ir.Value, ir.Value] | None


def read(facts: Facts, node: ir.Node) -> Call:
    """Understand one of the three operators.

    Raises:
        LeftAloneError: it does something that is not proven to be what the plugin computes.
    """
    return {"MultiHeadAttention": _multi_head, "GroupQueryAttention": _group_query, "Attention": _attention}[
        node.op_type
    ](facts, node)


def _refuse(node: ir.Node, inputs: dict[int, str], outputs: dict[int, str]) -> None:
    for index, what in inputs.items():
        if optional(node, index) is not None:
            raise LeftAloneError(f"its input {what} is given: the plugin's node is not proven to do the same")
    for index, what in outputs.items():
        if used(node, index):
            raise LeftAloneError(f"its output {what} is read")


def _check_attributes(node: ir.Node, allowed: dict[str, Any]) -> None:
    """Refuse attributes that are not known here, and those that must have one value and have another."""
    for name in sorted(node.attributes):
        if name not in allowed:
            raise LeftAloneError(f"its attribute {name} is not known here")
        wanted, value = allowed[name], attribute(node, name, None)
        if wanted is not None and value != wanted:
            raise LeftAloneError(f"its attribute {name} is {value}, which the plugin's node does not do")


def _scale(node: ir.Node, size: Size) -> float:
    scale = attribute(node, "scale", 0.0)
    if scale:
        return float(scale)
    if not size.number:
        raise LeftAloneError(f"the head size, {size}, must be a number")
    return 1 / math.sqrt(size.number)


def _name(node: ir.Node) -> str:
    return node.name or node.outputs[0].name or ""


def _stand_in(like: ir.Value) -> ir.Value:
    """What a tensor is called before the nodes that give it are there."""
    return ir.Value(name=f"{like.name}_for_attention", type=like.type)


def _parts_of(value: ir.Value, shape: Shape, heads: int, kv_heads: int) -> tuple[Laid, Laid, Laid]:
    """Q, K and V in one tensor [batch, seq, (heads + 2 * kv heads) * head size]."""
    size = shape[2].over(heads + 2 * kv_heads)
    if size is None or size.number is None:
        raise LeftAloneError(f"its packed input has {shape[2]} columns, which are not {heads} + 2 * {kv_heads} heads")
    firsts = 0, heads * size.number, (heads + kv_heads) * size.number
    q, k, v = (
        Laid(value, "bsH", (shape[0], Size.of(count), shape[1], size), first, part=True)
        for count, first in zip((heads, kv_heads, kv_heads), firsts, strict=True)
    )
    return q, k, v


def _multi_head(facts: Facts, node: ir.Node) -> Call:
    _check_attributes(node, {"num_heads": None, "mask_filter_value": None, "scale": None, "unidirectional": None})
    _refuse(
        node,
        {4: "key_padding_mask", 5: "attention_bias", 8: "past_sequence_length", 9: "cache_indirection"},
        {3: "qk"},
    )  # fmt: skip
    heads = attribute(node, "num_heads", 0)
    query, key, value = (optional(node, index) for index in range(3))
    bias = optional(node, 3)
    past, present = past_of(node, 6), used(node, 1) or used(node, 2)
    if query is not None and (key is None or value is None):
        if bias is not None:
            raise LeftAloneError("it has a bias, and Q, K and V in one tensor")
        return _interleaved(facts, node, query, key, past, present)
    q = heads_of(facts, query, heads, "Q")
    k, v = heads_of(facts, key, heads, "K"), heads_of(facts, value, heads, "V")
    _check_past(facts, past, k)
    visible = _causal(node, past)
    if bias is None:
        return Call(
            _name(node), q, k, v, _scale(node, q.sizes[3]), visible=visible, out_order="bsH", past=past,
            present=present,
        )  # fmt: skip
    if any(laid.order != "bsH" for laid in (q, k, v)):
        raise LeftAloneError("it has a bias, and K and V of four axes")
    real = [q, k, v]
    stand_ins = [Laid(_stand_in(laid.value), laid.order, laid.sizes) for laid in real]

    def with_bias(op: Any) -> dict[ir.Value, ir.Value]:
        first, made = 0, {}
        for laid, stand_in in zip(real, stand_ins, strict=True):
            count = (laid.sizes[1].number or 0) * (laid.sizes[3].number or 0)
            ends = (constant(op, [number]) for number in (first, first + count, 0))
            made[stand_in.value] = op.Add(laid.value, op.Slice(bias, *ends))
            first += count
        return made

    q, k, v = stand_ins
    return Call(
        _name(node), q, k, v, _scale(node, q.sizes[3]), visible=visible, out_order="bsH", before=with_bias, past=past,
        present=present,
    )  # fmt: skip


def _interleaved(facts: Facts, node: ir.Node, query: ir.Value, key: ir.Value | None, past: Past, present: bool) -> Call:
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
    stand_ins = [ir.Value(name=f"{held.name}_{part}_for_attention", type=held.type) for part in "QKV"[-count:]]
    parts = [Laid(stand_in, "bshd", sizes) for stand_in in stand_ins]
    if key is not None:
        own = heads_of(facts, query, heads.number, "Q")
        taken = own if own.order != "bsH" else Laid(_stand_in(query), "bshd", own.sizes)
        parts = [taken, *parts]

    def taken_out(op: Any) -> dict[ir.Value, ir.Value]:
        made = {}
        for index, stand_in in enumerate(stand_ins):
            made[stand_in] = op.Gather(held, op.Constant(value=ir.tensor(np.asarray(index, np.int64))), axis=3)
        if key is not None and parts[0].value is not query:
            whole = [0, 0, heads.number or 0, parts[0].sizes[3].number or -1]
            made[parts[0].value] = op.Reshape(query, constant(op, whole))
        return made

    q, k, v = parts
    _check_past(facts, past, k)
    return Call(
        _name(node), q, k, v, _scale(node, q.sizes[3]), visible=_causal(node, past), out_order="bsH",
        before=taken_out, past=past, present=present,
    )  # fmt: skip


def _check_past(facts: Facts, past: Past, k: Laid) -> None:
    if past is not None:
        check_past(facts, past, k)


def _causal(node: ir.Node, past: Past = None) -> Visible:
    """``unidirectional`` is aligned to the first key of this step: with earlier ones, to the last query and key."""
    return Visible(causal=bool(attribute(node, "unidirectional", 0)), bottom_right=past is not None)


def _group_query(facts: Facts, node: ir.Node) -> Call:
    allowed: dict[str, Any] = {
        "num_heads": None,
        "kv_num_heads": None,
        "scale": None,
        "softcap": None,
        "local_window_size": None,
    }
    allowed |= {"do_rotary": 0, "rotary_interleaved": None, "smooth_softmax": 0, "qk_output": 0}
    allowed |= {"k_quant_type": "NONE", "v_quant_type": "NONE", "kv_cache_bit_width": 0}
    _check_attributes(node, {**allowed, "causal": 1})
    _refuse(
        node,
        {3: "past_key", 4: "past_value", 7: "cos_cache", 8: "sin_cache", 9: "position_ids", 10: "attention_bias",
         11: "head_sink", 12: "k_scale", 13: "v_scale"},
        {3: "output_qk"},
    )  # fmt: skip
    heads, kv_heads = attribute(node, "num_heads", 0), attribute(node, "kv_num_heads", 0)
    query, key, value = (optional(node, index) for index in range(3))
    packed = None
    if query is not None and key is None and value is None:
        shape = facts.shape(query)
        if shape is None or len(shape) != 3:
            raise LeftAloneError("the shape of its packed input is not known")
        q, k, v = _parts_of(query, shape, heads, kv_heads)
        packed = query, _scale(node, q.sizes[3])
    else:
        q = heads_of(facts, query, heads, "Q")
        k, v = heads_of(facts, key, kv_heads, "K"), heads_of(facts, value, kv_heads, "V")
    total = facts.content(optional(node, 6))
    if total is None or total.size != 1 or next(iter(total.flat)) != q.sizes[2]:
        raise LeftAloneError("its total_sequence_length is not proven to be the length of Q: keys may come before")
    window = attribute(node, "local_window_size", -1)
    # A row past a sequence's end sees what causality lets it see: seqlens_k changes nothing without earlier keys.
    visible = Visible(causal=True, window=(window - 1 if window > 0 else -1, -1))
    return Call(
        _name(node), q, k, v, _scale(node, q.sizes[3]),
        softcap=attribute(node, "softcap", 0.0), visible=visible, out_order="bsH",
        present=used(node, 1) or used(node, 2), packed=packed,
    )  # fmt: skip


def _attention(facts: Facts, node: ir.Node) -> Call:
    allowed = {"num_heads": None, "unidirectional": None, "scale": None, "mask_filter_value": None, "do_rotary": 0}
    _check_attributes(node, {**allowed, "qkv_hidden_sizes": None, "past_present_share_buffer": 0})
    _refuse(
        node,
        {3: "mask_index", 4: "past", 5: "attention_bias", 6: "past_sequence_length"},
        {1: "present"},
    )
    heads = attribute(node, "num_heads", 0)
    tokens, weights, bias = (optional(node, index) for index in range(3))
    shapes = [None if value is None else facts.shape(value) for value in (tokens, weights)]
    if tokens is None or weights is None or shapes[0] is None or shapes[1] is None or len(shapes[0]) != 3:
        raise LeftAloneError("the shapes of its input and weights are not known")
    hidden = attribute(node, "qkv_hidden_sizes", None)
    if hidden and len(set(hidden)) != 1:
        raise LeftAloneError(f"its qkv_hidden_sizes are {list(hidden)}; the plugin takes K and V of one head size")
    packed = _stand_in(tokens)
    q, k, v = _parts_of(packed, (*shapes[0][:2], shapes[1][1]), heads, heads)

    def projected(op: Any) -> dict[ir.Value, ir.Value]:
        product = op.MatMul(tokens, weights)
        return {packed: product if bias is None else op.Add(product, bias)}

    scale = _scale(node, q.sizes[3])
    return Call(
        _name(node), q, k, v, scale, visible=_causal(node), out_order="bsH", before=projected, packed=(packed, scale)
    )
