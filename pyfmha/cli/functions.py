"""``pyfmha build --functions``: files of score and mask functions."""

from collections.abc import Sequence
from typing import Annotated

import typer

from pyfmha.aot import Compiler
from pyfmha.functions.family import SHIPPED, declared_in, file_of, function_specs
from pyfmha.spec.kernel import KernelSpec

FunctionFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--functions",
        help="Files of score and mask functions, which are executed, or the names of some that come with pyfmha:"
        f" {', '.join(SHIPPED)}. One or several, besides the kernels.",
    ),
]


def specs_of_files(names: list[str], dtypes: Sequence[str], head_sizes: Sequence[int]) -> list[KernelSpec]:
    """What to compile of some files of functions, which are imported in a process of their own."""
    with Compiler(1) as compiler:
        declared = [function for name in names for function in declared_in(file_of(name), compiler.collect)]
    return function_specs(declared, dtypes, head_sizes)
