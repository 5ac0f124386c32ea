"""The plugins in C in a process without Python: a program in C plays TensorRT and sees what Python's plugins do."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_cuda import FakeCuda
from helpers import few_of
from plugin_host import HostCalls, attention
from plugin_host.operators import CHOICES, SHAPES, operators_of, random_values
from trt_double import RUNTIME, Field
from trt_double.twins import Pair, drive, fields_of, spoilt

from pyfmha.attention.operator import OPERATOR

pytest_plugins = ("plugin_host.operators", "plugin_host.attention")
LAYERS = ("layer 7", "", 'it\'s \\ "so"', "\u03c0")


def pair_of(path: Path, fake_cuda: FakeCuda, host: HostCalls, name: str) -> Pair:
    assert fake_cuda.c.cuInit(0) == 0
    fake_cuda.use_context()
    return Pair(path, fake_cuda, operators_of(path)[name], host)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CHOICES)
def test_every_call_is_answered_alike(path: Path, fake_cuda: FakeCuda, host: HostCalls, name: str, seed: int) -> None:
    pair = pair_of(path, fake_cuda, host, name)
    chance = random.Random(seed)
    counts = {"refused": 0, "prepared": 0, "launched": 0, "split": 0}
    for _ in range(60):
        layer = chance.choice(LAYERS)
        plugins = pair.create(spoilt(fields_of(pair.operator, random_values(name, chance)), chance), layer=layer)
        if plugins is None:
            counts["refused"] += 1
            continue
        counts[drive(pair, plugins, chance, SHAPES[name])] += 1
        plugins[1].delete()
    assert counts["refused"] > 0
    assert counts["prepared"] > 0
    assert counts["split" if name == "Blend" else "launched"] > 0
    del plugins
    assert host.ask("modules") == ["0"]


ALLOWED = ("", "it's", "\u00e9\u07ff\u0800\ud7ff\ue000\uffff", "\U00010000\U0010ffff")
REFUSED = (
    *(b"\x80", b"\xff", b"a\xc3", b"\xc1\xbf", b"\xe0\x9f\xbf", b"\xed\xa0\x80", b"\xe2\x82"),
    *(b"\xf0\x8f\xbf\xbf", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xf0\x9f\x98"),
)


def test_texts_are_utf8_in_both(path: Path, fake_cuda: FakeCuda, host: HostCalls) -> None:
    """As others they would be kept by one plugin in other bytes than by the other; and what an engine keeps is read."""
    pair = pair_of(path, fake_cuda, host, "Blend")
    weights = fields_of(pair.operator, {"weights": (1.0,)})
    for text in (*(text.encode() for text in ALLOWED), *REFUSED):
        plugins = pair.create([*weights, Field("name", 6, len(text) + 1, text + b"\0")])
        assert (plugins is None) == (text in REFUSED)
        if plugins is None:
            assert pair.c.error().endswith("create_plugin: field name is no text in UTF-8")
            continue
        pair.both("timing_cache_id", plugins)
        stored = pair.stored(plugins)
    for number, text in ((0, b"x\0"), (7, b"\xff\0")):
        changed = {"pyfmha_schema": number.to_bytes(4, "little"), "pyfmha_prototype": text}
        for name, data in changed.items():
            other = [
                Field(name, f.type, len(data) if f.type == 6 else 1, data) if f.name == name else f for f in stored
            ]
            assert pair.create(other, RUNTIME) is None


@pytest.fixture
def attention_host(host_program: Path, attention_path: Path, fake_cuda: FakeCuda) -> Iterator[HostCalls]:
    calls = HostCalls(host_program, attention_path, fake_cuda.path)
    yield calls
    assert calls.close() == ""


SEEDS = few_of(range(30), lambda seed: seed < 3)


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_is_answered_alike(
    attention_path: Path, fake_cuda: FakeCuda, attention_host: HostCalls, seed: int
) -> None:
    """Every attribute and shape: refused with one text, or with the launches of the plugin in Python."""
    assert fake_cuda.c.cuInit(0) == 0
    fake_cuda.use_context()
    pair = Pair(attention_path, fake_cuda, OPERATOR, attention_host)
    chance = random.Random(seed)
    counts = {"refused": 0, "prepared": 0, "launched": 0, "split": 0}
    for _ in range(200):
        fields = spoilt(fields_of(OPERATOR, attention.random_values(chance)), chance)
        plugins = pair.create(fields, layer=chance.choice(LAYERS))
        if plugins is None:
            counts["refused"] += 1
            continue
        counts[drive(pair, plugins, chance, attention.random_shapes)] += 1
        plugins[1].delete()
    assert min(counts.values()) > 0, counts
    del plugins
    assert attention_host.ask("modules") == ["0"]
