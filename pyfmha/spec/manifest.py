"""What a library holds: the one description shared by the builder, the loader and the people who inspect it.

The same JSON is written beside the library and compiled into it (``pyfmha_manifest()``), so a library describes itself
and a pair that does not belong together is noticed.
"""

import json
import re
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pyfmha.errors import ManifestError
from pyfmha.spec.abi import ctype
from pyfmha.spec.advice import build_command
from pyfmha.spec.constants import from_data

_T = TypeVar("_T")

INTERFACE = 4
"""Version of how a library's functions are called, which engines store: another is refused. It changes with the C
interface alone, so that engines outlive changes of what a manifest says."""

SCHEMA = 5
"""Version of the manifest and of the C interface it describes. Another version is refused, never guessed at."""


@dataclass(frozen=True)
class Image:
    """Machine code of one variant for one architecture.

    Attributes:
        arch: ``"sm_90"``.
        constants: the kernel's compile-time constants.
        num_warps, num_stages: as compiled.
        maxnreg: registers a thread that it was confined to; None where it was not.
        debug: whether device asserts are in the code.
        enable_fp_fusion: whether a * b + c may be rounded once.
        grid: the three grid expressions as text.
        registers: 32-bit registers a thread.
        spilled: bytes a thread keeps in local memory.
        shared: bytes of shared memory a block.
        shared_limit: bytes a block may ask for on that architecture.
        threads: threads a block.
        dependent: it is launched by programmatic dependent launch, see :class:`pyfmha.spec.kernel.KernelSpec`.
        cluster: the blocks along x form a thread-block cluster.
        num_ctas: blocks that work on one program together, as a cluster; the grid counts programs.
        workspace: bytes of global scratch that a block needs, in the function's last argument; 0: none.
        workspace_align: bytes of which the workspace must be a multiple.
        size: bytes of code.
        sha256: of the code.
        ptxas: version of the assembler, which decides the oldest driver that can load the code.
    """

    arch: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    maxnreg: int | None
    debug: bool
    enable_fp_fusion: bool
    grid: tuple[str, ...]
    registers: int
    spilled: int
    shared: int
    shared_limit: int
    threads: int
    dependent: bool
    cluster: bool
    size: int
    sha256: str
    ptxas: str
    num_ctas: int = 1
    workspace: int = 0
    workspace_align: int = 1


@dataclass(frozen=True)
class Variant:
    """One specialisation of a function.

    Attributes:
        name: readable, unique, the same in every later build.
        kernel: the Triton kernel that it launches.
        hints: argument name to 16, 8 or 1; empty for the generic variant.
        requires: further conditions on the arguments; see :mod:`pyfmha.spec.conditions`.
        archs: the only architectures that it is for; on others, the algorithm's next variant runs. Empty: all.
        tensors: its tensor descriptors, described.
        images: its code, one an architecture.
    """

    name: str
    kernel: str
    hints: dict[str, int]
    requires: tuple[str, ...]
    archs: tuple[str, ...]
    tensors: tuple[str, ...]
    images: tuple[Image, ...]


@dataclass(frozen=True)
class Function:
    """One C function.

    Attributes:
        name: ``X`` of ``load_X``, ``X``, ``X_default``.
        kernel: the Triton kernel it launches; the first variant's, where they differ.
        arguments: name and type of each argument, as :mod:`pyfmha.spec.abi` names types.
        algorithms: by ``algo_id``, the variants in the order in which the dispatcher tries them.
    """

    name: str
    kernel: str
    arguments: tuple[tuple[str, str], ...]
    algorithms: tuple[tuple[Variant, ...], ...]

    @property
    def prototype(self) -> str:
        """The C function with the names and types of its arguments, as engines store it."""
        return f"{self.name}({', '.join(f'{kind} {name}' for name, kind in self.arguments)})"

    def archs(self) -> tuple[str, ...]:
        """The architectures for which every algorithm holds the code that it needs, ascending.

        That is the code of all its variants but those for some architectures only; of any, where it has only such.
        """
        return _ascending(set.intersection(*map(_archs, self.algorithms)))


@dataclass(frozen=True)
class Manifest:
    """One library.

    Attributes:
        build_id: changes with anything that is compiled into the library.
        pyfmha, triton: versions that built it.
        operators: descriptions of the plugins that it holds, as JSON has them; see
            :meth:`pyfmha.operators.description.Operator.from_json`.
    """

    build_id: str
    pyfmha: str
    triton: str
    functions: tuple[Function, ...]
    operators: tuple[Any, ...] = ()

    def archs(self) -> tuple[str, ...]:
        """The architectures that every function is for, ascending."""
        sets = [set(function.archs()) for function in self.functions]
        return _ascending(set.intersection(*sets)) if sets else ()

    def archs_in_words(self) -> str:
        """``"sm_80, sm_90"``; those that only some of the functions are for apart: ``"sm_90; in part sm_80"``."""
        whole = self.archs()
        part = _ascending({arch for function in self.functions for arch in function.archs()} - set(whole))
        return "; ".join(filter(None, [", ".join(whole), f"in part {', '.join(part)}" if part else ""]))

    def variants(self) -> Iterator[tuple[Function, int, Variant]]:
        """Every variant with its function and ``algo_id``."""
        for function in self.functions:
            for algo_id, algorithm in enumerate(function.algorithms):
                for variant in algorithm:
                    yield function, algo_id, variant

    def to_json(self) -> str:
        """The manifest as text that :func:`parse_manifest` reads back, the same for equal manifests."""
        data = {"schema": SCHEMA, **asdict(self)}
        if not self.operators:
            del data["operators"]
        return json.dumps(data, indent=1) + "\n"


def _ascending(archs: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(archs, key=lambda arch: int(arch.removeprefix("sm_"))))


def _archs(algorithm: Iterable[Variant]) -> set[str]:
    variants = list(algorithm)
    needed = [{image.arch for image in variant.images} for variant in variants if not variant.archs]
    return set.intersection(*needed) if needed else {image.arch for variant in variants for image in variant.images}


def parse_manifest(text: str, origin: str, again: str = "pyfmha build") -> Manifest:
    """Read a manifest.

    Args:
        text: JSON.
        origin: where it comes from, for messages.
        again: the command that builds it again, for messages.

    Raises:
        ManifestError: it is no manifest, is damaged, or has another schema version.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{origin} is not JSON ({error}); build it again: {again}") from None
    if not isinstance(data, dict) or "schema" not in data:
        raise ManifestError(f"{origin} is not a pyfmha manifest: it has no schema version")
    schema = data["schema"]
    if type(schema) is not int or schema != SCHEMA:  # True and 1.0 are equal to 1
        raise ManifestError(
            f"{origin} has schema version {reprlib.repr(schema)}, this pyfmha reads {SCHEMA}; build it again: {again}"
        )
    try:
        functions = tuple(_function(entry) for entry in data["functions"])
        _refuse_repeated("function", [function.name for function in functions])
        return Manifest(
            text_from_data(data["build_id"]),
            text_from_data(data["pyfmha"]),
            text_from_data(data["triton"]),
            functions,
            tuple(data.get("operators", ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ManifestError(f"{origin} is damaged ({type(error).__name__}: {error}); build it again: {again}") from None


def read_manifest(path: Path) -> Manifest:
    """Read a manifest file.

    Raises:
        ManifestError: it cannot be read, or as :func:`parse_manifest`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"cannot read the manifest {path}: {error}; build it: {build_command(path)}") from None
    return parse_manifest(text, str(path), build_command(path))


def text_from_data(value: object) -> str:
    """A text of printable ASCII from parsed JSON; raises TypeError where it is none."""
    if not isinstance(value, str) or not (value.isascii() and value.isprintable()):
        raise TypeError(f"text expected, got {reprlib.repr(value)}")
    return value


def _name(value: object) -> str:
    """A name that C can have."""
    name = text_from_data(value)
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"a name expected, got {reprlib.repr(name)}")
    return name


def _type(value: object) -> str:
    kind = text_from_data(value)
    ctype(kind)
    return kind


def _some(what: str, entries: tuple[_T, ...]) -> tuple[_T, ...]:
    if not entries:
        raise ValueError(f"there are no {what}")
    return entries


def _refuse_repeated(what: str, names: list[str]) -> None:
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"more than one {what} {', '.join(sorted(repeated))}")


def _user_text(value: object) -> str:
    """As :func:`text_from_data`, for what holds names of the user's own, which Python does not confine to ASCII."""
    if not isinstance(value, str) or not value.isprintable():
        raise TypeError(f"text expected, got {reprlib.repr(value)}")
    return value


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise TypeError(f"a count expected, got {reprlib.repr(value)}")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"true or false expected, got {reprlib.repr(value)}")
    return value


def _arch(value: object) -> str:
    arch = text_from_data(value)
    if not re.fullmatch(r"sm_[0-9]{1,4}", arch):
        raise ValueError(f"an architecture expected, such as sm_90, got {reprlib.repr(arch)}")
    return arch


def _constants(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"constants by name expected, got {reprlib.repr(value)}")
    for name, constant in value.items():
        _user_text(name)
        try:
            from_data(constant)
        except TypeError:
            raise TypeError(f"a constant expected for {name}, got {reprlib.repr(constant)}") from None
    return value


def _image(data: dict[str, Any]) -> Image:
    return Image(
        arch=_arch(data["arch"]),
        constants=_constants(data["constants"]),
        num_warps=_number(data["num_warps"]),
        num_stages=_number(data["num_stages"]),
        maxnreg=None if data["maxnreg"] is None else _number(data["maxnreg"]),
        debug=_flag(data["debug"]),
        enable_fp_fusion=_flag(data["enable_fp_fusion"]),
        grid=_some("expressions of a grid", tuple(_user_text(part) for part in data["grid"])),
        registers=_number(data["registers"]),
        spilled=_number(data["spilled"]),
        shared=_number(data["shared"]),
        shared_limit=_number(data["shared_limit"]),
        threads=_number(data["threads"]),
        dependent=_flag(data["dependent"]),
        cluster=_flag(data["cluster"]),
        size=_number(data["size"]),
        sha256=text_from_data(data["sha256"]),
        ptxas=text_from_data(data["ptxas"]),
        num_ctas=_number(data.get("num_ctas", 1)),
        workspace=_number(data.get("workspace", 0)),
        workspace_align=_number(data.get("workspace_align", 1)),
    )


def variant_from_data(data: dict[str, Any]) -> Variant:
    """One variant from parsed JSON; raises KeyError, TypeError or ValueError where it is damaged."""
    images = _some("images of a variant", tuple(_image(image) for image in data["images"]))
    _refuse_repeated("image for", [image.arch for image in images])
    return Variant(
        name=_name(data["name"]),
        kernel=_user_text(data["kernel"]),
        hints={text_from_data(name): _number(hint) for name, hint in data["hints"].items()},
        requires=tuple(text_from_data(condition) for condition in data["requires"]),
        archs=tuple(_arch(arch) for arch in data["archs"]),
        tensors=tuple(_user_text(tensor) for tensor in data["tensors"]),
        images=images,
    )


def _function(data: dict[str, Any]) -> Function:
    arguments = tuple((_name(name), _type(kind)) for name, kind in data["arguments"])
    _refuse_repeated("argument", [name for name, _ in arguments])
    algorithms = tuple(
        _some("variants of an algorithm", tuple(variant_from_data(variant) for variant in algorithm))
        for algorithm in data["algorithms"]
    )
    return Function(
        name=_name(data["name"]),
        kernel=_user_text(data["kernel"]),
        arguments=_some("arguments of a function", arguments),
        algorithms=_some("algorithms of a function", algorithms),
    )
