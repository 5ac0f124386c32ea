"""``tests/two_gpus.py`` on the fake driver's two devices: what it checks on two GPUs holds here, and it can fail."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda
from helpers import HANGS, LONG, TESTS
from shared import Shared
from trt_double.full.fixtures import example_environment
from trt_double.scene import FORWARDS, MEMBERS, specs, standin

from pyfmha.aot import build
from pyfmha.attention.operator import OPERATOR
from pyfmha.spec.arch import parse_archs

Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="session")
def both_ways_library_path(shared: Shared) -> Path:
    """One function of the first kernel and one stand-in for ``fmha_fwd_*``, with the plugin in C."""

    def make(folder: Path) -> Path:
        wanted = [*specs(MEMBERS[:1]), standin(FORWARDS[0], 256), standin(FORWARDS[0], 256).generic()]
        return build(wanted, parse_archs(["sm_90"]), folder, jobs=2, operators=[OPERATOR]).library

    return shared.once("both_ways_library", make)


@pytest.fixture
def run(fake_driver: FakeCuda, both_ways_library_path: Path, tmp_path: Path) -> Run:
    """Runs the program; its exit code, and each check's result with what it said."""

    def run(*arguments: str, **environment: str) -> tuple[int, dict[str, Any]]:
        out = tmp_path / "out.json"
        command = [sys.executable, TESTS / "two_gpus.py", both_ways_library_path, "--launches", "100", "--out", out]
        variables = example_environment(fake_driver.path, None)  # the library is an argument, and that suffices
        done = subprocess.run(
            [*map(str, command), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=HANGS,
            env={**variables, **environment},
        )
        assert out.exists(), done.stderr
        return done.returncode, {row["check"]: row for row in json.loads(out.read_text())["checks"]}

    return run


def assert_all(rows: dict[str, Any], result: str) -> None:
    assert {name: row["result"] for name, row in rows.items()} == dict.fromkeys(rows, result), rows


def test_what_needs_no_process_of_its_own(run: Run) -> None:
    code, rows = run("--only", "sessions", "orders", "refused")

    assert_all(rows, "ok")
    assert code == 0
    assert rows["refused"]["detail"].startswith("100 refusals on device 0")


@pytest.mark.parametrize("name", ["foreign", "destroyed", pytest.param("fault", marks=LONG)])
def test_what_may_end_a_process(run: Run, name: str) -> None:
    code, rows = run("--only", name)

    assert_all(rows, "ok")
    assert code == 0


@LONG
def test_threads_in_any_order_of_the_devices(run: Run) -> None:
    code, rows = run("--only", "threads", "visible")

    assert_all(rows, "ok")
    assert code == 0


def test_wrong_results_fail(run: Run) -> None:
    code, rows = run("--only", "orders", "sessions", FAKE_GPU_KERNEL="wrong")

    assert_all(rows, "FAILED")
    assert code == 1
    assert "relative error 1." in rows["orders"]["detail"]


def test_one_gpu_is_no_failure_and_no_proof(run: Run) -> None:
    code, rows = run("--only", "refused", "visible", "verify", "bench", FAKE_GPU_DEVICES="90")

    assert_all(rows, "not run")
    assert {row["detail"] for row in rows.values()} == {"needs two GPUs"}
    assert code == 0


@pytest.mark.parametrize("kernel", ["right", "wrong"])
def test_the_kinds_of_plugins_side_by_side(
    fake_driver: FakeCuda, both_ways_library_path: Path, tmp_path: Path, kernel: str
) -> None:
    """``tests/plugin_kinds.py`` on one device, with kernels that are right and that are not."""
    out = tmp_path / "kinds.json"
    variables = example_environment(fake_driver.path, both_ways_library_path)
    done = subprocess.run(
        [sys.executable, str(TESTS / "plugin_kinds.py"), str(both_ways_library_path), "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS,
        env={**variables, **({"FAKE_GPU_KERNEL": "wrong"} if kernel == "wrong" else {})},
    )

    assert (done.returncode == 0) == (kernel == "right"), done.stderr
    assert out.exists() == (kernel == "right")
    if kernel == "right":
        rows = json.loads(out.read_text())["rows"]
        assert {"C plugin", "Python plugin"} <= {row["kind"] for row in rows}
        assert all(row["same_bits"] for row in rows)
