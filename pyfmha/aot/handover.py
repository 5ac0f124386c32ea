"""What ``compile`` hands to ``link``: for each variant a header, a C source and a JSON file of the same stem.

The header is what users name on the command line; the JSON carries what the linker must know, so that nothing is read
back out of C.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pyfmha.aot.cubin import Cubin
from pyfmha.aot.emit_c import emit_variant, runtime_files
from pyfmha.aot.staging import Staging
from pyfmha.errors import ManifestError, SpecError
from pyfmha.spec.arch import ARCHS
from pyfmha.spec.constants import to_data
from pyfmha.spec.kernel import KernelSpec
from pyfmha.spec.manifest import SCHEMA, Image, Variant, text_from_data, variant_from_data
from pyfmha.spec.record import spec_from_data, spec_to_data


@dataclass(frozen=True)
class Handover:
    """One compiled variant on disk.

    Attributes:
        spec: what was compiled; its source is a bare file name.
        variant: its entry in a manifest.
        stem: the path of its files without ending.
        triton: the version that compiled it.
        source_digest: of the kernel's file and those it imports, as they were when it was compiled.
        cubins: its machine code, one an architecture.
    """

    spec: KernelSpec
    variant: Variant
    stem: Path
    triton: str
    source_digest: str
    cubins: tuple[Cubin, ...] = ()

    @property
    def c_file(self) -> Path:
        """Its C source."""
        return self.stem.with_name(self.stem.name + ".c")

    @property
    def header(self) -> Path:
        """Its header."""
        return self.stem.with_name(self.stem.name + ".h")


def describe_variant(spec: KernelSpec, cubins: Sequence[Cubin]) -> Variant:
    """The manifest entry of a compiled spec."""
    return Variant(
        name=spec.variant,
        kernel=spec.kernel,
        hints={argument.name: argument.hint for argument in spec.arguments if argument.hint},
        requires=tuple(condition.text for condition in spec.conditions),
        archs=spec.archs,
        tensors=tuple(map(str, spec.tensors)),
        images=tuple(_image(spec.resolve(cubin.arch), cubin) for cubin in cubins),
    )


def _image(spec: KernelSpec, cubin: Cubin) -> Image:
    described = {name: getattr(cubin, name) for name in ("arch", "registers", "spilled", "shared", "threads", "ptxas")}
    return Image(
        **described,
        constants={
            **{name: to_data(value) for name, value in spec.constants},
            **{function.parameter: function.attribute for function in spec.functions},
        },
        num_warps=spec.num_warps,
        num_stages=spec.num_stages,
        maxnreg=spec.maxnreg,
        debug=cubin.debug,
        enable_fp_fusion=spec.enable_fp_fusion,
        dependent=spec.is_dependent_on(cubin.arch),
        cluster=spec.cluster,
        num_ctas=spec.num_ctas,
        workspace=cubin.workspace,
        workspace_align=cubin.workspace_align,
        grid=tuple(expression.text for expression in spec.grid_expressions),
        shared_limit=ARCHS[cubin.arch].shared_limit,
        size=len(cubin.code),
        sha256=_digest(cubin.code),
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_handover(stage: Staging, stem: str, spec: KernelSpec, cubins: Sequence[Cubin], triton: str) -> list[str]:
    """Prepare the files of one variant.

    Args:
        stage: where.
        stem: name of its files without ending, relative to the destination.

    Returns:
        The files' names in the order to publish them: the JSON, which vouches for the others, last.
    """
    digests = {cubin.source_digest() for cubin in cubins}
    if len(digests) > 1:
        raise SpecError(
            f"{spec.source} or a file it imports changed while {spec.variant} was compiled; compile it again"
        )
    folder, _, name = stem.rpartition("/")
    prefix = f"{folder}/" if folder else ""
    files = {prefix + file: text for file, text in {**emit_variant(spec, cubins, name), **runtime_files("h")}.items()}
    record = {
        "schema": SCHEMA,
        "triton": triton,
        "source_digest": digests.pop(),
        "spec": spec_to_data(spec),
        "variant": asdict(describe_variant(spec, cubins)),
        "cubins": [cubin.to_record() for cubin in cubins],
        "sha256": {Path(file).name: _digest(text.encode()) for file, text in files.items()},
    }
    for file, text in files.items():
        stage.write(file, text)
    stage.write(f"{stem}.json", json.dumps(record, indent=1) + "\n")
    return [*files, f"{stem}.json"]


def read_handover(header: Path) -> Handover:
    """Read back the variant whose header is named.

    Raises:
        ManifestError: a file is missing, is not what ``compile`` wrote, or comes from another schema version.
    """
    stem = header.with_suffix("") if header.suffix in (".h", ".c", ".json") else header
    record_path = stem.with_name(stem.name + ".json")
    again = "compile it again with pyfmha compile"
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(
            f"{header}: its description {record_path.name} cannot be read ({error});"
            " keep the .h, .c and .json that compile writes together"
        ) from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else None
        raise ManifestError(f"{record_path} has schema version {found!r}, this pyfmha reads {SCHEMA}; {again}")
    try:
        spec, variant = spec_from_data(record["spec"]), variant_from_data(record["variant"])
        cubins = tuple(map(Cubin.from_record, record["cubins"]))
        if [(c.arch, _digest(c.code)) for c in cubins] != [(i.arch, i.sha256) for i in variant.images]:
            raise ValueError("its machine code is not the variant's")
        versions = text_from_data(record["triton"]), text_from_data(record["source_digest"])
        handover = Handover(spec, variant, stem, *versions, cubins)
        digests = dict(record["sha256"].items())
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{record_path} is damaged ({type(error).__name__}: {error}); {again}") from None
    for name, digest in digests.items():
        try:
            content = (stem.parent / name).read_bytes()
        except OSError as error:
            raise ManifestError(f"{stem.parent / name} cannot be read ({error}); {again}") from None
        if _digest(content) != digest:
            raise ManifestError(f"{stem.parent / name} is not the file that {record_path.name} describes; {again}")
    return handover


def disagreement(one: Handover, other: Handover) -> str:
    """Why two runs of the compiler did not make images of one variant, in words; "" where they did."""
    if spec_to_data(one.spec) != spec_to_data(other.spec):
        return "their specs differ"
    if one.source_digest != other.source_digest:
        return f"they were compiled from different versions of {one.spec.source.name} or of a file it imports"
    if one.triton != other.triton:
        return f"they were compiled by Triton {one.triton} and {other.triton}"
    if {(c.symbol, c.scratch) for c in one.cubins} != {(c.symbol, c.scratch) for c in other.cubins}:
        return "their kernels are called in different ways"
    code = {cubin.arch: cubin.code for cubin in one.cubins}
    other_code = {cubin.arch: cubin.code for cubin in other.cubins if cubin.code != code.get(cubin.arch, cubin.code)}
    return f"their machine code for {', '.join(other_code)} differs" if other_code else ""


def unite(handovers: Sequence[Handover]) -> Handover:
    """One variant with the images of several runs of the compiler: the run that has them all, else a new one, whose C
    source has yet to be written.

    Raises:
        SpecError: they do not belong together.
    """
    first = handovers[0]
    for other in handovers[1:]:
        if reason := disagreement(first, other):
            raise SpecError(
                f"{first.header} and {other.header} are two builds of the same variant of {first.spec.name}; name one:"
                f" {reason}"
            )
    by_arch = {cubin.arch: cubin for one in reversed(handovers) for cubin in one.cubins}
    for one in handovers:
        if len(one.cubins) == len(by_arch):
            return one
    cubins = tuple(sorted(by_arch.values(), key=lambda cubin: ARCHS[cubin.arch]))
    return replace(first, cubins=cubins, variant=describe_variant(first.spec, cubins))


def earlier_cubins(path: Path, made: Handover) -> list[Cubin]:
    """The code for other architectures that an earlier run left where a variant is to be written.

    Args:
        path: the description of the earlier run's variant, which need not exist.
        made: what is to be written there.

    Raises:
        SpecError: there is such code, and it does not go with what is to be written.
    """
    asked = {cubin.arch for cubin in made.cubins}
    try:
        images = json.loads(path.read_text(encoding="utf-8"))["variant"]["images"]
        held = [str(image["arch"]) for image in images if image["arch"] not in asked]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []  # there is none, or nothing to be saved in it
    if not held:
        return []
    try:
        earlier = read_handover(path)
        reason = disagreement(made, earlier)
    except ManifestError as error:
        reason = str(error)
    if reason:
        targets = " ".join(f"-t {arch}" for arch in sorted({*held, *asked}))
        raise SpecError(
            f"{path} holds code for {', '.join(held)}, which does not go with this: {reason}; compile for all at once"
            f" ({targets}) after deleting it, or give another -o"
        )
    return [cubin for cubin in earlier.cubins if cubin.arch not in asked]


def is_library(header: Path) -> bool:
    """Whether a header is of a linked library, which lies beside those of variants once it has been linked."""
    try:
        record = json.loads(header.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "functions" in record and "spec" not in record


def check_stem(path: Path) -> None:
    """Refuse a path of results that C or the library itself cannot have.

    Raises:
        SpecError: saying why.
    """
    if path.is_dir():
        raise SpecError(f"-o {path} is a folder; give the path of the results in it, without ending: {path}/NAME")
    if path.name in ("", ".", "..", "pyfmha_runtime", "pyfmha_manifest") or re.search(r"""["\\\x00-\x1f]""", path.name):
        raise SpecError(
            f"-o {str(path)!r} is no path for results: it ends in their name, without ending, which is not"
            " pyfmha_runtime or pyfmha_manifest and has no quotes, backslashes or control characters"
        )
