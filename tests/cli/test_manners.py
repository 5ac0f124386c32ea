"""How the commands talk: progress, -q and -v, --json, --dry-run, words, examples to copy."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import LONG, python_environment, some_of
from rich.console import Console
from shared import Shared
from trt_double.full.gpu import Gpu
from typer.main import get_command
from typer.testing import CliRunner

import pyfmha
from pyfmha.attention.first import Attention
from pyfmha.cli.main import app
from pyfmha.errors import SpecError
from pyfmha.operators.program import program_of
from pyfmha.report import duration, progress_bar
from pyfmha.spec.arch import ARCHS
from pyfmha.spec.kernel import Argument
from pyfmha.spec.manifest import parse_manifest, read_manifest
from pyfmha.spec.words import dtype_name, one_of

pytest_plugins = ["verify_standins"]

ROOT = Path(pyfmha.__file__).parents[1]
FEW = ("--kernels", "basic", "--dtype", "fp16", "--head-size", "32", "--arch", "sm_90", "-o", "out")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As a user of a terminal of 80 columns who keeps the output in files."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    command = [sys.executable, "-m", "pyfmha", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def printed(main: int) -> bytes:
    """All that a terminal was sent before it was closed, however many pieces it comes in; closes its main side."""
    pieces = []
    with contextlib.suppress(OSError):  # EIO: nothing is left
        while piece := os.read(main, 4096):
            pieces.append(piece)
    os.close(main)
    return b"".join(pieces)


@pytest.fixture
def folder(tmp_path: Path, shared: Shared) -> Path:
    """An empty one, whose builds find what the run has compiled."""
    shared.lend(tmp_path / "lent")
    return tmp_path


class TestProgress:
    def lines(self, total: int) -> list[str]:
        console = Console(width=80, force_terminal=False)
        with console.capture() as captured, progress_bar(console, "compiling") as progress:
            for done in range(total + 1):
                progress(done, total, f"fmha_fwd_d128_fp16_a_name_longer_than_what_is_left_of_a_line_{done} [/x]")
        return captured.get().splitlines()

    def test_where_no_terminal_is_there_are_lines_of_80_columns(self) -> None:
        lines = self.lines(84)

        assert lines[0] == "compiling: 84 to do"
        assert re.match(r"compiling: 5 of 84 in \d+ s, about \d+ \w+ left: fmha_fwd_d128", lines[1])
        assert re.match(r"compiling: 84 of 84 in \d+ s: fmha_fwd_d128", lines[-1])
        assert len(lines) == 1 + 84 // 5 + 1
        assert max(map(len, lines)) == 80

    def test_lines_where_colours_are_forced_and_where_a_terminal_cannot_move(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """CI services and Jupyter set FORCE_COLOR, for which rich takes any file for a terminal."""
        for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm")):
            monkeypatch.setenv(name, value)
        with (tmp_path / "log").open("w") as log:
            console = Console(file=log, color_system=None)
            assert console.is_terminal
            with progress_bar(console, "compiling") as progress:
                progress(0, 2, "")
                progress(2, 2, "b")
        written = (tmp_path / "log").read_text()
        assert re.fullmatch(r"compiling: 2 to do\ncompiling: 2 of 2 in \d+ s: b\n", written)

        main, terminal = os.openpty()
        monkeypatch.setenv("TERM", "dumb")
        with (
            open(terminal, "w") as screen,
            progress_bar(Console(file=screen, color_system=None), "compiling") as progress,
        ):
            progress(2, 2, "b")
        assert re.fullmatch(rb"compiling: 2 of 2 in \d+ s: b\r\n", printed(main))

    def test_a_bar_of_80_columns_has_count_and_time_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TERM", "xterm")
        main, terminal = os.openpty()
        with (
            open(terminal, "w") as screen,
            progress_bar(Console(file=screen, color_system=None, width=80), "compiling") as progress,
        ):
            progress(120, 199, "fmha_fwd_d128_fp16_a_name_longer_than_what_is_left_of_a_line sm_90")
        assert re.search(rb"compiling \S+ +120/199 0:\d\d:\d\d fmha_fwd_d128_fp16_\w+", printed(main))

    def test_few_steps_have_a_line_each(self) -> None:
        assert len(self.lines(3)) == 4

    def test_times_are_for_people(self) -> None:
        assert [duration(seconds) for seconds in (0.4, 99, 100, 1800)] == ["0 s", "99 s", "2 min", "30 min"]

    def test_a_quiet_console_gets_nothing(self) -> None:
        console = Console(width=80, force_terminal=False, quiet=True)
        with console.capture() as captured, progress_bar(console, "compiling") as progress:
            progress(1, 1, "x")
        assert captured.get() == ""


@LONG
def test_a_build_says_what_it_will_do_and_does_it(folder: Path, shared: Shared) -> None:
    dry = run(folder, "build", *FEW, "--dry-run")

    assert dry.returncode == 0, dry.stderr
    would = re.findall(r"^Would compile (\S+) sm_90$", dry.stdout, re.MULTILINE)
    assert len(would) == 4
    assert "out/libpyfmha.so: 2 functions, 4 to compile, 0 from the cache" in dry.stdout
    assert re.search(r"Without --dry-run: Compiling 4 kernels in \w+ process(es)?: about \d+ s\.", dry.stdout)
    assert dry.stderr == ""
    assert not (folder / "out").exists()

    built = run(folder, "build", *FEW)

    assert built.returncode == 0, built.stderr
    said = built.stderr.splitlines()
    assert said[0].startswith("Compiling 4 kernels in ")
    assert [line.split(" in ")[0] for line in said[1:]] == [f"compiling: {done} of 4" for done in (1, 2, 3, 4)]
    assert built.stdout == "out/libpyfmha.so: 2 functions for sm_90, 4 compiled, 0 from the cache\n"
    variants = [name.split(",")[0] for name in run(folder, "inspect", "out/manifest.json").stdout.splitlines()]
    assert set(would) <= set(variants)

    again = run(folder, "build", *FEW, "--dry-run")
    assert again.stdout == "out/libpyfmha.so: 2 functions, 0 to compile, 4 from the cache\n"
    other = run(folder, "build", *FEW, "--fresh", "--dtype", "bfloat16", "--dry-run")
    assert "Would keep" not in other.stdout
    quiet = run(folder, "build", "--fresh", *FEW[:-2], "-o", "out", "-q")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_errors_come_before_announcements(tmp_path: Path) -> None:
    for wrong in (("--kernels", "foward"), ("--dtype", "fp61"), ("--head-size", "300")):
        done = run(tmp_path, "build", *wrong)

        assert (done.returncode, done.stdout) == (2, "")
        assert re.match(r"\Aerror: ", done.stderr)
        assert "Building" not in done.stderr


ADD = (str(ROOT / "tests/kernels/elementwise.py"), "-n", "add", "-s", "*fp32, *fp32, *fp32, i32, 32", "-g", "n")


@pytest.mark.parametrize("command", [("build",), ("demo",), ("compile", *ADD)], ids=lambda words: words[0])
def test_a_folder_that_cannot_be_is_refused_before_announcements(command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = CliRunner().invoke(app, [*command, "--arch", "sm_90", "-o", f"{tmp_path}/file/"])

    assert (done.exit_code, done.stdout) == (2, "")
    assert re.match(r"error: cannot write \S*/file/\w+\.\w+: \S*/file is no folder\n\Z", done.stderr)


@pytest.mark.parametrize("command", ["build", "demo"])
def test_no_c_compiler_is_said_before_compiling(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "nonsense")
    done = CliRunner().invoke(app, [command, "--arch", "sm_90", "-o", str(tmp_path / "out")])

    assert (done.exit_code, done.stdout) == (2, "")
    assert re.match(r"error: no C compiler: CC is 'nonsense'.*\n\Z", done.stderr)


def test_a_dry_run_is_a_result_which_quiet_leaves(tmp_path: Path) -> None:
    command = ["build", *FEW[:-1], str(tmp_path / "out"), "--dry-run"]
    usual, quiet = CliRunner().invoke(app, command), CliRunner().invoke(app, [*command, "-q"])

    assert "2 functions, 4 to compile" in usual.stdout
    assert (quiet.stdout, quiet.stderr) == (usual.stdout, "")


def test_inspect_says_which_library_it_found(
    small_library_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYFMHA_LIBRARY", str(small_library_path))
    assert CliRunner().invoke(app, ["inspect"]).stdout.splitlines()[0] == f"{small_library_path}:"
    copy = shutil.copy(small_library_path, tmp_path / "libpyfmha.so")
    assert CliRunner().invoke(app, ["inspect", str(tmp_path)]).stdout.splitlines()[0] == f"{copy}:"


@pytest.mark.parametrize("command", ["inspect", "plugin-check"])
def test_a_variable_that_names_no_library_is_told_of(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.so"
    text.write_text("no library")
    monkeypatch.setenv("PYFMHA_LIBRARY", str(text))
    done = CliRunner().invoke(app, [command])
    assert done.exit_code == 2
    assert f"{text} cannot be loaded" in done.stderr
    assert "(PYFMHA_LIBRARY names that library)" in done.stderr
    assert "PYFMHA_LIBRARY" not in CliRunner().invoke(app, [command, str(text)]).stderr


WORDS = {
    "family": (("build", "--arch", "sm_90", "--kernels", "foward"), "did you mean forward?"),
    "dtype": (("build", "--arch", "sm_90", "--dtype", "fp61"), "did you mean fp16?"),
    "architecture": (("build", "--arch", "sm_901"), "did you mean sm_90?"),
    "command": (("verfy",), "Did you mean 'verify'?"),
    "option": (("build", "--arc", "sm_90"), "Possible options: --arch"),
    "other spelling of a dtype": (("build", "--arch", "sm_90", "--dtype", "flaot16"), "did you mean fp16?"),
    "part": (("verify", "--only", "libary"), "did you mean library?"),
    "preset": (("bench", "--preset", "quik"), "did you mean quick?"),
    "functions": (("build", "--arch", "sm_90", "--functions", "alibbi"), "did you mean alibi?"),
}


@pytest.mark.parametrize("case", WORDS)
def test_what_was_meant_is_guessed(case: str) -> None:
    arguments, guess = WORDS[case]
    done = CliRunner().invoke(app, list(arguments))

    assert done.exit_code == 2
    assert guess in " ".join(done.output.split())


def test_nothing_is_guessed_that_is_far_off() -> None:
    assert one_of(("basic", "forward"), "xyz") == "use one of basic, forward"


@pytest.mark.parametrize(
    ("word", "name"), [("float16", "fp16"), ("bfloat16", "bf16"), ("float32", "fp32"), ("fp16", "fp16")]
)
def test_a_dtype_has_either_name_everywhere(word: str, name: str) -> None:
    from pyfmha.attention.decode import Decode
    from pyfmha.attention.families import library_specs
    from pyfmha.attention.forward import Forward
    from pyfmha.bench.cells import Cell

    assert dtype_name(word) == name
    assert Attention(word, 64) == Attention(name, 64)
    assert Forward(word, 64) == Forward(name, 64)
    assert Decode(word, 64) == Decode(name, 64)
    assert Cell(word, 1, 1, 1, 1, 1, 64, True) == Cell(name, 1, 1, 1, 1, 1, 64, True)
    both = library_specs(("basic", "forward", "decode"), (word, name), (64,))
    assert both == library_specs(("basic", "forward", "decode"), (name,), (64,))
    assert Argument("x", f"*{word}") == Argument("x", f"*{name}")
    assert operator(word, "float32") == operator(name, "fp32")
    config = pyfmha.EngineConfig(1, 64, 1, 1, word, causal=True)
    assert (config.dtype, config.problem.dtype) == (name, name)


def operator(word: str, factor: str) -> Any:
    """What an operator of such types is, in short."""
    described = pyfmha.Operator(
        name="Scale",
        inputs={"X": "T[rows]", "Y": f"{word}[rows]"},
        outputs={"Z": "T[rows]"},
        types={"T": (word, "int32")},
        attributes={"factor": f"{factor} = 1.0", "factors": f"{factor}[] = [1.0]"},
        workspace=[pyfmha.Part("W", "4 * rows", type=word)],
        launches=[pyfmha.Launch({"x": "X"}, kernel="k", grid="1")],
    )
    program = program_of(described)
    types = [form.type for tensor in program.inputs for form in tensor.forms]
    return types, described.inputs, described.types, described.attributes, described.workspace


@pytest.mark.parametrize("option", ["-t", "--arch", "--target"])
@pytest.mark.parametrize("command", ["build", "compile"])
def test_architectures_have_one_option(option: str, command: str) -> None:
    kernel = (str(ROOT / "tests/kernels/elementwise.py"), "-n", "add", "-s", "i32", "-g", "1")
    done = CliRunner().invoke(app, [command, *(kernel if command == "compile" else ()), option, "sm_91"])

    assert "unknown architecture 'sm_91'" in done.output


def test_inspect_as_json(small_library_path: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", str(small_library_path), "--json", "-q"])

    assert done.exit_code == 0, done.output
    written = parse_manifest(small_library_path.with_suffix(".json").read_text(), "there")
    assert parse_manifest(done.stdout, "here") == written


def test_verify_as_json(verify_gpu: Gpu, verify_library_path: Path) -> None:
    done = CliRunner().invoke(app, ["verify", "--only", "library", "--json"])

    found = json.loads(done.stdout)
    assert done.exit_code == (0 if found["passed"] else 1)
    assert found["engines"] == []
    assert found["facts"].startswith(f"pyfmha {pyfmha.__version__}, ")
    held = {variant.name for _, _, variant in read_manifest(verify_library_path.with_name("manifest.json")).variants()}
    assert held == {one["variant"] for one in found["variants"]}
    assert all(one["passed"] == (one["error"] is not None and one["cases"] > 0) for one in found["variants"])
    assert done.stderr.startswith("verifying: ")


def test_quiet_and_verbose_stand_before_or_behind_a_command(small_library_path: Path) -> None:
    wanted = CliRunner().invoke(app, ["inspect", str(small_library_path)])
    for arguments in (["-q", "inspect"], ["-v", "inspect"], ["inspect", "-q"], ["inspect", "--verbose"]):
        done = CliRunner().invoke(app, [*arguments, str(small_library_path)])
        assert (done.exit_code, done.stdout) == (0, wanted.stdout)


def examples_of(command: str) -> str:
    """The lines of a command's help that stand under Example."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-m", "pyfmha", command, "--help"], env=env, capture_output=True, text=True, check=True
    )
    assert max(map(len, done.stdout.splitlines())) <= 80
    described = done.stdout.partition("╭")[0]
    return re.search(r"^ *pyfmha .*", described, re.MULTILINE | re.DOTALL)[0]


@pytest.mark.parametrize("command", some_of(["compile", "link", "build", "demo", "bench"]))
def test_examples_of_help_can_be_copied(command: str) -> None:
    """Pasted into a shell, padding and all, each is a command that parses."""
    script = "pyfmha() { printf '%s\\0' \"$@\"; printf '\\n\\0'; }\n" + examples_of(command)
    done = subprocess.run(["bash", "-euc", script], cwd=ROOT, capture_output=True, text=True, check=True)
    commands = [line.split("\0")[:-1] for line in done.stdout.split("\n\0")[:-1]]

    assert done.stderr == ""
    assert commands
    for name, *arguments in commands:
        parsed = get_command(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]
        files = [parsed.params.get("path"), *(parsed.params.get("operators") or ())]
        assert all((ROOT / file).is_file() for file in files if file)


def test_a_shell_completes_words(tmp_path: Path) -> None:
    for words, found in (
        ("build --arch sm_80 sm_1", "\n".join(name for name in ARCHS if name.startswith("sm_1"))),
        ("insp", "inspect"),
    ):
        env = {**os.environ, "_PYFMHA_COMPLETE": "complete_bash", "COMP_WORDS": f"pyfmha {words}"}
        env["COMP_CWORD"] = str(len(words.split()))
        program = "import sys; sys.argv = ['pyfmha']; from pyfmha.__main__ import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", program], env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert done.stdout.strip() == found, done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("inspect", "--help")])
def test_a_help_may_be_left_unread(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pyfmha", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=python_environment(), check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_completion_is_for_the_shell_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/bash")
    done = CliRunner().invoke(app, ["--install-completion", "zsh"])
    assert done.exit_code == 0
    assert "zsh completion installed in" in done.stdout
    assert "_PYFMHA_COMPLETE=complete_zsh" in (tmp_path / ".zfunc" / "_pyfmha").read_text()
    done = CliRunner().invoke(app, ["--show-completion=fish"])
    assert (done.exit_code, "complete --command pyfmha" in done.stdout) == (0, True)
    for option in ("--install-completion", "--show-completion"):
        done = CliRunner().invoke(app, [option, "fsh"])
        assert done.exit_code == 2
        assert "no completion for the shell 'fsh': use one of bash, zsh, fish, powershell, pwsh (did" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".zfunc", ".zshrc"]


@LONG
def test_demo_says_first_what_it_builds_and_last_what_to_do(tmp_path: Path, shared: Shared) -> None:
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shared.lend(tmp_path / "out")
    done = run(tmp_path, "demo", "--arch", "sm_90", "--dtype", "fp16", "--head-size", "32", "-o", "out")

    assert done.returncode == 0, done.stderr
    first, second, *_ = done.stderr.splitlines()
    assert first == "Builds out/libpyfmha.so: attention kernels of head size 32, as asked."
    assert second.endswith("Then it runs and checks them: some seconds on a GPU, about half a minute on a CPU.")
    (headings,) = [line.split() for line in done.stdout.splitlines() if line.split()[:1] == ["function"]]
    assert headings == ["function", "error", "limit"], "columns with nothing in them"
    _, after = done.stdout.split("Next:\n")
    inspect, build = after.splitlines()
    program = "pyfmha" if shutil.which("pyfmha") else f"{sys.executable} -m pyfmha"
    assert inspect == f"  {program} inspect {tmp_path / 'out/libpyfmha.so'}"
    assert build.startswith(f"  {program} build -o {tmp_path / 'out'}   # ")


def test_what_to_do_next_can_be_copied_where_the_path_has_no_pyfmha(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyfmha.cli.demo import program_here

    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "argv", [".venv/bin/pyfmha", "demo"])
    assert program_here() == ".venv/bin/pyfmha"


def test_a_dtype_that_is_not_served_is_refused() -> None:
    with pytest.raises(SpecError, match=r"'fp61' is not served: use one of fp16, bf16, fp32 \(did you mean fp16\?\)"):
        Attention("fp61", 64)
