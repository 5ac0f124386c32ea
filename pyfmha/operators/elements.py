"""What a kernel's pointers point to."""

from collections.abc import Mapping

from pyfmha.errors import SpecError
from pyfmha.operators.description import DATA_TYPES, ELEMENTS
from pyfmha.operators.program import NULL, LaunchProgram, Program, Source


def element_of(program: Program, launch: LaunchProgram, name: str, source: Source, types: Mapping[str, str]) -> str:
    """The elements of a pointer's tensor, or of its part of the workspace, as :mod:`pyfmha.spec.abi` names types.

    Args:
        program: of the operator.
        launch: whose argument it is.
        name, source: of the argument.
        types: what the names of types stand for.

    Raises:
        SpecError: the tensors that it may be are of several types, or nothing tells.
    """
    what = f"{program.operator.name}: launch of {launch.launch.kernel}, argument {name}"
    kinds: set[str] = set()
    for _, pointer, _ in source.cases:
        if pointer == NULL:
            continue
        parts = {part.name: part.type for part in program.operator.workspace}
        if pointer in parts:
            kinds.add(types.get(parts[pointer], parts[pointer]))
        for tensor in (*program.inputs, *program.outputs):
            if tensor.name == pointer:
                kinds |= {types.get(form.type, form.type) for form in tensor.forms}
    if len(kinds) != 1:
        there = f"it may be of {', '.join(sorted(kinds))}" if kinds else "nothing tells what it points to"
        raise SpecError(f"{what}: {there}; say so in scalars={{{name!r}: '*fp32'}}")
    (kind,) = kinds
    if kind not in DATA_TYPES:
        raise SpecError(f"{what}: {kind!r} is no type")
    return ELEMENTS[kind]
