"""Tables for people: of one run, and of a comparison."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyfmha.bench.compare import Change
from pyfmha.bench.results import Measured, Results, Roof, Row

_STYLES = {"slower": "red", "lost": "red", "faster": "green"}


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits, no exponent; a dash for None."""
    if value is None:
        return "-"
    before = len(str(int(abs(value))))
    return f"{value:.{max(digits - before, 0)}f}"


def table_of(measured: Sequence[Measured], roof: Roof) -> Table:
    """All cells, each with its contenders; the best of a cell's times is bold."""
    table = Table(title="Attention side by side: GPU time with a cold L2 cache, median", title_justify="left")
    for heading, justify in (
        ("contender", "left"), ("GPU us", "right"), ("+-", "right"), ("host us", "right"), ("graph us", "right"),
        ("TFLOP/s", "right"), ("GB/s", "right"), ("ratio", "right"), ("error", "right"), ("note", "left"),
    ):  # fmt: skip
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for one in measured:
        baseline = one.baseline
        against = f"ratio to {baseline.title}" if baseline is not None else ""
        table.add_section()
        table.add_row(Text(one.cell.name, "bold cyan"), *[""] * 8, Text(against, "cyan"))
        best = min((row.us for row in one.rows if row.us is not None), default=None)
        for row in one.rows:
            table.add_row(*_cells(one, row, roof), style="bold" if best is not None and row.us == best else "")
    return table


def _cells(one: Measured, row: Row, roof: Roof) -> list[Text]:
    if row.us is None:
        style = "red" if row.wrong else "dim"
        return [Text(row.title), *[Text("-", "dim")] * 8, Text(row.missing, style)]
    ratio = one.ratio(row)
    note = row.missing
    if one.cell.bound_by_memory and roof.copy_gbps:
        share = f"{100 * (one.gigabytes(row) or 0.0) / roof.copy_gbps:.0f} % of copying"
        if one.copy_us is not None:
            share += f", {100 * one.copy_us / row.us:.0f} % of a copy of as many bytes"
        note = f"{share}; {note}" if note else share
    texts = [
        number(row.us), f"{100 * (row.noise or 0.0):.1f} %", number(row.host_us, 3), number(row.graph_us),
        number(one.tflops(row)), number(one.gigabytes(row)), "-" if ratio is None else f"{ratio:.2f}",
        "-" if row.error is None else f"{row.error:.1e}", note,
    ]  # fmt: skip
    return [Text(row.title), *map(Text, texts)]


def variants_of(measured: Sequence[Measured]) -> list[str]:
    """One line for each variant of ours that ran: where."""
    cells: dict[str, list[str]] = {}
    for one in measured:
        for row in one.rows:
            if row.variant and row.us is not None:
                cells.setdefault(row.variant, []).append(one.cell.name)
    return [f"{variant}: {', '.join(names)}" for variant, names in cells.items()]


def print_results(console: Console, results: Results) -> None:
    """Facts, table, roof and variants."""
    console.print(facts_line(results.facts), markup=False, soft_wrap=True)
    console.print(table_of(results.measured, results.roof))
    roof = [f"{dtype} product {number(value)} TFLOP/s" for dtype, value in results.roof.matmul_tflops.items()]
    if results.roof.copy_gbps is not None:
        roof.append(f"copy of memory {number(results.roof.copy_gbps)} GB/s")
    lines = [f"Roof measured here: {', '.join(roof)}." if roof else "No roof was measured."]
    if results.roof.note:
        lines.append(results.roof.note)
    lines += [f"ran: {line}" for line in variants_of(results.measured)]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def facts_line(facts: dict[str, str | None]) -> str:
    """Device and versions in one line."""
    return "; ".join(f"{name} {value or 'not installed'}" for name, value in facts.items())


def print_changes(console: Console, changes: Sequence[Change], origin: str) -> bool:
    """The comparison as a table; returns whether there is no regression."""
    table = Table(title=f"Against {origin}: old time over new, above 1 is faster now", title_justify="left")
    for heading in ("cell", "contender", "old us", "new us", "ratio", "noise", ""):
        table.add_column(heading, justify="left" if heading in ("cell", "contender", "") else "right", overflow="fold")
    for change in changes:
        verdict = "REGRESSION" if change.regression else change.verdict
        if change.verdict == "lost":
            verdict += f": {change.row.missing}"
        table.add_row(
            Text(change.cell), Text(change.row.title), number(change.old_us), number(change.row.us),
            "-" if change.ratio is None else f"{change.ratio:.3f}",
            "-" if change.noise is None else f"{100 * change.noise:.1f} %",
            Text(verdict, _STYLES.get(change.verdict, "")),
        )  # fmt: skip
    console.print(table)
    worse = [change for change in changes if change.regression]
    if worse:
        console.print(f"[red]{len(worse)} of ours became slower beyond the noise of both runs, or no longer run.[/red]")
    else:
        console.print("None of ours became slower beyond the noise of both runs.")
    return not worse
