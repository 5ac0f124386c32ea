"""A double of TensorRT's Python binding: a module with its classes, and the calls of its trampolines.

It follows ``TENSORRT.md``, above all where that is unkind: what returns is ignored, what raises is a failure or
silently False or 0; C++ keeps pointers, not Python objects; name, outputs and cache id live in C++ objects that a
clone does not inherit.
"""

import ctypes
import struct as _struct
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from pyfmha.trt.tables import LibraryTables, Logger, virtual
from trt_double import Field, Tensor, Unknown, operate

POISON = 0xDB  # what freed memory holds
_ELEMENT = {0: 2, 1: 4, 2: 8, 3: 1, 4: 2, 5: 4, 6: 1, 7: 4, 8: 1, 9: 2, 10: 8}
_NUMPY = {1: np.float32, 2: np.float64, 3: np.int8, 4: np.int16, 5: np.int32, 6: np.int8, 8: np.int8, 10: np.int64}


class DataType(IntEnum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64 = range(9)


class TensorFormat(IntEnum):
    LINEAR, CHW2 = range(2)


class PluginFieldType(IntEnum):
    FLOAT16, FLOAT32, FLOAT64, INT8, INT16, INT32, CHAR, DIMS, UNKNOWN, BF16, INT64 = range(11)


class TensorRTPhase(IntEnum):
    BUILD, RUNTIME = range(2)


class PluginCapabilityType(IntEnum):
    CORE, BUILD, RUNTIME = range(3)


class DimensionOperation(IntEnum):
    SUM, PROD, MAX, MIN, SUB, EQUAL, LESS, FLOOR_DIV, CEIL_DIV = range(9)


class _Memory:
    """A pointer and a length in elements: it does not keep what it points to."""

    def __init__(self, name: str, data: Any, kind: PluginFieldType, length: int) -> None:
        self.name, self.kind, self.length = name, kind, length
        try:
            self._owner: Callable[[], Any] = weakref.ref(data)
        except TypeError:  # bytes have no weak references: taken to live for ever
            self._owner = lambda: data

    def read(self) -> bytes:
        wanted = self.length * _ELEMENT[self.kind]
        owner = self._owner()
        content = b"" if owner is None else bytes(memoryview(owner).cast("B")) if self.length else b""
        return content[:wanted].ljust(wanted, bytes([POISON]))

    def address(self) -> int | None:
        """Where the data is, if it is an array that is still there."""
        owner = self._owner()
        return int(owner.ctypes.data) if isinstance(owner, np.ndarray) else None


class _Struct(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    )


class PluginField(float):
    """As the binding's, in memory too: behind the object's header lies a pointer to the C struct. That is where a float
    keeps its number, so this one's bits are that pointer."""

    def __new__(
        cls, name: str = "", data: Any = None, type: PluginFieldType = PluginFieldType.UNKNOWN
    ) -> "PluginField":
        buffer = memoryview(b"" if data is None else data)
        field = cls.of(_Memory(name, data, type, int(np.prod(buffer.shape))))
        field._kept = data
        return field

    @classmethod
    def of(cls, memory: _Memory) -> "PluginField":
        content = ctypes.create_string_buffer(memory.read())
        data = memory.address() or ctypes.addressof(content)
        struct = _Struct(memory.name.encode(), data, memory.kind, memory.length)
        (bits,) = _struct.unpack("d", _struct.pack("Q", ctypes.addressof(struct)))
        field = super().__new__(cls, bits)
        field.memory, field._behind = memory, (struct, content)
        return field

    @property
    def name(self) -> str:
        return self.memory.name

    @property
    def type(self) -> PluginFieldType:
        return self.memory.kind

    @property
    def size(self) -> int:
        return self.memory.length

    @property
    def data(self) -> Any:
        if self.memory.kind not in _NUMPY:
            raise AttributeError("No known conversion for returning data from PluginField")
        return np.frombuffer(self.memory.read(), _NUMPY[self.memory.kind]).copy()


class RepeatingField(PluginField):
    """As that of TensorRT 10.8 to 10.15.1 under numpy 2: ``data`` repeats its first element."""

    @property
    def data(self) -> Any:
        content = super().data
        return np.repeat(content[:1], len(content))


class PluginFieldCollection:
    """A vector of copies of the fields' structs; the Python objects are not kept."""

    field = PluginField

    def __init__(self, fields: Iterable[PluginField] = ()) -> None:
        self.structs = [field.memory for field in fields]

    def __len__(self) -> int:
        return len(self.structs)

    def __getitem__(self, index: int) -> PluginField:
        return self.field.of(self.structs[index])


class _RepeatingCollection(PluginFieldCollection):
    field = RepeatingField


class PluginFieldCollection_:
    """A length and a pointer to a vector's elements."""

    def __init__(self, vector: PluginFieldCollection) -> None:
        self._kept = vector
        self.vector = weakref.ref(vector)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> PluginField:
        return self._kept[index]


class Dims(tuple):
    __slots__ = ()


class PluginTensorDesc:
    def __init__(self) -> None:
        self.dims, self.type, self.format, self.scale = Dims(), DataType.FLOAT, TensorFormat.LINEAR, 0.0


class DynamicPluginTensorDesc:
    def __init__(self) -> None:
        self.desc = PluginTensorDesc()
        self.min = self.opt = self.max = Dims()


class IDimensionExpr:
    def __init__(self, value: int | None) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return self.value is not None and not isinstance(self.value, Unknown)

    def get_constant_value(self) -> int:
        return self.value if self.value is not None and self.is_constant() else -1


class DimsExprs(list):
    pass


class IExprBuilder:
    def constant(self, value: int) -> IDimensionExpr:
        return IDimensionExpr(value)

    def operation(self, op: DimensionOperation, first: IDimensionExpr, second: IDimensionExpr) -> IDimensionExpr:
        return IDimensionExpr(operate(op, first.value, second.value))


class _Made(type):
    """Refuses an object for which a base's ``__init__`` was not called, as pybind11 does."""

    def __call__(cls, *arguments: Any, **keywords: Any) -> Any:
        made = super().__call__(*arguments, **keywords)
        for base in cls.__mro__:
            if "cpp" in vars(base) and base.__name__ not in _cpp[made]:
                raise TypeError(f"{base.__name__}.__init__() must be called when overriding __init__")
        return made


# The C++ objects: not in an instance's __dict__, and not copied with it.
_cpp: "weakref.WeakKeyDictionary[Any, dict[str, Any]]" = weakref.WeakKeyDictionary()


class _Bound(metaclass=_Made):
    def __init__(self) -> None:
        raise TypeError("call the __init__ of each base")


def _property(name: str, kind: type) -> property:
    def get(self: Any) -> Any:
        if name not in _cpp[self]:
            raise AttributeError(f"{name} not initialized")
        return _cpp[self][name]

    def put(self: Any, value: Any) -> None:
        if not isinstance(value, kind):
            raise TypeError(f"{name}: incompatible function arguments: {value!r}")
        _cpp[self][name] = value

    return property(get, put)


def _base(name: str, /, **properties: type) -> Any:
    def init(self: Any) -> None:
        _cpp.setdefault(self, {})[name] = True

    members = {key: _property(key, kind) for key, kind in properties.items()}
    return _Made(name, (_Bound,), {"__init__": init, "cpp": True, **members})


class _NoDims:
    """The shape of an output that its plugin refused, up to 11.1: of -1 dimensions, so ``len()`` is a ValueError."""

    def __len__(self) -> int:
        return -1


class ITensor:
    def __init__(self, name: str, dtype: DataType, shape: tuple[int, ...]) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape

    @property
    def shape(self) -> Any:
        if self._shape is None:
            raise RuntimeError("Could not get tensor shape.")
        return self._shape

    @shape.setter
    def shape(self, shape: Any) -> None:
        self._shape = shape

    @classmethod
    def refused(cls, name: str, version: str) -> "ITensor":
        """An output whose plugin refused to say its type or shape."""
        return cls(name, DataType.FLOAT, None if version_of(version) > (11, 1) else _NoDims())


def version_of(text: str) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(map(int, text.split(".")[:2]))


class _Layer:
    def __init__(self, outputs: list[ITensor], plugin: Any) -> None:
        self.name = "(Unnamed Layer* 0) [PluginV3]"
        self._outputs, self.plugin = outputs, plugin
        self.inputs: list[ITensor] = []

    def get_output(self, index: int) -> ITensor | None:
        return self._outputs[index] if index < len(self._outputs) else None


class INetworkDefinition:
    """A network of plugin layers: what fails is a tensor without a shape."""

    def __init__(self) -> None:
        self.layers: list[_Layer] = []

    def add_input(self, name: str, dtype: DataType, shape: Sequence[int]) -> ITensor:
        return ITensor(name, dtype, tuple(shape))

    def add_plugin_v3(self, inputs: Sequence[ITensor], shape_inputs: Sequence[ITensor], plugin: Any) -> _Layer | None:
        calls = DoubleCalls(sys.modules[type(self).__module__])
        calls.keep(plugin)
        copy = calls.clone(plugin)
        if copy is None:
            return None
        kinds = calls.output_types(copy, [int(tensor.dtype) for tensor in inputs])
        shapes = calls.output_shapes(copy, [[None if size < 0 else size for size in t.shape] for t in inputs])
        if kinds is None or shapes is None:
            outputs = [ITensor.refused("output", calls.trt.__version__)] * copy.num_outputs
        else:
            outputs = [
                ITensor("output", DataType(kind), tuple(-1 if size is None else size for size in shape))
                for kind, shape in zip(kinds, shapes, strict=True)
            ]
        self.layers.append(_Layer(outputs, copy))
        self.layers[-1].inputs = list(inputs)
        return self.layers[-1]


class LibraryCreator:
    """As the registry shows a creator in C."""

    def __init__(self, tables: LibraryTables, address: int) -> None:
        self.tables, self.address = tables, address
        names = [virtual(address, slot, ctypes.c_char_p)().decode() for slot in (6, 7, 8)]
        self.name, self.plugin_version, self.plugin_namespace = names
        self.field_names = [
            PluginField(name, None, PluginFieldType(kind)) for name, kind in tables.field_names(address)
        ]


class Registry:
    """The process's, or a runtime's own, whose parent is asked for what it lacks (``parent_search_enabled``)."""

    def __init__(self, parent: "Registry | None" = None) -> None:
        self._creators: dict[tuple[str, str, str], Any] = {}
        self._parent = parent
        self.loaded: list[str] = []

    def load_library(self, plugin_path: str, logger: Logger | None = None) -> LibraryTables | None:
        """None for a path that is loaded, as lean has it, and for what is no library."""
        if plugin_path in self.loaded:
            return None
        try:
            tables = LibraryTables(Path(plugin_path), logger)
        except OSError:
            return None
        self.loaded.append(plugin_path)
        for address in tables.creators:
            creator = LibraryCreator(tables, address)
            self._creators[creator.name, creator.plugin_version, creator.plugin_namespace] = creator
        return tables

    def register_creator(self, creator: Any, plugin_namespace: str = "") -> bool:
        key = (creator.name, creator.plugin_version, plugin_namespace)
        if key in self._creators:
            return False
        self._creators[key] = creator
        return True

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> Any | None:
        key = (type, version, plugin_namespace)
        inherited = None if self._parent is None else self._parent.get_creator(*key)
        return self._creators.get(key, inherited)


_numbers = count()


def make_binding(name: str | None = None, *, repeats: bool = False) -> Any:
    """A new module of its own classes, in ``sys.modules`` under its name; its registry is empty.

    ``repeats`` is for one of TensorRT 10.8 to 10.15.1 under numpy 2, see :class:`RepeatingField`.
    """
    module: Any = types.ModuleType(name or f"trt_double_{next(_numbers)}")
    for shared in (
        *(DataType, TensorFormat, PluginFieldType, TensorRTPhase, PluginCapabilityType, PluginField),
        *(PluginFieldCollection, PluginFieldCollection_, Dims, PluginTensorDesc, DynamicPluginTensorDesc),
        *(IDimensionExpr, DimsExprs, IExprBuilder, DimensionOperation, ITensor),
    ):
        setattr(module, shared.__name__, shared)
    module.__version__ = "11.4.double"
    if repeats:
        module.__version__ = "10.15.double"
        module.PluginField, module.PluginFieldCollection = RepeatingField, _RepeatingCollection
    module.IPluginV3 = _base("IPluginV3")
    module.IPluginV3OneCore = _base("IPluginV3OneCore", plugin_name=str, plugin_version=str, plugin_namespace=str)
    module.IPluginV3OneBuild = _base("IPluginV3OneBuild", num_outputs=int, timing_cache_id=str)
    module.IPluginV3OneRuntime = _base("IPluginV3OneRuntime")
    module.IPluginCreatorV3One = _base(
        "IPluginCreatorV3One",
        name=str,
        plugin_version=str,
        plugin_namespace=str,
        field_names=PluginFieldCollection,
    )
    module.INetworkDefinition = type("INetworkDefinition", (INetworkDefinition,), {"__module__": module.__name__})
    registry = Registry()
    module.get_plugin_registry = lambda: registry
    sys.modules[module.__name__] = module
    return module


class _Stored:
    """What the trampoline keeps: a copy of the length and of the pointer."""

    def __init__(self, collection: PluginFieldCollection_) -> None:
        self._vector = collection.vector
        self._length = len(collection)

    def read(self) -> list[Field]:
        vector = self._vector()
        if vector is None:
            return [Field("\xdb", POISON, POISON, bytes([POISON]))] * self._length
        return [Field(m.name, int(m.kind), m.length, m.read()) for m in vector.structs]


class DoubleCalls:
    """See :class:`trt_double.Calls`. What goes to stderr in the binding is collected in ``errors``."""

    def __init__(self, trt: Any) -> None:
        self.trt = trt
        self.errors: list[str] = []
        self.kept: list[Any] = []  # what the binding keeps for ever: every plugin that C++ has had in its hands

    def _try(self, plugin: Any, call: str, failed: Any, use: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return use(getattr(plugin, call)(*arguments))
        except Exception as error:
            self.errors.append(f"Exception thrown from {call}() {error}")
            return failed

    def _status(self, plugin: Any, call: str, *arguments: Any) -> int:
        return self._try(plugin, call, -1, lambda ignored: 0, *arguments)

    def _plugin(self, made: Any) -> Any:
        if not isinstance(made, self.trt.IPluginV3):
            raise TypeError("Return value could not be interpreted as nvinfer1::IPluginV3")
        self.keep(made)
        return made

    def keep(self, plugin: Any) -> None:
        """As the binding, which gives up its hold on a plugin (``.release()``) without ever letting it go."""
        if not any(other is plugin for other in self.kept):
            self.kept.append(plugin)

    def _descs(self, tensors: Sequence[Tensor]) -> list[Any]:
        return [self._desc(tensor) for tensor in tensors]

    def _desc(self, tensor: Tensor) -> Any:
        desc = self.trt.PluginTensorDesc()
        desc.dims, desc.type = self.trt.Dims(tensor.shape), self.trt.DataType(tensor.type)
        desc.format = self.trt.TensorFormat(tensor.format)
        return desc

    def _dynamic(self, tensors: Sequence[Tensor]) -> list[Any]:
        made = []
        for tensor in tensors:
            dynamic = self.trt.DynamicPluginTensorDesc()
            dynamic.desc = self._desc(tensor)
            dynamic.min = dynamic.opt = dynamic.max = self.trt.Dims(tensor.largest or tensor.shape)
            if tensor.smallest is not None:
                dynamic.min = self.trt.Dims(tensor.smallest)
            made.append(dynamic)
        return made

    def create(self, creator: Any, name: str, fields: Sequence[Field], phase: int) -> Any | None:
        data = [np.frombuffer(bytearray(field.data), np.uint8) for field in fields]
        structs = (
            _Memory(f.name, array, PluginFieldType(f.type), f.length) for f, array in zip(fields, data, strict=True)
        )
        vector = self.trt.PluginFieldCollection()
        vector.structs = list(structs)
        phase = self.trt.TensorRTPhase(phase)
        plugin = self._try(
            creator, "create_plugin", None, self._plugin, name, self.trt.PluginFieldCollection_(vector), phase
        )
        for array in data:  # TensorRT's memory is gone after the call
            array[:] = POISON
        return plugin

    def output_types(self, plugin: Any, types: Sequence[int]) -> list[int] | None:
        def use(kinds: Any) -> list[int]:
            if len(kinds) != plugin.num_outputs:
                raise RuntimeError("a list with a different length than num_outputs")
            return [int(kind) for kind in kinds]

        kinds = [self.trt.DataType(kind) for kind in types]
        return self._try(plugin, "get_output_data_types", None, use, kinds)

    def output_shapes(
        self, plugin: Any, shapes: Sequence[Sequence[int | None]], values: Sequence[Sequence[int | None]] = ()
    ) -> list[list[int | None]] | None:
        """The outputs' shapes; ``values`` are those of the inputs whose values are read."""

        def use(outputs: Any) -> list[list[int | None]]:
            if len(outputs) != plugin.num_outputs or not all(isinstance(dims, DimsExprs) for dims in outputs):
                raise RuntimeError("Return value could not be interpreted as std::vector<DimsExprs>")
            return [[expression.value for expression in dims] for dims in outputs]

        inputs, read = ([DimsExprs(map(IDimensionExpr, sizes)) for sizes in given] for given in (shapes, values))
        return self._try(plugin, "get_output_shapes", None, use, inputs, read, IExprBuilder())

    def supports(self, plugin: Any, position: int, tensors: Sequence[Tensor]) -> bool:
        return self._try(
            plugin,
            "supports_format_combination",
            False,
            bool,
            position,
            self._dynamic(tensors),
            len(tensors) - plugin.num_outputs,
        )

    def configure(self, plugin: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        return self._status(plugin, "configure_plugin", self._dynamic(inputs), self._dynamic(outputs))

    def tactics(self, plugin: Any) -> list[int] | None:
        return self._try(plugin, "get_valid_tactics", None, lambda ids: [ctypes.c_int32(i).value for i in ids])

    def workspace(self, plugin: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        return self._try(plugin, "get_workspace_size", 0, int, self._dynamic(inputs), self._dynamic(outputs))

    def timing_cache_id(self, plugin: Any) -> str | None:
        return _cpp[plugin].get("timing_cache_id")

    def set_tactic(self, plugin: Any, tactic: int) -> int:
        return self._status(plugin, "set_tactic", tactic)

    def on_shape_change(self, plugin: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        _cpp[plugin]["seen"] = (len(inputs), len(outputs))
        return self._status(plugin, "on_shape_change", self._descs(inputs), self._descs(outputs))

    def prepared_enqueue(
        self, plugin: Any, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int
    ) -> Callable[[], int]:
        """A function of no arguments that enqueues."""
        sources, targets = _cpp[plugin].get("seen", (0, 0))
        descs: Iterator[list[Any]] = (self._descs([Tensor((1,) * 4)] * n) for n in (sources, targets))
        arguments = (*descs, list(inputs)[:sources], list(outputs)[:targets], workspace, stream)
        return lambda: self._status(plugin, "enqueue", *arguments)

    def enqueue(self, plugin: Any, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int) -> int:
        return self.prepared_enqueue(plugin, inputs, outputs, workspace, stream)()

    def attach(self, plugin: Any) -> Any | None:
        return self._try(plugin, "attach_to_context", None, self._plugin, None)

    def clone(self, plugin: Any) -> Any | None:
        return self._try(plugin, "clone", None, self._plugin)

    def stored_fields(self, plugin: Any) -> _Stored | None:
        def use(collection: Any) -> _Stored:
            if isinstance(collection, PluginFieldCollection):  # converted, and the result dropped
                collection = PluginFieldCollection_(collection)
            return _Stored(collection)

        return self._try(plugin, "get_fields_to_serialize", None, use)

    def core(self, plugin: Any) -> tuple[str, str, str]:
        state = _cpp[plugin]
        keys = ("plugin_name", "plugin_version", "plugin_namespace")
        name, version, namespace = (state.get(key, "missing") for key in keys)
        return name, version, namespace

    def destroy(self, plugin: Any) -> None:
        self._try(plugin, "destroy", None, lambda ignored: None)
