"""Ragged batches in fmha_sm90.py: sequences one after the other, each of which has tiles of its own."""

from sm90_asm import uniform
from sm90_tiles import ROWS, seen_from
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

# Sequences looked at in one go: a thread of a warp has one, so that every warp finds a tile without the others.
LOOK: gl.constexpr = gl.constexpr(32)
HEIGHT: gl.constexpr = gl.constexpr(16)  # rows stored at a time


@gluon.jit
def _larger(a, b):
    return gl.maximum(a, b)


@gluon.jit
def _sum(a, b):
    return a + b


@gluon.jit
def _at_most(cu_seqlens, index, given, otherwise, total):
    """Elements of cu_seqlens, clamped to at most total; `otherwise` where they are not given."""
    return gl.minimum(gl.load(cu_seqlens + index, mask=given, other=otherwise), total)


@gluon.jit
def find_tile(sizes, tile, SHAPE: gl.constexpr):
    """The sequence of a tile: the tile's place among those of the sequence, where in the tensors its queries and its
    keys begin, and the sequence as `sequence_of` has it.

    As ragged.py finds it: sequence s is called segment s + 1. Segments 0 and batch_size + 1 are the rows before and
    after all sequences: they have no keys, so their rows get what rows without keys get. Each segment has tiles of its
    own, at most cdiv(q_len, 64 * CONSUMERS) + batch_size + 1 in all; tiles past the last find no queries. They are
    numbered from the last: causal sequences end with the tiles that take longest.
    """
    TILE: gl.constexpr = ROWS * SHAPE.CONSUMERS
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [LOOK], [gl.num_warps()], [0])
    num_heads, group, q_len, kv_len, row_tiles, heads, section, bounds = sizes
    bottom_right, queries, cu_seqlens_kv, window_left, window_right = bounds
    cu_seqlens_q, batch_size = queries
    tile = row_tiles - 1 - tile
    row_tile = tile * 0
    q_start = tile * 0
    q_n = tile * 0
    kv_start = tile * 0
    kv_n = tile * 0
    tiles_before = tile * 0
    q_before = tile * 0
    kv_before = tile * 0
    first = tile * 0
    while first < batch_size + 2:
        segment = first + gl.arange(0, LOOK, layout=LAYOUT)
        given = segment <= batch_size
        begin_given = (segment > 0) & (segment <= batch_size + 1)
        begin = _at_most(cu_seqlens_q, segment - 1, begin_given, gl.where(segment > 0, q_len, 0), q_len)
        end = _at_most(cu_seqlens_q, segment, given, q_len, q_len)
        kv_end = _at_most(cu_seqlens_kv, segment, given, 0, kv_len)
        # Whatever they hold, nothing begins before what came earlier, of which there is at least 0.
        begin = gl.maximum(gl.associative_scan(begin, 0, _larger), q_before)
        end = gl.maximum(end, begin)
        tiles = (end - begin + (TILE - 1)) // TILE
        tiles_end = tiles_before + gl.associative_scan(tiles, 0, _sum)
        hit = (tile >= tiles_end - tiles) & (tile < tiles_end)
        if gl.max(tiles_end, 0) > tile:
            found = gl.max(gl.where(hit, segment, 0), 0)
            row_tile = tile - gl.max(gl.where(hit, tiles_end - tiles, 0), 0)
            q_start = gl.max(gl.where(hit, begin, 0), 0)
            q_n = gl.max(gl.where(hit, end, 0), 0) - q_start
            kv_start = gl.maximum(gl.max(gl.where(segment < found, kv_end, 0), 0), kv_before)
            kv_n = gl.maximum(gl.max(gl.where(segment <= found, kv_end, 0), 0), kv_start) - kv_start
            kv_n = gl.where((found > 0) & (found <= batch_size), kv_n, 0)
            first = batch_size + 2
        else:
            tiles_before = gl.max(tiles_end, 0)
            q_before = gl.max(end, 0)
            kv_before = gl.maximum(gl.max(kv_end, 0), kv_before)
            first += LOOK
    sequence = seen_from(uniform(q_n), uniform(kv_n), bottom_right, window_left, window_right, SHAPE)
    return uniform(row_tile), uniform(q_start), uniform(kv_start), sequence


@gluon.jit
def store_rows(slot, Out, stride, count, head_size, SHAPE: gl.constexpr):
    """Store the first `count` of the 64 rows in a slot, which TMA would not do without those behind them.

    Args:
        slot: [64, BLOCK_D] in shared memory, just written; the next rows may come by TMA when this is done.
        Out: of the first row; rows and head size are such that elements go by eights.
    """
    BLOCK_D: gl.constexpr = SHAPE.BLOCK_D
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    rows = gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, LAYOUT))
    gl.barrier()
    for first in gl.static_range(0, ROWS, HEIGHT):
        if first < count:
            places = Out + (first + rows).to(gl.int64)[:, None] * stride + columns[None, :]
            stored = (rows < count - first)[:, None] & (columns < head_size)[None, :]
            gl.store(places, slot.slice(first, HEIGHT).load(LAYOUT), mask=stored)
    fence_async_shared()
    gl.barrier()
