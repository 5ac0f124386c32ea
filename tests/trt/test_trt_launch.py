"""What reaches the CUDA driver from ``enqueue``: against the fake driver, through each binding's C++ side."""

import gc
import struct
import threading

import pytest
from fake_cuda import FakeCuda, Launch
from helpers import entered
from trt_double import BF16, FLOAT, Tensor
from trt_double.scene import HEADS, SCALE, SIZE, Scene, tensors

import pyfmha.trt
from pyfmha.runtime.library import Library

pytest_plugins = ("trt_double.fixtures",)

Q, K, V, OUT, WORKSPACE, STREAM = 0x7F0000001000, 0x7F0000002000, 0x7F0000003000, 0x7F0000004000, 0x7F0000005000, 0xABCD


def start(fake_cuda: FakeCuda, device: int = 0) -> int:
    assert fake_cuda.c.cuInit(0) == 0
    return fake_cuda.use_context(device)


def variant_of(library: Library, launch: Launch) -> tuple[str, int, bool]:
    """The function, the algorithm and whether it carries hints, of the machine code that was launched."""
    found = [
        (function.name, algo_id, bool(variant.hints))
        for function, algo_id, variant in library.manifest.variants()
        if any(image.sha256 == launch.image_sha256 for image in variant.images)
    ]
    assert len(found) == 1
    return found[0]


def parameters(batch: int, seq: int, out: int = OUT, workspace: int = WORKSPACE) -> tuple[bytes, ...]:
    """What the kernel is to read, from Out to seq_len."""
    rows = batch * HEADS * seq
    m = workspace + (4 * rows + 15) // 16 * 16
    numbers = (struct.pack("<Q", pointer) for pointer in (out, workspace, m, Q, K, V))
    return (*numbers, struct.pack("<f", SCALE), *(struct.pack("<i", size) for size in (batch, HEADS, seq)))


@pytest.mark.parametrize(("batch", "seq"), [(2, 100), (1, 1), (8, 129), (3, 17)])
def test_parameters_are_exactly_right(
    scene: Scene, attention_library: Library, fake_cuda: FakeCuda, batch: int, seq: int
) -> None:
    start(fake_cuda)
    plugin = scene.running(batch, seq)
    assert scene.calls.enqueue(plugin, [Q, K, V], [OUT], WORKSPACE, STREAM) == 0
    (launch,) = fake_cuda.launches()
    assert launch.params[:10] == parameters(batch, seq)
    assert launch.grid == (-(-seq // 32), batch * HEADS, 1)
    assert (launch.stream, launch.device) == (STREAM, 0)
    assert variant_of(attention_library, launch) == ("fmha_d32_fp16", 0, True)


@pytest.mark.parametrize(
    ("changes", "function"),
    [
        ({}, "fmha_d32_fp16"),
        ({"causal": 0}, "fmha_d32_fp16_full"),
        ({"type_id": BF16}, "fmha_d32_bf16"),
        ({"type_id": FLOAT}, "fmha_d32_fp32"),
    ],
)
def test_each_problem_runs_its_function(
    scene: Scene, attention_library: Library, fake_cuda: FakeCuda, changes: dict[str, float], function: str
) -> None:
    start(fake_cuda)
    plugin = scene.running(**changes)
    assert scene.calls.enqueue(plugin, [Q, K, V], [OUT], WORKSPACE, STREAM) == 0
    assert variant_of(attention_library, fake_cuda.launches()[0]) == (function, 0, True)


def test_every_tactic_runs_its_algorithm(scene: Scene, attention_library: Library, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    tactics = scene.calls.tactics(scene.built())
    assert len(tactics) == 2
    for algo_id, tactic in enumerate(tactics):
        plugin = scene.running(tactic=tactic)
        assert scene.calls.enqueue(plugin, [Q, K, V], [OUT], WORKSPACE, STREAM) == 0
        assert variant_of(attention_library, fake_cuda.launches()[-1])[1] == algo_id


def test_a_tactic_may_change_after_the_shape(scene: Scene, attention_library: Library, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    plugin = scene.running(batch=3, seq=17)
    assert scene.calls.set_tactic(plugin, scene.calls.tactics(plugin)[1]) == 0
    assert scene.calls.enqueue(plugin, [Q, K, V], [OUT], WORKSPACE, STREAM) == 0
    assert variant_of(attention_library, fake_cuda.launches()[0])[1] == 1
    assert fake_cuda.launches()[0].params[:10] == parameters(3, 17)


@pytest.mark.parametrize("moved", ["Q", "Out", "workspace"])
def test_misaligned_pointers_run_the_generic_variant(
    scene: Scene, attention_library: Library, fake_cuda: FakeCuda, moved: str
) -> None:
    start(fake_cuda)
    plugin = scene.running()
    moves = {"Q": 2, "Out": 2, "workspace": 4}  # by one element: the least that memory of that type can be off
    bases = {"Q": Q, "Out": OUT, "workspace": WORKSPACE}
    q, out, workspace = (base + moves[name] * (name == moved) for name, base in bases.items())
    assert scene.calls.enqueue(plugin, [q, K, V], [out], workspace, STREAM) == 0
    assert variant_of(attention_library, fake_cuda.launches()[0]) == ("fmha_d32_fp16", 0, False)
    assert scene.calls.enqueue(plugin, [Q, K, V], [OUT], WORKSPACE, STREAM) == 0
    assert variant_of(attention_library, fake_cuda.launches()[1]) == ("fmha_d32_fp16", 0, True)


def test_odd_row_counts_keep_both_statistics_aligned(
    scene: Scene, attention_library: Library, fake_cuda: FakeCuda
) -> None:
    start(fake_cuda)
    plugin = scene.running(batch=1, seq=1, num_heads=3)  # 12 bytes of L: M must not start there
    assert scene.calls.enqueue(plugin, [Q, K, V], [OUT], WORKSPACE, STREAM) == 0
    launch = fake_cuda.launches()[0]
    assert struct.unpack("<Q", launch.params[2])[0] == WORKSPACE + 16
    assert variant_of(attention_library, launch)[2] is True
    largest = [Tensor((-1, 3, -1, SIZE), largest=(1, 3, 1, SIZE))] * 4
    assert scene.calls.workspace(plugin, largest[:3], largest[3:]) == 28


def test_an_empty_batch_launches_nothing(scene: Scene, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    plugin = scene.running(batch=0)
    assert scene.calls.enqueue(plugin, [0, 0, 0], [0], 0, STREAM) == 0
    assert fake_cuda.launch_count() == 0


def test_shapes_alternate(scene: Scene, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    plugin = scene.running()
    for turn in range(20):
        batch, seq = (2, 64) if turn % 2 else (5, 33)
        shape = tensors(batch, seq)
        assert scene.calls.on_shape_change(plugin, shape[:3], shape[3:]) == 0
        assert scene.calls.enqueue(plugin, [Q, K, V], [OUT], WORKSPACE, STREAM) == 0
        assert fake_cuda.launches()[-1].params[:10] == parameters(batch, seq)
    assert fake_cuda.calls("cuModuleLoadData") == 4  # each variant of the function once


def test_what_failed_to_prepare_does_not_run_the_shape_before(scene: Scene, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    plugin = scene.running()
    bad = tensors(size=SIZE * 2)
    assert scene.calls.on_shape_change(plugin, bad[:3], bad[3:]) != 0
    assert scene.calls.enqueue(plugin, [Q, K, V], [OUT], WORKSPACE, STREAM) != 0
    assert fake_cuda.launch_count() == 0


@pytest.mark.parametrize("function", ["cuModuleLoadData", "cuModuleGetFunction"])
def test_code_that_does_not_load_fails_before_it_runs(scene: Scene, fake_cuda: FakeCuda, function: str) -> None:
    start(fake_cuda)
    loaded = scene.loaded()
    fake_cuda.fail(function, 200)
    assert scene.calls.attach(loaded) is None
    assert f"attach_to_context: {function} failed" in str(pyfmha.trt.last_failure().error)
    fake_cuda.heal(function)
    assert scene.calls.attach(loaded) is not None


def test_another_device_is_named(scene: Scene, fake_cuda: FakeCuda) -> None:
    fake_cuda.set_device(0, 80)
    start(fake_cuda)
    assert scene.calls.attach(scene.loaded()) is None
    assert "which is sm_80" in str(pyfmha.trt.last_failure().error)


def test_attaching_without_a_context_waits_for_one(scene: Scene, fake_cuda: FakeCuda) -> None:
    plugin = scene.calls.attach(scene.loaded())
    shape = tensors()
    assert scene.calls.on_shape_change(plugin, shape[:3], shape[3:]) != 0
    assert "no current CUDA context" in str(pyfmha.trt.last_failure().error)
    start(fake_cuda)
    assert scene.calls.on_shape_change(plugin, shape[:3], shape[3:]) == 0
    assert scene.calls.enqueue(plugin, [Q, K, V], [OUT], WORKSPACE, STREAM) == 0


def test_two_devices_in_turn(scene: Scene, fake_cuda: FakeCuda) -> None:
    contexts = [start(fake_cuda, 0), start(fake_cuda, 1)]
    loaded, plugins, shape = scene.loaded(), [], tensors()
    for context in contexts:
        fake_cuda.make_current(context)
        plugins.append(scene.calls.attach(loaded))
        assert scene.calls.on_shape_change(plugins[-1], shape[:3], shape[3:]) == 0
    for turn in range(4):
        fake_cuda.make_current(contexts[turn % 2])
        assert scene.calls.enqueue(plugins[turn % 2], [Q, K, V], [OUT], WORKSPACE, STREAM + turn) == 0
    assert [(launch.device, launch.stream - STREAM) for launch in fake_cuda.launches()] == [
        (0, 0),
        (1, 1),
        (0, 2),
        (1, 3),
    ]


def test_a_shape_change_on_another_device_moves_there(scene: Scene, fake_cuda: FakeCuda) -> None:
    start(fake_cuda, 0)
    plugin = scene.running()
    loaded = fake_cuda.modules_loaded()
    start(fake_cuda, 1)
    assert scene.calls.enqueue(plugin, [Q, K, V], [OUT], WORKSPACE, STREAM) != 0
    assert "not loaded in the current CUDA context" in str(pyfmha.trt.last_failure().error)
    shape = tensors()
    assert scene.calls.on_shape_change(plugin, shape[:3], shape[3:]) == 0
    assert scene.calls.enqueue(plugin, [Q, K, V], [OUT], WORKSPACE, STREAM) == 0
    assert fake_cuda.launches()[-1].device == 1
    assert fake_cuda.modules_loaded() == loaded  # given back on the first


def test_destroy_gives_the_code_back(scene: Scene, fake_cuda: FakeCuda) -> None:
    context = start(fake_cuda)
    first, second = scene.running(), scene.running()
    loaded = fake_cuda.modules_loaded()
    assert loaded > 0
    first.destroy()
    first.destroy()
    assert fake_cuda.modules_loaded() == loaded  # counted
    start(fake_cuda, 1)  # destroyed on a thread with another context, which stays current
    second.destroy()
    assert fake_cuda.modules_loaded() == 0
    assert scene.calls.enqueue(second, [Q, K, V], [OUT], WORKSPACE, STREAM) != 0
    fake_cuda.make_current(context)


def test_cpp_destroys(scene: Scene, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    plugin = scene.running()
    assert fake_cuda.modules_loaded() > 0
    scene.calls.destroy(plugin)
    assert fake_cuda.modules_loaded() == 0


def test_what_python_drops_is_given_back(attention_library: Library, fake_cuda: FakeCuda) -> None:
    from pyfmha.trt import standin
    from pyfmha.trt.attention.problem import Problem, attention_program
    from pyfmha.trt.creator import make_creator
    from pyfmha.trt.fields import creation_fields

    start(fake_cuda)
    made_fields = creation_fields(standin, attention_program(), Problem(HEADS, SIZE, "fp16", SCALE, True).attributes())
    plugin = make_creator(standin, attention_library).create_plugin("x", made_fields.collection, 0)
    attached = plugin.attach_to_context(None)
    assert fake_cuda.modules_loaded() > 0
    del attached
    gc.collect()
    assert fake_cuda.modules_loaded() == 0


def test_a_context_that_is_gone_does_not_matter(scene: Scene, fake_cuda: FakeCuda) -> None:
    context = start(fake_cuda)
    plugin = scene.running()
    fake_cuda.recreate(context)  # another one at the same address
    plugin.destroy()
    shape = tensors()
    again = scene.calls.attach(scene.loaded())
    assert scene.calls.on_shape_change(again, shape[:3], shape[3:]) == 0
    assert scene.calls.enqueue(again, [Q, K, V], [OUT], WORKSPACE, STREAM) == 0


def test_eight_contexts_on_eight_threads(scene: Scene, fake_cuda: FakeCuda) -> None:
    assert fake_cuda.c.cuInit(0) == 0
    loaded = scene.loaded()
    barrier = threading.Barrier(8)
    problems: list[str] = []

    def work(number: int) -> None:
        try:
            fake_cuda.use_context(number % 2)
            plugin = scene.calls.attach(loaded)
            barrier.wait()
            for turn in range(50):
                seq = 16 * number + turn % 3 + 1
                shape = tensors(1 + turn % 2, seq)
                assert scene.calls.on_shape_change(plugin, shape[:3], shape[3:]) == 0
                assert scene.calls.enqueue(plugin, [Q, K, V], [OUT + 4096 * number], WORKSPACE, STREAM + number) == 0
            plugin.destroy()
        except Exception as error:
            problems.append(f"{number}: {error!r}")
            barrier.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    launches = fake_cuda.launches()
    assert len(launches) == 400
    for launch in launches:
        number = launch.stream - STREAM
        assert launch.device == number % 2
        batch, _, seq = (struct.unpack("<i", launch.params[index])[0] for index in (7, 8, 9))
        assert (seq - 1) // 16 == number
        assert launch.params[:10] == parameters(batch, seq, OUT + 4096 * number)
    assert fake_cuda.modules_loaded() == 0


def test_an_enqueue_is_one_function_of_python_and_one_launch(scene: Scene, fake_cuda: FakeCuda) -> None:
    """The first and the hundredth; what that takes is measured by ``tests/host_times.py``."""
    start(fake_cuda)
    call = scene.calls.prepared_enqueue(scene.running(), [Q, K, V], [OUT], WORKSPACE, STREAM)
    before = fake_cuda.all_calls()
    for _ in range(100):
        assert entered(call) == ["enqueue"]
    assert fake_cuda.all_calls() - before == {"cuCtxGetCurrent": 100, "cuCtxGetId": 100, "cuLaunchKernel": 100}
