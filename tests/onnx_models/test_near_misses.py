"""What looks like attention, and is not proven to be what the plugin computes: it is left alone, with the reason."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from models import BOOL, FLOAT, FLOAT16, INT64, Graph, attention, counted, heads, size
from proofs import features_of, problem_of, reason_of, report_of

from pyfmha.errors import OnnxError
from pyfmha.onnx import replace_attention


def _causal(graph: Graph, first: int = 0) -> str:
    """Whether key <= query + first."""
    rows, keys = counted(graph, size(graph, "q", 2)), counted(graph, size(graph, "k", 2))
    rows = graph.op("Unsqueeze", graph.op("Add", rows, graph.constant(np.int64(first))), graph.constant(np.array([1])))
    return str(graph.op("LessOrEqual", graph.op("Unsqueeze", keys, graph.constant(np.array([0]))), rows))


def masked(change: Callable[[Graph, str], str], **shapes: tuple[int | str, ...]) -> onnx.ModelProto:
    """A model whose scores go through a change."""
    graph = Graph()
    q, k, v = heads(graph, **shapes)
    graph.output(attention(graph, q, k, v, mask=lambda scores: change(graph, scores)))
    return graph.model()


def where(hides: float, condition: Callable[[Graph], str] = _causal) -> Callable[[Graph, str], str]:
    return lambda graph, scores: str(graph.op("Where", condition(graph), scores, graph.constant(hides)))


def _first_keys(graph: Graph) -> str:
    """Whether a key is one of the first three."""
    return str(graph.op("Less", counted(graph, size(graph, "k", 2)), graph.constant(np.int64(3))))


def _lengths(graph: Graph, counts: str, other: int) -> str:
    """Whether a key, or a query, lies within a sequence; ``other`` is the axis of those that do not matter."""
    at = graph.op("Unsqueeze", counted(graph, size(graph, counts, 2)), graph.constant(np.array([0, 1, other])))
    if counts == "k":
        at = graph.op("Reshape", at, graph.constant(np.array([1, 1, 1, -1])))
    ends = graph.op("Unsqueeze", graph.input("lengths", ("batch",), INT64), graph.constant(np.array([1, 2, 3])))
    return str(graph.op("Less", at, ends))


NO_MASK = {
    "a number that does not hide": (where(0.0), "writes 0 in the place of scores"),
    "a number that hides small scores only": (where(-10000.0), "-10000"),
    "a first query without a key": (where(-np.inf, lambda g: _causal(g, -1)), "aligned to neither"),
    "a mask whose axes are not proven": (
        lambda g, s: g.op("Where", g.input("mask", ("batch", 1, "rows", "other"), BOOL), s, g.constant(-np.inf)),
        "leave the shape of the scores",
    ),
    "a bias of another type": (
        lambda g, s: g.op("Add", s, g.op("Cast", g.input("bias", ("what",), FLOAT16), to=FLOAT)),
        "leave the shape of the scores",
    ),
    "a soft cap behind a mask": (
        lambda g, s: g.op("Mul", g.op("Tanh", where(-np.inf)(g, s)), g.constant(3.0)), "soft cap comes after a mask",
    ),
    "a scale behind a soft cap": (
        lambda g, s: g.op("Mul", g.op("Mul", g.op("Tanh", s), g.constant(3.0)), g.constant(2.0)), "after the soft cap",
    ),
    "a scale for each key": (
        lambda g, s: g.op("Mul", s, g.input("of_keys", ("keys",))), "which is not proven one for all keys",
    ),
    "a scale for each head behind a mask": (
        lambda g, s: g.op("Mul", where(-np.inf)(g, s), g.constant(np.ones((4, 1, 1)))), "after a soft cap or a mask",
    ),
    "scores that are taken away": (lambda g, s: g.op("Sub", g.constant(1.0), s), "no product of Q and K"),
    "zeros in the place of scores": (lambda g, s: g.op("Trilu", s, upper=0), "no product of Q and K"),
    "keys hidden from all by a number": (
        where(-np.inf, lambda g: g.op("Not", _first_keys(g))), "no causal mask, window or length",
    ),
    "keys hidden by minus infinity behind some that are by a number": (
        lambda g, s: where(-np.inf, lambda g: g.op("Not", _first_keys(g)))(g, where(-3e38)(g, s)),
        "no causal mask, window or length",
    ),
    "finite lengths": (where(-3e38, lambda g: _lengths(g, "k", 2)), "may have length 0"),
    "lengths of queries": (where(-np.inf, lambda g: _lengths(g, "q", 3)), "no causal mask, window or length"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), NO_MASK.values(), ids=list(NO_MASK))
def test_masks_and_scales(change: Callable[[Graph, str], str], reason: str) -> None:
    assert reason in reason_of(masked(change))


WITHOUT_WORDS = {
    "keys shown to all by a number": (where(-np.inf, lambda g: _first_keys(g)), True),
    "two rules of which one is enough": (where(-np.inf, lambda g: g.op("Or", _causal(g), _first_keys(g))), True),
    "keys that may all be hidden by a finite number": (where(-3e38, lambda g: g.op("Not", _first_keys(g))), False),
}


@pytest.mark.parametrize(("change", "mask"), WITHOUT_WORDS.values(), ids=list(WITHOUT_WORDS))
def test_a_rule_without_words_is_a_tensor(change: Callable[[Graph, str], str], mask: bool) -> None:
    """Where each query sees a key, or the model averages all values as we do."""
    features = features_of(masked(change), rows=5, keys=3)

    assert (features.mask, features.bias) == ((True, "") if mask else (False, "fp32"))


def test_weights_that_are_reshaped_are_found() -> None:
    """Here into something else than a batch of heads, as BLOOM and DeBERTa have."""
    graph = Graph()
    q, k, v = heads(graph, (8, "rows", 16), (8, "keys", 16))
    scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 2, 1]))
    by_heads = graph.op("Reshape", scores, graph.constant(np.array([2, 4, 5, 7])))
    weights = graph.op("Reshape", graph.op("Softmax", by_heads, axis=-1), graph.constant(np.array([1, 8, 5, 7])))
    graph.output(graph.op("MatMul", weights, graph.op("Unsqueeze", v, graph.constant(np.array([0])))))

    assert "reshaped between Softmax and the second product" in reason_of(graph.model())


def test_scores_that_a_mask_makes_more() -> None:
    graph = Graph()
    q, k, v = heads(graph, (1, 4, 8, 16), (1, 4, 8, 16))
    mask = graph.constant(np.zeros((3, 1, 1, 1)))
    graph.output(attention(graph, q, k, v, mask=lambda scores: graph.op("Add", scores, mask)))

    assert "leave the shape of the scores" in reason_of(graph.model())


def test_a_window_that_may_leave_queries_without_keys() -> None:
    """With more queries than keys the last ones see none: the model averages all values, the plugin gives zeros."""

    def near(graph: Graph, scores: str) -> str:
        rows, keys = counted(graph, size(graph, "q", 2)), counted(graph, size(graph, "k", 2))
        first = graph.op("Sub", graph.op("Unsqueeze", rows, graph.constant(np.array([1]))), graph.constant(np.int64(2)))
        seen = graph.op("GreaterOrEqual", graph.op("Unsqueeze", keys, graph.constant(np.array([0]))), first)
        return str(graph.op("Where", seen, scores, graph.constant(-np.inf)))

    assert "not proven that its mask leaves every query a key (rows queries, keys keys)" in reason_of(masked(near))


SHAPES = {
    "other batches": ({"k": ("other", 4, "keys", 16)}, "the batch of Q, batch, and of K, other, are not proven"),
    "one batch of keys for all": ({"k": (1, 4, "keys", 16)}, "the batch of Q, batch, and of K, 1"),
    "other lengths": ({"v": ("batch", 4, "values", 16)}, "the length of K, keys, and of V, values"),
    "heads without a number": (
        {"q": ("batch", "heads", "rows", 16), "k": ("batch", "heads", "keys", 16)},
        "the heads of Q, heads, must be a number",
    ),
    "a head size without a number": (
        {"q": ("batch", 4, "rows", "size"), "k": ("batch", 4, "keys", "size")}, "the head size, size, must be a number",
    ),
    "a head size above 256": ({"q": (1, 2, 8, 288), "k": (1, 2, 8, 288)}, "the plugin does not serve it"),
}  # fmt: skip


@pytest.mark.parametrize(("shapes", "reason"), SHAPES.values(), ids=list(SHAPES))
def test_shapes(shapes: dict[str, tuple[int | str, ...]], reason: str) -> None:
    graph = Graph()
    graph.output(attention(graph, *heads(graph, **shapes)))

    assert reason in reason_of(graph.model())


def test_axes_without_names() -> None:
    graph = Graph()
    q, k, v = heads(graph)
    graph.output(attention(graph, q, k, v))
    model = graph.model()
    for value in model.graph.input:
        for axis in value.type.tensor_type.shape.dim:
            axis.ClearField("dim_param")

    assert "not proven to be the same: give free axes names" in reason_of(model)


@pytest.mark.parametrize("name", ["?", "-1"])
def test_axes_whose_name_says_nothing(name: str) -> None:
    """Paddle's exporter calls every size that it does not know "?"; two of them are not one size."""
    graph = Graph()
    graph.output(attention(graph, *heads(graph, (name, 4, "rows", 16), (name, 4, "keys", 16))))

    assert "not proven to be the same: give free axes names" in reason_of(graph.model())


def test_types_that_are_mixed() -> None:
    graph = Graph()
    q, k, v = graph.input("q", (1, 4, 8, 16)), graph.input("k", (1, 4, 8, 16)), graph.input("v", (1, 4, 8, 16), FLOAT16)
    scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
    weights = graph.op("Cast", graph.op("Softmax", scores, axis=-1), to=FLOAT16)
    graph.output(graph.op("MatMul", weights, v), FLOAT16)

    assert "Q, K and V are of types FLOAT, FLOAT, FLOAT16" in reason_of(graph.model())


def test_doubles() -> None:
    graph = Graph(kind=onnx.TensorProto.DOUBLE)
    graph.output(attention(graph, *heads(graph)))

    assert "of type DOUBLE" in reason_of(graph.model())


def test_weights_that_are_read_elsewhere() -> None:
    graph = Graph()
    q, k, v = heads(graph)
    graph.output(attention(graph, q, k, v))
    graph.output(next(node.output[0] for node in graph.nodes if node.op_type == "Softmax"))

    assert "are read by something else, too" in reason_of(graph.model())


@pytest.mark.parametrize(("opset", "axis", "found"), [(17, 2, 0), (11, None, 0), (11, 3, 1)])
def test_a_softmax_over_another_axis_is_no_attention(opset: int, axis: int | None, found: int) -> None:
    """Before opset 13 the axis was 1 by default."""
    graph = Graph(opset)
    q, k, v = heads(graph)
    scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
    weights = graph.op("Softmax", scores, **({} if axis is None else {"axis": axis}))
    graph.output(graph.op("MatMul", weights, v))

    assert len(report_of(graph.model()).replaced) == found


@pytest.mark.parametrize(("seen", "shown"), [(0.5, True), (0.0, False)])
def test_a_condition_cast_from_a_float_that_is_no_whole_number(seen: float, shown: bool) -> None:
    """0.5 is true: cut off to 0 it would hide every key."""
    graph = Graph()
    q, k, v = heads(graph)
    condition = graph.op("Cast", graph.constant(seen), to=BOOL)
    hide = graph.constant(-np.inf)
    graph.output(attention(graph, q, k, v, mask=lambda scores: graph.op("Where", condition, scores, hide)))

    assert [entry.replaced for entry in report_of(graph.model()).found] == [shown]


def test_a_dropout_in_training() -> None:
    graph = Graph()
    q, k, v = heads(graph)
    scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
    training = graph.constant(np.array(True))
    weights = graph.op("Dropout", graph.op("Softmax", scores, axis=-1), graph.constant(np.float32(0.5)), training)
    graph.output(graph.op("MatMul", weights, v))

    assert report_of(graph.model()).found == []


def test_a_value_that_is_scaled_is_taken_as_it_is() -> None:
    graph = Graph()
    q, k, v = heads(graph)
    graph.output(attention(graph, q, k, graph.op("Mul", v, graph.constant(2.0))))
    model, report = replace_attention(graph.model())

    assert len(report.replaced) == 1
    assert [node.op_type for node in model.graph.node].count("Mul") == 1


def test_an_opset_that_is_too_old() -> None:
    graph = Graph(9)
    graph.output(attention(graph, *heads(graph)))

    with pytest.raises(OnnxError, match="opset 9; export it with opset 11 or later"):
        replace_attention(graph.model())


def test_the_model_given_stays_as_it_is() -> None:
    graph = Graph()
    graph.output(attention(graph, *heads(graph)))
    model = graph.model()
    before = model.SerializeToString()

    replace_attention(model)

    assert model.SerializeToString() == before


def test_repeated_heads_of_q_are_heads() -> None:
    """Q and K of two heads, each repeated: four heads of the result, not two."""
    graph = Graph()
    q, k, v = heads(graph, ("batch", 2, "rows", 16), ("batch", 2, "keys", 16))
    twice = graph.constant(np.array([0, 0, 1, 1]))
    q, k, v = (graph.op("Gather", x, twice, axis=1) for x in (q, k, v))
    graph.output(attention(graph, q, k, v))

    problem = problem_of(graph.model())

    assert (problem.num_heads, problem.kv_heads) == (4, 2)


def test_weights_that_are_quantised() -> None:
    graph = Graph()
    q, k, v = heads(graph)
    scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
    whole = graph.op("Cast", graph.op("Softmax", scores, axis=-1), to=INT64)
    graph.output(graph.op("MatMul", graph.op("Cast", whole, to=FLOAT), v))

    assert report_of(graph.model()).found == []


def test_a_mask_aligned_to_lengths() -> None:
    """Lengths beyond the tensor move the mask of the model, and not that of the plugin."""
    graph = Graph()
    q, k, v = heads(graph)
    graph.input("lengths", ("batch",), INT64)
    ends = graph.op("Unsqueeze", "lengths", graph.constant(np.array([1, 2, 3])))
    rows = graph.op("Unsqueeze", counted(graph, size(graph, "q", 2)), graph.constant(np.array([1])))
    keys = graph.op("Unsqueeze", counted(graph, size(graph, "k", 2)), graph.constant(np.array([0])))
    last = graph.op("Sub", graph.op("Add", rows, ends), size(graph, "q", 2))
    seen = graph.op("And", graph.op("Less", keys, ends), graph.op("LessOrEqual", keys, last))
    graph.output(attention(graph, q, k, v, mask=lambda s: graph.op("Where", seen, s, graph.constant(-np.inf))))

    assert "aligned to lengths, which are not proven to lie within the tensor" in reason_of(graph.model())


def test_a_number_that_is_cut_off() -> None:
    """0.5 as a whole number is 0: key <= query + 0.5 is causal, key <= query + 1.5 shows one more."""
    graph = Graph()
    q, k, v = heads(graph)
    rows = graph.op("Add", counted(graph, size(graph, "q", 2)), graph.op("Cast", graph.constant(1.5), to=INT64))
    rows = graph.op("Unsqueeze", rows, graph.constant(np.array([1])))
    keys = graph.op("Unsqueeze", counted(graph, size(graph, "k", 2)), graph.constant(np.array([0])))
    seen = graph.op("LessOrEqual", keys, rows)
    graph.output(attention(graph, q, k, v, mask=lambda s: graph.op("Where", seen, s, graph.constant(-np.inf))))

    problem = problem_of(graph.model())

    assert not problem.causal
    assert problem.features is not None
    assert problem.features.window == (-1, 1)


def test_shapes_that_nobody_knows_stand_in_the_report() -> None:
    """Behind an operator of somebody's own nothing is known."""
    graph = Graph()
    q, k, v = (graph.op("Own", x, domain="com.microsoft") for x in heads(graph))
    graph.output(attention(graph, q, k, v))
    (found,) = report_of(graph.model()).found

    assert found.reason == "the shape of its scores is not known"


def test_behind_onnx_runtimes_fused_normalisation_shapes_and_types_are_known() -> None:
    """Of its four outputs the last is the sum, of the first input's shape and type; ONNX does not infer it."""
    graph = Graph()
    x, gain = graph.input("x", ("batch", "rows", 64)), graph.constant(np.ones(64))
    _, _, _, added = graph.op(
        "SkipSimplifiedLayerNormalization", x, x, gain, outputs=4, domain="com.microsoft", epsilon=1e-6
    )
    split = graph.op("Reshape", added, graph.constant(np.array([0, 0, 4, 16])))
    head = graph.op("Transpose", split, perm=[0, 2, 1, 3])
    graph.output(attention(graph, head, head, head))

    assert problem_of(graph.model()).num_heads == 4


def test_shapes_behind_embeddings_that_are_picked_by_elements() -> None:
    """BERT's token types: GatherElements has the shape of its indices, which ONNX infers as unknown sizes."""
    graph = Graph()
    types = graph.constant(np.zeros((1, 32), np.int64))
    at = graph.op("Unsqueeze", counted(graph, size(graph, graph.input("x", ("batch", "rows", 4, 16)), 1)),
                  graph.constant(np.array([0])))  # fmt: skip
    kinds = graph.op("GatherElements", types, at, axis=1)
    wide = graph.op("Expand", kinds, graph.op("Concat", size(graph, "x", 0), size(graph, "x", 1), axis=0))
    table = graph.constant(np.random.default_rng(0).normal(size=(2, 4, 16)))
    x = graph.op("Transpose", graph.op("Add", "x", graph.op("Gather", table, wide)), perm=[0, 2, 1, 3])
    mask = graph.op("Expand", graph.constant(0.0), graph.op("Concat", *(size(graph, "x", at) for at in (0, 1)), axis=0))
    mask = graph.op("Unsqueeze", mask, graph.constant(np.array([1, 2])))
    graph.output(attention(graph, x, x, x, mask=lambda scores: graph.op("Add", scores, mask)))

    assert problem_of(graph.model()).num_heads == 4
