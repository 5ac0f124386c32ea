"""``pyfmha build --functions``: files of score and mask functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pyfmha.aot import Compiler
from pyfmha.aot.held import read_held
from pyfmha.errors import KernelSourceError, SpecError
from pyfmha.functions.family import (
    SHIPPED,
    Declared,
    declared_in,
    file_of,
    function_operators,
    function_specs,
)
from pyfmha.functions.relative import check_relative
from pyfmha.operators.description import Operator
from pyfmha.spec.kernel import KernelSpec

FunctionFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--functions",
        help="Files of score and mask functions, which are executed, or the names of some that come with pyfmha:"
        f" {', '.join(SHIPPED)}. One or several, besides the kernels.",
    ),
]


@dataclass(frozen=True)
class FunctionFamily:
    """What a build makes of functions.

    Attributes:
        specs: what to compile of those that are asked for.
        operators: their plugins, and those of functions that the folder holds.
        notes: what of them cannot be had, a line each.
    """

    specs: list[KernelSpec]
    operators: list[Operator]
    notes: list[str]


def functions_of(
    names: Sequence[str],
    dtypes: Sequence[str],
    head_sizes: Sequence[int],
    folder: Path,
    fresh: bool,
) -> FunctionFamily:
    """What to make of some files, which are imported in a process of their own.

    Functions that the folder holds are compiled again where their files have changed; so are their plugins, which know
    them by their source.
    """
    kept = set() if fresh else _held(folder)
    if not names and not kept:
        return FunctionFamily([], [], [])
    with Compiler(1) as compiler:
        asked = [function for name in names for function in declared_in(file_of(name), compiler.collect)]
        known = {function.name for function in asked}
        files = sorted({file for file, name in kept if name not in known})
        others = [function for file in files for function in _again(compiler, file, folder)]
    check_relative(asked)
    held = [function for function in others if (function.source, function.name) in kept and function.name not in known]
    operators, notes = function_operators([*held, *asked])
    specs = function_specs(asked, dtypes, head_sizes)
    return FunctionFamily(specs, operators, notes)


def _again(compiler: Compiler, file: Path, folder: Path) -> list[Declared]:
    """The functions of a file that a folder holds some of."""
    try:
        return declared_in(file, compiler.collect)
    except (KernelSourceError, SpecError) as error:
        raise type(error)(
            f"{error}\n{folder} holds functions of that file; mend it, or drop what {folder} holds:"
            f" pyfmha build --fresh -o {folder}"
        ) from error


def _held(folder: Path) -> set[tuple[Path, str]]:
    """The functions of a folder's library, each with its file, as far as that is still there."""
    found = set()
    for one in read_held(folder).variants:
        for function in one.spec.functions:
            file = (folder / function.source).resolve()
            if file.is_file():
                found.add((file, function.attribute.partition(".")[0]))
    return found
