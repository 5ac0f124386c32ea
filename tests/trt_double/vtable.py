"""The calls of TensorRT's C++ code on a real binding's objects.

A pybind11 object that inherits several C++ classes holds a pointer to one C++ object for each, in the order of the
bases. Those objects' virtual functions are called here through their tables, so that the binding's own C++ code runs:
it takes the GIL, looks the override up, converts, and turns exceptions into what TensorRT sees. Order of the
functions: NvInferRuntime*.h of TensorRT 11.1; each interface begins with getAPILanguage, getInterfaceInfo and the two
destructors of the Itanium C++ ABI.
"""

import ctypes
import functools
import gc
import weakref
from collections.abc import Sequence
from typing import Any

from pyfmha.trt.plugin import PluginBehaviour
from trt_double import Field, Tensor

_POINTER = ctypes.c_void_p
_CORE, _BUILD, _RUNTIME = 1, 2, 3  # positions among the plugin's bases, after IPluginV3
_DESTRUCTOR = 2  # the complete-object one. Its neighbour, which also frees, corrupts the heap: Python owns the memory


class _Dims(ctypes.Structure):
    _fields_ = (("nb", ctypes.c_int32), ("d", ctypes.c_int64 * 8))


class _Desc(ctypes.Structure):
    _fields_ = (("dims", _Dims), ("type", ctypes.c_int32), ("format", ctypes.c_int32), ("scale", ctypes.c_float))


class _DynamicDesc(ctypes.Structure):
    _fields_ = (("desc", _Desc), ("min", _Dims), ("max", _Dims), ("opt", _Dims))


class _DimsExprs(ctypes.Structure):
    _fields_ = (("nb", ctypes.c_int32), ("d", _POINTER * 8))


class _Field(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", _POINTER),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    )


class _Collection(ctypes.Structure):
    _fields_ = (("nb", ctypes.c_int32), ("fields", ctypes.POINTER(_Field)))


_ELEMENT = {0: 2, 1: 4, 2: 8, 3: 1, 4: 2, 5: 4, 6: 1, 8: 1, 10: 8}  # bytes an element, by PluginFieldType


_made: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
"""The plugins that there are, by the address of their IPluginV3."""


def _remember(start: Any) -> Any:
    @functools.wraps(start)
    def remembered(self: Any, *arguments: Any) -> None:
        start(self, *arguments)
        if type(type(self)).__name__ == "pybind11_type":  # and not of a double, which has no C++ objects
            _made[pointers(self, 4)[0]] = self

    return remembered


PluginBehaviour.__init__ = _remember(PluginBehaviour.__init__)  # type: ignore[method-assign]


def pointers(instance: Any, count: int) -> list[int]:
    """The C++ objects of an instance, one for each C++ base."""
    start = id(instance) + 2 * ctypes.sizeof(_POINTER)  # after the object's header
    first = ctypes.cast(start, ctypes.POINTER(_POINTER))
    if count == 1:  # pybind11's simple layout: value and holder in place
        return [int(first[0])]
    table = ctypes.cast(first[0], ctypes.POINTER(_POINTER))
    return [int(table[2 * index]) for index in range(count)]  # value, holder, value, holder, ...


def virtual(this: int, slot: int, result: Any, *types: Any) -> Any:
    """A virtual function of a C++ object, bound to it. The call releases the GIL, as TensorRT does not hold it."""
    table = ctypes.cast(ctypes.cast(this, ctypes.POINTER(_POINTER))[0], ctypes.POINTER(_POINTER))
    function = ctypes.CFUNCTYPE(result, _POINTER, *types)(table[slot])
    return lambda *arguments: function(this, *arguments)


def _dims(shape: Sequence[int]) -> _Dims:
    return _Dims(len(shape), (ctypes.c_int64 * 8)(*shape))


def _desc(tensor: Tensor) -> _Desc:
    return _Desc(_dims(tensor.shape), tensor.type, tensor.format, 1.0)


def _descs(tensors: Sequence[Tensor]) -> Any:
    return (_Desc * len(tensors))(*map(_desc, tensors))


def _dynamic(tensors: Sequence[Tensor]) -> Any:
    made = []
    for tensor in tensors:
        most = tensor.largest or tensor.shape
        made.append(_DynamicDesc(_desc(tensor), _dims(tensor.smallest or most), _dims(most), _dims(most)))
    return (_DynamicDesc * len(tensors))(*made)


class _Expressions:
    """IDimensionExpr objects: constants, and sizes that are not known. Laid out as a C++ compiler would."""

    def __init__(self) -> None:
        self._kept: list[Any] = []
        runtime = ctypes.CDLL("libstdc++.so.6")
        information = ctypes.addressof(_POINTER.in_dll(runtime, "_ZTVN10__cxxabiv117__class_type_infoE")) + 16
        self._type, self._builder_type = (
            self._keep((_POINTER * 2)(information, self._keep(name)))
            for name in (b"N8nvinfer114IDimensionExprE\0", b"N8nvinfer112IExprBuilderE\0")
        )
        self._values: dict[int, int | None] = {}

    def _keep(self, what: Any) -> int:
        kept = ctypes.create_string_buffer(what) if isinstance(what, bytes) else what
        self._kept.append(kept)
        return ctypes.addressof(kept)

    def make(self, value: int | None) -> int:
        unused = ctypes.CFUNCTYPE(None, _POINTER)(lambda this: None)
        constant = ctypes.CFUNCTYPE(ctypes.c_bool, _POINTER)(lambda this: value is not None)
        get = ctypes.CFUNCTYPE(ctypes.c_int64, _POINTER)(lambda this: -1 if value is None else value)
        size = ctypes.CFUNCTYPE(ctypes.c_bool, _POINTER)(lambda this: False)
        self._kept += [unused, constant, get, size]
        slots = [ctypes.cast(entry, _POINTER) for entry in (unused, unused, constant, get, size)]
        table = self._keep((_POINTER * 5)(*slots))
        implementation = self._keep((_POINTER * 1)(table))
        # offset to top, type information, then the destructors, which nobody calls
        own = self._keep((_POINTER * 4)(None, self._type, None, None))
        address = self._keep((_POINTER * 2)(own + 16, implementation))
        self._values[address] = value
        return address

    def builder(self) -> int:
        """An IExprBuilder that makes constants; its other function is never called."""
        unused = ctypes.CFUNCTYPE(None, _POINTER)(lambda this: None)
        constant = ctypes.CFUNCTYPE(_POINTER, _POINTER, ctypes.c_int64)(lambda this, value: self.make(value))
        self._kept += [unused, constant]
        table = self._keep((_POINTER * 3)(*(ctypes.cast(entry, _POINTER) for entry in (unused, unused, constant))))
        own = self._keep((_POINTER * 4)(None, self._builder_type, None, None))
        return self._keep((_POINTER * 2)(own + 16, self._keep((_POINTER * 1)(table))))

    def value(self, address: int) -> int | None:
        return self._values[address]


class _Stored:
    def __init__(self, collection: int) -> None:
        self._collection = ctypes.cast(collection, ctypes.POINTER(_Collection)).contents

    def read(self) -> list[Field]:
        fields = (self._collection.fields[index] for index in range(self._collection.nb))
        return [
            Field(
                f.name.decode(),
                f.type,
                f.length,
                ctypes.string_at(f.data or 0, f.length * _ELEMENT[f.type]) if f.length else b"",
            )
            for f in fields
        ]


def create_through(creator: int, name: str, fields: Sequence[Field], phase: int) -> int | None:
    """The address of the IPluginV3 that a creator's C++ object makes; the fields' memory is gone afterwards."""
    data = [ctypes.create_string_buffer(field.data, max(len(field.data), 1)) for field in fields]
    entries = (_Field * len(fields))(
        *(
            _Field(f.name.encode(), ctypes.addressof(buffer), f.type, f.length)
            for f, buffer in zip(fields, data, strict=True)
        )
    )
    collection = _Collection(len(fields), entries)
    call = virtual(creator, 4, _POINTER, ctypes.c_char_p, ctypes.POINTER(_Collection), ctypes.c_int32)
    made: int | None = call(name.encode(), ctypes.byref(collection), phase)
    for buffer in data:  # TensorRT's memory is gone after the call
        ctypes.memset(buffer, 0xDB, len(buffer))
    return made


class RealCalls:
    """See :class:`trt_double.Calls`."""

    def __init__(self, trt: Any) -> None:
        self.trt = trt

    def _function(self, plugin: Any, part: int, slot: int, result: Any, *types: Any) -> Any:
        return virtual(pointers(plugin, 4)[part], slot, result, *types)

    def _object(self, address: int | None) -> Any | None:
        if not address:
            return None
        # Those made by the plugin's own __init__ first: gc.get_objects() shows half-made tuples of other threads, and
        # Python fails to finish a tuple that somebody else holds (SystemError in tupleobject.c).
        known = _made.get(address)
        if known is not None and self._is_plugin(known):
            return known
        found = [o for o in gc.get_objects() if self._is_plugin(o) and pointers(o, 4)[0] == address]
        assert len(found) == 1, "the C++ object has no Python object"
        return found[0]

    def _is_plugin(self, candidate: Any) -> bool:
        # by type(), because isinstance also asks an object's __class__, which some compute
        return issubclass(type(candidate), self.trt.IPluginV3)

    def create(self, creator: Any, name: str, fields: Sequence[Field], phase: int) -> Any | None:
        (this,) = pointers(creator, 1)
        return self._object(create_through(this, name, fields, phase))

    def fields_at(self, collection: int) -> list[Field]:
        """The fields of a C++ collection."""
        return _Stored(collection).read()

    def output_types(self, plugin: Any, types: Sequence[int]) -> list[int] | None:
        ints = ctypes.POINTER(ctypes.c_int32)
        call = self._function(plugin, _BUILD, 5, ctypes.c_int32, ints, ctypes.c_int32, ints, ctypes.c_int32)
        count = int(plugin.num_outputs)
        out = (ctypes.c_int32 * count)(*[-1] * count)
        status = call(out, count, (ctypes.c_int32 * len(types))(*types), len(types))
        return list(out) if status == 0 else None

    def output_shapes(self, plugin: Any, shapes: Sequence[Sequence[int | None]]) -> list[list[int | None]] | None:
        expressions = _Expressions()
        made = [_DimsExprs(len(shape), (_POINTER * 8)(*(expressions.make(size) for size in shape))) for shape in shapes]
        inputs = (_DimsExprs * len(made))(*made)
        count = int(plugin.num_outputs)
        outputs = (_DimsExprs * count)()
        dims, number = ctypes.POINTER(_DimsExprs), ctypes.c_int32
        call = self._function(plugin, _BUILD, 6, number, dims, number, dims, number, dims, number, _POINTER)
        if call(inputs, len(made), None, 0, outputs, count, expressions.builder()) != 0:
            return None
        return [[expressions.value(out.d[axis]) for axis in range(out.nb)] for out in outputs]

    def supports(self, plugin: Any, position: int, tensors: Sequence[Tensor]) -> bool:
        number = ctypes.c_int32
        call = self._function(plugin, _BUILD, 7, ctypes.c_bool, number, _POINTER, number, number)
        return bool(call(position, _dynamic(tensors), len(tensors) - plugin.num_outputs, plugin.num_outputs))

    def configure(self, plugin: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        number = ctypes.c_int32
        call = self._function(plugin, _BUILD, 4, number, _POINTER, number, _POINTER, number)
        return int(call(_dynamic(inputs), len(inputs), _dynamic(outputs), len(outputs)))

    def tactics(self, plugin: Any) -> list[int] | None:
        count = self._function(plugin, _BUILD, 11, ctypes.c_int32)()
        if count < 0:
            return None
        ids = (ctypes.c_int32 * count)()
        status = self._function(plugin, _BUILD, 10, ctypes.c_int32, _POINTER, ctypes.c_int32)(ids, count)
        return list(ids) if status == 0 else None

    def workspace(self, plugin: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        number = ctypes.c_int32
        call = self._function(plugin, _BUILD, 9, ctypes.c_size_t, _POINTER, number, _POINTER, number)
        return int(call(_dynamic(inputs), len(inputs), _dynamic(outputs), len(outputs)))

    def timing_cache_id(self, plugin: Any) -> str | None:
        text = self._function(plugin, _BUILD, 12, ctypes.c_char_p)()
        return None if text is None else text.decode()

    def set_tactic(self, plugin: Any, tactic: int) -> int:
        return int(self._function(plugin, _RUNTIME, 4, ctypes.c_int32, ctypes.c_int32)(tactic))

    def on_shape_change(self, plugin: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        number = ctypes.c_int32
        call = self._function(plugin, _RUNTIME, 5, number, _POINTER, number, _POINTER, number)
        return int(call(_descs(inputs), len(inputs), _descs(outputs), len(outputs)))

    def prepared_enqueue(
        self, plugin: Any, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int
    ) -> Any:
        """A function of no arguments that enqueues, for timing."""
        call = self._function(plugin, _RUNTIME, 6, ctypes.c_int32, *[_POINTER] * 6)
        descs = _descs([Tensor((1,) * 4)] * 8)  # as many as any plugin of ours has
        sources = (_POINTER * len(inputs))(*inputs)
        targets = (_POINTER * len(outputs))(*outputs)
        return lambda: call(descs, descs, sources, targets, workspace, stream)

    def enqueue(self, plugin: Any, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int) -> int:
        return int(self.prepared_enqueue(plugin, inputs, outputs, workspace, stream)())

    def attach(self, plugin: Any) -> Any | None:
        return self._object(self._function(plugin, _RUNTIME, 7, _POINTER, _POINTER)(None))

    def clone(self, plugin: Any) -> Any | None:
        return self._object(self._function(plugin, 0, 5, _POINTER)())

    def stored_fields(self, plugin: Any) -> _Stored | None:
        collection = self._function(plugin, _RUNTIME, 8, _POINTER)()
        return _Stored(collection) if collection else None

    def core(self, plugin: Any) -> tuple[str, str, str]:
        texts = [self._function(plugin, _CORE, slot, ctypes.c_char_p)() for slot in (4, 5, 6)]
        name, version, namespace = ("missing" if text is None else text.decode() for text in texts)
        return name, version, namespace

    def destroy(self, plugin: Any) -> None:
        self._function(plugin, 0, _DESTRUCTOR, None)()
