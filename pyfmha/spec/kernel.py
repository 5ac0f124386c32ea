"""What to compile: one kernel, specialised one way, under one C function name.

A :class:`KernelSpec` is validated when it is made, so everything downstream may trust it. It knows nothing of
attention.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, Union

from pyfmha.errors import SpecError
from pyfmha.spec.abi import canonical, ctype
from pyfmha.spec.arch import ARCHS
from pyfmha.spec.c_names import c_argument_name, check_function_name
from pyfmha.spec.conditions import Condition, parse_condition, parse_nullable
from pyfmha.spec.constants import Constant, JitFunction, constants_to_data
from pyfmha.spec.descriptors import MAX_DESCRIPTORS, Descriptor, Tensor, parse_descriptor
from pyfmha.spec.grid import NUM_SMS, GridExpression, parse_grid

_T = TypeVar("_T")
Shape = tuple[Union[str, "Shape"], ...]
"""What a tuple is made of: names of arguments and constants, and further tuples."""
HINTS = (1, 8, 16)
TENSOR_CAPABILITY = 90
"""The first compute capability (major * 10 + minor) with the Tensor Memory Accelerator."""
DEPENDENT_CAPABILITY = 90
"""The first with programmatic dependent launch."""
CLUSTER_CAPABILITY = 90
"""The first with thread-block clusters."""
HINTS_ALLOWED = "use :16 or :8 (a multiple of it) or :1 (equal to 1)"


@dataclass(frozen=True)
class Argument:
    """One run-time argument.

    Attributes:
        name: as in the kernel.
        type: as in a Triton signature, ``"*fp16"`` or ``"i32"``.
        hint: 16 promises a multiple of 16 (bytes of a pointer, value of an integer); 8 that an integer is a multiple of
            8; 1 promises the value 1; None promises nothing.
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
            raise SpecError(f"argument {self.name}: hint :{self.hint} is unknown; {HINTS_ALLOWED}")
        if kind == "float" or (kind == "pointer" and self.hint != 16):
            allowed = "pointers take :16 only" if kind == "pointer" else "floating-point arguments take no hint"
            raise SpecError(f"argument {self.name}: {self.type} cannot carry the hint :{self.hint}; {allowed}")

    @property
    def c_name(self) -> str:
        """Its name in C: the kernel's, with an underscore where that is a word of C or of the generated code."""
        return c_argument_name(self.name)


@dataclass(frozen=True)
class Tuning:
    """Settings for one architecture that differ from a spec's own.

    Attributes:
        arch: ``"sm_90"``.
        constants: the constants that differ, by name.
        num_warps, num_stages, maxnreg: as the spec's, in their place.
    """

    arch: str
    constants: tuple[tuple[str, Constant], ...]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


@dataclass(frozen=True)
class KernelSpec:
    """One specialisation of one Triton kernel.

    Attributes:
        source: the Python file that holds the kernel.
        kernel: the ``@triton.jit`` function's name in that file.
        name: the C function under which it is linked; specs that share it become its algorithms and variants.
        arguments: the run-time arguments, in the kernel's order.
        constants: the ``tl.constexpr`` arguments by name, in the kernel's order.
        descriptors: tensor descriptors, made from arguments at the launch; the kernel takes them before its arguments.
        grid: ``"x, y, z"``, see :mod:`pyfmha.spec.grid`.
        num_warps: warps of 32 threads a block; a power of two.
        num_stages: software-pipelining depth.
        tunings: architectures with settings of their own; list them all, whichever are built, because they are part of
            the variant's name.
        algorithm_name: joins variants with other settings to one algorithm: a generic variant with small blocks, say,
            to a hinted one. By default variants are of one algorithm if constants, warps and stages are the same.
            Different kernels can share a function only where all its variants have one.
        requires: what the variant asks of a call, see :mod:`pyfmha.spec.conditions`; others go to the algorithm's next.
        archs: the only architectures that it is for. Such a variant is optional: a library, or a device, without its
            code, or a driver too old to launch it, goes to the algorithm's next. Empty: for all, and needed on all.
        maxnreg: registers a thread at most; None leaves it to the assembler.
        programmatic_dependent_launch: it is launched with CUDA's attribute of that name on architectures that have it,
            sm_90 and later: its blocks may start before the kernel before it in the stream has ended. There it must
            wait, ``tl.extra.cuda.gdc_wait()``, before it touches memory that others write or read; a kernel before it
            says when the blocks may start, ``tl.extra.cuda.gdc_launch_dependents()``. For older architectures those
            words must not be in the kernel: a constant that :attr:`tunings` set can leave them out.
        cluster: the programs along x, 1 to 8 of them, form a thread-block cluster. For sm_90 and later only. A call
            whose grid has more along x is an error: let `requires` or the grid prevent it.
        num_ctas: 1, 2, 4, 8 or 16 blocks that work on one program together, as a thread-block cluster along x: Triton's
            option of that name. Above 1 for sm_90 and later only.
        tuples: parameters that are tuples, of which some elements are arguments: each with its elements, which
            `arguments` and `constants` list in the tuple's place.
        workspace: the last of `arguments`, a pointer to memory of the caller's that the kernel uses as its global
            scratch, as device-made tensor descriptors need it; the kernel has no parameter of that name. Empty: none.
        grid_arguments: those of `arguments` that the grid alone reads: integers that the kernel has no parameter for.
        debug: whether ``tl.device_assert`` is in the machine code; None: as the kernel's ``@triton.jit(debug=...)``.
        enable_fp_fusion: whether a * b + c may be rounded once, as Triton's option of that name.
        nullable: the pointers that may be 0: ``"bias"`` in every call, ``"K if kv_len == 0"`` where that condition (see
            :mod:`pyfmha.spec.conditions`) holds. A call that gives another as 0, and whose grid is not empty, is an
            error. It changes no machine code, and so not the variant's name.
        functions: compile-time parameters that are functions.
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
    requires: tuple[str, ...] = ()
    archs: tuple[str, ...] = ()
    maxnreg: int | None = None
    descriptors: tuple[Descriptor, ...] = ()
    programmatic_dependent_launch: bool = False
    cluster: bool = False
    num_ctas: int = 1
    tuples: tuple[tuple[str, Shape], ...] = ()
    workspace: str = ""
    grid_arguments: tuple[str, ...] = ()
    debug: bool | None = None
    enable_fp_fusion: bool = True
    nullable: tuple[str, ...] = ()
    functions: tuple[JitFunction, ...] = ()
    _grid: tuple[GridExpression, ...] = field(init=False, repr=False, compare=False)
    _conditions: tuple[Condition, ...] = field(init=False, repr=False, compare=False)
    _nullable: dict[str, Condition | None] = field(init=False, repr=False, compare=False)
    _tensors: tuple[Tensor, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_function_name(self.name)
        self._check_numbers()
        self._check_names()
        self._check_archs()
        constants = dict(self.constants)
        types = dict(self.prototype)
        object.__setattr__(self, "_grid", parse_grid(self.grid, self._integers(), constants))
        object.__setattr__(self, "_conditions", tuple(self._parsed(parse_condition, text) for text in self.requires))
        object.__setattr__(self, "_nullable", dict(self._parsed(parse_nullable, text) for text in self.nullable))
        tensors = (parse_descriptor(d, types, self._integers(), constants) for d in self.descriptors)
        try:
            object.__setattr__(self, "_tensors", tuple(tensors))
        except SpecError as error:
            raise SpecError(f"{self.name}: {error}") from None
        self._check_tuned_tensors()

    def _check_tuned_tensors(self) -> None:
        for tuning in self.tunings:
            for one, other in zip(self._tensors, self.resolve(tuning.arch).tensors, strict=True):
                if (one.shape, one.strides) != (other.shape, other.strides):
                    raise SpecError(
                        f"{self.name}: sizes and strides of descriptor {one.name} depend on a constant that the tuning"
                        f" for {tuning.arch} changes; only its block can"
                    )

    def _check_numbers(self) -> None:
        if type(self.num_warps) is not int or self.num_warps not in (1, 2, 4, 8, 16, 32):
            raise SpecError(f"{self.name}: num_warps is {self.num_warps}; use 1, 2, 4, 8, 16 or 32")
        if type(self.num_stages) is not int or self.num_stages not in range(1, 17):
            raise SpecError(f"{self.name}: num_stages is {self.num_stages}; use 1 to 16")
        if self.maxnreg is not None and (type(self.maxnreg) is not int or self.maxnreg not in range(8, 256)):
            raise SpecError(f"{self.name}: maxnreg is {self.maxnreg}; use 8 to 255, or None")
        for name in ("programmatic_dependent_launch", "cluster", "enable_fp_fusion"):
            if type(getattr(self, name)) is not bool:
                raise SpecError(f"{self.name}: {name} is {getattr(self, name)!r}; use True or False")
        if self.debug is not None and type(self.debug) is not bool:
            raise SpecError(f"{self.name}: debug is {self.debug!r}; use True, False or None")
        if type(self.num_ctas) is not int or self.num_ctas not in (1, 2, 4, 8, 16):
            raise SpecError(f"{self.name}: num_ctas is {self.num_ctas}; use 1, 2, 4, 8 or 16")
        if self.num_ctas > 1 and self.cluster:
            raise SpecError(f"{self.name}: num_ctas above 1 is a cluster a program already; leave out cluster")
        if not self.kernel_arguments:
            raise SpecError(f"{self.name}: the kernel takes no run-time argument, so it can have no effect")
        if len(self.descriptors) > MAX_DESCRIPTORS:
            raise SpecError(
                f"{self.name} has {len(self.descriptors)} descriptors; at most {MAX_DESCRIPTORS} are served"
            )

    def _check_names(self) -> None:
        if self.workspace and self.arguments[-1:] != (workspace_argument(self.workspace),):
            raise SpecError(f"{self.name}: the last argument is to be the workspace {self.workspace}, of type *i8")
        names = [a.name for a in self.arguments] + [d.name for d in self.descriptors] + [n for n, _ in self.constants]
        names += [function.parameter for function in self.functions]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise SpecError(f"{self.name}: argument {', '.join(repeated)} is given more than once")
        spelled = [argument.c_name for argument in self.arguments]
        if clashing := sorted({name for name in spelled if spelled.count(name) > 1}):
            raise SpecError(f"{self.name}: two arguments would be called {', '.join(clashing)} in C; rename one")
        if {self.name, f"{self.name}_arguments", f"{self.name}_packed"} & set(spelled):
            raise SpecError(
                f"{self.name}: an argument has the function's name, which C cannot tell apart; give another --out-name"
            )
        if not set(self.grid_arguments) <= self._integers():
            raise SpecError(f"{self.name}: grid_arguments are {self.grid_arguments}; they must be integer arguments")
        unsafe = [argument.name for argument in self.arguments if not argument.name.isascii()]
        if unsafe:
            raise SpecError(
                f"{self.name}: argument {', '.join(unsafe)} is not an ASCII name, which the generated C needs"
            )
        if NUM_SMS in names and NUM_SMS not in {*self._integers(), *dict(self.constants)}:
            raise SpecError(
                f"{self.name}: {NUM_SMS} is a word of grids, so it cannot name a pointer or a float; rename it"
            )

    def _check_archs(self) -> None:
        for arch in self.archs:
            if arch not in ARCHS:
                raise SpecError(f"{self.name}: archs names {arch!r}; use some of {', '.join(ARCHS)}")
        unable = [arch for arch in self.archs if ARCHS[arch].capability < TENSOR_CAPABILITY]
        if self.descriptors and (unable or not self.archs):
            raise SpecError(
                f"{self.name}: tensor descriptors need sm_90 or later, and archs to say so; archs is {self.archs!r}"
            )
        if self.cluster and ([a for a in self.archs if ARCHS[a].capability < CLUSTER_CAPABILITY] or not self.archs):
            raise SpecError(f"{self.name}: clusters need sm_90 or later, and archs to say so; archs is {self.archs!r}")
        for tuning in self.tunings:
            if tuning.arch not in ARCHS:
                raise SpecError(f"{self.name}: a tuning is for {tuning.arch!r}; use one of {', '.join(ARCHS)}")
            unknown = sorted({name for name, _ in tuning.constants} - {name for name, _ in self.constants})
            if unknown:
                raise SpecError(
                    f"{self.name}: the tuning for {tuning.arch} sets {', '.join(unknown)}, no constant of the kernel"
                )
            self.resolve(tuning.arch)

    def _parsed(self, parse: Callable[[str, Mapping[str, str]], _T], text: str) -> _T:
        try:
            return parse(text, dict(self.prototype))
        except SpecError as error:
            raise SpecError(f"{self.name}: {error}") from None

    def _integers(self) -> frozenset[str]:
        return frozenset(a.name for a in self.arguments if ctype(a.type).kind == "integer")

    @property
    def grid_expressions(self) -> tuple[GridExpression, ...]:
        """The parsed grid: x, y and z."""
        return self._grid

    @property
    def kernel_arguments(self) -> tuple[Argument, ...]:
        """The arguments that the kernel has parameters for: all but the workspace and those of the grid."""
        return tuple(a for a in self.arguments if a.name != self.workspace and a.name not in self.grid_arguments)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What :attr:`requires` says, parsed."""
        return self._conditions

    def needed_pointers(self) -> Iterator[tuple[Argument, Condition | None]]:
        """The pointers that must not be 0 in a call that runs; with each the condition under which it may, if any.

        The workspace is none of them: how much of it a launch needs, if any, depends on the architecture.
        """
        for argument in self.kernel_arguments:
            condition = self._nullable.get(argument.name)
            if ctype(argument.type).kind == "pointer" and (condition or argument.name not in self._nullable):
                yield argument, condition

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The descriptors, parsed."""
        return self._tensors

    @property
    def optional(self) -> bool:
        """Whether a device may lack its code: it is for some architectures only."""
        return bool(self.archs)

    @property
    def unconditional(self) -> bool:
        """Whether it serves every call everywhere: no hints, conditions or descriptors, for all architectures."""
        return self._kind == "generic"

    def is_for(self, arch: str) -> bool:
        """Whether it is to be compiled for an architecture."""
        return not self.archs or arch in self.archs

    def is_dependent_on(self, arch: str) -> bool:
        """Whether it is launched by programmatic dependent launch on an architecture."""
        return self.programmatic_dependent_launch and ARCHS[arch].capability >= DEPENDENT_CAPABILITY

    def resolve(self, arch: str) -> "KernelSpec":
        """The spec for one architecture: its tuning, or that of the one it is like, applied; its name kept."""
        tuned = {tuning.arch: tuning for tuning in reversed(self.tunings)}
        tuning = tuned.get(arch) or tuned.get(ARCHS[arch].like if arch in ARCHS else "")
        if tuning is None:
            return replace(self, tunings=(), resolved_from=self.variant)
        constants = tuple((name, dict(tuning.constants).get(name, value)) for name, value in self.constants)
        return replace(
            self,
            constants=constants,
            num_warps=tuning.num_warps,
            num_stages=tuning.num_stages,
            maxnreg=tuning.maxnreg,
            tunings=(),
            resolved_from=self.variant,
        )

    @property
    def _settings(self) -> str:
        tunings: list[Any] = [
            [t.arch, constants_to_data(t.constants), t.num_warps, t.num_stages, *([t.maxnreg] if t.maxnreg else [])]
            for t in self.tunings
        ]
        limit = [self.maxnreg] if self.maxnreg else []
        ctas = [f"{self.num_ctas} blocks"] if self.num_ctas > 1 else []
        return json.dumps([constants_to_data(self.constants), self.num_warps, self.num_stages, tunings, *limit, *ctas])

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
        if self.tunings:
            return f"{self.name}_{self._kind}_{self.digest}"
        numbers = [value for _, value in self.constants if isinstance(value, int) and not isinstance(value, bool)]
        sizes = [str(value).replace("-", "m") for value in numbers[:4]]
        parts = [self.name, "x".join(sizes), f"w{self.num_warps}s{self.num_stages}", self._kind]
        return "_".join([part for part in parts if part] + [self.digest])

    @property
    def _kind(self) -> str:
        if self.descriptors:
            return "tma"
        if any(argument.hint for argument in self.arguments):
            return "hinted"
        return "special" if self.requires or self.archs else "generic"

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits over everything but the source file's place and contents, and :attr:`nullable`."""
        arguments = [[a.name, a.type, a.hint] for a in self.arguments]
        described: list[Any] = [self.kernel, arguments, self._settings, self.algorithm_name, self.grid]
        if self.requires or self.archs or self.descriptors:  # the others keep the names that they have always had
            described += [self.requires, self.archs, [asdict(descriptor) for descriptor in self.descriptors]]
        said = {"programmatic dependent launch": self.programmatic_dependent_launch, "cluster": self.cluster}
        described += [word for word, holds in said.items() if holds]
        named = {"tuples": self.tuples, "workspace": self.workspace, "grid arguments": self.grid_arguments}
        described += [[word, value] for word, value in named.items() if value]
        if self.debug is not None:
            described.append(f"debug {self.debug}")
        if not self.enable_fp_fusion:
            described.append("no fp fusion")
        if self.functions:
            described.append([[function.parameter, function.attribute] for function in self.functions])
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:8]

    def generic(self) -> "KernelSpec":
        """The same without hints: it serves every value and alignment that its conditions and descriptors admit."""
        return replace(self, arguments=tuple(replace(argument, hint=None) for argument in self.arguments))


def workspace_argument(name: str) -> Argument:
    """The argument that a kernel's global scratch is given by."""
    return Argument(name, "*i8")
