"""A GPU through cuda-python: context, memory, streams, events. Only what running and timing a kernel needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pyfmha.errors import DriverError


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError:
        raise DriverError("cuda-python is not installed: pip install cuda-python", 0) from None
    return driver


def _call(name: str, *arguments: Any) -> Any:
    """Call a driver function and return its results without the status.

    Raises:
        DriverError: it failed, or there is no driver.
    """
    driver = _driver()
    try:
        status, *results = getattr(driver, name)(*arguments)
    except RuntimeError as error:  # cuda-python raises its own kinds of it where libcuda is missing
        raise DriverError("no CUDA driver: libcuda cannot be loaded", 0) from error
    if int(status):
        text = driver.cuGetErrorString(status)[1] or b"unknown error"
        raise DriverError(f"{name} failed: CUDA error {int(status)}, {text.decode()}", int(status))
    return results[0] if len(results) == 1 else results


class Device:
    """One GPU, by its primary context, which is made current on this thread.

    Args:
        ordinal: its number, from 0.

    Raises:
        DriverError: there is no driver or no such device.
    """

    def __init__(self, ordinal: int = 0) -> None:
        _call("cuInit", 0)
        count = _call("cuDeviceGetCount")
        if not 0 <= ordinal < count:
            raise DriverError(f"no GPU {ordinal}: the driver sees {count}", 101)
        self.ordinal = ordinal
        self._device = _call("cuDeviceGet", ordinal)
        self._before = _call("cuCtxGetCurrent")
        self._context = _call("cuDevicePrimaryCtxRetain", self._device)
        self.make_current()

    def make_current(self) -> None:
        """Make its context the current one of this thread."""
        _call("cuCtxSetCurrent", self._context)

    def close(self) -> None:
        """Give the primary context back; memory that still lives in it goes with its last user.

        What was current on this thread before is current again: the context may be destroyed now, and nothing would
        work in it.
        """
        if int(_call("cuCtxGetCurrent") or 0) == int(self._context):
            _call("cuCtxSetCurrent", self._before)
        _call("cuDevicePrimaryCtxRelease", self._device)

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        """The product's name."""
        return str(_call("cuDeviceGetName", 128, self._device).split(b"\0")[0].decode())

    @property
    def driver_version(self) -> str:
        """The newest CUDA version its driver serves: ``"13.0"``."""
        version = _call("cuDriverGetVersion")
        return f"{version // 1000}.{version % 1000 // 10}"

    @property
    def arch(self) -> str:
        """Its architecture: ``"sm_90"``."""
        attributes = _driver().CUdevice_attribute
        kinds = ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR", "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR")
        major, minor = (_call("cuDeviceGetAttribute", getattr(attributes, kind), self._device) for kind in kinds)
        return f"sm_{major}{minor}"

    def synchronize(self) -> None:
        """Wait for all its work; raises DriverError where some of it failed."""
        _call("cuCtxSynchronize")


def find_gpu() -> tuple[Device | None, str]:
    """The first GPU, or None with the reason why there is none to use."""
    try:
        device = Device()
    except DriverError as error:
        return None, str(error)
    return device, device.name


class DeviceArray:
    """A contiguous array in device memory.

    Attributes:
        pointer: its address.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        self.pointer = int(_call("cuMemAlloc", max(self.nbytes, 1)))

    @classmethod
    def of(cls, values: NDArray[Any]) -> "DeviceArray":
        """A copy of a host array."""
        array = cls(values.shape, values.dtype)
        array.write(values)
        return array

    def to_host(self) -> NDArray[Any]:
        """A copy on the host; waits for the legacy default stream only: synchronise others first."""
        return self.read(0, self.shape, self.dtype)

    def write(self, values: NDArray[Any], offset: int = 0) -> None:
        """Copy a host array to ``offset`` bytes from the start; raises ValueError where it would not fit."""
        host = np.ascontiguousarray(values)
        self._check_range(offset, host.nbytes)
        _call("cuMemcpyHtoD", self.pointer + offset, host.ctypes.data, host.nbytes)

    def read(self, offset: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A copy of a part that begins ``offset`` bytes from the start; raises ValueError where it is not inside."""
        host = np.empty(shape, dtype)
        self._check_range(offset, host.nbytes)
        _call("cuMemcpyDtoH", host.ctypes.data, self.pointer + offset, host.nbytes)
        return host

    def send(self, values: NDArray[Any], stream: "Stream") -> NDArray[Any]:
        """Copy a host array to the start, in a stream's order.

        Returns:
            The host memory that is read, which must live until the stream was synchronised.

        Raises:
            ValueError: it would not fit.
            DriverError: the copy cannot be queued.
        """
        host = np.ascontiguousarray(values)
        self._check_range(0, host.nbytes)
        if host.nbytes:
            _call("cuMemcpyHtoDAsync", self.pointer, host.ctypes.data, host.nbytes, stream._stream)
        return host

    def fetch(self, shape: tuple[int, ...], dtype: DTypeLike, stream: "Stream") -> NDArray[Any]:
        """A copy of the part at the start, in a stream's order: complete once the stream was synchronised.

        Raises:
            ValueError: the array is smaller.
            DriverError: the copy cannot be queued.
        """
        host = np.empty(shape, dtype)
        self._check_range(0, host.nbytes)
        if host.nbytes:
            _call("cuMemcpyDtoHAsync", host.ctypes.data, self.pointer, host.nbytes, stream._stream)
        return host

    def _check_range(self, offset: int, nbytes: int) -> None:
        if offset < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"bytes {offset} to {offset + nbytes} are not inside an array of {self.nbytes}")

    def fill(self, byte: int) -> None:
        """Set every byte."""
        _call("cuMemsetD8", self.pointer, byte, self.nbytes)

    def free(self) -> None:
        """Give the memory back; harmless when repeated."""
        if self.pointer:
            _call("cuMemFree", self.pointer)
            self.pointer = 0


@contextmanager
def device_arrays(*arrays: DeviceArray) -> Iterator[tuple[DeviceArray, ...]]:
    """Free arrays at the end of a block."""
    try:
        yield arrays
    finally:
        for array in arrays:
            array.free()


class Stream:
    """A stream of the current context that does not wait for the default one."""

    def __init__(self) -> None:
        self._stream = _call("cuStreamCreate", 1)

    @property
    def handle(self) -> int:
        """The ``CUstream`` as an integer."""
        return int(self._stream)

    def synchronize(self) -> None:
        """Wait for its work; raises DriverError where some of it failed."""
        _call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        """Destroy it."""
        _call("cuStreamDestroy", self._stream)


class Event:
    """A point in a stream's work, for timing."""

    def __init__(self) -> None:
        self._event = _call("cuEventCreate", 0)

    def record(self, stream: Stream) -> None:
        """Mark the present end of a stream's work."""
        _call("cuEventRecord", self._event, stream._stream)

    def milliseconds_since(self, earlier: "Event") -> float:
        """Waits for this event; the time between the two on the GPU."""
        _call("cuEventSynchronize", self._event)
        return float(_call("cuEventElapsedTime", earlier._event, self._event))

    def close(self) -> None:
        """Destroy it."""
        _call("cuEventDestroy", self._event)
