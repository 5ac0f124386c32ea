"""Score functions that say they are relative: tried, refused where they are not, told to the Hopper kernel."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyfmha.attention import biased_hopper
from pyfmha.cli import functions as cli_functions
from pyfmha.errors import KernelSourceError, SpecError
from pyfmha.functions.family import Declared, WithFunction, declared_in, file_of
from pyfmha.functions.relative import check_relative, inputs_of, trial_of
from pyfmha.interpreter.kernel import run_interpreted
from pyfmha.interpreter.loading import load_module

HEADER = """
import numpy as np
import triton.language as tl
import pyfmha

def example(batch, heads, q_len, kv_len):
    return {"slopes": np.linspace(0.5, 1, heads, dtype=np.float32)}
"""
DECORATED = "@pyfmha.score_function(relative=True, example=example)\n"


def functions_of(source: Path) -> list[Declared]:
    held = {name: value for name, value in vars(load_module(source)).items() if hasattr(type(value), "__pyfmha__")}
    return declared_in(source, lambda _: [{**value.__pyfmha__(), "attribute": name} for name, value in held.items()])


def written(folder: Path, body: str, header: str = HEADER) -> list[Declared]:
    path = folder / "own.py"
    path.write_text(header + body)
    return functions_of(path)


@pytest.mark.parametrize("name", ["alibi", "t5"])
def test_those_that_come_along_are(name: str) -> None:
    functions = functions_of(file_of(name))
    assert functions
    assert all(function.relative for function in functions)
    check_relative(functions, run=run_interpreted)


def test_others_are_not_tried() -> None:
    functions = functions_of(file_of("swin"))
    assert [function.trial for function in functions] == [""]
    check_relative(functions, run=lambda *_, **__: pytest.fail("nothing is to run"))


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("score + tl.load(slopes + head) * key", "adds 0 for query 58 and key 0 and 0.5 for query 59 and key 1,"),
        ("score * (1 + tl.load(slopes + head))", "for query 58 and key 0 and"),
        (
            "tl.where((key - query == 5) & (key > 60), float('-inf'), score + tl.load(slopes))",
            "adds 0.5 for query 20 and key 25 and -inf for query 56 and key 61,",
        ),
    ],
)
def test_one_that_is_not_is_refused(body: str, wrong: str, tmp_path: Path) -> None:
    functions = written(tmp_path, f"{DECORATED}def own(score, batch, head, query, key, slopes):\n    return {body}\n")
    with pytest.raises(SpecError, match=r"own of .* says it is relative, but of batch 0 and head 0 it") as caught:
        check_relative(functions, run=run_interpreted)
    assert wrong in str(caught.value)
    assert "drop relative=True" in str(caught.value)


def test_an_example_is_needed_and_must_not_fail(tmp_path: Path) -> None:
    body = "def own(score, batch, head, query, key):\n    return score + key - query\n"
    with pytest.raises(KernelSourceError, match="SpecError: own is relative, but has no example"):
        written(tmp_path, "@pyfmha.score_function(relative=True)\n" + body)
    failing = HEADER.replace("return {", "raise ValueError('no such model')\n    return {")
    with pytest.raises(SpecError, match=r"own: its example for batch 2, 3 heads.*fails: ValueError: no such model"):
        written(tmp_path, DECORATED + body, failing)


def test_the_example_comes_through_as_it_was() -> None:
    given: dict[str, Any] = {
        "table": np.float32([[1.5, -np.inf], [np.nan, 3e38]]), "starts": np.int64([2**62]), "width": 7,
        "rate": np.float32(0.5), "count": np.int64(3),
    }  # fmt: skip
    found = inputs_of(trial_of("any", lambda *_: given))
    assert [found[name] for name in ("width", "rate", "count")] == [7, 0.5, 3]
    assert not any(isinstance(found[name], np.ndarray) for name in ("rate", "count"))
    for name in ("table", "starts"):
        assert found[name].dtype == given[name].dtype
        np.testing.assert_array_equal(found[name], given[name])


PAIR = f"""
{DECORATED}def own(score, batch, head, query, key, slopes):
    return score + tl.load(slopes + head) * (key - query)

@pyfmha.mask_function
def all_seen(batch, head, query, key):
    return key >= 0

both = pyfmha.score_and_mask("both", own, all_seen)
"""


def test_the_hopper_kernel_is_told(tmp_path: Path) -> None:
    """Also of a pair, whose example then lacks nothing."""
    header = HEADER + "\ndef none(*_):\n    return {}\n"
    found = {f.name: f for f in written(tmp_path, PAIR.replace("mask_function", "mask_function(example=none)"), header)}
    told = {
        name: {dict(spec.constants).get("RELATIVE") for spec in WithFunction("fp16", 64, function=function).specs()}
        for name, function in found.items()
    }
    assert told == {"own": {True, None}, "both": {True, None}, "all_seen": {False, None}}


@pytest.mark.parametrize("size", biased_hopper.HEAD_SIZES)
def test_terms_have_room_in_shared_memory(size: int, tmp_path: Path) -> None:
    """With all that the producer loads into, as often as programs share a multiprocessor."""
    (function,) = written(tmp_path, PAIR.split("@pyfmha.mask_function", maxsplit=1)[0])
    hopper = [s for s in WithFunction("fp16", size, function=function).specs() if s.archs]
    assert hopper
    for spec in hopper:
        of: dict[str, Any] = dict(spec.constants)
        rows = of["CONSUMERS"] * 64 * of["Q_SLOTS"] + (of["STAGES"] + of["V_STAGES"]) * of["BLOCK_N"]
        terms = 2 * of["CONSUMERS"] * 4 * of["BLOCK_N"] * 4
        programs = 2 if of["CONSUMERS"] == 1 else 1
        assert programs * (rows * size * 2 + terms + 2048) <= 227 * 1024


OWN = Path(__file__).with_name("functions_of_tests.py")


@pytest.mark.parametrize(
    ("source", "name", "asked", "from_first"),
    [
        (file_of("alibi"), "alibi", False, False),
        (OWN, "soft", True, False),
        (OWN, "near", True, False),
        (OWN, "causal", False, True),
        (OWN, "even", True, False),
        (OWN, "soft_near", True, False),
        (file_of("prefix"), "prefix", False, True),
        (file_of("documents"), "documents", False, False),
    ],
)
def test_what_is_asked_for_each_element_has_one_consumer_of_few_keys(
    source: Path, name: str, asked: bool, from_first: bool
) -> None:
    """At head size 128, and where tiles see few keys, beside two consumers else; at 64 of few keys where bounds are all
    that is known."""
    (function,) = [function for function in functions_of(source) if function.name == name]
    assert (function.asked, function.from_first) == (asked, from_first)
    long = [s for s in WithFunction("fp16", 128, function=function).specs() if "q_len <= 1024" not in s.requires]
    first = dict(long[0].constants)
    assert (first["CONSUMERS"], first["BLOCK_N"]) == ((1, 64) if asked or name == "documents" else (2, 128))
    assert ("FROM_FIRST" in first) == from_first
    first = dict(WithFunction("fp16", 64, function=function).specs()[0].constants)
    assert (first["CONSUMERS"], first["BLOCK_N"]) == (1, 64 if name in ("near", "documents") else 128)


@pytest.mark.parametrize(
    ("source", "name", "even", "orders"),
    [
        (file_of("alibi"), "alibi", True, {64: {None, 2}, 128: {None, 2}}),
        (OWN, "causal", True, {64: {2}, 128: {None, 2}}),
        (file_of("prefix"), "prefix", False, {64: {2}, 128: {None}}),
        (file_of("documents"), "documents", False, {64: {None}, 128: {None}}),
        (OWN, "near", False, {64: {None}, 128: {None}}),
        (OWN, "soft_near", False, {64: {None}, 128: {None}}),
        (OWN, "soft_cap", True, {64: {None, 2}, 128: {None, 2}}),
    ],
)
def test_which_tiles_are_dealt_out_evenly(
    source: Path, name: str, even: bool, orders: dict[int, set[int | None]]
) -> None:
    """Those of causal attention, where bounds do not say otherwise, and of bounds that say the same; at 64 also of such
    as begin with the first key."""
    (function,) = [function for function in functions_of(source) if function.name == name]
    assert function.even == even
    for size, expected in orders.items():
        made = [dict(s.constants) for s in WithFunction("fp16", size, function=function).specs() if s.archs]
        plain = [constants for constants in made if not constants["GENERAL"]]
        assert {constants.get("EVEN") for constants in plain} == expected
        for constants in plain:
            assert constants.get("HANDED_ON") or "EVEN" not in constants
            assert not (constants.get("LONGEST_FIRST") and "EVEN" in constants)


BOUNDS = """
@triton.jit
def {name}(first_query, last_query, kv_len):
    return {values}

@pyfmha.mask_function(bounds={name})
def own(batch, head, query, key):
    return key <= query
"""


@pytest.mark.parametrize(("values", "asked"), [("0, last_query + 1", True), ("0, kv_len, 0, first_query + 1", False)])
def test_bounds_may_be_a_function(values: str, asked: bool, tmp_path: Path) -> None:
    (function,) = written(tmp_path, BOUNDS.format(name="of_own", values=values), "import triton\n" + HEADER)
    assert (function.asked, function.from_first, function.even) == (asked, not asked, False)


@pytest.mark.long
def test_a_build_tries_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "def own(score, batch, head, query, key, slopes):\n    return score + tl.load(slopes + head) * key\n"
    functions = written(tmp_path, DECORATED + body)
    monkeypatch.setattr(cli_functions, "declared_in", lambda *_: functions)
    with pytest.raises(SpecError, match=r"own of .* says it is relative"):
        cli_functions.functions_of([str(functions[0].source)], ["fp16"], [64], tmp_path / "out", fresh=True)
