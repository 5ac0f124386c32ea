"""Rotated positions and normalised queries and keys that stand before attention, which is replaced all the same.

The normalisations stay; ONNX Runtime's RotaryEmbedding, which TensorRT's parser does not know, is written out.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import few_of
from models import INT64, Graph, attention, heads
from proofs import problem_of

from pyfmha.onnx import replace_attention

MICROSOFT = "com.microsoft"
Wanted = Callable[[Graph, Any, bool], Any]


def numbers(*shape: int) -> Any:
    return np.random.default_rng(7).uniform(0.5, 1, shape)


def width(wide: bool) -> int:
    """Of a row: one head's, or that of all four."""
    return 64 if wide else 16


def rotary(graph: Graph, x: Any, wide: bool) -> Any:
    """ONNX Runtime's own, of positions that are an input."""
    positions = [one.name for one in graph.inputs if one.name == "at"] or [graph.input("at", ("batch", "rows"), INT64)]
    angles = numbers(64, 8)
    tables = [graph.constant(function(angles)) for function in (np.cos, np.sin)]
    return graph.op("RotaryEmbedding", x, *positions, *tables, domain=MICROSOFT, **({"num_heads": 4} if wide else {}))


def partly(graph: Graph, x: Any, wide: bool) -> Any:
    """Of the first half of each head, from the first position on."""
    tables = [graph.constant(function(numbers(64, 4))) for function in (np.cos, np.sin)]
    more = {"num_heads": 4, "rotary_embedding_dim": 8}
    return graph.op("RotaryEmbedding", x, graph.constant(np.array([0])), *tables, domain=MICROSOFT, **more)


def paired(graph: Graph, x: Any, wide: bool) -> Any:
    """Neighbours, from the third position on, by an operator that need not say how many heads there are."""
    tables = [graph.constant(function(numbers(64, 8))) for function in (np.cos, np.sin)]
    return graph.op("RotaryEmbedding", x, graph.constant(np.array([2])), *tables, domain=MICROSOFT, interleaved=1)


def fused(graph: Graph, x: Any, wide: bool) -> Any:
    """As ONNX Runtime's optimizer writes it, in ONNX's own domain."""
    return graph.op("SimplifiedLayerNormalization", x, graph.constant(numbers(width(wide))), axis=-1, epsilon=1e-6)


def of_each_head(graph: Graph, x: Any, wide: bool) -> Any:
    """Rows of all heads, cut up for it and put together again."""
    apart = graph.op("Reshape", x, graph.constant(np.array([0, 0, 4, 16])))
    return graph.op("Reshape", fused(graph, apart, False), graph.constant(np.array([0, 0, 64])))


def in_steps(graph: Graph, x: Any, wide: bool) -> Any:
    """Divided by the root of the mean of squares."""
    mean = graph.op("ReduceMean", graph.op("Pow", x, graph.constant(2.0)), axes=[-1], keepdims=1)
    root = graph.op("Sqrt", graph.op("Add", mean, graph.constant(1e-6)))
    return graph.op("Mul", graph.op("Div", x, root), graph.constant(numbers(width(wide))))


def by_its_opset(graph: Graph, x: Any, wide: bool) -> Any:
    return graph.op("RMSNormalization", x, graph.constant(numbers(width(wide))), axis=-1)


def by_its_length(graph: Graph, x: Any, wide: bool) -> Any:
    return graph.op("LpNormalization", x, axis=-1, p=2)


def multi_head(*before: Wanted) -> Graph:
    graph = Graph(17)
    q, k, v = (graph.input(name, ("batch", "rows", 64)) for name in "qkv")
    for one in before:
        q, k = one(graph, q, True), one(graph, k, True)
    graph.output(graph.op("MultiHeadAttention", q, k, v, domain=MICROSOFT, num_heads=4), rank=3)
    return graph


def of_opset_23(*before: Wanted) -> Graph:
    graph = Graph(23)
    q, k, v = heads(graph, k=("batch", 4, "rows", 16))
    for one in before:
        q, k = one(graph, q, False), one(graph, k, False)
    graph.output(graph.op("Attention", q, k, v))
    return graph


def decomposed(*before: Wanted) -> Graph:
    """Behind a cache, which holds what was turned."""
    graph = Graph(17)
    q, k, v = heads(graph, k=("batch", 4, "rows", 16))
    past_k, past_v = (graph.input(name, ("batch", 4, "past", 16)) for name in ("past_k", "past_v"))
    for one in before:
        q, k = one(graph, q, False), one(graph, k, False)
    k, v = graph.op("Concat", past_k, k, axis=2), graph.op("Concat", past_v, v, axis=2)
    graph.output(k)
    graph.output(attention(graph, q, k, v))
    return graph


CASES: list[tuple[Callable[..., Graph], tuple[Wanted, ...]]] = [
    (multi_head, (of_each_head, rotary)), (of_opset_23, (by_its_opset, rotary)), (decomposed, (in_steps, rotary)),
    (multi_head, (partly,)), (multi_head, (in_steps,)), (multi_head, (by_its_length,)), (of_opset_23, (partly,)),
    (of_opset_23, (by_its_length,)), (decomposed, (fused, partly)), (decomposed, (by_its_length,)),
    (multi_head, (paired,)), (decomposed, (paired,)),
]  # fmt: skip


@pytest.mark.parametrize(("made", "before"), few_of(CASES, CASES[:3].__contains__))
def test_attention_behind_others_is_replaced(
    made: Callable[..., Graph], before: tuple[Wanted, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx.checker, "check_model", lambda model: None)  # it knows no operators of ONNX Runtime's
    model = made(*before).model()

    assert problem_of(model).num_heads == 4

    kinds = [node.op_type for node in model.graph.node]
    kept = [node.op_type for node in replace_attention(model)[0].graph.node]
    for kind in ("SimplifiedLayerNormalization", "RMSNormalization", "LpNormalization", "ReduceMean"):
        assert kept.count(kind) == kinds.count(kind)
    assert "RotaryEmbedding" not in kept


@pytest.mark.parametrize("attributes", [{"scale": 0.5}, {"is_packed_batching": 1}], ids=str)
def test_a_rotation_of_another_kind_stays(attributes: dict[str, Any]) -> None:
    graph = Graph(17)
    x = graph.input("x", ("batch", "rows", 64))
    tables = [graph.constant(numbers(64, 8)) for _ in range(2)]
    at = graph.input("at", ("batch", "rows"), INT64)
    q = graph.op("RotaryEmbedding", x, at, *tables, domain=MICROSOFT, **attributes)
    graph.output(graph.op("MultiHeadAttention", q, x, x, domain=MICROSOFT, num_heads=4), rank=3)

    new, report = replace_attention(graph.model())

    assert [entry.reason for entry in report.left_alone] == []
    assert [node.op_type for node in new.graph.node].count("RotaryEmbedding") == 1
