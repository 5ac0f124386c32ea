"""What the plugin in C has room for: one more is an error of the build that names it, and so many are served."""

import re
from pathlib import Path
from typing import Any

import pytest
from helpers import PACKAGE

from pyfmha.aot import operator_limits as limits
from pyfmha.aot.emit_operators import emit_operators
from pyfmha.errors import SpecError
from pyfmha.operators.description import MOST_ELEMENTS, Attribute, Launch, Operator, Option, Part, Tensor

LAUNCH = Launch({"x": "X", "y": "Y"}, function="f{p}")


def operator(**changes: Any) -> Operator:
    usual: dict[str, Any] = {
        "name": "Op",
        "inputs": {"X": "fp32[n]"},
        "outputs": {"Y": "fp32[n]"},
        "launches": [LAUNCH],
        "attributes": {"p": "int32 = 0"},
    }
    return Operator(**{**usual, **changes})


def emitted(one: Operator) -> str:
    return emit_operators([one], [], "libpyfmha.so")["pyfmha_operators.c"]


def names(count: int, letter: str = "v") -> list[str]:
    return [f"{letter}{number}" for number in range(count)]


def values(count: int) -> Operator:
    return operator(attributes={"p": "int32 = 0", **dict.fromkeys(names(60), "int32 = 1")},
                    define=dict.fromkeys(names(count - 62, "d"), "p"))  # fmt: skip


def tensors(count: int) -> Operator:
    return operator(inputs=dict.fromkeys(["X", *names(count - 2)], "fp32[n]"))


def alternatives(count: int) -> Operator:
    forms = [Tensor("X", "fp32[n]", f"p == {number}") for number in range(count)]
    return operator(inputs=[*forms[:-1], Tensor("N", "fp32[n]")])


def options(count: int) -> Operator:
    launches = [Launch({"x": "X"}, function=f"f{name}", option=name) for name in names(count)]
    return operator(options=[Option(name, 1) for name in names(count)], launches=[LAUNCH, *launches])


def arguments(count: int) -> Operator:
    return operator(launches=[Launch({"x": "X", **dict.fromkeys(names(count - 1), "n")}, function="f{p}")])


def elements(count: int) -> Operator:
    return operator(attributes={"p": "int32 = 0", "q": Attribute("int32[]", str([1] * count))})


def read(count: int) -> Operator:
    return operator(inputs={"X": "fp32[n]", "S": f"shape[{count}]"})


ROOM = {
    "values": (values, limits.MOST_VALUES, "Op has 161 attributes, types, axes and definitions; the plugin in C"),
    "tensors": (tensors, limits.MOST_TENSORS, "Op has 33 tensors; the plugin in C has room for 32"),
    "alternatives": (alternatives, limits.MOST_TENSORS, "Op has 33 inputs, alternatives counted; the plugin in C"),
    "launches": (
        lambda count: operator(launches=[LAUNCH] * count),
        limits.MOST_LAUNCHES,
        "Op has 17 launches; the plugin in C has room for 16",
    ),
    "parts": (
        lambda count: operator(workspace=[Part(name, "4") for name in names(count)]),
        limits.MOST_PARTS,
        "Op has 17 parts of the workspace; the plugin in C has room for 16",
    ),
    "options": (options, limits.MOST_OPTIONS, "Op has 9 options; the plugin in C has room for 8"),
    "arguments": (arguments, limits.MOST_ARGUMENTS, "Op has 97 arguments of a launch; the plugin in C has room for 96"),
    "elements": (elements, MOST_ELEMENTS, "Op: attribute q has 65 elements; at most 64"),
    "values that are read": (read, MOST_ELEMENTS, "Op: S has 65 values; 1 to 64 can be read"),
    "dimensions": (
        lambda count: operator(outputs={"Y": f"fp32[{', '.join(['n'] * count)}]"}),
        8,
        "Op: output Y: 9 axes; TensorRT has at most 8",
    ),
    "the name": (lambda count: operator(name="N" * count), 64, "its name has 65 characters; at most 64 are allowed"),
    "the namespace": (
        lambda count: operator(namespace="n" * count),
        64,
        "its namespace has 65 characters; at most 64 are allowed",
    ),
    "an attribute's name": (
        lambda count: operator(attributes={"p": "int32 = 0", "q" * count: "int32 = 0"}),
        64,
        f"the name {'q' * 65} has 65 characters",
    ),
    "a tensor's name": (
        lambda count: operator(outputs={"Y": "fp32[n]", "Z" * count: "fp32[n]"}),
        64,
        f"the name {'Z' * 65} has 65 characters",
    ),
    "a function's name": (
        lambda count: operator(launches=[Launch({"x": "X"}, function="f" * (count - 5) + "{p}")]),
        255,
        "has 256 characters; at most 255 are allowed",
    ),
    "alignment": (
        lambda count: operator(alignment=count),
        1 << 30,
        "alignment is 1073741825; at most 1073741824 is allowed",
    ),
    "an option's number": (
        lambda count: operator(
            options=[Option("o", count)], launches=[LAUNCH, Launch({"x": "X"}, function="fo", option="o")]
        ),
        (1 << 31) - 1,
        "option o has number 2147483648; give 1 to 2147483647",
    ),
}


@pytest.mark.parametrize("kind", ROOM)
def test_so_much_and_no_more(kind: str) -> None:
    make, most, message = ROOM[kind]
    assert "_operator = {" in emitted(make(most))
    with pytest.raises(SpecError, match=re.escape(message)):
        emitted(make(most + 1))


def test_operators_of_one_library() -> None:
    made = [operator(name=f"Op{number}") for number in range(limits.MOST_OPERATORS + 1)]
    assert "pyfmha_operator_count = 64" in emit_operators(made[:-1], [], "libpyfmha.so")["pyfmha_operators.c"]
    with pytest.raises(SpecError, match="65 operators for one library; it has room for 64: build a second"):
        emit_operators(made, [], "libpyfmha.so")


def test_the_numbers_are_those_of_the_tables() -> None:
    templates = Path(PACKAGE) / "aot" / "templates"
    text = "".join((templates / name).read_text() for name in ("pyfmha_operator.h", "pyfmha_plugin.c"))
    wanted = {
        "PYFMHA_MAX_VALUES": limits.MOST_VALUES,
        "PYFMHA_MAX_LAUNCHES": limits.MOST_LAUNCHES,
        "PYFMHA_MAX_ARGUMENTS": limits.MOST_ARGUMENTS,
        "PYFMHA_MAX_TENSORS_IO": limits.MOST_TENSORS,
        "PYFMHA_MAX_PARTS": limits.MOST_PARTS,
        "PYFMHA_MAX_OPTIONS": limits.MOST_OPTIONS,
        "PYFMHA_MAX_FUNCTIONS": limits.MOST_FUNCTIONS,
        "PYFMHA_MAX_LIST": MOST_ELEMENTS,
        "MAX_OPERATORS": limits.MOST_OPERATORS,
    }
    for name, number in wanted.items():
        assert re.search(rf"\b{name} = {number}\b", text), name
