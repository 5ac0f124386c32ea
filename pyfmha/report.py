"""Tables for people: what a library holds, and how results compare."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pyfmha.aot.build import Progress as ProgressCallback
from pyfmha.manifest import Manifest


def audit_table(manifest: Manifest) -> Table:
    """One row a variant and architecture: registers, spills, shared memory against the limit, size."""
    table = Table(
        title=f"Library {manifest.build_id[:12]}, built by pyfmha {manifest.pyfmha} and Triton {manifest.triton}"
    )
    table.add_column("variant", overflow="fold")
    table.add_column("algo", justify="right")
    table.add_column("arch")
    for heading in ("registers", "spilled, bytes", "shared memory, bytes", "limit", "code, KB"):
        table.add_column(heading, justify="right")
    table.add_column("ptxas")
    for _, algo_id, variant in manifest.variants():
        for image in variant.images:
            spilled = f"[red]{image.spilled}[/red]" if image.spilled else "0"
            table.add_row(
                variant.name,
                str(algo_id),
                image.arch,
                str(image.registers),
                spilled,
                str(image.shared),
                str(image.shared_limit),
                f"{image.size / 1024:.0f}",
                image.ptxas,
            )
    return table


def describe_functions(manifest: Manifest) -> Iterator[str]:
    """One line a function: its C prototype and how many algorithms and variants it has."""
    for function in manifest.functions:
        arguments = ", ".join(f"{kind} {name}" for name, kind in function.arguments)
        variants = sum(map(len, function.algorithms))
        counts = f"{len(function.algorithms)} algorithm(s), {variants} variants"
        yield f"{function.name}(stream, {arguments}, algo_id): {counts}"


@contextmanager
def progress_bar(console: Console, title: str) -> Iterator[ProgressCallback]:
    """A progress bar fed by a builder's callback."""
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("{task.fields[latest]}"), console=console, transient=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=None, latest="")

        def advance(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, latest=name)

        yield advance
