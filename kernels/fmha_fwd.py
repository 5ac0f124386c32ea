"""Attention for production: one kernel for every shape, layout and mask, FlashAttention-2 style.

One program computes BLOCK_M queries of one head:

    score = sm_scale * q . k, if softcap > 0: softcap * tanh(score / softcap)
    Out = softmax(score over the visible keys) @ v        Lse = log(sum of exp(score)), natural

Query i of a sequence of q_n queries and kv_n keys sees key j if j < kv_n and i + d - window_left <= j <= i + d +
window_right; d is kv_n - q_n with bottom_right, else 0; a window of -1 has no bound. Keys that no query of a tile sees
are not read. A query without keys gets zeros and -inf, and so do rows of no query (padding).

The method is that of fmha_triton.py (Dao, "FlashAttention-2", 2023): a hot loop in a range where plain float32 is safe,
and a second, safe computation of those tiles that turn out to have left it. What holds there holds here: finite input
never gives NaN or infinity, scores above FLOAT_MAX apart, which Lse cannot tell from it. Blocks of keys that
every query of a tile sees go through the loop without masks, the others, at both ends, through the one with.
Where fp32 is multiplied as parts in fp16 (fp16x3.py), the range is narrower, and the safe loop takes tf32x3.

NaN and infinity beyond the lengths change nothing. Inside them, NaN reaches the outputs that it takes part in, and may
reach queries of the same tile that do not see its key.
"""

import triton
import triton.language as tl
from fmha_triton import (
    BFLOAT16_MAX,
    FAST_LIMIT,
    FLOAT_MAX,
    LN_2,
    LOG2_E,
    LOWEST,
    SAFE_BLOCK_N,
    WIDE_SHIFT,
    _normalise_rows,
)
from fp16x3 import LEAST_EXPONENT, SHIFT, add_weighted, power, precise_rows, prepare, scaled_scores
from ragged import find_ragged

# The least factor of q . k inside tanh: 2**-100. Below it products lose bits as subnormal numbers; where softcap would
# ask for less, a smaller one does, and differs only for q . k beyond 2**88.
LEAST_BEND: tl.constexpr = tl.constexpr(7.888609052210118e-31)


@triton.jit
def _load_rows(base, offsets, in_rows, in_columns, MASKED: tl.constexpr):
    """A [rows, BLOCK_D] block. Columns outside in_columns and, if MASKED, rows outside in_rows read as zero.

    Where head_size is known to be a multiple of 8, the test of the columns costs next to nothing in the
    compiled loop (3 of 830 instructions on sm_90, with a cap).
    """
    if MASKED:
        block = tl.load(base + offsets, mask=in_rows[:, None] & in_columns[None, :], other=0.0)
    else:
        block = tl.load(base + offsets, mask=in_columns[None, :], other=0.0)
    return block


@triton.jit
def _load_queries(Q, q_stride, rows_left, head_size, zero, sm_scale, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The queries, negated for a negative scale: exact, and the maximum of q . k is then always that of the scores."""
    rows = tl.arange(0, BLOCK_M) + zero
    columns = tl.arange(0, BLOCK_D) + zero
    offsets = rows[:, None] * q_stride + columns[None, :]
    q = _load_rows(Q, offsets, rows < rows_left, columns < head_size, True)
    if sm_scale < 0:
        q = -q
    return q


@triton.jit
def _visible(keys, row_first, row_last):
    """Which keys the queries see."""
    return (keys[None, :] >= row_first[:, None]) & (keys[None, :] <= row_last[:, None])


@triton.jit
def _tanh(x):
    """tanh within a few units in the last place: a series near zero, where the quotient would cancel."""
    square = x * x
    series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    quotient = 1.0 - 2.0 / (tl.exp2(x * (2 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 0.25, x * series, quotient)


@triton.jit
def _bend(qk, bend, WIDE: tl.constexpr):
    bent = _tanh(qk * bend)
    if WIDE:
        bent += qk * 0.0  # NaN where the product overflowed: that must show
    return bent


@triton.jit
def _attend(
    acc, row_sum, m, exponent, q, K, V, k_stride, v_stride, scale, bend, unit, largest_unit, shift, row_first, row_last,
    begin, count, left, skipped, end, head_size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The hot loop, over `count` blocks of keys from `begin` on. After `left` blocks the MASKED one skips some keys.

    The score in units of log2 is scale * q . k, or scale * tanh(bend * q . k) where bend > 0.
    The state: m is the running maximum in units of log2, plus shift; weights are exp2(score - m), at most 2**-shift;
    row_sum is their sum; acc is the sum of weight * v.

    With fp16x3 (fp16x3.py), q, unit, largest_unit, scale and bend are what prepare gives, and acc is in units of
    2**(exponent - 141).
    """
    keys = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    k_offsets = keys[:, None] * k_stride + columns[None, :]
    v_offsets = keys[:, None] * v_stride + columns[None, :]
    in_columns = columns < head_size
    if not MASKED:
        K += begin.to(tl.int64) * k_stride
        V += begin.to(tl.int64) * v_stride
    for index in range(0, count):
        start = begin + index * BLOCK_N
        if MASKED:
            start += tl.where(index < left, 0, skipped)
            K_block = K + start.to(tl.int64) * k_stride
            V_block = V + start.to(tl.int64) * v_stride
        else:
            K_block = K
            V_block = V
        in_rows = start + keys < end
        k = _load_rows(K_block, k_offsets, in_rows, in_columns, MASKED)
        factor = scale
        block_bend = bend
        if PRECISION == "fp16x3":
            qk, block_unit = scaled_scores(q[0], q[1], k, unit, largest_unit)
            block_bend = bend * block_unit
            if SOFTCAP == "never":
                factor = scale * block_unit
            elif SOFTCAP == "any":
                factor = tl.where(bend > 0, scale, scale * block_unit)
        else:
            qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP == "always":
            qk = _bend(qk, block_bend, K.dtype.element_ty != tl.float16)
        elif SOFTCAP == "any":
            if bend > 0:
                qk = _bend(qk, block_bend, K.dtype.element_ty != tl.float16)
        if MASKED:
            # A scale of zero makes NaN of it, which the safe loop mends.
            qk = tl.where(_visible(start + keys, row_first, row_last), qk, float("-inf"))
        m_new = tl.maximum(m, tl.max(qk, 1) * factor + shift)
        p = tl.exp2(qk * factor - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        if PRECISION != "fp16x3":
            acc = acc * alpha[:, None]
        v = _load_rows(V_block, v_offsets, in_rows, in_columns, MASKED)
        if PRECISION == "fp16x3":
            acc, exponent = add_weighted(acc, alpha, p, v, exponent)
        else:
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        m = m_new
        if not MASKED:
            K += BLOCK_N * k_stride
            V += BLOCK_N * v_stride
    return acc, row_sum, m, exponent


@triton.jit
def _attend_safely(
    Q, K, V, q_stride, k_stride, v_stride, sm_scale, scale, bend, shift, zero, row_first, row_last, rows_left, begin,
    end, head_size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As _attend, over the keys begin..end, with arithmetic that stays finite for any finite input.

    Powers of two bring the operands into range: q row by row, k and v by a half (tf32 would round FLOAT_MAX up to
    infinity). Then |q . k| < 2**126. Differences of two such, taken before they are scaled, are finite, and exactly
    zero at the maximum, which therefore weighs exactly 2**-shift whatever the scale is.
    """
    WIDE: tl.constexpr = Q.dtype.element_ty != tl.float16
    columns = tl.arange(0, BLOCK_D) + zero
    keys = tl.arange(0, BLOCK_N) + zero
    q = _load_queries(Q, q_stride, rows_left, head_size, zero, sm_scale, BLOCK_M, BLOCK_D)
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
        visible = _visible(start + keys, row_first, row_last)
        k = _load_rows(K + tl.cast(start, tl.int64) * k_stride, k_offsets, in_rows, columns < head_size, True)
        if WIDE:
            k = (k.to(tl.float32) * 0.5).to(k.dtype)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP == "always":
            qk = _tanh(qk * row_scale[:, None])
        elif SOFTCAP == "any":
            if bend > 0:
                qk = _tanh(qk * row_scale[:, None])
        m_new = tl.maximum(m, tl.max(tl.where(visible, qk, LOWEST), 1))
        p = tl.exp2(tl.where(visible, (qk - m_new[:, None]) * last_scale[:, None] - shift, float("-inf")))
        alpha = tl.exp2((m - m_new) * last_scale)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        v = _load_rows(V + tl.cast(start, tl.int64) * v_stride, v_offsets, in_rows, columns < head_size, True)
        if WIDE:
            v = (v.to(tl.float32) * 0.5).to(v.dtype)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    if WIDE:
        acc *= 2.0
    m = tl.minimum(tl.maximum(m * last_scale, -FLOAT_MAX), FLOAT_MAX)
    return acc, row_sum, m + shift


@triton.jit
def fused_attention_forward(
    Out, Lse, Q, K, V, q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv, sm_scale, softcap, batch_size, num_heads,
    num_kv_heads, q_len, kv_len, head_size, q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s,
    v_stride_b, v_stride_h, v_stride_s, out_stride_b, out_stride_h, out_stride_s, window_left, window_right,
    bottom_right, ragged, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr = "any", PRECISION: tl.constexpr = "tf32x3", SEGMENTS: tl.constexpr = 128,
):  # fmt: skip
    """Grid: (tiles, a, b) with a * b at least heads: num_heads if ragged, else batch_size * num_heads. Tiles are
    cdiv(q_len, BLOCK_M), and batch_size + 1 more if ragged; more do no harm.

    Dense tensors are [batch, heads, seq, head size] in any order of the axes but the last, which has stride 1;
    q_lengths and kv_lengths (or null) bound each sequence. Ragged ones have the sequences one after the other, [tokens,
    heads, head size]; sequence b spans cu_seqlens[b]..cu_seqlens[b + 1], clamped to the tensor and made non-decreasing.
    Lse is float32 [batch, heads, q_len], ragged [heads, q_len], or null. Strides count elements.

    head_size is at most BLOCK_D. sm_scale is any finite float32, softcap any not negative, 0 for none. SOFTCAP says
    what is known of it: "never" (it is 0), "always" (it is positive) or "any", which costs a branch in the hot loop
    (and on sm_90, where ptxas then runs one wgmma at a time, a good deal more). PRECISION (tf32, tf32x3, fp16x3, ieee)
    is how fp32 operands are multiplied; the other dtypes ignore it, and must not have fp16x3. SEGMENTS: sequences of a
    ragged batch that a program looks at in one go.
    """
    WIDE: tl.constexpr = Q.dtype.element_ty != tl.float16
    FP16X3: tl.constexpr = PRECISION == "fp16x3"
    safe_shift: tl.constexpr = WIDE_SHIFT if WIDE else 0.0
    shift: tl.constexpr = SHIFT if FP16X3 else safe_shift
    # As a constant, 1 has no .to; and offsets can pass 2**31 elements.
    q_len = tl.cast(q_len, tl.int32)
    kv_len = tl.cast(kv_len, tl.int32)
    q_stride_s = tl.cast(q_stride_s, tl.int64)
    k_stride_s = tl.cast(k_stride_s, tl.int64)
    v_stride_s = tl.cast(v_stride_s, tl.int64)
    out_stride_s = tl.cast(out_stride_s, tl.int64)

    # 65535 * 65536 heads at most, which 32 bits just hold.
    head = tl.program_id(1).to(tl.uint32) + tl.program_id(2).to(tl.uint32) * tl.num_programs(1).to(tl.uint32)
    batch = (head // tl.cast(num_heads, tl.uint32)).to(tl.int32)
    if batch >= tl.where(ragged != 0, 1, batch_size):
        return
    head = (head % tl.cast(num_heads, tl.uint32)).to(tl.int32)
    kv_head = head // (num_heads // num_kv_heads)
    tile = tl.program_id(0)
    if window_right >= 0:
        tile = tl.num_programs(0) - 1 - tile  # the longest rows first, so that the last to finish are short

    if ragged != 0:
        first_row, q_start, q_n, kv_start, kv_n = find_ragged(
            cu_seqlens_q, cu_seqlens_kv, tile, batch_size, q_len, kv_len, BLOCK_M, SEGMENTS
        )
        out_rows = q_n - first_row
    else:
        first_row = tile * BLOCK_M
        q_start = tile * 0
        kv_start = tile * 0
        q_n = tl.load(q_lengths + batch, mask=tl.cast(q_lengths, tl.int64) != 0, other=q_len)
        q_n = tl.minimum(tl.maximum(q_n, 0), q_len)
        kv_n = tl.load(kv_lengths + batch, mask=tl.cast(kv_lengths, tl.int64) != 0, other=kv_len)
        kv_n = tl.minimum(tl.maximum(kv_n, 0), kv_len)
        out_rows = q_len - first_row
    if out_rows <= 0:
        return
    rows_left = q_n - first_row

    # Keys that the first query sees, as if there were keys below 0 and past kv_n; clamped to where nothing changes.
    diagonal = first_row.to(tl.int64) + tl.where(bottom_right != 0, kv_n - q_n, 0)
    oldest = tl.where(window_left >= 0, diagonal - window_left, -BLOCK_M)
    oldest = tl.minimum(tl.maximum(oldest, -BLOCK_M), kv_n)
    newest = tl.where(window_right >= 0, diagonal + window_right, kv_n)
    newest = tl.minimum(tl.maximum(newest, -BLOCK_M), kv_n)
    # Queries of the tile that exist; their keys are begin..end, and all of them see full_begin..full_end.
    height = tl.minimum(tl.maximum(rows_left, 1), BLOCK_M)
    begin = tl.maximum(oldest, 0).to(tl.int32)
    end = tl.minimum(newest + height, kv_n).to(tl.int32)
    full_begin = tl.maximum(oldest + height - 1, 0)
    full_end = tl.minimum(newest + 1, kv_n)
    if (rows_left <= 0) | (end <= begin):
        end = begin
    # The keys of each query, row_first..row_last. No sum here leaves 32 bits.
    rows = tl.arange(0, BLOCK_M)
    row_first = tl.minimum(oldest.to(tl.int32), end - rows) + rows
    row_last = tl.minimum(newest.to(tl.int32), end - 1 - rows) + rows
    # In blocks from `begin` on: `left` with masks, then full ones up to `right`, then with masks again.
    blocks = (end - begin) // BLOCK_N + ((end - begin) % BLOCK_N != 0).to(tl.int32)
    left = tl.minimum((full_begin - begin + BLOCK_N - 1) // BLOCK_N, blocks).to(tl.int32)
    right = tl.minimum(tl.maximum((full_end - begin) // BLOCK_N, left), blocks).to(tl.int32)

    batch = batch.to(tl.int64)
    Q += batch * q_stride_b + head.to(tl.int64) * q_stride_h + (q_start.to(tl.int64) + first_row) * q_stride_s
    K += batch * k_stride_b + kv_head.to(tl.int64) * k_stride_h + kv_start.to(tl.int64) * k_stride_s
    V += batch * v_stride_b + kv_head.to(tl.int64) * v_stride_h + kv_start.to(tl.int64) * v_stride_s
    q = _load_queries(Q, q_stride_s, rows_left, head_size, 0, sm_scale, BLOCK_M, BLOCK_D)
    # The score in units of log2 is scale * q . k, or scale * tanh(bend * q . k).
    scale = tl.minimum(tl.abs(sm_scale) * LOG2_E, FLOAT_MAX)
    cap = tl.minimum(softcap * LOG2_E, FLOAT_MAX)
    bend = cap * 0.0
    if SOFTCAP != "never" and cap > 0:
        bend = tl.minimum(tl.maximum(scale / cap, LEAST_BEND), FLOAT_MAX)
        scale = tl.minimum(cap, scale * (1.0 / LEAST_BEND))

    unit = 0
    largest_unit = 0
    fast_scale = scale
    fast_bend = bend
    if FP16X3:
        q, unit, largest_unit, fast_scale, fast_bend = prepare(q, scale, bend)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], shift - FAST_LIMIT, tl.float32)
    exponent = tile * 0 + LEAST_EXPONENT
    acc, row_sum, m, exponent = _attend(
        acc, row_sum, m, exponent, q, K, V, k_stride_s, v_stride_s, fast_scale, fast_bend, unit, largest_unit, shift,
        row_first, row_last, begin + left * BLOCK_N, right - left, 0, 0, end, head_size, BLOCK_M, BLOCK_N, BLOCK_D,
        False, SOFTCAP, PRECISION,
    )  # fmt: skip
    acc, row_sum, m, exponent = _attend(
        acc, row_sum, m, exponent, q, K, V, k_stride_s, v_stride_s, fast_scale, fast_bend, unit, largest_unit, shift,
        row_first, row_last, begin, blocks - (right - left), left, (right - left) * BLOCK_N, end, head_size, BLOCK_M,
        BLOCK_N, BLOCK_D, True, SOFTCAP, PRECISION,
    )  # fmt: skip
    has_keys = (rows < rows_left) & (tl.maximum(row_first, begin) <= row_last)
    # row_sum is NaN where a dot product overflowed (or the input holds NaN); m is as it began where no score is higher.
    in_range = (tl.abs(m - shift) < FAST_LIMIT) & (row_sum > 0)
    if FP16X3:
        in_range &= precise_rows(acc, row_sum, exponent, head_size)
    elif Q.dtype.element_ty == tl.float32:
        in_range &= tl.sum(acc * 0.0, 1) == 0  # tf32 rounds v within 2**-12 of FLOAT_MAX to infinity
    unsafe_rows = tl.sum((has_keys & ~in_range).to(tl.int32), 0)
    if unsafe_rows != 0:
        # Zero, but the compiler cannot know: what follows computes its addresses anew, instead of keeping them in
        # registers all through the hot loop (up to 30 more, and spills). A multiple of BLOCK_D keeps loads wide.
        zero = (tl.minimum(tl.maximum(unsafe_rows, 0), 1) - 1) * BLOCK_D
        acc, row_sum, m = _attend_safely(
            Q, K, V, q_stride_s, k_stride_s, v_stride_s, sm_scale, scale, bend, safe_shift, zero, row_first,
            row_last, rows_left, begin, end, head_size, BLOCK_M, SAFE_BLOCK_N, BLOCK_D, SOFTCAP,
            "tf32x3" if FP16X3 else PRECISION,
        )  # fmt: skip
        exponent = tl.minimum(exponent, 0) + 141  # acc is in units of 1

    # A mean never exceeds its largest value, but the rounded one may, by enough to become infinite in Out's dtype.
    if Q.dtype.element_ty == tl.float16:
        largest: tl.constexpr = 65504.0
    elif Q.dtype.element_ty == tl.bfloat16:
        largest: tl.constexpr = BFLOAT16_MAX
    else:
        largest: tl.constexpr = FLOAT_MAX
    columns = tl.arange(0, BLOCK_D)
    stored = (rows < out_rows)[:, None] & (columns < head_size)[None, :]
    out = acc * (1.0 / row_sum)[:, None]
    if FP16X3:
        out *= power(exponent - 14)
    out = tl.clamp(out, -largest, largest, propagate_nan=tl.PropagateNan.ALL)
    out = tl.where(has_keys[:, None], out, 0.0)
    token = q_start.to(tl.int64) + first_row
    Out += batch * out_stride_b + head.to(tl.int64) * out_stride_h + token * out_stride_s
    tl.store(Out + rows[:, None] * out_stride_s + columns[None, :], out.to(Out.dtype.element_ty), mask=stored)
    if tl.cast(Lse, tl.int64) != 0:
        lse = tl.where(has_keys, (m + tl.log2(row_sum)) * LN_2, float("-inf"))
        Lse += (batch * num_heads + head) * q_len + token
        tl.store(Lse + rows, lse, mask=rows < out_rows)
