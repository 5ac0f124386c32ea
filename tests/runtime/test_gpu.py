"""On a GPU: the whole family built for it, checked by ``examples/measure.py`` against float64, between guards."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pyfmha
from pyfmha.aot import build
from pyfmha.attention.first import family, family_specs
from pyfmha.runtime.device import Device
from pyfmha.spec.arch import parse_archs

ROOT = Path(pyfmha.__file__).parents[1]


@pytest.mark.gpu
def test_every_variant_on_this_gpu(tmp_path: Path) -> None:
    built = build(family_specs(family()), parse_archs([Device().arch]), tmp_path)
    results = tmp_path / "results.json"
    script = ROOT / "examples" / "maintainers" / "measure.py"
    command = [sys.executable, script, "--library", built.library, "--part", "check", "--out", results]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads(results.read_text())["checks"]
    ran = {row["variant"] for row in checks}
    assert ran == {variant.name for _, _, variant in built.manifest.variants()}
