"""Attention as a layer of a TensorRT network."""

import math
from pathlib import Path
from typing import Any

from pyfmha.errors import PluginError
from pyfmha.runtime.library import Library
from pyfmha.trt.creator import register
from pyfmha.trt.failures import collect_failures
from pyfmha.trt.fields import DATA_TYPES, TYPE_NAMES, Problem, creation_fields
from pyfmha.trt.modules import find_module, module_of
from pyfmha.trt.plugin import NAME
from pyfmha.trt.shapes import INPUTS


def add_attention(
    network: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = True,
    scale: float | None = None,
    name: str | None = None,
    namespace: str = "",
    library: Library | Path | str | None = None,
    trt_module: Any = None,
) -> Any:
    """Add softmax(scale * Q K^T) V to a network. Registers the plugin first, if need be.

    Args:
        network: an ``INetworkDefinition`` of TensorRT 10.x or 11.x.
        q, k, v: ``ITensor`` of one type (HALF, BF16 or FLOAT) and one shape, [batch, heads, seq, head size], where
            heads and head size are known and batch and seq may be -1.
        causal: whether a query sees only keys at its own position and before.
        scale: by default 1 / sqrt(head size).
        name: of the layer, which also names it in the engine and in messages.
        namespace, library: as :func:`pyfmha.trt.register`.
        trt_module: by default the module that the network is of.

    Returns:
        Out, an ``ITensor`` of the type and shape of Q.

    Raises:
        PluginError: the tensors do not fit, or TensorRT refused the layer.
        LibraryError: the library is missing or cannot be used.
    """
    trt = find_module(trt_module if trt_module is not None else module_of(network))
    if not hasattr(network, "add_plugin_v3"):
        raise PluginError(
            f"{trt.__name__} {trt.__version__} has no plugins in networks; build the engine with tensorrt"
        )
    problem = _problem(dict(zip(INPUTS, (q, k, v), strict=True)), causal, scale)
    creator = register(trt, namespace=namespace, library=library)
    layer_name = name or NAME
    fields = creation_fields(trt, problem)
    with collect_failures() as failures:
        plugin = creator.create_plugin(layer_name, fields.collection, trt.TensorRTPhase.BUILD)
        layer = network.add_plugin_v3([q, k, v], [], plugin)
        # TensorRT asks for types and shapes when the output's are asked for, and shows a failure only by what it
        # answers.
        out = None if layer is None else layer.get_output(0)
        rank = -1 if out is None else len(out.shape)
    if failures:
        raise failures[-1].error
    if out is None or rank != 4:
        raise PluginError(f"{trt.__name__} refused to add {layer_name!r}; its log says why")
    layer.name = layer_name
    return out


def _problem(tensors: dict[str, Any], causal: bool, scale: float | None) -> Problem:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    types = {name: int(tensor.dtype) for name, tensor in tensors.items()}
    shape, kind = shapes["Q"], types["Q"]
    listed = ", ".join(f"{name} {list(shapes[name])} {tensor.dtype}" for name, tensor in tensors.items())
    if len(set(shapes.values())) > 1 or len(set(types.values())) > 1:
        raise PluginError(f"Q, K and V must have one shape and one type, got {listed}")
    if len(shape) != 4 or shape[1] < 1 or shape[3] < 1:
        raise PluginError(
            f"Q, K and V must be [batch, heads, seq, head size] with heads and head size known, got {listed}"
        )
    if kind not in DATA_TYPES:
        raise PluginError(f"Q, K and V must be of type {', '.join(TYPE_NAMES.values())}, got {listed}")
    return Problem(shape[1], shape[3], DATA_TYPES[kind], 1 / math.sqrt(shape[3]) if scale is None else scale, causal)
