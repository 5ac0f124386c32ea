"""Which parameters a kernel compares with ``None``: Triton settles that when it compiles, for a null pointer too."""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any


def compared_with_none(function: Any) -> tuple[str, ...]:
    """The parameters that a function asks for by ``is None`` or ``is not None``, itself or in functions that it calls.

    Args:
        function: a Python function, such as the ``fn`` of a kernel.
    """
    found = _compared(function, frozenset())
    return tuple(name for name in inspect.signature(function).parameters if name in found)


def _compared(function: FunctionType, within: frozenset[Any]) -> set[str]:
    if function in within:
        return set()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):  # made without a file
        return set()
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Compare(left=ast.Name(id=name), ops=[ast.Is() | ast.IsNot()], comparators=[ast.Constant(None)]):
                found.add(name)
            case ast.Call():
                found.update(_of_call(node, function.__globals__, within | {function}))
    return found


def _of_call(call: ast.Call, names: Mapping[str, Any], within: frozenset[Any]) -> Iterator[str]:
    """The names that a call hands to parameters which its function compares with None."""
    called = names.get(call.func.id) if isinstance(call.func, ast.Name) else None
    while called is not None and not isinstance(called, FunctionType):
        called = getattr(called, "fn", None)
    if called is None:
        return
    asked = _compared(called, within)
    given = [*zip(inspect.signature(called).parameters, call.args, strict=False)]
    given += [(keyword.arg or "", keyword.value) for keyword in call.keywords]
    for parameter, value in given:
        if parameter in asked and isinstance(value, ast.Name):
            yield value.id
