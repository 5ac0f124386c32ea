"""An engine with one attention layer in files: itself, its configuration and its timing cache."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pyfmha.errors import EngineError
from pyfmha.spec.advice import engine_advice
from pyfmha.trt.attention.config import EngineConfig
from pyfmha.trt.engine import Built
from pyfmha.trt.saved import read_plan, write_whole

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
    again = f"build it: {engine_advice()}"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("schema") != CONFIG_SCHEMA:
            raise EngineError(f"{path} is of another version of pyfmha; {again}")
        if "softmax_scale" in data:  # what files of earlier versions call it
            data["scale"] = data.pop("softmax_scale")
        engine, digest, tensorrt = (data.pop(name) for name in ("engine", "sha256", "tensorrt"))
        saved = Saved(Path(folder) / engine, EngineConfig(**data), tensorrt)
    except OSError as error:
        raise EngineError(f"no engine configuration at {path} ({error.strerror}); {again}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise EngineError(f"{path} is damaged ({type(error).__name__}: {error}); {again}") from None
    if hashlib.sha256(read_plan(saved.path)).hexdigest() != digest:
        raise EngineError(f"{saved.path} is not the engine that {path} describes; {again}")
    return saved
