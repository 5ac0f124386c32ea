"""Attributes to try a description with, while it is read: contradictions that only some of their values show."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from pyfmha.errors import PluginError, SpecError
from pyfmha.operators.absent import UntoldError
from pyfmha.operators.description import Attribute, Operator
from pyfmha.operators.expressions import Expression, Node
from pyfmha.operators.instance import Instance
from pyfmha.operators.program import Program, program_of

MOST_TRIALS = 4096


def check_absent(operator: Operator) -> None:
    """Refuse a description of which some attributes leave the type or an axis of a tensor untold.

    Attributes that the conditions of tensors do not read are not tried; nor are more than :data:`MOST_TRIALS` choices.
    What is missed here, the plugin refuses when it is created.

    Raises:
        SpecError: naming the tensor, what is not told, and the attributes.
    """
    program = program_of(operator)
    for given in _trials(program):
        try:
            Instance(program, given)
        except UntoldError as error:
            said = ", ".join(f"{name} = {value!r}" for name, value in given.items()) or "no attributes"
            raise SpecError(f"{operator.name}: with {said}: {error}") from None
        except PluginError:
            continue  # refused for another reason


def _trials(program: Program) -> Iterator[dict[str, Any]]:
    """Of attributes that decide which tensors are there every value that may matter, of others what must be given."""
    deciding = _deciding(program)
    named = {node.value for expression in _conditions(program) for node in constants(expression.node)}
    named |= {node.value for _, expression in program.early for node in constants(expression.node)}
    choices: list[list[tuple[str, Any]]] = []
    for name, kind in program.operator.attributes:
        values = list(dict.fromkeys(_values(kind, named)))
        if name in deciding:
            choices.append([(name, value) for value in values])
        elif program.attributes[name] is None:
            choices.append([(name, value) for value in values[:1]])
        if name in deciding and program.attributes[name] is not None:
            choices[-1].append((name, None))
    for chosen in itertools.islice(itertools.product(*choices), MOST_TRIALS):
        yield {name: value for name, value in chosen if value is not None}


def _conditions(program: Program) -> Iterator[Expression]:
    for tensor in (*program.inputs, *program.outputs):
        yield from (when for when in (tensor.when, *(form.condition for form in tensor.forms)) if when is not None)


def _deciding(program: Program) -> set[str]:
    """The attributes that conditions of tensors read, by themselves or through definitions."""
    found = {name for expression in _conditions(program) for name in _read(expression)}
    for name, expression in reversed(program.early):
        if name in found:
            found |= _read(expression)
    return found


def _read(expression: Expression) -> set[str]:
    asked = {words[0] for question, words in expression.questions() if question in ("given", "len")}
    return {*expression.names(), *asked}


def constants(node: Any) -> list[Node]:
    """The constants of an expression."""
    if not isinstance(node, Node):
        return []
    own = [node] if node.kind == "constant" else []
    return own + [found for part in node.parts for found in constants(part)]


def _values(kind: Attribute, named: Iterable[Any]) -> Iterator[Any]:
    """Values of an attribute: its choices, or its bounds, those that conditions name, and what is next to them."""
    base = kind.type.removesuffix("[]")
    if kind.choices:
        found: list[Any] = list(kind.choices)
    elif base == "string":
        found = ["", *(value for value in named if isinstance(value, str))]
    else:
        numbers = sorted({value for value in named if isinstance(value, int | float)})
        near = [n + step for n in (*numbers, kind.minimum, kind.maximum) if n is not None for step in (0, 1, -1)]
        found = [1, 0, *near] if base == "fp32" else [int(n) for n in (1, 0, *near)]
        found = [
            n
            for n in found
            if (kind.minimum is None or n >= kind.minimum) and (kind.maximum is None or n <= kind.maximum)
        ]
    return ((value,) for value in found) if kind.type.endswith("[]") else iter(found)
