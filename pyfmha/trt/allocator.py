"""Memory for outputs whose shape depends on the data: TensorRT asks for it while it runs."""

import types
from typing import Any, Protocol

import numpy as np

from pyfmha.errors import EngineError, PyfmhaError
from pyfmha.runtime.device import DeviceArray
from pyfmha.trt.failures import report


class OutputAllocator(Protocol):
    """What a session asks of an allocator; see :class:`AllocatorBehaviour`."""

    error: PyfmhaError | None

    def begin(self) -> None: ...
    def memory(self) -> DeviceArray: ...
    def shape(self) -> tuple[int, ...]: ...
    def free(self) -> None: ...


class AllocatorBehaviour:
    """One output's memory, kept from run to run and only ever exchanged for more.

    Attributes:
        error: what went wrong inside TensorRT's call, for whose exceptions it has no use.
    """

    def __init__(self) -> None:
        self.error: PyfmhaError | None = None
        self._memory: DeviceArray | None = None
        self._outgrown: list[DeviceArray] = []
        self._shape: tuple[int, ...] | None = None

    def begin(self) -> None:
        """Forget the last run's shape."""
        self.error = None
        self._shape = None

    def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
        """At least ``size`` bytes of device memory, or 0 where there are none; called by TensorRT."""
        try:
            if self._memory is None or self._memory.nbytes < size:
                # What was there may still be in use on the stream, for which an allocator cannot wait.
                if self._memory is not None:
                    self._outgrown.append(self._memory)
                    self._memory = None
                self._memory = DeviceArray((max(size, 1),), np.uint8)
            return self._memory.pointer
        except Exception as error:
            self.error = report("reallocate_output", f"output {tensor_name!r}, {size} bytes", error)
            return 0

    def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
        """As :meth:`reallocate_output`."""
        return self.reallocate_output(tensor_name, memory, size, alignment)

    def notify_shape(self, tensor_name: str, shape: Any) -> None:
        """The shape, as soon as TensorRT knows it; called by TensorRT."""
        self._shape = tuple(shape)

    def memory(self) -> DeviceArray:
        """The memory that the last run wrote to.

        Raises:
            EngineError: TensorRT never asked for it.
        """
        if self._memory is None:
            raise EngineError("TensorRT ran without asking for the memory of an output")
        return self._memory

    def shape(self) -> tuple[int, ...]:
        """The shape that the last run found.

        Raises:
            EngineError: TensorRT did not say.
        """
        if self._shape is None:
            raise EngineError("TensorRT ran without saying the shape of an output")
        return self._shape

    def free(self) -> None:
        """Give the memory back; harmless when repeated."""
        for memory in [*self._outgrown, *([] if self._memory is None else [self._memory])]:
            memory.free()
        self._outgrown = []


def make_allocator(trt: Any) -> Any:
    """An :class:`OutputAllocator` of a TensorRT module's class ``IOutputAllocator``."""

    def start(self: Any) -> None:
        trt.IOutputAllocator.__init__(self)
        AllocatorBehaviour.__init__(self)

    bases = (AllocatorBehaviour, trt.IOutputAllocator)
    made = types.new_class("PyfmhaAllocator", bases, {}, lambda namespace: namespace.update({"__init__": start}))
    return made()
