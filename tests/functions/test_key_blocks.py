"""Mask functions whose blocks of keys are listed by a launch before attention: right, and no more than is seen."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from biased_runs import Lists, Problem, expected, judge, launch, place
from helpers import few_of
from numpy.random import default_rng
from test_functions import OWN, constants, declared, products

from pyfmha.attention.key_blocks import TILE, KeyBlocks, bytes_of
from pyfmha.errors import SpecError
from pyfmha.functions import mask_function, score_and_mask, score_function
from pyfmha.functions.family import Declared, WithFunction, file_of
from pyfmha.interpreter.kernel import FunctionOf

SMALL = Problem(batch=2, heads=1, kv_heads=1, q_len=40, kv_len=56)
NUMBERS = default_rng(5).integers(0, 4, (2, 56)).astype(np.int32)


def near(b: int, h: int, i: Any, j: Any) -> Any:
    return (i - j < 9) & (j <= i)


def same(b: int, h: int, i: Any, j: Any) -> Any:
    return NUMBERS[b][i] == NUMBERS[b][j]


FORMULAS: dict[str, tuple[Any, dict[str, Any]]] = {
    "near": (near, {"width": 9}),
    "even": (lambda b, h, i, j: (i + j) % 2 == 0, {}),
    "causal": (lambda b, h, i, j: j <= i, {}),
    "groups": (same, {"numbers": NUMBERS, "tokens": 56}),
}
CASES: list[tuple[str, dict[str, Any], tuple[int, int], tuple[int, int]]] = [
    # function, problem, lists of sequences and heads, queries and keys of an entry
    ("groups", {}, (2, 1), (16, 16)),
    ("causal", {"blocks": (8, 16)}, (1, 1), (16, 32)),
    ("near", {"q_lengths": [33, 7], "kv_lengths": [11, 50], "dtype": "bf16"}, (2, 1), (16, 16)),
    ("even", {"right": 0, "left": 20, "bottom_right": True}, (1, 1), (32, 16)),
    ("groups", {"mask": (2, 1, 40, 56), "bias": (1, 1, 40, 56), "sinks": "own", "softcap": 3.0}, (2, 1), (16, 16)),
    ("near", {"mask": (1, 2, 1, 56), "share": 0.2, "blocks": (16, 8), "heads": 2}, (1, 2), (16, 16)),
    ("causal", {"cu_q": [2, 20, 40], "cu_kv": [0, 30, 56], "batch": 1, "bottom_right": True}, (1, 1), (16, 16)),
    ("groups", {"cu_q": [0, 7, 38], "cu_kv": [3, 3, 50], "batch": 1, "blocks": (8, 16)}, (1, 1), (16, 16)),
    ("causal", {"cu_q": [0, 9, 40], "cu_kv": [0, 24, 56], "batch": 1, "mask": (2, 1, 31, 20), "bias": (1, 1, 31, 25)},
     (1, 1), (16, 16)),
]  # fmt: skip


def named(name: str) -> Declared:
    """A function of the tests' or, that one, of pyfmha's."""
    return declared(file_of("groups") if name == "groups" else OWN, name)


@pytest.mark.parametrize(
    ("name", "options", "counts", "tile"), few_of(CASES, lambda case: case in (CASES[4], CASES[7]))
)
def test_against_float64(name: str, options: dict[str, Any], counts: tuple[int, int], tile: tuple[int, int]) -> None:
    """With all else that masks; a list that lacks an entry is found out."""
    formula, inputs = FORMULAS[name]
    problem = Problem(**{**vars(SMALL), **options})
    functions = constants(named(name), inputs)
    made = place(problem)
    exact = expected(problem, made, seen=formula)
    lists = Lists(*counts, tile)
    judge(problem, *launch(problem, made, functions, lists), *exact)

    def shorten(entries: np.ndarray) -> None:
        """The last list that has an entry loses one: of those seen in part, else of the whole ones."""
        at = np.argwhere(entries[..., :2] > 0)
        kind = at[:, 3].min()
        entries[(*at[at[:, 3] == kind][-1][:3], kind)] -= 1

    spoilt = Lists(*counts, tile, shorten)
    with pytest.raises(AssertionError):
        judge(problem, *launch(problem, place(problem), functions, spoilt), *exact)


def blocks_seen(problem: Problem, formula: Any, size: int) -> int:
    """Blocks of which some key is seen by some query."""
    seen = [
        formula(b, h, np.arange(problem.q_len)[:, None], np.arange(problem.kv_len)[None, :])
        for b in range(problem.batch) for h in range(problem.heads)
    ]  # fmt: skip
    cut = np.array(seen).reshape(-1, problem.q_len // size, size, problem.kv_len // size, size)
    return int(cut.any(axis=(2, 4)).sum())


def test_only_blocks_that_are_seen_are_computed() -> None:
    """Documents in any order: bounds would have to span them."""
    problem = Problem(batch=2, heads=2, kv_heads=1, q_len=64, kv_len=64, blocks=(16, 16))
    numbers = np.repeat([[0, 1, 0, 1], [0, 1, 1, 0]], 16, axis=1).astype(np.int32)
    functions = constants(named("groups"), {"numbers": numbers, "tokens": 64})

    def formula(b: int, h: int, i: Any, j: Any) -> Any:
        return numbers[b][i] == numbers[b][j]

    lists = Lists(2, 1)
    assert products(problem, functions, lists) == blocks_seen(problem, formula, 16) == 2 * 2 * 4 * 2
    assert lists.entries[..., 1].sum() == 2 * 4 * 2, "all of them whole, once for both heads"
    assert products(problem, functions) == 2 * 2 * 4 * 4


def test_a_tree_beside_what_came_before() -> None:
    """Two sequences of drafts, each on its own branch: the other's blocks are not visited."""
    problem = Problem(q_len=64, kv_len=96, blocks=(16, 16), bottom_right=True)
    inputs = {"starts": np.int32([32]), "nodes": 64}
    bits = [sum(1 << k for k in range(64) if k // 32 == j // 32 and k <= j) for j in range(64)]
    inputs["ancestors"] = np.array([bits], np.uint64).view(np.int64)
    functions = constants(declared(file_of("tree"), "tree"), inputs)
    lists = Lists(1, 1)
    # Two blocks of what came before for each tile; of the drafts 1, 2, 1, 2 where there would be 1, 2, 3, 4.
    assert products(problem, functions, lists) == 4 * 2 + 1 + 2 + 1 + 2
    assert lists.entries[0, 0, :, :2].tolist() == [[1, 2], [1, 3], [1, 2], [1, 3]]


def test_blocks_that_a_mask_tensor_hides_are_not_visited() -> None:
    """And of those that it shows whole it is not read again: there it may be anything by then."""
    problem = Problem(q_len=32, kv_len=96, blocks=(16, 16), mask=(1, 1, 32, 96))
    shown = np.zeros((32, 96), bool)
    shown[:16, 16:48] = shown[16:, 64:70] = True

    def edit(values: dict[str, np.ndarray]) -> None:
        values["mask"][...] = shown
        for name in "KV":
            values[name][:, :, :16] = values[name][:, :, 80:] = np.nan  # which would show

    function = declared(file_of("blocks"), "blocks")
    made, lists = place(problem, edit), Lists(1, 1)
    exact = expected(problem, place(problem, lambda v: v["mask"].__setitem__(..., shown)))
    judge(problem, *launch(problem, made, constants(function, {}), lists), *exact)
    assert lists.entries[0, 0, :, :2].tolist() == [[0, 2], [1, 0]]

    made = place(problem, edit)
    lists.spoil = lambda entries: made.values["mask"][0, 0, :16, 16:48].fill(0)
    judge(problem, *launch(problem, made, constants(function, {}), lists), *exact)


def test_blocks_that_several_programs_ask_about_are_listed_in_order() -> None:
    """More of them than programs, and than the second launch looks at in a round."""
    blocks = 70
    problem = Problem(q_len=16, kv_len=16 * blocks, blocks=(16, 16), mask=(1, 1, 16, 16 * blocks))
    kinds = default_rng(3).integers(0, 3, blocks)  # nothing, in part, whole
    shown = np.repeat(kinds == 2, 16) | (np.repeat(kinds == 1, 16) & (np.arange(16 * blocks) % 16 == 5))

    def edit(values: dict[str, np.ndarray]) -> None:
        values["mask"][...] = shown

    made, lists = place(problem, edit), Lists(1, 1)
    function = declared(file_of("blocks"), "blocks")
    judge(problem, *launch(problem, made, constants(function, {}), lists), *expected(problem, place(problem, edit)))
    partly, wholly = (np.flatnonzero(kinds == kind) for kind in (1, 2))
    entries = lists.entries[0, 0, 0]
    assert entries[:2].tolist() == [len(partly), len(wholly)]
    assert entries[2 : 2 + len(partly)].tolist() == partly.tolist()
    assert entries[len(entries) - len(wholly) :].tolist() == wholly[::-1].tolist()


def test_whole_blocks_do_not_ask_the_function() -> None:
    problem = Problem(q_len=64, kv_len=64, blocks=(16, 16))
    asked = {**constants(declared(OWN, "causal"), {})}
    lists = Lists(1, 1)

    def spoil(entries: np.ndarray) -> None:
        asked["SEEN"] = FunctionOf(str(OWN), "even.seen")

    lists.spoil = spoil
    made = place(problem)
    launch(problem, made, dict(asked), lists)
    assert lists.entries[0, 0, :, :2].tolist() == [[1, 0], [1, 1], [1, 2], [1, 3]]


def test_what_tells_lists_apart() -> None:
    def shared(batch, head, query, key): ...
    def own(batch, head, query, key, slopes): ...

    assert mask_function(shared, blocks=True).__pyfmha__()["blocks"] == {"batch": False, "head": False}
    assert mask_function(shared).__pyfmha__()["blocks"] is None
    bounded = mask_function(shared, blocks=True, bounds=lambda head, kv_len: (head, kv_len))
    assert bounded.__pyfmha__()["blocks"] == {"batch": False, "head": True}
    pair = score_and_mask("pair", score_function(lambda_score), mask_function(own, blocks=True))
    assert pair.__pyfmha__()["blocks"] == {"batch": False, "head": False}
    with pytest.raises(SpecError, match="blocks is 128; give True or False"):
        mask_function(shared, blocks=128)
    given: dict[str, Any] = {"lengths": False, "mask": (0, 0), "ragged": False}
    assert KeyBlocks(batch=False, head=False).numbers(3, 4, **given) == (1, 1)
    assert KeyBlocks(batch=True, head=True).numbers(3, 4, **given) == (3, 4)
    assert KeyBlocks(batch=False, head=False).numbers(3, 4, **{**given, "lengths": True, "mask": (0, 5)}) == (3, 4)
    assert KeyBlocks(batch=True, head=False).numbers(3, 4, **{**given, "ragged": True}) == (1, 1)
    assert bytes_of(2, 3, 129, 1000) == 4 * 6 * 2 * (10 + 8)


def lambda_score(score, batch, head, query, key): ...


def test_a_function_with_lists_is_another_one() -> None:
    """An engine built without has no memory for them."""

    def shared(batch, head, query, key): ...

    names = [mask_function(shared, blocks=blocks).__pyfmha__()["mask"] for blocks in (False, True, False)]
    assert names[0] == names[2] != names[1]


def test_the_library_functions() -> None:
    """What walks lists takes what writes them takes; every tile of it fits into theirs."""
    function = replace(named("groups"), blocks=KeyBlocks(batch=True, head=False))
    for dtype, size in (("fp16", 256), ("fp16", 128), ("fp32", 64)):
        *walking, aligned, flagging, writing = WithFunction(dtype, size, function=function).specs()
        assert writing.name == f"fmha_blocks_groups_d{size}_{dtype}"
        assert aligned.name == flagging.name == f"fmha_flags_groups_d{size}_{dtype}"
        hints = {argument.name for argument in aligned.arguments if argument.hint}
        assert hints == {"Mask", *(f"mask_stride_{axis}" for axis in "bhqk")}
        assert {spec.name for spec in walking} == {f"fmha_with_groups_d{size}_{dtype}"}
        hopper = [spec for spec in walking if spec.archs]
        assert all(dict(spec.constants)["LIST"] == TILE for spec in hopper)
        assert all(TILE % dict(spec.constants)["BLOCK_N"] == 0 for spec in hopper)
        for spec in walking[len(hopper) :]:
            assert dict(spec.prototype) == dict(flagging.prototype) == dict(writing.prototype)
            for tuned in (spec, *(spec.resolve(tuning.arch) for tuning in spec.tunings)):
                sizes = dict(tuned.constants)
                assert TILE % sizes["BLOCK_M"] == TILE % sizes["BLOCK_N"] == 0
                assert (sizes["LIST"], sizes["LIST_M"], sizes["LIST_N"]) == ("read", TILE, TILE)


WHOLE = """
import numpy as np, pyfmha
from pyfmha.attention.reference import attend, relative_error
from pyfmha.functions.groups import groups
chance = np.random.default_rng(0)
q, k, v = (chance.standard_normal((2, 2, rows, 32)).astype(np.float16) for rows in (130, 260, 260))
numbers = chance.integers(0, 3, (2, 260)).astype(np.int32)
out = pyfmha.interpret_attention(q, k, v, causal=True, mask=groups, mask_inputs=[numbers, 260])
seen = lambda b, h, i, j: numbers[b][i] == numbers[b][j]
exact, _ = attend(q, k, v, sm_scale=32**-0.5, window_right=0, seen=seen)
print(relative_error(out.astype(np.float64), exact))
"""


@pytest.mark.long
def test_interpret_attention_makes_both_launches() -> None:
    """As the plugin's description says them, in the workspace that it asks for."""
    program = [sys.executable, "-c", WHOLE]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2e-3
