"""Attention of one query a head over many keys (decoding) for Hopper (sm_90) in Gluon: one launch, by a cluster.

The same function as fmha_fwd.py for dense batches of fp16 and bf16 with q_len 1, see its docstring for the arguments.
There is nothing to do but to read K and V once, as fast as memory gives them. The keys of one key head are split over
the programs of a thread-block cluster. Each has TMA fetch its part into shared memory, as many blocks at once as fit,
and combines what it found with the others' through distributed shared memory; nothing goes through global memory, and
no second launch waits for the first.

A program computes the queries of up to 8 heads that share the key head, and everything transposed: K times Q^T and V^T
times the weights, so that K and V are the 64-row operand of wgmma, which reads them where TMA has put them, and the
queries its 8 columns. As time goes into memory, all arithmetic is the safe one of fmha_fwd.py: finite input never
gives NaN or infinity.
"""

from sm90_slow import FLOAT_MAX, LN_2, LOG2_E, LOWEST, row_powers
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

BY_HAND = ("fences", "layouts")  # what Triton has passes for, see pyfmha/aot/passes.py

BFLOAT16_MAX: gl.constexpr = gl.constexpr(3.3895313892515355e38)
WIDE_SHIFT: gl.constexpr = gl.constexpr(24.0)
HEADS: gl.constexpr = gl.constexpr(8)  # of one program: the least N of wgmma
RANKS: gl.constexpr = gl.constexpr(8)  # the largest cluster that every device takes
STATISTICS: gl.constexpr = gl.constexpr(3 * 8)  # of one program: maxima, sums and factors of its heads


@gluon.constexpr_function
def _room_asm(block_d):
    """PTX that gives the address of shared memory of its own, where the programs of a cluster put their results: parts
    of the output, statistics, and the barrier that counts their bytes.

    It lies before what Triton allocates, which TMA and wgmma want to begin at a multiple of 1024 bytes.
    """
    size = (4 * (block_d * HEADS.value + RANKS.value * STATISTICS.value) + 8 + 1023) // 1024 * 1024
    return f"{{ .shared .align 1024 .b8 pyfmha_room[{size}]; mov.u32 $0, pyfmha_room; }} // $1"


@gluon.jit
def _prepare(barrier, nbytes, thread):
    """Set up the barrier for a number of bytes, and tell the cluster that this program runs."""
    asm: gl.constexpr = """
    {
        .reg .pred first;
        setp.eq.s32 first, $3, 0;
        @first mbarrier.init.shared::cta.b64 [$1], 1;
        bar.warp.sync 0xFFFFFFFF;
        @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2;
        @first fence.mbarrier_init.release.cluster;
        barrier.cluster.arrive.relaxed.aligned;
        mov.b32 $0, $3;
    }"""
    return gl.inline_asm_elementwise(asm, "=r,r,r,r", [barrier, nbytes, thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _join(thread):
    """Wait until all programs of the cluster run and have set up their barriers."""
    asm: gl.constexpr = "barrier.cluster.wait.acquire.aligned; mov.b32 $0, $1;"
    return gl.inline_asm_elementwise(asm, "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _put(address, barrier, rank, value, really):
    """Send values to addresses of the shared memory of programs of the cluster, where `really` is 1; where it is 2,
    store them at addresses of the program's own, of which the barrier learns nothing.

    Two at a time, because each store costs the barrier an update: those of a pair of columns, which a thread holds side
    by side, and which go side by side.
    """
    asm: gl.constexpr = """
    {
        .reg .pred p, own;
        .reg .u32 there, counter;
        setp.eq.s32 p, $10, 1;
        setp.eq.s32 own, $10, 2;
        mapa.shared::cluster.u32 there, $2, $6;
        mapa.shared::cluster.u32 counter, $4, $6;
        @p st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [there], {$8, $9}, [counter];
        @own st.shared.v2.b32 [$2], {$8, $9};
        mov.b32 $0, 0;
        mov.b32 $1, 0;
    }"""
    value = value.to(gl.int32, bitcast=True)
    arguments = [address, barrier, rank, value, really]
    gl.inline_asm_elementwise(asm, "=r,=r,r,r,r,r,r,r,r,r,r,r", arguments, dtype=gl.int32, is_pure=False, pack=2)


@gluon.jit
def _receive(barrier, thread):
    """Wait for all that the programs of the cluster put here."""
    asm: gl.constexpr = """
    {
        .reg .pred done;
    again:
        mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [$1], 0;
        @!done bra again;
        mov.b32 $0, $2;
    }"""
    return gl.inline_asm_elementwise(asm, "=r,r,r", [barrier, thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _get(address):
    """Load what was put."""
    return gl.inline_asm_elementwise(
        "ld.shared.f32 $0, [$1];", "=f,r", [address], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _normalise(q):
    """bf16 queries below 2**-10, so that no product with finite keys is below LOWEST, and what undoes it."""
    wide = q.to(gl.float32)
    down, undo = row_powers(wide)
    return (wide * down[:, None] * (1.0 / 4096.0)).to(q.dtype), undo


@gluon.jit
def _fetch(descriptors, shared, ready, place, key, stage, BYTES: gl.constexpr):
    """Have TMA load a block of K and one of V."""
    for i in gl.static_range(2):
        mbarrier.expect(ready[i].index(stage), BYTES)
        tma.async_load(descriptors[i], [place[0], place[1], key, 0], ready[i].index(stage), shared[i].index(stage))


@gluon.jit
def fmha_decode_sm90(
    k_desc,
    v_desc,
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

    Descriptors: boxes of [1, 1, BLOCK_N, BLOCK_D] of K and V. q_len is 1. q_lengths, ragged batches and softcap are not
    served.
    """
    dtype: gl.constexpr = k_desc.dtype
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

    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], v_desc.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(s), count=1)
        mbarrier.init(v_ready.index(s), count=1)
    descriptors = (k_desc, v_desc)
    shared = (k_smem, v_smem)
    ready = (k_ready, v_ready)
    place = (batch, kv_head)
    BYTES: gl.constexpr = BLOCK_N * BLOCK_D * 2
    for s in gl.static_range(STAGES):
        mbarrier.expect(k_ready.index(s), BYTES, pred=s < count)
        mbarrier.expect(v_ready.index(s), BYTES, pred=s < count)
    for s in gl.static_range(STAGES):
        key = begin + s * BLOCK_N
        tma.async_load(k_desc, [batch, kv_head, key, 0], k_ready.index(s), k_smem.index(s), pred=s < count)
        tma.async_load(v_desc, [batch, kv_head, key, 0], v_ready.index(s), v_smem.index(s), pred=s < count)

    ONE_EACH: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    thread = gl.arange(0, 32 * WARPS, layout=ONE_EACH)
    room = gl.inline_asm_elementwise(_room_asm(BLOCK_D), "=r,r", [rank], dtype=gl.int32, is_pure=False, pack=1)
    barrier = room + 4 * (BLOCK_D * HEADS + RANKS * STATISTICS)
    expected = gl.where(ranks > 1, 4 * (BLOCK_D * HEADS + ranks * STATISTICS), 0)  # a lone program sends itself nothing
    same = thread * 0
    _prepare(same + barrier, same + expected, thread)
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
    fence_async_shared()
    gl.barrier()

    keys = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, S_LAYOUT))
    m = gl.full([HEADS], LOWEST, gl.float32, layout=COLUMN)
    sums = gl.zeros([BLOCK_N, HEADS], gl.float32, layout=S_LAYOUT)  # one for each thread and row
    acc = gl.zeros([BLOCK_D, HEADS], gl.float32, layout=S_LAYOUT)
    no_scores = gl.zeros([BLOCK_N, HEADS], gl.float32, layout=S_LAYOUT)
    for turn in range(count):
        stage = turn % STAGES
        phase = (turn // STAGES) & 1
        left = end - begin - turn * BLOCK_N
        visible = (keys < left)[:, None]
        mbarrier.wait(k_ready.index(stage), phase)
        k = k_smem.index(stage).reshape([BLOCK_N, BLOCK_D])
        scores = warpgroup_mma(k, q_smem.permute((1, 0)), no_scores, use_acc=False)
        m_new = gl.maximum(m, gl.max(gl.where(visible, scores, LOWEST), 0))
        p = gl.exp2(gl.where(visible, (scores - m_new[None, :]) * factor[None, :] - shift, float("-inf")))
        alpha = gl.exp2((m - m_new) * factor)
        m = m_new
        sums = sums * alpha[None, :] + p
        acc = acc * alpha[None, :]
        p_smem.permute((1, 0)).store(p.to(dtype))
        mbarrier.wait(v_ready.index(stage), phase)
        v = v_smem.index(stage).reshape([BLOCK_N, BLOCK_D])
        if (end < kv_len) & (left < BLOCK_N):  # padding may be NaN, which a weight of 0 does not undo
            rows = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, BY_ROW))
            v.store(gl.where((rows < left)[:, None], v.load(BY_ROW), 0.0))
        fence_async_shared()
        gl.barrier()
        acc = warpgroup_mma(v.permute((1, 0)), p_smem.permute((1, 0)), acc)
        gl.barrier()
        if turn + STAGES < count:
            _fetch(descriptors, shared, ready, place, begin + (turn + STAGES) * BLOCK_N, stage, BYTES)

    found = (acc, m, gl.sum(sums, 0), factor)
    heads = (batch, kv_head * group, first_head, group, num_heads, head_size)
    output = (Out, Lse, out_stride_b, out_stride_h)
    _combine(found, (thread, room, barrier), (rank, ranks, halvings), heads, output, shift, BLOCK_D, ONE_EACH)


@gluon.jit
def _send(found, exchange, cluster, BLOCK_D: gl.constexpr):
    """Give each program of the cluster its rows of the transposed output, and the statistics of all heads."""
    acc, m, total, factor = found
    thread, room, barrier = exchange
    rank, ranks, halvings = cluster
    LAYOUT: gl.constexpr = acc.type.layout
    rows_each = BLOCK_D >> halvings
    row = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, HEADS, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    every = gl.zeros([BLOCK_D, HEADS], gl.int32, layout=LAYOUT)
    to = (row << halvings) // BLOCK_D
    way = gl.where(ranks > 1, 1, 2)  # without a cluster compute-sanitizer takes what is sent for out of bounds
    slot = rank * rows_each + row - to * rows_each
    _put(room + (slot[:, None] * HEADS + column) * 4, every + barrier, every + to[:, None], acc, every + way)
    # Rows 0 to 7 send maxima to the program of their number, the next sums, the next factors.
    kind = (row // RANKS)[:, None]
    value = gl.where(kind == 0, m[None, :], gl.where(kind == 1, total[None, :], factor[None, :]))
    address = room + 4 * (BLOCK_D * HEADS + rank * STATISTICS + kind * HEADS + column)
    wanted = (kind < 3) & (row % RANKS < ranks)[:, None]
    _put(address, every + barrier, every + (row % RANKS)[:, None], value, every + wanted.to(gl.int32) * way)


@gluon.jit
def _combine(
    found,
    exchange,
    cluster,
    heads,
    output,
    shift: gl.constexpr,
    BLOCK_D: gl.constexpr,
    ONE_EACH: gl.constexpr,
):
    """Each program takes BLOCK_D / ranks rows of the transposed output, and gets what the others have of them."""
    thread, room, barrier = exchange
    rank, ranks, halvings = cluster
    batch, group_head, first_head, group, num_heads, head_size = heads
    Out, Lse, out_stride_b, out_stride_h = output
    _join(thread)
    _send(found, exchange, cluster, BLOCK_D)
    if ranks == 1:
        gl.barrier()
    _receive(thread * 0 + barrier, thread)
    THREADS: gl.constexpr = thread.shape[0]
    BY_RANK: gl.constexpr = gl.BlockedLayout([1, RANKS], [32, 1], [THREADS // 32, 1], [1, 0])
    statistics = room + 4 * BLOCK_D * HEADS
    values = (BLOCK_D >> halvings) * HEADS  # that are this program's
    other = gl.arange(0, RANKS, layout=gl.SliceLayout(0, BY_RANK))[None, :]
    sender = gl.minimum(other, ranks - 1)
    for first in range(0, values, THREADS):
        place = first + thread
        column = place % HEADS
        there = gl.convert_layout(place, gl.SliceLayout(1, BY_RANK), assert_trivial=True)[:, None]
        its = statistics + 4 * (sender * STATISTICS + there % HEADS)
        m = _get(its)
        best = gl.max(m, 1)
        scale = _get(statistics + 4 * (2 * HEADS + column))
        scales = gl.convert_layout(scale, gl.SliceLayout(1, BY_RANK), assert_trivial=True)
        weight = gl.where(other < ranks, gl.exp2((m - best[:, None]) * scales[:, None]), 0.0)
        row_sum = gl.convert_layout(gl.sum(weight * _get(its + 4 * HEADS), 1), ONE_EACH, assert_trivial=True)
        part = _get(room + 4 * (sender * values + gl.minimum(there, values - 1)))
        out = gl.convert_layout(gl.sum(weight * part, 1), ONE_EACH, assert_trivial=True) * (1.0 / row_sum)
        most: gl.constexpr = BFLOAT16_MAX if Out.dtype.element_ty == gl.bfloat16 else 65504.0
        out = gl.where(out > most, most, gl.where(out < -most, -most, out))
        out = gl.where(row_sum != 0, out, 0.0)
        d = rank * (BLOCK_D >> halvings) + place // HEADS
        head = group_head + first_head + column
        inside = (place < values) & (first_head + column < group)
        target = Out + batch.to(gl.int64) * out_stride_b + head.to(gl.int64) * out_stride_h + d
        gl.store(target, out.to(Out.dtype.element_ty), mask=inside & (d < head_size))
        if Lse.to(gl.int64) != 0:
            maximum = gl.convert_layout(best, ONE_EACH, assert_trivial=True)
            score = gl.minimum(gl.maximum(maximum * scale, -FLOAT_MAX), FLOAT_MAX)
            lse = gl.where(row_sum != 0, (score + gl.log2(row_sum) + shift) * LN_2, float("-inf"))
            gl.store(Lse + batch.to(gl.int64) * num_heads + head, lse, mask=inside & (d == 0))
