"""Ragged batches in the Hopper kernel, in the emulator: where tiles lie, their numbers, and what they leave alone."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gluon_emulator import Machine
from gluon_language import load_kernel
from gluon_values import INT32, Pointer, tensor
from helpers import examples, some_of
from hypothesis import given
from hypothesis import strategies as st
from sm90_runs import KERNEL, LOUD, TOLERANCE, altered, check, is_noticed, run

from pyfmha.attention.reference import relative_error

RAGGED = KERNEL.with_name("sm90_ragged.py")
BEYOND = 2**31 - 1

# What the kernel is compiled with, and more.
SETTINGS: dict[str, dict[str, Any]] = {
    "head size 64": {"consumers": 1, "block_n": 128},
    "head size 128": {"consumers": 1, "block_d": 128, "v_stages": 3, "head_size": 120},
    "head size 256": {"block_d": 256, "head_size": 136, "q_slots": 1, "v_stages": 3, "dtype": "bf16"},
    "two consumers of wide blocks": {"block_n": 128, "stages": 3},
}
# Sequences of no queries, of no keys, of one, of a whole tile and a row more; rows before the first and after the last.
FEW: dict[str, Any] = {
    **{"general": True, "layout": "bshd", "heads": 2, "kv_heads": 1, "q_len": 300, "kv_len": 400},
    "cu_q": (3, 5, 5, 69, 70, 200, 265, 280),
    "cu_kv": (7, 130, 131, 131, 196, 390, 391, 400),
}
MANY: dict[str, Any] = {
    **{"general": True, "heads": 1, "q_len": 150, "kv_len": 260, "programs": 2},
    "cu_q": tuple(min(2 * i - i // 7, 140) for i in range(75)),
    "cu_kv": tuple(min(3 * i + 11 * (i // 30), 255) for i in range(75)),
}
ONE = {"general": True, "heads": 1, "q_len": 100, "kv_len": 140, "cu_q": (0, 100), "cu_kv": (0, 140)}
LOUD_FEW = {**FEW, **LOUD, "q_len": 90, "kv_len": 80, "cu_q": (3, 5, 5, 70, 71, 88), "cu_kv": (2, 30, 31, 52, 52, 80)}
FULL, CAUSAL, WIDE, NARROW = (-1, -1), (-1, 0), (70, 20), (2, 3)


def spans(cu_seqlens: Sequence[int], total: int) -> list[tuple[int, int]]:
    """Where each segment begins and ends: the rows before all sequences, each of these, and the rows behind."""
    borders = [0]
    for end in cu_seqlens:
        borders.append(max(borders[-1], min(max(end, 0), total)))
    borders.append(total)
    return list(pairwise(borders))


def check_tiles(
    cu_q: Sequence[int], cu_kv: Sequence[int], q_len: int, kv_len: int, consumers: int, source: Path = RAGGED
) -> None:
    """Every tile finds its sequence, and those past the last find no rows."""
    find = load_kernel(source, Machine(0))["find_tile"]
    shape = SimpleNamespace(CONSUMERS=consumers, GENERAL=True)
    height, batch = 64 * consumers, len(cu_q) - 1
    tiles = -(-q_len // height) + batch + 1
    queries, keys = (Pointer(np.array(cu, np.int64).astype(np.int32), INT32) for cu in (cu_q, cu_kv))
    numbers = [tensor(x, np.int32) for x in (1, 1, q_len, kv_len, tiles, 1, 1)]
    left, right = tensor(-1, np.int32), tensor(0, np.int32)
    sizes = (*numbers, (right, (queries, tensor(batch, np.int32)), keys, left, right))
    segments = []
    count = 0
    for index, ((q_first, q_end), (kv_first, kv_end)) in enumerate(
        zip(spans(cu_q, q_len), spans(cu_kv, kv_len), strict=True)
    ):
        keys = kv_end - kv_first if 0 < index <= batch else 0
        segments.append((count, (q_first, q_end - q_first, kv_first, keys)))
        count += -(-(q_end - q_first) // height)
    assert count <= tiles
    few = {*range(count)} if count < 300 else {0, 1, 2, count // 2, count - 1}
    for tile in sorted(few | {tiles - 1}):
        row_tile, q_start, kv_start, (q_n, kv_n, *_) = find(sizes, tensor(tiles - 1 - tile, np.int32), shape)
        found = tuple(map(int, (row_tile, q_start, q_n, kv_start, kv_n)))
        if tile >= count:
            assert found[2] == found[4] == 0
            continue
        first, segment = next((first, segment) for first, segment in reversed(segments) if first <= tile)
        wanted = tile - first, *segment
        if found[4] == 0:  # where there are no keys, it does not matter where they begin
            assert (*found[:3], found[4]) == (*wanted[:3], wanted[4])
            assert 0 <= found[3] <= kv_len
        else:
            assert found == wanted


@examples(60)
@given(st.data())
def test_every_tile_finds_its_sequence(data: st.DataObject) -> None:
    """However many there are, and whatever cu_seqlens hold."""
    count = data.draw(st.integers(2, 5) | st.integers(29, 36) | st.integers(61, 70) | st.integers(2, 140))
    q_len, kv_len = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 400))
    wild = data.draw(st.booleans())

    def borders(total: int) -> list[int]:
        element = st.integers(0, total)
        if wild:
            element |= st.integers(-(2**31), BEYOND)
        drawn = data.draw(st.lists(element, min_size=count, max_size=count))
        return drawn if wild else sorted(drawn)

    check_tiles(borders(q_len), borders(kv_len), q_len, kv_len, data.draw(st.integers(1, 2)))


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
@pytest.mark.parametrize("consumers", [1, 2])
def test_places_stay_within_32_bits(cu_q: Sequence[int], cu_kv: Sequence[int], consumers: int) -> None:
    check_tiles(cu_q, cu_kv, 2**28, 2**28, consumers)


@pytest.mark.parametrize(("setting", "bottom_right"), some_of(SETTINGS, [False, True]))
def test_sequences_of_every_kind(setting: str, bottom_right: bool) -> None:
    first = list(SETTINGS).index(setting) // 2 % 2
    for index, window in enumerate((FULL, CAUSAL, WIDE, NARROW)[first::2]):
        problem = {**FEW, **SETTINGS[setting], "window": window, "bottom_right": bottom_right}
        check(seed=index, programs=2 * index + 1, **problem)


@pytest.mark.parametrize("window", [FULL, CAUSAL, NARROW])
@pytest.mark.parametrize("consumers", [1, 2])
def test_more_sequences_than_a_warp_has_threads(consumers: int, window: tuple[int, int]) -> None:
    check(**MANY, consumers=consumers, window=window, bottom_right=True)


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
    for consumers in (1, 2):
        problem = {"general": True, "q_len": 150, "kv_len": 90, "cu_q": cu_q, "cu_kv": cu_kv}
        check(consumers=consumers, q_slots=3 - consumers, window=CAUSAL, bottom_right=consumers == 1, **problem)


@examples(15)
@given(data=st.data())
def test_any_ragged_problem(data: st.DataObject) -> None:
    consumers, kv_heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    count = data.draw(st.integers(2, 6) | st.integers(2, 40))
    q_len, kv_len = data.draw(st.integers(1, 260)), data.draw(st.integers(1, 260))
    sorts = data.draw(st.booleans())

    def borders(total: int) -> list[int]:
        drawn = data.draw(st.lists(st.integers(-3, total + 3), min_size=count, max_size=count))
        return sorted(drawn) if sorts else drawn

    sides = st.just(-1) | st.integers(0, 20) | st.integers(0, 220)
    check(
        seed=data.draw(st.integers(0, 1000)),
        general=True,
        kv_heads=kv_heads,
        heads=kv_heads * data.draw(st.integers(1, 2)),
        q_len=q_len,
        kv_len=kv_len,
        cu_q=borders(q_len),
        cu_kv=borders(kv_len),
        window=(data.draw(sides), data.draw(sides)),
        bottom_right=data.draw(st.booleans()),
        consumers=consumers,
        ping_pong=consumers > 1 and data.draw(st.booleans()),
        stages=data.draw(st.integers(2, 3)),
        v_stages=data.draw(st.integers(2, 3)),
        block_n=data.draw(st.sampled_from([64, 128])),
        q_slots=data.draw(st.integers(1, 2)),
        programs=data.draw(st.integers(1, 4)),
        layout=data.draw(st.sampled_from(["bhsd", "bshd"])),
        head_size=8 * data.draw(st.integers(1, 8)),
    )


@pytest.mark.parametrize(("sequence", "consumers"), some_of([0, 2, 4, 6], [1, 2]))
def test_nan_stays_in_its_sequence(sequence: int, consumers: int) -> None:
    """Queries, keys and values of others, and what is of no sequence; in half of the cases infinity."""
    wrong = (np.nan, np.inf)[sequence // 4]
    q_rows, k_rows = slice(*FEW["cu_q"][sequence : sequence + 2]), slice(*FEW["cu_kv"][sequence : sequence + 2])

    def change(q: Any, k: Any, v: Any) -> None:
        kept = q[:, :, q_rows].copy(), k[:, :, k_rows].copy(), v[:, :, k_rows].copy()
        for x, rows, values in zip((q, k, v), (q_rows, k_rows, k_rows), kept, strict=True):
            x[...] = wrong
            x[:, :, rows] = values

    for window in (FULL, NARROW):
        with np.errstate(invalid="ignore"):  # of the reference
            out, lse, wanted, wanted_lse = run(**FEW, consumers=consumers, window=window, change=change)

        assert relative_error(out[:, :, q_rows], wanted[:, :, q_rows]) < TOLERANCE["fp16"]
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

    for consumers in (1, 2):
        problem = {**FEW, "cu_kv": (*FEW["cu_kv"][:-3], 370, 380, 380), "consumers": consumers, "change": change}
        check(source=fast, **problem)
        check(source=fast, **problem, window=NARROW, bottom_right=True)


@pytest.mark.parametrize("bottom_right", [False, True])
@pytest.mark.parametrize("consumers", [1, 2])
def test_slow_rows_are_ragged_too(consumers: int, bottom_right: bool) -> None:
    for seed, window in enumerate((FULL, CAUSAL, NARROW, (3, -1), (-1, 3))):
        check(**{**LOUD_FEW, "seed": seed, "consumers": consumers, "window": window, "bottom_right": bottom_right})


def test_lse_may_be_left_out() -> None:
    for problem in (FEW, LOUD_FEW):
        out, lse, wanted, _ = run(**{"dtype": "fp16", **problem}, lse=False)

        assert relative_error(out, wanted) < TOLERANCE[str(problem.get("dtype", "fp16"))]
        assert (lse == 7).all()


# What is replaced by what, and the problem that shows it.
MUTANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rows of the next sequence are stored, too": ("if count >= ROWS:", "if count > 0:", FEW),
    "rows of a whole tile's size are missed": ("if first < count:", "if first + HEIGHT <= count:", FEW),
    "a row too many is stored": ("stored = (rows < count - first)", "stored = (rows <= count - first)", FEW),
    "a row too few is stored": ("stored = (rows < count - first)", "stored = (rows < -1 + count - first)", FEW),
    "columns behind the head size are stored": (
        "stored = (rows < count - first)[:, None] & (columns < head_size)[None, :]\n",
        "stored = (rows < count - first)[:, None]\n",
        {**FEW, "head_size": 40},
    ),
    "rows are stored at the begin of the tensor": ("token.to(gl.int64)", "first_row.to(gl.int64)", FEW),
    "all heads are stored as the first": (
        "Out += head.to(gl.int64) * stride_h + ",
        "Out += ",
        FEW,
    ),
    "whole tiles are stored as if all began at 0": (
        "[0, head, token, 0]",
        "[0, head, first_row, 0]",
        FEW,
    ),
    "no fence keeps what is read from what comes next": (
        "    fence_async_shared()\n    gl.barrier()\n",
        "    gl.barrier()\n",
        FEW,
    ),
    "no fence before the next rows come": (
        "    fence_async_shared()\n    gl.barrier()\n",
        "    gl.barrier()\n",
        FEW,
    ),
    "queries are loaded as if all began at 0": ("first_row += q_start", "first_row += 0", FEW),
    "keys are loaded as if all began at 0": ("key += kv_start", "key += 0", FEW),
    "values of the next sequence are kept": (
        "(kv_start + kv_n if RAGGED else kv_n) < kv_len",
        "kv_n < 0",
        {**FEW, "change": lambda q, k, v: v[:, :, 130:131].fill(np.nan)},  # of a sequence without queries
    ),
    "a sequence of as many keys as there are tokens is taken for all": (
        "        if GENERAL:\n            if (kv_start + kv_n if RAGGED else kv_n) < kv_len",
        "        if GENERAL:\n            if (kv_start * 3 + kv_n if RAGGED else kv_n) < kv_len",
        {
            **{**FEW, "cu_q": (3, 5, 5, 69, 70, 70, 265, 280)},  # the sequence that has NaN has no queries
            "change": lambda q, k, v: v[:, :, 196:390].fill(np.nan),
        },
    ),
    "Lse is stored as if all began at 0": (
        "head.to(gl.int64) * q_len + token)",
        "head.to(gl.int64) * q_len + first_row)",
        FEW,
    ),
    "the Lse of the next sequence is stored, too": ("mask=own_rows < count)", "mask=own_rows < q_len - token)", FEW),
    "the copy of the weights differs": (
        "ragged - 1 if RAGGED",
        "ragged if RAGGED",
        {**FEW, **SETTINGS["head size 256"]},
    ),
    "there are too few tiles": ("row_tiles += batch_size + 1", "row_tiles += batch_size", {**ONE, "cu_q": (1, 99)}),
    "a batch has the heads of several": (
        "num_heads if RAGGED else batch_size * num_heads",
        "batch_size * num_heads",
        FEW,
    ),
    "slow rows are of the first queries": (
        "        Q += q_start.to(gl.int64) * q_strides[2]\n",
        "",
        LOUD_FEW,
    ),
    "slow rows see the first keys": ("        K += kv_start.to(gl.int64) * k_strides[2]\n", "", LOUD_FEW),
    "slow rows see the first values": ("        V += kv_start.to(gl.int64) * v_strides[2]\n", "", LOUD_FEW),
    "slow rows go to the first ones": ("        Out += q_start.to(gl.int64) * out_strides[2]\n", "", LOUD_FEW),
    "slow rows go to the first Lse": ("Lse += q_start", "Lse += 0", LOUD_FEW),
    "slow rows go over those of the next sequence": (
        "out_rows = q_n if RAGGED else q_len",
        "out_rows = q_len",
        LOUD_FEW,
    ),
    "slow rows find no sequence": (
        "                        row_tile, q_start, kv_start, sequence = find_tile(sizes, row_tile, SHAPE)\n"
        "                        place",
        "                        _t, q_start, kv_start, sequence = find_tile(sizes, row_tile, SHAPE)\n"
        "                        place",
        LOUD_FEW,
    ),
    "Out may be written after it was computed again": (
        "        noted = written(noted)\n",
        "        pass\n",
        {**LOUD_FEW, "heads": 1, "q_len": 70, "kv_len": 5, "cu_q": (0, 70), "cu_kv": (0, 5)},
    ),
}

# The same of where tiles lie.
PLACES = {
    "the border of two looks is lost": ("begin_given = (segment > 0)", "begin_given = (segment > first)"),
    "sequences may go back": ("end = gl.maximum(end, begin)", "end = end"),
    "earlier borders are forgotten": ("0, _larger), q_before)", "0, _larger), 0)"),
    "earlier tiles are forgotten": ("tiles_before = gl.max(tiles_end, 0)", "tiles_before = tile * 0"),
    "earlier keys are forgotten": ("kv_before = gl.maximum(gl.max(kv_end, 0), kv_before)", "kv_before = kv_before"),
    "only the latest keys are remembered": (
        "kv_before = gl.maximum(gl.max(kv_end, 0), kv_before)",
        "kv_before = gl.max(kv_end, 0)",
    ),
    "keys begin at the end of the sequence": ("gl.where(segment < found, kv_end", "gl.where(segment <= found, kv_end"),
    "rows of no sequence have keys": ("(found > 0) & (found <= batch_size)", "found >= 0"),
    "the rows before the first sequence have keys": ("(found > 0) & (found <= batch_size)", "found <= batch_size"),
    "a tile too few": ("(end - begin + (TILE - 1)) // TILE", "(end - begin) // TILE"),
    "borders may lie behind the tensor": ("other=otherwise), total)", "other=otherwise), total + 99)"),
    "what follows cu_seqlens is read": ("given = segment <= batch_size\n", "given = segment <= batch_size + 1\n"),
    "what precedes cu_seqlens is read": ("begin_given = (segment > 0) & ", "begin_given = "),
    "a whole look of sequences is left out": ("first += LOOK", "first += LOOK + LOOK"),
}


@pytest.mark.parametrize("mutant", some_of(MUTANTS))
def test_a_faulty_kernel_is_noticed(mutant: str, tmp_path: Path) -> None:
    right, wrong, problem = MUTANTS[mutant]
    assert is_noticed(check, altered(KERNEL, right, wrong, tmp_path), problem), "no interleaving showed the fault"


@pytest.mark.parametrize("mutant", PLACES)
def test_a_faulty_search_is_noticed(mutant: str, tmp_path: Path) -> None:
    path = altered(RAGGED, *PLACES[mutant], tmp_path)
    batch = 70
    rising = [4 * i - 3 * (i % 3) + 2 for i in range(batch)]
    wild = [(37 * i) % 211 - 20 for i in range(batch)]

    def check_all() -> None:
        for borders, total in ((rising, 400), (wild, 180), (wild[::-1], 180), ([5, 5, 9], 20), ([-3, -9, 130], 140)):
            keys = [border // 2 for border in borders]
            check_tiles(borders, keys, total, total, 1, path)
            check_tiles(keys, borders, total, total, 2, path)
        check_tiles(rising, [150] * 20 + [10] * 45 + [50, 60, 200, 70, 210], 400, 400, 1, path)

    with pytest.raises(AssertionError):
        check_all()
