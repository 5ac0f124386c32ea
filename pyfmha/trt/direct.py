"""The plugin on a GPU without TensorRT's engine: driven as an execution context drives it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyfmha.bfloat16 import STORAGE
from pyfmha.errors import PluginError, SpecError
from pyfmha.runtime.device import Device, DeviceArray, Stream, device_arrays
from pyfmha.runtime.library import Library
from pyfmha.trt import standin
from pyfmha.trt.creator import find_library, make_creator
from pyfmha.trt.fields import Problem, creation_fields
from pyfmha.trt.modules import find_module
from pyfmha.trt.shapes import INPUTS, OUTPUTS, TENSORS

Array = NDArray[Any]


class DirectSession:
    """Attention on one GPU through the plugin object, in the order in which TensorRT calls it.

    Created in the build phase, serialised, created again from those fields in the runtime phase, attached to a
    context, then ``set_tactic``, ``on_shape_change`` and ``enqueue`` on a stream. Return values are ignored;
    exceptions are raised.

    Args:
        num_heads: heads of Q, K and V.
        head_size: elements of one head.
        dtype: ``"fp16"``, ``"bf16"`` or ``"fp32"``.
        causal: whether a query sees only keys at its own position and before.
        scale: of Q K^T; by default 1 / sqrt(head size).
        library: as :func:`pyfmha.trt.register`.
        trt_module: whose classes to use; by default the first installed, or :mod:`pyfmha.trt.standin` where none is.
        device: number of the GPU.
        tactic: which algorithm: one of :attr:`tactics`, or 0 for the first.

    Attributes:
        tactics: ids of the algorithms with code for the GPU.
        workspace_bytes: bytes of workspace for the shape last prepared.

    Raises:
        PluginError, SpecError: it is not served.
        LibraryError: the library is missing or cannot be used.
        DriverError: there is no GPU, or no code for it.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        head_size: int,
        dtype: str = "fp16",
        causal: bool = True,
        scale: float | None = None,
        library: Library | Path | str | None = None,
        trt_module: Any = None,
        device: int = 0,
        tactic: int = 0,
    ) -> None:
        self._trt = trt_module if trt_module is not None else _installed_or_standin()
        self.problem = Problem(
            num_heads, head_size, dtype, 1 / math.sqrt(head_size) if scale is None else scale, causal
        )
        creator = make_creator(self._trt, find_library(library))
        phases = self._trt.TensorRTPhase
        fields = creation_fields(self._trt, self.problem)
        built = creator.create_plugin("DirectSession", fields.collection, phases.BUILD)
        loaded = creator.create_plugin("DirectSession", built.get_fields_to_serialize(), phases.RUNTIME)
        self._workspace: DeviceArray | None = None
        self._prepared: tuple[int, int] | None = None
        self.workspace_bytes = 0
        self._device: Device | None = Device(device)
        try:
            self.tactics: list[int] = loaded.get_valid_tactics()
            self.plugin = loaded.attach_to_context(None)
            self.plugin.set_tactic(tactic)
            self._stream = Stream()
        except BaseException:
            self._device.close()
            raise

    @property
    def algorithm(self) -> str:
        """The names of the variants that may run, one for aligned pointers and the generic one."""
        return str(self.plugin.tactic.name)

    def set_tactic(self, tactic: int) -> None:
        """Change the algorithm: one of :attr:`tactics`, or 0 for the first."""
        self.plugin.set_tactic(tactic)

    def prepare(self, batch_size: int, seq_len: int) -> None:
        """Get ready for a shape: workspace and launch. :meth:`run` does it by itself."""
        self._open().make_current()
        shape = (batch_size, self.problem.num_heads, seq_len, self.problem.head_size)
        dynamic = [self._dynamic_desc(shape) for _ in TENSORS]
        needed = self.plugin.get_workspace_size(dynamic[:3], dynamic[3:])
        descs = [desc.desc for desc in dynamic]
        self._prepared = None
        self.plugin.on_shape_change(descs[:3], descs[3:])
        if self._workspace is None or self._workspace.nbytes < needed:
            if self._workspace is not None:
                self._open().synchronize()  # a launch on any stream may still be writing to it
                self._workspace.free()
            self._workspace = DeviceArray((needed,), np.uint8)
        self.workspace_bytes = needed
        self._prepared = batch_size, seq_len

    def enqueue(self, pointers: Mapping[str, int], stream: int) -> None:
        """Launch for the shape prepared, and return at once; the session's context must be current.

        Args:
            pointers: device addresses of ``"Q"``, ``"K"``, ``"V"`` and ``"Out"``, each of the prepared shape.
            stream: a ``CUstream`` as an integer. Launches share the session's workspace, so they must not overlap.
        """
        inputs, outputs = [pointers[name] for name in INPUTS], [pointers[name] for name in OUTPUTS]
        workspace = 0 if self._workspace is None else self._workspace.pointer
        self.plugin.enqueue([], [], inputs, outputs, workspace, stream)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Attention on host arrays.

        Args:
            inputs: ``"Q"``, ``"K"`` and ``"V"``, each [batch, heads, seq, head size], float16, float32, or bfloat16 as
                uint16.

        Returns:
            ``"Out"``, of the same shape and type.

        Raises:
            SpecError: names, shapes or types do not fit.
            PyfmhaError: the plugin or the driver failed.
        """
        shape = self._check(inputs)
        device = self._open()
        device.make_current()
        if self._prepared != (shape[0], shape[2]):
            self.prepare(shape[0], shape[2])
        arrays = {name: DeviceArray.of(inputs[name]) for name in INPUTS}
        arrays["Out"] = DeviceArray(shape, STORAGE[self.problem.dtype])
        with device_arrays(*arrays.values()):
            # A copy from pageable memory may still be under way, and the stream would not wait for it.
            device.synchronize()
            self.enqueue({name: array.pointer for name, array in arrays.items()}, self._stream.handle)
            self._stream.synchronize()
            return {name: arrays[name].to_host() for name in OUTPUTS}

    def close(self) -> None:
        """Give everything back; harmless when repeated."""
        if self._device is None:
            return
        device, self._device = self._device, None
        device.make_current()
        device.synchronize()
        self.plugin.destroy()
        if self._workspace is not None:
            self._workspace.free()
        self._stream.close()
        device.close()

    def __enter__(self) -> "DirectSession":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> Device:
        if self._device is None:
            raise PluginError("the session is closed")
        return self._device

    def _dynamic_desc(self, shape: tuple[int, ...]) -> Any:
        dynamic = self._trt.DynamicPluginTensorDesc()
        desc = self._trt.PluginTensorDesc()
        desc.dims = dynamic.min = dynamic.opt = dynamic.max = self._trt.Dims(shape)
        desc.type = self._trt.DataType(self.problem.type_id)
        dynamic.desc = desc
        return dynamic

    def _check(self, inputs: Mapping[str, Array]) -> tuple[int, ...]:
        storage = np.dtype(STORAGE[self.problem.dtype])
        if set(inputs) != set(INPUTS):
            raise SpecError(f"inputs are {', '.join(inputs) or 'missing'}; give {', '.join(INPUTS)}")
        shape = inputs["Q"].shape
        wanted = f"{storage} [batch, {self.problem.num_heads}, seq, {self.problem.head_size}]"
        for name, array in inputs.items():
            fits = array.ndim == 4 and (array.shape[1], array.shape[3]) == (
                self.problem.num_heads,
                self.problem.head_size,
            )
            if array.dtype != storage or not fits or array.shape != shape:
                raise SpecError(f"{name} is {array.dtype} {list(array.shape)}; Q, K and V must all be {wanted}")
        return shape


def _installed_or_standin() -> Any:
    try:
        return find_module()
    except PluginError:
        return standin
