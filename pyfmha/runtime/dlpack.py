"""DLPack's structures, read from the capsules that ``__dlpack__`` gives (dlpack.h, versions 0.x and 1.x)."""

import ctypes
from typing import Any, NamedTuple

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
DEVICES = {CPU: "the host", CUDA: "a GPU", CUDA_HOST: "pinned host memory", CUDA_MANAGED: "managed memory"}
"""``DLDeviceType``, as far as CUDA and the host go."""

_READ_ONLY = 1  # a flag of DLManagedTensorVersioned
_NUMBERS = {0: "i", 1: "u", 2: "fp", 4: "bf", 5: "complex"}  # DLDataTypeCode, followed by the bits
_WHOLE = {6: "i1", 10: "fp8e4nv", 11: "fp8e4b8", 12: "fp8e5", 13: "fp8e5b16"}  # bool and the float8 of one byte


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


class Packed(NamedTuple):
    """What a capsule holds.

    Attributes:
        pointer: the first element's address.
        shape: sizes.
        strides: in elements; None where rows lie one after the other.
        dtype: as Triton names it: ``fp16``, ``bf16``, ``i32``, ``u8``, ``i1``, ``fp8e4nv``.
        device_type, device: ``DLDeviceType``, and its number.
        read_only: the producer forbids writing.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: str
    device_type: int
    device: int
    read_only: bool


def export(tensor: Any, stream: int | None) -> Any:
    """The capsule of a tensor.

    It is never renamed, so it stays its producer's: when it is dropped, the producer's own destructor gives back what
    it holds.

    Args:
        tensor: what has ``__dlpack__``.
        stream: on which it will be used: the producer orders that after its own work. None for no order.
    """
    wanted = {"stream": stream} if stream is not None else {}
    try:
        return tensor.__dlpack__(**wanted, max_version=(1, 0))
    except TypeError:  # from before version 1, whose keyword that is
        return tensor.__dlpack__(**wanted)


def read(capsule: Any) -> Packed:
    """What a capsule holds; raises ValueError where it is none, used up, or of a later major version."""
    if _is(capsule, b"dltensor_versioned"):
        managed = _Versioned.from_address(_pointer(capsule, b"dltensor_versioned"))
        if managed.major != 1:
            raise ValueError(f"its DLPack is version {managed.major}.{managed.minor}; versions 0 and 1 are read")
        return _packed(managed.tensor, bool(managed.flags & _READ_ONLY))
    if _is(capsule, b"dltensor"):
        return _packed(_Tensor.from_address(_pointer(capsule, b"dltensor")), False)
    raise ValueError("its __dlpack__ gave no DLPack capsule, or a used one")


def _is(capsule: Any, name: bytes) -> bool:
    valid = ctypes.pythonapi.PyCapsule_IsValid
    valid.argtypes, valid.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_int
    return bool(valid(capsule, name))


def _pointer(capsule: Any, name: bytes) -> int:
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.argtypes, pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    return int(pointer(capsule, name))


def _packed(tensor: _Tensor, read_only: bool) -> Packed:
    code, axes = tensor.code, range(tensor.ndim)
    word = f"{_NUMBERS[code]}{tensor.bits}" if code in _NUMBERS else _WHOLE.get(code, f"DLPack's type {code}")
    return Packed(
        (tensor.data or 0) + tensor.byte_offset,
        tuple(tensor.shape[axis] for axis in axes),
        tuple(tensor.strides[axis] for axis in axes) if tensor.strides else None,
        word if tensor.lanes == 1 else f"{word} in vectors of {tensor.lanes}",
        tensor.device_type,
        tensor.device_id,
        read_only,
    )
