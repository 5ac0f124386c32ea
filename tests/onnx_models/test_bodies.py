"""Attention in the branches of If and the bodies of Loop: replaced there, and proven by running them."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import LONG
from models import BOOL, FLOAT, INT64, Graph, attention, heads
from onnx import helper
from proofs import reason_of

from pyfmha.attention.operator import OPERATOR
from pyfmha.onnx import replace_attention
from pyfmha.onnx.prove import prove
from pyfmha.onnx.report import Report


def body(name: str, graph: Graph, outputs: list[tuple[str, int, int]]) -> Any:
    """A graph within another: its outputs by name, type and number of axes."""
    infos = [helper.make_tensor_value_info(out, kind, [None] * rank) for out, kind, rank in outputs]
    return helper.make_graph(graph.nodes, name, graph.inputs, infos, graph.weights)


def renamed(graph: Graph, prefix: str) -> Graph:
    """With constants and results of other names: those of all graphs of a model differ."""
    graph.constant = lambda value, dtype=None, make=graph.constant: _named(graph, make(value, dtype), prefix)  # type: ignore[method-assign]
    return graph


def _named(graph: Graph, name: str, prefix: str) -> str:
    graph.weights[-1].name = f"{prefix}_{name}"
    return f"{prefix}_{name}"


def proven(model: onnx.ModelProto, sizes: dict[str, int] | None = None) -> tuple[onnx.ModelProto, Report]:
    onnx.checker.check_model(model)
    new, report = replace_attention(model)
    assert [entry.reason for entry in report.left_alone] == []
    trials = prove(ir.serde.deserialize_model(model), ir.serde.deserialize_model(new), sizes=sizes)
    assert all(trial.same for trial in trials), trials
    return new, report


def attend(graph: Graph, prefix: str, q: str, k: str, v: str, **more: Any) -> str:
    """Attention whose nodes' results have names of their own."""
    before = len(graph.nodes)
    out = attention(graph, q, k, v, **more)
    own = {name: f"{prefix}_{name}" for node in graph.nodes[before:] for name in node.output}
    for node in graph.nodes[before:]:
        node.input[:] = [own.get(name, name) for name in node.input]
        node.output[:] = [own[name] for name in node.output]
    return own[out]


def branches(then: dict[str, Any], otherwise: dict[str, Any]) -> onnx.ModelProto:
    """Attention in both branches of an If, of Q, K and V outside."""
    graph = Graph()
    q, k, v = heads(graph)
    graph.input("which", (), BOOL)
    made = []
    for name, more in (("then", then), ("else", otherwise)):
        inner = renamed(Graph(), name)
        made.append(body(name, inner, [(attend(inner, name, q, k, v, **more), FLOAT, 4)]))
    graph.output(graph.op("If", "which", then_branch=made[0], else_branch=made[1]))
    return graph.model()


def test_the_branches_of_an_if() -> None:
    new, report = proven(branches({"scale": 0.25}, {"scale": 0.5}))

    assert sorted(entry.problem.softmax_scale for entry in report.replaced if entry.problem) == [0.25, 0.5]
    (node,) = new.graph.node
    for attribute in node.attribute:
        assert [inner.op_type for inner in attribute.g.node] == [OPERATOR.name]
    assert "pyfmha" in [entry.domain for entry in new.opset_import]


def test_one_branch_alone_and_what_comes_after() -> None:
    graph = Graph()
    q, k, v = heads(graph, k=("batch", 4, "rows", 16))
    graph.input("which", (), BOOL)
    inner, other = renamed(Graph(), "then"), Graph()
    then = body("then", inner, [(attend(inner, "then", q, k, v), FLOAT, 4)])
    plain = body("else", other, [(other.op("Identity", q, name="other"), FLOAT, 4)])
    chosen = graph.op("If", "which", then_branch=then, else_branch=plain)
    graph.output(attention(graph, chosen, k, v))

    _, report = proven(graph.model())

    assert len(report.replaced) == 2


def loop(graph: Graph, inner: Graph, times: int, outputs: list[tuple[str, int, int]], *state: str) -> Any:
    count = graph.constant(np.int64(times))
    return graph.op("Loop", count, "", *state, outputs=len(outputs) - 1, body=body("body", inner, outputs))


def inside(kind: int = FLOAT, shape: tuple[Any, ...] = (None, None, None, None)) -> Graph:
    inner = renamed(Graph(), "body")
    inner.input("time", (), INT64)
    inner.input("go", (), BOOL)
    inner.inputs.append(helper.make_tensor_value_info("x", kind, list(shape)))
    inner.nodes.append(helper.make_node("Identity", ["go"], ["on"]))
    return inner


@pytest.mark.parametrize("times", [3, pytest.param(1, marks=LONG)])
def test_the_body_of_a_loop(times: int) -> None:
    """What goes round keeps its shape, which the body does not declare; and each time gives a result."""
    graph, inner = Graph(), inside()
    q, k, v = heads(graph, v=("batch", 4, "keys", 16))
    out = attend(inner, "body", "x", k, v)
    twice = inner.op("Add", out, out, name="twice")
    last, every = loop(graph, inner, times, [("on", BOOL, 0), (out, FLOAT, 4), (twice, FLOAT, 4)], q)
    graph.output(last)
    graph.output(every, rank=5)

    _, report = proven(graph.model())

    assert len(report.replaced) == 1


def grown(declared: tuple[Any, ...]) -> onnx.ModelProto:
    """Keys that become more each time round, and Q that follows them."""
    graph, inner = Graph(), inside(shape=declared)
    x = graph.input("start", ("batch", 4, "rows", 16))
    out = attend(inner, "body", "x", x, x)
    longer = inner.op("Concat", "x", out, axis=2, name="longer")
    graph.output(loop(graph, inner, 2, [("on", BOOL, 0), (longer, FLOAT, 4)], x))
    return graph.model()


@pytest.mark.parametrize("declared", [(None, None, None, None), ("batch", 4, "rows", 16)])
def test_what_grows_each_time_round_has_no_size_that_is_proven(declared: tuple[Any, ...]) -> None:
    """Its batch, heads and head size stay; a name that the body declares says nothing."""
    _, report = proven(grown(declared))

    assert len(report.replaced) == 1


def test_a_causal_mask_of_what_grows_is_left_alone() -> None:
    """Of the first size it would be aligned to the first key as well as to the last."""
    graph, inner = Graph(), inside(shape=("batch", 4, "rows", 16))
    x = graph.input("start", ("batch", 4, "rows", 16))
    stored = inner.constant(np.where(np.tril(np.ones((6, 6))), 0, -np.inf).astype(np.float32))
    out = attend(inner, "body", "x", x, x, mask=lambda scores: inner.op("Add", scores, stored))
    longer = inner.op("Concat", "x", out, axis=2, name="longer")
    graph.output(loop(graph, inner, 2, [("on", BOOL, 0), (longer, FLOAT, 4)], x))

    assert "shape of the scores" in reason_of(graph.model())


def test_a_scan_is_not_followed() -> None:
    graph = Graph()
    q, k, v = heads(graph)
    inner = renamed(Graph(), "body")
    inner.inputs.append(helper.make_tensor_value_info("x", FLOAT, [4, None, 16]))
    wide = inner.op("Unsqueeze", "x", inner.constant(np.array([0])), name="wide")
    out = attend(inner, "body", wide, k, v)
    made = body("body", inner, [(out, FLOAT, 4)])
    graph.output(graph.op("Scan", q, body=made, num_scan_inputs=1), rank=5)

    _, report = replace_attention(graph.model())

    assert [entry.reason for entry in report.found] == ["it lies in a subgraph of Scan Scan_0, which is not followed"]
