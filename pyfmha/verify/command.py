"""``pyfmha verify``: the library's variants, then TensorRT's engines; tables to paste into a bug report."""

import importlib.metadata
import json
import math
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

import pyfmha
from pyfmha.attention.first import DTYPES
from pyfmha.errors import EngineError, PluginError, SpecError
from pyfmha.functions.family import Declared, file_of
from pyfmha.report import progress_bar
from pyfmha.runtime.device import Device
from pyfmha.runtime.library import Library
from pyfmha.spec.advice import build_command
from pyfmha.spec.words import one_of
from pyfmha.trt.creator import find_library
from pyfmha.verify.engines import Verified, engine_versions, print_engines
from pyfmha.verify.function_cases import Example, examples_in
from pyfmha.verify.variants import Checked, Summary, runs_of, summary_of, verify_library, without_code

PARTS = ("library", "engine")
MADE_WITH = "fmha_with_"
"""How the names of attention with a user's function begin."""


@dataclass(frozen=True)
class Verdict:
    """What verify found.

    Attributes:
        facts: the line with versions and devices.
        variants: of the library; empty where they were not asked for.
        failures: of single runs of variants, in words.
        engines: one a shape of an engine; empty where they were not asked for, or there is no TensorRT that builds.
        passed: whether everything did.
    """

    facts: str
    variants: tuple[Summary, ...]
    failures: tuple[str, ...]
    engines: tuple[Verified, ...]
    passed: bool

    def to_json(self) -> str:
        """For programs; a NaN is null."""
        variants = [
            {"variant": one.variant, "cases": one.cases, "error": _number(one.error), "limit": one.limit,
             "passed": one.passed}
            for one in self.variants
        ]  # fmt: skip
        engines = [
            {"dtype": one.config.dtype, "mask": one.mask, "batch": one.batch, "seq": one.seq,
             "error": _number(one.error), "tactic": one.tactic, "failure": one.failure or None, "passed": one.passed}
            for one in self.engines
        ]  # fmt: skip
        content = {"passed": self.passed, "facts": self.facts, "variants": variants, "failures": self.failures,
                   "engines": engines}  # fmt: skip
        return json.dumps(content, indent=1, allow_nan=False)


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def run_verify(
    console: Console,
    errors: Console,
    dtypes: Sequence[str],
    head_size: int,
    only: str | None = None,
    path: Path | None = None,
    random: int = 0,
    functions: Sequence[str] = (),
    device: int = 0,
) -> Verdict:
    """Check and print; returns what was found.

    Args:
        console: for the tables.
        errors: for the progress bar.
        dtypes: some of fp16, bf16, fp32.
        head_size: of the engines.
        only: one of :data:`PARTS`, or None for both. Without it, a TensorRT that is missing is no error.
        path: of the library, for its variants; None for the one that engines use.
        random: how many random problems for each production function besides.
        functions: files of users' functions, or names of some that come along, which are executed.
        device: number of the GPU.

    Raises:
        SpecError: there is no such part, or a function of ``functions`` is not in the library.
        DriverError: there is no GPU.
        LibraryError: there is no library, or it has no code for the GPU.
        EngineError, PluginError: engines alone are asked for, and there is no TensorRT that builds them.
    """
    if only not in (None, *PARTS):
        raise SpecError(f"there is no part {only!r}: {one_of(PARTS, only or '')}, or leave it out for both")
    tensorrt, missing = "", ""
    if only != "library":
        try:
            tensorrt = engine_versions()
        except (EngineError, PluginError) as error:
            if only == "engine":
                raise
            missing = str(error)
    library = find_library(path)
    examples = [one for name in functions for one in examples_in(file_of(name))]
    _check_made(library, functions, examples, dtypes)
    variants: tuple[Summary, ...] = ()
    failures: tuple[str, ...] = ()
    passed = True
    with Device(device) as gpu:
        facts = _facts(library, gpu, tensorrt)
        console.print(facts, markup=False, soft_wrap=True)
        if only != "engine":
            variants, failures, passed = _verify_library(console, errors, library, gpu, dtypes, random, examples)
    if missing:
        console.print(f"Engines were not checked: {missing}", markup=False, soft_wrap=True)
    engines = print_engines(console, dtypes, head_size, device) if tensorrt else ()
    return Verdict(facts, variants, failures, engines, passed and all(one.passed for one in engines))


def _facts(library: Library, device: Device, tensorrt: str) -> str:
    manifest = library.manifest
    try:
        cuda_python = importlib.metadata.version("cuda-python")
    except importlib.metadata.PackageNotFoundError:
        cuda_python = "of unknown version"
    return (
        f"pyfmha {pyfmha.__version__}, {tensorrt or 'no TensorRT that builds'}, Python {platform.python_version()},"
        f" numpy {np.__version__}, cuda-python {cuda_python}; {device.name} ({device.arch}), driver for CUDA"
        f" {device.driver_version}; library {manifest.build_id[:12]} for {manifest.archs_in_words()},"
        f" Triton {manifest.triton}"
    )


def _verify_library(
    console: Console,
    errors: Console,
    library: Library,
    device: Device,
    dtypes: Sequence[str],
    random: int,
    examples: Sequence[tuple[Declared, Example]],
) -> tuple[tuple[Summary, ...], tuple[str, ...], bool]:
    """The summaries, what failed in words, and whether everything passed."""
    checked: list[Checked] = []
    total = runs_of(library, device.arch, dtypes, random, examples)
    with progress_bar(errors, "verifying") as progress:
        progress(0, total, "")
        for one in verify_library(library, device, dtypes, random, examples):
            checked.append(one)
            progress(len(checked), total, one.case.name)
    summaries = summary_of(library, device.arch, checked, dtypes, examples)
    console.print(_table(summaries))
    if names := without_code(library, device.arch, dtypes):
        note = f"Not checked, without code for {device.arch}: {', '.join(names)}"
        console.print(note, markup=False, soft_wrap=True)
    known = {function.name for function, _ in examples}
    made = _made(library)
    if made - known:
        left = ", ".join(sorted(made - known))
        console.print(f"Not checked, give their files to --functions: {left}", markup=False, soft_wrap=True)
    failures = [f"{' + '.join(one.variants)}, {one.case.name}: {one.failure}" for one in checked if one.failure]
    unserved = [summary.variant for summary in summaries if not summary.cases]
    unknown = [f"{name}: no case was served by it, so nothing is known of it" for name in unserved]
    for line in (*failures, *unknown):
        console.print(line, markup=False, soft_wrap=True)
    found = tuple(summaries), (*failures, *unknown)
    if failures or unserved:
        console.print(
            f"[red]{len(failures)} of {len(checked)} runs failed, {len(unserved)} of {len(summaries)} variants did not"
            " run[/red]"
        )
        return *found, False
    console.print(f"All {len(checked)} runs passed, by {len(summaries)} variants.")
    return *found, True


def _made(library: Library, dtypes: Sequence[str] = DTYPES) -> set[str]:
    """Names of the users' functions that a library's attention was made with."""
    names = [f.name for f in library.manifest.functions if f.name.startswith(MADE_WITH)]
    return {name.removeprefix(MADE_WITH).rpartition("_d")[0] for name in names if name.rpartition("_")[2] in dtypes}


def _check_made(
    library: Library, files: Sequence[str], examples: Sequence[tuple[Declared, Example]], dtypes: Sequence[str]
) -> None:
    """Raise SpecError where a function was asked for that the library does not hold: it would pass unseen."""
    missing = sorted({function.name for function, _ in examples} - _made(library, dtypes))
    if missing:
        command = build_command(library.path, "--functions", *map(shlex.quote, files))
        raise SpecError(f"{library.path} holds no {', '.join(missing)} in {', '.join(dtypes)}; build it: {command}")


def _table(summaries: Sequence[Summary]) -> Table:
    table = Table(title="Every variant of the library against float64", title_justify="left")
    table.add_column("variant", overflow="fold")
    for heading in ("cases", "worst error", "limit"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for one in summaries:
        verdict = Text("ok", "green") if one.passed else Text("FAILED" if one.cases else "NOT RUN", "red")
        table.add_row(
            Text(one.variant),
            str(one.cases),
            "-" if one.error is None else "nan" if math.isnan(one.error) else f"{one.error:.1e}",
            "-" if one.limit is None else f"{one.limit:.0e}",
            verdict,
        )
    return table
