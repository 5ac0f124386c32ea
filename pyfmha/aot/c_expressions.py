"""Expressions of operators in C: the same values as :mod:`pyfmha.operators.expressions` has in Python."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from pyfmha.errors import SpecError
from pyfmha.operators.description import DATA_TYPES, ITEM_SIZES
from pyfmha.operators.expressions import FIGURES, Node
from pyfmha.operators.text import Text

_FLOATS = {"add": "+", "mul": "*", "div": "/"}
_SYMBOLS = {
    "add": "TRT_SUM",
    "sub": "TRT_SUB",
    "mul": "TRT_PROD",
    "div": "TRT_FLOOR_DIV",  # sizes are not negative
    "floordiv": "TRT_FLOOR_DIV",
    "cdiv": "TRT_CEIL_DIV",
    "min": "TRT_MIN",
    "max": "TRT_MAX",
}
_MEMBERS = {"int": "i", "bool": "i", "float": "f", "str": "s"}


def c_string(text: str) -> str:
    """A C string literal of UTF-8; question marks could start a trigraph."""
    plain = (chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\?' else f"\\{byte:03o}" for byte in text.encode())
    return f'"{"".join(plain)}"'


class Numbers:
    """What an operator's names are called in C.

    Args:
        prefix: of the operator.
        values: attributes, types, axes and definitions, in the order of their numbers.
        tensors, launches, options, attributes, types: names in the order of theirs.
    """

    def __init__(
        self,
        prefix: str,
        values: list[str],
        tensors: list[str],
        launches: list[str],
        options: list[str],
        attributes: list[str],
        types: list[str],
    ) -> None:
        self.prefix, self.values, self.tensors = prefix, values, tensors
        self.launches, self.options, self.attributes, self.types = launches, options, attributes, types

    def value(self, name: str) -> str:
        """The C name of a value's number: no table ends like it."""
        return f"{self.prefix}_{name}_value"


def c_expression(node: Node, numbers: Numbers) -> str:
    """An expression in C, of a scope ``s``."""

    def of(part: Node) -> str:
        return c_expression(part, numbers)

    match node.kind:
        case "constant":
            return c_constant(node.value)
        case "name":
            value = f"s->v[{numbers.value(node.value)}].{_MEMBERS[node.type]}"
            return f"({value} != 0)" if node.type == "bool" else value
        case "item":
            function = "pyfmha_item_float" if node.type == "float" else "pyfmha_item"
            return f"{function}(s, s->v[{numbers.value(node.value)}].l, {of(node.parts[0])})"
        case "ask":
            return _question(node.value, node.parts, numbers)
        case "float":
            return f"(double){of(node.parts[0])}"
        case "not":
            return f"!{of(node.parts[0])}"
        case "and" | "or":
            return f"({(' && ' if node.kind == 'and' else ' || ').join(map(of, node.parts))})"
        case "if":
            condition, yes, no = map(of, node.parts)
            return f"({condition} ? {yes} : {no})"
    left, right = map(of, node.parts)
    if node.kind == "compare":
        if node.parts[0].type == "str":
            return f"(strcmp({left}, {right}) {node.value} 0)"
        return f"({left} {node.value} {right})"
    if node.type == "float":
        if node.value in _FLOATS:
            return f"({left} {_FLOATS[node.value]} {right})"
        return f"pyfmha_{node.value}_float({left}, {right})"
    return f"pyfmha_{node.value}({left}, {right}, &s->bad)"


def c_constant(value: Any) -> str:
    """A number, a truth value or a text in C."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return c_string(value)
    if isinstance(value, float):
        if math.isnan(value):
            return "NAN"
        return float.hex(value) if math.isfinite(value) else f"{'-' * (value < 0)}INFINITY"
    if value == -(1 << 63):
        return "INT64_MIN"
    return f"INT64_C({value})" if value >= 0 else f"-INT64_C({-value})"


def _question(question: str, words: tuple[Any, ...], numbers: Numbers) -> str:
    match question:
        case "given":
            return f"s->given[{numbers.attributes.index(words[0])}]"
        case "has":
            return f"s->options[{numbers.options.index(words[0])}]"
        case "len":
            return f"(int64_t)s->v[{numbers.value(words[0])}].l->count"
        case "itemsize":
            if words[0] in DATA_TYPES:
                return f"INT64_C({ITEM_SIZES[words[0]]})"
            return f"pyfmha_item_size_of(s->v[{numbers.value(words[0])}].s)"
        case "size" | "stride":
            return f"pyfmha_{question}(s, {numbers.tensors.index(words[0])}, {words[1]})"
        case "numel":
            return f"pyfmha_numel(s, {numbers.tensors.index(words[0])})"
        case "least":
            return f"s->least[{numbers.value(words[0])}]"
        case "device":
            return f"s->device(s, {FIGURES[words[0]]})"
    launch = numbers.launches.index(words[0])
    return f"s->serves(s, {launch}, {c_string(words[1])})"


def c_text(text: Text, numbers: Numbers) -> list[str]:
    """Statements that write a text to a buffer ``b``."""
    lines = []
    for part in text.parts:
        if isinstance(part, str):
            lines.append(f"pyfmha_put(b, {c_string(part)});")
            continue
        value = c_expression(part.expression.node, numbers)
        put = {"int": "pyfmha_put_integer", "bool": "pyfmha_put_integer", "float": "pyfmha_put_float"}.get(
            part.expression.type, "pyfmha_put_quoted" if part.format == "r" else "pyfmha_put"
        )
        lines.append(f"{put}(b, {value});")
    return lines


class Symbols:
    """Sizes of axes in TensorRT's expressions.

    Args:
        numbers: names in C.
        early: names whose values attributes tell.
        definitions: of the others that are no axes, what they stand for.
        shapes: names of inputs whose values are read.
        function: makes a C function of an early expression and returns its name.
    """

    def __init__(
        self,
        numbers: Numbers,
        early: frozenset[str],
        definitions: Mapping[str, Node],
        shapes: frozenset[str],
        function: Callable[[Node], str],
    ) -> None:
        self._numbers, self._early, self._definitions = numbers, early, definitions
        self._shapes, self._function = shapes, function

    def of(self, node: Node, what: str) -> str:
        """An expression in C, of symbols ``y``.

        Raises:
            SpecError: TensorRT has no such expression.
        """
        if _is_early(node, self._early):
            return f"pyfmha_symbol_integer(y, {self._function(node)})"
        if node.kind == "name":
            if node.value in self._definitions:
                return self.of(self._definitions[node.value], what)
            return f"pyfmha_symbol_name(y, {self._numbers.value(node.value)})"
        if node.kind == "item" and node.value in self._shapes and node.parts[0].kind == "constant":
            tensor = self._numbers.tensors.index(node.value)
            return f"pyfmha_symbol_item(y, {tensor}, {node.parts[0].value})"
        if node.kind == "if" and _is_early(node.parts[0], self._early):
            yes, no = (self.of(part, what) for part in node.parts[1:])
            return f"(pyfmha_symbol_condition(y, {self._function(node.parts[0])}) ? {yes} : {no})"
        if node.kind == "binary" and node.value in _SYMBOLS:
            left, right = (self.of(part, what) for part in node.parts)
            return f"pyfmha_symbol_operation(y, {_SYMBOLS[node.value]}, {left}, {right})"
        if node.kind == "binary" and node.value == "mod":
            left, right = node.parts
            whole = Node("binary", "int", "mul", (Node("binary", "int", "floordiv", (left, right)), right))
            return self.of(Node("binary", "int", "sub", (left, whole)), what)
        raise SpecError(f"{what}: TensorRT's sizes are + - * / // % cdiv min max of axes, and choices by attributes")


def _is_early(node: Node, early: frozenset[str]) -> bool:
    if node.kind in ("name", "item") and node.value not in early:
        return False
    if node.kind == "ask" and node.value not in ("given", "len", "has"):
        return False
    return all(_is_early(part, early) for part in node.parts if isinstance(part, Node))
