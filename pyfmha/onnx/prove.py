"""The proof: both models on the same random inputs, and the difference of each output beside what rounding explains."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from pyfmha.attention.reference import LIMITS, relative_error
from pyfmha.errors import OnnxError
from pyfmha.onnx.inputs import SIZES, random_inputs, sizes_of
from pyfmha.onnx.plugin_node import problem_of_node
from pyfmha.onnx.staged import Runner, Staged, is_ours

MARGIN = 4
"""How much more than a disturbance moves an output may differ: both models round, and not the same numbers."""

FLOOR = 16
"""In units of the last place: the least difference that rounding explains."""


@dataclass(frozen=True)
class Compared:
    """One output of both models.

    Attributes:
        output: its name.
        shape: of the output.
        error: relative Frobenius norm of the difference, where the original has numbers; NaN if ours has none there.
        explained: what rounding explains: how far the output moves when every attention's result is disturbed by the
            largest error that the project's kernels may have (:data:`pyfmha.attention.reference.LIMITS`).
        holes: how many elements of the original are NaN or infinite.
    """

    output: str
    shape: tuple[int, ...]
    error: float
    explained: float
    holes: int = 0

    @property
    def same(self) -> bool:
        """Whether rounding explains the difference."""
        return self.error <= self.explained


@dataclass(frozen=True)
class Trial:
    """One run of both models.

    Attributes:
        sizes: of the free axes.
        compared: an entry an output.
        original_by: who ran the original.
    """

    sizes: dict[str, int]
    compared: tuple[Compared, ...]
    original_by: str = "ONNX Runtime"

    @property
    def same(self) -> bool:
        """Whether rounding explains every difference."""
        return all(entry.same for entry in self.compared)


def prove(
    original: ir.Model,
    rewritten: ir.Model,
    *,
    folder: Path | None = None,
    sizes: Mapping[str, int] | None = None,
    trials: int = 3,
    seed: int = 0,
) -> list[Trial]:
    """Run both models, and compare.

    Args:
        original, rewritten: the models.
        folder: of external weights.
        sizes: of free axes by name; the others are chosen, anew for each trial.
        trials: how many runs, with at most as many sizes as :data:`pyfmha.onnx.inputs.SIZES` has.
        seed: of the inputs.

    Raises:
        OnnxError: ONNX Runtime cannot run one of them.
        PluginError: a node of ours gets what the plugin does not take.
    """
    whole, staged = Runner(original, folder), Staged(rewritten, folder)
    ours = [node for node in rewritten.graph.all_nodes() if is_ours(node)]
    limit = max((LIMITS[problem_of_node(node).dtype] for node in ours), default=0.0)
    done: list[Trial] = []
    for trial in range(trials):
        chosen = sizes_of(original.graph, trial, sizes or {})
        if any(chosen == earlier.sizes for earlier in done) and trial >= len(SIZES):
            break
        inputs = random_inputs(original.graph, chosen, seed + trial)
        expected = _expected(whole, inputs, chosen)
        done.append(Trial(chosen, _compared(staged, inputs, expected, limit, seed + trial), whole.by))
    return done


def _expected(whole: Runner, inputs: Mapping[str, Any], sizes: Mapping[str, int]) -> Mapping[str, Any]:
    """What the original answers."""
    try:
        return whole.run(inputs)
    except OnnxError as error:
        given = ", ".join(f"{name}={size}" for name, size in sizes.items())
        hint = "; give sizes that go together: --size NAME=NUMBER" if sizes else ""
        raise OnnxError(f"the original does not run with {given or 'its sizes'}: {error}{hint}") from None


def _compared(
    staged: Staged, inputs: Mapping[str, Any], expected: Mapping[str, Any], limit: float, seed: int
) -> tuple[Compared, ...]:
    ours = staged.run(inputs)
    random = np.random.default_rng(seed)

    def disturbed(out: Any) -> Any:
        return out + limit * np.sqrt(np.mean(out * out)) * random.standard_normal(out.shape)

    moved = [staged.run(inputs, disturbed) for _ in range(2)]
    result = []
    for name, wanted in expected.items():
        got, kept = ours[name], np.isfinite(wanted.astype(np.float64))
        error = _error(got, wanted, kept) if got.shape == wanted.shape else float("inf")
        last = _last_place(wanted.dtype)
        explained = MARGIN * max(_error(other[name], got, kept) for other in moved) + FLOOR * last
        result.append(Compared(name, wanted.shape, error, explained, int(kept.size - np.count_nonzero(kept))))
    return tuple(result)


def _last_place(dtype: Any) -> float:
    """The relative distance between two numbers of a type; 0 for whole numbers. numpy holds bfloat16 by ml_dtypes."""
    if dtype.name == "bfloat16":
        return 2.0**-9  # a quarter of it: sixteen whole ones are 12 %, and would explain what is wrong
    return float(np.finfo(dtype).eps) if dtype.kind == "f" else 0.0


def _error(got: Any, wanted: Any, kept: Any) -> float:
    return relative_error(got.astype(np.float64)[kept], wanted.astype(np.float64)[kept])
