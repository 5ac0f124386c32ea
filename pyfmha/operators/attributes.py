"""The values of a plugin's attributes: those given, the defaults of the others, and what is allowed."""

from collections.abc import Mapping
from typing import Any

from pyfmha.errors import PluginError
from pyfmha.operators.description import Attribute
from pyfmha.operators.expressions import Expression
from pyfmha.operators.program import Program
from pyfmha.operators.scopes import AttributeScope


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
    for name, default in program.attributes.items():
        if name in values:
            continue
        if default is None:
            raise PluginError(f"missing attribute {name}")
        if isinstance(default, Expression) and default.names():
            later.append((name, default))
            continue
        values[name] = default.evaluate(scope) if isinstance(default, Expression) else default
        scope.values[name] = values[name]
    for name, default in later:
        values[name] = scope.values[name] = default.evaluate(scope)
    for name, kind in program.operator.attributes:
        _check_range(name, kind, values[name])
    return {name: values[name] for name in program.attributes}


def _check_range(name: str, kind: Attribute, value: Any) -> None:
    elements = value if isinstance(value, tuple) else (value,)
    for index, element in enumerate(elements):
        said = f"{name}[{index}]" if isinstance(value, tuple) else name
        if kind.choices and element not in kind.choices:
            shown = f"'{element}'" if isinstance(element, str) else _number(element)
            raise PluginError(f"{said} is {shown}; allowed are {', '.join(map(str, kind.choices))}")
        low = kind.minimum is not None and not element >= kind.minimum
        if low or (kind.maximum is not None and not element <= kind.maximum):
            raise PluginError(f"{said} is {_number(element)}; {range_text(kind)}")


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def range_text(kind: Attribute) -> str:
    """What is said of a value out of range."""
    if kind.maximum is None:
        return f"give {_number(kind.minimum or 0)} or more"
    if kind.minimum is None:
        return f"give {_number(kind.maximum)} or less"
    return f"allowed are {_number(kind.minimum)} to {_number(kind.maximum)}"
