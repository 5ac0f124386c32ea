"""The values of a plugin's attributes: those given, the defaults of the others, and what is allowed."""

import math
from collections.abc import Mapping
from typing import Any

from pyfmha.errors import PluginError
from pyfmha.operators.expressions import Expression
from pyfmha.operators.program import Program
from pyfmha.operators.ranges import as_float32, check_range
from pyfmha.operators.scopes import AttributeScope

_INT32 = 1 << 31
BEYOND_FLOAT32 = (2 - 2**-24) * 2.0**127
"""The smallest number that float32 rounds to infinity."""


def settle(program: Program, given: Mapping[str, Any]) -> dict[str, Any]:
    """All attributes, with their defaults.

    Args:
        program: of the operator.
        given: values by name.

    Raises:
        PluginError: one is missing, or out of range.
    """
    values = dict(given)
    scope = AttributeScope(values, frozenset(given), {}, {})
    later = []
    kinds = {name: kind.type for name, kind in program.operator.attributes}
    for name, default in program.attributes.items():
        if name in values:
            continue
        if default is None:
            raise PluginError(f"missing attribute {name}")
        if isinstance(default, Expression) and not default.is_constant():
            later.append((name, default))
            continue
        found = default.evaluate(scope) if isinstance(default, Expression) else default
        values[name] = scope.values[name] = _held(kinds[name], found)
    for name, default in later:
        values[name] = scope.values[name] = _held(kinds[name], default.evaluate(scope))
    for name in program.attributes:
        number = values[name]
        if kinds[name] == "int32" and not -_INT32 <= number < _INT32:
            raise PluginError(f"{name} is {number}; int32 holds {-_INT32} to {_INT32 - 1}")
    for name, kind in program.operator.attributes:
        check_range(name, kind, values[name])
    return {name: values[name] for name in program.attributes}


def _held(kind: str, value: Any) -> Any:
    """A default as the field that an engine stores holds it."""
    return as_float32(value) if kind.startswith("fp32") else value


def checked(program: Program, given: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as a user gives them, each of its type.

    Raises:
        PluginError: the operator has no such attribute, or it is of another type.
    """
    unknown = sorted(set(given) - set(program.attributes))
    if unknown:
        there = ", ".join(program.attributes) or "none"
        raise PluginError(f"{program.operator.name} has no attribute {', '.join(unknown)}; it has: {there}")
    kinds = {name: kind.type for name, kind in program.operator.attributes}
    return {name: _typed(name, kinds[name], value) for name, value in given.items()}


def _typed(name: str, kind: str, value: Any) -> Any:
    if kind.endswith("[]"):
        if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
            raise PluginError(f"{name} is {value!r}; it must be {kind}")
        return tuple(_element(name, kind, element) for element in value)
    return _element(name, kind, value)


def _element(name: str, kind: str, value: Any) -> Any:
    base = kind.removesuffix("[]")
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # of numpy or PyTorch
        value = value.item()
    if base == "string":
        if isinstance(value, str) and "\0" not in value:
            return value
    elif base == "fp32":
        if isinstance(value, int | float) and not isinstance(value, bool):
            if BEYOND_FLOAT32 <= abs(value) < math.inf:
                raise PluginError(f"{name} is larger than {kind} holds: give up to 3.4e38 in size")
            return float(value)
    elif isinstance(value, int):
        bits = 31 if base == "int32" else 63
        if -(1 << bits) <= value < 1 << bits:
            return int(value)
    raise PluginError(f"{name} is {value!r}; it must be {kind}")
