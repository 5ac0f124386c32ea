"""Attention forward for Hopper (sm_90) in Gluon: TMA, warp-specialised, FlashAttention-3 shaped.

The same function as fmha_fwd.py for dense batches of fp16 and bf16 without window and soft cap, see its docstring for
the arguments. The algorithm is that of Shah et al., "FlashAttention-3" (2024): one warp loads through TMA into a ring
of K and V blocks; each consumer warpgroup owns 64 query rows, multiplies with wgmma straight from shared memory, and
lets the product of the last block's weights with V run while it takes the exponentials of the next block.

Programs are persistent: program p of n takes the tiles p, 2n - 1 - p, 2n + p, ... of a list that for causal attention
begins with the longest rows, so that every program gets long and short ones alike. Heads are taken in sections whose K
and V fit in half of the L2 cache. While a consumer finishes one tile, the loads of its next are already under way.

Descriptors are [batch, heads, seq, head size], so that a block past the end of a sequence, or past the head size, reads
zeros instead of the next head, and is not written past either. Any strides a descriptor can take will do.

Arithmetic is fast within the range that fmha_triton.py explains. Rows that leave it are not written but noted, and
computed again when all tiles are done, one key at a time, in arithmetic that stays finite for any finite input. That
part stands outside the consumers, whose registers it would fill with strides and pointers. NaN in the input takes the
same path, hundreds of times slower.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2_E: gl.constexpr = gl.constexpr(1.4426950408889634)
LN_2: gl.constexpr = gl.constexpr(0.6931471805599453)
FLOAT_MAX: gl.constexpr = gl.constexpr(3.4028234663852886e38)
FLOAT16_MAX: gl.constexpr = gl.constexpr(65504.0)
BFLOAT16_MAX: gl.constexpr = gl.constexpr(3.3895313892515355e38)
# Scores, in units of log2, that the fast arithmetic accepts: see fmha_triton.py.
FAST_LIMIT: gl.constexpr = gl.constexpr(1048576.0)
# Below every dot product of the slow arithmetic, yet near enough that the difference is finite: -2**126.
LOWEST: gl.constexpr = gl.constexpr(-8.507059173023462e37)
# Bytes of K and V that the heads of one section may fill: under half of the 50 MB of an H100's L2 cache.
SECTION_BYTES: gl.constexpr = gl.constexpr(20 * 1024 * 1024)
ROWS: gl.constexpr = gl.constexpr(64)  # of one consumer: the M of wgmma
SLOW_ROWS: gl.constexpr = gl.constexpr(16)  # computed at a time where it is slow: so few that nothing spills
# A consumer notes the tiles to compute again in the bits of a word. Where a program has more, several share a bit, and
# are then all computed again.
NOTES: gl.constexpr = gl.constexpr(32)
NOTE: gl.constexpr = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
NOTE_SMEM: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _take_turn(x, consumer: gl.constexpr):
    """Wait until the consumer before this one has issued its products. Returns x, to keep its place in the code."""
    if consumer == 0:
        x = gl.inline_asm_elementwise("bar.sync 8, 256;", "=r,=r,0,1", [x], dtype=x.dtype, is_pure=False, pack=2)
    elif consumer == 1:
        x = gl.inline_asm_elementwise("bar.sync 9, 256;", "=r,=r,0,1", [x], dtype=x.dtype, is_pure=False, pack=2)
    else:
        x = gl.inline_asm_elementwise("bar.sync 10, 256;", "=r,=r,0,1", [x], dtype=x.dtype, is_pure=False, pack=2)
    return x


@gluon.jit
def _pass_turn(x, consumer: gl.constexpr):
    """Let a consumer issue its products."""
    if consumer == 0:
        x = gl.inline_asm_elementwise("bar.arrive 8, 256;", "=r,=r,0,1", [x], dtype=x.dtype, is_pure=False, pack=2)
    elif consumer == 1:
        x = gl.inline_asm_elementwise("bar.arrive 9, 256;", "=r,=r,0,1", [x], dtype=x.dtype, is_pure=False, pack=2)
    else:
        x = gl.inline_asm_elementwise("bar.arrive 10, 256;", "=r,=r,0,1", [x], dtype=x.dtype, is_pure=False, pack=2)
    return x


@gluon.jit
def _hold(x):
    """Returns x, of at least 0 or NaN, which is then computed before any wait that follows.

    Left alone, ptxas moves the wait for a product ahead of the arithmetic that should run beside it: nothing it knows
    of ties them. A store does, which is never carried out.
    """
    asm: gl.constexpr = "{.reg .pred p; setp.lt.f32 p, $1, 0fBF800000; @p st.shared.b32 [$1], $1; mov.b32 $0, $1;}"
    return gl.inline_asm_elementwise(asm, "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)


@gluon.jit
def _tile_count(tiles):
    """How many of all tiles this program takes."""
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    rounds = tiles // programs
    if rounds % 2 == 0:
        place = program
    else:
        place = programs - 1 - program
    return rounds + (place < tiles % programs).to(gl.int32)


@gluon.jit
def _tile(turn, row_tiles, heads, section, CAUSAL: gl.constexpr):
    """The turn-th tile of this program: its place among the tiles of rows, and its head of batch * heads."""
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    if turn % 2 == 0:
        place = program
    else:
        place = programs - 1 - program
    index = turn * programs + place
    if CAUSAL:
        first_head = index // (section * row_tiles) * section
        inside = index - first_head * row_tiles
        held = gl.minimum(section, heads - first_head)
        row_tile = row_tiles - 1 - inside // held
        head = first_head + inside % held
    else:
        head = index // row_tiles
        row_tile = index % row_tiles
    return row_tile, head


@gluon.jit
def _section(kv_len, group, heads, BLOCK_D: gl.constexpr):
    """Query heads whose K and V fill a section: at most all, so that their tiles are never more than 32 bits hold."""
    kv_bytes = kv_len.to(gl.int64) * (BLOCK_D * 4)
    return gl.minimum(gl.maximum(SECTION_BYTES // kv_bytes, 1) * group, heads).to(gl.int32)


@gluon.jit
def _block_count(end_row, kv_len, offset, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """Key blocks that the rows below end_row see, but at least one, which then counts for nothing."""
    end = kv_len
    if CAUSAL:
        end = gl.minimum(kv_len, end_row + offset)
    return gl.maximum((end + (BLOCK_N - 1)) // BLOCK_N, 1)


@gluon.jit
def _load(work, SHAPE: gl.constexpr):
    """The producer: one warp, which loads what the consumers use in the order in which they do."""
    BLOCK_D: gl.constexpr = SHAPE[0]
    BLOCK_N: gl.constexpr = SHAPE[1]
    CONSUMERS: gl.constexpr = SHAPE[2]
    STAGES: gl.constexpr = SHAPE[3]
    CAUSAL: gl.constexpr = SHAPE[4]
    descriptors, shared, barriers, notes, sizes, Lse, sm_scale = work
    q_desc, k_desc, v_desc, out_desc = descriptors
    q_smem, out_smem, k_smem, v_smem = shared
    q_ready, q_free, k_ready, k_free, v_ready, v_free = barriers
    num_heads, group, q_len, kv_len, offset, row_tiles, heads, section = sizes
    step = 0
    for turn in range(_tile_count(row_tiles * heads)):
        row_tile, head = _tile(turn, row_tiles, heads, section, CAUSAL)
        batch = head // num_heads
        q_head = head % num_heads
        kv_head = q_head // group
        first_row = row_tile * (ROWS * CONSUMERS)
        for c in gl.static_range(CONSUMERS):
            mbarrier.wait(q_free.index(c), (turn & 1) ^ 1)
            mbarrier.expect(q_ready.index(c), ROWS * BLOCK_D * 2)
            tma.async_load(q_desc, [batch, q_head, first_row + c * ROWS, 0], q_ready.index(c), q_smem.index(c))
        blocks = _block_count(gl.minimum(first_row + ROWS * CONSUMERS, q_len), kv_len, offset, BLOCK_N, CAUSAL)
        for block in range(blocks):
            key = (blocks - 1 - block) * BLOCK_N  # from right to left: the masked blocks first
            stage = step % STAGES
            phase = ((step // STAGES) & 1) ^ 1
            mbarrier.wait(k_free.index(stage), phase)
            mbarrier.expect(k_ready.index(stage), BLOCK_N * BLOCK_D * 2)
            tma.async_load(k_desc, [batch, kv_head, key, 0], k_ready.index(stage), k_smem.index(stage))
            mbarrier.wait(v_free.index(stage), phase)
            mbarrier.expect(v_ready.index(stage), BLOCK_N * BLOCK_D * 2)
            tma.async_load(v_desc, [batch, kv_head, key, 0], v_ready.index(stage), v_smem.index(stage))
            step += 1


@gluon.jit
def _weigh(
    scores,
    m,
    row_sum,
    scale,
    shift: gl.constexpr,
    ends,
    key,
    MASKED: gl.constexpr,
    S_LAYOUT: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """Weights of one block of keys, and the running maximum (in units of log2, plus shift) and sum with it."""
    if MASKED:
        columns = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
        scores = gl.where(columns[None, :] < (ends - key)[:, None], scores, float("-inf"))
    m_new = gl.maximum(m, gl.max(scores, 1) * scale + shift)
    weights = gl.exp2(scores * scale - m_new[:, None])
    alpha = gl.exp2(m - m_new)
    return weights, m_new, row_sum * alpha + gl.sum(weights, 1), alpha


@gluon.jit
def _step(
    acc,
    p,
    m,
    row_sum,
    q,
    shared,
    barriers,
    step,
    scale,
    shift: gl.constexpr,
    ends,
    key,
    MASKED: gl.constexpr,
    CONSUMER: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PING_PONG: gl.constexpr,
    S_LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr,
    P_LAYOUT: gl.constexpr,
):
    """Scores of block `step` beside the product of block `step - 1`; exponentials while that product runs."""
    q_smem, out_smem, k_smem, v_smem = shared
    q_ready, q_free, k_ready, k_free, v_ready, v_free = barriers
    stage = step % STAGES
    before = (step - 1) % STAGES
    mbarrier.wait(k_ready.index(stage), (step // STAGES) & 1)
    if PING_PONG:
        m = _take_turn(m, CONSUMER)
    k_t = k_smem.index(stage).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
    scores = warpgroup_mma(q, k_t, gl.zeros([ROWS, BLOCK_N], gl.float32, layout=S_LAYOUT), use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(before), ((step - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, v_smem.index(before).reshape([BLOCK_N, BLOCK_D]), acc, is_async=True)
    if PING_PONG:
        m = _pass_turn(m, (CONSUMER + 1) % CONSUMERS)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(k_free.index(stage), count=1)
    weights, m, row_sum, alpha = _weigh(scores, m, row_sum, scale, shift, ends, key, MASKED, S_LAYOUT, BLOCK_N)
    row_sum = _hold(row_sum)
    next_p = gl.convert_layout(weights.to(v_smem.dtype), P_LAYOUT, assert_trivial=True)
    acc, p, next_p = warpgroup_mma_wait(0, deps=(acc, p, next_p))
    mbarrier.arrive(v_free.index(before), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True)[:, None]
    return acc, next_p, m, row_sum


@gluon.jit
def _compute_slowly(
    tensors,
    strides,
    sizes,
    head,
    first_row,
    head_size,
    sm_scale,
    BLOCK_D: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """A few rows of one head, key by key, finite for any finite input; writes Out and Lse itself.

    As fmha_triton.py does it: powers of two bring q, row by row, and k and v into range; scores are subtracted before
    they are scaled.
    """
    Out, Lse, Q, K, V = tensors
    q_strides, k_strides, v_strides, out_strides = strides
    num_heads, group, q_len, kv_len, offset, row_tiles, heads, section = sizes
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    rows = first_row + gl.arange(0, SLOW_ROWS, layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, LAYOUT))
    inside = (rows < q_len)[:, None] & (columns < head_size)[None, :]
    batch = (head // num_heads).to(gl.int64)
    q_head = (head % num_heads).to(gl.int64)
    kv_head = q_head // group
    q_rows = Q + batch * q_strides[0] + q_head * q_strides[1] + rows.to(gl.int64) * q_strides[2]
    q = gl.load(q_rows[:, None] + columns[None, :], mask=inside, other=0.0).to(gl.float32)
    largest = gl.max(gl.abs(q), 1)
    exponent = gl.minimum(gl.maximum(largest.to(gl.int32, bitcast=True) >> 23, 1), 253)
    down = ((254 - exponent) << 23).to(gl.float32, bitcast=True)
    undo = (exponent << 23).to(gl.float32, bitcast=True)
    q = q * down[:, None] * (1.0 / 4096.0)
    # 2**13: 2**12 left over from q, and the halved k. Scale comes first, for undo * 2**13 may be infinite.
    row_scale = gl.minimum(gl.minimum(sm_scale * LOG2_E, FLOAT_MAX) * undo * 8192.0, FLOAT_MAX)
    m = gl.full([SLOW_ROWS], LOWEST, gl.float32, layout=gl.SliceLayout(1, LAYOUT))
    row_sum = gl.zeros([SLOW_ROWS], gl.float32, layout=gl.SliceLayout(1, LAYOUT))
    acc = gl.zeros([SLOW_ROWS, BLOCK_D], gl.float32, layout=LAYOUT)
    k_row = K + batch * k_strides[0] + kv_head * k_strides[1] + columns
    v_row = V + batch * v_strides[0] + kv_head * v_strides[1] + columns
    end = kv_len
    if CAUSAL:
        end = gl.minimum(kv_len, gl.minimum(first_row + SLOW_ROWS, q_len) + offset)
    for key in range(end):
        k = gl.load(k_row, mask=columns < head_size, other=0.0).to(gl.float32) * 0.5
        v = gl.load(v_row, mask=columns < head_size, other=0.0).to(gl.float32) * 0.5
        score = gl.sum(q * k[None, :], 1)
        visible = rows < q_len
        if CAUSAL:
            visible = visible & (key <= rows + offset)
        m_new = gl.maximum(m, gl.where(visible, score, LOWEST))
        p = gl.where(visible, gl.exp2((score - m_new) * row_scale), 0.0)
        alpha = gl.exp2((m - m_new) * row_scale)
        row_sum = row_sum * alpha + p
        acc = acc * alpha[:, None] + gl.where(visible[:, None], p[:, None] * v[None, :], 0.0)
        m = m_new
        k_row += k_strides[2]
        v_row += v_strides[2]
    some = row_sum != 0  # NaN too
    inverse = gl.where(some, 1.0 / row_sum, 0.0)
    out = _within(acc * inverse[:, None] * 2.0, Out.dtype.element_ty)
    out_rows = Out + batch * out_strides[0] + q_head * out_strides[1] + rows.to(gl.int64) * out_strides[2]
    gl.store(out_rows[:, None] + columns[None, :], out.to(Out.dtype.element_ty), mask=inside)
    scaled = gl.minimum(gl.maximum(m * row_scale, -FLOAT_MAX), FLOAT_MAX)
    lse = gl.where(some, (scaled + gl.log2(row_sum)) * LN_2, float("-inf"))
    if Lse.to(gl.int64) != 0:
        gl.store(Lse + head.to(gl.int64) * q_len + rows, lse, mask=rows < q_len)


@gluon.jit
def _within(out, dtype: gl.constexpr):
    """A mean never exceeds its largest value, but the rounded one may, by enough to become infinite. NaN stays NaN."""
    largest: gl.constexpr = FLOAT16_MAX if dtype == gl.float16 else BFLOAT16_MAX
    return gl.where(out > largest, largest, gl.where(out < -largest, -largest, out))


@gluon.jit
def _attend(work, CONSUMER: gl.constexpr, SHAPE: gl.constexpr):
    """One consumer: 64 rows of each of the program's tiles."""
    BLOCK_D: gl.constexpr = SHAPE[0]
    BLOCK_N: gl.constexpr = SHAPE[1]
    CONSUMERS: gl.constexpr = SHAPE[2]
    STAGES: gl.constexpr = SHAPE[3]
    CAUSAL: gl.constexpr = SHAPE[4]
    PING_PONG: gl.constexpr = SHAPE[5]
    OWN_OUT: gl.constexpr = SHAPE[6]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    descriptors, shared, barriers, notes, sizes, Lse, sm_scale = work
    q_desc, k_desc, v_desc, out_desc = descriptors
    q_smem, out_smem, k_smem, v_smem = shared
    q_ready, q_free, k_ready, k_free, v_ready, v_free = barriers
    num_heads, group, q_len, kv_len, offset, row_tiles, heads, section = sizes
    # bf16 values may be as large as float32's: weights of at most 2**-24 keep their sum finite, at no cost.
    shift: gl.constexpr = 24.0 if v_smem.dtype == gl.bfloat16 else 0.0
    scale = gl.minimum(sm_scale * LOG2_E, FLOAT_MAX)
    q = q_smem.index(CONSUMER).reshape([ROWS, BLOCK_D])
    if PING_PONG:
        if CONSUMER == CONSUMERS - 1:
            _pass_turn(gl.zeros([ROWS], gl.float32, layout=ROW_LAYOUT), 0)
    noted = 0
    step = 0
    for turn in range(_tile_count(row_tiles * heads)):
        row_tile, head = _tile(turn, row_tiles, heads, section, CAUSAL)
        tile_row = row_tile * (ROWS * CONSUMERS)
        first_row = tile_row + CONSUMER * ROWS
        rows = first_row + gl.arange(0, ROWS, layout=ROW_LAYOUT)
        loaded = _block_count(gl.minimum(tile_row + ROWS * CONSUMERS, q_len), kv_len, offset, BLOCK_N, CAUSAL)
        if CAUSAL:
            ends = gl.minimum(rows + (offset + 1), kv_len)  # keys below it are visible to a row
            blocks = gl.minimum(_block_count(first_row + ROWS, kv_len, offset, BLOCK_N, CAUSAL), loaded)
            unmasked = gl.maximum(gl.minimum(first_row + offset + 1, kv_len), 0) // BLOCK_N
            for _unused in range(loaded - blocks):  # keys only for the rows of the consumers below
                if PING_PONG:
                    turn_taken = _take_turn(gl.zeros([ROWS], gl.float32, layout=ROW_LAYOUT), CONSUMER)
                    _pass_turn(turn_taken, (CONSUMER + 1) % CONSUMERS)
                mbarrier.wait(k_ready.index(step % STAGES), (step // STAGES) & 1)
                mbarrier.arrive(k_free.index(step % STAGES), count=1)
                mbarrier.wait(v_ready.index(step % STAGES), (step // STAGES) & 1)
                mbarrier.arrive(v_free.index(step % STAGES), count=1)
                step += 1
        else:
            ends = rows * 0 + kv_len
            blocks = loaded
            unmasked = kv_len // BLOCK_N
        m = gl.full([ROWS], shift - FAST_LIMIT, gl.float32, layout=ROW_LAYOUT)
        row_sum = gl.zeros([ROWS], gl.float32, layout=ROW_LAYOUT)
        key = (blocks - 1) * BLOCK_N
        stage = step % STAGES
        mbarrier.wait(q_ready.index(CONSUMER), turn & 1)
        mbarrier.wait(k_ready.index(stage), (step // STAGES) & 1)
        k_t = k_smem.index(stage).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
        scores = warpgroup_mma(
            q, k_t, gl.zeros([ROWS, BLOCK_N], gl.float32, layout=S_LAYOUT), use_acc=False, is_async=True
        )
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(k_free.index(stage), count=1)
        weights, m, row_sum, alpha = _weigh(scores, m, row_sum, scale, shift, ends, key, True, S_LAYOUT, BLOCK_N)
        p = gl.convert_layout(weights.to(v_smem.dtype), P_LAYOUT, assert_trivial=True)
        acc = gl.zeros([ROWS, BLOCK_D], gl.float32, layout=O_LAYOUT)
        step += 1
        masked = gl.maximum(blocks - gl.maximum(unmasked, 1), 0) if CAUSAL else 0
        masked = gl.minimum(masked, blocks - 1) if CAUSAL else 0
        for _masked in range(masked):
            key -= BLOCK_N
            acc, p, m, row_sum = _step(
                acc, p, m, row_sum, q, shared, barriers, step, scale, shift, ends, key, True,
                CONSUMER, CONSUMERS, STAGES, BLOCK_D, BLOCK_N, PING_PONG, S_LAYOUT, O_LAYOUT, P_LAYOUT,
            )  # fmt: skip
            step += 1
        for _unmasked in range(1 + masked, blocks):
            acc, p, m, row_sum = _step(
                acc, p, m, row_sum, q, shared, barriers, step, scale, shift, ends, 0, False,
                CONSUMER, CONSUMERS, STAGES, BLOCK_D, BLOCK_N, PING_PONG, S_LAYOUT, O_LAYOUT, P_LAYOUT,
            )  # fmt: skip
            step += 1
        if OWN_OUT:
            mbarrier.arrive(q_free.index(CONSUMER), count=1)
        last = (step - 1) % STAGES
        mbarrier.wait(v_ready.index(last), ((step - 1) // STAGES) & 1)
        acc = warpgroup_mma(p, v_smem.index(last).reshape([BLOCK_N, BLOCK_D]), acc, is_async=True)
        some = row_sum > 0
        inverse = gl.where(some, 1.0 / row_sum, 0.0)
        in_range = some & (gl.abs(m - shift) < FAST_LIMIT)
        leaving = gl.sum(((ends > 0) & (rows < q_len) & (in_range == 0)).to(gl.int32), 0)
        lse = gl.where(some, (m - shift + gl.log2(row_sum) + shift) * LN_2, float("-inf"))
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        mbarrier.arrive(v_free.index(last), count=1)
        if OWN_OUT:
            out_part = out_smem.index(CONSUMER)
            tma.store_wait(0)  # of the tile before: the buffer is free again
        else:
            out_part = q_smem.index(CONSUMER)
        if leaving == 0:
            factor = gl.convert_layout(inverse, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True)
            out_part.reshape([ROWS, BLOCK_D]).store(_within(acc * factor[:, None], v_smem.dtype).to(v_smem.dtype))
            fence_async_shared()
            tma.async_store(out_desc, [head // num_heads, head % num_heads, first_row, 0], out_part)
            if Lse.to(gl.int64) != 0:
                gl.store(Lse + head.to(gl.int64) * q_len + rows, lse, mask=rows < q_len)
        else:
            noted = noted | (1 << (turn % NOTES))
        if not OWN_OUT:
            tma.store_wait(0)
            mbarrier.arrive(q_free.index(CONSUMER), count=1)
    tma.store_wait(0)
    notes.index(CONSUMER).store(gl.zeros([1], gl.int32, layout=NOTE) + noted)


@gluon.jit
def fmha_fwd_sm90(
    out_desc,
    q_desc,
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
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    PING_PONG: gl.constexpr,
    OWN_OUT: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Grid: any number of programs up to cdiv(q_len, 64 * CONSUMERS) * num_heads * batch_size.

    Descriptors: boxes of [1, 1, 64, BLOCK_D] for Q and Out, [1, 1, BLOCK_N, BLOCK_D] for K and V. window_right is 0
    where CAUSAL, else -1; sm_scale is above 0, q_len and kv_len at least 1. Lengths, ragged batches, softcap and
    window_left are not served. OWN_OUT: Out has a buffer of its own, so that Q's is free for the next tile a product
    earlier.
    """
    offset = bottom_right * (kv_len - q_len)
    group = num_heads // num_kv_heads
    row_tiles = (q_len + (ROWS * CONSUMERS - 1)) // (ROWS * CONSUMERS)
    section = _section(kv_len, group, batch_size * num_heads, BLOCK_D)
    sizes = (num_heads, group, q_len, kv_len, offset, row_tiles, batch_size * num_heads, section)
    descriptors = (q_desc, k_desc, v_desc, out_desc)
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, BLOCK_D], q_desc.layout)
    if OWN_OUT:
        out_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, BLOCK_D], q_desc.layout)
    else:
        out_smem = q_smem
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], v_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(q_ready.index(c), count=1)
        mbarrier.init(q_free.index(c), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(s), count=1)
        mbarrier.init(k_free.index(s), count=CONSUMERS)
        mbarrier.init(v_ready.index(s), count=1)
        mbarrier.init(v_free.index(s), count=CONSUMERS)
    notes = gl.allocate_shared_memory(gl.int32, [CONSUMERS, 1], NOTE_SMEM)
    shared = (q_smem, out_smem, k_smem, v_smem)
    barriers = (q_ready, q_free, k_ready, k_free, v_ready, v_free)
    work = (descriptors, shared, barriers, notes, sizes, Lse, sm_scale)
    SHAPE: gl.constexpr = (BLOCK_D, BLOCK_N, CONSUMERS, STAGES, CAUSAL, PING_PONG, OWN_OUT)
    if CONSUMERS == 1:
        gl.warp_specialize([(_attend, (work, 0, SHAPE)), (_load, (work, SHAPE))], [1], [PRODUCER_REGISTERS])
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [(_attend, (work, 0, SHAPE)), (_attend, (work, 1, SHAPE)), (_load, (work, SHAPE))],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (work, 0, SHAPE)),
                (_attend, (work, 1, SHAPE)),
                (_attend, (work, 2, SHAPE)),
                (_load, (work, SHAPE)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    for part in range(CONSUMERS):
        noted = gl.max(notes.index(part).load(NOTE), 0)
        if noted != 0:
            tensors = (Out, Lse, Q, K, V)
            strides = (
                (q_stride_b, q_stride_h, q_stride_s),
                (k_stride_b, k_stride_h, k_stride_s),
                (v_stride_b, v_stride_h, v_stride_s),
                (out_stride_b, out_stride_h, out_stride_s),
            )
            for turn in range(_tile_count(row_tiles * batch_size * num_heads)):
                if (noted >> (turn % NOTES)) & 1 != 0:
                    row_tile, head = _tile(turn, row_tiles, batch_size * num_heads, section, CAUSAL)
                    first_row = (row_tile * CONSUMERS + part) * ROWS
                    for row in range(first_row, first_row + ROWS, SLOW_ROWS):
                        _compute_slowly(tensors, strides, sizes, head, row, head_size, sm_scale, BLOCK_D, CAUSAL)
