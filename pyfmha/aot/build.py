"""From specs to files: one kernel (``pyfmha compile``) or a whole library (``pyfmha build``)."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyfmha
from pyfmha.aot.cache import Cache
from pyfmha.aot.cubin import Compiler, Cubin, toolchain
from pyfmha.aot.emit_c import TEMPLATES
from pyfmha.aot.handover import check_stem, read_handover, write_handover
from pyfmha.aot.limits import check_shared_memory
from pyfmha.aot.link_so import CFLAGS, LDFLAGS, find_compiler, prepare_library
from pyfmha.aot.staging import staging
from pyfmha.errors import ManifestError, SharedMemoryError, SpecError
from pyfmha.spec.arch import Arch
from pyfmha.spec.kernel import KernelSpec
from pyfmha.spec.manifest import Manifest, read_manifest

LIBRARY_STEM = "libpyfmha"
LIBRARY_NAME = f"{LIBRARY_STEM}.so"
MANIFEST_NAME = "manifest.json"
_STAMP_NAME = "build.json"
_DECIDING = (
    "abi",
    "arch",
    "c_names",
    "conditions",
    "descriptors",
    "grid",
    "manifest",
    "spec",
)  # modules beyond this package that decide what is built

Progress = Callable[[int, int, str], None]
"""Called with work done, work in all, and the name of what was just done."""


def _silent(done: int, total: int, name: str) -> None:
    pass


def compile_kernel(
    compiler: Compiler,
    spec: KernelSpec,
    archs: Sequence[Arch],
    output: Path,
    *,
    generic: bool = True,
    progress: Progress = _silent,
) -> list[Path]:
    """Compile one spec for some architectures, and with it its generic variant.

    Args:
        compiler: running compiler processes.
        spec: what to compile.
        archs: for which architectures, at least one.
        output: path of the results without ending; each variant's name is appended to it.
        generic: whether to add the variant without hints, which serves the values that the hinted one cannot.
        progress: called after each piece.

    Returns:
        The headers written, for :func:`pyfmha.aot.link`.

    Raises:
        KernelSourceError, CompileError, SharedMemoryError: it cannot be compiled.
        OutputError: the results cannot be written. Whatever fails, earlier results stay as they were.
    """
    check_stem(output)
    served = [arch for arch in archs if spec.is_for(arch.name)]
    if not served:
        raise SpecError(f"{spec.variant} is for {', '.join(spec.archs)} only; compile it for one of them")
    specs = list({s.variant: s for s in ([spec, spec.generic()] if generic else [spec])}.values())
    wanted = [(s, arch) for s in specs for arch in served]
    cubins = _compile_all(compiler, wanted, progress)
    triton = toolchain()["triton"]
    with staging(output.parent) as stage:
        names = []
        for index, one in enumerate(specs):
            images = cubins[index * len(served) : (index + 1) * len(served)]
            names += write_handover(stage, f"{output.name}.{one.variant}", one, images, triton)
        stage.publish(*dict.fromkeys(names))
    return [output.parent / f"{output.name}.{one.variant}.h" for one in specs]


def compile_configs(
    compiler: Compiler,
    specs: Sequence[KernelSpec],
    archs: Sequence[Arch],
    output: Path,
    *,
    generic: bool = True,
    progress: Progress = _silent,
    note: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """As :func:`compile_kernel`, for the configurations of an autotuner: each an algorithm, in their order.

    One that needs more shared memory than an architecture has is left out with a note, as the autotuner does.

    Raises:
        SharedMemoryError: all of them do.
        PyfmhaError: as :func:`compile_kernel`.
    """
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


def _compile_all(
    compiler: Compiler, wanted: Sequence[tuple[KernelSpec, Arch]], progress: Progress, cache: Cache | None = None
) -> list[Cubin]:
    count = 0

    def done(spec: KernelSpec, cubin: Cubin) -> None:
        nonlocal count
        check_shared_memory(compiler, spec, cubin)
        if cache is not None:  # at once, so that an interrupted build resumes where it stopped
            cache.put(spec, cubin)
        count += 1
        progress(count, len(wanted), f"{spec.variant} {cubin.arch}")

    return compiler.compile_all(wanted, done)


@dataclass(frozen=True)
class BuildResult:
    """What a build did.

    Attributes:
        library: the shared library.
        manifest: what it holds.
        compiled: how many pieces of machine code were compiled; the rest came from the cache.
        up_to_date: nothing had changed, and nothing was done.
    """

    library: Path
    manifest: Manifest
    compiled: int
    up_to_date: bool


def build(
    specs: Sequence[KernelSpec],
    archs: Sequence[Arch],
    folder: Path,
    *,
    jobs: int | None = None,
    progress: Progress = _silent,
) -> BuildResult:
    """Build a library of many specs: ``libpyfmha.so`` and ``manifest.json``, with the C sources in ``c/``.

    Hints are a spec's own business here: pass the generic variants too, so that the dispatch is total.

    Args:
        specs: what to compile, in the order in which their algorithms are to be numbered.
        archs: for which architectures; specs for none of them are left out.
        folder: where to; made if need be.
        jobs: compiler processes, by default one a CPU.
        progress: called after each piece of machine code that had to be compiled.

    Returns:
        What was done.

    Raises:
        PyfmhaError: as :func:`compile_kernel` and :func:`pyfmha.aot.link`; earlier output stays as it was.
    """
    if not specs or not archs:
        raise SpecError("nothing to build: give at least one spec and one architecture")
    specs = [spec for spec in _distinct(specs) if any(spec.is_for(arch.name) for arch in archs)]
    if not specs:
        raise SpecError(f"no spec is for {', '.join(arch.name for arch in archs)}; build for another architecture")
    tools = toolchain()
    cache = Cache.open(folder / "cache", tools)
    wanted = [(spec, arch) for spec in specs for arch in archs if spec.is_for(arch.name)]
    stamp = _stamp(cache, wanted)
    found = {(spec.variant, arch.name): cache.get(spec, arch) for spec, arch in wanted}
    missing = [(spec, arch) for spec, arch in wanted if found[spec.variant, arch.name] is None]
    current = None if missing else _current(folder, stamp)
    if current is not None:
        return BuildResult(folder / LIBRARY_NAME, current, 0, True)
    if missing:
        with Compiler(jobs) as compiler:
            made = _compile_all(compiler, missing, progress, cache)
        found |= {(spec.variant, arch.name): cubin for (spec, arch), cubin in zip(missing, made, strict=True)}
    cubins = [[c for arch in archs if (c := found.get((spec.variant, arch.name))) is not None] for spec in specs]
    manifest = _write(folder, specs, cubins, tools["triton"], stamp)
    return BuildResult(folder / LIBRARY_NAME, manifest, len(missing), False)


def _distinct(specs: Sequence[KernelSpec]) -> list[KernelSpec]:
    by_variant: dict[str, KernelSpec] = {}
    for spec in specs:
        other = by_variant.setdefault(spec.variant, spec)
        if other.source.resolve() != spec.source.resolve():
            raise SpecError(f"{other.source} and {spec.source} both give {spec.variant}; give one another name")
    return list(by_variant.values())


def _write(
    folder: Path, specs: Sequence[KernelSpec], cubins: Sequence[Sequence[Cubin]], triton: str, stamp: str
) -> Manifest:
    with staging(folder) as stage:
        names: list[str] = []
        for spec, images in zip(specs, cubins, strict=True):
            names += write_handover(stage, f"c/{spec.variant}", spec, images, triton)
        variants = [read_handover(stage.path / f"c/{spec.variant}.h") for spec in specs]
        made, manifest = prepare_library(stage, variants, LIBRARY_STEM, library=True)
        stage.write(MANIFEST_NAME, manifest.to_json())
        library = hashlib.sha256((stage.path / LIBRARY_NAME).read_bytes()).hexdigest()
        stage.write(_STAMP_NAME, json.dumps({"stamp": stamp, "library": library}) + "\n")
        sources = [name for name in made if name.endswith((".c", ".h"))]
        for name in sources:
            (stage.path / name).replace(stage.path / "c" / name)
        stage.publish(
            *dict.fromkeys([*names, *(f"c/{name}" for name in sources), LIBRARY_NAME, MANIFEST_NAME, _STAMP_NAME])
        )
        _drop_stale(folder / "c", {Path(name).name for name in names} | set(sources))
    return manifest


def _drop_stale(folder: Path, keep: set[str]) -> None:
    """Remove the sources of variants that this build no longer has."""
    for file in folder.iterdir():
        if file.name not in keep and file.suffix in (".c", ".h", ".json"):
            file.unlink()


def _stamp(cache: Cache, wanted: Sequence[tuple[KernelSpec, Arch]]) -> str:
    """Digest of everything that decides a build's output."""
    digest = hashlib.sha256(json.dumps([pyfmha.__version__, *find_compiler(), *CFLAGS, *LDFLAGS]).encode())
    for spec, arch in wanted:
        digest.update(f"{spec.name} {cache.key(spec, arch)}\n".encode())
    for file in sorted(TEMPLATES.iterdir()):
        digest.update(file.read_bytes())
    package = Path(pyfmha.__file__).parent
    for module in sorted([*package.glob("aot/*.py"), *package.glob("spec/*.py")]):
        digest.update(module.read_bytes())
    return digest.hexdigest()


def _current(folder: Path, stamp: str) -> Manifest | None:
    """The manifest of what is there, if that is just what this build would make."""
    try:
        record = json.loads((folder / _STAMP_NAME).read_text())
        library = hashlib.sha256((folder / LIBRARY_NAME).read_bytes()).hexdigest()
        if record["stamp"] != stamp or record["library"] != library:
            return None
        manifest = read_manifest(folder / MANIFEST_NAME)
        complete = all((folder / "c" / f"{variant.name}.c").is_file() for _, _, variant in manifest.variants())
        return manifest if complete else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ManifestError):
        return None
