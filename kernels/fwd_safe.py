"""The second computation of fmha_fwd.py, for rows that its hot loop cannot take: finite for any finite input."""

import triton
import triton.language as tl
from fmha_triton import FLOAT_MAX, LOWEST, _normalise_rows
from fwd_rows import keys_of, load_queries, load_rows, store_lse, store_rows, tanh, visible_to

SAFE_ROWS: tl.constexpr = tl.constexpr(16)  # as few as tl.dot takes


@triton.jit
def attend_safely(
    Q, K, V, q_stride, k_stride, v_stride, sm_scale, scale, bend, shift, zero, row_first, row_last, rows_left, begin,
    end, head_size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As the hot loop, over the keys begin..end, with arithmetic that stays finite for any finite input.

    Powers of two bring the operands into range: q row by row, k and v by a half (tf32 would round FLOAT_MAX up to
    infinity). Then |q . k| < 2**126. Differences of two such, taken before they are scaled, are finite, and exactly
    zero at the maximum, which therefore weighs exactly 2**-shift whatever the scale is.
    """
    WIDE: tl.constexpr = Q.dtype.element_ty != tl.float16
    columns = tl.arange(0, BLOCK_D) + zero
    keys = tl.arange(0, BLOCK_N) + zero
    q = load_queries(Q, q_stride, rows_left, head_size, zero, sm_scale, BLOCK_M, BLOCK_D)
    factor = scale
    if SOFTCAP != "never":
        factor = tl.where(bend > 0, bend, scale)
    if WIDE:
        q, undo = _normalise_rows(q)
        # 2**13: 2**12 left over from q, and the halved k. The factor comes first, for undo * 2**13 may be infinite.
        row_scale = tl.minimum(factor * undo * 8192.0, FLOAT_MAX)
    else:
        row_scale = tl.full([BLOCK_M], 0.0, tl.float32) + factor
    if SOFTCAP == "never":
        last_scale = row_scale
    else:
        last_scale = tl.where(bend > 0, scale, row_scale)
    k_offsets = keys[:, None] * k_stride + columns[None, :]
    v_offsets = keys[:, None] * v_stride + columns[None, :]
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(begin, end, BLOCK_N, num_stages=1):
        in_rows = start + keys < end
        visible = visible_to(start + keys, row_first, row_last)
        k = load_rows(K + tl.cast(start, tl.int64) * k_stride, k_offsets, in_rows, columns < head_size, True)
        if WIDE:
            k = (k.to(tl.float32) * 0.5).to(k.dtype)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP == "always":
            qk = tanh(qk * row_scale[:, None])
        elif SOFTCAP == "any":
            if bend > 0:
                qk = tanh(qk * row_scale[:, None])
        m_new = tl.maximum(m, tl.max(tl.where(visible, qk, LOWEST), 1))
        p = tl.exp2(tl.where(visible, (qk - m_new[:, None]) * last_scale[:, None] - shift, float("-inf")))
        alpha = tl.exp2((m - m_new) * last_scale)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        v = load_rows(V + tl.cast(start, tl.int64) * v_stride, v_offsets, in_rows, columns < head_size, True)
        if WIDE:
            v = (v.to(tl.float32) * 0.5).to(v.dtype)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    if WIDE:
        acc *= 2.0
    m = tl.minimum(tl.maximum(m * last_scale, -FLOAT_MAX), FLOAT_MAX)
    return acc, row_sum, m + shift


@triton.jit
def compute_safely(
    Out, Lse, lse_start, Q, K, V, q_stride, k_stride, v_stride, out_stride, sm_scale, scale, bend, shift, zero, oldest,
    newest, rows_left, out_rows, begin, end, head_size, HEIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out and Lse of a tile of HEIGHT rows, a few at a time: for tiles whose sums would not fit the registers whole."""
    columns = tl.arange(0, BLOCK_D) + zero
    for first in range(0, HEIGHT, SAFE_ROWS):
        rows = tl.arange(0, SAFE_ROWS) + first
        row_first, row_last = keys_of(rows, oldest, newest, end)
        acc, row_sum, m = attend_safely(
            Q + first * q_stride, K, V, q_stride, k_stride, v_stride, sm_scale, scale, bend, shift, zero, row_first,
            row_last, rows_left - first, begin, end, head_size, SAFE_ROWS, BLOCK_N, BLOCK_D, SOFTCAP, PRECISION,
        )  # fmt: skip
        has_keys = (rows < rows_left) & (tl.maximum(row_first, begin) <= row_last)
        out = acc * (1.0 / row_sum)[:, None]
        store_rows(Out, out, rows, columns, out_rows, head_size, out_stride, has_keys)
        store_lse(Lse, lse_start, m, row_sum, rows, out_rows, has_keys)
