"""Launch-grid expressions: what is allowed, and that C and Python compute the same."""

import ctypes
import itertools
import math
import random
from collections.abc import Callable
from fractions import Fraction

import pytest
from fake_cuda import FakeCuda
from helpers import STRICT, SUCCESS, CLibrary, gcc
from hypothesis import example, given
from hypothesis import strategies as st

from pyfmha.aot.emit_c import TEMPLATES
from pyfmha.errors import SpecError
from pyfmha.spec.grid import GridExpression, parse_grid

NAMES = frozenset({"a", "b", "c"})
INT64 = range(-(1 << 63), 1 << 63)


def parse(text: str, **constants: object) -> GridExpression:
    return parse_grid(text, NAMES, constants)[0]


class Overflow(Exception):
    """A step left 64 bits."""


class Int64:
    """Integers whose every step must stay within 64 bits: the reference for C, without pyfmha's code."""

    def __init__(self, value: int) -> None:
        if value not in INT64:
            raise Overflow
        self.value = value

    def __add__(self, other: "Int64") -> "Int64":
        return Int64(self.value + other.value)

    def __sub__(self, other: "Int64") -> "Int64":
        return Int64(self.value - other.value)

    def __mul__(self, other: "Int64") -> "Int64":
        return Int64(self.value * other.value)

    def __truediv__(self, other: "Int64") -> "Int64":
        return Int64(math.trunc(Fraction(self.value, other.value)))  # C's

    def __floordiv__(self, other: "Int64") -> "Int64":
        return Int64(self.value // other.value)

    def __mod__(self, other: "Int64") -> "Int64":
        return Int64(self.value - other.value * math.trunc(Fraction(self.value, other.value)))  # C's

    def __lt__(self, other: "Int64") -> bool:
        return self.value < other.value


def reference(text: str, values: dict[str, int]) -> int | None:
    """The expression's value; None where it overflows or divides by zero."""

    def cdiv(a: Int64, b: Int64) -> Int64:
        return Int64(0) - (Int64(0) - a) // b

    names = {name: Int64(value) for name, value in values.items()}
    literals = {f"L{n}": Int64(n) for n in LITERALS}
    try:
        result = eval(text, {"cdiv": cdiv, "min": min, "max": max, **names, **literals})
    except (Overflow, ZeroDivisionError):
        return None
    return result.value


LITERALS = (0, 1, 2, 3, 127, 128, 65536, 2**31, 2**40, 2**62)


def random_expression(choose: random.Random, depth: int) -> str:
    if depth == 0 or choose.random() < 0.15:
        return choose.choice(["a", "b", "c", f"L{choose.choice(LITERALS)}"])
    left, right = (random_expression(choose, depth - 1) for _ in range(2))
    operation = choose.choice(["+", "-", "*", "/", "//", "%", "cdiv", "min", "max"])
    return f"{operation}({left}, {right})" if operation.isalpha() else f"({left} {operation} {right})"


def expressions() -> list[str]:
    choose = random.Random(2024)
    every = [f"({x} {op} {y})" for op in ("+", "-", "*", "/", "//", "%") for x, y in itertools.product("ab", repeat=2)]
    every += [f"{call}(a, b)" for call in ("cdiv", "min", "max")]
    return every + [random_expression(choose, 4) for _ in range(200)]


EXPRESSIONS = expressions()


@pytest.fixture(scope="module")
def evaluate_in_c(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int, int, int], int | None]:
    """Evaluates one of EXPRESSIONS with the C that it is translated to; None where C finds it bad."""
    folder = tmp_path_factory.mktemp("grid")
    cases = []
    for index, text in enumerate(EXPRESSIONS):
        constants = {f"L{n}": n for n in LITERALS}
        (node, *_) = parse_grid(text, NAMES, constants)
        cases.append(f"    case {index}: *result = {node.to_c()}; break;")
    source = folder / "grid.c"
    source.write_text(
        '#include "pyfmha_runtime.h"\n'
        "int evaluate(int which, int64_t a, int64_t b, int64_t c, int64_t *result);\n"
        "int evaluate(int which, int64_t a, int64_t b, int64_t c, int64_t *result) {\n"
        "  bool bad = false;\n  switch (which) {\n" + "\n".join(cases) + "\n  }\n  return bad;\n}\n"
    )
    # -ftrapv would turn any overflow that the helpers let through into a crash.
    done = gcc(*STRICT, "-O1", "-ftrapv", "-shared", "-fPIC", f"-I{TEMPLATES}", source, "-o", folder / "grid.so")
    assert done.returncode == 0, done.stderr
    function = ctypes.CDLL(str(folder / "grid.so")).evaluate
    function.argtypes = [ctypes.c_int, *[ctypes.c_int64] * 3, ctypes.POINTER(ctypes.c_int64)]

    def evaluate(which: int, a: int, b: int, c: int) -> int | None:
        result = ctypes.c_int64()
        return None if function(which, a, b, c, ctypes.byref(result)) else result.value

    return evaluate


INTEGERS = st.one_of(
    st.integers(0, 300),
    st.sampled_from([0, 1, 127, 128, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1]),
    st.integers(INT64.start, INT64.stop - 1),
)


@given(st.integers(0, len(EXPRESSIONS) - 1), INTEGERS, INTEGERS, INTEGERS)
@example(EXPRESSIONS.index("(a / b)"), -(2**63), -1, 0)
@example(EXPRESSIONS.index("(a % b)"), -(2**63), -1, 0)
@example(EXPRESSIONS.index("(a % b)"), 5, 0, 0)
@example(EXPRESSIONS.index("(a / b)"), -1, 128, 0)
@example(EXPRESSIONS.index("cdiv(a, b)"), 129, 128, 0)
def test_c_and_python_compute_the_same_or_c_says_bad(
    evaluate_in_c: Callable[[int, int, int, int], int | None], which: int, a: int, b: int, c: int
) -> None:
    text, values = EXPRESSIONS[which], {"a": a, "b": b, "c": c}
    expected = reference(text, values)

    in_c = evaluate_in_c(which, a, b, c)

    assert in_c == expected, text
    if expected is not None:
        assert parse(text, **{f"L{n}": n for n in LITERALS}).evaluate(values) == expected, text


def test_the_random_expressions_reach_both_outcomes() -> None:
    outcomes = [reference(text, {"a": 2**40, "b": 7, "c": 3}) for text in EXPRESSIONS]

    assert 20 < outcomes.count(None) < len(outcomes) - 20


@pytest.mark.parametrize(
    ("text", "seq_len", "blocks"),
    [("(a + 127) / 128", 1, 1), ("(a + 127) / 128", 128, 1), ("(a + 127) // 128", 129, 2), ("cdiv(a, 128)", 0, 0)],
)
def test_the_usual_block_counts(text: str, seq_len: int, blocks: int) -> None:
    assert parse(text).evaluate({"a": seq_len}) == blocks


def test_missing_dimensions_are_one() -> None:
    x, y, z = parse_grid("a, b", NAMES, {})

    assert (x.names(), y.names(), z.names()) == (("a",), ("b",), ())
    assert z.evaluate({}) == 1


def test_constants_of_the_kernel_are_replaced_by_their_values() -> None:
    expression = parse("cdiv(a, BLOCK)", BLOCK=64)

    assert expression.names() == ("a",)
    assert expression.evaluate({"a": 65}) == 2


def test_an_argument_is_spelled_as_the_caller_of_to_c_says() -> None:
    assert parse("a + 1").to_c(lambda name: f"(int64_t){name}_") == "pyfmha_add((int64_t)a_, 1, &bad)"


def test_dividing_by_zero_is_an_error_in_python() -> None:
    with pytest.raises(ZeroDivisionError):
        parse("a / b").evaluate({"a": 1, "b": 0})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not an expression|one to three"),
        ("a +", "is not an expression"),
        ("a, b, c, 1", "one to three"),
        ("a b", "is not an expression"),
        ("a ** 2", "is not allowed"),
        ("a << 1", "is not allowed"),
        ("a if b else c", "is not allowed"),
        ("a.real", "is not allowed"),
        ("a[0]", "is not allowed"),
        ("__import__('os')", "is not allowed"),
        ("1.5", "is not allowed"),
        ("True", "is not allowed"),
        ("'a'", "is not allowed"),
        ("min(a)", "is not allowed"),
        ("min(a, b, c)", "is not allowed"),
        ("cdiv(a, y=2)", "is not allowed"),
        ("lambda: a", "is not allowed|is not an expression"),
        ("d", "'d' is no integer argument.*it has: a, b, c"),
        ("RATE", "RATE is the constant 0.5, not an integer"),
        (f"a + {2**63}", "does not fit in 64 bits"),
        ("(" * 3000 + "a" + ")" * 3000, "is not an expression"),
        ("a, *b", "is not allowed"),
        ("a)(b", "one to three"),
        ("a), (b", "is not allowed"),
        ("a\0b", "is not an expression"),
    ],
)
def test_anything_else_is_refused(text: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        parse_grid(text, NAMES, {"RATE": 0.5})


@given(st.text(alphabet="abc0129+-*/%,() _.[]'x\n", max_size=30))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        dimensions = parse_grid(text, NAMES, {})
    except SpecError:
        return
    assert len(dimensions) == 3


def test_the_grid_that_a_library_launches_is_the_one_python_computes(library: CLibrary, fake_cuda: FakeCuda) -> None:
    (function,) = (f for f in library.manifest.functions if f.name == "product")
    x, y, _ = parse_grid(", ".join(function.algorithms[0][0].images[0].grid), frozenset({"n"}), {"BLOCK_N": 64})
    fake_cuda.use_context()
    assert library.load("product") == SUCCESS

    for n in (128, 192, 1024, 4095):
        assert library.launch("product", 16, 16, 16, n, 64) == SUCCESS
        assert fake_cuda.launches()[-1].grid == (x.evaluate({"n": n}), y.evaluate({"n": n}), 1)


class TestNumberOfMultiprocessors:
    def test_a_grid_reads_it_where_the_kernel_has_no_such_name(self) -> None:
        expression = parse("min(num_sms, a)")

        assert expression.names() == ("num_sms", "a")
        assert expression.to_c() == "pyfmha_min(num_sms, a, &bad)"
        assert expression.evaluate({"num_sms": 132, "a": 500}) == 132

    def test_a_constant_of_that_name_is_meant(self) -> None:
        assert parse("num_sms * a", num_sms=3).evaluate({"a": 5}) == 15

    def test_an_argument_of_that_name_is_meant(self) -> None:
        assert parse_grid("num_sms", frozenset({"num_sms"}), {})[0].names() == ("num_sms",)
