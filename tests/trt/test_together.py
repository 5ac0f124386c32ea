"""Operators and attention in one library and in two of one process; engines of another library or description."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from described.random_operators import random_values
from fake_cuda import FakeCuda
from plugin_host import attention
from trt_double import RUNTIME, Field, Tensor
from trt_double.twins import Pair, drive, fields_of, shapes_for

from pyfmha.attention.operator import OPERATOR
from pyfmha.operators.description import Operator
from pyfmha.runtime.library import Library
from pyfmha.spec.manifest import INTERFACE

pytest_plugins = ("plugin_host.operators", "plugin_host.attention", "described.fixtures")

SHAPES = shapes_for((1, 2, 64), (1 << 31,), odd=0.0)
PairOf = Callable[[Path, str], Pair]


@pytest.fixture
def pair_in(fake_cuda: FakeCuda) -> PairOf:
    """Both plugins of a library's operator, with a context."""
    assert fake_cuda.c.cuInit(0) == 0
    fake_cuda.use_context()

    def made(path: Path, name: str) -> Pair:
        operators: dict[str, Operator] = {operator.name: operator for operator in Library(path).operators}
        return Pair(path, fake_cuda, operators[name])

    return made


def life(pair: Pair, chance: random.Random) -> str:
    """A random life of attention, or of an operator."""
    is_attention = pair.operator == OPERATOR
    values = attention.random_values(chance) if is_attention else random_values(pair.operator, chance)
    plugins = pair.create(fields_of(pair.operator, values))
    if plugins is None:
        return "refused"
    ended = drive(pair, plugins, chance, attention.random_shapes if is_attention else SHAPES)
    plugins[1].delete()
    return ended


def test_one_library_holds_attention_and_others(attention_path: Path, pair_in: PairOf) -> None:
    chance = random.Random(5)
    for name in (OPERATOR.name, "Beside"):  # one after the other: the library has one logger
        pair = pair_in(attention_path, name)
        assert len(pair.c.creators) > 1
        assert "launched" in {life(pair, chance) for _ in range(25)}


def test_two_libraries_in_one_process(
    attention_path: Path, described_path: Path, tmp_path: Path, pair_in: PairOf
) -> None:
    """Each has statics of its own: loaded code, loggers and errors; what one gives up the other keeps."""
    other = Path(shutil.copy(described_path, tmp_path / "libother.so"))
    one, two = pair_in(attention_path, "Beside"), pair_in(other, "Named")
    inputs, outputs = {}, {}
    attached = {}
    for pair, shape, result in ((one, (5,), (5,)), (two, (2, 4, 3), (3, 2, 2))):
        built = pair.create([])
        assert built is not None
        attached[pair] = [calls.attach(plugin) for calls, plugin in zip((pair.python, pair.c), built, strict=True)]
        inputs[pair], outputs[pair] = [Tensor(shape, 0)], [Tensor(result, 0)]
        assert pair.both("on_shape_change", attached[pair], inputs[pair], outputs[pair]) == 0
    for pair in (one, two, one, two):
        assert len(pair.launches(attached[pair], [1 << 40], [2 << 40], 0, 7)) == 1
    said = len(one.c.logger.lines)
    assert two.create([Field("factor", 1, 1, bytes(4))]) is None
    assert "unknown field 'factor'" in two.c.error()
    assert len(one.c.logger.lines) == said
    attached[two][1].delete()
    attached[two][0].destroy()
    assert len(one.launches(attached[one], [1 << 40], [2 << 40], 0, 7)) == 1


def changed(fields: list[Field], name: str, text: str) -> list[Field]:
    data = text.encode() + b"\0"
    return [Field(name, field.type, len(data), data) if field.name == name else field for field in fields]


def test_an_engine_of_another_build(described_path: Path, attention_path: Path, pair_in: PairOf) -> None:
    """A library that is called in the same way will do; else both plugins say what the engine was built with."""
    pair = pair_in(described_path, "Tied")
    built = pair.create(fields_of(pair.operator, {"kind": 2}))
    assert built is not None
    stored = pair.stored(built)
    assert pair.create(changed(stored, "pyfmha_algorithms", "probe_fp16_9"), RUNTIME) is not None
    assert pair.create(changed(stored, "pyfmha_prototype", "probe_fp16(*fp16 a)"), RUNTIME) is None
    assert "the engine was built with probe_fp16(*fp16 a), schema" in pair.c.logger.lines[-1][1]
    assert "build the engine again, or use the library of that time" in pair.c.logger.lines[-1][1]
    schema = [
        Field(f.name, 5, 1, (INTERFACE + 1).to_bytes(4, "little")) if f.name == "pyfmha_schema" else f for f in stored
    ]
    assert pair.create(schema, RUNTIME) is None
    assert f", schema {INTERFACE + 1}; the library here has" in pair.c.logger.lines[-1][1]


def test_an_engine_whose_fields_are_not_served(described_path: Path, pair_in: PairOf) -> None:
    """One of a later description, and one of an earlier: both plugins name the field and what to do."""
    pair = pair_in(described_path, "Attributed")
    built = pair.create([])
    assert built is not None
    stored = pair.stored(built)
    later = [*stored, Field("later", 5, 1, bytes(4))]
    assert pair.create(later, RUNTIME) is None
    said = pair.c.logger.lines[-1][1]
    assert "create_plugin: unknown field 'later'; allowed are count (INT32, optional)," in said
    assert said.endswith(": build the engine again, or use the library that it was built with")
    tied = pair_in(described_path, "Tied")
    built = tied.create(fields_of(tied.operator, {"kind": 2}))
    assert built is not None
    assert tied.create([field for field in tied.stored(built) if field.name != "kind"], RUNTIME) is None
    said = tied.c.logger.lines[-1][1]
    assert "missing field kind; needed are kind (INT32), pyfmha_schema" in said
    assert said.endswith(": build the engine again, or use the library that it was built with")
    # Of another operator altogether.
    assert tied.create(stored, RUNTIME) is None
    assert "unknown field 'count'; allowed are kind (INT32), pyfmha_schema" in tied.c.logger.lines[-1][1]
