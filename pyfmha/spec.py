"""What to compile: one kernel, specialised one way, under one C function name.

A :class:`KernelSpec` is validated when it is made, so everything downstream may trust it. It knows nothing of attention.
"""

import hashlib
import json
import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pyfmha.abi import canonical, ctype
from pyfmha.errors import SpecError
from pyfmha.grid import GridExpression, parse_grid

Constant = int | float | bool | str | None
HINTS = (1, 16)

# Words that may not be an argument's or a function's name in the generated C.
_C_WORDS = frozenset(
    """auto break case char const continue default do double else enum extern float for goto if inline int long register
    restrict return short signed sizeof static struct switch typedef union unsigned void volatile while bool true false
    stream algo_id variant kernel params grid bad CUstream CUresult CUdeviceptr NULL errno linux unix asm""".split()
)


@dataclass(frozen=True)
class Argument:
    """One run-time argument.

    Attributes:
        name: as in the kernel.
        type: as in a Triton signature, ``"*fp16"`` or ``"i32"``.
        hint: 16 promises a multiple of 16 (bytes of a pointer, value of an integer); 1 promises the value 1; None
            promises nothing.
    """

    name: str
    type: str
    hint: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "type", canonical(self.type))
        kind = ctype(self.type).kind
        if self.hint is None:
            return
        if self.hint not in HINTS or isinstance(self.hint, bool):
            raise SpecError(f"argument {self.name}: hint :{self.hint} is unknown; use :16 (a multiple of 16) or :1 (equal to 1)")
        if kind == "float" or (kind == "pointer" and self.hint == 1):
            allowed = "pointers take :16 only" if kind == "pointer" else "floating-point arguments take no hint"
            raise SpecError(f"argument {self.name}: {self.type} cannot carry the hint :{self.hint}; {allowed}")

    @property
    def c_name(self) -> str:
        """Its name in C: the kernel's, with an underscore where that is a word of C or of the generated code."""
        return f"{self.name}_" if self.name in _C_WORDS else self.name


@dataclass(frozen=True)
class KernelSpec:
    """One specialisation of one Triton kernel.

    Attributes:
        source: the Python file that holds the kernel.
        kernel: the ``@triton.jit`` function's name in that file.
        name: the C function under which it is linked; specs that share it become its algorithms and variants.
        arguments: the run-time arguments, in the kernel's order.
        constants: the ``tl.constexpr`` arguments by name, in the kernel's order.
        grid: ``"x, y, z"``, see :mod:`pyfmha.grid`.
        num_warps: warps of 32 threads a block; a power of two.
        num_stages: software-pipelining depth.

    Raises:
        SpecError: on creation, saying which part is wrong and what is allowed.
    """

    source: Path
    kernel: str
    name: str
    arguments: tuple[Argument, ...]
    constants: tuple[tuple[str, Constant], ...]
    grid: str
    num_warps: int = 4
    num_stages: int = 3
    _grid: tuple[GridExpression, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_function_name(self.name)
        if self.num_warps not in (1, 2, 4, 8, 16, 32) or isinstance(self.num_warps, bool):
            raise SpecError(f"{self.name}: num_warps is {self.num_warps}; use 1, 2, 4, 8, 16 or 32")
        if self.num_stages not in range(1, 17) or isinstance(self.num_stages, bool):
            raise SpecError(f"{self.name}: num_stages is {self.num_stages}; use 1 to 16")
        if not self.arguments:
            raise SpecError(f"{self.name}: the kernel takes no run-time argument, so it can have no effect")
        names = [argument.name for argument in self.arguments] + [name for name, _ in self.constants]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise SpecError(f"{self.name}: argument {', '.join(repeated)} is given more than once")
        spelled = [argument.c_name for argument in self.arguments]
        clashing = sorted({name for name in spelled if spelled.count(name) > 1})
        if clashing:
            raise SpecError(f"{self.name}: two arguments would be called {', '.join(clashing)} in C; rename one")
        unsafe = [argument.name for argument in self.arguments if not argument.name.isascii()]
        if unsafe:
            raise SpecError(f"{self.name}: argument {', '.join(unsafe)} is not an ASCII name, which the generated C needs")
        object.__setattr__(self, "_grid", parse_grid(self.grid, self._integers(), dict(self.constants)))

    def _integers(self) -> frozenset[str]:
        return frozenset(a.name for a in self.arguments if ctype(a.type).kind == "integer")

    @property
    def grid_expressions(self) -> tuple[GridExpression, ...]:
        """The parsed grid: x, y and z."""
        return self._grid

    @property
    def algorithm(self) -> str:
        """What tells one algorithm of a function from another: constants, warps and stages, but not hints."""
        return json.dumps([list(self.constants), self.num_warps, self.num_stages])

    @property
    def prototype(self) -> tuple[tuple[str, str], ...]:
        """Name and type of each run-time argument: what every spec of one function must share."""
        return tuple((argument.name, argument.type) for argument in self.arguments)

    @property
    def variant(self) -> str:
        """A readable name, unique to this spec and the same in every later build."""
        sizes = [str(v) for _, v in self.constants if isinstance(v, int) and not isinstance(v, bool)][:4]
        hinted = any(argument.hint for argument in self.arguments)
        parts = [self.name, "x".join(sizes), f"w{self.num_warps}s{self.num_stages}", "hinted" if hinted else "generic"]
        return "_".join([part for part in parts if part] + [self.digest])

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits over everything but the source file's place and contents."""
        described = [self.kernel, [[a.name, a.type, a.hint] for a in self.arguments], self.algorithm, self.grid]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:8]

    def generic(self) -> "KernelSpec":
        """The same without hints: it serves every value and alignment."""
        return replace(self, arguments=tuple(replace(argument, hint=None) for argument in self.arguments))


def check_function_name(name: str) -> None:
    """Refuse a C function name that would not compile or would clash with the library's own.

    Raises:
        SpecError: saying why.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name in _C_WORDS:
        raise SpecError(f"function name {name!r} is not a C identifier: use letters, digits and _, not starting with a digit")
    if name.startswith(("pyfmha_", "_")):
        raise SpecError(f"function name {name!r}: names starting with 'pyfmha_' or '_' are kept for the library itself")


def split_signature(text: str) -> list[str]:
    """Split at the commas outside brackets and quotes; an empty entry stays, to be refused with its position."""
    entries, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "[<(") - (character in "]>)")
            if character == "," and depth <= 0:
                entries.append("")
                continue
        entries[-1] += character
    return [entry.strip() for entry in entries]


def parse_signature(
    text: str, parameters: Sequence[str], defaults: Mapping[str, Constant], constexprs: frozenset[str]
) -> tuple[tuple[Argument, ...], tuple[tuple[str, Constant], ...]]:
    """Read ``"*fp16:16, fp32, i32, 128"`` against a kernel's parameters.

    Args:
        text: one entry a parameter: a type with an optional hint, or a constant's value (int, float, True, False, None,
            a quoted string). Trailing constants that have a default may be left out.
        parameters: names of the kernel's parameters, in order.
        defaults: their default values, where they have one.
        constexprs: the parameters annotated ``tl.constexpr``.

    Returns:
        The run-time arguments and the constants, each in the kernel's order.

    Raises:
        SpecError: wrong length, unknown type, bad hint, or a type where a constant is needed.
    """
    entries = split_signature(text)
    omitted = parameters[len(entries) :]
    if len(entries) > len(parameters) or any(name not in defaults for name in omitted):
        needed = sum(name not in defaults for name in parameters)
        wanted = str(needed) if needed == len(parameters) else f"{needed} to {len(parameters)}"
        raise SpecError(f"signature has {len(entries)} entries, the kernel takes {wanted}: {', '.join(parameters)}")
    arguments: list[Argument] = []
    constants: list[tuple[str, Constant]] = []
    for name, entry in zip(parameters, entries, strict=False):
        is_constant, value = _constant(entry)
        if is_constant:
            constants.append((name, value))
        elif name in constexprs:
            raise SpecError(f"argument {name} is a tl.constexpr: give its value, not {entry!r} (text goes in quotes)")
        else:
            arguments.append(_argument(name, entry))
    return tuple(arguments), (*constants, *((name, defaults[name]) for name in omitted))


def _constant(entry: str) -> tuple[bool, Constant]:
    words: dict[str, Constant] = {"True": True, "False": False, "None": None}
    if entry in words:
        return True, words[entry]
    if re.fullmatch(r"""'[^']*'|"[^"]*\"""", entry):
        return True, entry[1:-1]
    for convert in (int, float):
        try:
            return True, convert(entry)
        except ValueError:
            continue
    return False, None


def _argument(name: str, entry: str) -> Argument:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise SpecError(f"{name!r} is not an argument name")
    type_name, colon, hint = entry.partition(":")
    if colon and not re.fullmatch(r"\d+", hint.strip()):
        raise SpecError(f"argument {name}: hint {entry!r} is unknown; use :16 (a multiple of 16) or :1 (equal to 1)")
    try:
        return Argument(name, type_name, int(hint) if colon else None)
    except SpecError as error:
        raise error if str(error).startswith("argument ") else SpecError(f"argument {name}: {error}") from None
