"""wgmma as a kernel's own text has it, for the emulator: what its descriptors say is what it multiplies.

Known are operands of 16 bits, and of e4m3 by columns, with rows of 128, 64 or 32 bytes, swizzled, as TMA writes them:
columns of as many beside each other one after the other. Shared memory of the emulator has rows of all columns, and no
swizzle; here it is as the GPU has it.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from gluon_values import E4M3, USES, Shared, Tensor, product_of, tensor

from pyfmha.e4m3 import float_from_e4m3

ROWS_OF_PRODUCT, DEPTH = 64, 32
"""Rows of a product, and the bytes of each that one instruction multiplies."""
SWIZZLED = {0x40000040: 128, 0x80000020: 64, 0xC0000010: 32}
"""Bytes of a row, by the upper half of a descriptor: swizzled by as many, 8 of them without a gap."""


class Part:
    """One of the tensors that a text writes; the machine gives its value when it has waited for the products."""

    def __init__(self, columns: slice) -> None:
        self.columns = columns
        self.value: Tensor | None = None


class Products:
    """The products of one text, issued together."""

    def __init__(self, asm: str, args: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> None:
        self.products: list[tuple[Any, Any, int, int, bool]] = []  # a, b, keys or columns, whether b is by rows, adds
        self.shared = [value for value in args if isinstance(value, Shared)]
        USES.visible(self.shared[-1].array)  # the others TMA loads over what was stored
        self.dtype = self.shared[0].dtype
        self.item = 1 if self.dtype is E4M3 else 2
        widths = [shape[1] for shape in shapes]
        ends = np.cumsum(widths)
        self.parts = [Part(slice(end - width, end)) for end, width in zip(ends, widths, strict=True)]
        self.width = sum(widths)
        tensors = [value for value in args if not isinstance(value, Shared)]
        self.sums = np.concatenate(tensors[: len(widths)], 1) if tensors else None
        # Two 16-bit weights to an integer, as `pack` gives them, or four of 8 bits; a fourth of the integers of each
        # row to a thread.
        weights = [np.asarray(value).reshape(ROWS_OF_PRODUCT, -1) for value in tensors[len(widths) :]]
        self.weights = np.concatenate(weights, 1).view(np.uint32) if tensors else np.zeros((0, 0))
        written = self.width // 2
        self.first_weight = written * (2 if tensors else 1)
        self.registers: dict[str, Any] = {}
        first_address = self.first_weight + self.weights.shape[1] // 2
        for i, value in enumerate(self.shared):
            self.registers[f"${first_address + i}"] = value, 0
        for line in re.findall(r"[^{};]+(?:\{[^{}]*\}[^{};]*)*;", asm.strip()[1:-1]):
            self._read(line.strip(" ;"))

    def _read(self, line: str) -> None:
        registers = self.registers
        if line.startswith(".reg") or line in ("wgmma.fence.sync.aligned", "wgmma.commit_group.sync.aligned"):
            return
        if found := re.fullmatch(r"mov\.b32 (\S+), (0x[0-9A-Fa-f]+)", line):
            registers[found[1]] = int(found[2], 16)
        elif found := re.fullmatch(r"setp\.ne\.b32 (\S+), (\S+), \2", line):
            registers[found[1]] = False
        elif found := re.fullmatch(r"shr\.u32 (\S+), (\$\d+), 4", line):
            registers[found[1]] = registers[found[2]]
        elif found := re.fullmatch(r"(add\.u32|or\.b32) (\S+), (\S+), (\w+)", line):
            base, low = registers[found[3]]
            registers[found[2]] = base, low + int(found[4], 0)
        elif found := re.fullmatch(r"mov\.b64 (\S+), \{(\S+), (\S+)\}", line):
            registers[found[1]] = *registers[found[2]], SWIZZLED[registers[found[3]]] // self.item
        elif line.startswith("wgmma.mma_async"):
            self._issue(line)
        else:
            raise NotImplementedError(f"the emulator does not know this instruction: {line}")

    def _issue(self, line: str) -> None:
        kind = {"fp16": "f16", "bf16": "bf16", "e4m3": "e4m3"}[self.dtype.name]
        sums = ", ".join(f"${i}" for i in range(self.width // 2))
        opcode = f"wgmma.mma_async.sync.aligned.m64n{self.width}k{DEPTH // self.item}.f32.{kind}.{kind} {{{sums}}}, "
        assert line.startswith(opcode), line
        a, b, adds, *rest = re.findall(r"\{[^}]*\}|[^,\s]+", line.removeprefix(opcode))
        by_rows = rest == ["1", "1", "1"]
        assert by_rows or rest == ["1", "1", *["0", "0"][: 2 * (self.item - 1)]], line
        if a.startswith("{"):
            weights = [int(name) - self.first_weight for name in re.findall(r"\$(\d+)", a)]
            assert weights == list(range(weights[0], weights[0] + 4))
            left: Any = weights[0] // 4
        else:
            left = self.registers[a]
        self.products.append((left, self.registers[b], self.width, by_rows, adds == "1" or self.registers[adds]))

    def complete(self) -> None:
        total = None
        for left, right, width, by_rows, adds in self.products:
            if isinstance(left, int):
                bits = self.weights[:, 8 * left : 8 * left + 8]
                a = self._numbers(np.ascontiguousarray(bits).view(np.uint8 if self.item == 1 else np.uint16))
            else:
                a = _by_columns(*left, ROWS_OF_PRODUCT)
            b = _by_rows(*right, width) if by_rows else _by_columns(*right, width).T
            if total is None and adds:
                total = self.sums
            total = product_of(a, b, total if adds else None)
        assert total is not None
        for part in self.parts:
            part.value = tensor(total[:, part.columns], np.float32)

    def _numbers(self, bits: Any) -> Any:
        return float_from_e4m3(bits) if self.item == 1 else np.asarray(self.dtype.from_bits(bits), np.float32)


def _memory(base: Shared, row: int) -> tuple[Any, int]:
    """All of the buffer, as it lies in memory, and where in it a part begins."""
    whole = base.array
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    begin = (base.array.ctypes.data - whole.ctypes.data) // whole.itemsize
    rows, columns = whole.shape[-2:]
    assert columns % row == 0
    assert begin % (rows * columns) == 0
    return whole.reshape(-1, rows, columns // row, row).transpose(0, 2, 1, 3).reshape(-1, row), begin


def _by_columns(base: Shared, low: int, width: int, rows: int) -> Any:
    """[rows, as many as one instruction multiplies], of rows of so many elements."""
    memory, begin = _memory(base, width)
    item = 1 if base.dtype is E4M3 else 2
    row, column = divmod(begin + (low & 0x3FFF) * 16 // item, width)
    assert row % 8 == 0, "a matrix begins within what is swizzled together"
    found = memory[row : row + rows, column : column + DEPTH // item]
    assert found.shape == (rows, DEPTH // item), "a product reads past shared memory"
    return float_from_e4m3(found) if item == 1 else found.astype(np.float32)


def _by_rows(base: Shared, low: int, width: int, columns: int) -> Any:
    """[16, columns] of 16 bits, of rows of so many elements, the next ones as many bytes further as the descriptor
    says."""
    memory, begin = _memory(base, width)
    row, column = divmod(begin + (low & 0x3FFF) * 8, width)
    assert row % 8 == 0
    assert column == 0
    each = (low >> 16) * 8 // width
    depth = DEPTH // 2
    found = [memory[row + i * each : row + i * each + depth] for i in range(columns // width)]
    assert all(part.shape == (depth, width) for part in found), "a product reads past shared memory"
    return np.concatenate(found, 1).astype(np.float32)
