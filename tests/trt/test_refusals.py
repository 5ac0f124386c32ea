"""What TensorRT's binding answers with where it refuses: exceptions of its own, in whose place errors say why."""

import gc
import logging
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import LAUNCH_FAILED
from trt_double.full import builder, make_full
from trt_double.full.gpu import Gpu

from pyfmha.errors import EngineError, PyfmhaError
from pyfmha.runtime.library import Library
from pyfmha.trt import PluginError, add_attention, add_attention_packed, last_failure, register
from pyfmha.trt.attention.engine import EngineConfig, build_engine
from pyfmha.trt.engine import build_plan
from pyfmha.trt.plugin import PluginBehaviour
from pyfmha.trt.session import Session

pytest_plugins = ["trt_double.fixtures", "trt_double.full.fixtures"]

SMALL = EngineConfig(num_heads=2, head_size=32, max_batch_size=2, max_seq_len=40, causal=True)
SHAPE = (2, 4, 8, 32)


@pytest.fixture
def library(forward_library_path: Any, gpu: Gpu) -> Library:
    """The production kernel's stand-ins."""
    gpu.learn(forward_library_path.with_name("manifest.json"))
    return Library(forward_library_path)


def network_of(trt: Any) -> Any:
    return trt.Builder(logger(trt)).create_network(0 if trt.__version__ >= "11" else 2)


def logger(trt: Any) -> Any:
    class Silent(trt.ILogger):
        def log(self, severity: Any, msg: str) -> None:
            pass

    return Silent()


# ---------------------------------------------------------------- a network with what the plugin refuses


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (("INT32", (3,)), "kv_lengths has batch 3, Q has 2; they must be the same"),
        (("FLOAT", (2,)), r"kv_lengths is of type .*; it must be INT32"),
        (("INT32", (2, 1)), r"kv_lengths has 2 dimensions; it must be \[batch\]"),
    ],
)
def test_lengths(full_trt: Any, library: Library, lengths: tuple[str, Any], message: str) -> None:
    network = network_of(full_trt)
    q, k, v = (network.add_input(name, full_trt.DataType.HALF, SHAPE) for name in "QKV")
    given = network.add_input("lengths", full_trt.DataType[lengths[0]], lengths[1])

    with pytest.raises(PluginError, match=rf"^TritonFlashAttention layer 'mine' .*{message}"):
        add_attention(network, q, k, v, causal=True, kv_lengths=given, name="mine", library=library)


def test_keys_of_another_batch(full_trt: Any, library: Library) -> None:
    network = network_of(full_trt)
    q, k, v = (network.add_input(name, full_trt.DataType.HALF, (2 + (name != "Q"), *SHAPE[1:])) for name in "QKV")

    with pytest.raises(PluginError, match=r"TritonFlashAttention layer .*K has batch 3, Q has 2"):
        add_attention(network, q, k, v, causal=True, library=library)


def test_packed_heads_that_do_not_fit(full_trt: Any, library: Library) -> None:
    network = network_of(full_trt)
    qkv = network.add_input("QKV", full_trt.DataType.HALF, (2, 8, 12, 32))

    with pytest.raises(PluginError, match=r"QKV has heads \+ 2 \* kv heads 12, the plugin was created for 15"):
        add_attention_packed(network, qkv, 5, causal=True, library=library)


# ---------------------------------------------------------------- no builder, no runtime


def test_a_driver_that_is_too_old(full_trt: Any, gpu: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    plan = build_engine(SMALL, trt_module=full_trt).plan
    full_trt.double.old_driver = True
    reason = r"TensorRT: CUDA initialization failure with error: 35\..*; the NVIDIA driver must be as new"

    with pytest.raises(EngineError, match=f"gives no Builder here: {reason}"):
        build_engine(SMALL, trt_module=full_trt)
    with pytest.raises(EngineError, match=f"gives no Runtime here: {reason}"):
        Session(plan, trt_module=full_trt)
    assert [record.levelno for record in caplog.records if "error: 35" in record.message] == [logging.WARNING] * 2
    assert set(gpu.live().values()) == {0}


# ---------------------------------------------------------------- profiles


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (((1, 2), (1, 2), (1, 2, 3)), r"is \[1, 2\], \[1, 2\], \[1, 2, 3\]; give .* of one rank"),
        (((1,), (2,)), r"is \[1\], \[2\]; give its smallest, optimum and largest shape"),
        (((1,) * 9,) * 3, r"is .*, of 9 dimensions; TensorRT has at most 8"),
        (((3,), (2,), (4,)), r"is \[3\], \[2\], \[4\]; no size may be negative, or larger"),
        (((-1,), (2,), (4,)), r"is \[-1\], .*no size may be negative"),
    ],
)
def test_a_range_that_is_none(trt11: Any, bounds: Any, message: str) -> None:
    def define(network: Any) -> None:
        raise AssertionError("the ranges are looked at first")

    with pytest.raises(EngineError, match=f"^the range of input x {message}"):
        build_plan(trt11, define, {"x": bounds})


@pytest.mark.parametrize("kind", [RuntimeError, TypeError, ValueError])
def test_a_range_that_only_tensorrt_refuses(trt11: Any, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise kind("no such shape")

    monkeypatch.setattr(builder.Profile, "set_shape", refuse)

    with pytest.raises(EngineError, match=r"refused the range \(\(1,\), \(2,\), \(3,\)\) of input x: no such shape"):
        build_plan(trt11, lambda network: None, {"x": ((1,), (2,), (3,))})


def test_the_double_refuses_ranges_as_the_binding_does() -> None:
    profile = builder.Profile()
    with pytest.raises(RuntimeError):
        profile.set_shape("x", (1,), (1,), (1, 2))
    with pytest.raises(TypeError):
        profile.set_shape("x", *[(1,) * 9] * 3)


def two_profiles(trt: Any) -> bytes:
    made = trt.Builder(logger(trt))
    network, config = made.create_network(0), made.create_builder_config()
    x = network.add_input("x", trt.DataType.FLOAT, (-1,))
    network.mark_output(network.add_identity(x).get_output(0))
    for low, high in ((1, 4), (5, 8)):
        profile = made.create_optimization_profile()
        profile.set_shape("x", (low,), (high,), (high,))
        config.add_optimization_profile(profile)
    return bytes(made.build_serialized_network(network, config))


def test_a_profile_that_is_refused(trt11: Any) -> None:
    with Session(two_profiles(trt11), trt_module=trt11) as session:
        trt11.double.refused_profiles.add(1)
        with pytest.raises(EngineError, match=r"profile 1 cannot be used \(Error in set opt.*: TensorRT: .*is in use"):
            session.run({"x": np.ones(6, np.float32)})
        assert session.run({"x": np.ones(3, np.float32)})  # in the one that is active
        trt11.double.refused_profiles.clear()
        assert session.run({"x": np.ones(6, np.float32)})


# ---------------------------------------------------------------- what stays alive


def alive(kinds: tuple[type, ...]) -> list[Any]:
    gc.collect()
    return [found for found in gc.get_objects() if issubclass(type(found), kinds)]


def refused(trt: Any, gpu: Gpu) -> None:
    """A build whose plugin refuses its tensors."""

    def define(network: Any) -> None:
        q, k, v = (network.add_input(name, trt.DataType.HALF, SHAPE) for name in "QKV")
        lengths = network.add_input("lengths", trt.DataType.INT32, (3,))
        add_attention(network, q, k, v, causal=True, kv_lengths=lengths, trt_module=trt)

    build_plan(trt, define, {})


def failing(trt: Any, gpu: Gpu) -> None:
    """A build whose plugin cannot launch."""
    gpu.cuda.fail("cuLaunchKernel", LAUNCH_FAILED)
    build_engine(SMALL, trt_module=trt)


@pytest.mark.parametrize("build", [refused, failing])
def test_a_failed_build_keeps_nothing(
    trt11: Any, library: Library, gpu: Gpu, build: Callable[[Any, Gpu], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYFMHA_LIBRARY", str(library.path))
    kinds = (builder.Builder, builder.Config, builder.TimingCache, trt11.INetworkDefinition)
    assert alive(kinds) == []
    text = ""
    try:
        build(trt11, gpu)
    except PyfmhaError as error:
        text = str(error)
    assert "TritonFlashAttention layer" in text

    assert alive(kinds) == []
    failure = last_failure()
    assert failure is not None
    again, other = failure.error, failure.error
    assert "TritonFlashAttention layer" in str(again)
    assert type(again) is failure.kind
    assert again is not other, "who raises one leaves its traceback in it"
    assert again.__traceback__ is None


def test_a_destroyed_plugin_is_an_empty_one(trt11: Any, gpu: Gpu) -> None:
    """The binding keeps it for ever."""
    with Session(build_engine(SMALL, trt_module=trt11).plan, trt_module=trt11) as session:
        arrays = {name: np.ones((1, 2, 5, 32), np.float16) for name in "QKV"}
        session.run(arrays)
        (running,) = (plugin for plugin in trt11.double.calls.kept if plugin._hold is not None)
        held = [weakref.ref(running._hold), weakref.ref(running.origin)]
        assert running._plan is not None
    del session
    kept = trt11.double.calls.kept
    assert running in kept
    made = [plugin for plugin in kept if plugin._origin is not None]
    assert len(made) == 1, "the user's own object, which C++ does not own, and which was never used"
    assert (made[0]._plan, made[0]._hold, made[0]._stored_fields, made[0]._launch) == (None,) * 4
    gc.collect()
    assert [ref() for ref in held] == [None] * 2
    assert (running._plan, running._plans) == (None, {})
    assert running.describe() == "TritonFlashAttention (destroyed)"
    assert isinstance(running, PluginBehaviour)
    with pytest.raises(PluginError, match="the plugin was destroyed"):
        running.clone()
    with pytest.raises(PluginError, match=r"destroyed.*no shape is prepared"):
        running.enqueue([], [], [], [], 0, 0)


# ---------------------------------------------------------------- engines as they come


def test_an_engine_as_tensorrt_gives_it(trt11: Any) -> None:
    memory = builder.HostMemory.of(build_engine(SMALL, trt_module=trt11).plan)
    assert not isinstance(memory, bytes | bytearray | memoryview)

    for engine in (memory, memoryview(memory), bytearray(memory)):
        with Session(engine, trt_module=trt11) as session:
            assert [info.name for info in session.inputs] == ["Q", "K", "V"]
    for wrong in (None, 3, object()):
        with pytest.raises(
            EngineError, match=rf"is a {type(wrong).__name__}; give the path .*, its bytes, or the IHost"
        ):
            Session(wrong, trt_module=trt11)


def test_an_engine_of_another_namespace(trt11: Any, library: Library) -> None:
    def define(network: Any) -> None:
        q, k, v = (network.add_input(name, trt11.DataType.HALF, SHAPE) for name in "QKV")
        out = add_attention(network, q, k, v, causal=True, namespace="acme", library=library)
        network.mark_output(out)

    plan = build_plan(trt11, define, {}).plan
    other = make_full("trt_another_process", trt11.__version__)
    try:
        with pytest.raises(
            EngineError,
            match=r"Cannot find plugin: TritonFlashAttention.*acme.*before: pyfmha\.register\(namespace='acme'\)$",
        ):
            Session(plan, trt_module=other)
        register(other, namespace="acme", library=library)
        Session(plan, trt_module=other).close()
    finally:
        del sys.modules["trt_another_process"]
