"""Causal tiles of the Hopper kernel dealt out evenly, and what is left out at their ends, in the emulator."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gluon_emulator import Machine
from gluon_language import load_kernel
from gluon_values import tensor
from helpers import examples, some_of
from hypothesis import given
from hypothesis import strategies as st
from sm90_runs import KERNEL, LOUD, TILES, altered, check, is_noticed, run

TWO: dict[str, Any] = {
    **{"lazy": True, "producer_first": True, "ping_pong": False, "block_n": 128, "v_stages": 3, "threes": True},
    **{"handed": True, "brief": True, "halved": True},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "two consumers": TWO,
    "three consumers": {"consumers": 3, "block_n": 128, "handed": True, "brief": True, "dtype": "bf16"},
    "three consumers, half blocks": {"consumers": 3, "block_n": 128, "handed": True, "brief": True, "halved": True},
    "one consumer": {"consumers": 1, "block_n": 128, "threes": True, "handed": True},
    "a buffer for Out": {
        "lazy": True, "producer_first": True, "q_slots": 1, "apart": True, "handed": True, "threes": True,
    },
}  # fmt: skip
PROBLEMS: dict[str, dict[str, Any]] = {
    "several sections": {"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 300, "programs": 3, "layout": "bshd"},
    "more keys": {"heads": 3, "kv_heads": 1, "q_len": 200, "kv_len": 270, "causal": "bottom-right"},
    "a few more keys": {"heads": 1, "q_len": 130, "kv_len": 150, "causal": "bottom-right"},
    "fewer keys": {"heads": 2, "q_len": 300, "kv_len": 140, "causal": "bottom-right", "programs": 2},
    "a tile": {"heads": 1, "q_len": 40},
    # Rows see past the keys, which end within the first half of a block.
    "keys end in half a block": {"heads": 1, "q_len": 450, "kv_len": 300, "head_size": 128, "block_d": 128},
}


@pytest.mark.parametrize(("setting", "problem"), some_of(SETTINGS, PROBLEMS))
def test_numbers(setting: str, problem: str) -> None:
    check(**{"causal": True, **SETTINGS[setting], **PROBLEMS[problem]}, even=2)


def test_rows_are_computed_again() -> None:
    check(**{**TWO, **LOUD, "q_len": 300, "heads": 5, "causal": True, "programs": 2}, even=2)


def dealt(row_tiles: int, heads: int, rounds: int, programs: int, source: Path = TILES) -> list[list[tuple[int, int]]]:
    """The tiles of each program, of which every one is taken once, and from section to section from the longest."""
    machine = Machine(0)
    kernel = load_kernel(source, machine)
    machine.programs = programs
    sizes = [tensor(row_tiles, np.int32), tensor(heads, np.int32)]
    sizes.append(kernel["section_heads"](*sizes, rounds))
    section = int(sizes[2])
    found = []
    for machine.program in range(programs):
        state, own = kernel["even_begin"](), []
        for _ in range(int(kernel["tile_count"](*sizes, kernel["EVENLY"]))):
            row_tile, head, state = kernel["even_place"](state, *sizes)
            own.append((int(row_tile), int(head)))
        last = max(heads // section - 1, 0)
        assert own == sorted(own, key=lambda tile: (min(tile[1] // section, last), -tile[0]))
        found.append(own)
    taken = sorted(tile for own in found for tile in own)
    assert taken == [(row_tile, head) for row_tile in range(row_tiles) for head in range(heads)]
    return found


@examples(40)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 20), st.sampled_from([2, 4]))
def test_tiles_are_taken_once(row_tiles: int, heads: int, programs: int, rounds: int) -> None:
    dealt(row_tiles, heads, rounds, min(programs, row_tiles * heads))


@pytest.mark.parametrize(
    ("row_tiles", "heads", "rounds", "most"),
    [(16, 128, 2, 1.005), (32, 32, 2, 1.005), (64, 16, 2, 1.005), (43, 64, 4, 1.01), (300, 2, 2, 1.05)],
)
def test_programs_get_as_much_to_do(row_tiles: int, heads: int, rounds: int, most: float) -> None:
    """In blocks of keys, of which the end of a tile takes 3/4."""
    work = [sum(row_tile + 1.75 for row_tile, _ in own) for own in dealt(row_tiles, heads, rounds, 132)]

    assert max(work) <= most * sum(work) / len(work)


def dealt_or_paired(
    row_tiles: int, heads: int, programs: int, source: Path = TILES
) -> tuple[bool, list[list[tuple[int, int]]]]:
    """Whether tiles go in pairs, and those of each program, of which every one is taken once."""
    machine = Machine(0)
    kernel = load_kernel(source, machine)
    machine.programs = programs
    sizes = [tensor(row_tiles, np.int32), tensor(heads, np.int32)]
    sizes.append(kernel["section_or_pairs"](*sizes, 2))
    order = kernel["EVENLY_OR_PAIRED"]
    found = []
    for machine.program in range(programs):
        state, own = kernel["even_begin"](), []
        for turn in range(int(kernel["tile_count"](*sizes, order))):
            row_tile, head, state = kernel["next_place"](tensor(turn, np.int32), state, *sizes, order)
            own.append((int(row_tile), int(head)))
        found.append(own)
    taken = sorted(tile for own in found for tile in own)
    assert taken == [(row_tile, head) for row_tile in range(row_tiles) for head in range(heads)]
    return int(sizes[2]) == 0, found


@examples(40)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 20))
def test_tiles_in_pairs_or_not_are_taken_once(row_tiles: int, heads: int, programs: int) -> None:
    dealt_or_paired(row_tiles, heads, min(programs, row_tiles * heads))


@pytest.mark.parametrize(
    ("row_tiles", "heads", "programs", "paired", "most"),
    [
        *((8, 256, 264, True, 1.04), (16, 128, 264, True, 1.04), (8, 16, 132, True, 2.0), (15, 192, 264, True, 1.11)),
        *((12, 64, 264, False, 1.16), (10, 64, 264, False, 1.13), (11, 32, 132, False, 1.13)),
    ],
)
def test_pairs_where_they_are_as_many_for_each_program(
    row_tiles: int, heads: int, programs: int, paired: bool, most: float
) -> None:
    """And no program has much more to do than others, in blocks of keys."""
    found, tiles = dealt_or_paired(row_tiles, heads, programs)
    work = [sum(row_tile + 1 for row_tile, _ in own) for own in tiles]

    assert found == paired
    assert max(work) <= most * sum(work) / len(work)


def test_numbers_in_pairs_or_not() -> None:
    """3 heads of 5 tiles: 8 pairs, for 4 programs two rounds, for 7 one and a tile; also rows computed again."""
    for programs in (4, 7):
        for setting in ("one consumer", "two consumers"):
            problem = {**SETTINGS[setting], "q_len": 5 * 64 * SETTINGS[setting].get("consumers", 2) - 20, "heads": 3}
            check(**problem, causal=True, programs=programs, even=2, paired=True)
    check(**{**TWO, **LOUD, "q_len": 300, "heads": 4, "causal": True, "programs": 6}, even=2, paired=True)


PAIRING_FAULTS = {
    "in pairs, whatever is left over": ("(room - pairs <= room // 8)", "(room - pairs <= room)"),
    "never in pairs": ("(tiles <= programs) | (room - pairs <= room // 8)", "tiles < 0"),
    "counted as pairs": (
        "            count = _even_count(row_tiles, heads, section)\n        return",
        "            count = tile_count(row_tiles, heads, section, PAIRS_OF_A_HEAD)\n        return",
    ),
}


def check_pairing(source: Path = TILES) -> None:
    for row_tiles, heads, programs, paired in (
        (8, 16, 33, True),
        (5, 7, 6, True),
        (12, 8, 33, False),
        (5, 3, 7, False),
    ):
        assert dealt_or_paired(row_tiles, heads, programs, source)[0] == paired


@pytest.mark.parametrize("fault", PAIRING_FAULTS)
def test_faulty_pairing_is_noticed(fault: str, tmp_path: Path) -> None:
    check_pairing()

    with pytest.raises(AssertionError):
        check_pairing(altered(TILES, *PAIRING_FAULTS[fault], tmp_path))


FAULTS = {
    "every section begins from the same program": ("place -= lacking\n", "place -= 0\n"),
    "all tiles are dealt out forth": (
        "tile = lap * programs + gl.where(lap % 2 == 0, place,", "tile = lap * programs + gl.where(lap >= 0, place,"
    ),
    "those that lack a tile are counted from the first section": (
        "before * lacking - first + programs - 1", "lacking - first + programs - 1"
    ),
    "the head of the next section": ("gl.where(lap == 0, index - 1, index) * section", "index * section"),
    "the last section begins with the first program": (
        "(gl.program_id(0) + before * (programs - lacking)) % programs", "gl.program_id(0)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_order_is_noticed(fault: str, tmp_path: Path) -> None:
    path = altered(TILES, *FAULTS[fault], tmp_path)

    def all_of_them() -> None:
        for row_tiles, heads, programs in ((4, 7, 3), (5, 8, 8), (5, 3, 7)):
            dealt(row_tiles, heads, 2, programs, path)

    with pytest.raises(AssertionError):
        all_of_them()


LEFT_OUT = {
    "a row sees a key of the second half": (
        "kv_n) - block * BLOCK_N <= BLOCK_N // 2:", "kv_n) - block * BLOCK_N <= BLOCK_N:"
    ),
    "the second half is multiplied instead": (".slice(0, HALF).permute", ".slice(HALF, HALF).permute"),
    "the first half is not masked where some row sees less": (
        "first_row + newest + 1, kv_n) >= key + BLOCK_N // 2", "first_row + newest + 65, kv_n) >= key + BLOCK_N // 2"
    ),
    "keys past the last are seen by rows that reach there": (
        "gl.minimum(first_row + newest + 1, kv_n) >= key +", "first_row + newest + 1 >= key +"
    ),
    "the second half is masked as the first": (
        "mask_all(far, ends, key + HALF, LAYOUT, HALF)", "mask_all(far, ends, key, LAYOUT, HALF)"
    ),
    "a slot is given back before its rows have left it": (
        "            tma.store_wait(0)\n            mbarrier.arrive(q_free.index((turn - 1) % Q_SLOTS * SHAPE",
        "            mbarrier.arrive(q_free.index((turn - 1) % Q_SLOTS * SHAPE",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", some_of(LEFT_OUT))
def test_a_faulty_end_of_a_tile_is_noticed(fault: str, tmp_path: Path) -> None:
    faulty = altered(KERNEL, *LEFT_OUT[fault], tmp_path)

    def both(source: Path = KERNEL, seed: int = 0, limit: float = 1.0) -> None:
        for problem in PROBLEMS:
            run = {"causal": True, **TWO, **PROBLEMS[problem], "even": 2}
            check(source=source, seed=seed, limit=limit, **run)

    assert is_noticed(both, faulty, {})


def values_not_finite(_q: Any, _k: Any, v: Any) -> None:
    v[...] = np.nan


def rows_without_keys_are_zeros(source: Path = KERNEL) -> None:
    out, *_ = run(source=source, **{**TWO, **PROBLEMS["fewer keys"], "change": values_not_finite}, even=2)
    assert (out[:, :, :160] == 0).all()


def test_rows_without_keys_are_zeros(tmp_path: Path) -> None:
    rows_without_keys_are_zeros()

    faulty = altered(KERNEL, "if first_row + newest < 0:", "if first_row + newest < -1000:", tmp_path)
    with pytest.raises(AssertionError):
        rows_without_keys_are_zeros(faulty)
