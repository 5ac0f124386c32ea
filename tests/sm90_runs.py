"""Runs the Hopper kernel in the emulator and holds it against float64; shared by the tests of it and of decoding."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gluon_emulator import Deadlock, Machine, launch
from gluon_language import load_kernel
from gluon_values import BF16, DTYPES, FP32, INT32, Descriptor, Pointer, tensor

from pyfmha.attention.reference import attend, relative_error

KERNEL = Path(__file__).parents[1] / "kernels" / "fmha_sm90.py"
TILES = KERNEL.with_name("sm90_tiles.py")
ROUNDS = 2
"""SECTION_ROUNDS of the kernel."""

TOLERANCE = {"fp16": 5e-4, "bf16": 4e-3}


def rows_of_grid(row_tiles: int, programs: int) -> int:
    """Where tiles go from the longest."""
    return 1 + max(2 * ROUNDS, -(-2 * row_tiles // programs))


def make(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, layout: str, scale: float = 1.0) -> Any:
    """A [batch, heads, seq, head size] array of values of the dtype, laid out as asked for, within guards of NaN."""
    values = DTYPES[dtype].rounded(rng.standard_normal(shape) * scale)
    batch, heads, seq, size = shape
    stored = (batch, heads, seq, size) if layout == "bhsd" else (batch, seq, heads, size)
    memory = np.full(int(np.prod(stored)) + 32, np.nan, np.float32)
    view = memory[16:-16].reshape(stored)
    view = view if layout == "bhsd" else view.transpose(0, 2, 1, 3)
    view[...] = values
    return memory, view


def run(
    *,
    source: Path = KERNEL,
    seed: int = 0,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    q_len: int = 64,
    kv_len: int | None = None,
    head_size: int = 64,
    causal: bool | str = False,
    dtype: str = "fp16",
    layout: str = "bhsd",
    consumers: int = 2,
    block_n: int = 64,
    stages: int = 2,
    v_stages: int = 2,
    two_heads: bool = False,
    longest_first: bool = False,
    ping_pong: bool | None = None,
    q_slots: int = 2,
    programs: int = 1,
    block_d: int = 64,
    sm_scale: float = 0.125,
    scale: float = 1.0,
    lse: bool = True,
    change: Callable[[Any, Any, Any], None] = lambda q, k, v: None,
    general: bool = False,
    window: tuple[int, int] | None = None,
    bottom_right: bool = False,
    q_lengths: Sequence[int] | None = None,
    kv_lengths: Sequence[int] | None = None,
    cu_q: Sequence[int] | None = None,
    cu_kv: Sequence[int] | None = None,
    padding: float = np.nan,
    softcap: float = 0.0,
    two_parts: bool = False,
    lazy: bool = False,
    serial: bool = False,
    producer_first: bool = False,
    lengths: bool = False,
    threes: bool = False,
    handed: bool = False,
    apart: bool = False,
    sections: int = 0,
    early: bool = False,
    even: int = 0,
    paired: bool = False,
    brief: bool = False,
    halved: bool = False,
    direct: bool = False,
    levels: bool = False,
    finder: bool = False,
) -> tuple[Any, Any, Any, Any]:
    """Run the kernel; returns Out, Lse and what they should be. `change` may write other values to Q, K and V; what
    lies behind their lengths is padding. What only the general kernel serves, it alone takes. cu_q and cu_kv make the
    batch ragged: a batch of one here, of q_len and kv_len tokens."""
    ragged = cu_q is not None
    assert not ragged or (cu_kv is not None and (general or lengths) and batch == 1 and len(cu_q or ()) == len(cu_kv))
    bottom_right = bottom_right or causal == "bottom-right"
    window = window or (-1, 0 if causal else -1)
    assert general or lengths or (q_lengths, kv_lengths) == (None, None)
    assert general or window == (-1, 0 if causal else -1)
    rng = np.random.default_rng(seed)
    kv_heads, kv_len = kv_heads or heads, kv_len or q_len
    (q_memory, q), (k_memory, k), (v_memory, v) = (
        make(rng, (batch, h, s, head_size), dtype, layout, scale)
        for h, s in ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    )
    change(q, k, v)
    for tensors, ends in (((q,), q_lengths), ((k, v), kv_lengths)):
        for b, length in enumerate(ends or ()):
            for padded in tensors:
                padded[b, :, max(length, 0) :] = padding
    out_memory, out = make(rng, (batch, heads, q_len, head_size), dtype, layout)
    out[...] = np.nan
    lse_memory = np.full(batch * heads * q_len, 7.0, np.float32)
    machine = Machine(seed)
    kernel = load_kernel(source, machine)["fmha_fwd_sm90"]
    element = DTYPES[dtype]
    unit = block_n & -block_n

    def strides(array: Any) -> list[Any]:
        return [np.int64(stride // 4) for stride in array.strides[:3]]

    launch(
        machine,
        kernel,
        programs,
        Descriptor(out, element, 64, block_d),
        Descriptor(q, element, 64, block_d),
        *(Descriptor(x, element, block_n, block_d if unit == block_n else min(block_d, 64)) for x in (k, v)),
        Pointer(out_memory, element, 16),
        Pointer(lse_memory if lse else None, FP32),
        *(Pointer(memory, element, 16) for memory in (q_memory, k_memory, v_memory)),
        *(
            Pointer(None if ends is None else np.array(ends, np.int32), INT32)
            for ends in (q_lengths, kv_lengths, cu_q, cu_kv)
        ),
        sm_scale,
        softcap,
        batch if cu_q is None else len(cu_q) - 1,
        heads,
        kv_heads,
        q_len,
        kv_len,
        head_size,
        *strides(q),
        *strides(k),
        *strides(v),
        *strides(out),
        *window,
        int(bottom_right),
        int(ragged),
        BLOCK_D=block_d,
        BLOCK_N=block_n,
        CONSUMERS=consumers,
        STAGES=stages,
        V_STAGES=v_stages,
        CAUSAL=bool(causal) or general,
        TWO_HEADS=two_heads,
        LONGEST_FIRST=longest_first,
        rows=rows_of_grid(-(-q_len // (64 * consumers)), programs) if longest_first else 1,
        GENERAL=general,
        RAGGED=ragged,
        CAPPED=softcap > 0,
        PING_PONG=consumers > 1 if ping_pong is None else ping_pong,
        Q_SLOTS=q_slots,
        CONSUMER_REGISTERS=240,
        PRODUCER_REGISTERS=24,
        TWO_PARTS=two_parts,
        LAZY=lazy,
        SERIAL=serial,
        PRODUCER_FIRST=producer_first,
        LENGTHS=lengths,
        THREES=threes,
        HANDED_ON=handed,
        APART=apart,
        SECTIONS=sections,
        EARLY=early,
        EVEN=even,
        PAIRED=paired,
        BRIEF=brief,
        HALVED=halved,
        DIRECT=direct,
        LEVELS=levels,
        FINDER=finder,
    )
    assert np.isnan(out_memory[:16]).all()
    assert np.isnan(out_memory[-16:]).all()
    mask: dict[str, Any] = {
        **{"window_left": window[0], "window_right": window[1], "bottom_right": bottom_right},
        "softcap": float(np.float32(softcap)),
    }
    if ragged:
        tokens = (x[0].transpose(1, 0, 2) for x in (q, k, v))
        wanted, wanted_lse = attend(*tokens, sm_scale=sm_scale, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv, **mask)
        wanted, wanted_lse = wanted.transpose(1, 0, 2)[None], wanted_lse[None]
    else:
        wanted, wanted_lse = attend(q, k, v, sm_scale=sm_scale, q_lengths=q_lengths, kv_lengths=kv_lengths, **mask)
    return out, lse_memory.reshape(batch, heads, q_len), wanted, wanted_lse


def check(dtype: str = "fp16", limit: float = 1.0, **problem: Any) -> None:
    """Run, and hold it against float64; `limit` is a factor of the errors that pass."""
    out, lse, wanted, wanted_lse = run(dtype=dtype, **problem)
    assert (out[np.isneginf(wanted_lse)] == 0).all()
    check_values(out, lse, wanted, wanted_lse, dtype, limit)


def check_values(out: Any, lse: Any, wanted: Any, wanted_lse: Any, dtype: str, limit: float) -> None:
    assert np.isfinite(out).all()
    assert relative_error(out, wanted) < limit * TOLERANCE[dtype]
    np.testing.assert_allclose(lse, wanted_lse, rtol=limit * 1e-4, atol=limit * 1e-4)


ORDERS = ("SINGLES", "PAIRS_OF_A_HEAD", "PAIRS_OF_TWO_HEADS")


def check_schedule(row_tiles: int, heads: int, programs: int, order: str, source: Path = TILES) -> None:
    """Every tile of every head is taken by one program, once, and no program has more than a unit more than another.

    Args:
        row_tiles: tiles of rows of a head.
        heads: how many, over the batch.
        programs: of the grid.
        order: one of :data:`ORDERS`.
        source: the kernel's file.
    """
    machine = Machine(0)
    kernel = load_kernel(source, machine)
    machine.programs = programs
    sizes = tensor(row_tiles, np.int32), tensor(heads, np.int32), tensor(heads, np.int32), kernel[order]
    taken: list[tuple[int, int]] = []
    work = []
    paired = order != "SINGLES"
    for machine.program in range(programs):
        count = int(kernel["tile_count"](*sizes))
        tiles = [tuple(map(int, kernel["tile_of"](tensor(turn, np.int32), *sizes))) for turn in range(count)]
        taken += tiles
        work.append(sum(row_tile + 1 if paired else 1 for row_tile, _ in tiles))
        if order == "PAIRS_OF_TWO_HEADS" and row_tiles * heads > programs:
            check_pairs(tiles, row_tiles, heads)
    assert sorted(taken) == [(row_tile, head) for row_tile in range(row_tiles) for head in range(heads)]
    assert max(work) - min(work) <= (row_tiles + 1 if paired else 1)


def check_longest_first(row_tiles: int, heads: int, section: int, programs: int, source: Path = TILES) -> list[int]:
    """Every tile of every head is taken once: those of all sections but the last by the first row of programs, longest
    first within a section; one of the last section by each program of the other rows, longest first.

    Returns:
        How many keys each program of the first row has to do, in tiles' heights.
    """
    machine = Machine(0)
    kernel = load_kernel(source, machine)
    machine.programs = programs
    sizes = *(tensor(x, np.int32) for x in (row_tiles, heads, section)), kernel["LONGEST_FIRST"]
    last = max(heads // section - 1, 0) * section  # the first head of the last section
    taken: list[tuple[int, int]] = []
    work, singles = [], []
    rows = rows_of_grid(row_tiles, programs)
    for machine.row in range(rows):
        for machine.program in range(programs):
            count = int(kernel["tile_count"](*sizes))
            tiles = [tuple(map(int, kernel["tile_of"](tensor(turn, np.int32), *sizes))) for turn in range(count)]
            taken += tiles
            if machine.row == 0:
                work.append(sum(row_tile + 1 for row_tile, _ in tiles))
                assert all(head < last for _, head in tiles)
                assert tiles == sorted(tiles, key=lambda tile: (tile[1] // section, -tile[0]))
            else:
                assert count <= 1
                singles += tiles
    assert sorted(taken) == [(row_tile, head) for row_tile in range(row_tiles) for head in range(heads)]
    assert all(head >= last for _, head in singles)
    assert singles == sorted(singles, key=lambda tile: (-tile[0], tile[1]))
    return work


def check_pairs(tiles: list[tuple[int, int]], row_tiles: int, heads: int) -> None:
    """What a program takes: pairs of two heads side by side, then single tiles of the last head where their number is
    odd, from the longest."""
    pairs = sum(head < heads // 2 * 2 for _, head in tiles) // 2
    for (row, head), (other_row, other_head) in zip(tiles[: 2 * pairs : 2], tiles[1 : 2 * pairs : 2], strict=True):
        assert head % 2 == 0
        assert (other_row, other_head) == (row_tiles - 1 - row, head + 1)
    singles = tiles[2 * pairs :]
    assert all(head == heads - 1 for _, head in singles)
    assert singles == sorted(singles, reverse=True)


def loud(q: Any, k: Any, _v: Any) -> None:
    """Products of bf16 that pass float32's range; a small scale brings them back: :data:`LOUD`."""
    q *= 2.0**66
    k *= 2.0**62


LOUD = {"dtype": "bf16", "sm_scale": 2.0**-20, "change": loud, "head_size": 32}
"""All rows leave the range of the fast arithmetic, whose numbers are then NaN; Lse is finite."""


def largest(q: Any, k: Any, v: Any) -> None:
    """Values all as large as fp16 goes, and all weights but one a little above 0.5, where fp16 rounds them up."""
    _all_largest(q, k, v, 65504.0, 2.0**-12)


def largest_bf16(q: Any, k: Any, v: Any) -> None:
    """The same of bf16."""
    _all_largest(q, k, v, 255 * 2.0**120, 2.0**-9)


def _all_largest(q: Any, k: Any, v: Any, value: float, half_step: float) -> None:
    q[...], k[...], v[...] = 0, 0, value
    score = np.log(0.5 + 1.2 * half_step) / 0.125
    q[..., :2] = 1
    k[..., 1:, 0], k[..., 1:, 1] = -5.5, BF16.rounded(score + 5.5)


def altered(kernel: Path, right: str, wrong: str, folder: Path) -> Path:
    """A copy of a kernel's file and of all that it imports, with a fault in one of them."""
    texts = {kernel.name: kernel.read_text()}
    for text in (found := [kernel.read_text()]):  # and what those import that it imports
        for name in re.findall(r"^from (\w+) import", text, re.MULTILINE):
            beside = kernel.with_name(f"{name}.py")
            if beside.name not in texts and beside.exists():
                texts[beside.name] = beside.read_text()
                found.append(texts[beside.name])
    faulty = next((name for name, text in texts.items() if right in text), kernel.name)
    assert texts[faulty].count(right) == 1, "the kernel has changed: adapt the mutant"
    for name, text in texts.items():
        (folder / name).write_text(text.replace(right, wrong) if name == faulty else text)
    return folder / kernel.name


# Problems, by identity, that the kernel without a fault has passed; kept, so that no other takes their place.
_PASSED: dict[tuple[int, int], tuple[Callable[..., None], dict[str, Any]]] = {}


# Factors of the errors that pass: most of that may be there without a fault, of which nearly all is what rounding Out
# to 16 bits leaves, on any host. A fault must show by far more, so that rounding elsewhere decides nothing.
SOUND, FAULTY = 0.75, 10.0


def is_noticed(check: Callable[..., None], kernel: Path, problem: dict[str, Any]) -> bool:
    """Whether some interleaving of 40 shows a fault of a kernel by far: a check of the problem fails, or hangs, which
    it is far from without the fault."""
    if (id(check), id(problem)) not in _PASSED:
        check(limit=SOUND, **problem)
        _PASSED[id(check), id(problem)] = check, problem
    for seed in range(40):
        try:
            check(source=kernel, seed=seed, limit=FAULTY, **problem)
        except (AssertionError, Deadlock):
            return True
    return False
