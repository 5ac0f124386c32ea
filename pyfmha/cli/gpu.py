"""The commands that measure and check on a GPU: ``verify`` and ``bench``."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pyfmha.attention.first import DTYPES
from pyfmha.bench.cells import LAYOUTS
from pyfmha.bench.presets import DESCRIPTIONS
from pyfmha.cli.base import SILENT, Dtypes, beginning, console, dtypes_of, notes, print_json, reported
from pyfmha.errors import SpecError

AsJson = Annotated[bool, typer.Option("--json", help="The results for programs, in the place of tables.")]
LibraryPath = Annotated[
    Path | None,
    typer.Option("--library", help="The .so. Default: $PYFMHA_LIBRARY, else aot_out/libpyfmha.so, else the wheel's."),
]

DeviceNumber = Annotated[int, typer.Option("--device", min=0, help="Number of the GPU, as the CUDA driver counts.")]


@reported()
def verify_command(
    dtype: Dtypes = None,
    head_size: Annotated[int, typer.Option("--head-size", help="Of the engines.")] = 64,
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            help="library or engine. Default: both, engines where TensorRT is installed.",
            autocompletion=beginning(("library", "engine")),
        ),
    ] = None,
    library: LibraryPath = None,
    random: Annotated[
        int,
        typer.Option(
            "--random",
            min=0,
            help="So many random problems for each production function besides: sizes, masks, lengths, strides.",
        ),
    ] = 0,
    functions: Annotated[
        list[str] | None,
        typer.Option(
            "--functions",
            help="Files of score and mask functions, which are executed, or names of some that come with pyfmha. One"
            " or several. Needs Triton, whose interpreter evaluates them in float64.",
        ),
    ] = None,
    device: DeviceNumber = 0,
    as_json: AsJson = False,
) -> None:
    """Check every variant of the library on this GPU against float64, then TensorRT engines with the plugin.

    Needs a GPU and the library that pyfmha build makes; no Triton, no PyTorch. The cases hold every feature and edge:
    odd lengths, grouped heads, windows, padding and ragged batches, rows without keys, misaligned pointers, the largest
    finite inputs, guard bytes around outputs. Which variant ran is checked, too. It takes about a minute; the exit code
    is 1 if anything is wrong. The tables are for a bug report.

    Engines need the full tensorrt (pip install tensorrt).
    """
    from pyfmha.verify.command import run_verify

    printed = SILENT if as_json else console
    verdict = run_verify(
        printed, notes, dtypes_of(dtype), head_size, only, library, random, functions or (), device=device
    )
    if as_json:
        print_json(verdict.to_json())
    if not verdict.passed:
        raise typer.Exit(1)


def _several(what: str, default: str, words: Sequence[str] = ()) -> Any:
    return typer.Option(help=f"{what}, one or several. Default: {default}.", autocompletion=beginning(words))


@reported()
def bench_command(
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            help=" ".join(f"{name}: {said}." for name, said in DESCRIPTIONS.items())
            + " Default, without sizes: quick.",
            autocompletion=beginning(DESCRIPTIONS),
        ),
    ] = None,
    dtype: Annotated[list[str] | None, _several(", ".join(DTYPES), "fp16", DTYPES)] = None,
    batch: Annotated[list[int] | None, _several("Sequences", "4")] = None,
    heads: Annotated[list[int] | None, _several("Query heads", "32")] = None,
    kv_heads: Annotated[list[int] | None, _several("Key heads, of which heads is a multiple", "as heads")] = None,
    seq: Annotated[list[int] | None, _several("Queries of a sequence", "2048")] = None,
    kv_seq: Annotated[list[int] | None, _several("Keys of a sequence", "as seq")] = None,
    head_size: Annotated[list[int] | None, _several("1 to 256", "64")] = None,
    v_head_size: Annotated[
        int | None,
        typer.Option("--v-head-size", min=1, max=256, help="Of V and Out. Default: as head-size."),
    ] = None,
    causal: Annotated[bool | None, typer.Option("--causal/--full", help="Which mask. Default: both.")] = None,
    layout: Annotated[
        list[str] | None,
        _several("How tensors lie in memory: bhsd (batch, heads, sequence, head size) or bshd", "bhsd", LAYOUTS),
    ] = None,
    row: Annotated[
        list[str] | None,
        typer.Option(
            help="Which rows, by the beginning of their names: ours, ours-decode, ours-first, cudnn, flash, efficient,"
            " math, flex, flash3, jit, tensorrt. Default: all."
        ),
    ] = None,
    generic: Annotated[
        bool, typer.Option("--generic", help="Also time the variant for misaligned tensors, which is slow.")
    ] = False,
    out: Annotated[Path, typer.Option("-o", "--out", help="The results, as JSON.")] = Path("bench.json"),
    png: Annotated[Path | None, typer.Option(help="The picture. Default: beside the JSON. Needs matplotlib.")] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            help="An earlier JSON of the same GPU: exit code 1 if ours became slower beyond the noise of both."
        ),
    ] = None,
    library: LibraryPath = None,
    device: DeviceNumber = 0,
    as_json: AsJson = False,
) -> None:
    """Time attention side by side on this GPU: ours by variant, cuDNN, FlashAttention-2 and 3, Triton's JIT, TensorRT.

    Needs a GPU and the library that pyfmha build makes. Software that is missing is a row that says so; PyTorch brings
    most rows: pip install torch.

    GPU us is the median time of single launches, each after a write to more memory than the L2 cache holds, on random
    data in three sets, all contenders in turns; each output is compared with float64 before and after. +- is the
    farthest that the median of a round lay from it. host us is what a call costs on the CPU, graph us the same launch
    in a CUDA graph, ratio FlashAttention-3's time over the row's (cuDNN's where that is not there, memory-efficient's
    where cuDNN does not serve).

    Examples, the third after a kernel was changed and built:

    \b
    pyfmha bench
    pyfmha bench --preset prefill -o before.json
    pyfmha bench --preset prefill --compare before.json
    pyfmha bench --preset flash3 --layout bhsd bshd
    pyfmha bench --seq 512 1024 --head-size 96 --causal --row ours cudnn
    """
    from pyfmha.bench.cells import cells_from
    from pyfmha.bench.command import Request, run_bench
    from pyfmha.bench.presets import preset as preset_cells

    sizes = (dtype, batch, heads, kv_heads, seq, kv_seq, head_size)
    given = any(value is not None for value in (*sizes, v_head_size, causal))
    if preset is not None and given:
        raise SpecError("--preset brings its own sizes: give it, or sizes by flags, not both")
    if preset is not None or not given:
        cells = preset_cells(preset or "quick")
    else:
        masks = (True, False) if causal is None else (causal,)
        cells = cells_from(
            dtypes_of(dtype or ["fp16"]), batch or [4], heads or [32], kv_heads or [], seq or [2048], kv_seq or [],
            head_size or [64], masks, v_head_size or 0,
        )  # fmt: skip
    cells = list(dict.fromkeys(replace(cell, layout=one) for cell in cells for one in layout or ["bhsd"]))
    picture = png or out.with_suffix(".png")
    request = Request(cells, row or (), generic, out, picture, compare, library, device)
    fine = run_bench(SILENT if as_json else console, notes, request)
    if as_json:
        print_json(out.read_text())
    if not fine:
        raise typer.Exit(1)
