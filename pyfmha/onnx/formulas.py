"""Elements of tensors as expressions of their indices: numbers, conditions, and choices between numbers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyfmha.onnx.sizes import Bounds, Size


@dataclass(frozen=True)
class Data:
    """A number or a condition that only the run knows.

    Attributes:
        source: the name of the value that it is an element of.
    """

    source: str


@dataclass(frozen=True)
class AtLeast0:
    """The condition that an expression is not negative."""

    size: Size


@dataclass(frozen=True)
class All:
    """The condition that all of several hold."""

    parts: frozenset[Any]


@dataclass(frozen=True)
class Some:
    """The condition that at least one of several holds."""

    parts: frozenset[Any]


@dataclass(frozen=True)
class Pick:
    """One number where a condition holds, another elsewhere."""

    condition: Any
    yes: Any
    no: Any


Condition = bool | Data | AtLeast0 | All | Some
Number = Size | float | Data | Pick


def both(left: Condition, right: Condition) -> Condition:
    """Whether two conditions hold."""
    if isinstance(left, bool):
        return right if left else False
    if isinstance(right, bool):
        return left if right else False
    return All(_parts(left, All) | _parts(right, All))


def either(left: Condition, right: Condition) -> Condition:
    """Whether one of two conditions holds."""
    if isinstance(left, bool):
        return True if left else right
    if isinstance(right, bool):
        return True if right else left
    return Some(_parts(left, Some) | _parts(right, Some))


def _parts(condition: Condition, kind: type) -> frozenset[Any]:
    if isinstance(condition, (All, Some)) and isinstance(condition, kind):
        return condition.parts
    return frozenset({condition})


def negated(condition: Condition) -> Condition:
    """Whether a condition does not hold."""
    if isinstance(condition, bool):
        return not condition
    if isinstance(condition, AtLeast0):
        return AtLeast0(-condition.size - 1)
    if isinstance(condition, (All, Some)):
        other = Some if isinstance(condition, All) else All
        return other(frozenset(map(negated, condition.parts)))
    return condition


def settled(element: Any, bounds: Bounds) -> Any:
    """An element with the conditions left out that the bounds of its indices decide."""
    if isinstance(element, AtLeast0):
        if element.size.at_least_0(bounds):
            return True
        return False if (-element.size - 1).at_least_0(bounds) else element
    if isinstance(element, (All, Some)):
        join = both if isinstance(element, All) else either
        result: Condition = isinstance(element, All)
        for part in sorted(element.parts, key=str):
            result = join(result, settled(part, bounds))
        if isinstance(result, Some) and any(_denied(part) in result.parts for part in result.parts):
            return True
        return result
    if isinstance(element, Pick):
        return chosen(settled(element.condition, bounds), element.yes, element.no)
    return element


def _denied(condition: Condition) -> Condition | None:
    """What holds where a condition does not; nothing is known of data, of which each element may be another."""
    return AtLeast0(-condition.size - 1) if isinstance(condition, AtLeast0) else None


def chosen(condition: Condition, yes: Any, no: Any) -> Any:
    """One of two elements, numbers or conditions."""
    if isinstance(condition, bool):
        return yes if condition else no
    if yes == no:
        return yes
    if is_condition(yes) and is_condition(no):
        other = negated(condition)
        if _follows(other, yes) and _follows(condition, no):
            return both(yes, no)
        if _follows(yes, condition) and _follows(no, other):
            return either(yes, no)
        return either(both(condition, yes), both(other, no))
    return Pick(condition, yes, no)


def _follows(condition: Condition, other: Condition) -> bool:
    """Whether a condition implies another, as far as their numbers tell."""
    if not isinstance(condition, AtLeast0) or not isinstance(other, AtLeast0):
        return False
    return (other.size - condition.size).at_least_0({})


def is_condition(element: Any) -> bool:
    """Whether an element is a condition; data may be one."""
    return isinstance(element, (bool, AtLeast0, All, Some))


def mapped(act: Callable[..., Any], *elements: Any) -> Any:
    """A function of elements, taken into their choices."""
    for at, element in enumerate(elements):
        if isinstance(element, Pick):
            before, after = elements[:at], elements[at + 1 :]
            yes = mapped(act, *before, element.yes, *after)
            return chosen(element.condition, yes, mapped(act, *before, element.no, *after))
    for element in elements:
        if isinstance(element, Data):
            return element
    return act(*elements)


def as_number(element: Any) -> Any:
    """A condition as 1 and 0; numbers as they are."""
    return chosen(element, Size.of(1), Size()) if is_condition(element) else element


def as_condition(element: Any) -> Any:
    """Whether a number is not 0; conditions as they are."""
    if is_condition(element):
        return element

    def nonzero(number: Any) -> Any:
        if isinstance(number, Size):
            return Data(str(number)) if number.number is None else number.number != 0
        return number != 0

    return mapped(nonzero, element)


def added(a: Any, b: Any) -> Any:
    """The sum of two numbers; a symbolic one and a broken one are data."""
    if isinstance(a, Size) and isinstance(b, Size):
        return a + b
    return _of_floats(lambda x, y: x + y, a, b)


def subtracted(a: Any, b: Any) -> Any:
    """The difference of two numbers."""
    if isinstance(a, Size) and isinstance(b, Size):
        return a - b
    return _of_floats(lambda x, y: x - y, a, b)


def multiplied(a: Any, b: Any) -> Any:
    """The product of two numbers."""
    if isinstance(a, Size) and isinstance(b, Size):
        return a * b
    return _of_floats(lambda x, y: x * y, a, b)


def divided(a: Any, b: Any) -> Any:
    """The quotient of two numbers, of which one is a float."""
    if isinstance(a, Size) and isinstance(b, Size):
        return Data(f"{a} / {b}")
    return _of_floats(lambda x, y: x / y if y else math.nan, a, b)


def absolute(a: Any) -> Any:
    """A number without its sign: of a symbolic one a choice, as the distance of a query and a key is."""
    if isinstance(a, Size):
        return Pick(AtLeast0(a), a, -a) if a.number is None else Size.of(abs(a.number))
    return abs(a)


def _of_floats(act: Callable[[float, float], float], a: Any, b: Any) -> Any:
    numbers = [x.number if isinstance(x, Size) else x for x in (a, b)]
    left, right = numbers
    return Data(f"{a}, {b}") if left is None or right is None else act(float(left), float(right))


def at_least(a: Any, b: Any) -> Any:
    """Whether a >= b, both whole numbers."""
    if isinstance(a, Size) and isinstance(b, Size):
        difference = a - b
        return AtLeast0(difference) if difference.number is None else difference.number >= 0
    return Data(f"{a} >= {b}") if isinstance(a, Size) or isinstance(b, Size) else a >= b


def above(a: Any, b: Any) -> Any:
    """Whether a > b."""
    return negated_element(at_least(b, a))


def equal(a: Any, b: Any) -> Any:
    """Whether a == b."""
    if isinstance(a, Size) and isinstance(b, Size):
        return both(at_least(a, b), at_least(b, a))
    return Data(f"{a} == {b}") if isinstance(a, Size) or isinstance(b, Size) else a == b


def negated_element(element: Any) -> Any:
    """Whether a condition, which may be data, does not hold."""
    return element if isinstance(element, Data) else negated(as_condition(element))
