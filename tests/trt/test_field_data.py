"""Fields of bindings that misread them: TensorRT 10.8 to 10.15.1 under numpy 2 repeat a field's first element."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from trt_double import BUILD, RUNTIME
from trt_double.binding import PluginFieldType, make_binding
from trt_double.scene import Scene, fields, problem_of

from pyfmha.errors import PluginError
from pyfmha.operators.tactics import tactics_of
from pyfmha.runtime.library import Library
from pyfmha.trt.field_data import read_data

pytest_plugins = ["trt_double.fixtures"]

CONTENTS = {
    "CHAR": np.frombuffer(b"bhsd\0", np.int8),
    "INT32": np.array([1, 2, 3], np.int32),
    "FLOAT32": np.array([1.5, -2.5], np.float32),
}


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("length", [0, 1, None])
def test_what_a_field_points_to(trt: Any, kind: str, length: int | None) -> None:
    content = CONTENTS[kind][:length].copy()
    field = trt.PluginField("some", content, getattr(trt.PluginFieldType, kind))

    assert read_data(trt, field, kind).tolist() == content.tolist()
    assert read_data(trt, trt.PluginFieldCollection([field])[0], kind).tolist() == content.tolist()


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_binding_that_repeats_the_first_element(kind: str) -> None:
    trt = make_binding(repeats=True)
    content = CONTENTS[kind]
    field = trt.PluginField("some", content, PluginFieldType[kind])

    assert set(field.data.tolist()) == {content[0]}, "the double reads as those bindings do"
    assert read_data(trt, field, kind).tolist() == content.tolist()


def test_what_was_read_is_a_copy() -> None:
    for trt in (make_binding(), make_binding(repeats=True)):
        content = np.array([1, 2, 3], np.int32)
        read = read_data(trt, trt.PluginField("some", content, PluginFieldType.INT32), "INT32")
        content[:] = 0

        assert read.tolist() == [1, 2, 3]


class Elsewhere:
    """A field that repeats its first element, and that no pointer to a struct lies in."""

    __slots__ = ("_behind", "content", "name", "size", "type")

    def __init__(self, name: str, data: Any, type: PluginFieldType) -> None:
        self._behind = object()
        self.name, self.content, self.type, self.size = name, data, type, len(data)

    @property
    def data(self) -> Any:
        return np.repeat(self.content[:1], self.size)


def test_an_unknown_layout_is_refused_by_name() -> None:
    trt: Any = ModuleType("other")
    trt.__version__, trt.PluginField, trt.PluginFieldType = "10.9", Elsewhere, PluginFieldType
    one, many = (Elsewhere("layout", CONTENTS["INT32"][:n], PluginFieldType.INT32) for n in (1, 3))

    assert read_data(trt, one, "INT32").tolist() == [1]
    with pytest.raises(PluginError, match=r"other 10\.9 misreads plugin fields under numpy .* field layout"):
        read_data(trt, many, "INT32")


def test_a_plugin_is_made_stored_and_loaded(attention_library: Library) -> None:
    scene = Scene(make_binding(repeats=True), attention_library)
    built = scene.built()
    stored = scene.calls.stored_fields(built)
    loaded = scene.calls.create(scene.creator, "layer 7", stored.read(), RUNTIME)

    for name in ("library", "stored", "layer", "namespace"):
        assert getattr(loaded.origin, name) == getattr(built.origin, name), name
    for name in ("program", "attributes", "options", "types"):
        assert getattr(loaded.instance, name) == getattr(built.instance, name), name
    tactics = tactics_of(attention_library["fmha_d32_fp16"].manifest)
    assert loaded.origin.stored.algorithms == tuple(tactic.name for tactic in tactics)


def test_a_plugin_with_text_among_its_fields(forward_library: Library) -> None:
    scene = Scene(make_binding(repeats=True), forward_library)
    built = scene.calls.create(scene.creator, "layer 7", fields(layout="bshd", causal=0), BUILD)

    assert problem_of(built).features.layout == "bshd"
