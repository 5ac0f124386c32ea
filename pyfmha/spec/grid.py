"""Launch-grid expressions: ``(seq_len + 127) / 128, batch_size * num_heads, 1``.

An expression is made of integer arguments and constants of the kernel, integer literals, ``+ - * / // %``, parentheses
and ``cdiv(a, b)``, ``min(a, b)``, ``max(a, b)``. ``/`` and ``%`` are C's: they round toward zero; ``//`` rounds toward
minus infinity and ``cdiv`` toward infinity. The launcher refuses negative arguments and a negative result.

A grid may also read ``num_sms``, the number of the device's multiprocessors, unless the kernel has an argument or a
constant of that name, which is then meant.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pyfmha.errors import SpecError

ALLOWED = (
    "integer arguments and constants of the kernel, integers, + - * / // %, parentheses,"
    " cdiv(a, b), min(a, b), max(a, b)"
)

NUM_SMS = "num_sms"
"""What a grid may read beside the kernel's own: how many multiprocessors the device has."""

_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
}
_EVALUATE: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": lambda a, b: _truncated(a, b),
    "mod": lambda a, b: a - b * _truncated(a, b),
    "floordiv": operator.floordiv,
    "cdiv": lambda a, b: -(-a // b),
    "min": min,
    "max": max,
}


def _truncated(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


@dataclass(frozen=True)
class Call:
    """One operation of an expression; operands are integers, names or further operations."""

    operation: str
    left: "Node"
    right: "Node"


Node = int | str | Call


@dataclass(frozen=True)
class GridExpression:
    """One dimension of a launch grid.

    Attributes:
        text: as the user wrote it.
        node: the parsed form, constants of the kernel already replaced by their values.
    """

    text: str
    node: Node

    def names(self) -> tuple[str, ...]:
        """The kernel arguments it reads, in order of first use."""
        found: dict[str, None] = {}
        _collect(self.node, found)
        return tuple(found)

    def to_c(self, spell: Callable[[str], str] = str) -> str:
        """The expression in C, in 64-bit integers through the checked helpers of ``pyfmha_runtime.h``.

        Args:
            spell: gives the C expression of an argument's name.
        """
        return _to_c(self.node, spell)

    def evaluate(self, values: Mapping[str, int]) -> int:
        """The number of blocks for given argument values.

        Raises:
            ZeroDivisionError: as the expression divides by zero for these values.
        """
        return _evaluate(self.node, values)


def parse_grid(text: str, integers: frozenset[str], constants: Mapping[str, object]) -> tuple[GridExpression, ...]:
    """Parse ``"x, y, z"``; missing dimensions are 1.

    Args:
        text: one to three expressions, separated by commas.
        integers: names of the kernel's integer arguments.
        constants: the kernel's compile-time constants by name.

    Raises:
        SpecError: an expression is malformed, or reads something that is not an integer known here.
    """
    try:
        tree = ast.parse(f"({text.strip()},)", mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise SpecError(f"grid {text!r} is not an expression: use {ALLOWED}") from None
    if not isinstance(tree, ast.Tuple) or not 1 <= len(tree.elts) <= 3:
        raise SpecError(f"grid {text!r}: give one to three expressions separated by commas, x, y and z")
    sources = [ast.unparse(element) for element in tree.elts] + ["1", "1"]
    known = integers if NUM_SMS in constants else integers | {NUM_SMS}
    nodes = [_parse(element, f"grid {text!r}", known, constants) for element in tree.elts] + [1, 1]
    x, y, z = (GridExpression(source, node) for source, node in zip(sources[:3], nodes[:3], strict=True))
    return (x, y, z)


def parse_expression(text: str, integers: frozenset[str], constants: Mapping[str, object], what: str) -> GridExpression:
    """Parse one expression of the same kind for another use; it does not know ``num_sms``.

    Args:
        text: the expression.
        integers, constants: as :func:`parse_grid`.
        what: what it is a part of, for messages.

    Raises:
        SpecError: as :func:`parse_grid`.
    """
    try:
        element = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise SpecError(f"{what}: {text!r} is not an expression: use {ALLOWED}") from None
    return GridExpression(ast.unparse(element), _parse(element, what, integers, constants))


def _parse(element: ast.expr, what: str, integers: frozenset[str], constants: Mapping[str, object]) -> Node:
    def parse(child: ast.expr) -> Node:
        return _parse(child, what, integers, constants)

    match element:
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return _fits(value, what)
        case ast.Name(id=name) if name in integers:
            return name
        case ast.Name(id=name) if name in constants:
            constant = constants[name]
            if isinstance(constant, int) and not isinstance(constant, bool):
                return _fits(constant, what)
            raise SpecError(f"{what}: {name} is the constant {constant!r}, not an integer")
        case ast.Name(id=name):
            known = ", ".join((*sorted(integers), *sorted(constants))) or "none"
            raise SpecError(f"{what}: {name!r} is no integer argument or constant of the kernel; it has: {known}")
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return Call(_OPERATORS[type(op)], parse(left), parse(right))
        case ast.Call(func=ast.Name(id="cdiv" | "min" | "max" as name), args=[left, right], keywords=[]):
            return Call(name, parse(left), parse(right))
    raise SpecError(f"{what}: {ast.unparse(element)!r} is not allowed: use {ALLOWED}")


def _fits(value: int, what: str) -> int:
    if not -(1 << 63) < value < 1 << 63:
        raise SpecError(f"{what}: {value} does not fit in 64 bits")
    return value


def _collect(node: Node, found: dict[str, None]) -> None:
    if isinstance(node, str):
        found[node] = None
    elif isinstance(node, Call):
        _collect(node.left, found)
        _collect(node.right, found)


def _to_c(node: Node, spell: Callable[[str], str]) -> str:
    if isinstance(node, int):
        return str(node) if abs(node) < 1 << 31 else f"INT64_C({node})"
    if isinstance(node, str):
        return spell(node)
    return f"pyfmha_{node.operation}({_to_c(node.left, spell)}, {_to_c(node.right, spell)}, &bad)"


def _evaluate(node: Node, values: Mapping[str, int]) -> int:
    if isinstance(node, int):
        return node
    if isinstance(node, str):
        return values[node]
    return _EVALUATE[node.operation](_evaluate(node.left, values), _evaluate(node.right, values))
