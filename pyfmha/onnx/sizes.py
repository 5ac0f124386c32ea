"""Sizes and indices that are not known as numbers: polynomials with whole coefficients, equal where proven so."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

Monomial = tuple[str, ...]
Bounds = Mapping[str, "Size"]
"""The exclusive upper bound of each index symbol; every index is at least 0, and so is every other symbol, a size.
Only those that begin with @ may be negative: elements of a tensor of whole numbers."""


@dataclass(frozen=True)
class Size:
    """A polynomial in named symbols, none of them negative.

    Attributes:
        terms: the coefficient of each product of symbols, none 0; the product of none is the constant.
    """

    terms: Mapping[Monomial, int] = field(default_factory=dict)

    @staticmethod
    def of(value: "int | str | Size") -> "Size":
        """A number, or a symbol by its name."""
        if isinstance(value, Size):
            return value
        if isinstance(value, str):
            return Size({(value,): 1})
        return Size({(): int(value)} if value else {})

    @property
    def number(self) -> int | None:
        """Its value, where it has no symbol."""
        if not self.terms:
            return 0
        return self.terms[()] if set(self.terms) == {()} else None

    @property
    def symbol(self) -> str | None:
        """Its name, where it is one symbol and nothing else."""
        if len(self.terms) == 1:
            ((monomial, factor),) = self.terms.items()
            if len(monomial) == 1 and factor == 1:
                return monomial[0]
        return None

    @property
    def symbols(self) -> set[str]:
        """All symbols in it."""
        return {name for monomial in self.terms for name in monomial}

    def __hash__(self) -> int:
        return hash(frozenset(self.terms.items()))

    def __add__(self, other: "int | str | Size") -> "Size":
        terms = dict(self.terms)
        for monomial, factor in Size.of(other).terms.items():
            terms[monomial] = terms.get(monomial, 0) + factor
        return Size({monomial: factor for monomial, factor in terms.items() if factor})

    def __neg__(self) -> "Size":
        return Size({monomial: -factor for monomial, factor in self.terms.items()})

    def __sub__(self, other: "int | str | Size") -> "Size":
        return self + -Size.of(other)

    def __mul__(self, other: "int | str | Size") -> "Size":
        terms: dict[Monomial, int] = {}
        for left, a in self.terms.items():
            for right, b in Size.of(other).terms.items():
                monomial = tuple(sorted(left + right))
                terms[monomial] = terms.get(monomial, 0) + a * b
        return Size({monomial: factor for monomial, factor in terms.items() if factor})

    def over(self, divisor: "int | str | Size") -> "Size | None":
        """The quotient, where the division by one product of symbols leaves nothing; else None."""
        by = Size.of(divisor)
        if len(by.terms) != 1:
            return Size.of(1) if by.terms and by == self else None
        ((names, factor),) = by.terms.items()
        terms = {}
        for monomial, mine in self.terms.items():
            rest = list(monomial)
            for name in names:
                if name not in rest:
                    return None
                rest.remove(name)
            if mine % factor:
                return None
            terms[tuple(rest)] = mine // factor
        return Size(terms)

    def split(self, divisor: "Size", bounds: "dict[str, Size]") -> "tuple[Size, Size] | None":
        """Quotient and remainder of an index, where the bounds prove that the remainder is 0 or more and below.

        A lone symbol that does not divide becomes two symbols, ``h//3`` and ``h%3``, whose bounds are added.
        """
        quotient, remainder = Size(), Size()
        for monomial, factor in self.terms.items():
            term = Size({monomial: factor})
            whole = term.over(divisor)
            if whole is None:
                remainder += term
            else:
                quotient += whole
        if remainder.at_least_0(bounds) and (divisor - remainder - 1).at_least_0(bounds):
            return quotient, remainder
        name, number = self.symbol, divisor.number
        whole = bounds[name].over(divisor) if name in bounds and number else None
        if name is None or number is None or whole is None:
            return None
        halves = f"{name}//{number}", f"{name}%{number}"
        bounds.update(zip(halves, (whole, divisor), strict=True))
        return Size.of(halves[0]), Size.of(halves[1])

    def joined(self) -> "Size":
        """With ``3 * (h//3) + h%3`` written as ``h`` again."""
        for name in sorted(self.symbols):
            stem, percent, number = name.rpartition("%")
            if not percent or not number.isdigit():
                continue
            for monomial, factor in self.terms.items():
                rest = list(monomial)
                if name not in rest:
                    continue
                rest.remove(name)
                high = tuple(sorted([*rest, f"{stem}//{number}"]))
                if self.terms.get(high) == factor * int(number):
                    parts = Size({monomial: factor, high: factor * int(number)})
                    return (self - parts + Size({tuple(sorted([*rest, stem])): factor})).joined()
        return self

    def at_least_0(self, bounds: Bounds) -> bool:
        """Whether it is proven not to be negative: with each index at its end that makes it smallest."""
        least = self
        for name in sorted(self.symbols):
            if name.startswith("@"):  # an element of a tensor of whole numbers, which may be negative
                return False
            if name in bounds:
                factors = [factor for monomial, factor in least.terms.items() if name in monomial]
                if all(factor > 0 for factor in factors):
                    least = least.replaced(name, Size())
                elif all(factor < 0 for factor in factors):
                    least = least.replaced(name, bounds[name] - 1)
        return all(factor > 0 for factor in least.terms.values())

    def replaced(self, name: str, value: "Size") -> "Size":
        """With another expression in the place of a symbol."""
        result = Size()
        for monomial, factor in self.terms.items():
            term = Size({(): factor})
            for symbol in monomial:
                term *= value if symbol == name else Size.of(symbol)
            result += term
        return result

    def __str__(self) -> str:
        parts = []
        for monomial, factor in sorted(self.terms.items(), key=lambda item: (len(item[0]) == 0, item[0])):
            product = "*".join(monomial)
            parts.append(f"{factor}*{product}" if product and factor != 1 else product or str(factor))
        return " + ".join(parts).replace("+ -", "- ") or "0"


def product(sizes: Iterable[Size]) -> Size:
    """Of all of them; 1 of none."""
    result = Size.of(1)
    for size in sizes:
        result *= size
    return result


_PART = re.compile(r"\s*(?:(\d+)|([A-Za-z_][\w.]*)|(.))")


def parsed(text: str) -> Size:
    """A dimension's name, or an expression of names as exporters write it: ``past + seq``, ``2*s0 - 1``.

    What is neither stays one symbol by its whole text, equal to itself only.
    """
    pieces = [match.groups() for match in _PART.finditer(text)]
    if any(other not in (None, "+", "-", "*", "(", ")") for _, _, other in pieces) or not pieces:
        return Size.of(text)
    try:
        return _Reader(pieces).read()
    except (IndexError, ValueError):
        return Size.of(text)


NAMELESS = ("", "?", "*", "-1", "None")
"""What exporters write for a size that they do not know. Two of them are two sizes."""


def dimension(size: int | str | None, otherwise: str) -> Size:
    """A dimension as a model declares it; one without a name is a symbol of the name given."""
    if isinstance(size, int):
        return Size.of(size)
    return Size.of(otherwise) if size is None or size.strip() in NAMELESS else parsed(size)


class _Reader:
    """Reads sums of products, from left to right."""

    def __init__(self, pieces: list[tuple[str | None, ...]]) -> None:
        self._pieces, self._at = pieces, 0

    def read(self) -> Size:
        result = self._sum()
        if self._at != len(self._pieces):
            raise ValueError("something is left")
        return result

    def _next(self) -> str | None:
        return self._pieces[self._at][2] if self._at < len(self._pieces) else ""

    def _chain(self, operand: Callable[[], Size], signs: str) -> Size:
        result = operand()
        while (sign := self._next()) and sign in signs:
            self._at += 1
            right = operand()
            result = result * right if sign == "*" else result + right if sign == "+" else result - right
        return result

    def _sum(self) -> Size:
        return self._chain(lambda: self._chain(self._one, "*"), "+-")

    def _one(self) -> Size:
        number, name, other = self._pieces[self._at]
        self._at += 1
        if number is not None:
            return Size.of(int(number))
        if name is not None:
            return Size.of(name)
        if other == "-":
            return -self._one()
        if other != "(":
            raise ValueError("no operand")
        inner = self._sum()
        if self._next() != ")":
            raise ValueError("no end")
        self._at += 1
        return inner
