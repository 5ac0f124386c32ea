"""The plugin inside the library answers every call as the Python plugin does: values, launches and texts."""

import random
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda
from plugin_host.attention import random_shapes, random_values
from trt_double.twins import Pair, drive, fields_of

from pyfmha.attention.operator import OPERATOR

pytest_plugins = ("plugin_host.attention",)


@pytest.fixture
def pair(attention_path: Path, fake_cuda: FakeCuda) -> Pair:
    assert fake_cuda.c.cuInit(0) == 0
    fake_cuda.use_context()
    return Pair(attention_path, fake_cuda, OPERATOR)


@pytest.mark.parametrize("seed", range(8))
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


def biased_values(chance: random.Random) -> dict[str, Any]:
    """Attributes that are allowed, some of what only ``fmha_biased_*`` serves among them."""
    values: dict[str, Any] = {"num_heads": 4, "head_size": 32, "type_id": 1, "softmax_scale": 0.125}
    values["layout"] = chance.choice(("bhsd", "bshd"))
    allowed = {"bias": (0, 1, 2), "mask": (0, 1), "sinks": (0, 1, 2), "v_head_size": (32, 24, 64)}
    values |= {name: chance.choice(choices) for name, choices in allowed.items()}
    return values if values["bias"] else values | {"mask": 1}


@pytest.mark.parametrize("seed", range(2))
def test_biases_masks_and_sinks_are_launched_alike(pair: Pair, seed: int) -> None:
    chance = random.Random(seed)
    counts = {"prepared": 0, "launched": 0, "split": 0}
    for _ in range(40):
        plugins = pair.create(fields_of(OPERATOR, biased_values(chance)))
        assert plugins is not None
        counts[drive(pair, plugins, chance, random_shapes)] += 1
        for plugin in plugins[1:]:
            plugin.delete()
    assert counts["launched"] > 1
    assert counts["split"] > 1
