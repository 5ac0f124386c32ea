"""Running any engine on numpy arrays, or on tensors where they are: its shapes, its memory, its stream, its errors.

Needs a TensorRT module that runs engines (``tensorrt`` or ``tensorrt_lean``) and cuda-python.
"""

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyfmha.errors import EngineError, PyfmhaError
from pyfmha.runtime.device import Device, DeviceArray, Stream
from pyfmha.runtime.graph import Graph
from pyfmha.runtime.tensors import TensorView
from pyfmha.trt.allocator import OutputAllocator, make_allocator
from pyfmha.trt.creator import register, unregistered
from pyfmha.trt.failures import collect_failures
from pyfmha.trt.messages import collect_errors, failure_of, make_root
from pyfmha.trt.modules import MODULES, find_module
from pyfmha.trt.protocols import Plan, TensorRT
from pyfmha.trt.saved import plan_of
from pyfmha.trt.tensors import TensorInfo, check_inputs, check_outputs, choose_profile, describe

Array = NDArray[Any]

_LIBRARY_SIGN = b"getCreators"
"""What stands in a plan that carries a library with plugins: the name of a function that such a library exports."""


class Session:
    """One engine, one execution context, one stream on one GPU.

    :meth:`run` may be called from several threads, one after the other. :meth:`bind`, :meth:`enqueue` and
    :meth:`fetch` are its parts, for those who time or overlap, and are for one thread.

    Args:
        engine: a serialised engine, as bytes or as TensorRT's ``IHostMemory``, or the path of its file.
        trt_module: as :func:`pyfmha.trt.register`, whose plugin is registered first. An engine without it needs
            neither the plugin nor its library.
        device: number of the GPU.
        cuda_graph: launch a captured CUDA graph instead of queueing each kernel, from the second run of a shape on.
        trust_library: run the code of a library that the engine carries (``embed_library``) in this process. Whoever
            made the engine's file then decides what this process does. Python's plugin is not registered for it.

    Attributes:
        inputs, outputs: what the engine takes and gives.
        stream: the stream on which it runs.

    Raises:
        EngineError: the engine is missing, of another TensorRT version, or TensorRT refused it.
        PluginError, LibraryError: TensorRT or the plugin cannot be used.
        DriverError: there is no such GPU, or no code for it in the plugin's library.
    """

    def __init__(
        self,
        engine: Plan,
        *,
        trt_module: TensorRT | None = None,
        device: int = 0,
        cuda_graph: bool = False,
        trust_library: bool = False,
    ) -> None:
        self._trt = find_module(trt_module)
        plan = plan_of(engine)
        self._lock = threading.Lock()
        self._wants_graph = cuda_graph
        self._trusts = trust_library
        self._graph: Graph | None = None
        self._buffers: dict[str, DeviceArray] = {}
        self._on_host: dict[str, Array] = {}
        self._allocators: dict[str, OutputAllocator] = {}
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._sent: list[Any] = []  # host memory that copies on the stream still read, and tensors in use
        self._given: dict[str, Any] = {}  # the outputs' tensors of the caller
        self._ordinal = device
        with ExitStack() as stack:
            # First: without a GPU a Runtime is made all the same, and crashes the process when it is used.
            self._device = Device(device)
            stack.callback(self._device.close)
            self.stream = Stream()
            stack.callback(self.stream.close)
            stack.callback(self._free)
            self._load(plan)
            tensors = describe(self._trt, self._engine)
            self.inputs = tuple(info for info in tensors if info.is_input)
            self.outputs = tuple(info for info in tensors if not info.is_input)
            if cuda_graph and any(info.on_host for info in tensors):
                raise EngineError("an engine with shapes among its inputs or outputs cannot run as a CUDA graph")
            self._resources: ExitStack | None = stack.pop_all()

    def _load(self, plan: Any) -> None:
        hint = ""
        try:
            if not self._trusts:
                register(self._trt)
        except PyfmhaError as error:  # of no account to an engine without the plugin
            hint = f"pyfmha's plugin is not registered: {error}"
        if self._trt.__name__ in MODULES[1:]:
            hint += f"{hint and '; '}{self._trt.__name__} runs engines that were built with version_compatible=True"
        with collect_failures() as failures, collect_errors() as said:
            self._runtime = make_root(self._trt, "Runtime")
            if self._trusts:
                self._runtime.engine_host_code_allowed = True
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                hint = unregistered(self._trt, said) or self._library_hint(plan, said) or hint
                raise failure_of("the engine cannot be loaded", failures, said, hint)
            self._context = self._engine.create_execution_context()
            if self._context is None:
                raise failure_of("the engine cannot be run here", failures, said)

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Run the engine once.

        Args:
            inputs: by name, in the types of :data:`pyfmha.trt.tensors.STORAGE`: bfloat16 as uint16. Each is a numpy
                array, or a tensor with DLPack or ``__cuda_array_interface__`` (PyTorch's, CuPy's): those on the
                session's GPU are used where they are, once what their producers queued is done.
            outputs: contiguous tensors on the GPU by name, which are written where they are. Addresses of tensors on
                the GPU must be multiples of 256 bytes, which TensorRT asks for.

        Returns:
            The outputs by name, complete: those given, and new numpy arrays for the others.

        Raises:
            EngineError: an input is missing, unknown, of a wrong type or rank, or outside the engine's profile; an
                output given does not fit; or TensorRT failed.
            TensorError: a tensor is on another GPU, has gaps, is read-only and would be written, or cannot be read.
            PluginError, LaunchError: the plugin failed, with its own text.
            DriverError: the GPU failed.
        """
        with self._lock:
            self.bind(inputs, outputs)
            self.enqueue()
            return self.fetch()

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any] | None = None) -> dict[str, tuple[int, ...]]:
        """Check the inputs, set their shapes, and copy those on the host to the GPU in the stream's order.

        Args:
            inputs, outputs: as :meth:`run`. Tensors must stay as they are until the work is done.

        Returns:
            The shapes of the outputs; -1 where they depend on the data.

        Raises:
            EngineError, TensorError, PluginError, DriverError: as :meth:`run`.
        """
        self._opened()
        self._device.make_current()
        arrays = check_inputs(self.inputs, inputs, self.stream.handle, self._ordinal)
        views = check_outputs(self.outputs, outputs or {}, self.stream.handle, self._ordinal)
        self._set_profile(arrays)
        with collect_failures() as failures, collect_errors() as said:
            for info in self.inputs:
                self._set_input(info, arrays[info.name], failures, said)
            try:
                unknown = self._opened().infer_shapes()
            except RuntimeError as error:
                raise failure_of(f"the output shapes cannot be inferred ({error})", failures, said) from None
            if unknown:
                raise failure_of(f"not enough is known of {', '.join(unknown)}", failures, said)
        shapes = {info.name: self._set_output(info, views.get(info.name)) for info in self.outputs}
        if self._sent:
            self.stream.synchronize()
        self._given = dict(outputs or {})
        self._sent = [*views.values(), *(held for held in arrays.values() if isinstance(held, TensorView))]
        for info in self.inputs:
            array = arrays[info.name]
            if not info.on_host and not isinstance(array, TensorView):
                self._sent.append(self._buffers[info.name].send(array, self.stream))
        return shapes

    def enqueue(self) -> None:
        """Queue one run on the stream, with the inputs last bound; returns at once.

        Raises:
            EngineError, PluginError, LaunchError, DriverError: as :meth:`run`.
        """
        if self._graph is not None:
            self._graph.launch(self.stream)
            return
        self._execute()
        if self._wants_graph:
            # Not before a run: what TensorRT puts off after a change of shape must not end up in the capture.
            self._graph = Graph(self.stream, self._execute)

    def fetch(self) -> dict[str, Any]:
        """Wait for what was queued, and copy the outputs to the host, except those that were given.

        Raises:
            DriverError: the GPU failed.
        """
        self._opened()
        results = {}
        for info in self.outputs:
            if info.on_host or info.name in self._given:
                continue
            allocator = self._allocators.get(info.name)
            memory = self._buffers[info.name] if allocator is None else allocator.memory()
            shape = self._shapes[info.name] if allocator is None else allocator.shape()
            results[info.name] = memory.fetch(shape, info.storage, self.stream)
        self.stream.synchronize()
        self._sent = []
        results.update({info.name: self._on_host[info.name].copy() for info in self.outputs if info.on_host})
        results.update(self._given)
        return {info.name: results[info.name] for info in self.outputs}

    def close(self) -> None:
        """Give everything back; harmless when repeated."""
        resources, self._resources = self._resources, None
        if resources is not None:
            self._device.make_current()
            resources.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ helpers

    def _library_hint(self, plan: Any, said: list[str]) -> str:
        """What to do where an engine is refused for the library that it carries, or does not; else empty."""
        carries = _LIBRARY_SIGN in bytes(plan)
        if carries and not self._trusts:
            return "it carries a library; if its maker is to be trusted: Session(..., trust_library=True)"
        if self._trusts and not carries:
            return "it carries no library, so pyfmha's plugin was not registered: leave out trust_library=True"
        if self._trusts and any("find plugin" in text.lower() for text in said):
            return (
                "the library that it carries has no such plugin; either call pyfmha.register() before, or build the"
                " engine again with the library that has it"
            )
        return ""

    def _opened(self) -> Any:
        if self._context is None:
            raise EngineError("the session is closed")
        return self._context

    def _execute(self) -> None:
        # No local name for the context: an exception that somebody keeps would keep it from being destroyed in time.
        with collect_failures() as failures, collect_errors() as said:
            done = self._opened().execute_async_v3(self.stream.handle)
            errors = [allocator.error for allocator in self._allocators.values() if allocator.error is not None]
            if errors:
                raise errors[0]
            if not done:
                raise failure_of("the engine did not run", failures, said)

    def _set_profile(self, arrays: dict[str, Array | TensorView]) -> None:
        active = self._opened().active_optimization_profile
        chosen = choose_profile(self.inputs, arrays, active, self._engine.num_optimization_profiles)
        if chosen != active:
            with collect_failures() as failures, collect_errors() as said:
                try:
                    self._opened().set_optimization_profile_async(chosen, self.stream.handle)
                except RuntimeError as error:
                    raise failure_of(f"profile {chosen} cannot be used ({error})", failures, said) from None
            self.stream.synchronize()
            self._changed()
            self._shapes.clear()  # they are void in another profile

    def _set_input(self, info: TensorInfo, array: Array | TensorView, failures: list[Any], said: list[str]) -> None:
        if self._shapes.get(info.name) != array.shape:
            self._changed()
            if not self._opened().set_input_shape(info.name, array.shape):
                raise failure_of(f"{info.name} cannot be {list(array.shape)}", failures, said)
            self._shapes[info.name] = array.shape
        if isinstance(array, TensorView):
            self._set_address(info.name, array.pointer)
        elif info.on_host:
            self._on_host[info.name] = array
            self._set_address(info.name, array.ctypes.data)
        else:
            self._set_address(info.name, self._memory(info.name, array.nbytes).pointer)

    def _set_output(self, info: TensorInfo, given: TensorView | None) -> tuple[int, ...]:
        shape = tuple(self._opened().get_tensor_shape(info.name))
        if given is not None and given.shape != shape:
            depends = ", which depends on the data: it cannot be given" if -1 in shape else ""
            raise EngineError(f"{info.name} is given as {given}; it will be {list(shape)}{depends}")
        if -1 in shape or info.name in self._allocators:
            if self._wants_graph:
                raise EngineError(
                    f"{info.name} has a shape that depends on the data, {list(shape)}: it cannot run as a CUDA graph"
                )
            if info.name not in self._allocators:
                self._allocators[info.name] = allocator = make_allocator(self._trt)
                self._opened().set_output_allocator(info.name, allocator)
            self._allocators[info.name].begin()
            return shape
        self._shapes[info.name] = shape
        if given is not None:
            self._set_address(info.name, given.pointer)
        elif info.on_host:
            self._on_host[info.name] = np.empty(shape, info.storage)
            self._set_address(info.name, self._on_host[info.name].ctypes.data)
        else:
            nbytes = int(np.prod(shape, dtype=np.int64)) * info.storage.itemsize
            self._set_address(info.name, self._memory(info.name, nbytes).pointer)
        return shape

    def _memory(self, name: str, nbytes: int) -> DeviceArray:
        """A tensor's memory, at least so large: it only grows, so that addresses stay."""
        held = self._buffers.get(name)
        if held is not None and held.nbytes >= nbytes:
            return held
        self._changed()
        if held is not None:
            self.stream.synchronize()  # it may still be in use
            self._buffers.pop(name).free()
        self._buffers[name] = DeviceArray((nbytes,), np.uint8)
        return self._buffers[name]

    def _set_address(self, name: str, address: int) -> None:
        if self._addresses.get(name) != address:
            self._changed()
            if not self._opened().set_tensor_address(name, address):
                raise EngineError(f"TensorRT refused the address of {name}")
            self._addresses[name] = address

    def _changed(self) -> None:
        """A captured graph is void: its shapes or addresses are no longer those of the session."""
        graph, self._graph = self._graph, None
        if graph is not None:
            with ExitStack() as stack:
                stack.callback(graph.close)
                self.stream.synchronize()

    def _free(self) -> None:
        with ExitStack() as stack:  # all of it, even where the GPU failed; what it says is raised at the end
            for memory in self._buffers.values():
                stack.callback(memory.free)
            for allocator in self._allocators.values():
                stack.callback(allocator.free)
            stack.callback(self._forget)
            stack.callback(self._changed)
            self.stream.synchronize()

    def _forget(self) -> None:
        # In this order: each lives by the next.
        self._context = None
        self._engine = None
        self._runtime = None
