"""A plugin of an operator: attributes, tensors that may be there, types, launches, workspace, options."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pyfmha.errors import PluginError
from pyfmha.operators.attributes import checked
from pyfmha.operators.description import DATA_TYPES, Attribute, Check, Launch, Operator, Option, Part, Tensor, Types
from pyfmha.operators.instance import Instance
from pyfmha.operators.plan import Plan, Pointer
from pyfmha.operators.program import program_of

COPY = Launch({"x": "X", "y": "Y", "n": "rows * cols"}, kernel="copy")


def operator(**changes: Any) -> Operator:
    usual: dict[str, Any] = {
        "name": "Op",
        "inputs": {"X": "fp32[rows, cols]"},
        "outputs": {"Y": "fp32[rows, cols]"},
        "launches": [COPY],
    }
    return Operator(**{**usual, **changes})


def made(changes: dict[str, Any], **given: Any) -> Instance:
    return Instance(program_of(operator(**changes)), given)


def planned(instance: Instance, *shapes: tuple[int, ...], **options: Any) -> Plan:
    count = len(instance.forms([len(shape) for shape in shapes]).inputs)
    return instance.plan(instance.measure(shapes[:count], shapes[count:], **options))


# ---------------------------------------------------------------- attributes

ATTRIBUTES: dict[str, Any] = {
    "n": Attribute("int32", minimum=1),
    "twice": Attribute("int64", "2 * n"),
    "scale": Attribute("fp32", 0.5, minimum=0, maximum=1),
    "mode": Attribute("string", "tanh", choices=("tanh", "erf")),
    "other": Attribute("string", "='exact' if mode == 'erf' else 'near'"),
    "steps": Attribute("int32[]", "[1, 2]", minimum=0, maximum=9),
    "level": Attribute("int32", 1, choices=(1, 2, 4)),
}


def test_defaults() -> None:
    found = made({"attributes": ATTRIBUTES}, n=3)
    assert found.attributes == {
        "n": 3, "twice": 6, "scale": 0.5, "mode": "tanh", "other": "near", "steps": (1, 2), "level": 1,
    }  # fmt: skip
    assert found.given == {"n"}
    assert made({"attributes": ATTRIBUTES}, n=3, twice=1, mode="erf").attributes["other"] == "exact"
    assert str(found) == "n 3, twice 6, scale 0.5, mode tanh, other near, level 1"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "missing attribute n"),
        ({"n": 0}, "n is 0; give 1 or more"),
        ({"n": 1, "scale": 1.5}, "scale is 1.5; allowed are 0 to 1"),
        ({"n": 1, "scale": float("nan")}, "scale is nan; allowed are 0 to 1"),
        ({"n": 1, "mode": "relu"}, "mode is 'relu'; allowed are tanh, erf"),
        ({"n": 1, "steps": (1, 10)}, r"steps\[1\] is 10; allowed are 0 to 9"),
        ({"n": 1, "level": 3}, "level is 3; allowed are 1, 2, 4"),
    ],
)
def test_values_that_are_not_allowed(given: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=f"^{message}"):
        made({"attributes": ATTRIBUTES}, **given)


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("n", np.int64(3), 3),
        ("n", np.array(3, np.uint8), 3),
        ("n", np.bool_(True), 1),
        ("scale", np.float32(0.5), 0.5),
        ("scale", np.int8(1), 1.0),
        ("scale", float("inf"), float("inf")),
        ("scale", float(np.finfo(np.float32).max), float(np.finfo(np.float32).max)),
        ("steps", np.array([1, 2], np.int32), (1, 2)),
        ("steps", range(2), (0, 1)),
    ],
)
def test_values_as_numpy_has_them(name: str, given: Any, wanted: Any) -> None:
    found = checked(program_of(operator(attributes=ATTRIBUTES)), {name: given})[name]
    assert (found, type(found)) == (wanted, type(wanted))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("steps", 1, r"^steps is 1; it must be int32\[\]$"),
        ("steps", None, r"^steps is None; it must be int32\[\]$"),
        ("steps", "12", r"^steps is '12'; it must be int32\[\]$"),
        ("steps", np.ones((2, 2), np.int32), r"^steps is array"),
        ("n", 1 << 31, "^n is 2147483648; it must be int32$"),
        ("n", 1.0, "^n is 1.0; it must be int32$"),
        ("scale", 1e39, "^scale is larger than fp32 holds: give up to 3.4e38 in size$"),
        ("scale", -(10**400), "^scale is larger than fp32 holds"),
        ("mode", b"tanh", "^mode is b'tanh'; it must be string$"),
    ],
)
def test_values_of_other_types(name: str, given: Any, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        checked(program_of(operator(attributes=ATTRIBUTES)), {name: given})


def test_an_empty_list_is_a_list() -> None:
    changes = {
        "attributes": {"steps": "int32[]"},
        "launches": [replace(COPY, arguments={"x": "X", "n": "len(steps)", "m": "steps[0] if len(steps) else 7"})],
    }
    assert planned(made(changes, steps=()), (1, 2), (1, 2)).steps[0].arguments[1:] == (0, 7)
    assert planned(made(changes, steps=(5, 6)), (1, 2), (1, 2)).steps[0].arguments[1:] == (2, 5)


def test_a_default_that_overflows() -> None:
    with pytest.raises(PluginError, match="overflows 64 bits"):
        made({"attributes": {"n": "int64", "m": "int64 = n * n"}}, n=1 << 40)


def test_what_an_engine_stores() -> None:
    changes = {
        "attributes": {
            "a": Attribute("int32", stores="min(a, 1)"),
            "b": Attribute("int32", 5, stored="given(b) or a > 1"),
        }
    }
    assert made(changes, a=1).stored_attributes() == {"a": 1}
    assert made(changes, a=2).stored_attributes() == {"a": 1, "b": 5}
    assert made(changes, a=1, b=5).stored_attributes() == {"a": 1, "b": 5}


def test_checks_come_as_soon_as_their_values() -> None:
    changes = {
        "attributes": {"n": "int32"},
        "define": {"half": "12 / n", "area": "rows * cols"},
        "checks": [
            Check("area <= 12", "{area} elements; at most 12"),
            Check("half > 1", "half is {half}"),
            Check("n != 0", "n is {n}"),  # before the division by it
        ],
    }
    with pytest.raises(PluginError, match=r"^n is 0$"):
        made(changes, n=0)
    with pytest.raises(PluginError, match=r"^half is 1$"):
        made(changes, n=12)
    assert planned(made(changes, n=3), (3, 4), (3, 4)).steps
    with pytest.raises(PluginError, match=r"^15 elements; at most 12$"):
        planned(made(changes, n=3), (3, 5), (3, 5))


# ---------------------------------------------------------------- tensors

OPTIONAL: dict[str, Any] = {
    "attributes": {"biased": "int32 = 0", "sums": "int32 = 0"},
    "inputs": {"X": "fp32[rows, cols]", "Bias": "fp32[cols] when biased"},
    "outputs": {"Y": "fp32[rows, cols]", "Sums": "fp32[rows] when sums == 2"},
    "launches": [replace(COPY, arguments={"x": "X", "b": "Bias", "s": "Sums + 8", "y": "Y", "n": "numel(Bias)"})],
}


def test_tensors_that_may_be_there() -> None:
    without, both = made(OPTIONAL), made(OPTIONAL, biased=1, sums=2)
    assert [form.name for form in without.forms().all] == ["X", "Y"]
    assert [form.name for form in both.forms().all] == ["X", "Bias", "Y", "Sums"]
    x, y, null = Pointer("input", 0), Pointer("output", 0), Pointer("null")
    assert planned(without, (2, 3), (2, 3)).steps[0].arguments == (x, null, null, y, 0)
    found = planned(both, (2, 3), (3,), (2, 3), (2,))
    assert found.steps[0].arguments == (x, Pointer("input", 1), Pointer("output", 1, 8), y, 3)
    assert (found.num_inputs, found.num_outputs) == (2, 2)
    assert found.sizes == "X [2, 3], Bias [3], Y [2, 3], Sums [2]"


def test_values_of_shape_inputs() -> None:
    changes = {
        "inputs": {"S": "shape[2]", "X": "fp32[cols]"},
        "outputs": {"Y": "fp32[S[0], S[1], cols]"},
        "launches": [replace(COPY, arguments={"x": "X", "y": "Y", "rows": "S[0]", "n": "S[0] * S[1]"})],
    }
    found = made(changes)
    assert [form.name for form in found.forms().inputs] == ["X"]
    assert found.forms().shapes == (("S", 2),)
    assert planned(found, (5,), (3, 4, 5)).steps[0].arguments[2:] == (3, 12)
    # TensorRT gives the shape input's descriptor too, behind the others; it is not looked at.
    scope = found.measure([(5,), (2,)], [(3, 4, 5)])
    assert scope.values["S"] == (3, 4)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("size(X, 1)", 4),
        ("stride(X, 0)", 4),
        ("stride(X, 1)", 1),
        ("numel(X)", 12),
        ("itemsize(T)", 2),
        ("itemsize(fp32) * rows", 12),
        ("cdiv(rows, 2) if itemsize(T) == 2 else 0", 2),
    ],
)
def test_what_arguments_may_ask(text: str, wanted: int) -> None:
    changes = {
        "inputs": {"X": "T[rows, cols]"},
        "types": {"T": ("fp16", "fp32")},
        "launches": [replace(COPY, arguments={"x": "X", "n": text})],
    }
    found = made(changes).with_types({"T": "fp16"})
    assert planned(found, (3, 4), (3, 4)).steps[0].arguments[1] == wanted


# ---------------------------------------------------------------- types

FP32, FP16, INT32, BF16 = (DATA_TYPES[name] for name in ("fp32", "fp16", "int32", "bf16"))


def test_tied_types() -> None:
    changes = {
        "inputs": {"X": "T[rows, cols]", "Z": "T[cols]", "I": "int32[rows]"},
        "outputs": {"Y": "T[rows, cols]", "L": "fp32[rows]"},
        "types": {"T": ("fp16", "fp32")},
    }
    found = made(changes)
    assert found.types_for([FP16, FP16, INT32, FP16, FP32]) == {"T": "fp16"}
    assert found.main_functions() == found.needed_functions() == ("op_fp16", "op_fp32")
    assert found.launched_functions() == ()
    typed = found.with_types({"T": "fp16"})
    assert [form.type for form in typed.forms().all] == ["fp16", "fp16", "int32", "fp16", "fp32"]
    assert typed.main_functions() == typed.launched_functions() == ("op_fp16",)
    assert typed.with_types({"T": "fp16"}) is typed
    for kinds, message in (
        ([BF16], "X is of type BF16; T is one type of HALF, FLOAT in all tensors"),
        ([FP16, FP32], "Z is of type FLOAT; T is one type of HALF, FLOAT in all tensors"),
        ([99], "X is of type 99; T is one type"),
    ):
        with pytest.raises(PluginError, match=message):
            found.types_for(kinds)
    assert found.type_error(found.forms().inputs[2], FP32, {}) == "I is of type FLOAT; it must be INT32"


def test_types_that_are_not_tied() -> None:
    changes = {
        "inputs": {"X": "T[rows, cols]", "Z": "U[cols]"},
        "types": {"T": ("fp16", "fp32"), "U": ("fp16", "bf16")},
        "outputs": {"Y": "U[rows, cols]"},
    }
    found = made(changes)
    assert found.types_for([FP32, BF16, BF16]) == {"T": "fp32", "U": "bf16"}
    assert found.main_functions() == ("op_fp16_fp16", "op_fp16_bf16", "op_fp32_fp16", "op_fp32_bf16")
    assert found.with_types({"T": "fp32", "U": "bf16"}).main_functions() == ("op_fp32_bf16",)


def test_a_type_that_an_attribute_holds() -> None:
    changes = {
        "inputs": {"X": "T[rows, cols]"},
        "outputs": {"Y": "T[rows, cols]"},
        "types": {"T": Types(("fp16", "fp32"), "kind")},
        "attributes": {"kind": "int32"},
    }
    found = made(changes, kind=FP16)
    assert found.types == {"T": "fp16"}
    assert found.main_functions() == ("op_fp16",)
    with pytest.raises(PluginError, match=r"X is of type FLOAT; the plugin was created for HALF \(kind 1\)"):
        found.types_for([FP32])
    with pytest.raises(PluginError, match=r"kind is 7; allowed is int\(trt.DataType\): 0 \(FLOAT\), 1 \(HALF\)"):
        made(changes, kind=BF16)


# ---------------------------------------------------------------- launches and workspace


def test_launches_that_follow_one_another() -> None:
    changes = {
        "attributes": {"mode": "int32 = 0"},
        "workspace": [Part("A", "rows"), Part("B", "4 * cols", "mode == 1"), Part("C", "8")],
        "alignment": 64,
        "launches": [
            Launch({"x": "X", "a": "A"}, "mode != 2", kernel="first"),
            Launch({"a": "A", "b": "B + 4 * rows", "c": "C"}, "mode < 2 and rows > 1", kernel="second"),
            Launch({"c": "C", "y": "Y"}, "mode == 2", kernel="third"),
        ],
    }
    zero, one, two = (made(changes, mode=mode) for mode in range(3))
    plan = planned(one, (3, 5), (3, 5))
    part = [Pointer("workspace", 0, offset) for offset in (0, 64 + 12, 128)]
    assert [step.function for step in plan.steps] == ["op_0", "op_1"]
    assert [step.arguments for step in plan.steps] == [(Pointer("input"), part[0]), tuple(part)]
    assert [step.tuned for step in plan.steps] == [True, False]
    assert plan.workspace_bytes == 128 + 8
    plan = planned(zero, (3, 5), (3, 5))
    assert plan.steps[1].arguments[1:] == (Pointer("null"), Pointer("workspace", 0, 64))
    assert [step.function for step in planned(zero, (1, 5), (1, 5)).steps] == ["op_0"]
    assert [step.function for step in planned(two, (3, 5), (3, 5)).steps] == ["op_2"]
    assert [step.tuned for step in planned(two, (3, 5), (3, 5)).steps] == [True]
    assert one.launched_functions() == ("op_0", "op_1")
    with pytest.raises(PluginError, match="no launch is for these attributes"):
        made({**changes, "launches": changes["launches"][:2]}, mode=2)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("rows * 4611686018427387904", r"overflows 64 bits, .*: shapes are X \[3, "),
        ("0 - rows", "part A of the workspace has -3 bytes, from 0 on; it must have 0 or more, and end before"),
        ("4611686018427387904", "part A of the workspace has 4611686018427387904 bytes, from 0 on"),
    ],
)
def test_a_workspace_that_nobody_has(size: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        planned(made({"workspace": {"A": size}}), (3, 5), (3, 5))


def test_the_workspace_of_a_profile() -> None:
    found = made({"workspace_of_profile": "16 * rows - least(rows)"})
    scope = found.measure([(8, 2)], [(8, 2)], least={"rows": 3})
    assert found.profile_bytes(scope) == 125
    assert made({}).profile_bytes(scope) == 0


def test_options() -> None:
    changes = {
        "attributes": {"n": "int32 = 1"},
        "options": [Option("fast", 3, "n > 0")],
        "define": {"quick": "has(fast) and rows > 2"},
        "launches": [
            replace(COPY, when="not quick"),
            Launch({"x": "X"}, "quick", "op_fast", option="fast"),
        ],
    }
    found = made(changes)
    assert [(option.name, names) for option, names in found.options_wanted()] == [("fast", ("op_fast",))]
    assert list(made(changes, n=0).options_wanted()) == []
    assert found.needed_functions() == found.launched_functions() == ("op_0",)
    assert planned(found, (3, 4), (3, 4)).steps[0].function == "op_0"
    fast = found.with_options({"fast": True})
    assert fast.launched_functions() == ("op_0", "op_fast")
    assert [step.function for step in planned(fast, (3, 4), (3, 4)).steps] == ["op_fast"]
    assert [step.function for step in planned(fast, (2, 4), (2, 4)).steps] == ["op_0"]
    assert fast.main_functions() == ("op_0",)


def test_what_a_launch_would_run() -> None:
    changes = {
        "define": {"cluster": "serves('main', 'clustered')"},
        "launches": [replace(COPY, name="main", arguments={"x": "X + 16", "n": "rows", "y": "null"}), Launch(
            {"n": "cols"}, "cluster", "op_other"
        )],
    }  # fmt: skip
    asked: list[Any] = []

    def serves(*question: Any) -> bool:
        asked.append(question)
        return True

    assert len(planned(made(changes), (3, 4), (3, 4), serves=serves).steps) == 2
    assert asked == [("op_0", "clustered", [(1 << 40) + 16, 3, 0])]
    assert len(planned(made(changes), (3, 4), (3, 4)).steps) == 1


def test_what_a_device_is() -> None:
    changes = {
        "define": {"many": "rows < device(multiprocessors)"},
        "launches": [replace(COPY, when="many"), Launch({"n": "cols"}, "not many", "op_other")],
    }
    found = [
        planned(made(changes), (3, 4), (3, 4), device={"multiprocessors": count}.__getitem__).steps[0].function
        for count in (3, 4)
    ]
    assert found == ["op_other", "op_0"]
    assert planned(made(changes), (3, 4), (3, 4)).steps[0].function == "op_other"  # without one


def test_texts_of_a_plugin() -> None:
    changes = {
        "attributes": {"n": "int32 = 1"},
        "summary": [("", "{n} of"), ("n > 1", " many")],
        "shape_summary": {"": "{rows} x {cols}"},
        "build": "--count {n}",
    }
    found = made(changes)
    assert (str(found), str(made(changes, n=2))) == ("1 of", "2 of many")
    assert planned(found, (3, 4), (3, 4)).sizes == "3 x 4"
    assert made({"attributes": {"steps": "int32[] = []"}}).__str__() == "no attributes"


def test_sizes_that_overflow() -> None:
    found = made({"launches": [replace(COPY, arguments={"x": "X", "n": "numel(X)"})]})
    with pytest.raises(PluginError, match="overflows 64 bits"):
        planned(found, (1 << 40, 1 << 40), (1 << 40, 1 << 40))
    assert planned(found, (0, 1 << 40), (0, 1 << 40)).steps[0].arguments[1] == 0


def test_an_output_that_is_another_tensors() -> None:
    found = made({"outputs": [Tensor("Y", "fp32[2 * rows]")]})
    assert planned(found, (3, 4), (6,)).steps
    with pytest.raises(PluginError, match=r"shapes are X \[3, 4\], Y \[7\]; they must be X .* Y \[2 \* rows\]"):
        planned(found, (3, 4), (7,))
