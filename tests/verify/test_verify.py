"""``pyfmha verify --only engine`` as users start it, with doubles in the place of TensorRT and the GPU."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda
from helpers import LAUNCH_FAILED
from trt_double.full import VERSIONS
from trt_double.full.fixtures import example_environment

from pyfmha.attention.first import DTYPES
from pyfmha.attention.reference import LIMITS
from pyfmha.spec.manifest import read_manifest
from pyfmha.trt.failures import LOGGER
from pyfmha.verify.engines import SHAPES, chosen_tactics

pytest_plugins = ["trt_double.fixtures"]

SIZE = 32
ENGINES = ("--only", "engine", "--head-size", str(SIZE))
FEW = ((1, 1), (2, 17), (1, 40))
"""In the place of :data:`SHAPES`: numpy's reference of all of them takes too long here."""

VERIFY = f"""
import sys
import pyfmha.verify.engines
from pyfmha.__main__ import main
pyfmha.verify.engines.SHAPES = {FEW}
"""
Verify = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def verify(fake_driver: FakeCuda, attention_library_path: Path) -> Verify:
    """Runs the command; ``before`` is Python code that sets the scene in its process."""

    def run(
        *arguments: str,
        before: str = "",
        library: Path | None = attention_library_path,
        libcuda: Path | None = fake_driver.path,
        **settings: str,
    ) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", f"{VERIFY}{before}\nmain()", "verify", *ENGINES, *arguments]
        environment = {**example_environment(libcuda, library), **settings}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    return run


def rows_of(done: "subprocess.CompletedProcess[str]") -> list[list[str]]:
    """The table's rows, as their cells; a tactic's further lines left out."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in done.stdout.splitlines() if "│" in line]
    return [row for row in rows if row[0]]


def assert_error(done: "subprocess.CompletedProcess[str]", *texts: str) -> None:
    assert done.returncode == 2, done
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stdout + done.stderr
    assert "│" not in done.stdout, "a table without a single engine"
    for text in texts:
        assert text in done.stderr


def test_everything_passes(verify: Verify, attention_library_path: Path) -> None:
    done = verify("--dtype", "fp16")

    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(done)
    asked = [("fp16", mask, *shape) for mask in ("causal", "full") for shape in FEW]
    assert [(row[0], row[1], int(row[2]), int(row[3])) for row in rows] == asked
    assert all(float(row[4]) <= float(row[5]) == LIMITS["fp16"] for row in rows)
    assert {row[-1] for row in rows} == {"ok"}
    assert "All 6 passed." in done.stdout
    manifest = read_manifest(attention_library_path.with_name("manifest.json"))
    for function in manifest.functions:
        named = [all(v.name in done.stdout for v in algorithm) for algorithm in function.algorithms]
        assert sum(named) == (function.name in ("fmha_d32_fp16", "fmha_d32_fp16_full")), "one tactic an engine"
    assert f"tensorrt {VERSIONS[-1]}" in done.stdout
    assert f"library {manifest.build_id[:12]} for sm_90" in done.stdout
    assert "Fake GPU" in done.stdout


def test_another_device(verify: Verify) -> None:
    """Engines are built and run there: the first device has no code."""
    done = verify("--dtype", "fp16", "--device", "1", FAKE_GPU_DEVICES="75,90")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "All 6 passed." in done.stdout
    assert "Fake GPU 1 (sm_90)" in done.stdout
    assert_error(verify("--dtype", "fp16", "--device", "2"), "no GPU 2: the driver sees 2")


@pytest.mark.parametrize("version", VERSIONS[:-1])
def test_earlier_versions(verify: Verify, version: str) -> None:
    done = verify("--dtype", "fp16", TRT_DOUBLE_VERSION=version)

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"tensorrt {version}" in done.stdout
    assert "All 6 passed." in done.stdout


def test_wrong_numbers(verify: Verify) -> None:
    done = verify("--dtype", "fp16", FAKE_GPU_KERNEL="wrong")

    assert done.returncode == 1, done.stderr
    assert {(row[4], row[-1]) for row in rows_of(done)} == {("1.0e-02", "FAILED")}
    assert "6 of 6 failed" in done.stdout


def test_engines_that_cannot_be_built(verify: Verify) -> None:
    """The library serves bf16 and fp32 with a causal mask only. Every dtype is the default."""
    done = verify()

    assert done.returncode == 1, done.stderr
    verdicts = [(row[0], row[1], row[-1]) for row in rows_of(done)]
    good = {(dtype, mask): [(dtype, mask, "ok")] * 3 for dtype in DTYPES for mask in ("causal", "full")}
    bad = {(dtype, "full"): [(dtype, "full", "FAILED")] for dtype in ("bf16", "fp32")}
    assert verdicts == [row for rows in {**good, **bad}.values() for row in rows]
    for dtype in ("bf16", "fp32"):
        assert f"{dtype} full, the engine: " in done.stdout
        assert f"libpyfmha.so does not hold fmha_fwd_d32_{dtype}" in done.stdout
        assert f"pyfmha build --dtype {dtype} --head-size 32" in done.stdout
    assert "2 of 14 failed" in done.stdout


@pytest.mark.parametrize(("spared", "verdicts"), [(0, "F ooo"), (3, "oFo ooo")])
def test_a_launch_that_fails(verify: Verify, spared: int, verdicts: str) -> None:
    """While the first engine is built, and at its second run. The others go on."""
    fail = f"gpu().cuda.fail('cuLaunchKernel', {LAUNCH_FAILED}, after={spared}, times=1)"

    done = verify("--dtype", "fp16", before=f"from trt_double.full.gpu import gpu\n{fail}")

    assert done.returncode == 1, done.stderr
    rows = rows_of(done)
    wanted = {"o": "ok", "F": "FAILED"}
    masks = [(mask, wanted[v]) for mask, vs in zip(("causal", "full"), verdicts.split(), strict=True) for v in vs]
    assert [(row[1], row[-1]) for row in rows] == masks
    (failed,) = [row for row in rows if row[-1] == "FAILED"]
    assert failed[2:5] == (["-", "-", "nan"] if spared == 0 else ["2", "17", "nan"])
    assert f"1 of {len(rows)} failed" in done.stdout
    where = "the engine" if spared == 0 else "batch 2, seq 17"
    (reason,) = [line for line in done.stdout.splitlines() if line.startswith(f"fp16 causal, {where}: ")]
    assert "enqueue: cuLaunchKernel failed for fmha_d32_fp16" in reason


def test_tensorrt_missing(verify: Verify) -> None:
    hide = "".join(f"sys.modules['{name}'] = None\n" for name in ("tensorrt", "tensorrt_lean", "tensorrt_dispatch"))

    assert_error(verify(before=hide), "TensorRT is not installed", "pip install tensorrt")


def test_a_tensorrt_that_only_runs_engines(verify: Verify) -> None:
    done = verify(before="sys.modules['tensorrt'] = None")

    assert_error(done, f"tensorrt_lean {VERSIONS[-1]} only runs engines", "pip install tensorrt")


def test_no_gpu(verify: Verify) -> None:
    assert_error(verify(libcuda=None), "no CUDA driver")
    assert_error(verify(FAKE_GPU_DEVICES=""), "cuInit failed: CUDA error 100")


def test_no_library(verify: Verify, tmp_path: Path) -> None:
    assert_error(verify(library=tmp_path / "none.so"), "PYFMHA_LIBRARY is", "pyfmha build")


def test_the_issues_shapes() -> None:
    assert set(SHAPES) == {(batch, seq) for batch in (1, 8) for seq in (1, 17, 127, 128, 129, 512)}


def test_tactics_are_read_from_the_log_which_stays_as_it_was() -> None:
    before: Any = LOGGER.level, list(LOGGER.handlers)
    with chosen_tactics() as chosen:
        LOGGER.debug("tactic %d", 7, extra={"tactic": "a+b"})
        LOGGER.debug("another matter")
    LOGGER.debug("tactic %d", 8, extra={"tactic": "c"})

    assert chosen == ["a+b"]
    assert (LOGGER.level, LOGGER.handlers) == before
