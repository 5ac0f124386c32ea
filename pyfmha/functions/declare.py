"""The decorators that make a Python function one of attention: of a score, or of what is seen.

    @pyfmha.score_function
    def alibi(score, batch, head, query, key, slopes):
        return score + tl.load(slopes + head) * (key - query)

    @pyfmha.mask_function(bounds=lambda first_query, last_query, kv_len, width: (first_query - width, last_query + 1))
    def near(batch, head, query, key, width):
        return (query - key < width) & (key <= query)

The body is Triton's language, for a block: score is float32 [queries, keys], query int32 [queries, 1], key [1, keys],
batch and head are numbers. What follows is inputs of the function's own. What a ``tl.load`` begins with is a pointer to
float32, anything else an int32; ``inputs={"slopes": "*fp16"}`` says otherwise. Positions are those of the sequence: a
query's is its index, or, with bottom-right alignment, that of the key it stands at.
"""

import ast
import inspect
import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pyfmha.errors import SpecError
from pyfmha.spec.abi import canonical, ctype

SCORE = ("score", "batch", "head", "query", "key")
"""What a score function takes before inputs of its own."""
SEEN = SCORE[1:]
"""What a mask function takes."""
BOUNDS = ("batch", "head", "first_query", "last_query", "kv_len")
"""What bounds may take, in this order; those not named are left out."""
POINTER, NUMBER = "*fp32", "i32"
"""The types of inputs of which nothing else is said."""

Inputs = tuple[tuple[str, str], ...]
Example = Callable[[int, int, int, int], Mapping[str, Any]]


@dataclass(frozen=True)
class _Part:
    """One function of the user's, and what it takes of its own."""

    function: Any
    inputs: Inputs


@dataclass(frozen=True, eq=False)
class AttentionFunction:
    """A score function, a mask function, or both.

    Attributes:
        name: part of the C functions' names: ``fmha_with_alibi_d64_fp16``.
        source: the file that declares it.
        inputs: name and type of each input, in the order of the kernel's arguments.
        example: gives inputs by name, numpy arrays and numbers, for (batch, heads, q_len, kv_len); or None.
    """

    name: str
    source: Path
    inputs: Inputs
    example: Example | None = None
    _score: _Part | None = None
    _seen: _Part | None = None
    _bounds: tuple[tuple[str, ...], Any] | None = None

    @cached_property
    def score(self) -> Any:
        """The ``@triton.jit`` function (score, batch, head, query, key, \\*inputs), or None."""
        return None if self._score is None else self._adapt("score", SCORE, self._score)

    @cached_property
    def seen(self) -> Any:
        """The ``@triton.jit`` function (batch, head, query, key, \\*inputs), or None."""
        return None if self._seen is None else self._adapt("seen", SEEN, self._seen)

    @cached_property
    def bounds(self) -> Any:
        """The ``@triton.jit`` function (batch, head, first_query, last_query, kv_len, \\*inputs), or None."""
        if self._bounds is None:
            return None
        taken, function = self._bounds
        parameters = [*BOUNDS, *(name for name, _ in self.inputs)]
        if isinstance(function, str):  # the expression of a lambda
            scope = self._seen.function.fn.__globals__ if self._seen else {}
            return _jitted(f"{self.name}.bounds", parameters, function, scope)
        return _jitted(f"{self.name}.bounds", parameters, f"_of_user({', '.join(taken)})", {"_of_user": function})

    def _adapt(self, what: str, first: Sequence[str], part: _Part) -> Any:
        """A function that takes all inputs, and gives the user's those that it wants."""
        parameters = [*first, *(name for name, _ in self.inputs)]
        arguments = [*first, *(name for name, _ in part.inputs)]
        return _jitted(
            f"{self.name}.{what}", parameters, f"_of_user({', '.join(arguments)})", {"_of_user": part.function}
        )

    def __pyfmha__(self) -> dict[str, Any]:
        """What a build must know of it, as JSON has it."""
        parts = {"SCORE": self._score, "SEEN": self._seen, "BOUNDS": self._bounds}
        return {
            "name": self.name,
            "source": str(self.source),
            "inputs": [list(one) for one in self.inputs],
            "parts": [parameter for parameter, part in parts.items() if part is not None],
        }


def score_function(
    function: Any = None, *, inputs: Mapping[str, str] | None = None, example: Example | None = None
) -> Any:
    """Make a function (score, batch, head, query, key, inputs...) one of scores: it gives the score that counts.

    It sees ``scale * q . k`` after soft cap and bias. Minus infinity says that the key is not seen.

    Args:
        function: the function.
        inputs: types of inputs, by name, where they are other than ``*fp32`` for what is loaded from, and ``i32``.
        example: for ``pyfmha verify --functions``: a function of (batch, heads, q_len, kv_len) that returns inputs by
            name, numpy arrays and numbers.

    Returns:
        An :class:`AttentionFunction`; the decorator, where keywords alone are given.

    Raises:
        SpecError: it takes other arguments, or an input has a type that is not served.
    """
    if function is None:
        return partial(score_function, inputs=inputs, example=example)
    part = _Part(_jit(function), _inputs_of(function, SCORE, "score", inputs or {}))
    return AttentionFunction(function.__name__, _file_of(function), part.inputs, example, _score=part)


def mask_function(
    function: Any = None,
    *,
    bounds: Callable[..., Any] | None = None,
    inputs: Mapping[str, str] | None = None,
    example: Example | None = None,
) -> Any:
    """Make a function (batch, head, query, key, inputs...) one that says which keys are seen.

    Args:
        function: the function.
        bounds: which keys the queries first_query..last_query of a sequence of kv_len keys can see: the first and the
            end, which lies after the last. Keys outside are neither loaded nor computed, so that they must be such as
            the function denies. Two more numbers, first and end of keys that all these queries see, save asking the
            function there. A lambda of one expression, or a ``@triton.jit`` function; it takes any of batch, head,
            first_query, last_query and kv_len, in this order, and then any inputs of the function, in theirs.
        inputs, example: as of :func:`score_function`.

    Returns:
        An :class:`AttentionFunction`; the decorator, where keywords alone are given.

    Raises:
        SpecError: it takes other arguments, or an input has a type that is not served.
    """
    if function is None:
        return partial(mask_function, bounds=bounds, inputs=inputs, example=example)
    part = _Part(_jit(function), _inputs_of(function, SEEN, "mask", inputs or {}))
    limits = None if bounds is None else _bounds_of(bounds, function.__name__, dict(part.inputs))
    return AttentionFunction(function.__name__, _file_of(function), part.inputs, example, _seen=part, _bounds=limits)


def score_and_mask(name: str, score: AttentionFunction, mask: AttentionFunction) -> AttentionFunction:
    """Both together, as a function of their own: inputs of the same name are the same.

    Args:
        name: of the C functions, and of the variable of the file that it is assigned to.
        score: a score function.
        mask: a mask function.

    Raises:
        SpecError: one is of the other kind, or an input has two types.
    """
    if score._score is None or mask._seen is None:
        raise SpecError(f"{name}: give a score function and a mask function, in this order")
    inputs = dict(score.inputs)
    for one, kind in mask.inputs:
        if inputs.setdefault(one, kind) != kind:
            raise SpecError(f"{name}: {one} is {inputs[one]} for {score.name} and {kind} for {mask.name}")
    frame = inspect.currentframe()
    caller = frame.f_back if frame else None
    source = Path(caller.f_code.co_filename) if caller else mask.source
    example = None
    if score.example is not None and mask.example is not None:
        example = partial(_both, score.example, mask.example)
    return AttentionFunction(name, source, tuple(inputs.items()), example, score._score, mask._seen, mask._bounds)


def _both(one: Example, other: Example, *sizes: int) -> dict[str, Any]:
    """The examples of two functions; the same inputs are the second's."""
    return {**one(*sizes), **other(*sizes)}


def _jit(function: Any) -> Any:
    """As Triton compiles it, or interprets it."""
    import triton

    return function if hasattr(function, "fn") else triton.jit(function)


def _file_of(function: Any) -> Path:
    return Path(inspect.getfile(function)).resolve()


def _inputs_of(function: Callable[..., Any], first: Sequence[str], kind: str, types: Mapping[str, str]) -> Inputs:
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
    loaded = _loaded(function)
    return tuple((one, _type(types.get(one, POINTER if one in loaded else NUMBER), one, function)) for one in own)


def _type(text: str, name: str, function: Callable[..., Any]) -> str:
    try:
        ctype(canonical(text))
    except SpecError as error:
        raise SpecError(f"{function.__name__}: input {name} cannot be {text!r}: {error}") from None
    return canonical(text)


def _loaded(function: Callable[..., Any]) -> set[str]:
    """The names that an argument of a load begins with: ``slopes`` of ``tl.load(slopes + head)``."""
    found = set()
    for node in ast.walk(_tree_of(function)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "load" and node.args:
            first = node.args[0]
            while isinstance(first, ast.BinOp):
                first = first.left
            if isinstance(first, ast.Name):
                found.add(first.id)
    return found


def _tree_of(function: Callable[..., Any]) -> ast.AST:
    """The function's part of its file's tree."""
    code = function.__code__
    tree = ast.parse("".join(linecache.getlines(code.co_filename)))
    kinds = (ast.Lambda,) if function.__name__ == "<lambda>" else (ast.FunctionDef,)
    names = list(inspect.signature(function).parameters)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and [a.arg for a in node.args.args] == names:
            lines = {node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))}
            if code.co_firstlineno in lines:
                return node
    raise SpecError(f"{function.__name__}: its source is not in {code.co_filename}")


def _bounds_of(bounds: Any, name: str, inputs: dict[str, str]) -> tuple[tuple[str, ...], Any]:
    """The names that bounds take, and the expression of a lambda or the function."""
    plain = getattr(bounds, "fn", bounds)
    taken = tuple(inspect.signature(plain).parameters)
    allowed = [one for one in (*BOUNDS, *inputs) if one in taken]
    if list(taken) != allowed:
        raise SpecError(
            f"{name}: its bounds take ({', '.join(taken)}); they may take any of ({', '.join(BOUNDS)}) in this order,"
            f" then any of the function's inputs ({', '.join(inputs) or 'none'}) in theirs"
        )
    if plain.__name__ != "<lambda>":
        return taken, _jit(bounds)
    tree = _tree_of(plain)
    assert isinstance(tree, ast.Lambda)
    return taken, ast.unparse(tree.body)


def _jitted(name: str, parameters: Sequence[str], expression: str, scope: dict[str, Any]) -> Any:
    """A Triton function of one expression. Triton reads the source of what it compiles, so there must be one."""
    text = f"def {name.replace('.', '_')}({', '.join(parameters)}):\n    return {expression}\n"
    file = f"<pyfmha {name} {hash((text, id(scope))) & 0xFFFFFFFF:08x}>"
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    import triton.language

    space = {"_tl": triton.language, **scope}  # the interpreter looks for it in what it runs
    exec(compile(text, file, "exec"), space)
    return _jit(space[name.replace(".", "_")])
