"""What both loops of fmha_fwd.py use: blocks of rows, the keys that they see, the soft cap, the stores."""

import triton
import triton.language as tl
from fmha_triton import BFLOAT16_MAX, FLOAT_MAX, LN_2, LOG2_E


@triton.jit
def load_rows(base, offsets, in_rows, in_columns, MASKED: tl.constexpr):
    """A block of rows. Columns outside in_columns and, if MASKED, rows outside in_rows read as zero.

    Where head_size is known to be a multiple of 8, the test of the columns costs next to nothing in the
    compiled loop (3 of 830 instructions on sm_90, with a cap).
    """
    if MASKED:
        block = tl.load(base + offsets, mask=in_rows[:, None] & in_columns[None, :], other=0.0)
    else:
        block = tl.load(base + offsets, mask=in_columns[None, :], other=0.0)
    return block


@triton.jit
def load_queries(Q, q_stride, rows_left, head_size, zero, sm_scale, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The queries, negated for a negative scale: exact, and the maximum of q . k is then always that of the scores."""
    rows = tl.arange(0, BLOCK_M) + zero
    columns = tl.arange(0, BLOCK_D) + zero
    offsets = rows[:, None] * q_stride + columns[None, :]
    q = load_rows(Q, offsets, rows < rows_left, columns < head_size, True)
    if sm_scale < 0:
        q = -q
    return q


@triton.jit
def visible_to(keys, row_first, row_last):
    """Which keys the queries see."""
    return (keys[None, :] >= row_first[:, None]) & (keys[None, :] <= row_last[:, None])


@triton.jit
def tanh(x):
    """tanh within a few units in the last place: a series near zero, where the quotient would cancel."""
    square = x * x
    series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    quotient = 1.0 - 2.0 / (tl.exp2(x * (2 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 0.25, x * series, quotient)


@triton.jit
def bent_by(qk, bend, WIDE: tl.constexpr):
    """tanh(bend * q . k)."""
    bent = tanh(qk * bend)
    if WIDE:
        bent += qk * 0.0  # NaN where the product overflowed: that must show
    return bent


@triton.jit
def keys_of(rows, oldest, newest, end):
    """The first and the last key of each query: row 0 sees oldest..newest, and every key is below end. No sum here
    leaves 32 bits."""
    first = tl.minimum(oldest.to(tl.int32), end - rows) + rows
    last = tl.minimum(newest.to(tl.int32), end - 1 - rows) + rows
    return first, last


@triton.jit
def store_rows(Out, out, rows, columns, out_rows, head_size, out_stride, has_keys):
    """Rows of Out, which begins at row 0; those without keys are zeros.

    A mean never exceeds its largest value, but the rounded one may, by enough to become infinite in Out's dtype.
    """
    if Out.dtype.element_ty == tl.float16:
        largest: tl.constexpr = 65504.0
    elif Out.dtype.element_ty == tl.bfloat16:
        largest: tl.constexpr = BFLOAT16_MAX
    else:
        largest: tl.constexpr = FLOAT_MAX
    stored = (rows < out_rows)[:, None] & (columns < head_size)[None, :]
    out = tl.clamp(out, -largest, largest, propagate_nan=tl.PropagateNan.ALL)
    out = tl.where(has_keys[:, None], out, 0.0)
    tl.store(Out + rows[:, None] * out_stride + columns[None, :], out.to(Out.dtype.element_ty), mask=stored)


@triton.jit
def store_lse(Lse, start, m, row_sum, rows, out_rows, has_keys):
    """The log-sum-exp of rows, from row 0 at `start` on, unless Lse is null; the maximum m is in units of log2."""
    if tl.cast(Lse, tl.int64) != 0:
        lse = tl.where(has_keys, (m + tl.log2(row_sum)) * LN_2, float("-inf"))
        tl.store(Lse + start + rows, lse, mask=rows < out_rows)
