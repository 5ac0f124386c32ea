"""Engines that carry a library: version-compatible ones alone, which a session runs when it is told to trust."""

import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import Launch
from trt_double.full import VERSIONS, make_full
from trt_double.full.builder import MAGIC
from trt_double.full.gpu import Gpu

from pyfmha.errors import EngineError, LibraryError
from pyfmha.runtime.library import Library
from pyfmha.trt import add_attention, last_failure, register
from pyfmha.trt.attention.engine import EngineConfig, build_engine
from pyfmha.trt.creator import CreatorBehaviour
from pyfmha.trt.engine import build_plan
from pyfmha.trt.network import add_operator
from pyfmha.trt.plugin import PluginBehaviour
from pyfmha.trt.session import Session
from pyfmha.trt.tables import TablePlugin

pytest_plugins = ["plugin_host.operators", "plugin_host.attention", "trt_double.fixtures", "trt_double.full.fixtures"]

CONFIG = EngineConfig(num_heads=2, head_size=32, max_batch_size=2, max_seq_len=40, causal=True)
SHAPES = {"x": (5, 8), "bias": (8,)}
CHANCE = np.random.default_rng(3)
INPUTS = {name: CHANCE.standard_normal((2, 2, 24, 32)).astype(np.float16) for name in "QKV"}


@pytest.fixture(scope="module")
def plans() -> dict[str, bytes]:
    return {}


@pytest.fixture
def plan(plans: dict[str, bytes], trt11: Any, attention_path: Path, attention_plugin_path: Path, gpu: Gpu) -> bytes:
    """An engine with attention that carries the library it was built with, which is nowhere else by now."""
    gpu.learn(attention_plugin_path.with_name("manifest.json"))
    if not plans:
        plans["attention"] = build_engine(CONFIG, trt_module=trt11, library=attention_path, embed_library=True).plan
    attention_path.unlink()
    return plans["attention"]


@pytest.fixture
def other(gpu: Gpu) -> Iterator[Any]:
    """The lean TensorRT of another process, where nothing is registered."""
    yield make_full("trt_lean", VERSIONS[-1])
    del sys.modules["trt_lean"]


def with_library(plan: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """An engine that carries something else."""
    content = json.loads(plan[len(MAGIC) :])
    content["libraries"] = [change(library.encode("latin-1")).decode("latin-1") for library in content["libraries"]]
    return MAGIC + json.dumps(content).encode()


def without_library(plan: bytes) -> bytes:
    return MAGIC + json.dumps({**json.loads(plan[len(MAGIC) :]), "libraries": []}).encode()


def plugins_of(session: Session) -> list[Any]:
    return list(session._engine.plugins.values())


def libraries_in(process: str) -> int:
    """How many copies out of engines are loaded."""
    return len({line.split()[4] for line in process.splitlines() if line.endswith(".so (deleted)")})


def test_without_trust_nothing_of_it_is_loaded(plan: bytes, other: Any) -> None:
    before = libraries_in(Path("/proc/self/maps").read_text())
    with pytest.raises(EngineError, match=r"it carries a library; .*Session\(\.\.\., trust_library=True\)"):
        Session(plan, trt_module=other)
    assert libraries_in(Path("/proc/self/maps").read_text()) == before


def test_with_trust_its_plugin_in_c_runs(
    plan: bytes, trt11: Any, other: Any, gpu: Gpu, attention_plugin_path: Path
) -> None:
    """Nothing is registered but what the engine brings; it goes with the session."""
    before = libraries_in(Path("/proc/self/maps").read_text())
    with Session(plan, trt_module=other, trust_library=True) as session:
        (plugin,) = plugins_of(session)
        assert isinstance(plugin, TablePlugin)
        assert libraries_in(Path("/proc/self/maps").read_text()) == before + 1
        out = session.run(INPUTS)["Out"]
        assert gpu.live()["modules"] > 0
        again = session.run({name: array[:1] for name, array in INPUTS.items()})["Out"]
    assert other.get_plugin_registry().get_creator("TritonFlashAttention", "1", "") is None
    del session, plugin
    assert libraries_in(Path("/proc/self/maps").read_text()) == before
    assert set(gpu.live().values()) == {0}
    # The same as the plugin in Python, which built the engine.
    register(trt11, library=Library(attention_plugin_path))
    with Session(without_library(plan), trt_module=trt11) as session:
        assert isinstance(plugins_of(session)[0], PluginBehaviour)
        assert np.array_equal(session.run(INPUTS)["Out"], out)
    assert np.array_equal(again, out[:1])


def test_an_operator_that_is_not_attention(
    trt11: Any, other: Any, path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the place of its kernel (x + bias) * scale is computed, of what the driver was given."""

    def define(network: Any) -> None:
        x, bias = (network.add_input(name, trt11.DataType.FLOAT, shape) for name, shape in SHAPES.items())
        (y,) = add_operator(network, "BiasGelu", x, bias, scale=0.5, library=path)
        y.name = "y"
        network.mark_output(y)

    def computed(launch: Launch) -> float:
        x, bias, y, rows, cols, scale = struct.unpack("<QQQiif", b"".join(launch.params[:6]))
        sums = gpu.array(x, (rows, cols), np.float32) + gpu.array(bias, (cols,), np.float32)
        gpu.array(y, (rows, cols), np.float32)[...] = sums * scale
        return 0.05

    monkeypatch.setattr(gpu, "_run_kernel", computed)
    plan = build_plan(trt11, define, {}, version_compatible=True, embedded=path).plan
    path.unlink()
    given = {name: CHANCE.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    with pytest.raises(EngineError, match="it carries a library"):
        Session(plan, trt_module=other)
    with Session(plan, trt_module=other, trust_library=True) as session:
        (plugin,) = plugins_of(session)
        assert isinstance(plugin, TablePlugin)
        assert np.array_equal(session.run(given)["y"], (given["x"] + given["bias"]) * np.float32(0.5))


def test_what_its_plugin_refuses_is_said(plan: bytes, other: Any) -> None:
    """The plugin in C has no exceptions: its text comes by TensorRT's logger."""
    with Session(plan, trt_module=other, trust_library=True) as session:
        session.run(INPUTS)
        other.double.calls.on_shape_change = lambda plugin, inputs, outputs: original(plugin, [*inputs[:2]], outputs)
        original = other.double.calls._c.on_shape_change
        with pytest.raises(EngineError, match=r"TensorRT: TritonFlashAttention layer .*on_shape_change: "):
            session.run({name: array[:1] for name, array in INPUTS.items()})
        del other.double.calls.on_shape_change


@pytest.mark.parametrize("kind", ["python", "library"])
def test_what_it_brings_comes_before_what_is_registered(
    plan: bytes, other: Any, attention_plugin_path: Path, kind: Any
) -> None:
    """A runtime's own plugins come first; those of the process stay, for engines without a library."""
    before = last_failure()
    creator = register(other, library=Library(attention_plugin_path), kind=kind)
    with Session(plan, trt_module=other, trust_library=True) as session:
        (plugin,) = plugins_of(session)
        assert isinstance(plugin, TablePlugin)
        loaded = session._runtime.registry.get_creator("TritonFlashAttention", "1", "")
        assert loaded is not creator
        out = session.run(INPUTS)["Out"]
    del session, plugin, loaded
    assert isinstance(creator, CreatorBehaviour) == (kind == "python")
    with Session(without_library(plan), trt_module=other) as session:
        assert isinstance(plugins_of(session)[0], TablePlugin) == (kind == "library")
        assert np.array_equal(session.run(INPUTS)["Out"], out)
    assert last_failure() is before


def test_a_library_of_another_build(plan: bytes, other: Any, attention_plugin_path: Path) -> None:
    """One that is called as the engine's was runs; one that is not says what the engine was built with."""
    build_id = Library(attention_plugin_path).manifest.build_id.encode()
    later = with_library(plan, lambda library: library.replace(build_id, b"0" * len(build_id)))
    assert later != plan
    with Session(later, trt_module=other, trust_library=True) as session:
        assert np.isfinite(session.run(INPUTS)["Out"]).all()
    del session
    changed = with_library(plan, lambda library: library.replace(b"i32 window_left", b"i64 window_left"))
    assert changed != plan
    message = r"the engine was built with .*\(.*i32 window_left.*; the library here has .*i64 window_left.*, schema"
    with pytest.raises(EngineError, match=message + r".*: build the engine again, or use the library of that time"):
        Session(changed, trt_module=other, trust_library=True)


def test_a_library_that_does_not_help(plan: bytes, other: Any, plugins_path: Path) -> None:
    with pytest.raises(
        EngineError, match=r"find plugin: TritonFlashAttention.*carries has no such plugin; either call"
    ):
        Session(with_library(plan, lambda library: plugins_path.read_bytes()), trt_module=other, trust_library=True)
    with pytest.raises(EngineError, match=r"cannot be loaded: .*\.so: cannot be loaded"):
        Session(with_library(plan, lambda library: b"getCreators"), trt_module=other, trust_library=True)


def attention(trt: Any) -> Any:
    def define(network: Any) -> None:
        q, k, v = (network.add_input(name, trt.DataType.HALF, (1, 2, 24, 32)) for name in "QKV")
        network.mark_output(add_attention(network, q, k, v, causal=True))

    return define


def test_trust_in_what_is_not_there(trt11: Any, other: Any, gpu: Gpu) -> None:
    """With trust the engine brings the plugin; where it does not, in a process that has none, the error says so."""
    plain = build_plan(trt11, attention(trt11), {}, version_compatible=True).plan
    with pytest.raises(EngineError, match=r"Cannot find plugin.*leave out trust_library=True"):
        Session(plain, trt_module=other, trust_library=True)
    with Session(plain, trt_module=other) as session:
        assert len(session.outputs) == 1


def test_what_cannot_be_carried(trt11: Any, path: Path, small_library_path: Path, tmp_path: Path, gpu: Gpu) -> None:
    with pytest.raises(EngineError, match="has no plugins for the engine to carry"):
        build_plan(trt11, attention(trt11), {}, version_compatible=True, embedded=small_library_path)
    with pytest.raises(LibraryError, match="no library at"):
        build_plan(trt11, attention(trt11), {}, version_compatible=True, embedded=tmp_path / "libnone.so")
    (tmp_path / "text.so").write_text("getCreators")
    with pytest.raises(LibraryError, match=r"text\.so cannot be loaded"):
        build_plan(trt11, attention(trt11), {}, version_compatible=True, embedded=tmp_path / "text.so")
    with pytest.raises(EngineError, match="give version_compatible=True too"):
        build_plan(trt11, attention(trt11), {}, embedded=path)
    with pytest.raises(EngineError, match="has no plugin of its own to carry; build it again: pyfmha build"):
        build_engine(CONFIG, trt_module=trt11, embed_library=True)
