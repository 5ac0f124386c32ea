"""Masks and biases that only the run knows become inputs of the plugin, and the result is the model's."""

from collections.abc import Callable

import numpy as np
import pytest
from helpers import LONG
from models import BOOL, FLOAT16, Graph, attention, counted, heads, size
from proofs import as_defined, features_of, problem_of

from pyfmha.onnx import replace_attention

SHAPES = [("batch", 4, "rows", "keys"), ("batch", 1, 1, "keys"), (4, "rows", "keys"), ("rows", "keys"), ("keys",)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_bias_that_is_added(shape: tuple[int | str, ...]) -> None:
    graph = Graph()
    bias = graph.input("bias", shape)
    graph.output(attention(graph, *heads(graph), mask=lambda scores: graph.op("Add", scores, bias)))

    assert features_of(graph.model()).bias == "fp32"


def test_a_bias_of_each_head_that_is_a_constant() -> None:
    graph = Graph(kind=FLOAT16)
    bias = graph.constant(np.linspace(-1, 0, 4).reshape(4, 1, 1))
    graph.output(attention(graph, *heads(graph), mask=lambda scores: graph.op("Add", scores, bias)))

    assert features_of(graph.model()).bias == "fp16"


def test_two_biases_are_one() -> None:
    """As Swin has them: a bias of each head and a mask of each window."""
    graph = Graph()
    bias, mask = graph.input("bias", (4, "rows", "keys")), graph.input("mask", ("batch", 1, "rows", "keys"))
    change = lambda scores: graph.op("Add", graph.op("Add", scores, bias), mask)  # noqa: E731
    graph.output(attention(graph, *heads(graph), mask=change))

    assert features_of(graph.model()).bias == "fp32"


OF_THREE_AXES = [("batch", "rows", "keys"), ("rows", "keys"), ("batch", 1, "keys")]


@pytest.mark.parametrize("shape", [OF_THREE_AXES[0], *(pytest.param(x, marks=LONG) for x in OF_THREE_AXES[1:])])
def test_scores_without_an_axis_of_heads(shape: tuple[int | str, ...]) -> None:
    """As SAM has them: batch and heads are one axis, of the bias too."""
    graph = Graph()
    q, k, v = graph.input("q", ("batch", "rows", 16)), *(graph.input(x, ("batch", "keys", 16)) for x in "kv")
    scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 2, 1]))
    added = graph.op("Add", scores, graph.input("bias", shape))
    graph.output(graph.op("MatMul", graph.op("Softmax", added, axis=-1), v), rank=3)

    assert features_of(graph.model(), rows=5, keys=6).bias == "fp32"


BEHIND = [("batch", "rows", 4, "keys"), ("rows", 1, "keys"), (4, "keys"), ("batch", "rows", 1, 1), ("keys",)]


@pytest.mark.parametrize("kind", [pytest.param(BOOL, marks=LONG), None], ids=["bool", "float"])
@pytest.mark.parametrize(
    "shape",
    [BEHIND[0], BEHIND[2], *(pytest.param(x, marks=LONG) for x in BEHIND[1::2]), pytest.param(BEHIND[4], marks=LONG)],
)
def test_scores_whose_heads_lie_behind_the_queries(shape: tuple[int | str, ...], kind: int | None) -> None:
    graph = Graph()
    q, k, v = graph.input("q", ("batch", "rows", 4, 16)), *(graph.input(x, ("batch", "keys", 4, 16)) for x in "kv")
    scores, mask = graph.op("Einsum", q, k, equation="bqhd,bkhd->bqhk"), graph.input("mask", shape, kind)
    masked = graph.op("Where", mask, scores, graph.constant(-1e30)) if kind else graph.op("Add", scores, mask)
    graph.output(graph.op("Einsum", graph.op("Softmax", masked, axis=-1), v, equation="bqhk,bkhd->bqhd"))

    features = features_of(graph.model(), rows=5, keys=6)
    assert (features.bias, features.mask) == ("fp32", False)


def padding(graph: Graph, lowest: float) -> str:
    """(1 - attention_mask) * lowest, as BERT has it."""
    given = graph.op("Cast", graph.input("attention_mask", ("batch", "keys"), BOOL), to=graph.kind)
    wide = graph.op("Unsqueeze", given, graph.constant(np.array([1, 2])))
    hidden = graph.op("Sub", graph.constant(np.array(1.0)), wide)
    return str(graph.op("Mul", hidden, graph.constant(np.array(lowest))))


@pytest.mark.parametrize("lowest", [-1e4, float(np.finfo(np.float32).min)])
def test_a_mask_of_padding(lowest: float) -> None:
    """Also for a sequence of which nothing counts: the model averages all values, and so does the plugin."""
    graph = Graph()
    mask = padding(graph, lowest)
    graph.output(attention(graph, *heads(graph), mask=lambda scores: graph.op("Add", scores, mask)))

    features = features_of(graph.model())
    assert (features.bias, features.mask) == ("fp32", False)


def causal(graph: Graph) -> str:
    rows, keys = counted(graph, size(graph, "q", 2)), counted(graph, size(graph, "k", 2))
    return str(graph.op("LessOrEqual", keys, graph.op("Unsqueeze", rows, graph.constant(np.array([1])))))


MASKS: dict[str, tuple[Callable[[Graph, str, str], str], tuple[bool, bool]]] = {
    "a key where it is true": (lambda g, s, m: g.op("Where", m, s, g.constant(-1e30)), (False, True)),
    "a key where it is false": (lambda g, s, m: g.op("Where", m, g.constant(-1e30), s), (False, True)),
    "twice": (
        lambda g, s, m: g.op("Where", m, g.op("Where", m, s, g.constant(-3e38)), g.constant(-3e38)), (False, True),
    ),
    "with a causal mask by a finite number": (
        lambda g, s, m: g.op("Where", causal(g), g.op("Where", m, s, g.constant(-1e30)), g.constant(-1e30)),
        (False, True),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), MASKS.values(), ids=list(MASKS))
def test_a_mask_that_chooses(change: Callable[[Graph, str, str], str], expected: tuple[bool, bool]) -> None:
    graph = Graph()
    q, k, v = heads(graph)
    mask = graph.input("mask", ("batch", 1, "rows", "keys"), BOOL)
    graph.output(attention(graph, q, k, v, mask=lambda scores: change(graph, scores, mask)))

    features = features_of(graph.model())
    assert (features.mask, bool(features.bias)) == expected


def test_a_mask_by_minus_infinity_is_the_plugins_own() -> None:
    """A row without a key is NaN in the model: the mask here leaves each its first."""
    graph = Graph()
    first = graph.op("Less", counted(graph, size(graph, "k", 2)), graph.constant(np.int64(1)))
    mask = graph.op("Or", graph.input("mask", ("batch", 4, "rows", "keys"), BOOL), first)
    change = lambda scores: graph.op("Where", mask, scores, graph.constant(-np.inf))  # noqa: E731
    graph.output(attention(graph, *heads(graph), mask=change))

    features = features_of(graph.model())
    assert (features.mask, features.bias) == (True, "")


def test_values_of_another_size() -> None:
    graph = Graph()
    graph.output(attention(graph, *heads(graph, v=("batch", 4, "keys", 24))))

    assert problem_of(graph.model()).v_size == 24


@pytest.mark.parametrize("kind", [BOOL, None], ids=["bool", "float"])
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_the_mask_of_onnx_s_operator(shape: tuple[int | str, ...], kind: int | None) -> None:
    graph = Graph(24)
    q, k, v = heads(graph)
    mask = graph.input("mask", shape, kind)
    # Of a mask for all queries, ONNX's reference implementation makes the causal mask of one query.
    graph.output(graph.op("Attention", q, k, v, mask, is_causal=int(1 not in shape[2:])))

    features = as_defined(graph.model(), rows=5, keys=5).features
    assert features is not None
    assert (features.mask, features.bias) == ((True, "") if kind else (False, "fp32"))


@pytest.mark.parametrize(
    ("length", "kind"),
    [(1, None), ("columns", BOOL), *(pytest.param(x, y, marks=LONG) for x, y in ((4, None), (4, BOOL), (1, BOOL)))],
)
def test_a_mask_that_is_shorter_than_the_keys(length: int | str, kind: int | None) -> None:
    """ONNX hides the keys behind its end, also with a mask of one key, which would broadcast elsewhere."""
    graph = Graph(24)
    q, k, v = heads(graph)
    graph.output(graph.op("Attention", q, k, v, graph.input("mask", ("batch", 1, "rows", length), kind)))
    sizes = {"columns": 5} if length == "columns" else {}

    features = as_defined(graph.model(), rows=5, keys=7, **sizes).features
    assert features is not None
    assert (features.mask, features.bias) == ((True, "") if kind else (False, "fp32"))


def test_a_mask_that_is_shorter_than_earlier_and_new_keys() -> None:
    graph = Graph(24)
    q, k, v = heads(graph)
    past = [graph.input(name, ("batch", 4, "past", 16)) for name in ("past_key", "past_value")]
    graph.output(graph.op("Attention", q, k, v, graph.input("mask", ("rows", "columns"), BOOL), *past))

    features = as_defined(graph.model(), rows=5, keys=4, past=3, columns=6).features
    assert features is not None
    assert features.mask


def test_the_rest_of_a_batch_sees_no_other_node() -> None:
    graph = Graph(24)
    graph.output(graph.op("Attention", *heads(graph), graph.input("mask", ("rows", "keys"), BOOL)))
    new, _ = replace_attention(graph.model())
    assert [node.op_type for node in new.graph.node] == ["TritonFlashAttention"]
