"""Masks, biases, sinks, caches and rotations of ONNX Runtime's attention operators, held against its own kernels."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import LONG, few_of
from models import INT64, Graph
from proofs import against_onnx_runtime, reason_of

from pyfmha.attention.reference import relative_error
from pyfmha.onnx import replace_attention
from pyfmha.onnx.staged import Runner, Staged
from pyfmha.trt.attention.problem import Features, Problem

MICROSOFT = "com.microsoft"
INT32 = 6
BATCH, ROWS, PAST = 2, 5, 3


def numbers(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def features_of(problem: Problem) -> Features:
    assert problem.features is not None
    return problem.features


# Holes, a sequence of which nothing counts, ends and starts of sequences, and a mask of each query.
HOLES = np.array([[1, 0, 1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 0, 1, 1]], np.int32)
NOTHING = np.stack([np.zeros(8, np.int32), HOLES[0]])
EACH_QUERY = np.random.default_rng(3).integers(0, 2, (BATCH, ROWS, 8)).astype(np.int32)
MASKS = {
    "holes": (HOLES, ("batch", "keys")), "nothing counts": (NOTHING, ("batch", "keys")),
    "ends": (np.array([8, 4], np.int32), ("batch",)), "each query": (EACH_QUERY, ("batch", "rows", "keys")),
}  # fmt: skip


OTHERS = ((False, 0), (False, 1), (True, 0))
KEPT = {"MultiHeadAttention": ("holes", "ends"), "Attention": ("nothing counts", "each query")}


def with_mask(operator: str, mask: tuple[Any, tuple[str, ...]], past: bool, bias: bool, **attributes: Any) -> Problem:
    """One operator with a mask, perhaps earlier keys and a bias; five keys are new and three earlier."""
    graph, inputs = Graph(), {}
    keys = ROWS + PAST if past else ROWS
    array, shape = mask[0][..., :keys] if len(mask[1]) > 1 else np.minimum(mask[0], keys), mask[1]

    def given(name: str, value: Any, shape: tuple[int | str, ...], kind: int | None = None) -> str:
        inputs[name] = value
        return graph.input(name, shape, kind)

    def stored(*size: int, seed: int) -> str:
        return graph.constant(numbers(*size, seed=seed))

    earlier = ("batch", 4, "past", 16)
    biases = [given("bias", numbers(BATCH, 1, ROWS, keys, seed=9), ("batch", 1, "rows", "keys"))] if bias else [""]
    hidden = given("mask", array, shape, INT32)
    if operator == "MultiHeadAttention":
        tensors = [given(x, numbers(BATCH, ROWS, 64, seed=i), ("batch", "rows", 64)) for i, x in enumerate("qkv")]
        cache = [given(f"past_{x}", numbers(BATCH, 4, PAST, 16, seed=i), earlier) for i, x in enumerate("kv")]
        tensors += ["", hidden, *biases, *(cache if past else [])]
    else:
        x = given("x", numbers(BATCH, ROWS, 48), ("batch", "rows", 48))
        tensors = [x, stored(48, 192, seed=1), stored(192, seed=2), hidden, "", *biases]
        if past:
            tensors[4] = given("past", numbers(2, BATCH, 4, PAST, 16, seed=5), (2, *earlier))
    names = [entry for entry in tensors if entry]
    graph.inputs = [value for value in graph.inputs if value.name in names]
    made = {"MultiHeadAttention": 3, "Attention": 2}[operator]
    results = graph.op(operator, *tensors, outputs=made, domain=MICROSOFT, num_heads=4, **attributes)
    for name, rank in zip(results, (3, 4, 4) if made == 3 else (3, 5), strict=True):
        graph.output(name, rank=rank)
    # Scores that are all 10000 too small are rounded to the thousandth part of one.
    return against_onnx_runtime(graph.model(), {name: inputs[name] for name in names if name in inputs}, limit=2e-3)


@pytest.mark.parametrize(("past", "causal"), [(True, 1), *(pytest.param(x, y, marks=LONG) for x, y in OTHERS)])
@pytest.mark.parametrize(
    ("operator", "name"),
    few_of(itertools.product(("MultiHeadAttention", "Attention"), MASKS), lambda case: case[1] in KEPT[case[0]]),
)
def test_a_mask_of_whole_numbers(operator: str, name: str, past: bool, causal: int) -> None:
    problem = with_mask(operator, MASKS[name], past, bias=False, unidirectional=causal)

    assert (problem.causal, features_of(problem).bias, features_of(problem).bottom_right) == (causal, "fp32", past)


@pytest.mark.parametrize(("operator", "past"), [("MultiHeadAttention", True), ("Attention", False)])
def test_a_mask_and_a_bias_are_one(operator: str, past: bool) -> None:
    assert features_of(with_mask(operator, MASKS["holes"], past, bias=True, unidirectional=1)).bias == "fp32"


def test_a_mask_by_another_number() -> None:
    """Hidden keys count a little."""
    assert with_mask("MultiHeadAttention", MASKS["holes"], False, False, mask_filter_value=-1.5).num_heads == 4


def test_ends_and_starts() -> None:
    ends = np.array([5, 3, 1, 0], np.int32), (4,)

    def model() -> onnx.ModelProto:
        graph = Graph()
        x = graph.input("x", (BATCH, ROWS, 48))
        weights = [graph.constant(numbers(48, 192, seed=1)), graph.constant(numbers(192, seed=2))]
        mask = graph.input("mask", ends[1], INT32)
        graph.output(graph.op("Attention", x, *weights, mask, domain=MICROSOFT, num_heads=4), rank=3)
        return graph.model()

    against_onnx_runtime(model(), {"x": numbers(BATCH, ROWS, 48), "mask": ends[0]}, limit=1e-5)


@pytest.mark.parametrize("shape", [(1, 4), (2, 1), *(pytest.param(x, marks=LONG) for x in ((1, 1), (2, 4)))])
@pytest.mark.parametrize("operator", ["MultiHeadAttention", "GroupQueryAttention"])
def test_a_bias_of_each_form(operator: str, shape: tuple[int, int]) -> None:
    graph, kv = Graph(), 64 if operator == "MultiHeadAttention" else 32
    q, k, v = (graph.input(x, ("batch", "rows", 64 if x == "q" else kv)) for x in "qkv")
    symbols = ("batch" if shape[0] > 1 else 1, shape[1], "rows", "rows")
    bias = graph.input("bias", symbols)
    inputs = {x: numbers(BATCH, ROWS, 64 if x == "q" else kv, seed=i) for i, x in enumerate("qkv")}
    inputs["bias"] = numbers(*shape, ROWS, ROWS, seed=4)
    if operator == "MultiHeadAttention":
        made = graph.op(operator, q, k, v, "", "", bias, domain=MICROSOFT, num_heads=4)
    else:
        lengths, total = graph.input("lengths", ("batch",), INT32), graph.input("total", (), INT32)
        inputs |= {"lengths": np.full(BATCH, ROWS - 1, np.int32), "total": np.array(ROWS, np.int32)}
        made = graph.op(operator, q, k, v, "", "", lengths, total, "", "", "", bias, domain=MICROSOFT, num_heads=4,
                        kv_num_heads=2, softcap=1.5)  # fmt: skip
    graph.output(made, rank=3)

    assert features_of(against_onnx_runtime(graph.model(), inputs)).bias == "fp32"


def test_values_of_another_size_within_attention() -> None:
    graph = Graph()
    weights = [graph.constant(numbers(48, 64 + 64 + 96, seed=1)), graph.constant(numbers(224, seed=2))]
    made = graph.op("Attention", graph.input("x", ("batch", "rows", 48)), *weights, domain=MICROSOFT, num_heads=4,
                    qkv_hidden_sizes=[64, 64, 96])  # fmt: skip
    graph.output(made, rank=3)

    assert against_onnx_runtime(graph.model(), {"x": numbers(BATCH, ROWS, 48)}, limit=1e-5).v_size == 24


# ---------------------------------------------------------------------- GroupQueryAttention


class Step:
    """One step of a model with a cache: shapes, and what each input holds."""

    def __init__(self, rows: int, lengths: list[int], room: int | None = None, packed: bool = False) -> None:
        self.graph, batch = Graph(), len(lengths)
        self.total = max(lengths)
        self.inputs: dict[str, Any] = {}
        if packed:
            self.tensors = [self.given("q", numbers(batch, rows, 128), ("batch", "rows", 128)), "", ""]
        else:
            sizes = {"q": 64, "k": 32, "v": 32}
            self.tensors = [
                self.given(x, numbers(batch, rows, size, seed=i), ("batch", "rows", size))
                for i, (x, size) in enumerate(sizes.items())
            ]
        for index, x in enumerate("kv"):
            cache = None if room is None else numbers(batch, 2, room, 16, seed=5 + index)
            self.tensors.append("" if cache is None else self.given(f"past_{x}", cache, ("batch", 2, "past", 16)))
        self.tensors.append(self.given("lengths", np.array(lengths, np.int32) - 1, ("batch",), INT32))
        self.tensors.append(self.given("total", np.array(self.total, np.int32), (), INT32))

    def given(self, name: str, value: Any, shape: tuple[int | str, ...], kind: int | None = None) -> str:
        self.inputs[name] = value
        return self.graph.input(name, shape, kind)

    def rotation(self, columns: int = 8, positions: Any = None) -> "Step":
        angles = numbers(32, columns, seed=11)
        self.tensors += [self.graph.constant(function(angles)) for function in (np.cos, np.sin)]
        if positions is not None:
            self.tensors.append(self.given("positions", np.array(positions), ("batch", "rows"), INT64))
        return self

    def further(self, index: int, name: str) -> "Step":
        self.tensors += [""] * (index - len(self.tensors)) + [name]
        return self

    def checked(self, rows: Any = ..., **attributes: Any) -> Problem:
        out, *kept = self.graph.op("GroupQueryAttention", *self.tensors, outputs=3, domain=MICROSOFT, num_heads=4,
                                   kv_num_heads=2, **attributes)  # fmt: skip
        self.graph.output(out, rank=3)
        for name in kept:
            self.graph.output(name)
        return against_onnx_runtime(self.graph.model(), self.inputs, {out: rows})


ROTARY = {"do_rotary": 1}
STEPS: dict[str, tuple[int, list[int], int | None]] = {
    "one row": (1, [7, 7], 6), "of sequences of several lengths": (1, [7, 4], 6), "in a larger cache": (1, [7, 4], 12),
    "several rows": (3, [9], 6), "the first": (5, [5, 5], 0), "the first in a larger cache": (5, [5, 5], 12),
    "without a cache": (5, [5, 3], None),
}  # fmt: skip


@pytest.mark.parametrize(
    "attributes",
    [{"local_window_size": 3, "softcap": 2.0}, {"causal": 0}, *(pytest.param(x, marks=LONG) for x in ({}, ROTARY))],
    ids=str,
)
@pytest.mark.parametrize("name", few_of(STEPS, lambda name: name == "in a larger cache"))
def test_a_step_with_a_cache(name: str, attributes: dict[str, Any]) -> None:
    step = STEPS[name]
    made = Step(*step)
    if "do_rotary" in attributes:
        made.rotation()

    problem = made.checked(np.s_[:, : min(step[1])], **attributes)

    assert problem.causal == bool(attributes.get("causal", 1))
    assert features_of(problem).kv_lengths
    assert features_of(problem).bottom_right == (problem.causal and step[2] is not None)


def test_the_first_step_of_sequences_of_several_lengths() -> None:
    """Rows behind a sequence's end are open; what is seen and kept is not."""
    Step(5, [2, 5], 12).rotation().checked(np.s_[:, :2], do_rotary=1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("interleaved", [pytest.param(0, marks=LONG), 1])
@pytest.mark.parametrize("name", few_of(STEPS, lambda name: name == "several rows"))
def test_rotated_positions(name: str, interleaved: int, packed: bool) -> None:
    made, rows = Step(*STEPS[name], packed=packed).rotation(), min(STEPS[name][1])

    assert made.checked(np.s_[:, :rows], do_rotary=1, rotary_interleaved=interleaved).kv_heads == 2


@pytest.mark.parametrize(
    ("step", "positions"),
    [
        pytest.param((1, [7, 4], 6), [[2], [9]], marks=LONG), ((3, [9], 6), [[9, 2, 5]]),
        ((3, [3, 3], 0), [[4, 9, 9], [1, 2, 3]]),
        pytest.param((3, [3, 3], None), [[4, 9, 9], [1, 2, 3]], marks=LONG),
    ],
)  # fmt: skip
def test_positions_that_are_given(step: Any, positions: Any) -> None:
    """Of a first step only the first number counts."""
    Step(*step).rotation(positions=positions).checked(do_rotary=1)


@pytest.mark.parametrize(("step", "packed"), [((1, [7, 4], 12), False), ((3, [9], 6), True)])
def test_a_bias_beside_a_cache(step: Any, packed: bool) -> None:
    made = Step(*step, packed=packed)
    bias = numbers(len(step[1]), 4, step[0], made.total, seed=3)
    made.further(10, made.given("bias", bias, ("batch", 4, "rows", "total_keys")))

    assert features_of(made.checked()).bias == "fp32"


@pytest.mark.parametrize("step", [pytest.param((1, [7, 4], 12), marks=LONG), (5, [5, 5], None)])
@pytest.mark.parametrize("attributes", [{}, {"smooth_softmax": 1}, {"head_sink": True, "smooth_softmax": 1}], ids=str)
def test_sinks(step: Any, attributes: dict[str, Any]) -> None:
    made = Step(*step)
    if attributes.pop("head_sink", not attributes):
        made.further(11, made.given("sink", numbers(4, seed=8), (4,)))

    assert features_of(made.checked(**attributes)).sinks == "fp32"


def test_a_cache_that_is_proven_to_be_even_is_a_concatenation() -> None:
    graph = Graph()
    q, k, v = (graph.input(x, ("batch", "rows", size)) for x, size in zip("qkv", (64, 32, 32), strict=True))
    past = [graph.input(f"past_{x}", ("batch", 2, "past", 16)) for x in "kv"]
    ends = [graph.constant(np.array([number])) for number in (0, 1, 2, 3)]
    total = graph.op("Add", graph.op("Slice", graph.op("Shape", q), *ends[1:3]),
                     graph.op("Slice", graph.op("Shape", past[0]), *ends[2:4]))  # fmt: skip
    last = graph.op("Cast", graph.op("Sub", total, graph.constant(np.int64(1))), to=INT32)
    lengths = graph.op("Expand", last, graph.op("Slice", graph.op("Shape", q), *ends[:2]))
    whole = graph.op("Cast", graph.op("Squeeze", total, ends[0]), to=INT32)
    angles = [graph.constant(function(numbers(32, 8))) for function in (np.cos, np.sin)]
    results = graph.op("GroupQueryAttention", q, k, v, *past, lengths, whole, *angles, outputs=3, domain=MICROSOFT,
                       num_heads=4, kv_num_heads=2, do_rotary=1)  # fmt: skip
    for name, rank in zip(results, (3, 4, 4), strict=True):
        graph.output(name, rank=rank)
    sizes = {"q": (1, 3, 64), "k": (1, 3, 32), "v": (1, 3, 32), "past_k": (1, 2, 6, 16), "past_v": (1, 2, 6, 16)}

    problem = against_onnx_runtime(graph.model(), {name: numbers(*shape) for name, shape in sizes.items()})

    assert (features_of(problem).kv_lengths, features_of(problem).bottom_right) == (False, True)
    assert "GatherElements" not in [node.op_type for node in replace_attention(graph.model())[0].graph.node]


def test_what_is_left_alone() -> None:
    normed = Step(1, [7, 4], 6).further(14, "norm").further(15, "norm")
    normed.given("norm", numbers(16), (16,))
    chunk = Step(1, [7, 4], 6)
    chunk.further(16, chunk.given("counts", np.array([1, 1], np.int32), ("batch",), INT32))
    window = Step(1, [7, 4], 6)
    for made, attributes in ((normed, {}), (chunk, {}), (window, {"sliding_window_cache": 1, "local_window_size": 4})):
        made.graph.output(made.graph.op("GroupQueryAttention", *made.tensors, domain=MICROSOFT, num_heads=4,
                                        kv_num_heads=2, **attributes), rank=3)  # fmt: skip
    mask = Graph()
    inputs = [mask.input(x, ("batch", "rows", 64)) for x in "qkv"]
    inputs += ["", mask.input("mask", ("others",), INT32)]
    mask.output(mask.op("MultiHeadAttention", *inputs, domain=MICROSOFT, num_heads=4), rank=3)

    assert "its input q_norm_weight is given" in reason_of(normed.graph.model())
    assert "its input query_seqlens is given" in reason_of(chunk.graph.model())
    assert "its attribute sliding_window_cache is 1" in reason_of(window.graph.model())
    assert "mask is of shape [others], which is not proven to be batch or twice that" in reason_of(mask.model())


def test_one_behind_another_and_the_command_that_builds_what_they_need() -> None:
    """Shapes are followed through operators that ONNX does not know."""
    graph = Graph()
    inputs = [graph.input(x, ("batch", "rows", 64)) for x in "qkv"]
    mask, weights = graph.input("mask", ("batch", "rows"), INT32), graph.constant(numbers(64, 192))
    first = graph.op("MultiHeadAttention", *inputs, "", mask, domain=MICROSOFT, num_heads=4)
    second = graph.op("Attention", first, weights, domain=MICROSOFT, num_heads=4)
    lengths, total = graph.input("lengths", ("batch",), INT32), graph.input("total", (), INT32)
    third = graph.op("GroupQueryAttention", second, second, second, "", "", lengths, total, domain=MICROSOFT,
                     num_heads=4, kv_num_heads=4)  # fmt: skip
    last = graph.op("MultiHeadAttention", third, third, third, domain=MICROSOFT, num_heads=4)
    graph.output(graph.op("LongformerAttention", last, domain=MICROSOFT), rank=3)

    _, report = replace_attention(graph.model())

    assert [entry.reason for entry in report.left_alone] == [
        "LongformerAttention is not read here; export the model with MultiHeadAttention or without fused operators"
    ]
    assert len(report.replaced) == 4
    assert report.build_command == (
        "pyfmha build --kernels basic forward decode hopper values biased --dtype fp32 --head-size 32"
    )


def test_what_several_nodes_need_is_computed_once() -> None:
    """Places in the cache and rotated positions; the model's own twins stay as they are."""
    graph = Step(1, [7, 4], 6).rotation()
    first, *_ = graph.graph.op("GroupQueryAttention", *graph.tensors, outputs=3, domain=MICROSOFT, num_heads=4,
                               kv_num_heads=2, do_rotary=1)  # fmt: skip
    twins = [graph.graph.op("Relu", first) for _ in range(2)]
    tensors = [graph.graph.op("Add", *twins), *graph.tensors[1:]]
    last, *_ = graph.graph.op("GroupQueryAttention", *tensors, outputs=3, domain=MICROSOFT, num_heads=4,
                              kv_num_heads=2, do_rotary=1)  # fmt: skip
    graph.graph.output(last, rank=3)
    model = graph.graph.model()

    new, report = replace_attention(model)

    assert len(report.replaced) == 2
    counts = Counter(node.op_type for node in new.graph.node)
    assert (counts["Relu"], counts["TritonFlashAttention"]) == (2, 2)
    made = [
        (node.op_type, *node.input, *(attribute.SerializeToString() for attribute in node.attribute))
        for node in new.graph.node
        if node.op_type != "Relu"
    ]
    assert len(set(made)) == len(made)
    expected = Runner(ir.serde.deserialize_model(model)).run(graph.inputs)
    outputs = Staged(ir.serde.deserialize_model(new)).run(graph.inputs)
    assert relative_error(outputs[last], expected[last]) < 2e-6
