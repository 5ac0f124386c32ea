"""Functions that users write: in the kernel under the interpreter, against formulas of numpy; what is refused."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import triton.language as tl
from biased_runs import Lists, Problem, expected, judge, launch, place
from helpers import some_of
from numpy.random import default_rng

from pyfmha.errors import SpecError
from pyfmha.functions import mask_function, score_and_mask, score_function
from pyfmha.functions.evaluate import evaluate, packed_inputs
from pyfmha.functions.family import ATTRIBUTES, SHIPPED, Declared, file_of, function_specs
from pyfmha.interpreter.kernel import FunctionOf, _load_kernel, run_interpreted

OWN = Path(__file__).with_name("functions_of_tests.py")


def declared(source: Path, name: str) -> Declared:
    described = _load_kernel(source, name).__pyfmha__()
    return Declared(source, name, tuple(map(tuple, described["inputs"])), tuple(described["parts"]))


def constants(function: Declared, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the kernel is told of a function."""
    packed = packed_inputs(function, inputs)
    parts = {p: FunctionOf(str(function.source), f"{function.name}.{ATTRIBUTES[p]}") for p in function.parts}
    return {**parts, "inputs": packed or None}


def check(function: Declared, inputs: dict[str, Any], problem: Problem, score: Any = None, seen: Any = None) -> None:
    """The kernel with a function against float64 with a formula of numpy; and the function in float64 against it."""
    made = place(problem)
    out, lse = launch(problem, made, constants(function, inputs))
    formulas = {"score": score, "seen": seen}
    judge(problem, out, lse, *expected(problem, made, **{k: f for k, f in formulas.items() if f}))
    scores = default_rng(0).standard_normal((problem.batch, problem.heads, problem.q_len, problem.kv_len))
    first = problem.kv_len - problem.q_len if problem.bottom_right else 0
    found, shown = evaluate(function, scores, inputs, first_position=first, run=run_interpreted)
    query = np.maximum(np.arange(problem.q_len)[:, None] + first, 0)
    key = np.arange(problem.kv_len)[None, :]
    for b, h in np.ndindex(scores.shape[:2]):
        exact = score(scores[b, h], b, h, query, key) if score else scores[b, h]
        np.testing.assert_allclose(found[b, h], exact, rtol=1e-6, atol=1e-6)
        assert (shown[b, h] == (seen(b, h, query, key) if seen else True)).all()


BASE = Problem(batch=2, heads=2, kv_heads=1, q_len=40, kv_len=56)
FLAT = Problem(batch=2, heads=3, kv_heads=3, q_len=48, kv_len=48)


@pytest.mark.parametrize(
    ("dtype", "more"),
    some_of(
        ["fp16", "bf16", "fp32"],
        [{}, {"bias": (1, 2, 40, 56), "mask": (2, 1, 1, 56), "sinks": "own", "softcap": 3.0}],
    ),
)
def test_score_and_mask_together(dtype: str, more: dict[str, Any]) -> None:
    caps = np.float32([2.0, 5.0])
    function = declared(OWN, "soft_near")
    problem = Problem(**{**vars(BASE), "dtype": dtype, "bottom_right": True, **more})
    check(
        function, {"caps": caps, "width": 9}, problem,
        lambda s, b, h, i, j: caps[h] * np.tanh(s / caps[h]), lambda b, h, i, j: (i - j < 9) & (j <= i),
    )  # fmt: skip


def test_minus_infinity_is_a_key_that_is_not_seen() -> None:
    halves = default_rng(1).random(56).astype(np.float16)
    function = declared(OWN, "dropped")
    assert function.inputs == (("halves", "*fp16"), ("most", "fp32"))
    check(function, {"halves": halves, "most": 0.5}, BASE, lambda s, b, h, i, j: np.where(halves[j] > 0.5, -np.inf, s))


def test_a_function_without_inputs() -> None:
    check(declared(OWN, "even"), {}, BASE, seen=lambda b, h, i, j: (i + j) % 2 == 0)


def test_a_mask_function_may_give_integers() -> None:
    """Not their last bit alone counts."""
    flags = np.tile(np.int32([0, 1, 2, 4, 256, -256, 7]), 8)
    check(declared(OWN, "flagged"), {"flags": flags}, BASE, seen=lambda b, h, i, j: (flags[j] & 262) != 0)


@pytest.mark.parametrize(
    ("name", "formula"),
    [("constant", lambda s, b, h, i, j: s * 0 + 0.5), ("of_keys", lambda s, b, h, i, j: s * 0 + j % 3)],
)
def test_a_score_function_may_give_less_than_a_block(name: str, formula: Any) -> None:
    check(declared(OWN, name), {}, BASE, formula)


@pytest.mark.parametrize(
    "options", [{"cu_q": [2, 20, 40], "cu_kv": [0, 30, 56]}, {"q_lengths": [33, 7], "kv_lengths": [11, 50]}]
)
def test_positions_are_those_of_the_sequence(options: dict[str, Any]) -> None:
    caps = np.float32([2.0, 5.0])
    problem = Problem(**{**vars(BASE), "batch": 1 if "cu_q" in options else 2, "bottom_right": True, **options})
    made = place(problem)
    out, lse = launch(problem, made, constants(declared(OWN, "soft_near"), {"caps": caps, "width": 9}))
    judge(
        problem, out, lse,
        *expected(problem, made, score=lambda s, b, h, i, j: caps[h] * np.tanh(s / caps[h]),
                  seen=lambda b, h, i, j: (i - j < 9) & (j <= i)),
    )  # fmt: skip


def products(problem: Problem, functions: dict[str, Any], lists: Lists | None = None) -> int:
    """How many blocks of keys are multiplied by."""
    made = place(problem)
    builder = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder
    dot, counted = builder.create_dot, [0]

    def counting(self: Any, *args: Any) -> Any:
        counted[0] += 1
        return dot(self, *args)

    with mock.patch.object(builder, "create_dot", counting):
        launch(problem, made, functions, lists)
    assert counted[0] % 2 == 0, "one product with K and one with V"
    return counted[0] // 2


def test_blocks_out_of_bounds_are_not_computed() -> None:
    problem = Problem(q_len=64, kv_len=128, blocks=(16, 16), bottom_right=True)
    near = constants(declared(OWN, "near"), {"width": 16})

    # Four tiles; each sees 16 + 16 - 1 keys, in up to three blocks; here two, as tiles begin where blocks do.
    assert products(problem, near) == 8
    assert products(problem, {**near, "BOUNDS": None}) == 32


def test_blocks_out_of_bounds_are_not_read() -> None:
    """NaN there would show in V, even with a weight of zero, and force the second computation."""
    problem = Problem(q_len=16, kv_len=128, blocks=(16, 16), bottom_right=True)
    made = place(problem)
    for name in "KV":
        made.values[name][:, :, :96] = np.nan
    near = constants(declared(OWN, "near"), {"width": 16})
    out, lse = launch(problem, made, near)

    judge(problem, out, lse, *expected(problem, place(problem), seen=lambda b, h, i, j: (i - j < 16) & (j <= i)))


def test_full_blocks_do_not_ask_the_function() -> None:
    problem = Problem(q_len=64, kv_len=64, blocks=(16, 16))
    causal = constants(declared(OWN, "causal"), {})
    check(declared(OWN, "causal"), {}, problem, seen=lambda b, h, i, j: j <= i)

    assert products(problem, causal) == 4 + 3 + 2 + 1
    # The function of another parity would hide keys everywhere; it is asked on the diagonal only.
    asked = {**causal, "SEEN": FunctionOf(str(OWN), "even.seen")}
    made = place(problem)
    out, lse = launch(problem, made, asked)

    def formula(b: int, h: int, i: Any, j: Any) -> Any:
        return (j < i // 16 * 16) | ((j < (i // 16 + 1) * 16) & ((i + j) % 2 == 0))

    judge(problem, out, lse, *expected(problem, made, seen=formula))


def ramp(count: int) -> np.ndarray:
    return (2.0 ** (-8 * (np.arange(count) + 1) / count)).astype(np.float32)


def t5_bucket(distance: np.ndarray, buckets: int, furthest: int) -> np.ndarray:
    """Of transformers' T5Attention._relative_position_bucket, in float64."""
    exact = buckets // 2
    logarithm = np.log(np.maximum(distance, 1) / exact) / np.log(furthest / exact)
    large = exact + (logarithm * (buckets - exact) + 1e-9).astype(int)
    return np.where(distance < exact, distance, np.minimum(large, buckets - 1))


def test_alibi() -> None:
    slopes = ramp(3)
    check(declared(file_of("alibi"), "alibi"), {"slopes": slopes}, FLAT, lambda s, b, h, i, j: s + slopes[h] * (j - i))


@pytest.mark.parametrize("name", ["t5", "t5_causal"])
def test_t5(name: str) -> None:
    table = default_rng(2).standard_normal((16, 3)).astype(np.float32)
    inputs = {"table": table, "heads": 3, "buckets": 16, "furthest": 32}

    def formula(s: Any, b: int, h: int, i: Any, j: Any) -> Any:
        if name == "t5":
            bucket = np.where(j > i, 8, 0) + t5_bucket(np.abs(j - i), 8, 32)
        else:
            bucket = t5_bucket(np.maximum(i - j, 0), 16, 32)
        return s + table[bucket, h]

    check(declared(file_of("t5"), name), inputs, FLAT, formula)


def test_t5_buckets_of_every_distance() -> None:
    """T5's own sizes: every distance up to 600, among them the powers at which buckets change."""
    table = np.arange(32, dtype=np.float32)[:, None].copy()
    inputs = {"table": table, "heads": 1, "buckets": 32, "furthest": 128}
    found, _ = evaluate(declared(file_of("t5"), "t5_causal"), np.zeros((1, 1, 600, 1)), inputs, run=run_interpreted)

    np.testing.assert_array_equal(found[0, 0, :, 0], t5_bucket(np.arange(600), 32, 128))


def test_swin() -> None:
    table = default_rng(2).standard_normal((13 * 13, 3)).astype(np.float32)
    index = np.zeros((49, 49), int)
    for i in range(49):  # as the original builds `relative_position_index`
        for j in range(49):
            index[i, j] = (i // 7 - j // 7 + 6) * 13 + (i % 7 - j % 7 + 6)
    problem = Problem(**{**vars(FLAT), "q_len": 49, "kv_len": 49})
    inputs = {"table": table, "heads": 3, "width": 7}
    check(declared(file_of("swin"), "swin"), inputs, problem, lambda s, b, h, i, j: s + table[index[i, j], h])


def test_relative_positions() -> None:
    rng = default_rng(3)
    by_row, by_column = (rng.standard_normal((2, 3, 48, n)).astype(np.float32) for n in (6, 8))
    inputs = {"by_row": by_row, "by_column": by_column, "heads": 3, "height": 6, "width": 8}

    def formula(s: Any, b: int, h: int, i: Any, j: Any) -> Any:
        return s + by_row[b, h][i, j // 8] + by_column[b, h][i, j % 8]

    check(declared(file_of("relative_positions"), "relative_positions"), inputs, FLAT, formula)


def test_documents() -> None:
    borders = np.array([[0, 5, 30, 48], [0, 20, 21, 48]])
    begins, ends = (np.zeros((2, 48), np.int32) for _ in range(2))
    for b in range(2):
        for begin, end in zip(borders[b][:-1], borders[b][1:], strict=True):
            begins[b, begin:end], ends[b, begin:end] = begin, end
    function = declared(file_of("documents"), "documents")
    inputs = {"begins": begins, "ends": ends, "tokens": 48}
    check(function, inputs, FLAT, seen=lambda b, h, i, j: begins[b][i] == begins[b][j])

    # Three tiles of 16 queries: those of the first sequence meet keys 0..30, 5..48 and 30..48, those of the second
    # 0..20, 0..48 and 21..48. Blocks of 16 that these lie in:
    once = Problem(**{**vars(FLAT), "heads": 1, "kv_heads": 1})
    assert products(once, constants(function, inputs)) == (2 + 3 + 2) + (2 + 3 + 2)


def test_prefix() -> None:
    lengths = np.int32([20, 0])
    function = declared(file_of("prefix"), "prefix")
    check(function, {"lengths": lengths}, FLAT, seen=lambda b, h, i, j: (j <= i) | (j < lengths[b]))


def test_natten() -> None:
    function = declared(file_of("natten"), "natten")
    inputs = {"height": 12, "width": 4, "window": 3}

    def formula(b: int, h: int, i: Any, j: Any) -> Any:
        rows = np.abs(np.clip(i // 4, 1, 10) - j // 4) <= 1
        return rows & (np.abs(np.clip(i % 4, 1, 2) - j % 4) <= 1)

    check(function, inputs, FLAT, seen=formula)
    once = Problem(**{**vars(FLAT), "batch": 1, "heads": 1, "kv_heads": 1})
    assert products(once, constants(function, inputs)) == 2 + 3 + 2  # rows 0..4, 3..8 and 7..11, of 4 tokens each


def test_tree() -> None:
    """Drafts 0 to 4 with parents -, 0, 0, 1, 2."""
    paths = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4]]
    bits = np.array([[sum(1 << node for node in path) for path in paths]], np.int64)
    problem = Problem(q_len=5, kv_len=25, bottom_right=True)

    def formula(b: int, h: int, i: Any, j: Any) -> Any:
        table = np.ones((25, 25), bool)
        table[20:, 20:] = [[node in path for node in range(5)] for path in paths]
        return table[i, j]

    inputs = {"ancestors": bits, "nodes": 5, "starts": np.int32([20])}
    check(declared(file_of("tree"), "tree"), inputs, problem, seen=formula)


def test_all_that_come_along_are_tested() -> None:
    text = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    assert all(f'file_of("{name}")' in text for name in SHIPPED)
    assert len(SHIPPED) == 11


def test_what_a_function_must_take() -> None:
    def wrong(score, head, batch, query, key): ...
    def optional(score, batch, head, query, key, slope=1): ...
    def right(batch, head, query, key, width): ...

    with pytest.raises(SpecError, match=r"score function wrong takes \(score, head, .*must take \(score, batch, head"):
        score_function(wrong)
    with pytest.raises(SpecError, match="without defaults"):
        score_function(optional)
    with pytest.raises(SpecError, match="mask function wrong takes"):
        mask_function(wrong)
    with pytest.raises(SpecError, match="right has no input slopes; it has: width"):
        mask_function(right, inputs={"slopes": "*fp32"})
    with pytest.raises(SpecError, match="right: input width cannot be 'half'"):
        mask_function(right, inputs={"width": "half"})
    with pytest.raises(
        SpecError, match=r"right: its bounds take \(kv_len, first_query\); they may take any of \(batch"
    ):
        mask_function(right, bounds=lambda kv_len, first_query: (0, kv_len))
    with pytest.raises(SpecError, match="give a score function and a mask function"):
        score_and_mask("both", mask_function(right), mask_function(right))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            lambda score, batch, head, query, key: score,
            "score function is <lambda>; give a function that is made by def",
        ),
        (partial(print, 1), "score function is of type partial"),
        (3, "score function is of type int"),
        (max, "score function is of type builtin_function_or_method"),
    ],
)
def test_what_is_no_function(given: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        score_function(given)


def test_what_decorators_are_given_is_told() -> None:
    async def later(batch, head, query, key): ...
    def right(batch, head, query, key, width): ...
    def score(score, batch, head, query, key): ...

    with pytest.raises(SpecError, match="mask function is later"):
        mask_function(later)
    with pytest.raises(SpecError, match=r"right: its bounds are \(0, 3\); give a function that returns them"):
        mask_function(right, bounds=(0, 3))
    with pytest.raises(SpecError, match=r"right: inputs is \['width'\]; give types by name"):
        mask_function(right, inputs=["width"])
    with pytest.raises(SpecError, match=r"right: input width cannot be 4; a type is a text, as '\*fp32'"):
        mask_function(right, inputs={"width": 4})
    with pytest.raises(SpecError, match=r"width cannot be \*i32\[\*batch\]: an axis is one number"):
        mask_function(right, inputs={"width": "*i32[*batch]"})
    with pytest.raises(SpecError, match=r"right: requires is \(4,\); give a tuple of conditions"):
        mask_function(right, requires=(4,))
    with pytest.raises(SpecError, match="relative is 'yes'; give True or False"):
        score_function(score, relative="yes")


def test_lambdas_that_nothing_tells_apart() -> None:
    """The bounds of one would be those of the other."""

    def right(batch, head, query, key): ...

    one, other = lambda last_query: (0, last_query + 1), lambda last_query: (0, last_query + 2)  # fmt: skip
    for bounds in (one, other):
        with pytest.raises(SpecError, match="has 2 lambdas of the same arguments"):
            mask_function(right, bounds=bounds)


def test_an_input_has_one_type() -> None:
    def one(score, batch, head, query, key, width): ...
    def other(batch, head, query, key, width): ...

    with pytest.raises(SpecError, match=r"both: width is i32 for one and \*i32 for other"):
        score_and_mask("both", score_function(one), mask_function(other, inputs={"width": "*i32"}))


def test_inputs_are_checked() -> None:
    near, dropped = declared(OWN, "near"), declared(OWN, "dropped")
    with pytest.raises(SpecError, match="near takes width; given: none"):
        packed_inputs(near, {})
    with pytest.raises(SpecError, match=r"input halves is \*fp16; given: \*fp32"):
        packed_inputs(dropped, {"halves": np.zeros(3, np.float32), "most": 1.0})
    with pytest.raises(SpecError, match=r"input halves is \*fp16; given: a number"):
        packed_inputs(dropped, {"halves": 3, "most": 1.0})
    for width, given in (
        (9.5, "9.5, which is no integer from -2147483648 to"),
        (1 << 31, "2147483648, "),
        ("9", "str"),
    ):
        with pytest.raises(SpecError, match=f"near: input width is i32; given: {given}"):
            packed_inputs(near, {"width": width})
    with pytest.raises(SpecError, match=r"width is i32; given: \*i64; its decorator may say inputs={'width': '\*i64'}"):
        packed_inputs(near, {"width": np.zeros(3, np.int64)})
    _, most = packed_inputs(dropped, {"halves": np.zeros(3, np.float16), "most": np.int64(1)})
    assert (type(most), most) == (float, 1.0)


def test_what_is_loaded_from_is_a_pointer() -> None:
    def here(score, batch, head, query, key, a, b, c, d, width):
        row = a + query * width
        row = row + b
        return score + tl.load(row + key) + tl.load(head + c) + tl.load(pointer=d)

    assert [kind for _, kind in score_function(here).inputs] == ["*fp32", "i32", "*fp32", "*fp32", "i32"]


def test_two_functions_of_one_name_are_refused() -> None:
    near = declared(OWN, "near")
    with pytest.raises(SpecError, match="near is declared more than once"):
        function_specs([near, near], ["fp16"], [64])
