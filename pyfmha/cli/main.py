"""The command line: it parses, calls the Python API, and prints. Errors end with exit code 2, failed checks with 1."""

from pathlib import Path
from typing import Annotated

import typer

import pyfmha
from pyfmha.aot import Compiler, build, preview
from pyfmha.aot.operator_specs import load_operators, operator_specs
from pyfmha.attention.families import DEFAULT, KERNELS, library_specs
from pyfmha.attention.first import HEAD_SIZES, family
from pyfmha.attention.operator import OPERATOR
from pyfmha.cli.archs import Archs, default_archs
from pyfmha.cli.base import (
    Command,
    Dtypes,
    Group,
    Spread,
    announce,
    beginning,
    console,
    dtypes_of,
    notes,
    print_json,
    reported,
    tell,
)
from pyfmha.cli.builds import check_ready, effort, foretold, told
from pyfmha.cli.functions import FunctionFiles, functions_of
from pyfmha.cli.gpu import bench_command, verify_command
from pyfmha.cli.kernels import compile_command, link_command
from pyfmha.cli.onnx import onnx_command, onnx_engine_command
from pyfmha.cli.plugin_check import plugin_check_command
from pyfmha.operators.description import Operator
from pyfmha.report import audit, describe_functions, progress_bar
from pyfmha.runtime.find import library_path
from pyfmha.runtime.library import describe
from pyfmha.spec.advice import LIBRARY_NAME
from pyfmha.spec.arch import parse_archs
from pyfmha.spec.kernel import KernelSpec

app = typer.Typer(
    name="pyfmha",
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fused multi-head attention for TensorRT in pure Python: compile Triton kernels ahead of time, anywhere.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=True,
)


_FAMILIES = "; ".join(f"{name}, {what}" for name, what in KERNELS.items())
HeadSizes = Annotated[
    list[int] | None,
    typer.Option("--head-size", help="One or several, 1 to 256. Default: 32, 64, 128, 256, which serve all others."),
]
Folder = Annotated[Path, typer.Option("-o", "--out", help="Folder for the library.")]
Jobs = Annotated[int | None, typer.Option("-j", "--jobs", min=1, help="Compiler processes. Default: one a CPU.")]


@app.command("build", cls=Spread)
@reported()
def build_command(
    arch: Archs = None,
    dtype: Dtypes = None,
    head_size: HeadSizes = None,
    kernels: Annotated[
        list[str] | None,
        typer.Option(
            "--kernels",
            help=f"{_FAMILIES}. One or several. Default: {', '.join(DEFAULT)}.",
            autocompletion=beginning(KERNELS),
        ),
    ] = None,
    functions: FunctionFiles = None,
    out: Folder = Path("aot_out"),
    jobs: Jobs = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Drop what the library there holds beside this.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be built and compiled; do nothing.")
    ] = False,
    operators: Annotated[
        list[Path] | None,
        typer.Option(
            "--operators",
            help="Python file with pyfmha.Operator descriptions and their kernels, one or several; it is executed. Then"
            " attention is built only where --kernels, --dtype or --head-size ask for it.",
        ),
    ] = None,
) -> None:
    """Build the attention kernels, or operators of your own, into one shared library with its manifest and its plugins
    for TensorRT. Needs no GPU.

    What the library there holds stays in it: functions, and architectures of the same functions, add up.

    Examples, the last for a clone of the project:

    \b
    pyfmha build --arch sm_80 sm_90 --dtype fp16 bf16 --head-size 64 128
    pyfmha build --kernels forward decode --arch sm_90 --dry-run
    pyfmha build --operators examples/operator/bias_gelu.py --arch sm_80 sm_90
    """
    archs, why = (parse_archs(arch), "") if arch else default_archs()
    dtypes = dtypes_of(dtype)
    specs, described = _described(operators or [])
    if not operators or kernels or dtype or head_size:
        specs += library_specs(kernels or DEFAULT, dtypes, head_size or HEAD_SIZES)
        described.append(OPERATOR)
    own = functions_of(functions or [], dtypes, head_size or HEAD_SIZES, out, fresh)
    specs += own.specs
    described += own.operators
    for note in own.notes:
        announce(f"note: {note}")
    ahead = preview(specs, archs, out, fresh=fresh)
    if dry_run:
        for line in foretold(ahead, jobs):  # this is the result, which -q leaves
            console.print(line, markup=False, soft_wrap=True)
        return
    check_ready(ahead)
    if why:
        announce(f"Building {why}.")
    if ahead.missing:
        announce(effort(ahead, jobs))
    with progress_bar(notes, "compiling") as progress:
        result = build(specs, archs, out, jobs=jobs, progress=progress, fresh=fresh, operators=described)
    tell(told(result))


def _described(files: list[Path]) -> tuple[list[KernelSpec], list[Operator]]:
    """What to compile for the operators of some files, and the operators."""
    specs: list[KernelSpec] = []
    described: list[Operator] = []
    if files:
        with Compiler(1) as compiler:
            for file in files:
                for operator in load_operators(compiler, file):
                    specs += operator_specs(compiler, operator)
                    described.append(operator)
    return specs, described


@app.command("inspect", cls=Command)
@reported()
def inspect_command(
    path: Annotated[
        Path | None,
        typer.Argument(
            help="A library (.so), its folder, or a manifest (.json). Default: as verify finds one.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The manifest, for programs.")] = False,
) -> None:
    """Print what a library or a manifest holds. Needs neither GPU nor driver."""
    if path is not None and path.is_dir():
        path = path / LIBRARY_NAME
    manifest = describe(path)
    if as_json:
        print_json(manifest.to_json())
        return
    console.print(f"{path or library_path()}:", markup=False, soft_wrap=True)
    for line in describe_functions(manifest):
        console.print(line, markup=False, soft_wrap=True)
    console.print(audit(manifest))


@app.command("demo", cls=Spread)
@reported()
def demo_command(
    arch: Archs = None,
    dtype: Dtypes = None,
    head_size: Annotated[
        list[int] | None,
        typer.Option("--head-size", help=f"One or several: {', '.join(map(str, HEAD_SIZES))}. Default: 64."),
    ] = None,
    out: Folder = Path("aot_out"),
    jobs: Jobs = None,
) -> None:
    """Build the library, audit it, load it, run attention, and check it against float64.

    All the family:

    \b
    pyfmha demo --head-size 32 64 128 256
    """
    from pyfmha.cli.demo import run_demo

    archs, why = (parse_archs(arch), "as asked") if arch else default_archs(need_gpu_code=False)
    members = family(dtypes_of(dtype), head_size or [64])
    if not run_demo(console, members, archs, why, out, jobs):
        raise typer.Exit(1)


app.command("compile", cls=Command)(compile_command)
app.command("link", cls=Command)(link_command)
app.command("plugin-check", cls=Command)(plugin_check_command)
app.command("onnx", cls=Spread)(onnx_command)
app.command("onnx-engine", cls=Spread)(onnx_engine_command)
app.command("verify", cls=Spread)(verify_command)
app.command("bench", cls=Spread)(bench_command)


@app.callback(invoke_without_command=True)
@reported()
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        console.print(f"pyfmha {pyfmha.__version__}")
        raise typer.Exit
