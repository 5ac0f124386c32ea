"""What expressions compute with: integers of 64 bits, exact or refused, and floats of 64."""

import math
from collections.abc import Callable
from typing import Any

LIMIT = 1 << 63
"""Integers are from minus this to below it."""


class EvaluationError(ArithmeticError):
    """An expression has no value: see :data:`NO_VALUE`, which is all that is said of it, in C too."""

    def __init__(self) -> None:
        super().__init__(NO_VALUE)


NO_VALUE = "a size overflows 64 bits, a number is divided by zero, or what is read is not there"


def add(a: int, b: int) -> int:
    """The sum of two integers."""
    return fits(a + b)


def sub(a: int, b: int) -> int:
    """The difference of two integers."""
    return fits(a - b)


def mul(a: int, b: int) -> int:
    """The product of two integers."""
    return fits(a * b)


def div(a: int, b: int) -> int:
    """The quotient of two integers, cut toward zero."""
    quotient = abs(a) // abs(_divisor(b))
    return fits(quotient if (a < 0) == (b < 0) else -quotient)


def mod(a: int, b: int) -> int:
    """What :func:`div` leaves."""
    return a - b * div(a, b)


def floordiv(a: int, b: int) -> int:
    """The quotient of two integers, rounded down."""
    return fits(a // _divisor(b))


def cdiv(a: int, b: int) -> int:
    """The quotient of two integers, rounded up."""
    return fits(-(-a // _divisor(b)))


def fits(value: int) -> int:
    """An integer that fits in 64 bits.

    Raises:
        EvaluationError: it does not.
    """
    if not -LIMIT <= value < LIMIT:
        raise EvaluationError
    return value


def _divisor(value: int) -> int:
    if value == 0:
        raise EvaluationError
    return value


def quotient(a: float, b: float) -> float:
    """The quotient of two floats, as IEEE 754 has it by zero too."""
    if b == 0:
        return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1.0, b)
    return a / b


INTEGERS: dict[str, Callable[[int, int], int]] = {
    "add": add,
    "sub": sub,
    "mul": mul,
    "div": div,
    "floordiv": floordiv,
    "mod": mod,
    "cdiv": cdiv,
    "min": min,
    "max": max,
}
FLOATS: dict[str, Callable[[float, float], float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": quotient,
    "min": lambda a, b: b if b < a else a,
    "max": lambda a, b: b if b > a else a,
}


def _item(values: Any, index: int) -> Any:
    if not 0 <= index < len(values):
        raise EvaluationError
    return values[index]


# What the Python of an expression calls. Infinite constants have no literal.
CALLED = {**INTEGERS, **{f"_float_{name}": made for name, made in FLOATS.items()}, "_item": _item, "inf": math.inf}
