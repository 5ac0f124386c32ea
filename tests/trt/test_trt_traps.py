"""The ten traps of ``TENSORRT.md``, in its order.

Where a trap can be fallen into by one line, a test also falls into it, to show that it would be noticed.
"""

import gc
import logging
import re
import struct
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from shared import Shared
from trt_double import BUILD, CHAR, FLOAT32, HALF, INT32, RUNTIME, Field, Tensor
from trt_double.scene import HEADS, SCALE, SIZE, Scene, dynamic, fields, problem_of, tensors

import pyfmha.trt
from pyfmha.operators.instance import Instance
from pyfmha.operators.tactics import tactics_of
from pyfmha.runtime.library import Library
from pyfmha.trt.creator import register

pytest_plugins = ("trt_double.fixtures",)
PACKAGE = Path(pyfmha.trt.__file__).parent


def start(fake_cuda: FakeCuda, device: int = 0) -> int:
    """What TensorRT has done before it calls: started the driver, made a context current."""
    assert fake_cuda.c.cuInit(0) == 0
    return fake_cuda.use_context(device)


def litter() -> list[Any]:
    """Collect garbage and write over the memory it had."""
    gc.collect()
    return [np.full(size, 0xEE, np.uint8) for size in (1, 4, 8, 64, 129, 178, 256) for _ in range(200)]


# 1. temporaries behind PluginField


def stored_values(stored: list[Field]) -> dict[str, Any]:
    forms = {INT32: "<i", FLOAT32: "<f"}
    return {f.name: f.data if f.type == CHAR else struct.unpack(forms[f.type], f.data)[0] for f in stored}


def test_1_stored_fields_outlive_python_garbage(scene: Scene) -> None:
    plugin = scene.built()
    pointers = scene.calls.stored_fields(plugin)
    rubbish = litter()
    values = stored_values(pointers.read())
    assert rubbish
    assert [values[name] for name in ("num_heads", "head_size", "type_id", "causal")] == [HEADS, SIZE, HALF, 1]
    assert values["softmax_scale"] == SCALE
    assert values["pyfmha_prototype"].startswith(b"fmha_d32_fp16(*fp16 Out, *fp32 L, ")
    assert values["pyfmha_prototype"].endswith(b"\0")


def test_1_the_double_notices_temporaries(attention_library: Library) -> None:
    from trt_double.binding import make_binding

    scene = Scene(make_binding(), attention_library)
    plugin, trt = scene.built(), scene.trt

    def temporary() -> Any:
        data = np.array([HEADS], np.int32)
        return trt.PluginFieldCollection([trt.PluginField("num_heads", data, trt.PluginFieldType.INT32)])

    plugin.get_fields_to_serialize = temporary
    assert scene.calls.stored_fields(plugin).read()[0].name != "num_heads"


def test_1_created_plugins_keep_nothing_of_the_fields(scene: Scene) -> None:
    plugin = scene.built()  # the calls write over the fields' memory afterwards
    assert problem_of(plugin).num_heads == HEADS
    assert scene.loaded(plugin).origin.stored == plugin.origin.stored


# 2. get_workspace_size raising


def test_2_a_failed_workspace_is_no_zero(scene: Scene, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    plugin = scene.loaded()
    wrong = Tensor((-1, HEADS, -1, SIZE), largest=(8, HEADS, 512, SIZE + 1))
    assert scene.calls.workspace(plugin, [wrong] * 3, [wrong]) > 1 << 60  # no device has it: TensorRT drops the layer
    attached = scene.calls.attach(plugin)  # a clone knows it too
    shape = tensors()
    assert scene.calls.on_shape_change(attached, shape[:3], shape[3:]) != 0
    assert "get_workspace_size: shapes are Q [8, 4, 512, 33]" in str(pyfmha.trt.last_failure().error)
    assert scene.calls.enqueue(attached, [16, 32, 48], [64], 256, 7) != 0
    assert fake_cuda.launch_count() == 0


def test_2_a_failure_that_is_no_error_of_ours(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Instance, "plan", lambda *arguments: 1 // 0)
    largest = dynamic()
    assert scene.calls.workspace(scene.built(), largest[:3], largest[3:]) > 1 << 60
    assert "ZeroDivisionError" in str(pyfmha.trt.last_failure().error)


def test_2_no_workspace_is_refused(scene: Scene, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    plugin = scene.running()
    assert scene.calls.enqueue(plugin, [16, 32, 48], [64], 0, 7) != 0
    assert "TensorRT gave no workspace" in str(pyfmha.trt.last_failure().error)
    assert fake_cuda.launch_count() == 0


# 3. returning a code from enqueue


def test_3_a_failed_launch_is_a_failure(scene: Scene, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    plugin = scene.running()
    fake_cuda.fail("cuLaunchKernel", 719)
    assert scene.calls.enqueue(plugin, [16, 32, 48], [64], 256, 7) != 0
    fake_cuda.heal("cuLaunchKernel")
    assert scene.calls.enqueue(plugin, [16, 32, 48], [64], 256, 7) == 0


def test_3_a_returned_code_is_lost(scene: Scene) -> None:
    plugin = scene.loaded()
    plugin.enqueue = lambda *arguments: 719
    assert scene.calls.enqueue(plugin, [16, 32, 48], [64], 256, 7) == 0


def test_3_nothing_but_none_is_returned(scene: Scene, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    plugin = scene.running()
    descs = scene.trt.PluginTensorDesc()
    assert plugin.enqueue([descs] * 3, [descs], [16, 32, 48], [64], 256, 7) is None
    assert plugin.set_tactic(0) is None


# 4. a clone that copies only __dict__


def test_4_a_clone_has_its_own_objects_in_cpp(scene: Scene) -> None:
    plugin = scene.built()
    copy = scene.calls.clone(scene.calls.clone(plugin))
    assert scene.calls.core(copy) == ("TritonFlashAttention", "1", scene.namespace)
    assert scene.calls.timing_cache_id(copy) == scene.calls.timing_cache_id(plugin)
    assert scene.calls.output_types(copy, [HALF] * 3) == [HALF]  # num_outputs is 1 in C++


def test_4_a_copied_dict_is_noticed(scene: Scene) -> None:
    plugin = scene.built()

    def shallow() -> Any:
        copy = type(plugin).__new__(type(plugin))
        for base in type(plugin).trt_bases:
            base.__init__(copy)
        vars(copy).update(vars(plugin))
        return copy

    plugin.clone = shallow
    copy = scene.calls.clone(plugin)
    assert copy is not None
    assert scene.calls.core(copy)[0] == "missing"
    assert scene.calls.timing_cache_id(copy) is None


# 5. float64 or int64 data in a FLOAT32 or INT32 field


def test_5_stored_numbers_have_the_width_of_their_type(scene: Scene) -> None:
    for field in scene.calls.stored_fields(scene.built()).read():
        if field.type != CHAR:
            assert field.length == 1
            assert field.type == (FLOAT32 if field.name == "softmax_scale" else INT32)


def test_5_a_float64_scale_is_refused(scene: Scene) -> None:
    wrong = Field("softmax_scale", FLOAT32, 1, struct.pack("<d", 0.125)[:4])  # what C++ sees of it
    assert scene.calls.create(scene.creator, "x", [*fields(softmax_scale=None), wrong], BUILD) is None
    assert "float64 data in a FLOAT32 field is misread" in str(pyfmha.trt.last_failure().error)


# 6. an incomplete field_names loses ONNX attributes


def test_6_an_onnx_node_keeps_all_attributes(scene: Scene) -> None:
    attributes: dict[str, float] = {
        "num_heads": HEADS,
        "head_size": SIZE,
        "type_id": HALF,
        "softmax_scale": 0.3,
        "causal": 0,
    }
    every = {field.name: int(field.type) for field in scene.creator.field_names}
    assert list(every.items())[:5] == [(name, FLOAT32 if name == "softmax_scale" else INT32) for name in attributes]
    names = [(name, kind) for name, kind in every.items() if name in attributes]
    read = [  # as the parser: only what field_names lists, as INT32 from INT and FLOAT32 from FLOAT
        Field(name, kind, 1, struct.pack("<f" if kind == FLOAT32 else "<i", attributes[name])) for name, kind in names
    ]
    problem = problem_of(scene.calls.create(scene.creator, "node", read, BUILD))
    assert problem.causal is False
    assert problem.softmax_scale == pytest.approx(0.3)


def test_6_field_names_outlive_python_garbage(scene: Scene) -> None:
    rubbish = litter()
    assert rubbish
    assert [f.name for f in scene.creator.field_names] == [
        "num_heads",
        "head_size",
        "type_id",
        "softmax_scale",
        "causal",
        "num_kv_heads",
        "layout",
        "bottom_right",
        "window_left",
        "window_right",
        "softcap",
        "return_lse",
        "q_lengths",
        "kv_lengths",
        "cu_seqlens",
        "bias",
        "mask",
        "sinks",
        "v_head_size",
        "fp8",
        "q_descale",
        "k_descale",
        "v_descale",
    ]


# 7. a timing_cache_id that does not change with attributes or kernels


def test_7_every_attribute_and_the_library_change_the_cache_id(scene: Scene, attention_library: Library) -> None:
    changes: list[dict[str, float]] = [
        {},
        {"num_heads": 5},
        {"type_id": 7},
        {"softmax_scale": 0.3},
        {"softmax_scale": float(np.nextafter(np.float32(0.3), np.float32(1)))},
        {"causal": 0},
    ]
    ids = [scene.calls.timing_cache_id(scene.built(**change)) for change in changes]
    assert None not in ids
    assert len(set(ids)) == len(ids)
    assert all(attention_library.manifest.build_id in (cache_id or "") for cache_id in ids)
    assert f"head_size={SIZE}" in (ids[0] or "")
    assert scene.calls.timing_cache_id(scene.built()) == ids[0]
    assert scene.calls.timing_cache_id(scene.built(causal=1)) == ids[0]


# 8. module loading, allocation, sync, default stream or device 0 in enqueue


def test_8_enqueue_may_be_captured(scene: Scene, fake_cuda: FakeCuda) -> None:
    start(fake_cuda, 1)
    plugin = scene.running()
    before = {name: fake_cuda.calls(name) for name in ("cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute")}
    fake_cuda.begin_capture()
    status = scene.calls.enqueue(plugin, [16, 32, 48], [64], 256, 0xBEEF)
    fake_cuda.end_capture()
    assert status == 0
    assert fake_cuda.violations()[0] == 0
    assert before == {name: fake_cuda.calls(name) for name in before}
    (launch,) = fake_cuda.launches()
    assert (launch.stream, launch.device) == (0xBEEF, 1)


def test_8_loading_in_enqueue_would_be_noticed(scene: Scene, fake_cuda: FakeCuda) -> None:
    start(fake_cuda)
    plugin = scene.loaded()
    plugin.enqueue = lambda *arguments: plugin._main_function().load()
    fake_cuda.begin_capture()
    status = scene.calls.enqueue(plugin, [16, 32, 48], [64], 256, 7)
    fake_cuda.end_capture()
    assert status != 0
    assert fake_cuda.violations() == (1, "cuModuleLoadData")


# 9. flags that TensorRT 11 removed


def test_9_nothing_removed_is_named() -> None:
    removed = re.compile(
        r"EXPLICIT_BATCH|BuilderFlag\.(FP16|BF16)|get_plugin_creator|plugin_creator_list|\.precision\b"
    )
    for file in PACKAGE.glob("**/*.py"):
        assert not removed.search(file.read_text()), file


# 10. loading an engine where the creator is not registered


def test_10_registration_is_a_modules_and_a_namespaces_own(scene: Scene, attention_library: Library) -> None:
    registry = scene.trt.get_plugin_registry()
    assert registry.get_creator("TritonFlashAttention", "1", scene.namespace) is scene.creator
    assert registry.get_creator("TritonFlashAttention", "1", scene.namespace + "x") is None
    other = register(scene.trt, namespace=scene.namespace + "x", library=attention_library)
    assert registry.get_creator("TritonFlashAttention", "1", scene.namespace + "x") is other is not scene.creator


# Errors reach the user


def test_failures_are_logged_and_collected(scene: Scene, fake_cuda: FakeCuda, caplog: pytest.LogCaptureFixture) -> None:
    start(fake_cuda)
    plugin = scene.running(batch=3, seq=17)
    fake_cuda.fail("cuLaunchKernel", 719)
    with caplog.at_level(logging.ERROR, "pyfmha"), pyfmha.trt.collect_failures() as failures:
        assert scene.calls.enqueue(plugin, [16, 32, 48], [64], 256, 7) != 0
    (failure,) = failures
    assert failure.call == "enqueue"
    assert failure.error.code == 719
    for part in ("'layer 7'", "fp16, 4 heads of size 32, causal", "[3, 17] batch and seq", "cuLaunchKernel failed"):
        assert part in str(failure.error)
    assert [record.getMessage() for record in caplog.records if record.name == "pyfmha"] == [str(failure.error)]
    fake_cuda.heal("cuLaunchKernel")
    with pyfmha.trt.collect_failures() as failures:
        assert scene.calls.enqueue(plugin, [16, 32, 48], [64], 256, 7) == 0
    assert failures == []


# Tactics, across builds of the library


@pytest.fixture(scope="session")
def other_library_path(shared: Shared) -> Path:
    """The library without its second algorithm, and with a third before the first."""
    from trt_double.scene import MEMBERS, specs

    from pyfmha.aot import build
    from pyfmha.spec.arch import parse_archs

    wanted = specs(MEMBERS[:1], (8, 4))
    return shared.once("other_library", lambda folder: build(wanted, parse_archs(["sm_90"]), folder, jobs=2).library)


def test_tactics_mean_the_same_in_another_build(
    trt: ModuleType, attention_library: Library, other_library_path: Path, fake_cuda: FakeCuda
) -> None:
    start(fake_cuda)
    old, new = Scene(trt, attention_library), Scene(trt, other_library_path)
    built = old.built()
    first, second = old.calls.tactics(built)
    assert first > 0
    assert second > 0
    loaded = new.calls.create(new.creator, "layer 7", old.calls.stored_fields(built).read(), RUNTIME)
    assert new.calls.set_tactic(loaded, first) == 0
    assert loaded.tactic.algo_id == 1  # it has moved
    assert loaded.tactic.name == built.tactic.name
    assert new.calls.set_tactic(loaded, second) != 0
    message = str(pyfmha.trt.last_failure().error)
    gone = tactics_of(built._main_function().manifest)[1].name
    assert f"tactic {second} ({gone}), which this library does not hold" in message
    assert new.calls.timing_cache_id(new.built()) != old.calls.timing_cache_id(built)


def test_an_unknown_tactic_is_refused(scene: Scene) -> None:
    plugin = scene.loaded()
    assert scene.calls.set_tactic(plugin, 12345) != 0
    assert "tactic 12345, which this library does not hold; it holds" in str(pyfmha.trt.last_failure().error)


def test_tactics_need_code_for_the_device(scene: Scene, fake_cuda: FakeCuda) -> None:
    plugin = scene.built()
    assert scene.calls.tactics(plugin) is None
    assert "no current CUDA context" in str(pyfmha.trt.last_failure().error)
    fake_cuda.set_device(1, 80)
    start(fake_cuda, 0)
    assert len(scene.calls.tactics(plugin)) == 2
    start(fake_cuda, 1)
    assert scene.calls.tactics(plugin) is None
    message = str(pyfmha.trt.last_failure().error)
    assert "which is sm_80; it is built for sm_90: pyfmha build --arch sm_80" in message


def test_colliding_ids_are_refused(attention_library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyfmha.operators import tactics

    function = attention_library["fmha_d32_fp16"].manifest
    assert len(tactics.tactics_of(function)) == 2
    monkeypatch.setattr(tactics, "tactic_id", lambda name: 1)
    with pytest.raises(pyfmha.trt.PluginError, match="two algorithms of fmha_d32_fp16 have the same tactic id"):
        tactics.tactics_of(function)
    assert len(tactics.tactics_of(replace(function, algorithms=function.algorithms[:1]))) == 1
