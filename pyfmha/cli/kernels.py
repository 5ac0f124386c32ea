"""The commands that make C of one kernel, and a library of such results: ``compile`` and ``link``."""

from pathlib import Path
from typing import Annotated

import typer

from pyfmha.aot import Compiler, compile_configs, compile_kernel, link, make_specs
from pyfmha.cli.archs import archs_of
from pyfmha.cli.base import announce, beginning, notes, reported, tell
from pyfmha.errors import SpecError
from pyfmha.report import describe_functions, progress_bar
from pyfmha.spec.arch import ARCHS
from pyfmha.trt.saved import check_writable


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

    Example, in a clone of the project:

    \b
    pyfmha compile kernels/fmha_triton.py -n fused_attention_kernel -s "
      *fp16:16, *fp32:16, *fp32:16, *fp16:16, *fp16:16, *fp16:16,
      fp32, i32, i32, i32, 128, 64, 128" -g "
      (seq_len + 127) / 128, batch_size * num_heads, 1" -w 4 -t sm_90 -o aot_out/
    """
    archs = archs_of(target)
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
        check_writable(output.with_name(f"{output.name}.h"))
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
