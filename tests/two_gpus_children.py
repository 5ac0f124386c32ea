"""The checks of :mod:`two_gpus` that may end a process, and so run in one of their own."""

import json
import threading
from collections.abc import Callable
from contextlib import ExitStack

from two_gpus_checks import World, check_threads, context_on, in_threads
from two_gpus_parts import (
    Buffers,
    Case,
    Direct,
    Failed,
    OwnContext,
    Runner,
    access_to,
    buffers_of,
    device_id,
    hold,
    may_access,
    open_context,
)

from pyfmha.errors import DriverError, LaunchError
from pyfmha.runtime.device import Stream, _call


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
    return f"each of Q, K, V, Out refused by function and plugins ({said}); {peers}; the driver says: {access}"


def child_fault(world: World) -> str:
    """A kernel that faults on one device. CUDA's documentation leaves the process unusable then, and two H200 (driver
    580) did so on both devices: where the driver itself no longer copies to the other one, function and plugins say the
    driver's error, and nothing hangs or dies; where it does, the other device's results stay right."""
    second, case = world.second(), world.first_case
    near, far = open_context(0, own=True), open_context(second, own=False)
    stream = Stream()
    buffers, direct = Buffers(case, stream), Direct(world.library, case)
    runners = [Runner(kind, case.problem) for kind in world.kinds]
    for runner in runners:
        runner.prepare(case)
    near.make_current()
    bad_stream, bad = Stream(), Direct(world.library, case)
    bad.launch([0x10000] * 4, bad_stream.handle)
    said = _error_of(bad_stream.synchronize)
    hold(said is not None, "a launch on addresses of nothing ended well")
    far.make_current()
    lost = _error_of(lambda: buffers.send(0))
    if lost is None:
        for number in (0, 1):
            buffers.send(number)
            direct.launch(buffers.pointers, stream.handle)
            buffers.check(number, "after a fault on the other device", world.dry)
        return f"{said} on device 0, right results on device {second} after it"
    refused = _error_of(lambda: direct.launch(buffers.pointers, stream.handle))
    hold(refused is not None, f"the driver works no more ({lost}), and a function was launched")
    hold("CUDA error 700" in str(refused), f"refused for another reason: {refused}")
    for runner in runners:
        status = runner.prepared(buffers.pointers, stream.handle)()
        hold(status != 0, f"{runner.kind.name}: the driver works no more ({lost}), and it was launched")
    return f"{said} on device 0; the driver works no more on device {second} either ({lost}); refused there: {refused}"


def _error_of(call: Callable[[], object]) -> str | None:
    """What the driver or the library says of a call; None if it went well."""
    try:
        call()
    except (DriverError, LaunchError) as error:
        return str(error)
    return None


def child_visible(world: World) -> str:
    """What a child sees of the devices under CUDA_VISIBLE_DEVICES, with the threads' check."""
    return json.dumps([device_id(number) for number in range(world.devices)]) + " " + check_threads(world)
