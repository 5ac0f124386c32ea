"""The programs in C and C++ as users build and run them, with the fake driver in the place of a GPU."""

import os
import shutil
import subprocess
from pathlib import Path

import fake_cuda as fake
import pytest
from helpers import TESTS, gcc
from shared import Shared

from pyfmha.aot import build
from pyfmha.attention.first import Attention
from pyfmha.attention.operator import OPERATOR
from pyfmha.spec.arch import parse_archs

pytest_plugins = ["trt_double.fixtures"]

EXAMPLES = TESTS.parent / "examples" / "c"
WARNINGS = ("-Wall", "-Wextra", "-Werror")
SMALL = ("-DATTENTION=fmha_d32_fp32", "-DHEAD_SIZE=32")
"""What the small library of the tests holds."""


@pytest.fixture(scope="module")
def computing_driver(shared: Shared) -> Path:
    """A driver that computes float32 attention."""
    flags = ("-DHEAD_SIZE=32", str(TESTS / "fake_cuda" / "computing.c"), "-lm")
    return shared.once("computing_cuda", lambda folder: fake.build(folder / "libcuda.so.1", *flags))


@pytest.fixture(scope="module")
def plugin_library(shared: Shared) -> Path:
    """The first kernel in float32 for sm_90, with attention's plugin, as ``pyfmha build`` makes it."""
    specs = Attention("fp32", 32).specs()
    archs = parse_archs(["sm_90"])
    return shared.once(
        "plugin_library", lambda folder: build(specs, archs, folder, jobs=1, operators=[OPERATOR]).library
    )


def compiled(program: str, folder: Path, library: Path, *flags: str, compiler: str = "gcc") -> Path:
    done = gcc(
        *WARNINGS, *flags, "-O2", f"-I{library.parent / 'c'}", EXAMPLES / program, f"-L{library.parent}", "-lpyfmha",
        f"-Wl,-rpath,{library.parent}", "-lm", "-ldl", "-o", folder / "program", compiler=compiler,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "program"


def run(*command: str | Path, **settings: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("language", [("gcc", "-std=c11", "-xc"), ("g++", "-std=c++17", "-xc++")], ids=["C", "C++"])
def test_attention_through_the_librarys_header(
    language: tuple[str, ...], attention_library_path: Path, computing_driver: Path, tmp_path: Path
) -> None:
    compiler, *flags = language
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    program = compiled("attention.c", tmp_path, attention_library_path, *SMALL, *flags, compiler=compiler)

    right = run(program, PYFMHA_LIBCUDA=computing_driver)
    assert (right.returncode, right.stderr) == (0, "")
    assert right.stdout.startswith("relative error ")
    wrong = run(program, PYFMHA_LIBCUDA=computing_driver, FAKE_KERNEL="none")
    assert (wrong.returncode, wrong.stdout) == (1, "relative error 1.0e+00, limit 1e-05\n")
    without = run(program, PYFMHA_LIBCUDA=tmp_path / "none.so")
    assert (without.returncode, without.stdout) == (2, "")
    assert without.stderr.startswith("error: no CUDA driver: ")


def test_an_engine_from_cpp(plugin_library: Path, computing_driver: Path, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    plan = tmp_path / "fmha.engine"
    plan.write_bytes(b"fmha, for the double of TensorRT")
    double = TESTS / "trt_double" / "cpp"
    program = compiled("engine.cpp", tmp_path, plugin_library, "-std=c++17", f"-isystem{double}", compiler="g++")

    done = run(program, plan, plugin_library, PYFMHA_LIBCUDA=computing_driver)
    assert (done.returncode, done.stderr) == (0, "")
    shape = "[2, 3, 40, 32]"
    assert done.stdout.splitlines() == [*(f"in  {name} {shape}" for name in "QKV"), f"out Out {shape}", "ran"]
    for arguments, said in (
        ((plan, computing_driver), f"error: no plugins in {computing_driver}\n"),
        ((tmp_path / "none", plugin_library), f"error: no engine in {tmp_path / 'none'}\n"),
        ((program, plugin_library), f"error: {program} cannot be loaded\n"),
        ((plan,), "error: usage: engine ENGINE LIBRARY\n"),
    ):
        failed = run(program, *arguments, PYFMHA_LIBCUDA=computing_driver)
        assert (failed.returncode, failed.stdout, failed.stderr) == (2, "", said)


@pytest.mark.parametrize("program", ["attention.c", "engine.cpp"])
def test_the_programs_say_how_they_are_built(program: str) -> None:
    text = (EXAMPLES / program).read_text()
    assert f"examples/c/{program}" in text.partition("#include")[0]
