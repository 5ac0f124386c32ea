"""``pyfmha plugin-check``: right plugins pass, wrong ones are named, and what has no plugins is one clear line."""

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from shared import Shared
from trt_double.scene import specs
from typer.testing import CliRunner

import pyfmha.verify.plugins
from pyfmha.aot import Compiler, build
from pyfmha.attention.first import Attention
from pyfmha.attention.operator import OPERATOR
from pyfmha.cli.main import app
from pyfmha.operators.description import Operator
from pyfmha.runtime.library import Library
from pyfmha.spec.arch import parse_archs

pytest_plugins = ("plugin_host.operators", "trt_double.fixtures")


def check(*arguments: str | Path) -> tuple[int, list[str]]:
    done = CliRunner().invoke(app, ["plugin-check", *map(str, arguments)])
    return done.exit_code, done.output.splitlines()


def test_three_operators_pass_without_tensorrt(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyfmha.verify.plugins, "MODULES", ())
    code, lines = check(path)
    assert code == 0, lines
    assert lines[0] == "ok    no TensorRT is installed (): through the tables alone"
    assert "ok    Blend: creator with the fields weights, steps, mode, name, masked, outputs, most, spare" in lines
    assert (
        "ok    Spread: shapes of its outputs [[16, 2, 2, 4], [4, 3, 0, 2]] for [[4, 4, 4, 4, 4, 2, 4, 4], [8], [9]]"
        in lines
    )
    assert "ok    Blend: 288 bytes of workspace" in lines
    assert all(line.startswith("ok ") for line in lines)


@pytest.mark.parametrize("module", ["tensorrt_lean", "tensorrt_rtx"])
def test_tensorrt_loads_it(path: Path, module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    code, lines = check(path, "--tensorrt", module)
    assert code == 0, lines
    assert f"loads {path.resolve()}" in lines[0]
    assert any("finds BiasGelu version 1 in namespace acme, fields: scale" in line for line in lines)


def test_a_tensorrt_of_other_interfaces(path: Path, later_trt: Any) -> None:
    code, lines = check(path, "--tensorrt", later_trt.__name__)
    assert code == 1
    assert lines[0].startswith(
        f"WRONG {later_trt.__name__} 12.0.0 is given no plugins by {path.resolve()}: this is TensorRT 12"
    )
    assert all(line.startswith("ok ") for line in lines[1:-1])  # the tables are as described all the same


def test_attention_passes(compiler: Compiler, shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyfmha.verify.plugins, "MODULES", ())
    wanted = specs([Attention("bf16", 32, causal=False)])
    made = build(wanted, parse_archs(["sm_90"]), tmp_path, jobs=1, operators=[OPERATOR])
    code, lines = check(made.library)
    assert code == 0, lines
    assert any("head_size 32, type_id 7" in line for line in lines)


def test_a_plugin_that_is_not_as_described_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Library(path).operators

    def others(self: Library) -> tuple[Operator, ...]:
        outputs = tuple(replace(tensor, forms=("T[cols, rows + 1]",)) for tensor in held[1].outputs)
        return held[0], replace(held[1], outputs=outputs), held[2]

    assert held[0].name == "BiasGelu" or held[1].name == "BiasGelu"
    monkeypatch.setattr(pyfmha.verify.plugins, "MODULES", ())
    monkeypatch.setattr(Library, "operators", property(others))
    code, lines = check(path)
    assert code == 1
    wrong = [line for line in lines if line.startswith("WRONG")]
    assert any(line.startswith("WRONG BiasGelu: shapes of its outputs [[4, 4]]") for line in wrong)
    assert lines[-1] == f"{len(wrong)} wrong"


def test_what_has_no_plugins(small_library_path: Path, tmp_path: Path) -> None:
    code, lines = check(shutil.copy(small_library_path, tmp_path / "libsmall.so"))
    assert code == 2
    assert "libsmall.so has no plugins" in " ".join(lines)
    (tmp_path / "text.so").write_text("no library")
    code, lines = check(tmp_path / "text.so")
    assert code == 2
    assert "text.so cannot be loaded" in " ".join(lines)
    code, lines = check(tmp_path / "nowhere.so")
    assert code == 2
    assert "no library at" in " ".join(lines)


def test_a_tensorrt_that_is_not_there(path: Path) -> None:
    code, lines = check(path, "--tensorrt", "tensorrt_of_another_name")
    assert code == 2
    assert "tensorrt_of_another_name cannot be imported" in " ".join(lines)
