"""Attention of few queries over many keys (decoding): the keys are split over programs, whose results are combined.

The same problem as fmha_fwd.py for dense batches, in two launches. With one query a sequence there are too few tiles of
queries to fill a GPU, and all there is to do is to read K and V once. So fused_attention_split gives each program a
part of the keys of one key head, and packs into its rows all the queries that read them: those of the group of heads
that shares the key head. fused_attention_combine weighs the partial results of each query by their sums, as Dao et al.,
"Flash-Decoding" (2023), do.

Between the two, in float32 and for N = batch * num_heads * q_len queries numbered in that order: Partial [N, splits,
BLOCK_D], the sums of weight * v, and Statistics: [N, splits] maxima, [N, splits] sums of weights, [N] factors. A score
in units of log2 is factor * maximum; keeping the two apart makes differences exact for scores of any size. Time goes
into memory traffic, so all arithmetic is the safe one of fmha_fwd.py: finite input never gives NaN or infinity.

PDL (sm_90 and later): with programmatic dependent launch, the second kernel's programs start as soon as all of the
first's have, and find their code and arguments fetched when these end. Until then they touch no memory.
"""

import triton
import triton.language as tl
from fmha_triton import BFLOAT16_MAX, FLOAT_MAX, LN_2, LOG2_E, LOWEST, WIDE_SHIFT, _normalise_rows
from fwd_rows import tanh

BY_HAND = ("simple",)  # passes of Triton's that change nothing here, see pyfmha/aot/passes.py

# Programs of combine that fetch its code early: about one an SM, since those of an SM share what was fetched.
WARMING: tl.constexpr = tl.constexpr(128)


@triton.jit
def _bounds(i, diagonal, q_n, kv_n, window_left, window_right):
    """First and last key that the queries i see; none, of a query that does not count."""
    position = i.to(tl.int64) + diagonal
    oldest = tl.where(window_left >= 0, tl.maximum(position - window_left, 0), 0)
    newest = tl.where(window_right >= 0, tl.minimum(position + window_right, kv_n - 1), kv_n - 1)
    newest = tl.where(i < q_n, newest, -1)
    return tl.minimum(oldest, kv_n).to(tl.int32), tl.maximum(newest, -1).to(tl.int32)


@triton.jit
def _length(lengths, batch, longest):
    """The length of a sequence, clamped to the tensor; all of it where lengths is null."""
    length = tl.load(lengths + batch, mask=tl.cast(lengths, tl.int64) != 0, other=longest)
    return tl.minimum(tl.maximum(length, 0), longest)


@triton.jit
def _prefetch(base, row, stride, end, head_size, COLUMNS: tl.constexpr):
    """Ask for the rows [row, end) at base, of head_size elements, to be in the L2 cache soon; does not wait."""
    LINE: tl.constexpr = 128 // (base.dtype.element_ty.primitive_bitwidth // 8)
    column = tl.arange(0, COLUMNS // LINE) * LINE
    wanted = (row < end)[:, None] & (column < head_size)[None, :]
    tl.inline_asm_elementwise(
        "{ .reg .pred wanted; setp.ne.s32 wanted, $2, 0; @wanted prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r",
        [base + row.to(tl.int64)[:, None] * stride + column[None, :], wanted.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _finished(acc, row_sum, dtype: tl.constexpr):
    """Sums of weight * v, of all keys, divided by the sums of weights."""
    if dtype == tl.float16:
        most: tl.constexpr = 65504.0
    elif dtype == tl.bfloat16:
        most: tl.constexpr = BFLOAT16_MAX
    else:
        most: tl.constexpr = FLOAT_MAX
    if dtype != tl.float16:
        acc *= 2.0  # V was halved
    out = tl.clamp(acc * (1.0 / row_sum), -most, most, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(row_sum != 0, out, 0.0).to(dtype)


@triton.jit
def _lse(m, row_sum, factor, shift: tl.constexpr):
    """The logarithm of the sum of exponentials of all scores."""
    score = tl.minimum(tl.maximum(m * factor, -FLOAT_MAX), FLOAT_MAX)
    return tl.where(row_sum != 0, (score + tl.log2(row_sum) + shift) * LN_2, float("-inf"))


@triton.jit
def fused_attention_split(
    Out,
    Lse,
    Q,
    K,
    V,
    q_lengths,
    kv_lengths,
    Partial,
    Statistics,
    sm_scale,
    softcap,
    batch_size,
    num_heads,
    num_kv_heads,
    q_len,
    kv_len,
    head_size,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    out_stride_b,
    out_stride_h,
    out_stride_s,
    window_left,
    window_right,
    bottom_right,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr = "tf32x3",
    PREFETCH: tl.constexpr = 0,
    PDL: tl.constexpr = False,
):
    """Grid: (splits * tiles, a, b), a * b at least batch_size * num_kv_heads, tiles of BLOCK_M of the q_len * group
    queries that share a key head. Writes Partial and Statistics, and Out and Lse are the other kernel's; but if splits
    is 1, Out and Lse, and there is no other.

    The first PREFETCH keys, a power of two, are asked for before it waits for the queries.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
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
    in_columns = columns < head_size

    q_n = _length(q_lengths, batch, q_len)
    kv_n = _length(kv_lengths, batch, kv_len)
    diagonal = tl.where(bottom_right != 0, kv_n - q_n, 0)
    oldest, newest = _bounds(i, diagonal, q_n, kv_n, window_left, window_right)
    begin = tl.min(tl.where(newest >= oldest, oldest, kv_n), 0)
    end = tl.max(newest, 0) + 1
    # Whole blocks for every split but the last, so that only the ends of the range are masked by more than the window.
    span = ((tl.maximum(end - begin, 0) + BLOCK_N - 1) // BLOCK_N + splits - 1) // splits * BLOCK_N
    end = tl.minimum(end, tl.minimum(begin.to(tl.int64) + (split + 1).to(tl.int64) * span, kv_n).to(tl.int32))
    begin = tl.minimum(begin.to(tl.int64) + split.to(tl.int64) * span, kv_n).to(tl.int32)

    wide_batch = batch.to(tl.int64)
    K += wide_batch * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    V += wide_batch * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    k_stride = tl.cast(k_stride_s, tl.int64)
    v_stride = tl.cast(v_stride_s, tl.int64)
    q_rows = wide_batch * q_stride_b + head.to(tl.int64) * q_stride_h + i.to(tl.int64) * q_stride_s
    in_queries = (i < q_n)[:, None] & in_columns[None, :]
    q = tl.load(Q + q_rows[:, None] + columns[None, :], mask=in_queries, other=0.0)
    if PREFETCH:
        first_keys = begin + tl.arange(0, PREFETCH)
        _prefetch(K, first_keys, k_stride, end, head_size, BLOCK_D)
        _prefetch(V, first_keys, v_stride, end, head_size, BLOCK_D)
    if sm_scale < 0:
        q = -q
    scale = tl.minimum(tl.abs(sm_scale) * LOG2_E, FLOAT_MAX)
    # With a soft cap the score is softcap * tanh(bend * q . k), without one scale * q . k.
    bend = tl.where(softcap > 0, tl.minimum(tl.abs(sm_scale) / softcap, FLOAT_MAX), 0.0)
    factor = tl.where(softcap > 0, bend, scale)
    if WIDE:
        q, undo = _normalise_rows(q)
        factor = tl.minimum(factor * undo * 8192.0, FLOAT_MAX)
    else:
        factor = tl.zeros([BLOCK_M], tl.float32) + factor
    last_factor = tl.where(softcap > 0, tl.minimum(softcap * LOG2_E, FLOAT_MAX), factor)

    keys = tl.arange(0, BLOCK_N)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        key = start + keys
        in_block = (key < end)[:, None] & in_columns[None, :]
        k = tl.load(K + key.to(tl.int64)[:, None] * k_stride + columns[None, :], mask=in_block, other=0.0)
        v = tl.load(V + key.to(tl.int64)[:, None] * v_stride + columns[None, :], mask=in_block, other=0.0)
        if WIDE:
            k = (k.to(tl.float32) * 0.5).to(k.dtype)
            v = (v.to(tl.float32) * 0.5).to(v.dtype)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if softcap > 0:
            qk = tanh(qk * factor[:, None])
        visible = (key[None, :] >= oldest[:, None]) & (key[None, :] <= newest[:, None]) & (key < end)[None, :]
        m_new = tl.maximum(m, tl.max(tl.where(visible, qk, LOWEST), 1))
        p = tl.exp2(tl.where(visible, (qk - m_new[:, None]) * last_factor[:, None] - shift, float("-inf")))
        alpha = tl.exp2((m - m_new) * last_factor)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new

    queries = tl.cast(batch_size, tl.int64) * num_heads * q_len
    query = (wide_batch * num_heads + head) * q_len + i
    if splits == 1:  # there is nothing to combine
        rows = wide_batch * out_stride_b + head.to(tl.int64) * out_stride_h + i.to(tl.int64) * out_stride_s
        out = _finished(acc, row_sum[:, None], Out.dtype.element_ty)
        tl.store(Out + rows[:, None] + columns[None, :], out, mask=(i < q_len)[:, None] & in_columns[None, :])
        if tl.cast(Lse, tl.int64) != 0:
            tl.store(Lse + query, _lse(m, row_sum, last_factor, shift), mask=i < q_len)
    else:
        place = query * splits + split
        partial = place[:, None] * BLOCK_D + columns[None, :]
        tl.store(Partial + partial, acc, mask=(i < q_len)[:, None] & in_columns[None, :])
        tl.store(Statistics + place, m, mask=i < q_len)
        tl.store(Statistics + splits * queries + place, row_sum, mask=i < q_len)
        if split == 0:
            tl.store(Statistics + 2 * splits * queries + query, last_factor, mask=i < q_len)


@triton.jit
def fused_attention_combine(
    Out,
    Lse,
    Q,
    K,
    V,
    q_lengths,
    kv_lengths,
    Partial,
    Statistics,
    sm_scale,
    softcap,
    batch_size,
    num_heads,
    num_kv_heads,
    q_len,
    kv_len,
    head_size,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    out_stride_b,
    out_stride_h,
    out_stride_s,
    window_left,
    window_right,
    bottom_right,
    splits,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Grid: (batch_size * num_heads * q_len): one program a query, which takes SPLITS partial results at a time. Of one
    part there are none, and nothing is written: the first launch has stored Out."""
    WIDE: tl.constexpr = Out.dtype.element_ty != tl.float16
    shift: tl.constexpr = WIDE_SHIFT if WIDE else 0.0
    program = tl.program_id(0).to(tl.uint32)  # 32 bits, in which a division costs a fraction of that in 64
    row = program // tl.cast(q_len, tl.uint32)
    batch = row // tl.cast(num_heads, tl.uint32)
    i = (program - row * tl.cast(q_len, tl.uint32)).to(tl.int64)
    head = (row - batch * tl.cast(num_heads, tl.uint32)).to(tl.int64)
    Out += batch.to(tl.int64) * out_stride_b + head * out_stride_h + i * out_stride_s
    query = program.to(tl.int64)
    queries = tl.cast(batch_size, tl.int64) * num_heads * q_len
    if query >= queries:
        return
    maxima = Statistics + query * splits
    sums = maxima + queries * splits
    factors = Statistics + 2 * queries * splits
    Partial += query * splits * BLOCK_D
    columns = tl.arange(0, BLOCK_D)

    # There is one turn, the last. Before it, while the other kernel may still run, the first programs take one that
    # reads and writes nothing but fetches all the code. To write the turns out twice would defeat that, so their number
    # must not be a constant: `last` is 1.
    last = tl.minimum(splits, 1)
    for turn in range(last - (program < WARMING).to(tl.int32) if PDL else last, last + 1):
        counts = turn == last
        if PDL:
            if counts:
                tl.extra.cuda.gdc_wait()
        counts = counts & (splits > 1)  # of one part Out and Lse are there
        held_splits = tl.where(counts, splits, 0)
        in_columns = columns < tl.where(counts, head_size, 0)
        factor = tl.load(factors + query, mask=counts, other=0.0)
        m = LOWEST
        row_sum = 0.0
        acc = tl.zeros([BLOCK_D], tl.float32)
        for first in range(0, splits, SPLITS):
            split = first + tl.arange(0, SPLITS)
            held = split < held_splits
            split_m = tl.load(maxima + split, mask=held, other=LOWEST)
            split_sum = tl.load(sums + split, mask=held, other=0.0)
            partial = split.to(tl.int64)[:, None] * BLOCK_D + columns[None, :]
            split_acc = tl.load(Partial + partial, mask=held[:, None] & in_columns[None, :], other=0.0)
            m_new = tl.maximum(m, tl.max(split_m, 0))
            weight = tl.exp2((split_m - m_new) * factor)
            alpha = tl.exp2((m - m_new) * factor)
            row_sum = row_sum * alpha + tl.sum(weight * split_sum, 0)
            acc = acc * alpha + tl.sum(weight[:, None] * split_acc, 0)
            m = m_new
        tl.store(Out + columns, _finished(acc, row_sum, Out.dtype.element_ty), mask=in_columns)
        if tl.cast(Lse, tl.int64) != 0:
            tl.store(Lse + query, _lse(m, row_sum, factor, shift), mask=counts)
