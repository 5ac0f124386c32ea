"""What the fields of a description hold: looked at as soon as a part is made, so that what is wrong is named there."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pyfmha.errors import SpecError

_LONGEST = 80


class Kind(NamedTuple):
    """What a field may hold.

    Attributes:
        said: how messages call it.
        holds: whether a value is one.
    """

    said: str
    holds: Callable[[Any], bool]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, int | float | str)


TEXT = Kind("a text", lambda value: isinstance(value, str))
TEXTS = Kind("a text, or a list of texts", lambda value: isinstance(value, tuple) and all(map(TEXT.holds, value)))
INTEGER = Kind("an integer", _is_integer)
NUMBER = Kind("a number", lambda value: isinstance(value, float) or _is_integer(value))
CONSTANT = Kind("a number, a text, None or a tuple of such", _is_constant)
EXPRESSION = Kind("an expression, as text", lambda value: TEXT.holds(value) or _is_integer(value))
KERNEL = Kind("a kernel of the file, or its name", TEXT.holds)


def _plain(value: Any) -> bool:
    return TEXT.holds(value) or NUMBER.holds(value) or isinstance(value, bool)


PLAINS = Kind("a list of numbers or of texts", lambda value: isinstance(value, tuple) and all(map(_plain, value)))
DEFAULT = Kind("a number, a text or a list of numbers", lambda value: _plain(value) or PLAINS.holds(value))


def optional(kind: Kind) -> Kind:
    """That, or None."""
    return Kind(f"{kind.said}, or None", lambda value: value is None or kind.holds(value))


def one_of(part: str, said: str) -> Kind:
    """An object of a class of :mod:`pyfmha.operators.description`."""
    return Kind(said, lambda value: type(value).__name__ == part)


def several(part: str, said: str = "") -> Kind:
    """A tuple of such."""
    one = one_of(part, part)
    said = said or f"a list of {part}(...)"
    return Kind(said, lambda value: isinstance(value, tuple) and all(map(one.holds, value)))


def named(kind: Kind) -> Kind:
    """Pairs of a name and what is of a kind."""
    return Kind(
        f"a mapping, or pairs, from names to {kind.said}",
        lambda value: isinstance(value, tuple) and all(_is_pair(one) and kind.holds(one[1]) for one in value),
    )


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and TEXT.holds(value[0])


_NAMED = {"name": TEXT, "when": TEXT}
OPERATOR = {
    **dict.fromkeys(("name", "version", "namespace", "workspace_of_profile", "build", "source"), TEXT),
    "alignment": INTEGER,
    "inputs": several("Tensor", "a mapping from name to form, or a list of Tensor(...)"),
    "outputs": several("Tensor", "a mapping from name to form, or a list of Tensor(...)"),
    "launches": several("Launch"),
    "types": named(one_of("Types", "types")),
    "attributes": named(one_of("Attribute", "a type, or Attribute(...)")),
    **dict.fromkeys(("define", "summary", "shape_summary", "labels"), named(TEXT)),
    "checks": several("Check"),
    "workspace": several("Part", "a mapping from name to bytes, or a list of Part(...)"),
    "options": several("Option"),
}
"""Of each part of a description, what its fields hold."""
ATTRIBUTE = {
    **dict.fromkeys(("type", "stored", "stores"), TEXT),
    "default": optional(DEFAULT),
    **dict.fromkeys(("minimum", "maximum"), optional(NUMBER)),
    "choices": PLAINS,
}
TENSOR = {**_NAMED, "forms": TEXTS}
TYPES = {"names": TEXTS, "attribute": TEXT}
CHECK = {"condition": TEXT, "message": TEXT}
PART = {**_NAMED, "bytes": EXPRESSION, "type": TEXT}
OPTION = {**_NAMED, "number": INTEGER}
LAUNCH = {
    **_NAMED,
    **dict.fromkeys(("function", "option", "grid"), TEXT),
    "kernel": KERNEL,
    **dict.fromkeys(("arguments", "scalars"), named(TEXT)),
    "constants": named(CONSTANT),
    "configs": several("Config"),
    "hints": TEXTS,
}
CONFIG = {
    "constants": named(CONSTANT),
    **dict.fromkeys(("num_warps", "num_stages"), INTEGER),
    "maxnreg": optional(INTEGER),
}


def check_operator(operator: Any) -> None:
    """Refuse an operator of which a field, or a field of a part, holds something else.

    Raises:
        SpecError: the first, by its name and that of the part.
    """
    _check("Operator", operator, {"name": TEXT})
    own = operator.name
    _check(own, operator, OPERATOR)
    for kind, tensors in (("input", operator.inputs), ("output", operator.outputs)):
        for index, tensor in enumerate(tensors):
            _check(f"{own}: {kind} {_name(tensor, index)}", tensor, TENSOR)
    for name, types in operator.types:
        _check(f"{own}: type {name}", types, TYPES)
    for name, attribute in operator.attributes:
        _check(f"{own}: attribute {name}", attribute, ATTRIBUTE)
    for index, check in enumerate(operator.checks):
        _check(f"{own}: checks[{index}]", check, CHECK)
    for index, part in enumerate(operator.workspace):
        _check(f"{own}: workspace {_name(part, index)}", part, PART)
    for index, option in enumerate(operator.options):
        _check(f"{own}: option {_name(option, index)}", option, OPTION)
    for index, launch in enumerate(operator.launches):
        what = f"{own}: launch {_name(launch, index, 'name', 'kernel', 'function')}"
        _check(what, launch, LAUNCH)
        for number, config in enumerate(launch.configs):
            _check(f"{what}, configs[{number}]", config, CONFIG)


def _name(part: Any, index: int, *fields: str) -> Any:
    """How messages call a part: by its name where it is one, else by its number."""
    names = [getattr(part, field) for field in fields or ("name",)]
    return next((name for name in names if TEXT.holds(name) and name), index)


def _check(what: str, part: Any, kinds: Mapping[str, Kind]) -> None:
    for name, kind in kinds.items():
        value = getattr(part, name)
        if not kind.holds(value):
            raise SpecError(f"{what}: {name} is {_shown(value)}; give {kind.said}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
