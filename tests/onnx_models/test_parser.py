"""NVIDIA's real parser, of TensorRT-RTX, each case in a process of its own: the creator gets what the report says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import LONG
from models import Graph, attention, heads

from pyfmha.onnx import replace_attention

PROGRAM = Path(__file__).with_name("parse_with_rtx.py")


def windows() -> Graph:
    graph = Graph(25)
    q, k, v = heads(graph, k=("batch", 2, "keys", 16))
    graph.output(graph.op("Attention", q, k, v, left_window_size=3, right_window_size=1, softcap=20.0, scale=0.5))
    return graph


def lengths() -> Graph:
    graph = Graph(24)
    q, k, v = heads(graph)
    count = graph.input("lengths", ("batch",), onnx.TensorProto.INT64)
    graph.output(graph.op("Attention", q, k, v, "", "", "", count, is_causal=1))
    return graph


def packed() -> Graph:
    graph = Graph()
    weights = graph.constant(np.random.default_rng(0).normal(size=(48, 192)))
    x = graph.input("x", ("batch", "rows", 48))
    graph.output(graph.op("Attention", x, weights, domain="com.microsoft", num_heads=4), rank=3)
    return graph


def cached() -> Graph:
    """Rotated positions and a cache before the plugin's node, all in operators that the parser knows."""
    graph = Graph()
    q, k, v = (graph.input(x, ("batch", "rows", size)) for x, size in zip("qkv", (64, 32, 32), strict=True))
    past = [graph.input(f"past_{x}", ("batch", 2, "past", 16)) for x in "kv"]
    mask = graph.input("mask", ("batch", "total"), onnx.TensorProto.INT64)
    axis, one = graph.constant(np.array([1])), graph.constant(np.int64(1))
    last = graph.op("Sub", graph.op("ReduceSum", mask, axis, keepdims=0), one)
    whole = graph.op("Gather", graph.op("Shape", mask), one)
    lengths = [graph.op("Cast", value, to=onnx.TensorProto.INT32) for value in (last, whole)]
    angles = [graph.constant(function(np.random.default_rng(0).normal(size=(32, 8)))) for function in (np.cos, np.sin)]
    bias = graph.input("bias", (1, 4, "rows", "total"))
    made = graph.op("GroupQueryAttention", q, k, v, *past, *lengths, *angles, "", bias, domain="com.microsoft",
                    num_heads=4, kv_num_heads=2, do_rotary=1, rotary_interleaved=1, smooth_softmax=1)  # fmt: skip
    graph.output(made, rank=3)
    return graph


def padded() -> Graph:
    graph = Graph()
    inputs = [graph.input(x, ("batch", "rows", 64)) for x in "qkv"]
    inputs += ["", graph.input("mask", ("batch",), onnx.TensorProto.INT32)]
    graph.output(graph.op("MultiHeadAttention", *inputs, domain="com.microsoft", num_heads=4), rank=3)
    return graph


def branch() -> Graph:
    """The plugin's node within a branch of an If."""
    graph, then, other = Graph(), Graph(), Graph()
    q, k, v = heads(graph)
    graph.input("which", (), onnx.TensorProto.BOOL)
    outs = attention(then, q, k, v), other.op("Identity", q, name="same")
    bodies = [
        onnx.helper.make_graph(inner.nodes, "body", [], [onnx.helper.make_tensor_value_info(out, 1, [None] * 4)],
                               inner.weights)
        for inner, out in zip((then, other), outs, strict=True)
    ]  # fmt: skip
    graph.output(graph.op("If", "which", then_branch=bodies[0], else_branch=bodies[1]))
    return graph


def steps() -> Graph:
    graph = Graph()
    graph.output(attention(graph, *heads(graph)))
    return graph


def parse(model: Path, namespace: str = "") -> dict[str, Any]:
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(model), namespace], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize("make", [windows, lengths, packed, steps, cached, branch, pytest.param(padded, marks=LONG)])
def test_the_creator_gets_the_fields_of_the_report(make: Any, tmp_path: Path) -> None:
    model, report = replace_attention(make().model())
    (found,) = report.replaced
    assert found.problem is not None
    onnx.save(model, tmp_path / "model.onnx")

    answer = parse(tmp_path / "model.onnx")

    assert answer["fields"] == [found.problem.node_attributes()]
    # Nothing is left out and nothing unknown: the one failure is the recorder's.
    assert answer["errors"] == ["Assertion failed: plugin: Could not create the plugin."]
    assert [text for text in answer["warned"] if "attribute" in text.lower() or "field" in text.lower()] == []


def test_without_the_attribute_of_the_namespace_the_domain_is_asked_for(tmp_path: Path) -> None:
    """Why the nodes carry ``plugin_namespace``: the parser would look in the namespace pyfmha first."""
    model, _ = replace_attention(steps().model())
    (node,) = (node for node in model.graph.node if node.domain == "pyfmha")
    kept = [attribute for attribute in node.attribute if attribute.name != "plugin_namespace"]
    node.ClearField("attribute")
    node.attribute.extend(kept)
    onnx.save(model, tmp_path / "model.onnx")

    assert len(parse(tmp_path / "model.onnx", "pyfmha")["fields"]) == 1
