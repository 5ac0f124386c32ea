"""Texts of an operator's messages: ``"width is {width}; give 1 or more"``.

What stands in braces is an expression, with ``:g`` for a float, ``:r`` for a string in quotes, or neither. The same
text comes out of the plugin in Python and of the one in C.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from pyfmha.errors import SpecError
from pyfmha.operators.expressions import Expression, Parser, Scope

FORMATS = {"int": ("",), "bool": ("",), "float": ("g",), "str": ("", "r")}


@dataclass(frozen=True)
class Hole:
    """What stands in braces.

    Attributes:
        expression: whose value it shows.
        format: ``""``, ``"g"`` or ``"r"``.
    """

    expression: Expression
    format: str


@dataclass(frozen=True)
class Text:
    """A parsed text.

    Attributes:
        parts: strings, and what stands between them.
    """

    parts: tuple[str | Hole, ...]
    _named: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        holes = [part.expression.names() for part in self.parts if isinstance(part, Hole)]
        object.__setattr__(self, "_named", frozenset().union(*holes))

    def names(self) -> frozenset[str]:
        """The names that it shows."""
        return self._named

    def render(self, scope: Scope) -> str:
        """The text for some values."""
        return "".join(part if isinstance(part, str) else show(part, scope) for part in self.parts)


def show(hole: Hole, scope: Scope) -> str:
    """One value as text."""
    return shown(hole.expression.evaluate(scope), hole.expression.type, hole.format)


def shown(value: Any, kind: str, form: str) -> str:
    """A value of a type as text, in a format of :class:`Hole`: as C's ``printf`` shows it."""
    if kind == "float":
        # C's "%g" of a NaN may show its sign, which says nothing.
        return "nan" if math.isnan(value) else f"{value:g}"
    if kind == "bool":
        return str(int(value))
    return f"'{value}'" if form == "r" else str(value)


def parse_text(text: str, parser: Parser, what: str) -> Text:
    """Read a text; ``{{`` and ``}}`` stand for the braces themselves.

    Raises:
        SpecError: a brace is not closed, or what stands in it is no expression or has no such format.
    """
    parts: list[str | Hole] = []
    plain, at = "", 0
    while at < len(text):
        character = text[at]
        if text[at : at + 2] in ("{{", "}}"):
            plain, at = plain + character, at + 2
        elif character == "{":
            end = text.find("}", at)
            if end < 0:
                raise SpecError(f"{what}: a brace is not closed in {text!r}")
            parts += [plain] * bool(plain) + [_hole(text[at + 1 : end], parser, what)]
            plain, at = "", end + 1
        elif character == "}":
            raise SpecError(f"{what}: a brace is not opened in {text!r}")
        else:
            plain, at = plain + character, at + 1
    return Text(tuple(parts + [plain] * bool(plain)))


def _hole(inside: str, parser: Parser, what: str) -> Hole:
    source, colon, form = inside.rpartition(":")
    if not colon or form.strip() not in ("g", "r"):
        source, form = inside, ""
    expression = parser.parse(source, what)
    form = form.strip() or ("g" if expression.type == "float" else "")
    if form not in FORMATS.get(expression.type, ()):
        raise SpecError(f"{what}: {{{inside}}} is of type {expression.type}, which is not shown so")
    return Hole(expression, form)
