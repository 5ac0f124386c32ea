"""The values of a plugin's attributes: those given, the defaults of the others, and what is allowed."""

from collections.abc import Mapping
from typing import Any

from pyfmha.errors import PluginError
from pyfmha.operators.expressions import Expression
from pyfmha.operators.program import Program
from pyfmha.operators.ranges import check_range
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
        check_range(name, kind, values[name])
    return {name: values[name] for name in program.attributes}
