"""Expressions of an operator's description: sizes, conditions, arguments of launches.

One text means the same in Python and in C, which both are made from it here. There are integers of 64 bits, floats of
64, truth values and strings; names stand for attributes, axes and definitions. Integers are exact or refused:
an overflow and a division by zero are errors, never another number. Between integers ``/`` cuts toward zero as in C,
``//`` rounds down, ``cdiv`` rounds up.
"""

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyfmha.errors import SpecError
from pyfmha.operators.arithmetic import CALLED, FLOATS, LIMIT, EvaluationError

ALLOWED = (
    "names, numbers, strings, + - * / // %, == != < <= > >=, and, or, not, a if condition else b, cdiv(a, b),"
    " min(a, b), max(a, b), size(X, axis), stride(X, axis), numel(X), itemsize(T), given(attribute), len(list),"
    " list[index], least(axis), has(option), serves(launch, kernel), device(figure)"
)

Value = int | float | bool | str | tuple[int | float, ...]
_BINARY: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
}
_COMPARE: dict[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
BUILTINS = (
    *("cdiv", "min", "max", "size", "stride", "numel", "itemsize", "given", "len", "least", "has", "serves"),
    "device",
)
FIGURES = {"multiprocessors": 16, "memory_clock": 36, "memory_bus": 37}
"""What ``device`` may ask of the device at hand, as CUdevice_attribute; the memory's clock is in kHz, its bus in bits.
0 where there is no device, or its driver does not tell."""


@dataclass(frozen=True)
class Node:
    """A piece of an expression.

    Attributes:
        kind: ``"constant"``, ``"name"``, ``"item"``, ``"ask"`` (a question about a tensor or the library),
            ``"binary"``, ``"compare"``, ``"and"``, ``"or"``, ``"not"``, ``"if"``, ``"float"`` (an integer made one).
        type: ``"int"``, ``"float"``, ``"bool"``, ``"str"`` or, of a list, ``"int[]"`` and ``"float[]"``.
        value: the constant, the name or the operation.
        parts: what it is made of; of a question its words.
    """

    kind: str
    type: str
    value: Any
    parts: tuple[Any, ...] = ()


class Scope:
    """What an expression may read while it is evaluated.

    Attributes:
        values: attributes, axes and definitions by name.
    """

    def __init__(self, values: Mapping[str, Value]) -> None:
        self.values = dict(values)

    def ask(self, question: str, words: tuple[Any, ...]) -> int | bool:
        """Answer what is no name: of a tensor or of the library.

        Raises:
            EvaluationError: there is no such thing here.
        """
        raise EvaluationError


@dataclass(frozen=True)
class Expression:
    """One parsed expression.

    Attributes:
        text: as it was written, with uniform white space.
        node: its parsed form.
    """

    text: str
    node: Node
    _run: Callable[[Scope, Mapping[str, Value]], Any] = field(init=False, repr=False, compare=False)
    _named: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # As text, as ``dataclasses`` does: walking the parsed form at each evaluation takes ten times as long.
        text = python_of(
            self.node, lambda name: f"v[{name!r}]", lambda question, words: f"s.ask({question!r}, {words!r})"
        )
        run = eval(f"lambda s, v: {text}", dict(CALLED))
        object.__setattr__(self, "_run", run)
        object.__setattr__(self, "_named", frozenset(_names(self.node)))

    @property
    def type(self) -> str:
        """``"int"``, ``"float"``, ``"bool"`` or ``"str"``."""
        return self.node.type

    def names(self) -> frozenset[str]:
        """The names that it reads, those of lists too."""
        return self._named

    def questions(self) -> frozenset[tuple[str, tuple[Any, ...]]]:
        """What it asks of tensors and of the library."""
        return frozenset(_questions(self.node))

    def is_constant(self) -> bool:
        """Whether it reads and asks nothing."""
        return not self._named and not self.questions()

    def evaluate(self, scope: Scope) -> Any:
        """Its value.

        Raises:
            EvaluationError: it has none.
        """
        return self._run(scope, scope.values)


def _names(node: Any) -> set[str]:
    if not isinstance(node, Node):
        return set()
    own = {node.value} if node.kind in ("name", "item") else set()
    return own.union(*map(_names, node.parts))


def _questions(node: Any) -> set[tuple[str, tuple[Any, ...]]]:
    if not isinstance(node, Node):
        return set()
    if node.kind == "ask":
        return {(node.value, node.parts)}
    return set().union(*map(_questions, node.parts))


def python_of(node: Node, named: Callable[[str], str], asked: Callable[[str, tuple[Any, ...]], str]) -> str:
    """An expression in Python, which calls what :data:`pyfmha.operators.arithmetic.CALLED` has.

    Args:
        node: its parsed form.
        named: how a name is read.
        asked: how a question is asked.
    """

    def of(part: Node) -> str:
        return python_of(part, named, asked)

    match node.kind:
        case "constant":
            return repr(node.value)
        case "name":
            return named(node.value)
        case "item":
            return f"_item({named(node.value)}, {of(node.parts[0])})"
        case "ask":
            return asked(node.value, node.parts)
        case "float":
            return f"float({of(node.parts[0])})"
        case "not":
            return f"(not {of(node.parts[0])})"
        case "and" | "or":
            return f"({f' {node.kind} '.join(map(of, node.parts))})"
        case "if":
            condition, yes, no = map(of, node.parts)
            return f"({yes} if {condition} else {no})"
    left, right = map(of, node.parts)
    if node.kind == "compare":
        return f"({left} {node.value} {right})"
    return f"{'_float_' if node.type == 'float' else ''}{node.value}({left}, {right})"


class Parser:
    """Reads expressions against what they may name.

    Args:
        types: the type of each name.
        tensors: names of tensors, for ``size``, ``stride`` and ``numel``.
        dtypes: names of types that ``itemsize`` may ask of.
        options: names of optional groups of functions, for ``has``.
        launches: names of launches, for ``serves``.
        attributes: names that ``given`` may ask of.
        axes: names that ``least`` may ask of.
    """

    def __init__(
        self,
        types: Mapping[str, str],
        *,
        tensors: frozenset[str] = frozenset(),
        dtypes: frozenset[str] = frozenset(),
        options: frozenset[str] = frozenset(),
        launches: frozenset[str] = frozenset(),
        attributes: frozenset[str] = frozenset(),
        axes: frozenset[str] = frozenset(),
    ) -> None:
        self.types = dict(types)
        self.tensors, self.dtypes, self.options, self.launches = tensors, dtypes, options, launches
        self.attributes, self.axes = attributes, axes

    def parse(self, text: str | int | float, what: str, *, wanted: str = "") -> Expression:
        """Read one expression.

        Args:
            text: the expression; a number is one.
            what: what it is a part of, for messages.
            wanted: the type that it must have; an integer will do for a float.

        Raises:
            SpecError: it is malformed, names something unknown, or is of another type.
        """
        try:
            tree = ast.parse(str(text).strip(), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise SpecError(f"{what}: {text!r} is not an expression: use {ALLOWED}") from None
        return self.parse_tree(tree, what, wanted=wanted)

    def parse_tree(self, tree: ast.expr, what: str, *, wanted: str = "") -> Expression:
        """As :meth:`parse`, of an expression that Python's parser has read."""
        try:
            text, node = ast.unparse(tree), self._node(tree, what)
            if wanted and node.type != wanted:
                if (wanted, node.type) != ("float", "int"):
                    raise SpecError(f"{what}: {text!r} is of type {node.type}; it must be {wanted}")
                node = _as_float(node)
            return Expression(text, node)
        except (RecursionError, SyntaxError, MemoryError):  # which Python's own parser raises of its depth
            raise SpecError(f"{what}: an expression is too deep; give its parts names in `define`") from None

    def _node(self, tree: Any, what: str) -> Node:
        match tree:
            case ast.Constant(value=bool(value)):
                return Node("constant", "bool", value)
            case ast.Constant(value=int(value)):
                return _integer(value, what)
            case ast.Constant(value=float(value)):
                return Node("constant", "float", value)
            case ast.Constant(value=str(value)):
                return Node("constant", "str", value)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))) if not isinstance(value, bool):
                return _integer(-value, what)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._binary("sub", _integer(0, what), self._node(operand, what), what)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return Node("not", "bool", None, (self._truth(operand, what),))
            case ast.Name(id=name):
                return self._name(name, what)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return self._binary(_BINARY[type(op)], self._node(left, what), self._node(right, what), what)
            case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARE for op in ops):
                return self._comparison([left, *others], [_COMPARE[type(op)] for op in ops], what)
            case ast.BoolOp(op=op, values=values):
                parts = tuple(self._truth(value, what) for value in values)
                return Node("and" if isinstance(op, ast.And) else "or", "bool", None, parts)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                yes, no = _alike(self._node(body, what), self._node(orelse, what), what)
                return Node("if", yes.type, None, (self._truth(test, what), yes, no))
            case ast.Subscript(value=ast.Name(id=name), slice=index):
                return self._element(name, index, what)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in BUILTINS:
                return self._call(name, args, what)
        raise SpecError(f"{what}: {ast.unparse(tree)!r} is not allowed: use {ALLOWED}")

    def _name(self, name: str, what: str) -> Node:
        if name not in self.types:
            known = ", ".join(sorted(self.types)) or "none"
            raise SpecError(f"{what}: {name!r} is not known; known are: {known}")
        return Node("name", self.types[name], name)

    def _truth(self, tree: ast.expr, what: str) -> Node:
        """A condition; an integer is one, true where it is not 0."""
        node = self._node(tree, what)
        if node.type == "int":
            return Node("compare", "bool", "!=", (node, Node("constant", "int", 0)))
        if node.type != "bool":
            raise SpecError(f"{what}: {ast.unparse(tree)!r} is of type {node.type}, no condition")
        return node

    def _binary(self, operation: str, left: Node, right: Node, what: str) -> Node:
        left, right = _alike(left, right, what)
        if left.type not in ("int", "float"):
            raise SpecError(f"{what}: there is no {operation} of {left.type}")
        if left.type == "float" and operation not in FLOATS:
            raise SpecError(f"{what}: there is no {operation} of floats")
        return Node("binary", left.type, operation, (left, right))

    def _comparison(self, trees: list[ast.expr], operators: list[str], what: str) -> Node:
        nodes = [self._node(tree, what) for tree in trees]
        found = []
        for operator, one, other in zip(operators, nodes, nodes[1:], strict=False):
            left, right = _alike(one, other, what)
            if left.type in ("str", "bool") and operator not in ("==", "!="):
                raise SpecError(f"{what}: values of type {left.type} are compared by == and != only")
            if left.type.endswith("[]"):
                raise SpecError(f"{what}: lists are not compared; compare len() and elements")
            found.append(Node("compare", "bool", operator, (left, right)))
        return found[0] if len(found) == 1 else Node("and", "bool", None, tuple(found))

    def _element(self, name: str, index: ast.expr, what: str) -> Node:
        kind = self._name(name, what).type
        if not kind.endswith("[]"):
            raise SpecError(f"{what}: {name} is of type {kind}, no list")
        at = self._node(index, what)
        if at.type != "int":
            raise SpecError(f"{what}: {ast.unparse(index)!r} is no index")
        return Node("item", kind[:-2], name, (at,))

    def _call(self, name: str, args: list[ast.expr], what: str) -> Node:
        if name in ("cdiv", "min", "max"):
            if len(args) != 2:
                raise SpecError(f"{what}: {name} takes two values")
            left, right = (self._node(arg, what) for arg in args)
            return self._binary(name, left, right, what)
        words = tuple(_word(arg, what) for arg in args)
        known: dict[str, tuple[Any, ...]] = {
            "size": (self.tensors, None),
            "stride": (self.tensors, None),
            "numel": (self.tensors,),
            "itemsize": (self.dtypes,),
            "given": (self.attributes,),
            "len": (self.types,),
            "least": (self.axes,),
            "has": (self.options,),
            "serves": (self.launches, None),
            "device": (FIGURES,),
        }
        if len(words) != len(known[name]):
            raise SpecError(f"{what}: {name} takes {len(known[name])} words: use {ALLOWED}")
        if words[0] not in known[name][0]:
            there = ", ".join(sorted(known[name][0])) or "nothing here"
            raise SpecError(f"{what}: {name} asks of {words[0]!r}; it may ask of {there}")
        if name in ("size", "stride") and not (isinstance(words[1], int) and 0 <= words[1] < 8):
            raise SpecError(f"{what}: {name} asks of axis {words[1]!r}; axes are 0 to 7")
        if name == "len" and not self.types[str(words[0])].endswith("[]"):
            raise SpecError(f"{what}: len asks of {words[0]}, which is no list")
        return Node("ask", "bool" if name in ("given", "has", "serves") else "int", name, words)


def _word(tree: ast.expr, what: str) -> str | int:
    match tree:
        case ast.Name(id=name):
            return str(name)
        case ast.Constant(value=str(value)):
            return str(value)
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return int(value)
    raise SpecError(f"{what}: {ast.unparse(tree)!r} is neither a name nor a number")


def _integer(value: int, what: str) -> Node:
    if not -LIMIT < value < LIMIT:
        raise SpecError(f"{what}: {value} does not fit in 64 bits")
    return Node("constant", "int", value)


def _as_float(node: Node) -> Node:
    return Node("float", "float", None, (node,))


def _alike(left: Node, right: Node, what: str) -> tuple[Node, Node]:
    if {left.type, right.type} == {"int", "float"}:
        left, right = (node if node.type == "float" else _as_float(node) for node in (left, right))
    if left.type != right.type:
        raise SpecError(f"{what}: {left.type} and {right.type} do not go together")
    return left, right
