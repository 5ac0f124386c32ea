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
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pyfmha.errors import SpecError
from pyfmha.functions.capped import cap_of, scope_of
from pyfmha.functions.digest import identity
from pyfmha.functions.inputs import Inputs, Part, file_of, jitted, part_of, tree_of
from pyfmha.functions.relative import trial_of

SCORE = ("score", "batch", "head", "query", "key")
"""What a score function takes before inputs of its own."""
SEEN = SCORE[1:]
"""What a mask function takes."""
BOUNDS = ("batch", "head", "first_query", "last_query", "kv_len")
"""What bounds may take, in this order; those not named are left out."""

Example = Callable[[int, int, int, int], Mapping[str, Any]]


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
    _score: Part | None = None
    _seen: Part | None = None
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

    @cached_property
    def cap(self) -> Any:
        """The ``@triton.jit`` function (batch, head, \\*inputs) of the soft cap that the score function is, or None."""
        if self._cap is None or self._score is None:
            return None
        parameters = ["batch", "head", *(name for name, _ in self.inputs)]
        return _jitted(f"{self.name}.cap", parameters, self._cap, scope_of(self._score.function))

    @cached_property
    def _cap(self) -> str | None:
        """Where nothing else is to be asked for each score."""
        return None if self._score is None or self._score.relative or self._seen else cap_of(self._score)

    def _adapt(self, what: str, first: Sequence[str], part: Part) -> Any:
        """A function that takes all inputs, and gives the user's those that it wants. Kernels get a
        score for each element, and of what is seen truth values: as of a mask that is a tensor, all but 0 is seen."""
        parameters = [*first, *(name for name, _ in self.inputs)]
        arguments = [*first, *(name for name, _ in part.inputs)]
        value = f"_of_user({', '.join(arguments)})"
        import triton.language

        # Triton 3.6, on which what 3.9 built may be verified, has no public `to_tensor`: there functions give tensors.
        lines = [f"found = _tl.to_tensor({value})" if hasattr(triton.language, "to_tensor") else f"found = {value}"]
        if what == "score":
            lines.append("found, score = _tl.broadcast(found, score)")
        else:
            lines += ["if found.dtype != _tl.int1:", "    found = found != 0"]
        return _jitted(f"{self.name}.{what}", parameters, "found", {"_of_user": part.function}, lines)

    def _asked(self) -> bool:
        """Whether it is asked for each element, rather than once for each distance, or where bounds leave it open."""
        if self._score is not None and not self._score.relative:
            return True
        return self._seen is not None and (self._bounds is None or not _tells_what_is_whole(self._bounds[1]))

    def _blocks(self) -> dict[str, bool] | None:
        """Whether the blocks to visit are listed by a launch of their own, and what lists are told apart by."""
        seen = self._seen
        if seen is None or not seen.blocks:
            return None
        return {name: seen.reads(name) for name in ("batch", "head")}

    def __pyfmha__(self) -> dict[str, Any]:
        """What a build must know of it, as JSON has it."""
        parts = {"SCORE": self._score, "SEEN": self._seen, "BOUNDS": self._bounds}
        known = [part for part in (self._score, self._seen) if part is not None]
        return {
            "name": self.name,
            "source": str(self.source),
            "file": self.source.stem if self.source.parent == Path(__file__).resolve().parent else str(self.source),
            "inputs": [list(one) for one in self.inputs],
            "parts": [parameter for parameter, part in parts.items() if part is not None],
            "blocks": self._blocks(),
            "shapes": {name: list(axes) for part in known for name, axes in part.shapes},
            "requires": list(dict.fromkeys(one for part in known for one in part.requires)),
            "score": None if self._score is None else identity(self._score),
            "mask": None if self._seen is None else identity(self._seen),
            "asked": self._asked(),
            "capped": self._cap is not None,
            "from_first": self._bounds is not None and _begins_with_the_first_key(self._bounds[1]),
            "even": self._bounds is None or _ends_behind_the_last_query(self._bounds[1]),
            "trial": trial_of(self.name, self.example) if self._score is not None and self._score.relative else "",
        }


def score_function(
    function: Any = None,
    *,
    inputs: Mapping[str, str] | None = None,
    requires: Sequence[str] = (),
    example: Example | None = None,
    relative: bool = False,
) -> Any:
    """Make a function (score, batch, head, query, key, inputs...) one of scores: it gives the score that counts.

    It sees ``scale * q . k`` after soft cap and bias. Minus infinity says that the key is not seen.

    Args:
        function: the function.
        inputs: types of inputs, by name, where they are other than ``*fp32`` for what is loaded from, and ``i32``. A
            pointer may have a shape, ``"*i32[batch, tokens]"``, see :mod:`pyfmha.functions.inputs`: then TensorRT's
            plugin checks it, and takes the numbers that are axes from it.
        requires: conditions of such sizes and numbers, ``"tokens >= keys"``, which the plugin checks.
        example: for ``pyfmha verify --functions``: a function of (batch, heads, q_len, kv_len) that returns inputs by
            name, numpy arrays and numbers.
        relative: that what it adds to a score depends on batch, head and key - query alone, as ALiBi and T5's buckets.
            On Hopper it is then asked once for each distance rather than for each score. A build tries it on its
            `example`, which it needs for that.

    Returns:
        An :class:`AttentionFunction`; the decorator, where keywords alone are given.

    Raises:
        SpecError: it takes other arguments, an input has a type that is not served, or a relative one has no example.
    """
    if relative not in (True, False):
        raise SpecError(f"relative is {relative!r}; give True or False")
    if function is None:
        return partial(score_function, inputs=inputs, requires=requires, example=example, relative=relative)
    part = replace(part_of(function, SCORE, "score", inputs or {}, requires), relative=relative)
    if relative and example is None:
        raise SpecError(
            f"{function.__name__} is relative, but has no example of its inputs to be tried with: give example=, a"
            " function of (batch, heads, q_len, kv_len) that returns them by name"
        )
    return AttentionFunction(function.__name__, file_of(function), part.inputs, example, _score=part)


def mask_function(
    function: Any = None,
    *,
    bounds: Callable[..., Any] | None = None,
    blocks: bool = False,
    inputs: Mapping[str, str] | None = None,
    requires: Sequence[str] = (),
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
        blocks: whether a launch before attention asks the function of every query and key, and lists the blocks of keys
            that each tile of queries sees, in part or whole: only those are loaded and computed, wherever they lie, and
            it is not asked in whole ones. Worth it where what is seen has holes that bounds cannot tell. Sequences and
            heads share lists unless their numbers are read. Bounds limit where it asks; a mask tensor beside the
            function is part of the lists.
        inputs, requires, example: as of :func:`score_function`.

    Returns:
        An :class:`AttentionFunction`; the decorator, where keywords alone are given.

    Raises:
        SpecError: it takes other arguments, or an input has a type that is not served.
    """
    if blocks not in (True, False):
        raise SpecError(f"blocks is {blocks!r}; give True or False")
    if function is None:
        return partial(mask_function, bounds=bounds, blocks=blocks, inputs=inputs, requires=requires, example=example)
    part = replace(part_of(function, SEEN, "mask", inputs or {}, requires), bounds=bounds, blocks=blocks)
    limits = None if bounds is None else _bounds_of(bounds, function.__name__, dict(part.inputs))
    return AttentionFunction(function.__name__, file_of(function), part.inputs, example, _seen=part, _bounds=limits)


def score_and_mask(name: str, score: AttentionFunction, mask: AttentionFunction) -> AttentionFunction:
    """Both together, as a function of their own: inputs of the same name are the same.

    Args:
        name: of the C functions, and of the variable of the file that it is assigned to.
        score: a score function.
        mask: a mask function.

    Raises:
        SpecError: one is of the other kind, or an input has two types or shapes.
    """
    if score._score is None or mask._seen is None:
        raise SpecError(f"{name}: give a score function and a mask function, in this order")
    inputs = dict(score.inputs)
    for one, kind in mask.inputs:
        if inputs.setdefault(one, kind) != kind:
            raise SpecError(f"{name}: {one} is {inputs[one]} for {score.name} and {kind} for {mask.name}")
    shapes = dict(score._score.shapes)
    for one, axes in mask._seen.shapes:
        if shapes.setdefault(one, axes) != axes:
            raise SpecError(f"{name}: {one} has another shape for {score.name} than for {mask.name}")
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


def _bounds_of(bounds: Any, name: str, inputs: dict[str, str]) -> tuple[tuple[str, ...], Any]:
    """The names that bounds take, and the expression of a lambda or the function."""
    plain = getattr(bounds, "fn", bounds)
    if not inspect.isfunction(plain):
        raise SpecError(f"{name}: its bounds are {bounds!r}; give a function that returns them")
    taken = tuple(inspect.signature(plain).parameters)
    allowed = [one for one in (*BOUNDS, *inputs) if one in taken]
    if list(taken) != allowed:
        raise SpecError(
            f"{name}: its bounds take ({', '.join(taken)}); they may take any of ({', '.join(BOUNDS)}) in this order,"
            f" then any of the function's inputs ({', '.join(inputs) or 'none'}) in theirs"
        )
    if plain.__name__ != "<lambda>":
        return taken, jitted(bounds)
    tree = tree_of(plain)
    assert isinstance(tree, ast.Lambda)
    return taken, ast.unparse(tree.body)


def _values_of(bounds: Any) -> list[list[Any]]:
    """The numbers that bounds, the expression of a lambda or a function, may be; none where that cannot be read."""
    tree = ast.parse(bounds, mode="eval") if isinstance(bounds, str) else tree_of(bounds)
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)] or [getattr(tree, "body", None)]
    return [value.elts if isinstance(value, ast.Tuple) else [] for value in values]


def _tells_what_is_whole(bounds: Any) -> bool:
    """Whether bounds are four numbers."""
    return all(len(values) == 4 for values in _values_of(bounds))


def _begins_with_the_first_key(bounds: Any) -> bool:
    """Whether both what is seen at all and what is seen whole do, by a 0 that is written there."""
    return _tells_what_is_whole(bounds) and all(
        isinstance(first, ast.Constant) and first.value == 0 for values in _values_of(bounds) for first in values[::2]
    )


def _ends_behind_the_last_query(bounds: Any) -> bool:
    """Whether what is seen begins with the first key and ends so many keys behind the last query, by a sum that is
    written there."""
    return _begins_with_the_first_key(bounds) and all(
        isinstance(end := values[1], ast.BinOp)
        and isinstance(end.op, ast.Add)
        and isinstance(end.left, ast.Name)
        and end.left.id == "last_query"
        and isinstance(end.right, ast.Constant)
        for values in _values_of(bounds)
    )


def _jitted(
    name: str, parameters: Sequence[str], expression: str, scope: dict[str, Any], lines: Sequence[str] = ()
) -> Any:
    """A Triton function of some lines and an expression. Triton reads the source of what it compiles, so there must be
    one."""
    body = "".join(f"    {line}\n" for line in (*lines, f"return {expression}"))
    text = f"def {name.replace('.', '_')}({', '.join(parameters)}):\n{body}"
    file = f"<pyfmha {name} {hash((text, id(scope))) & 0xFFFFFFFF:08x}>"
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    import triton.language

    space = {"_tl": triton.language, **scope}  # the interpreter looks for it in what it runs
    exec(compile(text, file, "exec"), space)
    return jitted(space[name.replace(".", "_")])
