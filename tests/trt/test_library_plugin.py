"""The plugin inside the library answers every call as the Python plugin does: values, launches and texts."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda
from trt_double import Tensor
from trt_double.scene import DECODES, FORWARDS, MEMBERS, pair_standins, specs, standin
from trt_double.twins import Pair, drive, fields_of

from pyfmha.aot import build
from pyfmha.attention.operator import OPERATOR
from pyfmha.operators.instance import Instance
from pyfmha.operators.program import program_of
from pyfmha.spec.arch import parse_archs

PROGRAM = program_of(OPERATOR)
FLOATS = ("softmax_scale", "softcap")
WORKSPACE, STREAM = 0x7C0000000100, 0xABCD


@pytest.fixture(scope="module")
def library_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Functions of every kind, some of them missing, with attention's plugin."""
    wanted = specs(MEMBERS[:1], (4, 2)) + specs(MEMBERS[1:2])
    for number_, member in enumerate(FORWARDS):
        for block in (256, 512) if number_ == 0 else (256,):
            wanted += [standin(member, block), standin(member, block).generic()]
    for pair in DECODES:
        wanted += pair_standins(pair)
    folder = tmp_path_factory.mktemp("library_plugin")
    return build(wanted, parse_archs(["sm_90"]), folder, jobs=2, operators=[OPERATOR]).library


@pytest.fixture
def pair(library_path: Path, tmp_path: Path, fake_cuda: FakeCuda) -> Pair:
    assert fake_cuda.c.cuInit(0) == 0
    fake_cuda.use_context()
    return Pair(Path(shutil.copy(library_path, tmp_path / "libpyfmha.so")), fake_cuda, OPERATOR)


CHOICES: dict[str, tuple[Any, ...]] = {
    "num_kv_heads": (1, 2, 4, 4, 2, 0, 3),
    "layout": ("bhsd", "bshd", "packed", "bhsd", "bshd", "sbhd", ""),
    "bottom_right": (0, 1, 0, 1, 2),
    "window_left": (-1, 0, 5, 1 << 30, -2),
    "window_right": (-1, 0, 5, -2),
    "softcap": (0.0, 50.0, 0.5, -1.0, float("nan")),
    "return_lse": (0, 1, 1, 2),
    "q_lengths": (0, 1, 1, -1),
    "kv_lengths": (0, 1, 1, 7),
    "cu_seqlens": (0, 1, 1, 2),
}


def random_values(chance: random.Random) -> dict[str, Any]:
    values: dict[str, Any] = {
        "num_heads": chance.choice((4, 4, 4, 4, 8, 0, -1)),
        "head_size": chance.choice((32, 32, 32, 128, 80, 16, 64, 0, 257)),
        "type_id": chance.choice((1, 1, 1, 1, 7, 0, 2)),
        "softmax_scale": chance.choice((0.125, 0.3, -2.0, 1e-30, 0.0, float("inf"), float("nan"))),
    }
    if chance.random() < 0.7:
        values["causal"] = chance.choice((0, 1, 2, 3))
    for name, choices in CHOICES.items():
        if chance.random() < 0.3:
            values[name] = chance.choice(choices)
    if chance.random() < 0.05:
        del values[chance.choice(list(values))]
    return values


def random_shapes(chance: random.Random, instance: Instance) -> tuple[list[Tensor], int]:
    """Tensors of the plugin's forms, or nearly; and how many are inputs."""
    ranks = [len(form.axes) for form in instance.forms().inputs]
    if instance.attributes["layout"] == "packed" and chance.random() < 0.5:
        ranks[0] += 1
    forms = instance.forms(ranks)
    sizes = {
        "batch": chance.choice((0, 1, 2, 5)),
        "seq": chance.choice((0, 1, 7, 600)),
        "Sq": chance.choice((0, 1, 1, 3, 64, 900)),
        "Skv": chance.choice((0, 1, 511, 512, 5000, 200_000)),
        "tokens": chance.choice((0, 5, 700)),
        "Q_tokens": chance.choice((0, 5, 700)),
        "KV_tokens": chance.choice((0, 9, 4000)),
    }
    if chance.random() < 0.05:
        sizes[chance.choice(list(sizes))] = chance.choice((1 << 31, 1 << 40, 1 << 62))
    made = []
    for form in forms.all:
        shape = [
            sizes["batch"] + 1
            if axis.label == "batch + 1"
            else sizes[axis.name or ""]
            if axis.size is None
            else axis.size
            for axis in form.axes
        ]
        if chance.random() < 0.03:
            shape[chance.randrange(len(shape))] += chance.choice((1, -1))
        if chance.random() < 0.02:
            shape.append(1)
        kind = form.type_id if chance.random() < 0.98 else chance.choice((0, 1, 3, 7))
        made.append(Tensor(tuple(shape), kind))
    return made, len(forms.inputs)


@pytest.mark.parametrize("seed", range(8))
def test_every_call_is_answered_alike(pair: Pair, seed: int) -> None:
    chance = random.Random(seed)
    counts = {"refused": 0, "prepared": 0, "launched": 0, "split": 0}
    for _ in range(60):
        plugins = pair.create(fields_of(OPERATOR, random_values(chance)))
        if plugins is None:
            counts["refused"] += 1
            continue
        counts[drive(pair, plugins, chance, random_shapes)] += 1
        for plugin in plugins[1:]:
            plugin.delete()
    assert counts["refused"] > 5
    assert counts["launched"] > 0
