"""Attention's plugin for the tests of plugins in C: a library, and attributes and shapes at random.

Asked for with ``pytest_plugins``, after ``plugin_host.operators``.
"""

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from described import operator, probe, probe_specs
from shared import Shared
from trt_double import Tensor
from trt_double.scene import (
    BIASED,
    DECODES,
    EIGHTS,
    FORWARDS,
    MEMBERS,
    biased_pair_standins,
    biased_standin,
    fp8_standin,
    pair_standins,
    specs,
    standin,
)

from plugin_host import functions
from pyfmha.aot import Compiler, build
from pyfmha.attention.biased_decode import BiasedDecode
from pyfmha.attention.fp8 import DESCALES
from pyfmha.attention.hopper import DECODE_KERNEL
from pyfmha.attention.operator import OPERATOR
from pyfmha.operators.expressions import Scope
from pyfmha.operators.instance import Instance
from pyfmha.spec.arch import parse_archs
from pyfmha.spec.kernel import KernelSpec

BESIDE = operator("Beside", attributes={"count": "int32 = 3"}, launches=[probe(a="X", c="Y", i="n", j="count")])


def standins() -> list[KernelSpec]:
    """Functions of every kind, some of them missing; ``fmha_fwd_d128_fp16`` decodes in one launch."""
    wanted = specs(MEMBERS[:1], (4, 2)) + specs(MEMBERS[1:2])
    for number, member in enumerate(FORWARDS):
        for block in (256, 512) if number == 0 else (256,):
            found = standin(member, block)
            if member is FORWARDS[-1]:
                wanted.append(replace(found, kernel=DECODE_KERNEL, archs=("sm_90",), requires=("q_len == 1",)))
            wanted += [found, found.generic()]
    for pair in DECODES:
        wanted += pair_standins(pair)
    wanted += [biased_standin(member) for member in BIASED] + biased_pair_standins(BiasedDecode("fp16", 64))
    return wanted + [fp8_standin(member) for member in EIGHTS]


@pytest.fixture(scope="session")
def attention_plugin_path(compiler: Compiler, shared: Shared) -> Path:
    """A library of stand-ins for attention's functions and for some of users', with their plugins and that of another
    operator."""

    def make(folder: Path) -> Path:
        own, operators = functions.standins(compiler)
        specs = [*standins(), *probe_specs(), *own]
        operators = [OPERATOR, BESIDE, *operators]
        return build(specs, parse_archs(["sm_90"]), folder, jobs=2, operators=operators).library

    return shared.once("attention_plugin", make)


@pytest.fixture
def attention_path(attention_plugin_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(attention_plugin_path, tmp_path / "libpyfmha.so"))


ODD: dict[str, tuple[Any, ...]] = {
    "num_heads": (0, -1, 5, (1 << 31) - 1),
    "head_size": (0, 257, -128, 256, 64, 20),
    "type_id": (2, 3, -1, 99),
    "softmax_scale": (0.0, float("inf"), float("nan"), 1e-45),
    "causal": (3, -1),
    "num_kv_heads": (0, 3, 8, -1),
    "layout": ("sbhd", "", "BSHD", "bhsd ", "x" * 300),
    "bottom_right": (2, -1),
    "window_left": (-2, -(1 << 31)),
    "window_right": (-2, -(1 << 31)),
    "softcap": (-1.0, float("nan"), float("inf"), 1e-40),
    **dict.fromkeys(("return_lse", "q_lengths", "kv_lengths", "cu_seqlens", "mask"), (-1, 2, 7)),
    **dict.fromkeys(("bias", "sinks"), (-1, 3)),
    **dict.fromkeys(("fp8", *DESCALES), (-1, 1, 2)),
    "v_head_size": (0, 257, -1),
}
"""What each attribute may not be, or what the library has no function for."""


def random_values(chance: random.Random) -> dict[str, Any]:
    """Attributes that go together, most of the time; of some of their values the library lacks the function."""
    heads = chance.choice((4, 4, 4, 8, 1, 6, 32))
    values: dict[str, Any] = {
        "num_heads": heads,
        "head_size": chance.choice((32, 32, 16, 128, 80, 1, 127)),
        "type_id": chance.choice((1, 1, 1, 7, 0)),
        "softmax_scale": chance.choice((0.125, 0.3, -2.0, 1e-30, 3e38)),
    }
    ragged, layout = chance.random() < 0.3, chance.choice(("bhsd", "bshd", "packed"))
    newer: dict[str, Any] = {
        "num_kv_heads": chance.choice([divisor for divisor in range(1, heads + 1) if heads % divisor == 0]),
        "layout": "bshd" if ragged and layout == "bhsd" else layout,
        "bottom_right": chance.choice((0, 1)),
        "window_left": chance.choice((-1, 0, 5, (1 << 31) - 1)),
        "window_right": chance.choice((-1, 0, 5, (1 << 31) - 1)),
        "softcap": chance.choice((0.0, 50.0, 0.5)),
        "return_lse": chance.choice((0, 1)),
        "q_lengths": 0 if ragged else chance.choice((0, 1)),
        "kv_lengths": 0 if ragged else chance.choice((0, 1)),
    }
    usual = chance.choice((0.0, 0.4, 1.0))
    values |= {name: value for name, value in newer.items() if chance.random() < usual}
    if ragged:
        values["cu_seqlens"] = 1
        values["layout"] = newer["layout"]
    if chance.random() < 0.7:
        values["causal"] = chance.choice((0, 1, 1, 2))
    if chance.random() < 0.3:
        choices = {"bias": (1, 2), "mask": (1,), "sinks": (1, 2), "v_head_size": (values["head_size"], 24)}
        name = chance.choice(list(choices))
        values[name] = chance.choice(choices[name])
    if chance.random() < 0.15:
        name = chance.choice(list(ODD))
        values[name] = chance.choice(ODD[name])
    if chance.random() < 0.03:
        del values[chance.choice(list(values))]
    return values


def random_shapes(
    chance: random.Random, instance: Instance, own: Mapping[str, Sequence[int]] | None = None
) -> tuple[list[Tensor], int]:
    """Tensors of the plugin's forms, or nearly; and how many are inputs. `own`: sizes of axes of a user's function."""
    free = {"bias": 4, "mask": 4, **dict.fromkeys(DESCALES, 2)}
    ranks = [
        chance.randint(1, free[form.name]) if form.name in free else len(form.axes) for form in instance.forms().inputs
    ]
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
    rows = next(sizes[axis.name] for axis in forms.outputs[0].axes if axis.name in ("seq", "Sq", "tokens", "Q_tokens"))
    packed = instance.attributes["layout"] == "packed"
    whole = {"b": sizes["batch"], "h": instance.attributes["num_heads"], "q": rows, "k": sizes["Skv"]}
    for name in ("bias", "mask"):
        for axis, size in (whole | ({"k": rows} if packed else {})).items():
            sizes[f"{name}_{axis}"] = chance.choice((1, size, size))
    for name in DESCALES:
        sizes[f"{name}_b"] = chance.choice((1, 1 if instance.attributes["cu_seqlens"] else sizes["batch"]))
        sizes[f"{name}_h"] = chance.choice((1, instance.attributes["num_kv_heads"]))
    sizes |= {name: chance.choice(choices) for name, choices in (own or {}).items()}
    if chance.random() < 0.05:
        sizes[chance.choice(list(sizes))] = chance.choice((1 << 31, 1 << 40, 1 << 62))
    made = []
    for form in forms.all:
        scope = Scope({**instance.scope.values, **sizes})
        shape = [axis.expression.evaluate(scope) if axis.size is None else axis.size for axis in form.axes]
        if chance.random() < 0.03:
            shape[chance.randrange(len(shape))] += chance.choice((1, -1))
        if chance.random() < 0.02:
            shape.append(1)
        kind = form.type_id if chance.random() < 0.98 else chance.choice((0, 1, 3, 4, 7))
        made.append(Tensor(tuple(shape), kind))
    return made, len(forms.inputs)
