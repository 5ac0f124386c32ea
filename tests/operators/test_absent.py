"""Types and axes that only a tensor has which is not there; and numbers as fields of 32 bits hold them."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from trt_double.twins import Pair, drive, fields_of, shapes_for, spoilt

from pyfmha import Attribute, Launch, Operator, Tensor
from pyfmha.attention.operator import OPERATOR
from pyfmha.errors import PluginError, SpecError
from pyfmha.operators.instance import Instance
from pyfmha.operators.program import program_of
from pyfmha.operators.trials import check_absent

pytest_plugins = ("described.fixtures",)


def described(inputs: dict[str, str], outputs: dict[str, str], **attributes: Any) -> Operator:
    return Operator(
        "Op",
        inputs,
        outputs,
        [Launch({"y": "Y"}, function="f_{T}_{U}")],
        types={"T": ("fp16", "fp32"), "U": ("bf16", "fp32")},
        attributes=attributes,
    )


FLAG = Attribute("int32", 0, choices=(0, 1))


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (
            described({"X": "T[n]", "B": "U[n] when flag"}, {"Y": "U[n]"}, flag=FLAG),
            r"Op: with flag = 0: nothing tells the type U of Y for these attributes; B would",
        ),
        (
            described({"X": "T[n]", "B": "U[m] when mode == 'wide'"}, {"Y": "T[n, m]"}, mode="string = narrow"),
            r"Op: with mode = '': nothing tells the axis m of Y for these attributes; B would",
        ),
        (
            described({"X": "T[n * m]", "B": "U[m] when count > 3"}, {"Y": "T[1]"}, count="int64"),
            r"Op: with count = 1: nothing tells the axis m of X for these attributes; X, B would",
        ),
        (
            Operator(
                "Op",
                {"X": "fp16[n]"},
                [Tensor("Y", "fp16[n]", "flag > 0"), Tensor("Y", "fp16[1]", "flag or flag > 3")],
                [Launch({"y": "Y"}, function="f")],
                attributes={"flag": FLAG},
            ),
            "Op: with flag = 1: two outputs are called Y for these attributes",
        ),
    ],
)  # fmt: skip
def test_a_description_that_leaves_something_untold_is_refused(operator: Operator, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check_absent(operator)


@pytest.mark.parametrize(
    "operator",
    [
        OPERATOR,
        # The output is there with the input; either input tells; a type of which nothing but kernels hangs.
        described({"X": "T[n]", "B": "U[n] when flag"}, {"Y": "T[n]", "Z": "U[n] when flag == 1"}, flag=FLAG),
        described({"A": "U[n] when flag", "B": "U[n] when not flag", "X": "T[n]"}, {"Y": "U[n]"}, flag=FLAG),
        described({"X": "T[n]", "B": "U[n] when flag"}, {"Y": "T[n]"}, flag=FLAG),
        # What checks refuse is no contradiction.
        Operator(
            "Op",
            {"X": "T[n]", "B": "U[n] when flag < 9"},
            {"Y": "U[n]"},
            [Launch({"y": "Y"}, function="f")],
            types={"T": "fp16", "U": "fp32"},
            attributes={"flag": Attribute("int32", 0, minimum=0, maximum=8)},
        ),
    ],
)  # fmt: skip
def test_what_is_always_told_is_not(operator: Operator) -> None:
    check_absent(operator)


def test_a_type_that_no_tensor_has_is_its_first() -> None:
    program = program_of(described({"X": "T[n]", "B": "U[n] when flag"}, {"Y": "T[n]"}, flag=FLAG))
    assert Instance(program, {}).types == {"U": "bf16"}
    assert Instance(program, {"flag": 1}).types == {}
    assert Instance(program, {}).with_types({"T": "fp32"}).launched_functions() == ("f_fp32_bf16",)


VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "Optional": {"biased": (0, 1, 2)},
    "UntoldType": {"level": (0, 12, 13, 21)},
    "UntoldAxis": {"level": (0, 12, 13, 21)},
    "Twice": {"level": (0, 12, 13, 21)},
    "Rounded": {
        "one": (0.1, 0.3, 0.2),
        "other": (0.1, 0.7, 0.3, 0.70001),
        "factor": (1, 306_783_378, 306_783_379, 400_000_001),
        "product": (5, -(1 << 31)),
        "weights": ((0.1,), (0.1, 0.09), (7.0,)),
    },
}


@pytest.mark.parametrize("name", VALUES)
def test_both_plugins_say_so(pair_of: Callable[[str], Pair], name: str) -> None:
    pair = pair_of(name)
    chance = random.Random(name)
    counts = {"refused": 0, "prepared": 0, "launched": 0, "split": 0}
    for _ in range(80):
        values = {key: chance.choice(one) for key, one in VALUES[name].items() if chance.random() < 0.6}
        plugins = pair.create(spoilt(fields_of(pair.operator, values), chance))
        if plugins is None:
            counts["refused"] += 1
            continue
        counts[drive(pair, plugins, chance, shapes_for((0, 1, 2, 7, 64), (1 << 31, 1 << 62)))] += 1
        plugins[1].delete()
    assert counts["refused"] > 0
    assert counts["launched"] > 0
    if name.startswith("Untold"):
        assert pair.create(fields_of(pair.operator, {"level": 12})) is None
        assert "nothing tells the" in pair.c.error()
        assert pair.c.error().endswith("for these attributes; Bias would")
    if name == "Twice":
        assert pair.create(fields_of(pair.operator, {"level": 13})) is None
        assert "two outputs are called Y for these attributes" in pair.c.error()


def test_a_limit_of_a_tenth_allows_a_tenth(pair_of: Callable[[str], Pair]) -> None:
    """0.1 arrives as float32, which is a little more; a default is what would arrive."""
    pair = pair_of("Rounded")
    given = pair.create(fields_of(pair.operator, {"one": 0.1, "other": 0.7, "weights": (0.1, 0.2)}))
    default = pair.create([])
    assert given is not None
    assert default is not None
    assert pair.both("timing_cache_id", given) == pair.both("timing_cache_id", default)
    assert default[0].instance.attributes["one"] == float(np.float32(0.1))
    with pytest.raises(PluginError, match="product is 2147483653; int32 holds -2147483648 to 2147483647"):
        Instance(pair.program, {"factor": 306_783_379})
    for plugin in (*given[1:], *default[1:]):
        plugin.delete()
