"""Which values an attribute allows."""

from ctypes import c_float
from typing import Any

from pyfmha.errors import PluginError
from pyfmha.operators.description import Attribute


def as_float32(value: Any) -> Any:
    """A number, or each of several, as a field of type FLOAT32 holds it: a limit of 0.1 allows 0.1 as it arrives."""
    if isinstance(value, tuple):
        return tuple(map(as_float32, value))
    return None if value is None else c_float(value).value


def check_range(name: str, kind: Attribute, value: Any) -> None:
    """Refuse a value that an attribute does not allow.

    Raises:
        PluginError: saying what is allowed.
    """
    elements = value if isinstance(value, tuple) else (value,)
    choices, minimum, maximum = kind.choices, kind.minimum, kind.maximum
    if kind.type.startswith("fp32"):
        choices, minimum, maximum = as_float32(choices), as_float32(minimum), as_float32(maximum)
    for index, element in enumerate(elements):
        said = f"{name}[{index}]" if isinstance(value, tuple) else name
        if choices and element not in choices:
            shown = f"'{element}'" if isinstance(element, str) else _number(element)
            raise PluginError(f"{said} is {shown}; allowed are {', '.join(map(str, kind.choices))}")
        low = minimum is not None and not element >= minimum
        if low or (maximum is not None and not element <= maximum):
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
