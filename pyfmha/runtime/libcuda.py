"""libcuda through ctypes: the one that the launch library itself opens, ``PYFMHA_LIBCUDA`` included."""

import ctypes
import functools
import os

from pyfmha.errors import DriverError

_DEVICE_ORDINAL = 9  # CUpointer_attribute
_DISABLE_TIMING = 2  # CUevent_flags
_load = functools.cache(ctypes.CDLL)


def libcuda() -> ctypes.CDLL:
    """The driver; raises DriverError where there is none."""
    try:
        return _load(os.environ.get("PYFMHA_LIBCUDA") or "libcuda.so.1")
    except OSError as error:
        raise DriverError(f"no CUDA driver: {error}", 0) from None


def check(call: str, status: int) -> None:
    """Raise DriverError for a ``CUresult`` that is no success."""
    if status:
        raise DriverError(f"{call} failed: CUDA error {status}", status)


def current_device() -> int | None:
    """The number of the current context's device; None where no context is current."""
    device = ctypes.c_int()
    return device.value if libcuda().cuCtxGetDevice(ctypes.byref(device)) == 0 else None


def device_of(pointer: int) -> int | None:
    """The number of the device whose memory an address is in; None where the driver knows of none."""
    device = ctypes.c_int()
    found = libcuda().cuPointerGetAttribute(ctypes.byref(device), _DEVICE_ORDINAL, ctypes.c_uint64(pointer))
    return device.value if found == 0 else None


def wait_for(stream: int, earlier: int) -> None:
    """Order a stream after what is queued on another one now; the host does not wait.

    Args:
        stream, earlier: each a ``CUstream`` as an integer; 1 is the legacy default stream, 2 that of the thread.

    Raises:
        DriverError: the driver refused it.
    """
    driver, event = libcuda(), ctypes.c_void_p()
    check("cuEventCreate", driver.cuEventCreate(ctypes.byref(event), _DISABLE_TIMING))
    try:
        check("cuEventRecord", driver.cuEventRecord(event, ctypes.c_void_p(earlier)))
        check("cuStreamWaitEvent", driver.cuStreamWaitEvent(ctypes.c_void_p(stream), event, 0))
    finally:
        driver.cuEventDestroy_v2(event)
