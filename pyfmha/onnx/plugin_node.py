"""The plugin's node computed in float64 by the project's reference, from the attributes that a creator would get."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from pyfmha.attention.fp8 import DESCALES
from pyfmha.attention.reference import attend
from pyfmha.errors import PluginError
from pyfmha.onnx.emit import PARSER
from pyfmha.operators.description import DATA_TYPES
from pyfmha.trt import standin
from pyfmha.trt.attention.beside import BESIDE
from pyfmha.trt.attention.problem import Features, Problem, attention_program
from pyfmha.trt.fields import FIELD_TYPES, attribute_types, read_fields

_KINDS = {"INT32": np.int32, "FLOAT32": np.float32}


def problem_of_node(node: ir.Node) -> Problem:
    """What the creator makes of a node's attributes: read by the very code that reads the plugin's fields.

    Raises:
        PluginError: the creator would refuse them.
    """
    fields, types = [], attribute_types(attention_program())
    for name, attribute in node.attributes.items():
        if name in PARSER:
            continue
        value: Any = attribute.value
        kind = FIELD_TYPES[types.get(name, "int32")]
        data = np.frombuffer(value.encode() + b"\0", np.int8) if kind == "CHAR" else np.array([value], _KINDS[kind])
        fields.append(standin.PluginField(name, data, getattr(standin.PluginFieldType, kind)))
    given = read_fields(standin, attention_program(), fields, stored=False)[0]
    dtype = {number: name for name, number in DATA_TYPES.items()}[given["type_id"]]
    kinds = ("", dtype, "fp32")
    features = Features(
        given["num_kv_heads"],
        given["layout"],
        bool(given["bottom_right"]),
        (given["window_left"], given["window_right"]),
        given["softcap"],
        return_lse=bool(given["return_lse"]),
        q_lengths=bool(given["q_lengths"]),
        kv_lengths=bool(given["kv_lengths"]),
        cu_seqlens=bool(given["cu_seqlens"]),
        bias=kinds[given.get("bias", 0)],
        mask=bool(given.get("mask", 0)),
        sinks=kinds[given.get("sinks", 0)],
        v_head_size=given.get("v_head_size", 0),
        fp8=bool(given.get("fp8", 0)),
        **{name: bool(given.get(name, 0)) for name in DESCALES},
    )
    causal = bool(given["causal"])
    return Problem(given["num_heads"], given["head_size"], dtype, given["softmax_scale"], causal, features)


def computed(node: ir.Node, inputs: Sequence[Any]) -> list[Any]:
    """The outputs of the plugin's node in float64.

    Args:
        node: of our domain.
        inputs: numpy arrays, as the node names them.

    Raises:
        PluginError: the attributes or the shapes are not what the plugin takes.
    """
    problem = problem_of_node(node)
    features = problem.features
    assert features is not None
    if features.fp8:
        raise PluginError("Q, K and V are FP8, which is not computed here: no model's node is replaced by such a one")
    forms = problem.forms(*(array.ndim for array in inputs))
    tensors = dict(zip((form.name for form in forms.inputs), inputs, strict=True))
    q, k, v = _heads_first(problem, tensors)
    out_shape = q.shape[:2] if features.layout == "bhsd" else (q.shape[0], q.shape[2])
    out_shape = (*out_shape, q.shape[2] if features.layout == "bhsd" else q.shape[1], v.shape[3])
    outputs = [out_shape, q.shape[:3]][: len(forms.outputs)]
    problem.instance.measure([array.shape for array in inputs], outputs)
    left, right = features.window
    out, lse = attend(
        q, k, v,
        scale=problem.softmax_scale,
        softcap=features.softcap,
        window_left=left,
        window_right=0 if problem.causal else right,
        bottom_right=features.bottom_right,
        q_lengths=tensors.get("q_lengths"),
        kv_lengths=tensors.get("kv_lengths"),
        **{name: tensors.get(name) for name in BESIDE},
    )  # fmt: skip
    result = out if features.layout == "bhsd" else out.transpose(0, 2, 1, 3)
    return [result, lse][: len(forms.outputs)]


def _heads_first(problem: Problem, tensors: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Q, K and V as [batch, heads, seq, head size]."""
    features = problem.features
    assert features is not None
    if features.layout == "packed":
        qkv = tensors["QKV"]
        if qkv.ndim == 5:
            qkv = qkv.reshape(*qkv.shape[:2], -1, qkv.shape[-1])
        ends = np.cumsum([problem.num_heads, problem.kv_heads])
        parts = np.split(qkv, ends, axis=2)
    else:
        parts = [tensors[name] for name in "QKV"]
    if features.layout == "bhsd":
        return parts[0], parts[1], parts[2]
    q, k, v = (part.transpose(0, 2, 1, 3) for part in parts)
    return q, k, v
