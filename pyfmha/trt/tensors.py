"""The inputs and outputs of an engine, and which of its optimisation profiles serves given inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pyfmha.errors import EngineError
from pyfmha.runtime.tensors import TensorView, host_array, is_tensor, on_device, view

ADDRESS_ALIGNMENT = 256
"""What ``IExecutionContext::setTensorAddress`` asks of an address, in bytes (NvInferRuntime.h)."""

Array = NDArray[Any]

STORAGE: dict[str, DTypeLike] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": np.uint16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
    "FP8": np.uint8,
}
"""How numpy holds each ``trt.DataType``: the bits of bfloat16 in uint16 and of FP8 in uint8, which it does not have."""

Bounds = tuple[tuple[int, ...], tuple[int, ...]]
"""Smallest and largest shape, or values."""


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of an engine.

    Attributes:
        name: its name.
        type: of its elements, as ``trt.DataType`` names it.
        shape: -1 where it may vary.
        is_input: or an output.
        on_host: TensorRT reads or writes it on the host: a tensor whose values are shapes.
        profiles: for an input, the shapes that each profile allows.
        values: for an input on the host, the values that each profile allows; empty where it sets none.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    is_input: bool
    on_host: bool
    profiles: tuple[Bounds, ...]
    values: tuple[Bounds, ...]

    @property
    def storage(self) -> np.dtype[Any]:
        """Its type in numpy."""
        return np.dtype(STORAGE[self.type])

    def __str__(self) -> str:
        held = "" if self.type not in ("BF16", "FP8") else f" as {self.storage}"
        return f"{self.name} {self.type}{held} {list(self.shape)}"


def describe(trt: Any, engine: Any) -> tuple[TensorInfo, ...]:
    """The inputs and outputs of an ``ICudaEngine``, in its order.

    Raises:
        EngineError: one has a type or layout that this package does not pass.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return tuple(_describe(trt, engine, name) for name in names)


def _describe(trt: Any, engine: Any, name: str) -> TensorInfo:
    kind = engine.get_tensor_dtype(name).name
    if kind not in STORAGE:
        raise EngineError(f"{name} is of type {kind}; numpy can hold {', '.join(STORAGE)}")
    if engine.get_tensor_vectorized_dim(name) != -1:
        raise EngineError(
            f"{name} has the layout {engine.get_tensor_format_desc(name)}; only linear tensors are served: build the"
            " engine with linear inputs and outputs"
        )
    is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
    on_host = engine.get_tensor_location(name) == trt.TensorLocation.HOST
    shapes: list[Bounds] = []
    values: list[Bounds] = []
    for index in range(engine.num_optimization_profiles if is_input else 0):
        smallest, _, largest = engine.get_tensor_profile_shape(name, index)
        shapes.append((tuple(smallest), tuple(largest)))
        if on_host:
            # By position: the binding has the two keywords the wrong way round (pyCore.cpp, get_tensor_profile_values).
            allowed = engine.get_tensor_profile_values(index, name)
            if allowed:
                values.append((tuple(allowed[0]), tuple(allowed[2])))
    shape = tuple(engine.get_tensor_shape(name))
    return TensorInfo(name, kind, shape, is_input, on_host, tuple(shapes), tuple(values))


def check_inputs(
    expected: Sequence[TensorInfo], given: Mapping[str, Any], stream: int, device: int
) -> dict[str, Array | TensorView]:
    """The inputs as contiguous arrays, or views of contiguous tensors on a GPU.

    Args:
        expected: the engine's.
        given: by name.
        stream: on which tensors will be used.
        device: the GPU's number.

    Raises:
        EngineError: one is missing or unknown, or of a wrong type or rank.
        TensorError: a tensor is on another GPU, has gaps, or cannot be read.
    """
    names = [info.name for info in expected]
    listed = ", ".join(map(str, expected)) or "none"
    missing = [name for name in names if name not in given]
    unknown = [name for name in given if name not in names]
    if missing or unknown:
        parts = [f"missing input {', '.join(missing)}"] if missing else []
        parts += [f"unknown input {', '.join(unknown)}"] if unknown else []
        raise EngineError(f"{'; '.join(parts)}; the engine's inputs are {listed}")
    return {info.name: _checked(info, given[info.name], stream, device) for info in expected}


def _checked(info: TensorInfo, value: Any, stream: int, device: int) -> Array | TensorView:
    if not isinstance(value, np.ndarray):
        if not is_tensor(value):
            raise EngineError(
                f"{info.name} is a {type(value).__name__}; give a numpy array, or a tensor with DLPack or"
                f" __cuda_array_interface__, {info}"
            )
        found = view(info.name, value, None)
        if found.device is not None:
            return _on_device(info, value, stream, device)
        value = host_array(found)
    _check_form(info, str(value.dtype), value.shape)
    # Not numpy.ascontiguousarray, which makes an array of one element of one without dimensions.
    contiguous: Array = np.require(value, requirements="C").reshape(value.shape)
    return contiguous


def _on_device(info: TensorInfo, value: Any, stream: int, device: int, *, written: bool = False) -> TensorView:
    if info.on_host:
        raise EngineError(f"{info.name} is on a GPU; TensorRT uses its values on the host: give a numpy array, {info}")
    found = on_device(info.name, value, stream, device, written=written)
    _check_form(info, found.stored, found.shape)
    if found.pointer % ADDRESS_ALIGNMENT:
        raise EngineError(
            f"{info.name} is at {found.pointer:#x}; TensorRT asks for multiples of {ADDRESS_ALIGNMENT} bytes: give a"
            " copy"
        )
    return found


def _check_form(info: TensorInfo, stored: str, shape: Sequence[int]) -> None:
    if stored != info.storage.name:
        raise EngineError(f"{info.name} is {stored}; it must be {info.storage}: the engine has {info}")
    if len(shape) != len(info.shape):
        raise EngineError(f"{info.name} is {list(shape)}; the engine has {info}")


def check_outputs(
    expected: Sequence[TensorInfo], given: Mapping[str, Any], stream: int, device: int
) -> dict[str, TensorView]:
    """Views of tensors on a GPU that outputs are to be written to; their sizes are not compared yet.

    Args:
        expected: the engine's.
        given: by name; those of the engine that are missing are the session's own business.
        stream: on which they will be written.
        device: the GPU's number.

    Raises:
        EngineError: one is unknown, no tensor on a GPU, or of a wrong type or rank.
        TensorError: one is on another GPU, has gaps, is read-only, or cannot be read.
    """
    by_name = {info.name: info for info in expected}
    unknown = [name for name in given if name not in by_name]
    if unknown:
        raise EngineError(f"unknown output {', '.join(unknown)}; the engine's are {', '.join(map(str, expected))}")
    for name, value in given.items():
        if isinstance(value, np.ndarray) or not is_tensor(value):
            raise EngineError(f"{name} is a {type(value).__name__}; give a tensor on the GPU, or none")
    return {name: _on_device(by_name[name], value, stream, device, written=True) for name, value in given.items()}


def choose_profile(expected: Sequence[TensorInfo], arrays: Mapping[str, Any], active: int, count: int) -> int:
    """The optimisation profile that serves some inputs: the active one if it does, else the first.

    Raises:
        EngineError: none does; the message says which shapes or values are allowed.
    """
    for profile in sorted(range(count), key=lambda index: index != active):
        if all(_fits(info, arrays[info.name], profile) for info in expected):
            return profile
    outside = [info for info in expected if not any(_fits(info, arrays[info.name], p) for p in range(count))]
    if not outside:
        outside = list(expected)
    wrong = "; ".join(
        f"{info.name} is {_shown(info, arrays[info.name])}, allowed {'are values' if info.on_host else 'is'}"
        f" {_allowed(info, count)}"
        for info in outside
    )
    raise EngineError(f"outside the engine's optimisation profile{'s' if count > 1 else ''}: {wrong}")


def _fits(info: TensorInfo, array: Any, profile: int) -> bool:
    if info.on_host and info.values and not _between(array.ravel().tolist(), info.values[profile]):
        return False
    return _between(array.shape, info.profiles[profile])


def _between(sizes: Sequence[int], bounds: Bounds) -> bool:
    smallest, largest = bounds
    return len(sizes) == len(smallest) and all(
        low <= size <= high for low, size, high in zip(smallest, sizes, largest, strict=True)
    )


def _shown(info: TensorInfo, array: Any) -> str:
    return str(array.tolist() if info.on_host and info.values else list(array.shape))


def _allowed(info: TensorInfo, count: int) -> str:
    bounds = info.values if info.on_host and info.values else info.profiles
    return " or ".join(f"{list(bounds[index][0])} to {list(bounds[index][1])}" for index in range(count))
