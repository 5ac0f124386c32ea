"""Several GPUs in one process, for a machine that has them: not a test, but a program that prints what held.

    PYTHONPATH=. python tests/two_gpus.py aot_out/libpyfmha.so --out two_gpus.json

It needs a library of this version with code for the GPUs, numpy and cuda-python; with typer and rich it also runs
``pyfmha verify`` and ``bench`` on the second GPU, with tensorrt_lean the plugin through the real binding. What needs
two GPUs and finds one is listed as not run. The exit code is 1 if anything failed. What may end the process runs in
a child. It ends within four minutes.

``--dry-run`` leaves comparisons out, of results and of memory, and only those: the fake driver keeps every launch.
"""

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from two_gpus_checks import World, check_growth, check_orders, check_refused, check_sessions, check_threads
from two_gpus_children import child_destroyed, child_fault, child_foreign, child_visible
from two_gpus_parts import (
    Failed,
    NotRun,
    device_count,
    device_id,
    hold,
    kinds_of,
    problems_of,
)

from pyfmha.errors import PyfmhaError
from pyfmha.runtime.device import Device
from pyfmha.runtime.library import Library

SECONDS = 235.0


@dataclass
class Row:
    """One check."""

    check: str
    result: str
    seconds: float
    detail: str = ""


# ------------------------------------------------------------------ children


def in_child(world: World, name: str, **environment: str) -> str:
    """Run a part in a process of its own; what it says."""
    command = [sys.executable, __file__, *world.arguments, "--child", name]
    done = _run(world, command, environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("child: ")]
    if done.returncode < 0:
        raise Failed(f"the process died of signal {-done.returncode}: {done.stderr.strip()[-400:]}")
    hold(bool(lines), f"the process said nothing, exit code {done.returncode}: {done.stderr.strip()[-600:]}")
    result, text = json.loads(lines[-1].removeprefix("child: "))
    if result == "not run":
        raise NotRun(text)
    hold(result == "ok", text)
    return str(text)


def _run(world: World, command: list[str], environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    left = world.end - time.monotonic()
    if left < 5:
        raise NotRun("no time is left")
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=left, env={**os.environ, **environment}, check=False
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        raise Failed(f"not done after {left:.0f} s: {said[-300:]}") from None


def check_visible(world: World) -> str:
    """CUDA_VISIBLE_DEVICES=1,0: the devices change places, and everything works."""
    world.second()
    ids = [device_id(number) for number in range(world.devices)]
    texts = []
    for order in ("1,0", "1"):
        text = in_child(world, "visible", CUDA_VISIBLE_DEVICES=order)
        seen, end = json.JSONDecoder().raw_decode(text)
        hold(seen == [ids[int(number)] for number in order.split(",")], f"{order}: {seen} of {ids}")
        texts.append(f"{order}: {text[end:].strip()}")
    return "; ".join(texts)


def _command(world: World, *arguments: str) -> str:
    for package in ("typer", "rich", "jinja2"):
        try:
            __import__(package)
        except ImportError:
            raise NotRun(f"pyfmha's commands need {package}, which is not installed here") from None
    command = [sys.executable, "-m", "pyfmha", *arguments, "--library", str(world.library.path)]
    done = _run(world, command, {})
    hold(done.returncode == 0, f"exit code {done.returncode}: {done.stdout[-600:]} {done.stderr[-400:]}")
    return done.stdout


def check_verify(world: World) -> str:
    """``pyfmha verify --device 1 --only library`` for fp16."""
    dtype = world.problems[0].dtype
    out = _command(world, "verify", "--device", str(world.second()), "--only", "library", "--dtype", dtype)
    return " ".join(out.strip().splitlines()[-1:])


def check_bench(world: World) -> str:
    """``pyfmha bench --device 1`` of one cell."""
    problem = world.problems[0]
    sizes = ["--seq", "512", "--head-size", str(problem.head_size), "--batch", "2", "--heads", "8", "--causal"]
    where = ["--device", str(world.second()), "-o", "/tmp/two_gpus_bench.json", "--dtype", problem.dtype]
    out = _command(world, "bench", *sizes, *where)
    return " | ".join(line.strip() for line in out.splitlines() if "ours" in line or "cuDNN" in line)[:300]


CHECKS: dict[str, Callable[[World], str]] = {
    "threads": check_threads,
    "sessions": check_sessions,
    "orders": check_orders,
    "refused": check_refused,
    "growth": check_growth,
    "destroyed": lambda world: in_child(world, "destroyed"),
    "foreign": lambda world: in_child(world, "foreign", PYFMHA_CHECK_POINTERS="1"),
    "fault": lambda world: in_child(world, "fault"),
    "visible": check_visible,
    "verify": check_verify,
    "bench": check_bench,
}
CHILDREN: dict[str, Callable[[World], str]] = {
    "destroyed": child_destroyed,
    "foreign": child_foreign,
    "fault": child_fault,
    "visible": child_visible,
}


def run_check(world: World, name: str, check: Callable[[World], str]) -> Row:
    """One row of the table."""
    begin = time.monotonic()
    try:
        if world.end - begin < 5:
            raise NotRun("no time is left")
        result, detail = "ok", check(world)
    except NotRun as error:
        result, detail = "not run", str(error)
    except (Failed, PyfmhaError) as error:
        result, detail = "FAILED", str(error)
    except Exception:
        result, detail = "FAILED", traceback.format_exc()[-1500:]
    return Row(name, result, round(time.monotonic() - begin, 1), detail)


def facts(world: World) -> dict[str, Any]:
    """Devices, driver and versions."""
    versions = {"python": sys.version.split()[0]}
    for package in ("numpy", "cuda-bindings", "torch", "triton", "tensorrt_lean_cu13_bindings", "rich"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "-"
    devices = []
    for number in range(world.devices):
        with Device(number) as device:
            devices.append({"name": device.name, "arch": device.arch, "id": device_id(number)})
            driver = device.driver_version
    manifest = world.library.manifest
    return {
        "devices": devices,
        "driver": driver,
        "versions": versions,
        "library": f"{manifest.build_id[:12]} for {manifest.archs_in_words()}, {len(world.library)} functions",
        "kinds": [kind.name for kind in world.kinds],
        "functions": [problem.function for problem in world.problems],
        "dry": world.dry,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--out", type=Path, help="JSON of the results")
    parser.add_argument("--dry-run", action="store_true", help="leave the comparisons out")
    parser.add_argument("--launches", type=int, default=10_000, help="on each device, for the growth")
    parser.add_argument("--only", nargs="+", choices=CHECKS)
    parser.add_argument("--skip", nargs="+", choices=CHECKS, default=())
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ["PYFMHA_LIBRARY"] = str(given.library.resolve())  # which plugins and sessions open, the children's too
    arguments = [str(given.library), *(["--dry-run"] if given.dry_run else []), "--launches", str(given.launches)]
    faulthandler.dump_traceback_later(SECONDS + 4, exit=True)  # what hangs, hangs in one of the threads
    library = Library(given.library)
    end = time.monotonic() + SECONDS
    world = World(library, device_count(), given.dry_run, given.launches, end, arguments)
    world.kinds, world.problems = kinds_of(library), problems_of(library)
    for problem in world.problems:
        problem.cases()  # their float64 results, once and not in threads
    if given.child:
        row = run_check(world, given.child, CHILDREN[given.child])
        print("child: " + json.dumps([row.result, row.detail]), flush=True)
        return int(row.result == "FAILED")
    known = facts(world)
    print(json.dumps(known, indent=1), flush=True)
    rows: list[Row] = []
    for name, check in CHECKS.items():
        if name in given.skip or (given.only and name not in given.only):
            continue
        rows.append(run_check(world, name, check))
        row = rows[-1]
        print(f"{row.check:10} {row.result:8} {row.seconds:6.1f} s  {row.detail}", flush=True)
        if given.out:
            given.out.write_text(json.dumps({**known, "checks": [asdict(one) for one in rows]}, indent=1) + "\n")
    failed = [row.check for row in rows if row.result == "FAILED"]
    print(f"{len(rows)} checks, {len(failed)} failed: {', '.join(failed) or '-'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
