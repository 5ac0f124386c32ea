"""Descriptions that contradict themselves are refused while they are read, and the part is named."""

import re
from typing import Any

import pytest

from pyfmha.attention.operator import OPERATOR
from pyfmha.errors import SpecError
from pyfmha.operators.description import Attribute, Check, Launch, Operator, Option, Part, Tensor, Types
from pyfmha.operators.program import Program, Source, program_of
from pyfmha.operators.reading import function_text


def launch(**changes: Any) -> Launch:
    usual: dict[str, Any] = {"arguments": {"x": "X", "y": "Y", "n": "rows * cols"}, "kernel": "copy"}
    return Launch(**{**usual, **changes})


def operator(**changes: Any) -> Operator:
    usual: dict[str, Any] = {
        "name": "Copy",
        "inputs": {"X": "T[rows, cols]"},
        "outputs": {"Y": "T[rows, cols]"},
        "types": {"T": ("fp16", "fp32")},
        "launches": [launch()],
    }
    return Operator(**{**usual, **changes})


def asks(condition: str) -> dict[str, Any]:
    return {"checks": [Check(condition, "text")]}


SHAPED = {"inputs": {"X": "T[n]", "S": "shape[2]"}, "outputs": {"Y": "T[S[0], S[1]]"}}
COPY = {"x": "X", "y": "Y"}


def shaped(**changes: Any) -> dict[str, Any]:
    return {**SHAPED, "launches": [launch(arguments=COPY)], **changes}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    # ------------------------------------------------------------ arguments and launches
    "an argument without a source": (
        {"launches": [launch(arguments={"x": "X", "n": "depth"})]},
        "Copy: launch copy, argument n: 'depth' is not known",
    ),
    "an argument of no number": (
        {"attributes": {"mode": "string = a"}, "launches": [launch(arguments={"m": "mode"})]},
        "launch copy, argument m: 'mode' is of type str; a kernel takes numbers",
    ),
    "an argument of a list": (
        {"attributes": {"steps": "int32[] = [1]"}, "launches": [launch(arguments={"m": "steps"})]},
        "argument m: 'steps' is of type int[]; a kernel takes numbers",
    ),
    "an argument twice": (
        {"launches": [launch(arguments=[("x", "X"), ("x", "Y")])]},
        "launch copy: argument x is given more than once",
    ),
    "an address in one case alone": (
        {"launches": [launch(arguments={"x": "X if rows > 1 else rows"})]},
        "argument x: 'X if rows > 1 else rows' is an address in one case and none in another",
    ),
    "bytes that are no number": (
        {"launches": [launch(arguments={"x": "X + 0.5"})]},
        "argument x: 0.5 is no number of bytes",
    ),
    "addresses multiplied": ({"launches": [launch(arguments={"x": "X * 2"})]}, "argument x: 'X' is not known"),
    "hints of no argument": ({"launches": [launch(hints="m")]}, "launch copy: hints name m, no argument"),
    "scalars of no argument": (
        {"launches": [launch(scalars={"m": "i64"})]},
        "launch copy: scalars name m, no argument",
    ),
    "neither kernel nor function": ({"launches": [launch(kernel="")]}, "give the kernel to compile, or the name"),
    "kernel and function": ({"launches": [launch(function="f")]}, "give the kernel to compile, or the name"),
    "a condition of no condition": ({"launches": [launch(when="0.5 * rows")]}, "is of type float, no condition"),
    "a function by sizes": (
        {"launches": [launch(kernel="", function="f{rows}")]},
        "a name in launch f{rows}: 'rows' reads rows; attributes alone must tell it",
    ),
    "two launches of one name": (
        {"launches": [launch(name="main"), launch(name="main")]},
        "main as launch is given more than once",
    ),
    "an option that is none": ({"launches": [launch(option="fast")]}, "launch copy: 'fast' is no option"),
    "an option without a launch": ({"options": [Option("fast", 1)]}, "option fast has no launch"),
    "an option by sizes": (
        {"options": [Option("fast", 1, "rows > 1")], "launches": [launch(), launch(option="fast")]},
        "'rows' is not known",
    ),
    "what serves asked too early": (
        {
            "define": {"fast": "serves('main', 'k')"},
            "launches": [launch(name="main", arguments={"x": "X", "y": "Y", "n": "fast"})],
        },
        "definition fast asks what serves main, whose arguments read fast, defined here or after it: a cycle",
    ),
    # ------------------------------------------------------------ axes
    "an axis never given": ({"outputs": {"Y": "T[rows, depth]"}}, "output Y: axis depth: 'depth' is not known"),
    "a sum of two unknown axes": (
        {"inputs": {"X": "T[a + b]"}, "outputs": {"Y": "T[a]"}, "launches": [launch(arguments=COPY)]},
        "input X: axis a + b: nothing gives a, b; an axis must stand alone in some input, or be the only unknown",
    ),
    "a square alone": (
        {"inputs": {"X": "T[a * a]"}, "outputs": {"Y": "T[a]"}, "launches": [launch(arguments=COPY)]},
        "input X: axis a * a: nothing gives a",
    ),
    "a quotient alone": (
        {"inputs": {"X": "T[a / 2]"}, "outputs": {"Y": "T[a]"}, "launches": [launch(arguments=COPY)]},
        "input X: axis a / 2: nothing gives a",
    ),
    "an axis solved after its use": (
        {"inputs": {"X": "T[a + b, b + c, c]"}, "outputs": {"Y": "T[a]"}, "launches": [launch(arguments=COPY)]},
        "input X: axis a + b: nothing gives a",
    ),
    "an axis that is no integer": ({"inputs": {"X": "T[rows, 0.5 * cols]"}}, "sizes are integers"),
    "an axis that asks": ({"inputs": {"X": "T[rows, cols]", "Z": "T[numel(X)]"}}, "axis numel(X) asks"),
    "an axis by a definition of sizes": (
        {"inputs": {"X": "T[rows, cols]", "Z": "T[both]"}, "define": {"both": "rows * cols"}},
        "input Z: axis both reads the definition both, which reads sizes itself",
    ),
    "an axis called as a tensor": (
        {"inputs": {"X": "T[X, cols]"}, "outputs": {"Y": "T[cols]"}, "launches": [launch(arguments=COPY)]},
        "axis X has the name of a tensor, a type or a part",
    ),
    "nine axes": ({"inputs": {"X": "T[a, b, c, d, e, f, g, h, i]"}}, "input X: 9 axes; TensorRT has at most 8"),
    "no form": ({"inputs": {"X": "T(rows)"}}, "input X: 'T(rows)' is no form"),
    "no such type": ({"inputs": {"X": "fp12[rows, cols]"}}, "input X: 'fp12' is no type; there are T, fp32"),
    "an output that asks": (
        {"outputs": {"Y": "T[numel(X)]"}},
        "output Y: axis numel(X): TensorRT cannot compute it; use axes",
    ),
    "an output by a condition on sizes": (
        {"outputs": {"Y": "T[rows if rows > cols else cols]"}},
        "output Y: axis rows if rows > cols else cols: TensorRT cannot compute it",
    ),
    "an output by a definition that asks": (
        {"outputs": {"Y": "T[count]"}, "define": {"count": "size(X, 0) + 1"}},
        "output Y: axis count: TensorRT cannot compute it",
    ),
    # ------------------------------------------------------------ tensors
    "two outputs of one name": (
        {"outputs": [Tensor("Y", "T[rows]"), Tensor("Y", "T[cols]")]},
        "two outputs are called Y",
    ),
    "two outputs under one condition": (
        {"attributes": {"f": "int32 = 0"}, "outputs": [Tensor("Y", "T[rows]", "f > 0"), Tensor("Y", "T[cols]", "f>0")]},
        "two outputs are called Y",
    ),
    "two inputs of one name": (
        {"inputs": [Tensor("X", "T[rows, cols]"), Tensor("X", "T[cols]")]},
        "two inputs are called X",
    ),
    "in place": (
        {"outputs": {"X": "T[rows, cols]"}},
        "X is an input and an output: nothing is computed in place; give the output a name of its own",
    ),
    "two forms that nothing tells apart": (
        {"inputs": {"X": ["T[rows, cols]", "T[cols, rows]"]}},
        "X: nothing tells two of its forms apart",
    ),
    "an output of two ranks": (
        {"outputs": {"Y": ["T[rows, cols]", "T[cols]"]}},
        "Y: nothing tells two of its forms apart",
    ),
    "values and memory in one": (
        shaped(inputs={"X": "T[n]", "S": ["shape[2]", "int32[n]"]}),
        "S: one form holds values to read and another memory",
    ),
    "an output of values": ({"outputs": {"Y": "shape[2]"}}, "output Y: 'shape' is no type"),
    "a tensor there by sizes": ({"outputs": {"Y": "T[rows] when rows > 1"}}, "'rows' is not known"),
    # ------------------------------------------------------------ values read while a network is built
    "a value no output shows": (
        shaped(outputs={"Y": "T[S[0]]"}, launches=[launch(arguments={**COPY, "n": "S[1]"})]),
        "launch copy: 'S[1]' reads S[1]; it is known only where an axis of an output that is always there is S[1]",
    ),
    "a value inside a sum alone": (
        shaped(outputs={"Y": "T[S[0] + 1]"}),
        "output Y: 'S[0] + 1' reads S[0]; it is known only where",
    ),
    "a value of an optional output": (
        shaped(
            attributes={"f": "int32 = 0"},
            outputs=[Tensor("Y", "T[S[0]]"), Tensor("Z", "T[S[1]]", "f")],
            launches=[launch(arguments={**COPY, "n": "S[1]"})],
        ),
        "'S[1]' reads S[1]; it is known only where",
    ),
    "an attribute with the name of values": (
        shaped(attributes={"S": "int32 = 0"}),
        "S is an attribute and an input of values",
    ),
    "a value beyond the last": (shaped(outputs={"Y": "T[S[0], S[2]]"}), "reads S[2], which has 2 values"),
    "a value at an index by sizes": (
        shaped(launches=[launch(arguments={**COPY, "n": "S[n]"})]),
        "reads S at an index that is no number",
    ),
    "values of unknown number": (
        shaped(inputs={"X": "T[n]", "S": "shape[n]"}),
        "input S: shape[...] holds one number, how many values there are",
    ),
    # ------------------------------------------------------------ types
    "a type that nothing gives": (
        {"outputs": {"Y": "U[rows, cols]"}, "types": {"T": "fp16", "U": ("fp16", "fp32")}},
        "nothing gives the type U: give it to an input, or an attribute that holds it",
    ),
    "a type held by no attribute": ({"types": {"T": Types("fp16", "kind")}}, "type T is held by 'kind', which is no"),
    "a type held by a float": (
        {"types": {"T": Types("fp16", "kind")}, "attributes": {"kind": "fp32"}},
        "type T is held by kind, which is no integer",
    ),
    "a type called as one": ({"types": {"fp16": "fp32"}}, "fp16 is a type of its own"),
    # ------------------------------------------------------------ names
    "an attribute twice": ({"attributes": [("a", "int32"), ("a", "fp32")]}, "a as attribute is given more than once"),
    "an attribute and a definition": (
        {"attributes": {"a": "int32"}, "define": {"a": "1"}},
        "a names two things: attributes, types and definitions",
    ),
    "a word of the language": (
        {"attributes": {"if": "int32"}},
        "attribute 'if' is no name, or has a meaning of its own",
    ),
    "a function's word": ({"define": {"max": "1"}}, "definition 'max' is no name, or has a meaning of its own"),
    "the null pointer": ({"inputs": {"null": "T[rows, cols]"}}, "tensor 'null' is no name, or has a meaning"),
    "a field of pyfmha's own": ({"attributes": {"pyfmha_schema": "int32"}}, "pyfmha_schema begins with pyfmha_"),
    "a part called as a tensor": ({"workspace": {"X": "4"}}, "X is a tensor and a part of the workspace"),
    "a part called as a definition": (
        {"workspace": {"part": "4"}, "define": {"part": "1"}},
        "part is a part of the workspace and a value besides",
    ),
    "no alignment": ({"alignment": 0}, "alignment is 0"),
    # ------------------------------------------------------------ definitions
    "a cycle of definitions": (
        {"define": {"a": "b + rows", "b": "a + 1"}},
        "definition a reads b, defined after it: a cycle, or an order to change",
    ),
    "a cycle by attributes alone": ({"define": {"a": "b + 1", "b": "a + 1"}}, "a cycle, or an order to change"),
    "a definition of itself": ({"define": {"a": "a + 1"}}, "definition a reads a"),
    "a definition of something unknown": ({"define": {"a": "depth + 1"}}, "definition a: 'depth' is not known"),
    "a definition that is no expression": ({"define": {"a": "rows +"}}, "definition a: 'rows +' is not an expression"),
    # ------------------------------------------------------------ attributes
    "a default out of range": (
        {"attributes": {"a": Attribute("int32", 0, minimum=1)}},
        "attribute a: its own default is not allowed: a is 0; give 1 or more",
    ),
    "a default that is no choice": (
        {"attributes": {"a": Attribute("string", "c", choices=("a", "b"))}},
        "attribute a: its own default is not allowed: a is 'c'; allowed are a, b",
    ),
    "a default beyond 32 bits": ({"attributes": {"a": f"int32 = {1 << 31}"}}, "its default 2147483648 is no int32"),
    "a default of another type": ({"attributes": {"a": "int32 = 0.5"}}, "is of type float; it must be int"),
    "a default that is no list": ({"attributes": {"a": "int32[] = 3"}}, "attribute a, default: '3' is no list"),
    "a default list of strings": ({"attributes": {"a": "int32[] = ['b']"}}, "its default 'b' is no int32"),
    "a default list that is no text of one": ({"attributes": {"a": "fp32[] = [1,"}}, "'[1,' is no list"),
    "defaults in a circle": (
        {"attributes": {"a": "int32 = b", "b": "int32 = a"}},
        "attribute a: its default reads b, settled after it: a cycle",
    ),
    "a default of itself": ({"attributes": {"a": "int32 = a + 1"}}, "attribute a: its default reads a"),
    "a default of the library": (
        {
            "attributes": {"n": "int32", "a": "int32 = n if has(fast) else 0"},
            "options": [Option("fast", 1)],
            "launches": [launch(), launch(option="fast")],
        },
        "attribute a: a default may read attributes alone",
    ),
    "a string with a minimum": ({"attributes": {"a": Attribute("string", "b", minimum=1)}}, "a string has no minimum"),
    "stored by sizes": ({"attributes": {"a": Attribute("int32", 0, stored="rows > 1")}}, "'rows' is not known"),
    "stored by a question to sizes": (
        {"attributes": {"a": Attribute("int32", 0, stored="numel(X) > 1")}},
        "attribute a: 'numel(X) > 1' reads numel()",
    ),
    # ------------------------------------------------------------ the rest
    "workspace of something unknown": ({"workspace": {"part": "4 * depth"}}, "workspace part: 'depth' is not known"),
    "workspace of no integer": (
        {"workspace": {"part": "0.5"}},
        "workspace part: '0.5' is of type float; it must be int",
    ),
    "least outside a profile": ({"workspace": {"part": "least(rows)"}}, "least asks of 'rows'; it may ask of nothing"),
    "least of no axis": ({"workspace_of_profile": "least(X)"}, "least asks of 'X'; it may ask of cols, rows"),
    "a check of something unknown": (asks("depth > 1"), "check 'depth > 1': 'depth' is not known"),
    "a check of no condition": (asks("0.5"), "check '0.5': '0.5' is of type float, no condition"),
    "a message of sizes where attributes are checked": (
        {"attributes": {"a": "int32 = 0"}, "checks": [Check("a > 0", "{rows} rows")]},
        "'rows' is not known",
    ),
    "a summary of sizes": ({"summary": {"": "{rows} rows"}}, "'rows' is not known"),
    "a summary that asks for sizes": ({"summary": {"": "{numel(X)} elements"}}, "summary: 'numel(X)' reads numel()"),
    # ------------------------------------------------------------ texts and numbers
    "a version that is no text": ({"version": 1}, "version is 1; give a text"),
    "a namespace that is no text": ({"namespace": 3}, "namespace is 3; give a text"),
    "a definition without a value": ({"define": {"a": "1 / 0"}}, "definition a: 1 / 0 has no value"),
    "a size below zero": (
        {"inputs": {"X": "T[rows, cols]", "Z": "T[-1, cols]"}},
        "Z: -1 is less than 0; a size that varies has a name",
    ),
    "a workspace below zero": ({"workspace": [Part("W", "2 - 6")]}, "workspace W: 2 - 6 is less than 0"),
    "a stride of no axis": (
        {"launches": [launch(arguments={"x": "X", "y": "Y", "n": "stride(X, 2)"})]},
        "launch copy: stride(X, 2): it has 2 axes",
    ),
    "a build command of sizes": ({"build": "--size {rows}"}, "a name in build: 'rows' reads rows"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_contradiction_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)) as caught:
        program_of(operator(**changes))
    assert str(caught.value).startswith("Copy: ")


SERVED: dict[str, dict[str, Any]] = {
    "the plain one": {},
    "a size by attributes": {"attributes": {"cols": "int32"}},
    "a sum with one unknown": {"inputs": {"X": "T[rows, cols]", "Z": "T[2 * rows + depth]"}},
    "sums one after the other": {"inputs": {"X": "T[rows, cols]", "Z": "T[rows + a, a + b]"}},
    "a quotient of what another gives": {"inputs": {"X": "T[rows, cols]", "Z": "T[rows / 2]"}},
    "outputs by expressions": {"outputs": {"Y": "T[cdiv(rows, 2) + max(rows, cols) % 3, min(rows // 2, 5)]"}},
    "an output by a definition": {"outputs": {"Y": "T[half, cols]"}, "define": {"half": "rows / 2"}},
    "alternatives": {
        "attributes": {"f": "int32 = 0"},
        "outputs": [Tensor("Y", "T[rows]", "f == 0"), Tensor("Y", "T[cols]", "f != 0")],
    },
    "forms of two ranks": {"inputs": {"X": ["T[rows, cols]", "T[rows, cols, depth]"]}},
    "an axis that one form has": {
        "inputs": {"X": ["T[rows, cols]", "T[rows, cols, depth]"]},
        "define": {"third": "size(X, 2)"},
    },
    "a tensor and an attribute of one name": {
        "attributes": {"Z": "int32 = 0"},
        "inputs": {"X": "T[rows, cols]", "Z": "T[cols] when Z"},
    },
    "a default by another attribute": {"attributes": {"a": "int32 = b", "b": "int32", "c": "int32 = a + b"}},
    "values that an output shows": shaped(launches=[launch(arguments={**COPY, "n": "S[0] * S[1]"})]),
}


@pytest.mark.parametrize("changes", SERVED.values(), ids=SERVED.keys())
def test_what_is_no_contradiction(changes: dict[str, Any]) -> None:
    assert program_of(operator(**changes)).launches


def test_attention_does_not_contradict_itself() -> None:
    broadcast = [f"{name}_{axis}" for name in ("bias", "mask") for axis in "kqhb"]
    broadcast += [f"{name}_{axis}" for name in ("q_descale", "k_descale", "v_descale") for axis in "hb"]
    assert Program(OPERATOR).axes == ("batch", "seq", "Sq", "Q_tokens", "Skv", "KV_tokens", "tokens", *broadcast)


def test_functions_are_called_after_the_operator() -> None:
    one = program_of(operator(name="BiasGelu", namespace="acme.x"))
    two = program_of(operator(launches=[launch(), launch()]))
    assert function_text(operator(version="2.1-b"), 0) == "copy_v2_1_b_{T}"
    assert function_text(one.operator, 0) == "acme_x_biasgelu_{T}"
    assert [function_text(two.operator, index) for index in (0, 1)] == ["copy_0_{T}", "copy_1_{T}"]


def test_arguments_are_addresses_or_numbers() -> None:
    program = program_of(
        operator(
            attributes={"f": "int32 = 0"},
            workspace=[Part("Sums", "4 * rows")],
            launches=[
                launch(
                    arguments={
                        "a": "X",
                        "b": "X + 4 * rows + 8",
                        "c": "Sums if f else null",
                        "d": "X if f else Y + 2 if rows > 3 else null",
                        "e": "rows if f else cols",
                        "g": "f and rows > 2",
                    }
                )
            ],
        )
    )
    sources = dict(program.launches[0].arguments)
    cases = {
        name: [(None if c is None else c.text, of, None if o is None else o.text) for c, of, o in source.cases]
        for name, source in sources.items()
        if isinstance(source, Source)
    }
    assert cases == {
        "a": [(None, "X", None)],
        "b": [(None, "X", "4 * rows + 8")],
        "c": [("f", "Sums", None), (None, "null", None)],
        "d": [("f", "X", None), ("rows > 3", "Y", "2"), (None, "null", None)],
    }
    assert {name for name in sources if name not in cases} == {"e", "g"}
    kinds = [(name, "*fp32" if name in cases else "i32") for name in sources]
    assert program.launches[0].fits(kinds)
    assert not program.launches[0].fits(kinds[1:])
    assert not program.launches[0].fits([*kinds[:-1], ("g", "*i32")])
