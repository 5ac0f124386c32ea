"""The library functions that are made of a user's: ``fmha_with_alibi_d64_fp16`` and its kin.

They take what :mod:`pyfmha.attention.biased` takes, and then the function's inputs.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pyfmha.attention import biased_hopper, key_blocks
from pyfmha.attention.biased import ANY, ARGUMENTS, MASKED, PLAIN, Biased
from pyfmha.attention.biased_settings import NEITHER
from pyfmha.attention.first import DTYPES
from pyfmha.attention.forward import HEAD_SIZES
from pyfmha.attention.function_operator import UserFunction, function_operator
from pyfmha.attention.key_blocks import KeyBlocks
from pyfmha.errors import KernelSourceError, LibraryError, SpecError
from pyfmha.functions.declare import AttentionFunction
from pyfmha.operators.description import Operator
from pyfmha.spec.advice import build_command
from pyfmha.spec.constants import JitFunction
from pyfmha.spec.kernel import Argument, KernelSpec
from pyfmha.spec.words import one_of

ATTRIBUTES = {"SCORE": "score", "SEEN": "seen", "BOUNDS": "bounds"}
"""The kernel's parameters that are functions, and the attributes of an AttentionFunction that they are."""

SHIPPED = tuple(
    sorted(
        path.stem
        for path in Path(__file__).parent.glob("*.py")
        if path.stem
        not in ("__init__", "arithmetic", "capped", "declare", "digest", "evaluate", "family", "inputs", "relative")
    )
)
"""The files of functions that come with pyfmha."""


@dataclass(frozen=True)
class Declared:
    """A function of a file, as :meth:`pyfmha.functions.declare.AttentionFunction.__pyfmha__` describes it.

    Attributes:
        source: the file.
        name: of the function.
        inputs: name and type of each input.
        parts: those of :data:`ATTRIBUTES` that it has.
        function: the same as attention's operator must know it.
        asked: whether it is asked for each element: a score function that is not relative, or a mask function without
            bounds of what is seen whole.
        trial: of one that says it is relative, what it is to be tried with, see :mod:`pyfmha.functions.relative`.
        blocks: of lists of the blocks to visit; None: there are none.
        capped: whether the score function is a soft cap and nothing else, which Hopper's kernel takes by itself.
        from_first: whether bounds say that what is seen begins with the first key, as in causal attention.
        even: whether bounds, if there are any, say that besides it ends some keys behind the last query.
    """

    source: Path
    name: str
    inputs: tuple[tuple[str, str], ...]
    parts: tuple[str, ...]
    function: UserFunction | None = None
    asked: bool = True
    trial: str = ""
    blocks: KeyBlocks | None = None
    capped: bool = False
    from_first: bool = False
    even: bool = False

    @property
    def relative(self) -> bool:
        """Whether what it adds to a score depends on batch, head and key - query alone."""
        return bool(self.trial)

    @classmethod
    def of(cls, function: AttentionFunction) -> "Declared":
        """A function in this process.

        Raises:
            SpecError: it is none.
        """
        if not isinstance(function, AttentionFunction):
            raise SpecError(
                f"function is {function!r}; give what @pyfmha.score_function or @pyfmha.mask_function makes of one"
            )
        said = function.__pyfmha__()
        return cls._made(said, Path(said["source"]), None, KeyBlocks(**said["blocks"]) if said["blocks"] else None)

    @classmethod
    def _made(
        cls, said: dict[str, Any], source: Path, function: UserFunction | None, blocks: KeyBlocks | None
    ) -> "Declared":
        inputs = tuple((name, kind) for name, kind in said["inputs"])
        told = said["asked"], said["trial"], blocks, said["capped"], said["from_first"], said["even"]
        return cls(source, said["name"], inputs, tuple(said["parts"]), function, *told)

    @property
    def arguments(self) -> tuple[tuple[str, str], ...]:
        """What a function of the library takes behind attention's own arguments."""
        return (*self.inputs, *(() if self.blocks is None else key_blocks.ARGUMENTS))


def file_of(name: str) -> Path:
    """The file that ``--functions`` means: a path, or the name of one that comes with pyfmha.

    Raises:
        KernelSourceError: there is none.
    """
    if name in SHIPPED:
        return Path(__file__).with_name(f"{name}.py")
    if not Path(name).is_file():
        raise KernelSourceError(
            f"{name} is no file of functions; give a Python file, or what comes with pyfmha: {one_of(SHIPPED, name)}"
        )
    return Path(name)


def declared_in(source: Path, collect: Callable[[Path], Sequence[dict[str, Any]]]) -> list[Declared]:
    """The functions that a file declares.

    Args:
        source: the file.
        collect: :meth:`pyfmha.aot.cubin.Compiler.collect`, which imports it in a process of its own.

    Raises:
        KernelSourceError: it declares none, or cannot be imported.
        SpecError: a function is declared wrongly.
    """
    found = [
        Declared._made(one, source, made := UserFunction.of(one), made.blocks)
        for one in collect(source)
        if _is_at_home(source, one)
    ]
    if not found:
        raise KernelSourceError(
            f"{source} declares no function; decorate one with @pyfmha.score_function or @pyfmha.mask_function"
        )
    return found


def _is_at_home(source: Path, one: dict[str, Any]) -> bool:
    """Whether a function is the file's own, not imported; and then it must bear the name of its variable."""
    if Path(one["source"]).resolve() != source.resolve():
        return False
    if one["attribute"] != one["name"]:
        raise SpecError(f"{source}: {one['name']} is assigned to {one['attribute']}; give both the same name")
    return True


@dataclass(frozen=True)
class WithFunction(Biased):
    """One function of the library.

    Attributes:
        dtype, head_size: as of :class:`pyfmha.attention.biased.Biased`.
        function: the user's.
    """

    function: Declared = field(kw_only=True)

    @property
    def name(self) -> str:
        """The C function: ``fmha_with_alibi_d64_fp16``."""
        return f"fmha_with_{self.function.name}_d{self.padded}_{self.dtype}"

    @property
    def listing_names(self) -> tuple[str, ...]:
        """The C functions that list the blocks to visit, in this order: ``fmha_flags_documents_d64_fp16`` and
        ``fmha_blocks_documents_d64_fp16``; none where blocks are not listed."""
        names = key_blocks.LISTING if self.function.blocks is not None else ()
        return tuple(f"fmha_{what}_{self.function.name}_d{self.padded}_{self.dtype}" for what in names)

    def specs(self) -> tuple[KernelSpec, ...]:
        """What to compile: without bias, mask and soft cap, for Hopper and for others; with any of them; and for
        tensors of any alignment. Where blocks are listed, all these walk the lists, and the last write them."""
        one, base = self.function, self.generic()
        listed = one.blocks is not None
        if listed:
            fast = biased_hopper.of_kind(base, self.padded, NEITHER)
        else:
            fast = biased_hopper.of_function(
                base, self.padded, relative=one.relative, asked=one.asked, masked="SEEN" in one.parts,
                narrow=one.parts == ("SEEN", "BOUNDS") and not one.from_first, from_first=one.from_first, even=one.even,
            )  # fmt: skip
        known = (PLAIN, *((MASKED,) if listed else ()), ANY) if self.dtype != "fp32" else (ANY,)
        portable = (*(self.tuned(variant) for variant in known), self.generic())
        made = tuple(map(self._with_function, (*fast, *portable)))
        if not listed:
            return made
        # Rows of a mask are read many bytes at a time where they can.
        asking = [self._with_function(spec) for spec in (self.tuned(MASKED), self.generic())]
        flags, blocks = self.listing_names
        return (
            *map(key_blocks.reading, made),
            *(key_blocks.flagging(spec, flags) for spec in asking),
            key_blocks.writing(asking[-1], blocks),
        )

    def _with_function(self, spec: KernelSpec) -> KernelSpec:
        inputs = self.function.inputs
        parts = {part: ATTRIBUTES[part] for part in self.function.parts}
        if self.function.capped and spec.kernel == biased_hopper.KERNEL:
            parts["CAP"] = "cap"
        held = {*parts, *(("inputs",) if inputs else ())}
        return replace(
            spec,
            arguments=(*spec.arguments, *(Argument(name, kind) for name, kind in inputs)),
            constants=tuple((name, value) for name, value in spec.constants if name not in held),
            functions=tuple(
                JitFunction(part, self.function.source, f"{self.function.name}.{attribute}")
                for part, attribute in parts.items()
            ),
            tuples=(("inputs", tuple(name for name, _ in inputs)),) if inputs else (),
        )


def function_specs(
    functions: Sequence[Declared],
    dtypes: Sequence[str] = DTYPES,
    head_sizes: Sequence[int] = HEAD_SIZES,
) -> list[KernelSpec]:
    """What to compile for some functions.

    Raises:
        SpecError: a dtype or head size is not served, an input has a name of the kernel's, or two functions have one
            name.
    """
    names = [function.name for function in functions]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        files = ", ".join(str(function.source) for function in functions if function.name in twice)
        raise SpecError(f"function {', '.join(twice)} is declared more than once, in {files}; rename one")
    specs: dict[str, KernelSpec] = {}
    for function in functions:
        for dtype in dtypes:
            for head_size in head_sizes:
                for spec in WithFunction(dtype, head_size, function=function).specs():
                    specs[spec.variant] = spec
    return list(specs.values())


def function_operators(functions: Sequence[Declared]) -> tuple[list[Operator], list[str]]:
    """The plugins of some functions, and why others have none, a line each.

    Raises:
        SpecError: what a function says of its inputs is wrong.
    """
    operators, notes = [], []
    for function in functions:
        if function.function is None:
            continue
        if why := function.function.unserved():
            notes.append(f"{function.name} can be no plugin of TensorRT's: {why}; it is a function of the library only")
        else:
            operators.append(function_operator(function.function))
    return operators, notes


def find(library: Any, function: Declared, dtype: str, head_size: int) -> Any:
    """The function of a library that is made of a user's.

    Args:
        library: a :class:`pyfmha.runtime.library.Library`.
        function: the user's.
        dtype, head_size: of the problem, the latter the larger of Q's and V's.

    Raises:
        LibraryError: the library has none, or one that takes other inputs.
    """
    wanted = WithFunction(dtype, head_size, function=function)
    options = f"--functions {shlex.quote(str(function.source))}", f"--dtype {dtype}", f"--head-size {wanted.padded}"
    command = build_command(library.path, *options)
    if wanted.name not in library:
        raise LibraryError(f"{library.path} has no {wanted.name}, made of {function.name}; build it: {command}")
    found = library[wanted.name]
    given = tuple(found.manifest.arguments)[len(ARGUMENTS) :]
    if given != function.arguments:
        raise LibraryError(
            f"{wanted.name} of {library.path} takes {_said(given)}, {function.name} of {function.source} takes"
            f" {_said(function.arguments)}; build it again: {command}"
        )
    return found


def _said(inputs: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{name}: {kind}" for name, kind in inputs) or "no inputs"
