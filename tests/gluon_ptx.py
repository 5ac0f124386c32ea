"""Straight-line PTX of 32-bit floats on the CPU, as the Hopper kernel has it inline: see gluon_emulator.py."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def _lowest(a: Any, b: Any) -> Any:
    """Of a number and NaN, the number."""
    return np.fmin(a, b)


def _bits(a: Any) -> Any:
    return np.asarray(a, np.float32).view(np.int32)


def _power(a: Any) -> Any:
    result = np.exp2(np.asarray(a, np.float64)).astype(np.float32)
    return np.where(np.abs(result) < np.finfo(np.float32).tiny, np.float32(0), result)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "min.f32": _lowest,
    "max.NaN.f32": np.maximum,
    "ex2.approx.ftz.f32": _power,
    "rcp.approx.ftz.f32": lambda a: np.float32(1) / a,
    "add.f32": np.add,
    "sub.f32": np.subtract,
    "mul.f32": np.multiply,
    "neg.f32": np.negative,
    "fma.rn.f32": lambda a, b, c: (np.float64(a) * b + c).astype(np.float32),
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, places: (_bits(a) << places).view(np.float32),
}


ROWS_OF_A_WARP = 16


def of_warps(rows: Any) -> Any:
    """Whether it holds for some row of the same warp, for each row."""
    return np.repeat(np.asarray(rows).reshape(-1, ROWS_OF_A_WARP).any(1), ROWS_OF_A_WARP)


def products_where_due(asm: str, x: Any, factor: Any, due: Any) -> Any:
    """Elements times factors, in warps where that is due: PTX that multiplies a thread's registers in place, or jumps
    over that.

    Raises:
        NotImplementedError: it multiplies others, or not all.
    """
    found = [tuple(map(int, one)) for one in re.findall(r"mul\.f32 \$(\d+), \$(\d+), \$(\d+);", asm)]
    count = len(found)
    flag = re.search(r"setp\.ne\.b32 some, \$(\d+), 0; @!some bra\.uni REST;", asm)
    if found != [(i, i, 2 * count + i) for i in range(count)] or not flag or int(flag[1]) != 3 * count:
        raise NotImplementedError(f"the emulator does not know this assembly: {asm}")
    assert count * 128 == np.size(x), "128 threads have all elements"
    rows = np.asarray(due) != 0
    assert (of_warps(rows[:, 0])[:, None] == rows).all(), "threads of a warp part ways"
    return np.where(rows, np.asarray(x) * np.asarray(factor), x)


def run_straight_line(asm: str, outputs: int, inputs: Sequence[Any]) -> list[Any]:
    """The outputs $0, $1, ... of a block of PTX whose inputs are $outputs and those that follow.

    Raises:
        NotImplementedError: it has an instruction that is not known here.
    """
    values: dict[str, Any] = {f"${outputs + i}": np.asarray(value, np.float32) for i, value in enumerate(inputs)}

    def value_of(operand: str) -> Any:
        if operand.startswith("0f"):
            return np.uint32(int(operand[2:], 16)).view(np.float32)
        return int(operand) if operand.isdecimal() else values[operand]

    for line in asm.strip("{} ").split(";"):
        operation, _, operands = line.strip().partition(" ")
        if not operation or operation == ".reg":
            continue
        if operation not in OPERATIONS:
            raise NotImplementedError(f"the emulator does not know this instruction: {line}")
        target, *sources = re.split(r",\s*", operands)
        with np.errstate(all="ignore"):
            values[target] = np.asarray(OPERATIONS[operation](*map(value_of, sources)), np.float32)
    return [values[f"${i}"] for i in range(outputs)]
