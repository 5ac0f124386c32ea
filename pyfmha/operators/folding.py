"""Expressions of which some names are known already: what follows from those is computed, the rest is left."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

from pyfmha.operators.arithmetic import CALLED, EvaluationError
from pyfmha.operators.expressions import Node, Scope, Value

EARLY = ("given", "len", "has", "itemsize", "least")
"""Questions that need no shape. A lower bound is asked of profiles, which have a walk of their own; here it is 0."""

_CALLED: Mapping[str, Callable[..., Any]] = CALLED  # type: ignore[assignment]  # but for one constant
_COMPARED = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


def constant(kind: str, value: Value) -> Node:
    """A value of a type as a piece of an expression."""
    return Node("constant", kind, value)


def folded(node: Node, scope: Scope) -> Node:
    """The same with the values of the names that a scope knows.

    What has no value stays as it is, so that it has none when it is evaluated; and nothing is left out that comes
    before it, for it would not be evaluated then.
    """
    match node.kind:
        case "constant":
            return node
        case "name":
            return constant(node.type, scope.values[node.value]) if node.value in scope.values else node
        case "ask":
            if node.value not in EARLY:
                return node
            return constant(node.type, 0 if node.value == "least" else scope.ask(node.value, node.parts))
        case "and" | "or":
            return _joined(node, scope)
        case "if":
            condition = folded(node.parts[0], scope)
            if condition.kind == "constant":
                return folded(node.parts[1 if condition.value else 2], scope)
            return Node(node.kind, node.type, None, (condition, *(folded(part, scope) for part in node.parts[1:])))
    parts = tuple(folded(part, scope) for part in node.parts)
    made = Node(node.kind, node.type, node.value, parts)
    if all(part.kind == "constant" for part in parts) and (node.kind != "item" or node.value in scope.values):
        try:
            return constant(node.type, _computed(made, [part.value for part in parts], scope))
        except EvaluationError:
            return made
    return made


def _joined(node: Node, scope: Scope) -> Node:
    """Conditions joined by ``and`` or ``or``, up to the first that decides."""
    decides, left = node.kind == "or", []
    for part in node.parts:
        found = folded(part, scope)
        if found.kind != "constant":
            left.append(found)
        elif bool(found.value) == decides:
            left.append(found)
            break
    if not left:
        return constant("bool", not decides)
    return left[0] if len(left) == 1 else Node(node.kind, node.type, None, tuple(left))


def _computed(node: Node, values: list[Any], scope: Scope) -> Value:
    match node.kind:
        case "not":
            return not values[0]
        case "float":
            return float(values[0])
        case "item":
            found: Value = _CALLED["_item"](scope.values[node.value], values[0])
            return found
        case "compare":
            return bool(_COMPARED[node.value](*values))
    computed: Value = _CALLED[f"{'_float_' if node.type == 'float' else ''}{node.value}"](*values)
    return computed
