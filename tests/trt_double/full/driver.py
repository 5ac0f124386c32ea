"""``cuda.bindings.driver`` on the fake GPU: what :mod:`pyfmha.runtime` uses; each function returns its status first."""

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

from trt_double.full.gpu import (
    CAPTURE_INVALIDATED,
    CAPTURE_UNSUPPORTED,
    COPY_MS,
    INVALID_HANDLE,
    INVALID_VALUE,
    MEMORY,
    OUT_OF_MEMORY,
    SUCCESS,
    Fault,
    gpu,
)

CUdevice_attribute = SimpleNamespace(
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76
)


CUpointer_attribute = SimpleNamespace(CU_POINTER_ATTRIBUTE_ACCESS_FLAGS=16, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL=9)


class CUstreamCaptureMode(IntEnum):
    CU_STREAM_CAPTURE_MODE_GLOBAL, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, CU_STREAM_CAPTURE_MODE_RELAXED = range(3)


def _c(name: str, *arguments: Any) -> int:
    if not os.environ.get("PYFMHA_LIBCUDA"):
        raise RuntimeError("libcuda.so cannot be found")  # as cuda-python does
    return int(getattr(gpu().cuda.c, name)(*arguments))


def _out(kind: Any, name: str, *arguments: Any) -> tuple[int, Any]:
    value = kind()
    status = _c(name, ctypes.byref(value), *arguments)
    return status, value.value


def cuInit(flags: int) -> tuple[int]:
    return (_c("cuInit", flags),)


def cuDeviceGetCount() -> tuple[int, int]:
    return _out(ctypes.c_int, "cuDeviceGetCount")


def cuDeviceGet(ordinal: int) -> tuple[int, int]:
    return _out(ctypes.c_int, "cuDeviceGet", ordinal)


def cuDriverGetVersion() -> tuple[int, int]:
    return _out(ctypes.c_int, "cuDriverGetVersion")


def cuDeviceGetAttribute(attribute: int, device: int) -> tuple[int, int]:
    return _out(ctypes.c_int, "cuDeviceGetAttribute", attribute, device)


def cuDeviceGetName(length: int, device: int) -> tuple[int, bytes]:
    text = ctypes.create_string_buffer(length)
    return _c("cuDeviceGetName", text, length, device), text.raw


def cuDevicePrimaryCtxRetain(device: int) -> tuple[int, int]:
    status, context = _out(ctypes.c_void_p, "cuDevicePrimaryCtxRetain", device)
    gpu().retained += status == SUCCESS
    return status, context


def cuDevicePrimaryCtxRelease(device: int) -> tuple[int]:
    gpu().retained -= 1
    return (_c("cuDevicePrimaryCtxRelease_v2", device),)


def cuCtxGetCurrent() -> tuple[int, int | None]:
    return _out(ctypes.c_void_p, "cuCtxGetCurrent")


def cuCtxSetCurrent(context: int | None) -> tuple[int]:
    return (_c("cuCtxSetCurrent", ctypes.c_void_p(context)),)


def cuCtxCreate(params: None, flags: int, device: int) -> tuple[int, int]:
    context = gpu().cuda.c.fake_create_context(device)
    cuCtxSetCurrent(context)
    return SUCCESS, context


def cuCtxDestroy(context: int) -> tuple[int]:
    current = gpu().current()[0]
    gpu().forget(context)
    if current == context:  # of this thread; to others it stays current
        cuCtxSetCurrent(None)
    return (SUCCESS,)


def cuCtxEnablePeerAccess(context: int, flags: int) -> tuple[int]:
    own = gpu().current()
    cuCtxSetCurrent(context)
    other = gpu().current()[1]
    cuCtxSetCurrent(own[0])
    gpu().cuda.set_peer(own[1], other)
    return (SUCCESS,)


def cuPointerGetAttribute(attribute: int, pointer: int) -> tuple[int, int]:
    return _out(ctypes.c_int, "cuPointerGetAttribute", attribute, ctypes.c_uint64(pointer))


def cuDeviceCanAccessPeer(device: int, other: int) -> tuple[int, int]:
    return SUCCESS, int(device != other)


def cuDeviceGetUuid(device: int) -> tuple[int, bytes]:
    return SUCCESS, gpu().visible[device].to_bytes(16, "big")


def cuMemGetInfo() -> tuple[int, int, int]:
    used = sum(size for _, size in gpu().memory.values())
    return SUCCESS, MEMORY - used, MEMORY


def cuCtxSynchronize() -> tuple[int]:
    return (CAPTURE_UNSUPPORTED if gpu().forbidden() else gpu().finish_all(),)


def cuGetErrorString(status: int) -> tuple[int, bytes]:
    return SUCCESS, {700: b"an illegal memory access was encountered"}.get(status, b"fake error")


def cuMemAlloc(size: int) -> tuple[int, int]:
    if gpu().forbidden():
        return CAPTURE_UNSUPPORTED, 0
    address = gpu().allocate(size)
    return (SUCCESS if address else OUT_OF_MEMORY), address


def cuMemFree(address: int) -> tuple[int]:
    if gpu().forbidden():
        return (CAPTURE_UNSUPPORTED,)
    gpu().finish_all()  # the real one waits, too
    return (SUCCESS if gpu().free(address) else INVALID_VALUE,)


def _copy(target: Any, source: Any) -> float:
    target[:] = source
    return COPY_MS


def _host(address: int, size: int) -> Any:
    return (ctypes.c_ubyte * size).from_address(address)


def cuMemcpyHtoD(device: int, host: int, size: int) -> tuple[int]:
    try:
        _copy(gpu().array(device, (size,), "u1"), _host(host, size))
    except Fault:
        return (INVALID_VALUE,)
    return (SUCCESS,)


def cuMemcpyDtoH(host: int, device: int, size: int) -> tuple[int]:
    """At once: work on streams that do not wait for the default one is not done by that."""
    try:
        ctypes.memmove(host, gpu().array(device, (size,), "u1").tobytes(), size)
    except Fault:
        return (INVALID_VALUE,)
    return (SUCCESS,)


def cuMemsetD8(device: int, byte: int, size: int) -> tuple[int]:
    gpu().array(device, (size,), "u1")[:] = byte
    return (SUCCESS,)


def cuMemcpyHtoDAsync(device: int, host: int, size: int, stream: int) -> tuple[int]:
    return (gpu().push(stream, lambda: _copy(gpu().array(device, (size,), "u1"), _host(host, size))),)


def cuMemcpyDtoHAsync(host: int, device: int, size: int, stream: int) -> tuple[int]:
    def work() -> float:
        ctypes.memmove(host, gpu().array(device, (size,), "u1").tobytes(), size)
        return COPY_MS

    return (gpu().push(stream, work),)


def cuStreamCreate(flags: int) -> tuple[int, int]:
    stream = gpu().handle()
    gpu().streams[stream] = []
    context = gpu().current()[0]
    gpu().owners[stream] = context
    gpu().cuda.set_stream(stream, context)
    return SUCCESS, stream


def cuStreamSynchronize(stream: int) -> tuple[int]:
    return (CAPTURE_UNSUPPORTED if gpu().forbidden() else gpu().finish(stream),)


def cuStreamDestroy(stream: int) -> tuple[int]:
    gpu().finish(stream)
    gpu().owners.pop(stream, None)
    gpu().cuda.set_stream(stream, None)
    return (SUCCESS if gpu().streams.pop(stream, None) is not None else INVALID_HANDLE,)


def cuStreamBeginCapture(stream: int, mode: CUstreamCaptureMode) -> tuple[int]:
    assert isinstance(mode, CUstreamCaptureMode), "cuda-python takes the enumeration only"
    gpu().drain()
    gpu().captures[stream] = []
    gpu().capturing[stream] = threading.get_ident()
    gpu().cuda.begin_capture()
    return (SUCCESS,)


def cuStreamEndCapture(stream: int) -> tuple[int, int]:
    made = gpu()
    made.drain()
    made.cuda.end_capture()
    work = made.captures.pop(stream)
    made.capturing.pop(stream)
    if stream in made.broken:
        made.broken.discard(stream)
        return CAPTURE_INVALIDATED, 0
    graph = made.handle()
    made.graphs[graph] = work
    return SUCCESS, graph


def cuGraphInstantiate(graph: int, flags: int) -> tuple[int, int]:
    executable = gpu().handle()
    gpu().graphs[executable] = list(gpu().graphs[graph])
    return SUCCESS, executable


def cuGraphLaunch(executable: int, stream: int) -> tuple[int]:
    if executable not in gpu().graphs:
        return (INVALID_HANDLE,)
    gpu().replays += 1
    for work in gpu().graphs[executable]:
        gpu().push(stream, work)
    return (SUCCESS,)


def cuGraphDestroy(graph: int) -> tuple[int]:
    return (SUCCESS if gpu().graphs.pop(graph, None) is not None else INVALID_HANDLE,)


cuGraphExecDestroy = cuGraphDestroy


def cuEventCreate(flags: int) -> tuple[int, int]:
    event = gpu().handle()
    gpu().events[event] = None
    return SUCCESS, event


def cuEventRecord(event: int, stream: int) -> tuple[int]:
    def work() -> float:
        gpu().events[event] = gpu().clock
        return 0.0

    return (gpu().push(stream, work),)


def cuEventSynchronize(event: int) -> tuple[int]:
    return (gpu().finish_all(),)


def cuEventElapsedTime(earlier: int, later: int) -> tuple[int, float]:
    begin, end = gpu().events[earlier], gpu().events[later]
    return (INVALID_HANDLE, 0.0) if begin is None or end is None else (SUCCESS, end - begin)


def cuEventDestroy(event: int) -> tuple[int]:
    return (SUCCESS if event in gpu().events and gpu().events.pop(event, None) is not ... else INVALID_HANDLE,)


def _one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """As the driver's functions, which any thread may call."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if not os.environ.get("PYFMHA_LIBCUDA"):
            return function(*arguments)
        with gpu().lock:
            return function(*arguments)

    return call


globals().update({name: _one_at_a_time(made) for name, made in list(globals().items()) if name.startswith("cu")})
