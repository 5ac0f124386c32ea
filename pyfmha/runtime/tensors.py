"""Other packages' tensors, used where they are: DLPack and ``__cuda_array_interface__``.

PyTorch, CuPy, JAX, Numba and the like give their tensors' addresses by one or both of these protocols, and both say
when the memory may be touched: of DLPack the producer orders the given stream after its own work, of the other the
consumer does, from version 3 on. No import of theirs is needed here, and nothing is copied.
"""

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from pyfmha.errors import TensorError
from pyfmha.runtime import dlpack
from pyfmha.runtime.libcuda import device_of, wait_for

LEGACY_STREAM = 1
"""What both protocols call the stream of the handle 0, which they do not allow."""

STORED = {
    **{f"fp{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"{sign}{bits}": f"{name}{bits}" for bits in (8, 16, 32, 64) for sign, name in (("i", "int"), ("u", "uint"))},
    **dict.fromkeys(("fp8e4nv", "fp8e5", "fp8e4b8", "fp8e5b16"), "uint8"),
    "bf16": "uint16",
    "i1": "bool",
}
"""How numpy holds each type: the bits of bfloat16 in uint16 and of FP8 in uint8, which it does not have."""

_CODES = {"f": "fp", "i": "i", "u": "u", "b": "i", "V": "bf"}  # of numpy's type strings
_ALIKE = {("u16", "bf16"), ("u8", "i1"), ("i8", "i1"), ("i1", "u8"), ("i1", "i8")}


class TensorView(NamedTuple):
    """A tensor's memory, as its producer describes it.

    Attributes:
        pointer: the address of its first element.
        shape: sizes.
        strides: in elements; None where rows lie one after the other.
        dtype: of its elements, as Triton names it: ``fp16``, ``bf16``, ``i32``.
        device: the number of its GPU, or None where it is in the host's memory.
        read_only: it must not be written.
        owner: what keeps the memory alive.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: str
    device: int | None
    read_only: bool
    owner: Any

    @property
    def is_contiguous(self) -> bool:
        """Rows lie one after the other, without gaps."""
        if self.strides is None or 0 in self.shape:
            return True
        axes = [(size, stride) for size, stride in zip(self.shape, self.strides, strict=True) if size != 1]
        wanted = [math.prod(size for size, _ in axes[index + 1 :]) for index in range(len(axes))]
        return [stride for _, stride in axes] == wanted

    @property
    def stored(self) -> str:
        """The name of numpy's type that holds it."""
        return STORED.get(self.dtype, self.dtype)

    def holds(self, kind: str) -> bool:
        """Whether it is of a type, or holds its bits: bfloat16 in 16 bits, FP8 in 8."""
        return kind == self.dtype or (self.dtype, kind) in _ALIKE or (self.dtype == "u8" and kind.startswith("fp8"))

    def __str__(self) -> str:
        gaps = "" if self.is_contiguous else f" with strides {list(self.strides or ())}"
        return f"{self.dtype} {list(self.shape)}{gaps}"


def is_tensor(value: object) -> bool:
    """Whether it gives its memory by one of the protocols; classes do not."""
    return not isinstance(value, type) and (
        hasattr(value, "__cuda_array_interface__")
        or (hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"))
    )


def view(name: str, tensor: Any, stream: int | None) -> TensorView:
    """A tensor's memory, by DLPack where the tensor has both protocols.

    Args:
        name: what errors call it.
        tensor: for which :func:`is_tensor` is true.
        stream: a ``CUstream`` as an integer, on which it will be used; it is ordered after the work of the tensor's
            producer, and the host does not wait. None for no order.

    Raises:
        TensorError: its producer does not give it, it is of a kind that is not read, or neither on a GPU nor on the
            host.
        DriverError: the streams cannot be ordered.
    """
    ordered = LEGACY_STREAM if stream == 0 else stream
    if hasattr(tensor, "__dlpack__") and hasattr(tensor, "__dlpack_device__"):
        return _by_dlpack(name, tensor, ordered)
    return _by_interface(name, tensor, ordered)


def on_device(name: str, tensor: Any, stream: int | None, device: int, *, written: bool = False) -> TensorView:
    """A contiguous tensor in a GPU's memory.

    Args:
        name, tensor, stream: as :func:`view`.
        device: the GPU's number.
        written: it will be written.

    Raises:
        TensorError, DriverError: as :func:`view`; or it is elsewhere, has gaps, or must not be written.
    """
    found = view(name, tensor, stream)
    check_device(name, found, device)
    if not found.is_contiguous:
        raise TensorError(f"{name} is {found}; only contiguous tensors are served: give a contiguous copy")
    if written and found.read_only:
        raise TensorError(f"{name} is read-only, and would be written; give a tensor that may be")
    return found


def check_device(name: str, found: TensorView, device: int | None) -> None:
    """Raise TensorError unless a tensor is on a GPU, and on that of a number where one is given."""
    if found.device is None:
        raise TensorError(f"{name} is in host memory; give a tensor on GPU {device or 0}")
    if device is not None and found.device != device:
        raise TensorError(f"{name} is on GPU {found.device}; it is used on GPU {device}: move one of the two")


def _by_dlpack(name: str, tensor: Any, stream: int | None) -> TensorView:
    kind, number = (int(part) for part in tensor.__dlpack_device__())
    if kind not in (dlpack.CPU, dlpack.CUDA, dlpack.CUDA_MANAGED):
        where = dlpack.DEVICES.get(kind, f"a device of DLPack's type {kind}")
        raise TensorError(f"{name} is on {where}; give a tensor on a GPU or on the host")
    on_host = kind == dlpack.CPU
    try:
        # -1: no order. The host has no streams, and its producers refuse one.
        capsule = dlpack.export(tensor, None if on_host else -1 if stream is None else stream)
        packed = dlpack.read(capsule)
    except (BufferError, TypeError, ValueError, RuntimeError) as error:
        raise TensorError(f"{name} cannot be used: its producer says: {error}") from error
    device = None if on_host else number
    return TensorView(
        packed.pointer, packed.shape, packed.strides, packed.dtype, device, packed.read_only, (tensor, capsule)
    )


def _by_interface(name: str, tensor: Any, stream: int | None) -> TensorView:
    described = tensor.__cuda_array_interface__
    if described.get("mask") is not None:
        raise TensorError(f"{name} is a masked array; give one without a mask")
    pointer, read_only = described["data"]
    text, shape = described["typestr"], tuple(described["shape"])
    size = int(text[2:])
    if text[0] == ">" or text[1] not in _CODES:
        raise TensorError(f"{name} is of type {text!r}; give little-endian numbers")
    word = "i1" if text[1] == "b" else "u8" if text[1:] == "V1" else f"{_CODES[text[1]]}{8 * size}"
    strides = described.get("strides")
    if strides is not None:
        strides = tuple(stride // size for stride in strides)
    producer = described.get("stream")
    if producer == 0:
        raise TensorError(f"{name} says that its stream is 0, which is ambiguous: 1 is the legacy default stream")
    if stream is not None and producer is not None and producer != stream:
        wait_for(stream, producer)
    device = device_of(pointer) if math.prod(shape) else 0
    if device is None:
        raise TensorError(f"{name}: {pointer:#x} is no memory of a GPU that this process uses")
    return TensorView(pointer, shape, strides, word, device, bool(read_only), tensor)


def host_array(found: TensorView) -> Any:
    """A numpy array over a host tensor's memory, in numpy's type for it; it lives no longer than the tensor.

    Raises:
        TensorError: numpy cannot hold its type.
    """
    import numpy as np  # what only launches needs no numpy

    if found.dtype not in STORED:
        raise TensorError(f"a tensor is of type {found.dtype}; numpy can hold {', '.join(STORED)}")
    dtype = np.dtype(found.stored)
    if 0 in found.shape:
        return np.empty(found.shape, dtype)
    strides: Sequence[int] = found.strides or [math.prod(found.shape[axis + 1 :]) for axis in range(len(found.shape))]
    last = sum((size - 1) * stride for size, stride in zip(found.shape, strides, strict=True))
    memory: Any = (ctypes.c_ubyte * ((last + 1) * dtype.itemsize)).from_address(found.pointer)
    return np.ndarray(found.shape, dtype, memory, 0, [stride * dtype.itemsize for stride in strides])
