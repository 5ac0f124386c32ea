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
import random
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from two_gpus_parts import (
    NUM_HEADS,
    SCALE,
    Buffers,
    Case,
    Direct,
    Failed,
    Kind,
    NotRun,
    OwnContext,
    Problem,
    Runner,
    access_to,
    buffers_of,
    device_count,
    device_id,
    free_bytes,
    hold,
    kinds_of,
    may_access,
    open_context,
    problems_of,
    resident_bytes,
)

from pyfmha.errors import DriverError, LaunchError, PyfmhaError
from pyfmha.runtime.device import Device, Stream, _call
from pyfmha.runtime.graph import Graph
from pyfmha.runtime.library import Library
from pyfmha.trt.attention.direct import DirectSession

SECONDS = 235.0
THREADS = 8
GROWTH = 1 << 20
"""Bytes by which 10,000 launches may grow the process: 100 a launch would be a leak."""

GRAIN = 2 << 20
"""Bytes in which the driver takes device memory."""


@dataclass
class Row:
    """One check."""

    check: str
    result: str
    seconds: float
    detail: str = ""


@dataclass
class World:
    """What every check is given."""

    library: Library
    devices: int
    dry: bool
    launches: int
    end: float
    arguments: list[str]
    kinds: list[Kind] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def second(self) -> int:
        """The number of the second GPU."""
        if self.devices < 2:
            raise NotRun("needs two GPUs")
        return 1

    @property
    def first_case(self) -> Case:
        """Of the first kernel."""
        plain = [problem for problem in self.problems if not problem.newer]
        if not plain:
            raise NotRun("the library holds no function of the first kernel (pyfmha build --kernels basic)")
        return plain[0].cases()[0]


def in_threads(works: list[Callable[[], None]]) -> None:
    """Run all at once; fails with what the first that failed says."""
    failures: list[str] = []
    followed: list[str] = []  # of threads that only missed another
    gate = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        try:
            gate.wait()
            work()
        except (Failed, PyfmhaError) as error:
            failures.append(f"{type(error).__name__}: {error}")
        except threading.BrokenBarrierError:
            followed.append("another thread did not come")
        except BaseException:
            failures.append(traceback.format_exc())

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failures += followed
    if failures:
        raise Failed(f"{len(failures)} of {len(works)} threads: {failures[0]}")


@contextmanager
def context_on(ordinal: int, *, own: bool = False) -> Iterator[Stream]:
    """A context on a device, current, with a stream."""
    with ExitStack() as stack:
        context = open_context(ordinal, own=own)
        stack.callback(context.close)
        stream = Stream()
        stack.callback(stream.close)
        yield stream


# ------------------------------------------------------------------- threads


def check_threads(world: World) -> str:
    """Threads over all devices, each with a context, stream and plugins of its own, shapes in turns, graphs."""
    counts = [0] * THREADS

    def work(number: int) -> None:
        chance = random.Random(number)
        with context_on(number % world.devices, own=number % 4 >= 2) as stream:
            counts[number] = _one_thread(world, stream, chance)

    in_threads([lambda number=number: work(number) for number in range(THREADS)])
    return f"{sum(counts)} results of {len(world.kinds)} kinds of plugins, {len(world.problems)} functions, and graphs"


def _one_thread(world: World, stream: Stream, chance: random.Random) -> int:
    done = 0
    with ExitStack() as stack:
        runners = [Runner(kind, problem) for kind in world.kinds for problem in world.problems]
        for runner in runners:
            stack.callback(runner.close)
        held = {}
        for case in [case for problem in world.problems for case in problem.cases()]:
            held[case] = stack.enter_context(buffers_of(case, stream))
        for _ in range(3):
            for runner in chance.sample(runners, len(runners)):
                case = chance.choice(runner.problem.cases())
                done += _run_once(world, runner, held[case], stream, chance.randrange(2))
        for runner in chance.sample(runners, len(runners)):
            done += _replay(world, runner, held[chance.choice(runner.problem.cases())], stream)
        directs = [case for case in held if not case.problem.newer]
        chance.shuffle(directs)
        for case in directs:
            direct = Direct(world.library, case)
            stack.callback(direct.close)
            held[case].send(1)
            direct.launch(held[case].pointers, stream.handle)
            held[case].check(1, "function", world.dry)
            done += 1
    return done


def _run_once(world: World, runner: Runner, buffers: Buffers, stream: Stream, number: int) -> int:
    runner.prepare(buffers.case)
    buffers.send(number)
    runner.enqueue(buffers.pointers, stream.handle)
    buffers.check(number, runner.kind.name, world.dry)
    return 1


def _replay(world: World, runner: Runner, buffers: Buffers, stream: Stream) -> int:
    """Capture a launch, then replay it over other inputs."""
    runner.prepare(buffers.case)
    graph = Graph(stream, lambda: runner.enqueue(buffers.pointers, stream.handle))
    try:
        for number in (0, 1, 0):
            buffers.send(number)
            graph.launch(stream)
            buffers.check(number, f"{runner.kind.name} as a graph", world.dry)
    finally:
        graph.close()
    return 3


def check_sessions(world: World) -> str:
    """DirectSession on every device by threads, which take turns over both; arrays in, arrays out."""
    problem = world.first_case.problem

    def work(number: int) -> None:
        with ExitStack() as stack:
            sessions = [
                stack.enter_context(
                    DirectSession(
                        num_heads=NUM_HEADS, head_size=problem.head_size, causal=True, dtype=problem.dtype, scale=SCALE,
                        library=world.library, device=(number + step) % world.devices,
                    )
                )
                for step in range(2)
            ]  # fmt: skip
            for step in range(6):  # the context that is current is that of the other session
                case = problem.cases()[(number + step) % 3]
                given = dict(zip("QKV", case.inputs[step % 2], strict=True))
                case.check(sessions[step % 2].run(given)["Out"], step % 2, "DirectSession", world.dry)

    in_threads([lambda number=number: work(number) for number in range(4)])
    return "24 results, the other device's context current before each"


def check_orders(world: World) -> str:
    """Load and unload in any order, in contexts of all devices: counted, and each for itself."""
    case, chance = world.first_case, random.Random(7)
    function = world.library[case.problem.function]
    with ExitStack() as stack:
        contexts: list[Any] = []
        for number in range(2 * world.devices):
            contexts.append(open_context(number % world.devices, own=number >= world.devices))
            stack.callback(contexts[-1].close)
            stack.callback(contexts[-1].make_current)
        streams, held = [], []
        for context in contexts:
            context.make_current()
            streams.append(Stream())
            stack.callback(streams[-1].close)
            held.append(stack.enter_context(buffers_of(case, streams[-1])))
            stack.callback(context.make_current)
        counts, launched, refused = [0] * len(contexts), 0, 0
        for _ in range(40):
            at = chance.randrange(len(contexts))
            contexts[at].make_current()
            if chance.random() < 0.5:
                function.load()
                counts[at] += 1
            elif counts[at]:
                function.unload()
                counts[at] -= 1
            at = chance.randrange(len(contexts))
            contexts[at].make_current()
            good = _launches(world, case, held[at], streams[at])
            hold(good == (counts[at] > 0), f"context {at} with {counts[at]} loads: the launch was {good}")
            launched, refused = launched + good, refused + (not good)
        for context, count in zip(contexts, counts, strict=True):
            context.make_current()
            for _ in range(count):
                function.unload()
    return f"{launched} launches right, {refused} refused where it was not loaded, in {len(contexts)} contexts"


def _launches(world: World, case: Case, buffers: Buffers, stream: Stream) -> bool:
    """Whether the function launches in the current context as it is loaded there; the result is right, then."""
    direct = Direct(world.library, case, load=False)
    buffers.send(0)
    try:
        direct.launch(buffers.pointers, stream.handle)
        buffers.check(0, "function", world.dry)
    except LaunchError as error:
        hold("not loaded" in str(error), f"refused for another reason: {error}")
        return False
    finally:
        stream.synchronize()
        direct.close()
    return True


def check_refused(world: World) -> str:
    """Launches that are refused on one device, while the other works: its results stay right, and so do the next."""
    second = world.second()
    case = world.first_case
    done = threading.Event()
    counts = [0, 0]

    def refused() -> None:
        try:
            with context_on(0) as stream, buffers_of(case, stream) as buffers:
                direct = Direct(world.library, case)
                good = direct.arguments(buffers.pointers, stream.handle)
                bad = {
                    "a null Q": (4, 0),
                    "a misaligned Q": (4, good[4] + 1),
                    "a grid too large": (9, (1 << 31) - 1),
                    "a negative batch": (8, -1),
                }
                for _ in range(20):
                    for what, (index, value) in bad.items():
                        try:
                            direct.function(*good[:index], value, *good[index + 1 :])
                        except LaunchError:
                            counts[0] += 1
                        else:
                            raise Failed(f"{what} was launched")
                    buffers.send(0)
                    direct.launch(buffers.pointers, stream.handle)
                    buffers.check(0, "the device of the refusals", world.dry)
                direct.close()
        finally:
            done.set()

    def works() -> None:
        with context_on(second) as stream, buffers_of(case, stream) as buffers:
            direct = Direct(world.library, case)
            while not done.is_set() or not counts[1]:
                buffers.send(1)
                direct.launch(buffers.pointers, stream.handle)
                buffers.check(1, "the other device", world.dry)
                counts[1] += 1
            direct.close()

    in_threads([refused, works])
    return f"{counts[0]} refusals on device 0 beside {counts[1]} right results on device {second}"


def check_growth(world: World) -> str:
    """Launches on all devices by a thread each: functions, plugins and graphs; neither host nor device memory grows."""
    texts: list[str] = [""] * world.devices
    case = world.first_case
    settled, measured = threading.Barrier(world.devices + 1), threading.Barrier(world.devices + 1)
    resident: list[int] = []

    def work(ordinal: int) -> None:
        with context_on(ordinal) as stream, buffers_of(case, stream) as buffers, ExitStack() as stack:
            direct = Direct(world.library, case)
            stack.callback(direct.close)
            runners = [Runner(kind, case.problem) for kind in world.kinds]
            ways: list[Callable[[], Any]] = [lambda: direct.launch(buffers.pointers, stream.handle)]
            for runner in runners:
                stack.callback(runner.close)
                runner.prepare(case)
                ways.append(runner.prepared(buffers.pointers, stream.handle))
            graph = Graph(stream, ways[0])
            stack.callback(graph.close)
            ways.append(lambda: graph.launch(stream))
            buffers.send(0)

            def launch(count: int) -> None:
                for number in range(count):
                    hold(ways[number % len(ways)]() in (None, 0), "a launch failed")
                    if number % 100 == 99:
                        stream.synchronize()
                stream.synchronize()

            launch(max(world.launches // 5, 100))
            before = free_bytes()
            settled.wait()
            settled.wait()  # the memory of the process was read between
            launch(world.launches)
            measured.wait()
            lost = before - free_bytes()
            buffers.check(0, "after all launches", world.dry)
            texts[ordinal] = f"device {ordinal}: {lost} bytes less are free"
            hold(lost <= GRAIN, f"{texts[ordinal]} after {world.launches} launches")

    def watch() -> None:
        settled.wait()
        resident.append(resident_bytes())
        settled.wait()
        measured.wait()
        resident.append(resident_bytes())

    def guarded(run: Callable[[], None]) -> Callable[[], None]:
        def one() -> None:
            try:
                run()
            except BaseException:
                settled.abort()
                measured.abort()
                raise

        return one

    in_threads([guarded(watch), *(guarded(lambda ordinal=ordinal: work(ordinal)) for ordinal in range(world.devices))])
    grown = resident[1] - resident[0]
    hold(world.dry or grown <= GROWTH, f"{world.launches} launches on each device grew the process by {grown} bytes")
    return f"{world.launches} launches on each device: the process grew by {grown} bytes; {'; '.join(texts)}"


# ------------------------------------------------- what may end the process


def child_destroyed(world: World) -> str:
    """Contexts destroyed with work queued in them, while others on the same and the other device are under load."""
    case, rounds, destroyed = world.first_case, 5, 0
    done, counts = threading.Event(), [0] * world.devices

    def load(ordinal: int) -> None:
        with context_on(ordinal, own=True) as stream, buffers_of(case, stream) as buffers:
            runner = Runner(world.kinds[ordinal % len(world.kinds)], case.problem)
            runner.prepare(case)
            while not done.is_set() or not counts[ordinal]:
                buffers.send(ordinal % 2)
                runner.enqueue(buffers.pointers, stream.handle)
                buffers.check(ordinal % 2, "beside contexts that are destroyed", world.dry)
                counts[ordinal] += 1
            runner.close()

    def destroy() -> None:
        nonlocal destroyed
        try:
            for number in range(rounds):
                for ordinal in range(world.devices):
                    context = OwnContext(ordinal)
                    stream, buffers = _lived_in(world, case, number)
                    runners = [Runner(kind, case.problem) for kind in world.kinds]
                    direct = Direct(world.library, case)
                    for runner in runners:
                        runner.prepare(case)
                    for _ in range(50):
                        for runner in runners:
                            runner.enqueue(buffers.pointers, stream.handle)
                    _destroy(context, here=number % 2 == 0)  # with all that in its stream
                    _expect_refusal(world, direct, runners, buffers, stream)
                    for runner in runners:
                        runner.close(free=False)
                    destroyed += 1
        finally:
            done.set()

    in_threads([destroy, *(lambda ordinal=ordinal: load(ordinal) for ordinal in range(world.devices))])
    return f"{destroyed} contexts destroyed beside {sum(counts)} right results on {world.devices} devices"


def _destroy(context: OwnContext, *, here: bool) -> None:
    """On this thread, where another becomes current then, or on another, where it stays current here."""
    if here:
        context.close()
        return
    thread = threading.Thread(target=context.close)
    thread.start()
    thread.join()


def _lived_in(world: World, case: Case, number: int) -> tuple[Stream, Buffers]:
    stream = Stream()
    buffers = Buffers(case, stream)
    buffers.send(number % 2)
    stream.synchronize()
    return stream, buffers


def _expect_refusal(world: World, direct: Direct, runners: list[Runner], buffers: Buffers, stream: Stream) -> None:
    """After the context was destroyed nothing launches, and nothing faults."""
    try:
        direct.launch(buffers.pointers, stream.handle)
    except LaunchError:
        pass
    else:
        raise Failed("a function was launched in a context that was destroyed")
    for runner in runners:
        status = runner.prepared(buffers.pointers, stream.handle)()
        hold(status != 0, f"{runner.kind.name} was launched in a context that was destroyed")


def child_foreign(world: World) -> str:
    """Tensors of one device, launched on the other: refused with PYFMHA_CHECK_POINTERS=1; right with peer access."""
    second, case = world.second(), world.first_case
    said, peers = "", "no peer access between these GPUs"
    with ExitStack() as stack:
        far, near = open_context(second, own=False), open_context(0, own=False)
        for context in (far, near):
            stack.callback(context.close)
        far.make_current()
        there = Stream()
        foreign = Buffers(case, there)
        foreign.send(0)
        there.synchronize()
        near.make_current()
        stream = Stream()
        own = Buffers(case, stream)
        access = [access_to(foreign.pointers[0])]
        direct = Direct(world.library, case)
        runners = [Runner(kind, case.problem) for kind in world.kinds]
        for runner in runners:
            runner.prepare(case)
        for at in range(4):  # each of Q, K, V, Out
            pointers = [*own.pointers[:at], foreign.pointers[at], *own.pointers[at + 1 :]]
            try:
                direct.launch(pointers, stream.handle)
            except LaunchError as error:
                said = str(error)
                hold("device" in said, f"refused for another reason: {said}")
            else:
                raise Failed(f"{('Q', 'K', 'V', 'Out')[at]} of device {second} was launched on device 0")
            for runner in runners:
                status = runner.prepared(pointers, stream.handle)()
                hold(status != 0, f"{runner.kind.name}: a tensor of device {second} was launched on device 0")
        own.send(1)
        direct.launch(own.pointers, stream.handle)
        own.check(1, "after the refusals", world.dry)
        if may_access(0, second):
            _call("cuCtxEnablePeerAccess", far._context, 0)
            access.append(access_to(foreign.pointers[0]))
            direct.launch(foreign.pointers, stream.handle)
            stream.synchronize()
            far.make_current()
            foreign.check(0, "through peer access", world.dry)
            near.make_current()
            peers = "right with peer access"
        for runner in runners:
            runner.close()
        direct.close()
    return (
        f"each of Q, K, V, Out refused by function and plugins ({said}); {peers}; the driver's access flags: {access}"
    )


def child_fault(world: World) -> str:
    """A kernel that faults on one device: its context is lost, the other device's results stay right."""
    second, case = world.second(), world.first_case
    near, far = open_context(0, own=True), open_context(second, own=False)
    stream = Stream()
    buffers, direct = Buffers(case, stream), Direct(world.library, case)
    near.make_current()
    bad_stream, bad = Stream(), Direct(world.library, case)
    bad.launch([0x10000] * 4, bad_stream.handle)
    try:
        bad_stream.synchronize()
    except DriverError as error:
        said = str(error)
    else:
        raise Failed("a launch on addresses of nothing ended well")
    far.make_current()
    for number in (0, 1):
        buffers.send(number)
        direct.launch(buffers.pointers, stream.handle)
        buffers.check(number, "after a fault on the other device", world.dry)
    return f"{said} on device 0, right results on device {second} after it"


def child_visible(world: World) -> str:
    """What a child sees of the devices under CUDA_VISIBLE_DEVICES, with the threads' check."""
    return json.dumps([device_id(number) for number in range(world.devices)]) + " " + check_threads(world)


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
    for package in ("numpy", "cuda-bindings", "torch", "triton", "tensorrt_lean_cu13", "rich"):
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
