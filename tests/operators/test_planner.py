"""Launches by what is written of a description, against those by walking it."""

import functools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention_operator import PROGRAM, Case, cases

from pyfmha.errors import PluginError
from pyfmha.operators.description import Attribute, Check, Launch, Operator, Option, Part, Tensor, Types
from pyfmha.operators.instance import Instance
from pyfmha.operators.plan import Plan, Pointer
from pyfmha.operators.planner import planner, walk
from pyfmha.operators.program import program_of

Shapes = list[tuple[int, ...]]
OPERATOR = Operator(
    name="Rich",
    inputs=[
        Tensor("X", "T[rows, 2 * width]"),
        Tensor("Index", "int32[batch + 1]"),
        Tensor("Extra", ["T[more]", "T[most, more]"], "extra"),
    ],
    outputs=[Tensor("Y", "T[rows, halved]"), Tensor("Z", "fp32[batch * count]")],
    types={"T": Types(("fp32", "fp16"))},
    attributes={"width": "int32", "extra": Attribute("int32", 0), "mode": Attribute("string", "fast")},
    define={
        "item": "itemsize(T) * 2",
        "halved": "cdiv(rows, 2)",
        "count": "3 if mode == 'slow' else 1",
        "stride_r": "stride(X, 0)",
        "stride_c": "1",
        "mean": "(1.0 * numel(X)) / max(rows * 1.0, 1.0)",
        "large": "has(more_of) and extra >= 0 and serves('main', 'kernel')",
    },
    checks=[Check("rows < 101", "{rows} rows of {mode:r}, {mean:g} each; at most 100"), Check("batch > 0", "no batch")],
    launches=[
        Launch(
            {"x": "X", "e": "Extra + 4 * more if extra else null", "p": "Parts + item if rows > 4 else Y", "r": "rows",
             "stride_r": "stride_r", "stride_c": "stride_c", "mean": "mean",
             "flag": "rows < device('multiprocessors')"},
            "not large or batch > 1", "rich_{T}_{mode}", "main",
        ),
        Launch(
            {"parts": "Parts", "sums": "Sums", "z": "Z", "n": "numel(Extra)"},
            "large", "rich_sum_{mode}", option="more_of",
        ),
    ],
    workspace=[Part("Parts", "rows * item", "large or rows > 4"), Part("Sums", "batch * 8 - 8")],
    options=[Option("more_of", 1, "extra")],
    shape_summary=[("", "{rows} rows"), ("large", ", large: {large}, {mode:r}, {mean:g}")],
)  # fmt: skip


def instance_of(**given: Any) -> Instance:
    return Instance(program_of(OPERATOR), given, {"more_of": True}, {"T": "fp16"})


def shapes_of(rows: int, batch: int, extra: tuple[int, ...] | None = None, width: int = 3) -> tuple[Shapes, Shapes]:
    return [(rows, 2 * width), (batch + 1,), *([extra] if extra else [])], [(rows, -(-rows // 2)), (batch,)]


def walked(
    instance: Instance, shapes: tuple[Shapes, Shapes], serves: Any, values: dict[str, int] | None = None
) -> Plan:
    return instance.plan(instance.measure(*shapes, serves=serves, device=figure, given=values or {}))


def figure(name: str) -> int:
    return {"multiprocessors": 9, "memory_clock": 2619000, "memory_bus": 5120}[name]


@pytest.mark.parametrize("serves", [True, False])
@pytest.mark.parametrize("values", [{}, {"stride_r": 77, "stride_c": 2}], ids=str)
@pytest.mark.parametrize("extra", [None, (5,), (2, 5)], ids=str)
def test_all_that_a_description_may_have(
    monkeypatch: pytest.MonkeyPatch, serves: bool, values: dict[str, int], extra: tuple[int, ...] | None
) -> None:
    instance = instance_of(width=3, extra=int(extra is not None))
    asked: list[tuple[Any, ...]] = []

    def answer(*question: Any) -> bool:
        asked.append(question)
        return serves

    tried = [shapes_of(rows, batch, extra) for rows, batch in ((7, 2), (3, 2), (9, 1), (0, 1), (100, 5))]
    wanted = [walked(instance, shapes, answer, values) for shapes in tried]
    asked_of_walk = list(asked)
    asked.clear()
    assert instance.planned(*tried[0], answer, values, figure) == wanted[0]
    asked.clear()

    def no_walk(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was walked")

    monkeypatch.setattr(instance, "measure", no_walk)
    assert [instance.planned(*shapes, answer, values, figure) for shapes in tried] == wanted
    assert asked == asked_of_walk
    assert wanted[0].steps[0].arguments[4] == values.get("stride_r", 6)
    assert [plan.sizes for plan in wanted[:1]] == ["7 rows, large: 1, 'fast', 6" if serves else "7 rows"]


REFUSED: list[tuple[tuple[Shapes, Shapes], str]] = [
    (shapes_of(101, 2), r"101 rows of 'fast', 6 each; at most 100"), (shapes_of(4, 0), "no batch"),
    (shapes_of(4, 2, width=4), r"shapes are X \[4, 8\]"), (([(4, 6), ()], [(4, 2), (2,)]), r"Index \[\]"),
    (([(4, 6), (0,)], [(4, 2), (2,)]), r"Index \[0\]"), (([(4, 6), (3,)], [(4, 2), (5,)]), r"Z \[5\]"),
    (([(4, 6), (3,)], [(4, 2)]), "2 inputs, 1 outputs"), (([(-4, 6), (3,)], [(-4, 2), (2,)]), r"X \[-4, 6\]"),
    (([(4, 6), (1 << 61,)], [(4, 2), ((1 << 61) - 1,)]), "overflows 64 bits"),
]  # fmt: skip


@pytest.mark.parametrize(("shapes", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_refused_is_refused_with_the_same_words(shapes: tuple[Shapes, Shapes], message: str) -> None:
    instance = instance_of(width=3)
    for _ in range(3):
        with pytest.raises(PluginError, match=message):
            instance.planned(*shapes, lambda *_: False)


def test_what_is_only_walked() -> None:
    read = Operator(
        name="Read",
        inputs={"X": "fp32[rows]", "S": "shape[1]"},
        outputs={"Y": "fp32[S[0]]"},
        launches=[Launch({"x": "X", "y": "Y", "n": "S[0]"}, kernel="read")],
    )
    instance = Instance(program_of(read), {})
    forms = instance.forms([1])
    assert planner(instance.program, instance.scope, forms, instance.active, False) is walk
    for size in (3, 4, 5):
        assert instance.planned([(2,)], [(size,)], lambda *_: False).steps[0].arguments[2] == size


def test_offsets_and_numbers_are_those_of_the_walk() -> None:
    """An offset outside what can be is refused, and a NaN is one NaN."""
    far = Operator(
        name="Far",
        inputs={"X": "fp32[rows]"},
        outputs={"Y": "fp32[rows]"},
        launches=[Launch({"x": "X + 8 * (rows - 3)", "y": "Y", "mean": "(rows - 5.0) / (rows - 5)"}, kernel="far")],
    )
    instance = Instance(program_of(far), {})
    forms = instance.forms([1])
    written = planner(instance.program, instance.scope, forms, instance.active, False)
    assert written is not walk
    nan = math.nan
    for rows, wanted in ((4, (Pointer("input", 0, 8), 1.0)), (5, (Pointer("input", 0, 16), nan)), (2, None)):
        found = written(((rows,), (rows,)), lambda *_: False, {})
        if wanted is None:
            assert found is None
            with pytest.raises(PluginError):
                walked(instance, ([(rows,)], [(rows,)]), lambda *_: False)
            continue
        assert found is not None
        (step,) = walked(instance, ([(rows,)], [(rows,)]), lambda *_: False).steps
        for at in (0, 2):
            assert repr(found.steps[0].arguments[at]) == repr(step.arguments[at]) == repr(wanted[at // 2])
        assert math.copysign(1, found.steps[0].arguments[2]) == math.copysign(1, step.arguments[2])


def check_attention(case: Case, has: bool, clusters: bool, moved: int) -> None:
    instance = Instance(PROGRAM, case.values).with_options({"decode": has})
    shapes, asked = case.shapes(), ([], [])  # type: ignore[var-annotated]
    values = {"q_stride_s": moved, "k_stride_h": moved} if case.newer and moved else {}

    def serves(answers: list[Any], *question: Any) -> bool:
        answers.append(question)
        return clusters

    forms = instance.forms([len(shape) for shape in shapes[0]])
    written = planner(PROGRAM, instance.scope, forms, instance.active, bool(values))
    assert written is not walk
    found = written((*shapes[0], *shapes[1]), functools.partial(serves, asked[0]), values, figure)
    assert found == walked(instance, shapes, functools.partial(serves, asked[1]), values)
    assert asked[0] == asked[1]
    if values:
        names = [name for name, _ in instance.active[-1].arguments]
        assert found is not None
        assert found.steps[0].arguments[names.index("q_stride_s")] == moved
    assert all(isinstance(argument, Pointer | int | float) for step in found.steps for argument in step.arguments)


@settings(max_examples=40, deadline=None)
@given(case=cases(), has=st.booleans(), clusters=st.booleans(), moved=st.sampled_from([0, 12345]))
def test_attention(case: Case, has: bool, clusters: bool, moved: int) -> None:
    check_attention(case, has, clusters, moved)


@pytest.mark.long
@settings(max_examples=1000, deadline=None)
@given(case=cases(), has=st.booleans(), clusters=st.booleans(), moved=st.sampled_from([0, 12345]))
def test_attention_at_length(case: Case, has: bool, clusters: bool, moved: int) -> None:
    check_attention(case, has, clusters, moved)
