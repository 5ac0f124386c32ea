"""The main job from end to end: build, audit, load, run, compare. What ``pyfmha demo`` does."""

import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from pyfmha.aot import build, preview
from pyfmha.attention.first import Attention, family_specs
from pyfmha.attention.operator import OPERATOR
from pyfmha.attention.reference import LIMITS, attention_float64, relative_error
from pyfmha.attention.run import Array, Result, attention_on_cpu, attention_on_gpu, random_inputs, to_float
from pyfmha.cli.base import announce, notes
from pyfmha.cli.builds import check_ready, effort
from pyfmha.report import audit, progress_bar
from pyfmha.runtime.device import Device, find_gpu
from pyfmha.runtime.library import Library
from pyfmha.spec.advice import LIBRARY_NAME, build_command
from pyfmha.spec.arch import Arch, arch_for
from pyfmha.trt import DirectSession

GPU_SHAPE = (4, 16, 1000)
CPU_SHAPE = (1, 2, 150)
"""Batch, heads and seq: no multiple of any block, so that the tails are in the test."""
RUNNING = "some seconds on a GPU, about half a minute on a CPU"
REPEATS = 50


@dataclass(frozen=True)
class Check:
    """One member of the family against float64.

    Attributes:
        member: which.
        error: relative Frobenius error of Out.
        limit: the largest that passes.
        result: what the kernel gave.
        through_plugin: whether the TensorRT plugin, run without an engine, gave the very same bits; None where it was
            not run: without a GPU, and for plain tf32, which it does not serve.
    """

    member: Attention
    error: float
    limit: float
    result: Result
    through_plugin: bool | None = None

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit (a NaN is not) and the plugin agrees."""
        return self.error <= self.limit and self.through_plugin is not False


def error_limit(member: Attention) -> float:
    """The largest error a member may have."""
    return LIMITS["tf32" if member.precision == "tf32" else member.dtype]


def check_member(member: Attention, library: Library, device: Device | None, seed: int = 0) -> Check:
    """Run one member on random input, on the GPU if there is one, and compare it with float64."""
    batch, heads, seq = GPU_SHAPE if device is not None else CPU_SHAPE
    q, k, v = random_inputs(member.dtype, (batch, heads, seq, member.head_size), seed)
    sm_scale = member.head_size**-0.5
    agrees = None
    if device is None:
        result = attention_on_cpu(member, q, k, v, sm_scale)
    else:
        function = library[member.name]
        function.load()
        try:
            result = attention_on_gpu(function, member, device, q, k, v, sm_scale, repeats=REPEATS)
        finally:
            function.unload()
        if member.precision == "tf32x3":
            agrees = _plugin_agrees(member, library, q, k, v, result)
    inputs = (to_float(x, member.dtype) for x in (q, k, v))
    expected = attention_float64(*inputs, scale=sm_scale, causal=member.causal)
    error = relative_error(to_float(result.out, member.dtype), expected.out)
    return Check(member, error, error_limit(member), result, agrees)


def _plugin_agrees(member: Attention, library: Library, q: Array, k: Array, v: Array, result: Result) -> bool:
    """Whether the plugin, driven as TensorRT drives it, gives the very bits that the library gave."""
    settings = {"num_heads": q.shape[1], "head_size": member.head_size, "dtype": member.dtype, "causal": member.causal}
    with DirectSession(**settings, library=library) as session:
        out = session.run({"Q": q, "K": k, "V": v})["Out"]
    return bool(out.tobytes() == result.out.tobytes())


def run_demo(
    console: Console, members: Sequence[Attention], archs: Sequence[Arch], why: str, folder: Path, jobs: int | None
) -> bool:
    """Do it all and print it; returns whether every check passed."""
    specs = family_specs(members)
    ahead = preview(specs, archs, folder)
    check_ready(ahead)
    sizes = ", ".join(str(size) for size in sorted({member.head_size for member in members}))
    announce(f"Builds {folder / LIBRARY_NAME}: attention kernels of head size {sizes}, {why}.")
    announce(
        f"{effort(ahead, jobs) if ahead.missing else 'Nothing to compile.'} Then it runs and checks them: {RUNNING}."
    )
    console.rule("1. Compile")
    with progress_bar(notes, "compiling") as progress:
        built = build(specs, archs, folder, jobs=jobs, progress=progress, operators=[OPERATOR])
    console.print(
        "Up to date: nothing had changed since the last build."
        if built.up_to_date
        else f"{built.compiled} kernels compiled."
    )
    console.rule("2. Audit")
    console.print(audit(built.manifest))
    console.rule("3. Load")
    library = Library(built.library)
    loaded = f"{library.path}: {len(library)} functions for {library.manifest.archs_in_words()}."
    console.print(loaded, markup=False, soft_wrap=True)
    console.rule("4. Run")
    device, where = _place(library, members)
    console.print(where, markup=False, soft_wrap=True)
    checks = list(_checks(console, members, library, device))
    console.rule("5. Compare with float64")
    console.print(_table(checks, GPU_SHAPE if device is not None else CPU_SHAPE))
    failed = [check.member.name for check in checks if not check.passed]
    console.print(f"[red]Failed: {', '.join(failed)}[/red]" if failed else f"All {len(checks)} passed.")
    if not failed:
        for line in _next(library, device):
            console.print(line, markup=False, soft_wrap=True)
    return not failed


def _next(library: Library, device: Device | None) -> Iterator[str]:
    """What to do next, right when it is copied."""
    program = program_here()
    yield "Next:"
    yield f"  {program} inspect {shlex.quote(str(library.path))}"
    if device is not None:
        yield f"  {program} verify --only library --library {shlex.quote(str(library.path))}"
    build_all = build_command(library.path).removeprefix("pyfmha")
    yield f"  {program}{build_all}   # every kernel, for networks: pyfmha.add_attention"


def program_here() -> str:
    """How to start pyfmha: by its name, or by its path where the PATH has it not, as after ``make demo``."""
    if shutil.which("pyfmha"):
        return "pyfmha"
    if Path(sys.argv[0]).name == "pyfmha":
        return shlex.quote(sys.argv[0])
    return f"{shlex.quote(sys.executable)} -m pyfmha"


def _place(library: Library, members: Sequence[Attention]) -> tuple[Device | None, str]:
    """The GPU to run on, or None for the CPU, and a sentence that says which and why."""
    device, reason = find_gpu()
    held = sorted(set.intersection(*(set(library[member.name].manifest.archs()) for member in members)))
    if device is not None and arch_for(device.arch, held):
        where = "through the library, and again through the TensorRT plugin without an engine"
        return device, f"On the GPU, {where}: {reason}, {device.arch}."
    if device is not None:
        reason = f"the library was built for {', '.join(held)}, the GPU is {device.arch}"
    return None, (
        f"On the CPU, under Triton's interpreter, from the same kernel source, at a small size: {reason}."
        " (It multiplies fp32 exactly: the rounding of tf32 shows on a GPU only.)"
    )


def _checks(console: Console, members: Sequence[Attention], library: Library, device: Device | None) -> Iterator[Check]:
    with progress_bar(notes, "running") as progress:
        for index, member in enumerate(members):
            yield check_member(member, library, device, seed=index)
            progress(index + 1, len(members), member.name)


def _table(checks: Sequence[Check], shape: tuple[int, int, int]) -> Table:
    batch, heads, seq = shape
    title = f"Relative error at batch {batch}, heads {heads}, seq {seq}; standard normal input, causal unless full"
    table = Table(title=title, box=box.SIMPLE)
    timed = any(check.result.microseconds is not None for check in checks)
    plugged = any(check.through_plugin is not None for check in checks)
    table.add_column("function", overflow="fold")
    for heading in ("error", "limit", *(("us", "TFLOP/s") if timed else ())):
        table.add_column(heading, justify="right")
    for heading in (*(("plugin",) if plugged else ()), ""):
        table.add_column(heading)
    agreement = {True: "same bits", False: "[red]other bits[/red]", None: "-"}
    for check in checks:
        time = check.result.microseconds
        flop = 4 * batch * heads * seq * seq * check.member.head_size * (0.5 if check.member.causal else 1)
        speed = ("-", "-") if time is None else (f"{time:.1f}", f"{flop / time / 1e6:.0f}")
        table.add_row(
            check.member.name,
            f"{check.error:.1e}",
            f"{check.limit:.0e}",
            *(speed if timed else ()),
            *((agreement[check.through_plugin],) if plugged else ()),
            "[green]ok[/green]" if check.passed else "[red]FAILED[/red]",
        )
    return table
