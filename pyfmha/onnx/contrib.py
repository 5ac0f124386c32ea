"""ONNX Runtime's operators: ``MultiHeadAttention``, ``GroupQueryAttention`` and ``Attention`` of domain com.microsoft.

Their meaning is that of ONNX Runtime's documentation (docs/ContribOperators.md) and of its CPU implementation.
"""

import math
from typing import Any

import onnx_ir as ir

from pyfmha.onnx.calls import Call, Laid, LeftAloneError, Visible
from pyfmha.onnx.emit import constant
from pyfmha.onnx.facts import Facts
from pyfmha.onnx.sizes import Size
from pyfmha.onnx.standard import heads_of, optional, used
from pyfmha.onnx.tensors import Shape, attribute

DOMAIN = "com.microsoft"


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
        {4: "key_padding_mask", 5: "attention_bias", 6: "past_key", 7: "past_value", 8: "past_sequence_length",
         9: "cache_indirection"},
        {1: "present_key", 2: "present_value", 3: "qk"},
    )  # fmt: skip
    heads = attribute(node, "num_heads", 0)
    query, key, value = (optional(node, index) for index in range(3))
    if key is None or value is None:
        raise LeftAloneError("its query holds K and V as well, [batch, seq, heads, 3, head size]: not served")
    q = heads_of(facts, query, heads, "Q")
    k, v = heads_of(facts, key, heads, "K"), heads_of(facts, value, heads, "V")
    bias = optional(node, 3)
    if bias is None:
        return Call(_name(node), q, k, v, _scale(node, q.sizes[3]), visible=_causal(node), out_order="bsH")
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
    visible = _causal(node)
    return Call(_name(node), q, k, v, _scale(node, q.sizes[3]), visible=visible, out_order="bsH", before=with_bias)


def _causal(node: ir.Node) -> Visible:
    """Without keys of earlier steps, ``unidirectional`` is aligned to the first query and key."""
    return Visible(causal=bool(attribute(node, "unidirectional", 0)))


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
