"""The second computation of fmha_biased.py, for rows that its hot loop cannot take: finite for any finite input, and
right where what a row does not see is NaN or infinite."""

import triton
import triton.language as tl
from biased_scores import biased
from fmha_triton import FLOAT_MAX, LOG2_E, LOWEST, _normalise_rows
from fwd_rows import load_queries, load_rows, tanh

# 2**125: the sum of two such is within float32, and so is the difference of two such sums, in units of log2.
BOUND: tl.constexpr = tl.constexpr(4.253529586511731e37)


@triton.jit
def _bounded(x):
    """x between -BOUND and BOUND; NaN stays."""
    return tl.clamp(x, -BOUND, BOUND, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def attend_biased_safely(
    Q, K, V, q_stride, k_stride, v_stride, sm_scale, scale, bend, shift, zero, tile, inputs, rows_left, begin, end,
    head_size, v_head_size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, SCORE: tl.constexpr, SEEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As the hot loop, over the keys begin..end: sums, weights and maxima, the latter minus infinity of rows that see
    nothing. Scores beyond BOUND count as it.

    Powers of two bring the operands into range, as in fwd_safe.py.
    """
    WIDE: tl.constexpr = Q.dtype.element_ty != tl.float16
    columns = tl.arange(0, BLOCK_D) + zero
    v_columns = tl.arange(0, BLOCK_V) + zero
    keys = tl.arange(0, BLOCK_N) + zero
    rows = tl.arange(0, BLOCK_M) + zero
    q = load_queries(Q, q_stride, rows_left, head_size, zero, sm_scale, BLOCK_M, BLOCK_D)
    factor = scale
    if SOFTCAP != "never":
        factor = tl.where(bend > 0, bend, scale)
    if WIDE:
        q, undo = _normalise_rows(q)
        row_scale = tl.minimum(factor * undo * 8192.0, FLOAT_MAX)
    else:
        row_scale = tl.full([BLOCK_M], 0.0, tl.float32) + factor
    k_offsets = keys[:, None] * k_stride + columns[None, :]
    v_offsets = keys[:, None] * v_stride + v_columns[None, :]
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    spoilt = tl.zeros([BLOCK_M], tl.int32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in tl.range(begin, end, BLOCK_N, num_stages=1):
        in_rows = start + keys < end
        k = load_rows(K + tl.cast(start, tl.int64) * k_stride, k_offsets, in_rows, columns < head_size, True)
        if WIDE:
            k = (k.to(tl.float32) * 0.5).to(k.dtype)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * row_scale[:, None]
        if SOFTCAP == "always":
            score = tanh(score) * scale
        elif SOFTCAP == "any":
            if bend > 0:
                score = tanh(score) * scale
        score = biased(_bounded(score), tile, inputs, rows, start + keys, True, BIAS, MASK, SCORE, SEEN)
        seen = score != float("-inf")
        score = _bounded(score)
        m_new = tl.maximum(m, tl.max(tl.where(seen, score, LOWEST), 1))
        p = tl.exp2(tl.where(seen, (score - m_new[:, None]) * LOG2_E - shift, float("-inf")))
        alpha = tl.exp2((m - m_new) * LOG2_E)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        v = load_rows(V + tl.cast(start, tl.int64) * v_stride, v_offsets, in_rows, v_columns < v_head_size, True)
        odd = v.to(tl.float32) * 0.0 != 0
        spoilt |= tl.max((seen & (tl.max(odd.to(tl.int32), 1) != 0)[None, :]).to(tl.int32), 1)
        v = tl.where(odd, 0.0, v.to(tl.float32))
        if WIDE:
            v *= 0.5
        acc = tl.dot(
            p.to(K.dtype.element_ty), v.to(K.dtype.element_ty), acc * alpha[:, None], input_precision=PRECISION
        )
        m = m_new
    if WIDE:
        acc *= 2.0
    acc = tl.where((spoilt != 0)[:, None], float("nan"), acc)
    m = tl.where(row_sum == 0, float("-inf"), m * LOG2_E + shift)
    return acc, row_sum, m
