"""Kernels of kinds that people have, described as they would first write it: both plugins serve them alike."""

import random
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda
from helpers import KERNELS
from shared import Shared
from trt_double import BUILD, RUNTIME, Tensor
from trt_double.twins import Pair, drive, fields_of, operators_library, pair_of, shapes_for, spoilt

from pyfmha.aot import Compiler
from pyfmha.operators.description import DATA_TYPES

pytestmark = pytest.mark.long

Listed = list[tuple[tuple[int, ...], str]]
CASES: dict[str, tuple[dict[str, Any], Listed, Listed, list[int], dict[str, Any], tuple[int, ...]]] = {
    # Attributes; inputs; outputs; values of the shape input; of the first launch some arguments, and its grid.
    "LayerNorm": (
        {"affine": "weight", "tell": 1, "eps": 0.5},
        [((2, 3, 200), "fp16"), ((200,), "fp32")],
        [((2, 3, 200), "fp16"), ((2, 3), "fp32")],
        [],
        {"hidden": 200, "eps": 0.5},
        (6, 1, 1),
    ),
    "TopOne": ({}, [((5, 7), "fp32")], [((5, 1), "fp32"), ((5, 1), "int32")], [], {"cols": 7}, (5, 1, 1)),
    "SplitK": (
        {"most": 3},
        [((20, 300), "fp16"), ((300, 17), "fp16")],
        [((20, 17), "fp16")],
        [],
        {"m": 20, "n": 17, "k": 300, "each": 100, "stride_am": 300, "stride_ak": 1},
        (2, 2, 3),
    ),
    "Embedding": (
        {"scale": 2.0},
        [((9, 130), "fp16"), ((2, 5), "int64")],
        [((2, 5, 130), "fp16")],
        [],
        {"dim": 130, "rows": 9, "scale": 2.0},
        (10, 2, 1),
    ),
    "Quantise": (
        {"bits": 4},
        [((5, 7), "fp16")],
        [((5, 7), "int8"), ((5, 1), "fp32")],
        [],
        {"cols": 7, "most": 7.0},
        (5, 1, 1),
    ),
    "Conv1d": (
        {"stride": 2, "dilation": 3, "pads": (1, 2)},
        [((2, 4, 100), "fp16"), ((6, 4, 5), "fp16")],
        [((2, 6, 46), "fp16")],
        [],
        {"channels": 4, "length": 100, "outs": 6, "taps": 5, "stride": 2, "padding": 1, "dilation": 3, "long": 46},
        (2, 6, 1),
    ),
    "SegmentSum": (
        {},
        [((50, 70), "fp16"), ((8,), "int32")],
        [((9, 70), "fp16")],
        [9],
        {"segments": 7, "dim": 70},
        (9, 2, 1),
    ),
    "Dropout": (
        {"seed": 1 << 40, "rank": 2, "mask": 1, "p": 0.25},
        [((30, 50), "fp16")],
        [((30, 50), "fp16"), ((30, 50), "bool")],
        [],
        {"n": 1500, "p": 0.25, "seed": 1 << 40},
        (6, 1, 1),
    ),
    "MoeGate": (
        {"k": 2, "normalise": 0},
        [((11, 8), "fp32")],
        [((11, 2), "fp32"), ((11, 2), "int32")],
        [],
        {"count": 8, "k": 2, "normalise": 0},
        (11, 1, 1),
    ),
}


@pytest.fixture(scope="module")
def library_path(compiler: Compiler, shared: Shared) -> Path:
    return shared.once("strangers", lambda folder: operators_library(compiler, KERNELS / "strangers.py", folder))


@pytest.fixture
def pair(library_path: Path, tmp_path: Path, fake_cuda: FakeCuda, name: str) -> Pair:
    return pair_of(library_path, tmp_path, fake_cuda, name)


@pytest.mark.parametrize("name", CASES)
def test_what_is_launched(pair: Pair, name: str) -> None:
    attributes, given, wanted, values, arguments, grid = CASES[name]
    inputs, outputs = ([Tensor(shape, DATA_TYPES[kind]) for shape, kind in listed] for listed in (given, wanted))
    built = pair.create(fields_of(pair.operator, attributes), BUILD)
    assert built is not None
    assert pair.both("output_types", built, [t.type for t in inputs]) == [t.type for t in outputs]
    shapes = [list(tensor.shape) for tensor in inputs]
    assert pair.both("output_shapes", built, shapes, [values] * bool(values)) == [list(t.shape) for t in outputs]
    loaded = pair.create(pair.stored(built), RUNTIME)
    assert loaded is not None
    attached = [calls.attach(plugin) for calls, plugin in zip((pair.python, pair.c), loaded, strict=True)]
    pair.both("workspace", attached, inputs, outputs)
    assert pair.both("on_shape_change", attached, inputs, outputs) == 0
    addresses = [0x7F0000000000 + 0x10000000 * index for index in range(len(inputs) + len(outputs))]
    launch, *_ = pair.launches(attached, addresses[: len(inputs)], addresses[len(inputs) :], 0x7C0000000100, 1)
    assert launch.grid == grid
    step = attached[0]._plan.steps[0]
    names = [argument for argument, _ in pair.library[step.function].manifest.arguments]
    found = dict(zip(names, step.arguments, strict=True))
    shown = {key: getattr(found[key], "offset", found[key]) for key in arguments}
    assert shown == arguments


ATTRIBUTES: dict[str, dict[str, tuple[Any, ...]]] = {
    "LayerNorm": {"affine": ("both", "weight", "none", "some"), "tell": (0, 1), "eps": (0.5, -1.0)},
    "SplitK": {"most": (1, 3, 64, 65)},
    "Embedding": {"flat": (0, 1), "scale": (0.5,)},
    "Quantise": {"bits": (4, 8, 5)},
    "Conv1d": {"stride": (1, 2, 0), "dilation": (1, 3), "pads": ((0, 0), (1, 2), (3,), (-1, 0))},
    "Dropout": {"seed": (0, -1, 1 << 62), "rank": (1, 2, 3), "mask": (0, 1), "p": (0.25, 1.0)},
    "MoeGate": {"k": (1, 2, 17), "normalise": (0, 1)},
}


@pytest.mark.parametrize("name", CASES)
def test_every_call_is_answered_alike(pair: Pair, name: str) -> None:
    chance = random.Random(name)
    sizes = shapes_for((0, 1, 2, 3, 7, 16, 60, 100, 200), (1 << 20, 1 << 31, 1 << 40, 1 << 62))
    counts = {"refused": 0, "prepared": 0, "launched": 0, "split": 0}
    for _ in range(150):
        choices = ATTRIBUTES.get(name, {})
        values = {key: chance.choice(found) for key, found in choices.items() if chance.random() < 0.6}
        plugins = pair.create(spoilt(fields_of(pair.operator, values), chance))
        if plugins is None:
            counts["refused"] += 1
            continue
        counts[drive(pair, plugins, chance, sizes)] += 1
        plugins[1].delete()
    assert counts["prepared"] > 0
    assert counts["launched"] + counts["split"] > 0
