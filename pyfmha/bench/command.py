"""``pyfmha bench``: opens the device, measures every cell, and prints and saves what came out."""

import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import pyfmha
from pyfmha.bench.cells import Cell
from pyfmha.bench.clock import Clock
from pyfmha.bench.compare import compare
from pyfmha.bench.flex import torch_contenders
from pyfmha.bench.measure import measure_cell
from pyfmha.bench.ours import our_contenders
from pyfmha.bench.plot import save_plot
from pyfmha.bench.protocol import Contender, MissingError
from pyfmha.bench.results import Measured, Results, Roof, read_results
from pyfmha.bench.table import print_changes, print_results
from pyfmha.bench.tensorrt_row import TensorrtLayer
from pyfmha.bench.torch_rows import find_torch, matmul_tflops
from pyfmha.errors import LibraryError, PyfmhaError, SpecError
from pyfmha.report import progress_bar
from pyfmha.runtime.device import Device
from pyfmha.runtime.library import Library
from pyfmha.spec.advice import code_for
from pyfmha.spec.arch import arch_for
from pyfmha.trt.creator import find_library
from pyfmha.trt.saved import write_whole

PACKAGES = ("numpy", "cuda-python", "torch", "triton", "tensorrt", "matplotlib")


@dataclass(frozen=True)
class Request:
    """What the command was asked for.

    Attributes:
        cells: what to compute.
        rows: beginnings of the contenders' keys that are wanted; empty for all.
        generic: whether to time the generic variant, too, on tensors that are not aligned.
        out: the JSON; None for none.
        png: the picture; None for none.
        old: an earlier JSON to compare with; None for none.
        library: whose kernels are ours; None for the one of :func:`pyfmha.trt.creator.find_library`.
        device: number of the GPU.
    """

    cells: Sequence[Cell]
    rows: Sequence[str] = ()
    generic: bool = False
    out: Path | None = None
    png: Path | None = None
    old: Path | None = None
    library: Path | None = None
    device: int = 0


def run_bench(console: Console, errors: Console, request: Request) -> bool:
    """Measure, print, save; returns whether all of ours was right and nothing regressed.

    Args:
        console: for the results.
        errors: for the progress bar.
        request: what is wanted.

    Raises:
        DriverError: there is no GPU.
        LibraryError: there is no library, or it has no code for the GPU.
        SpecError: no contender is called so.
        BenchError: the earlier results cannot be read or compared; those of this run are saved first.
    """
    old = None if request.old is None else read_results(request.old)
    with ExitStack() as stack:
        device = Device(request.device)
        stack.callback(device.close)
        library = find_library(request.library)
        _check_code(library, device)
        clock = Clock(device)
        stack.callback(clock.close)
        contenders = chosen(all_contenders(library, clock, device, generic=request.generic), request.rows)
        with progress_bar(errors, "timing") as progress:
            measured = _measure_all(clock, request.cells, contenders, progress)
        results = Results(facts_of(device, library), roof_of(clock, request.cells), measured)
    print_results(console, results)
    _save(console, results, request)
    fine = not any(row.wrong and row.ours for one in results.measured for row in one.rows)
    if not fine:
        console.print("[red]Ours computed something wrong.[/red]")
    if old is not None:
        fine = print_changes(console, compare(old, results, str(request.old)), str(request.old)) and fine
    return fine


def _check_code(library: Library, device: Device) -> None:
    if not any(arch_for(device.arch, function.archs()) for function in library.manifest.functions):
        raise LibraryError(
            f"{library.path} was built for {library.manifest.archs_in_words()}, the GPU here, {device.name}, is"
            f" {device.arch}; {code_for(device.arch, library.path, 'build it for this GPU: ')}"
        )


def all_contenders(library: Library, clock: Clock, device: Device, *, generic: bool) -> list[Contender]:
    """Everything that computes attention here, or would if it were installed."""
    stream = clock.stream
    ours = our_contenders(library, stream, generic=generic)
    return [*ours, *torch_contenders(stream, device.arch), TensorrtLayer(device.ordinal)]


def chosen(contenders: Sequence[Contender], wanted: Sequence[str]) -> list[Contender]:
    """Those whose key begins as asked; all where nothing was asked.

    Raises:
        SpecError: nothing begins so.
    """
    for name in wanted:
        if not any(contender.key.startswith(name) for contender in contenders):
            raise SpecError(f"no row {name!r}: use some of {', '.join(contender.key for contender in contenders)}")
    return [one for one in contenders if not wanted or any(one.key.startswith(name) for name in wanted)]


def _measure_all(
    clock: Clock, cells: Sequence[Cell], contenders: Sequence[Contender], progress: Callable[[int, int, str], None]
) -> tuple[Measured, ...]:
    measured = []
    total = len(cells) * len(contenders)
    progress(0, total, "")
    for number, cell in enumerate(cells):
        done = number * len(contenders)
        seen = iter(range(done, total))

        def advance(title: str, cell: Cell = cell, seen: Any = seen) -> None:
            progress(next(seen), total, f"{cell.name}: {title}")

        measured.append(measure_cell(clock, cell, contenders, advance))
        progress(done + len(contenders), total, cell.name)
    return tuple(measured)


def roof_of(clock: Clock, cells: Sequence[Cell]) -> Roof:
    """What the GPU reaches in a copy, and in products of the dtypes that were timed."""
    notes: list[str] = []
    products: dict[str, float] = {}
    try:
        copy: float | None = clock.copy_gbps()
    except PyfmhaError as error:
        copy = None
        notes.append(f"No roof for memory: {error}.")
    timed = (cell.dtype for cell in cells if cell.dtype in ("fp16", "bf16") and not cell.bound_by_memory)
    for dtype in dict.fromkeys(timed):
        try:
            products[dtype] = matmul_tflops(clock, dtype)
        except (MissingError, RuntimeError) as error:
            notes.append(f"No roof for {dtype}: {str(error).splitlines()[0]}.")
    return Roof(copy, products, " ".join(notes))


def facts_of(device: Device, library: Library) -> dict[str, str | None]:
    """Device, driver, versions of everything, and which library."""
    manifest = library.manifest
    facts: dict[str, str | None] = {
        "device": device.name,
        "arch": device.arch,
        "driver": _kernel_driver(),
        "driver_cuda": device.driver_version,
        "python": platform.python_version(),
        "pyfmha": pyfmha.__version__,
        "library": manifest.build_id,
        "built_by_pyfmha": manifest.pyfmha,
        "built_by_triton": manifest.triton,
    }
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = None
    try:
        facts["cudnn"] = str(find_torch().backends.cudnn.version())
    except MissingError:
        facts["cudnn"] = None
    return facts


def _kernel_driver() -> str | None:
    """The version of the NVIDIA driver; None where Linux does not say."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return None
    return next((word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()), None)


def _save(console: Console, results: Results, request: Request) -> None:
    if request.out is not None:
        write_whole(request.out, results.to_json().encode())
        console.print(str(request.out), markup=False, soft_wrap=True)
    if request.png is not None:
        console.print(save_plot(results, request.png), markup=False, soft_wrap=True)
