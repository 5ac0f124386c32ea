"""The second half of ``pyfmha verify``: engines of one attention layer, built and run with the TensorRT installed.

For those who have the full TensorRT, which the project's own machines have not.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from pyfmha.attention.reference import LIMITS, attention_float64, relative_error
from pyfmha.attention.run import random_inputs, to_float
from pyfmha.errors import EngineError, PyfmhaError
from pyfmha.runtime.device import Device
from pyfmha.trt.attention.engine import EngineConfig, build_engine
from pyfmha.trt.attention.words import Dtype
from pyfmha.trt.creator import find_library
from pyfmha.trt.modules import find_module
from pyfmha.trt.session import Session

SHAPES = tuple((batch, seq) for seq in (1, 17, 127, 128, 129, 512) for batch in (1, 8))
NUM_HEADS = 4


@dataclass(frozen=True)
class Verified:
    """One engine at one shape.

    Attributes:
        config: the engine.
        batch, seq: the shape; 0 for a failure of the engine as a whole.
        error: relative Frobenius error of Out against float64; NaN where it could not be had.
        tactic: name of the algorithm that TensorRT chose.
        failure: what went wrong, else empty.
    """

    config: EngineConfig
    batch: int
    seq: int
    error: float
    tactic: str
    failure: str = ""

    @property
    def mask(self) -> str:
        """``"causal"`` or ``"full"``."""
        return "causal" if self.config.causal else "full"

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit; a NaN is not."""
        return self.error <= LIMITS[self.config.dtype]


def verify(dtypes: Sequence[str], head_size: int, trt_module: Any = None, device: int = 0) -> Iterator[Verified]:
    """Build an engine for each dtype, causal and full, and run it at every shape of :data:`SHAPES`.

    Args:
        dtypes: some of ``"fp16"``, ``"bf16"``, ``"fp32"``.
        head_size: of all of them.
        trt_module: as :func:`pyfmha.trt.register`; it needs a builder.
        device: number of the GPU.

    Raises:
        PyfmhaError: there is no TensorRT with a builder, no GPU or no library. What goes wrong with one engine is
            reported in its rows instead.
    """
    trt = _find_builder(trt_module)
    find_library()
    Device(device).close()
    for dtype in dtypes:
        for causal in (True, False):
            config = EngineConfig(
                NUM_HEADS, head_size, max(b for b, _ in SHAPES), max(s for _, s in SHAPES), cast("Dtype", dtype),
                causal=causal,
            )  # fmt: skip
            yield from _verify_engine(config, trt, device)


def _find_builder(trt_module: Any) -> Any:
    trt = find_module(trt_module)
    if not hasattr(trt, "Builder"):
        raise EngineError(
            f"{trt.__name__} {trt.__version__} only runs engines, and verify builds them: pip install tensorrt"
        )
    return trt


def _verify_engine(config: EngineConfig, trt: Any, device: int) -> Iterator[Verified]:
    try:
        with (
            chosen_tactics() as chosen,
            Session(build_engine(config, trt_module=trt, device=device).plan, trt_module=trt, device=device) as session,
        ):
            for batch, seq in SHAPES:
                yield _verify_shape(config, session, batch, seq, chosen)
    except PyfmhaError as failed:
        yield Verified(config, 0, 0, float("nan"), "-", str(failed))


def _verify_shape(config: EngineConfig, session: Session, batch: int, seq: int, chosen: list[str]) -> Verified:
    shape = (batch, config.num_heads, seq, config.head_size)
    q, k, v = random_inputs(config.dtype, shape, seed=seq)
    try:
        out = session.run({"Q": q, "K": k, "V": v})["Out"]
    except PyfmhaError as failed:
        return Verified(config, batch, seq, float("nan"), chosen[-1] if chosen else "-", str(failed))
    inputs = (to_float(x, config.dtype) for x in (q, k, v))
    exact = attention_float64(*inputs, scale=config.factor, causal=bool(config.causal)).out
    error = relative_error(to_float(out, config.dtype), exact)
    return Verified(config, batch, seq, error, chosen[-1] if chosen else "-")


@contextmanager
def chosen_tactics() -> Iterator[list[str]]:
    """The names of the algorithms that TensorRT chooses during the block, from the plugin's log; the last is in use."""
    chosen: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if hasattr(record, "tactic"):
                chosen.append(str(record.tactic))

    logger, handler = logging.getLogger("pyfmha"), Collect(logging.DEBUG)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield chosen
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def engine_versions(trt_module: Any = None) -> str:
    """TensorRT's name and version, if it can build engines.

    Raises:
        PluginError: no TensorRT is installed.
        EngineError: it only runs engines.
    """
    trt = _find_builder(trt_module)
    return f"{trt.__name__} {trt.__version__}"


def print_engines(
    console: Console, dtypes: Sequence[str], head_size: int, device: int = 0, trt_module: Any = None
) -> tuple[Verified, ...]:
    """Build and run the engines and print their table; returns its rows.

    Raises:
        EngineError, PluginError, DriverError, LibraryError: as :func:`verify`.
    """
    trt = _find_builder(trt_module)
    table = Table(title=f"Engines of one attention layer, {NUM_HEADS} heads of size {head_size}, against float64")
    for heading in ("dtype", "mask", "batch", "seq"):
        table.add_column(heading)
    table.add_column("relative error", justify="right")
    table.add_column("limit", justify="right")
    table.add_column("tactic, where it changes", overflow="fold")
    table.add_column("")
    rows: list[Verified] = []
    for row in verify(dtypes, head_size, trt, device):
        same = bool(rows) and (rows[-1].config, rows[-1].tactic) == (row.config, row.tactic)
        rows.append(row)
        table.add_row(
            row.config.dtype,
            row.mask,
            str(row.batch or "-"),
            str(row.seq or "-"),
            f"{row.error:.1e}",
            f"{LIMITS[row.config.dtype]:.0e}",
            "" if same else row.tactic.replace("+", "\n"),
            "[green]ok[/green]" if row.passed else "[red]FAILED[/red]",
        )
    console.print(table)
    for row in rows:
        if row.failure:
            where = f"batch {row.batch}, seq {row.seq}" if row.batch else "the engine"
            console.print(f"{row.config.dtype} {row.mask}, {where}: {row.failure}", markup=False, soft_wrap=True)
    failed = sum(not row.passed for row in rows)
    console.print(f"[red]{failed} of {len(rows)} failed[/red]" if failed else f"All {len(rows)} passed.")
    return tuple(rows)
