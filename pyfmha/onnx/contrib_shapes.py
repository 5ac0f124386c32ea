"""The shapes of results of ONNX Runtime's operators, which ONNX's shape inference does not know."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx_ir as ir

from pyfmha.onnx.shape_rules import matmul
from pyfmha.onnx.sizes import Size
from pyfmha.onnx.tensors import Shape, attribute

if TYPE_CHECKING:
    from pyfmha.onnx.facts import Facts


def _multi_head(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    query, key, value = (facts.input_shape(node, at) for at in range(3))
    heads = Size.of(attribute(node, "num_heads", 0))
    if query is None:
        return None
    if index == 0:
        held = value or key or query
        return query[0], query[1], held[2] if len(held) == 3 else heads * held[-1]
    new, past = (key, value)[index - 1] if index < 3 else None, facts.input_shape(node, 5 + index)
    if new is None or len(new) != 3 or (past is not None and len(past) != 4):
        return None
    size, count = new[2].over(heads), new[1] if past is None else past[2] + new[1]
    return None if size is None else (query[0], heads, count, size)


def _group_query(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    query, key = facts.input_shape(node, 0), facts.input_shape(node, 1)
    heads, kv_heads = (attribute(node, name, 0) for name in ("num_heads", "kv_num_heads"))
    if query is None or len(query) != 3 or index:
        return None
    size = query[2].over(heads if key is not None else heads + 2 * kv_heads)
    return None if size is None else (query[0], query[1], size * heads)


def _attention(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    tokens, weights, past = (facts.input_shape(node, at) for at in (0, 1, 4))
    hidden, heads = attribute(node, "qkv_hidden_sizes", None), attribute(node, "num_heads", 0)
    if tokens is None or weights is None or len(tokens) != 3:
        return None
    size = Size.of(hidden[2]) if hidden else weights[1].over(3)
    if index == 0 or size is None:
        return None if size is None else (tokens[0], tokens[1], size)
    each, count = size.over(heads), tokens[1] if past is None else past[3] + tokens[1]
    return None if each is None else (Size.of(2), tokens[0], Size.of(heads), count, each)


def _quantised(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    """A product with weights of few bits: [..., N]."""
    rows = facts.input_shape(node, 0)
    return None if rows is None else (*rows[:-1], Size.of(attribute(node, "N", 0)))


CONTRIB: dict[str, Callable[["Facts", ir.Node, int], Shape | None]] = {
    "FusedMatMul": matmul, "MultiHeadAttention": _multi_head, "GroupQueryAttention": _group_query,
    "Attention": _attention, "MatMulNBits": _quantised,
}  # fmt: skip
