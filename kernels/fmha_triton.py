"""Fused multi-head attention, FlashAttention-2 style: one program computes BLOCK_M rows of one head.

    out = softmax(sm_scale * q @ k.T) @ v        M = row maximum of the scores, L = sum of exp(score - M)

All tensors are contiguous [batch, heads, seq_len, head size] in fp16, bf16 or fp32; M and L are float32
[batch * heads, seq_len]. The algorithm is that of Dao, "FlashAttention-2" (2023): one pass over the keys with a running
maximum and sum, and one division at the end.

The hot loop works in a range where plain float32 arithmetic is safe. A tile that leaves it, which the end of the loop
shows, is computed a second time, slowly and safely. So ordinary input pays nothing for the promise that finite input
never gives NaN or infinity. The range:

- Scores below FAST_LIMIT in size. The fused multiply-add qk * scale - m rounds m but not the product, so beyond 2**27
  the exponent of a row's own maximum could come out above 16 and its weight overflow.
- Dot products within float32. They always are in fp16; in bf16 and fp32 q . k can exceed it.

L belongs to the M that is stored: L * exp(M) is the sum of exp(score). Where a score exceeds float32, M stops near
2.4e38, and with |sm_scale| above 1e34 possibly earlier. A partial sum of q . k below the least float32 counts as minus
infinity. NaN in the input reaches every output it takes part in, in a causal tile also those that weigh it with zero.
"""

import triton
import triton.language as tl

BY_HAND = ("simple",)  # passes of Triton's that change nothing here, see pyfmha/aot/passes.py

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
FLOAT_MAX: tl.constexpr = tl.constexpr(3.4028234663852886e38)
BFLOAT16_MAX: tl.constexpr = tl.constexpr(3.3895313892515355e38)
# Scores, in units of log2, that the fast loop accepts. At 2**20 the rounding of m is at most 2**-4.
FAST_LIMIT: tl.constexpr = tl.constexpr(1048576.0)
# In bf16 and fp32 values may reach FLOAT_MAX, and the sum of p * v would overflow although the mean does not.
# Weights are therefore at most 2**-24, which costs nothing: it is part of the addend of the same multiply-add.
WIDE_SHIFT: tl.constexpr = tl.constexpr(24.0)
# Keys at a time in the safe loop: so few that it needs no more registers than the fast one.
SAFE_BLOCK_N: tl.constexpr = tl.constexpr(16)
# Below every dot product of the safe loop, yet near enough that the difference is finite: -2**126.
LOWEST: tl.constexpr = tl.constexpr(-8.507059173023462e37)


@triton.jit
def _load_rows(base, offsets, rows, row_limit, MASKED: tl.constexpr):
    """A [rows, head size] block; rows at or past row_limit read as zero (MASKED) or are promised not to occur."""
    if MASKED:
        block = tl.load(base + offsets, mask=(rows < row_limit)[:, None], other=0.0)
    else:
        block = tl.load(base + offsets)
    return block


@triton.jit
def _load_queries(base, offsets, rows, seq_len, sm_scale):
    """The queries, negated for a negative scale: exact, and the maximum of q . k is then always that of the scores."""
    q = _load_rows(base, offsets, rows, seq_len, True)
    if sm_scale < 0:
        q = -q
    return q


@triton.jit
def _visible(rows, columns, seq_len, CAUSAL: tl.constexpr):
    """Which keys (columns) a query (rows) may see. A causal row below seq_len sees no key past it, so one test does."""
    if CAUSAL:
        visible = columns[None, :] <= rows[:, None]
    else:
        visible = (columns < seq_len)[None, :]
    return visible


@triton.jit
def _attend(
    acc,
    row_sum,
    m,
    q,
    K,
    V,
    scale,
    shift,
    rows,
    begin,
    end,
    seq_len,
    BLOCK_N: tl.constexpr,
    BLOCK_DMODEL: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The hot loop, over keys begin..end, the first of them at K and V.

    The state: m is the running maximum in units of log2, plus shift; weights are exp2(score - m), at most 2**-shift;
    row_sum is their sum; acc is the sum of weight * v.
    """
    keys = tl.arange(0, BLOCK_N)
    offsets = keys[:, None] * BLOCK_DMODEL + tl.arange(0, BLOCK_DMODEL)[None, :]
    for start in range(begin, end, BLOCK_N):
        k = _load_rows(K, offsets, start + keys, seq_len, MASKED)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            # Scale first: a product of -inf and a scale of zero would be NaN.
            s = tl.where(_visible(rows, start + keys, seq_len, CAUSAL), qk * scale, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1) + shift)
            p = tl.exp2(s - m_new[:, None])
        else:
            m_new = tl.maximum(m, tl.max(qk, 1) * scale + shift)
            p = tl.exp2(qk * scale - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = _load_rows(V, offsets, start + keys, seq_len, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        m = m_new
        K += BLOCK_N * BLOCK_DMODEL
        V += BLOCK_N * BLOCK_DMODEL
    return acc, row_sum, m


@triton.jit
def _normalise_rows(q):
    """q with every row scaled by an exact power of two to below 2**-10, and the factor that undoes it but for 2**12."""
    largest = tl.max(tl.abs(q.to(tl.float32)), 1)
    # Powers of two straight from the exponent bits; 2**-126 and 2**126 are the outermost with exact inverses.
    exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 1), 253)
    down = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    up = (exponent << 23).to(tl.float32, bitcast=True)
    return (q.to(tl.float32) * down[:, None] * (1.0 / 4096.0)).to(q.dtype), up


@triton.jit
def _attend_safely(
    Q,
    K,
    V,
    sm_scale,
    scale,
    shift,
    zero,
    first_row,
    end,
    seq_len,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DMODEL: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As _attend, over all keys below end, with arithmetic that stays finite for any finite input.

    Powers of two bring the operands into range: q row by row, k and v by a half (tf32 would round FLOAT_MAX up to
    infinity). Then |q . k| < 2**126. Differences of two such, taken before they are scaled, are finite, and exactly
    zero at the maximum, which therefore weighs exactly 2**-shift whatever the scale is.
    """
    WIDE: tl.constexpr = Q.dtype.element_ty != tl.float16
    rows = first_row + zero + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_DMODEL) + zero
    keys = tl.arange(0, BLOCK_N) + zero
    q = _load_queries(Q, (rows - first_row)[:, None] * BLOCK_DMODEL + columns[None, :], rows, seq_len, sm_scale)
    if WIDE:
        q, undo = _normalise_rows(q)
        # 2**13: 2**12 left over from q, and the halved k. Scale comes first, for undo * 2**13 may be infinite.
        row_scale = tl.minimum(scale * undo * 8192.0, FLOAT_MAX)
    else:
        row_scale = tl.full([BLOCK_M], 0.0, tl.float32) + scale
    offsets = keys[:, None] * BLOCK_DMODEL + columns[None, :]
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DMODEL], tl.float32)
    for start in tl.range(0, end, BLOCK_N, num_stages=1):
        visible = _visible(rows, start + keys, seq_len, CAUSAL)
        k = _load_rows(K, offsets, start + keys, seq_len, True)
        if WIDE:
            k = (k.to(tl.float32) * 0.5).to(k.dtype)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        m_new = tl.maximum(m, tl.max(tl.where(visible, qk, LOWEST), 1))
        p = tl.exp2(tl.where(visible, (qk - m_new[:, None]) * row_scale[:, None] - shift, float("-inf")))
        alpha = tl.exp2((m - m_new) * row_scale)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        v = _load_rows(V, offsets, start + keys, seq_len, True)
        if WIDE:
            v = (v.to(tl.float32) * 0.5).to(v.dtype)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
        K += BLOCK_N * BLOCK_DMODEL
        V += BLOCK_N * BLOCK_DMODEL
    if WIDE:
        acc *= 2.0
    m = tl.minimum(tl.maximum(m * row_scale, -FLOAT_MAX), FLOAT_MAX)
    return acc, row_sum, m + shift


@triton.jit
def fused_attention_kernel(
    Out,
    L,
    M,
    Q,
    K,
    V,
    sm_scale,
    batch_size,
    num_heads,
    seq_len,
    BLOCK_M: tl.constexpr,
    BLOCK_DMODEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr = True,
    PRECISION: tl.constexpr = "tf32x3",
):
    """Grid: (tiles of BLOCK_M rows, heads, 1), or (tiles, a, b) with a * b >= heads where heads exceed 65535.

    sm_scale is any finite float32, negative and zero included. BLOCK_DMODEL is the head size. PRECISION (tf32, tf32x3,
    ieee) is how fp32 operands are multiplied; the other dtypes ignore it.
    """
    WIDE: tl.constexpr = Q.dtype.element_ty != tl.float16
    shift: tl.constexpr = WIDE_SHIFT if WIDE else 0.0
    head = tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)
    if head >= tl.cast(batch_size, tl.int64) * num_heads:
        return
    seq_len = tl.cast(seq_len, tl.int32)  # a length of 1 may come as a constant, which has no .to
    tile = tl.program_id(0)
    if CAUSAL:
        tile = tl.num_programs(0) - 1 - tile  # the longest rows first, so that the last to finish are short
    first_row = tile * BLOCK_M
    if first_row >= seq_len:  # a grid with more tiles than needed
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    # Offsets between heads and tiles can pass 2**31 elements; those inside a tile cannot.
    head_start = head * seq_len * BLOCK_DMODEL
    tile_start = head_start + first_row.to(tl.int64) * BLOCK_DMODEL
    in_tile = tl.arange(0, BLOCK_M)[:, None] * BLOCK_DMODEL + tl.arange(0, BLOCK_DMODEL)[None, :]
    K += head_start
    V += head_start

    q = _load_queries(Q + tile_start, in_tile, rows, seq_len, sm_scale)
    scale = tl.minimum(tl.abs(sm_scale) * LOG2_E, FLOAT_MAX)

    if CAUSAL:
        end = tl.minimum(first_row + BLOCK_M, seq_len)
        unmasked = first_row // BLOCK_N * BLOCK_N
    else:
        end = seq_len
        unmasked = seq_len // BLOCK_N * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_DMODEL], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], shift - FAST_LIMIT, tl.float32)
    acc, row_sum, m = _attend(
        acc,
        row_sum,
        m,
        q,
        K,
        V,
        scale,
        shift,
        rows,
        0,
        unmasked,
        seq_len,
        BLOCK_N,
        BLOCK_DMODEL,
        CAUSAL,
        False,
        PRECISION,
    )
    skipped = unmasked.to(tl.int64) * BLOCK_DMODEL
    acc, row_sum, m = _attend(
        acc,
        row_sum,
        m,
        q,
        K + skipped,
        V + skipped,
        scale,
        shift,
        rows,
        unmasked,
        end,
        seq_len,
        BLOCK_N,
        BLOCK_DMODEL,
        CAUSAL,
        True,
        PRECISION,
    )
    # row_sum is NaN where a dot product overflowed (or the input holds NaN); m is as it began where no score is higher.
    in_range = (tl.abs(m - shift) < FAST_LIMIT) & (row_sum > 0)
    if Q.dtype.element_ty == tl.float32:
        in_range &= tl.sum(acc * 0.0, 1) == 0  # tf32 rounds v within 2**-12 of FLOAT_MAX to infinity
    unsafe_rows = tl.sum((~in_range).to(tl.int32), 0)
    if unsafe_rows != 0:
        # Zero, but the compiler cannot know: what follows computes its addresses anew, instead of keeping them in
        # registers all through the hot loop (up to 30 more, and spills). A multiple of the head size keeps loads wide.
        zero = (tl.minimum(tl.maximum(unsafe_rows, 0), 1) - 1) * BLOCK_DMODEL
        acc, row_sum, m = _attend_safely(
            Q + tile_start,
            K,
            V,
            sm_scale,
            scale,
            shift,
            zero,
            first_row,
            end,
            seq_len,
            BLOCK_M,
            SAFE_BLOCK_N,
            BLOCK_DMODEL,
            CAUSAL,
            PRECISION,
        )

    # A mean never exceeds its largest value, but the rounded one may, by enough to become infinite in Out's dtype.
    if Q.dtype.element_ty == tl.float16:
        largest: tl.constexpr = 65504.0
    elif Q.dtype.element_ty == tl.bfloat16:
        largest: tl.constexpr = BFLOAT16_MAX
    else:
        largest: tl.constexpr = FLOAT_MAX
    out = tl.clamp(acc * (1.0 / row_sum)[:, None], -largest, largest, propagate_nan=tl.PropagateNan.ALL)
    tl.store(Out + tile_start + in_tile, out.to(Out.dtype.element_ty), mask=(rows < seq_len)[:, None])
    statistics = head * seq_len + rows
    tl.store(M + statistics, (m - shift) * LN_2, mask=rows < seq_len)
    tl.store(L + statistics, row_sum * 2.0**shift, mask=rows < seq_len)
