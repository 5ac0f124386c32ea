"""Compiled machine code kept between builds, under a key of everything that decides it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyfmha.aot.cubin import Cubin
from pyfmha.aot.kernel_files import check_source
from pyfmha.aot.staging import staging
from pyfmha.spec.arch import ARCHS, Arch
from pyfmha.spec.kernel import KernelSpec
from pyfmha.spec.manifest import SCHEMA

_WORKER = ("worker.py", "descriptors.py", "sources.py", "target.py", "wrappers.py")


@dataclass(frozen=True)
class Cache:
    """Machine code by key.

    Attributes:
        folder: one JSON file an entry.
        toolchain: versions of Triton and its assemblers.
        worker: digest of the code that drives Triton.
    """

    folder: Path
    toolchain: dict[str, str]
    worker: str

    @classmethod
    def open(cls, folder: Path, toolchain: dict[str, str]) -> "Cache":
        """The cache in a folder, which need not exist."""
        worker = b"".join(Path(__file__).with_name(name).read_bytes() for name in _WORKER)
        return cls(folder, toolchain, hashlib.sha256(worker).hexdigest())

    def key(self, spec: KernelSpec, arch: Arch) -> str:
        """Source, spec, versions, architecture and schema, hashed.

        Raises:
            KernelSourceError: the source does not exist.
        """
        source = hashlib.sha256(check_source(spec.source).read_bytes()).hexdigest()
        parts = [
            SCHEMA,
            source,
            spec.variant,
            spec.resolve(arch.name).digest,
            spec.kernel,
            arch.name,
            self.toolchain,
            self.worker,
        ]
        if spec.functions:  # the module by which they are declared decides what they are, too
            declared = Path(__file__).parents[1] / "functions" / "declare.py"
            files = [*(function.source for function in spec.functions), declared]
            parts.append([hashlib.sha256(check_source(file).read_bytes()).hexdigest() for file in files])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def get(self, spec: KernelSpec, arch: Arch) -> Cubin | None:
        """The entry, or None: missing, damaged, or made when a file the kernel imports was another."""
        key = self.key(spec, arch)
        try:
            entry: dict[str, Any] = json.loads((self.folder / f"{key}.json").read_text())
            if _entry_digest(key, entry["cubin"]) != entry["sha256"]:
                return None
            cubin = Cubin.from_record(entry["cubin"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        folder = spec.source.resolve().parent
        current = all(_digest(folder / name) == digest for name, digest in cubin.dependencies.items())
        return cubin if current else None

    def put(self, spec: KernelSpec, cubin: Cubin) -> None:
        """Add an entry, whole.

        Raises:
            OutputError: it cannot be written.
        """
        record = cubin.to_record()
        key = self.key(spec, ARCHS[cubin.arch])
        with staging(self.folder) as stage:
            stage.write(f"{key}.json", json.dumps({"sha256": _entry_digest(key, record), "cubin": record}))
            stage.publish(f"{key}.json")


def _entry_digest(key: str, record: dict[str, Any]) -> str:
    """Over the key too: an entry under another's name is damaged."""
    return hashlib.sha256(f"{key}{json.dumps(record, sort_keys=True)}".encode()).hexdigest()


def _digest(file: Path) -> str | None:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None
