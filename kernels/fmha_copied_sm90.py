"""Attention of one query a head over many keys (decoding) for Hopper (sm_90) in Gluon, that copies K and V.

The same kernel as fmha_decode_sm90.py but for how K and V come to shared memory: each thread copies its 16 bytes of a
row (cp.async) instead of having TMA fetch blocks. TMA gives rows of 128 bytes, the widest that wgmma reads, at 4.0 to
4.2 TB/s on an H200, copies at 4.5 (kernels/NOTES.md). A program that has all keys of its key head stores what it found;
those of a cluster combine theirs as there.
"""

from fmha_decode_sm90 import (
    BFLOAT16_MAX,
    HEADS,
    RANKS,
    STATISTICS,
    WIDE_SHIFT,
    _combine,
    _normalise,
    _prepare,
    _room_asm,
)
from sm90_slow import FLOAT_MAX, LN_2, LOG2_E, LOWEST
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

BY_HAND = ("fences", "layouts")  # what Triton has passes for, see pyfmha/aot/passes.py


@gluon.jit
def _fetch(rows, shared, stage, key, end):
    """Ask for a block of K or V; keys from `end` on, which may be NaN, become zeros."""
    base, keys, stride, columns, inside = rows
    here = base + (key + keys).to(gl.int64)[:, None] * stride + columns[None, :]
    async_copy.async_load(shared.index(stage), here, mask=(key + keys < end)[:, None] & inside[None, :])
    async_copy.commit_group()


@gluon.jit
def fmha_decode_sm90(
    Out,
    Lse,
    Q,
    K,
    V,
    q_lengths,
    kv_lengths,
    cu_seqlens_q,
    cu_seqlens_kv,
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
    ragged,
    BLOCK_D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Grid: (ranks, num_kv_heads * cdiv(num_heads / num_kv_heads, 8), batch_size), ranks 1, 2, 4 or 8: a cluster.

    q_len is 1. q_lengths, ragged batches and softcap are not served.
    """
    dtype: gl.constexpr = K.dtype.element_ty
    gl.static_assert(16 * WARPS <= BLOCK_D, "two warps would have the same rows of the output, and send them twice")
    WIDE: gl.constexpr = dtype == gl.bfloat16
    shift: gl.constexpr = WIDE_SHIFT if WIDE else 0.0
    rank = gl.program_id(0)
    ranks = gl.num_programs(0)
    halvings = (ranks > 1).to(gl.int32) + (ranks > 2).to(gl.int32) + (ranks > 4).to(gl.int32)
    batch = gl.program_id(2)
    kv_head = gl.program_id(1)
    # A division that leaves nothing, as an integer and for integers below 2**21, is one of floats; it takes less time.
    group = (num_heads.to(gl.float32) / num_kv_heads.to(gl.float32) + 0.5).to(gl.int32)
    first_head = 0
    if group > HEADS:
        parts = (group + HEADS - 1) // HEADS
        first_head = kv_head % parts * HEADS
        kv_head = kv_head // parts

    # The queries first: asked for after K and V, they would come after them.
    BY_ROW: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [WARPS, 1], [1, 0])
    q_rows = first_head + gl.arange(0, HEADS, layout=gl.SliceLayout(1, BY_ROW))
    q_columns = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, BY_ROW))
    q_place = batch.to(gl.int64) * q_stride_b + (kv_head * group + q_rows).to(gl.int64) * q_stride_h
    q = gl.load(
        Q + q_place[:, None] + q_columns[None, :],
        mask=(q_rows < group)[:, None] & (q_columns < head_size)[None, :],
        other=0.0,
    )

    kv_n = kv_len
    if kv_lengths.to(gl.int64) != 0:
        kv_n = gl.minimum(gl.maximum(gl.load(kv_lengths + batch), 0), kv_len)
    begin = 0
    end = kv_n
    if (window_left & window_right) != -1:
        diagonal = gl.where(bottom_right != 0, kv_n - 1, 0).to(gl.int64)
        if window_right >= 0:
            end = gl.maximum(gl.minimum(diagonal + window_right + 1, kv_n), 0).to(gl.int32)
        if window_left >= 0:
            begin = gl.minimum(gl.maximum(diagonal - window_left, 0), end).to(gl.int32)
    blocks = (end - begin + (BLOCK_N - 1)) // BLOCK_N
    share = (blocks + ranks - 1) >> halvings
    count = gl.minimum(gl.maximum(blocks - rank * share, 0), share)
    begin += rank * share * BLOCK_N

    BLOCK: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_D], dtype)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], BLOCK)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], BLOCK)
    own = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, BY_ROW))
    in_head = q_columns < head_size
    K += batch.to(gl.int64) * k_stride_b + kv_head.to(gl.int64) * k_stride_h
    V += batch.to(gl.int64) * v_stride_b + kv_head.to(gl.int64) * v_stride_h
    k_rows = (K, own, k_stride_s, q_columns, in_head)
    v_rows = (V, own, v_stride_s, q_columns, in_head)
    last = gl.minimum(begin + count * BLOCK_N, end)
    for s in gl.static_range(STAGES):
        _fetch(k_rows, k_smem, s, begin + s * BLOCK_N, last)
        _fetch(v_rows, v_smem, s, begin + s * BLOCK_N, last)

    ONE_EACH: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    thread = gl.arange(0, 32 * WARPS, layout=ONE_EACH)
    room = gl.inline_asm_elementwise(_room_asm(BLOCK_D), "=r,r", [rank], dtype=gl.int32, is_pure=False, pack=1)
    barrier = room + 4 * (BLOCK_D * HEADS + RANKS * STATISTICS)
    if ranks > 1:
        same = thread * 0
        _prepare(same + barrier, same + 4 * (BLOCK_D * HEADS + ranks * STATISTICS), thread)
    if sm_scale < 0:
        q = -q
    scale = gl.minimum(gl.abs(sm_scale) * LOG2_E, FLOAT_MAX)
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, HEADS, 16]
    )
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    if WIDE:
        q, undo = _normalise(q)
        factor = gl.convert_layout(gl.minimum(gl.minimum(scale * undo, FLOAT_MAX) * 4096.0, FLOAT_MAX), COLUMN)
    else:
        factor = gl.full([HEADS], scale, gl.float32, layout=COLUMN)
    q_smem = gl.allocate_shared_memory(
        dtype, [HEADS, BLOCK_D], gl.NVMMASharedLayout.get_default_for([HEADS, BLOCK_D], dtype)
    )
    q_smem.store(q)
    p_smem = gl.allocate_shared_memory(
        dtype, [HEADS, BLOCK_N], gl.NVMMASharedLayout.get_default_for([HEADS, BLOCK_N], dtype)
    )

    keys = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, S_LAYOUT))
    m = gl.full([HEADS], LOWEST, gl.float32, layout=COLUMN)
    sums = gl.zeros([BLOCK_N, HEADS], gl.float32, layout=S_LAYOUT)  # one for each thread and row
    acc = gl.zeros([BLOCK_D, HEADS], gl.float32, layout=S_LAYOUT)
    no_scores = gl.zeros([BLOCK_N, HEADS], gl.float32, layout=S_LAYOUT)
    for turn in range(count):
        stage = turn % STAGES
        left = end - begin - turn * BLOCK_N
        visible = (keys < left)[:, None]
        async_copy.wait_group(2 * STAGES - 1)
        fence_async_shared()  # at first for the queries, too
        gl.barrier()
        k = k_smem.index(stage)
        scores = warpgroup_mma(k, q_smem.permute((1, 0)), no_scores, use_acc=False)
        m_new = gl.maximum(m, gl.max(gl.where(visible, scores, LOWEST), 0))
        p = gl.exp2(gl.where(visible, (scores - m_new[None, :]) * factor[None, :] - shift, float("-inf")))
        alpha = gl.exp2((m - m_new) * factor)
        m = m_new
        sums = sums * alpha[None, :] + p
        acc = acc * alpha[None, :]
        p_smem.permute((1, 0)).store(p.to(dtype))
        async_copy.wait_group(2 * STAGES - 2)
        v = v_smem.index(stage)
        fence_async_shared()
        gl.barrier()
        acc = warpgroup_mma(v.permute((1, 0)), p_smem.permute((1, 0)), acc)
        gl.barrier()
        _fetch(k_rows, k_smem, stage, begin + (turn + STAGES) * BLOCK_N, last)
        _fetch(v_rows, v_smem, stage, begin + (turn + STAGES) * BLOCK_N, last)

    found = (acc, m, gl.sum(sums, 0), factor)
    heads = (batch, kv_head * group, first_head, group, num_heads, head_size)
    output = (Out, Lse, out_stride_b, out_stride_h)
    if ranks == 1:
        _store(found, heads, output, shift, BLOCK_D)
    else:
        _combine(found, (thread, room, barrier), (rank, ranks, halvings), heads, output, shift, BLOCK_D, ONE_EACH)


@gluon.jit
def _store(found, heads, output, shift: gl.constexpr, BLOCK_D: gl.constexpr):
    """A program that has read all keys stores what it found."""
    acc, m, total, factor = found
    batch, group_head, first_head, group, num_heads, head_size = heads
    Out, Lse, out_stride_b, out_stride_h = output
    LAYOUT: gl.constexpr = acc.type.layout
    row = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(1, LAYOUT))
    column = first_head + gl.arange(0, HEADS, layout=gl.SliceLayout(0, LAYOUT))
    out = _finished(acc, total[None, :], Out.dtype.element_ty)
    head = (group_head + column).to(gl.int64)
    target = Out + batch.to(gl.int64) * out_stride_b + (head * out_stride_h)[None, :] + row[:, None]
    inside = (column < group)[None, :] & (row < head_size)[:, None]
    gl.store(target, out, mask=inside)
    if Lse.to(gl.int64) != 0:
        lse = _log_sum(m * factor, total, shift)
        gl.store(Lse + batch.to(gl.int64) * num_heads + head, lse, mask=column < group)


@gluon.jit
def _finished(acc, row_sum, dtype: gl.constexpr):
    """Sums of weight * v divided by the sums of weights."""
    most: gl.constexpr = BFLOAT16_MAX if dtype == gl.bfloat16 else 65504.0
    out = acc * (1.0 / row_sum)
    out = gl.where(out > most, most, gl.where(out < -most, -most, out))
    return gl.where(row_sum != 0, out, 0.0).to(dtype)


@gluon.jit
def _log_sum(score, row_sum, shift: gl.constexpr):
    """The logarithm of the sum of exponentials of all scores, by the largest in units of log2."""
    score = gl.minimum(gl.maximum(score, -FLOAT_MAX), FLOAT_MAX)
    return gl.where(row_sum != 0, (score + gl.log2(row_sum) + shift) * LN_2, float("-inf"))
