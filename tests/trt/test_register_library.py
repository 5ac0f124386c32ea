"""``register(kind="library")``: TensorRT loads the plugin in C, once; the two kinds do not meet under one name."""

import importlib.util
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import python_environment
from trt_double.binding import make_binding

from pyfmha.errors import PluginError
from pyfmha.runtime.library import Library
from pyfmha.trt import register

pytest_plugins = ("plugin_host.operators", "trt_double.fixtures")


def test_the_library_is_loaded_once(path: Path) -> None:
    trt = make_binding()
    creator = register(trt, kind="library", library=path, operator="BiasGelu")
    assert (creator.name, creator.plugin_version, creator.plugin_namespace) == ("BiasGelu", "1", "acme")
    assert register(trt, kind="library", library=path, operator="BiasGelu") is creator
    assert register(trt, kind="library", library=Library(path), operator="Blend").name == "Blend"
    assert trt.get_plugin_registry().loaded == [str(path.resolve())]
    other = make_binding()  # another module has a registry of its own
    assert register(other, kind="library", library=path, operator="BiasGelu") is not creator


def test_two_kinds_do_not_meet(path: Path) -> None:
    trt = make_binding()
    register(trt, kind="library", library=path, operator="BiasGelu")
    with pytest.raises(PluginError, match=r"has BiasGelu version 1 in namespace 'acme' of the kind 'library' already"):
        register(trt, library=path, operator="BiasGelu")
    register(trt, library=path, operator="BiasGelu", namespace="mine")  # Python's may have another name
    other = make_binding()
    register(other, library=path, operator="Blend")
    with pytest.raises(
        PluginError, match=r"has Blend version 2 in namespace '' of the kind 'python' already, with .*\.so"
    ):
        register(other, kind="library", library=path, operator="BiasGelu")
    assert other.get_plugin_registry().loaded == []


def test_two_libraries_of_one_plugin(path: Path, tmp_path: Path) -> None:
    trt = make_binding()
    register(trt, kind="library", library=path, operator="Spread")
    with pytest.raises(PluginError, match="a plugin of that name is registered already"):
        register(trt, kind="library", library=shutil.copy(path, tmp_path / "libother.so"), operator="Spread")


def test_a_tensorrt_of_other_interfaces(path: Path, later_trt: Any) -> None:
    """None of its slots is called; Python's plugin goes by names, and may try."""
    with pytest.raises(
        PluginError, match=r"without BiasGelu: this is TensorRT 12 \(version number 120000\); the library"
    ):
        register(later_trt, kind="library", library=path, operator="BiasGelu")
    assert register(later_trt, library=path, operator="BiasGelu").name == "BiasGelu"


def test_a_library_that_was_built_again(path: Path) -> None:
    """TensorRT keeps what it loaded; the file holds another build by now."""
    trt = make_binding()
    register(trt, kind="library", library=path, operator="Blend")
    later = Library(path)
    later.manifest = replace(later.manifest, build_id="f" * 64)
    with pytest.raises(PluginError, match=r"has loaded .*\.so of an earlier build \(.*, now f{12}\); start another"):
        register(trt, kind="library", library=later, operator="Blend")


def test_what_the_library_does_not_hold(path: Path, small_library_path: Path, tmp_path: Path) -> None:
    trt = make_binding()
    with pytest.raises(PluginError, match="has no plugin TritonFlashAttention of its own, but Blend, BiasGelu, Spread"):
        register(trt, kind="library", library=path)
    with pytest.raises(PluginError, match="of its own, but none"):
        register(trt, kind="library", library=shutil.copy(small_library_path, tmp_path / "libsmall.so"))
    with pytest.raises(PluginError, match="is in namespace 'acme', not 'mine'"):
        register(trt, kind="library", library=path, operator="BiasGelu", namespace="mine")
    with pytest.raises(PluginError, match="kind is 'c'; allowed are python, library"):
        register(trt, kind="c")


REAL = """
import sys
import numpy as np
import tensorrt_lean as trt
from pyfmha.errors import PluginError
from pyfmha.trt import register

path = sys.argv[1]
registry = trt.get_plugin_registry()
creator = register(trt, kind="library", library=path, operator="Blend")
assert [field.name for field in creator.field_names][:3] == ["weights", "steps", "mode"], "fields"
assert register(trt, kind="library", library=path, operator="BiasGelu").plugin_namespace == "acme"
try:
    register(trt, library=path, operator="Blend")
except PluginError as error:
    assert "of the kind 'library' already" in str(error), error
else:
    raise AssertionError("both kinds are there")
weights = np.array([0.5, 2.0], np.float32)
mode = np.frombuffer(b"sum\\0", np.int8)
fields = [
    trt.PluginField("weights", weights, trt.PluginFieldType.FLOAT32),
    trt.PluginField("mode", mode, trt.PluginFieldType.CHAR),
]
made = creator.create_plugin("layer", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
build = made.get_capability_interface(trt.PluginCapabilityType.BUILD)
assert build.num_outputs == 1
print(build.timing_cache_id)
runtime = made.get_capability_interface(trt.PluginCapabilityType.RUNTIME)
core = made.get_capability_interface(trt.PluginCapabilityType.CORE)
assert (core.plugin_name, core.plugin_version, core.plugin_namespace) == ("Blend", "2", "")
python = register(trt, library=path, operator="Blend", namespace="python")
own = python.create_plugin("layer", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
assert own.timing_cache_id == build.timing_cache_id
kept = own.get_fields_to_serialize()
again = creator.create_plugin("layer", own._stored_fields._vector, trt.TensorRTPhase.RUNTIME)
assert again is not None, "fields that Python's plugin stored"
assert again.get_capability_interface(trt.PluginCapabilityType.BUILD).timing_cache_id == build.timing_cache_id
wrong = creator.create_plugin("layer", trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD)
assert wrong is None
del made, build, runtime, core, again
print("done")
"""


CROSSED = """
import sys
import numpy as np
import tensorrt_lean as trt
from pyfmha.trt import register
from pyfmha.trt.tables import Field, LibraryTables

path, other = sys.argv[1:]
registry = trt.get_plugin_registry()
# A library goes when it is told to, and may come again.
for _ in range(2):
    handle = registry.load_library(other)
    assert handle is not None
    assert registry.get_creator("Blend", "2", "") is not None
    registry.deregister_library(handle)
    assert registry.get_creator("Blend", "2", "") is None

c = register(trt, kind="library", library=path, operator="Blend")
python = register(trt, library=path, operator="Blend", namespace="python")
given = {"weights": np.array([0.5, 2.0], np.float32), "steps": np.array([3], np.int32)}
given["mode"] = np.frombuffer(b"sum\\0", np.int8)
types = {np.dtype(np.float32): 1, np.dtype(np.int32): 5, np.dtype(np.int8): 6, np.dtype(np.int64): 10}
kinds = {int(kind): kind for kind in trt.PluginFieldType.__members__.values()}

def collection(arrays):
    fields = [trt.PluginField(name, array, kinds[types[array.dtype]]) for name, array in arrays.items()]
    return trt.PluginFieldCollection(fields)

# What the plugin in C stores, read from its table: the binding shows no method of C++'s plugins that gives it.
tables = LibraryTables(path)
made = tables.create(tables.named("Blend"), "layer", [
    Field(name, types[array.dtype], array.size, array.tobytes()) for name, array in given.items()
], 0)
assert made is not None, tables.error()
numpys = {number: dtype for dtype, number in types.items()}
stored = {field.name: np.frombuffer(field.data, numpys[field.type]) for field in tables.stored_fields(made).read()}
own = python.create_plugin("layer", collection(given), trt.TensorRTPhase.BUILD)
wanted = tables.timing_cache_id(made)
assert own.timing_cache_id == wanted
own.get_fields_to_serialize()
for kept in (collection(stored), own._stored_fields._vector):
    again = python.create_plugin("layer", kept, trt.TensorRTPhase.RUNTIME)
    assert again.timing_cache_id == wanted
    again = c.create_plugin("layer", kept, trt.TensorRTPhase.RUNTIME)
    assert again.get_capability_interface(trt.PluginCapabilityType.BUILD).timing_cache_id == wanted
    del again
print("done")
"""


def run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=python_environment())


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_lean") is None, reason="tensorrt_lean is not installed")
def test_tensorrt_lean_loads_it(path: Path) -> None:
    done = run(REAL, path)
    assert done.returncode == 0, done.stdout + done.stderr
    first, last = done.stdout.splitlines()[0], done.stdout.splitlines()[-1]
    assert first.startswith("Blend 2 weights=0x1.0000000000000p-1,0x1.0000000000000p+1 steps=1,2 mode=sum name=sum")
    assert last == "done"


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_lean") is None, reason="tensorrt_lean is not installed")
def test_either_kind_reads_in_tensorrt_lean_what_the_other_stored(path: Path, tmp_path: Path) -> None:
    other = Path(shutil.copy(path, tmp_path / "libother.so"))
    done = run(CROSSED, path, other)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "done"


PARSED = """
import struct
import sys
import tensorrt_rtx as trt

def part(number, content):
    # A field of a protobuf message (onnx.proto3): a number, a float, or what has a length.
    if isinstance(content, float):
        return bytes([*varint(number << 3 | 5)]) + struct.pack("<f", content)
    if isinstance(content, int):
        return bytes([*varint(number << 3), *varint(content)])
    content = content.encode() if isinstance(content, str) else content
    return bytes([*varint(number << 3 | 2), *varint(len(content))]) + content

def varint(value):
    while value > 127:
        yield value & 127 | 128
        value >>= 7
    yield value

def tensor(name, *sizes):
    shape = b"".join(part(1, part(1, size)) for size in sizes)
    return part(1, name) + part(2, part(1, part(1, 10) + part(2, shape)))

scale = part(1, "scale") + part(2, 2.5) + part(20, 1)
node = part(1, "X") + part(1, "B") + part(2, "Y") + part(3, "gelu") + part(4, "BiasGelu") + part(5, scale)
graph = part(1, node + part(7, "acme")) + part(2, "graph")
graph += part(11, tensor("X", 4, 8)) + part(11, tensor("B", 8)) + part(12, tensor("Y", 4, 8))
model = part(1, 8) + part(7, graph) + part(8, part(1, "") + part(2, 20)) + part(8, part(1, "acme") + part(2, 1))

logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
assert builder.get_plugin_registry().load_library(sys.argv[1]) is not None
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
assert not parser.parse(model)
print(parser.get_error(0).desc())
"""


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_the_parser_hands_a_nodes_attributes_over(path: Path) -> None:
    done = run(PARSED, path)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert "BiasGelu layer 'gelu': create_plugin: this is TensorRT-RTX 1." in said
    assert "which has no plugin layers; use TensorRT. The plugin would serve scale 2.5" in said
