"""Files written whole or not at all: prepared in a folder beside their destination, then moved into place."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyfmha.errors import OutputError

_PREFIX = ".pyfmha-staging-"


class Staging:
    """Files on their way to ``folder``.

    Attributes:
        path: where they are prepared; on the destination's file system, so that moving them is atomic.
    """

    def __init__(self, folder: Path, path: Path) -> None:
        self.folder = folder
        self.path = path

    def write(self, name: str, content: str | bytes) -> Path:
        """Prepare one file; ``name`` may hold folders."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    def publish(self, *names: str) -> None:
        """Move files into place one by one, in the order given: name last what makes the others count."""
        for name in names:
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.path / name, target)


@contextmanager
def staging(folder: Path) -> Iterator[Staging]:
    """Prepare files for a folder, which is made if need be; what is not published by the end is dropped.

    Raises:
        OutputError: the folder or a file cannot be written; what the folder held is as it was.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=folder))
        try:
            yield Staging(folder, path)
        finally:
            shutil.rmtree(path, ignore_errors=True)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {error.strerror or error} (is the disk full or read-only?)"
        ) from error


def _sweep(folder: Path) -> None:
    """Remove what builds that were killed outright left behind."""
    for left in folder.glob(f"{_PREFIX}*"):
        pid = left.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)
