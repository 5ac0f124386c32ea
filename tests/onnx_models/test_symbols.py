"""The algebra behind the proofs, against numbers: what is said of any size and index must hold for each."""

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FLOAT, INT64, Graph, counted, size
from onnx.reference import ReferenceEvaluator

from pyfmha.onnx import formulas as f
from pyfmha.onnx.elements import Elements
from pyfmha.onnx.facts import Facts
from pyfmha.onnx.sizes import Size, parsed
from pyfmha.onnx.views import chain, reshaped

SIZES = ({"rows": 4, "keys": 6}, {"rows": 6, "keys": 4}, {"rows": 1, "keys": 1}, {"rows": 3, "keys": 3})


def number(size_: Size, env: dict[str, int]) -> int:
    """The value of an expression; ``h//3`` and ``h%3`` are what they say."""
    total = 0
    for monomial, factor in size_.terms.items():
        for name in monomial:
            factor *= env[name] if name in env else eval(name, {}, dict(env))
        total += factor
    return total


def value(element: Any, env: dict[str, int]) -> Any:
    """What an element is at one index of one size; None for data, and for what hangs on a size that is not known."""
    if isinstance(element, f.Data) or "<" in str(element):
        return None
    if isinstance(element, Size):
        return number(element, env)
    if isinstance(element, f.AtLeast0):
        return number(element.size, env) >= 0
    if isinstance(element, (f.All, f.Some)):
        parts = [value(part, env) for part in element.parts]
        if None in parts:
            return None
        return all(parts) if isinstance(element, f.All) else any(parts)
    if isinstance(element, f.Pick):
        condition = value(element.condition, env)
        return None if condition is None else value(element.yes if condition else element.no, env)
    return element


@given(st.lists(st.integers(-3, 3), min_size=6, max_size=6), st.integers(0, 5), st.integers(0, 5))
def test_sums_and_products(factors: list[int], a: int, b: int) -> None:
    x, y = Size.of("a"), Size.of("b")
    left = x * factors[0] + y * factors[1] + factors[2]
    right = x * factors[3] + y * factors[4] + factors[5]
    env = {"a": a, "b": b}

    assert number(left + right, env) == number(left, env) + number(right, env)
    assert number(left - right, env) == number(left, env) - number(right, env)
    assert number(left * right, env) == number(left, env) * number(right, env)
    assert number(parsed(str(left)), env) == number(left, env)
    if left.at_least_0({"a": Size.of(6), "b": Size.of(6)}):
        assert number(left, env) >= 0


def test_names_that_are_no_expression_stay_themselves() -> None:
    assert parsed("past + seq") - Size.of("past") == Size.of("seq")
    assert parsed("2*(a + b)") == parsed("2*a + 2*b")
    for text in ("floor(a/2)", "a +", "(a", "a b", "-", "max(a, b)"):
        assert parsed(text).symbol == text


@given(st.permutations([2, 3, 4]), st.integers(0, 2), st.booleans())
def test_reshapes_of_indices(sizes: list[int], join: int, back: bool) -> None:
    """Axes that are joined, and taken apart in another way."""
    out = (2, 3, 4)
    shape = tuple(sizes) if not back else (sizes[0] * sizes[1], sizes[2])
    if join:
        shape = (*shape[:-1], 1, shape[-1])
    bounds = {name: Size.of(size_) for name, size_ in zip("abc", out, strict=True)}

    found = reshaped(tuple(map(Size.of, "abc")), tuple(map(Size.of, out)), tuple(map(Size.of, shape)), bounds)

    flat = np.arange(24)
    if found is None:
        assert shape[: len(out)] != out
        return
    for at in np.ndindex(out):
        env = dict(zip("abc", map(int, at), strict=True))
        assert flat.reshape(out)[at] == flat.reshape(shape)[tuple(number(axis, env) for axis in found)]


def _numbers(graph: Graph) -> st.SearchStrategy[str]:
    """Whole numbers [rows, keys] or less, made of indices."""
    rows = graph.op("Unsqueeze", counted(graph, size(graph, "q", 0)), graph.constant(np.array([1])))
    keys = graph.op("Unsqueeze", counted(graph, size(graph, "q", 1)), graph.constant(np.array([0])))
    leaves = st.sampled_from([rows, keys, graph.constant(np.int64(2)), graph.constant(np.int64(-1)),
                              size(graph, "q", 0), size(graph, "q", 1)])  # fmt: skip
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.tuples(st.sampled_from(["Add", "Sub"]), inner, inner).map(lambda t: graph.op(*t)),
            st.tuples(st.sampled_from(["Abs", "Neg"]), inner).map(lambda t: graph.op(*t)),
        ),
        max_leaves=4,
    )


@st.composite
def masks(draw: Any) -> tuple[Graph, str]:
    """A graph with a mask that is made at run time, of a shape that broadcasts to [rows, keys]."""
    graph = Graph()
    graph.input("q", ("rows", "keys"))
    numbers = _numbers(graph)
    compare = st.sampled_from(["Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"])
    conditions = st.recursive(
        st.tuples(compare, numbers, numbers).map(lambda t: graph.op(*t)),
        lambda inner: st.one_of(
            st.tuples(st.sampled_from(["And", "Or"]), inner, inner).map(lambda t: graph.op(*t)),
            inner.map(lambda x: graph.op("Not", x)),
        ),
        max_leaves=3,
    )
    shape = graph.op("Concat", size(graph, "q", 0), size(graph, "q", 1), axis=0)
    mask = graph.op("Expand", graph.op("Cast", draw(conditions), to=FLOAT), shape)
    for change in draw(st.lists(st.sampled_from(["hide", "trilu", "flip", "split", "shift", "cast"]), max_size=3)):
        if change == "hide":
            mask = graph.op("Mul", graph.op("Sub", graph.constant(1.0), mask), graph.constant(-2.0))
        elif change == "trilu":
            k = graph.constant(np.int64(draw(st.integers(-2, 2))))
            mask = graph.op("Trilu", mask, k, upper=draw(st.integers(0, 1)))
        elif change == "flip":
            mask = graph.op("Transpose", graph.op("Transpose", mask, perm=[1, 0]), perm=[1, 0])
        elif change == "split":
            apart = graph.op("Unsqueeze", mask, graph.constant(np.array([0, 2])))
            mask = graph.op("Squeeze", apart, graph.constant(np.array([0, 2])))
        elif change == "shift":
            first = graph.op("Slice", mask, *(graph.constant(np.array([x])) for x in (0, 1, 1)))
            joined = graph.op("Concat", first, mask, axis=1)
            zero, one = graph.constant(np.array([0])), graph.constant(np.array([1]))
            mask = graph.op("Slice", joined, zero, size(graph, "q", 1), one)
        else:
            mask = graph.op("Cast", graph.op("Cast", mask, to=INT64), to=FLOAT)
    graph.output(mask, rank=2)
    return graph, mask


@settings(max_examples=60)
@given(masks())
def test_masks_are_what_they_are_said_to_be(made: tuple[Graph, str]) -> None:
    graph, name = made
    proto = graph.model()
    model = ir.serde.deserialize_model(proto)
    facts = Facts(model.graph)
    bounds = {"i": Size.of("rows"), "j": Size.of("keys")}
    (mask,) = model.graph.outputs
    element = Elements(facts, bounds).at(mask, (Size.of("i"), Size.of("j")))
    evaluator = ReferenceEvaluator(proto)

    assert mask.name == name
    for sizes in SIZES:
        shape = sizes["rows"], sizes["keys"]
        (wanted,) = evaluator.run(None, {"q": np.zeros(shape, np.float32)})
        for i, j in itertools.product(*map(range, shape)):
            got = value(element, {**sizes, "i": i, "j": j})
            assert got is None or float(got) == wanted[i, j]


def test_most_of_these_masks_are_understood() -> None:
    """The test above would pass if nothing were."""
    graph = Graph()
    graph.input("q", ("rows", "keys"))
    rows = graph.op("Unsqueeze", counted(graph, size(graph, "q", 0)), graph.constant(np.array([1])))
    keys = graph.op("Unsqueeze", counted(graph, size(graph, "q", 1)), graph.constant(np.array([0])))
    graph.output(graph.op("Cast", graph.op("LessOrEqual", keys, rows), to=FLOAT), rank=2)
    model = ir.serde.deserialize_model(graph.model())
    bounds = {"i": Size.of("rows"), "j": Size.of("keys")}

    element = Elements(Facts(model.graph), bounds).at(model.graph.outputs[0], (Size.of("i"), Size.of("j")))

    assert element == f.Pick(f.AtLeast0(Size.of("i") - Size.of("j")), Size.of(1), Size.of(0))


@st.composite
def moves(draw: Any) -> tuple[Graph, list[int]]:
    """A graph that only moves the elements of a tensor [2, 3, 4, 5], and the shape that it gives."""
    graph, shape = Graph(), [2, 3, 4, 5]
    x = graph.input("x", tuple(shape))
    kinds = ["turn", "join", "apart", "cut", "pick", "repeat", "widen"]
    for move in draw(st.lists(st.sampled_from(kinds), max_size=5)):
        axis = draw(st.integers(0, len(shape) - 1))
        if move == "turn":
            order = draw(st.permutations(range(len(shape))))
            x, shape = graph.op("Transpose", x, perm=order), [shape[at] for at in order]
        elif move == "join" and axis + 1 < len(shape):
            shape = [*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]]
            x = graph.op("Reshape", x, graph.constant(np.array(shape)))
        elif move == "apart" and shape[axis] % 2 == 0:
            shape = [*shape[:axis], 2, shape[axis] // 2, *shape[axis + 1 :]]
            x = graph.op("Reshape", x, graph.constant(np.array(shape)))
        elif move == "cut" and shape[axis] > 1:
            x = graph.op("Slice", x, *(graph.constant(np.array([at])) for at in (1, shape[axis], axis)))
            shape = [*shape[:axis], shape[axis] - 1, *shape[axis + 1 :]]
        elif move == "pick" and len(shape) > 1:
            x = graph.op("Gather", x, graph.constant(np.int64(draw(st.integers(-1, shape[axis] - 1)))), axis=axis)
            shape = shape[:axis] + shape[axis + 1 :]
        elif move == "repeat":
            x = graph.op("Tile", x, graph.constant(np.array([2 if at == axis else 1 for at in range(len(shape))])))
            shape = [*shape[:axis], 2 * shape[axis], *shape[axis + 1 :]]
        elif move == "widen":
            wide = [*shape[:axis], 3, *shape[axis:]]
            apart = graph.op("Unsqueeze", x, graph.constant(np.array([axis])))
            x = graph.op("Expand", apart, graph.constant(np.array(wide)))
            shape = wide
    graph.output(graph.op("Identity", x), rank=len(shape))
    return graph, shape


@settings(max_examples=60)
@given(moves())
def test_elements_come_from_where_they_are_said_to(made: tuple[Graph, list[int]]) -> None:
    graph, shape = made
    proto = graph.model()
    model = ir.serde.deserialize_model(proto)
    names = [f"n{axis}" for axis in range(len(shape))]
    bounds = {name: Size.of(size_) for name, size_ in zip(names, shape, strict=True)}
    steps = chain(Facts(model.graph), model.graph.outputs[0], tuple(map(Size.of, names)), bounds)
    x = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
    (out,) = ReferenceEvaluator(proto).run(None, {"x": x})

    if steps[-1][0].name == "x":
        for at in np.ndindex(*shape):
            env = dict(zip(names, map(int, at), strict=True))
            assert out[at] == x[tuple(number(axis, env) for axis in steps[-1][1])]


def test_the_widths_of_a_pad_as_the_older_exporter_computes_them() -> None:
    """As Swin fills its image up to whole windows: a remainder, and pairs of widths that are turned around."""
    graph = Graph()
    x = graph.input("x", ("batch", 6, 10, 3))
    whole = [graph.constant(np.int64(number)) for number in (4, 6)]
    missing = graph.op("Mod", graph.op("Sub", whole[0], graph.op("Mod", whole[1], whole[0])), whole[0])
    width = graph.op("Unsqueeze", missing, graph.constant(np.array([0])))
    zeros, ones = graph.constant(np.zeros(5, np.int64)), graph.constant(np.array([0, 1]))
    pairs = graph.op("Reshape", graph.op("Concat", zeros, width, ones, axis=0),
                     graph.constant(np.array([-1, 2])))  # fmt: skip
    ends = [graph.constant(np.array([number])) for number in (-1, -(2**63) + 1, 0, -1)]
    turned = graph.op("Transpose", graph.op("Slice", pairs, *ends), perm=[1, 0])
    pads = graph.op("Reshape", turned, graph.constant(np.array([-1])))
    graph.output(graph.op("Pad", x, pads))
    model = graph.model()

    (out,) = ReferenceEvaluator(model).run(None, {"x": np.zeros((2, 6, 10, 3), np.float32)})

    made = ir.serde.deserialize_model(model).graph
    shape = Facts(made).shape(made.outputs[0])
    assert shape is not None
    assert [str(size_) for size_ in shape] == ["batch + 1", *map(str, out.shape[1:])]
