"""What the tables of the plugins in C have room for: ``pyfmha_operator.h`` and ``pyfmha_plugin.c``."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

from pyfmha.errors import SpecError
from pyfmha.operators.description import TYPE_NAMES, Operator
from pyfmha.operators.program import LaunchProgram, Program
from pyfmha.spec.manifest import Function

MOST_VALUES, MOST_LAUNCHES, MOST_ARGUMENTS, MOST_TENSORS, MOST_PARTS, MOST_OPTIONS = 160, 16, 96, 32, 16, 8
MOST_FUNCTIONS, MOST_OPERATORS = 1024, 64
LONGEST_NAME, LONGEST_FUNCTION, LARGEST_ALIGNMENT = 64, 255, 1 << 30


def check_limits(program: Program, functions: Mapping[str, Function]) -> None:
    """Refuse what has no room.

    Args:
        program: of the operator.
        functions: those of the library, by name.

    Raises:
        SpecError: naming it, how much there is and how much may be.
    """
    check_room(program)
    count = max(len(callables(one, functions)) for one in program.launches)
    _check(program, {"functions for a launch": (count, MOST_FUNCTIONS)})


def check_room(program: Program) -> None:
    """Refuse what has no room, whatever the library holds: before minutes of compiling.

    Raises:
        SpecError: naming it, how much there is and how much may be.
    """
    operator = program.operator
    values = [*program.attributes, *program.types, *dict(operator.define), *program.axes, *program.shape_values]
    tensors = {tensor.name for tensor in (*program.inputs, *program.outputs)}
    counts = {
        "attributes, types, axes and definitions": (len(values), MOST_VALUES),
        "tensors": (len(tensors), MOST_TENSORS),
        "inputs, alternatives counted": (len(program.inputs), MOST_TENSORS),
        "outputs, alternatives counted": (len(program.outputs), MOST_TENSORS),
        "launches": (len(program.launches), MOST_LAUNCHES),
        "parts of the workspace": (len(program.workspace), MOST_PARTS),
        "options": (len(program.options), MOST_OPTIONS),
        "arguments of a launch": (max(len(launch.arguments) for launch in program.launches), MOST_ARGUMENTS),
    }
    _check(program, counts)
    _check_lengths(program)
    if operator.alignment > LARGEST_ALIGNMENT:
        raise SpecError(f"{operator.name}: alignment is {operator.alignment}; at most {LARGEST_ALIGNMENT} is allowed")
    for option in operator.options:
        if not 1 <= option.number < 1 << 31:
            raise SpecError(
                f"{operator.name}: option {option.name} has number {option.number}; give 1 to {(1 << 31) - 1}"
            )


def _check(program: Program, counts: Mapping[str, tuple[int, int]]) -> None:
    for what, (count, most) in counts.items():
        if count > most:
            raise SpecError(f"{program.operator.name} has {count} {what}; the plugin in C has room for {most}")


def _check_lengths(program: Program) -> None:
    """Refuse names that are too long, for the tables and for the names of files.

    Raises:
        SpecError: naming it, how long it is and may be.
    """
    name = program.operator.name
    for what, length, most in _lengths(program.operator, program):
        if length > most:
            raise SpecError(f"{name}: {what} has {length} characters; at most {most} are allowed")


def callables(launch: LaunchProgram, functions: Mapping[str, Function]) -> list[str]:
    """The functions of a library that take a launch's arguments."""
    return [name for name, function in functions.items() if launch.fits(function.arguments)]


def check_count(operators: Sequence[Operator]) -> None:
    """Refuse more operators than a library has room for.

    Raises:
        SpecError: saying how many there are and may be.
    """
    if len(operators) > MOST_OPERATORS:
        raise SpecError(f"{len(operators)} operators for one library; it has room for {MOST_OPERATORS}: build a second")


def _lengths(operator: Operator, program: Program) -> Iterator[tuple[str, int, int]]:
    words = {"its name": operator.name, "its version": operator.version, "its namespace": operator.namespace}
    for what, word in words.items():
        yield what, len(word.encode()), LONGEST_NAME
    tensors = [tensor.name for tensor in (*operator.inputs, *operator.outputs)]
    named = [*program.attributes, *program.types, *program.axes, *dict(operator.define)]
    others = [*(part.name for part in operator.workspace), *(option.name for option in operator.options)]
    for name in itertools.chain(named, tensors, others):
        yield f"the name {name}", len(name), LONGEST_NAME
    longest = max(map(len, TYPE_NAMES))
    for launch in program.launches:
        parts = launch.function.parts
        length = sum(len(part.encode()) if isinstance(part, str) else longest for part in parts)
        yield f"the function of launch {launch.said}", length, LONGEST_FUNCTION
