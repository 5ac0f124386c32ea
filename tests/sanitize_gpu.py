"""Runs compute-sanitizer over every variant for Hopper with biases, masks, sinks, functions and smaller values.

    python tests/sanitize_gpu.py build FOLDER [--dtype bf16] [--head-size 64 128 256]   # anywhere, no GPU
    pip install nvidia-cuda-sanitizer-api   # a compute-sanitizer of 2026, see below
    python tests/sanitize_gpu.py all FOLDER [--tools memcheck synccheck racecheck] [--limit SECONDS] [--out FILE]
    compute-sanitizer --tool racecheck python tests/sanitize_gpu.py run FOLDER   # what `all` starts for each tool

Each variant is launched once, by the smallest of the problems of ``pyfmha verify`` that it serves, and its output held
against float64; a tool has one process, or several with ``--parts``. Of several compute-sanitizers the newest is taken:
racecheck before 2026.1 takes warps that met at a barrier for unordered (its release notes; ``kernels/NOTES.md``), and
what it displays proves nothing. 2026.4 reports nothing of the variants for bf16 (H200, all three tools).
``--sanitizer`` names another. The exit code is 1 if a tool reports anything, an output
is wrong, or a variant has no problem, was left out for time, or did not run.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from pyfmha.aot.build import build
from pyfmha.aot.cubin import Compiler
from pyfmha.attention import hopper
from pyfmha.attention.biased import Biased
from pyfmha.bfloat16 import STORAGE
from pyfmha.errors import LaunchError
from pyfmha.functions.family import declared_in, file_of, function_specs
from pyfmha.interpreter.process import Interpreter, run_in_subprocess
from pyfmha.runtime.device import Device
from pyfmha.runtime.library import Function, Library
from pyfmha.spec.arch import parse_archs
from pyfmha.spec.kernel import KernelSpec
from pyfmha.verify.cases import Case
from pyfmha.verify.function_cases import Run, examples_in
from pyfmha.verify.variants import _arguments, _plans, check

ARCH = "sm_90"
TOOLS = ("memcheck", "synccheck", "racecheck")
FUNCTIONS = ("alibi", "t5", "prefix", "documents", "groups")
"""Of score (two), of mask with bounds (two), and of mask with lists of blocks."""
SIZES = (64, 128)
"""Head sizes of functions; all have variants of their own for these alone."""


GRACE = 8.0
"""Seconds that a process has beyond its limit, which it looks at between launches."""


def specs(dtypes: Sequence[str], sizes: Sequence[int]) -> list[KernelSpec]:
    """What has code for Hopper alone, of other types what is cut another way; and of functions what comes before."""
    made = [spec for dtype in dtypes for size in sizes for spec in Biased(dtype, size).specs()]
    known = {(spec.kernel, spec.constants) for spec in made}
    others = (
        spec for dtype in set(hopper.DTYPES) - set(dtypes) for size in sizes for spec in Biased(dtype, size).specs()
    )
    made += [spec for spec in others if (spec.kernel, spec.constants) not in known]
    with Compiler(1) as compiler:
        functions = [one for name in FUNCTIONS for one in declared_in(file_of(name), compiler.collect)]
    made += function_specs(functions, dtypes, [size for size in sizes if size in SIZES])
    return [spec for spec in made if spec.archs or "LIST" in dict(spec.constants)]


class Addresses:
    """Where the memory of a case could be: what `_arguments` asks of memory on the device."""

    def __init__(self, case: Case) -> None:
        self._next = itertools.count(1 << 30, 1 << 20)
        shift = case.shift * np.dtype(STORAGE[case.dtype]).itemsize
        self.out = self.add(None, shift)
        self.inputs = [self.add(None, shift).pointer for _ in "QKV"]
        self.lse = self.add(None, 4 * case.shift) if case.lse else None

    def add(self, _content: Any, shift: int = 0) -> Any:
        return SimpleNamespace(pointer=next(self._next) + shift)

    def integers(self, values: Sequence[int] | None) -> int:
        return 0 if values is None else self.add(values).pointer


def work_of(case: Case) -> int:
    return case.batch * case.heads * case.q_len * case.kv_len


def chosen(
    library: Library, dtypes: Sequence[str], interpret: Run = run_in_subprocess
) -> tuple[dict[str, tuple[list[Function], Case]], list[str]]:
    """By variant for Hopper the functions and the smallest case that launch it; and those that no case does. Functions
    are loaded, since what a launch would take is asked of them."""
    examples = [one for name in FUNCTIONS for one in examples_in(file_of(name))]
    found: dict[str, tuple[list[Function], Case]] = {}
    wanted: set[str] = set()
    for functions, cases in _plans(library, dtypes, 0, examples, interpret):
        last = functions[-1]
        last.load()
        wanted |= {variant.name for variant in last.manifest.algorithms[0] if "_tma_" in variant.name}
        for case in cases:
            with suppress(LaunchError):  # served by no variant that is here
                name = last.variant(*_arguments(functions, case, Addresses(case)))
                if name in wanted and (name not in found or work_of(case) < work_of(found[name][1])):
                    found[name] = functions, case
        last.unload()
    return found, sorted(wanted - found.keys())


def run(folder: Path, limit: float, part: int = 0, parts: int = 1) -> int:
    """Launch each once, or those of a part; a line for each, flushed, so that a report that follows belongs to it."""
    begun, wrong = time.time(), 0
    library, device = Library(folder / "libpyfmha.so"), Device()
    with Interpreter() as interpreter:
        plans, missing = chosen(library, ["fp16", "bf16"], interpreter.run)
        for name in missing if part == 0 else ():
            print(f"no case: {name}")
            wrong += 1
        for name, (functions, case) in list(plans.items())[part::parts]:
            if time.time() - begun > limit:
                print(f"left out: {name}")
                wrong += 1
                continue
            for function in functions:
                function.load()
            result = check(functions, case, 0, ARCH, device)
            good = not result.failure and result.variants[-1] == name
            wrong += not good
            detail = result.failure or ("" if good else f"{result.variants[-1]} ran")
            said = "right" if good else "WRONG"
            print(f"{said}: {name}, {case.name}; {time.time() - begun:.1f} s {detail}", flush=True)
            for function in functions:
                function.unload()
    return wrong


def sanitizers() -> list[tuple[str, str]]:
    """Every compute-sanitizer that is found, with its version, the newest first: of CUDA's toolkit, and of the package
    ``nvidia-cuda-sanitizer-api``."""
    installed = (Path(p).glob("nvidia/*/compute-sanitizer/compute-sanitizer") for p in sys.path if p)
    toolkits = Path("/usr/local").glob("cuda*/bin/compute-sanitizer")
    places = [shutil.which("compute-sanitizer"), *map(str, itertools.chain(toolkits, *installed))]
    found = {place: version_of(place) for place in places if place}
    return sorted(found.items(), key=lambda one: [int(n) for n in one[1].split(".")], reverse=True)


def version_of(program: str) -> str:
    """ "2025.3.1", say; "0" where it does not say."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    told = re.search(r"Version (\d+(?:\.\d+)+)", said)
    return told[1] if told else "0"


def sanitizer() -> str:
    """The newest program."""
    found = sanitizers()
    if not found:
        sys.exit("compute-sanitizer is not there: pip install nvidia-cuda-sanitizer-api, or install CUDA's toolkit")
    return found[0][0]


def reports(text: str) -> Iterator[str]:
    """What a tool reports, a line each with the variant that it is about: that of the next line of `run`."""
    pending: list[str] = []
    for line in text.splitlines():
        if told := re.match(r"========= +(?:ERROR|Error|Warning|Invalid|Barrier error|Program hit|.*hazard).*", line):
            if "SUMMARY" not in line:
                pending.append(told[0])
        elif variant := re.match(r"(?:right|WRONG): (\S+),", line):
            yield from (f"{variant[1]}: {one}" for one in pending)
            pending = []
    yield from pending


def all_tools(folder: Path, tools: Sequence[str], limit: float, out: Path | None, program: str, parts: int) -> int:
    """Side by side, a process each part of each tool; one that hangs is ended, and what it has said counts."""
    command = [sys.executable, __file__, "run", str(folder), "--limit", str(limit)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    begun, texts, codes = time.time(), {}, {}
    running: dict[tuple[str, int], tuple[Any, subprocess.Popen[str]]] = {}
    with ExitStack() as files:
        for tool, part in itertools.product(tools, range(parts)):
            said = files.enter_context(tempfile.TemporaryFile("w+"))
            line = [program, "--tool", tool, "--error-exitcode", "9", *command, "--part", str(part), str(parts)]
            running[tool, part] = (
                said,
                subprocess.Popen(line, stdout=said, stderr=subprocess.STDOUT, env=environment, start_new_session=True),
            )
        for (tool, part), (said, process) in running.items():
            try:
                process.wait(max(1.0, begun + limit + GRACE - time.time()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # the tool and what it looks at
                process.wait()
            said.seek(0)
            texts[tool, part], codes[tool, part] = said.read(), process.returncode
    results, bad = {}, 0
    for tool in tools:
        mine = [texts[tool, part] for part in range(parts)]
        told = [one for text in mine for one in reports(text)]
        lines = [line for text in mine for line in text.splitlines()]
        counts = {
            word: sum(line.startswith(word) for line in lines) for word in ("right", "WRONG", "left out", "no case")
        }
        summary = [one for one in lines if "SUMMARY" in one]
        exits = [codes[tool, part] for part in range(parts)]
        print(tool, version_of(program), {"exit": exits, **counts, "summary": summary}, flush=True)
        for one in told[:20]:
            print("  ", one)
        bad += any(exits) or bool(told) or not counts["right"]
        results[tool] = {
            "program": version_of(program), "exit": exits, **counts, "summary": summary, "reports": told, "text": mine,
        }  # fmt: skip
    if out:
        out.write_text(json.dumps(results, indent=1))
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("build", "run", "all"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", nargs="*", choices=("fp16", "bf16"), default=["bf16"])
    parser.add_argument("--head-size", nargs="*", type=int, default=[*SIZES, 256])
    parser.add_argument("--tools", nargs="*", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--limit", type=float, default=86400.0, help="seconds of a tool")
    parser.add_argument("--sanitizer", help="the program compute-sanitizer; by default the newest that is found")
    parser.add_argument("--parts", type=int, default=1, help="processes of each tool, of which each has some variants")
    parser.add_argument("--part", nargs=2, type=int, default=(0, 1), help="of run: which of how many")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.what == "build":
        made = specs(options.dtype, options.head_size)
        print(len(made), build(made, parse_archs([ARCH]), options.folder, jobs=options.jobs).library)
        return 0
    if options.what == "run":
        return bool(run(options.folder, options.limit, *options.part))
    program = options.sanitizer or sanitizer()
    return bool(all_tools(options.folder, options.tools, options.limit, options.out, program, options.parts))


if __name__ == "__main__":
    sys.exit(main())
