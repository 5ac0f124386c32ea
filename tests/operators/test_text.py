"""Texts of messages: what stands in braces, and what C's printf shows of it."""

import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyfmha.errors import SpecError
from pyfmha.operators.expressions import Parser, Scope
from pyfmha.operators.text import parse_text

PARSER = Parser({"n": "int", "x": "float", "flag": "bool", "word": "str", "list": "int[]"})
VALUES = {"n": -3, "x": 0.1, "flag": True, "word": "it's", "list": (1,)}


def shown(text: str, **values: object) -> str:
    return parse_text(text, PARSER, "test").render(Scope({**VALUES, **values}))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", ""),
        ("plain", "plain"),
        ("{n}", "-3"),
        ("{n} rows of {2 * n}", "-3 rows of -6"),
        ("{x}{x:g}", "0.10.1"),
        ("{word} {word:r}", "it's 'it's'"),
        ("{flag} {not flag} {n < 0}", "1 0 1"),
        ("{{n}} is {n}", "{n} is -3"),
        ("{'a' if flag else 'b'}", "a"),
        ("{'causal' if n else ''}", "causal"),
        ("100 %", "100 %"),
    ],
)
def test_texts(text: str, wanted: str) -> None:
    assert shown(text) == wanted


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-320, 1e300, float("inf"), -float("inf"), 0.1, 123456789.0, 3.0])
def test_a_float_is_what_printf_shows(value: float) -> None:
    libc = ctypes.CDLL(None)
    buffer = ctypes.create_string_buffer(64)
    libc.snprintf(buffer, ctypes.c_size_t(64), b"%g", ctypes.c_double(value))
    assert shown("{x}", x=value) == buffer.value.decode()


def test_not_a_number_has_no_sign() -> None:
    assert shown("{x} {x:g}", x=-float("nan")) == "nan nan"


@given(text=st.text())
def test_a_text_without_holes_is_itself(text: str) -> None:
    assert shown(text.replace("{", "{{").replace("}", "}}")) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{n", "a brace is not closed"),
        ("n}", "a brace is not opened"),
        ("{}", "is not an expression"),
        ("{rows}", "'rows' is not known"),
        ("{n:r}", "is of type int, which is not shown so"),
        ("{n:g}", "is of type int, which is not shown so"),
        ("{word:g}", "is of type str, which is not shown so"),
        ("{x:r}", "is of type float, which is not shown so"),
        ("{list}", r"is of type int\[\], which is not shown so"),
        ("{n:x}", "is not an expression"),
    ],
)
def test_what_is_refused_names_the_part(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=rf"^check 3: .*{message}"):
        parse_text(text, PARSER, "check 3")
