"""PTX of 32-bit floats on the CPU, as the Hopper kernel has it inline: see gluon_emulator.py."""

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


def _of_three(a: Any, b: Any, c: Any, table: Any) -> Any:
    if _bits(table) != 0xFE:
        raise NotImplementedError("the emulator knows no other operation of three than their `or`")
    return (_bits(a) | _bits(b) | _bits(c)).view(np.float32)


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
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, places: (_bits(a) << places).view(np.float32),
    "and.b32": lambda a, b: (_bits(a) & _bits(b)).view(np.float32),
    "or.b32": lambda a, b: (_bits(a) | _bits(b)).view(np.float32),
    "lop3.b32": _of_three,
    "setp.ne.u32": lambda a, b: _bits(a) != b,
    "setp.gt.f32": np.greater,
    "setp.geu.f32": lambda a, b: ~np.less(a, b),
    "vote.sync.any.pred": lambda a, _threads: a,  # a thread votes alone
}


def run_ptx(asm: str, outputs: int, inputs: Sequence[Any], *, in_place: bool = False) -> list[Any]:
    """The outputs $0, $1, ... of a block of PTX whose inputs are $outputs and those that follow.

    Args:
        asm: of 32-bit floats and, as their bits, integers; with jumps ahead where all threads of a warp agree, which
            here are those that share an index of the inputs.
        outputs: how many.
        inputs: arrays of one shape.
        in_place: whether the outputs have the inputs to begin with.

    Raises:
        NotImplementedError: it has an instruction that is not known here.
    """
    values: dict[str, Any] = {f"${outputs + i}": np.asarray(value, np.float32) for i, value in enumerate(inputs)}
    if in_place:
        values |= {f"${i}": np.asarray(value, np.float32) for i, value in enumerate(inputs[:outputs])}
    names = [f"${i}" for i in range(outputs)]
    return _run([line.strip() for line in asm.strip("{} ").split(";")], names, values)


def _run(lines: Sequence[str], outputs: Sequence[str], values: dict[str, Any]) -> list[Any]:
    def value_of(operand: str) -> Any:
        if operand.startswith("0f"):
            return np.uint32(int(operand[2:], 16)).view(np.float32)
        if operand.startswith("0x"):
            return np.uint32(int(operand, 16)).view(np.float32)
        return int(operand) if operand.isdecimal() else values[operand]

    for index, line in enumerate(lines):
        operation, _, operands = re.sub(r"^\w+: *", "", line).partition(" ")
        if not operation or operation == ".reg":
            continue
        if operation == "bra.uni":
            return _run(lines[_place(lines, operands) :], outputs, values)
        if operation.startswith("@"):
            jumps, label = values[operation[1:]] != 0, operands.split()[1]
            ways = (lines[index + 1 :], lines[_place(lines, label) :])
            results = [np.zeros(jumps.shape, np.float32) for _ in outputs]
            for way, here in zip(ways, (~jumps, jumps), strict=True):
                if not here.any():
                    continue
                there = {name: value[here] if value.ndim else value for name, value in values.items()}
                for whole, part in zip(results, _run(way, outputs, there), strict=True):
                    whole[here] = part
            return results
        if operation not in OPERATIONS:
            raise NotImplementedError(f"the emulator does not know this instruction: {line}")
        target, *sources = re.split(r",\s*", operands)
        with np.errstate(all="ignore"):
            values[target] = np.asarray(OPERATIONS[operation](*map(value_of, sources)), np.float32)
    return [values[name] for name in outputs]


def _place(lines: Sequence[str], label: str) -> int:
    """Of the line that a label stands before."""
    (place,) = (i for i, line in enumerate(lines) if line.startswith(f"{label}:"))
    return place
