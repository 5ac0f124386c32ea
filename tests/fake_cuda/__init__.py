"""The fake CUDA driver from Python: built from ``fake_cuda.c``, controlled and read back through ctypes."""

import ctypes
import hashlib
import re
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_cuda.c")
_FUNCTIONS = re.findall(r"^EXPORT CUresult (cu\w+)\(", SOURCE.read_text(), re.MULTILINE)
MAX_PARAMS = 128
PARAM_BYTES = 4096
MAP_BYTES = 128


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("image", ctypes.c_void_p),
        ("image_size", ctypes.c_size_t),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("device", ctypes.c_int),
        ("dependent", ctypes.c_int),
        ("cluster", ctypes.c_uint * 3),
        ("param_count", ctypes.c_uint),
        ("param_sizes", ctypes.c_ushort * MAX_PARAMS),
        ("params", ctypes.c_ubyte * PARAM_BYTES),
    )


class _Wait(ctypes.Structure):
    _fields_ = (("stream", ctypes.c_void_p), ("earlier", ctypes.c_void_p), ("launches", ctypes.c_ulong))


@dataclass(frozen=True)
class TensorMap:
    """What a ``CUtensorMap`` was made of, as the driver was told: arrays innermost first, strides in bytes."""

    address: int
    small: bool  # bit 21 of the second word was cleared
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    data_type: int
    swizzle: int
    interleave: int
    l2_promotion: int
    fill: int

    @classmethod
    def read(cls, parameter: bytes) -> "TensorMap":
        """From the 128 bytes that a kernel gets."""
        assert len(parameter) == MAP_BYTES
        address, flags, *numbers = struct.unpack_from("<QQ4Q5I5H5B6B", parameter)
        strides, sizes, box, steps = numbers[:4], numbers[4:9], numbers[9:14], numbers[14:19]
        rank, data_type, interleave, swizzle, l2_promotion, fill = numbers[19:]
        assert flags | 1 << 21 == (1 << 64) - 1, "bits that no launcher may touch"
        assert steps[:rank] == [1] * rank
        return cls(
            address,
            not flags & 1 << 21,
            tuple(sizes[:rank]),
            tuple(strides[: rank - 1]),
            tuple(box[:rank]),
            data_type,
            swizzle,
            interleave,
            l2_promotion,
            fill,
        )


@dataclass(frozen=True)
class Launch:
    """One launch that reached the driver.

    ``params`` are the bytes that the kernel would have read; ``dependent`` is programmatic dependent launch;
    ``cluster`` the blocks of a cluster along x, y and z, None where it was launched without that attribute.
    """

    kernel: str
    image_sha256: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    device: int
    dependent: bool
    cluster: tuple[int, ...] | None
    params: tuple[bytes, ...]


class FakeCuda:
    """The driver's controls; see ``fake_cuda.h``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.c = ctypes.CDLL(str(path))
        self.c.fake_create_context.restype = ctypes.c_void_p
        for name in ("fake_destroy_context", "fake_recreate_context", "fake_make_current"):
            getattr(self.c, name).argtypes = [ctypes.c_void_p]
        self.c.fake_set_memory.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int, ctypes.c_uint64]
        self.c.fake_set_stream.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.c.fake_inject.argtypes = [ctypes.c_char_p, *[ctypes.c_int] * 4]
        self.c.fake_calls.argtypes = [ctypes.c_char_p]
        self.c.fake_calls.restype = ctypes.c_ulong
        self.c.fake_launch_count.restype = ctypes.c_ulong
        self.c.fake_get_launch.argtypes = [ctypes.c_ulong, ctypes.POINTER(_Launch)]
        self.c.fake_last_violation.restype = ctypes.c_char_p
        self.c.fake_wait_count.restype = ctypes.c_ulong
        self.c.fake_get_wait.argtypes = [ctypes.c_ulong, ctypes.POINTER(_Wait)]

    def reset(self) -> None:
        self.c.fake_reset()

    def set_device_count(self, count: int) -> None:
        self.c.fake_set_device_count(count)

    def set_device(self, device: int, capability: int, shared_optin: int = 232448) -> None:
        self.c.fake_set_device(device, capability, shared_optin)

    def set_bandwidth(self, device: int, clock: int, bus: int) -> None:
        """Of its memory: kHz and bits, which are an H100's otherwise."""
        self.c.fake_set_bandwidth(device, clock, bus)

    def set_driver_version(self, version: int) -> None:
        """As ``cuDriverGetVersion`` says it: 13000 is CUDA 13.0, which is what a reset sets."""
        self.c.fake_set_driver_version(version)

    def set_memory(self, begin: int, size: int, device: int = 0, on_device: int | None = None) -> None:
        """Memory of a device at an address, for ``cuPointerGetAttribute``, and where kernels find it; of size 0 it is
        gone again."""
        self.c.fake_set_memory(begin, size, device, begin if on_device is None else on_device)

    def set_stream(self, stream: int, context: int | None) -> None:
        """The context that a stream goes with; None: it is gone."""
        self.c.fake_set_stream(stream, context)

    def set_peer(self, device: int, other: int) -> None:
        """A device may access another's memory."""
        self.c.fake_set_peer(device, other)

    def use_context(self, device: int = 0) -> int:
        """Create a context and make it current on this thread."""
        context = int(self.c.fake_create_context(device))
        self.make_current(context)
        return context

    def make_current(self, context: int | None) -> None:
        self.c.fake_make_current(context)

    def destroy(self, context: int) -> None:
        self.c.fake_destroy_context(context)

    def recreate(self, context: int) -> None:
        """Another context takes the address of this one."""
        self.c.fake_recreate_context(context)

    def fail(self, function: str, status: int, *, after: int = 0, times: int = -1, device: int = -1) -> None:
        """Make a function fail after some more calls that work, for so many calls (-1: from then on); on one device
        only, where it is given."""
        self.c.fake_inject(function.encode(), status, after, times, device)

    def heal(self, function: str) -> None:
        self.c.fake_inject(function.encode(), 0, 0, 0, -1)

    def calls(self, function: str) -> int:
        return int(self.c.fake_calls(function.encode()))

    def all_calls(self) -> Counter[str]:
        """Of every function that was called, how often."""
        return +Counter({name: self.calls(name) for name in _FUNCTIONS})

    def begin_capture(self) -> None:
        """From now on this thread may only launch: what a stream capture forbids fails, and is a violation."""
        self.c.fake_begin_capture()

    def end_capture(self) -> None:
        self.c.fake_end_capture()

    def violations(self) -> tuple[int, str]:
        """How many, and the name of the latest function."""
        return self.c.fake_violations(), self.c.fake_last_violation().decode()

    def modules_loaded(self) -> int:
        return int(self.c.fake_modules_loaded())

    def waits(self) -> list[tuple[int, int, int]]:
        """Streams that were made to wait: the one that waits, the one waited for, and the launches before."""
        raw, found = _Wait(), []
        for index in range(self.c.fake_wait_count()):
            assert self.c.fake_get_wait(index, ctypes.byref(raw))
            found.append((raw.stream or 0, raw.earlier or 0, int(raw.launches)))
        return found

    def events_alive(self) -> int:
        return int(self.c.fake_events_alive())

    def launch_count(self) -> int:
        return int(self.c.fake_launch_count())

    def launches(self, start: int = 0) -> list[Launch]:
        """From one on."""
        return [self._launch(index) for index in range(start, self.launch_count())]

    def _launch(self, index: int) -> Launch:
        raw = _Launch()
        if not self.c.fake_get_launch(index, ctypes.byref(raw)):
            raise IndexError(index)
        return Launch(
            raw.kernel.decode(),
            hashlib.sha256(ctypes.string_at(raw.image, raw.image_size)).hexdigest(),
            tuple(raw.grid),
            tuple(raw.block),
            raw.shared,
            raw.stream or 0,
            raw.device,
            bool(raw.dependent),
            tuple(raw.cluster) if any(raw.cluster) else None,
            tuple(_parts(bytes(raw.params), raw.param_sizes[: raw.param_count])),
        )


def _parts(content: bytes, sizes: list[int]) -> Iterator[bytes]:
    start = 0
    for size in sizes:
        yield content[start : start + size]
        start += size


def build(output: Path, *flags: str) -> Path:
    """Compile the fake driver to a shared library."""
    strict = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O2", "-fPIC", "-shared", "-pthread"]
    subprocess.run(["gcc", *strict, *flags, str(SOURCE), "-o", str(output)], check=True)
    return output
