"""C source: the templates beside this module, filled in. Formats values only; decides nothing."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

import pyfmha
from pyfmha.abi import CType, ctype
from pyfmha.aot.cubin import Cubin
from pyfmha.arch import ARCHS
from pyfmha.spec import Argument, KernelSpec

TEMPLATES = Path(__file__).parent / "templates"


@cache
def _environment() -> jinja2.Environment:
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


def _render(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(pyfmha_version=pyfmha.__version__, **values)


def c_string(text: str) -> str:
    """A C string literal: JSON's escapes of printable ASCII are C's too; question marks could start a trigraph."""
    return json.dumps(text).replace("?", "\\?")


def _c_comment(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("*/", "* /").replace("/*", "/ *")).encode("ascii", "replace").decode()


def _c_bytes(code: bytes) -> str:
    rows = (code[start : start + 24] for start in range(0, len(code), 24))
    return "\n".join("  " + ",".join(f"0x{byte:02x}" for byte in row) + "," for row in rows)


def _parameters(arguments: Sequence[Argument]) -> str:
    return ", ".join(f"{ctype(argument.type).c} {argument.c_name}" for argument in arguments)


@dataclass(frozen=True)
class _Check:
    """One thing a variant needs of one argument, and how to say that it lacks it."""

    argument: Argument
    condition: str
    required: str
    status: str

    @property
    def name(self) -> str:
        return self.argument.c_name

    @property
    def format(self) -> str:
        return "0x%llx" if self.status == "PYFMHA_MISALIGNED_ADDRESS" else "%lld"

    @property
    def value(self) -> str:
        cast = "unsigned long long" if self.format == "0x%llx" else "long long"
        return f"({cast}){self.name}"


def _check(argument: Argument) -> _Check | None:
    kind: CType = ctype(argument.type)
    name = argument.c_name
    if kind.kind == "pointer":
        # Without a hint, a kernel still reads whole elements, which fault unless aligned to their size.
        multiple = argument.hint or kind.size
        if multiple == 1:
            return None
        required = f"not a multiple of {multiple} bytes"
        return _Check(argument, f"{name} % {multiple} == 0", required, "PYFMHA_MISALIGNED_ADDRESS")
    if argument.hint is None:
        return None
    condition = f"{name} == 1" if argument.hint == 1 else f"{name} % {argument.hint} == 0"
    required = "not 1" if argument.hint == 1 else f"not a multiple of {argument.hint}"
    return _Check(argument, condition, required, "PYFMHA_INVALID_VALUE")


class _VariantView:
    """What the templates read of one variant."""

    def __init__(self, spec: KernelSpec) -> None:
        self.name = spec.variant
        self.function = spec.name
        constants = ", ".join(f"{name}={value!r}" for name, value in spec.constants)
        hints = ", ".join(f"{a.name}:{a.hint}" for a in spec.arguments if a.hint) or "none"
        self.summary = _c_comment(
            f"Kernel {spec.kernel} of {spec.source.name}; {constants}; {spec.num_warps} warps,"
            f" {spec.num_stages} stages; hints: {hints}."
        )
        self.parameters = _parameters(spec.arguments)
        self.checks = [check for check in map(_check, spec.arguments) if check is not None]
        self.generic = not any(argument.hint for argument in spec.arguments)
        checked = [check.argument for check in self.checks]
        self.checked_parameters = _parameters(checked) or "void"
        self.checked_names = ", ".join(argument.c_name for argument in checked)
        self.condition = " && ".join(f"({check.condition})" for check in self.checks) or "true"
        by_name = {argument.name: argument for argument in spec.arguments}
        used = dict.fromkeys(name for e in spec.grid_expressions for name in e.names())
        self.grid_names = [_GridName(by_name[name]) for name in used if _GridName(by_name[name]).negative]
        passed = [argument for argument in spec.arguments if argument.hint != 1]
        self.narrowed = [{"name": a.c_name, "function": ctype(a.type).narrow} for a in passed if ctype(a.type).narrow]
        self.params = [f"&{a.c_name}{'_bits' if ctype(a.type).narrow else ''}" for a in passed]


class _GridName:
    """An integer that a grid reads, and the test that it is not negative (or too large for signed arithmetic)."""

    def __init__(self, argument: Argument) -> None:
        self.name = argument.c_name
        low, high = ctype(argument.type).bounds or (0, 0)
        self.limit = min(high, (1 << 63) - 1)
        self.negative = f"{self.name} < 0" if low < 0 else f"{self.name} > INT64_MAX" if high > self.limit else ""
        self.format = "%lld" if low < 0 else "%llu"
        self.value = f"({'long long' if low < 0 else 'unsigned long long'}){self.name}"


@dataclass(frozen=True)
class _Grid:
    """A C function that computes the grid from the kernel's parameters, for the images whose grids are the same."""

    name: str
    text: str
    reads: tuple[str, ...]
    expressions: tuple[str, ...]


def _grids(spec: KernelSpec, archs: Sequence[str]) -> dict[str, _Grid]:
    """The grid function of each architecture."""
    passed = [argument for argument in spec.arguments if argument.hint != 1]
    position = {argument.name: index for index, argument in enumerate(passed)}
    by_name = {argument.name: argument for argument in spec.arguments}
    made: dict[tuple[str, ...], _Grid] = {}
    of_arch: dict[str, _Grid] = {}
    for arch in archs:
        expressions = spec.resolve(arch).grid_expressions
        code = tuple(expression.to_c(lambda name: by_name[name].c_name) for expression in expressions)
        if code not in made:
            reads = tuple(
                f"const int64_t {by_name[name].c_name} = "
                + (
                    f"(int64_t)*(const {ctype(by_name[name].type).c} *)params[{position[name]}]"
                    if name in position
                    else "1"
                )
                for name in dict.fromkeys(name for expression in expressions for name in expression.names())
            )
            made[code] = _Grid(f"grid_{len(made)}", _c_comment(", ".join(e.text for e in expressions)), reads, code)
        of_arch[arch] = made[code]
    return of_arch


def _image(cubin: Cubin) -> dict[str, Any]:
    arch = ARCHS[cubin.arch]
    described = {name: getattr(cubin, name) for name in ("registers", "spilled", "shared", "threads", "code", "arch")}
    return {**described, "capability": arch.capability, "exact": arch.exact, "ptxas": f"ptxas {cubin.ptxas}"}


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
        "header": f"{stem}.h",
        "images": [_image(cubin) | {"grid": grids[cubin.arch].name} for cubin in cubins],
        "grids": list(dict.fromkeys(grids.values())),
        "symbol": cubins[0].symbol,
        "scratch": cubins[0].scratch,
    }
    return {f"{stem}.{ending}": _render(f"variant.{ending}.j2", **values) for ending in ("h", "c")}


def emit_library(functions: Mapping[str, Sequence[Sequence[KernelSpec]]], stem: str) -> dict[str, str]:
    """The dispatching C source and header of a library, and the runtime they need.

    Args:
        functions: by name, the algorithms of each; an algorithm is its variants, in the order to try them.
        stem: file name without ending.

    Returns:
        File name to content.
    """
    views = []
    for name, algorithms in functions.items():
        variants = [[_VariantView(spec) for spec in algorithm] for algorithm in algorithms]
        arguments = algorithms[0][0].arguments
        checked = {check.name for algorithm in variants for v in algorithm for check in v.checks}
        views.append(
            {
                "name": name,
                "kernel": algorithms[0][0].kernel,
                "algorithms": variants,
                "parameters": _parameters(arguments),
                "names": ", ".join(argument.c_name for argument in arguments),
                "members": [f"{ctype(argument.type).c} {argument.c_name}" for argument in arguments],
                "packed_names": ", ".join(f"a->{argument.c_name}" for argument in arguments),
                "unchecked": [a.c_name for a in arguments if a.c_name not in checked],
            }
        )
    summary = _c_comment(f"{stem}: {', '.join(functions)}.")
    guard = f"PYFMHA_LIBRARY_{re.sub('[^A-Za-z0-9]', '_', stem)}"
    values = {"functions": views, "summary": summary, "guard": guard, "header": f"{stem}.h"}
    files = {f"{stem}.{ending}": _render(f"library.{ending}.j2", **values) for ending in ("h", "c")}
    return files | runtime_files("h", "c")


def runtime_files(*endings: str) -> dict[str, str]:
    """The C files that are the same in every library: those of the endings ``"h"`` and ``"c"`` asked for."""
    names = [f"pyfmha_runtime.{ending}" for ending in endings]
    return {name: (TEMPLATES / name).read_text(encoding="utf-8") for name in names}


def emit_manifest(text: str) -> str:
    """The C source that compiles a manifest into its library."""
    return _render("manifest.c.j2", lines=text.splitlines(keepends=True))
