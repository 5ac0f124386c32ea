"""What fmha_biased.py does with a block of scores: an additive bias, a function of the user's, and what is seen.

Scores are in natural units here. Minus infinity is the score of a key that is not seen; one that merely overflows to it
becomes LEAST, so that a row is known to see nothing where all its scores are minus infinity.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from fwd_rows import visible_to

# -2**100: small enough that no score in the range of the hot loop is below, and far enough from the end of float32
# that it can still be scaled and subtracted.
LEAST: tl.constexpr = tl.constexpr(-1.2676506002282294e30)


class Tile(NamedTuple):
    """Where a tile of queries stands. A bias and the mask begin at its first query and at key 0; a flag says whether
    each is there, and how many queries and keys of it are read. `query` and `last_key` are positions that functions
    may see."""

    bias: tl.tensor
    bias_fp32: tl.tensor
    mask: tl.tensor
    has_bias: tl.tensor
    has_bias_fp32: tl.tensor
    has_mask: tl.tensor
    bias_stride_q: tl.tensor
    bias_stride_k: tl.tensor
    mask_stride_q: tl.tensor
    mask_stride_k: tl.tensor
    bias_rows: tl.tensor
    bias_keys: tl.tensor
    mask_rows: tl.tensor
    mask_keys: tl.tensor
    row_first: tl.tensor
    row_last: tl.tensor
    batch: tl.tensor
    head: tl.tensor
    query: tl.tensor
    last_key: tl.tensor


@triton.jit
def _load(base, rows, keys, stride_q, stride_k, given, otherwise: tl.constexpr):
    offsets = rows[:, None] * stride_q + keys.to(tl.int64)[None, :] * stride_k
    return tl.load(base + offsets, mask=given, other=otherwise)


@triton.jit
def _inside(rows, keys, row_count, key_count, MASKED: tl.constexpr):
    """What of a block is read. Without MASKED all its keys are, so that they are read 16 bytes at a time."""
    inside = (rows < row_count)[:, None]
    if MASKED:
        inside &= (keys < key_count)[None, :]
    else:
        inside = tl.broadcast_to(inside, [rows.shape[0], keys.shape[0]])
    return inside


@triton.jit
def biased(score, tile, inputs, rows, keys, MASKED: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
           SCORE: tl.constexpr, SEEN: tl.constexpr):  # fmt: skip
    """The scores that count, minus infinity where a key is not seen: [rows, keys], from scale * q . k with a soft cap.

    BIAS is "never", "own" (of Q's dtype) or "any", MASK "never", "always" or "any". SCORE and SEEN are functions of the
    user's, or None; without MASKED, all keys are in the window, seen by SEEN, and inside of bias and mask.
    """
    in_bias = _inside(rows, keys, tile.bias_rows, tile.bias_keys, MASKED)
    in_mask = _inside(rows, keys, tile.mask_rows, tile.mask_keys, MASKED)
    seen = tl.full(score.shape, 1, tl.int1)
    if MASKED:
        seen = visible_to(keys, tile.row_first, tile.row_last)
    query = tile.query[:, None]
    key = tl.minimum(keys, tile.last_key)[None, :]
    if BIAS == "own":
        bias = _load(tile.bias, rows, keys, tile.bias_stride_q, tile.bias_stride_k, in_bias, 0.0).to(tl.float32)
        score += bias
        seen &= bias != float("-inf")
    elif BIAS == "any":
        given = in_bias & tile.has_bias
        bias = _load(tile.bias, rows, keys, tile.bias_stride_q, tile.bias_stride_k, given, 0.0).to(tl.float32)
        given = in_bias & tile.has_bias_fp32
        bias += _load(tile.bias_fp32, rows, keys, tile.bias_stride_q, tile.bias_stride_k, given, 0.0)
        score += bias
        seen &= bias != float("-inf")
    if SCORE is not None:
        score = SCORE(score, tile.batch, tile.head, query, key, *inputs)
        score = tl.cast(score, tl.float32)
        seen &= score != float("-inf")
    if MASK == "always":
        seen &= _load(tile.mask, rows, keys, tile.mask_stride_q, tile.mask_stride_k, in_mask, 0) != 0
    elif MASK == "any":
        given = in_mask & tile.has_mask
        shown = _load(tile.mask, rows, keys, tile.mask_stride_q, tile.mask_stride_k, given, 0) != 0
        seen &= shown | (tile.has_mask == 0)
    if SEEN is not None and MASKED:
        seen &= SEEN(tile.batch, tile.head, query, key, *inputs)
    score = tl.where(score < LEAST, LEAST, score)  # NaN stays
    return tl.where(seen, score, float("-inf"))
