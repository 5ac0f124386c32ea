"""Attention in single steps, as exporters write it: what is proven the same is replaced, and runs the same."""

from collections.abc import Callable

import numpy as np
import pytest
from models import BOOL, FLOAT, FLOAT16, INT64, Graph, attention, counted, heads, size
from proofs import features_of, problem_of, reason_of

from pyfmha.onnx import replace_attention

Q_FIRST = ("batch", "rows", 4, 16)


@pytest.mark.parametrize("where", ["after", "divided", "before", "roots", "none"])
def test_a_scale_wherever_it_stands(where: str) -> None:
    graph = Graph()
    q, k, v = heads(graph)
    scale = None
    if where == "before":
        q = graph.op("Mul", q, graph.constant(0.25))
    elif where == "roots":
        q, k = graph.op("Mul", q, graph.constant(0.5)), graph.op("Mul", k, graph.constant(0.5))
    elif where == "after":
        scale = 0.25
    mask = (lambda s: graph.op("Div", s, graph.constant(4.0))) if where == "divided" else None
    graph.output(attention(graph, q, k, v, scale, mask))

    problem = problem_of(graph.model())

    assert problem.softmax_scale == (1.0 if where == "none" else 0.25)
    assert (problem.num_heads, problem.head_size, problem.dtype, problem.causal) == (4, 16, "fp32", False)


@pytest.mark.parametrize("shape", [(4, 1, 1), ("batch", 4, "rows", 1), (1,)], ids=str)
def test_scales_of_heads_and_rows_multiply_q(shape: tuple[int | str, ...]) -> None:
    """As Swin v2's do."""
    graph = Graph()
    q, k, v = heads(graph)
    factor = graph.op("Exp", graph.input("factor", shape))
    graph.output(attention(graph, q, k, v, mask=lambda s: graph.op("Add", graph.op("Mul", factor, s), _bias(graph))))

    problem = problem_of(graph.model())

    assert (problem.softmax_scale, problem.num_heads) == (0.25, 4)


def _bias(graph: Graph) -> str:
    return graph.input("bias", (1, 4, "rows", "keys"))


def _shifted(graph: Graph, windows: tuple[int, ...], groups: str = "groups") -> str:
    """Attention of windows, of which each of one image has a mask of its own, added twice as Swin v2 does."""
    q, k, v = heads(graph, *((f"4*{groups}", 4, 9, 16),) * 2)
    masks = [graph.constant(np.where(np.random.default_rng(at).random((*windows, 9, 9)) > 0.3, 0, -5.0).astype("f"))
             for at in range(2)]  # fmt: skip
    scale = graph.constant(np.array([0.5, 1, 2, 3], np.float32).reshape(4, 1, 1))

    def change(scores: str) -> str:
        scores = graph.op("Mul", scores, scale)
        scores = graph.op("Reshape", scores, graph.constant(np.array([-1, 4, 4, 9, 9])))
        for mask in masks:
            scores = graph.op("Add", scores, mask)
        return str(graph.op("Reshape", scores, graph.constant(np.array([-1, 4, 9, 9]))))

    return attention(graph, q, k, v, mask=change)


def test_masks_of_the_windows_of_an_image_are_a_bias_of_all() -> None:
    graph = Graph()
    graph.output(_shifted(graph, (1, 4, 1)))

    assert features_of(graph.model(), groups=3).bias == "fp32"


def test_masks_of_groups_of_windows_are_left_alone() -> None:
    """They would be another for each image."""
    graph = Graph()
    graph.output(_shifted(graph, (1, 1, 4)))

    assert "no product of Q and K with scales and masks" in reason_of(graph.model())


@pytest.mark.parametrize("causal", [True, False])
def test_heads_within_the_batch_that_softmax_has_on_their_own(causal: bool) -> None:
    """As BLOOM has them, with a bias of each head before, and a mask behind."""
    graph = Graph()
    q, k, v = heads(graph, ("4*batch", "rows", 16), ("4*batch", "keys", 16))
    graph.input("alibi", ("4*batch", 1, "keys"))
    scores = graph.op("Mul", graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 2, 1])), graph.constant(0.25))
    scores = graph.op("Add", graph.op("Mul", "alibi", graph.constant(0.5)), scores)
    sizes = [graph.op("Shape", x, start=1, end=2) for x in (q, k)]
    apart, joined = (graph.op("Concat", graph.constant(np.array(x)), *sizes, axis=0) for x in ([-1, 4], [-1]))
    scores = graph.op("Reshape", scores, apart)
    if causal:
        rows, keys = (graph.op("Unsqueeze", counted(graph, x), graph.constant(np.array([axis])))
                      for x, axis in zip(sizes, (1, 0), strict=True))  # fmt: skip
        scores = graph.op("Where", graph.op("LessOrEqual", keys, rows), scores, graph.constant(-1e38))
    weights = graph.op("Reshape", graph.op("Softmax", scores, axis=-1), joined)
    graph.output(graph.op("MatMul", weights, v, name="attention"), rank=3)

    problem = problem_of(graph.model(), keys=5, rows=5)

    assert (problem.num_heads, problem.head_size, problem.softmax_scale) == (4, 16, 0.25)
    assert problem.features is not None
    assert problem.features.bias == "fp32"


def test_reshapes_that_change_nothing() -> None:
    """As Falcon has them before and behind Softmax."""
    graph = Graph()
    q, k, v = heads(graph)
    same = graph.constant(np.array([0, 4, 0, -1]))
    scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
    weights = graph.op("Softmax", graph.op("Reshape", scores, same), axis=-1)
    graph.output(graph.op("MatMul", graph.op("Reshape", weights, same), v))

    assert problem_of(graph.model()).softmax_scale == 1


def test_what_is_taken_from_scores_is_added_with_the_other_sign() -> None:
    """As XLNet's mask is, times a number."""
    graph = Graph()
    q, k, v = heads(graph)
    hidden = graph.op("Mul", graph.op("Cast", graph.op("Not", graph.input("seen", ("rows", "keys"), BOOL)), to=FLOAT),
                      graph.constant(5.0))  # fmt: skip
    graph.output(attention(graph, q, k, v, mask=lambda s: graph.op("Sub", s, hidden)))

    assert features_of(graph.model()).bias == "fp32"


@pytest.mark.parametrize("sign", [1, -1])
def test_a_causal_mask_that_is_taken_from_scores(sign: int) -> None:
    graph = Graph()
    q, k, v = heads(graph)
    rows, keys = _rows_and_keys(graph)
    hidden = graph.op("Cast", graph.op("Greater", keys, rows), to=FLOAT)
    mask = graph.op("Mul", hidden, graph.constant(3e38 * sign))
    graph.output(attention(graph, q, k, v, mask=lambda s: graph.op("Sub" if sign > 0 else "Add", s, mask)))

    assert problem_of(graph.model()).causal


def _rows_and_keys(graph: Graph) -> tuple[str, str]:
    """Indices [rows, 1] and [1, keys]."""
    rows, keys = counted(graph, size(graph, "q", 2)), counted(graph, size(graph, "k", 2))
    return (
        graph.op("Unsqueeze", rows, graph.constant(np.array([1]))),
        graph.op("Unsqueeze", keys, graph.constant(np.array([0]))),
    )


def _by_comparison(graph: Graph, scores: str) -> str:
    rows, keys = _rows_and_keys(graph)
    return str(graph.op("Where", graph.op("LessOrEqual", keys, rows), scores, graph.constant(-np.inf)))


def _by_trilu(graph: Graph, scores: str) -> str:
    shape = graph.op("Concat", size(graph, "q", 2), size(graph, "k", 2), axis=0)
    ones = graph.op("Expand", graph.constant(1.0), shape)
    hidden = graph.op("Not", graph.op("Cast", graph.op("Trilu", ones, upper=0), to=BOOL))
    return str(graph.op("Where", hidden, graph.constant(np.finfo(np.float32).min), scores))


def _by_addition(graph: Graph, scores: str) -> str:
    rows, keys = _rows_and_keys(graph)
    seen = graph.op("Cast", graph.op("GreaterOrEqual", rows, keys), to=FLOAT)
    mask = graph.op("Mul", graph.op("Sub", graph.constant(1.0), seen), graph.constant(np.finfo(np.float32).min))
    return str(graph.op("Add", scores, mask))


def _by_a_stored_triangle(graph: Graph, scores: str) -> str:
    """GPT-2's buffer, of which each run takes the first rows and columns."""
    stored, zero = graph.constant(np.tril(np.ones((1, 1, 32, 32), bool))), graph.constant(np.array([0]))
    for axis, end in ((2, size(graph, "q", 2)), (3, size(graph, "k", 2))):
        stored = graph.op("Slice", stored, zero, end, graph.constant(np.array([axis])), graph.constant(np.array([1])))
    return str(graph.op("Where", stored, scores, graph.constant(np.finfo(np.float32).min)))


@pytest.mark.parametrize("mask", [_by_comparison, _by_trilu, _by_addition, _by_a_stored_triangle])
def test_causal_masks_made_at_run_time(mask: Callable[[Graph, str], str]) -> None:
    graph = Graph()
    q, k, v = heads(graph)
    graph.output(attention(graph, q, k, v, mask=lambda scores: mask(graph, scores)))

    problem = problem_of(graph.model())

    assert problem.causal
    assert problem.features is not None
    assert not problem.features.bottom_right
    assert problem.features.window == (-1, -1)


def test_a_mask_behind_keys_of_earlier_steps_is_aligned_bottom_right() -> None:
    graph = Graph()
    q, new, past = graph.input("q", ("batch", 4, "rows", 16)), graph.input("new", ("batch", 4, "rows", 16)), "past"
    graph.input(past, ("batch", 4, "past", 16))
    k = graph.op("Concat", past, new, axis=2)
    rows = counted(graph, graph.op("Add", size(graph, past, 2), size(graph, "q", 2)), size(graph, past, 2))
    keys = counted(graph, size(graph, k, 2))
    rows = graph.op("Unsqueeze", rows, graph.constant(np.array([1])))
    seen = graph.op("LessOrEqual", graph.op("Unsqueeze", keys, graph.constant(np.array([0]))), rows)
    hide = graph.constant(np.finfo(np.float32).min)
    graph.output(attention(graph, q, k, k, mask=lambda scores: graph.op("Where", seen, scores, hide)))

    problem = problem_of(graph.model())

    assert problem.causal
    assert problem.features is not None
    assert problem.features.bottom_right


def test_a_window_becomes_a_window() -> None:
    graph = Graph()
    q, k, v = heads(graph, k=("batch", 4, "rows", 16))
    rows, keys = _rows_and_keys(graph)
    near = graph.op("Greater", keys, graph.op("Sub", rows, graph.constant(np.int64(3))))
    seen = graph.op("And", near, graph.op("LessOrEqual", keys, rows))
    graph.output(attention(graph, q, k, v, mask=lambda s: graph.op("Where", seen, s, graph.constant(-np.inf))))

    problem = problem_of(graph.model())

    assert problem.causal
    assert problem.features is not None
    assert problem.features.window == (2, -1)


def test_a_band_without_causality_is_a_window_on_both_sides() -> None:
    graph = Graph()
    q, k, v = heads(graph, k=("batch", 4, "rows", 16))
    rows, keys = _rows_and_keys(graph)
    far = graph.op("Or",
        graph.op("Less", keys, graph.op("Sub", rows, graph.constant(np.int64(2)))),
        graph.op("Greater", keys, graph.op("Add", rows, graph.constant(np.int64(1)))))  # fmt: skip
    graph.output(attention(graph, q, k, v, mask=lambda s: graph.op("Where", far, graph.constant(-np.inf), s)))

    features = features_of(graph.model())

    assert features.window == (2, 1)


@pytest.mark.parametrize("shows", ["near", "not far", "negative"])
def test_a_distance_of_query_and_key_is_a_window(shows: str) -> None:
    """As ModernBERT has it."""
    graph = Graph()
    q, k, v = heads(graph, k=("batch", 4, "rows", 16))
    distance = graph.op("Abs", graph.op("Sub", *_rows_and_keys(graph)))
    if shows == "near":
        seen = graph.op("LessOrEqual", distance, graph.constant(np.int64(2)))
    elif shows == "not far":
        seen = graph.op("Not", graph.op("Less", graph.constant(np.int64(2)), distance))
    else:
        seen = graph.op("Greater", graph.op("Neg", distance), graph.constant(np.int64(-3)))
    graph.output(attention(graph, q, k, v, mask=lambda s: graph.op("Where", seen, s, graph.constant(-np.inf))))

    assert features_of(graph.model()).window == (2, 2)


def test_what_hides_the_near_keys_is_no_window() -> None:
    graph = Graph()
    q, k, v = heads(graph, k=("batch", 4, "rows", 16))
    distance = graph.op("Abs", graph.op("Sub", *_rows_and_keys(graph)))
    seen = graph.op("GreaterOrEqual", distance, graph.constant(np.int64(2)))
    graph.output(attention(graph, q, k, v, mask=lambda s: graph.op("Where", seen, s, graph.constant(-1e38))))

    features = features_of(graph.model(), rows=5)

    assert (features.window, features.bias) == ((-1, -1), "fp32")


def test_lengths_become_lengths() -> None:
    graph = Graph()
    q, k, v = heads(graph)
    graph.input("lengths", ("batch",), INT64)
    _, keys = _rows_and_keys(graph)
    ends = graph.op("Unsqueeze", "lengths", graph.constant(np.array([1, 2, 3])))
    seen = graph.op("Less", graph.op("Unsqueeze", keys, graph.constant(np.array([0, 1]))), ends)
    graph.output(attention(graph, q, k, v, mask=lambda s: graph.op("Where", seen, s, graph.constant(-np.inf))))

    assert features_of(graph.model(), keys=9).kv_lengths


def test_a_soft_cap_with_a_mask_behind_it() -> None:
    graph = Graph()
    q, k, v = heads(graph)

    def capped(scores: str) -> str:
        scores = graph.op("Mul", graph.op("Tanh", graph.op("Div", scores, graph.constant(30.0))), graph.constant(30.0))
        return _by_comparison(graph, scores)

    graph.output(attention(graph, q, k, v, mask=capped))

    problem = problem_of(graph.model())

    assert problem.features is not None
    assert (problem.features.softcap, problem.softmax_scale, problem.causal) == (30.0, pytest.approx(0.25), True)


def test_softmax_in_float_between_casts() -> None:
    graph = Graph(kind=FLOAT16)
    q, k, v = heads(graph)
    scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
    weights = graph.op("Softmax", graph.op("Cast", scores, to=FLOAT), axis=-1)
    graph.output(graph.op("MatMul", graph.op("Cast", weights, to=FLOAT16), v))

    assert problem_of(graph.model()).dtype == "fp16"


def test_a_row_without_a_key_is_zeros_where_the_model_guards_against_nan() -> None:
    graph = Graph()
    q, k, v = heads(graph)
    rows, keys = _rows_and_keys(graph)
    scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
    ahead = graph.op("GreaterOrEqual", keys, graph.op("Sub", rows, graph.constant(np.int64(2))))
    weights = graph.op("Softmax", graph.op("Where", ahead, scores, graph.constant(-np.inf)), axis=-1)
    weights = graph.op("Where", graph.op("IsNaN", weights), graph.constant(0.0), weights)
    graph.output(graph.op("MatMul", weights, v))

    assert features_of(graph.model(), rows=11, keys=4).window == (2, -1)


def _expanded(graph: Graph, value: str) -> str:
    """transformers' repeat_kv."""
    wide = graph.op("Expand", graph.op("Unsqueeze", value, graph.constant(np.array([2]))),
                    graph.constant(np.array([1, 1, 3, 1, 1])))  # fmt: skip
    return str(graph.op("Reshape", wide, graph.constant(np.array([0, 6, -1, 16]))))


def _gathered(graph: Graph, value: str) -> str:
    return str(graph.op("Gather", value, graph.constant(np.array([0, 0, 0, 1, 1, 1])), axis=1))


@pytest.mark.parametrize("repeat", [_expanded, _gathered])
def test_repeated_key_heads_become_grouped_heads(repeat: Callable[[Graph, str], str]) -> None:
    graph = Graph()
    q, k, v = heads(graph, ("batch", 6, "rows", 16), ("batch", 2, "keys", 16))
    graph.output(attention(graph, q, repeat(graph, k), repeat(graph, v)))

    problem = problem_of(graph.model())

    assert (problem.num_heads, problem.kv_heads) == (6, 2)


def test_one_key_head_that_is_broadcast_serves_all() -> None:
    graph = Graph()
    q, k, v = heads(graph, k=("batch", 1, "keys", 16))
    graph.output(attention(graph, q, k, v))

    assert problem_of(graph.model()).kv_heads == 1


def test_heads_in_another_order_are_not_grouped() -> None:
    """Tile repeats 0 1 0 1, grouping means 0 0 1 1: the tiled tensor itself is taken."""
    graph = Graph()
    q, k, v = heads(graph, k=("batch", 2, "keys", 16))
    twice = graph.constant(np.array([1, 2, 1, 1]))
    graph.output(attention(graph, q, graph.op("Tile", k, twice), graph.op("Tile", v, twice)))

    assert problem_of(graph.model()).kv_heads == 4


def test_transposes_become_a_layout() -> None:
    graph = Graph()
    q, k, v = heads(graph, Q_FIRST, ("batch", "keys", 4, 16))
    across = [0, 2, 1, 3]
    scores = graph.op("MatMul", graph.op("Transpose", q, perm=across), graph.op("Transpose", k, perm=[0, 2, 3, 1]))
    out = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), graph.op("Transpose", v, perm=across))
    graph.output(graph.op("Identity", graph.op("Transpose", out, perm=across)))
    model = graph.model()

    assert features_of(model).layout == "bshd"
    assert "Transpose" not in [node.op_type for node in replace_attention(model)[0].graph.node]


def test_a_projection_split_in_three_is_packed() -> None:
    graph = Graph()
    weights = np.random.default_rng(0).normal(size=(64, 192))
    qkv = graph.op("MatMul", graph.input("x", ("batch", "rows", 64)), graph.constant(weights))
    heads_ = graph.op("Reshape", qkv, graph.constant(np.array([0, 0, 3, 4, 16])))
    parts = graph.op("Split", graph.op("Transpose", heads_, perm=[2, 0, 3, 1, 4]), outputs=3, axis=0)
    q, k, v = (graph.op("Squeeze", part, graph.constant(np.array([0]))) for part in parts)
    graph.output(attention(graph, q, k, v))

    assert features_of(graph.model()).layout == "packed"


def test_parts_of_a_projection_in_another_order_are_not_packed() -> None:
    graph = Graph()
    weights = np.random.default_rng(0).normal(size=(64, 192))
    qkv = graph.op("MatMul", graph.input("x", ("batch", "rows", 64)), graph.constant(weights))
    parts = graph.op("Split", qkv, outputs=3, axis=2)
    k, q, v = (
        graph.op("Transpose", graph.op("Reshape", part, graph.constant(np.array([0, 0, 4, 16]))), perm=[0, 2, 1, 3])
        for part in parts
    )
    graph.output(attention(graph, q, k, v))

    assert features_of(graph.model()).layout == "bshd"


@pytest.mark.parametrize("scores", ["bhqd,bhkd->bhqk", "bhqd,bhkd->hbqk"])
def test_einsum(scores: str) -> None:
    graph = Graph()
    q, k, v = heads(graph)
    weights = graph.op("Softmax", graph.op("Einsum", q, k, equation=scores), axis=-1)
    letters = scores.partition("->")[2]
    graph.output(graph.op("Einsum", weights, v, equation=f"{letters},bhkd->bqhd"))

    problem = problem_of(graph.model())

    assert (problem.num_heads, problem.softmax_scale) == (4, 1.0)


def test_batch_and_heads_in_one_axis() -> None:
    graph = Graph()
    q, k, v = (graph.input(name, ("sequences", "rows", 16)) for name in "qkv")
    scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 2, 1]))
    graph.output(graph.op("MatMul", graph.op("Softmax", scores, axis=-1), v), rank=3)

    assert problem_of(graph.model()).num_heads == 1


def test_onnx_runtimes_fused_product() -> None:
    graph = Graph()
    q, k, v = heads(graph)
    scores = graph.op("FusedMatMul", q, k, domain="com.microsoft", alpha=0.125, transB=1)
    graph.output(graph.op("MatMul", graph.op("Softmax", scores, axis=-1), v))

    assert problem_of(graph.model()).softmax_scale == 0.125
