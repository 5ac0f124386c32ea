"""Fixtures for tests with the double of the whole of TensorRT; a test module asks for them with ``pytest_plugins``."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda
from helpers import TESTS

from pyfmha.runtime import device, graph
from trt_double.full import VERSIONS, make_full
from trt_double.full import driver as fake_cuda_driver
from trt_double.full.gpu import Gpu, use

PATH = TESTS / "trt_double" / "full" / "path"


@pytest.fixture
def gpu(fake_cuda: FakeCuda, attention_library_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """A fake GPU with memory, in the place of cuda-python's driver; it knows the attention library's machine code."""
    made = Gpu(fake_cuda.path)
    made.learn(attention_library_path.with_name("manifest.json"))
    use(made)
    for module in (device, graph):
        monkeypatch.setattr(module, "_driver", lambda: fake_cuda_driver)
    monkeypatch.setenv("PYFMHA_LIBRARY", str(attention_library_path))
    yield made
    use(None)


@pytest.fixture(params=VERSIONS)
def full_trt(request: pytest.FixtureRequest, gpu: Gpu) -> Iterator[Any]:
    """A double of each version of TensorRT, which no test shares."""
    made = make_full("trt_full", request.param)
    yield made
    del sys.modules["trt_full"]


@pytest.fixture
def trt11(gpu: Gpu) -> Iterator[Any]:
    """A double of the newest version."""
    made = make_full("trt_full", VERSIONS[-1])
    yield made
    del sys.modules["trt_full"]


def example_environment(libcuda: Path | None, library: Path | None, version: str = VERSIONS[-1]) -> dict[str, str]:
    """For a process that finds the doubles in the place of TensorRT, TensorRT-LLM and cuda-python."""
    hidden = ("PYFMHA_LIBCUDA", "PYFMHA_LIBRARY", "FAKE_GPU_KERNEL", "FAKE_GPU_DEVICES", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    path = os.pathsep.join(map(str, (PATH, TESTS, TESTS.parent)))
    environment |= {"PYTHONPATH": path, "TRT_DOUBLE_VERSION": version, "MPLBACKEND": "agg"}
    if libcuda is not None:
        environment["PYFMHA_LIBCUDA"] = str(libcuda)
    if library is not None:
        environment["PYFMHA_LIBRARY"] = str(library)
    return environment
