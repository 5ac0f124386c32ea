"""Reading nodes: attributes, constants, and arrays of sizes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from pyfmha.onnx.sizes import Size

Shape = tuple[Size, ...]
Content = Any
"""An object array of :class:`Size`, for whole numbers, and floats."""

STANDARD = ("", "ai.onnx")
"""The domain of ONNX's own operators, by both its names."""


def constant(value: ir.Value | None) -> Any:
    """The numpy array of a value that no input can change; None for others."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype == ir.DataType.STRING:
        return None
    try:
        array = tensor.numpy()
    except FileNotFoundError:  # external data that is elsewhere: no constant that could prove anything
        return None
    return array.astype(np.float32) if array.dtype.kind == "V" or array.dtype.name == "bfloat16" else array


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """An attribute's value, or its default."""
    found = node.attributes.get(name)
    return default if found is None or found.is_ref() else found.value


def objects(flat: Sequence[Any], shape: Sequence[int]) -> Content:
    """An object array of given elements."""
    array = np.empty(len(flat), object)
    array[:] = flat
    return array.reshape(tuple(shape))


def broadcast(shapes: Sequence[Shape], name: str) -> Shape:
    """The shape of an elementwise operator; a size that its inputs do not prove becomes a symbol of that name."""
    rank = max(map(len, shapes))
    padded = [(Size.of(1),) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    result = []
    for axis, sizes in enumerate(zip(*padded, strict=True)):
        others = {size for size in sizes if size.number != 1}
        numbers = {size for size in others if size.number is not None}
        if not others:
            result.append(Size.of(1))
        elif len(others) == 1 or len(numbers) == 1:
            result.append(next(iter(numbers or others)))
        else:
            result.append(Size.of(f"<{name}.{axis}>"))
    return tuple(result)
