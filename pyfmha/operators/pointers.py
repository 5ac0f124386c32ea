"""Arguments of launches that are addresses: ``"X"``, ``"X + 4 * rows"``, ``"A if condition else B"``."""

import ast
from collections.abc import Iterator, Set

from pyfmha.errors import SpecError
from pyfmha.operators.expressions import Expression, Parser
from pyfmha.operators.reading import condition

Case = tuple[Expression | None, str, Expression | None]
"""A condition (None for the last), the name of what the address is of, and bytes behind it."""


def cases_of(tree: ast.expr, parser: Parser, what: str, pointers: Set[str]) -> tuple[Case, ...] | None:
    """The cases of an argument; None where it is no address.

    Args:
        tree: the argument.
        parser: reads conditions and offsets.
        what: it is, for messages.
        pointers: the names that stand for addresses.

    Raises:
        SpecError: one of its cases is an address and another is none.
    """
    cases = list(_cases(tree, parser, what, pointers))
    found = tuple(case for case in cases if case is not None)
    if found and len(found) < len(cases):
        raise SpecError(f"{what}: {ast.unparse(tree)!r} is an address in one case and none in another; 'null' is one")
    return found or None


def _cases(tree: ast.expr, parser: Parser, what: str, pointers: Set[str]) -> Iterator[Case | None]:
    match tree:
        case ast.IfExp(test=test, body=body, orelse=orelse):
            found = _pointer(body, parser, what, pointers)
            yield found and (condition(ast.unparse(test), parser, what), found[0], found[1])
            yield from _cases(orelse, parser, what, pointers)
        case _:
            found = _pointer(tree, parser, what, pointers)
            yield found and (None, *found)


def _pointer(tree: ast.expr, parser: Parser, what: str, pointers: Set[str]) -> tuple[str, Expression | None] | None:
    """A tensor's or part's name and the bytes behind it; None where it is no pointer."""
    match tree:
        case ast.Name(id=name) if name in pointers:
            return name, None
        case ast.BinOp(left=ast.Name(id=name), op=ast.Add(), right=right) if name in pointers:
            offset = parser.parse_tree(right, what)
            if offset.type != "int":
                raise SpecError(f"{what}: {ast.unparse(right)} is no number of bytes")
            return name, offset
        case ast.BinOp(op=ast.Add(), left=ast.BinOp(op=ast.Add()) as left, right=right):
            found = _pointer(left, parser, what, pointers)
            if found is None or found[1] is None:
                return None
            return found[0], parser.parse(f"({found[1].text}) + ({ast.unparse(right)})", what, wanted="int")
    return None
