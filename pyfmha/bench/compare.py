"""Two runs side by side: what became faster, what slower, and what of that is more than noise."""

from dataclasses import dataclass

from pyfmha.bench.results import Results, Row
from pyfmha.errors import BenchError

SAME_FACTS = ("device", "arch")
"""What must be the same for times to be comparable."""


@dataclass(frozen=True)
class Change:
    """One row in both runs.

    Attributes:
        cell: its name.
        row: the new run's.
        old_us: the old run's time; None where it had none.
        ratio: old time over new; above 1 it became faster. None where either is missing.
        noise: how far the ratio may be off: the noise of both runs, added.
        verdict: ``"same"``, ``"faster"``, ``"slower"``, ``"lost"`` (had a time) or ``"new"`` (had none).
    """

    cell: str
    row: Row
    old_us: float | None
    ratio: float | None
    noise: float | None
    verdict: str

    @property
    def regression(self) -> bool:
        """Whether a kernel of the library became slower beyond the noise, or has no time any more."""
        return self.row.ours and self.verdict in ("slower", "lost")


def compare(old: Results, new: Results, origin: str) -> list[Change]:
    """Every row that is in both runs, in the new one's order; rows without a time in either are left out.

    Args:
        old, new: the runs.
        origin: where the old one comes from, for messages.

    Raises:
        BenchError: the GPUs differ, or no row is in both.
    """
    for fact in SAME_FACTS:
        before, now = old.facts.get(fact), new.facts.get(fact)
        if before != now:
            raise BenchError(
                f"{origin} was measured on {fact} {before}, this run on {now}: times of two GPUs say nothing about the"
                " code; compare runs on one"
            )
    earlier = {(one.cell, row.contender): row for one in old.measured for row in one.rows}
    found = [
        _change(one.cell.name, earlier[one.cell, row.contender], row)
        for one in new.measured
        for row in one.rows
        if (one.cell, row.contender) in earlier
    ]
    changes = [change for change in found if change is not None]
    if not changes:
        raise BenchError(f"{origin} has no cell in common with this run; measure the same sizes and rows")
    return changes


def _change(cell: str, old: Row, new: Row) -> Change | None:
    if old.us is None and new.us is None:
        return None
    if old.us is None or new.us is None:
        return Change(cell, new, old.us, None, None, "new" if old.us is None else "lost")
    ratio, noise = old.us / new.us, (old.noise or 0.0) + (new.noise or 0.0)
    verdict = "slower" if new.us > old.us * (1 + noise) else "faster" if new.us * (1 + noise) < old.us else "same"
    return Change(cell, new, old.us, ratio, noise, verdict)
