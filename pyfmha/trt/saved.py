"""Files of engines and timing caches, each written whole or not at all."""

import os
import tempfile
from pathlib import Path
from typing import Any

from pyfmha.errors import EngineError, OutputError
from pyfmha.spec.advice import engine_advice
from pyfmha.trt.protocols import Plan


def read_plan(path: Path) -> bytes:
    """A serialised engine's bytes.

    Raises:
        EngineError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise EngineError(f"no engine at {path} ({error.strerror}); build it: {engine_advice()}") from None


def plan_of(engine: Plan) -> Any:
    """A serialised engine: that of a file, or what holds one already, such as bytes or an ``IHostMemory``.

    Raises:
        EngineError: the file cannot be read, or it is neither.
    """
    if isinstance(engine, str | os.PathLike):
        return read_plan(Path(engine))
    try:
        memoryview(engine).release()  # type: ignore[arg-type]  # an IHostMemory has a buffer
    except TypeError:
        kind = type(engine).__name__
        raise EngineError(
            f"the engine is a {kind}; give the path of its file, its bytes, or the IHostMemory of a build"
        ) from None
    return engine


def read_timing_cache(path: Path | str) -> bytes:
    """A timing cache's bytes; empty where there is no such file yet.

    Raises:
        EngineError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise EngineError(f"the timing cache {path} cannot be read: {error.strerror}") from None


def check_writable(*paths: Path) -> None:
    """Refuse files that cannot be written, before a long build instead of behind it.

    Raises:
        OutputError: one is a folder, or the folder that it would be in cannot be made or written to.
    """
    for path in paths:
        try:
            folder = path.parent
            while not folder.exists():
                folder = folder.parent
            if path.is_dir():
                raise OutputError(f"cannot write {path}: it is a folder")
            if not folder.is_dir():
                raise OutputError(f"cannot write {path}: {folder} is no folder")
            if not os.access(folder, os.W_OK | os.X_OK):
                raise OutputError(f"cannot write {path}: no permission to write in {folder}")
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"cannot write {path}: {error.strerror}") from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or as it was; its folder is made if need be.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files for their owner alone
        os.replace(temporary, path)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
