"""The names in a description: what may be one, and that none stands for two things."""

import keyword
from collections.abc import Iterable, Iterator
from typing import Any

from pyfmha.errors import SpecError
from pyfmha.operators.description import DATA_TYPES, Operator, Tensor

SHAPE = "shape"
"""The type of an input whose values are read, not its memory."""
RESERVED = ("cdiv", "min", "max", "null", SHAPE)
"""Not those of questions, such as ``stride``: what is called there is no name, and grids, which are searched for words,
have none."""
OWN = "pyfmha_"
"""How the fields begin that an engine stores besides attributes."""


def check_names(operator: Operator) -> None:
    """Refuse names that are none, stand for two things, or have a meaning of their own.

    Raises:
        SpecError: the first.
    """
    kinds = {
        "attribute": [name for name, _ in operator.attributes],
        "type": [name for name, _ in operator.types],
        "definition": [name for name, _ in operator.define],
        "option": [option.name for option in operator.options],
        "workspace": [part.name for part in operator.workspace],
        "launch": [launch.name for launch in operator.launches if launch.name],
    }
    for kind, names in kinds.items():
        _refuse(operator, sorted(twice(names)), f"as {kind} is given more than once")
        for name in names:
            _check_name(operator, kind, name)
    for tensor in (*operator.inputs, *operator.outputs):
        _check_name(operator, "tensor", tensor.name)
    values = kinds["attribute"] + kinds["type"] + kinds["definition"]
    _refuse(operator, sorted(twice(values)), "names two things: attributes, types and definitions")
    # An attribute may say by its name whether a tensor is there; as an argument, the name means the tensor.
    tensors = {tensor.name for tensor in (*operator.inputs, *operator.outputs)}
    taken = sorted(tensors & {*kinds["workspace"], *kinds["definition"], *kinds["type"]})
    _refuse(operator, taken, "is a tensor and a part of the workspace, a definition or a type besides")
    _refuse(operator, sorted(set(kinds["workspace"]) & set(values)), "is a part of the workspace and a value besides")
    _refuse(operator, [name for name in kinds["attribute"] if name.startswith(OWN)], f"begins with {OWN}")
    _refuse(operator, sorted(set(DATA_TYPES) & set(kinds["type"])), "is a type of its own; give another name")
    held = dict(operator.attributes)
    for name, types in operator.types:
        if types.attribute and types.attribute not in held:
            raise SpecError(f"{operator.name}: type {name} is held by {types.attribute!r}, which is no attribute")
        if types.attribute and held[types.attribute].type not in ("int32", "int64"):
            raise SpecError(f"{operator.name}: type {name} is held by {types.attribute}, which is no integer")
    if operator.alignment < 1 or not operator.version:
        raise SpecError(f"{operator.name}: alignment is {operator.alignment}, version {operator.version!r}")
    _check_tensors(operator)
    _check_characters(operator)


def _check_characters(operator: Operator) -> None:
    """C's texts end at a NUL, and TensorRT's are UTF-8."""
    for where, text in _texts(operator.to_json(), ""):
        what = f"{operator.name}: {where.lstrip('.')} is {text!r}, which holds"
        if "\0" in text:
            raise SpecError(f"{what} the character NUL")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SpecError(f"{what} {text[error.start]!r}, no character") from None


def _texts(data: Any, where: str) -> Iterator[tuple[str, str]]:
    """Every text of JSON's types, and where it is."""
    if isinstance(data, str):
        yield where, data
    elif isinstance(data, dict):
        for name, value in data.items():
            yield from _texts(value, f"{where}.{name}")
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            if isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str):  # a pair
                yield where, value[0]
                yield from _texts(value[1], f"{where}[{value[0]!r}]")
            else:
                yield from _texts(value, f"{where}[{index}]")


def _refuse(operator: Operator, names: list[str], why: str) -> None:
    if names:
        raise SpecError(f"{operator.name}: {', '.join(names)} {why}")


def _check_name(operator: Operator, kind: str, name: str) -> None:
    if not name.isidentifier() or not name.isascii() or keyword.iskeyword(name) or name in RESERVED:
        raise SpecError(f"{operator.name}: {kind} {name!r} is no name, or has a meaning of its own")


def full_name(operator: Operator) -> str:
    """An operator among others, as messages name it: by its namespace, if it has one, its name and its version."""
    return f"{operator.namespace}::{operator.name}, version {operator.version}".lstrip(":")


def twice(names: Iterable[str]) -> set[str]:
    """Those that stand there more than once."""
    seen: set[str] = set()
    return {name for name in names if name in seen or seen.add(name)}  # type: ignore[func-returns-value]


def _check_tensors(operator: Operator) -> None:
    for kind, tensors in (("inputs", operator.inputs), ("outputs", operator.outputs)):
        for name in sorted(twice(tensor.name for tensor in tensors)):
            alike: list[Tensor] = [tensor for tensor in tensors if tensor.name == name]
            conditions = ["".join(tensor.when.split()) for tensor in alike]
            if "" in conditions or twice(conditions):
                raise SpecError(f"{operator.name}: two {kind} are called {name}")
    read = {one.name for one in operator.inputs if any(form.partition("[")[0].strip() == SHAPE for form in one.forms)}
    _refuse(
        operator, sorted(read & {name for name, _ in operator.attributes}), "is an attribute and an input of values"
    )
    both = sorted({tensor.name for tensor in operator.inputs} & {tensor.name for tensor in operator.outputs})
    reason = "is an input and an output: nothing is computed in place; give the output a name of its own"
    _refuse(operator, both, reason)
