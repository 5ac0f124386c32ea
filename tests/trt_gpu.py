"""The plugin on a GPU, called through the C++ code of a real TensorRT binding, as an execution context calls it.

    python tests/trt_gpu.py aot_out/libpyfmha.so --out results.json [--only graph features ...]

The library needs fp16, bf16 and fp32 of head size 64 for this GPU (``pyfmha build --head-size 64``); whatever else it
holds is checked, too, with every feature where it holds ``fmha_fwd_*``. Needs pyfmha installed, and ``tensorrt_lean``
or another binding; without one, the tests' double takes its place and the host cost is not measured. Times are compared
with torch's and Triton's, and the host cost needs a C compiler. Each part has a time, and all of them have --limit: a
part that has used up its own stops, which is a failed check; one that hangs ends the script, with the place where it
hangs. Exit code 1 if a check failed or the script was ended, 2 if there is nothing to check with.
"""

import argparse
import faulthandler
import gc
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

# Before numpy is there. The matrices of the references are small: threads for them wait for each other only.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import trt_gpu_times
from trt_double import Calls
from trt_double.binding import make_binding
from trt_double.scene import calls_of
from trt_gpu_features import check_features
from trt_gpu_parts import Attached, Report, error_of, random_case, run_once

import pyfmha
import pyfmha.trt
from pyfmha.attention.first import DTYPES, HEAD_SIZES, Attention
from pyfmha.attention.reference import LIMITS
from pyfmha.errors import DriverError, PyfmhaError
from pyfmha.runtime.device import Device, DeviceArray, Stream, _call
from pyfmha.runtime.graph import Graph
from pyfmha.runtime.library import Library
from pyfmha.trt import DirectSession, standin

EDGES = [(batch, seq) for batch in (1, 8) for seq in (1, 17, 127, 128, 129, 512)]
MISALIGNED_SEQS = (17, 129)
TURNS = 10_000
LIMIT = 120.0
GRACE = 15.0
"""Seconds that a part has to notice that its time is over: more than the compilation of a kernel takes."""


def check_numerics(report: Report, calls: Calls, creator: Any, library: Library, device: Device) -> None:
    """Every function and tactic against float64, between guard bytes, also with a misaligned Q."""
    stream, rows, worst = Stream(), report.results.setdefault("numerics", []), dict.fromkeys(DTYPES, 0.0)
    members = [Attention(d, s, c) for d in DTYPES for s in HEAD_SIZES for c in (True, False)]
    for member in members:
        if member.name not in library:
            continue
        report.progress(f"numerics: {len(rows)} runs, {member.name}")
        first = Attached(calls, creator, member.dtype, 3, member.head_size, member.causal)
        first.close()
        for tactic in first.tactics:
            if report.late():
                break
            attached = Attached(calls, creator, member.dtype, 3, member.head_size, member.causal, tactic)
            for batch, seq in EDGES if member.head_size == 64 else [(2, 129)]:
                for misaligned in (False, True) if seq in MISALIGNED_SEQS else (False,):
                    error, clean = run_once(attached, batch, seq, seq + batch, device, stream, misaligned)
                    row = {"function": member.name, "tactic": tactic, "algorithm": attached.plugin.tactic.name}
                    row |= {"batch": batch, "seq": seq, "misaligned": misaligned, "error": error, "clean": clean}
                    rows.append({**row, "passed": error <= LIMITS[member.dtype] and clean})
                    worst[member.dtype] = float(np.maximum(worst[member.dtype], error))  # a NaN stays
            attached.close()
    stream.close()
    bad = [row for row in rows if not row["passed"]]
    held = {dtype for dtype in DTYPES if Attention(dtype, 64).name in library}
    report.check("the library holds every dtype at head size 64", held == set(DTYPES), sorted(set(DTYPES) - held) or "")
    errors = ", ".join(f"{dtype} {error:.1e}" for dtype, error in worst.items())
    report.check(
        f"numerics: {len(rows)} runs, every tactic, guard bytes intact", bool(rows) and not bad, bad[:3] or errors
    )


def check_graph(report: Report, calls: Calls, creator: Any, library: Library, device: Device) -> None:
    """Captured by pyfmha.runtime.graph, replayed with contents that copies in the stream's order change."""
    attached, stream = Attached(calls, creator, "fp16", 4, 64, True), Stream()
    shape = attached.shape(2, 300)
    attached.prepare(2, 300)
    arrays = {name: DeviceArray(shape, np.float16) for name in ("Q", "K", "V", "Out")}
    workspace = DeviceArray((attached.workspace_bytes(2, 300),), np.uint8)
    inputs = [arrays[name].pointer for name in "QKV"]

    def work() -> None:
        attached.enqueue(inputs, arrays["Out"].pointer, workspace.pointer, stream.handle)

    work()
    graph, worst = Graph(stream, work), 0.0
    for seed in range(10):
        tensors, exact = random_case("fp16", shape, True, seed)
        kept = [arrays[name].send(values, stream) for name, values in zip("QKV", tensors, strict=True)]
        graph.launch(stream)
        out = arrays["Out"].fetch(shape, np.float16, stream)
        stream.synchronize()
        del kept
        worst = float(np.maximum(worst, error_of(out, "fp16", exact)))
    graph.close()
    report.check(
        "CUDA graph: captured, replayed 10 times with changed contents", worst <= LIMITS["fp16"], f"{worst:.1e}"
    )
    refused = ""
    try:
        Graph(stream, device.synchronize)
    except DriverError as error:
        refused = str(error)
    report.check("a capture that waits is refused", bool(refused), refused)
    work()
    stream.synchronize()
    again = error_of(arrays["Out"].to_host(), "fp16", exact)
    report.check("after a refused capture the stream is as it was", again <= LIMITS["fp16"], f"{again:.1e}")
    attached.close()
    for array in [*arrays.values(), workspace]:
        array.free()
    stream.close()


def check_two_contexts(report: Report, calls: Calls, creator: Any, library: Library, device: Device) -> None:
    """Two contexts, each with its thread and stream, shapes that change at every turn."""
    problems: list[object] = []

    def work(number: int) -> None:
        try:
            device.make_current()
            attached, stream = Attached(calls, creator, "fp16", 4, 64, bool(number)), Stream()
            for turn in range(60):
                if report.late():
                    break
                batch, seq = 1 + turn % 3, 33 + 61 * (turn % 5) + number
                error, clean = run_once(attached, batch, seq, 100 * number + turn, device, stream)
                if not error <= LIMITS["fp16"] or not clean:
                    problems.append((number, turn, error, clean))
            attached.close()
            stream.close()
        except Exception:
            problems.append(traceback.format_exc())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(1)
            report.progress("two contexts")
    report.check("two contexts on two streams and threads, 60 runs each", not problems, problems[:1] or "")


def check_growth(report: Report, calls: Calls, creator: Any, library: Library, device: Device) -> None:
    """Shapes that alternate, and what that costs in device memory: nothing."""
    attached, stream = Attached(calls, creator, "fp16", 4, 64, True), Stream()
    arrays = [DeviceArray(attached.shape(4, 256), np.float16) for _ in range(4)]
    workspace = DeviceArray((attached.workspace_bytes(4, 256),), np.uint8)
    for array in [*arrays, workspace]:
        array.fill(0)
    device.synchronize()
    out, *inputs = (array.pointer for array in arrays)

    def alternate(count: int) -> int:
        for turn in range(count):
            if turn % 100 == 0 and report.late():
                return turn
            report.progress(f"growth: {turn} of {count}")
            attached.prepare(*((4, 256) if turn % 2 else (1, 17)))
            attached.enqueue(inputs, out, workspace.pointer, stream.handle)
        stream.synchronize()
        return count

    alternate(100)
    free = _call("cuMemGetInfo")[0]
    turns = alternate(TURNS)
    grown = free - _call("cuMemGetInfo")[0]
    report.check(f"{turns} alternating shapes without growth of device memory", grown <= 0, f"{grown} bytes")
    attached.close()
    for array in [*arrays, workspace]:
        array.free()
    stream.close()


def check_session(report: Report, calls: Calls, creator: Any, library: Library, device: Device) -> None:
    """DirectSession without any TensorRT, and with the binding."""
    for module in (standin, calls.trt):
        worst = 0.0
        with DirectSession(num_heads=4, head_size=64, causal=True, library=library, trt_module=module) as session:
            for batch, seq in ((1, 17), (2, 129), (1, 512)):
                arrays, exact = random_case("fp16", (batch, 4, seq, 64), True, seq)
                out = session.run(dict(zip("QKV", arrays, strict=True)))["Out"]
                worst = float(np.maximum(worst, error_of(out, "fp16", exact)))
        report.check(f"DirectSession with {module.__name__}", worst <= LIMITS["fp16"], f"{worst:.1e}")


def find_binding(name: str) -> tuple[Any, str]:
    """A TensorRT module, or the tests' double and the reason."""
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return make_binding(), f"{name} cannot be imported ({error}); the tests' double takes its place"


def about(device: Device, library: Library, trt: Any) -> dict[str, Any]:
    """What everything is measured on and with."""
    driver = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
        driver = answer[0] if answer else None
    found: dict[str, Any] = {"device": device.name, "arch": device.arch, "driver": driver}
    found |= {"driver_cuda": device.driver_version, "python": platform.python_version(), "numpy": np.__version__}
    found |= {name: _version(name) for name in ("torch", "triton")}
    found |= {"binding": f"{trt.__name__} {trt.__version__}", "pyfmha": pyfmha.__version__}
    return found | {"built_by_triton": library.manifest.triton, "build_id": library.manifest.build_id}


def _version(name: str) -> str | None:
    """A package's version without its import: torch's takes seconds, and makes the garbage collector slow."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return str(importlib.import_module(name).__version__)


class Part(NamedTuple):
    """One part: what it does, the seconds that it has, several times what it took where measured, what it needs."""

    check: Callable[[Report, Calls, Any, Library, Device], None]
    seconds: float
    torch: bool = False


PARTS = {
    "graph": Part(check_graph, 10),
    "numerics": Part(check_numerics, 20),
    "features": Part(check_features, 25),
    "contexts": Part(check_two_contexts, 10),
    "growth": Part(check_growth, 10),
    "session": Part(check_session, 10),
    "host": Part(trt_gpu_times.measure_host, 25),
    "capture": Part(trt_gpu_times.check_torch_capture, 20, torch=True),
    "times": Part(trt_gpu_times.compare_times, 50, torch=True),
}


def run(
    library: Library, device: Device, trt: Any, why_double: str, only: Collection[str], limit: float, out: Path | None
) -> Report:
    """The checks of some parts; what one raises is its failure, and the others go on."""
    report = Report(out, **about(device, library, trt))
    report.line(", ".join(f"{name} {value}" for name, value in report.results.items() if isinstance(value, str)))
    if why_double:
        report.skip("the real binding", why_double)
    made, calls = pyfmha.trt.register(trt, library=library), calls_of(trt)
    creator = trt.get_plugin_registry().get_creator("TritonFlashAttention", "1", "")
    report.check("the registry gives the creator back", creator is made)
    for name, part in PARTS.items():
        if name not in only:
            continue
        if part.torch and not (report.results["torch"] and report.results["triton"]):
            report.skip(name, "torch or triton is not installed")
            continue
        left = max(limit - report.seconds(), 0.0)
        faulthandler.dump_traceback_later(max(min(part.seconds + GRACE, left), 1.0), exit=True)
        # The plugins' creation collects garbage, hundreds of times: modules and leftovers are not to be gone through.
        gc.collect()
        gc.freeze()
        with report.part(name, min(part.seconds, 0.9 * left)):
            part.check(report, calls, creator, library, device)
        faulthandler.cancel_dump_traceback_later()
    report.results["finished"] = True
    report.save()
    return report


def main() -> int:
    """Check, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, help="libpyfmha.so, or the folder it is in")
    parser.add_argument("--binding", default="tensorrt_lean", help="the TensorRT module (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the results, written as they come")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all of it (default: %(default)s)")
    options = parser.parse_args()
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # as the library is built
    path = options.library / "libpyfmha.so" if options.library.is_dir() else options.library
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        binding = find_binding(options.binding)
        report = run(Library(path), Device(), *binding, options.only, options.limit, options.out)
    except PyfmhaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    checks = report.results["checks"]
    failed = [entry["name"] for entry in checks if not entry["passed"]]
    skipped = len(report.results["skipped"])
    report.line(f"{len(checks)} checks, {len(failed)} failed, {skipped} skipped; {report.seconds():.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # plugins that the binding owns cannot be torn down in just any order
