"""What a description can say, each through both plugins: shapes, workspace, tactics, and the launches' arguments."""

import ast
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_cuda
import numpy as np
import pytest
from described import operator
from described.cases import CASES, Case, Listed
from helpers import TESTS
from trt_double import BUILD, RUNTIME, Tensor
from trt_double.twins import Pair, fields_of

import pyfmha
import pyfmha.operators
from pyfmha.aot import Compiler
from pyfmha.aot.operator_specs import load_operators
from pyfmha.errors import SpecError
from pyfmha.operators.description import DATA_TYPES, Launch, Operator
from pyfmha.operators.program import program_of

pytest_plugins = ("described.fixtures",)

FORMATS = {"i32": "<i", "i64": "<q", "u8": "<B", "fp32": "<f", "fp64": "<d"}
ADDRESS, STEP, WORKSPACE = 0x7F0000000000, 0x10000000, 0x7C0000000100


def tensors(listed: Listed) -> list[Tensor]:
    return [Tensor(shape, DATA_TYPES[kind]) for shape, kind in listed]


def attached_of(pair: Pair, case: Case) -> list[Any]:
    """As an engine with it is loaded."""
    built = pair.create(fields_of(pair.operator, case.attributes), BUILD)
    assert built is not None
    loaded = pair.create(pair.stored(built), RUNTIME)
    assert loaded is not None
    return [calls.attach(plugin) for calls, plugin in zip((pair.python, pair.c), loaded, strict=True)]


def read(pair: Pair, launch: fake_cuda.Launch, names: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """A launch's function and arguments, addresses by what they are of."""
    function = next(
        function
        for function in pair.library.manifest.functions
        for algorithm in function.algorithms
        for variant in algorithm
        for image in variant.images
        if image.sha256 == launch.image_sha256
    )
    found: dict[str, Any] = {}
    for (name, kind), param in zip(function.arguments, launch.params, strict=False):
        if kind in FORMATS:
            (found[name],) = struct.unpack(FORMATS[kind], param)
            continue
        address = int.from_bytes(param, "little")
        index, moved = divmod(address - ADDRESS, STEP)
        if address >= ADDRESS:
            found[name] = names[index] + (f"+{moved}" if moved else "")
        else:
            moved = address - WORKSPACE
            found[name] = "null" if address == 0 else "workspace" + (f"+{moved}" if moved else "")
    return function.name, found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_both_plugins_make_the_same_of_it(pair_of: Callable[[str], Pair], case: Case) -> None:
    pair = pair_of(case.operator.name)
    inputs, outputs = tensors(case.inputs), tensors(case.outputs)
    built = pair.create(fields_of(pair.operator, case.attributes), BUILD)
    assert built is not None
    assert pair.both("output_types", built, [tensor.type for tensor in inputs]) == [tensor.type for tensor in outputs]
    told = case.open or ([list(t.shape) for t in inputs], [list(t.shape) for t in outputs])
    assert pair.both("output_shapes", built, told[0], [list(given) for given in case.values]) == told[1]
    assert all(pair.both("supports", built, at, [*inputs, *outputs]) for at in range(len(inputs) + len(outputs)))
    assert pair.both("configure", built, inputs, outputs) == 0
    assert len(pair.both("tactics", built)) == case.tactics
    if case.wrong is not None:
        assert pair.both("output_shapes", built, case.wrong[0]) is None
        assert case.wrong[1] in pair.c.error()

    attached = attached_of(pair, case)
    assert pair.both("workspace", attached, inputs, outputs) == case.workspace
    assert pair.both("on_shape_change", attached, inputs, outputs) == 0
    addresses = [ADDRESS + STEP * index for index in range(len(inputs) + len(outputs))]
    launched = pair.launches(attached, addresses[: len(inputs)], addresses[len(inputs) :], WORKSPACE, 1)
    forms = built[0].instance.forms()
    found = [read(pair, launch, [form.name for form in forms.all]) for launch in launched]
    assert [function for function, _ in found] == [function for function, _ in case.launches]
    for (_, got), (_, wanted) in zip(found, case.launches, strict=True):
        shown = {name: float(np.float32(value)) if name == "f" else value for name, value in wanted.items()}
        assert {name: got[name] for name in wanted} == shown


def test_several_algorithms_are_tactics(pair_of: Callable[[str], Pair]) -> None:
    """Each is another kernel; the tactic is that of the first launch, and the last is the first algorithm's."""
    case = CASES["launches after one another, by conditions"]
    pair = pair_of(case.operator.name)
    attached, launches = attached_of(pair, case), []
    inputs, outputs = tensors(case.inputs), tensors(case.outputs)
    assert pair.both("on_shape_change", attached, inputs, outputs) == 0
    for tactic in pair.both("tactics", attached):
        assert pair.both("set_tactic", attached, tactic) == 0
        launches.append(
            [one.image_sha256 for one in pair.launches(attached, [ADDRESS], [ADDRESS + STEP], WORKSPACE, 1)]
        )
    one, other = launches
    assert [len(one), len(other)] == [3, 3]
    assert one[0] != other[0]
    assert one[1:] == other[1:] == [one[0]] * 2


@pytest.mark.parametrize(
    ("name", "attributes", "message"),
    [
        ("Attributed", {"count": 0}, "count is 0; allowed are 1 to 9"),
        ("Attributed", {"scale": 0.05}, "scale is 0.05; give 0.1 or more"),
        ("Attributed", {"mode": "x" * 300}, f"mode is '{'x' * 300}'; allowed are sum, mean\u00e9\U0001f600"),
        ("Attributed", {"steps": (1, -1)}, "steps[1] is -1; give 0 or more"),
        ("Attributed", {"wide": -(1 << 63)}, "wide is -9223372036854775808; give -4611686018427387904 or more"),
        ("Tied", {}, "missing field kind; needed are kind (INT32)"),
        ("Tied", {"kind": 3}, "kind is 3; allowed is int(trt.DataType): 2 (INT8), 5 (UINT8)"),
        ("Optional2", {"how": ""}, "how is ''; allowed are one, both"),
    ],
)
def test_attributes_that_are_refused(
    pair_of: Callable[[str], Pair], name: str, attributes: dict[str, Any], message: str
) -> None:
    pair = pair_of(name)
    assert pair.create(fields_of(pair.operator, attributes)) is None
    assert message in pair.c.error()


@pytest.mark.parametrize(
    ("name", "inputs", "outputs", "message"),
    [
        ("Equal", [((2, 3), "fp32"), ((4, 5), "fp32")], [((2, 5), "fp32")], "a name stands for the same size wherever"),
        ("Computed", [((6, 7), "fp32"), ((12,), "fp32"), ((24,), "fp32")], [((13, 20, 4, 2), "fp32")],
         "they must be X"),
        ("Tied", [((5,), "fp16"), ((5,), "fp32"), ((5,), "int64"), ((5,), "uint8")],
         [((5,), "int64"), ((5,), "uint8")], "W is of type FLOAT; T is one type of HALF, FLOAT in all tensors"),
        ("Named", [((1 << 40, 4, 1 << 40), "fp32")], [((1 << 40, 2, 1 << 40), "fp32")], "i32 holds -2147483648 to"),
        ("Arguments", [((1 << 31, 1 << 31, 4), "fp32")], [((4, 1 << 31), "fp32")],
         "is not there: X [2147483648, 2147483648, 4] has more elements than 64 bits hold"),
    ],
)  # fmt: skip
def test_shapes_that_are_refused(
    pair_of: Callable[[str], Pair], name: str, inputs: Listed, outputs: Listed, message: str
) -> None:
    case = next(case for case in CASES.values() if case.operator.name == name)
    pair = pair_of(name)
    assert pair.both("on_shape_change", attached_of(pair, case), tensors(inputs), tensors(outputs)) != 0
    assert message in pair.c.error()


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (
            {"bytes": -1},
            "part Room of the workspace has -9 bytes, from 0 on; it must have 0 or more, and end before 46116",
        ),
        (
            {"bytes": 1 << 59},
            "part Room of the workspace has 5188146770730811392 bytes, from 0 on; it must have 0 or more",
        ),
        (
            {"bytes": (1 << 61) - 1},
            "a number is divided by zero, or what is read is not there: shapes are X [9], Y [9]",
        ),
        ({"by": 0}, "a number is divided by zero, or what is read is not there: shapes are X [9], Y [9]"),
    ],
)
def test_workspaces_that_are_refused(pair_of: Callable[[str], Pair], attributes: dict[str, Any], message: str) -> None:
    case = CASES["workspace of no bytes"]
    pair = pair_of(case.operator.name)
    attached = attached_of(pair, replace(case, attributes=attributes))
    inputs, outputs = tensors(case.inputs), tensors(case.outputs)
    for call in ("on_shape_change", "configure"):
        assert pair.both(call, attached, inputs, outputs) != 0
        assert f"{call if call[0] == 'o' else 'configure_plugin'}: " in pair.c.error()
        assert message in pair.c.error()
    assert pair.both("workspace", attached, inputs, outputs) >= 1 << 62  # which TensorRT refuses


def test_a_workspace_of_no_bytes(pair_of: Callable[[str], Pair]) -> None:
    """Neither asked for nor missed."""
    case = CASES["workspace of no bytes"]
    pair = pair_of(case.operator.name)
    attached = attached_of(pair, case)
    inputs, outputs = [Tensor((0,), 0)], [Tensor((0,), 0)]
    assert pair.both("workspace", attached, inputs, outputs) == 0
    assert pair.both("on_shape_change", attached, inputs, outputs) == 0
    (launch,) = pair.launches(attached, [ADDRESS], [ADDRESS + STEP], 0, 1)
    assert read(pair, launch, ["X", "Y"])[1] | {"a": "X", "b": "null", "c": "Y"} == read(pair, launch, ["X", "Y"])[1]


def test_empty_tensors_are_served(pair_of: Callable[[str], Pair]) -> None:
    """Their axes are solved and compared as others'; a product with 0 tells nothing of the other factor."""
    case = CASES["sums, products and quotients"]
    pair = pair_of(case.operator.name)
    attached = attached_of(pair, case)
    empty = tensors([((6, 0), "fp32"), ((1,), "fp32"), ((24,), "fp32")])
    assert pair.both("on_shape_change", attached, empty, tensors([((6, 0, 0, 0), "fp32")])) == 0
    (launch,) = pair.launches(attached, [ADDRESS] * 3, [ADDRESS], 0, 1)
    assert read(pair, launch, ["X"])[1]["j"] == 4006
    empty = tensors([((0, 7), "fp32"), ((1,), "fp32"), ((0,), "fp32")])
    assert pair.both("on_shape_change", attached, empty, tensors([((7, 0, 4, 2), "fp32")])) != 0
    assert "shapes are X [0, 7]" in pair.c.error()
    assert pair.both("output_shapes", attached, [[0, 7], [1], [0]]) is None
    assert "Y: its size c * d cannot be computed from these inputs" in pair.c.error()


def test_in_place_is_refused_by_name() -> None:
    with pytest.raises(SpecError, match="InPlace: X is an input and an output: nothing is computed in place"):
        program_of(operator("InPlace", outputs={"X": "fp32[n]"}))


def test_what_plugingen_said_can_be_said() -> None:
    """The guide's table, left and right: its right column is put together to a description."""
    text = (Path(pyfmha.operators.__file__).parent / "README.md").read_text()
    rows = [row.split("|")[1:3] for row in text.splitlines() if row.startswith("| `") or row.startswith("| P")]
    for word in ("ios", "shape_infer_rules", "Constexpr", "ParamArg", "DimSizeArg", "grid_dims", "hints"):
        assert any(f"`{word}" in left for left, _ in rows), word
    spans = [span for _, right in rows for span in re.findall("`([^`]+)`", right)]
    said = {span.partition("=")[0]: ast.literal_eval(span.partition("=")[2]) for span in spans if "=" in span}
    (tensor,) = (ast.literal_eval(span) for span in spans if span.startswith("{"))
    asked = {f"a{number}": span for number, span in enumerate(spans) if re.match(r"(stride|size)\(", span)}
    assert set(said) == {"constants", "attributes", "arguments", "grid", "hints"}
    assert len(asked) == 2
    launch = Launch(
        {**tensor, "X": "X", "cols": "cols", "scale": "scale", **said["arguments"], **asked} | {"Q": "Q"},
        kernel="kernel",
        constants=said["constants"],
        grid=said["grid"],
        hints=said["hints"],
    )
    inputs = {**tensor, "X": "T[rows, cols]"}
    made = Operator("Said", inputs, {"Y": "T[rows, 64]"}, [launch], types={"T": "fp16"}, attributes=said["attributes"])
    program = program_of(made)
    assert set(program.axes) == {"batch", "heads", "seq", "rows", "cols"}
    assert [name for name, _ in program.launches[0].arguments][:2] == ["Q", "X"]


def test_the_guides_description_is_that_of_the_example(compiler: Compiler) -> None:
    """What the guide shows first, but for configurations, is what a build reads of the example."""
    text = (Path(pyfmha.operators.__file__).parent / "README.md").read_text()
    code = re.findall("```python\n(.*?)```", text, re.DOTALL)[0]
    found: dict[str, Any] = {"pyfmha": pyfmha, "bias_gelu_kernel": lambda: None}
    exec(code, found)
    shown: Operator = found["BIAS_GELU"]
    (example,) = load_operators(compiler, TESTS.parent / "examples" / "operator" / "bias_gelu.py")
    assert program_of(shown).axes == ("rows", "cols")
    launch, other = shown.launches[0], example.launches[0]
    assert (launch.arguments, launch.scalars, launch.grid) == (other.arguments, other.scalars, other.grid)
    assert replace(shown, launches=example.launches, source=example.source) == example
