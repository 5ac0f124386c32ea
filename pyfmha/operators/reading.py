"""What Python's parser makes of the texts in a description."""

import ast
import json
import re
from collections.abc import Iterable
from dataclasses import replace

from pyfmha.errors import SpecError
from pyfmha.operators.description import Attribute, Operator
from pyfmha.operators.expressions import Expression, Node, Parser

TYPES_OF_ATTRIBUTES = {"int32": "int", "int64": "int", "fp32": "float", "string": "str"}
LATE = ("size", "stride", "numel", "serves", "least", "itemsize", "device")
"""Questions that sizes or types answer, not attributes alone."""
OF_GRIDS = ("size", "stride", "numel", "itemsize", "len")
"""What a grid may ask of tensors, types and lists."""


def type_of(kind: Attribute) -> str:
    """The type of an attribute in expressions."""
    element = kind.type.removesuffix("[]")
    return TYPES_OF_ATTRIBUTES[element] + ("[]" if kind.type.endswith("[]") else "")


def condition(text: str, parser: Parser, what: str) -> Expression:
    """A condition; an integer is true where it is not 0."""
    found = parser.parse(text, what)
    if found.type == "int":
        node = Node("compare", "bool", "!=", (found.node, Node("constant", "int", 0)))
        return Expression(found.text, node)
    if found.type != "bool":
        raise SpecError(f"{what}: {text!r} is of type {found.type}, no condition")
    return found


def parsed(text: str, what: str) -> ast.expr:
    """A text as Python's parser reads it.

    Raises:
        SpecError: it is no expression.
    """
    try:
        return ast.parse(str(text).strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise SpecError(f"{what}: {text!r} is not an expression") from None


def asked_given(operator: Operator) -> dict[str, str]:
    """The attributes of which the description asks whether they are given, with that question.

    An engine stores such a one if it was given, where the description says nothing: else it would be given to the
    plugin that the engine loads. What is asked for the sake of storing does not count.
    """
    quiet = [(name, replace(kind, stored="", stores="")) for name, kind in operator.attributes]
    text = json.dumps(replace(operator, attributes=quiet).to_json())
    return {name: f"given({name})" for name in re.findall(r"\bgiven\(\s*(\w+)\s*\)", text)}


def axes_of(text: str, what: str) -> list[ast.expr]:
    """The axes in a form's brackets."""
    if not text.strip():
        return []
    tree = parsed(f"({text},)", what)
    return list(tree.elts) if isinstance(tree, ast.Tuple) else [tree]


def names_of(tree: ast.expr) -> set[str]:
    """The names that stand for values; the words of questions do not."""
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
        if tree.func.id in ("cdiv", "min", "max"):
            return set().union(*map(names_of, tree.args))
        if tree.func.id in ("given", "len", "least"):
            return {arg.id for arg in tree.args if isinstance(arg, ast.Name)}
        return set()
    if isinstance(tree, ast.Name):
        return {tree.id}
    children = [child for child in ast.iter_child_nodes(tree) if isinstance(child, ast.expr)]
    return set().union(*map(names_of, children))


def plain_summary(operator: Operator) -> list[tuple[str, str]]:
    """What is said of a plugin where the description says nothing: its attributes, but for lists."""
    numbers = [name for name, kind in operator.attributes if not kind.type.endswith("[]")]
    return [("", ", ".join(f"{name} {{{name}}}" for name in numbers) or "no attributes")]


def reads_ahead(name: str, others: Iterable[str]) -> str:
    """What is said of a definition that reads others after it."""
    return f"definition {name} reads {', '.join(others)}, defined after it: a cycle, or an order to change"


def function_text(operator: Operator, index: int) -> str:
    """How the function of a launch that is compiled is called, as a text of its types: no two versions share one."""
    version = "" if operator.version == "1" else f"v{operator.version}"
    stem = re.sub("[^A-Za-z0-9_]", "_", "_".join(filter(None, [operator.namespace, operator.name, version]))).lower()
    number = f"_{index}" if len(operator.launches) > 1 else ""
    return stem + number + "".join(f"_{{{name}}}" for name, _ in operator.types)
