"""On a GPU: the plugin through a real TensorRT binding, by ``trt_gpu.py``."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TESTS, python_environment

from pyfmha.aot import build
from pyfmha.arch import parse_archs
from pyfmha.attention import family, family_specs
from pyfmha.runtime.device import Device


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed: nothing to compare with")
def test_the_plugin_on_this_gpu(tmp_path: Path) -> None:
    built = build(family_specs(family(head_sizes=[64])), parse_archs([Device().arch]), tmp_path)
    results = tmp_path / "results.json"
    environment = python_environment()
    environment.pop("TRITON_INTERPRET", None)  # these tests' own

    done = subprocess.run(
        [sys.executable, TESTS / "trt_gpu.py", built.library, "--out", results],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(results.read_text())
    assert written["passed"]
    assert written["build_id"] == built.manifest.build_id
    served = {member.name for member in family(head_sizes=[64]) if member.precision == "tf32x3"}
    assert {row["function"] for row in written["numerics"]} == served
