"""What people read of a library: what it holds, and how its build proceeds."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from pyfmha.spec.manifest import Image, Manifest

Progress = Callable[[int, int, str], None]
"""Called with work done, work in all, and the name of what was just done."""

LINES = 20
WIDTH = 80
_LOGGER = logging.getLogger("pyfmha")
_AUDIT = ("arch", "regs", "spill B", "shared B", "limit B", "KB", "ptxas")


def audit(manifest: Manifest) -> Text:
    """Every variant with a line an architecture: registers, bytes spilled and of shared memory, its limit, code size.

    It is text, not markup, and fits a terminal of 80 columns.
    """
    variants = list(manifest.variants())
    rows = [[_audited(image) for image in variant.images] for _, _, variant in variants]
    cells = [_AUDIT, *(row for images in rows for row in images)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: tuple[str, ...]) -> str:
        inner = (cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True))
        return "  ".join([f"  {row[0].ljust(widths[0])}", *inner, row[-1]])

    text = Text(f"Library {manifest.build_id[:12]}, built by pyfmha {manifest.pyfmha} and Triton {manifest.triton}\n")
    text.append(line(_AUDIT), "bold")
    for (_, algo_id, variant), images in zip(variants, rows, strict=True):
        text.append(f"\n{variant.name}, algo {algo_id}")
        for image, row in zip(variant.images, images, strict=True):
            text.append("\n").append(line(row), "red" if image.spilled else "")
    return text


def _audited(image: Image) -> tuple[str, ...]:
    counts = (image.registers, image.spilled, image.shared, image.shared_limit)
    return (image.arch, *map(str, counts), f"{image.size / 1024:.0f}", image.ptxas)


def describe_functions(manifest: Manifest) -> Iterator[str]:
    """One line a function: its C prototype and how many algorithms and variants it has."""
    for function in manifest.functions:
        arguments = ", ".join(f"{kind} {name}" for name, kind in function.arguments)
        variants = sum(map(len, function.algorithms))
        counts = f"{len(function.algorithms)} algorithm(s), {variants} variants"
        yield f"{function.name}(stream, {arguments}, algo_id): {counts}"


@contextmanager
def progress_bar(console: Console, title: str) -> Iterator[Progress]:
    """Progress fed by a callback: a bar in a terminal, lines elsewhere, where a bar would show nothing until its end.

    Args:
        console: where to; one that is quiet gets nothing.
        title: what is being done, ``"compiling"``.
    """
    # Not what rich takes for a terminal where FORCE_COLOR is set, as CI services and Jupyter do: it would draw every
    # frame into the log.
    if not console.file.isatty() or console.is_dumb_terminal:
        yield _Lines(console, title)
        return
    latest = TextColumn("{task.fields[latest]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    columns = (TextColumn("[bold]{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    room = max(0, console.width - len(title) - 42)  # rich would cut count and time for the name's sake
    with Bar(*columns, latest, console=console) as bar:
        task = bar.add_task(title, total=None, latest="")

        def advance(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, latest=name[:room])

        yield advance


class _Lines:
    """About twenty lines in all, each at most 80 columns; with the logger ``pyfmha`` at INFO one for each step."""

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        self._start = time.monotonic()

    def __call__(self, done: int, total: int, name: str) -> None:
        step = 1 if _LOGGER.isEnabledFor(logging.INFO) else max(1, -(-total // LINES))  # of nothing, too
        if done % step and done != total:
            return
        spent = time.monotonic() - self._start
        if done == 0:
            line = f"{self._title}: {total} to do"
        else:
            left = spent * (total - done) / done
            ahead = f", about {duration(left)} left" if done < total else ""
            line = f"{self._title}: {done} of {total} in {duration(spent)}{ahead}: {name}"
        if len(line) > WIDTH:
            line = f"{line[: WIDTH - 2]}.."
        self._console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """``"45 s"``, ``"3 min"``, for people."""
    return f"{seconds:.0f} s" if seconds < 99.5 else f"{seconds / 60:.0f} min"
