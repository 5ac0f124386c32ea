"""What a ``PluginField`` points to, read rightly from bindings that misread it.

The bindings of TensorRT 10.8 to 10.15.1 were built for numpy 1. With numpy 2 they take an array's item size to be 0, so
``PluginField.data`` repeats its first element: ``b"text\\0"`` reads as ``b"ttttt"``. Everything else of a field is
right: its name, its type, its length, and the first element. There the data is read through the C struct::

    struct PluginField { char const* name; void const* data; PluginFieldType type; int32_t length; };

to which pybind11 holds a pointer, right behind the header of the Python object (NvInferRuntimePlugin.h; pybind11's
"simple" layout, detail/common.h).
"""

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyfmha.errors import PluginError

_ELEMENTS = {"INT32": np.int32, "FLOAT32": np.float32, "CHAR": np.int8}
_CANARY = (0x5EED, -7, 3)


class _Struct(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    )


def read_data(trt: Any, field: Any, kind: str) -> NDArray[Any]:
    """A copy of a field's elements, one axis.

    Args:
        trt: the TensorRT module that the field is of.
        field: one of its ``PluginField``.
        kind: its type: ``"INT32"``, ``"FLOAT32"`` or ``"CHAR"``.

    Raises:
        PluginError: the binding misreads fields, and their memory is not laid out as that of the bindings known to.
    """
    if field.size < 2 or _reads_right(trt):  # the first element is right in any case
        return np.array(field.data).reshape(-1)
    element = np.dtype(_ELEMENTS[kind])
    struct = _struct_of(field) if _has_the_struct(trt) else None
    if struct is None or not _is_of(struct, field, element):
        raise PluginError(
            f"{trt.__name__} {trt.__version__} misreads plugin fields under numpy {np.__version__} (as TensorRT 10.8"
            f" to 10.15.1 do under numpy 2), and the memory of field {field.name} is not laid out as theirs: use"
            " TensorRT 10.16 or newer, or pip install 'numpy<2'"
        )
    return np.frombuffer(_content(struct, element), element)


@cache
def _canary(trt: Any) -> tuple[Any, NDArray[Any]]:
    """A field of known elements, and the memory that it points to."""
    elements = np.array(_CANARY, np.int32)
    return trt.PluginField("pyfmha_canary", elements, trt.PluginFieldType.INT32), elements


@cache
def _reads_right(trt: Any) -> bool:
    """Whether this binding reads more than a first element under this numpy."""
    return bool(np.array(_canary(trt)[0].data).reshape(-1).tolist() == list(_CANARY))


@cache
def _has_the_struct(trt: Any) -> bool:
    """Whether a field of known content lies in memory as expected."""
    field, elements = _canary(trt)
    struct = _struct_of(field)
    # The address of the data comes first: where that is right, the object does hold a pointer to the struct.
    return struct is not None and struct.data == elements.ctypes.data and _is_of(struct, field, elements.dtype)


def _struct_of(field: Any) -> _Struct | None:
    if type(field).__basicsize__ < object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p):
        return None
    address = ctypes.c_void_p.from_address(id(field) + object.__basicsize__).value
    if not address or address % ctypes.alignment(_Struct):
        return None
    return _Struct.from_address(address)


def _is_of(struct: _Struct, field: Any, element: np.dtype[Any]) -> bool:
    """Whether a struct says what the binding says of its field."""
    said = (field.name.encode(), int(field.type), field.size)
    if not struct.data or (struct.name, struct.type, struct.length) != said:
        return False
    first = np.array(field.data).reshape(-1)[:1]
    return first.dtype == element and _content(struct, element)[: element.itemsize] == first.tobytes()


def _content(struct: _Struct, element: np.dtype[Any]) -> bytes:
    return ctypes.string_at(struct.data, struct.length * element.itemsize)
