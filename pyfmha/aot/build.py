"""From specs to files: one kernel (``pyfmha compile``) or a whole library (``pyfmha build``)."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyfmha
from pyfmha.aot.c_compiler import CFLAGS, LDFLAGS, find_compiler
from pyfmha.aot.cache import Cache
from pyfmha.aot.compiling import Progress, compile_pieces, silent
from pyfmha.aot.cubin import Compiler, Cubin
from pyfmha.aot.emit_c import TEMPLATES
from pyfmha.aot.handover import Handover, check_stem, describe_variant, earlier_cubins, read_handover, write_handover
from pyfmha.aot.held import RECORD_NAME, SOURCES, Held, read_held, to_record
from pyfmha.aot.link_so import prepare_library
from pyfmha.aot.operator_limits import check_count
from pyfmha.aot.operator_specs import check_together
from pyfmha.aot.plan import Plan, plan
from pyfmha.aot.staging import staging
from pyfmha.aot.toolchain import toolchain
from pyfmha.errors import CompileError, KernelSourceError, ManifestError, SharedMemoryError, SpecError
from pyfmha.operators.description import Operator
from pyfmha.operators.names import full_name, twice
from pyfmha.spec.advice import LIBRARY_NAME, LIBRARY_STEM, MANIFEST_NAME
from pyfmha.spec.arch import ARCHS, Arch
from pyfmha.spec.kernel import KernelSpec
from pyfmha.spec.manifest import Manifest, read_manifest
from pyfmha.spec.record import spec_to_data


def compile_kernel(
    compiler: Compiler,
    spec: KernelSpec,
    archs: Sequence[Arch],
    output: Path,
    *,
    generic: bool = True,
    progress: Progress = silent,
) -> list[Path]:
    """Compile one spec for some architectures, and with it its generic variant.

    Args:
        compiler: running compiler processes.
        spec: what to compile.
        archs: for which architectures, at least one.
        output: path of the results without ending; each variant's name is appended to it. A folder that exists gets
            results that are called as the function.
        generic: whether to add the variant without hints, which serves the values that the hinted one cannot.
        progress: called after each piece.

    Returns:
        The headers written, for :func:`pyfmha.aot.link`.

    Raises:
        KernelSourceError, CompileError, SharedMemoryError: it cannot be compiled.
        SpecError: it is for none of the architectures, or there are earlier results of this variant for others, which
            do not go with it. Those that do, because source, spec and Triton are the same, stay in the new results.
        OutputError: the results cannot be written. Whatever fails, earlier results stay as they were.
    """
    if output.is_dir():
        output = output / spec.name
    check_stem(output)
    served = [arch for arch in archs if spec.is_for(arch.name)]
    if not served:
        raise SpecError(f"{spec.variant} is for {', '.join(spec.archs)} only; compile it for one of them")
    specs = list({s.variant: s for s in ([spec, spec.generic()] if generic else [spec])}.values())
    wanted = [(s, arch) for s in specs for arch in served]
    cubins = compile_pieces(compiler, wanted, progress)
    triton = toolchain()["triton"]
    with staging(output.parent) as stage:
        names = []
        for index, one in enumerate(specs):
            stem = f"{output.name}.{one.variant}"
            images = [cubin for cubin in cubins[index * len(served) : (index + 1) * len(served)] if cubin is not None]
            earlier = earlier_cubins(
                output.parent / f"{stem}.json", _handover(one, images, output.parent / stem, triton)
            )
            images = sorted([*images, *earlier], key=lambda cubin: ARCHS[cubin.arch]) if earlier else images
            names += write_handover(stage, stem, one, images, triton)
        stage.publish(*dict.fromkeys(names))
    return [output.parent / f"{output.name}.{one.variant}.h" for one in specs]


def compile_configs(
    compiler: Compiler,
    specs: Sequence[KernelSpec],
    archs: Sequence[Arch],
    output: Path,
    *,
    generic: bool = True,
    progress: Progress = silent,
    note: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """As :func:`compile_kernel`, for the configurations of an autotuner: each an algorithm, in their order.

    One that needs more shared memory than an architecture has is left out with a note, as the autotuner does.

    Raises:
        SharedMemoryError: all of them do.
        PyfmhaError: as :func:`compile_kernel`.
    """
    if output.is_dir():
        output = output / specs[0].name
    check_stem(output)
    headers: list[Path] = []
    failure: SharedMemoryError | None = None
    for index, spec in enumerate(specs):
        stem = output.with_name(
            f"{output.name}.{index:0{len(str(len(specs)))}}"
        )  # in their order where a glob sorts them
        try:
            headers += compile_kernel(compiler, spec, archs, stem, generic=generic, progress=progress)
        except SharedMemoryError as error:
            failure = error
            note(f"left out: {error}")
    if failure is not None and not headers:
        raise failure
    return headers


def _handover(spec: KernelSpec, cubins: Sequence[Cubin], stem: Path, triton: str) -> Handover:
    variant = describe_variant(spec, cubins)
    return Handover(spec, variant, stem, triton, cubins[0].source_digest(), tuple(cubins))


@dataclass(frozen=True)
class BuildResult:
    """What a build did.

    Attributes:
        library: the shared library.
        manifest: what it holds.
        compiled: how many pieces of machine code were compiled; the rest came from the cache.
        up_to_date: nothing had changed, and nothing was done.
        pieces: how many pieces of machine code the library holds.
        kept: functions that the folder held, and nobody asked for.
        replaced: variants that the folder held, in whose place those asked for came.
        dropped: what the folder held and a fresh start left out: functions, or ``"X for sm_80"``.
        left_out: fast variants with users' functions that could not be compiled, a line each; others serve their calls.
    """

    library: Path
    manifest: Manifest
    compiled: int
    up_to_date: bool
    pieces: int
    kept: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def build(
    specs: Sequence[KernelSpec],
    archs: Sequence[Arch],
    folder: Path,
    *,
    jobs: int | None = None,
    progress: Progress = silent,
    fresh: bool = False,
    operators: Sequence[Operator] = (),
) -> BuildResult:
    """Build a library of many specs: ``libpyfmha.so`` and ``manifest.json``, with the C sources in ``c/``.

    What an earlier build left in the folder stays in the library, see :func:`pyfmha.aot.plan.plan`; its machine code is
    compiled again where the kernel file, Triton or pyfmha has changed since. The order of builds does not matter.

    Hints are a spec's own business here: pass the generic variants too, so that the dispatch is total.

    Args:
        specs: what to compile, of each function in the order in which its algorithms are to be numbered.
        archs: for which architectures; specs for none of them are left out.
        folder: where to; made if need be.
        jobs: compiler processes, of Triton and then of C, by default one a CPU.
        progress: called after each piece of machine code that had to be compiled.
        fresh: drop what the folder holds and is not asked for.
        operators: what the library's plugins are, see :func:`pyfmha.aot.emit_operators.emit_operators`. Those that the
            folder holds stay, too.

    Returns:
        What was done.

    Raises:
        ManifestError: of something that the folder holds it is not known what it was built from.
        PyfmhaError: as :func:`compile_kernel` and :func:`pyfmha.aot.link`; earlier output stays as it was.
    """
    if not specs or not archs:
        raise SpecError("nothing to build: give at least one spec and one architecture")
    asked = _distinct(specs)
    cache = Cache.open(folder / "cache", toolchain())
    compiled = 0
    while True:
        held = read_held(folder)
        planned = plan(held, asked, archs, folder, fresh=fresh)
        plugins = joined_operators(() if fresh else held.operators, operators)
        check_count(plugins)
        check_together(plugins)
        found = _found(cache, planned)
        left_out: dict[str, str] = {}
        before = compiled
        if None in found.values():
            find_compiler()  # none is an error before minutes of compiling, not behind them
            compiled += _compile_missing(cache, planned, found, folder, jobs, progress, left_out)
            planned = planned.without(left_out)
        stamp = _stamp(cache, planned, plugins)
        manifest = _current(folder, held, stamp) if compiled == before else None
        up_to_date = manifest is not None
        if manifest is None:
            manifest = _write(folder, held, planned, found, plugins, cache.toolchain["triton"], stamp, jobs)
        if manifest is not None:
            count = sum(len(archs) for _, archs in planned.pieces)
            pieces = (count, planned.kept, planned.replaced, planned.dropped, tuple(left_out.values()))
            return BuildResult(folder / LIBRARY_NAME, manifest, compiled, up_to_date, *pieces)


@dataclass(frozen=True)
class Preview:
    """What a build would do.

    Attributes:
        library: the shared library it would write.
        functions: those the library would hold.
        pieces: how many pieces of machine code.
        missing: those to be compiled, ``"VARIANT sm_80"``; the cache has the others.
        kept, replaced, dropped: as of :class:`BuildResult`.
    """

    library: Path
    functions: tuple[str, ...]
    pieces: int
    missing: tuple[str, ...]
    kept: tuple[str, ...]
    replaced: tuple[str, ...]
    dropped: tuple[str, ...]


def preview(specs: Sequence[KernelSpec], archs: Sequence[Arch], folder: Path, *, fresh: bool = False) -> Preview:
    """What :func:`build` would do; writes nothing.

    Raises:
        PyfmhaError: as :func:`build` before it compiles.
    """
    cache = Cache.open(folder / "cache", toolchain())
    planned = plan(read_held(folder), _distinct(specs), archs, folder, fresh=fresh)
    missing = [f"{variant} {arch}" for (variant, arch), cubin in _found(cache, planned).items() if cubin is None]
    return Preview(
        folder / LIBRARY_NAME,
        tuple(dict.fromkeys(spec.name for spec, _ in planned.pieces)),
        sum(len(archs) for _, archs in planned.pieces),
        tuple(missing),
        planned.kept,
        planned.replaced,
        planned.dropped,
    )


def joined_operators(held: Sequence[Operator], asked: Sequence[Operator]) -> tuple[Operator, ...]:
    """Operators by name; of one that is held and asked for, what is asked for.

    Raises:
        SpecError: two are asked for under one name.
    """
    for name in sorted(twice(map(full_name, dict.fromkeys(asked)))):
        raise SpecError(f"{name} is described twice; give one another name or version")
    found = {(one.namespace, one.name, one.version): one for one in (*held, *asked)}
    return tuple(found[key] for key in sorted(found))


Found = dict[tuple[str, str], Cubin | None]
"""Machine code by variant and architecture; None where it is yet to be compiled."""


def _found(cache: Cache, planned: Plan) -> Found:
    return {(spec.variant, arch.name): cache.get(spec, arch) for spec, archs in planned.pieces for arch in archs}


def _compile_missing(
    cache: Cache,
    planned: Plan,
    found: Found,
    folder: Path,
    jobs: int | None,
    progress: Progress,
    left_out: dict[str, str],
) -> int:
    """Compile what the cache has not: first what is asked for, then what is kept; returns how much that was. What must
    be left out is added to `left_out`."""
    missing = [(spec, arch) for spec, archs in planned.pieces for arch in archs if not found[spec.variant, arch.name]]
    asked = [(spec, arch) for spec, arch in missing if spec.variant in planned.asked]
    kept = [(spec, arch) for spec, arch in missing if spec.variant not in planned.asked]
    with Compiler(jobs) as compiler:

        def compile_some(some: list[tuple[KernelSpec, Arch]], before: int) -> None:
            made = compile_pieces(
                compiler, some, lambda n, _, name: progress(before + n, len(missing), name), cache, left_out
            )
            found.update({(spec.variant, arch.name): cubin for (spec, arch), cubin in zip(some, made, strict=True)})

        compile_some(asked, 0)
        try:
            compile_some(kept, len(asked))
        except (CompileError, KernelSourceError, SpecError) as error:
            names = ", ".join(dict.fromkeys(spec.name for spec, _ in kept))
            raise type(error)(
                f"{error}\n{folder} holds that beside what was asked for ({names}), and it must be compiled again"
                " because its kernel file, Triton or pyfmha has changed. Mend it, or build it with its present spec; to"
                f" drop what {folder} holds: pyfmha build --fresh -o {folder}"
            ) from error
    return sum(found[spec.variant, arch.name] is not None for spec, arch in missing)


def _distinct(specs: Sequence[KernelSpec]) -> list[KernelSpec]:
    by_variant: dict[str, KernelSpec] = {}
    for spec in specs:
        other = by_variant.setdefault(spec.variant, spec)
        if os.path.realpath(other.source) != os.path.realpath(spec.source):
            raise SpecError(f"{other.source} and {spec.source} both give {spec.variant}; give one another name")
    return list(by_variant.values())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among builds that write to a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: two builds at once are then the user's to avoid
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(
    folder: Path,
    held: Held,
    planned: Plan,
    found: Found,
    operators: Sequence[Operator],
    triton: str,
    stamp: str,
    jobs: int | None,
) -> Manifest | None:
    """Write the library; None where another build changed the folder meanwhile, so that the plan is out of date."""
    with staging(folder) as stage, _locked(folder):
        if read_held(folder) != held:
            return None
        names: list[str] = []
        for spec, archs in planned.pieces:
            cubins = [cubin for arch in archs if (cubin := found[spec.variant, arch.name]) is not None]
            names += write_handover(stage, f"{SOURCES}/{spec.variant}", spec, cubins, triton)
        variants = [read_handover(stage.path / f"{SOURCES}/{spec.variant}.h") for spec, _ in planned.pieces]
        made, manifest = prepare_library(stage, variants, LIBRARY_STEM, library=True, operators=operators, jobs=jobs)
        stage.write(MANIFEST_NAME, manifest.to_json())
        sources = [name for name in made if name.endswith((".c", ".h"))]
        for name in sources:
            (stage.path / name).replace(stage.path / SOURCES / name)
        names = [*dict.fromkeys([*names, *(f"{SOURCES}/{name}" for name in sources), LIBRARY_NAME, MANIFEST_NAME])]
        pieces = [(spec, [arch.name for arch in archs]) for spec, archs in planned.pieces]
        stage.write(RECORD_NAME, to_record(folder, stage.path, names, pieces, operators, stamp))
        stage.publish(*names, RECORD_NAME)
        for name in held.files.keys() - set(names):  # the sources of variants that are no more
            (folder / SOURCES / Path(name).name).unlink(missing_ok=True)
    return manifest


def _stamp(cache: Cache, planned: Plan, operators: Sequence[Operator]) -> str:
    """Digest of everything that decides a build's output."""
    digest = hashlib.sha256(json.dumps([pyfmha.__version__, *find_compiler(), *CFLAGS, *LDFLAGS]).encode())
    for spec, archs in planned.pieces:
        described = [spec_to_data(spec), [cache.key(spec, arch) for arch in archs]]
        digest.update(json.dumps(described).encode())
    digest.update(json.dumps([operator.to_json() for operator in operators]).encode())
    for file in sorted(TEMPLATES.iterdir()):
        digest.update(file.read_bytes())
    package = Path(pyfmha.__file__).parent
    for module in sorted([*package.glob("aot/*.py"), *package.glob("spec/*.py"), *package.glob("operators/*.py")]):
        digest.update(module.read_bytes())
    return digest.hexdigest()


def _current(folder: Path, held: Held, stamp: str) -> Manifest | None:
    """The manifest of what is there, if that is just what this build would make."""
    if held.stamp != stamp or not held.is_whole(folder):
        return None
    try:
        return read_manifest(folder / MANIFEST_NAME)
    except ManifestError:
        return None
