"""The double's runtime: engines and execution contexts, which refuse what TensorRT refuses and say it to the logger."""

import _ctypes
import base64
import json
import tempfile
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np

from pyfmha.trt.tables import LibraryTables, Logger
from trt_double import RUNTIME, Field, Tensor
from trt_double.binding import DataType, Dims, Registry
from trt_double.full.builder import MAGIC
from trt_double.full.gpu import KERNEL_MS, gpu
from trt_double.full.network import COMPUTE, STORAGE, axes_shape, to_numbers, to_stored

UNUSED_PROFILE = "does not satisfy any optimization profiles"


class TensorIOMode(IntEnum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(IntEnum):
    DEVICE, HOST = range(2)


class _RuntimeLogger(Logger):
    """That of a runtime, as plugins in C see it."""

    def __init__(self, runtime: "Runtime") -> None:
        super().__init__()
        self._logger, self._severity = runtime.logger, runtime.trt.ILogger.Severity

    def _log(self, this: int, severity: int, text: bytes) -> None:
        self._logger.log(self._severity(severity), text.decode(errors="replace"))


class Runtime:
    def __init__(self, trt: Any, logger: Any) -> None:
        assert isinstance(logger, trt.ILogger)
        trt.double.check_driver(logger)
        self.trt, self.logger = trt, logger
        # Without a GPU the object comes to be all the same, and the next call crashes: seen with tensorrt_lean 11.4.
        self.engine_host_code_allowed = False
        self.registry = Registry(trt.get_plugin_registry())
        self.temporary_directory = tempfile.gettempdir()
        self._libraries: list[LibraryTables] = []
        self._dead = not trt.double.use_runtime_context()
        if self._dead:
            self._error(
                "createInferRuntime: Error Code 6: API Usage Error (CUDA initialization failure with error: 35)"
            )

    def __del__(self) -> None:
        """The libraries go with the runtime, and their code with them: no engine may be left."""
        for tables in getattr(self, "_libraries", ()):
            _ctypes.dlclose(tables.c._handle)

    def _error(self, text: str) -> None:
        self.logger.log(self.trt.ILogger.ERROR, text)

    def _load_libraries(self, contents: Sequence[str]) -> bool:
        """Each is written to a file, which goes once it is loaded: a copy with statics of its own, nothing beside it.
        It goes into the runtime's own registry, which is looked at before the process's.
        """
        for content in contents:
            with tempfile.NamedTemporaryFile(suffix=".so", dir=self.temporary_directory) as file:
                file.write(content.encode("latin-1"))
                file.flush()
                tables = self.registry.load_library(file.name, _RuntimeLogger(self))
            if tables is None:
                self._error(f"IRuntime::deserializeCudaEngine: Error Code 3: {file.name}: cannot be loaded")
                return False
            self._libraries.append(tables)
        return True

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> "Engine | None":
        assert not self._dead, "the real TensorRT crashes here"
        content = bytes(serialized_engine)
        if not content.startswith(MAGIC):
            self._error("IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magicTag mismatch)")
            return None
        plan = json.loads(content[len(MAGIC) :])
        lean = self.trt.__name__ != "tensorrt" and not hasattr(self.trt, "Builder")
        if (plan["version"] != self.trt.__version__ or lean) and not plan["compatible"]:
            self._error(f"Error Code 1: Serialization (Version tag does not match: {plan['version']})")
            return None
        if plan["libraries"] and not self.engine_host_code_allowed:
            self._error("Error Code 3: API Usage Error (the plan has host code, and engineHostCodeAllowed is false)")
            return None
        if not self._load_libraries(plan["libraries"]):
            return None
        plugins: dict[str, Any] = {}
        for layer in plan["layers"]:
            if layer["kind"] == "plugin":
                name, version, namespace = layer["params"]["core"]
                creator = self.registry.get_creator(name, version, namespace)
                if creator is None:
                    self._error(f"Error Code 4: Cannot find plugin: {name}, version: {version}, namespace:{namespace}.")
                    return None
                fields = [Field(n, t, count, base64.b64decode(d)) for n, t, count, d in layer["params"]["fields"]]
                plugins[layer["output"]] = self.trt.double.calls.create(creator, layer["name"], fields, RUNTIME)
                if plugins[layer["output"]] is None:
                    self._error(f"Error Code 2: Internal Error (plugin {layer['name']} could not be created)")
                    return None
        return Engine(self, plan, plugins)


class Engine:
    def __init__(self, runtime: Runtime, plan: dict[str, Any], plugins: dict[str, Any]) -> None:
        self.runtime, self.plan, self.plugins = runtime, plan, plugins
        self.trt = runtime.trt
        self._names = [*plan["inputs"], *plan["outputs"]]
        self.num_io_tensors = len(self._names)
        self.num_optimization_profiles = len(plan["profiles"])

    def __del__(self) -> None:
        for plugin in self.plugins.values():
            self.trt.double.calls.destroy(plugin)

    def get_tensor_name(self, index: int) -> str:
        return str(self._names[index])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.plan["inputs"] else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self.plan["tensors"][name][0])

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(self.plan["tensors"][name][1])

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation(name in self.plan["on_host"])

    def get_tensor_vectorized_dim(self, name: str) -> int:
        return -1

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        return [Dims(shape) for shape in self.plan["profiles"][profile_index]["shapes"][name]]

    def get_tensor_profile_values(self, name: int, profile_index: str) -> list[list[int]]:
        """The binding's keywords are the wrong way round: the first argument is the profile."""
        if not isinstance(name, int):
            raise TypeError("get_tensor_profile_values(): incompatible function arguments")
        return list(self.plan["profiles"][name]["values"].get(profile_index, []))

    def create_execution_context(self) -> "Context | None":
        calls = self.trt.double.calls
        attached = {}
        for layer in self.plan["layers"]:
            if layer["kind"] == "plugin":
                original = self.plugins[layer["output"]]
                clone = calls.attach(original)
                if clone is None or calls.set_tactic(clone, layer["params"]["tactic"]) != 0:
                    self.runtime._error(
                        "IExecutionContext::createExecutionContext: Error Code 2: attachToContext failed"
                    )
                    return None
                assert clone is not original, "attach_to_context must return a clone"
                attached[layer["output"]] = clone
        return Context(self, attached)


class Context:
    """Reads nothing of Python's but addresses; what goes on in a plugin is known by status only."""

    def __init__(self, engine: Engine, plugins: dict[str, Any]) -> None:
        self.engine, self.plugins, self.plan = engine, plugins, engine.plan
        self.active_optimization_profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}
        self._prepared: dict[str, Any] = {}
        self._own: dict[str, int] = {}
        device = gpu()
        largest = self._all_shapes({n: tuple(s[2]) for n, s in self.plan["profiles"][0]["shapes"].items()}, {})
        for layer in self.plan["layers"]:
            name = layer["output"]
            for other in layer["more"]:
                if other not in self.plan["outputs"]:
                    self._own[other] = device.allocate(max(self._nbytes(other, largest[other]), 1))
            if layer["kind"] == "plugin":
                # Of the size that was asked for and not a byte more.
                self._own[f"{name} workspace"] = device.allocate(max(layer["params"]["workspace"], 1))
            if name not in self.plan["outputs"] and largest.get(name) is not None:
                self._own[name] = device.allocate(max(self._nbytes(name, largest[name]), 1))

    def __del__(self) -> None:
        for plugin in self.plugins.values():
            self.engine.trt.double.calls.destroy(plugin)
        for address in self._own.values():
            gpu().memory.pop(address, None)

    def _error(self, text: str) -> None:
        self.engine.runtime._error(text)

    def _dtype(self, name: str) -> DataType:
        return self.engine.get_tensor_dtype(name)

    def _nbytes(self, name: str, shape: tuple[int, ...]) -> int:
        return int(np.prod(shape, dtype=np.int64)) * np.dtype(STORAGE[self._dtype(name)]).itemsize

    def _all_shapes(self, shapes: dict[str, tuple[int, ...]], values: dict[str, Any]) -> dict[str, Any]:
        """Every tensor's shape; None where it depends on data."""
        found: dict[str, Any] = dict(shapes)
        for layer in self.plan["layers"]:
            sources = [found.get(name) for name in layer["inputs"]]
            kind, params = layer["kind"], layer["params"]
            if None in sources and kind != "constant":
                shape = None
            elif kind == "plugin":
                shape, *others = (axes_shape(axes, sources) for axes in params["axes"])
                found.update(zip(layer["more"], others, strict=True))
            elif kind == "constant":
                shape = tuple(params["shape"])
            elif kind == "product":
                shape = np.broadcast_shapes(*sources)
            elif kind == "reshape":
                shape = tuple(values[layer["inputs"][1]]) if layer["inputs"][1] in values else None
            else:
                shape = None if kind == "nonzero" else sources[0]
            found[layer["output"]] = shape
        return found

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """True, or an exception."""
        if profile_index in self.engine.trt.double.refused_profiles:
            self._error(f"setOptimizationProfileAsync: Error Code 3: Profile {profile_index} is in use")
            raise RuntimeError("Error in set optimization profile async.")
        self.active_optimization_profile = profile_index
        self._shapes.clear()
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        profile = self.plan["profiles"][self.active_optimization_profile]["shapes"][name]
        low, _, high = profile
        if len(shape) != len(low) or not all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True)):
            self._error(f"setInputShape: Error Code 3: Set dimension {list(shape)} for tensor {name} {UNUSED_PROFILE}")
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if memory == 0:
            self._error(f"setTensorAddress given null for {name}")
            return False
        self._addresses[name] = memory
        return True

    def set_output_allocator(self, name: str, output_allocator: Any) -> bool:
        assert isinstance(output_allocator, self.engine.trt.IOutputAllocator)
        self._allocators[name] = output_allocator
        return True

    def _current(self) -> dict[str, Any]:
        values = {}
        for name in self.plan["on_host"]:
            if name in self._addresses:
                size = int(np.prod(self._shapes.get(name, ())))
                kind = np.dtype(STORAGE[self._dtype(name)])
                raw = (np.ctypeslib.ctypes.c_ubyte * (size * kind.itemsize)).from_address(self._addresses[name])
                values[name] = np.frombuffer(bytes(raw), kind).tolist()
        return self._all_shapes(self._shapes, values)

    def infer_shapes(self) -> list[str]:
        missing = [name for name in self.plan["inputs"] if name not in self._shapes]
        return missing + [name for name in self.plan["on_host"] if name not in self._addresses]

    def get_tensor_shape(self, name: str) -> Dims:
        shape = self._current().get(name)
        return Dims(self.engine.get_tensor_shape(name) if shape is None else shape)

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle, "the default stream costs synchronisation"
        unset = [
            n
            for n in self.plan["inputs"] + self.plan["outputs"]
            if n not in self._addresses and n not in self._allocators
        ]
        if self.infer_shapes() or unset:
            self._error(
                f"IExecutionContext::enqueueV3: Error Code 3: API Usage Error (no address or shape for {unset})"
            )
            return False
        shapes = self._current()
        for layer in self.plan["layers"]:
            if layer["kind"] == "plugin":
                done = self._run_plugin(layer, shapes, stream_handle)
            elif layer["kind"] == "nonzero":
                done = self._run_nonzero(layer, shapes, stream_handle)
            else:
                done = self._run_op(layer, shapes, stream_handle)
            if not done:
                return False
        return True

    def _address(self, name: str) -> int:
        return self._addresses.get(name) or self._own[name]

    def _run_plugin(self, layer: dict[str, Any], shapes: dict[str, Any], stream: int) -> bool:
        calls, plugin, output = self.engine.trt.double.calls, self.plugins[layer["output"]], layer["output"]
        names, count = [*layer["inputs"], output, *layer["more"]], len(layer["inputs"])
        tensors = [Tensor(shapes[name], int(self._dtype(name))) for name in names]
        pointers = [self._address(name) for name in names]
        # On the hot path, after a change of shapes or addresses.
        if self._prepared.get(output) != (tensors, pointers):
            self._prepared.pop(output, None)
            if calls.on_shape_change(plugin, tensors[:count], tensors[count:]) != 0:
                self._error("IExecutionContext::enqueueV3: Error Code 2: Internal Error (onShapeChange failed)")
                return False
            self._prepared[output] = (tensors, pointers)
        workspace = self._own[f"{output} workspace"]
        if calls.enqueue(plugin, pointers[:count], pointers[count:], workspace, stream) != 0:
            self._error("IExecutionContext::enqueueV3: Error Code 2: Internal Error (enqueue failed)")
            return False
        gpu().drain()
        return True

    def _numbers(self, names: list[str], shapes: dict[str, Any]) -> list[Any]:
        device = gpu()
        return [
            to_numbers(device.array(self._address(name), shapes[name], STORAGE[self._dtype(name)]), self._dtype(name))
            if name not in self.plan["on_host"]
            else shapes[name]
            for name in names
        ]

    def _run_op(self, layer: dict[str, Any], shapes: dict[str, Any], stream: int) -> bool:
        name, inputs, shape = layer["output"], layer["inputs"], dict(shapes)
        address = self._address(name)

        def work() -> float:
            if layer["kind"] == "constant":
                kind = self._dtype(name)
                stored = np.array(layer["params"]["values"], STORAGE[kind]).reshape(layer["params"]["shape"])
            else:
                # A shape tensor's value is in the output's shape.
                values = [
                    shape[name] if source in self.plan["on_host"] else self._numbers([source], shape)[0]
                    for source in inputs
                ]
                stored = to_stored(COMPUTE[layer["kind"]](values, layer["params"]), self._dtype(name))
            gpu().array(address, shape[name], STORAGE[self._dtype(name)])[...] = stored
            return KERNEL_MS

        return gpu().push(stream, work) == 0

    def _run_nonzero(self, layer: dict[str, Any], shapes: dict[str, Any], stream: int) -> bool:
        """TensorRT waits for the stream here: memory is asked for once the count is known."""
        name = layer["output"]
        if gpu().forbidden() or gpu().finish(stream) != 0:
            self._error("IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (operation not permitted)")
            return False
        found = COMPUTE["nonzero"](self._numbers(layer["inputs"], shapes), {}).astype(np.int32)
        allocator = self._allocators[name]
        try:
            address = allocator.reallocate_output_async(name, 0, found.nbytes, 256, stream)
        except Exception as error:
            self.engine.trt.double.calls.errors.append(f"Exception caught in reallocateOutputAsync(): {error}")
            address = 0
        if not address:
            self._error(f"IExecutionContext::enqueueV3: Error Code 2: OutOfMemory (no memory for {name})")
            return False
        allocator.notify_shape(name, Dims(found.shape))
        return gpu().push(stream, lambda: _write(address, found)) == 0


def _write(address: int, values: Any) -> float:
    gpu().array(address, values.shape, values.dtype)[...] = values
    return KERNEL_MS
