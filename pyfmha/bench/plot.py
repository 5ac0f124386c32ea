"""The PNG: TFLOP/s over sequence length against the measured roof; decoding in GB/s against that of a copy."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyfmha.bench.cells import FP8, Cell
from pyfmha.bench.results import Measured, Results

COLUMNS = 4


@dataclass(frozen=True)
class Panel:
    """One diagram.

    Attributes:
        title: dtype, head size, mask, and what few serve: a soft cap, V of another head size.
        unit: ``"TFLOP/s"``, or ``"GB/s"`` where memory bounds.
        ticks: a label for each cell, ascending in length.
        lines: by contender's title, a value for each tick; None where there is none.
        roof: the horizontal line; None where it was not measured.
    """

    title: str
    unit: str
    ticks: tuple[str, ...]
    lines: dict[str, tuple[float | None, ...]]
    roof: float | None


def _group(cell: Cell) -> tuple[object, ...]:
    return cell.bound_by_memory, cell.dtype, cell.head_size, cell.v_head_size, cell.softcap, cell.causal


def panels_of(results: Results) -> list[Panel]:
    """What is to be drawn: a panel for each dtype, head size and mask; only what has a time."""
    groups: dict[tuple[object, ...], list[Measured]] = {}
    for one in results.measured:
        groups.setdefault(_group(one.cell), []).append(one)
    panels = [_panel(group, results) for group in groups.values()]
    return [panel for panel in panels if panel.lines]


def _panel(group: Sequence[Measured], results: Results) -> Panel:
    ordered = sorted(group, key=lambda one: (one.cell.kv_seq, one.cell.batch, -one.cell.kv_heads))
    cell = ordered[0].cell
    values: dict[str, list[float | None]] = {}
    for place, one in enumerate(ordered):
        for row in one.rows:
            value = one.gigabytes(row) if cell.bound_by_memory else one.tflops(row)
            values.setdefault(row.title, [None] * len(ordered))[place] = value
    roof = results.roof.copy_gbps if cell.bound_by_memory else results.roof.matmul_tflops.get(cell.dtype)
    values_of = f", V of {cell.v_head_size}" if cell.v_head_size else ""
    cap = f", soft cap {cell.softcap:g}" if cell.softcap else ""
    return Panel(
        f"{cell.dtype}, head size {cell.head_size}{values_of}, {'causal' if cell.causal else 'full'}{cap}",
        "GB/s" if cell.bound_by_memory else "TFLOP/s",
        tuple(_tick(one.cell) for one in ordered),
        {title: tuple(line) for title, line in values.items() if any(value is not None for value in line)},
        roof,
    )


def _tick(cell: Cell) -> str:
    heads = f"\n{cell.heads}/{cell.kv_heads} heads" if cell.heads != cell.kv_heads else ""
    asked = ", ".join(said for word, said in cell.asks.items() if word != "values")  # that is in the panel's title
    extra = f"\n{cell.beside or asked}" if asked and cell.dtype != FP8 else ""
    return f"{cell.kv_seq}\nbatch {cell.batch}{heads}{extra}"


def save_plot(results: Results, path: Path) -> str:
    """Draw the panels as PNG, whole or not at all; returns where it is, or why it is not.

    Raises:
        OutputError: the file cannot be written.
    """
    panels = panels_of(results)
    if not panels:
        return "no picture: nothing was timed"
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.4 * columns, 3.6 * rows + 0.8), layout="constrained", squeeze=False
    )
    titles = list(dict.fromkeys(title for panel in panels for title in panel.lines))
    handles = {}
    for panel, ax in zip(panels, axes.flat, strict=False):
        for title, line in panel.lines.items():
            style = f"C{titles.index(title)}"
            marked = [float("nan") if value is None else value for value in line]
            (handles[title],) = ax.plot(range(len(line)), marked, marker="o", color=style, label=title)
        if panel.roof is not None:
            what = "copy of memory" if panel.unit == "GB/s" else "matrix product"
            ax.axhline(panel.roof, color="black", linestyle="--", linewidth=1)
            ax.text(0, panel.roof, f"{what}: {panel.roof:.0f}", fontsize=7, va="bottom")
        ax.set_xticks(range(len(panel.ticks)), panel.ticks, fontsize=7)
        ax.set_title(panel.title, fontsize=9)
        ax.set_ylabel(panel.unit)
        ax.set_xlabel("keys")
        ax.set_ylim(bottom=0)
    for ax in list(axes.flat)[len(panels) :]:
        ax.axis("off")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    note = "" if results.roof.matmul_tflops else "; roof not measured"
    figure.suptitle(f"{results.facts.get('device')}: attention, cold L2 cache, more is better{note}", fontsize=11)
    temporary = path.with_name(f".{path.name}.tmp.png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, dpi=110)
        temporary.replace(path)
    finally:
        plt.close(figure)
        temporary.unlink(missing_ok=True)
    return str(path)
