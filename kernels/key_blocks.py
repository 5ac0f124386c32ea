"""Which blocks of keys a tile of queries has to visit: lists that two launches of fmha_biased.py's kernel write.

The first asks the function, and the mask, of every query and key, many programs for a tile, and notes a flag for each
block, behind all lists; the second puts a tile's in order. Counters that programs share would take one launch, but make
the order of the blocks, and so the bits of sums, chance.

A list is int32: how many blocks are seen in part, how many whole, then the former's numbers from the front, and from
the back the latter's. Each tile of LIST_M queries has one, of each head and sequence, or for all of them where nothing
distinguishes them.
"""

import triton
import triton.language as tl
from biased_scores import _inside, _load
from fwd_rows import visible_to

SPLITS: tl.constexpr = tl.constexpr(64)  # for a tile, at most; the grid has as many


@triton.jit
def list_at(Blocks, batch, head, list_batches, list_heads, sequence, q_start, first_row, q_len, kv_len, batch_size,
            ragged, LIST_M: tl.constexpr, LIST_N: tl.constexpr):  # fmt: skip
    """The list of the tile that a row lies in, how many blocks of keys there are; its number, and how many
    there are of a head.

    Of a ragged batch, every sequence has as many lists as it has tiles, and begins with its own.
    """
    capacity = tl.cdiv(kv_len, LIST_N)
    tiles = tl.cdiv(q_len, LIST_M) + tl.where(ragged != 0, batch_size + 1, 0)
    tile = (q_start // LIST_M + tl.where(ragged != 0, sequence + 1, 0)) + first_row // LIST_M
    owner = tl.minimum(batch, list_batches - 1) * list_heads + tl.minimum(head, list_heads - 1)
    number = owner.to(tl.int64) * tiles + tile
    return Blocks + number * (capacity + 2), capacity, number, tiles


@triton.jit
def _count(rows, absent, column, tile, inputs, SEEN: tl.constexpr, MASKED: tl.constexpr):
    """Of some keys and all rows, which are seen, and in the upper half of the bits, which are hidden from a row that
    exists. Without MASKED all keys are inside of the mask, which is then loaded many at a time."""
    shown = visible_to(column, tile.row_first, tile.row_last)
    inside = _inside(rows, column, tile.mask_rows, tile.mask_keys, MASKED) & tile.has_mask
    mask = _load(tile.mask, rows, column, tile.mask_stride_q, tile.mask_stride_k, inside, 0) != 0
    shown &= mask | (tile.has_mask == 0)
    if SEEN is not None:
        key = tl.minimum(column, tile.last_key)[None, :]
        shown &= SEEN(tile.batch, tile.head, tile.query[:, None], key, *inputs)
    seen = (shown & (absent == 0)).to(tl.int32)
    return seen + ((shown | absent) == 0).to(tl.int32) * 65536


@triton.jit
def splits_of(kv_len, LIST_N: tl.constexpr):
    """How many programs ask about the blocks of keys of one tile."""
    return tl.minimum(tl.cdiv(kv_len, LIST_N), SPLITS)


@triton.jit
def flags_at(Blocks, capacity, number, tiles, list_batches, list_heads):
    """What is known of each block of a tile, behind all lists."""
    lists = tl.cast(list_batches, tl.int64) * list_heads * tiles
    return Blocks + lists * (capacity + 2) + number * capacity


@triton.jit
def flag_blocks(flags, capacity, split, splits, begin, end, limit, tile, inputs, rows, rows_left, SEEN: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Ask the function and the mask of every key from `begin` to `end`, in every `splits`-th block from `split` on: its
    flag is 0 where none is seen, 2 where all queries that exist see all of its keys, and these are below `limit`, else
    1."""
    # A few keys at a time, so that what is known of each is in registers; counted for all before threads meet.
    WIDTH: tl.constexpr = min(BLOCK_N, 32)
    keys = tl.arange(0, WIDTH)
    absent = (rows >= rows_left)[:, None]
    for block in range(split, capacity, splits):
        start = block * BLOCK_N
        flag = start * 0
        if (start >= begin) & (start < end):
            counts = tl.zeros([BLOCK_M, WIDTH], tl.int32)
            if start + BLOCK_N <= tile.mask_keys:
                for part in tl.static_range(0, BLOCK_N, WIDTH):
                    counts += _count(rows, absent, start + part + keys, tile, inputs, SEEN, False)
            else:
                for part in tl.static_range(0, BLOCK_N, WIDTH):
                    counts += _count(rows, absent, start + part + keys, tile, inputs, SEEN, True)
            count = tl.sum(tl.sum(counts, 1), 0)
            whole = ((count >> 16) == 0) & (start + BLOCK_N <= limit)
            flag = tl.where((count & 65535) != 0, 1 + whole.to(tl.int32), 0)
        tl.store(flags + block, flag)


@triton.jit
def write_list(entries, flags, capacity, WIDTH: tl.constexpr):
    """The list of a tile, of the flags of its blocks."""
    partly = 0
    wholly = 0
    for start in range(0, capacity, WIDTH):
        blocks = start + tl.arange(0, WIDTH)
        flag = tl.load(flags + blocks, mask=blocks < capacity, other=0)
        some = (flag == 1).to(tl.int32)
        whole = (flag == 2).to(tl.int32)
        tl.store(entries + 1 + partly + tl.cumsum(some, 0), blocks, mask=flag == 1)
        tl.store(entries + 2 + capacity - wholly - tl.cumsum(whole, 0), blocks, mask=flag == 2)
        partly += tl.sum(some, 0)
        wholly += tl.sum(whole, 0)
    tl.store(entries, partly)
    tl.store(entries + 1, wholly)
