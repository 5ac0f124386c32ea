"""Finding TensorRT and the library, registering, and putting the plugin in a network."""

import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import python_environment
from trt_double import BF16, FLOAT, HALF
from trt_double.binding import DataType, make_binding
from trt_double.scene import HEADS, REAL_BINDINGS, SIZE, open_binding, problem_of

import pyfmha.trt
from pyfmha.errors import LibraryError
from pyfmha.runtime.library import Library
from pyfmha.trt import PluginError, add_attention, register
from pyfmha.trt.creator import find_library, plugin_classes
from pyfmha.trt.modules import MODULES, find_module, module_of
from pyfmha.trt.plugin import PluginBehaviour

pytest_plugins = ("trt_double.fixtures",)


def test_importing_imports_no_tensorrt() -> None:
    heavy = ("tensorrt", "torch", "triton", "cuda")
    code = f"import sys, pyfmha.trt; print([m for m in sys.modules if m.startswith({heavy})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=python_environment())
    assert (done.stdout.strip(), done.returncode) == ("[]", 0)


@pytest.mark.parametrize("name", REAL_BINDINGS)
def test_real_binding_is_here(name: str) -> None:
    """Where it is, the tests of the plugin run against it too; where it is not, this says so."""
    module, reason = open_binding(name)
    if module is None:
        pytest.skip(reason)
    assert find_module(module) is module


def test_modules_are_tried_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PluginError, match=r"TensorRT is not installed.*pip install tensorrt"):
        find_module()
    for name in reversed(MODULES):
        module = make_binding()
        monkeypatch.setitem(sys.modules, name, module)
        assert find_module() is module


def test_a_broken_installation_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "tensorrt_lean")
    (tmp_path / "tensorrt_lean.py").write_text("raise OSError('libnvinfer_lean.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match=r"tensorrt_lean: libnvinfer_lean.so.11: cannot open"):
        find_module()


def test_an_old_tensorrt_is_refused() -> None:
    old = make_binding()
    del old.IPluginV3OneCore
    with pytest.raises(PluginError, match=r"has no IPluginV3OneCore; use TensorRT 10"):
        register(old)


def test_registering_twice_changes_nothing(trt: Any, attention_library: Library) -> None:
    namespace = f"twice{id(attention_library)}"
    creator = register(trt, namespace=namespace, library=attention_library)
    assert register(trt, namespace=namespace) is creator
    assert register(trt, namespace=namespace, library=attention_library.path) is creator
    assert isinstance(creator, trt.IPluginCreatorV3One)
    assert (creator.name, creator.plugin_version, creator.plugin_namespace) == ("TritonFlashAttention", "1", namespace)


def test_another_library_in_the_same_namespace_is_refused(attention_library: Library, tmp_path: Path) -> None:
    trt = make_binding()
    register(trt, library=attention_library)
    other = shutil.copy(attention_library.path, tmp_path / "libother.so")
    with pytest.raises(PluginError, match=r"libother.so as well, register it in another namespace"):
        register(trt, library=other)


def test_a_name_taken_by_others_is_refused(trt: Any, attention_library: Library) -> None:
    namespace = f"taken{id(attention_library)}"

    class Other(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = "TritonFlashAttention", "1", namespace
            self.field_names = trt.PluginFieldCollection([])

    other = Other()
    assert trt.get_plugin_registry().register_creator(other, namespace)
    with pytest.raises(PluginError, match="a plugin of that name is registered already; give another namespace"):
        register(trt, namespace=namespace, library=attention_library)


def test_classes_are_made_once_for_each_module() -> None:
    one, two = make_binding(), make_binding()
    assert plugin_classes(one) is plugin_classes(one)
    assert plugin_classes(one).plugin is not plugin_classes(two).plugin
    assert issubclass(plugin_classes(one).plugin, one.IPluginV3)


def test_library_by_argument_variable_and_folder(
    attention_library_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYFMHA_LIBRARY", raising=False)
    with pytest.raises(LibraryError, match=r"no library at .*aot_out/libpyfmha.so; build it \(pyfmha build\)"):
        find_library()
    (tmp_path / "aot_out").mkdir()
    here = Path(shutil.copy(attention_library_path, tmp_path / "aot_out"))
    assert find_library().path == here
    monkeypatch.setenv("PYFMHA_LIBRARY", str(attention_library_path))
    assert find_library().path == attention_library_path
    assert find_library(here).path == here
    monkeypatch.setenv("PYFMHA_LIBRARY", str(tmp_path / "nothing.so"))
    with pytest.raises(LibraryError, match=r"PYFMHA_LIBRARY is .*nothing.so, where there is no file.*pyfmha build"):
        find_library()
    monkeypatch.setenv("PYFMHA_LIBRARY", str(tmp_path))
    with pytest.raises(LibraryError, match=r"no file; name a library's .so, or unset it; to build one: pyfmha build$"):
        find_library()
    with pytest.raises(LibraryError, match=r"no library at .*gone.so; build it: pyfmha build"):
        register(make_binding(), library=tmp_path / "gone.so")


# Networks


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A double that networks say they are of, as those of ``tensorrt`` do."""
    return make_binding()


def inputs(trt: Any, shape: tuple[int, ...] = (-1, HEADS, -1, SIZE), kind: int = HALF) -> tuple[Any, list[Any]]:
    network = trt.INetworkDefinition()
    return network, [network.add_input(name, DataType(kind), shape) for name in "qkv"]


def test_add_attention(double: Any, attention_library: Library) -> None:
    network, tensors = inputs(double)
    out = add_attention(network, *tensors, causal=True, library=attention_library, name="attention 3")
    assert (out.shape, out.dtype) == ((-1, HEADS, -1, SIZE), HALF)
    (layer,) = network.layers
    assert layer.name == "attention 3"
    problem = problem_of(layer.plugin)
    assert (problem.num_heads, problem.head_size, problem.dtype, problem.causal) == (HEADS, SIZE, "fp16", True)
    assert problem.softmax_scale == pytest.approx(1 / math.sqrt(SIZE), rel=1e-7)
    assert layer.plugin.origin.layer == "attention 3"


@pytest.mark.parametrize(("kind", "dtype"), [(BF16, "bf16"), (FLOAT, "fp32")])
def test_add_attention_takes_its_type_from_q(double: Any, attention_library: Library, kind: int, dtype: str) -> None:
    network, tensors = inputs(double, kind=kind)
    add_attention(network, *tensors, causal=True, library=attention_library, scale=0.5)
    problem = problem_of(network.layers[0].plugin)
    assert (problem.dtype, problem.softmax_scale) == (dtype, 0.5)


def test_add_full_attention_in_a_namespace(double: Any, attention_library: Library) -> None:
    network, tensors = inputs(double, (2, HEADS, 64, SIZE))
    out = add_attention(network, *tensors, causal=False, namespace="mine", library=attention_library)
    assert out.shape == (2, HEADS, 64, SIZE)
    plugin = network.layers[0].plugin
    assert (problem_of(plugin).causal, plugin.plugin_namespace) == (False, "mine")
    assert double.get_plugin_registry().get_creator("TritonFlashAttention", "1", "mine") is not None


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ((-1, -1, -1, SIZE), HALF, "with heads and head size known"),
        ((-1, HEADS, SIZE), HALF, r"must be \[batch, heads, seq, head size\]"),
        ((-1, HEADS, -1, SIZE), 3, "must be of type FLOAT, HALF, BF16"),
        ((-1, HEADS, -1, 48), HALF, "does not hold fmha_fwd_d64_fp16"),
        ((-1, HEADS, -1, 128), HALF, "does not hold fmha_fwd_d128_fp16"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    double: Any, attention_library: Library, shape: tuple[int, ...], kind: int, message: str
) -> None:
    network, tensors = inputs(double, shape, kind)
    with pytest.raises(PluginError, match=message):
        add_attention(network, *tensors, causal=True, library=attention_library)
    assert network.layers == []


def test_unlike_tensors_are_refused(double: Any, attention_library: Library) -> None:
    network, (q, k, _) = inputs(double)
    v = network.add_input("v", DataType.BF16, (-1, HEADS, -1, SIZE))
    with pytest.raises(PluginError, match="must be of one type, got Q"):
        add_attention(network, q, k, v, causal=True, library=attention_library)


def test_what_fails_inside_is_raised(double: Any, attention_library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    network, tensors = inputs(double)
    register(double, library=attention_library)
    monkeypatch.setattr(PluginBehaviour, "_take_types", lambda *arguments: 1 / 0)
    with pytest.raises(PluginError, match="get_output_data_types: ZeroDivisionError"):
        add_attention(network, *tensors, causal=True)


def test_networks_know_their_module(double: Any) -> None:
    assert module_of(double.INetworkDefinition()) is double
    with pytest.raises(PluginError, match=r"builtins.int is not a network"):
        module_of(3)


def test_rtx_has_no_plugins_in_networks(attention_library: Library) -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    network = rtx.Builder(rtx.Logger(rtx.Logger.ERROR)).create_network(0)
    tensors = [network.add_input(name, rtx.DataType.HALF, (-1, HEADS, -1, SIZE)) for name in "qkv"]
    assert module_of(network) is rtx
    with pytest.raises(PluginError, match=r"tensorrt_rtx .* has no plugins in networks; build .* with tensorrt"):
        add_attention(network, *tensors, causal=True, library=attention_library)


def test_public_names() -> None:
    assert all(hasattr(pyfmha.trt, name) for name in pyfmha.trt.__all__)
