"""What a user's function takes of its own: read from its signature, its body, and what its decorator says.

An input is a pointer or a number. A pointer may have a shape, ``"*i32[batch, tokens]"``: its axes are ``batch``,
``heads`` (of Q), ``queries``, ``keys``, other numbers of the function, integers and expressions of these. A number that
is an axis by itself is told by the tensor's shape, wherever there is a tensor rather than an address.
"""

import ast
import inspect
import linecache
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyfmha.errors import SpecError
from pyfmha.spec.abi import canonical, ctype

POINTER, NUMBER = "*fp32", "i32"
"""The types of inputs of which nothing else is said."""

Inputs = tuple[tuple[str, str], ...]
Shapes = tuple[tuple[str, tuple[str, ...]], ...]
"""The axes of those inputs that have a shape."""

_OTHER_KINDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_SHAPED = re.compile(r"([^\[\]]+)\[(.*)\]\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """One function of the user's, and what it takes of its own.

    Attributes:
        function: as Triton compiles it.
        inputs: name and type of each input.
        shapes: the axes of those that have a shape.
        requires: what must hold of sizes and numbers.
        bounds: the function of the bounds, as it was given.
        relative: whether it says that it is, see :func:`pyfmha.functions.declare.score_function`.
        blocks: whether the blocks to visit are found by a launch of their own.
    """

    function: Any
    inputs: Inputs
    shapes: Shapes
    requires: tuple[str, ...] = ()
    bounds: Any = None
    relative: bool = False
    blocks: bool = False

    @property
    def name(self) -> str:
        """The function's own name."""
        return str(self.function.__name__)

    def reads(self, name: str) -> bool:
        """Whether the function, or its bounds, reads a value of this name."""
        functions = [one for one in (self.function, self.bounds) if one is not None]
        nodes = (node for one in functions for node in ast.walk(tree_of(one)))
        return any(isinstance(node, ast.Name) and node.id == name for node in nodes)


def part_of(
    function: Callable[..., Any], first: Sequence[str], kind: str, types: Mapping[str, str], requires: Sequence[str]
) -> Part:
    """A function as a decorator takes it.

    Args:
        function: the function.
        first: what it takes before inputs of its own.
        kind: ``"score"`` or ``"mask"``, for messages.
        types: types of inputs by name, with shapes or without.
        requires: what must hold.

    Raises:
        SpecError: it takes other arguments, or a type, a shape or a requirement is none.
    """
    plain = getattr(function, "fn", function)
    if not inspect.isfunction(plain) or plain.__name__ == "<lambda>" or plain.__code__.co_flags & _OTHER_KINDS:
        given = plain.__name__ if inspect.isfunction(plain) else f"of type {type(plain).__name__}"
        raise SpecError(f"{kind} function is {given}; give a function that is made by def")
    if not isinstance(types, Mapping):
        raise SpecError(f"{plain.__name__}: inputs is {types!r}; give types by name")
    parameters = list(inspect.signature(function).parameters.values())
    names = [parameter.name for parameter in parameters]
    own = names[len(first) :]
    plain = all(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in parameters)
    if names[: len(first)] != list(first) or not plain:
        raise SpecError(
            f"{kind} function {function.__name__} takes ({', '.join(map(str, parameters))}); it must take"
            f" ({', '.join(first)}) and then inputs of its own, without defaults"
        )
    unknown = [name for name in types if name not in own]
    if unknown:
        raise SpecError(f"{function.__name__} has no input {', '.join(unknown)}; it has: {', '.join(own) or 'none'}")
    loaded = _loaded(function, own)
    inputs, shapes = [], []
    for name in own:
        text = types.get(name, POINTER if name in loaded else NUMBER)
        if not isinstance(text, str):
            raise SpecError(f"{function.__name__}: input {name} cannot be {text!r}; a type is a text, as '*fp32'")
        said = _SHAPED.match(text)
        kind = _type(said[1] if said else text, name, function)
        inputs.append((name, kind))
        if said:
            shapes.append((name, _axes(said[2], name, kind, function)))
    _check_axes(function, dict(inputs), shapes)
    _check_requires(function, dict(inputs), requires)
    return Part(jitted(function), tuple(inputs), tuple(shapes), tuple(requires))


def jitted(function: Any) -> Any:
    """A function as Triton compiles it, or interprets it: then it looks for its language in what the file imports."""
    import triton
    import triton.language

    if triton.knobs.runtime.interpret:
        getattr(function, "fn", function).__globals__.setdefault("_triton_language", triton.language)
    return function if hasattr(function, "fn") else triton.jit(function)


def file_of(function: Any) -> Path:
    """The file that declares a function."""
    return Path(inspect.getfile(function)).resolve()


def _type(text: str, name: str, function: Callable[..., Any]) -> str:
    try:
        ctype(canonical(text))
    except SpecError as error:
        raise SpecError(f"{function.__name__}: input {name} cannot be {text!r}: {error}") from None
    return canonical(text)


def _axes(text: str, name: str, kind: str, function: Callable[..., Any]) -> tuple[str, ...]:
    what = f"{function.__name__}: input {name} cannot be {kind}[{text}]"
    if not kind.startswith("*"):
        raise SpecError(f"{what}: a number has no shape; a pointer begins with *")
    try:
        tree = ast.parse(f"({text},)", mode="eval").body
    except SyntaxError:
        raise SpecError(f"{what}: write the axes as '{kind}[batch, tokens]'") from None
    assert isinstance(tree, ast.Tuple)
    if any(isinstance(axis, ast.Starred) for axis in tree.elts):
        raise SpecError(f"{what}: an axis is one number, and has no * before it")
    if not 1 <= len(tree.elts) <= MOST_AXES:
        raise SpecError(f"{what}: a tensor has 1 to {MOST_AXES} axes")
    return tuple(ast.unparse(axis) for axis in tree.elts)


MOST_AXES = 8
KNOWN = ("batch", "heads", "queries", "keys")
"""Axes that attention itself knows: sequences, heads of Q, and the positions of a sequence."""


def names_in(text: str) -> list[str]:
    """The names of values that an expression reads, without those of functions: ``min(a, b)`` reads a and b."""
    tree = ast.parse(text, mode="eval")
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in called]


def _check_axes(function: Callable[..., Any], inputs: Mapping[str, str], shapes: Sequence[tuple[str, Any]]) -> None:
    numbers = [name for name, kind in inputs.items() if not kind.startswith("*")]
    for name, axes in shapes:
        for axis in axes:
            unknown = [read for read in names_in(axis) if read not in (*KNOWN, *numbers)]
            if unknown:
                raise SpecError(
                    f"{function.__name__}: axis {axis} of input {name} reads {', '.join(unknown)}; an axis is made of"
                    f" {', '.join(KNOWN)}, integers and numbers that the function takes: {', '.join(numbers) or 'none'}"
                )


def _check_requires(function: Callable[..., Any], inputs: Mapping[str, str], requires: Sequence[str]) -> None:
    if isinstance(requires, str) or not all(isinstance(one, str) for one in requires):
        raise SpecError(f"{function.__name__}: requires is {requires!r}; give a tuple of conditions")
    numbers = [name for name, kind in inputs.items() if not kind.startswith("*")]
    for text in requires:
        try:
            unknown = [name for name in names_in(text) if name not in (*KNOWN, *numbers)]
        except SyntaxError:
            raise SpecError(f"{function.__name__} requires {text!r}, which is no condition") from None
        if unknown:
            raise SpecError(
                f"{function.__name__} requires {text!r}, which reads {', '.join(unknown)}; it may read"
                f" {', '.join(KNOWN)} and numbers that the function takes: {', '.join(numbers) or 'none'}"
            )


def _loaded(function: Callable[..., Any], own: Sequence[str]) -> set[str]:
    """The inputs that an argument of a load begins with: ``slopes`` of ``tl.load(slopes + head)``."""
    nodes = list(ast.walk(tree_of(function)))
    values: dict[str, list[ast.AST]] = {}
    for assigned in (node for node in nodes if isinstance(node, ast.Assign)):
        for target in assigned.targets:
            values.setdefault(getattr(target, "id", ""), []).append(assigned.value)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Call) and "load" in (getattr(node.func, "attr", ""), getattr(node.func, "id", "")):
            given = [*node.args[:1], *(keyword.value for keyword in node.keywords if keyword.arg == "pointer")]
            found.update(*(_leading(one, values, own) for one in given))
    return found


def _leading(address: ast.AST, values: Mapping[str, Sequence[ast.AST]], own: Sequence[str]) -> set[str]:
    """The input that an address begins with, also by way of a local variable; of ``head + slopes`` the only one."""
    first = address
    while isinstance(first, ast.BinOp):
        first = first.left
    if not isinstance(first, ast.Name) or first.id in own:
        return {first.id} if isinstance(first, ast.Name) else set()
    if first.id in values:
        return set().union(*(_leading(one, {**values, first.id: ()}, own) for one in values[first.id]))
    read = {node.id for node in ast.walk(address) if isinstance(node, ast.Name) and node.id in own}
    return read if len(read) == 1 else set()


def tree_of(function: Callable[..., Any]) -> ast.AST:
    """The function's part of its file's tree.

    Raises:
        SpecError: its source cannot be read.
    """
    function = getattr(function, "fn", function)
    code = function.__code__
    tree = ast.parse("".join(linecache.getlines(code.co_filename)))
    kinds = (ast.Lambda,) if function.__name__ == "<lambda>" else (ast.FunctionDef,)
    names = list(inspect.signature(function).parameters)
    found: dict[str, ast.AST] = {}
    for node in ast.walk(tree):
        if isinstance(node, kinds) and [a.arg for a in node.args.args] == names:
            lines = {node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))}
            if code.co_firstlineno in lines:
                found.setdefault(ast.dump(node), node)
    if len(found) > 1:
        raise SpecError(
            f"{code.co_filename}:{code.co_firstlineno} has {len(found)} lambdas of the same arguments, which nothing"
            " tells apart; give each a line of its own"
        )
    if not found:
        raise SpecError(f"{function.__name__}: its source is not in {code.co_filename}")
    return next(iter(found.values()))
