"""Conditions on a function's arguments: ``kv_len >= q_len``, ``head_size == 64``, ``q_stride_s % 8 == 0``.

A variant with conditions serves only the calls that meet them all; the dispatcher passes over it at the others. A
condition compares an argument, or a product of two of 32 bits, with an integer or with another argument, by ``== != <
<= > >=``, or the remainder of an integer or pointer with an integer, by ``==``. A pointer that is 0 is one that was not
given. NaN meets no condition but ``!=``.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyfmha.errors import SpecError
from pyfmha.spec.abi import CType, ctype

ALLOWED = (
    '"name op value" or "name * factor op value" (op: == != < <= > >=; value, factor: an integer or another argument)'
    ' or "name % integer == integer"'
)

_OPERATORS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
_UNSIGNED_MAX = (1 << 64) - 1


@dataclass(frozen=True)
class Condition:
    """One condition.

    Attributes:
        text: as the user wrote it, with uniform white space.
        name: the argument on its left.
        modulus: what it is divided by, to compare the remainder; None to compare the argument itself.
        operator: ``"=="``, ``"!="``, ``"<"``, ``"<="``, ``">"`` or ``">="``.
        value: an integer, or the name of another argument.
        factor: what the argument on the left is multiplied with: the same; 1 for nothing.
    """

    text: str
    name: str
    modulus: int | None
    operator: str
    value: int | str
    factor: int | str = 1

    @property
    def names(self) -> tuple[str, ...]:
        """The arguments it reads."""
        return (self.name, *(other for other in (self.factor, self.value) if isinstance(other, str)))

    def holds(self, values: Mapping[str, float]) -> bool:
        """Whether it is met by these values of the arguments."""
        left = values[self.name] if self.modulus is None else values[self.name] % self.modulus
        if self.factor != 1:
            left *= values[self.factor] if isinstance(self.factor, str) else self.factor
        right = values[self.value] if isinstance(self.value, str) else self.value
        answers: dict[str, bool] = {
            "==": left == right,
            "!=": left != right,
            "<": left < right,
            "<=": left <= right,
            ">": left > right,
            ">=": left >= right,
        }
        return answers[self.operator]

    def to_c(self, spelled: Mapping[str, str], types: Mapping[str, str]) -> str:
        """The condition in C.

        Args:
            spelled: the C expression of each argument.
            types: the type of each argument.
        """
        common = _common(types[self.name], types[self.value] if isinstance(self.value, str) else None)
        left = f"({common}){spelled[self.name]}"
        if self.factor != 1:
            factor = f"({common}){spelled[self.factor]}" if isinstance(self.factor, str) else self.factor
            left = f"{left} * {factor if isinstance(factor, str) else _literal(factor, common)}"
        if self.modulus is not None:
            modulus = _literal(self.modulus, common)
            left = f"{left} % {modulus}"
            if self.value != 0 and common == "int64_t":  # C's remainder has the sign of what is divided
                left = f"({left} + {modulus}) % {modulus}"
        right = f"({common}){spelled[self.value]}" if isinstance(self.value, str) else _literal(self.value, common)
        return f"{left} {self.operator} {right}"


def _wide(kind: CType) -> bool:
    """Whether its values need all of 64 bits without a sign."""
    return kind.kind == "pointer" or (kind.bounds is not None and kind.bounds[1] == _UNSIGNED_MAX)


def _common(left: str, right: str | None) -> str:
    """The C type in which both sides are compared; conditions between types without one are refused when parsed."""
    kinds = [ctype(name) for name in (left, right) if name is not None]
    if any(kind.kind == "float" for kind in kinds):
        return "double"
    return "uint64_t" if any(map(_wide, kinds)) else "int64_t"


def _literal(value: int, common: str) -> str:
    if common == "double":
        return f"{value}.0"
    if common == "uint64_t":
        return f"UINT64_C({value})"
    if value == -(1 << 63):
        return "INT64_MIN"  # C has no literal for it
    return f"INT64_C({value})" if value >= 0 else f"-INT64_C({-value})"


def parse_condition(text: str, types: Mapping[str, str]) -> Condition:
    """Read one condition.

    Args:
        text: as in the module's description.
        types: the type of each of the function's arguments, by name.

    Raises:
        SpecError: it is malformed, names no argument, or compares what cannot be compared.
    """
    try:
        tree: Any = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError, AttributeError):
        raise SpecError(f"condition {text!r} is not an expression: use {ALLOWED}") from None
    match tree:
        case ast.Compare(
            left=ast.BinOp(left=ast.Name(id=name), op=ast.Mod(), right=ast.Constant(value=int(modulus))),
            ops=[ast.Eq()],
            comparators=[ast.Constant(value=int(rest))],
        ):
            found = Condition(ast.unparse(tree), name, modulus, "==", rest)
        case ast.Compare(
            left=ast.BinOp(left=ast.Name(id=name), op=ast.Mult(), right=factor), ops=[operator], comparators=[right]
        ) if type(operator) in _OPERATORS:
            found = Condition(
                ast.unparse(tree), name, None, _OPERATORS[type(operator)], _value(right, text), _value(factor, text)
            )
        case ast.Compare(left=ast.Name(id=name), ops=[operator], comparators=[right]) if type(operator) in _OPERATORS:
            found = Condition(ast.unparse(tree), name, None, _OPERATORS[type(operator)], _value(right, text))
        case _:
            raise SpecError(f"condition {text!r} is not allowed: use {ALLOWED}")
    for used in found.names:
        if used not in types:
            raise SpecError(f"condition {text!r}: {used!r} is no argument; there are: {', '.join(types)}")
    _check(found, types)
    return found


def parse_nullable(text: str, types: Mapping[str, str]) -> tuple[str, Condition | None]:
    """Read which pointer may be 0, and when: ``"bias"``, ``"K if kv_len == 0"``.

    Args:
        text: as above.
        types: the type of each of the function's arguments, by name.

    Returns:
        The argument's name, and the condition, if there is one.

    Raises:
        SpecError: it names no pointer, or the condition cannot be read.
    """
    name, word, condition = text.strip().partition(" if ")
    pointers = [known for known, kind in types.items() if ctype(kind).kind == "pointer"]
    if name not in pointers:
        raise SpecError(
            f'nullable {text!r}: {name!r} is no pointer; use "name" or "name if condition" with one of'
            f" {', '.join(pointers) or 'no pointer, since there is none'}"
        )
    return name, parse_condition(condition, types) if word else None


def _value(node: Any, text: str) -> int | str:
    match node:
        case ast.Name(id=name):
            return str(name)
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return int(value)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))) if not isinstance(value, bool):
            return -int(value)
    raise SpecError(f"condition {text!r}: {ast.unparse(node)!r} is neither an integer nor an argument: use {ALLOWED}")


def _check(condition: Condition, types: Mapping[str, str]) -> None:
    kinds = {name: ctype(types[name]) for name in condition.names}
    said = f"condition {condition.text!r}"
    if condition.modulus is not None:
        if kinds[condition.name].kind == "float":
            raise SpecError(f"{said}: {condition.name} is {types[condition.name]}, which has no remainder")
        if isinstance(condition.modulus, bool) or not 1 <= condition.modulus < 1 << 31:
            raise SpecError(f"{said}: the modulus is {condition.modulus}, allowed is 1 to {(1 << 31) - 1}")
        if type(condition.value) is not int or not 0 <= condition.value < condition.modulus:
            raise SpecError(f"{said}: the remainder is {condition.value}, allowed is 0 to {condition.modulus - 1}")
        return
    if condition.factor != 1:
        _check_product(said, condition, types)
        return
    if isinstance(condition.value, str):
        _check_pair(said, condition.name, condition.value, kinds)
        return
    low, high = kinds[condition.name].bounds or (0, _UNSIGNED_MAX)
    if kinds[condition.name].kind == "float":
        low, high = -(1 << 53), 1 << 53  # what a double holds exactly
    if not low <= condition.value <= high:
        held = f"{types[condition.name]} holds {low} to {high}"
        raise SpecError(f"{said}: {condition.value} is no value of {condition.name}; {held}")
    if (condition.operator, condition.value) in (("<", 0), (">=", 0)) and low == 0:
        raise SpecError(f"{said}: {condition.name} is never negative, so the condition says nothing")


def _check_product(said: str, condition: Condition, types: Mapping[str, str]) -> None:
    """Of 32 bits each, products fit 64."""
    wide = [name for name in condition.names if types[name] != "i32"]
    if wide:
        raise SpecError(f"{said}: {wide[0]} is {types[wide[0]]}; products are of i32, and compared with such")
    for number in (condition.factor, condition.value):
        if isinstance(number, int) and not -(1 << 31) <= number < 1 << 31:
            raise SpecError(f"{said}: {number} does not fit 32 bits")


def _check_pair(said: str, left: str, right: str, kinds: Mapping[str, CType]) -> None:
    one, other = kinds[left], kinds[right]
    if left == right:
        raise SpecError(f"{said} compares {left} with itself")
    if (one.kind == "pointer") != (other.kind == "pointer") or (one.kind == "float") != (other.kind == "float"):
        raise SpecError(f"{said} compares {one.kind} with {other.kind}: compare arguments of one kind")
    for wide, narrow in ((one, other), (other, one)):
        if _wide(wide) and narrow.bounds is not None and narrow.bounds[0] < 0:
            raise SpecError(f"{said} compares u64 with a signed integer, which C would get wrong")
