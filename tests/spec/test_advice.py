"""Commands that messages print are right when they are run as they stand."""

import shlex
from pathlib import Path

import pytest
from helpers import some_of
from typer.testing import CliRunner

from pyfmha.cli.main import app
from pyfmha.spec.advice import build_command, code_for
from pyfmha.spec.arch import ARCHS


@pytest.mark.parametrize(
    ("library", "command"),
    [
        ("aot_out/libpyfmha.so", "pyfmha build"),
        ("aot_out/manifest.json", "pyfmha build"),
        ("other/libpyfmha.so", "pyfmha build -o other"),
        ("with space/manifest.json", "pyfmha build -o 'with space'"),
        ("other/libmine.so", "pyfmha build"),
    ],
)
def test_the_command_names_the_folder_where_it_is_another(library: str, command: str) -> None:
    assert build_command(Path(library)) == command
    assert build_command(Path(library).resolve()).replace(f"{Path.cwd()}/", "") == command


def test_options_come_before_the_folder() -> None:
    assert build_command(Path("o/libpyfmha.so"), "--dtype", "fp32") == "pyfmha build --dtype fp32 -o o"


@pytest.mark.parametrize(
    ("gpu", "advice"),
    [
        ("sm_90", "add it: pyfmha build --arch sm_90"),
        ("sm_88", "add it: pyfmha build --arch sm_86"),
        ("sm_75", f"pyfmha has no code for sm_75; it serves {', '.join(ARCHS)}"),
        ("sm_91", f"pyfmha has no code for sm_91; it serves {', '.join(ARCHS)}"),
    ],
)
def test_a_gpu_that_nothing_serves_is_told_so(gpu: str, advice: str) -> None:
    assert code_for(gpu, Path("aot_out/libpyfmha.so"), "add it: ") == advice


@pytest.mark.parametrize("gpu", some_of(ARCHS))
def test_the_command_line_takes_what_is_advised(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def record(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr("pyfmha.cli.main.build", record)
    command = code_for(gpu, Path("a b/libpyfmha.so")).removeprefix("pyfmha ")

    CliRunner().invoke(app, shlex.split(command))

    assert [(archs, folder) for _, archs, folder in asked] == [((ARCHS[gpu],), Path("a b"))]
