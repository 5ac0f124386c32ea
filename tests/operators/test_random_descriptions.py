"""Descriptions at random: both plugins answer every call alike, and what contradicts itself is refused by name."""

import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from described import build_described, probe
from described.cases import largest
from described.random_operators import RANDOM, random_operator, random_values
from fake_cuda import FakeCuda
from shared import Shared
from trt_double.twins import Pair, Shapes, drive, fields_of, shapes_for, spoilt

from pyfmha.aot.operator_types import check_held
from pyfmha.errors import SpecError
from pyfmha.operators.description import Attribute, Operator, Part, Tensor, Types
from pyfmha.operators.program import program_of
from pyfmha.operators.trials import check_absent
from pyfmha.runtime.library import Library

pytest_plugins = ("described.fixtures",)

SHAPES = shapes_for((0, 1, 2, 3, 4, 6, 12, 100), (1 << 31, 1 << 40, 1 << 62))


def lives(pair: Pair, chance: random.Random, count: int, shapes: Shapes = SHAPES) -> dict[str, int]:
    """Random lives of both plugins: how they ended."""
    counts = dict.fromkeys(("refused", "prepared", "launched", "split"), 0)
    for _ in range(count):
        plugins = pair.create(spoilt(fields_of(pair.operator, random_values(pair.operator, chance)), chance))
        if plugins is None:
            counts["refused"] += 1
            continue
        counts[drive(pair, plugins, chance, shapes)] += 1
        plugins[1].delete()
    return counts


def test_every_call_is_answered_alike(pair_of: Callable[[str], Pair]) -> None:
    counts = dict.fromkeys(("refused", "prepared", "launched", "split"), 0)
    for name in RANDOM:
        for ended, count in lives(pair_of(name), random.Random(name), 6).items():
            counts[ended] += count
    assert min(counts.values()) > 0, counts


@pytest.mark.long
@pytest.mark.parametrize("seed", range(12))
def test_many_more_are(shared: Shared, tmp_path: Path, fake_cuda: FakeCuda, seed: int) -> None:
    chance = random.Random(seed)
    operators = [random_operator(chance, f"Random{number}") for number in range(60)]
    made = shared.once(f"random_{seed}", lambda folder: build_described(operators, folder))
    assert fake_cuda.c.cuInit(0) == 0
    fake_cuda.use_context()
    path = Path(shutil.copy(made, tmp_path / "libpyfmha.so"))
    ended = [lives(Pair(path, fake_cuda, operator), chance, 20) for operator in Library(path).operators]
    assert sum(one["launched"] + one["split"] for one in ended) > 200


def test_as_much_as_there_is_room_for(pair_of: Callable[[str], Pair]) -> None:
    """16 launches, 32 tensors, 16 parts, 160 names, lists of 64, names of 64 characters."""
    ended = lives(pair_of("L" * 64), random.Random(1), 8, shapes_for((1, 2, 3, 12), (1 << 62,), odd=0.002))
    assert ended["split"] > 0, ended
    assert ended["prepared"] > 0, ended


# ---------------------------------------------------------------- contradictions


def _launch(operator: Operator, **arguments: str) -> Operator:
    """The same, with a first launch that has other arguments."""
    first = replace(operator.launches[0], arguments={**dict(operator.launches[0].arguments), **arguments})
    return replace(operator, launches=(first, *operator.launches[1:]))


def _of_type(operator: Operator, chance: random.Random) -> Operator:
    """A launch of a function that is compiled for another type than a tensor's."""
    function = chance.choice(("probe_fp16", "probe_fp32"))
    tensor = Tensor("Other", f"{chance.choice(('int8', 'bf16', 'int64', 'bool'))}[7]")
    return replace(
        operator, inputs=(*operator.inputs, tensor), launches=(*operator.launches, probe(function, b="Other"))
    )


def _of_no_function(operator: Operator, _: random.Random) -> Operator:
    """A launch of a function that is not compiled for one of its types."""
    tensor, types = Tensor("Last", "V[1]"), ("V", Types("bf16"))
    launches = (*operator.launches, probe("probe_{V}"))
    return replace(operator, inputs=(*operator.inputs, tensor), types=(*operator.types, types), launches=launches)


Spoiler = Callable[[Operator, random.Random], Operator]
SPOILED: dict[str, tuple[Spoiler, str]] = {
    "an argument without a source": (
        lambda one, chance: _launch(one, **{chance.choice("abc"): "Nowhere"}),
        r"launch probe\S*, argument [abc]: 'Nowhere' is not known",
    ),
    "an argument by an axis never given": (
        lambda one, _: _launch(one, j="2 * never + 1"),
        r"argument j: 'never' is not known",
    ),
    "an argument in words": (
        lambda one, _: _launch(one, i="'words'"),
        r"argument i: \"'words'\" is of type str; a kernel takes numbers",
    ),
    "an output's axis never given": (
        lambda one, _: replace(one, outputs=(*one.outputs, Tensor("Last", "fp32[never + 1]"))),
        r"output Last: axis never \+ 1: 'never' is not known",
    ),
    "an input's axes that nothing tells apart": (
        lambda one, _: replace(one, inputs=(*one.inputs, Tensor("Last", "fp32[never * ever]"))),
        r"input Last: axis never \* ever: nothing gives ever, never",
    ),
    "a cycle": (
        lambda one, _: replace(one, define=(*one.define, ("one_", "1 + other_"), ("other_", "one_ * 2"))),
        r"definition one_ reads other_, defined after it: a cycle",
    ),
    "a cycle of sizes": (
        lambda one, _: replace(one, define=(*one.define, ("one_", "numel(Y) + other_"), ("other_", "one_ * 2"))),
        r"definition one_ reads other_, defined after it: a cycle",
    ),
    "two outputs of one name": (
        lambda one, _: replace(one, outputs=(*one.outputs, replace(one.outputs[0], forms="fp32[1]"))),
        r"two outputs are called Y",
    ),
    "in place": (
        lambda one, chance: replace(one, outputs=(*one.outputs, Tensor(chance.choice(one.inputs).name, "fp32[1]"))),
        r"\w+ is an input and an output: nothing is computed in place",
    ),
    "a type that is none": (
        lambda one, _: replace(one, inputs=(*one.inputs, Tensor("Last", "V[1]"))),
        r"input Last: 'V' is no type",
    ),
    "a type that nothing gives": (
        lambda one, _: replace(one, types=(*one.types, ("V", Types("fp16")))),
        r"nothing gives the type V",
    ),
    "a type the kernel was not compiled for": (
        _of_type,
        r"launch probe_fp\d\d, argument b: the kernel is compiled for \*fp\d\d, and Other is of \w+",
    ),
    "a function that is not there": (
        _of_no_function,
        r"launch probe_{V}: probe_bf16 is not among the library's functions, for V bf16",
    ),
    "nine axes": (
        lambda one, _: replace(one, outputs=(*one.outputs, Tensor("Last", f"fp32[{', '.join('123456789')}]"))),
        r"output Last: 9 axes; TensorRT has at most 8",
    ),
    "a part of the workspace by something unknown": (
        lambda one, _: replace(one, workspace=(*one.workspace, Part("Last", "4 * never"))),
        r"workspace Last: 'never' is not known",
    ),
    "a default that is not allowed": (
        lambda one, _: replace(one, attributes=(*one.attributes, ("last", Attribute("int32", 3, maximum=2)))),
        r"attribute last: its own default is not allowed: last is 3",
    ),
    "a default without a value": (
        lambda one, _: replace(one, attributes=(*one.attributes, ("last", Attribute("int32", "1 // 0")))),
        r"attribute last: its default 1 // 0 has no value",
    ),
    "bounds that allow nothing": (
        lambda one, _: replace(one, attributes=(*one.attributes, ("last", Attribute("fp32", minimum=3, maximum=2)))),
        r"attribute last: its minimum 3 is above its maximum 2",
    ),
    "a choice of another kind": (
        lambda one, _: replace(one, attributes=(*one.attributes, ("last", Attribute("int32", choices=(1, 1 << 31))))),
        r"attribute last: its choice 2147483648 is no int32",
    ),
    "one name for two things": (
        lambda one, _: replace(one, define=(*one.define, ("Y", "1"))),
        r"Y is a tensor and a part of the workspace, a definition or a type besides",
    ),
    "a text that C cannot hold": (
        lambda one, _: replace(one, attributes=(*one.attributes, ("last", Attribute("string", "a\0b")))),
        r"which holds the character NUL",
    ),
    "a text that is none": (
        lambda one, _: replace(one, attributes=(*one.attributes, ("last", Attribute("string", "a\ud800")))),
        r"which holds '\\ud800', no character",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILED)
def test_what_contradicts_itself_is_refused_by_name(described_path: Path, kind: str) -> None:
    functions = {function.name: function for function in Library(described_path).manifest.functions}
    chance = random.Random(kind)
    spoil, message = SPOILED[kind]
    for name in chance.sample(RANDOM, 4):
        spoiled = spoil(random_operator(random.Random(name), name), chance)
        with pytest.raises(SpecError, match=f"^{name}: .*{message}"):
            refuse(spoiled, functions)


def refuse(operator: Operator, functions: dict[str, Any]) -> None:
    """All that a build reads a description for."""
    program = program_of(operator)
    check_absent(operator)
    check_held(program, functions)


def test_the_largest_is_no_contradiction() -> None:
    assert re.fullmatch("L{64}", program_of(largest()).operator.name)
