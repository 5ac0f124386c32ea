"""ONNX's Attention of each opset against ONNX's own reference implementation, and ONNX Runtime's against itself."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import FLOAT16, INT64, Graph, heads
from proofs import as_defined, problem_of, reason_of

from pyfmha.onnx import replace_attention
from pyfmha.onnx.prove import prove

MICROSOFT = "com.microsoft"
INT32 = 6
CAUSAL_MASK = np.tril(np.ones((6, 6), bool))
SAME = {"k": ("batch", 4, "rows", 16)}


def of_four_axes(opset: int = 23, extra: tuple[str, ...] = (), outputs: int = 1, **attributes: Any) -> Graph:
    graph = Graph(opset)
    q, k, v = heads(graph)
    made = graph.op("Attention", q, k, v, *extra, outputs=outputs, **attributes)
    graph.output(made if outputs == 1 else made[0])
    return graph


@pytest.mark.parametrize("opset", [23, 24, 25])
@pytest.mark.parametrize(
    ("attributes", "attribute"),
    [
        ({}, ("softmax_scale", 0.25)), ({"scale": 0.5}, ("softmax_scale", 0.5)),
        ({"is_causal": 1}, ("causal", 1)), ({"softcap": 3.0}, ("softcap", 3.0)),
    ],
)  # fmt: skip
def test_attributes(opset: int, attributes: dict[str, Any], attribute: tuple[str, Any]) -> None:
    problem = as_defined(of_four_axes(opset, **attributes).model())

    assert problem.attributes()[attribute[0]] == attribute[1]


@pytest.mark.parametrize("kind", [1, FLOAT16])
def test_three_axes_and_grouped_heads(kind: int) -> None:
    graph = Graph(23, kind)
    q, k, v = graph.input("q", ("batch", "rows", 96)), *(graph.input(name, ("batch", "keys", 32)) for name in "kv")
    graph.output(graph.op("Attention", q, k, v, q_num_heads=6, kv_num_heads=2, is_causal=1), rank=3)

    problem = as_defined(graph.model())

    assert (problem.num_heads, problem.kv_heads, problem.features and problem.features.layout) == (6, 2, "bshd")


@pytest.mark.parametrize("rank", [3, 4])
def test_keys_of_earlier_steps(rank: int) -> None:
    graph = Graph(23)
    if rank == 4:
        q, k, v = heads(graph, ("batch", 4, "rows", 16), ("batch", 2, "rows", 16))
        attributes = {}
    else:
        q, k, v = graph.input("q", ("batch", "rows", 64)), *(graph.input(x, ("batch", "rows", 32)) for x in "kv")
        attributes = {"q_num_heads": 4, "kv_num_heads": 2}
    past = [graph.input(name, ("batch", 2, "past", 16)) for name in ("past_key", "past_value")]
    out, key, value = graph.op("Attention", q, k, v, "", *past, outputs=3, is_causal=1, **attributes)
    graph.output(out, rank=rank)
    graph.output(key)
    graph.output(value)

    problem = as_defined(graph.model())

    assert problem.causal
    assert problem.features is not None
    assert problem.features.bottom_right


def test_lengths_of_opset_24() -> None:
    for causal in (0, 1):
        graph = Graph(24)
        q, k, v = heads(graph)
        graph.input("lengths", ("batch",), INT64)
        graph.output(graph.op("Attention", q, k, v, "", "", "", "lengths", is_causal=causal))

        problem = as_defined(graph.model(), {"lengths": np.array([3, 5])}, batch=2, rows=3, keys=9)

        assert problem.features is not None
        assert (problem.features.kv_lengths, problem.features.bottom_right) == (True, bool(causal))


@pytest.mark.parametrize(("left", "right", "causal"), [(2, -1, 1), (2, 1, 0), (-1, 3, 0), (0, 0, 0), (1, 2, 1)])
def test_windows_of_opset_25(left: int, right: int, causal: int) -> None:
    graph = Graph(25)
    graph.output(graph.op("Attention", *heads(graph), left_window_size=left, right_window_size=right, is_causal=causal))

    problem = as_defined(graph.model(), rows=11, keys=6)

    assert problem.features is not None
    assert problem.features.window == (left, -1 if causal or not right else right)
    assert problem.causal == (causal == 1 or right == 0)


@pytest.mark.parametrize("stored", [CAUSAL_MASK, np.where(CAUSAL_MASK, 0, -np.inf).astype(np.float32)])
def test_a_mask_that_is_causal(stored: Any) -> None:
    graph = Graph(23)
    q, k, v = heads(graph, ("batch", 4, 6, 16), ("batch", 4, 6, 16))
    graph.output(graph.op("Attention", q, k, v, graph.constant(stored, stored.dtype)))

    assert as_defined(graph.model()).causal


def test_what_is_left_alone() -> None:
    weights = Graph(23)
    weights.output(weights.op("Attention", *heads(weights), outputs=4)[3])

    assert "qk_matmul_output is read" in reason_of(weights.model())


def test_a_mask_that_does_not_fit_the_scores() -> None:
    graph = Graph(23)
    q, k, v = heads(graph, (2, 4, 6, 16), (2, 4, 6, 16))
    graph.output(graph.op("Attention", q, k, v, graph.input("mask", (5, 6))))

    assert "its attn_mask mask is not proven to fit the scores" in reason_of(graph.model())


def test_a_mask_that_is_longer_than_the_keys() -> None:
    graph = Graph(23)
    q, k, v = heads(graph, (2, 4, 6, 16), (2, 4, 6, 16))
    graph.output(graph.op("Attention", q, k, v, graph.input("mask", (6, 9))))

    assert "its attn_mask mask is for 9 keys, of which there are 6" in reason_of(graph.model())


def of_rows(graph: Graph, heads_: int = 4, kv_heads: int = 4, keys: str = "rows") -> tuple[str, str, str]:
    """Q, K and V as inputs of three axes."""
    q = graph.input("q", ("batch", "rows", heads_ * 16))
    return q, graph.input("k", ("batch", keys, kv_heads * 16)), graph.input("v", ("batch", keys, kv_heads * 16))


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_multi_head_attention(causal: int, bias: bool) -> None:
    graph = Graph()
    inputs = [*of_rows(graph)]
    if bias:
        inputs.append(graph.constant(np.random.default_rng(0).normal(size=192)))
    made = graph.op("MultiHeadAttention", *inputs, domain=MICROSOFT, num_heads=4, unidirectional=causal)
    graph.output(made, rank=3)

    assert problem_of(graph.model()).causal == bool(causal)


@pytest.mark.parametrize(("bias", "causal"), [(False, 0), (True, 0), (False, 1)])
def test_multi_head_attention_with_earlier_keys(bias: bool, causal: int) -> None:
    graph = Graph()
    inputs = [*of_rows(graph)]
    inputs.append(graph.constant(np.random.default_rng(0).normal(size=192)) if bias else "")
    past = [graph.input(name, ("batch", 4, "past", 16)) for name in ("past_key", "past_value")]
    results = graph.op("MultiHeadAttention", *inputs, "", "", *past, outputs=3, domain=MICROSOFT, num_heads=4,
                       unidirectional=causal)  # fmt: skip
    graph.output(results[0], rank=3)
    for name in results[1:]:
        graph.output(name)

    assert problem_of(graph.model()).causal == bool(causal)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("count", [2, 3])
def test_multi_head_attention_in_one_tensor(count: int, causal: int) -> None:
    """ONNX Runtime's CPU has no such form, and runs the same with the parts taken out before."""

    def model(*, whole: bool) -> onnx.ModelProto:
        graph = Graph()
        packed = graph.input("packed", ("batch", "rows", 4, count, 16))
        inputs = [] if count == 3 else [graph.input("q", ("batch", "rows", 64))]
        parts = [graph.op("Gather", packed, graph.constant(np.array(at)), axis=3) for at in range(count)]
        rows = graph.constant(np.array([0, 0, 64]))
        parts = [graph.op("Reshape", part, rows) for part in parts]
        inputs += [packed] if whole else parts
        made = graph.op("MultiHeadAttention", *inputs, domain=MICROSOFT, num_heads=4, unidirectional=causal)
        graph.output(made, rank=3)
        return graph.model()

    new, report = replace_attention(model(whole=True))

    assert [entry.reason for entry in report.left_alone] == []
    trials = prove(ir.serde.deserialize_model(model(whole=False)), ir.serde.deserialize_model(new))
    assert all(trial.same for trial in trials), trials


def test_multi_head_attention_in_a_tensor_of_another_form() -> None:
    graph = Graph()
    packed = graph.input("packed", ("batch", "rows", 4, 2, 16))
    graph.output(graph.op("MultiHeadAttention", packed, domain=MICROSOFT, num_heads=4), rank=3)

    assert r"shape is ['batch', 'rows', '4', '2', '16'], not [batch, seq, 4, 3, head size]" in reason_of(graph.model())


def test_attention_with_its_projection() -> None:
    graph = Graph()
    random = np.random.default_rng(0)
    weights, bias = graph.constant(random.normal(size=(48, 192))), graph.constant(random.normal(size=192))
    x = graph.input("x", ("batch", "rows", 48))
    graph.output(graph.op("Attention", x, weights, bias, domain=MICROSOFT, num_heads=4, unidirectional=1), rank=3)

    problem = problem_of(graph.model())

    assert problem.causal
    assert problem.features is not None
    assert problem.features.layout == "packed"


def grouped(graph: Graph, inputs: tuple[str, ...], total: str, outputs: int = 1, **attributes: Any) -> Any:
    ends = graph.constant(np.array([0])), graph.constant(np.array([1]))
    last = graph.op("Sub", graph.op("Cast", total, to=INT32), graph.constant(np.int32(1)))
    lengths = graph.op("Expand", last, graph.op("Slice", graph.op("Shape", "q"), *ends))
    whole = graph.op("Cast", graph.op("Squeeze", total, graph.constant(np.array([0]))), to=INT32)
    return graph.op("GroupQueryAttention", *inputs, "", "", lengths, whole, outputs=outputs, domain=MICROSOFT,
                    num_heads=4, kv_num_heads=2, **attributes)  # fmt: skip


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.5}, {"softcap": 2.0}, {"local_window_size": 4}])
def test_group_query_attention(attributes: dict[str, Any]) -> None:
    graph = Graph()
    inputs = of_rows(graph, kv_heads=2)
    total = graph.op("Slice", graph.op("Shape", "q"), *map(graph.constant, (np.array([1]), np.array([2]))))
    out, key, value = grouped(graph, inputs, total, 3, **attributes)
    graph.output(out, rank=3)
    graph.output(key)
    graph.output(value)

    problem = problem_of(graph.model(), rows=13)

    assert (problem.num_heads, problem.kv_heads, problem.causal) == (4, 2, True)


@pytest.mark.parametrize("scale", [None, 0.32])
def test_bfloat16_is_proven_and_what_is_wrong_is_found(scale: float | None) -> None:
    def model(**attributes: Any) -> onnx.ModelProto:
        graph = Graph(23)
        inputs = [graph.input(name, ("batch", 4, "rows", 16), onnx.TensorProto.BFLOAT16) for name in "qkv"]
        graph.output(graph.op("Attention", *inputs, **attributes))
        return graph.model()

    new, _ = replace_attention(model(**({} if scale is None else {"scale": scale})))

    trials = prove(*map(ir.serde.deserialize_model, (model(), new)), sizes={"rows": 33})

    assert {trial.original_by for trial in trials} == {"ONNX's reference implementation"}
    assert all(trial.same for trial in trials) == (scale is None), trials


def test_the_keys_of_all_steps_are_the_operators_own() -> None:
    """K and V are repeated and scaled before the operator: its outputs are what it was given, not what lies deeper."""
    graph = Graph(23)
    q, k, v = heads(graph, k=("batch", 2, "rows", 16))
    twice = graph.constant(np.array([0, 0, 1, 1]))
    k = graph.op("Mul", graph.op("Gather", k, twice, axis=1), graph.constant(2.0))
    past = [graph.input(name, ("batch", 4, "past", 16)) for name in ("past_key", "past_value")]
    out, key, value = graph.op("Attention", q, k, graph.op("Gather", v, twice, axis=1), "", *past, outputs=3)
    for name in (out, key, value):
        graph.output(name)

    assert as_defined(graph.model()).kv_heads == 4


def test_outputs_that_nobody_reads() -> None:
    graph = Graph(23)
    q, k, v = heads(graph)
    graph.output(graph.op("Attention", q, k, v, outputs=3)[0])
    model = graph.model()

    assert as_defined(model).num_heads == 4
    assert [value.name for value in replace_attention(model)[0].graph.output] == [model.graph.output[0].name]


def test_what_onnx_runtime_refuses_runs_by_onnxs_reference() -> None:
    """RotaryEmbedding of opset 23 with more than one sequence, before and beside attention."""
    graph = Graph(23)
    q, k, v = heads(graph, **SAME)
    angles = [graph.constant(np.random.default_rng(seed).normal(size=(12, 8))) for seed in range(2)]
    at = graph.input("at", ("batch", "rows"), INT64)
    q = graph.op("RotaryEmbedding", q, *angles, at)
    graph.output(graph.op("Attention", q, k, v, is_causal=1))

    assert problem_of(graph.model()).causal


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize(("rank", "half"), [(4, 8), (3, 4)])
def test_angles_of_one_sequence_are_written_out(rank: int, half: int, interleaved: int) -> None:
    """TensorRT's parser refuses such a RotaryEmbedding beside a free batch: this is what it gets instead."""
    graph = Graph(23)
    angles = [graph.input(name, (1, "rows", half)) for name in ("cos", "sin")]
    shape = ("batch", 4, "rows", 16) if rank == 4 else ("batch", "rows", 64)
    more = {"rotary_embedding_dim": 2 * half} | ({} if rank == 4 else {"num_heads": 4})
    q, k = (
        graph.op("RotaryEmbedding", graph.input(name, shape), *angles, interleaved=interleaved, **more) for name in "qk"
    )
    heads_of = {} if rank == 4 else {"q_num_heads": 4, "kv_num_heads": 4}
    graph.output(graph.op("Attention", q, k, graph.input("v", shape), **heads_of), rank=rank)
    model = graph.model()

    assert as_defined(model).num_heads == 4
    assert "RotaryEmbedding" not in [node.op_type for node in replace_attention(model)[0].graph.node]


def test_angles_of_each_sequence_stay() -> None:
    graph = Graph(23)
    angles = [graph.input(name, ("batch", "rows", 8)) for name in ("cos", "sin")]
    q, k, v = heads(graph, **SAME)
    q = graph.op("RotaryEmbedding", q, *angles)
    graph.output(graph.op("Attention", q, k, v))

    assert "RotaryEmbedding" in [node.op_type for node in replace_attention(graph.model())[0].graph.node]
