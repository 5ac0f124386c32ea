"""The commands as a user runs them: in processes of their own, in a folder of their own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cuda import FakeCuda
from typer.testing import CliRunner

import pyfmha
from pyfmha.cli import app
from pyfmha.runtime import Library

ROOT = Path(pyfmha.__file__).parents[1]
COMPILE = ("compile", "kernels/fmha_triton.py", "-n", "fused_attention_kernel", "-w", "4")
SIGNATURE = "*fp16:16, *fp32:16, *fp32:16, *fp16:16, *fp16:16, *fp16:16, fp32, i32, i32, i32, 64, 32, 64"
GRID = "(seq_len + 63) / 64, batch_size * num_heads, 1"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder as a user has it: the kernels, and nothing built."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``pyfmha ARGUMENTS`` in a folder, on a machine whose driver cannot be found."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment}
    command = [sys.executable, "-m", "pyfmha", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def readme_block(containing: str) -> list[str]:
    """The shell commands of the README's indented block that holds some text, continuation lines joined."""
    blocks = re.findall(r"(?:^    .*\n)+", (ROOT / "README.md").read_text(), re.MULTILINE)
    block = next(block for block in blocks if containing in block)
    return [line.strip() for line in block.replace("\\\n", " ").splitlines()]


def test_readme_flow_from_kernel_to_launch(project: Path, fake_cuda: FakeCuda) -> None:
    commands = readme_block("pyfmha link aot_out/fp16")
    assert [command.split()[1] for command in commands] == ["compile", "compile", "link", "link"]
    pyfmha_command = f"{sys.executable} -m pyfmha"

    for command in commands:
        done = subprocess.run(
            re.sub(r"^pyfmha\b", pyfmha_command, command),
            shell=True,
            cwd=project,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    fake_cuda.use_context()
    for dtype, block in (("fp16", 128), ("fp32", 64)):
        library = Library(project / f"aot_out/fmha_kernel_{dtype}.so")
        function = library[f"fmha_d64_{dtype}"]
        function.load()
        function(0, *[0x1000 * i for i in range(1, 7)], 0.125, 2, 3, 300)
        launch = fake_cuda.launches()[-1]
        assert launch.grid == (-(-300 // block), 6, 1)
        assert launch.kernel == "fused_attention_kernel"
        function.unload()


BAD_COMPILES = {
    "no architecture": ((*COMPILE, "-s", SIGNATURE, "-g", GRID), r"no architecture given and no GPU .* -t sm_90"),
    "unknown architecture": (
        (*COMPILE, "-s", SIGNATURE, "-g", GRID, "-t", "sm_91"),
        r"unknown architecture 'sm_91': use one of sm_80",
    ),
    "no such file": (
        ("compile", "nowhere.py", "-n", "k", "-s", "i32", "-g", "1", "-t", "sm_90"),
        r"nowhere.py does not exist",
    ),
    "no such kernel": (
        ("compile", "kernels/fmha_triton.py", "-n", "nope", "-s", "i32", "-g", "1", "-t", "sm_90"),
        r"'nope' is not there .* fused_attention_kernel",
    ),
    "wrong length": (
        (*COMPILE, "-s", "i32, i32", "-g", GRID, "-t", "sm_90"),
        r"signature has 2 entries, the kernel takes 13 to 15",
    ),
    "unknown type": (
        (*COMPILE, "-s", SIGNATURE.replace("*fp16:16", "*half:16"), "-g", GRID, "-t", "sm_90"),
        r"unknown pointer type '\*half'",
    ),
    "bad hint": (
        (*COMPILE, "-s", SIGNATURE.replace("*fp32:16", "*fp32:8"), "-g", GRID, "-t", "sm_90"),
        r"hint :8 is unknown; use :16",
    ),
    "bad grid": ((*COMPILE, "-s", SIGNATURE, "-g", "n_blocks", "-t", "sm_90"), r"'n_blocks' is no integer argument"),
    "bad warps": ((*COMPILE, "-s", SIGNATURE, "-g", GRID, "-t", "sm_90", "-w", "3"), r"num_warps is 3; use 1, 2, 4"),
    "nothing to link": (("link", "missing.h", "-o", "aot_out/x"), r"missing.json cannot be read"),
    "no library": (("inspect",), r"no library at aot_out/libpyfmha.so; build it: pyfmha build"),
    "unknown dtype": (("build", "--arch", "sm_90", "--dtype", "fp8"), r"dtype 'fp8' is not served"),
    "unknown head size": (("build", "--arch", "sm_90", "--head-size", "80"), r"head size 80 is not served"),
}


@pytest.mark.parametrize("case", BAD_COMPILES)
def test_bad_input_is_one_message_and_exit_code_2(case: str, project: Path) -> None:
    arguments, message = BAD_COMPILES[case]

    done = run(project, *arguments)

    assert done.returncode == 2, done.stderr
    assert re.search(message, " ".join(done.stderr.split())), done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.count("error:") == 1
    assert not (project / "aot_out").exists(), "a failed command left something behind"


def test_several_values_after_one_option(project: Path) -> None:
    done = run(project, "build", "--arch", "sm_80", "sm_90", "--dtype", "fp16", "--head-size", "32", "-o", "out")

    assert done.returncode == 0, done.stderr
    library = Library(project / "out/libpyfmha.so")
    assert library.manifest.archs() == ("sm_80", "sm_90")
    assert list(library) == ["fmha_d32_fp16", "fmha_d32_fp16_full"]
    again = run(project, "build", "--arch", "sm_80", "sm_90", "--dtype", "fp16", "--head-size", "32", "-o", "out")
    assert "up to date, nothing done" in again.stdout
    inspected = run(project, "inspect", "out/manifest.json")
    assert inspected.returncode == 0
    for _, _, variant in library.manifest.variants():
        assert variant.name in inspected.stdout


def test_demo_runs_the_main_job_without_a_gpu(project: Path) -> None:
    done = run(project, "demo", "--arch", "sm_90", "--dtype", "fp16", "--head-size", "32", "-o", "out")

    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("1. Compile", "2. Audit", "3. Load", "On the CPU, under Triton's interpreter", "All 2 passed"):
        assert expected in done.stdout


def test_demo_exits_1_when_the_numbers_are_wrong(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setattr("pyfmha.demo.LIMITS", {"fp16": 1e-9})

    done = CliRunner().invoke(app, ["demo", "--arch", "sm_90", "--dtype", "fp16", "--head-size", "32", "-o", "out"])

    assert done.exit_code == 1, done.output
    assert "Failed: fmha_d32_fp16, fmha_d32_fp16_full" in done.output


def test_help_names_every_command_and_version() -> None:
    helped = CliRunner().invoke(app, ["--help"])
    versioned = CliRunner().invoke(app, ["--version"])

    assert all(command in helped.output for command in ("compile", "link", "build", "inspect", "demo"))
    assert versioned.output == f"pyfmha {pyfmha.__version__}\n"
