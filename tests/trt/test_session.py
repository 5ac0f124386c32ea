"""Running engines: shapes, memory, streams, graphs and errors, on doubles of TensorRT and of the GPU."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import LAUNCH_FAILED, run_python
from trt_double.full import VERSIONS, make_full
from trt_double.full.gpu import ILLEGAL_ADDRESS, Gpu

from pyfmha.attention.reference import attention_float64, relative_error
from pyfmha.attention.run import random_inputs, to_float
from pyfmha.errors import DriverError, EngineError, LaunchError, PyfmhaError
from pyfmha.trt import PluginError
from pyfmha.trt.attention.engine import EngineConfig, build_engine
from pyfmha.trt.engine import build_plan
from pyfmha.trt.session import Session

pytest_plugins = ["trt_double.fixtures", "trt_double.full.fixtures"]

SMALL = EngineConfig(num_heads=2, head_size=32, max_batch_size=2, max_seq_len=40, causal=True)
NOTHING = dict.fromkeys(("memory", "streams", "graphs", "events", "modules", "contexts"), 0)


def inputs_of(batch: int, seq: int, seed: int = 0, config: EngineConfig = SMALL) -> dict[str, Any]:
    arrays = random_inputs(config.dtype, (batch, config.num_heads, seq, config.head_size), seed)
    return dict(zip(("Q", "K", "V"), arrays, strict=True))


def error_of(out: Any, inputs: dict[str, Any], config: EngineConfig = SMALL) -> float:
    numbers = (to_float(x, config.dtype) for x in inputs.values())
    exact = attention_float64(*numbers, sm_scale=config.factor, causal=config.causal).out
    return relative_error(to_float(out, config.dtype), exact)


@pytest.fixture
def plan(trt11: Any) -> bytes:
    return build_engine(SMALL, trt_module=trt11).plan


def any_engine(trt: Any, define: Callable[[Any], Any], **ranges: Any) -> bytes:
    return build_plan(trt, define, ranges).plan


# ---------------------------------------------------------------- results


def test_shapes_in_turn_from_bytes_and_from_a_file(full_trt: Any, tmp_path: Path) -> None:
    plan = build_engine(SMALL, trt_module=full_trt).plan
    (tmp_path / "an.engine").write_bytes(plan)

    for engine in (plan, tmp_path / "an.engine", str(tmp_path / "an.engine")):
        with Session(engine, trt_module=full_trt) as session:
            for seed, (batch, seq) in enumerate([(1, 1), (2, 40), (1, 17), (2, 40), (2, 3)]):
                inputs = inputs_of(batch, seq, seed)
                assert error_of(session.run(inputs)["Out"], inputs) < 5e-4


def test_what_the_engine_takes_and_gives(trt11: Any, plan: bytes) -> None:
    with Session(plan, trt_module=trt11) as session:
        assert [str(info) for info in session.inputs] == [f"{name} HALF [-1, 2, -1, 32]" for name in "QKV"]
        (out,) = session.outputs
        assert (out.name, out.storage, out.is_input, out.on_host) == ("Out", np.float16, False, False)


def test_bfloat16_travels_as_its_bits(trt11: Any) -> None:
    config = EngineConfig(2, 32, 1, 16, "bf16", causal=True)
    inputs = inputs_of(1, 16, config=config)

    with Session(build_engine(config, trt_module=trt11).plan, trt_module=trt11) as session:
        out = session.run(inputs)["Out"]
        assert out.dtype == np.uint16
        assert error_of(out, inputs, config) < 4e-3
        assert "BF16 as uint16" in str(session.inputs[0])


def test_results_are_new_arrays_and_inputs_need_not_be_contiguous(trt11: Any, plan: bytes) -> None:
    inputs = inputs_of(2, 40)
    strided = {name: np.swapaxes(np.ascontiguousarray(np.swapaxes(x, 1, 2)), 1, 2) for name, x in inputs.items()}
    assert not strided["Q"].flags.c_contiguous

    with Session(plan, trt_module=trt11) as session:
        first = session.run(strided)["Out"]
        kept = first.copy()
        session.run(inputs_of(2, 40, seed=1))
        np.testing.assert_array_equal(first, kept)
    assert error_of(first, inputs) < 5e-4


def test_the_parts_of_a_run(trt11: Any, plan: bytes, gpu: Gpu) -> None:
    inputs = inputs_of(1, 8)
    with Session(plan, trt_module=trt11) as session:
        assert session.bind(inputs) == {"Out": (1, 2, 8, 32)}
        launched = gpu.cuda.launch_count()
        for _ in range(3):
            session.enqueue()
        assert gpu.cuda.launch_count() == launched + 3
        assert error_of(session.fetch()["Out"], inputs) < 5e-4


def test_a_second_bind_waits_for_the_copies_of_the_first(trt11: Any, plan: bytes, gpu: Gpu) -> None:
    """They read host memory, which is not kept any longer."""
    with Session(plan, trt_module=trt11) as session:
        session.bind(inputs_of(1, 8, seed=1))
        assert len(gpu.streams[session.stream.handle]) == 3
        inputs = inputs_of(1, 8, seed=2)
        session.bind(inputs)
        assert len(gpu.streams[session.stream.handle]) == 3
        session.enqueue()
        assert error_of(session.fetch()["Out"], inputs) < 5e-4


def test_memory_grows_and_is_kept(trt11: Any, plan: bytes, gpu: Gpu) -> None:
    with Session(plan, trt_module=trt11) as session:
        session.run(inputs_of(2, 40))
        held = dict(gpu.live())
        for seq in range(1, 41):
            session.run(inputs_of(1, seq))
        assert gpu.live() == held


def test_threads_share_a_session(trt11: Any, plan: bytes) -> None:
    errors: list[float] = []
    with Session(plan, trt_module=trt11) as session:

        def work(seed: int) -> None:
            for turn in range(5):
                inputs = inputs_of(1, 5 + seed, 10 * seed + turn)
                errors.append(error_of(session.run(inputs)["Out"], inputs))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(errors) == 20
    assert max(errors) < 5e-4


def test_the_second_device(trt11: Any, plan: bytes, gpu: Gpu) -> None:
    with Session(plan, trt_module=trt11, device=1) as session:
        session.run(inputs_of(1, 8))
    assert gpu.cuda.launches()[-1].device == 1


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_sessions_on_both_devices_in_turns(trt11: Any, plan: bytes, gpu: Gpu, cuda_graph: bool) -> None:
    """Each makes its own device current, whatever another left; closed in any order."""
    first, second, third = (
        Session(plan, trt_module=trt11, device=device, cuda_graph=cuda_graph) for device in (0, 1, 0)
    )
    before = gpu.cuda.launch_count()
    for seed, (batch, seq) in enumerate([(1, 8), (1, 8), (2, 40), (1, 8)]):
        for session, device in ((first, 0), (second, 1), (third, 0)):
            inputs = inputs_of(batch, seq, seed)
            count = gpu.cuda.launch_count()
            assert error_of(session.run(inputs)["Out"], inputs) < 5e-4
            assert {launch.device for launch in gpu.cuda.launches()[count:]} <= {device}
        if seed == 2:
            first.close()
            first = Session(plan, trt_module=trt11, device=0, cuda_graph=cuda_graph)
    assert {launch.device for launch in gpu.cuda.launches()[before:]} == {0, 1}

    for session in (second, first, third):
        session.close()
    assert gpu.live() == NOTHING


def test_a_device_without_code_is_an_error_in_words_and_the_other_works(trt11: Any, plan: bytes, gpu: Gpu) -> None:
    gpu.cuda.set_device(1, 75)
    with Session(plan, trt_module=trt11, device=0) as session:
        with pytest.raises(PyfmhaError, match="not for device 1, which is sm_75"):
            Session(plan, trt_module=trt11, device=1)
        inputs = inputs_of(1, 8)
        assert error_of(session.run(inputs)["Out"], inputs) < 5e-4
    assert gpu.live() == NOTHING


# ---------------------------------------------------------------- CUDA graphs


def test_a_graph_is_captured_after_the_first_run_and_replayed(trt11: Any, plan: bytes, gpu: Gpu) -> None:
    with Session(plan, trt_module=trt11, cuda_graph=True) as session:
        launched = gpu.cuda.launch_count()
        for seed in range(5):
            inputs = inputs_of(2, 17, seed)
            assert error_of(session.run(inputs)["Out"], inputs) < 5e-4
        assert gpu.cuda.launch_count() == launched + 2  # the first run, and the capture
        assert gpu.replays == 4
    assert gpu.cuda.violations() == (0, "")
    assert gpu.live() == NOTHING


def test_another_shape_or_larger_memory_voids_the_graph(trt11: Any, plan: bytes, gpu: Gpu) -> None:
    with Session(plan, trt_module=trt11, cuda_graph=True) as session:
        for seed, seq in enumerate((4, 4, 9, 9, 40, 40, 4, 4)):
            inputs = inputs_of(1, seq, seed)
            assert error_of(session.run(inputs)["Out"], inputs) < 5e-4
    assert gpu.replays == 4
    assert gpu.live() == NOTHING


def test_a_launch_that_fails_in_the_capture_leaves_the_session_usable(trt11: Any, plan: bytes, gpu: Gpu) -> None:
    with Session(plan, trt_module=trt11, cuda_graph=True) as session:
        gpu.cuda.fail("cuLaunchKernel", LAUNCH_FAILED, after=1)
        with pytest.raises(LaunchError, match="enqueue"):
            session.run(inputs_of(1, 8))
        gpu.cuda.heal("cuLaunchKernel")

        inputs = inputs_of(1, 8, 5)
        assert error_of(session.run(inputs)["Out"], inputs) < 5e-4
        assert gpu.live()["graphs"] == 1
    assert gpu.live() == NOTHING


# ---------------------------------------------------------------- inputs that do not fit


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda i: i.pop("K"), r"missing input K; the engine's inputs are Q HALF \[-1, 2, -1, 32\], K"),
        (lambda i: i.update(W=i["Q"]), "unknown input W; the engine's inputs are Q"),
        (lambda i: i.update(Q=i["Q"].astype(np.float32)), "Q is float32; it must be float16"),
        (lambda i: i.update(Q=i["Q"][0]), r"Q is \[2, 8, 32\]; the engine has Q HALF \[-1, 2, -1, 32\]"),
        (lambda i: i.update(Q=i["Q"].tolist()), "Q is a list; give a numpy array"),
        (
            lambda i: i.update({name: np.zeros((3, 2, 8, 32), np.float16) for name in "QKV"}),
            r"outside .* profile: Q is \[3, 2, 8, 32\], allowed is \[1, 2, 1, 32\] to \[2, 2, 40, 32\]",
        ),
        (lambda i: i.update(V=np.zeros((1, 2, 41, 32), np.float16)), r"profile: V is \[1, 2, 41, 32\], allowed"),
        (lambda i: i.update(V=np.zeros((1, 2, 0, 32), np.float16)), r"profile: V is \[1, 2, 0, 32\], allowed"),
    ],
)
def test_inputs_that_do_not_fit_say_what_does(
    trt11: Any, plan: bytes, change: Callable[[dict[str, Any]], Any], text: str
) -> None:
    inputs = inputs_of(1, 8)
    with Session(plan, trt_module=trt11) as session:
        good = dict(inputs)
        change(inputs)
        with pytest.raises(EngineError, match=text):
            session.run(inputs)

        assert error_of(session.run(good)["Out"], good) < 5e-4


def test_shapes_that_only_the_plugin_can_refuse(trt11: Any, plan: bytes) -> None:
    inputs = {**inputs_of(1, 8), "K": inputs_of(1, 9)["K"]}
    with Session(plan, trt_module=trt11) as session:
        with pytest.raises(PluginError, match=r"on_shape_change: shapes are Q \[1, 2, 8, 32\], K \[1, 2, 9, 32\]"):
            session.run(inputs)

        good = inputs_of(1, 9)
        assert error_of(session.run(good)["Out"], good) < 5e-4


def test_the_profile_that_serves_is_chosen(trt11: Any, gpu: Gpu) -> None:
    plan = two_profiles(trt11)
    with Session(plan, trt_module=trt11) as session:
        for size in (2, 7, 8, 3):
            x = np.arange(size, dtype=np.float32)
            # The other input keeps its shape, which is void in another profile all the same.
            outputs = session.run({"x": x, "other": np.ones(2, np.float32)})
            np.testing.assert_array_equal(outputs["y"], x)
            np.testing.assert_array_equal(outputs["z"], [1, 1])
        with pytest.raises(EngineError, match=r"profiles: x is \[5\], allowed is \[1\] to \[4\] or \[6\] to \[8\]"):
            session.run({"x": np.zeros(5, np.float32), "other": np.ones(2, np.float32)})


def two_profiles(trt: Any) -> bytes:
    from pyfmha.trt.messages import logger_of

    builder = trt.Builder(logger_of(trt))
    network = builder.create_network(0)
    for source, name in (("x", "y"), ("other", "z")):
        output = network.add_identity(network.add_input(source, trt.DataType.FLOAT, (-1,))).get_output(0)
        output.name = name
        network.mark_output(output)
    config = builder.create_builder_config()
    for low, high in ((1, 4), (6, 8)):
        profile = builder.create_optimization_profile()
        profile.set_shape("x", (low,), (low,), (high,))
        profile.set_shape("other", (1,), (2,), (3,))
        config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))


# ---------------------------------------------------------------- other engines


def nonzero(trt: Any) -> Callable[[Any], None]:
    def define(network: Any) -> None:
        y = network.add_non_zero(network.add_input("x", trt.DataType.FLOAT, (-1,))).get_output(0)
        y.name = "where"
        network.mark_output(y)

    return define


def test_an_output_whose_shape_depends_on_the_data(trt11: Any, gpu: Gpu) -> None:
    plan = any_engine(trt11, nonzero(trt11), x=((1,), (8,), (64,)))

    with Session(plan, trt_module=trt11) as session:
        assert session.bind({"x": np.ones(3, np.float32)}) == {"where": (1, -1)}
        for count in (3, 64, 0, 10):
            x = np.zeros(64, np.float32)
            x[:count] = 1
            np.testing.assert_array_equal(session.run({"x": x})["where"], [np.arange(count)])
    assert gpu.live() == NOTHING


def test_no_memory_for_such_an_output(trt11: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = any_engine(trt11, nonzero(trt11), x=((1,), (8,), (64,)))
    with Session(plan, trt_module=trt11) as session:
        session.bind({"x": np.ones(64, np.float32)})

        def full(*_: Any) -> None:
            raise DriverError("cuMemAlloc failed: CUDA error 2, out of memory", 2)

        monkeypatch.setattr("pyfmha.trt.allocator.DeviceArray", full)
        with pytest.raises(DriverError, match=r"output 'where', \d+ bytes: reallocate_output: .*out of memory"):
            session.enqueue()


def test_such_an_engine_cannot_be_a_graph(trt11: Any) -> None:
    plan = any_engine(trt11, nonzero(trt11), x=((1,), (8,), (64,)))

    refused = pytest.raises(EngineError, match=r"depends on the data, \[1, -1\]: it cannot run as a CUDA graph")
    with Session(plan, trt_module=trt11, cuda_graph=True) as session, refused:
        session.run({"x": np.ones(3, np.float32)})


def reshape(trt: Any) -> bytes:
    from pyfmha.trt.messages import logger_of

    builder = trt.Builder(logger_of(trt))
    network = builder.create_network(0)
    layer = network.add_shuffle(network.add_input("x", trt.DataType.FLOAT, (-1,)))
    layer.set_input(1, network.add_input("shape", trt.DataType.INT64, (2,)))
    y = layer.get_output(0)
    y.name = "y"
    network.mark_output(y)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1,), (6,), (24,))
    profile.set_shape_input("shape", (1, 1), (2, 3), (4, 6))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))


def test_an_input_whose_values_are_shapes(trt11: Any) -> None:
    with Session(reshape(trt11), trt_module=trt11) as session:
        assert [info.on_host for info in session.inputs] == [False, True]
        for rows, columns in ((2, 3), (3, 2), (1, 6), (4, 6)):
            x = np.arange(rows * columns, dtype=np.float32)
            y = session.run({"x": x, "shape": np.array([rows, columns])})["y"]
            np.testing.assert_array_equal(y, x.reshape(rows, columns))
        with pytest.raises(EngineError, match=r"shape is \[5, 1\], allowed are values \[1, 1\] to \[4, 6\]"):
            session.run({"x": np.zeros(5, np.float32), "shape": np.array([5, 1])})


def test_shapes_among_the_inputs_cannot_be_a_graph(trt11: Any, gpu: Gpu) -> None:
    with pytest.raises(EngineError, match="cannot run as a CUDA graph"):
        Session(reshape(trt11), trt_module=trt11, cuda_graph=True)
    assert gpu.live() == NOTHING


def test_an_engine_without_the_plugin_needs_no_library(
    trt11: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = any_engine(trt11, nonzero(trt11), x=((1,), (8,), (64,)))
    monkeypatch.setenv("PYFMHA_LIBRARY", str(tmp_path / "none.so"))

    with Session(plan, trt_module=trt11) as session:
        assert session.run({"x": np.ones(2, np.float32)})["where"].shape == (1, 2)


# ---------------------------------------------------------------- engines and machines that will not do


def test_a_missing_engine(trt11: Any, tmp_path: Path, gpu: Gpu) -> None:
    with pytest.raises(EngineError, match=r"no engine at .*none\.engine \(No such file.*examples/build\.py"):
        Session(tmp_path / "none.engine", trt_module=trt11)
    assert gpu.live() == NOTHING


def test_a_file_that_is_no_engine(trt11: Any, gpu: Gpu) -> None:
    with pytest.raises(EngineError, match=r"cannot be loaded: TensorRT: .*magicTag"):
        Session(b"nonsense", trt_module=trt11)
    assert gpu.live() == NOTHING


def test_an_engine_of_another_version(plan: bytes, trt11: Any) -> None:
    other = make_full("trt_full_other", VERSIONS[0])

    with pytest.raises(EngineError, match=r"cannot be loaded: TensorRT: .*Version tag does not match"):
        Session(plan, trt_module=other)
    del sys.modules["trt_full_other"]


def test_an_engine_with_the_plugin_where_its_library_is_missing(
    plan: bytes, trt11: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fresh = make_full("trt_full_fresh", trt11.__version__)
    monkeypatch.setenv("PYFMHA_LIBRARY", str(tmp_path / "none.so"))

    with pytest.raises(EngineError, match=r"Cannot find plugin: TritonFlashAttention.*not registered: .*pyfmha build"):
        Session(plan, trt_module=fresh)
    del sys.modules["trt_full_fresh"]


def test_a_device_without_code(trt11: Any, plan: bytes, gpu: Gpu) -> None:
    gpu.cuda.set_device(1, 80)

    with pytest.raises(PyfmhaError, match=r"layer .*sm_80"):
        Session(plan, trt_module=trt11, device=1)
    assert gpu.live() == NOTHING


def test_no_such_device(trt11: Any, plan: bytes, gpu: Gpu) -> None:
    with pytest.raises(DriverError, match="no GPU 2: the driver sees 2"):
        Session(plan, trt_module=trt11, device=2)


def test_without_a_gpu_tensorrt_is_not_even_asked(trt11: Any, plan: bytes, gpu: Gpu) -> None:
    """TensorRT's own runtime crashes the process there."""
    gpu.cuda.set_device_count(0)

    with pytest.raises(DriverError, match="error 100"):
        Session(plan, trt_module=trt11)


def test_without_tensorrt(plan: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_lean", "tensorrt_dispatch"):
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(PluginError, match="TensorRT is not installed"):
        Session(plan)


def test_the_lean_runtime_runs_compatible_engines_and_says_so_of_others(trt11: Any, gpu: Gpu) -> None:
    lean = make_full("tensorrt_lean", VERSIONS[-1])
    try:
        compatible = build_engine(SMALL, trt_module=trt11, version_compatible=True).plan
        inputs = inputs_of(1, 8)
        with Session(compatible, trt_module=lean) as session:
            assert error_of(session.run(inputs)["Out"], inputs) < 5e-4

        with pytest.raises(
            EngineError, match="tensorrt_lean runs engines that were built with version_compatible=True"
        ):
            Session(build_engine(SMALL, trt_module=trt11).plan, trt_module=lean)
    finally:
        del sys.modules["tensorrt_lean"]
    assert gpu.live() == NOTHING


# ---------------------------------------------------------------- failures in a run


def test_a_failed_launch_is_raised_in_the_plugins_own_words(trt11: Any, plan: bytes, gpu: Gpu) -> None:
    with Session(plan, trt_module=trt11) as session:
        gpu.cuda.fail("cuLaunchKernel", LAUNCH_FAILED, times=1)
        with pytest.raises(LaunchError, match=r"TritonFlashAttention layer .*\(fp16, 2 heads.*enqueue: ") as caught:
            session.run(inputs_of(1, 8))
        assert caught.value.code == LAUNCH_FAILED

        inputs = inputs_of(1, 8)
        assert error_of(session.run(inputs)["Out"], inputs) < 5e-4


def test_a_fault_on_the_gpu_is_raised_by_the_wait_and_all_is_given_back(trt11: Any, plan: bytes, gpu: Gpu) -> None:
    session = Session(plan, trt_module=trt11, cuda_graph=True)
    session.bind(inputs_of(1, 8))
    session.enqueue()
    gpu.lose()
    with pytest.raises(DriverError, match="illegal memory access") as caught:
        session.fetch()
    assert caught.value.code == ILLEGAL_ADDRESS
    with pytest.raises(DriverError, match="illegal memory access"):
        session.close()
    assert gpu.live() == NOTHING


def test_close_gives_everything_back_once(trt11: Any, plan: bytes, gpu: Gpu) -> None:
    session = Session(plan, trt_module=trt11, cuda_graph=True)
    session.run(inputs_of(1, 8))
    session.run(inputs_of(1, 8))
    assert gpu.live() != NOTHING

    session.close()
    session.close()

    assert gpu.live() == NOTHING
    with pytest.raises(EngineError, match="the session is closed"):
        session.run(inputs_of(1, 8))
    with pytest.raises(EngineError, match="the session is closed"):
        session.fetch()


def test_two_sessions_on_one_device_do_not_disturb_each_other(trt11: Any, plan: bytes, gpu: Gpu) -> None:
    inputs = inputs_of(2, 30)
    with Session(plan, trt_module=trt11) as first:
        with Session(plan, trt_module=trt11) as second:
            assert error_of(second.run(inputs)["Out"], inputs) < 5e-4
        assert error_of(first.run(inputs)["Out"], inputs) < 5e-4
    assert gpu.live() == NOTHING


REAL = """
import tensorrt_lean as trt
from pyfmha.errors import DriverError
from pyfmha.trt.allocator import make_allocator
from pyfmha.trt.messages import logger_of
from pyfmha.trt.session import Session

assert isinstance(logger_of(trt), trt.ILogger)
allocator = make_allocator(trt)
assert isinstance(allocator, trt.IOutputAllocator)
allocator.notify_shape("y", trt.Dims((2, 3)))
assert allocator.shape() == (2, 3)
needed = {
    trt.ICudaEngine: ["num_io_tensors", "get_tensor_name", "get_tensor_dtype", "get_tensor_vectorized_dim",
        "get_tensor_mode", "get_tensor_location", "get_tensor_format_desc", "get_tensor_profile_shape",
        "get_tensor_profile_values", "num_optimization_profiles", "get_tensor_shape", "create_execution_context"],
    trt.IExecutionContext: ["infer_shapes", "set_optimization_profile_async", "active_optimization_profile",
        "set_input_shape", "set_tensor_address", "get_tensor_shape", "set_output_allocator", "execute_async_v3"],
    trt.Runtime: ["deserialize_cuda_engine"],
    trt: ["TensorIOMode", "TensorLocation", "DataType"],
}
for owner, names in needed.items():
    assert not [name for name in names if not hasattr(owner, name)], owner
# The trap: by its keywords this would be the other way round.
assert "name: typing.SupportsInt, profile_index: str" in trt.ICudaEngine.get_tensor_profile_values.__doc__
try:
    Session(b"nonsense", trt_module=trt)
except DriverError as error:
    print("refused:", error)
"""


def test_the_real_lean_binding_has_what_a_session_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_lean")
    monkeypatch.delenv("PYFMHA_LIBCUDA", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # where there is a GPU, none is to be seen

    done = run_python(REAL)

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused: "), done
