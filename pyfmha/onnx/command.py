"""What ``pyfmha onnx`` does: read, replace, prove, write; nothing is written before all of it has succeeded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pyfmha.errors import LibraryError, OnnxError
from pyfmha.onnx.files import check_target, read_model, write_model, write_report
from pyfmha.onnx.prove import Trial, prove
from pyfmha.onnx.replace import replaced
from pyfmha.onnx.report import Report
from pyfmha.runtime.find import built_library
from pyfmha.runtime.library import describe


@dataclass(frozen=True)
class Done:
    """What came of a model.

    Attributes:
        report: what was found and replaced.
        held: the functions of the library that was looked into, by name; None where there is none.
        trials: the proof; empty where none was asked for.
    """

    report: Report
    held: frozenset[str] | None
    trials: tuple[Trial, ...]

    @property
    def same(self) -> bool:
        """Whether no trial shows a difference."""
        return all(trial.same for trial in self.trials)


def rewrite(
    source: Path,
    target: Path,
    *,
    report_path: Path | None = None,
    library: Path | None = None,
    proof: bool = False,
    sizes: Mapping[str, int] | None = None,
    trials: int = 3,
) -> Done:
    """Rewrite a model's attention.

    Args:
        source: the model.
        target: the new model, never the same file. It is not written if the proof fails.
        report_path: for the report as JSON, which is written also if the proof fails.
        library: which must hold the functions that the new model needs; by default ``aot_out/libpyfmha.so`` is looked
            into if it is there, and may lack them.
        proof, sizes, trials: whether to run both models, and :func:`pyfmha.onnx.prove.prove`'s arguments.

    Raises:
        OnnxError: the model cannot be read, has no attention, or none that can be replaced; or a model does not run.
        LibraryError: the library given lacks functions.
        OutputError: a file cannot be written.
    """
    original = read_model(source)
    check_target(source, target)
    new, report = replaced(original.clone())
    _check_found(source, report)
    held = _held(library, report)
    done: list[Trial] = []
    if proof:
        done = prove(original, new, folder=source.resolve().parent, sizes=sizes, trials=trials)
    result = Done(report, held, tuple(done))
    if result.same:
        write_model(new, target)
    if report_path is not None:
        write_report(_described(result), report_path)
    return result


def _check_found(source: Path, report: Report) -> None:
    if not report.found:
        raise OnnxError(f"{source} has no attention")
    if not report.replaced:
        reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in report.left_alone[:3])
        more = len(report.left_alone) - 3
        others = f"; and {more} more" if more > 0 else ""
        raise OnnxError(f"none of the {len(report.found)} attentions of {source} can be replaced: {reasons}{others}")


def _held(library: Path | None, report: Report) -> frozenset[str] | None:
    path = built_library() if library is None else library
    if path is None:
        return None
    manifest = describe(path)
    held = frozenset(function.name for function in manifest.functions)
    missing = report.missing(held)
    if library is not None and missing:
        raise LibraryError(f"{library} lacks {', '.join(missing)}; build a library with them: {report.build_command}")
    return held


def _described(done: Done) -> dict[str, object]:
    described: dict[str, object] = done.report.as_dict()
    if done.held is not None:
        described["missing"] = done.report.missing(done.held)
    if done.trials:
        described["proof"] = [
            {
                "sizes": trial.sizes,
                "original by": trial.original_by,
                "outputs": [
                    {"name": entry.output, "shape": list(entry.shape), "error": entry.error,
                     "explained": entry.explained, "same": entry.same}
                    for entry in trial.compared
                ],
            }
            for trial in done.trials
        ]  # fmt: skip
    return described
