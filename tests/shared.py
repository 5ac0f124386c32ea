"""What a run of the tests makes once, for all its processes: libraries and machine code."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from pyfmha.aot.cache import Cache
from pyfmha.aot.cubin import Compiler, Cubin
from pyfmha.aot.toolchain import toolchain
from pyfmha.spec.arch import Arch
from pyfmha.spec.kernel import KernelSpec


class Shared:
    """A folder of the run. What one process makes in it, the others wait for and use; nobody may change it.

    Args:
        root: the folder, which every process of the run is given.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._compiled = root / "compiled"
        self._compiled.mkdir(parents=True, exist_ok=True)

    @classmethod
    def of(cls, factory: pytest.TempPathFactory) -> "Shared":
        """Of this run: beside the folders of xdist's processes, or in that of the only one."""
        own = factory.getbasetemp()
        return cls((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared")

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        with (self._root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def once(self, name: str, make: Callable[[Path], Path]) -> Path:
        """The path that `make` returned, given a folder, in whichever process came first.

        :func:`pyfmha.aot.build` finds in that folder's cache what other builds of the run compiled.
        """
        folder, made = self._root / name, self._root / f"{name}.made"
        with self._alone(name):
            if not made.exists():
                self.lend(folder)
                made.write_text(str(make(folder)))
        return Path(made.read_text())

    def folder(self, name: str) -> Path:
        """A folder of the run, whose files their makers put there whole."""
        (self._root / name).mkdir(exist_ok=True)
        return self._root / name

    def lend(self, folder: Path) -> None:
        """Let builds in a folder find what the run has compiled, and keep what they compile for the others."""
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "cache").is_symlink():
            (folder / "cache").symlink_to(self._compiled)

    def compile(self, compiler: Compiler, spec: KernelSpec, arch: Arch) -> Cubin:
        """As the compiler's method; what some process of the run has compiled is not compiled again."""
        kept = Cache.open(self._compiled, _toolchain())
        with self._alone(kept.key(spec, arch)):
            found = kept.get(spec, arch)
            if found is None:
                found = compiler.compile(spec, arch)
                kept.put(spec, found)
        return found


@cache
def _toolchain() -> dict[str, str]:
    return toolchain()
