"""A GPU, inputs and contenders made up for the tests of the benchmark: times are scripted, outputs are computed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from pyfmha.attention.reference import attend
from pyfmha.bench.cells import Cell
from pyfmha.bench.protocol import MissingError
from pyfmha.errors import DriverError


class FakeInputs:
    """Random float64 Q, K and V, by set."""

    def __init__(self, cell: Cell, count: int = 3) -> None:
        self.cell, self.count, self.closed = cell, count, False
        generator = np.random.default_rng(1)
        self.sets = [{name: generator.standard_normal(cell.shape(name)) for name in "QKV"} for _ in range(count)]

    def rows(self, index: int, tensor: str, batch: int, head: int, rows: Any, shift: int) -> Any:
        assert shift == 0
        return self.sets[index][tensor][batch, head][rows]

    def close(self) -> None:
        self.closed = True


class FakeGpu:
    """Its clock says what the contender that launches wants it to say."""

    def __init__(self, memory: bool = True) -> None:
        self.memory, self.made = memory, []
        self.microseconds: float = 0.0
        self.log: list[tuple[str, int]] = []

    def inputs(self, cell: Cell) -> FakeInputs:
        if not self.memory:
            raise DriverError("cuMemAlloc failed: CUDA error 2, out of memory", 2)
        self.made.append(FakeInputs(cell))
        return self.made[-1]

    def cold_us(self, launch: Callable[[], object], stream: Any, count: int) -> list[float]:
        times = []
        for _ in range(count):
            launch()
            times.append(self.microseconds)
        self.log.append((stream, count))
        return times

    def copy_us(self, nbytes: int) -> float:
        if not self.memory:
            raise DriverError("cuMemAlloc failed: CUDA error 2, out of memory", 2)
        return nbytes / 1e6  # at 1000 GB/s

    def host_us(self, launch: Callable[[], object], count: int) -> float:
        for _ in range(count):
            launch()
        return 3.5

    def synchronize(self) -> None:
        pass


class FakeContender:
    """Computes by the reference.

    Args:
        key: its name.
        gpu: whose clock it sets.
        us: what a launch of set i takes: its element i.
        factor: of the output, from the launch ``wrong_after`` on.
        missing: why it cannot be prepared.
        graph: why there is no graph; empty: there is one.
    """

    def __init__(
        self, key: str, gpu: FakeGpu, us: tuple[float, ...] = (10.0, 10.0, 10.0), *, factor: float = 1.0,
        wrong_after: int = 0, missing: str = "", graph: str = "", strictness: float = 1.0,
    ) -> None:  # fmt: skip
        self.key, self.title, self.strictness = key, key.upper(), strictness
        self.gpu, self.us, self.factor, self.wrong_after = gpu, us, factor, wrong_after
        self.missing, self.graph, self.closed, self.launches = missing, graph, 0, 0
        self.is_active = False

    def prepare(self, cell: Cell, inputs: FakeInputs) -> "FakeContender":
        if self.missing:
            raise MissingError(self.missing)
        self.variant, self.sets, self.shift, self.stream = f"{self.key}_variant", len(self.us), 0, self.key
        options = {"sm_scale": cell.sm_scale, "window_right": 0 if cell.causal else -1}
        self.outs = [attend(*one.values(), **options)[0] for one in inputs.sets]
        return self

    @contextmanager
    def active(self) -> Iterator[None]:
        self.is_active = True
        try:
            yield
        finally:
            self.is_active = False

    def launch(self, index: int) -> None:
        assert self.is_active
        self.gpu.microseconds = self.us[index]
        factor = self.factor if self.launches >= self.wrong_after else 1.0
        self.launches += 1
        self.out = self.outs[index] * factor

    def rows(self, batch: int, head: int, rows: list[int]) -> Any:
        return self.out[batch, head][rows]

    def capture(self) -> Callable[[], object]:
        if self.graph:
            raise RuntimeError(self.graph)
        return lambda: self.launch(0)

    def close(self) -> None:
        self.closed += 1
