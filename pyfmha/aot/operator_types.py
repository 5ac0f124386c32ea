"""Whether kernels were compiled for the types of the tensors that they are launched with."""

import itertools
from collections.abc import Iterator, Mapping

from pyfmha.errors import SpecError
from pyfmha.operators.description import ELEMENTS, ITEM_SIZES, Operator
from pyfmha.operators.expressions import Scope
from pyfmha.operators.program import LaunchProgram, Program, Source
from pyfmha.operators.text import Hole
from pyfmha.spec.abi import ctype
from pyfmha.spec.manifest import Function


def type_choices(program: Program) -> Iterator[dict[str, str]]:
    """What the names of types may stand for together."""
    names = list(program.types)
    for chosen in itertools.product(*(program.types[name].names for name in names)):
        yield dict(zip(names, chosen, strict=True))


def check_pointer(
    operator: Operator, launch: LaunchProgram, name: str, source: Source, given: str, types: Mapping[str, str]
) -> None:
    """Refuse a pointer to other elements than a tensor's: bytes, and integers of the same size, serve any tensor.

    Args:
        operator, launch: where it is an argument.
        name, source: the argument.
        given: what the kernel takes it for, ``"*fp32"``.
        types: what the names of types stand for.

    Raises:
        SpecError: naming argument, tensor and types.
    """
    element = given.removeprefix("*")
    for tensor in (*operator.inputs, *operator.outputs):
        for form in tensor.forms:
            kind = form.partition("[")[0].strip()
            kind = types.get(kind, kind)
            if not any(pointer == tensor.name for _, pointer, _ in source.cases) or kind not in ELEMENTS:
                continue
            bits = 8 * ITEM_SIZES[kind]
            allowed = list(dict.fromkeys((ELEMENTS[kind], f"i{bits}", f"u{bits}", "i8", "u8")))
            if element not in allowed:
                raise SpecError(
                    f"{operator.name}: launch {launch.said}, argument {name}: the kernel is compiled for {given}, and"
                    f" {tensor.name} is of {kind}; allowed are {', '.join(f'*{one}' for one in allowed)}"
                )


def check_held(program: Program, functions: Mapping[str, Function]) -> None:
    """Compare launches of functions that are built elsewhere with those that there are, as far as types name them.

    Raises:
        SpecError: there is no such function, or it is compiled for other types.
    """
    for launch in program.launches:
        read = {name for part in launch.function.parts if isinstance(part, Hole) for name in part.expression.names()}
        if not launch.launch.function or launch.launch.option or not read <= set(program.types):
            continue
        for types in type_choices(program):
            name = launch.function.render(Scope(types))
            if name not in functions or not launch.fits(functions[name].arguments):
                there = "takes other arguments" if name in functions else "is not among the library's functions"
                said = ", ".join(f"{variable} {kind}" for variable, kind in types.items() if variable in read)
                raise SpecError(
                    f"{program.operator.name}: launch {launch.said}: {name} {there}{said and ', for '}{said}"
                )
            for (argument, source), (_, kind) in zip(launch.arguments, functions[name].arguments, strict=True):
                if isinstance(source, Source) and ctype(kind).kind == "pointer":
                    check_pointer(program.operator, launch, argument, source, kind, types)
