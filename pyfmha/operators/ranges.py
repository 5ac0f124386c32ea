"""Which values an attribute allows."""

from typing import Any

from pyfmha.errors import PluginError
from pyfmha.operators.description import Attribute


def check_range(name: str, kind: Attribute, value: Any) -> None:
    """Refuse a value that an attribute does not allow.

    Raises:
        PluginError: saying what is allowed.
    """
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
