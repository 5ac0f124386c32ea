"""Tensor descriptors: how a pointer argument is handed to a kernel as a tensor that TMA reads and writes.

The Tensor Memory Accelerator (sm_90 on) copies boxes of a tensor by a description of 128 bytes, a ``CUtensorMap``,
which the launcher makes from the pointer and from integer arguments. What TMA cannot take (CUDA driver API,
``cuTensorMapEncodeTiled``) is left to the algorithm's next variant: a base that is null or not aligned to 16 bytes,
sizes outside 1 to 2^31 - 1, strides that are not positive multiples of 16 bytes below 2^40.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pyfmha.errors import SpecError
from pyfmha.spec.abi import ctype
from pyfmha.spec.grid import GridExpression, parse_expression

MAX_RANK = 5
MAX_DESCRIPTORS = 6
"""Of one kernel; as PYFMHA_MAX_TENSORS in pyfmha_runtime.h."""

ELEMENTS = ("fp16", "bf16", "fp32", "i8", "u8", "i16", "u16", "i32", "u32", "fp8e5", "fp8e4nv")

Size = int | str


@dataclass(frozen=True)
class Descriptor:
    """One tensor descriptor, as a kernel's parameter.

    Sizes and strides are integers or expressions in integer arguments and constants of the kernel, as in a grid, in
    elements, outermost dimension first.

    Attributes:
        name: of the kernel's parameter.
        base: the pointer argument that holds the tensor's address and says its element type.
        shape: the tensor's sizes, one to five.
        strides: as many; the last is 1. That of a dimension of size 1 may be anything.
        block: the box that one copy moves: integers, or expressions in constants of the kernel.
        parts: how many blocks one copy moves, for a Gluon kernel: behind each other in the last dimension but one, and
            so in shared memory. Of block sizes Triton knows only powers of two, TMA any up to 256.
    """

    name: str
    base: str
    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    block: tuple[Size, ...]
    parts: int = 1


@dataclass(frozen=True)
class Tensor:
    """A descriptor read against its kernel's arguments and constants.

    Attributes:
        name, base: as the descriptor's.
        element: the element type: ``"fp16"``.
        item_size: bytes of one element.
        shape: the sizes' expressions.
        strides: the strides' expressions, less the last, which is 1.
        block: the box, or a part of it.
        parts: of the box, in the last dimension but one.
    """

    name: str
    base: str
    element: str
    item_size: int
    shape: tuple[GridExpression, ...]
    strides: tuple[GridExpression, ...]
    block: tuple[int, ...]
    parts: int = 1

    @property
    def rank(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)

    def __str__(self) -> str:
        shape, strides = (", ".join(e.text for e in part) for part in (self.shape, self.strides))
        strides = f"{strides}, 1" if strides else "1"
        parts = f", {self.parts} at a time" if self.parts > 1 else ""
        return f"{self.name}: {self.base}[{shape}], strides [{strides}], block {list(self.block)}{parts}"


def parse_descriptor(
    descriptor: Descriptor, types: Mapping[str, str], integers: frozenset[str], constants: Mapping[str, object]
) -> Tensor:
    """Read a descriptor.

    Args:
        descriptor: as the user wrote it.
        types: the type of each of the kernel's arguments, by name.
        integers: which of them are integers.
        constants: the kernel's compile-time constants by name.

    Raises:
        SpecError: saying which part is wrong and what is allowed.
    """
    said = f"descriptor {descriptor.name}"
    kind = types.get(descriptor.base)
    if kind is None or ctype(kind).kind != "pointer":
        raise SpecError(f"{said}: its base {descriptor.base!r} is no pointer argument")
    element = kind.removeprefix("*").removeprefix("k")
    if element not in ELEMENTS:
        raise SpecError(f"{said}: {descriptor.base} points to {element}; allowed are {', '.join(ELEMENTS)}")
    rank = len(descriptor.shape)
    if not 1 <= rank <= MAX_RANK or not rank == len(descriptor.strides) == len(descriptor.block):
        counts = f"{rank} sizes, {len(descriptor.strides)} strides and {len(descriptor.block)} block sizes"
        raise SpecError(f"{said} has {counts}; give 1 to {MAX_RANK} of each, the same number")
    if str(descriptor.strides[-1]).strip() != "1":
        raise SpecError(f"{said}: its last stride is {descriptor.strides[-1]!r}; TMA needs 1 there")
    block = tuple(_block(said, size, constants) for size in descriptor.block)
    item_size = ctype(kind).size
    if block[-1] * item_size < 16:
        raise SpecError(f"{said}: the last block size {block[-1]} is below 16 bytes, which TMA needs at least")
    shape, strides = (
        tuple(parse_expression(str(size), integers, constants, said) for size in part)
        for part in (descriptor.shape, descriptor.strides[:-1])
    )
    if descriptor.parts != 1 and (rank < 2 or not 1 <= descriptor.parts * block[-2] <= 256):
        raise SpecError(f"{said}: {descriptor.parts} parts of block {list(block)}; TMA moves 1 to 256 rows at a time")
    return Tensor(descriptor.name, descriptor.base, element, item_size, shape, strides, block, descriptor.parts)


def _block(said: str, size: Size, constants: Mapping[str, object]) -> int:
    value = parse_expression(str(size), frozenset(), constants, said).evaluate({})
    if value < 1 or value & (value - 1):
        raise SpecError(f"{said}: block size {size!r} is {value}; use powers of two")
    return value
