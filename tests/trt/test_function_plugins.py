"""Attention with users' functions as plugins: Python's and C's alike, in networks, and what is refused."""

import importlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from plugin_host.attention import random_shapes
from plugin_host.functions import (
    NAMES,
    OWN_AXES,
    alibi_of,
    declared,
    listing_standins,
    own_functions,
    random_function_values,
    soft_near_of,
    standin,
)  # fmt: skip
from trt_double import INT32, RUNTIME
from trt_double.binding import DataType, make_binding
from trt_double.full.gpu import Gpu
from trt_double.scene import HEADS, SIZE, number, text
from trt_double.twins import Pair, drive, fields_of, spoilt

import pyfmha.trt
from pyfmha.aot import Compiler, build
from pyfmha.attention.biased import ARGUMENTS
from pyfmha.attention.function_operator import UserFunction, function_operator
from pyfmha.attention.operator import NAME
from pyfmha.attention.reference import attend, relative_error
from pyfmha.errors import EngineError, LibraryError, PluginError, SpecError
from pyfmha.functions import AttentionFunction, mask_function, score_function
from pyfmha.functions.family import SHIPPED, Declared, file_of, function_operators
from pyfmha.operators.plan import Step
from pyfmha.operators.program import program_of
from pyfmha.runtime.library import Library
from pyfmha.spec.arch import parse_archs
from pyfmha.spec.manifest import Function as FunctionManifest
from pyfmha.spec.manifest import Manifest
from pyfmha.trt import DirectSession, add_attention, add_attention_packed, register
from pyfmha.trt.attention.config import EngineConfig
from pyfmha.trt.attention.engine import build_engine
from pyfmha.trt.attention.own_inputs import OwnInput, own_inputs
from pyfmha.trt.attention.saved import read_engine, save_engine
from pyfmha.trt.creator import unregistered
from pyfmha.trt.engine import build_plan
from pyfmha.trt.session import Session
from pyfmha.verify.plugins import check_plugins

pytest_plugins = (
    "trt_double.fixtures", "trt_double.full.fixtures", "plugin_host.operators", "plugin_host.attention",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_plugin_in_c_answers_alike(attention_path: Path, fake_cuda: FakeCuda, name: str) -> None:
    """Every attribute and shape: refused with one text, or with the launches of the plugin in Python."""
    assert fake_cuda.c.cuInit(0) == 0
    fake_cuda.use_context()
    held = {operator.name: operator for operator in Library(attention_path).operators}
    pair = Pair(attention_path, fake_cuda, held[f"{NAME}_{name}"])
    chance = random.Random(name)
    counts = {"refused": 0, "prepared": 0, "launched": 0, "split": 0}
    for _ in range(60):
        plugins = pair.create(spoilt(fields_of(pair.operator, random_function_values(name, chance)), chance))
        if plugins is None:
            counts["refused"] += 1
            continue
        counts[drive(pair, plugins, chance, lambda c, i: random_shapes(c, i, OWN_AXES[name]))] += 1
        plugins[1].delete()
    done = "split" if name == "groups" else "launched"  # one of two launches
    assert min(counts[what] for what in ("refused", "prepared", done)) > 0, counts
    assert name == "groups" or not counts["split"]


NUMBERS: dict[str, dict[str, tuple[int, ...]]] = {
    "natten": {"height": (30,), "width": (30,), "window": (5, 4)}, "swin": {"width": (30,)},
    "t5": {"furthest": (128, 1)}, "t5_causal": {"furthest": (128, 1)},
}  # fmt: skip
"""Numbers that no shape tells, of those that come along."""


@pytest.mark.long
def test_all_that_come_along_in_c(compiler: Compiler, tmp_path: Path, fake_cuda: FakeCuda) -> None:
    """As ``pyfmha plugin-check`` asks them, and call by call as the plugins in Python."""
    held = list(declared(compiler, *map(file_of, SHIPPED)).values())
    operators, notes = function_operators(held)
    specs = [standin(function) for function in held]
    specs += [one for function in held for one in listing_standins(function)]
    path = build(specs, parse_archs(["sm_90"]), tmp_path, jobs=1, operators=operators).library
    assert (len(operators), notes) == (len(SHIPPED_FUNCTIONS), [])
    assert [finding.text for finding in check_plugins(path) if not finding.good] == []
    assert fake_cuda.c.cuInit(0) == 0
    fake_cuda.use_context()
    for operator in operators:
        name, pair, chance = operator.name.removeprefix(f"{NAME}_"), Pair(path, fake_cuda, operator), random.Random(1)
        own = {axis: (30, 64, 900) for axis in program_of(operator).axes if axis.startswith(f"{name}_")}
        counts = {"refused": 0, "prepared": 0, "launched": 0, "split": 0}
        for _ in range(80):
            values = random_function_values("alibi", chance)
            values.pop("score_function", None)
            values |= {f"{name}_{key}": chance.choice(choices) for key, choices in NUMBERS.get(name, {}).items()}
            plugins = pair.create(fields_of(operator, values))
            done = "refused" if plugins is None else drive(pair, plugins, chance, partial(random_shapes, own=own))
            counts[done] += 1
        assert min(counts["refused"], counts["split" if name in ("blocks", "groups") else "launched"]) > 0, (
            name,
            counts,
        )


class Held(Library):
    """A library that holds the functions made of some of users', but no machine code."""

    def __init__(self, functions: Sequence[AttentionFunction], path: Path = Path("/some/libpyfmha.so")) -> None:
        self.path = path
        self.manifest = Manifest("", "", "", (), ())
        described = [UserFunction.of(function.__pyfmha__()) for function in functions]
        self.operators = tuple(map(function_operator, described))
        self._functions = {
            name: SimpleNamespace(manifest=FunctionManifest(name, "", (*TYPED, *Declared.of(function).arguments), ()))
            for function in functions
            for name in [f"fmha_{what}_{function.name}_d32_fp16" for what in ("with", "flags", "blocks")]
        }


TYPED = tuple((name, kind.replace("T", "fp16")) for name, kind in ARGUMENTS)
SHIPPED_FUNCTIONS = {
    name: value
    for file in SHIPPED
    for name, value in vars(importlib.import_module(f"pyfmha.functions.{file}")).items()
    if isinstance(value, AttentionFunction)
}
KINDS_OF = {"int32": DataType.INT32, "int64": DataType.INT64, "float32": DataType.FLOAT}


class Net:
    """A network of a double of the binding, with Q, K and V of the tests' sizes."""

    def __init__(self, q_len: int = 64, kv_len: int = 64) -> None:
        self.network = make_binding().INetworkDefinition()
        shapes = {"q": (2, HEADS, q_len, SIZE), "k": (2, HEADS, kv_len, SIZE), "v": (2, HEADS, kv_len, SIZE)}
        self.qkv = {name: self.tensor(name, DataType.HALF, *shape) for name, shape in shapes.items()}

    def tensor(self, name: str, kind: DataType, *shape: int) -> Any:
        return self.network.add_input(name, kind, shape)

    def add(self, library: Library, causal: bool = False, **options: Any) -> Any:
        return add_attention(self.network, **self.qkv, causal=causal, library=library, **options)

    def step(self) -> Step:
        """What its last layer launches."""
        layer = self.network.layers[-1]
        outputs = [tuple(layer.get_output(index).shape) for index in range(layer.plugin.num_outputs)]
        instance = layer.plugin.instance
        *_, step = instance.plan(instance.measure([tuple(one.shape) for one in layer.inputs], outputs)).steps
        return step

    def given(self, function: AttentionFunction, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs for the keywords: tensors of the network for arrays, and those numbers that no shape tells."""
        wanted = [one.name for one in UserFunction.of(function.__pyfmha__()).given()]
        return {
            name: self.tensor(name, KINDS_OF[str(inputs[name].dtype)], *inputs[name].shape)
            if isinstance(inputs[name], np.ndarray)
            else inputs[name]
            for name in wanted
        }


def values_of(step: Step, names: Sequence[str]) -> dict[str, Any]:
    """The last arguments of a launch."""
    return dict(zip(names, step.arguments[-len(names) :], strict=True))


@pytest.mark.parametrize("name", SHIPPED_FUNCTIONS)
def test_those_that_come_along_are_launched_with_the_numbers_of_their_examples(name: str) -> None:
    """Those that shapes tell among them; and each tensor where it is."""
    function, net = SHIPPED_FUNCTIONS[name], Net()
    inputs = function.example(2, HEADS, 64, 64)
    kind = "score" if function.score is not None else "mask"
    given = net.given(function, inputs)
    out = net.add(Held([function]), **{kind: function, f"{kind}_inputs": list(given.values())})
    assert tuple(out.shape) == (2, HEADS, 64, SIZE)

    step, names = net.step(), [name for name, _ in (*ARGUMENTS, *Declared.of(function).arguments)]
    assert step.function == f"fmha_with_{name}_d32_fp16"
    found = values_of(step, names)
    tensors = [one.name for one in net.network.layers[-1].inputs]
    for one, kind in function.inputs:
        if kind.startswith("*"):
            assert tensors[found[one].index] == one
        else:
            assert found[one] == inputs[one]


OWN = own_functions()


@pytest.mark.parametrize(
    ("options", "lists"),
    [
        ({}, (2, 1)),
        ({"mask": (1, HEADS, 1, 300)}, (2, HEADS)),
        ({"mask": (2, 1, 150, 300)}, (2, 1)),
        ({"ragged": True}, (1, 1)),
    ],
)
def test_lists_of_blocks_are_written_before_attention(options: dict[str, Any], lists: tuple[int, int]) -> None:
    """As many as are told apart; with memory for each tile of 128 queries and each block of as many keys."""
    net, library = Net(150, 300), Held([SHIPPED_FUNCTIONS["groups"]])
    groups, numbers = SHIPPED_FUNCTIONS["groups"], net.tensor("numbers", DataType.INT32, 2, 300)
    shown = net.tensor("shown", DataType.BOOL, *options["mask"]) if "mask" in options else None
    mask: Any = groups if shown is None else (shown, groups)
    if "ragged" in options:
        net.qkv = {name: net.tensor(name, DataType.HALF, 150, HEADS, SIZE) for name in "qkv"}
        begins = net.tensor("begins", DataType.INT32, 3)
        net.add(library, mask=mask, mask_inputs=[numbers], cu_seqlens_q=begins, cu_seqlens_kv=begins)
    else:
        net.add(library, mask=mask, mask_inputs=[numbers])
    layer = net.network.layers[-1]
    outputs = [tuple(layer.get_output(0).shape)]
    plan = layer.plugin.instance.plan(layer.plugin.instance.measure([tuple(x.shape) for x in layer.inputs], outputs))
    assert [step.function for step in plan.steps] == [
        f"fmha_{what}_groups_d32_fp16" for what in ("flags", "blocks", "with")
    ]
    tiles, blocks = (2 + 3, 2) if "ragged" in options else (2, 3)
    for step in plan.steps:
        found = values_of(step, ("numbers", "tokens", "Blocks", "list_batches", "list_heads"))
        assert (found["list_batches"], found["list_heads"], found["tokens"]) == (*lists, 300)
        assert (found["Blocks"].source, found["Blocks"].offset) == ("workspace", 0)
    needed = 4 * lists[0] * lists[1] * tiles * (2 + 2 * blocks)
    assert needed <= plan.workspace_bytes < needed + 256


@pytest.mark.parametrize("how", ["apart", "by name", "together", "names", "its name"])
def test_a_score_and_a_mask_function_together(how: str) -> None:
    net, library = Net(16, 24), Held([OWN.soft_near, OWN.near])
    caps = net.tensor("caps", DataType.FLOAT, HEADS)
    given: dict[str, Any] = {
        "apart": {"score": OWN.soft, "score_inputs": [caps], "mask": OWN.near, "mask_inputs": [9]},
        "by name": {
            "score": OWN.soft, "score_inputs": {"caps": caps}, "mask": OWN.near, "mask_inputs": {"width": np.int64(9)},
        },
        "together": {"score": OWN.soft_near, "score_inputs": [caps, 9]},
        "names": {"score": "soft", "score_inputs": {"caps": caps}, "mask": "near", "mask_inputs": {"width": 9}},
        "its name": {"score": "soft_near", "score_inputs": (caps, 9)},
    }[how]  # fmt: skip
    net.add(library, **given)
    step = net.step()
    assert step.function == "fmha_with_soft_near_d32_fp16"
    found = values_of(step, ("caps", "width"))
    assert net.network.layers[-1].inputs[found["caps"].index] is caps
    assert found["width"] == 9


def test_with_everything_else() -> None:
    """A bias, a mask tensor beside a mask function, sinks, lengths, other values, and what they are launched with."""
    net = Net(16, 24)
    tensors = {
        "bias": net.tensor("bias", DataType.FLOAT, HEADS, 1, 24), "sinks": net.tensor("sinks", DataType.HALF, HEADS),
        "kv_lengths": net.tensor("kv_lengths", DataType.INT32, 2),
    }  # fmt: skip
    shown = net.tensor("mask", DataType.BOOL, 2, 1, 1, 24)
    options: dict[str, Any] = {"window": (5, -1), "softcap": 20.0, "align": "bottom-right", "return_lse": True}
    mask = (shown, OWN.near)
    out, lse = net.add(Held([OWN.near]), causal=True, mask=mask, mask_inputs=[9], **tensors, **options)
    assert (tuple(out.shape), tuple(lse.shape)) == ((2, HEADS, 16, SIZE), (2, HEADS, 16))

    found = values_of(net.step(), [*(name for name, _ in ARGUMENTS), "width"])
    inputs = net.network.layers[-1].inputs
    pointers = {
        "BiasFp32": tensors["bias"],
        "Mask": shown,
        "Sinks": tensors["sinks"],
        "kv_lengths": tensors["kv_lengths"],
    }
    assert all(inputs[found[name].index] is tensor for name, tensor in pointers.items())
    assert [found[name].source for name in ("Bias", "SinksFp32", "q_lengths")] == ["null"] * 3
    assert [found[name] for name in ("window_left", "softcap", "bottom_right", "width")] == [5, 20.0, 1, 9]


def test_in_one_tensor_and_in_ragged_batches() -> None:
    library, slopes = (
        Held([SHIPPED_FUNCTIONS["alibi"], SHIPPED_FUNCTIONS["documents"]]),
        ("slopes", DataType.FLOAT, HEADS),
    )
    net = Net()
    qkv = net.tensor("qkv", DataType.HALF, 2, 64, 3, HEADS, SIZE)
    inputs = [net.tensor(*slopes)]
    add_attention_packed(net.network, qkv, HEADS, causal=True, score="alibi", score_inputs=inputs, library=library)
    assert net.step().function == "fmha_with_alibi_d32_fp16"

    ragged = {name: net.tensor(name, DataType.HALF, 100, HEADS, SIZE) for name in "qkv"}
    begins = net.tensor("cu", DataType.INT32, 3)
    more = {"cu_seqlens_q": begins, "cu_seqlens_kv": begins, "causal": True, "library": library}
    tables = [net.tensor(name, DataType.INT32, 2, 70) for name in ("begins", "ends")]
    # 100 tokens in all; how long the longest sequence is, nobody but the device knows.
    add_attention(net.network, **ragged, **more, mask="documents", mask_inputs=tables)
    assert values_of(net.step(), ("begins", "ends", "tokens"))["tokens"] == 70


def refused(error: type[Exception], message: str, *functions: AttentionFunction, **options: Any) -> None:
    with pytest.raises(error, match=message):
        Net().add(Held(functions), **options)


def test_inputs_that_do_not_fit_are_named() -> None:
    net, natten, alibi = Net(), SHIPPED_FUNCTIONS["natten"], SHIPPED_FUNCTIONS["alibi"]
    documents, slopes = SHIPPED_FUNCTIONS["documents"], net.tensor("slopes", DataType.FLOAT, HEADS)
    tables = [net.tensor(name, DataType.INT32, 2, 40) for name in ("begins", "ends")]

    def check(message: str, function: AttentionFunction, *given: Any, **named: Any) -> None:
        kind = "mask" if function.score is None else "score"
        refused(PluginError, message, function, **{kind: function, f"{kind}_inputs": named or given})

    check(r"mask_inputs has 2; natten takes height, width, window", natten, 8, 8)
    check(r"missing: window", natten, height=8, width=8)
    check(r"mask_inputs has tokens; documents takes begins, ends \(tokens follows from shapes\)", documents, tokens=64)
    check(r"natten: input window is of type str; it must be a number \(int32\)", natten, 8, 8, "x")
    check(r"natten_window is 1.5; it must be int32", natten, 8, 8, 1.5)
    check(r"natten_window is 4294967296; it must be int32", natten, 8, 8, 1 << 32)
    check(r"natten requires window <= width; here window is 9, width is 8", natten, 16, 8, 9)
    check(r"alibi: input slopes is of type ndarray; it must be an ITensor of FLOAT: an input of .*add_constant", alibi,
          np.ones(HEADS, np.float32))  # fmt: skip
    check(r"alibi: input slopes is of type HALF; it must be FLOAT", alibi, net.tensor("s", DataType.HALF, HEADS))
    check(r"alibi_slopes has heads 5, the plugin was created for 4", alibi, net.tensor("s", DataType.FLOAT, 5))
    refused(PluginError, "score_inputs are given, and no score function", alibi, score_inputs=[slopes])
    refused(PluginError, "score_inputs is of type str; give a list", alibi, score=alibi, score_inputs="slopes")
    refused(PluginError, "score is of type int; give a function that is decorated", alibi, score=3)
    refused(PluginError, "natten is a mask function; give it as mask=natten", natten, score=natten)
    refused(PluginError, "alibi is a score function; give it as score=alibi", alibi, mask=alibi)
    refused(PluginError, "soft_near is a score and a mask function together; give it as score$", OWN.soft_near,
            mask=OWN.soft_near)  # fmt: skip
    refused(PluginError, "give one of each at the most", natten, mask=(natten, OWN.near))
    # What shapes alone tell: a load beyond the tables.
    net.add(Held([documents]), mask=documents, mask_inputs=tables)
    with pytest.raises(PluginError, match="documents requires tokens >= queries; here tokens is 40, queries is 64"):
        net.step()
    # And offsets that int32 does not hold.
    net, positions = Net(), SHIPPED_FUNCTIONS["relative_positions"]
    tables = [net.tensor("by", DataType.FLOAT, 2, HEADS, 1 << 16, size) for size in (1 << 12, 1 << 4)]
    net.add(Held([positions]), score=positions, score_inputs=tables)
    with pytest.raises(PluginError, match=r"requires batch \* heads \* height \* width \* height <= 2147483647; here"):
        net.step()


def test_an_input_that_both_functions_take_is_given_once() -> None:
    @score_function
    def one(score, batch, head, query, key, reach):
        return score + reach

    @mask_function
    def other(batch, head, query, key, reach):
        return key < reach

    both = pyfmha.functions.score_and_mask("both", one, other)
    net = Net()
    net.add(Held([both]), score=one, score_inputs=[3], mask=other, mask_inputs=[3])
    assert values_of(net.step(), ["reach"]) == {"reach": 3}
    with pytest.raises(PluginError, match="input reach is in score_inputs and in mask_inputs; give one"):
        net.add(Held([both]), score=one, score_inputs=[3], mask=other, mask_inputs=[4])


def test_what_the_library_lacks_is_told_with_its_command() -> None:
    alibi, natten = SHIPPED_FUNCTIONS["alibi"], SHIPPED_FUNCTIONS["natten"]
    end = "--dtype fp16 --head-size 32 -o /some$"
    refused(LibraryError, rf"no plugin with the function alibi:\w+; it has: natten. .* --functions alibi {end}", natten,
            score=alibi)  # fmt: skip
    refused(LibraryError, rf"it has: none. Build it: pyfmha build --functions {OWN.__file__} {end}", score=OWN.soft)
    pair = (
        r"from a file alibi_natten.py that imports both and has alibi_natten = pyfmha.score_and_mask\('alibi_natten', a"
    )
    refused(LibraryError, rf"{pair}libi, natten\): .*--functions alibi_natten.py {end}", alibi, natten, score=alibi,
            mask=natten)  # fmt: skip

    net = Net()
    net.qkv = {name: net.tensor(name, DataType.BF16, 2, HEADS, 8, SIZE) for name in "qkv"}
    with pytest.raises(
        LibraryError, match=f"fmha_with_soft_d32_bf16; add it: .*--functions {OWN.__file__} --dtype bf16"
    ):
        net.add(Held([OWN.soft]), score=OWN.soft, score_inputs=[net.tensor("caps", DataType.FLOAT, HEADS)])
    first, second = (scaled_by(factor) for factor in (1.0, 2.0))
    message = r"holds scaled:\w+, this is scaled:\w+, of another source .*; build the library again: pyfmha build"
    refused(LibraryError, message, first, score=second)
    Net().add(Held([first]), score=scaled_by(1.0))


def scaled_by(factor: float) -> AttentionFunction:
    @score_function
    def scaled(score, batch, head, query, key):
        return score * factor

    found: AttentionFunction = scaled
    return found


LEAST = {"num_heads": HEADS, "head_size": SIZE, "type_id": int(DataType.HALF), "softmax_scale": 0.25}


def test_an_engine_of_another_version_of_the_function_is_refused_by_name(
    attention_path: Path, fake_cuda: FakeCuda
) -> None:
    """Of another body, by the digest that it keeps; of other inputs, by their fields. In both plugins."""
    held = {operator.name: operator for operator in Library(attention_path).operators}
    pair = Pair(attention_path, fake_cuda, held[f"{NAME}_alibi"])
    plugins = pair.create(fields_of(pair.operator, LEAST))
    assert plugins is not None
    stored = pair.stored(plugins)
    assert pair.create(stored, RUNTIME) is not None
    old = text("score_function", "alibi:0123456789abcdef")

    assert pair.create([old if field.name == old.name else field for field in stored], RUNTIME) is None
    found = pair.c.error()
    assert "this engine or model has the score function alibi:0123456789abcdef; the library holds alibi:" in found
    assert found.endswith("pyfmha build --functions alibi --dtype fp16 --head-size 32")
    assert pair.create([*stored, number("alibi_width", INT32, 3)], RUNTIME) is None
    assert "unknown field 'alibi_width'; allowed are num_heads" in pair.c.error()
    assert pair.c.error().endswith("build the engine again, or use the library that it was built with")
    assert pair.create([field for field in stored if field.name != "num_heads"], RUNTIME) is None
    assert "missing field num_heads; needed are num_heads" in pair.c.error()
    assert pair.c.error().endswith("build the engine again, or use the library that it was built with")


def test_a_library_without_the_head_size_says_how_to_build_it(attention_path: Path, fake_cuda: FakeCuda) -> None:
    held = {operator.name: operator for operator in Library(attention_path).operators}
    pair = Pair(attention_path, fake_cuda, held[f"{NAME}_soft_near"])
    assert pair.create(fields_of(pair.operator, {**LEAST, "head_size": 100, "soft_near_width": 3})) is None
    assert "does not hold fmha_with_soft_near_d128_fp16, which serves fp16, 4 heads of size 100" in pair.c.error()
    command = "Add it: pyfmha build --functions functions_of_tests.py --dtype fp16 --head-size 128"
    assert f"{command} -o {attention_path.parent}" in pair.c.error()


def test_registering_attention_registers_it_with_functions(attention_path: Path) -> None:
    trt = make_binding()
    register(trt, library=attention_path)
    registry = trt.get_plugin_registry()
    assert all(registry.get_creator(f"{NAME}_{name}", "1", "") is not None for name in NAMES)
    # A layer without a library named goes by the one that is registered.
    net = Net()
    net.network = trt.INetworkDefinition()
    net.add(None, causal=True, score="alibi", score_inputs=[net.tensor("slopes", DataType.FLOAT, HEADS)])  # type: ignore[arg-type]
    assert net.step().function == "fmha_with_alibi_d32_fp16"

    said = f"Cannot find plugin: {NAME}_t5, version: 1, namespace:."
    assert unregistered(trt, [said]) == (
        f"it was built with the function t5, which {attention_path} has not (it has: {', '.join(NAMES)}); build it from"
        f" the function's file: pyfmha build --functions t5.py -o {attention_path.parent}"
    )


def test_types_that_tensorrt_has_not() -> None:
    @score_function(inputs={"table": "*fp64"})
    def doubled(score, batch, head, query, key, table):
        return score

    @score_function(inputs={"factor": "fp64"})
    def scaled(score, batch, head, query, key, factor):
        return score

    with pytest.raises(
        SpecError, match=r"doubled can be no plugin of TensorRT's: input table is \*fp64, .* it has \*fp"
    ):
        Held([doubled])
    with pytest.raises(SpecError, match="scaled can be no plugin of TensorRT's: input factor is fp64; attributes are"):
        Held([scaled])
    declared = [Declared.of(function) for function in (doubled, scaled, SHIPPED_FUNCTIONS["natten"])]
    held = [
        replace(one, function=UserFunction.of(f.__pyfmha__()))
        for one, f in zip(declared, (doubled, scaled, SHIPPED_FUNCTIONS["natten"]), strict=True)
    ]
    operators, notes = function_operators(held)
    assert [operator.name for operator in operators] == [f"{NAME}_natten"]
    assert all(note.endswith("it is a function of the library only") for note in notes)
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("inputs", "requires", "message"),
    [
        ({"table": "*fp32[rows + more]"}, (), "axis rows \\+ more of input table reads more; an axis is made of batch"),
        ({"rows": "i32[4]"}, (), r"input rows cannot be i32\[4\]: a number has no shape; a pointer begins with \*"),
        ({"table": "*fp32[rows,, 2]"}, (), r"write the axes as '\*fp32\[batch, tokens\]'"),
        ({"table": f"*fp32[{', '.join('1' * 9)}]"}, (), r"a tensor has 1 to 8 axes"),
        ({"table": "*fp32[rows]"}, ("rows >",), "tabled requires 'rows >', which is no condition"),
        (
            {"table": "*fp32[rows]"},
            ("rows > more",),
            "tabled requires 'rows > more', which reads more; it may read batch",
        ),
        ({"table": "*fp32[rows]"}, "rows > 1", "requires is 'rows > 1'; give a tuple of conditions"),
        ({"table": "*fp32[rows]"}, ("floor(rows) > 1",), r"floor"),
    ],
)
def test_what_a_function_says_of_its_inputs_is_checked(inputs: Any, requires: Any, message: str) -> None:
    def tabled(score, batch, head, query, key, table, rows):
        return score

    with pytest.raises(SpecError, match=message):
        Held([score_function(tabled, inputs=inputs, requires=requires)])


def test_shapes_may_be_of_everything_that_attention_knows() -> None:
    @score_function(
        inputs={"table": "*fp32[batch, heads, 2 * queries - 1, keys + rows]", "rows": "i32"},
        requires=("min(queries, keys) > rows", "max(rows, 1) < heads"),
    )
    def shaped(score, batch, head, query, key, table, rows, queries, keys):
        return score

    net, library = Net(16, 24), Held([shaped])
    net.add(library, score=shaped, score_inputs=[net.tensor("table", DataType.FLOAT, 2, HEADS, 31, 26), 2])
    assert values_of(net.step(), ("rows", "queries", "keys")) == {"rows": 2, "queries": 16, "keys": 24}
    table = net.tensor("other", DataType.FLOAT, 2, HEADS, 33, 26)
    net.add(library, score=shaped, score_inputs=[table, 2])
    with pytest.raises(PluginError, match="the axis queries of inputs of shaped is 17; there are 16 queries"):
        net.step()
    with pytest.raises(PluginError, match=r"shaped requires max\(rows, 1\) < heads; here rows is 4, heads is 4"):
        net.add(library, score=shaped, score_inputs=[table, 4])


@pytest.fixture
def functions_gpu(attention_plugin_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A fake GPU that knows the stand-ins of the users' functions."""
    gpu.learn(attention_plugin_path.with_name("manifest.json"))
    gpu.formulas |= {"alibi": alibi_of, "soft_near": soft_near_of}
    monkeypatch.setenv("PYFMHA_LIBRARY", str(attention_plugin_path))
    return gpu


def drawn() -> dict[str, Any]:
    chance = np.random.default_rng(0)
    found = {name: chance.standard_normal((2, HEADS, 9, SIZE)).astype(np.float16) for name in "QKV"}
    return found | {"slopes": np.float32([0.5, 0.25, 0.125, 0.0625]), "caps": np.float32([2, 5, 1, 9])}


def expected(values: dict[str, Any], function: str, **options: Any) -> Any:
    formulas = {"alibi": alibi_of, "soft_near": soft_near_of}[function]
    held = {"slopes": values["slopes"], "caps": values["caps"], "num_heads": HEADS, "width": 3}
    made = formulas(lambda array, *_: array, held)
    return attend(*(values[name] for name in "QKV"), sm_scale=SIZE**-0.5, **made, **options)[0]


@pytest.mark.parametrize("function", ["alibi", "soft_near"])
def test_an_engine_with_a_function_gives_its_numbers(trt11: Any, functions_gpu: Gpu, function: str) -> None:
    """From the network to the result, through the plugin in Python, an engine and a session of another process."""
    values = drawn()
    inputs = {"alibi": ["slopes"], "soft_near": ["caps", 3]}[function]
    names = [*"QKV", *(name for name in inputs if isinstance(name, str))]

    def define(network: Any) -> None:
        kinds = {name: trt11.DataType.HALF if name in "QKV" else trt11.DataType.FLOAT for name in names}
        made = {name: network.add_input(name, kind, values[name].shape) for name, kind in kinds.items()}
        given = [made.get(one, one) for one in inputs]
        out = add_attention(network, *(made[n] for n in "QKV"), causal=True, score=function, score_inputs=given)
        out.name = "Out"
        network.mark_output(out)

    plan = build_plan(trt11, define, {}).plan
    with Session(plan, trt_module=trt11) as session:
        found = session.run({name: values[name] for name in names})["Out"]
    assert relative_error(found.astype(np.float64), expected(values, function, window_right=0)) < 1e-3


ENGINE: dict[str, Any] = {
    "num_heads": HEADS, "head_size": SIZE, "max_batch_size": 2, "max_seq_len": 9, "causal": False,
}  # fmt: skip


@pytest.mark.parametrize("how", ["alibi", "pair", "names"])
def test_an_engine_of_a_configuration_with_functions(trt11: Any, functions_gpu: Gpu, how: str, tmp_path: Path) -> None:
    """Also from its file, of functions themselves or of their names."""
    caps: dict[str, Any] = {"width": 3, "caps": [HEADS]}
    functions: dict[str, Any] = {
        "alibi": {"score": SHIPPED_FUNCTIONS["alibi"]},
        "pair": {"score": OWN.soft, "mask_function": OWN.near, "function_inputs": caps},
        "names": {"score": "soft_near", "function_inputs": caps},
    }[how]
    config = EngineConfig(**ENGINE, **functions)
    built = build_engine(config, trt_module=trt11)
    save_engine(built, config, tmp_path)
    assert read_engine(tmp_path).config == config
    values, name = drawn(), "alibi" if how == "alibi" else "soft_near"
    own = {"alibi_slopes": values["slopes"]} if how == "alibi" else {"soft_near_caps": values["caps"]}
    with Session(built.plan, trt_module=trt11) as session:
        assert [info.name for info in session.inputs] == [*"QKV", *own]
        for batch, tokens in ((2, 9), (1, 5)):
            part = {**values, **{one: values[one][:batch, :, :tokens] for one in "QKV"}}
            found = session.run({**{one: part[one] for one in "QKV"}, **own})["Out"]
            assert relative_error(found.astype(np.float64), expected(part, name)) < 1e-3


def test_the_inputs_of_a_configuration_have_the_shapes_that_functions_say() -> None:
    @score_function(
        inputs={"table": "*fp32[batch, heads, 2 * queries - 1, keys + rows]", "rows": "i32"},
    )
    def shaped(score, batch, head, query, key, table, rows, queries, keys):
        return score

    config = EngineConfig(**ENGINE, max_kv_seq_len=20, score=shaped, function_inputs={"rows": 2})
    table = OwnInput("FLOAT", (1, HEADS, 1, 3), (2, HEADS, 17, 22))
    assert own_inputs(config, Held([shaped])) == ({"shaped_table": table}, {"table": "shaped_table"}, {"rows": 2})

    documents = SHIPPED_FUNCTIONS["documents"]
    config = EngineConfig(**ENGINE, mask_function=documents, function_inputs={"tokens": 30})
    found = own_inputs(config, Held([documents])).tensors
    assert found == dict.fromkeys(("documents_begins", "documents_ends"), OwnInput("INT32", (1, 30), (2, 30)))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("function_inputs lack width, numbers that soft_near takes", {"score": "soft_near"}),
        (r"lack the shape of caps, .*: give function_inputs=\{'caps': \(sizes", {
            "score": "soft_near", "function_inputs": {"width": 3}}),
        ("have more, which soft_near does not take", {
            "score": "soft_near", "function_inputs": {"width": 3, "caps": [4], "more": 2}}),
        ("lack tokens, the size of an axis of documents's tensors", {"mask_function": "documents"}),
        (r"have the shape of begins; documents says it: \[batch, tokens\]", {
            "mask_function": "documents", "function_inputs": {"begins": [2, 3], "tokens": 3}}),
        ("soft_near_width is 1.5; it must be int32", {"score": "soft_near", "function_inputs": {"width": 1.5}}),
        (r"function_inputs are given \(width\), and no function; give score= or mask_function=", {
            "function_inputs": {"width": 3}}),
        ("near is a mask function; give it as mask_function=near", {"score": OWN.near}),
        ("layer 'tensorrt' does not serve score", {"score": "soft_near", "layer": "tensorrt"}),
    ],
)  # fmt: skip
def test_a_configuration_that_does_not_fit_is_refused(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match=message):
        own_inputs(EngineConfig(**ENGINE, **options), Held([OWN.soft_near, SHIPPED_FUNCTIONS["documents"]]))


def test_a_configuration_whose_function_the_library_lacks_is_told_the_command_with_its_file() -> None:
    config = EngineConfig(**ENGINE, mask_function=OWN.near, function_inputs={"width": 3})
    with pytest.raises(LibraryError, match=rf"the function near:\w+; .* --functions {OWN.__file__} --dtype fp16"):
        own_inputs(config, Held([OWN.soft_near]))


def test_a_session_without_an_engine(functions_gpu: Gpu, trt11: Any) -> None:
    values = drawn()
    inputs = {name: values[name] for name in "QKV"}
    options: dict[str, Any] = {"num_heads": HEADS, "head_size": SIZE, "causal": False, "trt_module": trt11}
    with DirectSession(**options, score=OWN.soft_near, numbers={"width": 3}) as session:
        out = session.run({**inputs, "soft_near_caps": values["caps"]})["Out"]
        assert relative_error(out.astype(np.float64), expected(values, "soft_near")) < 1e-3
        with pytest.raises(SpecError, match=r"inputs are Q, K, V; give Q, K, V, soft_near_caps"):
            session.run(inputs)
        with pytest.raises(SpecError, match="soft_near_caps is int32"):
            session.run({**inputs, "soft_near_caps": values["caps"].astype(np.int32)})
        with pytest.raises(SpecError, match=r"the shape of soft_near_caps is not told by batch and lengths; run\(\)"):
            session.prepare(2, 9)
    with pytest.raises(PluginError, match="numbers are missing; soft_near takes width"):
        DirectSession(**options, score=OWN.soft_near)
    with pytest.raises(PluginError, match=r"numbers are given \(width\), and no function"):
        DirectSession(**options, numbers={"width": 3})


def test_the_guide_lists_what_those_that_come_along_take() -> None:
    guide = (Path(pyfmha.functions.__file__).with_name("README.md")).read_text()
    rows = dict(re.findall(r"^\| `(\w+)`.* \| ([\w, ]+) \|$", guide, re.MULTILINE))
    for name, function in SHIPPED_FUNCTIONS.items():
        given = [one.name for one in UserFunction.of(function.__pyfmha__()).given()]
        assert rows[name if name in rows else name.partition("_")[0]] == (", ".join(given) or "nothing")
