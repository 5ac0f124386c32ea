"""The plugin inside the library answers every call as the Python plugin does: values, launches and texts."""

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda, Launch
from trt_double import BUILD, INT32, RUNTIME, Field, Tensor
from trt_double.binding import make_binding
from trt_double.library_calls import LibraryCalls
from trt_double.scene import DECODES, FORWARDS, MEMBERS, Scene, number, pair_standins, specs, standin, text

import pyfmha.trt
from pyfmha.aot import build
from pyfmha.attention.operator import NAME, OPERATOR
from pyfmha.operators.instance import Instance
from pyfmha.operators.program import program_of
from pyfmha.runtime.library import Library
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


class Pair:
    """The same plugin twice, in Python and in C, for the same calls."""

    def __init__(self, path: Path, fake_cuda: FakeCuda) -> None:
        self.fake_cuda = fake_cuda
        self.library = Library(path)
        self.scene = Scene(make_binding(), self.library)
        self.python, self.c = self.scene.calls, LibraryCalls(path)
        self.creator = self.c.named(NAME)

    def both(self, call: str, plugins: Sequence[Any], *arguments: Any) -> Any:
        """Make a call on both: the answer, which is the same."""
        answers, texts = [], []
        for calls, plugin in zip((self.python, self.c), plugins, strict=True):
            before = len(self.c.logger.lines), pyfmha.trt.last_failure()
            answers.append(getattr(calls, call)(plugin, *arguments))
            failure = pyfmha.trt.last_failure()
            said = [line for severity, line in self.c.logger.lines[before[0] :] if severity == 1]
            texts.append(said[-1] if said else str(failure.error) if failure is not before[1] and failure else "")
        assert texts[0] == texts[1], (call, arguments)
        if call == "workspace":
            answers = [min(answer, 1 << 62) for answer in answers]
        assert answers[0] == answers[1], (call, arguments)
        return answers[0]

    def create(self, fields: Sequence[Field], phase: int = BUILD) -> tuple[Any, Any] | None:
        """Both plugins, or None where both refuse with one text."""
        before = pyfmha.trt.last_failure()
        python = self.python.create(self.scene.creator, "layer 7", fields, phase)
        c = self.c.create(self.creator, "layer 7", fields, phase)
        assert (python is None) == (c is None), (pyfmha.trt.last_failure(), self.c.error())
        if python is not None:
            return python, c
        failure = pyfmha.trt.last_failure()
        assert failure is not None
        assert failure is not before
        assert str(failure.error) == self.c.error()
        return None

    def stored(self, plugins: Sequence[Any]) -> list[Field]:
        one, other = (calls.stored_fields(p).read() for calls, p in zip((self.python, self.c), plugins, strict=True))
        assert one == other
        return one

    def launches(self, plugins: Sequence[Any], *arguments: Any) -> list[Launch]:
        """Enqueue on both: the launches, which are the same."""
        made = []
        status = []
        for calls, plugin in zip((self.python, self.c), plugins, strict=True):
            before = self.fake_cuda.launch_count()
            status.append(calls.enqueue(plugin, *arguments))
            made.append(self.fake_cuda.launches()[before:])
        assert status[0] == status[1], self.c.error()
        assert [_shown(launch) for launch in made[0]] == [_shown(launch) for launch in made[1]]
        return made[0]


def _shown(launch: Launch) -> tuple[Any, ...]:
    return launch.image_sha256, launch.grid, launch.block, launch.stream, launch.params


@pytest.fixture
def pair(library_path: Path, tmp_path: Path, fake_cuda: FakeCuda) -> Pair:
    assert fake_cuda.c.cuInit(0) == 0
    fake_cuda.use_context()
    return Pair(Path(shutil.copy(library_path, tmp_path / "libpyfmha.so")), fake_cuda)


def fields_of(values: dict[str, Any]) -> list[Field]:
    return [
        text(name, value) if isinstance(value, str) else number(name, 1 if name in FLOATS else INT32, value)
        for name, value in values.items()
    ]


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


def bounded(tensor: Tensor, chance: random.Random) -> Tensor:
    """A tensor whose sizes a profile bounds."""
    low = tuple(max(0, size - chance.choice((0, 0, 1, 5))) for size in tensor.shape)
    own = tuple(-1 if a != b else b for a, b in zip(low, tensor.shape, strict=True))
    return Tensor(own, tensor.type, tensor.format, largest=tensor.shape, smallest=low)


@pytest.mark.parametrize("seed", range(8))
def test_every_call_is_answered_alike(pair: Pair, seed: int) -> None:
    chance = random.Random(seed)
    counts = {"refused": 0, "prepared": 0, "launched": 0, "split": 0}
    for _ in range(60):
        plugins = pair.create(fields_of(random_values(chance)))
        if plugins is None:
            counts["refused"] += 1
            continue
        counts[drive(pair, plugins, chance)] += 1
        for plugin in plugins[1:]:
            plugin.delete()
    assert counts["refused"] > 5
    assert counts["launched"] > 0


def drive(pair: Pair, plugins: Sequence[Any], chance: random.Random) -> str:
    """All calls of a plugin's life on both."""
    tensors, count = random_shapes(chance, plugins[0].instance)
    inputs, outputs = tensors[:count], tensors[count:]
    assert plugins[0].num_outputs == plugins[1].num_outputs
    pair.both("timing_cache_id", plugins)
    assert pair.python.core(plugins[0])[:2] == pair.c.core(plugins[1])[:2]
    pair.both("output_types", plugins, [tensor.type for tensor in inputs])
    pair.both("output_shapes", plugins, [[None if chance.random() < 0.5 else s for s in t.shape] for t in inputs])
    for position in range(len(tensors)):
        pair.both("supports", plugins, position, tensors)
    dynamic = [bounded(tensor, chance) for tensor in tensors]
    pair.both("configure", plugins, dynamic[:count], dynamic[count:])
    tactics = pair.both("tactics", plugins)
    loaded = pair.create(pair.stored(plugins), RUNTIME)
    assert loaded is not None
    attached = [calls.attach(plugin) for calls, plugin in zip((pair.python, pair.c), loaded, strict=True)]
    assert None not in attached
    if tactics:
        pair.both("set_tactic", attached, chance.choice([0, *tactics, 12345]))
    room = pair.both("workspace", attached, dynamic[:count], dynamic[count:])
    if pair.both("on_shape_change", attached, inputs, outputs) != 0:
        return "prepared"
    addresses = [0x7F0000000000 + 0x10000000 * index for index in range(len(tensors))]
    launched = pair.launches(attached, addresses[:count], addresses[count:], WORKSPACE if room else 0, STREAM)
    copies = [calls.clone(plugin) for calls, plugin in zip((pair.python, pair.c), attached, strict=True)]
    pair.both("timing_cache_id", copies)
    pair.both("enqueue", copies, addresses[:count], addresses[count:], WORKSPACE, STREAM)
    return "split" if len(launched) > 1 else "launched"
