"""The plugin on a GPU, called through the C++ code of a real TensorRT binding, as an execution context calls it.

    python tests/trt_gpu.py aot_out/libpyfmha.so --out results.json

The library needs fp16, bf16 and fp32 of head size 64 for this GPU (``pyfmha build --head-size 64``); whatever else it
holds is checked, too, with every feature where it holds ``fmha_fwd_*``. Needs pyfmha installed, and ``tensorrt_lean``
or another binding; without one, the tests' double takes its place and the host cost is not measured. Times are compared
with torch's and Triton's, and the host cost needs a C compiler. Half a minute on an H100, and more for the features.
Exit code 1 if a check failed, 2 if there is nothing to check with.
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import trt_gpu_times
from trt_double.binding import make_binding
from trt_double.scene import calls_of
from trt_gpu_features import check_features
from trt_gpu_parts import Attached, Report, error_of, random_case, run_once

import pyfmha
import pyfmha.trt
from pyfmha.attention import DTYPES, HEAD_SIZES, Attention
from pyfmha.errors import DriverError, PyfmhaError
from pyfmha.reference import LIMITS
from pyfmha.runtime.device import Device, DeviceArray, Stream, _call
from pyfmha.runtime.graph import Graph
from pyfmha.runtime.library import Library
from pyfmha.trt import DirectSession, standin

EDGES = [(batch, seq) for batch in (1, 8) for seq in (1, 17, 127, 128, 129, 512)]
MISALIGNED_SEQS = (17, 129)


def check_numerics(report: Report, calls: Any, creator: Any, library: Library, device: Device) -> None:
    """Every function and tactic against float64, between guard bytes, also with a misaligned Q."""
    stream, rows, worst = Stream(), report.results.setdefault("numerics", []), dict.fromkeys(DTYPES, 0.0)
    members = [Attention(d, s, c) for d in DTYPES for s in HEAD_SIZES for c in (True, False)]
    for member in members:
        if member.name not in library:
            continue
        first = Attached(calls, creator, member.dtype, 3, member.head_size, member.causal)
        first.close()
        for tactic in first.tactics:
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


def check_graph(report: Report, calls: Any, creator: Any, device: Device) -> None:
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


def check_two_contexts(report: Report, calls: Any, creator: Any, device: Device) -> None:
    """Two contexts, each with its thread and stream, shapes that change at every turn."""
    problems: list[object] = []

    def work(number: int) -> None:
        try:
            device.make_current()
            attached, stream = Attached(calls, creator, "fp16", 4, 64, bool(number)), Stream()
            for turn in range(60):
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
        thread.join()
    report.check("two contexts on two streams and threads, 60 runs each", not problems, problems[:1] or "")


def check_growth(report: Report, calls: Any, creator: Any, device: Device, turns: int = 10_000) -> None:
    """Shapes that alternate, and what that costs in device memory: nothing."""
    attached, stream = Attached(calls, creator, "fp16", 4, 64, True), Stream()
    arrays = [DeviceArray(attached.shape(4, 256), np.float16) for _ in range(4)]
    workspace = DeviceArray((attached.workspace_bytes(4, 256),), np.uint8)
    for array in [*arrays, workspace]:
        array.fill(0)
    device.synchronize()
    out, *inputs = (array.pointer for array in arrays)

    def alternate(count: int) -> None:
        for turn in range(count):
            attached.prepare(*((4, 256) if turn % 2 else (1, 17)))
            attached.enqueue(inputs, out, workspace.pointer, stream.handle)
        stream.synchronize()

    alternate(100)
    free = _call("cuMemGetInfo")[0]
    alternate(turns)
    grown = free - _call("cuMemGetInfo")[0]
    report.check(f"{turns} alternating shapes without growth of device memory", grown <= 0, f"{grown} bytes")
    attached.close()
    for array in [*arrays, workspace]:
        array.free()
    stream.close()


def check_direct_session(report: Report, library: Library, trt: Any) -> None:
    """DirectSession without any TensorRT, and with the binding."""
    for module in (standin, trt):
        worst = 0.0
        with DirectSession(num_heads=4, head_size=64, library=library, trt_module=module) as session:
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
    for name in ("torch", "triton"):
        found[name] = importlib.import_module(name).__version__ if importlib.util.find_spec(name) else None
    found |= {"binding": f"{trt.__name__} {trt.__version__}", "pyfmha": pyfmha.__version__}
    return found | {"built_by_triton": library.manifest.triton, "build_id": library.manifest.build_id}


def run(library: Library, device: Device, trt: Any, why_double: str) -> Report:
    """All checks; what one raises is its failure, and the others go on."""
    report = Report(**about(device, library, trt))
    report.line(", ".join(f"{name} {value}" for name, value in report.results.items() if isinstance(value, str)))
    if why_double:
        report.skip("the real binding", why_double)
    made, calls = pyfmha.trt.register(trt, library=library), calls_of(trt)
    creator = trt.get_plugin_registry().get_creator("TritonFlashAttention", "1", "")
    report.check("the registry gives the creator back", creator is made)
    plugin, both = (report, calls, creator), (report, calls, creator, library, device)
    parts: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
        (check_graph, (*plugin, device)),
        (check_numerics, both),
        (check_features, both),
        (check_two_contexts, (*plugin, device)),
        (check_growth, (*plugin, device)),
        (check_direct_session, (report, library, trt)),
        (trt_gpu_times.measure_host, both),
    ]
    if report.results["torch"] and report.results["triton"]:
        parts += [(trt_gpu_times.check_torch_capture, plugin), (trt_gpu_times.compare_times, both)]
    else:
        report.skip("capture by torch, times beside Triton's and torch's", "torch or triton is not installed")
    for part, arguments in parts:
        try:
            part(*arguments)
        except Exception as error:
            traceback.print_exc()
            report.check(part.__name__, False, repr(error))
    report.results |= {"seconds": round(report.seconds(), 1), "passed": report.passed}
    return report


def main() -> int:
    """Check, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, help="libpyfmha.so, or the folder it is in")
    parser.add_argument("--binding", default="tensorrt_lean", help="the TensorRT module (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # as the library is built
    path = options.library / "libpyfmha.so" if options.library.is_dir() else options.library
    try:
        report = run(Library(path), Device(), *find_binding(options.binding))
    except PyfmhaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report.results, indent=1) + "\n")
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
