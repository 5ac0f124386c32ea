"""ONNX's own tests of its operator Attention, by the kernel with biases and masks under the interpreter.

What the kernel does not give is the product q . k as an output (`qk_matmul_output`): of nodes that ask for it, the rest
is checked. The cache's outputs are concatenations of inputs.
"""

from typing import Any

import numpy as np
import pytest
from biased_runs import Placed, Problem, launch, place
from forward_runs import LIMITS
from helpers import some_of
from onnx_cases import attention_cases

from pyfmha.attention.reference import relative_error
from pyfmha.attention.run import to_storage

onnx = pytest.importorskip("onnx", minversion="1.23")

SERVED = {
    "is_causal", "kv_num_heads", "left_window_size", "q_num_heads", "qk_matmul_output_mode", "right_window_size",
    "scale", "softcap",
    "softmax_precision",  # float32 always
}  # fmt: skip
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


NODES = {
    case.name: case for case in attention_cases() if [node.op_type for node in case.model.graph.node] == ["Attention"]
}
"""Those of one Attention node each, by name."""


def attributes_of(case: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in case.model.graph.node[0].attribute}


def values_of(case: Any, which: int) -> dict[str, np.ndarray]:
    """The node's inputs (0) or outputs (1) by their names in the operator."""
    node = case.model.graph.node[0]
    names = (
        ("Q", "K", "V", "mask", "past_key", "past_value", "kv_lengths"),
        ("Y", "present_key", "present_value", "qk_matmul_output"),
    )[which]
    given = (node.input, node.output)[which]
    arrays = iter(case.data_sets[0][which])
    return {name: next(arrays) for name, held in zip(names, given, strict=False) if held}


def heads_first(x: np.ndarray, heads: int | None) -> np.ndarray:
    """[batch, heads, seq, head size], of that or of [batch, seq, heads * head size]."""
    if x.ndim == 4:
        return x
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def limits(attributes: dict[str, Any], past: int, padded: bool, q_len: int, kv_len: int) -> dict[str, Any]:
    """The window: a query stands at the length of the past, or at that of the keys that count less the queries."""
    left, right = attributes.get("left_window_size", -1), attributes.get("right_window_size", -1)
    if attributes.get("is_causal"):
        right = 0
    if padded:
        return {"left": left, "right": right, "bottom_right": True}
    shift = kv_len - q_len  # where the last query would stand at the last key
    if left >= 0 and left < past:
        assert right < 0 or past >= shift
        right = right if right < 0 else right + past - shift
        return {"left": left - past + shift, "right": right, "bottom_right": True}
    return {"left": left if left < 0 else left - past, "right": right if right < 0 else right + past}


def prepare(case: Any) -> tuple[Problem, Placed, dict[str, np.ndarray]]:
    """The problem of a node, its tensors placed, and what the outputs should be."""
    attributes, given = attributes_of(case), values_of(case, 0)
    q = heads_first(given["Q"], attributes.get("q_num_heads"))
    k, v = (heads_first(given[name], attributes.get("kv_num_heads")) for name in "KV")
    past = given["past_key"].shape[2] if "past_key" in given else 0
    if past:
        k, v = (np.concatenate([given[n], x], 2) for n, x in (("past_key", k), ("past_value", v)))
    dtype = DTYPES[q.dtype.name]
    mask = given.get("mask")
    shape = None if mask is None else (1,) * (4 - mask.ndim) + mask.shape
    kind = "bias" if mask is not None and mask.dtype != bool else "mask"
    lengths = given.get("kv_lengths")
    problem = Problem(
        dtype=dtype, batch=q.shape[0], heads=q.shape[1], kv_heads=k.shape[1], q_len=q.shape[2], kv_len=k.shape[2],
        head_size=q.shape[3], v_head_size=v.shape[3], scale=attributes.get("scale"),
        softcap=attributes.get("softcap", 0.0), **({} if shape is None else {kind: shape}),
        kv_lengths=None if lengths is None else lengths.tolist(),
        **limits(attributes, past, lengths is not None, q.shape[2], k.shape[2]),
    )  # fmt: skip

    def edit(values: dict[str, np.ndarray]) -> None:
        for name, x in (("Q", q), ("K", k), ("V", v), ("bias", mask if kind == "bias" else None)):
            if x is not None:
                values[name][...] = to_storage(x.astype(np.float32), dtype).reshape(values[name].shape)
        if mask is not None and kind == "mask":
            values["mask"][...] = mask

    return problem, place(problem, edit), {"present_key": k, "present_value": v}


@pytest.mark.parametrize("name", some_of(sorted(NODES)))
def test_node(name: str) -> None:
    case = NODES[name]
    unknown = set(attributes_of(case)) - SERVED
    if unknown:
        pytest.skip(f"attribute {', '.join(sorted(unknown))} is not served")
    problem, made, present = prepare(case)
    out, _ = launch(problem, made)

    wanted = values_of(case, 1)
    exact = heads_first(wanted["Y"].astype(np.float64), attributes_of(case).get("q_num_heads"))
    assert out.shape == exact.shape
    assert relative_error(out, exact) <= 2 * LIMITS[problem.dtype]  # theirs is rounded, too
    for key in set(present) & set(wanted):
        np.testing.assert_array_equal(present[key], wanted[key])


def test_all_of_them_are_served() -> None:
    """93 in onnx 1.23, whichever has more; all attributes of today are known."""
    assert len(NODES) >= 93
    assert all(set(attributes_of(case)) <= SERVED for case in NODES.values())
    with_products = [name for name, case in NODES.items() if "qk_matmul_output" in values_of(case, 1)]
    assert len(with_products) >= 17
