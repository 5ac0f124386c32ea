"""Expressions against Python's own arithmetic, with the bounds of 64 bits checked beside it."""

import math
import operator
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyfmha.errors import SpecError
from pyfmha.operators.arithmetic import EvaluationError
from pyfmha.operators.expressions import Expression, Parser, Scope
from pyfmha.operators.folding import folded

LIMIT = 1 << 63
TYPES = {"a": "int", "b": "int", "x": "float", "flag": "bool", "word": "str", "list": "int[]", "ratios": "float[]"}
PARSER = Parser(
    TYPES,
    tensors=frozenset({"X"}),
    dtypes=frozenset({"T", "fp16"}),
    options=frozenset({"fast"}),
    launches=frozenset({"main"}),
    attributes=frozenset({"a"}),
    axes=frozenset({"b"}),
)


class Answers(Scope):
    """Answers each question by what the test says."""

    def __init__(self, values: Mapping[str, Any], answers: Mapping[tuple[str, tuple[Any, ...]], Any]) -> None:
        super().__init__(values)
        self.answers = answers

    def ask(self, question: str, words: tuple[Any, ...]) -> Any:
        return self.answers[question, words]


def value(text: str, **values: Any) -> Any:
    return PARSER.parse(text, "test").evaluate(Scope(values))


# ---------------------------------------------------------------- an independent model: a tree, its text and its value


def cut(a: int, b: int) -> int:
    return math.trunc(Fraction(a, b))


INTEGERS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": cut,
    "//": operator.floordiv,
    "%": lambda a, b: a - b * cut(a, b),
    "cdiv": lambda a, b: math.ceil(Fraction(a, b)),
    "min": min,
    "max": max,
}
COMPARISONS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


class NoValueError(Exception):
    pass


def model(tree: Any, values: Mapping[str, int]) -> Any:
    """The value of a tree of tuples; integers beyond 64 bits and divisions by zero have none."""
    match tree:
        case int(number):
            return number
        case str(name):
            return values[name]
        case ("if", condition, yes, no):
            return model(yes if model(condition, values) else no, values)
        case ("and", left, right):
            return model(left, values) and model(right, values)
        case ("or", left, right):
            return model(left, values) or model(right, values)
        case ("not", inside):
            return not model(inside, values)
        case (sign, left, right) if sign in COMPARISONS:
            return COMPARISONS[sign](model(left, values), model(right, values))
        case (sign, left, right):
            one, other = model(left, values), model(right, values)
            if sign in ("/", "//", "%", "cdiv") and other == 0:
                raise NoValueError
            if sign == "%" and not -LIMIT <= cut(one, other) < LIMIT:
                raise NoValueError
            found = INTEGERS[sign](one, other)
            if not -LIMIT <= found < LIMIT:
                raise NoValueError
            return found
    raise AssertionError(tree)


def text_of(tree: Any) -> str:
    match tree:
        case int(number):
            return str(number)
        case str(name):
            return name
        case ("if", condition, yes, no):
            return f"({text_of(yes)} if {text_of(condition)} else {text_of(no)})"
        case ("not", inside):
            return f"(not {text_of(inside)})"
        case (("cdiv" | "min" | "max") as name, left, right):
            return f"{name}({text_of(left)}, {text_of(right)})"
        case (sign, left, right):
            return f"({text_of(left)} {sign} {text_of(right)})"
    raise AssertionError(tree)


EDGES = st.sampled_from([0, 1, -1, 2, 3, 7, LIMIT - 1, -(LIMIT - 1), 1 << 31, 1 << 32])
NUMBERS = EDGES | st.integers(-100, 100)
LEAVES = NUMBERS | st.sampled_from(["a", "b"])


def compound(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    conditions = st.tuples(st.sampled_from(sorted(COMPARISONS)), inner, inner)
    conditions |= st.tuples(st.sampled_from(["and", "or"]), conditions, conditions) | st.tuples(
        st.just("not"), conditions
    )
    return st.tuples(st.sampled_from(sorted(INTEGERS)), inner, inner) | st.tuples(
        st.just("if"), conditions, inner, inner
    )


TREES = st.recursive(LEAVES, compound, max_leaves=12)


@settings(max_examples=400, deadline=None)
@given(tree=TREES, a=NUMBERS | st.just(-LIMIT), b=NUMBERS)
def test_integers_are_pythons_or_refused(tree: Any, a: int, b: int) -> None:
    parsed = PARSER.parse(text_of(tree), "test")
    partly = Expression("", folded(parsed.node, Scope({"a": a})))
    assert "a" not in partly.names()
    assert parsed.type == "int"
    assert parsed.names() == {name for name in ("a", "b") if _named(tree, name)}
    try:
        wanted = model(tree, {"a": a, "b": b})
    except NoValueError:
        with pytest.raises(EvaluationError, match=r"overflows 64 bits, a number is divided by zero"):
            parsed.evaluate(Scope({"a": a, "b": b}))
        with pytest.raises(EvaluationError):
            partly.evaluate(Scope({"b": b}))
    else:
        found = parsed.evaluate(Scope({"a": a, "b": b}))
        assert found == wanted
        assert type(found) is int
        assert partly.evaluate(Scope({"b": b})) == wanted


def _named(tree: Any, name: str) -> bool:
    return tree == name or (isinstance(tree, tuple) and any(_named(part, name) for part in tree[1:]))


@settings(deadline=None)
@given(tree=TREES)
def test_what_an_expression_says_of_itself_is_itself(tree: Any) -> None:
    parsed = PARSER.parse(text_of(tree), "test")
    assert PARSER.parse(parsed.text, "test") == parsed


@settings(deadline=None)
@given(
    a=st.floats(),
    b=st.floats(),
    sign=st.sampled_from(["+", "-", "*", "/"]),
)
def test_floats_are_those_of_64_bits(a: float, b: float, sign: str) -> None:
    parser = Parser({"a": "float", "b": "float"})
    found = parser.parse(f"a {sign} b", "test").evaluate(Scope({"a": a, "b": b}))
    if sign == "/" and b == 0:
        wanted = math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1, b)
    else:
        wanted = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}[sign](a, b)
    assert found == wanted or (math.isnan(found) and math.isnan(wanted))
    assert math.copysign(1, found) == math.copysign(1, wanted) or math.isnan(found)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a + 0.5", 3.5),
        ("a / 2", 1),
        ("a / 2.0", 1.5),
        ("a == 3.0", True),
        ("1 < a <= 3", True),
        ("3 < a < 10", False),
        ("-a", -3),
        ("-x", -0.25),
        ("min(x, 1)", 0.25),
        ("max(x, 1)", 1.0),
        ("1e400 > x", True),
        ("a and not flag", True),
        ("flag or word == 'yes'", True),
        ('word != "yes"', False),
        ("'one' if flag else 'other'", "other"),
        ("list[1]", 5),
        ("list[a - 3]", 4),
        ("ratios[0]", 0.5),
        ("True", True),
    ],
)
def test_values(text: str, wanted: Any) -> None:
    found = value(text, a=3, b=2, x=0.25, flag=False, word="yes", list=(4, 5), ratios=(0.5,))
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(
    ("text", "question", "words", "kind"),
    [
        ("size(X, 1)", "size", ("X", 1), "int"),
        ("stride(X, 0)", "stride", ("X", 0), "int"),
        ("numel(X)", "numel", ("X",), "int"),
        ("itemsize(T)", "itemsize", ("T",), "int"),
        ("itemsize(fp16)", "itemsize", ("fp16",), "int"),
        ("given(a)", "given", ("a",), "bool"),
        ("len(list)", "len", ("list",), "int"),
        ("least(b)", "least", ("b",), "int"),
        ("has(fast)", "has", ("fast",), "bool"),
        ("serves('main', 'kernel')", "serves", ("main", "kernel"), "bool"),
        ("device(memory_clock)", "device", ("memory_clock",), "int"),
    ],
)
def test_questions(text: str, question: str, words: tuple[Any, ...], kind: str) -> None:
    parsed = PARSER.parse(text, "test")
    assert parsed.type == kind
    assert parsed.questions() == {(question, words)}
    answer = True if kind == "bool" else 17
    assert parsed.evaluate(Answers({}, {(question, words): answer})) == answer
    with pytest.raises(EvaluationError):
        parsed.evaluate(Scope({}))


@pytest.mark.parametrize("index", [-1, 2, 1 << 40])
def test_an_index_beyond_a_list_has_no_value(index: int) -> None:
    with pytest.raises(EvaluationError):
        value("list[a]", a=index, list=(1, 2))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a + 0.5", 3.5), ("not flag", True), ("word == 'yes'", True), ("list[a - 2]", 5), ("b > 0 or a == 3", None),
        ("a == 3 or b > 0", True), ("b / 0 if a == 2 else 7", 7), ("flag and b / 0 > 1", False), ("list[b]", None),
        ("list[a]", None), ("-1e400 < x", True), ("1 < a < 5 and not flag", True), ("'one' if flag else word", "yes"),
    ],
)  # fmt: skip
def test_what_follows_from_the_names_that_are_known(text: str, wanted: Any) -> None:
    """None where it does not: ``b`` is not known, and what has no value keeps having none."""
    scope = Scope({"a": 3, "x": 0.25, "flag": False, "word": "yes", "list": (4, 5)})
    node = folded(PARSER.parse(text, "test").node, scope)
    assert (node.value if node.kind == "constant" else None) == wanted


def test_what_is_not_chosen_is_not_computed() -> None:
    assert value("b / a if a != 0 else 7", a=0, b=1) == 7
    assert value("a != 0 and b / a > 0", a=0, b=1) is False
    assert value("a == 0 or b / a > 0", a=0, b=1) is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a +", r"'a \+' is not an expression: use names, numbers"),
        ("", "is not an expression"),
        ("c", "'c' is not known; known are: a, b, flag"),
        ("a.b", "'a.b' is not allowed"),
        ("a ** 2", "is not allowed"),
        ("a << 2", "is not allowed"),
        ("[1, 2]", "is not allowed"),
        ("open('x')", "is not allowed"),
        ("__import__('os')", "is not allowed"),
        ("min(a, key=b)", "is not allowed"),
        ("(lambda: 1)()", "is not allowed"),
        ("a in list", "is not allowed"),
        ("9223372036854775808", "does not fit in 64 bits"),
        ("a + word", "int and str do not go together"),
        ("word + word", "there is no add of str"),
        ("x % 2.0", "there is no mod of floats"),
        ("cdiv(x, 2)", "there is no cdiv of floats"),
        ("cdiv(a)", "cdiv takes two values"),
        ("word < 'b'", "compared by == and != only"),
        ("list == list", "lists are not compared"),
        ("a[0]", "a is of type int, no list"),
        ("list[x]", "'x' is no index"),
        ("word and flag", "'word' is of type str, no condition"),
        ("1.5 if x else 2.0", "'x' is of type float, no condition"),
        ("size(Y, 0)", "size asks of 'Y'; it may ask of X"),
        ("size(X, 8)", "size asks of axis 8; axes are 0 to 7"),
        ("size(X, a)", "size asks of axis 'a'"),
        ("size(X)", "size takes 2 words"),
        ("numel(a + b)", "neither a name nor a number"),
        ("len(a)", "len asks of a, which is no list"),
        ("given(b)", "given asks of 'b'; it may ask of a"),
        ("least(a)", "least asks of 'a'; it may ask of b"),
        ("has(slow)", "has asks of 'slow'; it may ask of fast"),
        ("serves('other', 'k')", "serves asks of 'other'; it may ask of main"),
        ("device(price)", "device asks of 'price'; it may ask of memory_bus, memory_clock, multiprocessors"),
        ("itemsize(fp99)", "itemsize asks of 'fp99'"),
        ("(" * 300 + "a" + ")" * 300, "is not an expression"),
        (" + ".join(["a"] * 3000), "too deep|is not an expression"),
        ("not " * 3000 + "a", "too deep|is not an expression"),
    ],
)
def test_what_is_refused_names_the_part(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        PARSER.parse(text, "rows of X")
    assert str(caught.value).startswith("rows of X: ")


@pytest.mark.parametrize(
    ("text", "wanted", "found"),
    [("a", "float", "float"), (3, "float", "float"), (3, "int", "int"), (0.5, "float", "float")],
)
def test_a_wanted_type(text: Any, wanted: str, found: str) -> None:
    assert PARSER.parse(text, "test", wanted=wanted).type == found


@pytest.mark.parametrize(("text", "wanted"), [("x", "int"), ("flag", "int"), ("'a'", "float"), ("a", "str")])
def test_another_type_than_the_wanted_one(text: str, wanted: str) -> None:
    with pytest.raises(SpecError, match=f"size: .* is of type .*; it must be {wanted}"):
        PARSER.parse(text, "size", wanted=wanted)
