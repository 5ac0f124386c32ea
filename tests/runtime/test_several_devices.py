"""Several devices in one process: each context for itself, failures of one device, and memory of another."""

import threading
from collections.abc import Callable

import pytest
from fake_cuda import FakeCuda
from helpers import (
    INVALID_CONTEXT,
    INVALID_HANDLE,
    INVALID_VALUE,
    LAUNCH_FAILED,
    NO_BINARY_FOR_GPU,
    NOT_INITIALIZED,
    SUCCESS,
    CLibrary,
)

CONTEXT_IS_DESTROYED = 709
ARGUMENTS = (0x1000, 0x2000, 0x3000, 1024, 1)


def launch_add(library: CLibrary, *addresses: int, n: int = 1024, stream: int = 0) -> int:
    return library.launch("add", *(addresses or ARGUMENTS[:3]), n, stream=stream)


def in_threads(works: list[Callable[[], None]]) -> None:
    failures: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_eight_threads_with_contexts_of_their_own_on_both_devices(library: CLibrary, fake_cuda: FakeCuda) -> None:
    """Each loads and launches and unloads in its own order; one context is destroyed and another takes its address."""

    def work(number: int) -> None:
        context = fake_cuda.use_context(number % 2)
        for turn in range(20):
            functions = ["add", "subtract"] if (turn + number) % 2 else ["subtract", "add"]
            assert [library.load(name) for name in functions] == [SUCCESS] * 2
            for name in functions:
                assert library.launch(name, *ARGUMENTS[:4], stream=0x1000 * number + turn) == SUCCESS, library.error()
            if number < 2 and turn % 4 == 3:
                fake_cuda.recreate(context)  # with all that is loaded in it
                assert launch_add(library) == NOT_INITIALIZED
            else:
                assert [library.unload(name) for name in ("add", "subtract")] == [SUCCESS] * 2
                assert launch_add(library) == NOT_INITIALIZED

    in_threads([lambda number=number: work(number) for number in range(8)])  # type: ignore[misc]

    launches = fake_cuda.launches()
    assert len(launches) == 8 * 20 * 2
    assert all(launch.device == launch.stream // 0x1000 % 2 for launch in launches)
    assert fake_cuda.modules_loaded() == 0


def test_a_context_destroyed_under_load_is_an_error_in_it_and_nothing_to_the_others(
    library: CLibrary, fake_cuda: FakeCuda
) -> None:
    destroyed, turns = threading.Event(), [0, 0]

    def works(number: int) -> None:
        fake_cuda.use_context(number)
        assert library.load("add") == SUCCESS
        while not destroyed.is_set() or turns[number] < 50:
            assert launch_add(library, stream=0x10 + number) == SUCCESS, library.error()
            turns[number] += 1

    def loses() -> None:
        for _ in range(10):
            context = fake_cuda.use_context(1)
            assert library.load("add") == SUCCESS
            assert launch_add(library, stream=0x20) == SUCCESS
            fake_cuda.destroy(context)
            assert launch_add(library) == CONTEXT_IS_DESTROYED
            assert "cuCtxGetId failed" in library.error()
            assert library.load("add") == CONTEXT_IS_DESTROYED
            assert library.unload("add") == CONTEXT_IS_DESTROYED
            fake_cuda.make_current(None)
            assert launch_add(library) == INVALID_CONTEXT
        destroyed.set()

    in_threads([lambda: works(0), lambda: works(1), loses])

    assert fake_cuda.modules_loaded() == 2 * len(library.variants("add")) * library.algorithms("add")


def test_a_launch_that_fails_on_one_device_leaves_the_other_right(library: CLibrary, fake_cuda: FakeCuda) -> None:
    contexts = [fake_cuda.use_context(device) for device in (0, 1)]
    for context in contexts:
        fake_cuda.make_current(context)
        assert library.load("add") == SUCCESS
    fake_cuda.fail("cuLaunchKernel", LAUNCH_FAILED, device=0)

    for _ in range(3):
        fake_cuda.make_current(contexts[0])
        assert launch_add(library) == LAUNCH_FAILED
        fake_cuda.make_current(contexts[1])
        assert launch_add(library) == SUCCESS
    fake_cuda.heal("cuLaunchKernel")
    fake_cuda.make_current(contexts[0])
    assert launch_add(library) == SUCCESS

    assert [launch.device for launch in fake_cuda.launches()] == [1, 1, 1, 0]


def test_a_device_that_cannot_load_leaves_the_other_right(library: CLibrary, fake_cuda: FakeCuda) -> None:
    fake_cuda.set_device(1, 75)
    good, bad = (fake_cuda.use_context(device) for device in (0, 1))
    fake_cuda.make_current(good)
    assert library.load("add") == SUCCESS

    fake_cuda.make_current(bad)
    assert library.load("add") == NO_BINARY_FOR_GPU
    assert "not for device 1, which is sm_75; pyfmha has no code for that" in library.error()
    assert launch_add(library) == NOT_INITIALIZED

    fake_cuda.make_current(good)
    assert launch_add(library) == SUCCESS
    assert [launch.device for launch in fake_cuda.launches()] == [0]


class TestPointersOfAnotherDevice:
    """With PYFMHA_CHECK_POINTERS=1 a launch is refused that would fault."""

    @pytest.fixture(autouse=True)
    def memory(self, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, library: CLibrary) -> None:
        monkeypatch.setenv("PYFMHA_CHECK_POINTERS", "1")
        for begin, device in ((0x100000, 0), (0x200000, 1)):
            fake_cuda.set_memory(begin, 0x10000, device)
        fake_cuda.use_context(0)
        assert library.load("add") == SUCCESS

    def test_it_is_refused_by_name_with_what_to_do(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        own, foreign = 0x100000, 0x200010
        for at, name in enumerate("XYZ"):
            addresses = [own, own, own]
            addresses[at] = foreign
            assert launch_add(library, *addresses) == INVALID_VALUE
            assert library.error() == (
                f"add: {name} is 0x200010, memory of device 1; the current CUDA context is of device 0, which cannot"
                " access that: copy it, make a context of device 1 current, or enable access"
                " (cuCtxEnablePeerAccess, of a pool cuMemPoolSetAccess)"
            )
        assert fake_cuda.launch_count() == 0
        assert launch_add(library, own, own + 16, own + 32) == SUCCESS

    def test_with_peer_access_it_is_launched(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.set_peer(0, 1)

        assert launch_add(library, 0x200000, 0x100000, 0x200000) == SUCCESS
        fake_cuda.use_context(1)
        assert library.load("add") == SUCCESS
        assert launch_add(library, 0x200000, 0x100000, 0x200000) == INVALID_VALUE  # it holds one way only
        assert "add: Y is 0x100000, memory of device 0" in library.error()

    def test_what_cuda_does_not_know_is_refused(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        assert launch_add(library, 0x100000, 0x100000, 0x300000) == INVALID_VALUE
        assert "add: Z is 0x300000, which is no memory that CUDA knows of; device 0 cannot access it" in library.error()
        fake_cuda.set_memory(0x100000, 0)
        assert launch_add(library, 0x100000, 0x100000, 0x100000) == INVALID_VALUE

    def test_an_empty_grid_touches_no_memory(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        assert launch_add(library, 0x200000, 0x300000, 0x200000, n=0) == SUCCESS
        assert fake_cuda.calls("cuPointerGetAttribute") == 0

    def test_the_hosts_address_of_what_a_device_has_elsewhere(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.set_memory(0x400000, 0x10000, 0, on_device=0x900000)
        assert launch_add(library, 0x100000, 0x400010, 0x100000) == INVALID_VALUE
        assert library.error() == (
            "add: Y is 0x400010, an address of the host; device 0 has this memory at 0x900010: give that"
        )


def test_a_stream_of_the_other_device_is_refused_and_harms_neither(library: CLibrary, fake_cuda: FakeCuda) -> None:
    contexts = [fake_cuda.use_context(device) for device in (0, 1)]
    for stream, context in zip((0x10, 0x20), contexts, strict=True):
        fake_cuda.set_stream(stream, context)
        fake_cuda.make_current(context)
        assert library.load("add") == SUCCESS
    fake_cuda.make_current(contexts[0])

    assert launch_add(library, stream=0x20) == INVALID_HANDLE
    assert "CUDA error 400" in library.error()
    assert launch_add(library, stream=0x10) == SUCCESS
    fake_cuda.make_current(contexts[1])
    assert launch_add(library, stream=0x20) == SUCCESS
    assert [launch.device for launch in fake_cuda.launches()] == [0, 1]


def test_pointers_are_taken_at_their_word_without_the_variable(library: CLibrary, fake_cuda: FakeCuda) -> None:
    fake_cuda.use_context(0)
    assert library.load("add") == SUCCESS

    assert launch_add(library) == SUCCESS
    assert fake_cuda.calls("cuPointerGetAttribute") == 0
