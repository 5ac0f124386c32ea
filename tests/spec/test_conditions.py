"""Conditions on arguments: what is allowed, and that C and Python agree on whether they hold."""

import ctypes
import itertools
import struct
from pathlib import Path

import pytest
from helpers import STRICT, gcc

from pyfmha.aot.emit_c import TEMPLATES
from pyfmha.errors import SpecError
from pyfmha.spec.abi import ctype
from pyfmha.spec.conditions import parse_condition

TYPES = {
    **{"p": "*fp16", "q": "*i32", "flag": "i1", "small": "i8", "n": "i32", "m": "i32", "wide": "i64"},
    **{"byte": "u8", "word": "u32", "huge": "u64", "length": "u64", "x": "fp32", "y": "fp16", "z": "fp64"},
}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("m >= n", ("m", None, ">=", "n")),
        ("  m>=n ", ("m", None, ">=", "n")),
        ("wide % 8 == 0", ("wide", 8, "==", 0)),
        ("n % 16 == 3", ("n", 16, "==", 3)),
        ("n == 64", ("n", None, "==", 64)),
        ("x == 0", ("x", None, "==", 0)),
        ("p != 0", ("p", None, "!=", 0)),
        ("p % 128 == 0", ("p", 128, "==", 0)),
        ("n == -1", ("n", None, "==", -1)),
        ("x > -3", ("x", None, ">", -3)),
        ("huge < 18446744073709551615", ("huge", None, "<", (1 << 64) - 1)),
        ("wide != -9223372036854775808", ("wide", None, "!=", -(1 << 63))),
        ("p == q", ("p", None, "==", "q")),
        ("x <= z", ("x", None, "<=", "z")),
        ("byte < huge", ("byte", None, "<", "huge")),
    ],
)
def test_what_is_allowed(text: str, parts: tuple[object, ...]) -> None:
    found = parse_condition(text, TYPES)

    assert (found.name, found.modulus, found.operator, found.value) == parts
    assert parse_condition(found.text, TYPES) == found


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("n * m > 128", ("n", "m", ">", 128)),
        ("n*600 <= m", ("n", 600, "<=", "m")),
        ("n * -3 != m", ("n", -3, "!=", "m")),
    ],
)
def test_products_of_32_bits_are_compared(text: str, parts: tuple[object, ...]) -> None:
    found = parse_condition(text, TYPES)

    assert (found.name, found.factor, found.operator, found.value) == parts
    assert set(found.names) == {part for part in parts[:2] + parts[3:] if isinstance(part, str)}
    assert parse_condition(found.text, TYPES) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not an expression"),
        ("n =! 3", "is not an expression"),
        ("n", "is not allowed: use"),
        ("3 < n", "is not allowed"),
        ("0 < n < 3", "is not allowed"),
        ("n in m", "is not allowed"),
        ("n + 1 == 3", "is not allowed"),
        ("3 * n == 3", "is not allowed"),
        ("n * m * n == 3", "is not allowed"),
        ("n * wide == 3", "wide is i64; products are of i32"),
        ("n * m < x", "x is fp32; products are of i32"),
        ("n * 3 < p", "products are of i32"),
        ("n * 2147483648 == 3", "2147483648 does not fit 32 bits"),
        ("n % 8 != 0", "is not allowed"),
        ("n % m == 0", "is not allowed"),
        ("n == 3 and m == 3", "is not allowed"),
        ("__import__('os') == 3", "is not allowed"),
        ("n == 1.5", "'1.5' is neither an integer nor an argument"),
        ("n == True", "'True' is neither an integer nor an argument"),
        ("n == m + 1", "'m \\+ 1' is neither an integer nor an argument"),
        ("k == 3", "'k' is no argument; there are: p, q, flag"),
        ("n == k", "'k' is no argument"),
        ("n == n", "compares n with itself"),
        ("x % 8 == 0", "x is fp32, which has no remainder"),
        ("n % 0 == 0", "the modulus is 0, allowed is 1 to"),
        ("n % 8 == 8", "the remainder is 8, allowed is 0 to 7"),
        ("n % 8 == True", "the remainder is True, allowed is 0 to 7"),
        ("n == 2147483648", "2147483648 is no value of n; i32 holds -2147483648 to 2147483647"),
        ("word == -1", "-1 is no value of word"),
        ("p >= 0", "p is never negative"),
        ("flag < 0", "flag is never negative"),
        ("x == 36028797018963968", "is no value of x"),
        ("n == p", "compares integer with pointer"),
        ("x == n", "compares float with integer"),
        ("huge > n", "compares u64 with a signed integer"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        parse_condition(text, TYPES)


def interesting(kind: str) -> list[float]:
    """Values of a type at which comparisons go wrong."""
    entry = ctype(kind)
    if entry.kind == "float":
        return [0.0, -0.0, 0.5, -3.0, 64.0, float("inf"), float("-inf"), float("nan")]
    low, high = entry.bounds or (0, (1 << 64) - 1)
    return [v for v in (low, low + 1, -17, -16, -8, -5, -1, 0, 1, 3, 8, 16, 19, 64, high - 1, high) if low <= v <= high]


_PRODUCTS = (("n * m", "64"), ("n * 600", "m"), ("m * -5", "n"), ("n * m", "-2147483648"))


def test_c_and_python_agree(tmp_path: Path) -> None:
    """Every condition, compiled, at every interesting value of its arguments."""
    literals = [
        f"{name} {op} {value}"
        for name, value in itertools.product(TYPES, (0, 1, 64, -5))
        for op in ("==", "!=", "<", "<=", ">", ">=")
    ]
    remainders = [f"{name} % {m} == {r}" for name in TYPES for m, r in ((1, 0), (8, 0), (8, 3), (16, 15), (5, 2))]
    pairs = [f"{a} {op} {b}" for a, b in itertools.permutations(TYPES, 2) for op in ("==", "<", ">=")]
    conditions = []
    products = [f"{left} {op} {right}" for left, right in _PRODUCTS for op in ("==", "<", ">=", "<=", ">", "!=")]
    for text in [*literals, *remainders, *pairs, *products]:
        try:
            conditions.append(parse_condition(text, TYPES))
        except SpecError:
            continue
    assert len(conditions) > 300
    spelled = {name: f"a->{name}" for name in TYPES}
    members = "".join(f"{ctype(kind).c} {name}; " for name, kind in TYPES.items())
    functions = "\n".join(
        f"int f{i}(const arguments *a);\nint f{i}(const arguments *a) {{ return {c.to_c(spelled, TYPES)}; }}"
        for i, c in enumerate(conditions)
    )
    source = tmp_path / "conditions.c"
    source.write_text(f'#include "pyfmha_runtime.h"\ntypedef struct {{ {members}}} arguments;\n{functions}\n')
    done = gcc(*STRICT, "-O1", "-shared", "-fPIC", f"-I{TEMPLATES}", source, "-o", tmp_path / "conditions.so")
    assert (done.returncode, done.stderr) == (0, "")
    compiled = ctypes.CDLL(str(tmp_path / "conditions.so"))
    pack = struct.Struct("@" + "".join(ctype(kind).format for kind in TYPES.values())).pack
    answers = set()
    for i, condition in enumerate(conditions):
        for values in itertools.product(*(interesting(TYPES[name]) for name in condition.names)):
            given = dict(zip(condition.names, values, strict=True))
            packed = pack(*(given.get(name, 0) for name in TYPES))

            holds = bool(compiled[f"f{i}"](packed))

            assert holds == condition.holds(given), (condition.text, given)
            answers.add((condition.operator, holds))
    assert len(answers) == 12
