"""Constants of a model that are a rule: counting, steps, thresholds, triangles and bands."""

from typing import Any

import numpy as np

from pyfmha.onnx.formulas import AtLeast0, Data, both, chosen
from pyfmha.onnx.sizes import Size
from pyfmha.onnx.tensors import Shape

LARGEST = 1 << 26
"""Elements of the largest constant that is looked into."""


def element(array: Any, index: Shape, bounds: dict[str, Size], name: str) -> Any:
    """An element of a constant: as an expression of its index, where it follows a rule; else data of that name."""
    if array.size == 0 or array.size > LARGEST:
        return Data(name)
    known = [at.number for at in index]
    for axis in reversed(range(array.ndim)):
        at = 0 if array.shape[axis] == 1 else known[axis]
        if at is not None and -array.shape[axis] <= at < array.shape[axis]:
            array = np.take(array, at, axis=axis)
            index = index[:axis] + index[axis + 1 :]
    first = array.reshape(-1)[0]
    if (array == first).all():
        return _plain(first)
    found = None
    if array.ndim == 1:
        found = _line(array, index[0], bounds)
    elif array.ndim == 2:
        found = _band(array, index[0], index[1])
    return Data(name) if found is None else found


def _plain(number: Any) -> Any:
    if isinstance(number, (bool, np.bool_)):
        return bool(number)
    return Size.of(int(number)) if np.issubdtype(type(number), np.integer) else float(number)


def _line(array: Any, at: Size, bounds: dict[str, Size]) -> Any:
    if array.dtype.kind in "iu":
        steps = np.diff(array)
        if (steps == steps[0]).all():
            return at * int(steps[0]) + int(array[0])
        repeats = int(np.argmax(steps != 0)) + 1
        if (array == np.arange(len(array)) // repeats).all():
            halves = at.split(Size.of(repeats), bounds)
            return None if halves is None else halves[0]
    changes = np.flatnonzero(array[1:] != array[:-1])
    if len(changes) == 1:
        first = int(changes[0]) + 1
        return chosen(AtLeast0(at - first), _plain(array[-1]), _plain(array[0]))
    return None


def _band(array: Any, row: Size, column: Size) -> Any:
    """Two values, one of them where ``low <= column - row <= high``."""
    rows, columns = array.shape
    for value in (array[-1, 0], array[0, -1], array[0, 0], array[-1, -1]):
        inside = array != value
        if not inside.any():
            continue
        where = np.argwhere(inside)
        distances = where[:, 1] - where[:, 0]
        low, high = int(distances.min()), int(distances.max())
        distance = np.arange(columns)[None, :] - np.arange(rows)[:, None]
        others = array[inside]
        if (others != others[0]).any() or not np.array_equal(inside, (distance >= low) & (distance <= high)):
            continue
        lower: Any = True if low == 1 - rows else AtLeast0(column - row - low)
        upper: Any = True if high == columns - 1 else AtLeast0(row - column + high)
        return chosen(both(lower, upper), _plain(others[0]), _plain(value))
    return None
