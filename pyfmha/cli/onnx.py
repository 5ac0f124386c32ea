"""The commands for models: ``onnx`` and ``onnx-engine``."""

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from pyfmha.cli.base import console, reported
from pyfmha.cli.gpu import LibraryPath
from pyfmha.errors import OnnxError
from pyfmha.spec.advice import install_command


def _room(name: str) -> Any:
    """A module of :mod:`pyfmha.onnx`, where what it needs is installed.

    Raises:
        OnnxError: it is not.
    """
    try:
        return importlib.import_module(f"pyfmha.onnx.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("pyfmha"):
            raise
        raise OnnxError(f"this needs {error.name}: {install_command('onnx')}") from None


@reported()
def onnx_command(
    model: Annotated[Path, typer.Argument(help="The model, which stays as it is.", show_default=False)],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The new model. Default: MODEL.pyfmha.onnx.")] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write the report as JSON, too.")] = None,
    prove: Annotated[
        bool, typer.Option("--prove", help="Run both models on random inputs of several shapes, and compare.")
    ] = False,
    size: Annotated[
        list[str] | None,
        typer.Option("--size", help="NAME=NUMBER, one or several: free axes for the proof. Default: chosen."),
    ] = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="How many runs the proof takes.")] = 3,
    library: LibraryPath = None,
) -> None:
    """Replace a model's attention by the plugin's node, wherever that is proven to be the same.

    What is left alone is listed with its reason. Exit code 1 if the proof finds a difference that rounding does not
    explain; then nothing but the report is written.

    Example: pyfmha onnx model.onnx -o model.pyfmha.onnx --report report.json --prove
    """
    command = _room("command")
    target = out or model.with_name(f"{model.stem}.pyfmha.onnx")
    sizes = dict(map(_size, size or []))
    done = command.rewrite(model, target, report_path=report, library=library, proof=prove, sizes=sizes, trials=trials)
    console.print(_found(done))
    for entry in done.report.left_alone:
        console.print(f"left alone: {entry.name} ({entry.kind}): {entry.reason}", markup=False, soft_wrap=True)
    _say_functions(done)
    if done.trials:
        console.print(_proof(done))
    if not done.same:
        console.print("The two models differ; no model was written.", markup=False)
        raise typer.Exit(1)
    replaced, found = len(done.report.replaced), len(done.report.found)
    proven = f", the same in {len(done.trials)} runs" if done.trials else ""
    console.print(f"{target}: {replaced} of {found} replaced{proven}", markup=False, soft_wrap=True)


def _size(text: str) -> tuple[str, int]:
    name, _, number = text.rpartition("=")
    if not name or not number.isdigit():
        raise OnnxError(f"--size {text} is not NAME=NUMBER")
    return name, int(number)


def _found(done: Any) -> Table:
    """The table of what was replaced."""
    table = Table(title="Replaced", box=box.SIMPLE)
    for heading in ("node", "operator", "what", "function", "in the library"):
        table.add_column(heading, overflow="fold")
    for entry in done.report.replaced:
        function = entry.problem.function_name
        held = "no library here" if done.held is None else "yes" if function in done.held else "no"
        table.add_row(entry.name, entry.kind, str(entry.problem), function, held)
    return table


def _say_functions(done: Any) -> None:
    missing = done.report.functions if done.held is None else done.report.missing(done.held)
    if missing:
        text = f"a library with {', '.join(missing)}: {done.report.build_command}"
        console.print(text, markup=False, soft_wrap=True)


def _proof(done: Any) -> Table:
    """The table of the proof."""
    table = Table(title="Both models on random inputs; ours with attention in float64", box=box.SIMPLE)
    for heading in ("sizes", "output", "shape", "error", "rounding explains", ""):
        table.add_column(heading, overflow="fold")
    for trial in done.trials:
        sizes = ", ".join(f"{name}={number}" for name, number in trial.sizes.items()) or "fixed"
        sizes += "" if trial.original_by == "ONNX Runtime" else f" (original by {trial.original_by})"
        for entry in trial.compared:
            holes = f" ({entry.holes} without a number)" if entry.holes else ""
            verdict = "same" if entry.same else "DIFFERENT"
            shape = "x".join(map(str, entry.shape)) or "scalar"
            table.add_row(
                sizes, entry.output, f"{shape}{holes}", f"{entry.error:.1e}", f"{entry.explained:.1e}", verdict
            )
    return table


@reported()
def onnx_engine_command(
    model: Annotated[Path, typer.Argument(help="A model that pyfmha onnx wrote.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="The engine's file.")],
    range_: Annotated[
        list[str] | None,
        typer.Option(
            "--range",
            help="An input with free axes, and its smallest, best and largest shape: input_ids 1x1 8x128 8x512.",
        ),
    ] = None,
    library: LibraryPath = None,
) -> None:
    """Build a TensorRT engine of a model with the plugin's nodes. Needs the full tensorrt, and a GPU.

    Example: pyfmha onnx-engine model.pyfmha.onnx -o model.engine --range input_ids 1x1 8x128 8x512
    """
    engine = _room("engine")
    words = range_ or []
    if len(words) % 4:
        raise OnnxError(f"--range takes a name and three shapes, not {' '.join(words)}")
    ranges = {
        words[at]: engine.parsed_range((words[at + 1], words[at + 2], words[at + 3])) for at in range(0, len(words), 4)
    }
    built = engine.build_onnx_engine(model, ranges, library=library)
    from pyfmha.trt.saved import write_whole

    write_whole(out, built.plan)
    console.print(f"{out}: {len(built.plan)} bytes, TensorRT {built.tensorrt}", markup=False, soft_wrap=True)
