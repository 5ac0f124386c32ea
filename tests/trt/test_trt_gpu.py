"""On a GPU: the plugin through a real TensorRT binding, by ``trt_gpu.py``; and without one, what that leaves out."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import trt_gpu_features
import trt_gpu_parts
from helpers import TESTS, python_environment
from trt_gpu_features import CASES, DTYPES, HEAD_SIZES, sizes_of
from trt_gpu_parts import Report

from pyfmha.aot import build
from pyfmha.attention.first import family, family_specs
from pyfmha.runtime.device import Device
from pyfmha.spec.arch import parse_archs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [(False, False), (False, True), (True, False), (True, True)])
def test_every_head_size_runs_decoded_and_misaligned(dtype: str, kind: tuple[bool, bool]) -> None:
    shared = sizes_of(dtype, HEAD_SIZES)
    assert set(shared) == set(CASES)
    mine = [shared[name] for name, case in CASES.items() if (case.decoded, case.misaligned) == kind]
    assert {size for sizes in mine for size in sizes} == set(HEAD_SIZES)
    assert all(len(set(sizes)) == len(sizes) >= trt_gpu_features.SIZES_OF_A_CASE for sizes in mine)


def test_dtypes_run_a_case_with_other_head_sizes() -> None:
    per_dtype = [sizes_of(dtype, HEAD_SIZES)["causal"] for dtype in DTYPES]
    assert len({size for sizes in per_dtype for size in sizes}) == 3 * len(per_dtype)


@pytest.mark.parametrize("served", [(), (64,), (40, 64)])
def test_no_head_size_runs_twice_where_few_are_served(served: tuple[int, ...]) -> None:
    assert all(sorted(sizes) == list(served) for sizes in sizes_of("bf16", served).values())


class Clock:
    """A time that passes when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(trt_gpu_parts.time, "monotonic", lambda: self.now)


def test_a_part_that_is_late_stops_and_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch)
    report = Report(tmp_path / "results.json", device="none")
    with report.part("slow", 10):
        assert not report.late()
        clock.now += 11
        assert report.late()
    with report.part("fast", 10):
        assert not report.late()
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["parts"] == {"slow": 11.0, "fast": 0.0}
    assert [(check["name"], check["passed"]) for check in written["checks"]] == [("slow: all of it within 10 s", False)]


def test_the_file_is_there_after_each_part_but_has_not_passed_before_the_end(tmp_path: Path) -> None:
    report, path = Report(tmp_path / "results.json"), tmp_path / "results.json"
    with report.part("first", 10):
        report.check("fine", True)
    assert json.loads(path.read_text())["checks"]
    assert not json.loads(path.read_text())["passed"]
    report.results["finished"] = True
    report.save()
    assert json.loads(path.read_text())["passed"]
    with report.part("second", 10):
        raise ValueError("broken")
    written = json.loads(path.read_text())
    assert not written["passed"]
    assert "broken" in written["checks"][-1]["detail"]


def test_progress_is_said_after_some_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, report = Clock(monkeypatch), Report()
    for number in range(12):
        clock.now += 1
        report.progress(f"turn {number}")
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["4", "9"]


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
