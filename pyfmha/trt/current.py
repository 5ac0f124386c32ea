"""The CUDA context that is current on this thread, asked of the driver through ctypes.

TensorRT decides which device a call is for by making its context current; nothing tells the plugin otherwise. libcuda
is the one that the launch library itself opens, ``PYFMHA_LIBCUDA`` included.
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pyfmha.errors import DriverError
from pyfmha.operators.expressions import FIGURES
from pyfmha.runtime.libcuda import check as _check
from pyfmha.runtime.libcuda import libcuda

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_NOT_INITIALIZED = 3


class _Driver:
    """The functions of libcuda that are needed here, looked up once: ``on_shape_change`` is on the way of inference."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.get_current = library.cuCtxGetCurrent
        self.set_current = library.cuCtxSetCurrent
        self.get_device = library.cuCtxGetDevice
        self.get_attribute = library.cuDeviceGetAttribute
        self.get_id: Any = getattr(library, "cuCtxGetId", None)  # CUDA 12 and later


@dataclass(frozen=True)
class Context:
    """A CUDA context.

    Attributes:
        handle: the ``CUcontext``.
        identity: the driver's id, which tells it from a later context at the same address; 0 before CUDA 12.
        driver: whose context it is.
    """

    handle: int
    identity: int
    driver: _Driver = field(repr=False, compare=False)

    def is_current(self) -> bool:
        """Whether it is this thread's current one: as comparing :func:`current_context`, in half the time."""
        handle = ctypes.c_void_p()
        _check("cuCtxGetCurrent", self.driver.get_current(ctypes.byref(handle)))
        return handle.value == self.handle and _identity(self.driver, handle) == self.identity


_open = functools.cache(_Driver)


def _driver() -> _Driver:
    try:
        return _open(libcuda())
    except AttributeError as error:
        raise DriverError(f"no CUDA driver: {error}", 0) from None


def _identity(driver: _Driver, handle: ctypes.c_void_p) -> int:
    if driver.get_id is None:
        return 0
    identity = ctypes.c_uint64()
    _check("cuCtxGetId", driver.get_id(handle, ctypes.byref(identity)))
    return identity.value


def current_context() -> Context | None:
    """This thread's current context; None where there is none, or no driver, or CUDA is not initialised."""
    try:
        driver = _driver()
    except DriverError:
        return None
    handle = ctypes.c_void_p()
    status = driver.get_current(ctypes.byref(handle))
    if status == _NOT_INITIALIZED:
        return None
    _check("cuCtxGetCurrent", status)
    return Context(handle.value, _identity(driver, handle), driver) if handle.value else None


def current_capability() -> int:
    """Compute capability of the current context's device, as major * 10 + minor.

    Raises:
        DriverError: no context is current, or the driver fails.
    """
    context = current_context()
    if context is None:
        raise DriverError(
            "this thread has no current CUDA context, so the GPU to serve is unknown: make one current first", 201
        )
    return capability_in(context)


def capability_in(context: Context) -> int:
    """As :func:`current_capability`, of a context that is known to be this thread's current one.

    Raises:
        DriverError: the driver fails.
    """
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    driver = context.driver
    _check("cuCtxGetDevice", driver.get_device(ctypes.byref(device)))
    for value, attribute in ((major, _CAPABILITY_MAJOR), (minor, _CAPABILITY_MINOR)):
        _check("cuDeviceGetAttribute", driver.get_attribute(ctypes.byref(value), attribute, device))
    return major.value * 10 + minor.value


def current_figure(name: str) -> int:
    """One of :data:`pyfmha.operators.expressions.FIGURES` of the current context's device; 0 where there is none, or
    the driver does not tell."""
    try:
        driver = _driver()
    except DriverError:
        return 0
    device, value = ctypes.c_int(), ctypes.c_int()
    if driver.get_device(ctypes.byref(device)) or driver.get_attribute(ctypes.byref(value), FIGURES[name], device):
        return 0
    return max(value.value, 0)


@contextmanager
def made_current(context: Context) -> Iterator[None]:
    """Make a context current for a block.

    Raises:
        DriverError: it does not exist any more.
    """
    before = current_context()
    if before == context:
        yield
        return
    driver, handle = context.driver, ctypes.c_void_p(context.handle)
    if _identity(driver, handle) != context.identity:
        raise DriverError("the CUDA context was destroyed", 709)
    _check("cuCtxSetCurrent", driver.set_current(handle))
    try:
        yield
    finally:
        _check("cuCtxSetCurrent", driver.set_current(ctypes.c_void_p(before.handle if before else None)))
