# Export small models of many architectures by several routes, replace their attention, prove it, and tabulate.
# Usage: python examples/maintainers/onnx_models.py [-o examples/results/onnx_models.md] [--model NAME ...] [--keep DIR]
#        [--file "LABEL=model.onnx" ...] [--parse], which asks NVIDIA's parser (pip install tensorrt_rtx) for its fields
# Needs: pip install -r examples/maintainers/onnx_models.lock '.[onnx]'. Models are made anew, with random weights.
import argparse
import collections
import contextlib
import importlib.metadata
import io
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_more_models import MORE
from onnx_small_models import MODELS, Model, Only
from torch import nn
from transformers import T5EncoderModel

from pyfmha.errors import PyfmhaError
from pyfmha.onnx.files import read_model
from pyfmha.onnx.prove import prove
from pyfmha.onnx.replace import replaced
from pyfmha.onnx.report import Report

ROUTES = (
    ("torch old", 17, "eager"), ("torch old", 17, "sdpa"), ("torch old", 20, "sdpa"),
    ("torch new", 18, "sdpa"), ("torch new", 20, "eager"), ("torch new", 23, "sdpa"), ("torch new", 24, "sdpa"),
    ("ORT optimizer", 17, "sdpa"),
)  # fmt: skip
NOTES = (
    'Small models with random weights, float32, and files that ship inside packages of the index. "torch old" and',
    '"torch new" are torch.onnx.export\'s two exporters, with eager attention or scaled_dot_product_attention in the',
    'model; "ORT optimizer" is onnxruntime.transformers\' optimizer behind the old one. Gemma 2 and Swin have eager',
    'attention only. "fields as reported": NVIDIA\'s parser (TensorRT-RTX), in a process of its own, read everything',
    "before the first plugin, whose creator got the fields that the report has.",
    "The models from DistilBERT on are by three routes, and NVIDIA's parser was not asked.",
)
PARSER: list[str] = []
"""The program that asks NVIDIA's parser, where it is to be asked."""
ALL = {**MODELS, **MORE}
OF_MORE = (1, 4, 5)
"""The routes of :data:`MORE`, where none are asked for."""
DIMS = {name: torch.export.Dim(name, min=2, max=32) for name in ("batch", "seq", "past")}


class Named(nn.Module):
    """A module called by position, as the older exporter calls it."""

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *values: torch.Tensor) -> Any:
        return self.module(**dict(zip(self.names, values, strict=True)))


def export(model: Model, route: str, opset: int, path: Path) -> None:
    """Write a model by one route."""
    names = list(model.inputs)
    module, values = Named(model.module, names), tuple(model.inputs.values())
    if route == "torch new":
        shapes = tuple({axis: DIMS[free] for axis, free in model.free.get(name, {}).items()} for name in names)
        program = torch.onnx.export(
            module, values, dynamo=True, opset_version=opset, dynamic_shapes={"values": shapes}, verbose=False,
            input_names=names,
        )  # fmt: skip
        program.save(str(path))
        return
    # Without a mask transformers looks for packed sequences, by aten::diff, which the older exporter lacks.
    model.module.unpadded = isinstance(model.module, Only) and not isinstance(model.module.model, T5EncoderModel)
    buffer = io.BytesIO()
    torch.onnx.export(
        module, values, buffer, dynamo=False, opset_version=opset,
        input_names=names, dynamic_axes=model.free,
    )  # fmt: skip
    path.write_bytes(buffer.getvalue())
    if route == "ORT optimizer":
        from onnxruntime.transformers.optimizer import optimize_model

        optimize_model(str(path), model_type="bert", num_heads=0, hidden_size=0).save_model_to_file(str(path))


def row(name: str, route: tuple[str, int, str], folder: Path) -> tuple[str, Report | None]:
    """One line of the table."""
    path = folder / "model.onnx"
    torch.manual_seed(0)
    label = f"| {name} | {route[0]}, opset {route[1]}, {route[2]} | "
    try:
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):  # exporters print
            export(ALL[name](route[2]), *route[:2], path)
    except Exception as error:  # whatever an exporter raises: it is what the table says
        return f"{label}not exported: {type(error).__name__}: {short(error)} | | | |", None
    return rewritten(label, path, folder)


def rewritten(label: str, path: Path, folder: Path) -> tuple[str, Report | None]:
    """One line of the table, of a model that is there."""
    try:
        original = read_model(path)
    except PyfmhaError as error:
        return f"{label}not read: {short(error)} | | | |", None
    new, report = replaced(original.clone())
    kinds = collections.Counter(entry.kind for entry in report.found)
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"
    features = "; ".join(sorted({str(entry.problem) for entry in report.replaced}))
    reasons = "; ".join(sorted({entry.reason for entry in report.left_alone}))
    try:
        trials = prove(original, new, folder=folder, trials=2) if report.replaced else []
        worst = max((entry.error / entry.explained for trial in trials for entry in trial.compared), default=0.0)
        verdict = f"same, {worst:.2f} of what rounding explains" if all(trial.same for trial in trials) else "DIFFERENT"
        verdict = verdict + parsed(new, report, folder) if trials else "nothing replaced"
    except PyfmhaError as error:
        verdict = f"not run: {short(error)}"
    told = " / ".join(text for text in (features, reasons) if text)
    return f"{label}{found} | {len(report.replaced)} | {told} | {verdict} |", report


def parsed(new: Any, report: Report, folder: Path) -> str:
    """What NVIDIA's parser says, in a process of its own: whether the creator gets the fields that the report has."""
    if not PARSER:
        return ""
    ir.save(new, folder / "parsed.onnx")
    command = [sys.executable, *PARSER, str(folder / "parsed.onnx"), ""]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return "; the parser ended with " + done.stderr.strip().splitlines()[-1][:80]
    answer = json.loads(done.stdout)
    known = [entry.problem.node_attributes() for entry in report.replaced if entry.problem is not None]
    # The recorder refuses the first plugin, with which the parser stops.
    if len(answer["fields"]) == 1 and answer["fields"][0] in known:
        return "; fields as reported"
    if not answer["fields"]:
        return "; the parser stops before it: " + short(Exception(" ".join(answer["errors"][-1].split())))
    return "; FIELDS DIFFERENT"


def short(error: Exception) -> str:
    """An error's first line, cut to what fits a table."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:110].replace("|", "/")


def rows(names: list[str], routes: list[int] | None, files: list[str], folder: Path) -> Iterator[str]:
    for name in names:
        for route in routes or (OF_MORE if name in MORE else range(len(ROUTES))):
            yield row(name, ROUTES[route], folder)[0]
    for entry in files:
        label, _, path = entry.partition("=")
        yield rewritten(f"| {label} | as shipped | ", Path(path), folder)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description="Replace and prove the attention of small models of many kinds.")
    parser.add_argument("-o", "--out", type=Path, help="file of the table, in Markdown")
    parser.add_argument("--model", nargs="+", choices=sorted(ALL), default=list(ALL))
    numbers = range(len(ROUTES))
    routes = "; ".join(f"{number}: {' '.join(map(str, ROUTES[number]))}" for number in numbers)
    parser.add_argument("--route", nargs="+", type=int, choices=numbers, help=routes)
    parser.add_argument("--keep", type=Path, help="folder for the last model made")
    parser.add_argument("--file", nargs="+", default=[], metavar="LABEL=PATH", help="models that are there")
    parser.add_argument("--parse", action="store_true", help="ask NVIDIA's parser which fields the creator gets")
    settings = parser.parse_args()
    PARSER.extend([str(Path(__file__).parents[2] / "tests/onnx_models/parse_with_rtx.py")] if settings.parse else [])
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    packages = ("torch", "transformers", "diffusers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    lines = [
        f"Made by `examples/maintainers/onnx_models.py` with {versions}; Python {sys.version.split()[0]}, on a CPU.",
        "",
        *NOTES, "",
        "| model | route | attention found | replaced | features, or why left alone | proof |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    different = False
    with tempfile.TemporaryDirectory() as made:
        for line in rows(settings.model, settings.route, settings.file, settings.keep or Path(made)):
            print(line, flush=True)
            lines.append(line)
            different |= "DIFFERENT" in line
    if settings.out is not None:
        settings.out.write_text("\n".join(lines) + "\n")
    return int(different)


if __name__ == "__main__":
    raise SystemExit(main())
