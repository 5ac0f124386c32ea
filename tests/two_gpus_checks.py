"""The checks of :mod:`two_gpus` in its own process: threads, contexts, refusals, growth."""

import random
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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
    Problem,
    Runner,
    buffers_of,
    free_bytes,
    hold,
    open_context,
    resident_bytes,
)

from pyfmha.errors import LaunchError, PyfmhaError
from pyfmha.runtime.device import Stream
from pyfmha.runtime.graph import Graph
from pyfmha.runtime.library import Library
from pyfmha.trt.attention.direct import DirectSession

THREADS = 8
GROWTH = 1 << 20
"""Bytes by which 10,000 launches may grow the process: 100 a launch would be a leak."""

GRAIN = 2 << 20
"""Bytes in which the driver takes device memory."""


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
            with context_on(second) as other, context_on(0) as stream, buffers_of(case, stream) as buffers:
                direct = Direct(world.library, case)
                good = direct.arguments(buffers.pointers, stream.handle)
                bad = {
                    "a null Q": (4, 0),
                    "a misaligned Q": (4, good[4] + 1),
                    "a grid too large": (9, (1 << 31) - 1),
                    "a negative batch": (8, -1),
                    "a stream of the other device": (0, other.handle),  # which the driver refuses
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
