"""Sizes of axes from shapes: names that stand alone, what expressions tell, and shapes that do not fit."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyfmha.errors import PluginError
from pyfmha.operators.description import Launch, Operator
from pyfmha.operators.expressions import Parser
from pyfmha.operators.forms import solve
from pyfmha.operators.instance import Instance
from pyfmha.operators.program import program_of


def instance(inputs: Any, outputs: Any, attributes: Any = (), **given: Any) -> Instance:
    operator = Operator("Op", inputs, outputs, [Launch({"x": "X"}, kernel="k")], attributes=attributes)
    return Instance(program_of(operator), given)


def sizes(made: Instance, *shapes: tuple[int, ...]) -> dict[str, Any]:
    count = len(made.forms([len(shape) for shape in shapes]).inputs)
    scope = made.measure(shapes[:count], shapes[count:])
    return {name: scope.values[name] for name in made.program.axes}


@settings(deadline=None)
@given(a=st.integers(0, 1 << 20), b=st.integers(0, 1 << 20), c=st.integers(1, 64))
def test_sums_products_and_quotients(a: int, b: int, c: int) -> None:
    made = instance(
        {"X": "fp32[a, a + b]", "Z": "fp32[2 * b + factor * c + 1, a / 2, cdiv(c, 3)]"},
        {"Y": "fp32[a * b, a % 7, max(a, b), b // 3]"},
        {"factor": "int32"},
        factor=5,
    )
    shapes = ((a, a + b), (2 * b + 5 * c + 1, a // 2, -(-c // 3)), (a * b, a % 7, max(a, b), b // 3))
    assert sizes(made, *shapes) == {"a": a, "b": b, "c": c}
    for index, shape in enumerate(shapes):
        for axis in range(len(shape)):
            changed = list(map(list, shapes))
            changed[index][axis] += 1
            if (index, axis) == (0, 0) and a == 0 and b == 0:
                continue
            with pytest.raises(PluginError, match=r"^shapes are X \[.*they must be X \[a, a \+ b\], Z \["):
                sizes(made, *map(tuple, changed))


@settings(deadline=None)
@given(
    factor=st.integers(-50, 50),
    offset=st.integers(-50, 50),
    size=st.integers(-100, 5000),
)
def test_what_one_unknown_is(factor: int, offset: int, size: int) -> None:
    expression = Parser({"n": "int", "f": "int", "o": "int"}).parse("f * n + o", "test")
    found = solve(expression, "n", size, {"f": factor, "o": offset})
    fitting = [n for n in range(0, 5200) if factor * n + offset == size] if factor else []
    assert found == (fitting[0] if fitting else None)


def test_what_overflows_has_no_solution() -> None:
    expression = Parser({"n": "int"}).parse("4611686018427387904 * n + n", "test")
    assert solve(expression, "n", 4611686018427387905, {}) == 1
    assert solve(expression, "n", 2 * 4611686018427387905, {}) is None


def test_equal_names_are_equal_sizes() -> None:
    made = instance({"X": "fp32[rows, rows]", "Z": "fp32[cols]"}, {"Y": "fp32[cols, rows]"})
    assert sizes(made, (3, 3), (4,), (4, 3)) == {"rows": 3, "cols": 4}
    with pytest.raises(PluginError, match=r"X \[3, 4\], Z \[4\], Y \[4, 3\]; they must be X .*a name stands"):
        sizes(made, (3, 4), (4,), (4, 3))


def test_sizes_by_attributes_are_numbers_in_messages() -> None:
    made = instance({"X": "fp32[rows, 2 * width]"}, {"Y": "fp32[rows]"}, {"width": "int32"}, width=8)
    assert [str(form) for form in made.forms().all] == ["X [rows, 16]", "Y [rows]"]
    assert made.forms().inputs[0].named() == "[rows, 2 * width]"
    assert sizes(made, (3, 16), (3,)) == {"rows": 3}
    with pytest.raises(PluginError, match=r"shapes are X \[3, 17\], Y \[3\]; they must be X \[rows, 16\], Y \[rows\]"):
        sizes(made, (3, 17), (3,))


def test_forms_are_told_apart_by_rank() -> None:
    made = instance({"X": ["fp32[rows, cols]", "fp32[batch, rows, cols]"]}, {"Y": "fp32[rows]"})
    assert [str(form) for form in made.forms([2]).inputs] == ["X [rows, cols]"]
    assert [str(form) for form in made.forms([3]).inputs] == ["X [batch, rows, cols]"]
    assert sizes(made, (3, 4), (3,)) == {"rows": 3, "cols": 4, "batch": 0}
    assert sizes(made, (2, 3, 4), (3,)) == {"rows": 3, "cols": 4, "batch": 2}
    with pytest.raises(PluginError, match=r"shapes are X \[3\]"):
        sizes(made, (3,), (3,))


def test_scalars_and_eight_dimensions() -> None:
    names = ", ".join("abcdefgh")
    made = instance({"X": f"fp32[{names}]", "Z": "fp32[]"}, {"Y": f"fp32[{names}]"})
    shape = (1, 2, 3, 4, 5, 6, 7, 0)
    assert sizes(made, shape, (), shape) == dict(zip("abcdefgh", shape, strict=True))


@pytest.mark.parametrize(("shapes", "given"), [(((3, 4),), 0), (((3, 4), (3,), (3,)), 2)])
def test_another_number_of_tensors(shapes: Any, given: int) -> None:
    made = instance({"X": "fp32[rows, cols]"}, {"Y": "fp32[rows]"})
    with pytest.raises(PluginError, match=rf"1 inputs, {given} outputs; it has the inputs X, the outputs Y"):
        made.measure(shapes[:1], shapes[1:])


def test_sizes_that_are_negative() -> None:
    made = instance({"X": "fp32[rows, cols]"}, {"Y": "fp32[rows]"})
    with pytest.raises(PluginError, match=r"shapes are X \[-1, 4\]"):
        sizes(made, (-1, 4), (-1,))
