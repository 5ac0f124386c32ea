"""ONNX's own node tests of Attention through the rewriting: each becomes the plugin's node with ONNX's result, or is
left alone for a reason that is listed here."""

from collections import Counter
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from helpers import LONG
from onnx_cases import attention_cases

from pyfmha.attention.reference import relative_error
from pyfmha.onnx import replace_attention
from pyfmha.onnx.staged import Staged

LEFT_ALONE = {
    "qk_matmul_output is read": 18,  # a fused kernel never has the product
}
"""Part of the reason, and of how many of 93."""


def cases() -> list[Any]:
    return [case for case in attention_cases() if [node.op_type for node in case.model.graph.node] == ["Attention"]]


@pytest.mark.skipif(tuple(map(int, onnx.__version__.split(".")[:2])) < (1, 23), reason="these are the tests of 1.23")
@pytest.mark.parametrize("step", [pytest.param(1, marks=LONG, id="all"), pytest.param(4, id="some")])
def test_every_node_test_is_right_or_left_alone_for_a_reason(step: int) -> None:
    counts: Counter[str] = Counter()
    chosen = cases()[::step]
    for case in chosen:
        new, report = replace_attention(case.model)
        (found,) = report.found
        if not found.replaced:
            counts[next((part for part in LEFT_ALONE if part in found.reason), found.reason)] += 1
            continue
        counts["right"] += 1
        for given, wanted in case.data_sets:
            names = [value.name for value in case.model.graph.input]
            outputs = Staged(ir.serde.deserialize_model(new)).run(dict(zip(names, given, strict=True)))
            for exact, out in zip(wanted, outputs.values(), strict=True):
                assert out.shape == exact.shape, case.name
                limit = 1e-5 if exact.dtype.name == "float32" else 2e-2 if exact.dtype.name == "bfloat16" else 2e-3
                assert relative_error(out.astype("float64"), exact.astype("float64")) < limit, case.name
    assert set(counts) <= {"right", *LEFT_ALONE}, counts
    assert counts["right"] >= len(chosen) // 2
    if step == 1:
        assert {part: counts[part] for part in LEFT_ALONE} == LEFT_ALONE
        assert counts["right"] == len(chosen) - sum(LEFT_ALONE.values())
