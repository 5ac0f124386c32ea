"""The commands as a user runs them: in processes of their own, in a folder of their own."""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_cuda import FakeCuda
from helpers import KERNELS, LONG, few_of, some_of
from rich.console import Console
from shared import Shared
from typer.testing import CliRunner

import pyfmha
from pyfmha.aot.handover import read_handover
from pyfmha.cli.archs import default_archs
from pyfmha.cli.main import app
from pyfmha.errors import SpecError
from pyfmha.runtime import Library
from pyfmha.spec.arch import Arch

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
    """The shell commands of the indented block of pyfmha/aot/README.md that holds some text, with whole lines."""
    blocks = re.findall(r"(?:^    .*\n)+", (ROOT / "pyfmha/aot/README.md").read_text(), re.MULTILINE)
    block = next(block for block in blocks if containing in block)
    return [line.strip() for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.long
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
        r"\*fp32 cannot carry the hint :8; pointers take :16 only",
    ),
    "bad grid": ((*COMPILE, "-s", SIGNATURE, "-g", "n_blocks", "-t", "sm_90"), r"'n_blocks' is no integer argument"),
    "bad warps": ((*COMPILE, "-s", SIGNATURE, "-g", GRID, "-t", "sm_90", "-w", "3"), r"num_warps is 3; use 1, 2, 4"),
    "nothing to link": (("link", "missing.h", "-o", "aot_out/x"), r"missing.json cannot be read"),
    "no library": (("inspect",), r"no library at \S*/aot_out/libpyfmha.so; build it \(pyfmha build\)"),
    "unknown dtype": (("build", "--arch", "sm_90", "--dtype", "fp8"), r"dtype 'fp8' is not served"),
    "unknown head size": (("build", "--arch", "sm_90", "--head-size", "257"), r"head size is 257: use an integer"),
    "unknown kernels": (
        ("build", "--arch", "sm_90", "--kernels", "fast"),
        r"kernels fast are unknown: use one of basic",
    ),
}


@pytest.mark.parametrize("case", some_of(BAD_COMPILES))
def test_bad_input_is_one_message_and_exit_code_2(case: str, project: Path) -> None:
    arguments, message = BAD_COMPILES[case]

    done = run(project, *arguments)

    assert done.returncode == 2, done.stderr
    assert re.search(message, " ".join(done.stderr.split())), done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.count("error:") == 1
    assert not (project / "aot_out").exists(), "a failed command left something behind"


def test_what_the_operating_system_refuses_is_one_message(project: Path) -> None:
    name = "a" * 300
    for arguments in (
        ("compile", f"{name}.py", "-n", "k", "-s", "i32", "-g", "1", "-t", "sm_90"),
        ("inspect", f"{name}.so"),
        ("inspect", f"{name}.json"),
    ):
        done = run(project, *arguments)

        assert done.returncode == 2, done.stderr
        assert done.stderr.count("error:") == 1
        assert name in done.stderr
        assert "File name too long" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    few_of(
        [(one,) for one in (("inspect", "{}"), ("--version",), ("--help",), ("build", "--help"))],
        lambda one: one[0][0] in ("inspect", "--help"),
    ),
)
def test_output_that_cannot_be_written_is_one_message(arguments: tuple[str, ...], small_library_path: Path) -> None:
    command = [sys.executable, "-m", "pyfmha", *(a.format(small_library_path) for a in arguments)]
    for unbuffered, message in (
        ("", "error: the output cannot be written: No space left on device\n"),
        ("1", "error: No space left on device (for the output, or for a temporary file in "),
    ):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, env=env, stdout=full, stderr=subprocess.PIPE, text=True, check=False)

        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error(small_library_path: Path) -> None:
    command = [sys.executable, "-m", "pyfmha", "inspect", str(small_library_path)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)

    assert (done.returncode, done.stderr) == (141, b"")


def test_no_room_for_temporary_files_is_one_message(project: Path) -> None:
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}));"
        " from pyfmha.__main__ import main; main()"
    )
    arguments = (*COMPILE, "-s", SIGNATURE, "-g", GRID, "-t", "sm_90")
    done = subprocess.run(
        [sys.executable, "-c", limited.format(0), *arguments],
        cwd=project, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1
    assert "temporary" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_named_with_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/some/[/b]file")

    monkeypatch.setattr("pyfmha.cli.main.describe", full)
    monkeypatch.setenv("TMPDIR", "/some/tmp")
    done = CliRunner().invoke(app, ["inspect"])

    assert done.exit_code == 2, done.output
    assert (
        "error: /some/[/b]file: No space left on device (for the output, or for a temporary file in /some/tmp; TMPDIR"
        in done.output
    )


DAMAGED = {
    "markup": '{"schema": 5, "build_id": "[/b]", "pyfmha": "[/b]", "triton": "[/b]", "functions": []}',
    "surrogate": '{"schema": 5, "build_id": "\\ud800", "pyfmha": "0", "triton": "3", "functions": []}',
    "deep": "[" * 100_000,
    "true": '{"schema": true, "build_id": "a", "pyfmha": "0", "triton": "3", "functions": []}',
    "markup for a schema": '{"schema": "[/b]"}',
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_manifest_is_one_message(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.json").write_text(DAMAGED[case])
    done = CliRunner().invoke(app, ["inspect", "c.json"])

    if case == "markup":
        assert done.exit_code == 0, done.output
        assert "built by pyfmha [/b] and Triton [/b]" in done.output
    else:
        assert done.exit_code == 2, done.output
        assert done.output.startswith("error: c.json")


@LONG
@pytest.mark.parametrize("folder", few_of(["o[/gpu]", "o[gpu]", ":x:"], "o[/gpu]".__eq__))
def test_paths_are_printed_as_they_are(folder: str, project: Path) -> None:
    done = run(project, "compile", str(ROOT / "tests/kernels/elementwise.py"), "-n", "add", "-o", f"{folder}/add",
               "-s", "*fp32, *fp32, *fp32, i32, 1024", "-g", "1", "-t", "sm_90")  # fmt: skip

    assert done.returncode == 0, done.stderr
    headers = done.stdout.split()
    assert headers
    assert all(header.startswith(f"{folder}/add.") and (project / header).is_file() for header in headers)
    linked = run(project, "link", *headers, "-o", f"{folder}/lib")
    assert (linked.returncode, linked.stdout.splitlines()[-1]) == (0, f"{folder}/lib.so")
    missing = run(project, "inspect", f"{folder}/none.so")
    assert missing.stderr == f"error: no library at {folder}/none.so; build it: pyfmha build\n"


def test_a_path_that_is_not_text_is_printed(project: Path) -> None:
    done = run(project, "compile", str(ROOT / "tests/kernels/elementwise.py"), "-n", "add", "-o", "o\udcff/add",
               "-s", "*fp32, *fp32, *fp32, i32, 1024", "-g", "1", "-t", "sm_90")  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("o\\udcff/add.add_")


def gpu_of(arch: str) -> tuple[SimpleNamespace, str]:
    """What ``find_gpu`` says of a GPU."""
    return SimpleNamespace(arch=arch, name="Some [/b] GPU"), "Some [/b] GPU"


@pytest.mark.parametrize("arch", ["sm_75", "sm_101", "sm_130"])
def test_a_gpu_without_code_is_named(arch: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setattr("pyfmha.cli.archs.find_gpu", lambda: gpu_of(arch))

    for option, arguments in (("-t", (*COMPILE, "-s", SIGNATURE, "-g", GRID)), ("--arch", ("build",))):
        done = CliRunner().invoke(app, list(arguments))

        assert done.exit_code == 2, done.output
        assert f"the GPU here is {arch}, which pyfmha has no code for; give {option}, one or several of" in done.output


@LONG
def test_demo_runs_on_the_cpu_where_the_gpu_has_no_code(
    project: Path, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared.lend(project / "o[" / "x]")
    monkeypatch.chdir(project)
    for module in ("cli.archs", "cli.demo"):
        monkeypatch.setattr(f"pyfmha.{module}.find_gpu", lambda: gpu_of("sm_75"))
    monkeypatch.setattr("pyfmha.cli.main.console", Console(width=80, highlight=False, emoji=False))

    done = CliRunner().invoke(app, ["demo", "--dtype", "fp16", "--head-size", "32", "-o", "o[/x]"])

    assert done.exit_code == 0, done.output
    output = " ".join(done.output.split())
    assert "for sm_80 and sm_90, since pyfmha has no code for the GPU here, Some [/b] GPU, which is sm_75." in output
    assert "On the CPU, under Triton's interpreter" in output
    assert "the library was built for sm_80, sm_90, the GPU is sm_75" in output
    assert "o[/x]/libpyfmha.so: 2 functions for sm_80, sm_90." in output
    results = done.output.partition("5. Compare")[2]
    assert re.search(r"^ *fmha_d32_fp16_full +\S+ +5e-04 +ok", results, re.MULTILINE), results


def test_a_gpu_that_runs_older_code_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyfmha.cli.archs.find_gpu", lambda: gpu_of("sm_88"))

    archs, why = default_archs()

    assert [arch.name for arch in archs] == ["sm_86"]
    assert why == "for sm_86, found here: Some [/b] GPU, which is sm_88"


SPREAD = {
    "apart": ["--arch", "sm_90", "sm_80"],
    "with =": ["--arch=sm_90", "sm_80"],
    "twice": ["--arch", "sm_90", "--arch=sm_80"],
    "others between": ["--arch=sm_90", "sm_80", "-o", "aot_out", "--head-size=32", "64", "--dtype", "fp16", "bf16"],
}


@pytest.mark.parametrize("case", SPREAD)
def test_values_after_an_option_spread(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def stop(specs: object, archs: list[Arch], *_: object, **__: object) -> None:
        seen.append([arch.name for arch in archs])
        raise SpecError("enough")

    monkeypatch.setattr("pyfmha.cli.main.build", stop)
    done = CliRunner().invoke(app, ["build", *SPREAD[case]])

    assert "enough" in done.output
    assert seen == [["sm_80", "sm_90"]]


@pytest.mark.parametrize("arguments", [["verify", "--head-size", "64", "128"], ["build", "sm_80"]])
def test_what_no_option_takes_is_refused(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, arguments)

    assert done.exit_code == 2
    assert "unexpected extra argument" in done.output


@pytest.mark.parametrize(
    "command", [[], *([name] for name in ("compile", "link", "build", "inspect", "demo", "verify", "bench"))]
)
def test_h_is_help_everywhere(command: list[str]) -> None:
    helped = [CliRunner().invoke(app, [*command, option]) for option in ("-h", "--help")]

    assert [done.exit_code for done in helped] == [0, 0]
    assert helped[0].output == helped[1].output


@pytest.mark.long
def test_several_values_after_one_option(project: Path, shared: Shared) -> None:
    shared.lend(project / "out")
    few = ("--kernels", "basic", "-o", "out")
    done = run(project, "build", "--arch", "sm_80", "sm_90", "--dtype", "fp16", "--head-size", "32", *few)

    assert done.returncode == 0, done.stderr
    library = Library(project / "out/libpyfmha.so")
    assert library.manifest.archs() == ("sm_80", "sm_90")
    assert list(library) == ["fmha_d32_fp16", "fmha_d32_fp16_full"]
    again = run(project, "build", "--arch", "sm_80", "sm_90", "--dtype", "fp16", "--head-size", "32", *few)
    assert "up to date, nothing done" in again.stdout
    inspected = run(project, "inspect", "out/manifest.json")
    assert inspected.returncode == 0
    for _, _, variant in library.manifest.variants():
        assert variant.name in inspected.stdout


def test_demo_runs_the_main_job_without_a_gpu(project: Path, shared: Shared) -> None:
    shared.lend(project / "out")
    done = run(project, "demo", "--arch", "sm_90", "--dtype", "fp16", "--head-size", "32", "-o", "out")

    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("1. Compile", "2. Audit", "3. Load", "On the CPU, under Triton's interpreter", "All 2 passed"):
        assert expected in done.stdout


@LONG
def test_demo_exits_1_when_the_numbers_are_wrong(
    project: Path, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared.lend(project / "out")
    monkeypatch.chdir(project)
    monkeypatch.setattr("pyfmha.cli.demo.LIMITS", {"fp16": 1e-9})

    done = CliRunner().invoke(app, ["demo", "--arch", "sm_90", "--dtype", "fp16", "--head-size", "32", "-o", "out"])

    assert done.exit_code == 1, done.output
    assert "Failed: fmha_d32_fp16, fmha_d32_fp16_full" in done.output


def test_help_names_every_command_and_version() -> None:
    helped = CliRunner().invoke(app, ["--help"])
    versioned = CliRunner().invoke(app, ["--version"])

    assert all(
        command in helped.output for command in ("compile", "link", "build", "inspect", "demo", "verify", "bench")
    )
    assert versioned.output == f"pyfmha {pyfmha.__version__}\n"


def test_compile_takes_configurations(tmp_path: Path) -> None:
    decorated = str(KERNELS / "decorated.py")
    given = ["-s", "*fp32:16, *fp32:16, i32, None, EVEN=False", "-g", "cdiv(n, BLOCK)", "-t", "sm_90", "--no-generic"]
    command = ["compile", decorated, "-n", "nested", *given, "-o", str(tmp_path / "x")]

    done = CliRunner().invoke(app, [*command, "--config", "all"])
    assert done.exit_code == 0, done.output
    headers = sorted(str(header) for header in tmp_path.glob("x.*.h"))
    assert [line for line in done.stdout.splitlines() if line.endswith(".h")] == headers
    assert len(headers) == 3
    assert "note: configuration 2 has a pre_hook" in " ".join(done.output.split())

    done = CliRunner().invoke(app, ["link", *headers, "-o", str(tmp_path / "library"), "--no-library"])
    assert "nested(stream, *fp32 X, *fp32 Y, i32 n, algo_id): 3 algorithm(s), 3 variants" in done.output

    for config, said in (("some", "--config is 'some'; give a number"), ("9", "no configuration 9")):
        done = CliRunner().invoke(app, [*command, "--config", config])
        assert done.exit_code == 2
        assert said in done.output


def test_compile_without_configurations_has_one_warp(tmp_path: Path) -> None:
    decorated = str(KERNELS / "decorated.py")
    command = [
        "compile",
        decorated,
        "-n",
        "_private",
        "-s",
        "*fp32",
        "-g",
        "1",
        "-t",
        "sm_90",
        "-o",
        str(tmp_path / "x"),
    ]

    done = CliRunner().invoke(app, command)

    assert done.exit_code == 0, done.output
    assert "private_kernel_w1s3_generic" in done.output


def test_compile_takes_a_workspace(tmp_path: Path) -> None:
    given = ["-s", "*fp16:16, *fp16:16, i32, i32:16, 64, 64", "-g", "cdiv(m, M), cdiv(n, N)", "-t", "sm_90"]
    command = ["compile", str(KERNELS / "decorated.py"), "-n", "described", *given, "-o", str(tmp_path / "x")]

    refused = CliRunner().invoke(app, command)
    done = CliRunner().invoke(app, [*command, "--workspace"])

    assert refused.exit_code == 2
    assert "compile it with --workspace" in " ".join(refused.output.split())
    assert done.exit_code == 0, done.output


@LONG
def test_builds_of_two_dtypes_give_a_library_of_both(project: Path) -> None:
    size = ("--kernels", "decode", "--head-size", "64", "--arch", "sm_90", "-j", "2")
    first = run(project, "build", "--dtype", "fp16", *size)
    second = run(project, "build", "--dtype", "bf16", *size)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "Kept 2 functions that the library held beside: fmha_combine_d64_fp16, fmha_split_d64_fp16" in second.stdout
    assert "aot_out/libpyfmha.so: 4 functions for sm_90, 4 compiled, 4 from the cache" in second.stdout
    assert len(Library(project / "aot_out" / "libpyfmha.so")) == 4

    fresh = run(project, "build", "--dtype", "fp16", *size, "--fresh")

    dropped = "Dropped 2 functions that the library held: fmha_combine_d64_bf16, fmha_split_d64_bf16\n"
    assert fresh.stdout == dropped + "aot_out/libpyfmha.so: 2 functions for sm_90, 0 compiled, 4 from the cache\n"


@LONG
def test_results_go_into_a_folder_that_ends_in_a_slash(project: Path) -> None:
    shutil.copy(KERNELS / "elementwise.py", project)
    kernel = ("elementwise.py", "-n", "volume", "-s", "*i64, i64, i64, i64", "-g", "a, b, c", "-t", "sm_90")

    compiled = run(project, "compile", *kernel, "-o", "new/")

    assert compiled.returncode == 0, compiled.stderr
    (header,) = compiled.stdout.splitlines()
    assert header.startswith("new/volume.volume_")
    assert not list(project.glob("new.*"))
    for output in ("new/", "nowhere/"):
        linked = run(project, "link", header, "-o", output)
        assert (linked.returncode, linked.stdout) == (2, "")
        assert linked.stderr == (
            f"error: -o {output} is a folder; give the path of the results in it, without ending: {output}NAME\n"
        )
    assert run(project, "link", header, "-o", "new/all").returncode == 0


def test_options_of_the_compiler_reach_the_library(project: Path) -> None:
    shutil.copy(KERNELS / "elementwise.py", project)
    kernel = ("elementwise.py", "-n", "volume", "-s", "*i64, i64, i64, i64", "-g", "a, b, c", "-t", "sm_90")
    options = ("--maxnreg", "32", "--debug", "--no-fp-fusion", "--nullable", "X if a == 0")

    plain, other = (run(project, "compile", *kernel, *more, "-o", "k/") for more in ((), options))

    assert (plain.returncode, other.returncode) == (0, 0), plain.stderr + other.stderr
    (one,), (another,) = plain.stdout.splitlines(), other.stdout.splitlines()
    assert one != another
    variant = read_handover(project / another)
    assert variant.spec.nullable == ("X if a == 0",)
    (image,) = variant.variant.images
    assert (image.maxnreg, image.debug, image.enable_fp_fusion) == (32, True, False)
