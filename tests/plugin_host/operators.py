"""Fixtures and values of the tests of three operators that are not attention; asked for with ``pytest_plugins``."""

import ctypes
import functools
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from described import STRICT
from fake_cuda import FakeCuda
from helpers import KERNELS
from shared import Shared
from trt_double.binding import make_binding
from trt_double.twins import Shapes, shapes_for

from plugin_host import HostCalls, build_host
from pyfmha.aot import Compiler, build
from pyfmha.aot.operator_specs import load_operators, operator_specs
from pyfmha.operators.description import Operator
from pyfmha.runtime.library import Library
from pyfmha.spec.arch import parse_archs
from pyfmha.spec.kernel import KernelSpec
from pyfmha.trt.tables import POINTER, Logger


def specs_of(compiler: Compiler) -> tuple[list[Operator], list[KernelSpec]]:
    """The operators of ``kernels/plugins.py``, and what to compile for them."""
    operators = load_operators(compiler, KERNELS / "plugins.py")
    return operators, [spec for operator in operators for spec in operator_specs(compiler, operator)]


@pytest.fixture(scope="session")
def plugins_path(compiler: Compiler, shared: Shared) -> Path:
    """A library with the three operators of ``kernels/plugins.py``, whose C gives gcc nothing to say."""

    def make(folder: Path) -> Path:
        operators, specs = specs_of(compiler)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CC", STRICT)
            return build(specs, parse_archs(["sm_90"]), folder, jobs=1, operators=operators).library

    return shared.once("plugins", make)


@pytest.fixture(scope="session")
def host_program(shared: Shared) -> Path:
    return shared.once("plugin_host", lambda folder: build_host(folder / "host"))


def operators_of(path: Path) -> dict[str, Operator]:
    """The operators of a library by name."""
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


LATER = """
#include <stdlib.h>
int getInferLibVersion(void) { return 120000; }
static void unknown(void) { abort(); }
static void (*const table[])(void) = {unknown, unknown, unknown, unknown, unknown, unknown};
void (*const *finder[])(void) = {table};
"""


@pytest.fixture
def later_trt(tmp_path: Path) -> Any:
    """A binding of TensorRT 12, which loads libraries and has a finder that nobody may call."""
    source, library = tmp_path / "later.c", tmp_path / "libnvinfer.so.12"
    source.write_text(LATER)
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", library], check=True)
    logger, trt = Logger(), make_binding()
    logger.finder = (POINTER * 1).in_dll(ctypes.CDLL(str(library)), "finder")
    trt.__version__ = "12.0.0"
    registry = trt.get_plugin_registry()
    registry.load_library = functools.partial(registry.load_library, logger=logger)
    return trt


@pytest.fixture
def host(host_program: Path, path: Path, fake_cuda: FakeCuda) -> Iterator[HostCalls]:
    calls = HostCalls(host_program, path, fake_cuda.path)
    yield calls
    assert calls.close() == ""
