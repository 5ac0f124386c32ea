"""Ragged batches whose tiles the producer finds, in the emulator: where tiles lie, their order, and their numbers."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gluon_emulator import Machine
from gluon_language import load_kernel
from gluon_ptx import run_by_thread
from gluon_values import INT32, Pointer, Shared, tensor
from helpers import examples, few_of, some_of
from hypothesis import given
from hypothesis import strategies as st
from sm90_runs import KERNEL, LOUD, TILES, TOLERANCE, altered, check, is_noticed, run
from test_sm90_ragged import FEW as ALL_KINDS
from test_sm90_ragged import MANY as SEVENTY
from test_sm90_ragged import spans

from pyfmha.attention.reference import relative_error

PLACES = KERNEL.with_name("sm90_places.py")
BEYOND = 2**31 - 1
MOST = 126
"""Sequences of a table."""

# What the kernel is compiled with.
SETTINGS: dict[str, dict[str, Any]] = {
    "head size 64": {"consumers": 1, "block_n": 128, "threes": True, "sections": 4, "early": True},
    "head size 64, evenly": {"consumers": 1, "block_n": 128, "threes": True, "even": 4, "early": True},
    "head size 64, found by a warp": {
        **{"consumers": 1, "block_n": 128, "threes": True, "even": 4, "early": True, "finder": True},
    },
    "two consumers, found by a warp": {"finder": True, "lazy": True, "even": 2, "q_slots": 1},
    "two consumers": {},
    "head size 128": {
        **{"block_d": 128, "block_n": 128, "v_stages": 3, "head_size": 120, "lazy": True, "producer_first": True},
        **{"ping_pong": False, "threes": True, "early": True},
    },
    "head size 256": {
        **{"block_d": 256, "head_size": 136, "q_slots": 1, "v_stages": 3, "dtype": "bf16", "lazy": True},
        **{"threes": True, "early": True},
    },
    "head size 256, 80 keys": {
        **{"block_d": 256, "block_n": 80, "head_size": 136, "q_slots": 1, "dtype": "bf16", "lazy": True},
        **{"threes": True, "early": True, "direct": True, "sections": 2},
    },
    "head size 128, 96 keys": {
        **{"block_d": 128, "block_n": 96, "head_size": 120, "q_slots": 1, "dtype": "bf16", "lazy": True},
        **{"producer_first": True},
    },
}


def of_lengths(problem: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in problem.items() if name != "general"} | {"lengths": True}


FEW, MANY = of_lengths(ALL_KINDS), of_lengths(SEVENTY)
LOUD_FEW = {**FEW, **LOUD, "q_len": 90, "kv_len": 80, "cu_q": (3, 5, 5, 70, 71, 88), "cu_kv": (2, 30, 31, 52, 52, 80)}


def check_ranks(
    cu_q: Sequence[int], cu_kv: Sequence[int], q_len: int, kv_len: int, causal: bool | str, consumers: int = 2,
    source: Path = PLACES,
) -> None:  # fmt: skip
    """Each tile of each segment that has rows has a rank, and that of none is higher which has fewer blocks."""
    kernel = load_kernel(source, Machine(0))
    shape = SimpleNamespace(CONSUMERS=consumers, BLOCK_N=64, CAUSAL=bool(causal), GENERAL=False, LENGTHS=True)
    height, batch = 64 * consumers, len(cu_q) - 1
    queries, keys = (Pointer(np.array(cu, np.int64).astype(np.int32), INT32) for cu in (cu_q, cu_kv))
    table = Shared(np.zeros((2, int(kernel["SEGMENTS"])), np.int32), INT32)
    total = (tensor(q_len, np.int32), tensor(kv_len, np.int32))
    tiles, most = kernel["write_table"](table, queries, keys, tensor(batch, np.int32), *total, height, 64)
    bottom_right = tensor(int(causal == "bottom-right"), np.int32)
    window = tensor(-1, np.int32), tensor(0 if causal else -1, np.int32)
    sizes = (1, 1, *total, tiles, 1, 1, (bottom_right, (table, None, batch + 2 <= 32), most, *window))
    wanted = {}
    for index, ((q_first, q_end), (kv_first, kv_end)) in enumerate(
        zip(spans(cu_q, q_len), spans(cu_kv, kv_len), strict=True)
    ):
        q_n, kv_n = q_end - q_first, kv_end - kv_first if 0 < index <= batch else 0
        for row_tile in range(-(-q_n // height)):
            seen = min(kv_n, min((row_tile + 1) * height, q_n) + (kv_n - q_n if causal == "bottom-right" else 0))
            blocks = max(-(-(seen if causal else kv_n) // 64), 1)
            wanted[row_tile, q_first, q_n, kv_first if kv_n else None, kv_n] = blocks
    assert int(tiles) == len(wanted)
    longest = int(most)
    for rank in range(int(tiles)) if int(tiles) < 300 else (0, 1, int(tiles) // 2, int(tiles) - 1):
        row_tile, q_start, kv_start, (q_n, kv_n, *_) = kernel["find_ranked"](sizes, tensor(rank, np.int32), shape)
        found = tuple(map(int, (row_tile, q_start, q_n, kv_start, kv_n)))
        blocks = wanted.pop((*found[:3], found[3] if found[4] else None, found[4]))  # each once
        assert blocks <= longest
        longest = blocks


CAUSAL = [False, True, "bottom-right"]


@examples(60)
@given(st.data())
def test_every_tile_has_a_rank(data: st.DataObject) -> None:
    """However many there are, and whatever cu_seqlens hold."""
    count = data.draw(st.integers(2, 5) | st.integers(2, 40) | st.just(MOST + 1))
    q_len, kv_len = data.draw(st.integers(1, 900)), data.draw(st.integers(1, 900))
    wild = data.draw(st.booleans())

    def borders(total: int) -> list[int]:
        element = st.integers(0, total)
        if wild:
            element |= st.integers(-(2**31), BEYOND)
        drawn = data.draw(st.lists(element, min_size=count, max_size=count))
        return drawn if wild else sorted(drawn)

    causal = data.draw(st.sampled_from(CAUSAL))
    check_ranks(borders(q_len), borders(kv_len), q_len, kv_len, causal, data.draw(st.integers(1, 2)))


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize(
    ("cu_q", "cu_kv"),
    [
        ((0, 2**28), (0, 2**28)),
        ((-(2**31), BEYOND), (BEYOND, BEYOND)),
        ((2**27, 2**27 + 1, 5, BEYOND), (2**28 - 1, -1, 2**28, 2**28)),
        ((*[0] * 40, 2**28 - 1), (*[2**20] * 40, 2**28 - 1)),
    ],
    ids=str,
)
def test_ranks_stay_within_32_bits(cu_q: Sequence[int], cu_kv: Sequence[int], causal: bool | str) -> None:
    """So many tiles that only some are looked at."""
    kernel = load_kernel(PLACES, Machine(0))
    shape = SimpleNamespace(CONSUMERS=1, BLOCK_N=64, CAUSAL=bool(causal), GENERAL=False, LENGTHS=True)
    queries, keys = (Pointer(np.array(cu, np.int64).astype(np.int32), INT32) for cu in (cu_q, cu_kv))
    table = Shared(np.zeros((2, 128), np.int32), INT32)
    total = (tensor(2**28, np.int32), tensor(2**28, np.int32))
    tiles, most = kernel["write_table"](table, queries, keys, tensor(len(cu_q) - 1, np.int32), *total, 64, 64)
    window = tensor(-1, np.int32), tensor(0 if causal else -1, np.int32)
    flag = tensor(int(causal == "bottom-right"), np.int32)
    sizes = (1, 1, *total, tiles, 1, 1, (flag, (table, None, len(cu_q) < 31), most, *window))
    assert int(tiles) in range(2**22, 2**22 + len(cu_q) + 1)
    segments = {(first, end - first) for first, end in spans(cu_q, 2**28)}
    for rank in (0, 1, 2**21, int(tiles) - 1):
        row_tile, q_start, kv_start, (q_n, kv_n, *_) = kernel["find_ranked"](sizes, tensor(rank, np.int32), shape)
        assert (int(q_start), int(q_n)) in segments
        assert 0 <= int(row_tile) < -(-int(q_n) // 64)
        assert 0 <= int(kv_start) <= int(kv_start) + int(kv_n) <= 2**28


@examples(40)
@given(st.integers(1, 12), st.integers(1, 14), st.integers(1, 40), st.sampled_from(["", "SMALL_"]))
def test_pairs_of_sections_are_all_tiles(row_tiles: int, heads: int, programs: int, small: str) -> None:
    """Each once, and no program has two more than another."""
    machine = Machine(0)
    kernel = load_kernel(TILES, machine)
    machine.programs = programs
    sizes = *(tensor(x, np.int32) for x in (row_tiles, heads, heads)), kernel[f"PAIRS_OF_{small}SECTIONS"]
    taken = []
    counts = []
    for machine.program in range(programs):
        counts.append(int(kernel["tile_count"](*sizes)))
        taken += [tuple(map(int, kernel["tile_of"](tensor(i, np.int32), *sizes))) for i in range(counts[-1])]
    assert sorted(taken) == [(row_tile, head) for row_tile in range(row_tiles) for head in range(heads)]
    assert max(counts) - min(counts) <= 2


@pytest.mark.parametrize(("setting", "causal"), some_of(SETTINGS, CAUSAL))
def test_sequences_of_every_kind(setting: str, causal: bool | str) -> None:
    for seed, programs in enumerate((1, 3)):
        check(**{**FEW, **SETTINGS[setting], "programs": programs}, causal=causal, seed=seed)


@pytest.mark.parametrize("consumers", [1, 2])
def test_more_sequences_than_a_warp_has_threads(consumers: int) -> None:
    check(**MANY, consumers=consumers, causal="bottom-right")


@pytest.mark.parametrize(
    ("cu_q", "cu_kv"),
    [
        ((0, 0), (0, 0)),
        ((0, 150), (0, 90)),
        ((150, 150), (0, 90)),
        ((0, 150), (90, 90)),
        ((9, 100, 40, 140), (70, 20, 80, 10)),
        ((-5, 70, 400), (-(2**31), 30, BEYOND)),
        ((BEYOND, -(2**31), 3), (BEYOND, 4, -1)),
        ((100, 3, 3, 3), (5, 50, 50, 90)),
    ],
    ids=str,
)
def test_whatever_cu_seqlens_hold(cu_q: Sequence[int], cu_kv: Sequence[int]) -> None:
    for causal in (True, "bottom-right"):
        check(lengths=True, q_len=150, kv_len=90, cu_q=cu_q, cu_kv=cu_kv, causal=causal)


@examples(12)
@given(data=st.data())
def test_any_ragged_problem(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 6) | st.integers(2, 40))
    q_len, kv_len = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 400))
    sorts = data.draw(st.booleans())

    def borders(total: int) -> list[int]:
        drawn = data.draw(st.lists(st.integers(-3, total + 3), min_size=count, max_size=count))
        return sorted(drawn) if sorts else drawn

    check(
        **{"lengths": True, "seed": data.draw(st.integers(0, 1000)), "heads": data.draw(st.integers(1, 3))},
        **{"kv_heads": 1, "q_len": q_len, "kv_len": kv_len, "cu_q": borders(q_len), "cu_kv": borders(kv_len)},
        **SETTINGS[data.draw(st.sampled_from(sorted(SETTINGS)))],
        causal=data.draw(st.sampled_from(CAUSAL)),
        programs=data.draw(st.integers(1, 4)),
        layout=data.draw(st.sampled_from(["bhsd", "bshd"])),
    )


@pytest.mark.parametrize("sequence", few_of([0, 2, 4, 6], (2).__eq__))
@pytest.mark.parametrize("setting", ["two consumers", "head size 256, 80 keys"])
def test_nan_stays_in_its_sequence(sequence: int, setting: str) -> None:
    """Queries, keys and values of others, and what is of no sequence; in half of the cases infinity."""
    wrong = (np.nan, np.inf)[sequence // 4]
    q_rows, k_rows = slice(*FEW["cu_q"][sequence : sequence + 2]), slice(*FEW["cu_kv"][sequence : sequence + 2])

    def change(q: Any, k: Any, v: Any) -> None:
        kept = q[:, :, q_rows].copy(), k[:, :, k_rows].copy(), v[:, :, k_rows].copy()
        for x, rows, values in zip((q, k, v), (q_rows, k_rows, k_rows), kept, strict=True):
            x[...] = wrong
            x[:, :, rows] = values

    for causal in (False, "bottom-right"):
        with np.errstate(invalid="ignore"):  # of the reference
            out, lse, wanted, wanted_lse = run(**{**FEW, **SETTINGS[setting]}, causal=causal, change=change)

        dtype = SETTINGS[setting].get("dtype", "fp16")
        assert relative_error(out[:, :, q_rows], wanted[:, :, q_rows]) < TOLERANCE[dtype]
        np.testing.assert_allclose(lse[:, :, q_rows], wanted_lse[:, :, q_rows], rtol=1e-4, atol=1e-4)
        for rows in (slice(0, 3), slice(280, None)):
            assert (out[:, :, rows] == 0).all()
            assert np.isneginf(lse[:, :, rows]).all()


def test_rows_of_others_and_rows_without_keys_take_no_slow_arithmetic(tmp_path: Path) -> None:
    """Which is hundreds of times slower."""
    fast = altered(KERNEL, "    Out, Lse, Q, K, V = tensors\n", "    assert False, 'slow'\n", tmp_path)

    def change(q: Any, k: Any, v: Any) -> None:
        for x, first, end in ((q, 3, 280), (k, 7, 380), (v, 7, 380)):
            x[:, :, :first] = np.nan
            x[:, :, end:] = np.nan

    check(source=fast, **{**FEW, "cu_kv": (*FEW["cu_kv"][:-3], 370, 380, 380), "change": change})


@pytest.mark.parametrize("causal", CAUSAL)
def test_slow_rows_are_ragged_too(causal: bool | str) -> None:
    check(**LOUD_FEW, causal=causal)


OF_OTHERS: dict[str, Any] = {
    **{"cu_q": (3, 3, 5, 69, 70, 200, 265, 280), "change": lambda q, k, v: v[:, :, 7:130].fill(np.nan)},
}
"""Values that are NaN and behind which sequences of less than a block lie."""
# What is replaced by what, and the problem that shows it.
EVENLY: dict[str, Any] = {**FEW, "causal": True, "programs": 1, "even": 4, "q_slots": 1}
FAULTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "values of sequences before are kept": (
        "            if kv_n < BLOCK_N:  # then",
        "            if kv_n < 0:  # then",
        {**FEW, "cu_q": (3, 3, 5, 69, 70, 200, 265, 280), "change": lambda q, k, v: v[:, :, 7:130].fill(np.nan)},
    ),
    "a value of the sequence before is kept": (
        "(rows < count - first)[:, None], 0.0",
        "(rows < count - first - 1)[:, None], 0.0",
        {**FEW, "cu_q": (3, 3, 5, 69, 70, 200, 265, 280), "change": lambda q, k, v: v[:, :, 7:130].fill(np.nan)},
    ),
    "wide: a value of the sequence before is kept": (
        "(rows < count - first)[:, None], 0.0",
        "(rows < count - first - 1)[:, None], 0.0",
        {**FEW, **SETTINGS["head size 256, 80 keys"], **OF_OTHERS},
    ),
    "wide: values are kept but in the first columns": (
        "for part in gl.static_range(PARTS):  # those",
        "for part in gl.static_range(BLOCK_N // UNIT):  # those",
        {**FEW, **SETTINGS["head size 256, 80 keys"], **OF_OTHERS},
    ),
    "wide: parts of a block have the same keys": (
        "part % (BLOCK_N // UNIT) * UNIT",
        "0",
        {**FEW, **SETTINGS["head size 256, 80 keys"], **OF_OTHERS},
    ),
    "wide: keys of two blocks count twice": (
        "(own_keys,) if LENGTHS else ()",
        "()",
        {**FEW, **SETTINGS["head size 256, 80 keys"]},
    ),
    "wide: the second tensor begins with the first": (
        "second = _masked(scores[1], begins, ends, key)",
        "second = _masked(scores[1], begins, ends, key - scores[0].shape[1])",
        {**FEW, **SETTINGS["head size 256, 80 keys"]},
    ),
    "rows of the last values are given away": (
        "            elif Q_SLOTS == 1:  # the only",
        "            elif Q_SLOTS == 0:  # the only",
        {**FEW, **SETTINGS["head size 256"], "early": False},
    ),
    "early: a slot is given away before its rows are stored": (
        "            tma.store_wait(0)\n            mbarrier.arrive(q_free.index((turn - 1) % Q_SLOTS * SHAPE",
        "            mbarrier.arrive(q_free.index((turn - 1) % Q_SLOTS * SHAPE",
        {**FEW, **SETTINGS["head size 128"], "causal": True, "programs": 1},
    ),
    "early: the last values are left out": (
        "                if block == last:\n",
        "                if block == last - 1:\n",
        {**FEW, **SETTINGS["head size 256"], "causal": True, "programs": 1},
    ),
    "the first value is dropped": ("BLOCK_N - kv_n, v_whole", "BLOCK_N - kv_n + 1, v_whole", FEW),
    "the other consumers do not wait for dropped values": (
        "    mbarrier.wait(whole, phase)\n",
        "    pass\n",
        {**FEW, "cu_q": (3, 3, 5, 69, 70, 200, 265, 280), "change": lambda q, k, v: v[:, :, 7:130].fill(np.nan)},
    ),
    "no fence behind dropped values": (
        "        fence_async_shared()\n        gl.barrier()\n    mbarrier.arrive(whole",
        "    mbarrier.arrive(whole",
        FEW,
    ),
    "consumers meet in the wrong phase": ("dropped += 1", "dropped += 0", FEW),
    "tiles are handed on after their queries have come": (
        "                    if HANDING:\n                        hand_on(sizes, slot, row_tile",
        "                    if HANDING and turn < 1:\n                        hand_on(sizes, slot, row_tile",
        FEW,
    ),
    "evenly: the head that was handed on is lost": ("head = row_tile & (MOST_HEADS - 1)", "head = head * 0", EVENLY),
    "evenly: the producer goes on from the first tile": (
        "following, state = place_of_turn(turn + 1, state, sizes, SHAPE)",
        "following, _s = place_of_turn(turn + 1, state, sizes, SHAPE)",
        EVENLY,
    ),
    "places are found over others that wait": (
        "        mbarrier.wait(free.index(slot), ((turn // FOUND) & 1) ^ 1)\n",
        "",
        {**EVENLY, "finder": True},
    ),
    "places are given back before they are taken": (
        "    mbarrier.wait(ready.index(slot), (turn // FOUND) & 1)\n    at",
        "    mbarrier.wait(ready.index(slot), (turn // FOUND) & 1)\n"
        "    mbarrier.arrive(free.index(slot), count=1)\n    at",
        {**EVENLY, "finder": True},
    ),
    "slow rows find no sequence": (
        "row_tile, q_start, kv_start, sequence = find_ranked(sizes, row_tiles - 1 - row_tile, SHAPE)\n"
        "                        place",
        "_t, q_start, kv_start, sequence = find_ranked(sizes, row_tiles - 1 - row_tile, SHAPE)\n"
        "                        place",
        LOUD_FEW,
    ),
}

# The same of where tiles lie.
RANKS = {
    "sequences may go back": ("gl.maximum(end, begin) - begin", "end - begin"),
    "earlier borders are forgotten": (
        "begin = gl.maximum(gl.associative_scan(begin, 0, _larger), 0)\n    kv_begin",
        "begin = gl.maximum(begin, 0)\n    kv_begin",
    ),
    "earlier keys are forgotten": (
        "kv_begin = gl.maximum(gl.associative_scan(kv_begin, 0, _larger), 0)",
        "kv_begin = gl.maximum(kv_begin, 0)",
    ),
    "rows before the first sequence have keys": ("gl.where(segment == 0, -kv_n, kv_n)", "kv_n"),
    "keys before the first sequence are forgotten": ("gl.abs(keys)", "gl.maximum(keys, 0)"),
    "a tile too few": ("tiles = (q_n + (TILE - 1)) // TILE", "tiles = q_n // TILE"),
    "the last row's key is lost": ("(kv_n > key) & (q_n > row)", "(kv_n > key) & (q_n > row + 1)"),
    "a tile counts as longer": ("tiles - row // TILE", "tiles - (row - 1) // TILE"),
    "the longest is not looked for": ("beyond = most + 1", "beyond = most"),
    "ranks of a level are of the one above": ("rank - gl.sum(longer, 0)", "rank - gl.sum(as_long, 0)"),
    "tiles of a sequence are its first": ("tiles - as_long + index", "index"),
}


def test_the_thread_that_arrives_stores_places() -> None:
    """The first of the producer: with it Triton tells a barrier how many bytes come. Others' stores, before a barrier
    of the producer and that arrival, racecheck takes for races."""
    store = load_kernel(PLACES, Machine(0))["_first_stores_asm"](None, (("$0",), ("$1",), ("$2",), ("$3",)))
    threads, memory = np.arange(128), np.zeros(2, np.int32)
    run_by_thread(store, {"$0": 0 * threads, "$1": threads, "$2": threads + 7, "$3": threads + 9}, memory)
    assert list(memory) == [7, 9]


@pytest.mark.parametrize("fault", some_of(FAULTS))
def test_a_faulty_kernel_is_noticed(fault: str, tmp_path: Path) -> None:
    right, wrong, problem = FAULTS[fault]
    assert is_noticed(check, altered(KERNEL, right, wrong, tmp_path), problem), "no interleaving showed the fault"


@pytest.mark.parametrize("fault", some_of(RANKS))
def test_a_faulty_rank_is_noticed(fault: str, tmp_path: Path) -> None:
    path = altered(PLACES, *RANKS[fault], tmp_path)
    wild = [(37 * i) % 211 - 20 for i in range(50)]

    def check_all() -> None:
        for causal in CAUSAL:
            check_ranks((30, 95, 95, 300, 364, 700, 840), (10, 75, 90, 300, 500, 800, 880), 900, 900, causal, 1, path)
            check_ranks(wild, wild[::-1], 180, 180, causal, 1, path)

    with pytest.raises((AssertionError, KeyError)):
        check_all()
