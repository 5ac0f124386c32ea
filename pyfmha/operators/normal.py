"""Fields of a dataclass that take several spellings and hold one."""

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, overload

from pyfmha.errors import PyfmhaError

_Given = TypeVar("_Given")
_Held = TypeVar("_Held")
_MISSING: Any = object()


class Normal(Generic[_Given, _Held]):
    """A field that is converted when it is set: ``inputs: Normal[Given, Held] = Normal(convert)``.

    Args:
        convert: makes what is held of what is given; what it cannot convert is held as it is.
        default: what is given where nothing is; without, the field must be given.
    """

    def __init__(self, convert: Callable[[_Given], _Held], default: _Given = _MISSING) -> None:
        self._convert, self._default = convert, default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, owner: None, kind: type) -> _Given: ...
    @overload
    def __get__(self, owner: object, kind: type) -> _Held: ...
    def __get__(self, owner: Any, kind: type) -> Any:
        if owner is not None:
            return owner.__dict__[self._name]
        if self._default is _MISSING:
            raise AttributeError(self._name)  # how a dataclass asks whether there is a default
        return self._default

    def __set__(self, owner: Any, value: _Given) -> None:
        try:
            owner.__dict__[self._name] = self._convert(value)
        except PyfmhaError:  # which may be one of those below
            raise
        except (TypeError, ValueError, AttributeError):  # it is no such thing: pyfmha.operators.kinds says so by name
            owner.__dict__[self._name] = value


def pairs(given: Any) -> tuple[tuple[Any, Any], ...]:
    """A mapping, or pairs, as a tuple of pairs."""
    items = tuple(given.items()) if isinstance(given, Mapping) else tuple(given)
    if any(isinstance(item, str) for item in items):  # of two letters, it would be a pair
        raise TypeError(given)
    return tuple((key, value) for key, value in items)


def listed(given: Any) -> tuple[Any, ...]:
    """A sequence as a tuple; a text or a mapping is none."""
    if isinstance(given, str | Mapping):
        raise TypeError(given)
    return tuple(given)
