"""Helpers: rewrite a model, and hold what came of it against the original."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from pyfmha.attention.operator import OPERATOR
from pyfmha.attention.reference import relative_error
from pyfmha.onnx import Report, replace_attention
from pyfmha.onnx.inputs import random_inputs, sizes_of
from pyfmha.onnx.prove import prove
from pyfmha.onnx.staged import Runner, Staged
from pyfmha.trt.attention.problem import Features, Problem


def problem_of(model: onnx.ModelProto, **sizes: int) -> Problem:
    """What the one node of ours is created with, after both models were run and compared by ONNX Runtime."""
    new, report = replace_attention(model)
    assert [entry.reason for entry in report.left_alone] == []
    (found,) = report.found
    assert [node.op_type for node in new.graph.node].count(OPERATOR.name) == 1
    trials = prove(ir.serde.deserialize_model(model), ir.serde.deserialize_model(new), sizes=sizes)
    assert trials
    assert all(trial.same for trial in trials), trials
    assert found.problem is not None
    return found.problem


def features_of(model: onnx.ModelProto, **sizes: int) -> Features:
    """The features of the one node of ours."""
    features = problem_of(model, **sizes).features
    assert features is not None
    return features


def as_defined(model: onnx.ModelProto, given: dict[str, Any] | None = None, **sizes: int) -> Problem:
    """As :func:`problem_of`, with the original run by ONNX's own reference implementation."""
    new, report = replace_attention(model)
    assert [entry.reason for entry in report.left_alone] == []
    graph = ir.serde.deserialize_model(model).graph
    for trial in range(3):
        inputs = {**random_inputs(graph, sizes_of(graph, trial, sizes), trial), **(given or {})}
        expected = ReferenceEvaluator(model).run(None, inputs)
        outputs = Staged(ir.serde.deserialize_model(new)).run(inputs)
        for wanted, got in zip(expected, outputs.values(), strict=True):
            assert got.shape == wanted.shape
            assert relative_error(got, wanted) < (1e-5 if wanted.dtype == np.float32 else 2e-3)
    (found,) = report.found
    assert found.problem is not None
    return found.problem


def against_onnx_runtime(
    model: onnx.ModelProto, inputs: dict[str, Any], rows: dict[str, Any] | None = None, limit: float = 2e-6
) -> Problem:
    """What the one node of ours is created with, after ONNX Runtime ran the original on given inputs.

    ``rows`` picks what is compared of an output by name; of the others everything is.
    """
    new, report = replace_attention(model)
    assert [entry.reason for entry in report.left_alone] == []
    expected = Runner(ir.serde.deserialize_model(model)).run(inputs)
    outputs = Staged(ir.serde.deserialize_model(new)).run(inputs)
    for name, wanted in expected.items():
        picked = (rows or {}).get(name, ...)
        assert outputs[name].shape == wanted.shape
        assert relative_error(outputs[name][picked], wanted[picked]) < limit, name
    (found,) = report.found
    assert found.problem is not None
    return found.problem


def reason_of(model: onnx.ModelProto) -> str:
    """Why the one attention of a model is left alone; the model is as it was."""
    new, report = replace_attention(model)
    (found,) = report.found
    assert not found.replaced
    assert [node.op_type for node in new.graph.node] == [node.op_type for node in model.graph.node]
    return found.reason


def report_of(model: onnx.ModelProto) -> Report:
    """The report alone."""
    return replace_attention(model)[1]
