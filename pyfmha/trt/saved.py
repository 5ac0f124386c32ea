"""Engines in files: an engine, its configuration and its timing cache, each whole or not at all."""

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyfmha.errors import EngineError, OutputError
from pyfmha.trt.engine import Built, EngineConfig

ENGINE_FILE = "fmha.engine"
CONFIG_FILE = "config.json"
TIMING_CACHE_FILE = "timing.cache"
CONFIG_SCHEMA = 1


@dataclass(frozen=True)
class Saved:
    """An engine in a folder.

    Attributes:
        path: its file.
        config: what it serves.
        tensorrt: version that built it.
    """

    path: Path
    config: EngineConfig
    tensorrt: str


def save_engine(
    built: Built, config: EngineConfig, folder: Path | str, timing_cache: Path | str | None = None
) -> Saved:
    """Write an engine, its ``config.json`` and its timing cache, each whole or not at all.

    The configuration comes last and holds the engine's digest, so that a pair that does not belong together, because
    the second write failed, is noticed by :func:`read_engine`.

    Args:
        built: the engine.
        config: what it serves.
        folder: where to; made if need be.
        timing_cache: the timing cache's file; by default ``timing.cache`` in the folder.

    Raises:
        OutputError: a file cannot be written; the earlier one is as it was.
    """
    folder = Path(folder)
    engine = folder / ENGINE_FILE
    described = {
        "schema": CONFIG_SCHEMA,
        "engine": ENGINE_FILE,
        "sha256": hashlib.sha256(built.plan).hexdigest(),
        "tensorrt": built.tensorrt,
        **asdict(config),
    }
    write_whole(engine, built.plan)
    if built.timing_cache:
        write_whole(folder / TIMING_CACHE_FILE if timing_cache is None else Path(timing_cache), built.timing_cache)
    write_whole(folder / CONFIG_FILE, (json.dumps(described, indent=1) + "\n").encode())
    return Saved(engine, config, built.tensorrt)


def read_engine(folder: Path | str) -> Saved:
    """What :func:`save_engine` wrote.

    Raises:
        EngineError: a file is missing, damaged, or the two do not belong together.
    """
    path = Path(folder) / CONFIG_FILE
    again = "build it: python examples/build.py"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("schema") != CONFIG_SCHEMA:
            raise EngineError(f"{path} is of another version of pyfmha; {again}")
        engine, digest, tensorrt = (data.pop(name) for name in ("engine", "sha256", "tensorrt"))
        saved = Saved(Path(folder) / engine, EngineConfig(**data), tensorrt)
    except OSError as error:
        raise EngineError(f"no engine configuration at {path} ({error.strerror}); {again}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise EngineError(f"{path} is damaged ({type(error).__name__}: {error}); {again}") from None
    if hashlib.sha256(read_plan(saved.path)).hexdigest() != digest:
        raise EngineError(f"{saved.path} is not the engine that {path} describes; {again}")
    return saved


def read_plan(path: Path) -> bytes:
    """A serialised engine's bytes.

    Raises:
        EngineError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise EngineError(f"no engine at {path} ({error.strerror}); build it: python examples/build.py") from None


def plan_of(engine: Path | str | Any) -> Any:
    """A serialised engine: that of a file, or what holds one already, such as bytes or an ``IHostMemory``.

    Raises:
        EngineError: the file cannot be read, or it is neither.
    """
    if isinstance(engine, str | os.PathLike):
        return read_plan(Path(engine))
    try:
        memoryview(engine).release()
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
