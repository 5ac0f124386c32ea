"""What a build did, or would do, in lines."""

import os
from collections.abc import Iterator

from pyfmha.aot import BuildResult, Preview
from pyfmha.aot.c_compiler import find_compiler
from pyfmha.report import duration
from pyfmha.trt.saved import check_writable

SECONDS = 2.5
"""Of one processor for a piece of machine code, as the default build takes on a server of 2024."""


def check_ready(ahead: Preview) -> None:
    """Refuse what would fail behind minutes of compiling, before it is announced.

    Raises:
        OutputError: the library's folder cannot be made or written to.
        ToolchainError: there is no C compiler.
    """
    if ahead.missing:
        check_writable(ahead.library)
        find_compiler()


def effort(ahead: Preview, jobs: int | None) -> str:
    """What there is to compile, and about how long that takes."""
    count, jobs = len(ahead.missing), jobs or len(os.sched_getaffinity(0))
    jobs = min(jobs, count)
    kernels = "1 kernel" if count == 1 else f"{count} kernels"
    processes = "one process" if jobs == 1 else f"{jobs} processes"
    return f"Compiling {kernels} in {processes}: about {duration(count * SECONDS / jobs)}."


def foretold(ahead: Preview, jobs: int | None) -> Iterator[str]:
    """What a build would do."""
    yield from _besides(ahead, "Would drop", "Would replace", "Would keep")
    for name in ahead.missing:
        yield f"Would compile {name}"
    cached = ahead.pieces - len(ahead.missing)
    yield f"{ahead.library}: {len(ahead.functions)} functions, {len(ahead.missing)} to compile, {cached} from the cache"
    if ahead.missing:
        yield f"Without --dry-run: {effort(ahead, jobs)}"


def told(result: BuildResult) -> Iterator[str]:
    """What a build did, in lines."""
    yield from _besides(result, "Dropped", "Replaced", "Kept")
    for line in result.left_out:
        yield f"Note: {line}"
    done = f"{result.compiled} compiled, {max(0, result.pieces - result.compiled)} from the cache"
    done = "up to date, nothing done" if result.up_to_date else done
    yield f"{result.library}: {len(result.manifest.functions)} functions for {result.manifest.archs_in_words()}, {done}"


def _besides(what: BuildResult | Preview, dropped: str, replaced: str, kept: str) -> Iterator[str]:
    """What becomes of what the library held and nobody asked for."""
    if what.dropped:
        functions = [name for name in what.dropped if " for " not in name]
        also = f", and code for an architecture {len(what.dropped) - len(functions)} times"
        more = also if len(functions) < len(what.dropped) else ""
        yield f"{dropped} {len(functions)} functions that the library held{more}: {', '.join(what.dropped)}"
    if what.replaced:
        yield f"{replaced} by what their functions are built from now: {', '.join(what.replaced)}"
    if what.kept:
        yield f"{kept} {len(what.kept)} functions that the library held beside: {', '.join(what.kept)}"
