"""Descriptions as they are written, as they are held, and as JSON has them."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyfmha
from pyfmha.attention.operator import OPERATOR
from pyfmha.errors import SpecError
from pyfmha.operators.description import (
    DATA_TYPES,
    ELEMENTS,
    ITEM_SIZES,
    TYPE_NAMES,
    Attribute,
    Check,
    Config,
    Launch,
    Operator,
    Option,
    Part,
    Tensor,
    Types,
)
from pyfmha.operators.program import program_of


def kernel() -> None:
    """A kernel by itself."""


class Decorated:
    """What a decorator makes of a kernel."""

    fn = kernel


LONG = Operator(
    name="Gelu",
    version="2",
    namespace="acme",
    inputs=(Tensor("X", ("T[rows, cols]",)), Tensor("Bias", ("T[cols]",), "biased")),
    outputs=(Tensor("Y", ("T[rows, cols]",)), Tensor("Sums", ("fp32[rows]",), "sums > 0")),
    types=(("T", Types(("fp16", "fp32"))), ("U", Types(("bf16",), "kind"))),
    attributes=(
        ("scale", Attribute("fp32", "1.0")),
        ("biased", Attribute("int32", "0")),
        ("sums", Attribute("int32", 0, 0, 2)),
        ("kind", Attribute("int32")),
        ("mode", Attribute("string", "tanh", choices=("tanh", "erf"))),
        ("steps", Attribute("int32[]", "[1, 2]")),
    ),
    define=(("half", "rows / 2"),),
    checks=(Check("rows > 1", "{rows} rows"),),
    launches=(
        Launch(
            (("x", "X"), ("y", "Y"), ("n", "rows")),
            kernel="kernel",
            grid="cdiv(n, BLOCK)",
            constants=(("BLOCK", 64),),
            configs=(Config((("BLOCK", 32),), 8, 2, 128),),
            scalars=(("n", "i64"),),
            hints=("n",),
            name="main",
        ),
        Launch((("x", "X"),), "rows > 3", "gelu_fast", option="fast"),
    ),
    workspace=(Part("Scratch", "4 * rows", "biased", "int32"),),
    options=(Option("fast", 3, "biased"),),
    summary=(("", "scale {scale}"),),
    shape_summary=(("", "{rows} rows"),),
    labels=(("rows", "the rows"),),
)

SHORT = Operator(
    "Gelu",
    {"X": "T[rows, cols]", "Bias": "T[cols] when biased"},
    {"Y": ["T[rows, cols]"], "Sums": "fp32[rows] when sums > 0"},
    [
        Launch(
            {"x": "X", "y": "Y", "n": "rows"},
            kernel=Decorated(),
            grid="cdiv(n, BLOCK)",
            constants={"BLOCK": 64},
            configs=[Config({"BLOCK": 32}, num_warps=8, num_stages=2, maxnreg=128)],
            scalars={"n": "i64"},
            hints="n",
            name="main",
        ),
        Launch({"x": "X"}, "rows > 3", "gelu_fast", option="fast"),
    ],
    version="2",
    namespace="acme",
    types={"T": ["fp16", "fp32"], "U": Types("bf16", "kind")},
    attributes={
        "scale": "fp32 = 1.0",
        "biased": "int32=0",
        "sums": Attribute("int32", 0, minimum=0, maximum=2),
        "kind": "int32",
        "mode": Attribute("string", "tanh", choices=["tanh", "erf"]),
        "steps": "int32[] = [1, 2]",
    },
    define={"half": "rows / 2"},
    checks=[Check("rows > 1", "{rows} rows")],
    workspace=[Part("Scratch", "4 * rows", "biased", "int32")],
    options=[Option("fast", 3, "biased")],
    summary={"": "scale {scale}"},
    shape_summary={"": "{rows} rows"},
    labels={"rows": "the rows"},
)


def test_short_spellings_mean_the_long_ones() -> None:
    assert SHORT == LONG
    assert hash(SHORT) == hash(LONG)
    assert program_of(SHORT) is program_of(LONG)


@pytest.mark.parametrize(
    ("spelling", "meant"),
    [
        ("fp32", Attribute("fp32")),
        (" fp32 = 1.0 ", Attribute("fp32", "1.0")),
        ("string = tanh", Attribute("string", "tanh")),
        ("string = 'it is'", Attribute("string", "it is")),
        ('string = ""', Attribute("string", "")),
        ("int32[] = [1, 2]", Attribute("int32[]", "[1, 2]")),
        ("int32 = heads == 2", Attribute("int32", "heads == 2")),
        (Attribute("int64", 3), Attribute("int64", 3)),
    ],
)
def test_spellings_of_an_attribute(spelling: Any, meant: Attribute) -> None:
    assert dict(replace(LONG, attributes={"a": spelling}).attributes) == {"a": meant}


def test_sequences_and_mappings_are_one() -> None:
    pairs = (("a", "int32"), ("b", "fp32"))
    assert replace(LONG, attributes=pairs) == replace(LONG, attributes=dict(pairs))
    assert Launch([("x", "X")]) == Launch({"x": "X"})
    assert Config([("BLOCK", 1)]) == Config({"BLOCK": 1})
    assert replace(LONG, workspace={"Scratch": 16}).workspace == (Part("Scratch", "16"),)


@pytest.mark.parametrize("operator", [LONG, OPERATOR], ids=["gelu", "attention"])
def test_json_and_back(operator: Operator) -> None:
    text = json.dumps(operator.of("/home/somebody/gelu.py").to_json())
    assert "somebody" not in text
    assert Operator.from_json(json.loads(text)) == operator


@settings(max_examples=50, deadline=None)
@given(
    default=st.none() | st.integers(-9, 9),
    bounds=st.tuples(st.none() | st.integers(-9, 0), st.none() | st.integers(0, 9)),
    names=st.lists(st.sampled_from(sorted(DATA_TYPES)), min_size=1, unique=True),
    whens=st.lists(st.sampled_from(["", "a > 1"]), min_size=1, max_size=3),
    warps=st.sampled_from([1, 4, 8]),
)
def test_json_and_back_of_parts(default: Any, bounds: Any, names: list[str], whens: list[str], warps: int) -> None:
    operator = Operator(
        "O",
        [Tensor(f"X{index}", "T[rows]", when) for index, when in enumerate(whens)],
        {"Y": "T[rows]"},
        [Launch({"x": "X0"}, when, kernel="k", configs=[Config(num_warps=warps)]) for when in whens],
        types={"T": names},
        attributes={"a": Attribute("int32", default, *bounds)},
    )
    assert Operator.from_json(json.loads(json.dumps(operator.to_json()))) == operator


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"later": 1}, "an operator has no later; it was described by a later pyfmha"),
        ({"launches": None}, "this describes no operator: TypeError"),
        ({"inputs": [{"called": "X"}]}, "this describes no operator: TypeError"),
        ({"name": ""}, "operator name '' is no name"),
        ({"attributes": [["a", {"type": "int8"}]]}, "attribute type 'int8' is unknown; there are int32"),
        ({"types": [["T", {"names": ["fp12"]}]]}, "types fp12; there are fp32"),
    ],
)
def test_json_that_is_none(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Operator.from_json({**LONG.to_json(), **change})


def test_a_missing_part_is_no_operator() -> None:
    for part in ("name", "inputs", "outputs", "launches"):
        with pytest.raises(SpecError, match="this describes no operator"):
            Operator.from_json({name: value for name, value in LONG.to_json().items() if name != part})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "two words"}, "operator name 'two words' is no name: letters, digits and underscores"),
        ({"launches": []}, "Gelu launches nothing"),
        ({"inputs": {}}, "Gelu has no input"),
        ({"outputs": {}}, "Gelu has no output"),
        ({"attributes": {"a": "double"}}, "attribute a: attribute type 'double' is unknown"),
        ({"types": {"T": []}}, "types are none; there are"),
    ],
)
def test_what_is_wrong_by_itself(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        replace(LONG, **changes)


def test_types_are_tensorrts() -> None:
    """NvInferRuntimeBase.h, enum DataType; and each has a size, a name and what a pointer points to."""
    order = ["FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8", "FP8", "BF16", "INT64"]
    assert [TYPE_NAMES[name] for name in DATA_TYPES] == order
    assert list(DATA_TYPES.values()) == list(range(9))
    assert DATA_TYPES.keys() == TYPE_NAMES.keys() == ITEM_SIZES.keys() == ELEMENTS.keys()
    assert [ITEM_SIZES[name] for name in DATA_TYPES] == [4, 2, 1, 4, 1, 1, 1, 2, 8]


def test_public_names() -> None:
    for made in (Operator, Launch, Attribute, Config, Check, Part, Option, Tensor, Types):
        assert getattr(pyfmha, made.__name__) is made
        assert made.__name__ in pyfmha.__all__
    assert pyfmha.add_operator.__module__ == "pyfmha.trt.network"
