"""Random inputs for a model: sizes for its free axes, and contents that its operators take."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from pyfmha.errors import OnnxError
from pyfmha.onnx.sizes import Size, dimension

SIZES = ((2, 7), (1, 1), (3, 12), (1, 5))
"""For each trial the size of the first free axis of a model, as a rule the batch, and the least of the others."""

_FOLLOWED = ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten", "Expand", "Slice", "Concat")


def sizes_of(graph: ir.Graph, trial: int, given: Mapping[str, int]) -> dict[str, int]:
    """A number for every symbol in the shapes of a graph's inputs.

    Args:
        graph: of the model.
        trial: which of :data:`SIZES`.
        given: numbers by symbol, which stand.

    Raises:
        OnnxError: one is given for a symbol that the model does not have.
    """
    symbols = [name for value in inputs_of(graph) for size in shape_of(value) for name in sorted(size.symbols)]
    known = dict.fromkeys(symbols)
    unknown = sorted(set(given) - set(known))
    if unknown:
        has = ", ".join(known) or "none"
        raise OnnxError(f"the model has no free axis {', '.join(unknown)}; it has {has}")
    batch, least = SIZES[trial % len(SIZES)]
    free = [name for name in known if name not in given]
    chosen = {name: batch if index == 0 else least + index - 1 for index, name in enumerate(free)}
    return {name: given.get(name, chosen.get(name, 1)) for name in known}


def inputs_of(graph: ir.Graph) -> list[ir.Value]:
    """The inputs that a caller must give."""
    return [value for value in graph.inputs if value.name not in graph.initializers]


def shape_of(value: ir.Value) -> list[Size]:
    """The shape of an input; an axis without a name is a symbol of its own.

    Raises:
        OnnxError: it has none.
    """
    if value.shape is None:
        raise OnnxError(f"the input {value.name} has no shape")
    return [
        dimension(size if isinstance(size, int) else size.value, f"{value.name}.{axis}")
        for axis, size in enumerate(value.shape)
    ]


def random_inputs(graph: ir.Graph, sizes: Mapping[str, int], seed: int) -> dict[str, Any]:
    """An array for every input.

    Floats are standard normal, conditions even, one by itself true for every other seed. Whole numbers lie within what
    they pick from, where a Gather picks with them; else they are 0 or 1, as masks are, or for vectors 1 to 4, as
    lengths are.

    Raises:
        OnnxError: an input is of a type that numpy lacks, or a size is negative.
    """
    random = np.random.default_rng(seed)
    return {value.name or "": _array(value, sizes, random, seed) for value in inputs_of(graph)}


def _array(value: ir.Value, sizes: Mapping[str, int], random: Any, seed: int) -> Any:
    shape = [_number(size, sizes, value) for size in shape_of(value)]
    kind = None if value.dtype is None else value.dtype
    if kind in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE):
        return random.standard_normal(shape).astype(kind.numpy())
    if kind == ir.DataType.BOOL and not shape:
        return np.asarray(seed % 2 == 0)
    if kind == ir.DataType.BOOL:
        array = random.random(shape) < 0.7
        array[..., :1] = True
        return array
    if kind in (ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT8, ir.DataType.INT8):
        limit = picked_from(value)
        low, high = (0, limit) if limit else (1, 5) if len(shape) == 1 else (0, 2)
        array = random.integers(low, high, shape)
        if not limit and len(shape) > 1:
            array[..., :1] = 1  # a mask hides no whole sequence
        return array.astype(kind.numpy())
    raise OnnxError(f"the input {value.name} is of type {kind}, for which ONNX Runtime takes no numpy array")


def _number(size: Size, sizes: Mapping[str, int], value: ir.Value) -> int:
    for name in sorted(size.symbols):
        size = size.replaced(name, Size.of(sizes[name]))
    if size.number is None or size.number < 0:
        raise OnnxError(f"the input {value.name} would have an axis of size {size}; give other sizes")
    return size.number


def picked_from(value: ir.Value, depth: int = 6) -> int | None:
    """How many things an index picks from, where a Gather takes it as one."""
    found = []
    for user, index in value.uses():
        data = user.inputs[0]
        if user.op_type == "Gather" and index == 1 and data is not None and data.shape is not None:
            size = data.shape[user.attributes.get_int("axis", 0) or 0]
            found += [size] if isinstance(size, int) else []
        elif user.op_type in _FOLLOWED and index == 0 and depth:
            inner = picked_from(user.outputs[0], depth - 1)
            found += [] if inner is None else [inner]
    return min(found, default=None)
