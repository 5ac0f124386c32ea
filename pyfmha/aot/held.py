"""What the library in a folder was built from, so that a build keeps it and adds to it: the record ``build.json``.

Where the record is lost or damaged, the descriptions of the variants, ``c/*.json``, take its place; only the folders of
their kernel files are not in those.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyfmha.errors import SpecError
from pyfmha.operators.description import Operator
from pyfmha.spec.advice import LIBRARY_NAME, MANIFEST_NAME
from pyfmha.spec.arch import ARCHS
from pyfmha.spec.kernel import KernelSpec
from pyfmha.spec.record import spec_from_data, spec_to_data

RECORD_NAME = "build.json"
SOURCES = "c"
"""The folder of the C sources."""

_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SpecError)


@dataclass(frozen=True)
class HeldVariant:
    """One variant of the library in a folder.

    Attributes:
        spec: what it was compiled from; its files as paths from the folder, or only names.
        archs: for which architectures.
    """

    spec: KernelSpec
    archs: tuple[str, ...]


@dataclass(frozen=True)
class Held:
    """What a folder holds.

    Attributes:
        variants: in the library's order.
        lost: functions, variants or files of which it is not known what they were built from.
        files: what the build wrote, relative to the folder, with the SHA-256 of each; "" where that is not known.
        stamp: digest of everything that decided the build; "" where that is not known.
        operators: its plugins.
    """

    variants: tuple[HeldVariant, ...] = ()
    lost: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    stamp: str = ""
    operators: tuple[Operator, ...] = ()

    def is_whole(self, folder: Path) -> bool:
        """Whether every file is as it was written."""
        return bool(self.files) and all(_sha256(folder / name) == digest for name, digest in self.files.items())


def _sha256(file: Path) -> str | None:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def to_record(
    folder: Path,
    stage: Path,
    files: Iterable[str],
    pieces: Sequence[tuple[KernelSpec, Sequence[str]]],
    operators: Sequence[Operator],
    stamp: str,
) -> str:
    """The text of ``build.json``.

    Args:
        folder: where the library goes.
        stage: where its files are prepared.
        files: their names, relative to both.
        pieces: every spec, in the library's order, with its architectures.
        operators: the library's plugins.
        stamp: see :class:`Held`.
    """
    content = {
        "stamp": stamp,
        "files": {name: _sha256(stage / name) for name in sorted(files)},
        "variants": [
            {
                "spec": spec_to_data(spec),
                "path": _from(folder, spec.source),
                **({"functions": [_from(folder, one.source) for one in spec.functions]} if spec.functions else {}),
                "archs": list(archs),
            }
            for spec, archs in pieces
        ],
        "operators": [operator.to_json() for operator in operators],
    }
    return json.dumps({"content": content, "sha256": _seal(content)}, indent=1) + "\n"


def _from(folder: Path, file: Path) -> str:
    return os.path.relpath(file.resolve(), folder.resolve())


def _with_paths(one: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a spec with the paths that the record has of its files."""
    spec = {**one["spec"], "source": one["path"]}
    if "functions" in one:
        spec["functions"] = [[p, path, a] for (p, _, a), path in zip(spec["functions"], one["functions"], strict=True)]
    return spec


def read_held(folder: Path) -> Held:
    """What a folder holds; nothing where there is no library."""
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        content = record["content"]
        if record["sha256"] == _seal(content):
            variants = tuple(_variant(_with_paths(one), one["archs"]) for one in content["variants"])
            operators = _operators(content.get("operators", ()))
            return Held(variants, (), dict(content["files"]), str(content["stamp"]), operators)
    except _DAMAGED:
        pass
    return _from_sources(folder)


def _variant(spec: dict[str, Any], archs: Sequence[str]) -> HeldVariant:
    unknown = [arch for arch in archs if arch not in ARCHS]
    if unknown:
        raise ValueError(f"unknown architecture {unknown[0]!r}")
    return HeldVariant(spec_from_data(spec), tuple(archs))


def _from_sources(folder: Path) -> Held:
    """From the descriptions of the variants."""
    variants: list[HeldVariant] = []
    lost: list[str] = []
    files: dict[str, str] = {}
    for description in sorted((folder / SOURCES).glob("*.json")):
        header = description.with_suffix(".h")
        try:
            record = json.loads(description.read_text(encoding="utf-8"))
            if "spec" not in record:
                continue
            archs = [image["arch"] for image in record["variant"]["images"]]
            variants.append(_variant(record["spec"], archs))
        except _DAMAGED:
            if not _is_ours(header):
                continue
            lost.append(description.stem)
        files |= {f"{SOURCES}/{description.stem}{ending}": "" for ending in (".c", ".h", ".json")}
    known = {one.spec.name for one in variants}
    names = _function_names(folder / MANIFEST_NAME)
    lost += [name for name in names or () if name not in known]
    if names is None and not variants and (folder / LIBRARY_NAME).exists():
        lost.append(LIBRARY_NAME)
    return Held(tuple(variants), tuple(lost), files, operators=_manifest_operators(folder / MANIFEST_NAME))


def _is_ours(header: Path) -> bool:
    try:
        return "Generated by pyfmha" in header.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _operators(data: Iterable[Any]) -> tuple[Operator, ...]:
    return tuple(Operator.from_json(one) for one in data)


def _manifest_operators(manifest: Path) -> tuple[Operator, ...]:
    try:
        return _operators(json.loads(manifest.read_text(encoding="utf-8")).get("operators", ()))
    except _DAMAGED:
        return ()


def _function_names(manifest: Path) -> list[str] | None:
    """Of whatever version the manifest is; None where it says nothing."""
    try:
        return [str(function["name"]) for function in json.loads(manifest.read_text(encoding="utf-8"))["functions"]]
    except _DAMAGED:
        return None
