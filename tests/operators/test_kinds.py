"""Whatever a field of a description is given: it is taken, or refused by its name and that of its part."""

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest

from pyfmha.errors import SpecError
from pyfmha.operators.description import Attribute, Check, Config, Launch, Operator, Option, Part, Tensor, Types
from pyfmha.operators.program import program_of
from pyfmha.operators.trials import check_absent

ODD: list[Any] = [
    *(None, 3, True, float("inf"), 1 << 70, "a b", "\0", b"x", ["xy"], [["x", "y"]], [["x", 3]], {3: "x"}, {"x": None}),
    *(object(), {1, 2}, (1, 2), lambda: 0, Check("1", "text"), [Launch({"x": "X"}, kernel="k")], [Config()]),
    *({"x": Attribute("int32")}, [[["x"]]], {"x": ["y"]}),
]
LAUNCH = {"arguments": {"x": "X", "y": "Y", "n": "n"}, "kernel": "k", "grid": "n"}
COMPLETE: list[tuple[type, str, dict[str, Any], Callable[[Any], dict[str, Any]]]] = [
    (Launch, "launch k", LAUNCH, lambda made: {"launches": [made]}),
    (Config, "launch k, configs[0]", {}, lambda made: {"launches": [Launch(**LAUNCH, configs=[made])]}),
    (Attribute, "attribute a", {"type": "int32"}, lambda made: {"attributes": {"a": made}}),
    (Attribute, "attribute a", {"type": "fp32[]"}, lambda made: {"attributes": {"a": made}}),
    (Attribute, "attribute a", {"type": "string"}, lambda made: {"attributes": {"a": made}}),
    (Tensor, "input X", {"name": "X", "forms": "T[n]"}, lambda made: {"inputs": [made]}),
    (Types, "type T", {"names": "fp16"}, lambda made: {"types": {"T": made}}),
    (Check, "checks[0]", {"condition": "n > 0", "message": "text"}, lambda made: {"checks": [made]}),
    (Part, "workspace P", {"name": "P", "bytes": "4"}, lambda made: {"workspace": [made]}),
    (Option, "option O", {"name": "O", "number": 1}, lambda made: {"options": [made]}),
]


def operator(**changes: Any) -> Operator:
    usual: dict[str, Any] = {
        "name": "Copy",
        "inputs": {"X": "T[n]"},
        "outputs": {"Y": "T[n]"},
        "types": {"T": ("fp16", "fp32")},
        "launches": [Launch(**LAUNCH)],
    }
    return Operator(**{**usual, **changes})


def givers() -> Iterator[tuple[str, Callable[[Any], Operator]]]:
    """Of each field its name, and what makes an operator of a value in it."""
    for field in fields(Operator):
        yield field.name, lambda value, name=field.name: operator(**{name: value})
    for kind, _, usual, around in COMPLETE:
        for field in fields(kind):
            made = lambda value, k=kind, u=usual, n=field.name, a=around: operator(**a(k(**{**u, n: value})))  # noqa: E731
            yield field.name, made
    for name in ("inputs", "outputs", "attributes", "types", "workspace", "define", "labels"):
        yield name, lambda value, name=name: operator(**{name: {"x": value}})
    for name in ("inputs", "launches", "checks", "workspace", "options"):
        yield name, lambda value, name=name: operator(**{name: [value]})
    for name in ("arguments", "constants", "scalars"):
        yield name, lambda value, name=name: operator(launches=[Launch(**{**LAUNCH, name: {"x": value}})])


def test_every_field_takes_or_refuses() -> None:
    taken = refused = 0
    for _, made in givers():
        for value in ODD:
            try:
                given = made(value)
                program_of(given)
                check_absent(given)
            except SpecError:
                refused += 1
                continue
            assert Operator.from_json(given.to_json()).of(given.source) == given
            taken += 1
    assert refused > 1000
    assert taken > 40


@pytest.mark.parametrize(
    ("kind", "what", "usual", "around"), COMPLETE, ids=[f"{k.__name__}{n}" for n, (k, *_) in enumerate(COMPLETE)]
)
def test_what_is_refused_is_named(
    kind: type, what: str, usual: dict[str, Any], around: Callable[[Any], dict[str, Any]]
) -> None:
    for field in fields(kind):
        if (kind, field.name) in ((Launch, "kernel"), (Tensor, "name"), (Part, "name"), (Option, "name")):
            continue  # that by which it is called
        with pytest.raises(SpecError) as told:
            operator(**around(kind(**{**usual, field.name: object()})))
        said = str(told.value)
        assert f"{field.name} is <object" in said or "type <object" in said or "types <object" in said, said
        assert f"Copy: {what}: " in said or "<object" in said.partition("; ")[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checks": ["n > 0"]}, r"Copy: checks is ('n > 0',); give a list of Check(...)"),
        ({"checks": "n > 0"}, r"Copy: checks is 'n > 0'; give a list of Check(...)"),
        ({"checks": {"n > 0": "text"}}, r"Copy: checks is {'n > 0': 'text'}; give a list of Check(...)"),
        ({"launches": Launch(**LAUNCH)}, "Copy: launches is Launch("),
        ({"inputs": ["T[n]"]}, "Copy: inputs is ('T[n]',); give a mapping from name to form, or a list of Tensor(...)"),
        ({"alignment": "64"}, "Copy: alignment is '64'; give an integer"),
        (
            {"attributes": {"a": Attribute("int32", minimum="1")}},
            "Copy: attribute a: minimum is '1'; give a number, or",
        ),
        ({"attributes": {"a": Attribute("int32", maximum=float("inf"))}}, "attribute a: its maximum inf is no int32"),
        (
            {"attributes": {"a": Attribute("string", choices="sum")}},
            "attribute a: choices is 'sum'; give a list of numb",
        ),
        ({"attributes": {"a": Attribute("int32", 0, stored="b")}}, "Copy: attribute a, stored: 'b' is not known"),
        ({"types": {"T": "fp17"}}, "type T: types fp17; there are fp32"),
        (
            {"launches": [Launch(**LAUNCH, constants={"B": object})]},
            "launch k: constants is (('B', <class 'object'>),)",
        ),
        (
            {"launches": [Launch(**LAUNCH, configs=[{"num_warps": 4}])]},
            "launch k: configs is ({'num_warps': 4},); give",
        ),
        (
            {"launches": [Launch(**LAUNCH, when="a\0b")]},
            r"Copy: launches[0].when is 'a\x00b', which holds the character",
        ),
        ({"workspace": [Part("P", "4", "m")]}, "Copy: workspace P, when: 'm' is not known"),
    ],
)
def test_what_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as told:
        program_of(operator(**changes))
    assert message in str(told.value)


def test_lists_become_tuples() -> None:
    """As JSON has them: a description goes through it on the way from its file."""
    launch = Launch(**LAUNCH, constants={"SIZES": [1, [2, 3]], "NAME": None})
    made = operator(launches=[launch], attributes={"steps": Attribute("int32[]", [1, 2])})
    assert made.launches[0].constants == (("SIZES", (1, (2, 3))), ("NAME", None))
    assert Operator.from_json(made.to_json()) == made
    assert program_of(made).attributes["steps"] == (1, 2)
