"""Times to numbers: medians, and the noise around them."""

import statistics
from collections.abc import Sequence

RESOLUTION_US = 0.5
"""What an event's time is good for: "resolution of approximately one half microsecond" (CUDA, cuEventElapsedTime)."""


def middle(rounds: Sequence[Sequence[float]]) -> float:
    """The median of the medians of some rounds, in their unit."""
    return statistics.median(statistics.median(times) for times in rounds)


def noise(rounds: Sequence[Sequence[float]], resolution: float = RESOLUTION_US) -> float:
    """How far the time may be off, as a part of it: the farthest that the median of a round lies from that of all.

    At least what the clock resolves. The rounds of all contenders take turns, so that the clocks of a GPU that warms up
    are in it too.
    """
    medians = [statistics.median(times) for times in rounds]
    centre = statistics.median(medians)
    return max(resolution, *(abs(one - centre) for one in medians)) / centre


def tflops(flop: int, us: float) -> float:
    """10**12 operations a second."""
    return flop / us / 1e6


def gigabytes(nbytes: int, us: float) -> float:
    """10**9 bytes a second."""
    return nbytes / us / 1e3


def launches_of(us: float, budget_us: float, fewest: int, most: int) -> int:
    """How many launches of some time fit a budget, within limits."""
    return int(min(max(budget_us / max(us, 1e-3), fewest), most))
