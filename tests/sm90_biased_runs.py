"""Runs the Hopper kernel with bias, mask, sinks and functions in the emulator and holds it against float64."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from biased_runs import whole
from gluon_emulator import Machine, launch
from gluon_language import load_kernel
from gluon_values import DTYPES, FP32, INT32, UINT8, Descriptor, Pointer, tensor
from sm90_runs import check_values, make, rows_of_grid

from pyfmha.attention.reference import attend

KERNEL = Path(__file__).parents[1] / "kernels" / "fmha_biased_sm90.py"
SINKS = KERNEL.with_name("fmha_sinks_sm90.py")
VALUES = KERNEL.with_name("fmha_values_sm90.py")

Shape = tuple[int, int, int, int]


def _held(values: Any, dtype: Any) -> Pointer:
    return Pointer(None if values is None else values.reshape(-1), dtype)


def _strides(shape: Shape | None) -> list[Any]:
    if shape is None:
        return [tensor(n, np.int64) for n in (0, 0, 0, 1)]
    _, h, q, k = shape
    return [tensor(0 if n == 1 else step, np.int64) for n, step in zip(shape, (h * q * k, q * k, k, 1), strict=True)]


def lists_of(seen: Any, size: int = 128) -> Any:
    """The lists for what is seen [batch or 1, heads or 1, queries, keys], of queries that exist: NaN is of no account,
    neither is what lies past the keys. In part, then whole, as ``kernels/key_blocks.py`` has it; -7 is no entry."""
    batch, heads, q_len, kv_len = seen.shape
    tiles, blocks = -(-q_len // size), -(-kv_len // size)
    entries = np.full((batch, heads, tiles, 2 + blocks), -7, np.int32)
    for b, h, tile in np.ndindex(batch, heads, tiles):
        rows = seen[b, h, tile * size : (tile + 1) * size]
        rows = rows[~np.isnan(rows).any(axis=1)]
        cut = [rows[:, block * size : (block + 1) * size] for block in range(blocks)]
        whole = [block for block, part in enumerate(cut) if part.size and part.all() and part.shape[1] == size]
        partly = [block for block, part in enumerate(cut) if part.any() and block not in whole]
        entries[b, h, tile, :2] = len(partly), len(whole)
        entries[b, h, tile, 2 : 2 + len(partly)] = partly
        entries[b, h, tile, entries.shape[3] - len(whole) :] = whole[::-1]
    return entries


def run(
    *,
    source: Path | None = None,
    seed: int = 0,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    q_len: int = 64,
    kv_len: int | None = None,
    head_size: int = 64,
    v_head_size: int | None = None,
    dtype: str = "fp16",
    consumers: int = 1,
    block_n: int = 64,
    block_v: int = 64,
    x_stages: int = 2,
    q_slots: int = 2,
    causal: bool | None = None,
    late: bool | None = None,
    sinks_alone: bool = False,
    values_alone: bool = False,
    stages: int = 2,
    v_stages: int = 2,
    layout: str = "bhsd",
    apart: bool = False,
    longest_first: bool = False,
    lazy: bool = False,
    handed: bool = False,
    programs: int = 1,
    sm_scale: float = 0.125,
    bias: Shape | None = None,
    mask: Shape | None = None,
    sinks: str = "",
    window: tuple[int, int] = (-1, -1),
    bottom_right: bool = False,
    q_lengths: Sequence[int] | None = None,
    kv_lengths: Sequence[int] | None = None,
    score: Callable[..., Any] | None = None,
    seen: Callable[..., Any] | None = None,
    bounds: Callable[..., Any] | None = None,
    relative: bool = False,
    in_product: bool = False,
    tile_after: bool = False,
    from_first: bool = False,
    even: int = 0,
    brief: bool = False,
    cap: Callable[..., Any] | None = None,
    threes: bool = False,
    ping_pong: bool = True,
    producer_first: bool = False,
    entries: Any = None,
    change: Callable[..., None] = lambda **_: None,
) -> tuple[Any, Any, Any, Any]:
    """Run the kernel, or that for sinks or for smaller values alone; returns Out, Lse and what they should be. `change`
    may write other values to q, k, v, bias and mask; a row of the mask sees nothing, all behind lengths is NaN.
    `entries` are lists of blocks of 128 queries and keys, [batch or 1, heads or 1, tiles, 2 + blocks]."""
    if causal:
        window = (-1, 0)
    assert causal is None or (q_lengths, kv_lengths, window) == (None, None, (-1, 0 if causal else -1))
    rng = np.random.default_rng(seed)
    kv_heads, kv_len, v_head_size = kv_heads or heads, kv_len or q_len, v_head_size or head_size
    (q_memory, q), (k_memory, k), (v_memory, v) = (
        make(rng, (batch, h, s, size), dtype, layout)
        for h, s, size in ((heads, q_len, head_size), (kv_heads, kv_len, head_size), (kv_heads, kv_len, v_head_size))
    )
    element = DTYPES[dtype]
    biases = None if bias is None else element.rounded(2 * rng.standard_normal(bias))
    masks = None if mask is None else (rng.random(mask) < 0.7).astype(np.uint8) * 3
    if masks is not None and masks.shape[2] > 1:
        masks[:, :, 5] = 0
    change(q=q, k=k, v=v, bias=biases, mask=masks)
    for tensors, lengths in (((q,), q_lengths), ((k, v), kv_lengths)):
        for b, length in enumerate(lengths or ()):
            for padded in tensors:
                padded[b, :, max(length, 0) :] = np.nan
    out_memory, out = make(rng, (batch, heads, q_len, v_head_size), dtype, layout)
    out[...] = np.nan
    lse = np.full(batch * heads * q_len, 7.0, np.float32)
    sink_values = element.rounded(rng.standard_normal(heads)) if sinks else None
    kinds = ["never" if shape is None else "keys" if shape[2] == 1 else "tile" for shape in (bias, mask)]
    tile, tile_element = (biases, element) if kinds[0] == "tile" else (masks, UINT8)
    machine = Machine(seed)

    def strides(array: Any) -> list[Any]:
        return [tensor(stride // 4, np.int64) for stride in array.strides[:3]]

    constants: dict[str, Any] = {
        "BLOCK_V": block_v, "X_STAGES": x_stages, "LATE": consumers == 1 if late is None else late, "BIAS": kinds[0],
        "MASK": kinds[1], "SCORE": score, "SEEN": seen, "BOUNDS": bounds,
        "RELATIVE": relative, "IN_PRODUCT": in_product, "PRODUCER_FIRST": producer_first,
        "THREES": threes, "LONGEST_FIRST": longest_first, "TILE_AFTER": tile_after, "CAP": cap,
        "HANDED_ON": handed, "FROM_FIRST": from_first, "EVEN": even, "BRIEF": brief,
    }  # fmt: skip
    if entries is not None:
        constants |= {"Blocks": Pointer(entries.reshape(-1).copy(), INT32), "LIST": 128}
        constants |= dict(zip(("list_batches", "list_heads"), entries.shape[:2], strict=True))
    alone = SINKS if sinks_alone else VALUES if values_alone else None
    if alone is not None:
        ways = ("TWO_HEADS", "RAGGED", "CAPPED", "SERIAL", "PRODUCER_FIRST", "LENGTHS")
        constants = dict.fromkeys(ways, False) | {"LONGEST_FIRST": longest_first, "TWO_PARTS": values_alone}
        constants["LAZY"] = lazy
    if sinks_alone:
        constants |= {"THREES": threes, "HANDED_ON": handed, "PRODUCER_FIRST": producer_first}
    if values_alone:
        constants |= {"APART": apart, "HANDED_ON": handed, "EVEN": even, "BRIEF": brief}
        constants |= {"THREES": threes, "PRODUCER_FIRST": producer_first}
    kernel = alone or KERNEL
    launch(
        machine,
        load_kernel(source or kernel, machine)[kernel.stem],
        programs,
        Descriptor(out, element, 64, block_v),
        Descriptor(q, element, 64, 64),
        Descriptor(k, element, block_n, 64),  # as wide as a panel of blocks that are no power of two
        Descriptor(v, element, block_n, block_v),
        *(() if alone else (Descriptor(tile, tile_element, 64, block_n) if "tile" in kinds else None,)),
        Pointer(out_memory, element, 16),
        Pointer(lse, FP32),
        *(Pointer(memory, element, 16) for memory in (q_memory, k_memory, v_memory)),
        *(Pointer(None if x is None else np.array(x, np.int32), INT32) for x in (q_lengths, kv_lengths, None, None)),
        _held(biases, element),
        _held(None, FP32),
        _held(masks, UINT8),
        _held(sink_values if sinks == "own" else None, element),
        _held(sink_values if sinks == "fp32" else None, FP32),
        sm_scale,
        0.0,
        *(batch, heads, kv_heads, q_len, kv_len, head_size, v_head_size),
        *(stride for array in (q, k, v, out) for stride in strides(array)),
        *_strides(bias),
        *_strides(mask),
        *(bias or (0, 0, 0, 0))[2:],
        *(mask or (0, 0, 0, 0))[2:],
        *window,
        int(bottom_right),
        0,
        *(() if alone else (None,)),
        rows=rows_of_grid(-(-q_len // (64 * consumers)), programs) if longest_first else 1,
        BLOCK_D=64,
        BLOCK_N=block_n,
        CONSUMERS=consumers,
        STAGES=stages,
        V_STAGES=v_stages,
        CAUSAL=causal is not False,
        GENERAL=causal is None,
        PING_PONG=ping_pong and consumers > 1,
        Q_SLOTS=q_slots,
        CONSUMER_REGISTERS=240,
        PRODUCER_REGISTERS=24,
        **constants,
    )
    for guard in (out_memory[:16], out_memory[-16:]):
        assert np.isnan(guard).all()
    options: dict[str, Any] = {"sinks": sink_values}
    options["bias"] = None if biases is None else whole(biases, q_len, kv_len)
    options["mask"] = None if masks is None else whole(masks != 0, q_len, kv_len)
    functions = {"score": score, "seen": seen}
    wanted, wanted_lse = attend(
        q, k, v, sm_scale=sm_scale, q_lengths=q_lengths, kv_lengths=kv_lengths,
        window_left=window[0], window_right=window[1], bottom_right=bottom_right,
        **{name: value for name, value in {**options, **functions}.items() if value is not None},
    )  # fmt: skip
    return out, lse.reshape(batch, heads, q_len), wanted, wanted_lse


def check(dtype: str = "fp16", limit: float = 1.0, **problem: Any) -> None:
    """Run, and hold it against float64; `limit` is a factor of the errors that pass."""
    out, lse, wanted, wanted_lse = run(dtype=dtype, **problem)
    assert (out[np.isneginf(wanted_lse)] == 0).all()
    check_values(out, lse, wanted, wanted_lse, dtype, limit)
