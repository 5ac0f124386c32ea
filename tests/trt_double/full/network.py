"""The double's network: tensors, and layers that know their output's shape and can compute it on the fake GPU."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from pyfmha.bfloat16 import bf16_from_float, float_from_bf16
from trt_double.binding import DataType, DimsExprs, IDimensionExpr, IExprBuilder, ITensor
from trt_double.full.gpu import emulated_attention

STORAGE = {
    DataType.FLOAT: "f4",
    DataType.HALF: "f2",
    DataType.BF16: "u2",
    DataType.INT32: "i4",
    DataType.INT64: "i8",
    DataType.BOOL: "?",
    DataType.INT8: "i1",
    DataType.UINT8: "u1",
    DataType.FP8: "u1",
}


class AttentionNormalizationOp(IntEnum):
    NONE, SOFTMAX = range(2)


class CausalMaskKind(IntEnum):
    NONE, UPPER_LEFT, LOWER_RIGHT = range(3)


class ElementWiseOperation(IntEnum):
    SUM, PROD = range(2)


class Weights:
    """A pointer: the memory behind it is read when the engine is built, and must still be there."""

    def __init__(self, type: DataType, ptr: int, count: int) -> None:
        self.type, self.pointer, self.count = type, ptr, count

    def read(self) -> np.ndarray:
        storage = np.dtype(STORAGE[self.type])
        raw = (ctypes.c_ubyte * (self.count * storage.itemsize)).from_address(self.pointer)
        return np.frombuffer(bytes(raw), storage)


def to_numbers(stored: np.ndarray, kind: DataType) -> np.ndarray:
    return float_from_bf16(stored) if kind == DataType.BF16 else stored


def to_stored(values: np.ndarray, kind: DataType) -> np.ndarray:
    return bf16_from_float(values) if kind == DataType.BF16 else np.asarray(values).astype(STORAGE[kind])


@dataclass
class Op:
    """A layer as an engine stores it.

    Attributes:
        kind: a key of :data:`COMPUTE`, or ``"plugin"``.
        inputs: names of tensors.
        output: name of the first output.
        params: JSON.
        more: names of other outputs.
    """

    kind: str
    name: str
    inputs: list[str]
    output: str
    params: dict[str, Any] = field(default_factory=dict)
    more: list[str] = field(default_factory=list)


def _attention(values: list[np.ndarray], params: Mapping[str, Any]) -> np.ndarray:
    return emulated_attention(*values, 1.0, params["causal"])[0]


COMPUTE: dict[str, Callable[[list[np.ndarray], Mapping[str, Any]], np.ndarray]] = {
    "identity": lambda values, params: values[0],
    "product": lambda values, params: np.asarray(values[0] * values[1]),
    "constant": lambda values, params: np.array(params["values"]).reshape(params["shape"]),
    "attention": _attention,
    "reshape": lambda values, params: values[0].reshape(values[1]),
    "nonzero": lambda values, params: np.stack(np.nonzero(values[0])),
}


class Layer:
    def __init__(self, op: Op, output: ITensor, plugin: Any = None, weights: Weights | None = None) -> None:
        self.op, self.plugin, self.weights = op, plugin, weights
        self.name, self.outputs = op.name, [output]
        self.set: dict[int, ITensor] = {}
        self.sources: list[ITensor] = []
        self.decomposable = False

    def get_output(self, index: int) -> ITensor:
        return self.outputs[index]

    def set_input(self, index: int, tensor: ITensor) -> None:
        self.sources[index:] = [tensor]
        self.op.inputs[index:] = [tensor.name]
        self.outputs[0].shape = (-1,) * int(np.prod(tensor.shape))


class Network:
    """As ``INetworkDefinition``; :func:`trt_double.full.make_full` leaves out what a version lacks."""

    def __init__(self, trt: Any, strongly_typed: bool) -> None:
        self.trt, self.strongly_typed = trt, strongly_typed
        self.name = ""
        self.layers: list[Layer] = []
        self.inputs: list[ITensor] = []
        self.outputs: list[ITensor] = []

    def __del__(self) -> None:
        for layer in self.layers:
            if layer.plugin is not None:
                self.trt.double.calls.destroy(layer.plugin)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]

    def add_input(self, name: str, dtype: DataType, shape: Sequence[int]) -> ITensor:
        self.inputs.append(ITensor(name, DataType(dtype), tuple(shape)))
        return self.inputs[-1]

    def mark_output(self, tensor: ITensor) -> None:
        self.outputs.append(tensor)

    def _add(self, kind: str, sources: Sequence[ITensor], dtype: DataType, dims: Sequence[int], **params: Any) -> Layer:
        number = len(self.layers)
        output = ITensor(f"(Unnamed Layer* {number}) [{kind}]_output", dtype, tuple(dims))
        layer = Layer(Op(kind, f"(Unnamed Layer* {number}) [{kind}]", [], output.name, params), output)
        layer.sources = list(sources)
        self.layers.append(layer)
        return layer

    def add_identity(self, tensor: ITensor) -> Layer:
        return self._add("identity", [tensor], tensor.dtype, tensor.shape)

    def add_constant(self, shape: Sequence[int], weights: Weights) -> Layer:
        layer = self._add("constant", [], weights.type, shape, shape=list(shape))
        layer.weights = weights
        return layer

    def add_elementwise(self, a: ITensor, b: ITensor, op: ElementWiseOperation) -> Layer | None:
        if a.dtype != b.dtype or op != ElementWiseOperation.PROD:
            return None
        shape = [max(x, y) if -1 not in (x, y) else -1 for x, y in zip(a.shape, b.shape, strict=True)]
        return self._add("product", [a, b], a.dtype, shape)

    def add_shuffle(self, tensor: ITensor) -> Layer:
        return self._add("reshape", [tensor], tensor.dtype, tensor.shape)

    def add_non_zero(self, tensor: ITensor) -> Layer:
        return self._add("nonzero", [tensor], DataType.INT32, (len(tensor.shape), -1))

    def add_attention(self, query: Any, key: Any, value: Any, norm_op: Any, causal: bool) -> Layer:
        assert isinstance(causal, bool)
        return self._attention(query, key, value, norm_op, causal)

    def add_attention_v2(self, query: Any, key: Any, value: Any, norm_op: Any, causal_kind: CausalMaskKind) -> Layer:
        assert isinstance(causal_kind, CausalMaskKind)
        return self._attention(query, key, value, norm_op, causal_kind != CausalMaskKind.NONE)

    def _attention(self, query: Any, key: Any, value: Any, norm_op: Any, causal: bool) -> Layer:
        assert norm_op == AttentionNormalizationOp.SOFTMAX
        return self._add("attention", [query, key, value], query.dtype, query.shape, causal=causal)

    def add_plugin_v3(self, inputs: Sequence[ITensor], shape_inputs: Sequence[ITensor], plugin: Any) -> Layer | None:
        calls = self.trt.double.calls
        calls.keep(plugin)
        copy = calls.clone(plugin)  # TensorRT never uses the object that it is given
        if copy is None:
            return None
        kinds = calls.output_types(copy, [int(tensor.dtype) for tensor in inputs])
        axes = None if kinds is None else output_axes(calls, copy, [tensor.shape for tensor in inputs])
        if kinds is None or axes is None:
            layer = self._add("plugin", inputs, DataType(0), (), axes=axes)
            layer.outputs = [ITensor.refused(layer.outputs[0].name, self.trt.__version__)] * copy.num_outputs
        else:
            shapes = [axes_shape(own, [tensor.shape for tensor in inputs]) for own in axes]
            layer = self._add("plugin", inputs, DataType(kinds[0]), shapes[0], axes=axes)
            for kind, shape in zip(kinds[1:], shapes[1:], strict=True):
                name = f"{layer.outputs[0].name}_{len(layer.outputs)}"
                layer.outputs.append(ITensor(name, DataType(kind), shape))
        layer.plugin = copy
        return layer


Axis = int | list[int]
"""Of an output: its size, or [input, axis] of the one that it equals."""


def output_axes(calls: Any, plugin: Any, shapes: Sequence[Sequence[int]]) -> list[list[Axis]] | None:
    """Where the plugin's outputs get each of their sizes from."""
    inputs = [DimsExprs(IDimensionExpr(None if size < 0 else size) for size in shape) for shape in shapes]
    found = {id(size): [i, axis] for i, dims in enumerate(inputs) for axis, size in enumerate(dims)}

    def use(outputs: Any) -> list[list[Axis]]:
        if len(outputs) != plugin.num_outputs or not all(isinstance(dims, DimsExprs) for dims in outputs):
            raise RuntimeError("Return value could not be interpreted as std::vector<DimsExprs>")
        return [[found.get(id(size), size.value) for size in dims] for dims in outputs]

    axes: list[list[Axis]] | None = calls._try(plugin, "get_output_shapes", None, use, inputs, [], IExprBuilder())
    return axes


def axes_shape(axes: Sequence[Axis], shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(axis if isinstance(axis, int) else shapes[axis[0]][axis[1]] for axis in axes)
