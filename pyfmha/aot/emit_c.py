"""C source: the templates beside this module, filled in. Formats values only; decides nothing."""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyfmha
from pyfmha.aot.cubin import Cubin
from pyfmha.errors import ToolchainError
from pyfmha.spec.abi import CType, ctype
from pyfmha.spec.advice import install_command
from pyfmha.spec.arch import ARCHS
from pyfmha.spec.descriptors import Tensor
from pyfmha.spec.grid import NUM_SMS
from pyfmha.spec.kernel import Argument, KernelSpec
from pyfmha.spec.manifest import Image

TEMPLATES = Path(__file__).parent / "templates"
_SERVED = "{0, true} /* the capabilities that pyfmha compiles for */"


@cache
def _environment() -> Any:
    """Jinja's, imported here: what reads and runs a library imports this package and does without."""
    try:
        import jinja2
    except ModuleNotFoundError:
        raise ToolchainError(f"jinja2 is not installed; writing C needs it: {install_command('aot')}") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # C, not HTML
    )
    environment.filters |= {
        "c_bytes": _c_bytes,
        "c_bool": lambda value: "true" if value else "false",
        "c_string": c_string,
    }
    return environment


def render(template: str, **values: Any) -> str:
    """A template filled in."""
    text: str = _environment().get_template(template).render(pyfmha_version=pyfmha.__version__, **values)
    return text


def c_string(text: str) -> str:
    """A C string literal: JSON's escapes of printable ASCII are C's too; question marks could start a trigraph."""
    return json.dumps(text).replace("?", "\\?")


def _c_comment(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("*/", "* /").replace("/*", "/ *")).encode("ascii", "replace").decode()


# Question marks could start a trigraph; three digits end an escape, whatever follows.
_ESCAPED = {byte: f"\\{byte:03o}" for byte in range(256) if not (32 <= byte < 127) or chr(byte) in '"\\?'}


def _c_bytes(code: bytes) -> str:
    """String literals, which C compilers read six times as fast as numbers."""
    rows = (code[start : start + 48].decode("latin-1") for start in range(0, len(code), 48))
    return "\n".join(f'  "{row.translate(_ESCAPED)}"' for row in rows)


def _parameters(arguments: Sequence[Argument]) -> str:
    return ", ".join(f"{ctype(argument.type).c} {argument.c_name}" for argument in arguments)


def _member(argument: Argument) -> str:
    return f"a->{argument.c_name}"


def _shown(argument: Argument) -> tuple[str, str]:
    """How a message shows an argument: printf's format and the value for it."""
    kind = ctype(argument.type)
    if kind.kind == "float":
        return "%g", f"(double){_member(argument)}"
    if kind.kind == "pointer":
        return "0x%llx", f"(unsigned long long){_member(argument)}"
    letter, cast = ("d", "long long") if (kind.bounds or (0, 0))[0] < 0 else ("u", "unsigned long long")
    return f"%ll{letter}", f"({cast}){_member(argument)}"


@dataclass(frozen=True)
class _Check:
    """One thing a variant needs of its arguments, and how to say that they lack it: format and values of printf."""

    condition: str
    status: str
    text: str
    values: str


def _check(argument: Argument) -> _Check | None:
    kind: CType = ctype(argument.type)
    # Without a hint, a kernel still reads whole elements, which fault unless aligned to their size.
    multiple = argument.hint or (kind.size if kind.kind == "pointer" else None)
    if multiple is None or (kind.kind == "pointer" and multiple == 1):
        return None
    unit, status = (" bytes", "MISALIGNED_ADDRESS") if kind.kind == "pointer" else ("", "INVALID_VALUE")
    lacks = "not 1" if multiple == 1 else f"not a multiple of {multiple}{unit}"
    condition = f"{_member(argument)} == 1" if multiple == 1 else f"{_member(argument)} % {multiple} == 0"
    shown, value = _shown(argument)
    return _Check(condition, f"PYFMHA_{status}", f"{argument.c_name} is {shown}, {lacks}", value)


def _required(spec: KernelSpec) -> list[_Check]:
    by_name = {argument.name: argument for argument in spec.arguments}
    spelled = {name: _member(argument) for name, argument in by_name.items()}
    checks = []
    for condition in spec.conditions:
        shown = [(name, *_shown(by_name[name])) for name in condition.names]
        got = " and ".join(f"{name} = {form}" for name, form, _ in shown)
        text = f"it needs {condition.text.replace('%', '%%')}, got {got}"
        code = condition.to_c(spelled, dict(spec.prototype))
        checks.append(_Check(code, "PYFMHA_INVALID_VALUE", text, ", ".join(value for _, _, value in shown)))
    return checks


class _FunctionView:
    """What the templates read of a function; it is the same for each of its specs."""

    def __init__(self, spec: KernelSpec) -> None:
        self.name = spec.name
        self.parameters = _parameters(spec.arguments)
        self.names = ", ".join(argument.c_name for argument in spec.arguments)
        self.workspace = spec.workspace
        self.members = [f"{ctype(argument.type).c} {argument.c_name}" for argument in spec.arguments]


class _VariantView:
    """What the template reads of one variant."""

    def __init__(self, spec: KernelSpec) -> None:
        self.name = spec.variant
        self.optional = spec.optional
        constants = ", ".join(f"{name}={value!r}" for name, value in spec.constants)
        hints = ", ".join(f"{a.name}:{a.hint}" for a in spec.arguments if a.hint) or "none"
        extra = [f"requires: {', '.join(spec.requires)}"] * bool(spec.requires)
        extra += [f"tensor {tensor}" for tensor in spec.tensors]
        self.summary = _c_comment(
            f"Kernel {spec.kernel} of {spec.source.name}; {constants}; {spec.num_warps} warps,"
            f" {spec.num_stages} stages; {'; '.join([f'hints: {hints}', *extra])}."
        )
        self.checks = [check for check in map(_check, spec.arguments) if check is not None] + _required(spec)
        self.needed = list(_needed(spec))
        self.tensors = spec.tensors
        self.words = [word for tensor in spec.tensors for word in _words(spec, tensor)]
        by_name = {argument.name: argument for argument in spec.arguments}
        used = dict.fromkeys(name for e in spec.grid_expressions for name in e.names() if name in by_name)
        self.grid_names = [_GridName(by_name[name]) for name in used if _GridName(by_name[name]).negative]
        passed = [argument for argument in spec.kernel_arguments if argument.hint != 1]
        self.workspace = spec.workspace and _member(spec.arguments[-1])
        self.narrowed = [{"name": a.c_name, "function": ctype(a.type).narrow} for a in passed if ctype(a.type).narrow]
        self.params = [
            *_tensor_params(spec.tensors),
            *(f"&{a.c_name}_bits" if ctype(a.type).narrow else f"&{_member(a)}" for a in passed),
        ]


def _needed(spec: KernelSpec) -> Iterator[dict[str, str]]:
    """Of each pointer that a launch needs: its name, and the C condition that it is null and may not be."""
    spelled = {argument.name: _member(argument) for argument in spec.arguments}
    for argument, allowed in spec.needed_pointers():
        null = f"{_member(argument)} == 0"
        condition = f"{null} && !({allowed.to_c(spelled, dict(spec.prototype))})" if allowed else null
        yield {"name": argument.name, "condition": condition}


def _spell(spec: KernelSpec) -> Callable[[str], str]:
    """The C expression of a name in a grid or a descriptor: an argument, else what the launcher knows of the device."""
    members = {argument.name: f"(int64_t){_member(argument)}" for argument in spec.arguments}
    return lambda name: members.get(name, name)


def _words(spec: KernelSpec, tensor: Tensor) -> list[str]:
    (base,) = (_member(argument) for argument in spec.arguments if argument.name == tensor.base)
    return [base, *(expression.to_c(_spell(spec)) for expression in (*tensor.shape, *tensor.strides))]


def _tensor_params(tensors: Sequence[Tensor]) -> Iterator[str]:
    """A kernel's parameters for its descriptors: of each the map, sizes of 32 bits, and strides of 64.

    Sizes and strides lie in the key, of whose 64-bit words a kernel reads the lower half as a size: CUDA's hosts are
    little-endian.
    """
    word = 0
    for index, tensor in enumerate(tensors):
        yield f"&maps[{index}]"
        yield from (f"&key[{word + i}]" for i in range(1, 2 * tensor.rank))
        yield "&one"
        word += 2 * tensor.rank


class _GridName:
    """An integer that a grid reads, and the test that it is not negative (or too large for signed arithmetic)."""

    def __init__(self, argument: Argument) -> None:
        self.name = argument.c_name
        member = _member(argument)
        low, high = ctype(argument.type).bounds or (0, 0)
        self.limit = min(high, (1 << 63) - 1)
        self.negative = f"{member} < 0" if low < 0 else f"{member} > INT64_MAX" if high > self.limit else ""
        self.format, self.value = _shown(argument)


@dataclass(frozen=True)
class _Grid:
    """A C function that computes the grid from the arguments, for the images whose grids are the same."""

    name: str
    text: str
    expressions: tuple[str, ...]

    @property
    def reads_arguments(self) -> bool:
        return any("a->" in expression for expression in self.expressions)

    @property
    def reads_device(self) -> bool:
        return any(re.search(rf"(?<!->)\b{NUM_SMS}\b", expression) for expression in self.expressions)


def _grids(spec: KernelSpec, archs: Sequence[str]) -> dict[str, _Grid]:
    """The grid function of each architecture."""
    made: dict[tuple[str, ...], _Grid] = {}
    of_arch: dict[str, _Grid] = {}
    for arch in archs:
        expressions = spec.resolve(arch).grid_expressions
        code = tuple(expression.to_c(_spell(spec)) for expression in expressions)
        if code not in made:
            made[code] = _Grid(f"grid_{len(made)}", _c_comment(", ".join(e.text for e in expressions)), code)
        of_arch[arch] = made[code]
    return of_arch


def _image(spec: KernelSpec, cubin: Cubin) -> dict[str, Any]:
    arch = ARCHS[cubin.arch]
    described = {name: getattr(cubin, name) for name in ("registers", "spilled", "shared", "threads", "code", "arch")}
    described |= {"num_ctas": spec.num_ctas, "workspace": cubin.workspace, "workspace_align": cubin.workspace_align}
    tensors = [
        {"name": tensor.name, "rank": tensor.rank, "item_size": tensor.item_size, **made}
        for tensor, made in zip(spec.tensors, cubin.tensors, strict=True)
    ]
    compiled = {"capability": arch.capability, "exact": arch.exact, "ptxas": f"ptxas {cubin.ptxas}"}
    launched = {"dependent": spec.is_dependent_on(cubin.arch), "cluster": spec.cluster}
    return {**described, **compiled, **launched, "tensors": tensors}


def emit_variant(spec: KernelSpec, cubins: Sequence[Cubin], stem: str) -> dict[str, str]:
    """The C source and header of one variant.

    Args:
        spec: the variant.
        cubins: its machine code, one an architecture.
        stem: file name without ending.

    Returns:
        File name to content: ``stem.c`` and ``stem.h``.
    """
    grids = _grids(spec, [cubin.arch for cubin in cubins])
    values = {
        "v": _VariantView(spec),
        "f": _FunctionView(spec),
        "header": f"{stem}.h",
        "images": [_image(spec, cubin) | {"grid": grids[cubin.arch].name} for cubin in cubins],
        "grids": list(dict.fromkeys(grids.values())),
        "symbol": cubins[0].symbol,
        "scratch": cubins[0].scratch,
    }
    return {f"{stem}.{ending}": render(f"variant.{ending}.j2", **values) for ending in ("h", "c")}


def emit_library(
    functions: Mapping[str, Sequence[Sequence[KernelSpec]]],
    stem: str,
    images: Mapping[str, Sequence[Image]] | None = None,
) -> dict[str, str]:
    """The dispatching C source and header of a library, and the runtime they need.

    Args:
        functions: by name, the algorithms of each; an algorithm is its variants, in the order to try them.
        stem: file name without ending.
        images: what the header says of the workspace comes from them: the variants' images by their names.

    Returns:
        File name to content.
    """
    views = [_LibraryFunctionView(algorithms, images or {}) for algorithms in functions.values()]
    summary = _c_comment(f"{stem}: {', '.join(functions)}.")
    guard = f"PYFMHA_LIBRARY_{re.sub('[^A-Za-z0-9]', '_', stem)}"
    values = {"functions": views, "summary": summary, "guard": guard, "header": f"{stem}.h"}
    files = {f"{stem}.{ending}": render(f"library.{ending}.j2", **values) for ending in ("h", "c")}
    return files | runtime_files("h", "c")


class _LibraryFunctionView(_FunctionView):
    """What the library's templates read of a function: its variants too, and where each algorithm's end."""

    def __init__(self, algorithms: Sequence[Sequence[KernelSpec]], images: Mapping[str, Sequence[Image]]) -> None:
        super().__init__(algorithms[0][0])
        specs = [spec for algorithm in algorithms for spec in algorithm]
        self.kernels = ", ".join(dict.fromkeys(spec.kernel for spec in specs))
        self.variants = [spec.variant for spec in specs]
        held = [image for spec in specs for image in images.get(spec.variant, ())]
        self.workspaces = ", ".join(dict.fromkeys(f"{i.workspace * i.num_ctas} for {i.arch}" for i in held)) or "none"
        self.ends = list(itertools.accumulate(map(len, algorithms)))
        self.pointers = [argument for argument in specs[0].arguments if ctype(argument.type).kind == "pointer"]


def runtime_files(*endings: str) -> dict[str, str]:
    """The C files that are the same in every library: those of the endings ``"h"`` and ``"c"`` asked for."""
    served = ", ".join(f"{{{arch.capability}, {str(arch.exact).lower()}}}" for arch in ARCHS.values())
    texts = {f"pyfmha_runtime.{ending}": TEMPLATES / f"pyfmha_runtime.{ending}" for ending in endings}
    return {name: file.read_text(encoding="utf-8").replace(_SERVED, served) for name, file in texts.items()}


def emit_manifest(text: str, build_id: str) -> str:
    """The C source that compiles a manifest into its library."""
    return render("manifest.c.j2", lines=text.splitlines(keepends=True), build_id=build_id)
