"""Kernels as public collections have them, from a description to a plugin that launches; and right against float64."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from helpers import KERNELS
from operator_references import CASES, Case, relative_error
from shared import Shared
from trt_double import BUILD, RUNTIME, Tensor
from trt_double.twins import Pair, drive, fields_of, operators_library, pair_of, shapes_for

from pyfmha.aot import Compiler
from pyfmha.aot.operator_specs import load_operators
from pyfmha.interpreter import interpret_operator
from pyfmha.interpreter.kernel import run_interpreted

FILE = KERNELS / "foreign.py"
IDS = [case.operator for case in CASES]
KINDS = {np.float32: 0, np.float16: 1, np.int32: 3}


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_it_is_right_under_the_interpreter(compiler: Compiler, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is described; in this process, which interprets."""
    monkeypatch.setattr("pyfmha.interpreter.operators.run_in_subprocess", run_interpreted)
    inputs = case.inputs()
    (operator,) = [operator for operator in load_operators(compiler, FILE) if operator.name == case.operator]
    names = [tensor.name for tensor in operator.inputs]
    outputs = interpret_operator(operator, dict(zip(names, inputs, strict=True)), **case.attributes)
    for got, wanted, (shape, kind) in zip(outputs.values(), case.reference(*inputs), case.outputs, strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, kind) == (shape, kind)
        assert relative_error(got, wanted) < case.limit


@pytest.fixture(scope="module")
def library_path(compiler: Compiler, shared: Shared) -> Path:
    return shared.once("foreign", lambda folder: operators_library(compiler, FILE, folder))


@pytest.fixture
def pair(library_path: Path, tmp_path: Path, fake_cuda: FakeCuda, case: Case) -> Pair:
    return pair_of(library_path, tmp_path, fake_cuda, case.operator)


def tensors(listed: Any) -> list[Tensor]:
    return [Tensor(shape, KINDS[kind]) for shape, kind in listed]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_both_plugins_launch_what_triton_would(pair: Pair, case: Case) -> None:
    """Grid and arguments are those of a launch in Python."""
    inputs, outputs = tensors(case.shapes), tensors(case.outputs)
    built = pair.create(fields_of(pair.operator, case.attributes), BUILD)
    assert built is not None
    assert pair.both("output_types", built, [tensor.type for tensor in inputs]) == [tensor.type for tensor in outputs]
    assert pair.both("output_shapes", built, [t.shape for t in inputs]) == [list(t.shape) for t in outputs]
    loaded = pair.create(pair.stored(built), RUNTIME)
    assert loaded is not None
    attached = [calls.attach(plugin) for calls, plugin in zip((pair.python, pair.c), loaded, strict=True)]
    room = pair.both("workspace", attached, inputs, outputs)
    assert pair.both("on_shape_change", attached, inputs, outputs) == 0
    given = [0x7F0000000000 + 0x10000000 * index for index in range(len(inputs) + len(outputs))]
    space = 0x7C0000000100
    (launch,) = pair.launches(attached, given[: len(inputs)], given[len(inputs) :], space if room else 0, 1)
    wanted = case.launch(given[: len(inputs)], given[len(inputs) :], Scratch(space))
    assert launch.grid == case.grid
    function = next(f for f in pair.library.manifest.functions if f.name.startswith(f"foreign_{case.operator.lower()}"))
    took = [name for name, _ in function.arguments if name in wanted]  # all but what the grid alone reads
    assert set(took) == set(wanted)
    kinds = dict(function.arguments)
    assert list(launch.params[: len(took)]) == [bytes_of(kinds[name], wanted[name]) for name in took]


def bytes_of(kind: str, value: float) -> bytes:
    """An argument as the kernel reads it."""
    return np.float32(value).tobytes() if kind == "fp32" else int(value).to_bytes(8 if kind[0] == "*" else 4, "little")


class Scratch:
    """Parts of the workspace, one behind the other."""

    def __init__(self, start: int) -> None:
        self.at = start

    def __call__(self, count: int) -> int:
        found, self.at = self.at, self.at + -(-4 * count // 256) * 256
        return found


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_call_is_answered_alike(pair: Pair, case: Case) -> None:
    chance = random.Random(case.operator)
    sizes = shapes_for((0, 1, 2, 3, 16, 48, 64, 96, 1024, 1025), (1 << 20, 1 << 31, 1 << 40, 1 << 62))
    counts = {"prepared": 0, "launched": 0, "split": 0}
    for _ in range(100):
        values = {name: chance.choice((0, 1)) for name in case.integers}
        plugins = pair.create(fields_of(pair.operator, values))
        assert plugins is not None
        counts[drive(pair, plugins, chance, sizes)] += 1
        plugins[1].delete()
    assert counts["prepared"] > 0
    assert counts["launched"] > 0
