"""The Hopper kernel's numbers and barriers, in the emulator: every tile, mask, stride and phase, but not its speed."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gluon_emulator import Deadlock, Machine
from gluon_language import load_kernel
from gluon_values import tensor
from helpers import examples, some_of
from hypothesis import given
from hypothesis import strategies as st
from sm90_runs import (
    KERNEL,
    LOUD,
    ORDERS,
    ROUNDS,
    TILES,
    TOLERANCE,
    altered,
    check,
    check_longest_first,
    check_schedule,
    is_noticed,
    largest,
    largest_bf16,
    loud,
    run,
)

from pyfmha.attention.reference import relative_error


def loud_head(q: Any, k: Any, v: Any) -> None:
    loud(q[0, 33], k[0, 33], v)


DIAGONAL = {"q_len": 300, "kv_len": 340, "causal": "bottom-right", "heads": 1}
ONE_SLOT = {**DIAGONAL, "q_slots": 1}
SHORT = {"q_len": 100, "kv_len": 50, "heads": 6}
WIDE = {**DIAGONAL, "block_d": 128, "block_n": 128}
FEW_KEYS = {**LOUD, "q_len": 70, "kv_len": 5, "heads": 1}
STAGES = {**DIAGONAL, "v_stages": 3}
HALF = {"heads": 1, "causal": "bottom-right", "block_n": 128, "consumers": 1, "q_len": 64, "kv_len": 64}
MANY_TILES = {**LOUD, "change": loud_head, "q_len": 5, "heads": 35, "consumers": 1}
# Lengths of a batch of 70 queries and 200 keys each: none, one, the borders of blocks, all, and beyond.
LENGTHS: dict[str, Any] = {
    **{"general": True, "batch": 13, "heads": 1, "q_len": 70, "kv_len": 200},
    "q_lengths": (70, 70, 64, 65, 1, 2**31 - 1, 63, 69, 0, 70, -3, 66, 71),
    "kv_lengths": (0, 1, 63, 64, 65, 127, 128, 129, 200, 201, 199, -5, 2**31 - 1),
}
FEW_LENGTHS = {"general": True, "batch": 3, "q_len": 100, "kv_len": 200, "q_lengths": (30, 80, 100)}
FEW_LENGTHS |= {"kv_lengths": (150, 61, 200)}
WINDOW = {"general": True, "heads": 1, "q_len": 150, "kv_len": 260, "window": (70, 20), "bottom_right": True}
LOUD_WINDOW = {**LOUD, **WINDOW, "q_len": 40, "kv_len": 60, "window": (9, 2)}
LOUD_LENGTHS = {**LOUD, **FEW_LENGTHS, "q_len": 40, "q_lengths": (30, 0, 40), "kv_len": 30, "kv_lengths": (20, 30, 5)}


@pytest.mark.parametrize("q_slots", [1, 2])
@pytest.mark.parametrize("causal", [False, True, "bottom-right"])
@pytest.mark.parametrize("consumers", [1, 2, 3])
def test_every_number_of_consumers(q_slots: int, causal: bool | str, consumers: int) -> None:
    check(seed=q_slots, q_slots=q_slots, causal=causal, consumers=consumers, q_len=300, kv_len=200, programs=2)


@pytest.mark.parametrize(
    "problem",
    [
        {"q_len": 1, "kv_len": 1},
        {"q_len": 1, "kv_len": 200, "causal": "bottom-right"},
        {"q_len": 130, "kv_len": 1},
        {"q_len": 129, "kv_len": 127, "block_n": 128},
        {"q_len": 70, "kv_len": 300, "causal": True},
        {"q_len": 300, "kv_len": 70, "causal": True},
        {"q_len": 70, "kv_len": 300, "causal": "bottom-right"},
        {"q_len": 64, "kv_len": 256, "causal": "bottom-right", "block_n": 64, "programs": 7},
        {"heads": 6, "kv_heads": 2, "batch": 2, "q_len": 70, "causal": True, "programs": 3},
        {"heads": 3, "kv_heads": 1, "q_len": 200, "programs": 2},
        {"heads": 3, "q_len": 300, "causal": True, "programs": 4},
        {"layout": "bshd", "batch": 2, "q_len": 100, "causal": True},
        {"head_size": 40, "q_len": 100},
        {"head_size": 72, "block_d": 128, "q_len": 100, "causal": True, "layout": "bshd"},
        {"head_size": 256, "block_d": 256, "q_len": 80, "q_slots": 1},
        {"stages": 3, "q_len": 260, "causal": True},
        {"ping_pong": False, "q_len": 260, "causal": True, "consumers": 3},
        {"q_slots": 1, "q_len": 200, "causal": True},
        {"dtype": "bf16", "q_len": 200, "causal": True},
        {"head_size": 128, "block_d": 128, "block_n": 128, "q_len": 200, "kv_len": 300, "causal": True},
        {"head_size": 128, "block_d": 128, "block_n": 128, "q_len": 70, "kv_len": 300, "dtype": "bf16"},
    ],
    ids=str,
)
def test_shapes_layouts_and_settings(problem: dict[str, Any]) -> None:
    check(**problem)


@pytest.mark.parametrize(("consumers", "q_slots", "stages", "v_stages"), some_of([1, 2], [1, 2], [(2, 3), (3, 2)]))
def test_more_blocks_of_one_tensor_in_flight(consumers: int, q_slots: int, stages: int, v_stages: int) -> None:
    for causal, seed in product((False, True, "bottom-right"), range(2)):
        check(
            **{"seed": seed, "consumers": consumers, "q_slots": q_slots, "stages": stages, "v_stages": v_stages},
            **{"causal": causal, "q_len": 200, "kv_len": 330, "heads": 3, "programs": 2},
        )


@pytest.mark.parametrize(("heads", "q_len"), some_of([1, 3, 4], [1, 64, 130, 200, 448]))
def test_pairs_of_tiles_of_two_heads(heads: int, q_len: int) -> None:
    for causal, block_n, programs in ((True, 128, 1), ("bottom-right", 64, 3)):
        check(
            **{"two_heads": True, "consumers": 1, "block_n": block_n, "causal": causal, "programs": programs},
            **{"q_len": q_len, "kv_len": q_len + 30, "heads": heads},
        )


@pytest.mark.parametrize("consumers", [1, 2])
def test_pairs_of_tiles_of_two_heads_that_share_keys_in_a_batch(consumers: int) -> None:
    problem = {"batch": 3, "heads": 3, "kv_heads": 1, "q_len": 150, "layout": "bshd", "v_stages": 3}

    check(two_heads=True, causal=True, consumers=consumers, programs=4, **problem)


# The rows of a tile, those of the second consumer where there are two; keys; and whether some tile takes a half alone.
HALVES: dict[str, tuple[dict[str, Any], bool]] = {
    "a half": ({}, True),
    "one key more": ({"kv_len": 65}, False),
    "one key less": ({"kv_len": 63}, True),
    "one key": ({"kv_len": 1}, True),
    "all keys": ({"kv_len": 128}, False),
    "a block and a half": ({"kv_len": 192}, True),
    "a key more than a block and a half": ({"kv_len": 193}, False),
    "a key less than a block and a half": ({"kv_len": 191}, True),
    "a key more than a block": ({"kv_len": 129}, True),
    "from the left, a half": ({"causal": True, "kv_len": 300}, True),
    "from the left, fewer keys than rows": ({"causal": True, "kv_len": 50}, True),
    "few rows that see a half and more": ({"q_len": 5, "kv_len": 69}, False),
    "tiles of a half and of a whole": ({"q_len": 200, "kv_len": 200, "heads": 3, "programs": 2}, True),
    "rows without keys": ({"q_len": 100}, True),
    "a tile without keys": ({"q_len": 150, "kv_len": 80}, True),
    "a consumer that sees a half, and one that sees a whole": ({"q_len": 128, "kv_len": 128, "consumers": 2}, False),
    "a consumer that sees a key more than a half, and one more than a whole": (
        {"q_len": 128, "kv_len": 257, "consumers": 2},
        False,
    ),
    "a half, and a consumer without rows": ({"consumers": 2}, False),
    "a key more than a half, and a consumer without rows": ({"consumers": 2, "kv_len": 65}, False),
    "no mask": ({"causal": False}, False),
    "too wide for the registers": ({"block_d": 128}, False),
    "narrow blocks": ({"block_n": 64, "kv_len": 32}, False),
}


@pytest.mark.parametrize("case", HALVES)
def test_where_no_row_sees_the_second_half_of_the_first_block(case: str, tmp_path: Path) -> None:
    changes, taken = HALVES[case]
    counted = altered(KERNEL, "    near, far = gl.split(", "    assert False, 'taken'\n    _ = (", tmp_path)

    for dtype in ("fp16", "bf16"):
        check(**{**HALF, **changes, "dtype": dtype})
    if taken:
        with pytest.raises(AssertionError, match=r"^taken"):
            run(source=counted, **{**HALF, **changes})
    else:
        run(source=counted, **{**HALF, **changes})


@examples(25)
@given(data=st.data())
def test_any_problem(data: st.DataObject) -> None:
    consumers = data.draw(st.integers(1, 3))
    kv_heads = data.draw(st.integers(1, 2))
    check(
        seed=data.draw(st.integers(0, 1000)),
        batch=data.draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        heads=kv_heads * data.draw(st.integers(1, 3)),
        q_len=data.draw(st.integers(1, 270)),
        kv_len=data.draw(st.integers(1, 270)),
        causal=data.draw(st.sampled_from([False, True, "bottom-right"])),
        consumers=consumers,
        stages=data.draw(st.integers(2, 3)),
        v_stages=data.draw(st.integers(2, 3)),
        two_heads=data.draw(st.booleans()),
        block_n=data.draw(st.sampled_from([64, 128])),
        ping_pong=consumers > 1 and data.draw(st.booleans()),
        q_slots=data.draw(st.integers(1, 2)),
        programs=data.draw(st.integers(1, 5)),
        layout=data.draw(st.sampled_from(["bhsd", "bshd"])),
        head_size=8 * data.draw(st.integers(1, 8)),
    )


# What the general kernel is compiled with, and more.
GENERAL: dict[str, dict[str, Any]] = {
    "head size 64": {"consumers": 1, "block_n": 128},
    "head size 128": {"consumers": 1, "block_d": 128, "v_stages": 3},
    "head size 256": {"q_slots": 1, "v_stages": 3, "dtype": "bf16"},
    "two consumers of wide blocks": {"block_n": 128, "stages": 3},
}
WINDOWS = [
    *((-1, -1), (-1, 0), (0, -1), (0, 0), (5, 0), (0, 7), (3, 9), (63, 64), (64, 63), (130, 1), (1, 130), (300, 2)),
    *((2, 300), (2**31 - 1, 4), (4, 2**31 - 1), (2**31 - 1, 2**31 - 1), (-9, 20), (20, -(2**31))),
]


@pytest.mark.parametrize(("setting", "bottom_right"), some_of(GENERAL, [False, True]))
def test_lengths_within_and_beyond_the_tensors(setting: str, bottom_right: bool) -> None:
    problem = {**GENERAL[setting], **LENGTHS, "bottom_right": bottom_right}
    check(**problem)
    check(**{**problem, "q_lengths": None}, window=(-1, 0), padding=np.inf)
    check(**{**problem, "kv_lengths": None}, window=(30, 10), padding=1.0, programs=2)


@pytest.mark.parametrize(("setting", "bottom_right"), some_of(GENERAL, [False, True]))
def test_windows_of_any_width(setting: str, bottom_right: bool) -> None:
    first = list(GENERAL).index(setting) // 2 % 2
    for index, window in enumerate(WINDOWS[first::2]):
        q_len, kv_len = ((150, 260), (260, 150))[index % 2]
        problem = {"heads": 1, "q_len": q_len, "kv_len": kv_len, "window": window, "bottom_right": bottom_right}
        check(general=True, **GENERAL[setting], **problem)


@pytest.mark.parametrize(("row_tile", "loaded"), [(0, (0, 32)), (1, (0, 32)), (2, (0, 1)), (63, (0, 1))])
def test_tiles_of_padding_alone_load_one_block(row_tile: int, loaded: tuple[int, int]) -> None:
    tiles = load_kernel(TILES, Machine(0))
    shape = SimpleNamespace(BLOCK_N=128, CONSUMERS=1, CAUSAL=True, GENERAL=True)
    wide = 2**29
    sequence = [tensor(number, np.int32) for number in (65, 4096, -wide, wide)]
    assert tuple(map(int, tiles["tile_blocks"](tensor(row_tile, np.int32), sequence, shape))) == loaded


@pytest.mark.parametrize("order", ["PAIRS_OF_A_HEAD", "PAIRS_OF_TWO_HEADS"])
def test_few_tiles_are_shared_out_one_by_one(order: str) -> None:
    machine = Machine(0)
    tiles = load_kernel(TILES, machine)
    machine.programs = 64
    for machine.program in range(64):
        assert int(tiles["tile_count"](*[tensor(8, np.int32)] * 3, tiles[order])) == 1


def test_any_number_but_0_means_bottom_right() -> None:
    check(general=True, heads=1, q_len=70, kv_len=150, window=(40, 0), bottom_right=2)


@examples(20)
@given(data=st.data())
def test_any_general_problem(data: st.DataObject) -> None:
    batch, consumers = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    kv_heads = data.draw(st.integers(1, 2))
    lengths = st.none() | st.lists(st.integers(-2, 220), min_size=batch, max_size=batch)
    sides = st.just(-1) | st.integers(0, 20) | st.integers(0, 220)
    check(
        seed=data.draw(st.integers(0, 1000)),
        general=True,
        batch=batch,
        kv_heads=kv_heads,
        heads=kv_heads * data.draw(st.integers(1, 2)),
        q_len=data.draw(st.integers(1, 200)),
        kv_len=data.draw(st.integers(1, 200)),
        q_lengths=data.draw(lengths),
        kv_lengths=data.draw(lengths),
        window=(data.draw(sides), data.draw(sides)),
        bottom_right=data.draw(st.booleans()),
        consumers=consumers,
        ping_pong=consumers > 1 and data.draw(st.booleans()),
        stages=data.draw(st.integers(2, 3)),
        v_stages=data.draw(st.integers(2, 3)),
        two_heads=data.draw(st.booleans()),
        block_n=data.draw(st.sampled_from([64, 128])),
        q_slots=data.draw(st.integers(1, 2)),
        programs=data.draw(st.integers(1, 4)),
        layout=data.draw(st.sampled_from(["bhsd", "bshd"])),
        head_size=8 * data.draw(st.integers(1, 8)),
    )


@pytest.mark.parametrize("consumers", [1, 2])
def test_slow_rows_have_lengths_and_windows_too(consumers: int) -> None:
    for window in ((-1, -1), (9, 2), (0, 0), (3, -1), (-1, 3)):
        for bottom_right in (False, True):
            for problem in (LOUD_WINDOW, LOUD_LENGTHS):
                check(**{**problem, "consumers": consumers, "window": window, "bottom_right": bottom_right})


@pytest.mark.parametrize("wrong", [np.nan, 1e9])
def test_padding_and_rows_without_keys_take_no_slow_arithmetic(wrong: float, tmp_path: Path) -> None:
    """Which is hundreds of times slower."""
    fast = altered(KERNEL, "    Out, Lse, Q, K, V = tensors\n", "    assert False, 'slow'\n", tmp_path)

    check(source=fast, **LENGTHS, padding=wrong)
    check(source=fast, **FEW_LENGTHS, window=(5, 0), bottom_right=True, padding=wrong)
    check(source=fast, **{**WINDOW, "kv_len": 50, "window": (3, 2)})


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("consumers", [1, 2])
def test_nan_stays_in_its_row_within_lengths_and_windows(consumers: int, wrong: float) -> None:
    def change(q: Any, _k: Any, _v: Any) -> None:
        q[1, 0, 70, 3] = wrong

    with np.errstate(invalid="ignore"):  # of the reference
        out, lse, wanted, wanted_lse = run(**FEW_LENGTHS, window=(50, 30), consumers=consumers, change=change)

    others = np.ones(lse.shape, bool)
    others[1, 0, 70] = False
    assert np.isnan(out[~others]).all()
    assert np.isnan(lse[~others]).all()
    assert relative_error(out[others], wanted[others]) < TOLERANCE["fp16"]
    np.testing.assert_allclose(lse[others], wanted_lse[others], rtol=1e-4, atol=1e-4)


def test_the_emulator_splits_and_joins_as_triton_does() -> None:
    """Along the last axis, which has two values; each half a tensor of its own."""
    gl: Any = load_kernel(KERNEL, Machine(0))["gl"]
    values = tensor(np.arange(24).reshape(3, 4, 2), np.float32)

    first, second = gl.split(values)
    assert (first == np.arange(0, 24, 2).reshape(3, 4)).all()
    assert (second == np.arange(1, 24, 2).reshape(3, 4)).all()
    assert (gl.join(first, second) == values).all()
    assert (gl.join(first, second).permute((2, 0, 1)) == np.stack([first, second])).all()
    for wrong in (values.permute((2, 0, 1)), tensor([1.0, 2.0])):
        with pytest.raises(AssertionError):
            gl.split(wrong)
    for wrong in (second[:, :2], tensor(second, np.int32)):
        with pytest.raises(AssertionError):
            gl.join(first, wrong)


def test_lse_may_be_left_out() -> None:
    out, lse, wanted, _ = run(lse=False)

    assert relative_error(out, wanted) < TOLERANCE["fp16"]
    assert (lse == 7).all()


@pytest.mark.parametrize(("dtype", "scale"), [("fp16", 2.0**13), ("bf16", 2.0**125)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_largest_inputs_stay_finite(dtype: str, scale: float, causal: bool) -> None:
    """Scores beyond what the fast arithmetic holds: each row then weighs only its best key."""
    out, lse, wanted, _ = run(dtype=dtype, scale=scale, causal=causal, q_len=150, kv_len=90, programs=2)

    assert np.isfinite(out).all()
    assert not np.isnan(lse).any()
    assert relative_error(out / scale, wanted / scale) < TOLERANCE[dtype]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("consumers", [1, 2])
def test_rows_beside_one_that_leaves_the_range_stay_right(consumers: int, causal: bool) -> None:
    def change(q: Any, _k: Any, _v: Any) -> None:
        q[0, 1, 70] *= 2.0**100

    check(dtype="bf16", q_len=200, kv_len=90, consumers=consumers, causal=causal, change=change)


@pytest.mark.parametrize("consumers", [1, 2])
def test_tiles_of_two_heads_are_computed_again(consumers: int) -> None:
    for heads in (2, 3):

        def change(q: Any, k: Any, v: Any, last: int = heads - 1) -> None:
            loud(q[0, last], k[0, last], v)

        problem = {**LOUD, "q_len": 200, "kv_len": 66, "heads": heads, "programs": 2, "change": change}
        check(**problem, causal=True, two_heads=True, block_n=128, consumers=consumers)


@pytest.mark.parametrize("causal", [False, True])
def test_more_tiles_than_notes_have_bits(causal: bool) -> None:
    """Tiles then share a bit: those that need it are computed again, and others with them."""
    check(**MANY_TILES, causal=causal, two_heads=causal)


@pytest.mark.parametrize(("dtype", "change"), [("fp16", largest), ("bf16", largest_bf16)])
def test_a_mean_of_the_largest_values_is_not_rounded_to_infinity(dtype: str, change: Callable[..., None]) -> None:
    check(dtype=dtype, change=change)


@pytest.mark.parametrize("block_n", [64, 128])
@pytest.mark.parametrize("consumers", [1, 2])
def test_a_row_without_keys_is_zero_even_where_v_is_nan(consumers: int, block_n: int) -> None:
    def broken(_q: Any, _k: Any, v: Any) -> None:
        v[..., 40, 3] = np.nan
        v[..., 41, 4] = np.inf

    problem = {"q_len": 150, "kv_len": 80, "causal": "bottom-right", "block_n": block_n, "change": broken}
    out, lse, _, _ = run(**problem, consumers=consumers)

    assert (out[:, :, :70] == 0).all()
    assert np.isneginf(lse[:, :, :70]).all()


@pytest.mark.parametrize("settings", [{}, {"two_heads": True}, {"two_heads": True, "block_n": 128, "consumers": 1}])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_nan_stays_in_its_row(wrong: float, settings: dict[str, Any]) -> None:
    def change(q: Any, _k: Any, _v: Any) -> None:
        q[0, 0, 70, 3] = wrong

    with np.errstate(invalid="ignore"):  # of the reference
        out, lse, wanted, wanted_lse = run(q_len=150, causal=True, change=change, **settings)

    assert np.isnan(out[0, 0, 70]).all()
    assert np.isnan(lse[0, 0, 70])
    others = np.isfinite(wanted_lse)
    assert others.sum() == 2 * 150 - 1
    assert relative_error(out[others], wanted[others]) < TOLERANCE["fp16"]
    np.testing.assert_allclose(lse[others], wanted_lse[others], rtol=1e-4, atol=1e-4)


@examples(100)
@given(st.integers(1, 12), st.integers(1, 7), st.integers(1, 20), st.sampled_from(ORDERS))
def test_every_tile_is_taken_once_and_programs_get_as_much_to_do(
    row_tiles: int, heads: int, programs: int, order: str
) -> None:
    check_schedule(row_tiles, heads, programs, order)


@pytest.mark.parametrize("row_tiles", range(1, 10))
def test_tiles_of_two_heads_are_dealt_out_to_few_programs_and_to_many(row_tiles: int) -> None:
    for heads in range(1, 6):
        tiles = row_tiles * heads
        for programs in {1, 2, 3, 5, max(tiles // 2, 1), tiles, tiles + 3}:
            check_schedule(row_tiles, heads, programs, "PAIRS_OF_TWO_HEADS")


@examples(60)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 20), st.integers(1, 9))
def test_tiles_from_the_longest_are_taken_once(row_tiles: int, heads: int, programs: int, section: int) -> None:
    # What `section_heads` gives at most, but for a section of one head, which may be of any size.
    section = max(min(section, heads, ROUNDS * programs // row_tiles), 1)
    check_longest_first(row_tiles, heads, section, programs)


@pytest.mark.parametrize(
    ("row_tiles", "heads", "wanted"),
    [(128, 32, 2), (64, 64, 4), (16, 128, 16), (86, 32, 3), (264, 8, 1), (2048, 2, 1), (1, 2, 2)],
)
def test_heads_of_a_section(row_tiles: int, heads: int, wanted: int) -> None:
    machine = Machine(0)
    kernel = load_kernel(TILES, machine)
    machine.programs = 132

    section = int(kernel["section_heads"](tensor(row_tiles, np.int32), tensor(heads, np.int32)))

    assert section == wanted
    work = check_longest_first(row_tiles, heads, section, 132)
    if row_tiles == 128:
        assert max(work) <= 1.03 * sum(work) / len(work)


@pytest.mark.parametrize("consumers", [2, 3])
@pytest.mark.parametrize("programs", [1, 3, 7])
def test_tiles_from_the_longest(consumers: int, programs: int) -> None:
    problem = {"batch": 2, "heads": 3, "kv_heads": 1, "q_len": 450, "layout": "bshd", "v_stages": 3}

    check(longest_first=True, causal=True, consumers=consumers, programs=programs, **problem)


def test_rows_of_tiles_from_the_longest_are_computed_again() -> None:
    check(longest_first=True, causal=True, programs=2, **{**LOUD, "q_len": 150, "heads": 5})


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("row_tiles", "heads"), [(2**25, 63), (2**25 - 1, 63), (3, 2**29), (1, 2**31 - 1)])
def test_many_tiles_stay_within_32_bits(row_tiles: int, heads: int, order: str) -> None:
    machine = Machine(0)
    kernel = load_kernel(TILES, machine)
    machine.programs = 264

    def tiles(program: int, dtype: Any) -> list[int]:
        machine.program = program
        sizes = tensor(row_tiles, dtype), tensor(heads, dtype), tensor(heads, dtype), kernel[order]
        count = kernel["tile_count"](*sizes)
        turns = 0, 1, int(count) // 2, int(count) - 2, int(count) - 1
        return [int(count), *(int(x) for turn in turns for x in kernel["tile_of"](tensor(turn, dtype), *sizes))]

    for program in (0, 131, 263):
        assert tiles(program, np.int32) == tiles(program, np.int64)


LOAD_V = "if Q_SLOTS > 1 and not SHAPE.EARLY:\n                if step > 0:\n                    _load_v(work, "
FREE_SLOT = (
    "have left their slot by now\n                tma.store_wait(0)\n                mbarrier.arrive(q_free.index("
)

# What is replaced by what, and the problem that shows it.
MUTANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "the first K is not waited for": (
        "        mbarrier.wait(k_ready.index(stage), (step // STAGES) & 1)\n        visible = (",
        "        visible = (",
        DIAGONAL,
    ),
    "K is not waited for": (
        "    mbarrier.wait(k_ready.index(stage), (step // STAGES) & 1)\n    if PING",
        "    if PING",
        DIAGONAL,
    ),
    "V is freed before its product is complete": (
        "        acc, p, scores = wait_for_products(acc, p, scores)\n"
        "        mbarrier.arrive(v_free.index(before), count=1)\n",
        "        mbarrier.arrive(v_free.index(before), count=1)\n"
        "        acc, p, scores = wait_for_products(acc, p, scores)\n",
        DIAGONAL,
    ),
    "V is freed before the product of a lone consumer is complete": (
        "        acc, p, next_p = wait_for_products(acc, p, next_p)\n"
        "        mbarrier.arrive(v_free.index(before), count=1)\n",
        "        mbarrier.arrive(v_free.index(before), count=1)\n"
        "        acc, p, next_p = wait_for_products(acc, p, next_p)\n",
        {**DIAGONAL, "consumers": 1},
    ),
    "the last V is freed before its product is complete": (
        "        acc, p, inverse = wait_for_products(acc, p, inverse)\n"
        "        mbarrier.arrive(v_free.index(last), count=1)\n",
        "        mbarrier.arrive(v_free.index(last), count=1)\n"
        "        acc, p, inverse = wait_for_products(acc, p, inverse)\n",
        {**DIAGONAL, "stages": 3},
    ),
    "the first K is freed before its product is complete": (
        "    scores = warpgroup_mma_wait(0, deps=scores if WIDE else (scores,))\n"
        "    mbarrier.arrive(k_free.index(stage), count=1)\n",
        "    mbarrier.arrive(k_free.index(stage), count=1)\n"
        "    scores = warpgroup_mma_wait(0, deps=scores if WIDE else (scores,))\n",
        SHORT,
    ),
    "V is not waited for": (
        "    _wait_for_v(barriers, step - 1, CONSUMER, SHAPE)\n    if LATE",
        "    if LATE",
        DIAGONAL,
    ),
    "the last V is not waited for": (
        "        _wait_for_v(barriers, step - 1, CONSUMER, SHAPE)\n",
        "",
        DIAGONAL,
    ),
    "the producer waits for the phase of fewer blocks of V": (
        "mbarrier.wait(v_free.index(stage), ((step // V_STAGES) & 1) ^ 1)",
        "mbarrier.wait(v_free.index(stage), ((step // SHAPE.STAGES) & 1) ^ 1)",
        STAGES,
    ),
    "V is not waited for until it is free": (
        "    mbarrier.wait(v_free.index(stage), ((step // V_STAGES) & 1) ^ 1)\n",
        "",
        {**DIAGONAL, "stages": 3},
    ),
    "a consumer waits for the phase of fewer blocks of V": (
        "    mbarrier.wait(v_ready.index(step % V_STAGES), (step // V_STAGES) & 1)\n    if",
        "    mbarrier.wait(v_ready.index(step % V_STAGES), (step // SHAPE.STAGES) & 1)\n    if",
        STAGES,
    ),
    "a consumer that passes over keys waits for the phase of fewer blocks": (
        "                _wait_for_v(barriers, step, CONSUMER, SHAPE)\n                mbarrier",
        "                mbarrier.wait(v_ready.index(step % V_STAGES), (step // STAGES) & 1)\n                mbarrier",
        {**STAGES, "heads": 3},
    ),
    "values that a consumer passes over are not freed": (
        "                mbarrier.arrive(v_free.index(step % V_STAGES), count=1)\n",
        "",
        DIAGONAL,
    ),
    "V is that of the keys just loaded": (
        f"{LOAD_V}v_place,",
        f"{LOAD_V}(batch, kv_head, key),",
        DIAGONAL,
    ),
    "V of the only slot is that of the keys just loaded": (
        "had its last values\n                if step > 0:\n                    _load_v(work, v_place,",
        "had its last values\n                if step > 0:\n                    _load_v(work, (batch, kv_head, key),",
        ONE_SLOT,
    ),
    "the last V of a head is that of the next": (
        f"{LOAD_V}v_place,",
        f"{LOAD_V}(batch, kv_head, v_place[2]),",
        SHORT,
    ),
    "V goes where the next is to be": (
        "                    _load_v(work, v_place, step - 1, SHAPE)\n            v_place",
        "                    _load_v(work, v_place, step, SHAPE)\n            v_place",
        DIAGONAL,
    ),
    "the last V is not loaded": (
        "        if step > 0:\n            _load_v(work, v_place, step - 1, SHAPE)\n    if LAGS",
        "        pass\n    if LAGS",
        SHORT,
    ),
    "a program without tiles loads V": (
        "        if step > 0:\n            _load_v(work, v_place, step - 1, SHAPE)\n    if LAGS",
        "        _load_v(work, v_place, step - 1, SHAPE)\n    if LAGS",
        {"q_len": 64, "heads": 1, "programs": 2},
    ),
    "the first keys wait for the rows that come after them": ("if step == 1:", "if step == 0:", HALF),
    "keys wait for rows that come much later": (
        "mbarrier.wait(q_ready.index(0), 0)",
        "mbarrier.wait(q_ready.index(0), 1)",
        {**HALF, "kv_len": 300},
    ),
    "a half is taken though a key more is visible": (
        "- key <= BLOCK_N // 2 if HALVES",
        "- key <= BLOCK_N // 2 + 1 if HALVES",
        {**HALF, "kv_len": 65},
    ),
    "a half is taken by what the first row sees": (
        "half = gl.minimum(first_row + ROWS + newest",
        "half = gl.minimum(first_row + 1 + newest",
        {**HALF, "kv_len": 127},
    ),
    "a half is taken as if all began at the left": (
        "half = gl.minimum(first_row + ROWS + newest",
        "half = gl.minimum(first_row + ROWS",
        {**HALF, "kv_len": 128},
    ),
    "the other half is taken": ("near, far = gl.split", "far, near = gl.split", HALF),
    "every other key is taken": (
        "gl.split(scores.reshape([ROWS, 2, HALF]).permute((0, 2, 1)))",
        "gl.split(scores.reshape([ROWS, HALF, 2]))",
        HALF,
    ),
    "the weights of a half go to the other": ("gl.join(near, zeros)", "gl.join(zeros, near)", HALF),
    "the weights of a half go to every other key": (
        "gl.join(near, zeros).permute((0, 2, 1)).reshape",
        "gl.join(near, zeros).reshape",
        HALF,
    ),
    "a half is not masked": ("ends, key, True, LAYOUT", "ends, key, False, LAYOUT", HALF),
    "Out is cached by what is no policy": (
        "row, 0], rows, cache_policy=ONCE",
        "row, 0], rows, cache_policy='evict_first'",
        SHORT,
    ),
    "Q is cached by what is no policy": (
        "slot, ROWS, SHAPE, ONCE)",
        "slot, ROWS, SHAPE, 0)",
        SHORT,
    ),
    "keys that a consumer passes over are not freed": (
        "                mbarrier.arrive(k_free.index(step % STAGES), count=1)\n",
        "",
        DIAGONAL,
    ),
    "a consumer that passes over keys keeps its turn": (
        "pass_turn(turn_taken, (CONSUMER + 1) % CONSUMERS)",
        "pass",
        DIAGONAL,
    ),
    "the phase of K is wrong": (
        "mbarrier.wait(k_free.index(stage), phase)",
        "mbarrier.wait(k_free.index(stage), 0)",
        DIAGONAL,
    ),
    "Q is not waited for": (
        "        mbarrier.wait(q_ready.index(slot), (turn // Q_SLOTS) & 1)\n",
        "",
        SHORT,
    ),
    "Q is overwritten while in use": (
        "                    mbarrier.wait(q_free.index(slot), ((turn // Q_SLOTS) & 1) ^ 1)\n",
        "",
        SHORT,
    ),
    "the producer waits for the phase of a single slot": (
        "mbarrier.wait(q_free.index(slot), ((turn // Q_SLOTS) & 1) ^ 1)",
        "mbarrier.wait(q_free.index(slot), (turn & 1) ^ 1)",
        DIAGONAL,
    ),
    "a consumer waits for the phase of a single slot": (
        "mbarrier.wait(q_ready.index(slot), (turn // Q_SLOTS) & 1)",
        "mbarrier.wait(q_ready.index(slot), turn & 1)",
        DIAGONAL,
    ),
    "the slot in use is freed": (
        FREE_SLOT + "(turn - 1) % Q_SLOTS * CONSUMERS + CONSUMER)",
        FREE_SLOT + "turn % Q_SLOTS * CONSUMERS + CONSUMER)",
        DIAGONAL,
    ),
    "no slot is freed": (
        FREE_SLOT + "(turn - 1) % Q_SLOTS * CONSUMERS + CONSUMER), count=1)\n",
        "have left their slot by now\n                tma.store_wait(0)\n",
        DIAGONAL,
    ),
    "a slot is freed before Out has left it": (
        FREE_SLOT,
        FREE_SLOT.replace("                tma.store_wait(0)\n", ""),
        SHORT,
    ),
    "the only slot is freed before Out has left it": (
        "            tma.store_wait(0)\n            mbarrier.arrive(q_free.index(slot)",
        "            mbarrier.arrive(q_free.index(slot)",
        ONE_SLOT,
    ),
    "the program ends before Out has left its slot": (
        "    if not SHAPE.DIRECT:\n        tma.store_wait(0)\n        gl.barrier()\n    if SHAPE.APART and",
        "    if SHAPE.APART and",
        SHORT,
    ),
    "no fence makes Out visible": (
        "        if not SHAPE.DIRECT:\n            fence_async_shared()\n        if SHAPE.DIRECT:",
        "        if SHAPE.DIRECT:",
        DIAGONAL,
    ),
    "a masked block is taken for unmasked": (
        "masked = block >= unmasked if MASKED else False",
        "masked = False",
        {**DIAGONAL, "block_n": 32},
    ),
    "one masked block too few": (
        "first_row + newest + 1, kv_n), 0)",
        "first_row + newest + 1 + ROWS, kv_n), 0)",
        DIAGONAL,
    ),
    "the last keys are not masked": (
        "if GENERAL else block >= unmasked\n",
        "if GENERAL else False\n",
        {"kv_len": 100},
    ),
    "a key too many": ("gl.minimum(rows + (newest + 1), kv_n)", "gl.minimum(rows + (newest + 2), kv_n)", DIAGONAL),
    "the sums are not rescaled": ("row_sum * factor[:, None] + parts", "row_sum + parts", DIAGONAL),
    "a column's weights are left out of the sums": (
        "gl.sum(gl.sum(parts, 3), 1)",
        "gl.sum(parts, 1)[:, :, 0]",
        DIAGONAL,
    ),
    "what comes after a product is changed by it": ("RAGGED else ragged)", "RAGGED else q_len)", WIDE),
    "weights are multiplied as float32": (
        "        p = p.to(dtype)\n    else",
        "        p = p\n    else",
        {**DIAGONAL, "consumers": 1},
    ),
    "the weights of two keys change places": (
        'f"cvt.rn.{kind}.f32 $0, $2, $1;"',
        'f"cvt.rn.{kind}.f32 $0, $1, $2;"',
        DIAGONAL,
    ),
    "the weights of two keys are unpacked in another order": ("gl.join(even, odd)", "gl.join(odd, even)", DIAGONAL),
    "the blocks that are masked are multiplied twice": ("            to_left -= masked_count\n", "", DIAGONAL),
    "one masked block is left to the loop without a mask": (
        "gl.maximum(block - unmasked, 0), to_left)",
        "gl.maximum(block - unmasked - 1, 0), to_left)",
        {**DIAGONAL, "block_n": 32},
    ),
    "the halves of Out change places": ("satfinite.f16x2.f32 $0, $2, $1", "satfinite.f16x2.f32 $0, $1, $2", DIAGONAL),
    "fp16 beyond the largest becomes infinite": ("rn.satfinite.f16x2", "rn.f16x2", {"change": largest}),
    "bf16 beyond the largest becomes infinite": (
        "rn.satfinite.bf16x2",
        "rn.bf16x2",
        {"change": largest_bf16, "dtype": "bf16"},
    ),
    "what holds the exponentials may be negative": (
        "row_sum = hold(row_sum)\n        acc, p, next_p = wait_for_products(acc",
        "row_sum = -hold(-row_sum)\n        acc, p, next_p = wait_for_products(acc",
        {**DIAGONAL, "consumers": 1},
    ),
    "what holds the maxima may be negative": ("alpha = hold(alpha)", "alpha = -hold(-alpha)", DIAGONAL),
    "Out may be written after it was computed again": ("written(noted)", "noted", FEW_KEYS),
    "no rows are noted": ("noted = noted | gl.where(leaving", "noted = noted & gl.where(leaving", FEW_KEYS),
    "another consumer's rows are computed again": ("row_tile * CONSUMERS + part", "row_tile * CONSUMERS", FEW_KEYS),
    "there are more notes than bits": ("noted >> (turn % NOTES)", "noted >> turn", MANY_TILES),
}

MUTANTS |= {
    "what follows the values is not dropped": (
        "gl.where((rows < count - first)[:, None], part.load(LAYOUT), 0.0)",
        "part.load(LAYOUT)",
        FEW_LENGTHS,
    ),
    "a row after the values is not dropped": ("rows < count - first", "rows <= count - first", FEW_LENGTHS),
    "the last value is dropped": ("rows < count - first", "rows < count - first - 1", FEW_LENGTHS),
    "what follows the values is dropped in whole parts alone": (
        "if count < first + HEIGHT:",
        "if count <= first:",
        FEW_LENGTHS,
    ),
    "what follows the values of a single block is not dropped": (
        "values - block * BLOCK_N, CONSUMER",
        "BLOCK_N if own_end == first_block + 1 else values - block * BLOCK_N, CONSUMER",
        FEW_LENGTHS,
    ),
    "what follows the values of several blocks is not dropped": (
        "step - 1, values - key - BLOCK_N, CONSUMER",
        "step - 1, BLOCK_N, CONSUMER",
        FEW_LENGTHS,
    ),
    "values are dropped from the block after": (
        "step - 1, values - key - BLOCK_N, CONSUMER",
        "step - 1, values - key, CONSUMER",
        FEW_LENGTHS,
    ),
    "what follows the values is dropped in another block": (
        "v = v_smem[0].index(stage).reshape",
        "v = v_smem[0].index((step + 1) % V_STAGES).reshape",
        FEW_LENGTHS,
    ),
    "what follows the values is dropped before it comes": (
        "            mbarrier.wait(v_ready.index(stage), (step // V_STAGES) & 1)\n",
        "",
        FEW_LENGTHS,
    ),
    "no fence shows the tensor cores what is dropped": (
        "            fence_async_shared()\n            gl.barrier()\n",
        "            gl.barrier()\n",
        FEW_LENGTHS,
    ),
    "warps do not wait for each other to drop what follows the values": (
        "            fence_async_shared()\n            gl.barrier()\n",
        "            fence_async_shared()\n",
        FEW_LENGTHS,
    ),
    "the first consumer does not wait for the last to drop what follows the values": (
        "        mbarrier.wait(v_whole.index(step % V_STAGES), (step // V_STAGES) & 1)\n",
        "        pass\n",
        {**FEW_LENGTHS, "consumers": 2, "ping_pong": False},
    ),
    "the last consumer does not tell that nothing follows the values": (
        "            mbarrier.arrive(v_whole.index(stage), count=1)\n",
        "            pass\n",
        {**FEW_LENGTHS, "consumers": 2},
    ),
    "the last consumer may tell it two rounds ahead": (
        "            mbarrier.wait(v_ready.index(stage), (step // V_STAGES) & 1)  # so",
        "            # so",
        {"general": True, "consumers": 2, "ping_pong": False, "q_len": 128, "kv_len": 640, "heads": 1},
    ),
    "the window begins a key late": ("gl.maximum(rows + oldest, 0)", "gl.maximum(rows + oldest + 1, 0)", WINDOW),
    "the window begins a key early": ("gl.maximum(rows + oldest, 0)", "gl.maximum(rows + oldest - 1, 0)", WINDOW),
    "the block where the window of the last row begins is not masked": (
        "(ROWS - 1) + oldest, 0) + (BLOCK_N - 1)) // BLOCK_N",
        "(ROWS - 1) + oldest, 0)) // BLOCK_N",
        WINDOW,
    ),
    "the block where the window of the first row begins is the last that is masked": (
        "gl.maximum(first_row + (ROWS - 1) + oldest, 0)",
        "gl.maximum(first_row + oldest, 0)",
        WINDOW,
    ),
    "the first block is not masked at the left": (
        "(block >= unmasked) | (block < unmasked_from) if GENERAL",
        "block >= unmasked if GENERAL",
        {**WINDOW, "kv_len": 256, "window": (10, -1)},
    ),
    "blocks after the first are not masked at the left": (
        "masked = masked | (block < unmasked_from)",
        "masked = masked",
        WINDOW,
    ),
    "the first block of keys is left out": (
        "oldest, 0) // BLOCK_N, end - 1)",
        "oldest, 0) // BLOCK_N + 1, end - 1)",
        WINDOW,
    ),
    "the first block of keys is not loaded": (
        "        for block in range(end_block - first_block):",
        "        for block in range(gl.maximum(end_block - first_block - 1, 1)):",
        WINDOW,
    ),
    "a block is loaded that no row sees": (
        "        for block in range(end_block - first_block):",
        "        for block in range(end_block - gl.maximum(first_block - 1, 0)):",
        WINDOW,
    ),
    "the window begins as if all began at the left": ("    oldest = offset\n", "    oldest = offset * 0\n", WINDOW),
    "the window ends as if all began at the left": ("    newest = offset\n", "    newest = offset * 0\n", WINDOW),
    "a window without a left bound begins after the query": (
        "gl.where(window_left < 0, UNBOUNDED, window_left)",
        "window_left",
        {**WINDOW, "window": (-1, 3)},
    ),
    "a window without a right bound ends before the query": (
        "gl.where(window_right < 0, UNBOUNDED, window_right)",
        "window_right",
        {**WINDOW, "window": (3, -1)},
    ),
    "the beginning of a wide window overflows": (
        "gl.minimum(gl.where(window_left < 0, UNBOUNDED, window_left), UNBOUNDED)",
        "gl.where(window_left < 0, UNBOUNDED, window_left)",
        {**WINDOW, "q_len": 300, "window": (2**31 - 1, 3)},
    ),
    "the end of a wide window overflows": (
        "gl.minimum(gl.where(window_right < 0, UNBOUNDED, window_right), UNBOUNDED)",
        "gl.where(window_right < 0, UNBOUNDED, window_right)",
        {**WINDOW, "window": (3, 2**31 - 1)},
    ),
    "queries behind their sequence see keys": (
        "ends = gl.where(rows < q_n, ends, 0)",
        "ends = ends",
        {**FEW_LENGTHS, "padding": 1.0},
    ),
    "blocks of which queries behind their sequence see all are not masked": (
        "unmasked = gl.where(first_row + ROWS <= q_n, unmasked, 0)",
        "unmasked = unmasked",
        {**FEW_LENGTHS, "padding": 1.0},
    ),
    "more queries count than there are": (
        "gl.minimum(gl.maximum(gl.load(q_lengths + batch), 0), q_len)",
        "gl.maximum(gl.load(q_lengths + batch), 0)",
        {**LENGTHS, "window": (-1, 0), "bottom_right": True},
    ),
    "more keys count than there are": (
        "gl.minimum(gl.maximum(gl.load(kv_lengths + batch), 0), kv_len)",
        "gl.maximum(gl.load(kv_lengths + batch), 0)",
        {**FEW_LENGTHS, "kv_lengths": (150, 61, 230)},
    ),
    "all sequences have the queries of the first": ("q_lengths + batch", "q_lengths + 0 * batch", FEW_LENGTHS),
    "all sequences have the keys of the first": ("kv_lengths + batch", "kv_lengths + 0 * batch", FEW_LENGTHS),
    "slow rows see keys before their window": (
        "visible = visible & (key >= rows + oldest)",
        "visible = visible",
        LOUD_WINDOW,
    ),
    "slow rows see the first keys instead of those of their window": (
        "        k_row += begin.to(gl.int64) * k_strides[2]\n",
        "",
        LOUD_WINDOW,
    ),
    "slow rows begin a key late": (
        "begin = gl.maximum(first_row + oldest, 0)",
        "begin = gl.maximum(first_row + oldest + 1, 0)",
        LOUD_WINDOW,
    ),
    "slow rows see keys behind their sequence": (
        "    end = kv_n\n    if CAUSAL:\n        end = gl.minimum(kv_n, ",
        "    if CAUSAL:\n        end = gl.minimum(kv_len, ",
        LOUD_LENGTHS,
    ),
    "slow rows behind their sequence see keys": ("visible = rows < q_n", "visible = rows < q_len", LOUD_LENGTHS),
}

SCHEDULES = {
    "the last row of tiles is lost": ("row_tiles - 1 - (index >> shared)", "row_tiles - 2 - (index >> shared)"),
    "a tile is computed twice": ("(tiles % 2 != 0) & (gl", "(tiles < 0) & (gl"),
    "the last unit is lost": ("units = tiles - tiles // 2\n            count", "units = tiles // 2\n            count"),
    "a program takes a tile too many": ("(program < count % programs)", "(program <= count % programs)"),
    "another program has the single tile": ("(units - 1) % gl.num", "units % gl.num"),
    "the last head has the tiles of two": ("odd * (first_head + 1 < heads).to(gl.int32)", "odd"),
    "the other tile is of another length": ("(row_tiles << shared) - 1 - index", "(row_tiles << shared) - 2 - index"),
    "programs get long tiles only": (
        "            if turn % 2 != 0:\n                index = (row_tiles << shared) - 1 - index\n",
        "            index = index * 2 + turn % 2\n",
    ),
    "few tiles go in pairs, too": (
        "if row_tiles * heads > programs:\n            unit",
        "if row_tiles * heads > 0:\n            unit",
    ),
    "both tiles of a pair are of one head": ("            head += 1\n", ""),
    "both tiles of a pair are as long": (
        "            head += 1\n            row_tile = row_tiles - 1 - row_tile\n",
        "            head += 1\n",
    ),
    "an odd head is left out": ("_share((heads - heads // 2) * row_tiles)", "_share(heads // 2 * row_tiles)"),
    "the tiles of an odd head are paired": ("if (pair < pairs) & (other != 0):", "if other != 0:"),
    "the tiles of an odd head are counted as pairs": ("(turn + singles) // 2", "turn // 2"),
    "all tiles are single": ("gl.maximum(turn - 2 * _share(pairs * row_tiles), 0)", "turn"),
    "pairs overlap": ("head = 2 * pair", "head = pair"),
    "tiles of rows and heads are mixed up": ("row_tile = unit % row_tiles", "row_tile = unit % heads"),
}


@pytest.mark.parametrize("mutant", some_of(MUTANTS))
def test_a_faulty_kernel_is_noticed(mutant: str, tmp_path: Path) -> None:
    """The emulator would find what it is there to find."""
    right, wrong, problem = MUTANTS[mutant]
    assert is_noticed(check, altered(KERNEL, right, wrong, tmp_path), problem), "no interleaving showed the fault"


def test_values_are_asked_for_before_the_rows_that_wait_for_them_to_be_used(tmp_path: Path) -> None:
    """A single slot is free only when the tile before has had its last values: loaded after, they would never come."""
    late = altered(KERNEL, "if Q_SLOTS == 1:  # the only", "if Q_SLOTS == 0:  # the only", tmp_path)
    late = altered(
        late,
        "            if Q_SLOTS > 1 and not SHAPE.EARLY:\n                if step",
        "            if Q_SLOTS > 0:\n                if step",
        tmp_path,
    )

    run(source=late, **{**ONE_SLOT, "q_slots": 2})
    with pytest.raises(Deadlock):
        run(source=late, **ONE_SLOT)


@pytest.mark.parametrize("mutant", SCHEDULES)
def test_a_faulty_schedule_is_noticed(mutant: str, tmp_path: Path) -> None:
    path = altered(TILES, *SCHEDULES[mutant], tmp_path)

    def check_all() -> None:
        for row_tiles, heads, programs, order in product((4, 5), (3, 4), (2, 3, 24), ORDERS):
            check_schedule(row_tiles, heads, programs, order, path)

    with pytest.raises(AssertionError):
        check_all()


LONGEST = {
    "all tiles are dealt out forth": (
        "gl.where(lap % 2 == 0, gl.program_id(0), programs - 1 - gl.program_id(0))",
        "gl.program_id(0)",
    ),
    "what is dealt out back is counted as forth": (
        "gl.where(rounds % 2 == 0, gl.program_id(0), programs",
        "gl.where(rounds % 2 == 1, gl.program_id(0), programs",
    ),
    "the last section is dealt out, too": ("count = first // section *", "count = (first // section + 1) *"),
    "the last section begins a section early": (
        "heads // section - 1, 0) * section",
        "heads // section - 2, 0) * section",
    ),
    "tiles go from the shortest": ("row_tiles - 1 - place // side_by_side", "place // side_by_side"),
    "a row of the grid takes what the one before does": (
        "(gl.program_id(1) - 1) * gl.num_programs(0)",
        "(gl.program_id(1) - 1) * 0",
    ),
}


@pytest.mark.parametrize("mutant", LONGEST)
def test_a_faulty_order_from_the_longest_is_noticed(mutant: str, tmp_path: Path) -> None:
    path = altered(TILES, *LONGEST[mutant], tmp_path)

    def check_all() -> None:
        for row_tiles, heads, programs in product((4, 5), (3, 7), (3, 8)):
            section = min(max(ROUNDS * programs // row_tiles, 1), heads)
            check_longest_first(row_tiles, heads, section, programs, path)

    with pytest.raises(AssertionError):
        check_all()
