"""What a run of the benchmark gave, and the JSON that holds it."""

import json
import math
import reprlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pyfmha.bench.cells import Cell
from pyfmha.bench.figures import gigabytes, tflops
from pyfmha.errors import BenchError, SpecError

SCHEMA = 1
"""Version of the JSON. Another is refused: its numbers may mean something else."""

BASELINES = ("flash3", "cudnn", "efficient")
"""Whose time the ratios have on top: the first of these rows that ran."""


@dataclass(frozen=True)
class Row:
    """One contender at one cell. What was not measured is None.

    Attributes:
        contender: its short name, :attr:`pyfmha.bench.protocol.Contender.key`.
        title: the same for people.
        us: on the GPU, microseconds a launch, with a cold L2 cache; the median.
        noise: how far that may be off, as a part of it.
        host_us: on the host, microseconds a call.
        graph_us: on the GPU, as a CUDA graph of one launch.
        error: relative error against float64 of the output of a timed launch.
        variant: of ours, which variant ran.
        missing: why there are no numbers, or which there are not.
        wrong: whether the output was wrong; such a row has no times.
    """

    contender: str
    title: str
    us: float | None = None
    noise: float | None = None
    host_us: float | None = None
    graph_us: float | None = None
    error: float | None = None
    variant: str = ""
    missing: str = ""
    wrong: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is a kernel of the library."""
        return self.contender.startswith("ours")


@dataclass(frozen=True)
class Measured:
    """One cell with its rows.

    Attributes:
        cell: what was computed.
        rows: by whom.
        copy_us: microseconds of a copy that reads and writes as many bytes in all as the tensors have, where memory
            bounds the cell: what a launch that short can reach.
    """

    cell: Cell
    rows: tuple[Row, ...]
    copy_us: float | None = None

    def row(self, contender: str) -> Row | None:
        """The row of a contender; None where there is none."""
        return next((row for row in self.rows if row.contender == contender), None)

    @property
    def baseline(self) -> Row | None:
        """The row on top of the ratios: the first of :data:`BASELINES` that ran."""
        found = (self.row(contender) for contender in BASELINES)
        return next((row for row in found if row is not None and row.us is not None), None)

    def ratio(self, row: Row) -> float | None:
        """Time of the baseline over that of a row: above 1, the row is faster."""
        baseline = self.baseline
        return None if row.us is None or baseline is None or baseline.us is None else baseline.us / row.us

    def tflops(self, row: Row) -> float | None:
        """10**12 operations a second."""
        return None if row.us is None else tflops(self.cell.flop, row.us)

    def gigabytes(self, row: Row) -> float | None:
        """10**9 bytes a second, of one pass over the tensors."""
        return None if row.us is None else gigabytes(self.cell.nbytes, row.us)


@dataclass(frozen=True)
class Roof:
    """What this GPU reaches at its best.

    Attributes:
        copy_gbps: 10**9 bytes a second read and written, of a copy of device memory; None where it was not measured.
        matmul_tflops: by dtype, 10**12 operations a second of a large product by torch.
        note: why something was not measured.
    """

    copy_gbps: float | None = None
    matmul_tflops: dict[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Results:
    """One run.

    Attributes:
        facts: device, driver, versions, library: text by name; None where something is not installed.
        roof: measured beside.
        measured: the cells.
    """

    facts: dict[str, str | None]
    roof: Roof
    measured: tuple[Measured, ...]

    def to_json(self) -> str:
        """As text that :func:`parse_results` reads back; what follows from the measured is there for people."""
        cells: list[dict[str, Any]] = []
        for one in self.measured:
            rows = [
                {**asdict(row), "tflops": one.tflops(row), "gbps": one.gigabytes(row), "ratio": one.ratio(row)}
                for row in one.rows
            ]
            baseline = one.baseline
            against = None if baseline is None else baseline.contender
            cells.append({"name": one.cell.name, "cell": asdict(one.cell), "ratio_to": against, "rows": rows})
            if one.copy_us is not None:
                cells[-1]["copy_us"] = one.copy_us
        data = {"schema": SCHEMA, "facts": self.facts, "roof": asdict(self.roof), "cells": cells}
        return json.dumps(data, indent=1, allow_nan=False) + "\n"


def parse_results(text: str, origin: str) -> Results:
    """Read what :meth:`Results.to_json` wrote.

    Args:
        text: JSON.
        origin: where it comes from, for messages.

    Raises:
        BenchError: it is no such thing, is damaged, or has another schema version.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BenchError(f"{origin} is not JSON: {error}") from None
    if not isinstance(data, dict) or "schema" not in data or "cells" not in data:
        raise BenchError(f"{origin} holds no results of pyfmha bench: they have a schema version and cells")
    if type(data["schema"]) is not int or data["schema"] != SCHEMA:
        raise BenchError(
            f"{origin} has schema version {reprlib.repr(data['schema'])}, this pyfmha reads {SCHEMA};"
            f" measure again with the same options and --out {origin}"
        )
    try:
        facts = {str(name): None if value is None else str(value) for name, value in data["facts"].items()}
        measured = tuple(
            Measured(Cell(**entry["cell"]), tuple(map(_row, entry["rows"])), _time(entry.get("copy_us")))
            for entry in data["cells"]
        )
        return Results(facts, Roof(**data["roof"]), measured)
    except (KeyError, TypeError, ValueError, AttributeError, SpecError) as error:
        raise BenchError(f"{origin} is damaged ({type(error).__name__}: {error})") from None


def _time(value: Any) -> float | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf):
        return value
    raise ValueError(f"copy_us is {value!r}")


def _row(data: dict[str, Any]) -> Row:
    row = Row(**{entry.name: data[entry.name] for entry in fields(Row)})
    for name in ("us", "noise", "host_us", "graph_us", "error"):
        value = getattr(row, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value!r}")
    if (row.us is None) != (row.noise is None) or row.us == 0:
        raise ValueError(f"a time of {row.us!r} with a noise of {row.noise!r}")
    return row


def read_results(path: Path) -> Results:
    """Read a file.

    Raises:
        BenchError: it cannot be read, or as :func:`parse_results`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"cannot read {path}: {error}") from None
    return parse_results(text, str(path))
