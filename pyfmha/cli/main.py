"""The command line: it parses, calls the Python API, and prints. Errors end with exit code 2, failed checks with 1."""

from pathlib import Path
from typing import Annotated

import typer

import pyfmha
from pyfmha.aot import Compiler, build, compile_configs, compile_kernel, link, make_specs, preview
from pyfmha.aot.operator_specs import load_operators, operator_specs
from pyfmha.attention.families import DEFAULT, KERNELS, library_specs
from pyfmha.attention.first import HEAD_SIZES, family
from pyfmha.attention.operator import OPERATOR
from pyfmha.cli.base import (
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
from pyfmha.cli.builds import effort, foretold, told
from pyfmha.cli.functions import FunctionFiles, specs_of_files
from pyfmha.cli.gpu import bench_command, verify_command
from pyfmha.cli.onnx import onnx_command, onnx_engine_command
from pyfmha.cli.plugin_check import plugin_check_command
from pyfmha.errors import SpecError
from pyfmha.operators.description import Operator
from pyfmha.report import audit, describe_functions, progress_bar
from pyfmha.runtime.device import find_gpu
from pyfmha.runtime.library import describe
from pyfmha.spec.arch import ARCHS, Arch, arch_for, parse_archs
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


def _no_code(gpu: str, option: str) -> str:
    return f"the GPU here is {gpu}, which pyfmha has no code for; give {option}, one or several of {', '.join(ARCHS)}"


def _archs(asked: list[str] | None) -> tuple[Arch, ...]:
    """The architectures asked for, else the one whose code the GPU runs.

    Raises:
        SpecError: none was asked for and there is no GPU, or pyfmha has no code for it.
    """
    if asked:
        return parse_archs(asked)
    device, reason = find_gpu()
    if device is None:
        raise SpecError(
            f"no architecture given and no GPU to take it from ({reason}); give one with -t, such as -t sm_90;"
            f" allowed: {', '.join(ARCHS)}"
        )
    served = arch_for(device.arch, ARCHS)
    if served is None:
        raise SpecError(_no_code(device.arch, "-t"))
    return parse_archs([served])


def default_archs(*, need_gpu_code: bool = True) -> tuple[tuple[Arch, ...], str]:
    """The architecture whose code the GPU runs, or sm_80 and sm_90 where there is no GPU, with the reason in words.

    Args:
        need_gpu_code: whether a GPU that pyfmha has no code for is an error, or like none.

    Raises:
        SpecError: it is one, and it is that.
    """
    device, reason = find_gpu()
    if device is not None:
        served = arch_for(device.arch, ARCHS)
        if served is not None:
            found = f"found here: {device.name}" + (f", which is {device.arch}" if served != device.arch else "")
            return parse_archs([served]), f"for {served}, {found}"
        if need_gpu_code:
            raise SpecError(_no_code(device.arch, "--arch"))
        why = f"pyfmha has no code for the GPU here, {device.name}, which is {device.arch}"
    else:
        why = f"there is no GPU here ({reason})"
    return parse_archs(["sm_80", "sm_90"]), f"for sm_80 and sm_90, since {why}"


Archs = Annotated[
    list[str] | None,
    typer.Option(
        *("--arch", "-t", "--target"),
        help=f"Architecture, one or several: {', '.join(ARCHS)}. Default: the GPU's, else sm_80 and sm_90.",
        autocompletion=beginning(ARCHS),
    ),
]
_FAMILIES = "; ".join(f"{name}, {what}" for name, what in KERNELS.items())
HeadSizes = Annotated[
    list[int] | None,
    typer.Option("--head-size", help="One or several, 1 to 256. Default: 32, 64, 128, 256, which serve all others."),
]
Folder = Annotated[Path, typer.Option("-o", "--out", help="Folder for the library.")]
Jobs = Annotated[int | None, typer.Option("-j", "--jobs", min=1, help="Compiler processes. Default: one a CPU.")]


@app.command("compile")
@reported()
def compile_command(
    path: Annotated[Path, typer.Argument(help="Python file with the kernel. It is executed.", show_default=False)],
    kernel_name: Annotated[
        str,
        typer.Option(
            "-n", "--kernel-name", help="The @triton.jit function; it may stand under autotune or heuristics."
        ),
    ],
    signature: Annotated[
        str,
        typer.Option(
            "-s",
            "--signature",
            help="Types, hints and constants, in the kernel's order: '*fp16:16, i32, fp32, 128'. :16 promises a"
            " multiple of 16, :1 the value 1. Then by name: 'BLOCK=128, ACTIVATION=gelu, DTYPE=fp16'; tuples in"
            " parentheses; _ for what a configuration, a heuristic or a default gives.",
        ),
    ],
    grid: Annotated[
        str,
        typer.Option(
            "-g",
            "--grid",
            help="Launch grid, from integer arguments and constants: '(n + 127) / 128, batch * heads, 1'.",
        ),
    ],
    out_path: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--out-path",
            help="Path of the results, without ending, or a folder. Default: the function's name. Code for other"
            " architectures that is there stays.",
        ),
    ] = None,
    out_name: Annotated[
        str | None, typer.Option("-on", "--out-name", help="The C function's name. Default: the kernel's.")
    ] = None,
    num_warps: Annotated[
        int | None, typer.Option("-w", "--num-warps", help="Warps a block. Default: the configuration's, else 1.")
    ] = None,
    num_stages: Annotated[
        int | None,
        typer.Option("-ns", "--num-stages", help="Software-pipelining depth. Default: the configuration's, else 3."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            help="Which configuration of its @triton.autotune, from 0 on, gives constants, warps and stages; all: each,"
            " as an algorithm of its own.",
        ),
    ] = None,
    workspace: Annotated[
        bool,
        typer.Option("--workspace", help="The function's last argument is memory for the kernel's global scratch."),
    ] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(
            *("--arch", "-t", "--target"),
            help="Architecture, sm_90 or cuda:90:32; repeatable. Default: the GPU's.",
            autocompletion=beginning(ARCHS),
        ),
    ] = None,
    generic: Annotated[
        bool, typer.Option(help="Also compile the variant without hints, which serves what the hinted one cannot.")
    ] = True,
    maxnreg: Annotated[int | None, typer.Option(help="Registers a thread at most, 8 to 255.")] = None,
    debug: Annotated[
        bool | None, typer.Option(help="Compile device asserts in. Default: as @triton.jit(debug=...) says.")
    ] = None,
    fp_fusion: Annotated[bool, typer.Option(help="Round a * b + c once.")] = True,
    nullable: Annotated[
        list[str] | None,
        typer.Option(
            help="A pointer that may be null, repeatable: bias, or 'K if kv_len == 0'. Launches with another that is"
            " null are refused, unless their grid is empty."
        ),
    ] = None,
) -> None:
    """Compile one kernel to C files that carry its machine code. Needs no GPU.

    Example:

    \b
    pyfmha compile kernels/fmha_triton.py -n fused_attention_kernel -s "
      *fp16:16, *fp32:16, *fp32:16, *fp16:16, *fp16:16, *fp16:16,
      fp32, i32, i32, i32, 128, 64, 128" -g "
      (seq_len + 127) / 128, batch_size * num_heads, 1" -w 4 -t sm_90 -o aot_out/
    """
    archs = _archs(target)
    configs = _configs(config)
    with Compiler() as compiler, progress_bar(notes, "compiling") as progress:
        specs = make_specs(
            compiler,
            path,
            kernel_name,
            signature,
            grid,
            name=out_name,
            configs=configs,
            archs=archs,
            num_warps=num_warps,
            num_stages=num_stages,
            maxnreg=maxnreg,
            workspace=workspace,
            default_warps=1,
            debug=debug,
            enable_fp_fusion=fp_fusion,
            nullable=nullable or (),
            note=_note,
        )
        folder = not out_path or out_path.endswith("/")
        output = Path(out_path or "", specs[0].name) if folder else Path(out_path or "")
        if configs is None:
            headers = compile_configs(compiler, specs, archs, output, generic=generic, progress=progress, note=_note)
        else:
            headers = compile_kernel(compiler, specs[0], archs, output, generic=generic, progress=progress)
    tell(map(str, headers))


def _configs(text: str | None) -> list[int | None] | None:
    """The configurations asked for: none, one, or, as None, all."""
    if text is None:
        return [None]
    if text == "all":
        return None
    if not text.isdecimal():
        raise SpecError(f"--config is {text!r}; give a number, from 0 on, or all")
    return [int(text)]


def _note(text: str) -> None:
    announce(f"note: {text}")


@app.command("link")
@reported()
def link_command(
    headers: Annotated[list[Path], typer.Argument(help="The .h files that compile wrote.", show_default=False)],
    output: Annotated[str, typer.Option("-o", "--out", help="Path of the results, without ending.")],
    library: Annotated[bool, typer.Option(help="Also build the shared library, with the C compiler.")] = True,
) -> None:
    """Link compiled kernels: a dispatcher in C, and a shared library.

    Example:

    \b
    pyfmha link aot_out/fp16/*.h -o aot_out/fmha_kernel_fp16
    """
    if output.endswith("/"):
        raise SpecError(f"-o {output} is a folder; give the path of the results in it, without ending: {output}NAME")
    manifest = link([h for h in headers if h.name != "pyfmha_runtime.h"], Path(output), library=library)
    tell([*describe_functions(manifest), f"{output}.so" if library else f"{output}.c"])


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

    Examples:

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
    if functions:
        specs += specs_of_files(functions, dtypes, head_size or HEAD_SIZES)
    ahead = preview(specs, archs, out, fresh=fresh)
    if dry_run:
        tell(foretold(ahead, jobs))
        return
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


@app.command("inspect")
@reported()
def inspect_command(
    path: Annotated[
        Path | None,
        typer.Argument(help="A library (.so) or a manifest (.json). Default: as verify finds one.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The manifest, for programs.")] = False,
) -> None:
    """Print what a library or a manifest holds. Needs neither GPU nor driver."""
    manifest = describe(path)
    if as_json:
        print_json(manifest.to_json())
        return
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


app.command("plugin-check")(plugin_check_command)
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
