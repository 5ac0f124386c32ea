"""Random Q, K and V on the device, in several sets."""

from typing import Any

import numpy as np

from pyfmha.attention.run import to_float, to_storage
from pyfmha.bench.cells import Cell
from pyfmha.bench.extras import arrays_of
from pyfmha.bench.protocol import Floats
from pyfmha.bfloat16 import STORAGE
from pyfmha.errors import DriverError
from pyfmha.runtime.device import DeviceArray

SETS = 3
MOST_BYTES = 8 << 30
"""Of all sets; where the tensors are larger, there are fewer sets."""

POOL = 4194301
"""Random numbers in stock: a prime, so that no two rows of a tensor are alike. Fresh ones for every tensor would take
numpy longer than all the rest."""

SLACK = 16
"""Elements behind each tensor, for contenders whose tensors begin some elements later."""


def pool(dtype: str, seed: int, size: int = POOL) -> Any:
    """Standard normal numbers in the storage type of a dtype."""
    return to_storage(np.random.default_rng(seed).standard_normal(size, np.float32), dtype)


def head_of(array: DeviceArray, cell: Cell, tensor: str, batch: int, head: int, shift: int) -> Any:
    """One head of one sequence of a tensor, [seq, head size], in its storage type.

    Args:
        array: holds the tensor.
        cell: whose.
        tensor: which, as :meth:`~pyfmha.bench.cells.Cell.shape` has it.
        batch, head: which sequence, and which head of it.
        shift: elements before the tensor.
    """
    _, _, seq, size = cell.shape(tensor)
    batch_stride, head_stride, row_stride = cell.strides(tensor)
    place, (begin,) = cell.place(batch, [0])
    seq = cell.tokens[batch] if cell.tokens else seq
    first = place * batch_stride + begin * row_stride + head * head_stride + shift
    span = (seq - 1) * row_stride + size
    stored = array.read(first * cell.item_size(tensor), (span,), STORAGE[cell.dtype_of(tensor)])
    return np.lib.stride_tricks.as_strided(stored, (seq, size), (row_stride * stored.itemsize, stored.itemsize))


class DeviceInputs:
    """Sets of Q, K and V; see :class:`pyfmha.bench.protocol.Inputs`.

    Attributes:
        held: what the cell has beside them, in numpy; the same for all sets.
        extra: the same on the device.

    Args:
        cell: whose.
        pools: random numbers for Q, K and V, see :func:`pool`.

    Raises:
        DriverError: on creation, where the device has not the memory.
    """

    def __init__(self, cell: Cell, pools: dict[str, Any]) -> None:
        self.cell = cell
        sizes = {name: int(np.prod(cell.shape(name), dtype=np.int64)) + SLACK for name in "QKV"}
        nbytes = sum(sizes.values()) * cell.item_size("Q")
        self.count = min(max(MOST_BYTES // nbytes, 1), SETS)
        self.arrays: list[dict[str, DeviceArray]] = []
        self.held = arrays_of(cell)
        self.extra: dict[str, DeviceArray] = {}
        try:
            for name, values in self.held.items():
                self.extra[name] = DeviceArray(values.shape, values.dtype)
                self.extra[name].write(values)
            for index in range(self.count):
                self.arrays.append({})
                for name, size in sizes.items():
                    array = DeviceArray((size,), STORAGE[cell.dtype_of(name)])
                    self.arrays[index][name] = array
                    array.write(np.resize(np.roll(pools[name], -index * 1000003), size))
        except DriverError:
            self.close()
            raise

    def pointer(self, index: int, tensor: str, shift: int = 0) -> int:
        """The address of a tensor, or of that which begins some elements later."""
        return self.arrays[index][tensor].pointer + shift * self.cell.item_size(tensor)

    def rows(self, index: int, tensor: str, batch: int, head: int, rows: Any, shift: int = 0) -> Floats:
        """See :meth:`pyfmha.bench.protocol.Inputs.rows`."""
        stored = head_of(self.arrays[index][tensor], self.cell, tensor, batch, head, shift)
        return to_float(stored[rows], self.cell.dtype_of(tensor))

    def host(self, index: int, tensor: str) -> Any:
        """A copy of a tensor, in its storage type and the layout of the cell."""
        batch, heads, seq, size = self.cell.shape(tensor)
        shape = (batch, heads, seq, size) if self.cell.layout == "bhsd" else (batch, seq, heads, size)
        return self.arrays[index][tensor].read(0, shape, STORAGE[self.cell.dtype])

    def close(self) -> None:
        """Free them; harmless when repeated."""
        for arrays in (*self.arrays, self.extra):
            for array in arrays.values():
                array.free()
