"""Every call that TensorRT makes on the plugin, from C++ where a real binding is installed."""

import gc
import struct
from typing import Any

import pytest
from trt_double import BF16, BUILD, FLOAT, HALF, INT32, RUNTIME, Tensor
from trt_double.scene import HEADS, SCALE, SIZE, Scene, dynamic, fields, number, problem_of, tensors, text

from pyfmha import trt as pyfmha_trt
from pyfmha.operators.tactics import tactics_of
from pyfmha.spec.manifest import INTERFACE

pytest_plugins = ("trt_double.fixtures",)


def last_error() -> str:
    failure = pyfmha_trt.last_failure()
    assert failure is not None
    return str(failure.error)


def test_name_version_and_namespace(scene: Scene) -> None:
    assert scene.calls.core(scene.built()) == ("TritonFlashAttention", "1", scene.namespace)


@pytest.mark.parametrize("causal", [None, 0, 1])
def test_fields_become_the_problem(scene: Scene, causal: int | None) -> None:
    problem = problem_of(scene.built(causal=causal))
    assert (problem.num_heads, problem.head_size, problem.dtype, problem.softmax_scale) == (HEADS, SIZE, "fp16", SCALE)
    assert problem.causal is (causal != 0)


def test_a_negative_scale_is_served(scene: Scene) -> None:
    assert problem_of(scene.built(softmax_scale=-1.5)).softmax_scale == -1.5


@pytest.mark.parametrize(("kind", "dtype"), [(FLOAT, "fp32"), (HALF, "fp16"), (BF16, "bf16")])
def test_type_ids_are_data_types(scene: Scene, kind: int, dtype: str) -> None:
    plugin = scene.built(type_id=kind)
    assert problem_of(plugin).dtype == dtype
    assert int(getattr(scene.trt.DataType, {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}[dtype])) == kind


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": None}, r"missing field num_heads; needed are num_heads \(INT32\)"),
        ({"softmax_scale": None}, "missing field softmax_scale"),
        ({"num_heads": 0}, "num_heads is 0; give 1 or more"),
        ({"num_heads": -3}, "num_heads is -3"),
        ({"head_size": 96}, "does not hold fmha_fwd_d128_fp16"),
        ({"head_size": 257}, "head size is 257"),
        ({"head_size": 0}, "head size is 0: use an integer from 1 to 256"),
        ({"head_size": 64}, r"does not hold fmha_d64_fp16.* it holds .*pyfmha build --dtype fp16 --head-size 64"),
        ({"type_id": 2}, r"type_id is 2; allowed is int\(trt.DataType\): 0 \(FLOAT\), 1 \(HALF\), 7 \(BF16\)"),
        ({"softmax_scale": 0.0}, "softmax_scale is 0; give a finite float32 other than 0"),
        ({"softmax_scale": float("nan")}, "softmax_scale is nan"),
        ({"softmax_scale": float("inf")}, "softmax_scale is inf"),
        ({"causal": 2}, "does not hold fmha_fwd_d32_fp16"),
        ({"causal": 3}, r"causal is 3; allowed are 1 .*, 2 .* and 0"),
        ({"window": 5}, "unknown field 'window'; allowed are num_heads"),
    ],
)
def test_wrong_fields_are_refused(scene: Scene, change: dict[str, Any], message: str) -> None:
    assert scene.calls.create(scene.creator, "bad layer", fields(**change), BUILD) is None
    with pytest.raises(pyfmha_trt.PluginError, match=message):
        raise pyfmha_trt.last_failure().error
    assert "'bad layer'" in last_error()


def test_repeated_field_is_refused(scene: Scene) -> None:
    assert scene.calls.create(scene.creator, "x", [*fields(), number("num_heads", INT32, HEADS)], BUILD) is None
    assert "field num_heads is given more than once" in last_error()


def test_field_of_another_type_is_refused(scene: Scene) -> None:
    wrong = [*fields(num_heads=None), number("num_heads", 1, HEADS)]  # as FLOAT32
    assert scene.calls.create(scene.creator, "x", wrong, BUILD) is None
    assert "field num_heads is of type" in last_error()
    assert "it must be INT32" in last_error()


@pytest.mark.parametrize("length", [0, 2])
def test_field_of_another_length_is_refused(scene: Scene, length: int) -> None:
    wrong = type(fields()[0])("num_heads", INT32, length, struct.pack("<ii", HEADS, HEADS)[: 4 * length])
    assert scene.calls.create(scene.creator, "x", [*fields(num_heads=None), wrong], BUILD) is None
    assert f"field num_heads has {length} values; it must have one INT32" in last_error()


def test_a_users_fields_are_refused_in_the_runtime_phase(scene: Scene) -> None:
    assert scene.calls.create(scene.creator, "x", fields(), RUNTIME) is None
    assert "the engine was not built by pyfmha" in last_error()


def test_stored_fields_are_refused_in_the_build_phase(scene: Scene) -> None:
    assert scene.calls.create(scene.creator, "x", [*fields(), number("pyfmha_schema", INT32, 1)], BUILD) is None
    assert "unknown field 'pyfmha_schema'" in last_error()


def test_an_engine_of_another_schema_is_refused(scene: Scene) -> None:
    stored = scene.calls.stored_fields(scene.built()).read()
    changed = [number(f.name, INT32, INTERFACE + 1) if f.name == "pyfmha_schema" else f for f in stored]
    assert scene.calls.create(scene.creator, "x", changed, RUNTIME) is None
    assert f"schema {INTERFACE + 1}; the library here has" in last_error()
    assert "build the engine again" in last_error()


def test_an_engine_of_another_prototype_is_refused(scene: Scene) -> None:
    stored = scene.calls.stored_fields(scene.built()).read()
    changed = [text(f.name, "fmha_d32_fp16(*fp16 Out)") if f.name == "pyfmha_prototype" else f for f in stored]
    assert scene.calls.create(scene.creator, "x", changed, RUNTIME) is None
    assert "the engine was built with fmha_d32_fp16(*fp16 Out), schema" in last_error()


def test_loading_gives_the_same_plugin(scene: Scene) -> None:
    built = scene.built(causal=0, softmax_scale=0.3, num_heads=5)
    loaded = scene.loaded(built)
    assert problem_of(loaded) == problem_of(built)
    assert [f.data for f in scene.calls.stored_fields(loaded).read()] == [
        f.data for f in scene.calls.stored_fields(built).read()
    ]


def test_output_has_the_inputs_type(scene: Scene) -> None:
    plugin = scene.built(type_id=BF16)
    assert scene.calls.output_types(plugin, [BF16] * 3) == [BF16]
    assert scene.calls.output_types(plugin, [BF16, HALF, BF16]) is None
    assert "K is of type" in last_error()
    assert "created for BF16 (type_id 7)" in last_error()
    assert scene.calls.output_types(plugin, [BF16] * 2) is None


def test_output_has_the_shape_of_q(scene: Scene) -> None:
    plugin = scene.built()
    known: list[int | None] = [3, HEADS, 77, SIZE]
    assert scene.calls.output_shapes(plugin, [known] * 3) == [known]
    assert scene.calls.output_shapes(plugin, [[None] * 4] * 3) == [[None] * 4]


@pytest.mark.parametrize("shape", [[2, HEADS + 1, 8, SIZE], [2, HEADS, 8, SIZE * 2], [HEADS, 8, SIZE]])
def test_shapes_that_do_not_fit_are_refused_early(scene: Scene, shape: list[int]) -> None:
    plugin = scene.built()
    assert scene.calls.output_shapes(plugin, [[2, HEADS, 8, SIZE], shape, [2, HEADS, 8, SIZE]]) is None
    assert "K has" in last_error()


def test_formats(scene: Scene) -> None:
    if not hasattr(scene.trt, "TensorFormat"):
        pytest.skip(f"{scene.trt.__name__} only runs engines: it has no TensorFormat, and never asks")
    plugin = scene.built()
    for position in range(4):
        good = dynamic()
        assert scene.calls.supports(plugin, position, good) is True
        for bad in (Tensor((1,) * 4, FLOAT), Tensor((1,) * 4, HALF, format=1)):
            assert scene.calls.supports(plugin, position, [*good[:position], bad, *good[position + 1 :]]) is False


def test_configure_checks_the_largest_shapes(scene: Scene) -> None:
    plugin, good = scene.built(), dynamic()
    assert scene.calls.configure(plugin, good[:3], good[3:]) == 0
    bad = Tensor((-1, HEADS, -1, SIZE), largest=(8, HEADS, 511, SIZE))
    assert scene.calls.configure(plugin, [good[0], bad, good[2]], good[3:]) != 0
    assert "K [8, 4, 511, 32]" in last_error()


@pytest.mark.parametrize(("batch", "seq"), [(8, 512), (1, 1), (3, 17), (0, 5)])
def test_workspace_is_what_the_statistics_need(scene: Scene, batch: int, seq: int) -> None:
    largest = dynamic(batch, seq)
    rows = batch * HEADS * seq
    aligned = (4 * rows + 15) // 16 * 16
    assert scene.calls.workspace(scene.built(), largest[:3], largest[3:]) == aligned + 4 * rows


def test_capabilities_are_the_plugin_itself(scene: Scene) -> None:
    plugin = scene.built()
    for name in ("CORE", "BUILD", "RUNTIME"):
        kind = getattr(scene.trt.PluginCapabilityType, name)
        assert plugin.get_capability_interface(kind) is plugin
        if scene.trt.__name__.startswith("tensorrt"):  # through C++: it answers the right one of its C++ objects
            base = getattr(scene.trt, f"IPluginV3One{name.capitalize()}")
            assert isinstance(scene.trt.IPluginV3.get_capability_interface(plugin, kind), base)


def test_clone_and_attach_copy_everything(scene: Scene) -> None:
    plugin = scene.loaded(scene.built(softmax_scale=0.3))
    first, second = tactics_of(plugin.origin.library["fmha_d32_fp16"].manifest)
    assert plugin.tactic == first
    assert scene.calls.set_tactic(plugin, second.id) == 0
    for made in (scene.calls.clone(plugin), scene.calls.attach(plugin)):
        assert made is not plugin
        assert made.origin == plugin.origin
        assert made.tactic == second
        assert scene.calls.core(made) == scene.calls.core(plugin)
        assert scene.calls.timing_cache_id(made) == scene.calls.timing_cache_id(plugin) is not None
        assert set(vars(made)) == set(vars(plugin))
        assert scene.calls.output_types(made, [HALF] * 3) == [HALF]


def test_a_clone_outlives_its_original(scene: Scene) -> None:
    plugin = scene.built()
    copy = scene.calls.clone(plugin)
    scene.calls.destroy(plugin)
    del plugin
    gc.collect()
    assert len(scene.calls.stored_fields(copy).read()) == 8


def test_unprepared_enqueue_is_refused(scene: Scene) -> None:
    plugin = scene.loaded()
    assert scene.calls.enqueue(plugin, [1, 2, 3], [4], 5, 6) != 0
    assert "on_shape_change was not called on this object" in last_error()


@pytest.mark.parametrize(
    "shapes",
    [
        tensors(heads=HEADS + 1),
        tensors(size=64),
        [*tensors()[:3], Tensor((2, HEADS, 99, SIZE))],
        [Tensor((2, HEADS, 100, SIZE)), Tensor((2, HEADS, 101, SIZE)), *tensors()[2:]],
        [Tensor((2, -1, 100, SIZE))] * 4,
        [Tensor((-1, HEADS, 100, SIZE))] * 4,
        [Tensor((HEADS, 100, SIZE))] * 4,
        tensors()[:3],
        tensors(kind=BF16),
    ],
)
def test_shapes_and_types_are_checked_at_run_time(scene: Scene, shapes: list[Tensor]) -> None:
    plugin = scene.loaded()
    assert scene.calls.on_shape_change(plugin, shapes[:3], shapes[3:]) != 0
    assert "on_shape_change:" in last_error()
    assert "'layer 7' (fp16, 4 heads of size 32, causal" in last_error()
    assert scene.calls.enqueue(plugin, [1, 2, 3], [4], 5, 6) != 0
