"""Decoding with what fmha_biased.py takes, but for functions: the keys are split over programs, as in fmha_decode.py.

The same problem as fmha_biased.py for dense batches, in two launches; its docstring says what bias, mask and sinks do.
Between the two, Partial and Statistics are those of fmha_decode.py, but that scores, and so the maxima, are in natural
units: the factor is the same for all. Sinks come in where the parts are combined, once for each query.

Time goes into reading K and V, so all arithmetic is the safe one of biased_safe.py: finite for any finite input, and
right where what a row does not see is NaN or infinite.
"""

import triton
import triton.language as tl
from biased_safe import _bounded
from biased_scores import LEAST
from fmha_biased import _count_of, _load_sink
from fmha_decode import _bounds, _length
from fmha_triton import BFLOAT16_MAX, FLOAT_MAX, LN_2, LOG2_E, LOWEST, WIDE_SHIFT, _normalise_rows
from fwd_rows import tanh


@triton.jit
def _beside(base, rows, key, stride_k, inside, otherwise: tl.constexpr):
    """A block of a bias or mask, whose `rows` begin there; none of it where `base` is null."""
    given = tl.zeros(inside.shape, tl.int64) + tl.cast(base, tl.int64) != 0
    offsets = rows[:, None] + key.to(tl.int64)[None, :] * stride_k
    return tl.load(base + offsets, mask=inside & given, other=otherwise)


@triton.jit
def fused_attention_biased_split(
    Out, Lse, Q, K, V, q_lengths, kv_lengths, Partial, Statistics, Bias, BiasFp32, Mask, Sinks, SinksFp32, sm_scale,
    softcap, batch_size, num_heads, num_kv_heads, q_len, kv_len, head_size, v_head_size, q_stride_b, q_stride_h,
    q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s, out_stride_b, out_stride_h,
    out_stride_s, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, mask_stride_b, mask_stride_h,
    mask_stride_q, mask_stride_k, bias_rows, bias_columns, mask_rows, mask_columns, window_left, window_right,
    bottom_right, splits, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr = "tf32x3",
):  # fmt: skip
    """Grid, and what is written: as fused_attention_split of fmha_decode.py. Partial has v_head_size of BLOCK_D."""
    WIDE: tl.constexpr = Q.dtype.element_ty != tl.float16
    shift: tl.constexpr = WIDE_SHIFT if WIDE else 0.0
    q_len = tl.cast(q_len, tl.int32)
    kv_len = tl.cast(kv_len, tl.int32)
    split = tl.program_id(0) % splits
    tile = tl.program_id(0) // splits
    kv_head = tl.program_id(1).to(tl.uint32) + tl.program_id(2).to(tl.uint32) * tl.num_programs(1).to(tl.uint32)
    batch = (kv_head // tl.cast(num_kv_heads, tl.uint32)).to(tl.int32)
    if batch >= batch_size:
        return
    kv_head = (kv_head % tl.cast(num_kv_heads, tl.uint32)).to(tl.int32)
    group = tl.cast(num_heads // num_kv_heads, tl.int32)
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    i = packed // group
    head = kv_head * group + packed % group
    columns = tl.arange(0, BLOCK_D)

    q_n = _length(q_lengths, batch, q_len)
    kv_n = _length(kv_lengths, batch, kv_len)
    diagonal = tl.where(bottom_right != 0, kv_n - q_n, 0)
    oldest, newest = _bounds(i, diagonal, q_n, kv_n, window_left, window_right)
    begin = tl.min(tl.where(newest >= oldest, oldest, kv_n), 0)
    end = tl.max(newest, 0) + 1
    span = ((tl.maximum(end - begin, 0) + BLOCK_N - 1) // BLOCK_N + splits - 1) // splits * BLOCK_N
    end = tl.minimum(end, tl.minimum(begin.to(tl.int64) + (split + 1).to(tl.int64) * span, kv_n).to(tl.int32))
    begin = tl.minimum(begin.to(tl.int64) + split.to(tl.int64) * span, kv_n).to(tl.int32)

    wide_batch = batch.to(tl.int64)
    wide_head = head.to(tl.int64)
    K += wide_batch * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    V += wide_batch * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    k_stride = tl.cast(k_stride_s, tl.int64)
    v_stride = tl.cast(v_stride_s, tl.int64)
    q_rows = wide_batch * q_stride_b + wide_head * q_stride_h + i.to(tl.int64) * q_stride_s
    bias_at = wide_batch * bias_stride_b + wide_head * bias_stride_h + i.to(tl.int64) * bias_stride_q
    mask_at = wide_batch * mask_stride_b + wide_head * mask_stride_h + i.to(tl.int64) * mask_stride_q
    bias_stride_k = tl.cast(bias_stride_k, tl.int64)
    mask_stride_k = tl.cast(mask_stride_k, tl.int64)
    in_bias_rows = (i < q_n) & (i < _count_of(Bias, BiasFp32, bias_stride_q, bias_rows))
    in_mask_rows = (i < q_n) & (i < _count_of(Mask, Mask, mask_stride_q, mask_rows))
    bias_end = tl.minimum(end, _count_of(Bias, BiasFp32, bias_stride_k, bias_columns))
    mask_end = tl.minimum(end, _count_of(Mask, Mask, mask_stride_k, mask_columns))
    shows_all = tl.zeros([1, 1], tl.int64) + tl.cast(Mask, tl.int64) == 0
    in_queries = (i < q_n)[:, None] & (columns < head_size)[None, :]
    q = tl.load(Q + q_rows[:, None] + columns[None, :], mask=in_queries, other=0.0)
    if sm_scale < 0:
        q = -q
    # With a soft cap the score is softcap * tanh(factor * q . k), without one factor * q . k.
    scale = tl.minimum(tl.abs(sm_scale), FLOAT_MAX)
    factor = tl.where(softcap > 0, tl.minimum(scale / softcap, FLOAT_MAX), scale)
    if WIDE:
        q, undo = _normalise_rows(q)
        factor = tl.minimum(factor * undo * 8192.0, FLOAT_MAX)
    else:
        factor = tl.zeros([BLOCK_M], tl.float32) + factor

    keys = tl.arange(0, BLOCK_N)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    spoilt = tl.zeros([BLOCK_M], tl.int32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        key = start + keys
        in_rows = (key < end)[:, None]
        at = key.to(tl.int64)[:, None]
        k = tl.load(K + at * k_stride + columns[None, :], mask=in_rows & (columns < head_size)[None, :], other=0.0)
        v = tl.load(V + at * v_stride + columns[None, :], mask=in_rows & (columns < v_head_size)[None, :], other=0.0)
        if WIDE:
            k = (k.to(tl.float32) * 0.5).to(k.dtype)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor[:, None]
        if softcap > 0:
            score = tanh(score) * softcap
        in_bias = in_bias_rows[:, None] & (key < bias_end)[None, :]
        bias = _beside(Bias, bias_at, key, bias_stride_k, in_bias, 0.0).to(tl.float32)
        bias += _beside(BiasFp32, bias_at, key, bias_stride_k, in_bias, 0.0)
        in_mask = in_mask_rows[:, None] & (key < mask_end)[None, :]
        seen = (_beside(Mask, mask_at, key, mask_stride_k, in_mask, 0) != 0) | shows_all
        seen &= (key[None, :] >= oldest[:, None]) & (key[None, :] <= newest[:, None]) & (key < end)[None, :]
        seen &= bias != float("-inf")
        score = _bounded(score) + bias
        score = _bounded(tl.where(score < LEAST, LEAST, score))  # NaN stays
        m_new = tl.maximum(m, tl.max(tl.where(seen, score, LOWEST), 1))
        p = tl.exp2(tl.where(seen, (score - m_new[:, None]) * LOG2_E - shift, float("-inf")))
        alpha = tl.exp2((m - m_new) * LOG2_E)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        wide_v = v.to(tl.float32)
        odd = wide_v * 0.0 != 0
        spoilt |= tl.max((seen & (tl.max(odd.to(tl.int32), 1) != 0)[None, :]).to(tl.int32), 1)
        wide_v = tl.where(odd, 0.0, wide_v)
        if WIDE:
            wide_v *= 0.5
        acc = tl.dot(p.to(v.dtype), wide_v.to(v.dtype), acc * alpha[:, None], input_precision=PRECISION)
        m = m_new

    acc = tl.where((spoilt != 0)[:, None], float("nan"), acc)
    queries = tl.cast(batch_size, tl.int64) * num_heads * q_len
    query = (wide_batch * num_heads + head) * q_len + i
    place = query * splits + split
    partial = place[:, None] * BLOCK_D + columns[None, :]
    tl.store(Partial + partial, acc, mask=(i < q_len)[:, None] & (columns < v_head_size)[None, :])
    tl.store(Statistics + place, m, mask=i < q_len)
    tl.store(Statistics + splits * queries + place, row_sum, mask=i < q_len)


@triton.jit
def fused_attention_biased_combine(
    Out, Lse, Q, K, V, q_lengths, kv_lengths, Partial, Statistics, Bias, BiasFp32, Mask, Sinks, SinksFp32, sm_scale,
    softcap, batch_size, num_heads, num_kv_heads, q_len, kv_len, head_size, v_head_size, q_stride_b, q_stride_h,
    q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s, out_stride_b, out_stride_h,
    out_stride_s, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, mask_stride_b, mask_stride_h,
    mask_stride_q, mask_stride_k, bias_rows, bias_columns, mask_rows, mask_columns, window_left, window_right,
    bottom_right, splits, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid: (batch_size * num_heads * q_len): one program a query, which takes SPLITS partial results at a time."""
    WIDE: tl.constexpr = Out.dtype.element_ty != tl.float16
    shift: tl.constexpr = WIDE_SHIFT if WIDE else 0.0
    if Out.dtype.element_ty == tl.float16:
        most: tl.constexpr = 65504.0
    elif Out.dtype.element_ty == tl.bfloat16:
        most: tl.constexpr = BFLOAT16_MAX
    else:
        most: tl.constexpr = FLOAT_MAX
    program = tl.program_id(0).to(tl.uint32)
    row = program // tl.cast(q_len, tl.uint32)
    batch = (row // tl.cast(num_heads, tl.uint32)).to(tl.int32)
    head = (row % tl.cast(num_heads, tl.uint32)).to(tl.int32)
    i = (program - row * tl.cast(q_len, tl.uint32)).to(tl.int32)
    query = program.to(tl.int64)
    queries = tl.cast(batch_size, tl.int64) * num_heads * q_len
    if query >= queries:
        return
    columns = tl.arange(0, BLOCK_D)
    m = LOWEST
    row_sum = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        held = split < splits
        place = query * splits + split
        split_m = tl.load(Statistics + place, mask=held, other=LOWEST)
        split_sum = tl.load(Statistics + queries * splits + place, mask=held, other=0.0)
        partial = place[:, None] * BLOCK_D + columns[None, :]
        in_partial = held[:, None] & (columns < v_head_size)[None, :]
        split_acc = tl.load(Partial + partial, mask=in_partial, other=0.0)
        m_new = tl.maximum(m, tl.max(split_m, 0))
        weight = tl.exp2((split_m - m_new) * LOG2_E)
        alpha = tl.exp2((m - m_new) * LOG2_E)
        row_sum = row_sum * alpha + tl.sum(weight * split_sum, 0)
        acc = acc * alpha + tl.sum(weight[:, None] * split_acc, 0)
        m = m_new
    if WIDE:
        acc *= 2.0  # V was halved
    # A query that does not exist has no sink either.
    counts = i < _length(q_lengths, batch, q_len)
    sink = tl.where(counts, _load_sink(Sinks, SinksFp32, head), float("-inf"))
    sees = row_sum != 0  # NaN too
    m = tl.where(sees, m * LOG2_E + shift, float("-inf"))
    top = tl.maximum(m, sink + shift, propagate_nan=tl.PropagateNan.ALL)
    top = tl.where(top == float("-inf"), 0.0, top)
    alpha = tl.exp2(m - top)
    total = tl.where(sees, row_sum * alpha, 0.0) + tl.exp2(sink - top)
    out = tl.clamp(acc * (alpha * (1.0 / total)), -most, most, propagate_nan=tl.PropagateNan.ALL)
    out = tl.where(sees, out, 0.0)
    Out += batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h + i.to(tl.int64) * out_stride_s
    tl.store(Out + columns, out.to(Out.dtype.element_ty), mask=columns < v_head_size)
    if tl.cast(Lse, tl.int64) != 0:
        score = tl.minimum(tl.maximum(top, -FLOAT_MAX), FLOAT_MAX)
        lse = tl.where(total != 0, (score + tl.log2(total)) * LN_2, float("-inf"))
        tl.store(Lse + query, lse)
