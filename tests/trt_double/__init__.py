"""TensorRT's side of the plugin, for tests: the calls of its C++ code, against the real bindings and against a double.

- :mod:`trt_double.vtable`: calls the C++ virtual functions of the objects that a real binding makes, as TensorRT does.
- :mod:`trt_double.binding`: a module with the binding's classes, which behaves as ``TENSORRT.md`` says, and its calls.
- :mod:`trt_double.scene`: what tests share: a library, shapes, a plugin brought to the point where it runs.

Both sets of calls have the methods of :class:`Calls`. None of them raises when an override does: they answer as C++
sees it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

FLOAT, HALF, BF16 = 0, 1, 7  # trt.DataType
INT32, FLOAT32, CHAR = 5, 1, 6  # trt.PluginFieldType
BUILD, RUNTIME = 0, 1  # trt.TensorRTPhase
LINEAR = 0  # trt.TensorFormat


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


@dataclass(frozen=True)
class Tensor:
    """A tensor's descriptor; with bounds, a dynamic one's."""

    shape: tuple[int, ...]
    type: int = HALF
    format: int = LINEAR
    largest: tuple[int, ...] | None = None
    smallest: tuple[int, ...] | None = None  # the largest, if not given


@dataclass(frozen=True)
class Field:
    """A field as C++ reads it: its data as bytes."""

    name: str
    type: int
    length: int
    data: bytes


class StoredFields(Protocol):
    """What C++ holds after ``get_fields_to_serialize``: pointers, read later."""

    def read(self) -> list[Field]: ...


class Calls(Protocol):
    """The calls of TensorRT's C++ code, with what it sees of each: a status, an answer or nothing."""

    trt: Any

    def create(self, creator: Any, name: str, fields: Sequence[Field], phase: int) -> Any | None: ...
    def output_types(self, plugin: Any, types: Sequence[int]) -> list[int] | None: ...
    def output_shapes(
        self, plugin: Any, shapes: Sequence[Sequence[int | None]], values: Sequence[Sequence[int | None]] = ()
    ) -> list[list[int | None]] | None: ...
    def supports(self, plugin: Any, position: int, tensors: Sequence[Tensor]) -> bool: ...
    def configure(self, plugin: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int: ...
    def tactics(self, plugin: Any) -> list[int] | None: ...
    def workspace(self, plugin: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int: ...
    def timing_cache_id(self, plugin: Any) -> str | None: ...
    def set_tactic(self, plugin: Any, tactic: int) -> int: ...
    def on_shape_change(self, plugin: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int: ...
    def enqueue(
        self, plugin: Any, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int
    ) -> int: ...
    def attach(self, plugin: Any) -> Any | None: ...
    def clone(self, plugin: Any) -> Any | None: ...
    def stored_fields(self, plugin: Any) -> StoredFields | None: ...
    def core(self, plugin: Any) -> tuple[str, str, str]: ...
    def destroy(self, plugin: Any) -> None: ...
