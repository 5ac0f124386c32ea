"""PTX of 32-bit floats on the CPU, as the Hopper kernel has it inline: see gluon_emulator.py."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def _lowest(a: Any, b: Any) -> Any:
    """Of a number and NaN, the number."""
    return np.fmin(a, b)


def _bits(a: Any) -> Any:
    return np.asarray(a, np.float32).view(np.int32)


def _integers(a: Any) -> Any:
    """The bits of a register, or a number that stands in the text."""
    return np.int32(a) if isinstance(a, int) else _bits(a)


def _and(operation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b, other: operation(a, b) & (np.asarray(other) != 0)


def _or(operation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b, other: operation(a, b) | (np.asarray(other) != 0)


def _above(a: Any, b: Any) -> Any:
    return np.greater(_integers(a), _integers(b))


def _power(a: Any) -> Any:
    result = np.exp2(np.asarray(a, np.float64)).astype(np.float32)
    return np.where(np.abs(result) < np.finfo(np.float32).tiny, np.float32(0), result)


def _of_three(a: Any, b: Any, c: Any, table: Any) -> Any:
    if _integers(table) == 0xEA:
        return ((_bits(a) & _bits(b)) | _bits(c)).view(np.float32)
    if _integers(table) != 0xFE:
        raise NotImplementedError("the emulator does not know this operation of three")
    return (_bits(a) | _bits(b) | _bits(c)).view(np.float32)


def _of_integers(operation: Callable[..., Any], kind: Any) -> Callable[..., Any]:
    """An operation of bits that are integers of a kind: of two it makes one, or with a third a condition."""

    def of(a: Any, b: Any, other: Any = None) -> Any:
        found = operation(_bits(a).view(kind), _bits(b).view(kind))
        return found.view(np.float32) if other is None else found | (np.asarray(other) != 0)

    return of


OPERATIONS: dict[str, Callable[..., Any]] = {
    "min.f32": _lowest,
    "max.NaN.f32": np.maximum,
    "max.f32": np.fmax,
    "abs.f32": np.abs,
    "ex2.approx.ftz.f32": _power,
    "rcp.approx.ftz.f32": lambda a: np.float32(1) / a,
    "add.f32": np.add,
    "sub.f32": np.subtract,
    "mul.f32": np.multiply,
    "neg.f32": np.negative,
    "fma.rn.f32": lambda a, b, c: (np.float64(a) * b + c).astype(np.float32),
    "mov.b32": lambda a: _integers(a).view(np.float32),
    "shl.b32": lambda a, places: (_bits(a) << places).view(np.float32),
    "and.b32": lambda a, b: (_bits(a) & _bits(b)).view(np.float32),
    "or.b32": lambda a, b: (_bits(a) | _bits(b)).view(np.float32),
    "lop3.b32": _of_three,
    "setp.ne.u32": lambda a, b: _bits(a) != b,
    "max.s32": _of_integers(np.maximum, np.int32),
    "max.u32": _of_integers(np.maximum, np.uint32),
    "setp.gt.f32": np.greater,
    "setp.lt.f32": np.less,
    "setp.neu.f32": np.not_equal,
    "selp.f32": lambda a, b, chosen: np.where(np.asarray(chosen) != 0, a, b),
    "setp.gt.u32": lambda a, b: _of_integers(np.greater, np.uint32)(a, b, False),
    "setp.gt.or.u32": _of_integers(np.greater, np.uint32),
    "setp.gt.or.f32": _or(np.greater),
    "setp.lt.or.f32": _or(np.less),
    "setp.gt.and.f32": _and(np.greater),
    "setp.lt.and.f32": _and(np.less),
    "setp.eq.f32": np.equal,
    "setp.ge.or.f32": _or(np.greater_equal),
    "setp.gt.s32": _above,
    "setp.gt.or.s32": _or(_above),
    "or.pred": lambda a, b: (np.asarray(a) != 0) | (np.asarray(b) != 0),
    "selp.b32": lambda a, b, of: np.where(np.asarray(of) != 0, _integers(a), _integers(b)).view(np.float32),
    "setp.geu.f32": lambda a, b: ~np.less(a, b),
    "vote.sync.any.pred": lambda a, _threads: a,  # a thread votes alone
}


THREADS = 32
"""Of a warp."""


def _any(a: Any, _threads: Any) -> Any:
    return np.repeat(np.asarray(a).reshape(-1, THREADS).any(1), THREADS)


def _beside(a: Any, distance: int, _range: Any, _threads: Any) -> Any:
    return np.asarray(a).reshape(-1, THREADS)[:, np.arange(THREADS) ^ distance].reshape(-1)


OF_WARPS = OPERATIONS | {"vote.sync.any.pred": _any, "shfl.sync.bfly.b32": _beside}
"""Where values are those of all threads of some warps, one after the other."""

ROWS_OF_A_WARP = 16


def of_warps(rows: Any) -> Any:
    """Whether it holds for some row of the same warp, for each row."""
    return np.repeat(np.asarray(rows).reshape(-1, ROWS_OF_A_WARP).any(1), ROWS_OF_A_WARP)


def kept_references(room: float, m: Any, m_new: Any) -> tuple[Any, Any]:
    """Rows whose references stay, unless one of the same warp has grown by more than `room`; and whether one has."""
    growth = np.asarray(m_new) - np.asarray(m)
    grown = of_warps(growth > room)
    return np.where(grown, m_new, m).astype(np.float32), grown.astype(np.int32)


def products_where(asm: str, x: Any, factor: Any, due: Any) -> Any:
    """Elements times factors in warps where it is due: a block of PTX that multiplies a thread's registers in place, or
    jumps over that.

    Raises:
        NotImplementedError: it multiplies others, or not all.
    """
    found = re.findall(r"mul\.f32 \$(\d+), \$(\d+), \$(\d+);", asm)
    count = len(found)
    known = [(str(i), str(i), str(2 * count + i)) for i in range(count)]
    flag = re.search(r"setp\.ne\.b32 due, \$(\d+), 0; @!due bra\.uni SAME;", asm)
    if found != known or flag is None or int(flag[1]) != 3 * count or count * 128 != np.size(x):
        raise NotImplementedError(f"the emulator does not know this assembly: {asm}")
    rows = np.asarray(due).reshape(-1, ROWS_OF_A_WARP * np.shape(x)[1])
    assert (rows == rows[:, :1]).all(), "threads of a warp part ways"
    with np.errstate(all="ignore"):
        return np.where(np.asarray(due) != 0, np.asarray(x) * factor, x).astype(np.float32)


def run_ptx(
    asm: str, outputs: int, inputs: Sequence[Any], *, in_place: bool = False, warps: int | None = None
) -> list[Any]:
    """The outputs $0, $1, ... of a block of PTX whose inputs are $outputs and those that follow.

    Args:
        asm: of 32-bit floats and, as their bits, integers; with jumps ahead where all threads of a warp agree, which
            here are those that share an index of the inputs.
        outputs: how many.
        inputs: arrays of one shape.
        in_place: whether the outputs have the inputs to begin with.
        warps: as in_place of so many outputs; and threads of whole warps vote together, and see each other's registers.

    Raises:
        NotImplementedError: it has an instruction that is not known here.
    """
    values: dict[str, Any] = {f"${outputs + i}": np.asarray(value, np.float32) for i, value in enumerate(inputs)}
    if in_place or warps is not None:
        tied = outputs if warps is None else warps
        values |= {f"${i}": np.asarray(value, np.float32) for i, value in enumerate(inputs[:tied])}
    text = _parsed(asm)
    values = text.constants | values
    with np.errstate(all="ignore"):
        known = OPERATIONS if warps is None else OF_WARPS
        results = _run(text, 0, [f"${i}" for i in range(outputs)], values, known)
    return [result if np.ndim(result) else np.full(np.shape(inputs[0]), result) for result in results]


class _Text:
    """Instructions, without declarations.

    Attributes:
        lines: operation and operands of each.
        labels: where each stands.
        constants: the numbers among the operands.
    """

    def __init__(self) -> None:
        self.lines: list[tuple[str, list[str]]] = []
        self.labels: dict[str, int] = {}
        self.constants: dict[str, Any] = {}

    @functools.cached_property
    def named(self) -> list[frozenset[str]]:
        """Registers, and the rest, that each line and those behind it name."""
        sets = [frozenset[str]()]
        for operation, operands in reversed(self.lines):
            sets.append(sets[-1].union(operands, [operation.strip("@!")]))
        return sets[::-1]


@functools.cache
def _parsed(asm: str) -> _Text:
    """The instructions.

    Raises:
        NotImplementedError: one is not known here.
    """
    found = _Text()
    for text in asm.strip("{} ").split(";"):
        label, operation, operands = re.fullmatch(r"\s*(?:(\w+):)?\s*(\S*)\s*(.*?)\s*", text, re.DOTALL).groups()
        if operation.startswith("@"):
            operands = operands.split()[1]
        elif operation not in ("", ".reg", "bra.uni", *OF_WARPS):
            raise NotImplementedError(f"the emulator does not know this instruction: {text}")
        if label:
            found.labels[label] = len(found.lines)
        if operation not in ("", ".reg"):
            found.lines.append((operation, re.split(r",\s*", operands)))
    for operand in {operand for _, operands in found.lines for operand in operands}:
        if operand.startswith(("0f", "0x")):
            found.constants[operand] = np.uint32(int(operand[2:], 16)).view(np.float32)
        elif re.fullmatch(r"-?\d+", operand):
            found.constants[operand] = int(operand)
        elif re.fullmatch(r"-?\d+\.\d+(e-?\d+)?", operand):
            found.constants[operand] = np.float32(operand)
    return found


def _run(
    text: _Text, index: int, outputs: Sequence[str], values: dict[str, Any], known: dict[str, Callable[..., Any]]
) -> list[Any]:
    """The outputs, when all lines from one on have been carried out."""
    while index < len(text.lines):
        operation, operands = text.lines[index]
        index += 1
        if operation == "bra.uni":
            index = text.labels[operands[0]]
        elif operation.startswith("@"):
            jumps = (values[operation[1:].removeprefix("!")] != 0) ^ operation.startswith("@!")
            target = text.labels[operands[0]]
            if jumps.all():
                index = target
            elif jumps.any():
                return _parting(text, ((index, ~jumps), (target, jumps)), outputs, values, known)
        else:
            target, *sources = operands
            values[target] = np.asarray(known[operation](*[values[source] for source in sources]), np.float32)
    return [values[name] for name in outputs]


def _parting(
    text: _Text,
    ways: Sequence[tuple[int, Any]],
    outputs: Sequence[str],
    values: dict[str, Any],
    known: dict[str, Callable[..., Any]],
) -> list[Any]:
    """The same, where threads go on at different lines."""
    results = [np.zeros(ways[0][1].shape, np.float32) for _ in outputs]
    for index, here in ways:
        needed = text.named[index].union(outputs)
        there = {name: value[here] if np.ndim(value) else value for name, value in values.items() if name in needed}
        for whole, part in zip(results, _run(text, index, outputs, there, known), strict=True):
            whole[here] = part
    return results


WARPS, ROWS_OF_WARP, COLUMNS = 4, 8, 8
"""Of a tensor core's result: warps beside each other, each with twice so many rows; columns that four threads share."""


def by_thread(values: Any) -> Any:
    """The registers of the 128 threads of a warpgroup, [threads, registers]: of [n] or [1, n], dealt out one after the
    other, to several if there are fewer; and of [64, n] as wgmma leaves its result."""
    values = np.atleast_1d(np.asarray(values))
    if values.shape[1:] == (COLUMNS // 2,):  # one for each thread of those that share a row
        return values.reshape(WARPS, 2, ROWS_OF_WARP, -1).transpose(0, 2, 3, 1).reshape(32 * WARPS, 2)
    if values.ndim == 1 or values.shape[0] == 1:
        return np.resize(values, (max(1, values.size // (32 * WARPS)), 32 * WARPS)).T
    parts = values.reshape(WARPS, 2, ROWS_OF_WARP, -1, COLUMNS // 2, 2)  # warp, row of two, row, block, thread, column
    return parts.transpose(0, 2, 4, 3, 1, 5).reshape(32 * WARPS, -1)


def of_threads(registers: Any, columns: int) -> Any:
    """What `by_thread` makes such registers of, [64, columns]."""
    if columns == COLUMNS // 2:
        parts = np.asarray(registers).reshape(WARPS, ROWS_OF_WARP, columns, 2)
        return parts.transpose(0, 3, 1, 2).reshape(2 * ROWS_OF_WARP * WARPS, columns)
    parts = np.asarray(registers).reshape(WARPS, ROWS_OF_WARP, COLUMNS // 2, columns // COLUMNS, 2, 2)
    return parts.transpose(0, 4, 1, 3, 2, 5).reshape(2 * ROWS_OF_WARP * WARPS, columns)


def _first_of_warps() -> Any:
    return np.arange(WARPS * THREADS) % THREADS == 0


@functools.cache
def _word(text: str) -> tuple[str | None, str, str, list[str | int]]:
    """The condition of an instruction, its operation, the first operand and the others."""
    condition, operation, operands = re.fullmatch(r"(?:@(\w+) )?(\S+) (.*)", text).groups()
    target, *sources = (operand.strip("[]") for operand in re.split(r",\s*", operands))
    return condition, operation, target, [int(x) if re.fullmatch(r"-?\d+", x) else x for x in sources]


def shared_word(text: str, registers: dict[str, Any], memory: Any) -> bool:
    """Whether it is an instruction around a word that warps change at once; it is then carried out."""
    condition, operation, target, sources = _word(text)
    does = np.broadcast_to(registers[condition] if condition else True, WARPS * THREADS)
    values = [x if isinstance(x, int) else registers.get(x) for x in sources]
    if operation == "elect.sync":
        registers[target.removeprefix("_|")] = _first_of_warps()
    elif operation == "atom.shared.or.b32":
        assert values[1] == 0
        registers[target] = np.where(does, memory[values[0] // 4], registers[target]).astype(np.int32)
    elif operation == "atom.shared.max.s32":  # one thread a warp, of which one comes after the other
        found = np.zeros(does.shape, np.int32)
        for thread in np.flatnonzero(does):
            found[thread] = memory[values[0] // 4].flat[0]
            memory[values[0] // 4] = max(found[thread], np.broadcast_to(values[1], does.shape)[thread])
        registers[target] = np.where(does, found, registers[target]).astype(np.int32)
    elif operation == "red.shared.max.s32":
        place, value = np.broadcast_arrays(registers[target] // 4, values[0])
        chosen = np.broadcast_to(value, does.shape)[does]
        memory[place.flat[0]] = np.max(chosen, initial=memory[place.flat[0]])
    elif operation in WORDS:
        found = np.broadcast_to(WORDS[operation](*values), WARPS * THREADS)
        registers[target] = np.where(does, found, registers.get(target, found))
    else:
        return False
    return True


WORDS: dict[str, Callable[..., Any]] = {
    "mov.b32": lambda a: np.asarray(a),
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b,
    "add.s32": lambda a, b: a + b,
    "setp.ne.and.s32": lambda a, b, other: (a != b) & other,
    "setp.gt.and.s32": lambda a, b, other: (a > b) & other,
    "setp.gt.s32": np.greater,
    "setp.gt.f32": np.greater,
    "max.f32": np.fmax,
    "vote.sync.any.pred": _any,
}


def run_by_thread(asm: str, registers: dict[str, Any], memory: Any) -> None:
    """Straight-line PTX that loads from and stores to shared memory, for all threads at once.

    Args:
        asm: the text.
        registers: by name, of a value each or one for each thread; what it writes is added.
        memory: 32-bit elements, one axis; its first has the address 0.

    Raises:
        NotImplementedError: it has an instruction that is not known here.
    """

    def at(name: str, offset: str | None, size: int) -> Any:
        addresses = registers[name] + int(offset or 0)
        assert not (addresses % size).any(), "a pair is not aligned"
        assert (addresses >= 0).all(), "an address is out of bounds"
        assert (addresses + size <= memory.nbytes).all(), "an address is out of bounds"
        return addresses // 4

    for text in _lines_of_threads(asm):
        if shared_word(text, registers, memory):
            continue
        kind, found = _of_memory(text)
        if kind == "add":
            registers[found[1]] = registers[found[2]] + registers[found[3]]
        elif kind == "equal":
            registers[found[1]] = registers[found[2]] == int(found[3])
        elif kind == "store":
            memory[at(found[1], found[2], 4)] = registers[found[3]]
        elif kind == "store if":
            place, does = np.broadcast_arrays(at(found[3], None, 4 * int(found[2])), registers[found[1]])
            for i, name in enumerate(found[4].split(", ")):
                memory[place[does] + i] = np.broadcast_to(registers[name], does.shape)[does]
        else:
            place = at(found[3], found[4], 8)
            registers[found[1]], registers[found[2]] = memory[place].copy(), memory[place + 1].copy()


@functools.cache
def _lines_of_threads(asm: str) -> list[str]:
    """The instructions of straight-line PTX, without declarations."""
    lines = [line.strip(" ;") for line in re.findall(r"[^{};]+(?:\{[^{}]*\}[^;]*)?;", asm.strip()[1:-1])]
    return [line for line in lines if not line.startswith(".reg")]


OF_MEMORY = {
    "add": r"add\.s32 (\S+), (\S+), (\S+)",
    "equal": r"setp\.eq\.u32 (\S+), (\S+), (\d+)",
    "store": r"st\.shared\.f32 \[([^]+]+)(?:\+(\d+))?\], (\S+)",
    "store if": r"@(\S+) st\.shared\.v(\d)\.b32 \[(\S+)\], \{(.+)\}",
    "load": r"ld\.shared\.v2\.f32 \{(\S+), (\S+)\}, \[([^]+]+)(?:\+(\d+))?\]",
}


@functools.cache
def _of_memory(text: str) -> tuple[str, re.Match[str]]:
    for kind, pattern in OF_MEMORY.items():
        if found := re.fullmatch(pattern, text):
            return kind, found
    raise NotImplementedError(f"the emulator does not know this instruction: {text}")
