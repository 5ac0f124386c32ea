"""What to compile: one kernel, specialised one way, under one C function name.

A :class:`KernelSpec` is validated when it is made, so everything downstream may trust it. It knows nothing of
attention.
"""

import hashlib
import json
import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pyfmha.abi import canonical, ctype
from pyfmha.arch import ARCHS
from pyfmha.errors import SpecError
from pyfmha.grid import GridExpression, parse_grid

Constant = int | float | bool | str | None
HINTS = (1, 16)

# Words that may not be an argument's or a function's name in the generated C.
_C_WORDS = frozenset(
    """
    auto break case char const continue default do double else enum extern float for goto if inline int long
    register restrict return short signed sizeof static struct switch typedef union unsigned void volatile while
    bool true false stream algo_id variant kernel kernels images refuse scratch params grid bad CUstream
    CUresult CUdeviceptr NULL errno int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t size_t
    INT64_MAX INT64_C linux unix asm
    alignas alignof and and_eq bitand bitor catch class compl const_cast constexpr decltype delete dynamic_cast
    explicit export friend mutable namespace new noexcept not not_eq nullptr operator or or_eq private protected
    public reinterpret_cast static_assert static_cast template this thread_local throw try typeid typename using
    virtual wchar_t xor xor_eq typeof EOF SIZE_MAX INT8_MAX INT16_MAX INT32_MAX INT64_MIN UINT8_MAX UINT16_MAX
    UINT32_MAX UINT64_MAX UINT64_C INT32_C UINT32_C intptr_t uintptr_t ptrdiff_t offsetof
    """.split()  # noqa: SIM905  (a list would take a line a word)
)

# Functions of the C library which an exported function of that name would replace.
_C_FUNCTIONS = frozenset(
    """
    main malloc calloc realloc free abort exit atexit getenv memcpy memmove memset memcmp strlen strcmp strcpy
    printf snprintf vsnprintf fprintf puts dlopen dlsym dlclose dlerror open close read write signal time
    abs labs llabs fabs exp exp2 exp10 expm1 log log2 log10 log1p pow pow10 sqrt cbrt hypot sin cos tan asin acos atan
    atan2 sinh cosh tanh asinh acosh atanh sincos erf erfc gamma lgamma tgamma ceil floor round lround llround trunc
    rint lrint llrint nearbyint fmin fmax fdim fma fmod drem remainder remquo ldexp frexp modf scalb scalbn scalbln
    logb ilogb copysign nextafter nexttoward significand signbit nan j0 j1 jn y0 y1 yn ffs index rindex bcmp bcopy
    bzero alloca toupper tolower isalnum isalpha isblank iscntrl isdigit isgraph islower isprint ispunct isspace
    isupper isxdigit strcat strncat strncpy strncmp strchr strrchr strstr strspn strcspn strpbrk strdup strndup
    stpcpy memchr mempcpy putchar putc fputs fputc fwrite scanf sscanf fscanf vprintf vfprintf vsprintf sprintf
    aligned_alloc posix_memalign execl execv fork div ldiv rand srand system qsort bsearch
    """.split()  # noqa: SIM905  (a list would take a line a word)
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
            raise SpecError(
                f"argument {self.name}: hint :{self.hint} is unknown; use :16 (a multiple of 16) or :1 (equal to 1)"
            )
        if kind == "float" or (kind == "pointer" and self.hint == 1):
            allowed = "pointers take :16 only" if kind == "pointer" else "floating-point arguments take no hint"
            raise SpecError(f"argument {self.name}: {self.type} cannot carry the hint :{self.hint}; {allowed}")

    @property
    def c_name(self) -> str:
        """Its name in C: the kernel's, with an underscore where that is a word of C or of the generated code."""
        taken = self.name in _C_WORDS or self.name.startswith(("pyfmha_", "PYFMHA_")) or self.name.endswith("_bits")
        return f"{self.name}_" if taken else self.name


@dataclass(frozen=True)
class Tuning:
    """Settings for one architecture that differ from a spec's own.

    Attributes:
        arch: ``"sm_90"``.
        constants: the constants that differ, by name.
    """

    arch: str
    constants: tuple[tuple[str, Constant], ...]
    num_warps: int
    num_stages: int


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
        tunings: architectures with settings of their own; list them all, whichever are built, because they are part of
            the variant's name.
        algorithm_name: joins variants with other settings to one algorithm: a generic variant with small blocks, say,
            to a hinted one. By default variants are of one algorithm if constants, warps and stages are the same.
        resolved_from: the variant whose settings for one architecture this is; see :meth:`resolve`.

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
    tunings: tuple[Tuning, ...] = ()
    algorithm_name: str = ""
    resolved_from: str = ""
    _grid: tuple[GridExpression, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_function_name(self.name)
        if type(self.num_warps) is not int or self.num_warps not in (1, 2, 4, 8, 16, 32):
            raise SpecError(f"{self.name}: num_warps is {self.num_warps}; use 1, 2, 4, 8, 16 or 32")
        if type(self.num_stages) is not int or self.num_stages not in range(1, 17):
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
        if {self.name, f"{self.name}_no_algorithm"} & set(spelled):
            raise SpecError(
                f"{self.name}: an argument has the function's name, which C cannot tell apart; give another --out-name"
            )
        unsafe = [argument.name for argument in self.arguments if not argument.name.isascii()]
        if unsafe:
            raise SpecError(
                f"{self.name}: argument {', '.join(unsafe)} is not an ASCII name, which the generated C needs"
            )
        for tuning in self.tunings:
            if tuning.arch not in ARCHS:
                raise SpecError(f"{self.name}: a tuning is for {tuning.arch!r}; use one of {', '.join(ARCHS)}")
            unknown = sorted({name for name, _ in tuning.constants} - {name for name, _ in self.constants})
            if unknown:
                raise SpecError(
                    f"{self.name}: the tuning for {tuning.arch} sets {', '.join(unknown)}, no constant of the kernel"
                )
            self.resolve(tuning.arch)
        object.__setattr__(self, "_grid", parse_grid(self.grid, self._integers(), dict(self.constants)))

    def _integers(self) -> frozenset[str]:
        return frozenset(a.name for a in self.arguments if ctype(a.type).kind == "integer")

    @property
    def grid_expressions(self) -> tuple[GridExpression, ...]:
        """The parsed grid: x, y and z."""
        return self._grid

    def resolve(self, arch: str) -> "KernelSpec":
        """The spec for one architecture: its tuning applied, its name kept."""
        tuning = next((tuning for tuning in self.tunings if tuning.arch == arch), None)
        if tuning is None:
            return replace(self, tunings=(), resolved_from=self.variant)
        constants = tuple((name, dict(tuning.constants).get(name, value)) for name, value in self.constants)
        return replace(
            self,
            constants=constants,
            num_warps=tuning.num_warps,
            num_stages=tuning.num_stages,
            tunings=(),
            resolved_from=self.variant,
        )

    @property
    def _settings(self) -> str:
        tunings = [[t.arch, t.constants, t.num_warps, t.num_stages] for t in self.tunings]
        return json.dumps([self.constants, self.num_warps, self.num_stages, tunings])

    @property
    def algorithm(self) -> str:
        """What tells one algorithm of a function from another: its name, else its settings, but never its hints."""
        return self.algorithm_name or self._settings

    @property
    def prototype(self) -> tuple[tuple[str, str], ...]:
        """Name and type of each run-time argument: what every spec of one function must share."""
        return tuple((argument.name, argument.type) for argument in self.arguments)

    @property
    def variant(self) -> str:
        """A readable name, unique to this spec and the same in every later build."""
        if self.resolved_from:
            return self.resolved_from
        hinted = "hinted" if any(argument.hint for argument in self.arguments) else "generic"
        if self.tunings:
            return f"{self.name}_{hinted}_{self.digest}"
        sizes = [str(v).replace("-", "m") for _, v in self.constants if isinstance(v, int) and not isinstance(v, bool)][
            :4
        ]
        parts = [self.name, "x".join(sizes), f"w{self.num_warps}s{self.num_stages}", hinted]
        return "_".join([part for part in parts if part] + [self.digest])

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits over everything but the source file's place and contents."""
        arguments = [[a.name, a.type, a.hint] for a in self.arguments]
        described = [self.kernel, arguments, self._settings, self.algorithm_name, self.grid]
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
        raise SpecError(
            f"function name {name!r} is not a C identifier: use letters, digits and _, not starting with a digit"
        )
    if name.rstrip("fl") in _C_FUNCTIONS or name in _C_FUNCTIONS or name.startswith("pthread_"):
        raise SpecError(f"function name {name!r} is a function of the C library, which it would replace; use another")
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
