"""Tensors that are not there, to kernels that ask by ``is None``: Triton settles that when it compiles."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from helpers import KERNELS
from shared import Shared
from trt_double import BUILD, RUNTIME, Tensor
from trt_double.twins import fields_of, operators_library, pair_of

from pyfmha.aot import Compiler
from pyfmha.aot.absent_tensors import launches_without
from pyfmha.aot.operator_specs import load_operators, operator_specs
from pyfmha.errors import SpecError
from pyfmha.interpreter import interpret_operator
from pyfmha.interpreter.kernel import run_interpreted
from pyfmha.operators.description import Config, Operator
from pyfmha.spec.absent import compared_with_none

FILE = KERNELS / "absent.py"


@pytest.fixture(scope="module")
def operators(compiler: Compiler) -> dict[str, Operator]:
    return {operator.name: operator for operator in load_operators(compiler, FILE)}


def helper(first: Any, other: Any) -> bool:
    return first is None or other == 3


def asking(a: Any, b: Any, c: Any, d: Any) -> Any:
    if a is not None and b == 0 and helper(other=b, first=c):
        return asking(d, b, c, a)
    return d is True


def test_what_a_function_compares_with_none() -> None:
    """Itself, in what it calls, and in itself called again."""
    assert compared_with_none(asking) == ("a", "c")


def test_each_case_is_a_launch_of_a_kernel_of_its_own(compiler: Compiler, operators: dict[str, Operator]) -> None:
    """Those alone that the attributes' choices allow: a scale comes with a bias."""
    launches = operators["Scaled"].launches
    lacking = [[name for name, value in launch.constants if value is None] for launch in launches]
    assert lacking == [[], ["sums"], ["scale"], ["scale", "sums"], ["bias", "scale"], ["bias", "scale", "sums"]]
    specs = {spec.name: spec for spec in operator_specs(compiler, operators["Scaled"])}
    assert list(specs) == [f"scaled_{number}" for number in range(6)]
    given = [argument.name for argument in specs["scaled_5"].arguments]
    assert given == ["x", "y", "n", "size_Y_0"]
    assert dict(specs["scaled_5"].constants) == {"bias": None, "scale": None, "sums": None, "BLOCK": 64}


def test_a_kernel_is_tuned_as_its_autotuner_says(operators: dict[str, Operator]) -> None:
    (launch,) = operators["Tuned"].launches
    assert launch.configs == (
        Config({"BLOCK": 64, "DOUBLE": False}, num_warps=2, num_stages=3),
        Config({"BLOCK": 128, "DOUBLE": True}, num_warps=8, num_stages=2),
    )


def test_with_its_constants_given_heuristics_tell_the_rest(compiler: Compiler, tmp_path: Path) -> None:
    file = tmp_path / "absent.py"
    file.write_text(FILE.read_text().replace("kernel=tuned,", "kernel=tuned, constants={'BLOCK': 256},"))
    launches = {operator.name: operator.launches for operator in load_operators(compiler, file)}
    assert launches["Tuned"][0].configs == (Config({"DOUBLE": True}),)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kernel=scaled,", "kernel=scaled, name='it',", "^Scaled: launch it: its kernel compares bias, scale, sums"),
        ("Config({", "Config({'q': 64, ", r"^Tuned: launch of tuned: configuration 0 sets q, which .* or configs="),
        ("num_warps=2)", "num_warps=2, num_ctas=2)", "^Tuned: launch of tuned: its autotuner sets num_ctas, which an"),
        ("num_warps=2)", "num_warps=2, pre_hook=print)", "has a pre_hook, which Triton calls before each launch"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_or_tuned_is_refused(
    compiler: Compiler, tmp_path: Path, old: str, new: str, message: str
) -> None:
    file = tmp_path / "absent.py"
    file.write_text(FILE.read_text().replace(old, new, 1))
    with pytest.raises(SpecError, match=message):
        _ = [operator_specs(compiler, operator) for operator in load_operators(compiler, file)]


def test_more_cases_than_launches_are_refused(compiler: Compiler, operators: dict[str, Operator]) -> None:
    operator = operators["Scaled"]
    flags = [f"f{number}" for number in range(5)]
    many = replace(
        operator,
        inputs=[*operator.inputs[:1], *(replace(operator.inputs[1], name=flag, when=flag) for flag in flags)],
        attributes=dict.fromkeys(flags, "int32 = 0"),
        outputs=operator.outputs[:1],
        launches=[replace(operator.launches[0], when="", arguments={flag: flag for flag in flags}, scalars=[])],
    )
    found = replace(compiler.describe(FILE, "scaled"), compared=tuple(flags))
    with pytest.raises(SpecError, match=r"compares f0, f1, f2, f3, f4 with None.* makes 32 launches"):
        launches_without(many, many.launches[0], found)


X, BIAS = np.arange(100, dtype=np.float32), np.full(100, 0.5, np.float32)


@pytest.mark.parametrize(
    ("attributes", "inputs", "wanted"),
    [
        ({}, {}, 2 * X),
        ({"tell": 1, "mode": "bias"}, {"Bias": BIAS}, 2 * X + 1),
        ({"tell": 1, "mode": "both"}, {"Bias": BIAS, "Scale": np.full(1, 3.0, np.float32)}, 3 * X + 1.5),
    ],
)
@pytest.mark.parametrize("loaded", [False, True], ids=["as written", "as built"])
def test_it_is_right_under_the_interpreter(
    operators: dict[str, Operator],
    attributes: dict[str, Any],
    inputs: dict[str, Any],
    wanted: Any,
    loaded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pyfmha.interpreter.operators.run_in_subprocess", run_interpreted)
    operator = operators["Scaled"]
    if not loaded:
        first = operator.launches[0]
        arguments = [pair for pair in first.arguments if pair[0] != "size_Y_0"]
        grid = first.grid.replace("size_Y_0", "size(Y, 0)")
        operator = replace(operator, launches=[replace(first, when="", arguments=arguments, grid=grid, scalars=[])])
    got = interpret_operator(operator, {"X": X, **inputs}, source=FILE, **attributes)
    assert np.array_equal(got["Y"], wanted)
    if "tell" in attributes:
        assert np.array_equal(got["Sums"], [wanted[:64].sum(), wanted[64:].sum()])


def test_a_kernel_under_an_autotuner_is_interpreted(
    operators: dict[str, Operator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyfmha.interpreter.operators.run_in_subprocess", run_interpreted)
    assert np.array_equal(interpret_operator(operators["Tuned"], {"X": X}, source=FILE)["Y"], X)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["plain", "bias", "both"])
def test_both_plugins_launch_the_kernel_of_the_case(
    compiler: Compiler, shared: Shared, tmp_path: Path, fake_cuda: FakeCuda, mode: str
) -> None:
    path = shared.once("absent tensors", lambda folder: operators_library(compiler, FILE, folder))
    pair = pair_of(path, tmp_path, fake_cuda, "Scaled")
    built = pair.create(fields_of(pair.operator, {"mode": mode}), BUILD)
    assert built is not None
    loaded = pair.create(pair.stored(built), RUNTIME)
    assert loaded is not None
    attached = [calls.attach(plugin) for calls, plugin in zip((pair.python, pair.c), loaded, strict=True)]
    inputs = [Tensor((100,), 0), Tensor((100,), 0), Tensor((1,), 0)][: 1 + ["plain", "bias", "both"].index(mode)]
    assert pair.both("on_shape_change", attached, inputs, [Tensor((100,), 0)]) == 0
    addresses = [0x7F0000000000 + 0x10000000 * index for index in range(len(inputs) + 1)]
    (launch,) = pair.launches(attached, addresses[: len(inputs)], addresses[len(inputs) :], 0, 1)
    assert [int.from_bytes(param, "little") for param in launch.params[: len(addresses)]] == addresses
