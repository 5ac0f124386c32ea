"""Small producers of tensors, as other packages' are: memory with DLPack or ``__cuda_array_interface__``."""

import ctypes
from typing import Any

import numpy as np

CODES = {"f": 2, "i": 0, "u": 1, "b": 6}
BF16 = 4

_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Tensor(ctypes.Structure):
    """DLTensor of dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32 * 2), ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("offset", ctypes.c_uint64),
    )  # fmt: skip


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("manager", ctypes.c_void_p), ("deleter", _Deleter))


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32 * 2), ("manager", ctypes.c_void_p), ("deleter", _Deleter),
        ("flags", ctypes.c_uint64), ("tensor", _Tensor),
    )  # fmt: skip


class ByDlpack:
    """A tensor with DLPack alone.

    Attributes:
        streams: with which it was asked for.
        given_back: how many of its capsules were dropped unused.
    """

    def __init__(self, pointer: int, shape: tuple[int, ...], dtype: Any = np.float32, **more: Any) -> None:
        self.pointer, self.shape, self.dtype = pointer, shape, np.dtype(dtype)
        self.device: tuple[int, int] = more.get("device", (2, 0))
        self.strides: tuple[int, ...] | None = more.get("strides")
        self.version: tuple[int, int] | None = more.get("version", (1, 0))
        self.read_only: bool = more.get("read_only", False)
        self.code: int = more.get("code", CODES[self.dtype.kind])
        self.offset: int = more.get("offset", 0)
        self.streams: list[Any] = []
        self.given_back = 0
        self._kept: list[Any] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: Any = None, **more: Any) -> Any:
        if self.version is None and more:
            raise TypeError("unexpected keyword argument 'max_version'")
        self.streams.append(stream)
        axes = len(self.shape)
        strides = None if self.strides is None else (ctypes.c_int64 * axes)(*self.strides)
        tensor = _Tensor(
            self.pointer - self.offset, self.device, axes, self.code, 8 * self.dtype.itemsize, 1,
            (ctypes.c_int64 * axes)(*self.shape), strides, self.offset,
        )  # fmt: skip
        deleter = _Deleter(self._give_back)
        if self.version is None:
            managed: Any = _Managed(tensor, None, deleter)
        else:
            managed = _Versioned(self.version, None, deleter, int(self.read_only), tensor)
        name = b"dltensor" if self.version is None else b"dltensor_versioned"
        self._kept += [managed, name, deleter]
        make = ctypes.pythonapi.PyCapsule_New
        make.argtypes, make.restype = [ctypes.c_void_p, ctypes.c_char_p, _Deleter], ctypes.py_object
        return make(ctypes.addressof(managed), name, deleter)

    def _give_back(self, _: int | None) -> None:
        """The capsule's destructor."""
        self.given_back += 1


class ByInterface:
    """A tensor with ``__cuda_array_interface__`` alone."""

    def __init__(self, pointer: int, shape: tuple[int, ...], dtype: Any = np.float32, **more: Any) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": np.dtype(dtype).str, "version": 3,
            "data": (pointer, more.pop("read_only", False)), "strides": None, "stream": None, **more,
        }  # fmt: skip
