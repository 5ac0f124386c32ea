"""What ``compile`` hands to ``link``: for each variant a header, a C source and a JSON file of the same stem.

The header is what users name on the command line; the JSON carries what the linker must know, so that nothing is read
back out of C.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyfmha.aot.cubin import Cubin
from pyfmha.aot.emit_c import emit_variant, runtime_files
from pyfmha.aot.staging import Staging
from pyfmha.errors import ManifestError, SpecError
from pyfmha.spec.arch import ARCHS
from pyfmha.spec.constants import Constant, from_data, to_data
from pyfmha.spec.descriptors import Descriptor
from pyfmha.spec.kernel import Argument, KernelSpec, Tuning
from pyfmha.spec.manifest import SCHEMA, Image, Variant, text_from_data, variant_from_data


@dataclass(frozen=True)
class Handover:
    """One compiled variant on disk.

    Attributes:
        spec: what was compiled; its source is a bare file name.
        variant: its entry in a manifest.
        stem: the path of its files without ending.
        triton: the version that compiled it.
        source_digest: of the kernel's file and those it imports, as they were when it was compiled.
    """

    spec: KernelSpec
    variant: Variant
    stem: Path
    triton: str
    source_digest: str

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
        constants={name: to_data(value) for name, value in spec.constants},
        num_warps=spec.num_warps,
        num_stages=spec.num_stages,
        maxnreg=spec.maxnreg,
        dependent=spec.is_dependent_on(cubin.arch),
        cluster=spec.cluster,
        num_ctas=spec.num_ctas,
        workspace=cubin.workspace,
        workspace_align=cubin.workspace_align,
        grid=tuple(expression.text for expression in spec.grid_expressions),
        shared_limit=ARCHS[cubin.arch].shared_limit,
        size=len(cubin.code),
        sha256=hashlib.sha256(cubin.code).hexdigest(),
    )


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
        "spec": {
            "source": spec.source.name,
            "kernel": spec.kernel,
            "name": spec.name,
            "arguments": [[a.name, a.type, a.hint] for a in spec.arguments],
            "constants": _constants(spec.constants),
            "grid": spec.grid,
            "num_warps": spec.num_warps,
            "num_stages": spec.num_stages,
            "algorithm_name": spec.algorithm_name,
            "tunings": [{**vars(tuning), "constants": _constants(tuning.constants)} for tuning in spec.tunings],
            "requires": spec.requires,
            "archs": spec.archs,
            "maxnreg": spec.maxnreg,
            "descriptors": [vars(descriptor) for descriptor in spec.descriptors],
            "programmatic_dependent_launch": spec.programmatic_dependent_launch,
            "cluster": spec.cluster,
            "num_ctas": spec.num_ctas,
            "tuples": spec.tuples,
            "workspace": spec.workspace,
        },
        "variant": asdict(describe_variant(spec, cubins)),
        "sha256": {Path(file).name: hashlib.sha256(text.encode()).hexdigest() for file, text in files.items()},
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
    again = "compile it again: pyfmha compile"
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
        spec, variant = _spec(record["spec"]), variant_from_data(record["variant"])
        handover = Handover(
            spec, variant, stem, text_from_data(record["triton"]), text_from_data(record["source_digest"])
        )
        digests = dict(record["sha256"].items())
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{record_path} is damaged ({type(error).__name__}: {error}); {again}") from None
    for name, digest in digests.items():
        try:
            content = (stem.parent / name).read_bytes()
        except OSError as error:
            raise ManifestError(f"{stem.parent / name} cannot be read ({error}); {again}") from None
        if hashlib.sha256(content).hexdigest() != digest:
            raise ManifestError(f"{stem.parent / name} is not the file that {record_path.name} describes; {again}")
    return handover


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
    if path.name in ("", ".", "..", "pyfmha_runtime", "pyfmha_manifest") or re.search(r"""["\\\x00-\x1f]""", path.name):
        raise SpecError(
            f"-o {str(path)!r} is no path for results: it ends in their name, without ending, which is not"
            " pyfmha_runtime or pyfmha_manifest and has no quotes, backslashes or control characters"
        )


def _spec(data: dict[str, Any]) -> KernelSpec:
    fields = dict(data)
    fields["source"] = Path(str(fields["source"]))
    fields["arguments"] = tuple(Argument(*argument) for argument in fields["arguments"])
    fields["constants"] = tuple((name, from_data(value)) for name, value in fields["constants"])
    fields["tuples"] = _nested(fields.get("tuples", []))
    fields["tunings"] = tuple(
        Tuning(**{**tuning, "constants": tuple((name, from_data(value)) for name, value in tuning["constants"])})
        for tuning in fields["tunings"]
    )
    fields["requires"], fields["archs"] = tuple(fields["requires"]), tuple(fields["archs"])
    fields["descriptors"] = tuple(map(_descriptor, fields["descriptors"]))
    return KernelSpec(**fields)


def _constants(constants: Sequence[tuple[str, Constant]]) -> list[list[Any]]:
    return [[name, to_data(value)] for name, value in constants]


def _nested(data: Any) -> Any:
    return tuple(map(_nested, data)) if isinstance(data, list) else data


def _descriptor(data: dict[str, Any]) -> Descriptor:
    parts = (tuple(data[name]) for name in ("shape", "strides", "block"))
    return Descriptor(data["name"], data["base"], *parts)
