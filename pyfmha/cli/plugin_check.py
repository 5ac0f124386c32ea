"""``pyfmha plugin-check``: a library's own plugins, as TensorRT meets them."""

from pathlib import Path
from typing import Annotated

import typer

from pyfmha.cli.base import console, reported
from pyfmha.verify.plugins import MODULES, check_plugins


@reported()
def plugin_check_command(
    path: Annotated[
        Path | None, typer.Argument(help="The library (.so). Default: PYFMHA_LIBRARY, else aot_out, else the wheel's.")
    ] = None,
    tensorrt: Annotated[
        str | None,
        typer.Option(
            "--tensorrt", help=f"Module to load it with. Default: the first there is of {', '.join(MODULES)}."
        ),
    ] = None,
) -> None:
    """Load a library's own plugins as TensorRT does, and ask all that needs no engine. Needs neither GPU nor Triton;
    without TensorRT it goes through the plugins' tables. Exit code 1: an answer is wrong.
    """
    wrong = 0
    for finding in check_plugins(path, tensorrt):
        console.print(f"{'ok   ' if finding.good else 'WRONG'} {finding.text}", markup=False, soft_wrap=True)
        wrong += not finding.good
    if wrong:
        console.print(f"{wrong} wrong", markup=False)
        raise typer.Exit(1)
