"""The benchmark on the stand-in for a GPU: a device with a clock.

Asked for with ``pytest_plugins``, after ``trt_double.full.fixtures`` and ``trt_double.fixtures``.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench_on_double import prepare
from trt_double.full.gpu import Gpu

from pyfmha.bench.clock import Clock
from pyfmha.runtime.device import Device


@pytest.fixture
def bench_gpu(gpu: Gpu, forward_library_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """With the production kernel's stand-ins in the library."""
    prepare(gpu, monkeypatch)
    gpu.learn(forward_library_path.with_name("manifest.json"))
    monkeypatch.setenv("PYFMHA_LIBRARY", str(forward_library_path))
    for name in ("torch", "tensorrt", "tensorrt_lean", "tensorrt_dispatch"):
        monkeypatch.setitem(sys.modules, name, None)
    return gpu


@pytest.fixture
def timer(bench_gpu: Gpu) -> Iterator[Clock]:
    with Device() as device:
        made = Clock(device)
        yield made
        made.close()
