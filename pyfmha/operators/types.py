"""What the names of types in a description may stand for."""

from collections.abc import Mapping
from typing import Any

from pyfmha.errors import PluginError
from pyfmha.operators.description import DATA_TYPES, TYPE_NAMES, Types
from pyfmha.operators.forms import TensorForm
from pyfmha.operators.program import Program


def fixed_types(program: Program, values: Mapping[str, Any]) -> dict[str, str]:
    """The types that attributes hold.

    Args:
        program: of the operator.
        values: of attributes, by name.

    Raises:
        PluginError: an attribute holds one that is not allowed.
    """
    found = {}
    numbers = {number: name for name, number in DATA_TYPES.items()}
    for name, kinds in program.types.items():
        if not kinds.attribute:
            continue
        number = values[kinds.attribute]
        if numbers.get(number) not in kinds.names:
            allowed = allowed_types(kinds)
            raise PluginError(f"{kinds.attribute} is {number}; allowed is int(trt.DataType): {allowed}")
        found[name] = numbers[number]
    return found


def allowed_types(kinds: Types) -> str:
    """The types that a name may stand for, for messages: with their numbers where an attribute holds it."""
    if not kinds.attribute:
        return ", ".join(TYPE_NAMES[name] for name in kinds.names)
    return ", ".join(f"{n} ({said})" for n, said in sorted((DATA_TYPES[k], TYPE_NAMES[k]) for k in kinds.names))


def type_error(program: Program, form: TensorForm, kind: int, types: Mapping[str, str]) -> str:
    """What is said of a tensor of another type.

    Args:
        program: of the operator.
        form: of the tensor.
        kind: ``int(trt.DataType)`` that it has.
        types: what the names of types stand for.
    """
    names = {number: name for name, number in DATA_TYPES.items()}
    got = f"{form.name} is of type {TYPE_NAMES.get(names.get(kind, ''), kind)}"
    if form.variable in DATA_TYPES:
        return f"{got}; it must be {TYPE_NAMES[form.variable]}"
    variable = program.types[form.variable]
    if variable.attribute:
        wanted = types[form.variable]
        made = f"{TYPE_NAMES[wanted]} ({variable.attribute} {DATA_TYPES[wanted]})"
        return f"{got}; the plugin was created for {made}"
    return f"{got}; {form.variable} is one type of {allowed_types(variable)} in all tensors"
