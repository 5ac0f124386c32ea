"""Linking: variants become the algorithms of C functions, and those one shared library."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pyfmha
from pyfmha.aot.c_compiler import build_shared
from pyfmha.aot.emit_c import emit_library, emit_manifest
from pyfmha.aot.emit_operators import emit_operators
from pyfmha.aot.handover import Handover, check_stem, is_library, read_handover, unite, write_handover
from pyfmha.aot.staging import Staging, staging
from pyfmha.errors import SpecError
from pyfmha.operators.description import Operator
from pyfmha.spec.advice import LIBRARY_STEM, MANIFEST_NAME
from pyfmha.spec.arch import ARCHS
from pyfmha.spec.kernel import KernelSpec
from pyfmha.spec.manifest import Function, Manifest


def link(headers: Iterable[Path], output: Path, *, library: bool = True) -> Manifest:
    """Link compiled variants.

    Args:
        headers: the ``.h`` files that :func:`pyfmha.aot.compile_kernel` wrote, with their ``.c`` and ``.json`` beside
            them. Variants that share a function name become its algorithms, in the order given; in which
            order those of one algorithm are tried follows from what they are. The same variant compiled for several
            architectures by several runs counts as one.
        output: path of the results without ending: ``output.c``, ``output.h``, ``output.json`` (the manifest) and
            ``output.so``, with ``pyfmha_runtime.c`` and ``.h`` beside them; and the files of each variant that was put
            together from several runs, ``output.VARIANT.c``, ``.h`` and ``.json``, which stand for theirs.
        library: whether to build ``output.so`` too, which needs a C compiler.

    Returns:
        The manifest of the library.

    Raises:
        SpecError: the variants cannot stand in one library, or the output is a folder; the message says which and why.
        ManifestError: a header's companions are missing or damaged.
        ToolchainError: no C compiler, or it failed; the message holds its log.
        OutputError: the results cannot be written.
    """
    check_stem(output)
    if output.name == LIBRARY_STEM and (output.parent / MANIFEST_NAME).exists():
        raise SpecError(f"{output}.so is the library of {output.parent}/{MANIFEST_NAME}; give another -o")
    given = [read_handover(header) for header in dict.fromkeys(headers) if not is_library(header)]
    by_variant: dict[str, list[Handover]] = {}
    for one in given:
        by_variant.setdefault(one.variant.name, []).append(one)
    with staging(output.parent) as stage:
        united: list[str] = []
        variants = []
        for runs in by_variant.values():
            variant = unite(runs)
            if not any(variant is run for run in runs):  # its C source is none of theirs
                stem = f"{output.name}.{variant.variant.name}"
                united += write_handover(stage, stem, variant.spec, variant.cubins, variant.triton)
                variant = replace(variant, stem=stage.path / stem)
            variants.append(variant)
        names, manifest = prepare_library(stage, variants, output.name, library=library, in_order=False)
        stage.publish(*dict.fromkeys([*united, *names]))
    return manifest


def prepare_library(
    stage: Staging,
    variants: Sequence[Handover],
    stem: str,
    *,
    library: bool,
    so_name: str | None = None,
    in_order: bool = True,
    operators: Sequence[Operator] = (),
    jobs: int | None = None,
) -> tuple[list[str], Manifest]:
    """Prepare a library's files; returns their names in the order to publish them, and the manifest.

    The C compiler runs in so many processes, by default one a CPU.
    """
    functions = group(variants, in_order=in_order)
    by_name = {v.spec.variant: v for v in variants}
    specs = {name: [[v.spec for v in algorithm] for algorithm in algorithms] for name, algorithms in functions.items()}
    files = emit_library(specs, stem, {v.variant.name: v.variant.images for v in variants})
    if operators:
        files |= emit_operators(operators, _manifest(functions, {}, operators).functions, f"{stem}.so")
    manifest = _manifest(functions, files, operators)
    text = manifest.to_json()
    for name, content in files.items():
        stage.write(name, content)
    stage.write(f"{stem}.json", text)
    names = list(files)
    if library:
        so_name = so_name or f"{stem}.so"
        sources = files | {"pyfmha_manifest.c": emit_manifest(text, manifest.build_id)}
        build_shared(stage, sources, list(by_name.values()), so_name, jobs)
        names.append(so_name)
    return [*names, f"{stem}.json"], manifest


def group(variants: Sequence[Handover], *, in_order: bool = True) -> dict[str, list[list[Handover]]]:
    """Functions by name; of each its algorithms in order of first appearance; of each its variants, as tried.

    That is the order given, but those that serve every call come last, and of those that differ in hints alone none
    comes after one that would serve all its calls. With ``in_order`` False it follows from what they are, whatever the
    order given: files come from globs, by name.

    Raises:
        SpecError: two variants cannot share a function, or function names clash.
    """
    if not variants:
        raise SpecError("nothing to link: name the .h files that pyfmha compile wrote")
    functions: dict[str, dict[str, list[Handover]]] = {}
    for variant in variants:
        spec = variant.spec
        algorithms = functions.setdefault(spec.name, {})
        for other in (v for algorithm in algorithms.values() for v in algorithm):
            _check_same_function(variant, other)
        alike = algorithms.setdefault(spec.algorithm, [])
        twins = [v for v in alike if served(v.spec) == served(spec)]
        if not twins:
            alike.append(variant)
        elif twins[0].variant != variant.variant:
            raise SpecError(
                f"{twins[0].header} and {variant.header} are two builds of the same variant of {spec.name}; name one"
            )
    _check_exports(list(functions))
    if not in_order:
        for alike in (alike for algorithms in functions.values() for alike in algorithms.values()):
            alike.sort(key=lambda v: (rank(v.spec), v.variant.name))
    return {name: [_as_tried(alike) for alike in algorithms.values()] for name, algorithms in functions.items()}


def served(spec: KernelSpec) -> tuple[object, ...]:
    """What decides which calls a variant serves, and where."""
    return [argument.hint for argument in spec.arguments], *_conditions(spec)


def _conditions(spec: KernelSpec) -> tuple[object, ...]:
    return set(spec.requires), set(spec.archs), spec.tensors


def rank(spec: KernelSpec) -> tuple[int, ...]:
    """Where a variant belongs among those of its algorithm: not after one that serves all its calls and others.

    Those for some architectures alone come first: in clusters, which are for the few large rows that would leave most
    of a device idle, then those with more conditions, then those with more hints.
    """
    hints = sum({None: 0, 8: 1}.get(argument.hint, 2) for argument in spec.arguments)
    return len(spec.archs) or len(ARCHS) + 1, not spec.cluster, -len(set(spec.requires)), -len(spec.tensors), -hints


def _as_tried(variants: Sequence[Handover]) -> list[Handover]:
    """The variants of one algorithm in the order in which the dispatcher tries them."""
    ordered: list[Handover] = []
    for variant in sorted(variants, key=lambda v: v.spec.unconditional):
        hiding = (index for index, other in enumerate(ordered) if _hides(other.spec, variant.spec))
        ordered.insert(next(hiding, len(ordered)), variant)
    last = ordered[-1].spec
    needed = [v.spec.variant for v in ordered if not v.spec.optional]
    if needed and last.optional:
        raise SpecError(
            f"the last variant of an algorithm of {last.name}, {last.variant}, is for {', '.join(last.archs)} only, but"
            f" {needed[-1]} before it is for all; give that one last"
        )
    return ordered


def _hides(one: KernelSpec, other: KernelSpec) -> bool:
    """Whether a variant serves all calls of another that has the same conditions and more hints."""
    hints = ((a.hint, b.hint) for a, b in zip(one.arguments, other.arguments, strict=True))
    return _conditions(one) == _conditions(other) and all(a in (None, b) or (a, b) == (8, 16) for a, b in hints)


def _check_same_function(one: Handover, other: Handover) -> None:
    """Refuse variants that cannot share a function: others' names, or kernels that were not meant to."""
    specs = (other.spec, one.spec)
    together = one.spec.kernel == other.spec.kernel or all(spec.algorithm_name for spec in specs)
    if one.spec.prototype != other.spec.prototype or not together:
        described = [f"{s.kernel}({', '.join(f'{t} {n}' for n, t in s.prototype)})" for s in specs]
        raise SpecError(
            f"two different kernels claim the function name {one.spec.name!r}: {' and '.join(described)};"
            " give one another --out-name"
        )
    if one.spec.source == other.spec.source and one.source_digest != other.source_digest:
        raise SpecError(
            f"{other.header} and {one.header}, both of {one.spec.name}, were compiled from different versions"
            f" of {one.spec.source} or of a file it imports; delete the older one, or compile both again"
        )


def _check_exports(names: Sequence[str]) -> None:
    exports: dict[str, str] = {}
    for name in names:
        for symbol in (
            f"load_{name}",
            f"unload_{name}",
            name,
            f"{name}_default",
            f"{name}_packed",
            f"{name}_arguments",
            f"{name}_get_num_algos",
            f"{name}_variant",
            f"{name}_workspace",
        ):
            if symbol in exports:
                raise SpecError(
                    f"functions {exports[symbol]!r} and {name!r} would both export {symbol}; rename one with --out-name"
                )
            exports[symbol] = name


def _manifest(
    functions: dict[str, list[list[Handover]]], files: dict[str, str], operators: Sequence[Operator]
) -> Manifest:
    described = tuple(
        Function(
            name=name,
            kernel=algorithms[0][0].spec.kernel,
            arguments=algorithms[0][0].spec.prototype,
            algorithms=tuple(tuple(v.variant for v in algorithm) for algorithm in algorithms),
        )
        for name, algorithms in functions.items()
    )
    triton = ", ".join(sorted({v.triton for algorithms in functions.values() for a in algorithms for v in a}))
    plugins = tuple(operator.to_json() for operator in operators)
    unnamed = Manifest("", pyfmha.__version__, triton, described, plugins)
    digest = hashlib.sha256(unnamed.to_json().encode())
    for name in sorted(files):
        digest.update(files[name].encode())
    return replace(unnamed, build_id=digest.hexdigest()[:32])
