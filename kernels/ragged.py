"""Where in a ragged batch, sequences one after the other, a program's tile of queries lies."""

import triton
import triton.language as tl


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _clamped(cu_seqlens, index, given, otherwise, total):
    """Elements of cu_seqlens, clamped to [0, total]; `otherwise` where they are not given."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens + index, mask=given, other=otherwise), 0), total)


@triton.jit
def find_ragged(
    cu_seqlens_q, cu_seqlens_kv, tile, batch_size, q_len, kv_len, BLOCK_M: tl.constexpr, SEGMENTS: tl.constexpr
):  # fmt: skip
    """As find_sequence, but for the sequence's number."""
    _, first_row, q_start, q_n, kv_start, kv_n = find_sequence(
        cu_seqlens_q, cu_seqlens_kv, tile, batch_size, q_len, kv_len, BLOCK_M, SEGMENTS
    )
    return first_row, q_start, q_n, kv_start, kv_n


@triton.jit
def find_sequence(
    cu_seqlens_q, cu_seqlens_kv, tile, batch_size, q_len, kv_len, BLOCK_M: tl.constexpr, SEGMENTS: tl.constexpr
):  # fmt: skip
    """The sequence of a tile of a ragged batch: its number, first_row of the tile, q_start, q_n, kv_start, kv_n.

    Sequence s is called segment s + 1. Segments 0 and batch_size + 1 are the rows before and after all sequences, which
    are numbers -1 and batch_size: they have no keys, so their rows get what rows without keys get. Each segment has
    tiles of its own, at most cdiv(q_len, BLOCK_M) + batch_size + 1 in all; tiles past the last find q_n = 0.
    """
    sequence = tile * 0 - 1
    first_row = tile * 0
    q_start = tile * 0
    q_n = tile * 0
    kv_start = tile * 0
    kv_n = tile * 0
    tiles_before = tile * 0
    q_before = tile * 0
    kv_before = tile * 0
    first = tile * 0
    while first < batch_size + 2:
        segment = first + tl.arange(0, SEGMENTS)
        given = segment <= batch_size
        end = _clamped(cu_seqlens_q, segment, given, q_len, q_len)
        end = tl.maximum(tl.associative_scan(end, 0, _larger), q_before)
        begin_given = (segment > 0) & (segment <= batch_size + 1)
        begin = _clamped(cu_seqlens_q, segment - 1, begin_given, tl.where(segment > 0, q_len, 0), q_len)
        begin = tl.maximum(tl.associative_scan(begin, 0, _larger), q_before)
        tiles = (end - begin) // BLOCK_M + ((end - begin) % BLOCK_M != 0).to(tl.int32)
        tiles_end = tiles_before + tl.cumsum(tiles, 0)
        hit = (tile >= tiles_end - tiles) & (tile < tiles_end)
        kv_end = _clamped(cu_seqlens_kv, segment, given, 0, kv_len)
        if tl.sum(hit.to(tl.int32), 0) != 0:
            found = tl.sum(tl.where(hit, segment, 0), 0)
            sequence = found - 1
            first_row = tl.sum(tl.where(hit, (tile - tiles_end + tiles) * BLOCK_M, 0), 0)
            q_start = tl.sum(tl.where(hit, begin, 0), 0)
            q_n = tl.sum(tl.where(hit, end - begin, 0), 0)
            kv_start = tl.maximum(tl.max(tl.where(segment < found, kv_end, 0), 0), kv_before)
            kv_n = tl.maximum(tl.max(tl.where(segment <= found, kv_end, 0), 0), kv_before) - kv_start
            kv_n = tl.where((found > 0) & (found <= batch_size), kv_n, 0)
            first = batch_size + 2
        else:
            tiles_before = tl.max(tiles_end, 0)
            q_before = tl.max(end, 0)
            kv_before = tl.maximum(tl.max(kv_end, 0), kv_before)
            first += SEGMENTS
    return sequence, first_row, q_start, q_n, kv_start, kv_n
