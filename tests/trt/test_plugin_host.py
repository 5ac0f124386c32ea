"""The plugins in C in a process without Python: a program in C plays TensorRT and sees what Python's plugins do."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda
from helpers import KERNELS
from plugin_host import HostCalls, build_host
from shared import Shared
from trt_double.twins import Pair, Shapes, drive, fields_of, shapes_for, spoilt

from pyfmha.aot import Compiler, build
from pyfmha.aot.operator_specs import load_operators, operator_specs
from pyfmha.operators.description import Operator
from pyfmha.runtime.library import Library
from pyfmha.spec.arch import parse_archs


@pytest.fixture(scope="session")
def plugins_path(compiler: Compiler, shared: Shared) -> Path:
    """A library with the three operators of ``kernels/plugins.py``."""

    def make(folder: Path) -> Path:
        operators = load_operators(compiler, KERNELS / "plugins.py")
        specs = [spec for operator in operators for spec in operator_specs(compiler, operator)]
        return build(specs, parse_archs(["sm_90"]), folder, jobs=1, operators=operators).library

    return shared.once("plugins", make)


@pytest.fixture(scope="session")
def host_program(shared: Shared) -> Path:
    return shared.once("plugin_host", lambda folder: build_host(folder / "host"))


def operators_of(path: Path) -> dict[str, Operator]:
    return {operator.name: operator for operator in Library(path).operators}


CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "BiasGelu": {"scale": (1.0, 0.5, -3.25, float("inf"), float("nan"), 0.0)},
    "Blend": {
        "weights": ((1.0,), (0.5, -2.0, 3.5), (0.1,) * 64, (), (float("nan"), 1.0)),
        "steps": ((1, 2), (0,), (3, 2, 1), (-1,), (5, 4, 3, 2, 1), (2147483647,)),
        "mode": ("mean", "sum", "it's", "max", "", "mean"),
        "name": ("a name", "", "x" * 300),
        "masked": (0, 1, 1, 2),
        "outputs": (1, 2, 2, 0),
        "most": (1, 1 << 40, 1 << 62, 0, -5),
        "spare": (0.0, 0.25, -1.0),
    },
    "Spread": {"level": (0, -7, (1 << 63) - 1, -(1 << 62), -(1 << 62) - 1)},
}
LARGE = (1 << 20, (1 << 31) - 1, 1 << 31, 1 << 40, 1 << 62, (1 << 63) - 1)
SHAPES: dict[str, Shapes] = {
    "BiasGelu": shapes_for((0, 1, 2, 7, 128, 4096), LARGE),
    "Blend": shapes_for((0, 1, 1, 2, 5, 64, 100_000), LARGE),
    "Spread": shapes_for((0, 1, 2, 3, 4, 6, 12, 12, 1000), LARGE),
}


def random_values(name: str, chance: random.Random) -> dict[str, Any]:
    required = {"Blend": ("weights",)}.get(name, ())
    return {
        attribute: chance.choice(values)
        for attribute, values in CHOICES[name].items()
        if chance.random() < (0.97 if attribute in required else 0.4)
    }


@pytest.fixture
def path(plugins_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(plugins_path, tmp_path / "libpyfmha.so"))


@pytest.fixture
def host(host_program: Path, path: Path, fake_cuda: FakeCuda) -> Iterator[HostCalls]:
    calls = HostCalls(host_program, path, fake_cuda.path)
    yield calls
    assert calls.close() == ""


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
        layer = chance.choice(("layer 7", "", 'it\'s \\ "so"', "\u03c0"))
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
