"""TensorRT's interfaces as tables of functions, called through ctypes: the plugins in a library without TensorRT.

A C++ object begins with a pointer to its table of virtual functions (Itanium C++ ABI). Order of the functions and
layout of the structures: NvInferRuntime.h, NvInferRuntimeBase.h, NvInferPluginBase.h of TensorRT 10.0 to 11.x; each
interface begins with getAPILanguage, getInterfaceInfo and two destructors.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POINTER = ctypes.c_void_p
CORE, BUILD, RUNTIME = 0, 1, 2
"""PluginCapabilityType."""
DELETE = 3
"""The slot of the destructor that also frees."""


class Dims(ctypes.Structure):
    _fields_ = (("nb", ctypes.c_int32), ("d", ctypes.c_int64 * 8))


class Desc(ctypes.Structure):
    _fields_ = (("dims", Dims), ("type", ctypes.c_int32), ("format", ctypes.c_int32), ("scale", ctypes.c_float))


class DynamicDesc(ctypes.Structure):
    _fields_ = (("desc", Desc), ("min", Dims), ("max", Dims), ("opt", Dims))


class DimsExprs(ctypes.Structure):
    _fields_ = (("nb", ctypes.c_int32), ("d", POINTER * 8))


class FieldStruct(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", POINTER),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    )


class Collection(ctypes.Structure):
    _fields_ = (("nb", ctypes.c_int32), ("fields", ctypes.POINTER(FieldStruct)))


ELEMENT_BYTES = {0: 2, 1: 4, 2: 8, 3: 1, 4: 2, 5: 4, 6: 1, 8: 1, 10: 8}  # bytes an element, by PluginFieldType


class Unknown(int):
    """A size of an axis that is there, and that a plugin is not told while a network is built."""


def operate(operation: int, a: int | None, b: int | None) -> int | None:
    """What TensorRT makes of two sizes: ``trt.DimensionOperation`` by number. None is a size that nobody knows."""
    if a is None or b is None or (operation in (7, 8) and b == 0):
        return None
    known = not isinstance(a, Unknown) and not isinstance(b, Unknown)
    a, b = int(a), int(b)
    found = (a + b, a * b, max(a, b), min(a, b), a - b, int(a == b), int(a < b), b and a // b, b and -(-a // b))[
        operation
    ]
    found = (found + (1 << 63)) % (1 << 64) - (1 << 63)
    return found if known else Unknown(found)


def virtual(this: int, slot: int, result: Any, *types: Any) -> Any:
    """A virtual function of a C++ object, bound to it. The call releases the GIL, as TensorRT does not hold it."""
    table = ctypes.cast(ctypes.cast(this, ctypes.POINTER(POINTER))[0], ctypes.POINTER(POINTER))
    function = ctypes.CFUNCTYPE(result, POINTER, *types)(table[slot])
    return lambda *arguments: function(this, *arguments)


class Expressions:
    """IDimensionExpr objects: constants, and sizes that are not known. Laid out as a C++ compiler would."""

    def __init__(self) -> None:
        self._kept: list[Any] = []
        runtime = ctypes.CDLL("libstdc++.so.6")
        information = ctypes.addressof(POINTER.in_dll(runtime, "_ZTVN10__cxxabiv117__class_type_infoE")) + 16
        self._type, self._builder_type = (
            self._keep((POINTER * 2)(information, self._keep(name)))
            for name in (b"N8nvinfer114IDimensionExprE\0", b"N8nvinfer112IExprBuilderE\0")
        )
        self._values: dict[int, int | None] = {}

    def _keep(self, what: Any) -> int:
        kept = ctypes.create_string_buffer(what) if isinstance(what, bytes) else what
        self._kept.append(kept)
        return ctypes.addressof(kept)

    def make(self, value: int | None) -> int:
        known = value is not None and not isinstance(value, Unknown)
        unused = ctypes.CFUNCTYPE(None, POINTER)(lambda this: None)
        constant = ctypes.CFUNCTYPE(ctypes.c_bool, POINTER)(lambda this: known)
        get = ctypes.CFUNCTYPE(ctypes.c_int64, POINTER)(lambda this: value if known else -1)
        size = ctypes.CFUNCTYPE(ctypes.c_bool, POINTER)(lambda this: False)
        self._kept += [unused, constant, get, size]
        slots = [ctypes.cast(entry, POINTER) for entry in (unused, unused, constant, get, size)]
        table = self._keep((POINTER * 5)(*slots))
        implementation = self._keep((POINTER * 1)(table))
        # offset to top, type information, then the destructors, which nobody calls
        own = self._keep((POINTER * 4)(None, self._type, None, None))
        address = self._keep((POINTER * 2)(own + 16, implementation))
        self._values[address] = value
        return address

    def dims(self, shapes: Sequence[Sequence[int | None]]) -> Any:
        """An array of DimsExprs."""
        made = [DimsExprs(len(shape), (POINTER * 8)(*map(self.make, shape))) for shape in shapes]
        return (DimsExprs * len(made))(*made)

    def builder(self) -> int:
        """An IExprBuilder."""
        unused = ctypes.CFUNCTYPE(None, POINTER)(lambda this: None)
        constant = ctypes.CFUNCTYPE(POINTER, POINTER, ctypes.c_int64)(lambda this, value: self.make(value))
        operation = ctypes.CFUNCTYPE(POINTER, POINTER, ctypes.c_int32, POINTER, POINTER)(
            lambda this, op, first, second: self.make(operate(op, self._values[first], self._values[second]))
        )
        self._kept += [unused, constant, operation]
        slots = (unused, unused, constant, operation)
        table = self._keep((POINTER * 4)(*(ctypes.cast(entry, POINTER) for entry in slots)))
        own = self._keep((POINTER * 4)(None, self._builder_type, None, None))
        return self._keep((POINTER * 2)(own + 16, self._keep((POINTER * 1)(table))))

    def value(self, address: int) -> int | None:
        return self._values[address]


@dataclass(frozen=True)
class Tensor:
    """A tensor's descriptor; with bounds, a dynamic one's."""

    shape: tuple[int, ...]
    type: int = 1  # DataType.HALF
    format: int = 0  # TensorFormat.LINEAR
    largest: tuple[int, ...] | None = None
    smallest: tuple[int, ...] | None = None  # the largest, if not given


@dataclass(frozen=True)
class Field:
    """A field as C++ reads it: its data as bytes."""

    name: str
    type: int
    length: int
    data: bytes


def _dims(shape: Sequence[int]) -> Dims:
    return Dims(len(shape), (ctypes.c_int64 * 8)(*shape))


def _desc(tensor: Tensor) -> Desc:
    return Desc(_dims(tensor.shape), tensor.type, tensor.format, 1.0)


def descs_of(tensors: Sequence[Tensor]) -> Any:
    return (Desc * len(tensors))(*map(_desc, tensors))


def _dynamic(tensors: Sequence[Tensor]) -> Any:
    made = []
    for tensor in tensors:
        most = tensor.largest or tensor.shape
        made.append(DynamicDesc(_desc(tensor), _dims(tensor.smallest or most), _dims(most), _dims(most)))
    return (DynamicDesc * len(tensors))(*made)


class Stored:
    def __init__(self, collection: int) -> None:
        self._collection = ctypes.cast(collection, ctypes.POINTER(Collection)).contents

    def read(self) -> list[Field]:
        fields = (self._collection.fields[index] for index in range(self._collection.nb))
        return [
            Field(
                f.name.decode(),
                f.type,
                f.length,
                ctypes.string_at(f.data or 0, f.length * ELEMENT_BYTES[f.type]) if f.length else b"",
            )
            for f in fields
        ]


def create_through(creator: int, name: str, fields: Sequence[Field], phase: int) -> int | None:
    """The address of the IPluginV3 that a creator's C++ object makes; the fields' memory is gone afterwards."""
    data = [ctypes.create_string_buffer(field.data, max(len(field.data), 1)) for field in fields]
    entries = (FieldStruct * len(fields))(
        *(
            FieldStruct(f.name.encode(), ctypes.addressof(buffer), f.type, f.length)
            for f, buffer in zip(fields, data, strict=True)
        )
    )
    collection = Collection(len(fields), entries)
    call = virtual(creator, 4, POINTER, ctypes.c_char_p, ctypes.POINTER(Collection), ctypes.c_int32)
    made: int | None = call(name.encode(), ctypes.byref(collection), phase)
    for buffer in data:  # TensorRT's memory is gone after the call
        ctypes.memset(buffer, 0xDB, len(buffer))
    return made


class TableCalls:
    """TensorRT's calls on plugins, each answered as C++ sees it; ``None`` where it failed."""

    def _function(self, plugin: Any, part: int, slot: int, result: Any, *types: Any) -> Callable[..., Any]:
        raise NotImplementedError

    def _object(self, address: int | None) -> Any:
        raise NotImplementedError

    def fields_at(self, collection: int) -> list[Field]:
        """The fields of a C++ collection."""
        return Stored(collection).read()

    def output_types(self, plugin: Any, types: Sequence[int]) -> list[int] | None:
        ints = ctypes.POINTER(ctypes.c_int32)
        call = self._function(plugin, 2, 5, ctypes.c_int32, ints, ctypes.c_int32, ints, ctypes.c_int32)
        count = int(plugin.num_outputs)
        out = (ctypes.c_int32 * count)(*[-1] * count)
        status = call(out, count, (ctypes.c_int32 * len(types))(*types), len(types))
        return list(out) if status == 0 else None

    def output_shapes(
        self, plugin: Any, shapes: Sequence[Sequence[int | None]], values: Sequence[Sequence[int | None]] = ()
    ) -> list[list[int | None]] | None:
        expressions = Expressions()
        inputs, read = expressions.dims(shapes), expressions.dims(values) if values else None
        count = int(plugin.num_outputs)
        outputs = (DimsExprs * count)()
        dims, number = ctypes.POINTER(DimsExprs), ctypes.c_int32
        call = self._function(plugin, 2, 6, number, dims, number, dims, number, dims, number, POINTER)
        if call(inputs, len(shapes), read, len(values), outputs, count, expressions.builder()) != 0:
            return None
        return [[expressions.value(out.d[axis]) for axis in range(out.nb)] for out in outputs]

    def supports(self, plugin: Any, position: int, tensors: Sequence[Tensor]) -> bool:
        number = ctypes.c_int32
        call = self._function(plugin, 2, 7, ctypes.c_bool, number, POINTER, number, number)
        return bool(call(position, _dynamic(tensors), len(tensors) - plugin.num_outputs, plugin.num_outputs))

    def configure(self, plugin: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        number = ctypes.c_int32
        call = self._function(plugin, 2, 4, number, POINTER, number, POINTER, number)
        return int(call(_dynamic(inputs), len(inputs), _dynamic(outputs), len(outputs)))

    def tactics(self, plugin: Any) -> list[int] | None:
        count = self._function(plugin, 2, 11, ctypes.c_int32)()
        if count < 0:
            return None
        ids = (ctypes.c_int32 * count)()
        status = self._function(plugin, 2, 10, ctypes.c_int32, POINTER, ctypes.c_int32)(ids, count)
        return list(ids) if status == 0 else None

    def workspace(self, plugin: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        number = ctypes.c_int32
        call = self._function(plugin, 2, 9, ctypes.c_size_t, POINTER, number, POINTER, number)
        return int(call(_dynamic(inputs), len(inputs), _dynamic(outputs), len(outputs)))

    def timing_cache_id(self, plugin: Any) -> str | None:
        text = self._function(plugin, 2, 12, ctypes.c_char_p)()
        return None if text is None else text.decode()

    def set_tactic(self, plugin: Any, tactic: int) -> int:
        return int(self._function(plugin, 3, 4, ctypes.c_int32, ctypes.c_int32)(tactic))

    def on_shape_change(self, plugin: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        number = ctypes.c_int32
        call = self._function(plugin, 3, 5, number, POINTER, number, POINTER, number)
        return int(call(descs_of(inputs), len(inputs), descs_of(outputs), len(outputs)))

    def prepared_enqueue(
        self, plugin: Any, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int
    ) -> Any:
        """A function of no arguments that enqueues, for timing."""
        call = self._function(plugin, 3, 6, ctypes.c_int32, *[POINTER] * 6)
        descs = descs_of([Tensor((1,) * 4)] * 8)  # as many as any plugin of ours has
        sources = (POINTER * len(inputs))(*inputs)
        targets = (POINTER * len(outputs))(*outputs)
        return lambda: call(descs, descs, sources, targets, workspace, stream)

    def enqueue(self, plugin: Any, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int) -> int:
        return int(self.prepared_enqueue(plugin, inputs, outputs, workspace, stream)())

    def attach(self, plugin: Any) -> Any | None:
        return self._object(self._function(plugin, 3, 7, POINTER, POINTER)(None))

    def clone(self, plugin: Any) -> Any | None:
        return self._object(self._function(plugin, 0, 5, POINTER)())

    def stored_fields(self, plugin: Any) -> Stored | None:
        collection = self._function(plugin, 3, 8, POINTER)()
        return Stored(collection) if collection else None

    def core(self, plugin: Any) -> tuple[str, str, str]:
        texts = [self._function(plugin, 1, slot, ctypes.c_char_p)() for slot in (4, 5, 6)]
        name, version, namespace = ("missing" if text is None else text.decode() for text in texts)
        return name, version, namespace

    def destroy(self, plugin: Any) -> None:
        self._function(plugin, 0, 2, None)()


class TablePlugin:
    """One plugin in C; deleted with this object, unless TensorRT's ``delete`` came first."""

    def __init__(self, address: int) -> None:
        self.address = address
        capability = virtual(address, 4, POINTER, ctypes.c_int32)
        self.parts = [address, *(int(capability(kind)) for kind in range(3))]

    @property
    def num_outputs(self) -> int:
        return int(virtual(self.parts[2], 8, ctypes.c_int32)())

    def delete(self) -> None:
        address, self.address = self.address, 0
        if address:
            virtual(address, DELETE, None)()

    def __del__(self) -> None:
        self.delete()


class Logger:
    """An ILoggerFinder with a logger that keeps what it is told.

    Attributes:
        lines: severity (1 error, 2 warning, 3 information) and text.
        finder: the object that ``setLoggerFinder`` takes.
    """

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []
        log = ctypes.CFUNCTYPE(None, POINTER, ctypes.c_int32, ctypes.c_char_p)(self._log)
        self._kept: list[Any] = [log]
        logger = (POINTER * 1)(ctypes.addressof(self._table(log)))
        find = ctypes.CFUNCTYPE(POINTER, POINTER)(lambda this: ctypes.addressof(logger))
        self.finder = (POINTER * 1)(ctypes.addressof(self._table(find)))
        self._kept += [find, logger]

    def _table(self, entry: Any) -> Any:
        own = ctypes.cast(entry, POINTER)
        table = (POINTER * 5)(own, None, None, None, own)  # where TensorRT 10 has it, and where 11 has it
        self._kept.append(table)
        return table

    def _log(self, this: int, severity: int, text: bytes) -> None:
        self.lines.append((severity, text.decode(errors="replace")))


class LibraryTables(TableCalls):
    """The calls on what a library's ``getCreators`` hands out.

    Args:
        library: its path.
        logger: what is told of failures.
    """

    def __init__(self, library: Path, logger: Logger | None = None) -> None:
        self.c = ctypes.CDLL(str(library))
        self.logger = Logger() if logger is None else logger
        self.c.setLoggerFinder(POINTER(ctypes.addressof(self.logger.finder)))
        self.c.getCreators.restype = ctypes.POINTER(POINTER)
        self.c.pyfmha_last_error.restype = ctypes.c_char_p
        count = ctypes.c_int32()
        creators = self.c.getCreators(ctypes.byref(count))
        self.creators = [int(creators[index] or 0) for index in range(count.value)]

    def error(self) -> str:
        """The text of the last failure on this thread."""
        return str(self.c.pyfmha_last_error().decode(errors="replace"))

    def named(self, name: str) -> int:
        """A creator by the name of its operator."""
        (found,) = (creator for creator in self.creators if virtual(creator, 6, ctypes.c_char_p)() == name.encode())
        return found

    def _function(self, plugin: Any, part: int, slot: int, result: Any, *types: Any) -> Callable[..., Any]:
        return virtual(plugin.parts[part], slot, result, *types)  # type: ignore[no-any-return]

    def _object(self, address: int | None) -> TablePlugin | None:
        return TablePlugin(address) if address else None

    def create(self, creator: Any, name: str, fields: Sequence[Field], phase: int) -> TablePlugin | None:
        return self._object(create_through(creator, name, fields, phase))

    def field_names(self, creator: int) -> list[tuple[str, int]]:
        """Names and types of a creator's fields."""
        return [(field.name, field.type) for field in self.fields_at(virtual(creator, 5, POINTER)())]
