"""The device with its clock: times with a cold L2 cache, on one stream, by events."""

import time
from collections.abc import Callable
from typing import Any

from pyfmha.bench.cells import Cell
from pyfmha.bench.figures import gigabytes
from pyfmha.bench.inputs import DeviceInputs, pool
from pyfmha.errors import DriverError
from pyfmha.runtime.device import Device, DeviceArray, Event, Stream, _call, _driver

LEAST_FLUSH = 256 << 20
"""Bytes written between launches, at least: more than any L2 cache, and 60 to 100 us of writing on an H200 or H100."""

HEAD_START = 6
"""Such writes for each launch of a batch, queued before all of them: so far the GPU is behind the host when the first
launch is queued. Beside the write before each launch they hide some 400 us of the host a launch, whoever launches:
FlashAttention-3 took 260 on a virtual machine, of which twice as many writes as launches did not hide all."""

COPY_BYTES = 1 << 29
COPIES = 11


def _attribute(device: Device, name: str) -> int:
    kind = getattr(_driver().CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return int(_call("cuDeviceGetAttribute", kind, device._device))


class Clock:
    """A GPU that times; see :class:`pyfmha.bench.protocol.Gpu`.

    Args:
        device: whose context is current.
        flush: bytes written between launches; by default four times the L2 cache, at least :data:`LEAST_FLUSH`.

    Attributes:
        stream: where everything is launched that has no stream of its own.

    Raises:
        DriverError: on creation, where there is no memory.
    """

    def __init__(self, device: Device, flush: int | None = None) -> None:
        self.device = device
        self.stream = Stream()
        size = max(4 * _attribute(device, "L2_CACHE_SIZE"), LEAST_FLUSH) if flush is None else flush
        self._flush = DeviceArray((size,), "uint8")
        self._pools: dict[str, dict[str, Any]] = {}
        self._events: list[tuple[Event, Event]] = []

    def inputs(self, cell: Cell) -> DeviceInputs:
        """Fresh random inputs; their random numbers are the same in every run."""
        kind = cell.dtype_of("Q")
        if kind not in self._pools:
            self._pools[kind] = {name: pool(kind, seed) for seed, name in enumerate("QKV")}
        return DeviceInputs(cell, self._pools[kind])

    def synchronize(self) -> None:
        """Wait for all work; raises DriverError where some of it failed."""
        self.device.synchronize()

    def cold_us(self, launch: Callable[[], object], stream: Stream, count: int) -> list[float]:
        """See :meth:`pyfmha.bench.protocol.Gpu.cold_us`. All is queued at once, behind a head
        start of writes, so that the GPU never waits for the host, whose time differs from contender to contender."""
        while len(self._events) < count:
            self._events.append((Event(), Event()))
        pairs = self._events[:count]
        for _ in range(HEAD_START * count):
            self._overwrite(stream)
        for begin, end in pairs:
            self._overwrite(stream)
            begin.record(stream)
            launch()
            end.record(stream)
        return [1e3 * end.milliseconds_since(begin) for begin, end in pairs]

    def _overwrite(self, stream: Stream) -> None:
        _call("cuMemsetD8Async", self._flush.pointer, 0, self._flush.nbytes, stream._stream)

    def host_us(self, launch: Callable[[], object], count: int) -> float:
        """See :meth:`pyfmha.bench.protocol.Gpu.host_us`."""
        begin = time.perf_counter()
        for _ in range(count):
            launch()
        return 1e6 * (time.perf_counter() - begin) / count

    def copy_gbps(self, nbytes: int = COPY_BYTES) -> float:
        """10**9 bytes a second, read and written, of a copy of so much device memory.

        Raises:
            DriverError: there is no memory for it.
        """
        return gigabytes(2 * nbytes, self.copy_us(2 * nbytes))

    def copy_us(self, nbytes: int) -> float:
        """See :meth:`pyfmha.bench.protocol.Gpu.copy_us`."""
        half = max(nbytes // 2, 1)
        source = DeviceArray((half,), "uint8")
        try:
            target = DeviceArray((half,), "uint8")
        except DriverError:
            source.free()
            raise

        def copy() -> None:
            _call("cuMemcpyDtoDAsync", target.pointer, source.pointer, half, self.stream._stream)

        try:
            source.fill(1)
            times = sorted(self.cold_us(copy, self.stream, COPIES))
        finally:
            source.free()
            target.free()
        return times[len(times) // 2]

    def close(self) -> None:
        """Free the buffer, the events and the stream."""
        self._flush.free()
        for pair in self._events:
            for event in pair:
                event.close()
        self._events.clear()
        self.stream.close()
