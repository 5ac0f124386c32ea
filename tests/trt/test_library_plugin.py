"""The plugin inside the library answers every call as the Python plugin does: values, launches and texts."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda
from helpers import few_of
from plugin_host.attention import random_shapes, random_values
from trt_double import RUNTIME, Tensor
from trt_double.twins import STREAM, WORKSPACE, Pair, bounded, drive, fields_of

from pyfmha.attention.decode import most_workspace_bytes
from pyfmha.attention.fp8 import DESCALES
from pyfmha.attention.operator import OPERATOR

pytest_plugins = ("plugin_host.attention",)


@pytest.fixture
def pair(attention_path: Path, fake_cuda: FakeCuda) -> Pair:
    assert fake_cuda.c.cuInit(0) == 0
    fake_cuda.use_context()
    return Pair(attention_path, fake_cuda, OPERATOR)


@pytest.mark.parametrize("seed", few_of(range(8), lambda seed: seed < 4))
def test_every_call_is_answered_alike(pair: Pair, seed: int) -> None:
    chance = random.Random(seed)
    counts = {"refused": 0, "prepared": 0, "launched": 0, "split": 0}
    for _ in range(60):
        plugins = pair.create(fields_of(OPERATOR, random_values(chance)))
        if plugins is None:
            counts["refused"] += 1
            continue
        counts[drive(pair, plugins, chance, random_shapes)] += 1
        for plugin in plugins[1:]:
            plugin.delete()
    assert counts["refused"] > 5
    assert counts["launched"] > 0


@pytest.mark.parametrize(("memory", "count"), [((2619000, 5120), 1), ((3201000, 6144), 2), ((0, 0), 1)])
def test_long_decoding_follows_the_device_in_both(
    pair: Pair, fake_cuda: FakeCuda, memory: tuple[int, int], count: int
) -> None:
    """An H200 reads it in two launches faster, an H100 in one as fast; one that does not tell takes one."""
    fake_cuda.set_bandwidth(0, *memory)
    values = {"num_heads": 8, "head_size": 128, "type_id": 1, "softmax_scale": 0.125, "num_kv_heads": 8}
    plugins = pair.create(fields_of(OPERATOR, values))
    assert plugins is not None
    loaded = pair.create(pair.stored(plugins), RUNTIME)
    assert loaded is not None
    attached = [calls.attach(plugin) for calls, plugin in zip((pair.python, pair.c), loaded, strict=True)]
    q, k = Tensor((4, 8, 1, 128), 1), Tensor((4, 8, 32768, 128), 1)
    assert pair.both("on_shape_change", attached, [q, k, k], [q]) == 0
    room = pair.both("workspace", attached, [bounded(x, random.Random(0)) for x in (q, k, k)], [q])
    assert room == most_workspace_bytes(4, 8, 1, 128)  # wherever the engine is built, and wherever it runs
    addresses = [0x7F0000000000 + 0x100000000 * index for index in range(4)]
    assert len(pair.launches(attached, addresses[:3], addresses[3:], WORKSPACE, STREAM)) == count
    for plugin in (plugins[1], loaded[1], attached[1]):
        plugin.delete()


def test_a_device_without_code_is_told_of_and_leaves_the_other_right(pair: Pair, fake_cuda: FakeCuda) -> None:
    """Plugins move from one device's context to the other's, as those of an engine that each device deserialised."""
    fake_cuda.set_device_count(2)
    fake_cuda.set_device(1, 75)
    first, second = fake_cuda.use_context(0), fake_cuda.use_context(1)
    fake_cuda.make_current(first)
    values = {"num_heads": 4, "head_size": 32, "type_id": 1, "softmax_scale": 0.125, "num_kv_heads": 4}
    plugins = pair.create(fields_of(OPERATOR, values))
    assert plugins is not None
    attached = [calls.attach(plugin) for calls, plugin in zip((pair.python, pair.c), plugins, strict=True)]
    shape = [Tensor((2, 4, 100, 32), 1)] * 3
    addresses = [0x7F0000000000 + 0x100000000 * index for index in range(4)]
    for context, status in ((first, 0), (second, -1), (first, 0)):
        fake_cuda.make_current(context)
        assert pair.both("on_shape_change", attached, shape, shape[:1]) == status
        made = pair.both("enqueue", attached, addresses[:3], addresses[3:], WORKSPACE, STREAM)
        assert made == status
    fake_cuda.make_current(second)
    assert pair.both("on_shape_change", attached, shape, shape[:1]) == -1
    assert "not for device 1, which is sm_75" in pair.c.error()
    assert fake_cuda.violations() == (0, "")
    for plugin in (plugins[1], attached[1]):
        plugin.delete()


def biased_values(chance: random.Random) -> dict[str, Any]:
    """Attributes that are allowed, some of what only ``fmha_biased_*`` serves among them."""
    values: dict[str, Any] = {"num_heads": 4, "head_size": 32, "type_id": 1, "softmax_scale": 0.125}
    values["layout"] = chance.choice(("bhsd", "bshd"))
    allowed = {"bias": (0, 1, 2), "mask": (0, 1), "sinks": (0, 1, 2), "v_head_size": (32, 24, 64)}
    values |= {name: chance.choice(choices) for name, choices in allowed.items()}
    return values if values["bias"] else values | {"mask": 1}


def fp8_values(chance: random.Random) -> dict[str, Any]:
    """Attributes that are allowed with Q, K and V in FP8."""
    ragged, kv_heads = chance.random() < 0.3, chance.choice((1, 2, 4))
    values: dict[str, Any] = {
        **{"num_heads": 4, "num_kv_heads": kv_heads, "head_size": chance.choice((16, 48, 64)), "softmax_scale": 0.125},
        **{"type_id": chance.choice((1, 7)), "causal": chance.choice((0, 1, 2)), "return_lse": chance.choice((0, 1))},
        **{"fp8": 1, "layout": "bshd" if ragged else chance.choice(("bhsd", "bshd", "packed"))},
    }
    names = [*DESCALES, *(() if ragged else ("q_lengths", "kv_lengths"))]
    return values | {name: chance.choice((0, 1)) for name in names} | ({"cu_seqlens": 1} if ragged else {})


@pytest.mark.parametrize(("seed", "values"), [(0, biased_values), (1, biased_values), (0, fp8_values), (1, fp8_values)])
def test_biases_masks_sinks_and_eight_bits_are_launched_alike(
    pair: Pair, seed: int, values: Callable[[random.Random], dict[str, Any]]
) -> None:
    chance = random.Random(seed)
    counts = {"prepared": 0, "launched": 0, "split": 0}
    for _ in range(40):
        plugins = pair.create(fields_of(OPERATOR, values(chance)))
        assert plugins is not None
        counts[drive(pair, plugins, chance, random_shapes)] += 1
        for plugin in plugins[1:]:
            plugin.delete()
    assert counts["launched"] > 1
    assert (counts["split"] > 1) == (values is biased_values)  # eight bits are never split over the keys
