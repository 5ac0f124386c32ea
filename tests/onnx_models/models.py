"""Small ONNX models, written out: what the tests rewrite."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, FLOAT16, INT64, BOOL = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.BOOL
Shape = Sequence[int | str]


class Graph:
    """A graph in the making: each call adds a node and names its output."""

    def __init__(self, opset: int = 17, kind: int = FLOAT) -> None:
        self.opset, self.kind = opset, kind
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.weights: list[Any] = []

    def input(self, name: str, shape: Shape, kind: int | None = None) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind or self.kind, list(shape)))
        return name

    def constant(self, value: Any, dtype: Any = None) -> str:
        """A constant; floats are of the graph's type."""
        array = np.asarray(value)
        if dtype is None and array.dtype.kind == "f":
            dtype = helper.tensor_dtype_to_np_dtype(self.kind)
        name = f"constant_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array, dtype or array.dtype), name))
        return name

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", name: str = "", **attributes: Any) -> Any:
        names = [f"{name or kind}_{len(self.nodes)}_{index}" for index in range(outputs)]
        label = name or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, name=label, **attributes))
        return names[0] if outputs == 1 else names

    def output(self, name: str, kind: int | None = None, rank: int = 4) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, kind or self.kind, [None] * rank))

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "graph", self.inputs, self.outputs, self.weights)
        imports = [helper.make_opsetid("", self.opset)]
        if any(node.domain == "com.microsoft" for node in self.nodes):
            imports.append(helper.make_opsetid("com.microsoft", 1))
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        onnx.checker.check_model(model)
        return model


def heads(
    graph: Graph, q: Shape = ("batch", 4, "rows", 16), k: Shape = ("batch", 4, "keys", 16), v: Shape | None = None
) -> tuple[str, str, str]:
    """Q, K and V as inputs of four axes."""
    return graph.input("q", q), graph.input("k", k), graph.input("v", v or k)


def attention(graph: Graph, q: str, k: str, v: str, scale: float | None = 0.25, mask: Any = None) -> str:
    """Attention in single steps; ``mask`` takes the scores and gives those that Softmax gets."""
    scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
    if scale is not None:
        scores = graph.op("Mul", scores, graph.constant(scale))
    if mask is not None:
        scores = mask(scores)
    return str(graph.op("MatMul", graph.op("Softmax", scores, axis=-1), v, name="attention"))


def size(graph: Graph, value: str, axis: int) -> str:
    """One size of a tensor, as exporters compute it: a vector of one element."""
    at = graph.op("Gather", graph.op("Shape", value), graph.constant(np.int64(axis)))
    return str(graph.op("Unsqueeze", at, graph.constant(np.array([0]))))


def counted(graph: Graph, count: str, first: str | None = None) -> str:
    """0, 1, ... by Range: of as many as a vector of one element says, from ``first`` on."""
    axis = graph.constant(np.array([0]))
    start = graph.constant(np.int64(0)) if first is None else graph.op("Squeeze", first, axis)
    limit = graph.op("Squeeze", count, axis)
    return str(graph.op("Range", start, limit, graph.constant(np.int64(1))))
