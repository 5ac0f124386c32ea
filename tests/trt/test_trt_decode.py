"""Decoding through the plugin: when the keys are split, with what, and where the workspace for it comes from."""

import gc
import random
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda, Launch
from helpers import entered
from trt_double import FLOAT, RUNTIME, Field, Tensor
from trt_double.scene import SCALE, SIZE, Scene

import pyfmha.trt
from pyfmha.attention import decode
from pyfmha.attention.decode import LEAST_KEYS, MOST_QUERIES, most_workspace_bytes
from pyfmha.errors import DriverError, LaunchError
from pyfmha.runtime.library import Library
from pyfmha.trt import launch, standin
from pyfmha.trt.attention.problem import Features, Problem, attention_program
from pyfmha.trt.creator import make_creator
from pyfmha.trt.fields import creation_fields

pytest_plugins = ("trt_double.fixtures",)

Q, K, V, LENGTHS = 0x7F0000100000, 0x7F0000200000, 0x7F0000300000, 0x7F0000400000
OUT, LSE, WORKSPACE, STREAM = 0x7E0000000000, 0x7D0000000000, 0x7C0000000100, 0xABCD
D, INT32 = SIZE, 3
HQ, HKV = 4, 2
GROUPED = {"num_kv_heads": HKV}
SPLIT, COMBINE, FORWARD = "fmha_split_d64_fp16", "fmha_combine_d64_fp16", "fmha_fwd_d32_fp16"


@pytest.fixture
def scene(trt: Any, decode_library: Library) -> Scene:
    """The plugin in each binding, with the library that has the functions of decoding."""
    return Scene(trt, decode_library)


def start(fake_cuda: FakeCuda) -> int:
    assert fake_cuda.c.cuInit(0) == 0
    return fake_cuda.use_context(0)


def last_error() -> str:
    failure = pyfmha.trt.last_failure()
    assert failure is not None
    return str(failure.error)


def tensors(rows: int, keys: int, batch: int = 2, heads: int = HQ, kv_heads: int = HKV) -> list[Tensor]:
    """Q, K, V and Out."""
    q, kv = Tensor((batch, heads, rows, D)), Tensor((batch, kv_heads, keys, D))
    return [q, kv, kv, q]


def prepared(scene: Scene, rows: int, keys: int, *, batch: int = 2, **changes: float | str) -> Any:
    """A plugin of an execution context, through serialisation, with a shape prepared."""
    values = {**GROUPED, **changes}
    plugin = scene.calls.attach(scene.loaded(scene.built(**values)))
    assert plugin is not None, last_error()
    shape(scene, plugin, rows, keys, batch, int(values.get("num_heads", HQ)), int(values["num_kv_heads"]))
    return plugin


def shape(
    scene: Scene, plugin: Any, rows: int, keys: int, batch: int = 2, heads: int = HQ, kv_heads: int = HKV
) -> None:
    made = tensors(rows, keys, batch, heads, kv_heads)
    assert scene.calls.on_shape_change(plugin, made[:3], made[3:]) == 0, last_error()


def enqueue(scene: Scene, plugin: Any, q: int = Q, workspace: int = WORKSPACE) -> int:
    return scene.calls.enqueue(plugin, [q, K, V], [OUT], workspace, STREAM)


def variant_of(library: Library, launch: Launch) -> tuple[str, int, bool]:
    """The function, the algorithm and whether it carries hints, of the machine code that was launched."""
    (found,) = (
        (function.name, algo_id, bool(variant.hints))
        for function, algo_id, variant in library.manifest.variants()
        if any(image.sha256 == launch.image_sha256 for image in variant.images)
    )
    return found


def functions_of(library: Library, fake_cuda: FakeCuda) -> list[str]:
    return [variant_of(library, launch)[0] for launch in fake_cuda.launches()]


def parameters(pointers: list[int], floats: tuple[float, float], *numbers: int) -> tuple[bytes, ...]:
    """What both kernels are to read: nine pointers, scale and soft cap, six sizes, twelve strides, four settings."""
    assert (len(pointers), len(numbers)) == (9, 22)
    forms = "i" * 6 + "q" * 12 + "i" * 4
    packed = [struct.pack("<Q", pointer) for pointer in pointers] + [struct.pack("<f", value) for value in floats]
    return (*packed, *(struct.pack(f"<{form}", value) for form, value in zip(forms, numbers, strict=True)))


# What is launched


def test_both_launches_are_exactly_right(scene: Scene, decode_library: Library, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    plugin = prepared(scene, 3, 777)
    assert enqueue(scene, plugin) == 0, last_error()
    split, combine = fake_cuda.launches()
    assert variant_of(decode_library, split) == (SPLIT, 0, True)
    assert variant_of(decode_library, combine)[:2] == (COMBINE, 0)
    splits = 7  # each of at least 128 keys
    queries = 2 * HQ * 3
    statistics = WORKSPACE + 4 * splits * queries * 64
    wanted = parameters(
        [OUT, 0, Q, K, V, 0, 0, WORKSPACE, statistics], (SCALE, 0.0), 2, HQ, HKV, 3, 777, D,
        *[HQ * 3 * D, 3 * D, D], *[HKV * 777 * D, 777 * D, D] * 2, *[HQ * 3 * D, 3 * D, D], -1, 0, 0, splits,
    )  # fmt: skip
    assert split.params[:33] == combine.params[:33] == wanted
    assert split.grid == (splits * 1, 2 * HKV, 1)
    assert combine.grid == (queries, 1, 1)
    assert {split.stream, combine.stream} == {STREAM}
    made = tensors(3, 777)
    assert scene.calls.workspace(plugin, made[:3], made[3:]) >= statistics - WORKSPACE + 4 * (2 * splits + 1) * queries


def test_every_feature_arrives(scene: Scene, decode_library: Library, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    changes = {"layout": "bshd", "causal": 2, "window_left": 40, "softcap": 1.5, "return_lse": 1, "kv_lengths": 1}
    plugin = scene.calls.attach(scene.loaded(scene.built(**GROUPED, **changes)))
    q, kv, lse = Tensor((1, 2, HQ, D)), Tensor((1, 512, HKV, D)), Tensor((1, HQ, 2), FLOAT)
    assert scene.calls.on_shape_change(plugin, [q, kv, kv, Tensor((1,), INT32)], [q, lse]) == 0, last_error()
    assert scene.calls.enqueue(plugin, [Q, K, V, LENGTHS], [OUT, LSE], WORKSPACE, STREAM) == 0, last_error()
    split, combine = fake_cuda.launches()
    statistics = WORKSPACE + 4 * 4 * HQ * 2 * 64
    wanted = parameters(
        [OUT, LSE, Q, K, V, 0, LENGTHS, WORKSPACE, statistics], (SCALE, 1.5), 1, HQ, HKV, 2, 512, D,
        *[2 * HQ * D, D, HQ * D], *[512 * HKV * D, D, HKV * D] * 2, *[2 * HQ * D, D, HQ * D], 40, 0, 1, 4,
    )  # fmt: skip
    assert split.params[:33] == combine.params[:33] == wanted
    assert functions_of(decode_library, fake_cuda) == [SPLIT, COMBINE]


@pytest.mark.parametrize(
    ("rows", "keys", "kv_heads", "split"),
    [
        (1, 512, HKV, True),
        (1, 511, HKV, False),
        (32, 600, HKV, True),  # 64 queries share a key head
        (33, 600, HKV, False),
        (64, 600, HQ, True),
        (65, 600, HQ, False),
        (16, 600, 1, True),
        (17, 600, 1, False),
        (0, 600, HKV, False),
        (1, 0, HKV, False),
    ],
)
def test_where_the_keys_are_split(
    decode_library: Library, fake_cuda: FakeCuda, rows: int, keys: int, kv_heads: int, split: bool
) -> None:
    from trt_double.binding import make_binding

    start(fake_cuda)
    scene = Scene(make_binding(), decode_library)
    plugin = prepared(scene, rows, keys, num_kv_heads=kv_heads)
    assert enqueue(scene, plugin) == 0, last_error()
    wanted = [SPLIT, COMBINE] if split else [FORWARD] * (rows > 0)  # of no rows nothing is launched
    assert functions_of(decode_library, fake_cuda) == wanted
    made = tensors(rows, keys, kv_heads=kv_heads)
    assert bool(scene.calls.workspace(plugin, made[:3], made[3:])) is split


def pair_of(plugin: Any) -> tuple[str, ...]:
    """The functions of decoding that a plugin may launch."""
    return tuple(name for name in plugin.instance.launched_functions() if name in (SPLIT, COMBINE))


RAGGED = {"cu_seqlens": 1}, [Tensor((3, HQ, D)), *[Tensor((900, HKV, D))] * 2, *[Tensor((3,), INT32)] * 2], (3, HQ, D)
PACKED = {"layout": "packed"}, [Tensor((1, 600, HQ + 2 * HKV, D))], (1, 600, HQ, D)


@pytest.mark.parametrize(("changes", "inputs", "out"), [RAGGED, PACKED], ids=["ragged", "packed"])
def test_what_is_never_split(
    scene: Scene, decode_library: Library, fake_cuda: FakeCuda, changes: Any, inputs: list[Tensor], out: Any
) -> None:
    start(fake_cuda)
    plugin = scene.calls.attach(scene.loaded(scene.built(**GROUPED, **changes)))
    assert pair_of(plugin) == ()
    assert scene.calls.on_shape_change(plugin, inputs, [Tensor(out)]) == 0, last_error()
    assert scene.calls.workspace(plugin, inputs, [Tensor(out)]) == 0
    assert scene.calls.enqueue(plugin, [Q, K, V, LENGTHS, LENGTHS][: len(inputs)], [OUT], 0, STREAM) == 0
    assert functions_of(decode_library, fake_cuda) == [FORWARD]
    stored = scene.calls.stored_fields(plugin)
    assert stored is not None
    assert "pyfmha_decode" not in [field.name for field in stored.read()]


def test_shapes_alternate(scene: Scene, decode_library: Library, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    plugin = prepared(scene, 100, 600)
    for rows, keys in ((1, 600), (100, 600), (1, 100), (2, 900)):
        shape(scene, plugin, rows, keys)
        assert enqueue(scene, plugin) == 0
    assert functions_of(decode_library, fake_cuda) == [SPLIT, COMBINE, FORWARD, FORWARD, SPLIT, COMBINE]
    assert "Skv 900 in 8 parts" in plugin.describe()


@pytest.mark.parametrize("moved", [2, 8])
def test_misaligned_pointers_run_the_generic_split(
    scene: Scene, decode_library: Library, fake_cuda: FakeCuda, moved: int
) -> None:
    start(fake_cuda)
    plugin = prepared(scene, 1, 600)
    assert enqueue(scene, plugin, q=Q + moved) == 0, last_error()
    split, combine = fake_cuda.launches()
    assert variant_of(decode_library, split) == (SPLIT, 0, False)
    assert variant_of(decode_library, combine)[0] == COMBINE
    assert split.params[2] == combine.params[2] == struct.pack("<Q", Q + moved)


def test_every_tactic_decodes_alike(scene: Scene, decode_library: Library, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    plugin = prepared(scene, 1, 600)
    tactics = scene.calls.tactics(plugin)
    assert tactics is not None
    assert len(tactics) == 2
    assert enqueue(scene, plugin) == 0
    for tactic in tactics:
        assert scene.calls.set_tactic(plugin, tactic) == 0
        assert enqueue(scene, plugin) == 0
    first, *others = zip(*[iter(fake_cuda.launches())] * 2, strict=True)
    assert others == [first, first]
    shape(scene, plugin, 100, 600)  # the one set last holds again
    assert enqueue(scene, plugin) == 0
    assert variant_of(decode_library, fake_cuda.launches()[-1])[:2] == (FORWARD, 1)


def test_both_launches_may_be_captured(scene: Scene, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    plugin = prepared(scene, 1, 600)
    fake_cuda.begin_capture()
    status = enqueue(scene, plugin)
    fake_cuda.end_capture()
    assert (status, fake_cuda.violations()[0]) == (0, 0)
    assert [launch.dependent for launch in fake_cuda.launches()] == [False, True]


@pytest.mark.parametrize(("works", "name", "call"), [(0, SPLIT, "cuLaunchKernel"), (1, COMBINE, "cuLaunchKernelEx")])
def test_a_failing_launch_is_named(scene: Scene, fake_cuda: FakeCuda, works: int, name: str, call: str) -> None:
    start(fake_cuda)
    plugin = prepared(scene, 1, 600)
    fake_cuda.fail(call, 719)
    assert enqueue(scene, plugin) != 0
    assert f"Sq 1, Skv 600 in 5 parts): enqueue: {name}: {call} failed" in last_error()
    failure = pyfmha.trt.last_failure()
    assert failure is not None
    assert isinstance(failure.error, LaunchError)
    assert failure.error.code == 719
    assert fake_cuda.launch_count() == works
    fake_cuda.heal(call)
    assert enqueue(scene, plugin) == 0


def test_without_a_workspace_nothing_runs(scene: Scene, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    plugin = prepared(scene, 1, 600)
    for _ in range(2):
        assert enqueue(scene, plugin, workspace=0) != 0
        assert "TensorRT gave no workspace, 10592 bytes are needed" in last_error()  # 8 queries, 5 parts
    assert fake_cuda.launch_count() == 0


# How much workspace


def profile(
    rows: tuple[int, int], keys: tuple[int, int], batch: tuple[int, int] = (1, 8), **sizes: int
) -> list[Tensor]:
    """Q, K, V and Out of shapes between two."""
    heads, kv_heads = sizes.get("heads", HQ), sizes.get("kv_heads", HKV)
    q, kv = (
        Tensor((-1, n, -1, D), largest=(batch[1], n, span[1], D), smallest=(batch[0], n, span[0], D))
        for n, span in ((heads, rows), (kv_heads, keys))
    )
    return [q, kv, kv, q]


def workspace(scene: Scene, made: list[Tensor], **changes: float | str) -> int:
    plugin = scene.built(**{**GROUPED, **changes})
    assert scene.calls.configure(plugin, made[:3], made[3:]) == 0, last_error()
    return scene.calls.workspace(plugin, made[:3], made[3:])


def test_workspace_is_for_every_shape_of_a_profile(scene: Scene) -> None:
    most = most_workspace_bytes(8, HQ, 32, D)
    assert most > 0
    assert workspace(scene, profile((1, 4096), (1, 4096))) == most  # the largest shape itself is not decoded
    assert workspace(scene, profile((0, 4096), (0, 4096))) == most
    assert workspace(scene, profile((32, 33), (1, 512))) == most
    assert workspace(scene, profile((1, 1), (512, 4096))) == most_workspace_bytes(8, HQ, 1, D)


@pytest.mark.parametrize(
    ("made", "changes"),
    [
        (profile((33, 4096), (1, 4096)), {}),
        (profile((1, 64), (1, 511)), {}),
        (profile((0, 0), (0, 4096)), {}),
        (profile((1, 64), (1, 4096), (0, 0)), {}),
        (profile((1, 64), (1, 4096), heads=130, kv_heads=2), {"num_heads": 130}),  # 65 queries share a key head
    ],
)
def test_no_workspace_where_nothing_is_decoded(scene: Scene, made: list[Tensor], changes: dict[str, Any]) -> None:
    assert workspace(scene, made, **changes) == 0


def test_a_bound_that_is_missing_is_taken_for_any(scene: Scene) -> None:
    if scene.trt.__name__.startswith("tensorrt"):
        pytest.skip("the binding copies whatever C++ gives")
    made = [replace(tensor, smallest=()) for tensor in profile((64, 4096), (1, 4096))]
    assert workspace(scene, made) > 0


KEYS = (1, 511, 512, 700, 5000, 200_000)


def test_no_shape_needs_more_than_was_asked_for() -> None:
    """Shapes at random, and those at the edges, of problems and profiles at random."""
    chance = random.Random(4)
    split = 0
    for _ in range(300):
        kv_heads, group, size = (
            chance.choice((1, 2, 3, 8)),
            chance.choice((1, 2, 5, 8, 64)),
            chance.choice((1, 80, 256)),
        )
        problem = Problem(kv_heads * group, size, "fp16", 1.0, False, Features(kv_heads))
        assert list(problem.instance.options_wanted())
        instance = problem.instance.with_options({"decode": True})
        ranges = [
            sorted(chance.choice(choices) for _ in "ab") for choices in ((1, 2, 7, 40, 999), (1, 5, 64, 900), KEYS)
        ]

        def shapes(batch: int, rows: int, keys: int, problem: Problem = problem) -> list[tuple[int, ...]]:
            q, kv = (
                (batch, heads, n, problem.head_size)
                for heads, n in ((problem.num_heads, rows), (problem.kv_heads, keys))
            )
            return [q, kv, kv, q]

        least, most = (shapes(*(span[end] for span in ranges)) for end in (0, 1))
        bounds = {"Sq": least[0][2], "Skv": least[1][2], "batch": least[0][0]}
        asked = instance.profile_bytes(instance.measure(most[:3], most[3:], least=bounds))
        for _ in range(20):
            sizes = [chance.choice((*span, chance.randint(*span))) for span in ranges]
            made = shapes(*sizes)
            plan = instance.plan(instance.measure(made[:3], made[3:]))
            assert plan.workspace_bytes <= asked, (problem, ranges, sizes)
            split += len(plan.steps) > 1
    assert split > 500


def test_the_rule_that_engines_keep() -> None:
    """Whoever changes one of these numbers so that more may be needed takes the next ``WORKSPACE_RULE``."""
    assert decode.WORKSPACE_RULE == 1
    assert (MOST_QUERIES, LEAST_KEYS, decode.KEYS_OF_SPLIT, decode.PROGRAMS) == (64, 512, 128, 264)
    sizes = [(1, 1, 1, 1), (1, 32, 1, 128), (8, 32, 64, 128), (64, 8, 7, 256)]
    assert [most_workspace_bytes(*each) for each in sizes] == [1_132_048, 2_213_392, 8_585_232, 4_376_080]


# Engines and libraries of different times


def stored_by(scene: Scene, **changes: float | str) -> list[Field]:
    stored = scene.calls.stored_fields(scene.built(**{**GROUPED, **changes}))
    assert stored is not None
    return stored.read()


def running(scene: Scene, fields: list[Field]) -> Any:
    """A plugin of an execution context from an engine's fields, for a shape that is decoded."""
    loaded = scene.calls.create(scene.creator, "layer 7", fields, RUNTIME)
    assert loaded is not None, last_error()
    plugin = scene.calls.attach(loaded)
    shape(scene, plugin, 1, 600)
    return plugin


def test_what_is_stored_says_that_there_is_room(scene: Scene, decode_library: Library, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    fields = stored_by(scene)
    (room,) = (field for field in fields if field.name == "pyfmha_decode")
    assert np.frombuffer(room.data, np.int32).tolist() == [1]
    plugin = running(scene, fields)
    again = scene.calls.stored_fields(plugin)
    assert again is not None
    assert [(f.name, f.data) for f in again.read()] == [(f.name, f.data) for f in fields]
    assert pair_of(plugin) == (SPLIT, COMBINE)
    assert scene.calls.timing_cache_id(plugin) == scene.calls.timing_cache_id(scene.built(**GROUPED))


def changed(fields: list[Field], rule: int | None) -> list[Field]:
    others = [field for field in fields if field.name != "pyfmha_decode"]
    if rule is None:
        return others
    return [*others, Field("pyfmha_decode", 5, 1, np.array([rule], np.int32).tobytes())]


@pytest.mark.parametrize("rule", [None, 0, 2, -1])
@pytest.mark.parametrize("address", [0, WORKSPACE])
def test_an_engine_without_room_does_not_decode(
    scene: Scene, decode_library: Library, fake_cuda: FakeCuda, rule: int | None, address: int
) -> None:
    """One of an earlier version, and one of another rule: whatever the workspace's address is, it is not theirs."""
    start(fake_cuda)
    plugin = running(scene, changed(stored_by(scene), rule))
    made = tensors(1, 600)
    assert scene.calls.workspace(plugin, made[:3], made[3:]) == 0
    assert enqueue(scene, plugin, workspace=address) == 0, last_error()
    assert functions_of(decode_library, fake_cuda) == [FORWARD]
    assert struct.pack("<Q", WORKSPACE) not in fake_cuda.launches()[0].params
    stored = scene.calls.stored_fields(plugin)
    assert stored is not None
    kept = [np.frombuffer(f.data, np.int32)[0] for f in stored.read() if f.name == "pyfmha_decode"]
    assert kept == ([rule] if rule else [])


def test_a_library_without_the_functions_runs_forward(
    trt: Any, decode_library: Library, forward_library: Library, fake_cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    start(fake_cuda)
    earlier, later = Scene(trt, forward_library), Scene(trt, decode_library)
    made = profile((1, 64), (1, 4096))
    assert workspace(earlier, made) == 0
    assert "pyfmha_decode" not in [field.name for field in stored_by(earlier)]
    with caplog.at_level("INFO", "pyfmha"):
        for engine, scene, function in ((later, earlier, FORWARD), (earlier, later, FORWARD), (later, later, SPLIT)):
            before = fake_cuda.launch_count()
            plugin = running(scene, stored_by(engine))
            assert enqueue(scene, plugin) == 0, last_error()
            library = decode_library if scene is later else forward_library
            assert variant_of(library, fake_cuda.launches()[before])[0] == function
    said = [record.message for record in caplog.records if "does without decode" in record.message]
    assert len(said) == 2
    assert "the engine has, the library here lacks what it takes" in said[0]
    assert "only the library here has what it takes" in said[1]


def test_functions_that_are_called_in_another_way_are_not_called(
    scene: Scene, decode_library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pair_of(scene.built(**GROUPED)) == (SPLIT, COMBINE)
    combine = decode_library[COMBINE]
    others = tuple(("parts" if name == "splits" else name, kind) for name, kind in combine.manifest.arguments)
    monkeypatch.setattr(combine, "manifest", replace(combine.manifest, arguments=others))
    assert pair_of(scene.built(**GROUPED)) == ()


# Loaded code


def test_all_functions_are_loaded_and_given_back(scene: Scene, decode_library: Library, fake_cuda: FakeCuda) -> None:
    context = start(fake_cuda)
    plain = scene.calls.attach(scene.loaded(scene.built(**GROUPED, cu_seqlens=1)))
    alone = fake_cuda.modules_loaded()
    plugin = prepared(scene, 1, 600)
    assert fake_cuda.modules_loaded() > alone
    other = prepared(scene, 1, 600)
    plugin.destroy()
    plugin.destroy()
    assert enqueue(scene, other) == 0
    start(fake_cuda)
    other.destroy()  # where another context is current
    fake_cuda.make_current(context)
    assert fake_cuda.modules_loaded() == alone
    plain.destroy()
    assert fake_cuda.modules_loaded() == 0


def test_what_loads_in_part_is_given_back(scene: Scene, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    loaded = scene.loaded(scene.built(**GROUPED))
    for works in range(1, 5):
        fake_cuda.fail("cuModuleLoadData", 2, after=works)
        failed = scene.calls.attach(loaded) is None
        fake_cuda.heal("cuModuleLoadData")
        if not failed:
            break
        assert fake_cuda.modules_loaded() == 0
        assert "attach_to_context: cuModuleLoadData failed" in last_error()
    assert works > 2  # it did fail after the first function, and then not


def test_a_hold_without_a_context_keeps_nothing(
    decode_library: Library, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise DriverError("cuCtxGetCurrent failed: CUDA error 4", 4)

    start(fake_cuda)
    monkeypatch.setattr(launch, "current_context", fails)
    with pytest.raises(DriverError, match="cuCtxGetCurrent"):
        launch.Hold([decode_library[SPLIT], decode_library[COMBINE]])
    assert fake_cuda.modules_loaded() == 0


def test_the_garbage_collector_meets_no_exception(
    decode_library: Library, fake_cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    start(fake_cuda)
    hold = launch.Hold([decode_library[SPLIT]])
    fake_cuda.fail("cuCtxGetCurrent", 4)  # the driver is shutting down
    with caplog.at_level("DEBUG", "pyfmha"):
        hold.release_where_current()
    assert "no function was unloaded: cuCtxGetCurrent failed" in caplog.text
    fake_cuda.heal("cuCtxGetCurrent")
    hold.release_where_current()
    assert fake_cuda.modules_loaded() == 0


def test_a_device_change_takes_all_along(scene: Scene, decode_library: Library, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    plugin = prepared(scene, 1, 600)
    loaded = fake_cuda.modules_loaded()
    fake_cuda.use_context(1)
    assert enqueue(scene, plugin) != 0
    assert f"{SPLIT}: " in last_error()
    shape(scene, plugin, 1, 600)
    assert enqueue(scene, plugin) == 0
    assert [launch.device for launch in fake_cuda.launches()] == [1, 1]
    assert fake_cuda.modules_loaded() == loaded


def test_what_python_drops_is_given_back(decode_library: Library, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    made = creation_fields(
        standin, attention_program(), Problem(HQ, SIZE, "fp16", SCALE, False, Features(HKV)).attributes()
    )
    plugin = make_creator(standin, decode_library).create_plugin("x", made.collection, 0)
    attached = plugin.attach_to_context(None)
    assert fake_cuda.modules_loaded() > 0
    del attached
    gc.collect()
    assert fake_cuda.modules_loaded() == 0


# Threads and time


def test_threads_that_meet_in_one_object_keep_their_arguments(decode_library: Library, fake_cuda: FakeCuda) -> None:
    """TensorRT gives each execution context an object of its own; that two threads share one must not mix addresses."""
    from trt_double.binding import make_binding

    context = start(fake_cuda)
    scene = Scene(make_binding(), decode_library)
    plugin = prepared(scene, 1, 600)
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            fake_cuda.make_current(context)
            at = 4096 * number
            for _ in range(200):
                plugin.enqueue([], [], [Q + at, K + at, V + at], [OUT + at], WORKSPACE + at, STREAM + number)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    launches = fake_cuda.launches()
    assert len(launches) == 2 * 4 * 200
    bases = {0: OUT, 2: Q, 3: K, 4: V, 7: WORKSPACE}
    for queued in launches:
        at = 4096 * (queued.stream - STREAM)
        assert {index: struct.unpack("<Q", queued.params[index])[0] - at for index in bases} == bases


def test_an_argument_is_not_shared_between_two_launches(decode_library: Library, fake_cuda: FakeCuda) -> None:
    """The C call lets other threads run: one that enqueues just then must not change what the first one launches."""
    from trt_double.binding import make_binding

    start(fake_cuda)
    scene = Scene(make_binding(), decode_library)
    nested = [False]

    def nesting(start_of: Callable[[bytes], int]) -> Callable[[bytes], int]:
        def between(packed: bytes) -> int:
            if not nested[0]:
                nested[0] = True
                plugin.enqueue([], [], [Q + 64, K, V], [OUT], WORKSPACE, STREAM + 1)
                nested[0] = False
            return int(start_of(packed))

        return between

    for name in decode_library:
        decode_library[name].start = nesting(decode_library[name].start)
    plugin = prepared(scene, 1, 600)
    assert enqueue(scene, plugin) == 0, last_error()
    seen = [(launch.stream - STREAM, struct.unpack("<Q", launch.params[2])[0] - Q) for launch in fake_cuda.launches()]
    assert sorted(seen) == [(0, 0)] * 2 + [(1, 64)] * 4


def test_two_launches_are_one_function_of_python_and_no_other_work(scene: Scene, fake_cuda: FakeCuda) -> None:
    """What that takes is measured by ``tests/host_times.py``."""
    start(fake_cuda)
    call = scene.calls.prepared_enqueue(prepared(scene, 1, 600), [Q, K, V], [OUT], WORKSPACE, STREAM)
    before = fake_cuda.all_calls()
    for _ in range(10):
        assert entered(call) == ["enqueue"]
    made = fake_cuda.all_calls() - before
    assert sum(made[name] for name in ("cuLaunchKernel", "cuLaunchKernelEx")) == 2 * 10
    assert made["cuCtxGetCurrent"] == made["cuCtxGetId"] == 2 * 10
    assert made.total() == 3 * 2 * 10
