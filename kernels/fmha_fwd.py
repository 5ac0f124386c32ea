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
from fmha_triton import FAST_LIMIT, FLOAT_MAX, LOG2_E, SAFE_BLOCK_N, WIDE_SHIFT
from fp16x3 import LEAST_EXPONENT, SHIFT, add_weighted, power, precise_rows, prepare, scaled_scores
from fwd_rows import bent_by, keys_of, load_queries, load_rows, store_lse, store_rows, visible_to
from fwd_safe import attend_safely, compute_safely
from ragged import find_ragged

BY_HAND = ("simple",)  # passes of Triton's that change nothing here, see pyfmha/aot/passes.py

# The least factor of q . k inside tanh: 2**-100. Below it products lose bits as subnormal numbers; where softcap would
# ask for less, a smaller one does, and differs only for q . k beyond 2**88.
LEAST_BEND: tl.constexpr = tl.constexpr(7.888609052210118e-31)


@triton.jit
def _attend(
    acc, row_sum, m, exponent, q, K, V, k_stride, v_stride, scale, bend, unit, largest_unit, shift, row_first, row_last,
    begin, count, left, skipped, end, head_size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The hot loop, over `count` blocks of keys from `begin` on. After `left` blocks the MASKED one skips some keys.

    The score in units of log2 is scale * q . k, or scale * tanh(bend * q . k) where bend > 0.
    The state: m is the running maximum in units of log2, plus shift; weights are exp2(score - m), at most 2**-shift;
    row_sum is their sum; acc is the sum of weight * v, a tuple of parts of WIDTH columns each, of which only fp16x3
    makes more than one.

    With fp16x3 (fp16x3.py), q, unit, largest_unit, scale and bend are what prepare gives, and acc is in units of
    2**(exponent - 141).
    """
    keys = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    v_columns = tl.arange(0, WIDTH)
    k_offsets = keys[:, None] * k_stride + columns[None, :]
    v_offsets = keys[:, None] * v_stride + v_columns[None, :]
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
        k = load_rows(K_block, k_offsets, in_rows, in_columns, MASKED)
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
            qk = bent_by(qk, block_bend, K.dtype.element_ty != tl.float16)
        elif SOFTCAP == "any":
            if bend > 0:
                qk = bent_by(qk, block_bend, K.dtype.element_ty != tl.float16)
        if MASKED:
            # A scale of zero makes NaN of it, which the safe loop mends.
            qk = tl.where(visible_to(start + keys, row_first, row_last), qk, float("-inf"))
        m_new = tl.maximum(m, tl.max(qk, 1) * factor + shift)
        p = tl.exp2(qk * factor - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        if PRECISION == "fp16x3":
            v = ()
            for first in tl.static_range(0, BLOCK_D, WIDTH):
                v += (load_rows(V_block + first, v_offsets, in_rows, v_columns + first < head_size, MASKED),)
            acc, exponent = add_weighted(acc, alpha, p, v, exponent)
        else:
            scaled = acc[0] * alpha[:, None]
            v = load_rows(V_block, v_offsets, in_rows, in_columns, MASKED)
            acc = (tl.dot(p.to(v.dtype), v, scaled, input_precision=PRECISION),)
        m = m_new
        if not MASKED:
            K += BLOCK_N * k_stride
            V += BLOCK_N * v_stride
    return acc, row_sum, m, exponent


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
    # fp16x3 adds each block's product to the sums: a product of 64 columns at a time leaves registers for 256 of them.
    WIDTH: tl.constexpr = 64 if FP16X3 and BLOCK_D > 128 else BLOCK_D
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
    rows = tl.arange(0, BLOCK_M)
    row_first, row_last = keys_of(rows, oldest, newest, end)
    # In blocks from `begin` on: `left` with masks, then full ones up to `right`, then with masks again.
    blocks = (end - begin) // BLOCK_N + ((end - begin) % BLOCK_N != 0).to(tl.int32)
    left = tl.minimum((full_begin - begin + BLOCK_N - 1) // BLOCK_N, blocks).to(tl.int32)
    right = tl.minimum(tl.maximum((full_end - begin) // BLOCK_N, left), blocks).to(tl.int32)

    batch = batch.to(tl.int64)
    Q += batch * q_stride_b + head.to(tl.int64) * q_stride_h + (q_start.to(tl.int64) + first_row) * q_stride_s
    K += batch * k_stride_b + kv_head.to(tl.int64) * k_stride_h + kv_start.to(tl.int64) * k_stride_s
    V += batch * v_stride_b + kv_head.to(tl.int64) * v_stride_h + kv_start.to(tl.int64) * v_stride_s
    q = load_queries(Q, q_stride_s, rows_left, head_size, 0, sm_scale, BLOCK_M, BLOCK_D)
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

    acc = ()
    for _unused in tl.static_range(BLOCK_D // WIDTH):
        acc += (tl.zeros([BLOCK_M, WIDTH], tl.float32),)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], shift - FAST_LIMIT, tl.float32)
    exponent = tile * 0 + LEAST_EXPONENT
    acc, row_sum, m, exponent = _attend(
        acc, row_sum, m, exponent, q, K, V, k_stride_s, v_stride_s, fast_scale, fast_bend, unit, largest_unit, shift,
        row_first, row_last, begin + left * BLOCK_N, right - left, 0, 0, end, head_size, BLOCK_M, BLOCK_N, BLOCK_D,
        False, SOFTCAP, PRECISION, WIDTH,
    )  # fmt: skip
    acc, row_sum, m, exponent = _attend(
        acc, row_sum, m, exponent, q, K, V, k_stride_s, v_stride_s, fast_scale, fast_bend, unit, largest_unit, shift,
        row_first, row_last, begin, blocks - (right - left), left, (right - left) * BLOCK_N, end, head_size, BLOCK_M,
        BLOCK_N, BLOCK_D, True, SOFTCAP, PRECISION, WIDTH,
    )  # fmt: skip
    has_keys = (rows < rows_left) & (tl.maximum(row_first, begin) <= row_last)
    # row_sum is NaN where a dot product overflowed (or the input holds NaN); m is as it began where no score is higher.
    in_range = (tl.abs(m - shift) < FAST_LIMIT) & (row_sum > 0)
    if FP16X3:
        in_range &= precise_rows(acc, row_sum, exponent, head_size)
    elif Q.dtype.element_ty == tl.float32:
        in_range &= tl.sum(acc[0] * 0.0, 1) == 0  # tf32 rounds v within 2**-12 of FLOAT_MAX to infinity
    unsafe_rows = tl.sum((has_keys & ~in_range).to(tl.int32), 0)
    token = q_start.to(tl.int64) + first_row
    Out += batch * out_stride_b + head.to(tl.int64) * out_stride_h + token * out_stride_s
    lse_start = (batch * num_heads + head) * q_len + token
    if unsafe_rows != 0:
        # Zero, but the compiler cannot know: what follows computes its addresses anew, instead of keeping them in
        # registers all through the hot loop (up to 30 more, and spills). A multiple of BLOCK_D keeps loads wide.
        zero = (tl.minimum(tl.maximum(unsafe_rows, 0), 1) - 1) * BLOCK_D
        if WIDTH == BLOCK_D:
            sums, row_sum, m = attend_safely(
                Q, K, V, q_stride_s, k_stride_s, v_stride_s, sm_scale, scale, bend, safe_shift, zero, row_first,
                row_last, rows_left, begin, end, head_size, BLOCK_M, SAFE_BLOCK_N, BLOCK_D, SOFTCAP,
                "tf32x3" if FP16X3 else PRECISION,
            )  # fmt: skip
            acc = (sums,)
            exponent = tl.minimum(exponent, 0) + 141  # acc is in units of 1
        else:
            compute_safely(
                Out, Lse, lse_start, Q, K, V, q_stride_s, k_stride_s, v_stride_s, out_stride_s, sm_scale, scale, bend,
                safe_shift, zero, oldest, newest, rows_left, out_rows, begin, end, head_size, BLOCK_M, SAFE_BLOCK_N,
                BLOCK_D, SOFTCAP, "tf32x3",
            )  # fmt: skip
    if (WIDTH == BLOCK_D) | (unsafe_rows == 0):  # else all is stored; and acc need not be kept until then
        inverse = 1.0 / row_sum
        for part in tl.static_range(BLOCK_D // WIDTH):
            out = acc[part] * inverse[:, None]
            if FP16X3:
                out *= power(exponent - 14)
            columns = tl.arange(0, WIDTH) + part * WIDTH
            store_rows(Out, out, rows, columns, out_rows, head_size, out_stride_s, has_keys)
        store_lse(Lse, lse_start, m, row_sum, rows, out_rows, has_keys)
