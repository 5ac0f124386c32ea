"""Attention forward of e4m3 for Hopper (sm_90) in Gluon: TMA, warp-specialised, FlashAttention-3 shaped.

Out = softmax(sm_scale * q_descale * k_descale * Q K^T) V * v_descale for Q, K and V in e4m3 (float8_e4m3fn), Out in
fp16 or bf16, sums in float32. The other arguments are those of fmha_fwd.py; the structure and the order of the tiles
are fmha_sm90.py's. What differs:

- wgmma takes 8-bit operands with their inner dimension contiguous only, so V is transposed on its way. The producer
  does it: it reads pairs of values as 16 bits by ldmatrix.trans, puts those of four keys into one register by two byte
  permutations, and writes rows of keys. Keys that do not count are set to zero there, at no cost where all count.
- A thread holds other columns of a product than an operand of 8 bits wants: columns 2i, 2i + 1 and those 8 further,
  where it wants 4i to 4i + 3. The sum over keys does not ask for their order, so V's keys take the order in which the
  weights lie: within 16 keys, bits 3, 0 | 2, 1 of a key change places (see `packed`). Nothing moves between threads.
- The transposed rows of a pair of head dimensions would fall into the same banks. Those of even dimensions come first,
  8 by 8, and the odd ones after them; the columns of Out are put right in registers, by which 4 that are contiguous
  come to one thread, which stores them straight to memory.
- Weights are at most 2**8: e4m3 holds 2**-9 to 448, so weights down to 2**-17 of the largest count. They are rounded to
  nearest with 3 bits of fraction; what they are divided by is the sum before rounding.

Arithmetic is finite for any finite input as long as sm_scale * q_descale * k_descale is at most 2**99. Scores are what
float32 and the tensor cores make of them: where they exceed 2**20, nothing of the differences is left. The tensor
cores add products of e4m3 with 13 bits of fraction or so (not documented by NVIDIA). NaN in V reaches queries whose
blocks hold it, whether they see its key or not, except behind kv_lengths and in other sequences of a ragged batch.
"""

from fp8_near import NEAR_KEYS, masked_far, multiply_near_keys, packed_near
from fp8_wide import (
    allocate_blocks,
    allocate_turned,
    half_packed,
    largest_wide,
    layout_of,
    load_block,
    masked_wide,
    multiply_keys_wide,
    multiply_values_wide,
    packed,
    packed_into,
    panel_of,
    turned_layout,
    weights_wide,
)
from sm90_asm import arrive_by_warps, hold, moved, pass_turn, take_turn, uniform, wait_by_warps
from sm90_lazy import grown, part_times_where
from sm90_maxima import largest as largest_score
from sm90_places import SMEM, given_tile, hand_on_tile
from sm90_ragged import find_tile
from sm90_slow import LN_2, LOG2_E, narrow
from sm90_softmax import partial_sums
from sm90_tiles import (
    EVENLY,
    ROWS,
    Shape,
    end_block_of,
    even_begin,
    even_place,
    order_of,
    section_heads,
    sequence_of,
    tile_blocks,
    tile_count,
    tile_of,
)
from sm90_wide import all_moved, is_wide, near_keys, unit_keys
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import CachePolicy, FractionalEvictionPolicy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# log2 of the largest weight.
LARGEST_WEIGHT: gl.constexpr = gl.constexpr(8.0)
# Factors of scores, in units of log2: at most so much that a score, of at most 2**26 times it, stays finite.
LARGEST_FACTOR: gl.constexpr = gl.constexpr(6.338253001141147e29)  # 2**99
LOWEST: gl.constexpr = gl.constexpr(-8.507059173023462e37)  # -2**126: below every score
# A product's rounding, of a maximum: by so much it is set higher, or else the largest weight may exceed 2**8.
ROUNDING: gl.constexpr = gl.constexpr(1.1920928955078125e-07)  # 2**-23
# The maximum in units of log2, less 8, of scores of which the largest is 0.
OF_ZERO: gl.constexpr = gl.constexpr(-7.999999046325684)  # -8 * (1 - 2**-23)
# Values of V transposed at a time, by a warpgroup: 16 registers.
TURN_AT_ONCE: gl.constexpr = gl.constexpr(8192)
# Q is read once: its lines make room first.
ONCE: gl.constexpr = gl.constexpr(CachePolicy(l2=FractionalEvictionPolicy("evict_first", 1.0)))


@gluon.constexpr_function
def pairs_layout(keys, pairs):
    """Pairs of values of a block of V, [keys, pairs], as ldmatrix.trans brings them: a thread has those of two keys
    side by side, and of the keys 8 further on; each warp has 8 pairs."""
    registers = [[1, 0], [8, 0]]
    registers += [[key, 0] for key in (16, 32, 64, 128) if key < keys]
    registers += [[0, pair] for pair in (32, 64) if pair < pairs]
    return gl.DistributedLinearLayout(
        registers, [[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]], [[0, 8], [0, 16]], [], [keys, pairs]
    )


@gluon.jit
def _turned(pairs, KEYS: gl.constexpr, BLOCK_D: gl.constexpr):
    """Pairs of values [keys, head size / 2] as pairs of keys, [head size, keys / 2]: rows in the order that `_in_order`
    undoes, keys in that of `packed`."""
    near, far = gl.split(pairs.reshape([KEYS // 16, 2, 8, BLOCK_D // 2]).permute((0, 2, 3, 1)))
    even, odd = gl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531;",
        "=&r,=r,r,r",
        [near, far],
        dtype=(gl.int16, gl.int16),
        is_pure=True,
        pack=2,
    )
    rows = gl.join(even, odd).reshape([KEYS // 2, BLOCK_D // 16, 8, 2])
    return rows.permute((1, 3, 2, 0)).reshape([BLOCK_D, KEYS // 2])


@gluon.constexpr_function
def rows_layout(columns):
    """Rows of Out as a thread holds them: columns 4i to 4i + 3 of 16, for rows j and j + 8."""
    registers = [[0, 1], [0, 2], [8, 0]] + [[0, column] for column in (16, 32, 64, 128) if column < columns]
    return gl.DistributedLinearLayout(
        registers, [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, columns]
    )


@gluon.jit
def _in_order(acc, LAYOUT: gl.constexpr, BLOCK_D: gl.constexpr):
    """Columns of a product with V as `_turned` has it, in the order of the head's dimensions."""
    ordered = acc.reshape([ROWS, BLOCK_D // 16, 2, 8]).permute((0, 1, 3, 2)).reshape([ROWS, BLOCK_D])
    return gl.convert_layout(ordered, LAYOUT, assert_trivial=True)


@gluon.constexpr_function
def bytes_layout(keys):
    """What `unpacked` takes apart, [rows, keys / 16, 4, 2, 2]: a thread has an integer's four copies side by side."""
    registers = [[0, 0, 0, 0, 1], [0, 0, 0, 1, 0], [8, 0, 0, 0, 0]]
    registers += [[0, sixteen, 0, 0, 0] for sixteen in (1, 2, 4, 8) if sixteen < keys // 16]
    lanes = [[0, 0, 1, 0, 0], [0, 0, 2, 0, 0], [1, 0, 0, 0, 0], [2, 0, 0, 0, 0], [4, 0, 0, 0, 0]]
    warps = [[16, 0, 0, 0, 0], [32, 0, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [64, keys // 16, 4, 2, 2])


@gluon.jit
def unpacked(integers, KEYS: gl.constexpr):
    """What was packed, [rows, keys], in the order in which it lies there."""
    LAYOUT: gl.constexpr = bytes_layout(KEYS)
    twice = gl.join(integers, integers)
    wide = gl.convert_layout(gl.join(twice, twice), LAYOUT, assert_trivial=True)
    weights = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r,r,r", [wide], dtype=gl.float8e4nv, is_pure=True, pack=4
    )
    return weights.reshape([ROWS, KEYS])


@gluon.jit
def _transpose(shared, barriers, step, count, SHAPE: gl.constexpr, RAW: gl.constexpr, AHEAD: gl.constexpr):
    """A step's block of V transposed, without the keys from `count` on, when there is room for it."""
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    V_STAGES: gl.constexpr = SHAPE.V_STAGES
    q_smem, k_smem, v_smem, t_smem = shared
    q_ready, q_free, k_ready, k_free, v_ready, t_ready, t_free = barriers
    stage = step % V_STAGES
    mbarrier.wait(v_ready.index(step % RAW), (step // RAW) & 1)
    if AHEAD:  # what lies there was multiplied in the step before the one that has multiplied K two further on
        mbarrier.wait(k_free.index((step + 2) % V_STAGES), (((step + 2) // V_STAGES) & 1) ^ 1)
    else:
        mbarrier.wait(t_free.index(stage), ((step // V_STAGES) & 1) ^ 1)
    if is_wide(BLOCK_N):
        _transpose_units(v_smem, t_smem, step % RAW, stage, SHAPE)
    else:
        _transpose_block(v_smem, t_smem, step % RAW, stage, count, SHAPE)
    fence_async_shared()
    gl.barrier()
    mbarrier.arrive(t_ready.index(stage), count=1)


@gluon.jit
def _transpose_units(v_smem, t_smem, raw, stage, SHAPE: gl.constexpr):
    """As `_transpose_block`, of a block as in fp8_wide.py."""
    UNIT: gl.constexpr = unit_keys(SHAPE.BLOCK_N)
    UNITS: gl.constexpr = SHAPE.BLOCK_N // UNIT
    PANEL: gl.constexpr = panel_of(SHAPE.BLOCK_D)
    PANELS: gl.constexpr = SHAPE.BLOCK_D // PANEL
    PAIRS: gl.constexpr = gl.NVMMASharedLayout(PANEL, 16, 2)
    LAYOUT: gl.constexpr = pairs_layout(UNIT, PANEL // 2)
    for unit in gl.static_range(UNITS):
        turned = t_smem.index(stage * UNITS + unit)
        turned = turned.reinterpret(gl.int16, [SHAPE.BLOCK_D, UNIT // 2], turned_layout(SHAPE.BLOCK_N, 16))
        for panel in gl.static_range(PANELS):
            pairs = v_smem.index((raw * PANELS + panel) * UNITS + unit).reshape([UNIT, PANEL])
            part = pairs.reinterpret(gl.int16, [UNIT, PANEL // 2], PAIRS).load(LAYOUT)
            turned.slice(panel * PANEL, PANEL).store(_turned(part, UNIT, PANEL))


@gluon.jit
def _transpose_block(v_smem, t_smem, raw, stage, count, SHAPE: gl.constexpr):
    """A block of V, without the keys from `count` on."""
    BLOCK_D: gl.constexpr = SHAPE.BLOCK_D
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    KEYS: gl.constexpr = min(BLOCK_N, TURN_AT_ONCE // BLOCK_D)
    PAIRS: gl.constexpr = gl.NVMMASharedLayout(min(BLOCK_D, 128), 16, 2)
    TURNED: gl.constexpr = gl.NVMMASharedLayout(min(BLOCK_N, 128), 16, 2)
    LAYOUT: gl.constexpr = pairs_layout(KEYS, BLOCK_D // 2)
    pairs = v_smem.index(raw).reshape([BLOCK_N, BLOCK_D]).reinterpret(gl.int16, [BLOCK_N, BLOCK_D // 2], PAIRS)
    turned = t_smem.index(stage).reinterpret(gl.int16, [BLOCK_D, BLOCK_N // 2], TURNED)
    for first in gl.static_range(0, BLOCK_N, KEYS):
        part = pairs.slice(first, KEYS).load(LAYOUT)
        if SHAPE.GENERAL:
            if count < first + KEYS:
                keys = gl.arange(0, KEYS, layout=gl.SliceLayout(1, LAYOUT))
                part = gl.where((keys < count - first)[:, None], part, part & 0)
        turned.slice(first // 2, KEYS // 2, dim=1).store(_turned(part, KEYS, BLOCK_D))


@gluon.jit
def _load_queries(work, turn, place, tile, SHAPE: gl.constexpr):
    """Ask for the rows of a tile when there is room for them, and hand on which it is."""
    CONSUMERS: gl.constexpr = SHAPE.CONSUMERS
    Q_SLOTS: gl.constexpr = SHAPE.Q_SLOTS
    descriptors, shared, barriers, sizes, out, factors, handed = work
    q_ready, q_free = barriers[0], barriers[1]
    batch, q_head, first_row = place
    for c in gl.static_range(CONSUMERS):
        slot = turn % Q_SLOTS * CONSUMERS + c
        mbarrier.wait(q_free.index(slot), ((turn // Q_SLOTS) & 1) ^ 1)
        if SHAPE.HANDED:
            hand_on_tile(handed, slot, tile[0], tile[1])
        mbarrier.expect(q_ready.index(slot), ROWS * SHAPE.BLOCK_D)
        tma.async_load(
            descriptors[0], [batch, q_head, first_row + c * ROWS, 0], q_ready.index(slot), shared[0].index(slot),
            cache_policy=ONCE,
        )  # fmt: skip


@gluon.jit
def _load(work, SHAPE: gl.constexpr, RAW: gl.constexpr, AHEAD: gl.constexpr):
    """The producer: it asks for what the consumers use in the order in which they do, across tiles too, and transposes
    each block of V while the next one comes."""
    BLOCK_D: gl.constexpr = SHAPE.BLOCK_D
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    CONSUMERS: gl.constexpr = SHAPE.CONSUMERS
    STAGES: gl.constexpr = SHAPE.STAGES
    ORDER: gl.constexpr = SHAPE.ORDER
    RAGGED: gl.constexpr = SHAPE.RAGGED
    descriptors, shared, barriers, sizes, out, factors, handed = work
    q_desc, k_desc, v_desc = descriptors
    q_smem, k_smem, v_smem, t_smem = shared
    q_ready, q_free, k_ready, k_free, v_ready, t_ready, t_free = barriers
    num_heads, group, q_len, kv_len, row_tiles, heads, section, bounds = sizes
    step = 0
    count_before = 0
    if ORDER == EVENLY:
        state = even_begin()
    for turn in range(tile_count(row_tiles, heads, section, ORDER)):
        if ORDER == EVENLY:
            row_tile, head, state = even_place(state, row_tiles, heads, section)
        else:
            row_tile, head = tile_of(turn, row_tiles, heads, section, ORDER)
        batch = head // num_heads
        q_head = head % num_heads
        kv_head = q_head // group
        if RAGGED:
            row_tile, q_start, kv_start, sequence = find_tile(sizes, row_tile, SHAPE)
        first_row = row_tile * (ROWS * CONSUMERS)
        if RAGGED:
            first_row += q_start
        else:
            sequence = sequence_of(sizes, head, SHAPE)
            kv_start = 0
        q_n, kv_n, oldest, newest = sequence
        first_block, end_block = tile_blocks(row_tile, sequence, SHAPE)
        for block in range(end_block - first_block):
            key = (end_block - 1 - block) * BLOCK_N  # from right to left: the masked blocks first
            stage = step % STAGES
            mbarrier.wait(k_free.index(stage), ((step // STAGES) & 1) ^ 1)
            if is_wide(BLOCK_N):
                load_block(k_desc, batch, kv_head, key, k_ready.index(stage), k_smem, stage, SHAPE)
            else:
                mbarrier.expect(k_ready.index(stage), BLOCK_N * BLOCK_D)
                tma.async_load(k_desc, [batch, kv_head, kv_start + key, 0], k_ready.index(stage), k_smem.index(stage))
            if RAW == 1:  # the only block of V has to be transposed before the next one comes
                if step > 0:
                    _transpose(shared, barriers, step - 1, count_before, SHAPE, RAW, AHEAD)
            if block == 0:  # after the first keys, which need not wait for the rows of a tile before
                _load_queries(work, turn, (batch, q_head, first_row), (row_tile, head), SHAPE)
            if is_wide(BLOCK_N):
                load_block(v_desc, batch, kv_head, key, v_ready.index(step % RAW), v_smem, step % RAW, SHAPE)
            else:
                mbarrier.expect(v_ready.index(step % RAW), BLOCK_N * BLOCK_D)
                place = [batch, kv_head, kv_start + key, 0]
                tma.async_load(v_desc, place, v_ready.index(step % RAW), v_smem.index(step % RAW))
            if RAW > 1:
                if step > 0:
                    _transpose(shared, barriers, step - 1, count_before, SHAPE, RAW, AHEAD)
            count_before = kv_n - key
            step += 1
    if step > 0:
        _transpose(shared, barriers, step - 1, count_before, SHAPE, RAW, AHEAD)


@gluon.jit
def _packed(weights, BLOCK_N: gl.constexpr):
    if is_wide(BLOCK_N):
        made = ()
        for part in gl.static_range(len(weights)):
            made += (packed(weights[part]),)
        return made
    else:
        return packed(weights)


@gluon.jit
def _weigh(
    scores, m, row_sum, to_log2, ends, key, masked, S_LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, DUE: gl.constexpr,
    THREES: gl.constexpr,
):  # fmt: skip
    """Weights of one block of keys, the running maximum (in units of log2, less 8) and sums with it, the factor of what
    was summed up before, and, if DUE, where that is due. Where masked, a row sees only the keys below its end."""
    if masked:
        if is_wide(BLOCK_N):
            scores = masked_wide(scores, ends, key)
        else:
            columns = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
            scores = gl.where(columns[None, :] < (ends - key)[:, None], scores, float("-inf"))
    if is_wide(BLOCK_N):
        largest = largest_wide(scores, m, row_sum, OF_ZERO, BLOCK_N, THREES) * to_log2 - LARGEST_WEIGHT
    elif THREES:
        largest = largest_score(scores, m, OF_ZERO) * to_log2 - LARGEST_WEIGHT
    else:
        largest = gl.max(scores, 1) * to_log2 - LARGEST_WEIGHT
    m_new = gl.maximum(m, largest + gl.abs(largest) * ROUNDING)
    due = 0
    if DUE:
        due = grown(m, m_new)
    alpha = gl.exp2(m - m_new)
    if is_wide(BLOCK_N):
        weights, sums = weights_wide(scores, m_new, to_log2)
    else:
        weights = gl.exp2(scores * to_log2 - m_new[:, None])
        sums = partial_sums(weights, BLOCK_N)
    factor = gl.convert_layout(alpha, gl.SliceLayout(1, sums.type.layout), assert_trivial=True)
    row_sum = gl.convert_layout(row_sum, sums.type.layout, assert_trivial=True)
    return weights, m_new, row_sum * factor[:, None] + sums, alpha, due


@gluon.jit
def _await(barrier, phase, SHAPE: gl.constexpr):
    """A consumer waits for a buffer."""
    if SHAPE.BY_WARPS:
        wait_by_warps(barrier, phase)
    else:
        mbarrier.wait(barrier, phase)


@gluon.jit
def _give_back(barrier, SHAPE: gl.constexpr):
    """Say that a consumer has read a buffer, by tensor cores that it has waited for."""
    if SHAPE.BY_WARPS:
        arrive_by_warps(barrier)
    else:
        mbarrier.arrive(barrier, count=1)


@gluon.jit
def _multiply_keys(q, k_smem, stage, SHAPE: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Issue the product of a consumer's rows and a block of keys."""
    if is_wide(SHAPE.BLOCK_N):
        return multiply_keys_wide(q, k_smem, stage, SHAPE)
    else:
        k_t = k_smem.index(stage).reshape([SHAPE.BLOCK_N, SHAPE.BLOCK_D]).permute((1, 0))
        zeros = gl.zeros([ROWS, SHAPE.BLOCK_N], gl.float32, layout=S_LAYOUT)
        return warpgroup_mma(q, k_t, zeros, use_acc=False, is_async=True)


@gluon.jit
def _multiply_values(p, t_smem, stage, acc, SHAPE: gl.constexpr, P_LAYOUT: gl.constexpr):
    """Issue the product of packed weights and a block of V."""
    if is_wide(SHAPE.BLOCK_N):
        return multiply_values_wide(p, t_smem, stage, acc, SHAPE)
    elif SHAPE.ALIGNED:  # weights are read where `packed_into` writes them
        return multiply_values_wide((p,), t_smem, stage, acc, SHAPE)
    else:
        weights = gl.convert_layout(unpacked(p, SHAPE.BLOCK_N), P_LAYOUT, assert_trivial=True)
        return warpgroup_mma(weights, t_smem.index(stage).permute((1, 0)), acc, is_async=True)


@gluon.jit
def _wait_for_scores(scores, left: gl.constexpr, SHAPE: gl.constexpr):
    """Scores when all products but `left` are there."""
    if is_wide(SHAPE.BLOCK_N):
        return warpgroup_mma_wait(left, deps=scores)
    else:
        return warpgroup_mma_wait(left, deps=(scores,))


@gluon.jit
def _wait_for_sums(acc, p, next_p, SHAPE: gl.constexpr):
    """Sums when all products are there, with the weights that they read and those that were computed meanwhile."""
    if is_wide(SHAPE.BLOCK_N):
        PARTS: gl.constexpr = len(p)
        deps = (acc,)
        deps += p
        deps += next_p
        done = warpgroup_mma_wait(0, deps=deps)
        return done[0], done[1 : 1 + PARTS], done[1 + PARTS :]
    else:
        return warpgroup_mma_wait(0, deps=(acc, p, next_p))


@gluon.jit
def _wait_for_all(acc, scores, p, next_p, SHAPE: gl.constexpr):
    """As `_wait_for_sums`, with the scores of the block ahead."""
    if is_wide(SHAPE.BLOCK_N):
        PARTS: gl.constexpr = len(p)
        deps = (acc,)
        deps += scores
        deps += p
        deps += next_p
        done = warpgroup_mma_wait(0, deps=deps)
        return done[0], done[1 : 1 + PARTS], done[1 + PARTS : 1 + 2 * PARTS], done[1 + 2 * PARTS :]
    else:
        return warpgroup_mma_wait(0, deps=(acc, scores, p, next_p))


@gluon.jit
def _step(
    acc, p, m, row_sum, q, shared, barriers, step, to_log2, ends, key, masked, now,
    CONSUMER: gl.constexpr, SHAPE: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scores of block `step` and their exponentials beside the product of block `step - 1`. now: not 0, which the
    compiler does not know."""
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    CONSUMERS: gl.constexpr = SHAPE.CONSUMERS
    STAGES: gl.constexpr = SHAPE.STAGES
    V_STAGES: gl.constexpr = SHAPE.V_STAGES
    q_smem, k_smem, v_smem, t_smem = shared
    q_ready, q_free, k_ready, k_free, v_ready, t_ready, t_free = barriers
    stage = step % STAGES
    before = (step - 1) % V_STAGES
    _await(k_ready.index(stage), (step // STAGES) & 1, SHAPE)
    if SHAPE.PING_PONG:
        m = take_turn(m, CONSUMER)
    scores = _multiply_keys(q, k_smem, stage, SHAPE, S_LAYOUT)
    _await(t_ready.index(before), ((step - 1) // V_STAGES) & 1, SHAPE)
    acc = _multiply_values(p, t_smem, before, acc, SHAPE, P_LAYOUT)
    if SHAPE.PING_PONG:
        m = pass_turn(m, (CONSUMER + 1) % CONSUMERS)
    scores = _wait_for_scores(scores, 1, SHAPE)
    _give_back(k_free.index(stage), SHAPE)
    next_p, m, row_sum, alpha, due = _weigh(
        scores, m, row_sum, to_log2, ends, key, masked, S_LAYOUT, BLOCK_N, SHAPE.LAZY, SHAPE.THREES
    )
    if not SHAPE.BY_WARPS and not SHAPE.ALIGNED:
        next_p = _packed(next_p, BLOCK_N)
    if (SHAPE.CAUSAL or SHAPE.ALIGNED) and is_wide(BLOCK_N):
        halves = half_packed(next_p)
        row_sum = hold(row_sum)
        acc, p, next_p = _wait_for_sums(acc, p, next_p, SHAPE)
        next_p = packed_into(p, next_p, halves, now)
    elif SHAPE.ALIGNED:
        halves = half_packed((next_p,))
        row_sum = hold(row_sum)
        acc, p, next_p = _wait_for_sums(acc, p, next_p, SHAPE)
        next_p = packed_into((p,), (next_p,), halves, now)[0]
    else:
        row_sum = hold(row_sum)
        acc, p, next_p = _wait_for_sums(acc, p, next_p, SHAPE)
        if SHAPE.BY_WARPS:  # then they can have the registers of the weights before
            next_p = _packed(next_p, BLOCK_N)
    _give_back(t_free.index(before), SHAPE)
    if SHAPE.LAZY:
        acc = part_times_where(acc, alpha, due)
    else:
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True)[:, None]
    return acc, next_p, m, row_sum


@gluon.jit
def _near_first_block(
    q, shared, barriers, stage, m, row_sum, to_log2, ends, key, SHAPE: gl.constexpr, S_LAYOUT: gl.constexpr
):  # fmt: skip
    """Weights of a consumer's first block, with the maxima and sums, where its rows see the first 64 keys at most."""
    LAYOUT: gl.constexpr = layout_of(NEAR_KEYS)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    k_free = barriers[3]
    near = warpgroup_mma_wait(0, deps=(multiply_near_keys(q, shared[1], stage, SHAPE),))
    _give_back(k_free.index(stage), SHAPE)
    before = partial_sums(gl.zeros([ROWS, NEAR_KEYS], gl.float32, layout=LAYOUT), NEAR_KEYS)
    weights, m_new, sums, alpha, due = _weigh(
        near, gl.convert_layout(m, ROW_LAYOUT, assert_trivial=True), before, to_log2,
        gl.convert_layout(ends, ROW_LAYOUT, assert_trivial=True), key, True, LAYOUT, NEAR_KEYS, False, False,
    )  # fmt: skip
    m = gl.convert_layout(m_new, m.type.layout, assert_trivial=True)
    row_sum = gl.convert_layout(sums, row_sum.type.layout, assert_trivial=True)
    return packed_near(weights, SHAPE.BLOCK_N), m, row_sum


@gluon.jit
def _first_block(
    q, shared, barriers, stage, m, row_sum, to_log2, ends, seen, key, SHAPE: gl.constexpr, S_LAYOUT: gl.constexpr
):  # fmt: skip
    """As `_near_first_block`, where rows see more. Keys before `seen` all rows see."""
    k_free = barriers[3]
    scores = _wait_for_scores(_multiply_keys(q, shared[1], stage, SHAPE, S_LAYOUT), 0, SHAPE)
    _give_back(k_free.index(stage), SHAPE)
    if seen < key + SHAPE.BLOCK_N:
        scores = masked_far(scores, seen, ends, key, SHAPE.BLOCK_N)
    weights, m, row_sum, alpha, due = _weigh(
        scores, m, row_sum, to_log2, ends, key, False, S_LAYOUT, SHAPE.BLOCK_N, False, False
    )
    return _packed(weights, SHAPE.BLOCK_N), m, row_sum


@gluon.jit
def _step_ahead(
    acc, p, scores, m, row_sum, q, shared, barriers, step, to_log2, ends, key, masked,
    SHAPE: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Exponentials of block `step - 1`, whose scores are there, beside the product of block `step - 2` and the scores
    of block `step`: a consumer waits for no product but at the end of a step."""
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    STAGES: gl.constexpr = SHAPE.STAGES
    q_smem, k_smem, v_smem, t_smem = shared
    q_ready, q_free, k_ready, k_free, v_ready, t_ready, t_free = barriers
    stage = step % STAGES
    before = (step - 2) % STAGES
    _await(t_ready.index(before), ((step - 2) // STAGES) & 1, SHAPE)
    acc = _multiply_values(p, t_smem, before, acc, SHAPE, P_LAYOUT)
    _await(k_ready.index(stage), (step // STAGES) & 1, SHAPE)
    next_scores = _multiply_keys(q, k_smem, stage, SHAPE, S_LAYOUT)
    next_p, m, row_sum, alpha, due = _weigh(
        scores, m, row_sum, to_log2, ends, key, masked, S_LAYOUT, BLOCK_N, True, SHAPE.THREES
    )
    next_p = _packed(next_p, BLOCK_N)
    row_sum = hold(row_sum)
    acc, scores, p, next_p = _wait_for_all(acc, next_scores, p, next_p, SHAPE)
    _give_back(k_free.index(stage), SHAPE)
    return part_times_where(acc, alpha, due), next_p, scores, m, row_sum


@gluon.jit
def _steps_ahead(
    acc, p, scores, m, row_sum, q, q_free, shared, barriers, step, to_log2, ends, first_block, to_left, unmasked,
    SHAPE: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """All steps of a tile but its first, of which `p` are the weights: `to_left` blocks. The last one's product with V
    is the caller's."""
    STAGES: gl.constexpr = SHAPE.STAGES
    q_smem, k_smem, v_smem, t_smem = shared
    _q_ready, _q_free, k_ready, k_free, v_ready, t_ready, t_free = barriers
    if to_left > 0:
        stage = step % STAGES
        _await(k_ready.index(stage), (step // STAGES) & 1, SHAPE)
        scores = _wait_for_scores(_multiply_keys(q, k_smem, stage, SHAPE, S_LAYOUT), 0, SHAPE)
        _give_back(k_free.index(stage), SHAPE)
        step += 1
    block = first_block + to_left - 1  # whose scores are there
    to_come = to_left - 1
    if SHAPE.CAUSAL:  # two loops, as elsewhere
        masked_count = gl.maximum(gl.minimum(block - unmasked + 1, to_come), 0)
        for _unused in range(masked_count):
            acc, p, scores, m, row_sum = _step_ahead(
                acc, p, scores, m, row_sum, q, shared, barriers, step, to_log2, ends, block * SHAPE.BLOCK_N, True,
                SHAPE, S_LAYOUT, O_LAYOUT, P_LAYOUT,
            )  # fmt: skip
            step += 1
            block -= 1
        to_come -= masked_count
        p = all_moved(p) if is_wide(SHAPE.BLOCK_N) else moved(p)
    for _unused in range(to_come):
        acc, p, scores, m, row_sum = _step_ahead(
            acc, p, scores, m, row_sum, q, shared, barriers, step, to_log2, 0, 0, False,
            SHAPE, S_LAYOUT, O_LAYOUT, P_LAYOUT,
        )  # fmt: skip
        step += 1
    _give_back(q_free, SHAPE)
    if to_left > 0:
        before = (step - 2) % STAGES
        _await(t_ready.index(before), ((step - 2) // STAGES) & 1, SHAPE)
        acc = _multiply_values(p, t_smem, before, acc, SHAPE, P_LAYOUT)
        next_p, m, row_sum, alpha, due = _weigh(
            scores, m, row_sum, to_log2, ends, first_block * SHAPE.BLOCK_N, first_block >= unmasked, S_LAYOUT,
            SHAPE.BLOCK_N, True, SHAPE.THREES,
        )  # fmt: skip
        next_p = _packed(next_p, SHAPE.BLOCK_N)
        row_sum = hold(row_sum)
        acc, p, next_p = _wait_for_sums(acc, p, next_p, SHAPE)
        acc = part_times_where(acc, alpha, due)
        p = next_p
    return acc, p, m, row_sum, step


@gluon.jit
def _descale(factor, batch, kv_head):
    """One of the factors of a head of keys; 1 where there is none."""
    pointer, stride_b, stride_h = factor
    value = 1.0
    if pointer.to(gl.int64) != 0:
        value = gl.load(pointer + (batch.to(gl.int64) * stride_b + kv_head.to(gl.int64) * stride_h))
    return value


@gluon.jit
def _attend(work, CONSUMER: gl.constexpr, SHAPE: gl.constexpr, AHEAD: gl.constexpr):
    """One consumer: 64 rows of each of the program's tiles."""
    BLOCK_D: gl.constexpr = SHAPE.BLOCK_D
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    CONSUMERS: gl.constexpr = SHAPE.CONSUMERS
    STAGES: gl.constexpr = SHAPE.STAGES
    CAUSAL: gl.constexpr = SHAPE.CAUSAL
    Q_SLOTS: gl.constexpr = SHAPE.Q_SLOTS
    V_STAGES: gl.constexpr = SHAPE.V_STAGES
    ORDER: gl.constexpr = SHAPE.ORDER
    MASKS: gl.constexpr = CAUSAL and not SHAPE.ALIGNED  # of other blocks than a consumer's first
    GENERAL: gl.constexpr = SHAPE.GENERAL
    RAGGED: gl.constexpr = SHAPE.RAGGED
    S_LAYOUT: gl.constexpr = layout_of(near_keys(BLOCK_N))
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 32])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=4)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    STORE_LAYOUT: gl.constexpr = rows_layout(BLOCK_D)
    descriptors, shared, barriers, sizes, out, factors, handed = work
    q_smem, k_smem, v_smem, t_smem = shared
    q_ready, q_free, k_ready, k_free, v_ready, t_ready, t_free = barriers
    num_heads, group, q_len, kv_len, row_tiles, heads, section, bounds = sizes
    Out, out_stride_b, out_stride_h, out_stride_s, head_size, Lse = out
    sm_scale, q_descale, k_descale, v_descale = factors
    if SHAPE.PING_PONG:
        if CONSUMER == CONSUMERS - 1:
            pass_turn(gl.zeros([ROWS], gl.float32, layout=ROW_LAYOUT), 0)
    step = 0
    for turn in range(tile_count(row_tiles, heads, section, ORDER)):
        if not SHAPE.HANDED:
            row_tile, head = tile_of(turn, row_tiles, heads, section, ORDER)
        slot = turn % Q_SLOTS * CONSUMERS + CONSUMER
        if SHAPE.HANDED:
            _await(q_ready.index(slot), (turn // Q_SLOTS) & 1, SHAPE)
            row_tile, head = given_tile(handed, slot)
        q = q_smem.index(slot).reshape([ROWS, BLOCK_D])
        if RAGGED:
            row_tile, q_start, kv_start, sequence = find_tile(sizes, row_tile, SHAPE)
            batch = head * 0
        else:
            sequence = sequence_of(sizes, head, SHAPE)
            q_start = 0
            batch = head // num_heads
        kv_head = head % num_heads // group
        first_row = row_tile * (ROWS * CONSUMERS) + CONSUMER * ROWS
        rows = first_row + gl.arange(0, ROWS, layout=ROW_LAYOUT)
        q_n, kv_n, oldest, newest = sequence
        first_block, end_block = tile_blocks(row_tile, sequence, SHAPE)
        scale = sm_scale * (_descale(q_descale, batch, kv_head) * _descale(k_descale, batch, kv_head))
        to_log2 = gl.minimum(scale * LOG2_E, LARGEST_FACTOR)
        block = end_block - 1  # from right to left: the masked blocks first
        if CAUSAL:
            ends = gl.minimum(rows + (newest + 1), kv_n)  # keys below it are visible to a row
            if GENERAL:
                ends = gl.where(rows < q_n, ends, 0)
            own_end = gl.minimum(end_block_of(first_row + ROWS, sequence, SHAPE), end_block)
            own_end = gl.maximum(own_end, first_block + 1)
            unmasked = gl.maximum(gl.minimum(first_row + newest + 1, kv_n), 0) // BLOCK_N
            if GENERAL:
                unmasked = gl.where(first_row + ROWS <= q_n, unmasked, 0)
            for _unused in range(end_block - own_end):  # keys only for the rows of the consumers below
                if SHAPE.PING_PONG:
                    turn_taken = take_turn(gl.zeros([ROWS], gl.float32, layout=ROW_LAYOUT), CONSUMER)
                    pass_turn(turn_taken, (CONSUMER + 1) % CONSUMERS)
                _await(k_ready.index(step % STAGES), (step // STAGES) & 1, SHAPE)
                _give_back(k_free.index(step % STAGES), SHAPE)
                _await(t_ready.index(step % V_STAGES), (step // V_STAGES) & 1, SHAPE)
                if not AHEAD:
                    _give_back(t_free.index(step % V_STAGES), SHAPE)
                step += 1
            block = own_end - 1
        else:
            ends = rows * 0 + kv_n
            unmasked = kv_n // BLOCK_N
        m = gl.full([ROWS], LOWEST, gl.float32, layout=ROW_LAYOUT)
        NEAR: gl.constexpr = near_keys(BLOCK_N)
        row_sum = partial_sums(gl.zeros([ROWS, NEAR], gl.float32, layout=S_LAYOUT), NEAR)
        stage = step % STAGES
        if not SHAPE.HANDED:
            _await(q_ready.index(slot), (turn // Q_SLOTS) & 1, SHAPE)
        _await(k_ready.index(stage), (step // STAGES) & 1, SHAPE)
        if SHAPE.HALVED:
            seen = gl.minimum(first_row + newest + 1, kv_n)  # keys before it all rows see
            if gl.minimum(first_row + ROWS + newest, kv_n) - block * BLOCK_N <= NEAR_KEYS:
                p, m, row_sum = _near_first_block(
                    q, shared, barriers, stage, m, row_sum, to_log2, ends, block * BLOCK_N, SHAPE, S_LAYOUT
                )
            else:
                p, m, row_sum = _first_block(
                    q, shared, barriers, stage, m, row_sum, to_log2, ends, seen, block * BLOCK_N, SHAPE, S_LAYOUT
                )
        else:
            scores = _wait_for_scores(_multiply_keys(q, k_smem, stage, SHAPE, S_LAYOUT), 0, SHAPE)
            _give_back(k_free.index(stage), SHAPE)
            p, m, row_sum, alpha, due = _weigh(
                scores, m, row_sum, to_log2, ends, block * BLOCK_N, block >= unmasked, S_LAYOUT, BLOCK_N, AHEAD,
                False,  # the maximum before is below all scores
            )  # fmt: skip
            p = _packed(p, BLOCK_N)
        acc = gl.zeros([ROWS, BLOCK_D], gl.float32, layout=O_LAYOUT)
        step += 1
        to_left = uniform(block - first_block)
        step = uniform(step)
        block = uniform(block)
        if AHEAD:
            acc, p, m, row_sum, step = _steps_ahead(
                acc, p, scores, m, row_sum, q, q_free.index(slot), shared, barriers, step, to_log2, ends, first_block,
                to_left, unmasked, SHAPE, S_LAYOUT, O_LAYOUT, P_LAYOUT,
            )  # fmt: skip
        elif MASKS and is_wide(BLOCK_N):  # one loop: between two, weights would be moved in each round of the second
            for _unused in range(to_left):
                block -= 1
                acc, p, m, row_sum = _step(
                    acc, p, m, row_sum, q, shared, barriers, step, to_log2, ends, block * BLOCK_N, block >= unmasked,
                    num_heads, CONSUMER, SHAPE, S_LAYOUT, O_LAYOUT, P_LAYOUT,
                )  # fmt: skip
                step += 1
            _give_back(q_free.index(slot), SHAPE)
        else:
            if MASKS:  # two loops: the second, which has most of the blocks, needs no registers to mask them
                masked_count = gl.minimum(gl.maximum(block - unmasked, 0), to_left)
                for _unused in range(masked_count):
                    block -= 1
                    acc, p, m, row_sum = _step(
                        acc, p, m, row_sum, q, shared, barriers, step, to_log2, ends, block * BLOCK_N, True,
                        num_heads, CONSUMER, SHAPE, S_LAYOUT, O_LAYOUT, P_LAYOUT,
                    )  # fmt: skip
                    step += 1
                to_left -= masked_count
                p = moved(p)
            for _unused in range(to_left):
                acc, p, m, row_sum = _step(
                    acc, p, m, row_sum, q, shared, barriers, step, to_log2, ends, 0, False,
                    num_heads, CONSUMER, SHAPE, S_LAYOUT, O_LAYOUT, P_LAYOUT,
                )  # fmt: skip
                step += 1
            _give_back(q_free.index(slot), SHAPE)
        last = (step - 1) % V_STAGES
        _await(t_ready.index(last), ((step - 1) // V_STAGES) & 1, SHAPE)
        acc = _multiply_values(p, t_smem, last, acc, SHAPE, P_LAYOUT)
        total = gl.convert_layout(gl.sum(row_sum, 1), ROW_LAYOUT, assert_trivial=True)
        some = total != 0  # NaN too
        inverse = gl.where(some, _descale(v_descale, batch, kv_head) / total, 0.0)
        out_rows = q_n if RAGGED else q_len
        if Lse.to(gl.int64) != 0:
            lse = gl.where(some, (m + gl.log2(total)) * LN_2, float("-inf"))
            gl.store(Lse + (head.to(gl.int64) * q_len + q_start) + rows, lse, mask=rows < out_rows)
        acc, p, p = _wait_for_sums(acc, p, p, SHAPE)
        if not AHEAD:
            _give_back(t_free.index(last), SHAPE)
        factor = gl.convert_layout(inverse, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True)
        if SHAPE.ALIGNED:  # looked for once a tile
            if first_row + newest < 0:
                acc = gl.where((factor != 0)[:, None], acc, 0.0)
        elif CAUSAL:  # rows without keys are zeros, even if what they multiplied with 0 is NaN
            acc = gl.where((factor != 0)[:, None], acc, 0.0)
        ordered = narrow(_in_order(acc * factor[:, None], STORE_LAYOUT, BLOCK_D), Out.dtype.element_ty)
        own_rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, STORE_LAYOUT))
        columns = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, STORE_LAYOUT))
        start = batch.to(gl.int64) * out_stride_b + (head % num_heads).to(gl.int64) * out_stride_h
        places = Out + (start + q_start * out_stride_s) + own_rows.to(gl.int64) * out_stride_s
        inside = (own_rows < out_rows)[:, None] & (columns < head_size)[None, :]
        gl.store(places[:, None] + columns[None, :], ordered, mask=inside)


@gluon.jit
def fmha_fp8_sm90(
    q_desc,
    k_desc,
    v_desc,
    Out,
    Lse,
    Q,
    K,
    V,
    q_descale,
    k_descale,
    v_descale,
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
    q_descale_stride_b,
    q_descale_stride_h,
    k_descale_stride_b,
    k_descale_stride_h,
    v_descale_stride_b,
    v_descale_stride_h,
    window_left,
    window_right,
    bottom_right,
    ragged,
    BLOCK_D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
    RAW: gl.constexpr,
    CAUSAL: gl.constexpr,
    LONGEST_FIRST: gl.constexpr,
    GENERAL: gl.constexpr,
    RAGGED: gl.constexpr,
    PING_PONG: gl.constexpr,
    Q_SLOTS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    AHEAD: gl.constexpr = False,
    LAZY: gl.constexpr = False,
    PRODUCER_FIRST: gl.constexpr = False,
    THREES: gl.constexpr = False,
    BY_WARPS: gl.constexpr = False,
    EVEN: gl.constexpr = 0,
    ALIGNED: gl.constexpr = False,
    HALVED: gl.constexpr = False,
):
    """Grid: as that of fmha_fwd_sm90, which has one consumer, too.

    Descriptors: boxes of [1, 1, 64, BLOCK_D] for Q, [1, 1, BLOCK_N, BLOCK_D] for K and V. q_descale, k_descale and
    v_descale are float32 [batch, key heads] by their strides, positive, or null for 1; of a ragged batch, [1, key
    heads]. window_left is -1; window_right is 0 where CAUSAL, else -1, and either where GENERAL, which wants CAUSAL and
    serves lengths. RAGGED wants GENERAL and all that fmha_fwd_sm90's does. No soft caps. STAGES, RAW and V_STAGES:
    blocks of K, of V and of V transposed in flight. Elements of Out go by eights.

    LAZY: products of the sums are left out where no row of a warp has grown, which AHEAD does anyway. PRODUCER_FIRST:
    which partition the first warps are. THREES: maxima are taken of three scores at a time (sm90_maxima.py).

    EVEN: as fmha_fwd_sm90's, with places handed on by the producer. ALIGNED: a consumer's rows, and the keys they see,
    begin with a multiple of 64 keys, so that of causal attention only its first block is masked, in no loop: BLOCK_N is
    a multiple of 64, bottom_right 0 or kv_len - q_len a multiple of 64. Weights are then packed in the registers of
    those before, as in blocks that are no power of two. HALVED: of a first block of which its rows see 64 keys at most,
    a consumer multiplies those alone; so with CAUSAL and ALIGNED.

    AHEAD: scores are a block ahead of their exponentials (`_step_ahead`). Not with PING_PONG: a consumer of a single
    block would take a turn more than the others. STAGES is at least 3 and V_STAGES the same: t_free is k_free,
    by which a consumer gives back the block of K of its step and that of V two steps before.
    """
    group = num_heads // num_kv_heads
    row_tiles = (q_len + (ROWS * CONSUMERS - 1)) // (ROWS * CONSUMERS)
    all_heads = num_heads if RAGGED else batch_size * num_heads
    if RAGGED:
        row_tiles += batch_size + 1
        bounds = (bottom_right, (cu_seqlens_q, batch_size), cu_seqlens_kv, window_left, window_right)
    else:
        bounds = (bottom_right, q_lengths, kv_lengths, window_left, window_right)
    gl.static_assert(not ALIGNED or BLOCK_N % ROWS == 0, "ALIGNED wants blocks of a multiple of 64 keys")
    gl.static_assert(not HALVED or (CAUSAL and ALIGNED), "HALVED wants CAUSAL and ALIGNED")
    ORDER: gl.constexpr = order_of(CAUSAL, False, LONGEST_FIRST, 0, EVEN > 0, False)
    if EVEN:
        section = section_heads(row_tiles, all_heads, EVEN)
    else:
        section = section_heads(row_tiles, all_heads) if LONGEST_FIRST else all_heads
    sizes = (num_heads, group, q_len, kv_len, row_tiles, all_heads, section, bounds)
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [Q_SLOTS * CONSUMERS, 1, 1, ROWS, BLOCK_D], q_desc.layout)
    if is_wide(BLOCK_N):
        gl.static_assert(not GENERAL, "blocks that are no power of two go without lengths")
        k_smem = allocate_blocks(k_desc, STAGES, BLOCK_D, BLOCK_N)
        v_smem = allocate_blocks(v_desc, RAW, BLOCK_D, BLOCK_N)
        t_smem = allocate_turned(dtype, V_STAGES, BLOCK_D, BLOCK_N)
    else:
        k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
        v_smem = gl.allocate_shared_memory(dtype, [RAW, 1, 1, BLOCK_N, BLOCK_D], v_desc.layout)
        TURNED: gl.constexpr = gl.NVMMASharedLayout(min(BLOCK_N, 128), 8, 2)
        t_smem = gl.allocate_shared_memory(dtype, [V_STAGES, BLOCK_D, BLOCK_N], TURNED)
    q_ready = gl.allocate_shared_memory(gl.int64, [Q_SLOTS * CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [Q_SLOTS * CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [RAW, 1], mbarrier.MBarrierLayout())
    t_ready = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    if AHEAD:
        gl.static_assert(not PING_PONG, "AHEAD goes without turns")
        gl.static_assert(STAGES == V_STAGES and STAGES >= 3, "AHEAD wants as many STAGES as V_STAGES, at least 3")
        t_free = k_free
    else:
        t_free = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    handed = ()
    if EVEN:
        handed = gl.allocate_shared_memory(gl.int32, [2 * Q_SLOTS * CONSUMERS, 1], SMEM)
    ARRIVALS: gl.constexpr = 4 if BY_WARPS else 1  # of a consumer
    for c in gl.static_range(Q_SLOTS * CONSUMERS):
        mbarrier.init(q_ready.index(c), count=1)
        mbarrier.init(q_free.index(c), count=ARRIVALS)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(s), count=1)
        mbarrier.init(k_free.index(s), count=CONSUMERS * ARRIVALS)
    for s in gl.static_range(RAW):
        mbarrier.init(v_ready.index(s), count=1)
    for s in gl.static_range(V_STAGES):
        mbarrier.init(t_ready.index(s), count=1)
        if not AHEAD:
            mbarrier.init(t_free.index(s), count=CONSUMERS * ARRIVALS)
    factors = (
        sm_scale,
        (q_descale, q_descale_stride_b, q_descale_stride_h),
        (k_descale, k_descale_stride_b, k_descale_stride_h),
        (v_descale, v_descale_stride_b, v_descale_stride_h),
    )
    work = (
        (q_desc, k_desc, v_desc),
        (q_smem, k_smem, v_smem, t_smem),
        (q_ready, q_free, k_ready, k_free, v_ready, t_ready, t_free),
        sizes,
        (Out, out_stride_b, out_stride_h, out_stride_s, head_size, Lse),
        factors,
        handed,
    )
    SHAPE: gl.constexpr = Shape(
        BLOCK_D, BLOCK_N, CONSUMERS, STAGES, CAUSAL, PING_PONG, Q_SLOTS, True, V_STAGES, ORDER, GENERAL, RAGGED, False,
        LAZY=LAZY, THREES=THREES, BY_WARPS=BY_WARPS, HANDED=EVEN > 0, ALIGNED=ALIGNED, HALVED=HALVED,
    )  # fmt: skip
    if CONSUMERS == 2 and PRODUCER_FIRST:
        gl.warp_specialize(
            [
                (_load, (work, SHAPE, RAW, AHEAD)),
                (_attend, (work, 0, SHAPE, AHEAD)),
                (_attend, (work, 1, SHAPE, AHEAD)),
            ],
            [4, 4],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS],
        )
    elif PRODUCER_FIRST:
        gl.warp_specialize(
            [
                (_load, (work, SHAPE, RAW, AHEAD)),
                (_attend, (work, 0, SHAPE, AHEAD)),
                (_attend, (work, 1, SHAPE, AHEAD)),
                (_attend, (work, 2, SHAPE, AHEAD)),
            ],
            [4, 4, 4],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, CONSUMER_REGISTERS],
        )
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_attend, (work, 0, SHAPE, AHEAD)),
                (_attend, (work, 1, SHAPE, AHEAD)),
                (_load, (work, SHAPE, RAW, AHEAD)),
            ],
            [4, 4],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (work, 0, SHAPE, AHEAD)),
                (_attend, (work, 1, SHAPE, AHEAD)),
                (_attend, (work, 2, SHAPE, AHEAD)),
                (_load, (work, SHAPE, RAW, AHEAD)),
            ],
            [4, 4, 4],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
