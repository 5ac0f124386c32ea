"""Score functions that are a soft cap and nothing else, which attention on Hopper computes as its own.

``pyfmha.soft_cap(score, cap)``, or what people write: ``cap * libdevice.tanh(score / cap)``,
``cap * (2 * tl.sigmoid(2 * score / cap) - 1)``, or the same by powers, ``(e - 1) / (e + 1)`` where
``e = tl.exp(2 * score / cap)``; with names for parts of it, and factors in any order.
"""

import ast
import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyfmha.functions.inputs import Part, tree_of

OF_ELEMENTS = frozenset(("score", "query", "key"))
"""What differs from one score of a head to the next."""


def cap_of(part: Part) -> str | None:
    """The expression of the cap of a function that assigns names and then returns a soft cap of its score, where the
    cap reads no score, query or key; None of any other."""
    tree = tree_of(part.function)
    assert isinstance(tree, ast.FunctionDef)
    returned = _in_one_expression(tree.body)
    if returned is None:
        return None
    found = _Reader(part.function).cap_of(returned)
    if found is None or OF_ELEMENTS & {node.id for node in ast.walk(found) if isinstance(node, ast.Name)}:
        return None
    return ast.unparse(found)


def scope_of(function: Any) -> dict[str, Any]:
    """The variables outside that a function may read."""
    plain = getattr(function, "fn", function)
    return {**plain.__globals__, **inspect.getclosurevars(plain).nonlocals}


class _Inline(ast.NodeTransformer):
    """Puts what names have been given in their places."""

    def __init__(self, given: dict[str, ast.expr]) -> None:
        self.given = given

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return copy.deepcopy(self.given.get(node.id, node))


def _in_one_expression(body: list[ast.stmt]) -> ast.expr | None:
    """What a function of assignments and a last return returns, without the names that it gives; None of others."""
    given: dict[str, ast.expr] = {}
    for line in body:
        inline = _Inline(dict(given))
        if isinstance(line, ast.Return) and line.value is not None:
            return inline.visit(copy.deepcopy(line.value)) if line is body[-1] else None
        if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
            continue  # what it is for
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        if not isinstance(line, ast.Assign | ast.AnnAssign) or line.value is None:
            return None
        if len(targets) != 1 or not isinstance(targets[0], ast.Name):
            return None
        given[targets[0].id] = inline.visit(copy.deepcopy(line.value))
    return None


@dataclass(frozen=True)
class _Product:
    """A number times expressions, over others, each by what it says."""

    number: float
    above: tuple[str, ...]
    below: tuple[str, ...]


class _Reader:
    """Tells what expressions of a function are."""

    def __init__(self, function: Any) -> None:
        import triton.language as tl
        from triton.language.extra import libdevice
        from triton.language.extra.cuda import libdevice as of_cuda

        from pyfmha.functions.arithmetic import soft_cap

        self.scope = scope_of(function)
        self.soft_cap = soft_cap
        self.tanh = libdevice.tanh, of_cuda.tanh
        self.exp = tl.exp, libdevice.exp, of_cuda.exp
        self.sigmoid = (tl.sigmoid,)

    def cap_of(self, returned: ast.expr) -> ast.expr | None:
        """The cap of a soft cap of `score`, or None."""
        if isinstance(returned, ast.Call) and self._is(returned.func, (self.soft_cap,)):
            given = [*returned.args, *(word.value for word in returned.keywords if word.arg == "cap")]
            whole = len(given) == 2 == len(returned.args) + len(returned.keywords)
            return given[1] if whole and ast.unparse(given[0]) == "score" else None
        factors = list(_factors(returned))
        for taken in _taken(factors):
            of_tanh = _joined([factors[i] for i in taken])
            inside = self._inside_of_tanh(of_tanh)
            others = [factor for i, factor in enumerate(factors) if i not in taken]
            if inside is not None and others and _product_of(list(_factors(inside))) == _share(_product_of(others)):
                return _joined(others)
        return None

    def _inside_of_tanh(self, x: ast.expr) -> ast.expr | None:
        """y, where an expression is tanh(y)."""
        if (inside := self._argument(x, self.tanh)) is not None:
            return inside
        if isinstance(x, ast.BinOp) and isinstance(x.op, ast.Sub) and _is_number(x.right, 1):  # 2 sigmoid(2 y) - 1
            parts = [part for part, above in _factors(x.left) if above and not _is_number(part, 2)]
            if len(parts) == 1 and _product_of(list(_factors(x.left))).number == 2:
                return _half(self._argument(parts[0], self.sigmoid))
        if isinstance(x, ast.BinOp) and isinstance(x.op, ast.Div):  # (exp(2 y) - 1) / (exp(2 y) + 1)
            less, more = x.left, x.right
            if isinstance(less, ast.BinOp) and isinstance(less.op, ast.Sub) and _is_number(less.right, 1):
                wanted = {f"{ast.unparse(less.left)} + {one}" for one in ("1", "1.0")}
                wanted |= {f"{one} + {ast.unparse(less.left)}" for one in ("1", "1.0")}
                return _half(self._argument(less.left, self.exp)) if ast.unparse(more) in wanted else None
        return None

    def _argument(self, x: ast.expr, functions: tuple[Any, ...]) -> ast.expr | None:
        """Of a call of one of these functions, what is given to it."""
        if isinstance(x, ast.Call) and len(x.args) == 1 and not x.keywords and self._is(x.func, functions):
            return x.args[0]
        return None

    def _is(self, name: ast.expr, functions: tuple[Any, ...]) -> bool:
        found = self._value_of(name)
        return any(found is function for function in functions)

    def _value_of(self, name: ast.expr) -> Any:
        """What ``soft_cap`` or ``pyfmha.soft_cap`` is where the function stands; None of other expressions."""
        if isinstance(name, ast.Attribute):
            return getattr(self._value_of(name.value), name.attr, None)
        return self.scope.get(name.id) if isinstance(name, ast.Name) else None


def _factors(x: ast.expr, above: bool = True) -> Iterator[tuple[ast.expr, bool]]:
    """The factors of a product, and whether they stand above the line."""
    if isinstance(x, ast.BinOp) and isinstance(x.op, ast.Mult | ast.Div):
        yield from _factors(x.left, above)
        yield from _factors(x.right, above == isinstance(x.op, ast.Mult))
    else:
        yield x, above


def _product_of(factors: list[tuple[ast.expr, bool]]) -> _Product:
    number = 1.0
    sides: dict[bool, list[str]] = {True: [], False: []}
    for factor, above in factors:
        if isinstance(factor, ast.Constant) and isinstance(factor.value, int | float) and factor.value:
            number = number * factor.value if above else number / factor.value
        else:
            sides[above].append(ast.unparse(factor))
    return _Product(number, tuple(sorted(sides[True])), tuple(sorted(sides[False])))


def _share(cap: _Product) -> _Product:
    """score / cap."""
    return _Product(1 / cap.number, tuple(sorted(("score", *cap.below))), cap.above)


def _half(x: ast.expr | None) -> ast.expr | None:
    return None if x is None else ast.BinOp(x, ast.Div(), ast.Constant(2))


def _taken(factors: list[tuple[ast.expr, bool]]) -> Iterator[tuple[int, ...]]:
    """Which of some factors may be a tanh: each above the line, and each with each below it."""
    over = [i for i, (_, above) in enumerate(factors) if above]
    under = [i for i, (_, above) in enumerate(factors) if not above]
    yield from ((i,) for i in over)
    yield from ((i, j) for i in over for j in under)


def _joined(factors: list[tuple[ast.expr, bool]]) -> ast.expr:
    """Factors as a product again."""
    (made, above), *others = sorted(factors, key=lambda factor: not factor[1])  # those above the line first
    if not above:
        made = ast.BinOp(ast.Constant(1.0), ast.Div(), made)
    for factor, is_above in others:
        made = ast.BinOp(made, ast.Mult() if is_above else ast.Div(), factor)
    return made


def _is_number(x: ast.expr, number: float) -> bool:
    return isinstance(x, ast.Constant) and not isinstance(x.value, bool) and x.value == number
