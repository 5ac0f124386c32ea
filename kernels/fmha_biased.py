"""Attention with an additive bias, a mask, sinks, values of another head size, and functions that users write.

What fmha_fwd.py computes, and besides, for query i and key j of sequence b and head h:

    score = sm_scale * q . k, with a soft cap as there
    score += bias[b, h, i, j]
    score = SCORE(score, b, h, i, j)

Key j is seen where fmha_fwd.py says so and mask[b, h, i, j] is true and SEEN(b, h, i, j) is, and neither bias nor SCORE
made the score minus infinity. A sink adds exp(sinks[h]) to the sum of each row, hence to its log-sum-exp, but no value.
A row that sees nothing is zeros with a log-sum-exp of minus infinity, or of the sink. NaN and infinity in what a row
does not see have no effect on it. (ONNX's Attention, opset 23, adds its mask after the soft cap, too; sinks are those
of Xiao et al., "Efficient Streaming Language Models with Attention Sinks", as gpt-oss has them.)

The method is fmha_fwd.py's: a hot loop in a range where plain float32 is safe, and a second computation
(biased_safe.py) of tiles that turn out to have left it: those with a score beyond FAST_LIMIT, with a row of which no
score is above -2**20 although keys are seen, or with NaN.
"""

import triton
import triton.language as tl
from biased_safe import attend_biased_safely
from biased_scores import Tile, biased
from fmha_triton import FAST_LIMIT, FLOAT_MAX, LOG2_E, SAFE_BLOCK_N, WIDE_SHIFT
from fwd_rows import bent_by, keys_of, load_queries, load_rows, store_lse, store_rows
from key_blocks import flag_blocks, flags_at, list_at, splits_of, write_list
from ragged import find_sequence

# The least factor of q . k inside tanh, as in fmha_fwd.py.
LEAST_BEND: tl.constexpr = tl.constexpr(7.888609052210118e-31)


@triton.jit
def _attend(
    acc, row_sum, m, q, K, V, k_stride, v_stride, scale, bend, shift, tile, inputs, begin, count, left, skipped, end,
    head_size, v_head_size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    SCORE: tl.constexpr, SEEN: tl.constexpr, PRECISION: tl.constexpr, entries=None, step=None,
    PIECES: tl.constexpr = 1,
):  # fmt: skip
    """The hot loop, over `count` blocks of keys from `begin` on. After `left` blocks the MASKED one skips some keys.
    With a list it is over the blocks that `entries` names, of which each is PIECES of these.

    The state: m is the running maximum in units of log2, plus shift, minus infinity as long as no key was seen; weights
    are exp2(score * LOG2_E - m), at most 2**-shift; row_sum is their sum; acc is the sum of weight * v.
    """
    keys = tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    in_columns = tl.arange(0, BLOCK_D) < head_size
    in_v_columns = tl.arange(0, BLOCK_V) < v_head_size
    k_offsets = keys[:, None] * k_stride + tl.arange(0, BLOCK_D)[None, :]
    v_offsets = keys[:, None] * v_stride + tl.arange(0, BLOCK_V)[None, :]
    for index in range(0, count):
        start = begin + index * BLOCK_N
        if entries is not None:
            start = tl.load(entries + index // PIECES * step) * (PIECES * BLOCK_N) + index % PIECES * BLOCK_N
        elif MASKED:
            start += tl.where(index < left, 0, skipped)
        in_rows = start + keys < end
        k = load_rows(K + start.to(tl.int64) * k_stride, k_offsets, in_rows, in_columns, MASKED)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP == "always":
            score = bent_by(score, bend, K.dtype.element_ty != tl.float16)
        elif SOFTCAP == "any":
            if bend > 0:
                score = bent_by(score, bend, K.dtype.element_ty != tl.float16)
        score = biased(score * scale, tile, inputs, rows, start + keys, MASKED, BIAS, MASK, SCORE, SEEN)
        m_new = tl.maximum(m, tl.max(score, 1) * LOG2_E + shift)
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(score * LOG2_E - m_finite[:, None])
        alpha = tl.exp2(m - m_finite)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        v = load_rows(V + start.to(tl.int64) * v_stride, v_offsets, in_rows, in_v_columns, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    return acc, row_sum, m


@triton.jit
def _is_given(pointer):
    """Whether a pointer is not null, [1, 1]: under the interpreter, a block and a scalar make no mask together."""
    return tl.zeros([1, 1], tl.int64) + tl.cast(pointer, tl.int64) != 0


@triton.jit
def _count_of(pointer, other, stride, count):
    """Queries or keys of a bias or mask: no limit where there is none, or where it has the same for all."""
    given = (tl.cast(pointer, tl.int64) != 0) | (tl.cast(other, tl.int64) != 0)
    return tl.where(given & (stride != 0), count, 2147483647)


@triton.jit
def _load_sink(Sinks, SinksFp32, head):
    """The sink of a head in units of log2, minus infinity where there are none."""
    own = tl.load(Sinks + head, mask=tl.cast(Sinks, tl.int64) != 0, other=float("-inf")).to(tl.float32)
    wide = tl.load(SinksFp32 + head, mask=tl.cast(SinksFp32, tl.int64) != 0, other=float("-inf"))
    sink = tl.where(tl.cast(Sinks, tl.int64) != 0, own, wide) * LOG2_E
    return tl.minimum(sink, FLOAT_MAX, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def fused_attention_biased(
    Out, Lse, Q, K, V, q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv, Bias, BiasFp32, Mask, Sinks, SinksFp32,
    sm_scale, softcap, batch_size, num_heads, num_kv_heads, q_len, kv_len, head_size, v_head_size, q_stride_b,
    q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s, out_stride_b,
    out_stride_h, out_stride_s, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, mask_stride_b,
    mask_stride_h, mask_stride_q, mask_stride_k, bias_rows, bias_columns, mask_rows, mask_columns, window_left,
    window_right, bottom_right, ragged, inputs,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr = "any", BIAS: tl.constexpr = "any", MASK: tl.constexpr = "any",
    SCORE: tl.constexpr = None, SEEN: tl.constexpr = None, BOUNDS: tl.constexpr = None,
    PRECISION: tl.constexpr = "tf32x3", SEGMENTS: tl.constexpr = 128, Blocks=None, list_batches=None, list_heads=None,
    LIST: tl.constexpr = "none", LIST_M: tl.constexpr = 128, LIST_N: tl.constexpr = 128,
):  # fmt: skip
    """Grid, dense and ragged tensors, lengths and scalars: as fused_attention_forward of fmha_fwd.py.

    V and Out have v_head_size elements a row, at most BLOCK_V. Bias (Q's dtype) or BiasFp32, and Mask (bytes, not 0 is
    true), are [batch, heads, queries, keys] by strides in elements, 0 for an axis that is broadcast; of a ragged batch
    [sequences, heads, longest, longest], by the positions within a sequence. An axis that is not broadcast has as many
    queries as bias_rows, mask_rows, keys as bias_columns, mask_columns: what lies past them is not read, but is 0 of a
    bias, and not seen. Sinks (Q's dtype) or SinksFp32 are
    [num_heads]. Each may be null; of Bias and BiasFp32, and of Sinks and SinksFp32, at most one is not.

    SOFTCAP, BIAS, MASK: "never" and "always" (of BIAS "own": by Bias) are promises, "any" decides at run time.

    SCORE(score, batch, head, query, key, *inputs) gives the score, SEEN(batch, head, query, key, *inputs) whether a key
    is seen, for blocks [queries, keys]; query [queries, 1] and key [1, keys] are int32 positions. That of a query is
    its index in the sequence, plus kv_n - q_n with bottom_right, at least 0. Both are called with positions of the
    sequence only, also for what no query is.

    LIST: "flag" and then "write" compute no attention but, with tiles of LIST_M queries and LIST_N keys, the lists of
    key_blocks.py in Blocks, for list_batches sequences and list_heads heads; the grid has as many, and `splits_of` for
    each tile if "flag". "read" visits the blocks on them.
    BOUNDS(batch, head, first_query, last_query, kv_len, *inputs) bounds what a tile of queries sees by SEEN: first key
    and end, and if it likes, first key and end of those that all its queries see. inputs: a tuple of pointers and
    numbers.
    """
    WIDE: tl.constexpr = Q.dtype.element_ty != tl.float16
    shift: tl.constexpr = WIDE_SHIFT if WIDE else 0.0
    if inputs is None:
        inputs = ()
    # As a constant, 1 has no .to; and offsets can pass 2**31 elements.
    q_len = tl.cast(q_len, tl.int32)
    kv_len = tl.cast(kv_len, tl.int32)
    q_stride_s = tl.cast(q_stride_s, tl.int64)
    k_stride_s = tl.cast(k_stride_s, tl.int64)
    v_stride_s = tl.cast(v_stride_s, tl.int64)
    out_stride_s = tl.cast(out_stride_s, tl.int64)
    bias_stride_q = tl.cast(bias_stride_q, tl.int64)
    bias_stride_k = tl.cast(bias_stride_k, tl.int64)
    mask_stride_q = tl.cast(mask_stride_q, tl.int64)
    mask_stride_k = tl.cast(mask_stride_k, tl.int64)

    head = tl.program_id(1).to(tl.uint32) + tl.program_id(2).to(tl.uint32) * tl.num_programs(1).to(tl.uint32)
    LISTING: tl.constexpr = LIST == "flag" or LIST == "write"
    if LISTING:
        num_heads, num_kv_heads = list_heads, list_heads
    batch = (head // tl.cast(num_heads, tl.uint32)).to(tl.int32)
    if LISTING:
        if batch >= list_batches:
            return
    elif batch >= tl.where(ragged != 0, 1, batch_size):
        return
    head = (head % tl.cast(num_heads, tl.uint32)).to(tl.int32)
    kv_head = head // (num_heads // num_kv_heads)
    program = tl.program_id(0)
    split = 0
    if LIST == "flag":
        splits = splits_of(kv_len, LIST_N)
        split = program % splits
        program = program // splits
    elif window_right >= 0:
        program = tl.num_programs(0) - 1 - program  # the longest rows first, so that the last to finish are short

    sequence = batch
    rows_left = program * 0
    if ragged != 0:
        sequence, first_row, q_start, q_n, kv_start, kv_n = find_sequence(
            cu_seqlens_q, cu_seqlens_kv, program, batch_size, q_len, kv_len, BLOCK_M, SEGMENTS
        )
        out_rows = q_n - first_row
        rows_left = tl.where((sequence >= 0) & (sequence < batch_size), out_rows, 0)
    else:
        first_row = program * BLOCK_M
        q_start = program * 0
        kv_start = program * 0
        q_n = tl.load(q_lengths + batch, mask=tl.cast(q_lengths, tl.int64) != 0, other=q_len)
        q_n = tl.minimum(tl.maximum(q_n, 0), q_len)
        kv_n = tl.load(kv_lengths + batch, mask=tl.cast(kv_lengths, tl.int64) != 0, other=kv_len)
        kv_n = tl.minimum(tl.maximum(kv_n, 0), kv_len)
        out_rows = q_len - first_row
        rows_left = q_n - first_row
    if out_rows <= 0:
        return

    # Keys that the first query sees, and the limits of the tile, as in fmha_fwd.py.
    aligned = tl.where(bottom_right != 0, kv_n - q_n, 0)
    diagonal = first_row.to(tl.int64) + aligned
    oldest = tl.where(window_left >= 0, diagonal - window_left, -BLOCK_M)
    oldest = tl.minimum(tl.maximum(oldest, -BLOCK_M), kv_n)
    newest = tl.where(window_right >= 0, diagonal + window_right, kv_n)
    newest = tl.minimum(tl.maximum(newest, -BLOCK_M), kv_n)
    height = tl.minimum(tl.maximum(rows_left, 1), BLOCK_M)
    begin = tl.maximum(oldest, 0).to(tl.int32)
    end = tl.minimum(newest + height, kv_n).to(tl.int32)
    full_begin = tl.maximum(oldest + height - 1, 0).to(tl.int32)
    full_end = tl.minimum(newest + 1, kv_n).to(tl.int32)
    rows = tl.arange(0, BLOCK_M)
    # A query that does not exist passes for the last one that does, and a position before the first key for that.
    query = tl.maximum(tl.minimum(first_row + rows, q_n - 1) + aligned, 0)
    if BOUNDS is not None:
        first_query = tl.maximum(tl.minimum(first_row, q_n - 1) + aligned, 0)
        last_query = tl.maximum(tl.minimum(first_row + BLOCK_M, q_n) - 1 + aligned, 0)
        bounds = BOUNDS(sequence, head, first_query, last_query, kv_n, *inputs)
        begin = tl.maximum(begin, tl.cast(bounds[0], tl.int32))
        end = tl.minimum(end, tl.cast(bounds[1], tl.int32))
        if len(bounds) == 4:
            full_begin = tl.maximum(full_begin, tl.cast(bounds[2], tl.int32))
            full_end = tl.minimum(full_end, tl.cast(bounds[3], tl.int32))
        else:
            full_end = full_begin
    elif SEEN is not None:
        full_end = full_begin
    # In a block without masks all keys are inside of the tensors, too.
    bias_keys = _count_of(Bias, BiasFp32, bias_stride_k, bias_columns)
    mask_keys = _count_of(Mask, Mask, mask_stride_k, mask_columns)
    if BIAS != "never":
        full_end = tl.minimum(full_end, bias_keys)
    if MASK != "never":
        full_end = tl.minimum(full_end, mask_keys)
    begin = tl.minimum(begin, kv_n) // BLOCK_N * BLOCK_N  # so that blocks of a bias are loaded 16 bytes at a time
    if (rows_left <= 0) | (end <= begin):
        end = begin
    row_first, row_last = keys_of(rows, oldest, newest, end)
    # In blocks from `begin` on: `left` with masks, then full ones up to `right`, then with masks again.
    blocks = (end - begin + BLOCK_N - 1) // BLOCK_N
    left = tl.minimum(tl.maximum(full_begin - begin + BLOCK_N - 1, 0) // BLOCK_N, blocks)
    right = tl.minimum(tl.maximum(tl.maximum(full_end - begin, 0) // BLOCK_N, left), blocks)

    wide_batch = batch.to(tl.int64)
    wide_head = head.to(tl.int64)
    Q += wide_batch * q_stride_b + wide_head * q_stride_h + (q_start.to(tl.int64) + first_row) * q_stride_s
    K += wide_batch * k_stride_b + kv_head.to(tl.int64) * k_stride_h + kv_start.to(tl.int64) * k_stride_s
    V += wide_batch * v_stride_b + kv_head.to(tl.int64) * v_stride_h + kv_start.to(tl.int64) * v_stride_s
    bias_start = sequence.to(tl.int64) * bias_stride_b + wide_head * bias_stride_h + first_row * bias_stride_q
    mask_start = sequence.to(tl.int64) * mask_stride_b + wide_head * mask_stride_h + first_row * mask_stride_q
    tile = Tile(
        Bias + bias_start, BiasFp32 + bias_start, Mask + mask_start, _is_given(Bias), _is_given(BiasFp32),
        _is_given(Mask), bias_stride_q, bias_stride_k, mask_stride_q, mask_stride_k,
        tl.minimum(rows_left, _count_of(Bias, BiasFp32, bias_stride_q, bias_rows) - first_row),
        tl.minimum(end, bias_keys),
        tl.minimum(rows_left, _count_of(Mask, Mask, mask_stride_q, mask_rows) - first_row),
        tl.minimum(end, mask_keys),
        row_first, row_last, sequence, head, query, kv_n - 1,
    )  # fmt: skip
    if LIST != "none":
        entries, capacity, number, tiles = list_at(
            Blocks, batch, head, list_batches, list_heads, sequence, q_start, first_row, q_len, kv_len, batch_size,
            ragged, LIST_M, LIST_N,
        )  # fmt: skip
    if LISTING:
        flags = flags_at(Blocks, capacity, number, tiles, list_batches, list_heads)
        if LIST == "flag":
            limit = tl.minimum(tl.minimum(end, bias_keys), mask_keys)
            flag_blocks(
                flags, capacity, split, splits, begin, end, limit, tile, inputs, rows, rows_left, SEEN, BLOCK_M, BLOCK_N
            )
        else:
            write_list(entries, flags, capacity, LIST_N)
        return
    q = load_queries(Q, q_stride_s, rows_left, head_size, 0, sm_scale, BLOCK_M, BLOCK_D)
    # The score is scale * q . k, or scale * tanh(bend * q . k).
    scale = tl.abs(sm_scale)
    bend = softcap * 0.0
    if SOFTCAP != "never" and softcap > 0:
        bend = tl.minimum(tl.maximum(scale / softcap, LEAST_BEND), FLOAT_MAX)
        scale = tl.minimum(softcap, scale * (1.0 / LEAST_BEND))

    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if LIST == "read":
        # Whole blocks are seen by the mask, too, which is not read again.
        pieces: tl.constexpr = LIST_N // BLOCK_N
        whole = entries + 1 + capacity
        acc, row_sum, m = _attend(
            acc, row_sum, m, q, K, V, k_stride_s, v_stride_s, scale, bend, shift, tile, inputs, begin,
            tl.load(entries + 1) * pieces, 0, 0, end, head_size, v_head_size, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
            False, SOFTCAP, BIAS, "never", SCORE, SEEN, PRECISION, whole, -1, pieces,
        )  # fmt: skip
        acc, row_sum, m = _attend(
            acc, row_sum, m, q, K, V, k_stride_s, v_stride_s, scale, bend, shift, tile, inputs, begin,
            tl.load(entries) * pieces, 0, 0, end, head_size, v_head_size, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, True,
            SOFTCAP, BIAS, MASK, SCORE, SEEN, PRECISION, entries + 2, 1, pieces,
        )  # fmt: skip
    else:
        acc, row_sum, m = _attend(
            acc, row_sum, m, q, K, V, k_stride_s, v_stride_s, scale, bend, shift, tile, inputs,
            begin + left * BLOCK_N, right - left, 0, 0, end, head_size, v_head_size, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
            False, SOFTCAP, BIAS, MASK, SCORE, SEEN, PRECISION,
        )  # fmt: skip
        acc, row_sum, m = _attend(
            acc, row_sum, m, q, K, V, k_stride_s, v_stride_s, scale, bend, shift, tile, inputs, begin,
            blocks - (right - left), left, (right - left) * BLOCK_N, end, head_size, v_head_size, BLOCK_M, BLOCK_N,
            BLOCK_D, BLOCK_V, True, SOFTCAP, BIAS, MASK, SCORE, SEEN, PRECISION,
        )  # fmt: skip
    # Of a row that sees nothing m is minus infinity, and row_sum is zero unless q . k was NaN. Elsewhere row_sum is NaN
    # where a dot product overflowed or the input holds NaN, and so are sums where V does, or tf32 rounded it up.
    in_range = (tl.abs(m - shift) < FAST_LIMIT) & (row_sum > 0) & (tl.sum(acc * 0.0, 1) == 0)
    in_range |= (m == float("-inf")) & (row_sum == 0)
    unsafe_rows = tl.sum(((rows < rows_left) & ~in_range).to(tl.int32), 0)
    if unsafe_rows != 0:
        # Zero, but the compiler cannot know: see fmha_fwd.py.
        zero = (tl.minimum(tl.maximum(unsafe_rows, 0), 1) - 1) * BLOCK_D
        acc, row_sum, m = attend_biased_safely(
            Q, K, V, q_stride_s, k_stride_s, v_stride_s, sm_scale, scale, bend, shift, zero, tile, inputs, rows_left,
            begin, end, head_size, v_head_size, BLOCK_M, SAFE_BLOCK_N, BLOCK_D, BLOCK_V, SOFTCAP, BIAS, MASK, SCORE,
            SEEN, PRECISION,
        )  # fmt: skip
    sink = _load_sink(Sinks, SinksFp32, head)
    sees = (rows < rows_left) & (m != float("-inf"))
    top = tl.maximum(m, sink + shift, propagate_nan=tl.PropagateNan.ALL)
    top = tl.where(top == float("-inf"), 0.0, top)
    alpha = tl.exp2(m - top)
    row_sum = tl.where(sees, row_sum * alpha, 0.0) + tl.exp2(sink - top)
    counts = (rows < rows_left) & (row_sum != 0)
    out = acc * (alpha * (1.0 / row_sum))[:, None]
    token = q_start.to(tl.int64) + first_row
    Out += wide_batch * out_stride_b + wide_head * out_stride_h + token * out_stride_s
    store_rows(Out, out, rows, tl.arange(0, BLOCK_V), out_rows, v_head_size, out_stride_s, sees)
    store_lse(Lse, (wide_batch * num_heads + head) * q_len + token, top, row_sum, rows, out_rows, counts)
