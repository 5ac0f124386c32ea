"""The values that a Gluon kernel works with, on the CPU: see gluon_emulator.py.

Elements of bf16 and fp16 are held as float32, rounded by `.to` and by assembly; such a tensor knows its element type.
So does one of e4m3, which is held as its bits, uint8: kernels look at shared memory of them as if it were of int16.
"""

import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyfmha.bfloat16 import bf16_from_float, float_from_bf16
from pyfmha.e4m3 import float_from_e4m3


class DType:
    """A Gluon element type."""

    def __init__(self, name: str, numpy: Any) -> None:
        self.name = name
        self.numpy = np.dtype(numpy)

    def rounded(self, values: Any) -> Any:
        if self.name == "bf16":
            return float_from_bf16(bf16_from_float(np.asarray(values, np.float32)))
        if self.name == "fp16":
            with np.errstate(over="ignore"):
                return np.asarray(values).astype(np.float16).astype(np.float32)
        return np.asarray(values).astype(self.numpy)

    def bits(self, values: Any) -> Any:
        """16-bit values as uint16."""
        values = np.asarray(values, np.float32)
        return bf16_from_float(values) if self.name == "bf16" else values.astype(np.float16).view(np.uint16)

    def from_bits(self, bits: Any) -> Any:
        bits = np.asarray(bits, np.uint16)
        return float_from_bf16(bits) if self.name == "bf16" else bits.view(np.float16).astype(np.float32)


FP16, BF16, FP32 = DType("fp16", np.float32), DType("bf16", np.float32), DType("fp32", np.float32)
INT16, INT32, INT64 = DType("i16", np.int16), DType("i32", np.int32), DType("i64", np.int64)
UINT8, E4M3 = DType("u8", np.uint8), DType("e4m3", np.uint8)
DTYPES = {"fp16": FP16, "bf16": BF16}
ITEM_SIZE = {FP16: 2, BF16: 2, UINT8: 1, E4M3: 1}
LARGEST = {FP16: 65504.0, BF16: float(float_from_bf16(np.uint16(0x7F7F)))}


class Tensor(np.ndarray):
    """A value of the kernel, scalars included; integer division rounds toward zero, as on the GPU.

    Attributes:
        element: the 16-bit type of its elements, where it was made by a conversion.
    """

    # Results of numpy have none, and it makes them without a call of Python's: most of the emulator's time goes there.
    element: DType | None = None
    type = types.SimpleNamespace(layout="layout")

    @property
    def dtype(self) -> Any:  # what the kernel asks for; numpy itself does not come here
        plain = plain_dtype(self)
        return self.element or _KNOWN.get(plain, plain)

    def _like(self, part: Any) -> Any:
        """A part or another view of it, with its element type."""
        if self.element is not None and isinstance(part, Tensor):
            part.element = self.element
        return part

    def __getitem__(self, key: Any) -> Any:
        return self._like(super().__getitem__(key))

    def __neg__(self) -> "Tensor":
        return self._like(np.negative(self))

    def to(self, dtype: DType, bitcast: bool = False) -> "Tensor":
        plain = np.array(self)
        return plain.view(dtype.numpy).view(Tensor) if bitcast else converted(plain, dtype)

    def reshape(self, *shape: Any) -> "Tensor":
        return self._like(super().reshape(*shape))

    def broadcast_to(self, shape: Sequence[int]) -> "Tensor":
        return self._like(np.broadcast_to(self, shape, subok=True))

    def permute(self, order: Sequence[int]) -> "Tensor":
        return self._like(self.transpose(order))

    # Values do not change: `x += y` makes another, and leaves what else is named as x was.
    def __iadd__(self, other: Any) -> Any:
        return self + other

    def __isub__(self, other: Any) -> Any:
        return self - other

    def __floordiv__(self, other: Any) -> Any:
        if self.ndim == 0 and isinstance(other, int) and other > 0:
            a = int(self)
            return tensor(a // other if a >= 0 else -(-a // other), plain_dtype(self))
        a, b = np.asarray(self), np.asarray(other, plain_dtype(self) if isinstance(other, int) else None)
        quotient, rest = np.divmod(a, b)
        return tensor(quotient + ((rest != 0) & ((a < 0) != (b < 0))), quotient.dtype)

    def __rfloordiv__(self, other: Any) -> Any:
        return tensor(other, plain_dtype(self)) // self

    def __mod__(self, other: Any) -> Any:
        return self - (self // other) * other


plain_dtype: Callable[[Any], Any] = np.ndarray.dtype.__get__
"""numpy's own of an array, a tensor's too."""

_KNOWN = {known.numpy: known for known in (INT64, INT32, FP32)}


def tensor(values: Any, dtype: Any = None) -> Tensor:
    return np.array(values, dtype).view(Tensor)


def of_element(values: Any, dtype: DType | None) -> Tensor:
    """Values that an element type holds exactly."""
    result = tensor(values, dtype and dtype.numpy)
    result.element = dtype if dtype in LARGEST or dtype is E4M3 else None
    return result


def converted(values: Any, dtype: DType) -> Tensor:
    """Values rounded to an element type."""
    return of_element(dtype.rounded(values), dtype)


@dataclass(frozen=True)
class FractionalEvictionPolicy:
    """Which lines of the L2 cache make room first."""

    primary: str
    fraction: float
    secondary: str = "evict_unchanged"

    def __post_init__(self) -> None:
        first = "evict_unchanged", "evict_first"
        assert self.primary in (*first, "evict_normal", "evict_last"), f"there is no eviction {self.primary}"
        assert self.secondary in first, f"there is no second eviction {self.secondary}"
        assert 0 < self.fraction <= 1, "of no lines, or of more than all"


@dataclass(frozen=True)
class CachePolicy:
    """How memory is cached: of TMA, in L2 alone."""

    l2: FractionalEvictionPolicy

    def __post_init__(self) -> None:
        assert isinstance(self.l2, FractionalEvictionPolicy)


class Pointer:
    """Addresses within one array; null where there is none."""

    def __init__(self, array: Any, dtype: DType, offset: Any = 0) -> None:
        self.array = array
        self.dtype = types.SimpleNamespace(element_ty=dtype)
        self.offset = tensor(offset, np.int64)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.array, self.dtype.element_ty, np.asarray(self.offset) + np.asarray(offset, np.int64))

    def __getitem__(self, key: Any) -> "Pointer":
        return Pointer(self.array, self.dtype.element_ty, self.offset[key])

    def to(self, dtype: DType) -> int:
        return 0 if self.array is None else 4096

    def at(self, mask: Any) -> tuple[Any, Any]:
        offset, mask = np.asarray(self.offset), np.asarray(mask)
        if mask.shape != offset.shape:
            mask = np.broadcast_to(mask, offset.shape)
        used = offset[mask]
        assert self.array is not None, "a null pointer is used"
        assert used.size == 0 or (used.min() >= 0 and used.max() < self.array.size), "an address is out of bounds"
        return mask, np.where(mask, offset, 0)


class Descriptor:
    """A TMA descriptor of an array of four dimensions with any strides."""

    def __init__(self, array: Any, dtype: DType, rows: int, columns: int) -> None:
        self.array = array
        self.dtype = dtype
        self.box = (1, 1, rows, columns)
        self.layout = "shared"

    def region(self, coordinates: Sequence[Any]) -> tuple[Any, Any]:
        """Slices of the array and of the box where they overlap."""
        starts = [int(c) for c in coordinates]
        array, box = [], []
        for start, length, size in zip(starts, self.box, self.array.shape, strict=True):
            low, high = max(start, 0), max(min(start + length, size), max(start, 0))
            array.append(slice(low, high))
            box.append(slice(low - start, high - start))
        return tuple(array), tuple(box)


class Uses(threading.local):
    """What a partition does in shared memory, and has not told the tensor cores, TMA or its own other warps yet.

    Attributes:
        unfenced: what it stored, and no fence has made visible to TMA and wgmma.
        fenced: what it stored before the last fence, but other warps perhaps did not yet.
        read: what products read that are complete in one warp, but in others perhaps not.
        looked: what was loaded into registers, and no fence has kept apart from what TMA brings later.
        passed: what was loaded before the last fence, but by other warps perhaps not yet.
        met: what all warps have loaded, but no fence has kept apart; by where it is, as the next.
        told: what others have loaded without a fence before they arrived where this partition waited.
        shared, taken: what threads stored for each other, and loaded of each other's, since all of them met.
    """

    def __init__(self) -> None:
        self.unfenced: list[Any] = []
        self.fenced: list[Any] = []
        self.read: list[Any] = []
        self.looked: list[Any] = []
        self.passed: list[Any] = []
        self.met: dict[int, Any] = {}
        self.told: dict[int, Any] = {}
        self.shared: list[Any] = []
        self.taken: list[Any] = []

    def fence(self) -> None:
        self.fenced, self.unfenced = self.fenced + self.unfenced, []
        self.passed, self.looked = self.passed + self.looked, []
        self.met, self.told = {}, {}

    def barrier(self) -> None:
        self.met |= {array.ctypes.data: array for array in self.looked}
        self.fenced, self.read, self.passed, self.looked = [], [], [], []
        self.meet()

    def meet(self) -> None:
        """All threads of the partition do."""
        self.shared, self.taken = [], []

    def exchange(self, array: Any, *, stored: bool) -> None:
        """Threads store what others load, or load what others stored."""
        assert stored or not _overlap(array, self.shared), "what another warp stores is loaded before all met"
        assert not stored or not _overlap(array, self.taken), "what another warp may still load is stored over"
        (self.shared if stored else self.taken).append(array)

    def arrive(self, barrier: "Barrier") -> None:
        """Another partition may have TMA overwrite what this one has told that it no longer needs. Gluon has all
        threads meet before one arrives (tests/aot/test_biased_audit.py looks for that)."""
        self.met |= {array.ctypes.data: array for array in self.looked}
        self.looked, self.passed = [], []
        assert not self.unfenced, "what was stored is handed on, and no fence has made it visible to wgmma"
        barrier.looked |= self.met

    def multiply(self, *operands: Any) -> None:
        for operand in operands:
            self.visible(operand)
        self.read += operands

    def visible(self, operand: Any) -> None:
        assert not _overlap(operand, self.unfenced), "wgmma reads what no fence has made visible to it"
        assert not _overlap(operand, self.fenced), "wgmma reads what other warps may not have stored yet"

    def overwrite(self, target: Any) -> None:
        assert not _overlap(target, self.read), "shared memory is overwritten that other warps may still read"

    def load(self, target: Any) -> None:
        self.overwrite(target)
        assert not _overlap(target, self.unfenced + self.fenced), "TMA may come before what was stored earlier"
        assert not _overlap(target, [*self.met.values(), *self.told.values()]), "no fence is between a load and TMA"


def _overlap(array: Any, others: Sequence[Any]) -> bool:
    return any(np.may_share_memory(array, other) for other in others)


USES = Uses()


class Shared:
    """A buffer in shared memory, or a part of one."""

    def __init__(self, array: Any, dtype: DType) -> None:
        self.array = array
        self.dtype = dtype

    def index(self, place: Any) -> "Shared":
        assert 0 <= int(place) < self.array.shape[0]
        return Shared(self.array[int(place)], self.dtype)

    def reshape(self, shape: Sequence[int]) -> "Shared":
        view = self.array.reshape(tuple(shape))
        assert np.shares_memory(view, self.array)
        return Shared(view, self.dtype)

    def reaching(self, box: tuple[int, ...]) -> "Shared":
        """So large a box: where it has more rows than this part, those behind it."""
        rows = self.array.shape[2]
        assert self.array.shape == (*box[:2], rows, box[3])
        assert box[2] % rows == 0
        if rows == box[2]:
            return self
        whole = self.array.base
        begin = (self.array.ctypes.data - whole.ctypes.data) // whole.strides[0]
        return Shared(whole[begin : begin + box[2] // rows].reshape(box), self.dtype)

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.array.transpose(order), self.dtype)

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        assert isinstance(start, int), "the compiler has to know where a part begins"
        assert 0 <= start <= start + length <= self.array.shape[dim]
        return Shared(self.array[(*[slice(None)] * dim, slice(start, start + length))], self.dtype)

    def reinterpret(self, dtype: DType, shape: Sequence[int], layout: Any) -> "Shared":
        return Shared(self.array.view(dtype.numpy).reshape(tuple(shape)), dtype)

    def words(self) -> Any:
        """What assembly reaches that is given this part: if that is one word, those behind it too."""
        if self.array.size > 1:
            return self.array
        whole = self.array
        while whole.base is not None:
            whole = whole.base
        return whole.reshape(-1)[(self.array.ctypes.data - whole.ctypes.data) // self.array.itemsize :]

    def store(self, value: Tensor) -> None:
        assert self.dtype not in LARGEST or value.element is self.dtype, "values are stored without conversion"
        USES.overwrite(self.array)
        self.array[...] = value
        if self.dtype is not INT32:  # which neither TMA nor wgmma is ever given
            USES.unfenced.append(self.array)

    def load(self, layout: Any) -> Tensor:
        if self.dtype is not INT32:
            USES.looked.append(self.array)
        return of_element(self.array, self.dtype)


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all bytes expected have come."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0
        self.used = False
        self.looked: dict[int, Any] = {}

    def settle(self) -> None:
        self.used = True
        if self.count and self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


BARRIERS: list[Any] = []
"""Arrays of them that the last launch has set aside."""

DEPTH = 16
"""Elements of a row and a column that one instruction of the tensor cores multiplies and adds."""


def product_of(a: Any, b: Any, acc: Any = None) -> Any:
    """a @ b, plus acc, in float32.

    Where sums may leave float32's range, their order decides what is infinite, of which sign, and what is NaN. That
    order is then the one of the instructions, not what the BLAS of the host takes.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        largest = float(np.abs(a).max(initial=0)) * float(np.abs(b).max(initial=0))
        if largest * a.shape[1] < 2.0**126:  # not so where one is NaN
            product = a @ b
            return product if acc is None else product + acc
        total = np.zeros((a.shape[0], b.shape[1]), np.float32) if acc is None else acc
        for first in range(0, a.shape[1], DEPTH):
            part = slice(first, first + DEPTH)
            # Products of 16 bits and a few sums of them are exact enough in float64, and within its range.
            total = (total + a[:, part].astype(np.float64) @ b[part].astype(np.float64)).astype(np.float32)
        return total


class Product:
    """A wgmma that has been issued."""

    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        assert (a.dtype if isinstance(a, Shared) else a.element) is b.dtype, "operands of different types"
        self.operands = a, b, acc, use_acc
        self.value: Tensor | None = None

    def complete(self) -> None:
        a, b, acc, use_acc = self.operands
        if isinstance(acc, Product):  # of the same registers: the one that was issued before is complete by now
            acc = acc.value
            assert acc is not None, "products are added up before they are complete"
        left, right = (_numbers(x.array if isinstance(x, Shared) else x) for x in (a, b))
        self.value = tensor(product_of(left, right, np.asarray(acc) if use_acc else None))


def _numbers(operand: Any) -> Any:
    plain = np.asarray(operand)
    return float_from_e4m3(plain) if plain.dtype == np.uint8 else plain.astype(np.float32)


class Copy:
    """Something that comes into a program's shared memory at some time."""

    def __init__(self, program: int | None, come: Callable[[], None]) -> None:
        self.program = program
        self.come = come


class Store:
    """A TMA store on its way: first it reads shared memory, later what it read arrives in global memory."""

    def __init__(self, descriptor: Descriptor, coordinates: Sequence[Any], source: Shared) -> None:
        assert not USES.unfenced, "TMA stores what no fence has made visible to it"
        self.array, self.box = descriptor.region(coordinates)
        self.target, self.source = descriptor.array, source.array
        self.taken: Any = None

    def take(self) -> None:
        if self.taken is None:
            self.taken = self.source[self.box].copy()

    def write(self) -> None:
        self.take()
        self.target[self.array] = self.taken
