"""What the tests of the benchmark ask of the stand-in for a GPU."""

from typing import Any

import pytest
from trt_double.full import driver as fake_cuda_driver
from trt_double.full.gpu import Gpu

from pyfmha.bench import clock as clock_module
from pyfmha.bench.cells import Cell
from pyfmha.bench.clock import Clock
from pyfmha.bench.measure import measure_cell
from pyfmha.bench.results import Row

COPY_US = 200.0


def prepare(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only the benchmark asks of the driver; and little work."""

    def memset(address: int, byte: int, size: int, stream: int) -> tuple[int]:
        def work() -> float:
            gpu.array(address, (size,), "u1")[:] = byte
            return 0.03  # in no time that is measured

        return (gpu.push(stream, work),)

    def copy(target: int, source: int, size: int, stream: int) -> tuple[int]:
        def work() -> float:
            gpu.array(target, (size,), "u1")[:] = gpu.array(source, (size,), "u1")
            return COPY_US / 1000

        return (gpu.push(stream, work),)

    monkeypatch.setattr(fake_cuda_driver, "cuMemsetD8Async", memset, raising=False)
    monkeypatch.setattr(fake_cuda_driver, "cuMemcpyDtoDAsync", copy, raising=False)
    monkeypatch.setattr(clock_module, "_attribute", lambda device, name: 132)
    monkeypatch.setattr(clock_module, "LEAST_FLUSH", 4096)
    monkeypatch.setattr(clock_module.Clock.copy_gbps, "__defaults__", (1 << 20,))
    monkeypatch.setattr("pyfmha.bench.inputs.POOL", 65521)
    monkeypatch.setattr("pyfmha.bench.inputs.pool.__defaults__", (65521,))
    monkeypatch.setattr("pyfmha.bench.measure.MOST", 5)
    monkeypatch.setattr("pyfmha.bench.measure.HOST_CALLS", 5)


def rows_of(clock: Clock, cell: Cell, contenders: list[Any]) -> dict[str, Row]:
    return {row.contender: row for row in measure_cell(clock, cell, contenders, lambda title: None).rows}
