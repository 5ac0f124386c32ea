"""What a user's function is, as a short text: the same for the same arithmetic, whatever stands around it in its file.

An engine keeps it, so that a library made of another version of the function is known when the engine is loaded.
"""

import ast
import hashlib
import inspect
import io
import linecache
import tokenize
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from pyfmha.attention.key_blocks import TILE
from pyfmha.errors import SpecError
from pyfmha.functions.inputs import Part, tree_of

DIGITS = 16
"""Of the digest, hexadecimal."""

_LAYOUT = {tokenize.INDENT: "{", tokenize.DEDENT: "}", tokenize.NEWLINE: ";"}
_NOTHING = (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER, tokenize.ENCODING)


def identity(part: Part) -> str:
    """``"alibi:0123456789abcdef"``: a function's name, and a digest of what it does.

    Its source counts without comments and its docstring, that of its bounds and of the functions it calls, the values
    of the variables outside that it reads, and its inputs. Python's version does not.
    """
    said: list[str] = [repr((part.inputs, part.shapes, part.requires))]
    if part.blocks:  # an engine without has no memory for them
        said.append(f"blocks of {TILE}")
    seen: set[int] = set()
    for one in (part.function, part.bounds):
        said += _told(one, seen)
    return f"{part.name}:{hashlib.sha256(chr(0).join(said).encode()).hexdigest()[:DIGITS]}"


def _told(value: Any, seen: set[int]) -> Iterator[str]:
    """What a value is: a function by its source and all it reads, another by its representation."""
    function = getattr(value, "fn", value)
    if isinstance(value, ModuleType):
        return  # what is read of it is told by the source: tl.load
    if not inspect.isfunction(function):
        # Triton's constants hold a value; what prints its address says nothing.
        said = repr(getattr(value, "value", value))
        yield type(value).__qualname__ if said.startswith("<") else said
        return
    if id(function) in seen:
        return
    seen.add(id(function))
    try:
        tree = tree_of(function)
    except SpecError:  # one that is made by a program, which Triton could not read either
        yield function.__qualname__
        return
    yield from _tokens(function, tree)
    for name in _read(tree):
        for found in _looked_up(function, name):
            if not _is_tritons(found):
                yield name
                yield from _told(found, seen)


def _is_tritons(value: Any) -> bool:
    """Whether it is a function or class of Triton's or Python's own, and no value of theirs."""
    if not (inspect.isfunction(getattr(value, "fn", value)) or inspect.isclass(value) or inspect.isbuiltin(value)):
        return False
    module = getattr(getattr(value, "fn", value), "__module__", None) or ""
    return module.partition(".")[0] in ("triton", "builtins")


def _read(tree: ast.AST) -> list[str]:
    """The names that a function reads, and attributes of them: ``tl.load``; not those of its decorators."""
    found: dict[str, None] = {}
    body = [*tree.body, tree.args] if isinstance(tree, ast.FunctionDef) else [tree]
    for node in (node for part in body for node in ast.walk(part)):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            found[ast.unparse(node)] = None
    return sorted(found)


def _looked_up(function: Callable[..., Any], dotted: str) -> Iterator[Any]:
    """The value outside the function of ``name`` or ``name.other``; none where it is a local one."""
    first, *rest = dotted.split(".")
    if not first.isidentifier() or not all(part.isidentifier() for part in rest):
        return
    scopes = (inspect.getclosurevars(function).nonlocals, function.__globals__)
    for scope in scopes:
        if first in scope:
            found: Any = scope[first]
            if rest and not isinstance(found, ModuleType):
                return  # the value itself is told, under its own name
            for part in rest:
                found = getattr(found, part, None)
            yield found
            return


def _tokens(function: Callable[..., Any], tree: ast.AST) -> Iterator[str]:
    """The words of a function's source, without comments and docstring."""
    lines = linecache.getlines(function.__code__.co_filename)
    source = ast.get_source_segment("".join(lines), tree, padded=True) or ""
    if isinstance(tree, ast.Lambda):
        source = f"({source.strip()})\n"
    docstring = ast.get_docstring(tree) if isinstance(tree, ast.FunctionDef) else None
    before = ";"
    for token in tokenize.generate_tokens(io.StringIO(_dedented(source)).readline):
        if token.type in _NOTHING:
            continue
        is_docstring = token.type == tokenize.STRING and docstring is not None and before == "{"
        if is_docstring:
            docstring = None
            continue
        before = _LAYOUT.get(token.type, token.string)
        yield before


def _dedented(source: str) -> str:
    """A function that stands inside another, at the beginning of lines."""
    margin = len(source) - len(source.lstrip(" "))
    return "".join(line[margin:] if line[:margin].isspace() else line for line in source.splitlines(keepends=True))
