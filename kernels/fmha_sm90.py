"""Attention forward for Hopper (sm_90) in Gluon: TMA, warp-specialised, FlashAttention-3 shaped.

The same function as fmha_fwd.py for fp16 and bf16, see its docstring for the arguments. Compiled GENERAL it serves
lengths and windows of any width, else full or causal attention alone, faster; compiled LENGTHS, lengths, too; compiled
RAGGED, ragged batches, whose tiles are of one sequence each (GENERAL: sm90_ragged.py; LENGTHS, those of few sequences,
faster: sm90_places.py); compiled CAPPED, soft caps, and else none; compiled TWO_PARTS, head
sizes of 3/4 of a power of two (sm90_parts.py). The algorithm is that of
Shah et al., "FlashAttention-3" (2024): a producer loads through TMA into a ring of K and V blocks; each consumer
warpgroup owns 64 query rows, multiplies with wgmma straight from shared memory, and lets the product of the last
block's weights with V run while it takes the exponentials of the next block.

Programs are persistent: program p of n takes the tiles p, n + p, 2n + p, ...; of causal attention pairs of tiles, a
long one and a short one, so that every program gets as much to do. Programs beside each other share heads, which thus
stay in the L2 cache. While a consumer finishes one tile, the loads of its next are already under way.

Descriptors are [batch, heads, seq, head size], so that a block past the end of a sequence, or past the head size, reads
zeros instead of the next head, and is not written past either. Any strides a descriptor can take will do. NaN or
infinity in V reaches queries of tiles whose blocks hold it, whether they see its key or not, except behind kv_lengths
and in other sequences of a ragged batch.

Arithmetic is fast within the range that fmha_triton.py explains. Rows that leave it are noted, and computed again when
all tiles are done, one key at a time, in arithmetic that stays finite for any finite input; so Out must not overlap the
inputs. That part stands outside the consumers, whose registers it would fill with strides and pointers. NaN in the
input takes the same path, hundreds of times slower.
"""

from sm90_asm import hold, keep_up, moved, pass_turn, take_turn, uniform, written
from sm90_capped import WORD, capped_factors, not_held, reach_next, seen, weigh_capped
from sm90_direct import store_direct
from sm90_lazy import kept, room_for, times_where
from sm90_parts import (
    ONCE,
    allocate,
    load_rows,
    matrix,
    multiply_keys,
    multiply_near_keys,
    multiply_values,
    no_values,
    store_tile,
    times,
    wait_for_products,
)
from sm90_places import (
    FEW_SEGMENTS,
    FOUND,
    FOUND_WORDS,
    HANDED,
    SEGMENTS,
    SMEM,
    drop_rows,
    find_places,
    find_ranked,
    found_place,
    hand_on,
    hand_on_tile,
    place_of_turn,
    taken,
    taken_tile,
    write_table,
)
from sm90_powers import polynomials_of, tanh_factors
from sm90_products import product_factors
from sm90_ragged import find_tile, store_rows
from sm90_sinks import NOTHING, finished, load_sink
from sm90_slow import LN_2, SLOW_ROWS, compute_slowly, narrow, score_factors, shift_of
from sm90_softmax import (
    mask_all,
    mask_far,
    maxima,
    pack,
    partial_sums,
    unpack,
    weigh,
    weigh_after,
    weigh_half,
    weigh_lazily,
    weigh_near,
)
from sm90_tiles import (
    ROWS,
    Shape,
    end_block_of,
    even_begin,
    first_key,
    is_even,
    next_place,
    order_of,
    section_heads,
    section_or_pairs,
    sequence_of,
    tile_blocks,
    tile_count,
    tile_of,
)
from sm90_wide import (
    all_moved,
    all_packed,
    allocate_blocks,
    first_weights_wide,
    is_wide,
    layout_of,
    load_block,
    maxima_wide,
    multiply_keys_wide,
    multiply_values_wide,
    near_keys,
    next_weights_wide,
    wait_for_products_wide,
)
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

# Passes of Triton's that change nothing here, see pyfmha/aot/passes.py. A partition's barriers between uses of shared
# memory stand where Triton would put its own, also where a thread reads only what it wrote itself.
BY_HAND = ("fences", "barriers", "layouts")

# Scores, in units of log2, that the fast arithmetic accepts: see fmha_triton.py.
FAST_LIMIT: gl.constexpr = gl.constexpr(1048576.0)
# A row notes the tiles to compute again in the bits of a word. Where a program has more, several share a bit, and are
# then all computed again.
NOTES: gl.constexpr = gl.constexpr(32)
NOTE: gl.constexpr = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
NOTE_SMEM: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _load_block(desc, batch, head, key, ready, buffers, stage, SHAPE: gl.constexpr):
    if is_wide(SHAPE.BLOCK_N):
        load_block(desc, batch, head, key, ready, buffers, stage, SHAPE)
    else:
        load_rows(desc, batch, head, key, ready, buffers, stage, SHAPE.BLOCK_N, SHAPE)


@gluon.jit
def _load_v(work, place, step, SHAPE: gl.constexpr):
    """The block of V of one step."""
    V_STAGES: gl.constexpr = SHAPE.V_STAGES
    descriptors, shared, barriers, notes, sizes, Lse, factors, zero = work
    q_desc, k_desc, v_desc, out_desc = descriptors
    q_smem, k_smem, v_smem = shared
    q_ready, q_free, k_ready, k_free, v_ready, v_free, v_whole = barriers
    batch, head, key = place
    stage = step % V_STAGES
    mbarrier.wait(v_free.index(stage), ((step // V_STAGES) & 1) ^ 1)
    _load_block(v_desc, batch, head, key, v_ready.index(stage), v_smem, stage, SHAPE)


@gluon.jit
def _load(work, SHAPE: gl.constexpr):
    """The producer, which loads what the consumers use in the order in which they do: V a step behind K, across tiles
    too, so that the first keys of a tile are asked for before the last values of the one before."""
    LAGS: gl.constexpr = lags(SHAPE)
    CONSUMERS: gl.constexpr = SHAPE.CONSUMERS
    STAGES: gl.constexpr = SHAPE.STAGES
    ORDER: gl.constexpr = SHAPE.ORDER
    Q_SLOTS: gl.constexpr = SHAPE.Q_SLOTS
    RAGGED: gl.constexpr = SHAPE.RAGGED
    HANDING: gl.constexpr = RAGGED and SHAPE.LENGTHS
    descriptors, shared, barriers, notes, sizes, Lse, factors, zero = work
    q_desc, k_desc, v_desc, out_desc = descriptors
    q_smem, k_smem, v_smem = shared
    q_ready, q_free, k_ready, k_free, v_ready, v_free, v_whole = barriers
    num_heads, group, q_len, kv_len, row_tiles, heads, section, bounds = sizes
    step = 0
    v_place = (0, 0, 0)
    state = even_begin() if is_even(ORDER) else ()
    if HANDING and not SHAPE.FINDER:
        following, state = place_of_turn(0, state, sizes, SHAPE)
    for turn in range(tile_count(row_tiles, heads, section, ORDER)):
        if HANDING and SHAPE.FINDER:
            head, row_tile, q_start, kv_start, sequence = found_place(notes[1], turn, sizes, SHAPE)
        elif HANDING:
            head, row_tile, q_start, kv_start, sequence = following
        elif is_even(ORDER):
            row_tile, head, state = next_place(turn, state, row_tiles, heads, section, ORDER)
        else:
            row_tile, head = tile_of(turn, row_tiles, heads, section, ORDER)
        batch = head // num_heads
        q_head = head % num_heads
        kv_head = q_head // group
        if RAGGED and not HANDING:
            row_tile, q_start, kv_start, sequence = find_tile(sizes, row_tile, SHAPE)
        first_row = row_tile * (ROWS * CONSUMERS)
        if RAGGED:
            first_row += q_start
        else:
            sequence = sequence_of(sizes, head, SHAPE)
        first_block, end_block = tile_blocks(row_tile, sequence, SHAPE)
        last = end_block - first_block - 1
        rows_at = 0  # the block after whose keys the queries are asked for
        if SHAPE.EARLY and Q_SLOTS == 1 and not SHAPE.DIRECT:
            rows_at = gl.where(turn > 0, gl.minimum(1, last), 0)
        for block in range(end_block - first_block):
            key = first_key(end_block - 1 - block, sequence, SHAPE)  # from right to left: the masked blocks first
            if RAGGED:
                key += kv_start
            stage = step % STAGES
            phase = ((step // STAGES) & 1) ^ 1
            if CONSUMERS == 1:
                # All programs start at once, two an SM: what each needs first should not queue behind what can wait.
                if step == 1:
                    mbarrier.wait(q_ready.index(0), 0)
            mbarrier.wait(k_free.index(stage), phase)
            _load_block(k_desc, batch, kv_head, key, k_ready.index(stage), k_smem, stage, SHAPE)
            if SHAPE.EARLY:  # values not behind rows whose slot is free when those of the tile before are stored
                if block > 0:
                    _load_v(work, v_place, step - 1, SHAPE)
                if block == last:
                    _load_v(work, (batch, kv_head, key), step, SHAPE)
            elif Q_SLOTS == 1:  # the only slot is free when the tile before has had its last values
                if step > 0:
                    _load_v(work, v_place, step - 1, SHAPE)
            if block == rows_at:  # after the first keys, which need not wait for the rows of a tile before
                for c in gl.static_range(CONSUMERS):
                    slot = turn % Q_SLOTS * CONSUMERS + c
                    mbarrier.wait(q_free.index(slot), ((turn // Q_SLOTS) & 1) ^ 1)
                    row = first_row + c * ROWS
                    if HANDING:
                        hand_on(sizes, slot, row_tile, head, q_start, sequence, SHAPE)
                    if SHAPE.HANDED:
                        hand_on_tile(notes[1], slot, row_tile, head)
                    load_rows(q_desc, batch, q_head, row, q_ready.index(slot), q_smem, slot, ROWS, SHAPE, ONCE)
            if Q_SLOTS > 1 and not SHAPE.EARLY:
                if step > 0:
                    _load_v(work, v_place, step - 1, SHAPE)
            v_place = (batch, kv_head, key)
            if HANDING and not SHAPE.FINDER:
                # Where the consumers have been given work for as long as that takes: not where a tile ends.
                if block == gl.minimum(1, end_block - first_block - 1):
                    following, state = place_of_turn(turn + 1, state, sizes, SHAPE)
            step += 1
            if LAGS:
                keep_up(step, 2, 13, 1)
        if LAGS:
            keep_up(step, 8, 13, 1)
    if not SHAPE.EARLY:
        if step > 0:
            _load_v(work, v_place, step - 1, SHAPE)
    if LAGS:
        keep_up(step, 40, 13, 1)


@gluon.jit
def _find(work, SHAPE: gl.constexpr):
    """A warp that looks for the tiles of a ragged batch, so that the producer need not."""
    find_places(work[3][1], work[4], SHAPE)


@gluon.constexpr_function
def lags(shape):
    """Whether the other warps pass barriers of their own: one consumer that sees all keys is 1 to 3 % faster so where
    sequences are short, as measured; they were there for racecheck (NOTES.md)."""
    return shape.CONSUMERS == 1 and not (shape.CAUSAL or shape.GENERAL or shape.RAGGED)


@gluon.jit
def _idle(sizes, SHAPE: gl.constexpr, NAME: gl.constexpr, WARPS: gl.constexpr):
    """Warps that only fill up the warpgroup of a producer that lags."""
    num_heads, group, q_len, kv_len, row_tiles, heads, section, bounds = sizes
    barriers = 40
    for turn in range(tile_count(row_tiles, heads, section, SHAPE.ORDER)):
        row_tile, head = tile_of(turn, row_tiles, heads, section, SHAPE.ORDER)
        first_block, end_block = tile_blocks(row_tile, sequence_of(sizes, head, SHAPE), SHAPE)
        barriers += 2 * (end_block - first_block) + 8
    for i in range(0, barriers, 16):
        keep_up(i, 16, NAME, WARPS)


@gluon.jit
def _make_whole(v_smem, barriers, step, count, CONSUMER: gl.constexpr, SHAPE: gl.constexpr):
    """Set to zero what follows the first `count` rows of a step's block of V, and tell the other consumers. Padding
    behind a sequence may be NaN, which a weight of 0 does not undo.

    It falls to the last consumer, which uses every block of a tile, before its turn, which another may keep that waits.
    """
    BLOCK_D: gl.constexpr = SHAPE.BLOCK_D
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    CONSUMERS: gl.constexpr = SHAPE.CONSUMERS
    V_STAGES: gl.constexpr = SHAPE.V_STAGES
    HEIGHT: gl.constexpr = 16
    q_ready, q_free, k_ready, k_free, v_ready, v_free, v_whole = barriers
    stage = step % V_STAGES
    if CONSUMER == CONSUMERS - 1:
        if count < BLOCK_N:
            mbarrier.wait(v_ready.index(stage), (step // V_STAGES) & 1)
            LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
            rows = gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, LAYOUT))
            v = v_smem[0].index(stage).reshape([BLOCK_N, BLOCK_D])
            for first in gl.static_range(0, BLOCK_N, HEIGHT):
                if count < first + HEIGHT:
                    part = v.slice(first, HEIGHT)
                    kept = gl.where((rows < count - first)[:, None], part.load(LAYOUT), 0.0)
                    gl.barrier()
                    part.store(kept)
            fence_async_shared()
            gl.barrier()
        if CONSUMERS > 1:
            mbarrier.wait(v_ready.index(stage), (step // V_STAGES) & 1)  # so that it is never two rounds ahead
            mbarrier.arrive(v_whole.index(stage), count=1)


@gluon.jit
def _wait_for_v(barriers, step, CONSUMER: gl.constexpr, SHAPE: gl.constexpr):
    """Wait until a step's block of V is there, and nothing of it padding."""
    V_STAGES: gl.constexpr = SHAPE.V_STAGES
    q_ready, q_free, k_ready, k_free, v_ready, v_free, v_whole = barriers
    mbarrier.wait(v_ready.index(step % V_STAGES), (step // V_STAGES) & 1)
    if SHAPE.GENERAL and CONSUMER < SHAPE.CONSUMERS - 1:
        mbarrier.wait(v_whole.index(step % V_STAGES), (step // V_STAGES) & 1)


@gluon.jit
def _step(
    acc, p, m, row_sum, slot, shared, barriers, step, scale, shift: gl.constexpr, begins, ends, key, masked, values,
    zero, MASKED: gl.constexpr, CONSUMER: gl.constexpr, SHAPE: gl.constexpr, S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scores of block `step` beside the product of block `step - 1`. If LATE, exponentials run beside that product;
    else beside those of the other consumers, in registers that the weights before them have left."""
    BLOCK_D: gl.constexpr = acc[len(acc) - 1].shape[1]
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    CONSUMERS: gl.constexpr = SHAPE.CONSUMERS
    STAGES: gl.constexpr = SHAPE.STAGES
    PING_PONG: gl.constexpr = SHAPE.PING_PONG
    LATE: gl.constexpr = SHAPE.LATE
    V_STAGES: gl.constexpr = SHAPE.V_STAGES
    GENERAL: gl.constexpr = SHAPE.GENERAL
    CAUSAL: gl.constexpr = SHAPE.CAUSAL
    CAPPED: gl.constexpr = polynomials_of(SHAPE.CAPPED, CONSUMERS)
    q_smem, k_smem, v_smem = shared
    dtype: gl.constexpr = v_smem[0].dtype
    q_ready, q_free, k_ready, k_free, v_ready, v_free, v_whole = barriers
    stage = step % STAGES
    before = (step - 1) % V_STAGES
    if GENERAL:
        _make_whole(v_smem, barriers, step - 1, values - key - BLOCK_N, CONSUMER, SHAPE)
    mbarrier.wait(k_ready.index(stage), (step // STAGES) & 1)
    if PING_PONG:
        m = take_turn(m, CONSUMER)
    scores = multiply_keys(q_smem, slot, k_smem, stage, S_LAYOUT, SHAPE)
    _wait_for_v(barriers, step - 1, CONSUMER, SHAPE)
    if LATE:  # converted in the shadow of the product above
        p = p.to(dtype)
    else:
        p = unpack(p, dtype)
    acc, p = multiply_values(p, v_smem, before, acc, SHAPE)
    if PING_PONG:
        m = pass_turn(m, (CONSUMER + 1) % CONSUMERS)
    if SHAPE.LEVELS:
        level = seen(scale[1])
    scores = warpgroup_mma_wait(len(acc), deps=(scores,))  # for all but those with V
    mbarrier.arrive(k_free.index(stage), count=1)
    if SHAPE.LEVELS:
        (next_p,), m, row_sum, alpha, due = weigh_capped(
            (scores,),
            m,
            row_sum,
            scale,
            shift,
            level,
            ends,
            key,
            masked,
            BLOCK_N,
            SHAPE.LAZY,
            MASKED and not LATE,
            MASKED,
        )
    elif LATE and SHAPE.LAZY:
        next_p, m, row_sum, alpha, due = weigh_lazily(
            scores, m, row_sum, scale, shift, begins, ends, key, masked, S_LAYOUT, BLOCK_N, GENERAL, CAPPED,
            SHAPE.THREES,
        )  # fmt: skip
    elif LATE:
        next_p, m, row_sum, alpha = weigh(
            scores, m, row_sum, scale, shift, begins, ends, key, masked, S_LAYOUT, BLOCK_N, GENERAL, CAPPED,
            SHAPE.THREES,
        )  # fmt: skip
    if LATE or SHAPE.LEVELS:
        row_sum = hold(row_sum)
        acc, p, next_p = wait_for_products(acc, p, next_p)
        mbarrier.arrive(v_free.index(before), count=1)
        if not LATE:
            next_p = pack(next_p, dtype)
    else:
        scores, m_new, alpha, to_log2 = maxima(
            scores, m, scale, shift, begins, ends, key, masked, S_LAYOUT, BLOCK_N, GENERAL, CAPPED, SHAPE.THREES
        )
        if SHAPE.LAZY:
            m_new, due = kept(m, m_new)
            alpha = gl.exp2(m - m_new)
        m = m_new
        if CAUSAL or BLOCK_D < 256:  # full attention of head size 256 is as fast or faster without
            alpha = hold(alpha)
        acc, p, scores = wait_for_products(acc, p, scores)
        mbarrier.arrive(v_free.index(before), count=1)
        next_p, row_sum = weigh_after(acc[len(acc) - 1], scores, m, row_sum, alpha, to_log2, zero, BLOCK_D, BLOCK_N)
        next_p = pack(next_p, dtype)
    if SHAPE.LAZY or SHAPE.LEVELS:
        acc = times_where(acc, alpha, due)
    else:
        acc = times(acc, alpha)
    return acc, next_p, m, row_sum


@gluon.jit
def _wide_step(
    acc, p, m, row_sum, slot, shared, barriers, step, scale, shift: gl.constexpr, ends, key, masked, zero,
    MASKED: gl.constexpr, CONSUMER: gl.constexpr, SHAPE: gl.constexpr,
):  # fmt: skip
    """As `_step` of a kernel that is LAZY, of blocks as in sm90_wide.py."""
    CONSUMERS: gl.constexpr = SHAPE.CONSUMERS
    STAGES: gl.constexpr = SHAPE.STAGES
    V_STAGES: gl.constexpr = SHAPE.V_STAGES
    q_smem, k_smem, v_smem = shared
    dtype: gl.constexpr = v_smem[0].dtype
    q_ready, q_free, k_ready, k_free, v_ready, v_free, v_whole = barriers
    stage = step % STAGES
    before = (step - 1) % V_STAGES
    mbarrier.wait(k_ready.index(stage), (step // STAGES) & 1)
    if SHAPE.PING_PONG:
        m = take_turn(m, CONSUMER)
    scores = multiply_keys_wide(q_smem, slot, k_smem, stage, SHAPE)
    _wait_for_v(barriers, step - 1, CONSUMER, SHAPE)
    acc = multiply_values_wide(p, v_smem, before, acc, SHAPE)
    if SHAPE.PING_PONG:
        m = pass_turn(m, (CONSUMER + 1) % CONSUMERS)
    if SHAPE.LEVELS:
        level = seen(scale[1])
    scores = warpgroup_mma_wait(1, deps=scores)  # for all but those with V
    mbarrier.arrive(k_free.index(stage), count=1)
    if SHAPE.LEVELS:
        weights, m_new, row_sum, alpha, due = weigh_capped(
            scores, m, row_sum, scale, shift, level, ends, key, masked, SHAPE.BLOCK_N, True, MASKED, MASKED
        )
        row_sum = hold(row_sum)
        acc, p, weights = wait_for_products_wide(acc, p, weights)
        mbarrier.arrive(v_free.index(before), count=1)
        next_p = all_packed(weights, dtype)
    else:
        scores, m_new, alpha = maxima_wide(scores, m, row_sum, scale, shift, (), ends, key, masked, SHAPE)
        m_new, due = kept(m, m_new)
        alpha = hold(gl.exp2(m - m_new))
        acc, p, scores = wait_for_products_wide(acc, p, scores)
        mbarrier.arrive(v_free.index(before), count=1)
        next_p, row_sum = next_weights_wide(acc, scores, m_new, row_sum, alpha, scale, zero, dtype)
    return times_where(acc, alpha, due), next_p, m_new, row_sum


@gluon.jit
def _serial_step(
    acc, p, m, row_sum, slot, shared, barriers, step, scale, shift: gl.constexpr, begins, ends, key, masked,
    CONSUMER: gl.constexpr, SHAPE: gl.constexpr, S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """As `_step` of a kernel that is LAZY, but one product after the other: weights can have the registers of scores.
    Other consumers use the tensor cores meanwhile."""
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    STAGES: gl.constexpr = SHAPE.STAGES
    V_STAGES: gl.constexpr = SHAPE.V_STAGES
    q_smem, k_smem, v_smem = shared
    dtype: gl.constexpr = v_smem[0].dtype
    q_ready, q_free, k_ready, k_free, v_ready, v_free, v_whole = barriers
    stage = step % STAGES
    before = (step - 1) % V_STAGES
    _wait_for_v(barriers, step - 1, CONSUMER, SHAPE)
    acc, p = multiply_values(unpack(p, dtype), v_smem, before, acc, SHAPE)
    acc, p, m = wait_for_products(acc, p, m)
    mbarrier.arrive(v_free.index(before), count=1)
    mbarrier.wait(k_ready.index(stage), (step // STAGES) & 1)
    scores = multiply_keys(q_smem, slot, k_smem, stage, S_LAYOUT, SHAPE)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_free.index(stage), count=1)
    weights, m_new, row_sum, alpha, due = weigh_lazily(
        scores, m, row_sum, scale, shift, begins, ends, key, masked, S_LAYOUT, BLOCK_N, SHAPE.GENERAL, SHAPE.CAPPED,
        SHAPE.THREES,
    )  # fmt: skip
    return times_where(acc, alpha, due), pack(weights, dtype), m_new, row_sum


@gluon.jit
def _steps(
    acc, p, m, row_sum, slot, shared, barriers, step, scale, shift: gl.constexpr, begins, ends, block, count, unmasked,
    unmasked_from, values, zero, MASKED: gl.constexpr,
    CONSUMER: gl.constexpr, SHAPE: gl.constexpr, S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """So many steps to the left of `block`; if MASKED, with a mask where one is needed."""
    for _unused in range(count):
        block -= 1
        masked = block >= unmasked if MASKED else False
        if SHAPE.GENERAL:
            masked = masked | (block < unmasked_from)
        key = block * SHAPE.BLOCK_N
        if is_wide(SHAPE.BLOCK_N):
            acc, p, m, row_sum = _wide_step(
                acc, p, m, row_sum, slot, shared, barriers, step, scale, shift, ends, key, masked, zero, MASKED,
                CONSUMER, SHAPE,
            )  # fmt: skip
        elif SHAPE.SERIAL:
            acc, p, m, row_sum = _serial_step(
                acc, p, m, row_sum, slot, shared, barriers, step, scale, shift, begins, ends, key, masked,
                CONSUMER, SHAPE, S_LAYOUT,
            )  # fmt: skip
        else:
            acc, p, m, row_sum = _step(
                acc, p, m, row_sum, slot, shared, barriers, step, scale, shift, begins, ends, key, masked,
                values, zero, MASKED,
                CONSUMER, SHAPE, S_LAYOUT,
            )  # fmt: skip
        step += 1
    return acc, p, m, row_sum, step, block


@gluon.constexpr_function
def may_see_half(shape, consumer):
    """Whether a consumer looks for first blocks of whose keys its rows see the first half at most, if HALVED: of two
    consumers the last, whose rows end with a block of 128 keys where masks begin with one, has none."""
    return shape.HALVED and (shape.CONSUMERS > 2 or consumer + 1 < shape.CONSUMERS)


@gluon.jit
def _give_back(work, plain, turn, CONSUMER: gl.constexpr, SHAPE: gl.constexpr):
    """Beside the first product of a tile, give back what the rows of the tile before were stored from."""
    Q_SLOTS: gl.constexpr = SHAPE.Q_SLOTS
    q_free = work[2][1]
    if SHAPE.APART:
        if turn > 0:  # the other consumer may wait for it, but for blocks of keys that this one passes over, one
            tma.store_wait(0)
            mbarrier.arrive(plain[1].index(0), count=1)
    elif (SHAPE.EARLY or SHAPE.BRIEF) and Q_SLOTS > 1 and not SHAPE.DIRECT:
        if turn > 0:
            tma.store_wait(0)
            mbarrier.arrive(q_free.index((turn - 1) % Q_SLOTS * SHAPE.CONSUMERS + CONSUMER), count=1)


@gluon.jit
def _half_first_block(
    work, plain, slot, turn, step, m, row_sum, scale, shift: gl.constexpr, ends, key, CONSUMER: gl.constexpr,
    SHAPE: gl.constexpr, S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """As `_first_block`, where the rows see no more than the first half of its keys, which alone are multiplied."""
    CAPPED: gl.constexpr = polynomials_of(SHAPE.CAPPED, SHAPE.CONSUMERS)
    q_smem, k_smem, v_smem = work[1]
    k_free = work[2][3]
    stage = step % SHAPE.STAGES
    near = multiply_near_keys(q_smem, slot, k_smem, stage, SHAPE)
    _give_back(work, plain, turn, CONSUMER, SHAPE)
    near = warpgroup_mma_wait(0, deps=(near,))
    mbarrier.arrive(k_free.index(stage), count=1)
    p, m, row_sum, alpha = weigh_near(
        near, m, row_sum, scale, shift, ends, key, S_LAYOUT, SHAPE.BLOCK_N, CAPPED, SHAPE.CAPPED and SHAPE.THREES
    )
    return p, m, row_sum


@gluon.jit
def _first_block(
    work, plain, slot, turn, step, m, row_sum, scale, shift: gl.constexpr, visible, block, sequence,
    CONSUMER: gl.constexpr, SHAPE: gl.constexpr, S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Weights of a tile's first block, with the maxima and sums; queries and keys are there. visible: the first row,
    the rows, where the keys that each sees begin and end, and the blocks of which all rows see all keys."""
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    GENERAL: gl.constexpr = SHAPE.GENERAL
    LENGTHS: gl.constexpr = SHAPE.LENGTHS
    WIDE: gl.constexpr = is_wide(BLOCK_N)
    # blocks wide enough, and registers
    HALVES: gl.constexpr = SHAPE.CAUSAL and not GENERAL and SHAPE.LATE and BLOCK_N > ROWS
    CAPPED: gl.constexpr = polynomials_of(SHAPE.CAPPED, SHAPE.CONSUMERS)
    PRODUCTS: gl.constexpr = SHAPE.CAPPED and SHAPE.THREES
    descriptors, shared, barriers, notes, sizes, Lse, factors, zero = work
    q_smem, k_smem, v_smem = shared
    k_free = barriers[3]
    first_row, rows, begins, ends, unmasked_from, unmasked = visible
    q_n, kv_n, oldest, newest = sequence
    stage = step % SHAPE.STAGES
    if WIDE:
        scores = multiply_keys_wide(q_smem, slot, k_smem, stage, SHAPE)
    else:
        scores = multiply_keys(q_smem, slot, k_smem, stage, S_LAYOUT, SHAPE)
    _give_back(work, plain, turn, CONSUMER, SHAPE)
    if SHAPE.LEVELS:
        level = seen(scale[1])
    scores = warpgroup_mma_wait(0, deps=scores if WIDE else (scores,))
    mbarrier.arrive(k_free.index(stage), count=1)
    key = first_key(block, sequence, SHAPE)
    if LENGTHS:  # of the last block, the keys that are no other's
        own_keys = rows * 0 + block * BLOCK_N
    else:
        own_keys = begins
    half = gl.minimum(first_row + ROWS + newest, kv_n) - key <= BLOCK_N // 2 if HALVES else False
    if HALVES and LENGTHS:  # a last block's own keys need not be its first
        half = half & (key == block * BLOCK_N)
    if SHAPE.LEVELS:
        p, m, row_sum, alpha, due = weigh_capped(
            scores if WIDE else (scores,), m, row_sum, scale, shift, level, ends, key, block >= unmasked,
            BLOCK_N, SHAPE.LAZY, True, True,
        )  # fmt: skip
        if WIDE:
            p = all_packed(p, v_smem[0].dtype)
        else:
            p = p[0]
    elif WIDE:
        p, m, row_sum = first_weights_wide(
            scores, m, row_sum, scale, shift, (own_keys,) if LENGTHS else (), ends, key, block >= unmasked,
            v_smem[0].dtype, SHAPE,
        )  # fmt: skip
    elif half:
        p, m, row_sum, alpha = weigh_half(
            scores, m, row_sum, scale, shift, ends, key, S_LAYOUT, BLOCK_N, CAPPED, PRODUCTS
        )
    else:
        masked = (block >= unmasked) | (block < unmasked_from) if GENERAL else block >= unmasked
        if SHAPE.HALVED:
            if masked:
                if gl.minimum(first_row + newest + 1, kv_n) >= key + BLOCK_N // 2:
                    scores = mask_far(scores, ends, key, S_LAYOUT, BLOCK_N)
                else:
                    scores = mask_all(scores, ends, key, S_LAYOUT, BLOCK_N)
            masked = False
        p, m, row_sum, alpha = weigh(
            scores, m, row_sum, scale, shift, own_keys, ends, key, masked, S_LAYOUT, BLOCK_N, GENERAL or LENGTHS,
            CAPPED, PRODUCTS,
        )  # fmt: skip
    return p, m, row_sum


@gluon.jit
def _attend(work, plain, CONSUMER: gl.constexpr, SHAPE: gl.constexpr):
    """One consumer: 64 rows of each of the program's tiles. `plain` is how Out is stored without TMA, if RAGGED, the
    sinks, if SINKS, and if APART the buffer that Out is stored from, with a barrier for each time that it is free."""
    BLOCK_D: gl.constexpr = SHAPE.BLOCK_D
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    CONSUMERS: gl.constexpr = SHAPE.CONSUMERS
    STAGES: gl.constexpr = SHAPE.STAGES
    CAUSAL: gl.constexpr = SHAPE.CAUSAL
    PING_PONG: gl.constexpr = SHAPE.PING_PONG
    Q_SLOTS: gl.constexpr = SHAPE.Q_SLOTS
    LATE: gl.constexpr = SHAPE.LATE
    V_STAGES: gl.constexpr = SHAPE.V_STAGES
    ORDER: gl.constexpr = SHAPE.ORDER
    GENERAL: gl.constexpr = SHAPE.GENERAL
    RAGGED: gl.constexpr = SHAPE.RAGGED
    CAPPED: gl.constexpr = polynomials_of(SHAPE.CAPPED, CONSUMERS)
    LENGTHS: gl.constexpr = SHAPE.LENGTHS
    SPLIT: gl.constexpr = CAUSAL and not GENERAL and not LATE
    WIDE: gl.constexpr = is_wide(BLOCK_N)
    NEAR: gl.constexpr = near_keys(BLOCK_N)
    S_LAYOUT: gl.constexpr = layout_of(NEAR)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    descriptors, shared, barriers, notes, sizes, Lse, factors, zero = work
    q_desc, k_desc, v_desc, out_desc = descriptors
    q_smem, k_smem, v_smem = shared
    q_ready, q_free, k_ready, k_free, v_ready, v_free, v_whole = barriers
    num_heads, group, q_len, kv_len, row_tiles, heads, section, bounds = sizes
    dtype: gl.constexpr = v_smem[0].dtype
    shift: gl.constexpr = shift_of(dtype) + room_for(dtype, SHAPE.LAZY)
    scale = score_factors(factors, SHAPE.CAPPED)
    PRODUCTS: gl.constexpr = SHAPE.CAPPED and SHAPE.THREES
    if SHAPE.LEVELS:
        scale = capped_factors(factors, scale, zero, shift)
        held = not_held()
    elif PRODUCTS:
        scale = product_factors(factors, scale, shift, CAPPED)
    elif SHAPE.CAPPED:
        scale = tanh_factors(scale, shift, CAPPED)
    if PING_PONG:
        if CONSUMER == CONSUMERS - 1:
            pass_turn(gl.zeros([ROWS], gl.float32, layout=ROW_LAYOUT), 0)
    noted = gl.zeros([ROWS], gl.int32, layout=ROW_LAYOUT)
    dropped = 0
    step = 0
    for turn in range(tile_count(row_tiles, heads, section, ORDER)):
        slot = turn % Q_SLOTS * CONSUMERS + CONSUMER
        if SHAPE.LEVELS:
            scaling = (scale, notes[len(notes) - 1].index(0), turn)
        else:
            scaling = scale
        if SHAPE.HANDED:
            row_tile, head = taken_tile(notes[1], slot, q_ready.index(slot), (turn // Q_SLOTS) & 1)
        else:
            row_tile, head = tile_of(turn, row_tiles, heads, section, ORDER)
        if RAGGED and LENGTHS:
            ready = q_ready.index(slot)
            row_tile, head, q_start, sequence = taken(sizes, slot, head, ready, (turn // Q_SLOTS) & 1, SHAPE)
        elif RAGGED:
            row_tile, q_start, kv_start, sequence = find_tile(sizes, row_tile, SHAPE)
        tile_row = row_tile * (ROWS * CONSUMERS)
        first_row = tile_row + CONSUMER * ROWS
        rows = first_row + gl.arange(0, ROWS, layout=ROW_LAYOUT)
        if not RAGGED:
            sequence = sequence_of(sizes, head, SHAPE)
        q_n, kv_n, oldest, newest = sequence
        first_block, end_block = tile_blocks(row_tile, sequence, SHAPE)
        block = end_block - 1  # from right to left: the masked blocks first
        begins = 0
        unmasked_from = 0
        if CAUSAL:
            ends = gl.minimum(rows + (newest + 1), kv_n)  # keys below it are visible to a row
            if GENERAL:
                ends = gl.where(rows < q_n, ends, 0)
                begins = gl.maximum(rows + oldest, 0)
                unmasked_from = (gl.maximum(first_row + (ROWS - 1) + oldest, 0) + (BLOCK_N - 1)) // BLOCK_N
            own_end = gl.minimum(end_block_of(first_row + ROWS, sequence, SHAPE), end_block)
            own_end = gl.maximum(own_end, first_block + 1)
            unmasked = gl.maximum(gl.minimum(first_row + newest + 1, kv_n), 0) // BLOCK_N
            if GENERAL:
                unmasked = gl.where(first_row + ROWS <= q_n, unmasked, 0)
            for _unused in range(end_block - own_end):  # keys only for the rows of the consumers below
                if PING_PONG:
                    turn_taken = take_turn(gl.zeros([ROWS], gl.float32, layout=ROW_LAYOUT), CONSUMER)
                    pass_turn(turn_taken, (CONSUMER + 1) % CONSUMERS)
                mbarrier.wait(k_ready.index(step % STAGES), (step // STAGES) & 1)
                mbarrier.arrive(k_free.index(step % STAGES), count=1)
                _wait_for_v(barriers, step, CONSUMER, SHAPE)
                mbarrier.arrive(v_free.index(step % V_STAGES), count=1)
                step += 1
            block = own_end - 1
        else:
            ends = rows * 0 + kv_n
            unmasked = kv_n // BLOCK_N
        values = (block + 2) * BLOCK_N  # rows of V that are no padding
        if GENERAL:
            if (kv_start + kv_n if RAGGED else kv_n) < kv_len:
                values = kv_n
        if RAGGED:  # of all that, what is kept in registers until the rows are stored
            token = q_start + first_row
            count = q_n - first_row
        m = gl.full([ROWS], shift - FAST_LIMIT, gl.float32, layout=ROW_LAYOUT)
        row_sum = partial_sums(gl.zeros([ROWS, NEAR], gl.float32, layout=S_LAYOUT), NEAR)
        stage = step % STAGES
        if SHAPE.HANDED or (RAGGED and LENGTHS):  # this has been waited for, where the place was taken
            gl.barrier()
        mbarrier.wait(q_ready.index(slot), (turn // Q_SLOTS) & 1)
        mbarrier.wait(k_ready.index(stage), (step // STAGES) & 1)
        visible = (first_row, rows, begins, ends, unmasked_from, unmasked)
        if may_see_half(SHAPE, CONSUMER):
            if gl.minimum(first_row + ROWS + newest, kv_n) - block * BLOCK_N <= BLOCK_N // 2:
                p, m, row_sum = _half_first_block(
                    work, plain, slot, turn, step, m, row_sum, scaling, shift, ends, block * BLOCK_N,
                    CONSUMER, SHAPE, S_LAYOUT,
                )  # fmt: skip
            else:
                p, m, row_sum = _first_block(
                    work, plain, slot, turn, step, m, row_sum, scaling, shift, visible, block, sequence,
                    CONSUMER, SHAPE, S_LAYOUT,
                )  # fmt: skip
        else:
            p, m, row_sum = _first_block(
                work, plain, slot, turn, step, m, row_sum, scaling, shift, visible, block, sequence,
                CONSUMER, SHAPE, S_LAYOUT,
            )  # fmt: skip
        if Q_SLOTS > 1 and not SHAPE.APART and not SHAPE.EARLY and not SHAPE.BRIEF and not SHAPE.DIRECT:
            if turn > 0:  # the rows of the tile before have left their slot by now
                tma.store_wait(0)
                mbarrier.arrive(q_free.index((turn - 1) % Q_SLOTS * CONSUMERS + CONSUMER), count=1)
        if not LATE and not WIDE:
            p = pack(p, dtype)
        acc = no_values(len(q_smem) if WIDE else len(v_smem), SHAPE)
        step += 1
        to_left = uniform(block - first_block)
        step = uniform(step)
        block = uniform(block)
        if SPLIT:  # two loops: the second, which has most of the blocks, needs no registers to mask them
            masked_count = gl.minimum(gl.maximum(block - unmasked, 0), to_left)
            acc, p, m, row_sum, step, block = _steps(
                acc, p, m, row_sum, slot, shared, barriers, step, scaling, shift, begins, ends, block, masked_count,
                unmasked, unmasked_from, values, zero, True,
                CONSUMER, SHAPE, S_LAYOUT,
            )  # fmt: skip
            to_left -= masked_count
            if WIDE:
                p = all_moved(p)
            else:
                p = moved(p)
        acc, p, m, row_sum, step, block = _steps(
            acc, p, m, row_sum, slot, shared, barriers, step, scaling, shift, begins, ends, block, to_left, unmasked,
            unmasked_from, values, zero, not SPLIT and CAUSAL,
            CONSUMER, SHAPE, S_LAYOUT,
        )  # fmt: skip
        if SHAPE.LEVELS:
            held = reach_next(scaling[1], turn, held, m, row_sum, scaling[0], shift)
        if SHAPE.APART or SHAPE.DIRECT:
            mbarrier.arrive(q_free.index(slot), count=1)
        last = (step - 1) % V_STAGES
        if GENERAL:
            _make_whole(v_smem, barriers, step - 1, values - block * BLOCK_N, CONSUMER, SHAPE)
        _wait_for_v(barriers, step - 1, CONSUMER, SHAPE)
        if RAGGED and LENGTHS:
            if kv_n < BLOCK_N:  # then this is the only block, which begins within other sequences
                drop_rows(v_smem, last, BLOCK_N - kv_n, v_whole.index(0), dropped & 1, CONSUMER, SHAPE)
                dropped += 1
        if WIDE:
            acc = multiply_values_wide(p, v_smem, last, acc, SHAPE)
        else:
            p = p.to(dtype) if LATE else unpack(p, dtype)
            acc, p = multiply_values(p, v_smem, last, acc, SHAPE)
        total = gl.convert_layout(gl.sum(row_sum, 1), ROW_LAYOUT, assert_trivial=True)
        some = total > 0
        if LENGTHS:
            some = some & (rows < q_n)
        inverse = gl.where(some, 1.0 / total, 0.0)
        if SHAPE.SINKS:
            inverse, sunk = finished(gl.where(some, m, NOTHING), total, load_sink(plain, head % num_heads), shift)
        in_range = some & (gl.abs(m - shift) < FAST_LIMIT)
        if RAGGED:
            leaving = (ends > begins) & (in_range == 0)
            if LENGTHS:
                leaving = leaving & (rows < q_n)
        else:
            leaving = (ends > begins) & (rows < (q_n if LENGTHS else q_len)) & (in_range == 0)
        noted = noted | gl.where(leaving, 1 << (turn % NOTES), 0)
        if Lse.to(gl.int64) != 0:
            lse = gl.where(some, (m - shift + gl.log2(total) + shift) * LN_2, float("-inf"))
            if SHAPE.SINKS:
                lse = sunk
            if RAGGED:
                own_rows = gl.arange(0, ROWS, layout=ROW_LAYOUT)
                gl.store(Lse + (head.to(gl.int64) * q_len + token) + own_rows, lse, mask=own_rows < count)
            else:
                gl.store(Lse + head.to(gl.int64) * q_len + rows, lse, mask=rows < q_len)
        if WIDE:
            acc, near, inverse = wait_for_products(acc, p[0], inverse)
        else:
            acc, p, inverse = wait_for_products(acc, p, inverse)
        mbarrier.arrive(v_free.index(last), count=1)
        for part in gl.static_range(len(acc)):
            out = acc[part]
            factor = gl.convert_layout(inverse, gl.SliceLayout(1, out.type.layout), assert_trivial=True)
            if SHAPE.BRIEF:
                if first_row + newest < 0:
                    out = gl.where((factor != 0)[:, None], out, 0.0)
            elif CAUSAL or LENGTHS:  # rows without keys are zeros, even if what they multiplied with 0 is NaN
                out = gl.where((factor != 0)[:, None], out, 0.0)
            if SHAPE.DIRECT:
                own_count = count if RAGGED else q_len - first_row
                own_token = token if RAGGED else first_row
                store_direct(out * factor[:, None], head, own_token, own_count, plain, dtype)
            elif SHAPE.APART:
                if part > 0:  # the wait is for the same barrier as before
                    gl.barrier()
                mbarrier.wait(plain[1].index(0), ((turn * CONSUMERS + CONSUMER) & 1) ^ 1)
                matrix(plain[0], 0, part, ROWS, SHAPE).store(narrow(out * factor[:, None], dtype))
            else:
                matrix(q_smem, slot, part, ROWS, SHAPE).store(narrow(out * factor[:, None], dtype))
        if not SHAPE.DIRECT:
            fence_async_shared()
        if SHAPE.DIRECT:
            pass
        elif RAGGED:
            if SHAPE.APART:
                out_part = plain[0][0].index(0)
            else:
                out_part = q_smem[0].index(slot)
            if count >= ROWS:
                gl.barrier()
                tma.async_store(out_desc, [0, head, token, 0], out_part, cache_policy=ONCE)
            else:  # the next sequence's rows are behind
                Out, stride_h, stride_s, head_size = plain[2] if SHAPE.APART else plain
                Out += head.to(gl.int64) * stride_h + token.to(gl.int64) * stride_s
                store_rows(out_part.reshape([ROWS, BLOCK_D]), Out, stride_s, count, head_size, SHAPE)
        elif SHAPE.APART:
            store_tile(out_desc, head // num_heads, head % num_heads, first_row, plain[0], 0, len(acc), SHAPE)
        else:
            store_tile(out_desc, head // num_heads, head % num_heads, first_row, q_smem, slot, len(acc), SHAPE)
        if Q_SLOTS == 1 and not SHAPE.APART and not SHAPE.DIRECT:
            tma.store_wait(0)
            mbarrier.arrive(q_free.index(slot), count=1)
    if not SHAPE.DIRECT:
        tma.store_wait(0)
        gl.barrier()
    if SHAPE.APART and CONSUMER < CONSUMERS - 1:  # whom the other still waits for, if there was a tile
        if step > 0:
            mbarrier.arrive(plain[1].index(0), count=1)
    if gl.max((noted != 0).to(gl.int32), 0) != 0:
        noted = written(noted)
    notes[0].index(CONSUMER).store(noted)


@gluon.jit
def compute(
    descriptors, tensors, lengths, cu_seqlens, factors, counts, strides, window, ragged, sinks,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    V_STAGES: gl.constexpr, CAUSAL: gl.constexpr, TWO_HEADS: gl.constexpr, LONGEST_FIRST: gl.constexpr,
    GENERAL: gl.constexpr, RAGGED: gl.constexpr, CAPPED: gl.constexpr, PING_PONG: gl.constexpr,
    Q_SLOTS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    TWO_PARTS: gl.constexpr, LAZY: gl.constexpr = False, SERIAL: gl.constexpr = False,
    PRODUCER_FIRST: gl.constexpr = False, LENGTHS: gl.constexpr = False, v_head_size=(), APART: gl.constexpr = False,
    THREES: gl.constexpr = False, HANDED_ON: gl.constexpr = False, SECTIONS: gl.constexpr = 0,
    EARLY: gl.constexpr = False, EVEN: gl.constexpr = 0, BRIEF: gl.constexpr = False, HALVED: gl.constexpr = False,
    DIRECT: gl.constexpr = False, LEVELS: gl.constexpr = False, FINDER: gl.constexpr = False,
    PAIRED: gl.constexpr = False,
):  # fmt: skip
    """All that a kernel does, see fmha_fwd_sm90. sinks: two pointers, of which one is null, or () for none; these not
    for GENERAL. v_head_size: () where it is head_size; else, with TWO_PARTS, that of V and Out, which then have the
    first part alone, 2 * BLOCK_D columns at most and boxes as wide."""
    q_desc, k_desc, v_desc, out_desc = descriptors
    Out = tensors[0]
    Lse = tensors[1]
    q_lengths, kv_lengths = lengths
    cu_seqlens_q, cu_seqlens_kv = cu_seqlens
    sm_scale, softcap = factors
    batch_size, num_heads, num_kv_heads, q_len, kv_len, head_size = counts
    window_left, window_right, bottom_right = window
    group = num_heads // num_kv_heads
    HANDING: gl.constexpr = RAGGED and LENGTHS  # the producer finds tiles, and only those with rows
    row_tiles = (q_len + (ROWS * CONSUMERS - 1)) // (ROWS * CONSUMERS)
    all_heads = num_heads if RAGGED else batch_size * num_heads
    if HANDING:
        table = gl.allocate_shared_memory(gl.int32, [2, SEGMENTS], SMEM)
        places = gl.allocate_shared_memory(gl.int32, [HANDED * Q_SLOTS * CONSUMERS, 1], SMEM)
        row_tiles, most = write_table(
            table, cu_seqlens_q, cu_seqlens_kv, batch_size, q_len, kv_len, ROWS * CONSUMERS, BLOCK_N
        )
        bounds = (bottom_right, (table, places, batch_size + 2 <= FEW_SEGMENTS), most, window_left, window_right)
        plain = (Out, strides[3][1], strides[3][2], head_size)
    elif RAGGED:
        row_tiles += batch_size + 1
        bounds = (bottom_right, (cu_seqlens_q, batch_size), cu_seqlens_kv, window_left, window_right)
        plain = (Out, strides[3][1], strides[3][2], head_size)
    else:
        bounds = (bottom_right, q_lengths, kv_lengths, window_left, window_right)
        plain = sinks
    if DIRECT:
        plain = (Out, strides[3][0], strides[3][1], strides[3][2], num_heads, head_size)
    if APART:
        out_smem = allocate(out_desc, 1, ROWS, BLOCK_D, TWO_PARTS, len(v_head_size) > 0)
        out_free = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        mbarrier.init(out_free.index(0), count=1)
        plain = (out_smem, out_free, plain)
    ORDER: gl.constexpr = order_of(CAUSAL or HANDING, TWO_HEADS, LONGEST_FIRST, SECTIONS, EVEN > 0, PAIRED)
    if PAIRED:
        section = section_or_pairs(row_tiles, all_heads, EVEN)
    elif EVEN:
        section = section_heads(gl.maximum(row_tiles, 1) if HANDING else row_tiles, all_heads, EVEN)
    else:
        section = section_heads(row_tiles, all_heads) if LONGEST_FIRST else all_heads
    sizes = (num_heads, group, q_len, kv_len, row_tiles, all_heads, section, bounds)
    q_smem = allocate(q_desc, Q_SLOTS * CONSUMERS, ROWS, BLOCK_D, TWO_PARTS)
    if is_wide(BLOCK_N):
        k_smem = allocate_blocks(k_desc, STAGES, BLOCK_D, BLOCK_N, TWO_PARTS)
        v_smem = allocate_blocks(v_desc, V_STAGES, BLOCK_D, BLOCK_N, TWO_PARTS)
    else:
        k_smem = allocate(k_desc, STAGES, BLOCK_N, BLOCK_D, TWO_PARTS)
        v_smem = allocate(v_desc, V_STAGES, BLOCK_N, BLOCK_D, TWO_PARTS, len(v_head_size) > 0)
    q_ready = gl.allocate_shared_memory(gl.int64, [Q_SLOTS * CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [Q_SLOTS * CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    v_whole = v_ready  # not used where no consumer waits for another to drop padding
    if GENERAL and CONSUMERS > 1:
        v_whole = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    if HANDING:
        v_whole = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        mbarrier.init(v_whole.index(0), count=CONSUMERS)
    for c in gl.static_range(Q_SLOTS * CONSUMERS):
        mbarrier.init(q_ready.index(c), count=1)
        mbarrier.init(q_free.index(c), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(s), count=1)
        mbarrier.init(k_free.index(s), count=CONSUMERS)
    for s in gl.static_range(V_STAGES):
        if GENERAL and CONSUMERS > 1:
            mbarrier.init(v_whole.index(s), count=1)
        mbarrier.init(v_ready.index(s), count=1)
        mbarrier.init(v_free.index(s), count=CONSUMERS)
    notes = (gl.allocate_shared_memory(gl.int32, [CONSUMERS, ROWS], NOTE_SMEM),)
    if HANDED_ON:
        notes = (notes[0], gl.allocate_shared_memory(gl.int32, [2 * Q_SLOTS * CONSUMERS, 1], SMEM))
    if FINDER:
        ring = gl.allocate_shared_memory(gl.int32, [FOUND * FOUND_WORDS, 1], SMEM)
        ring_ready = gl.allocate_shared_memory(gl.int64, [FOUND, 1], mbarrier.MBarrierLayout())
        ring_free = gl.allocate_shared_memory(gl.int64, [FOUND, 1], mbarrier.MBarrierLayout())
        for s in gl.static_range(FOUND):
            mbarrier.init(ring_ready.index(s), count=1)
            mbarrier.init(ring_free.index(s), count=1)
        notes += ((ring, ring_ready, ring_free),)
    if LEVELS:
        level = gl.allocate_shared_memory(gl.int32, [1, 1], WORD)
        level.index(0).store(gl.zeros([1], gl.int32, layout=NOTE))
        notes += (level,)
    shared = (q_smem, k_smem, v_smem)
    barriers = (q_ready, q_free, k_ready, k_free, v_ready, v_free, v_whole)
    factors = factors if CAPPED else sm_scale
    work = (descriptors, shared, barriers, notes, sizes, Lse, factors, ragged - 1 if RAGGED else ragged)
    LATE: gl.constexpr = CONSUMERS == 1 and (3 if TWO_PARTS else 1) * BLOCK_D + BLOCK_N <= 192
    SHAPE: gl.constexpr = Shape(
        BLOCK_D,
        BLOCK_N,
        CONSUMERS,
        STAGES,
        CAUSAL,
        PING_PONG,
        Q_SLOTS,
        LATE,
        V_STAGES,
        ORDER,
        GENERAL,
        RAGGED,
        CAPPED,
        TWO_PARTS,
        len(sinks) > 0,
        APART,
        LAZY,
        SERIAL,
        LENGTHS,
        THREES,
        HANDED_ON,
        EARLY,
        BRIEF,
        HALVED,
        DIRECT,
        LEVELS,
        FINDER=FINDER,
    )
    # Where there is one consumer, a producer of one warp leaves most issue slots to it; with several, four are faster.
    # Of a consumer that is the first partition, ptxas keeps addresses in registers of each thread (R2UR in every step).
    if lags(SHAPE):
        gl.warp_specialize(
            [
                (_attend, (work, plain, 0, SHAPE)),
                (_load, (work, SHAPE)),
                (_idle, (sizes, SHAPE, 14, 1)),
                (_idle, (sizes, SHAPE, 15, 2)),
            ],
            [1, 1, 2],
            [PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )
    elif FINDER and CONSUMERS == 1:
        gl.warp_specialize(
            [(_attend, (work, plain, 0, SHAPE)), (_load, (work, SHAPE)), (_find, (work, SHAPE))],
            [1, 1],
            [PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )
    elif FINDER:
        gl.warp_specialize(
            [
                (_attend, (work, plain, 0, SHAPE)),
                (_attend, (work, plain, 1, SHAPE)),
                (_load, (work, SHAPE)),
                (_find, (work, SHAPE)),
            ],
            [4, 1, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )
    elif CONSUMERS == 1:
        gl.warp_specialize([(_attend, (work, plain, 0, SHAPE)), (_load, (work, SHAPE))], [1], [PRODUCER_REGISTERS])
    elif CONSUMERS == 2 and PRODUCER_FIRST:
        gl.warp_specialize(
            [(_load, (work, SHAPE)), (_attend, (work, plain, 0, SHAPE)), (_attend, (work, plain, 1, SHAPE))],
            [4, 4],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS],
        )
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [(_attend, (work, plain, 0, SHAPE)), (_attend, (work, plain, 1, SHAPE)), (_load, (work, SHAPE))],
            [4, 4],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    elif PRODUCER_FIRST:
        gl.warp_specialize(
            [
                (_load, (work, SHAPE)),
                (_attend, (work, plain, 0, SHAPE)),
                (_attend, (work, plain, 1, SHAPE)),
                (_attend, (work, plain, 2, SHAPE)),
            ],
            [4, 4, 4],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, CONSUMER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (work, plain, 0, SHAPE)),
                (_attend, (work, plain, 1, SHAPE)),
                (_attend, (work, plain, 2, SHAPE)),
                (_load, (work, SHAPE)),
            ],
            [4, 4, 4],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    for part in range(CONSUMERS):
        noted = notes[0].index(part).load(NOTE)
        if CONSUMERS > 1:  # the sum goes through the shared memory that the one before went through
            gl.barrier()
        noted = gl.reduce_or(noted, 0)
        if noted != 0:
            if is_even(ORDER):
                state = even_begin()
            for turn in range(tile_count(row_tiles, all_heads, section, ORDER)):
                if is_even(ORDER):
                    even_row_tile, even_head, state = next_place(turn, state, row_tiles, all_heads, section, ORDER)
                if ((noted >> (turn % NOTES)) & 1) != 0:
                    if is_even(ORDER):
                        row_tile, head = even_row_tile, even_head
                    else:
                        row_tile, head = tile_of(turn, row_tiles, all_heads, section, ORDER)
                    place = ()
                    if HANDING:
                        row_tile, q_start, kv_start, sequence = find_ranked(sizes, row_tiles - 1 - row_tile, SHAPE)
                        place = (q_start, kv_start, sequence)
                    elif RAGGED:
                        row_tile, q_start, kv_start, sequence = find_tile(sizes, row_tile, SHAPE)
                        place = (q_start, kv_start, sequence)
                    first_row = (row_tile * CONSUMERS + part) * ROWS
                    for row in range(first_row, first_row + ROWS, SLOW_ROWS):
                        compute_slowly(
                            tensors, strides, sizes, place, head, row, head_size, factors, sinks, v_head_size, SHAPE
                        )


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
    V_STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    TWO_HEADS: gl.constexpr,
    LONGEST_FIRST: gl.constexpr,
    GENERAL: gl.constexpr,
    RAGGED: gl.constexpr,
    CAPPED: gl.constexpr,
    PING_PONG: gl.constexpr,
    Q_SLOTS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    TWO_PARTS: gl.constexpr = False,
    LAZY: gl.constexpr = False,
    SERIAL: gl.constexpr = False,
    PRODUCER_FIRST: gl.constexpr = False,
    LENGTHS: gl.constexpr = False,
    THREES: gl.constexpr = False,
    HANDED_ON: gl.constexpr = False,
    APART: gl.constexpr = False,
    SECTIONS: gl.constexpr = 0,
    EARLY: gl.constexpr = False,
    EVEN: gl.constexpr = 0,
    BRIEF: gl.constexpr = False,
    HALVED: gl.constexpr = False,
    DIRECT: gl.constexpr = False,
    LEVELS: gl.constexpr = False,
    FINDER: gl.constexpr = False,
    PAIRED: gl.constexpr = False,
):
    """Grid: any number of programs up to cdiv(q_len, 64 * CONSUMERS) * num_heads * batch_size; if RAGGED, up to
    (cdiv(q_len, 64 * CONSUMERS) + batch_size + 1) * num_heads.

    Descriptors: boxes of [1, 1, 64, BLOCK_D] for Q and Out, [1, 1, BLOCK_N, BLOCK_D] for K and V. window_right is 0
    where CAUSAL, else -1; sm_scale is above 0, q_len and kv_len at least 1, head_size a multiple of 8: TMA stores 16
    bytes or nothing. softcap is above 0 if CAPPED, and is of no account otherwise; lengths
    only where GENERAL or LENGTHS, window_left and any window_right where GENERAL, which wants CAUSAL, and q_len and
    kv_len of at most 2**28, as LENGTHS does.
    RAGGED wants GENERAL or LENGTHS, the latter a batch_size of at most 126, ragged to be 1, descriptors of a batch of
    one, both cu_seqlens and elements of Out that go by eights; lengths do not count.
    BLOCK_N: 64 or 128; or another multiple of 16 (sm90_wide.py) for a kernel that is LAZY, and neither SERIAL, GENERAL
    nor, without LEVELS, CAPPED. The descriptors of K and V then are of parts, [1, 1, what of BLOCK_N is a power of two,
    64 or BLOCK_D if that is less], of which a box has as many as a block.
    STAGES and V_STAGES: blocks of K and of V in flight. TWO_HEADS: how causal tiles are
    paired, see `tile_of`. LONGEST_FIRST: they are not, see there; the grid then has rows besides the first,
    2 * SECTION_ROUNDS or as many as the tiles of two heads fill; not for RAGGED. TWO_PARTS: boxes have BLOCK_D columns
    and heads up to 3 * BLOCK_D; not for GENERAL. Q_SLOTS: 2 where there is shared
    memory for the rows of the next tile, else 1. Out is stored from the slot of its rows. LAZY: sums are rescaled where
    that is due (sm90_lazy.py). SERIAL: each consumer waits for one product before the next, LAZY
    and neither GENERAL nor PING_PONG. PRODUCER_FIRST: which partition the first warps are.
    THREES: maxima are taken of three scores at a time (sm90_maxima.py; of soft caps sm90_products.py). HANDED_ON: the
    producer finds tiles, and hands their places on (sm90_places.py); not for RAGGED.
    APART: Out is stored from a buffer of its own, see Shape; not with three consumers. SECTIONS: of how many heads the
    tiles of ragged batches are paired, 2 or 4, see `tile_of`; 0 for one. EARLY: the last values of a tile are asked for
    before the keys of the next, and where there is one slot for queries, its second keys and first values before its
    queries, unless DIRECT: Out is stored from registers (sm90_direct.py), elements of which then go by eights; neither
    APART nor TWO_PARTS.
    EVEN: causal tiles from the longest in sections of so many rounds for each program, from which all programs get as
    much to do, see `even_place`; not LONGEST_FIRST, the grid has one row, and HANDED_ON or RAGGED. BRIEF: the slot of
    the rows before is given back beside a tile's first product, and rows without keys are looked for once a tile; not
    LENGTHS.
    HALVED: a consumer whose rows see no more than the first half of a tile's first block multiplies that alone, and
    masks of others leave out a first half that all rows see; of blocks of 128 keys and several consumers, not GENERAL,
    LENGTHS or CAPPED. LEVELS: soft caps go the same way in all warps of a program (sm90_capped.py); CAPPED and neither
    GENERAL, RAGGED nor LENGTHS. FINDER: a warp of its own looks for tiles; RAGGED and LENGTHS, of one or two consumers,
    and not PRODUCER_FIRST. PAIRED: of EVEN, in pairs of one head where these are as many for each program, see
    `next_place`; not for RAGGED.
    """
    compute(
        (q_desc, k_desc, v_desc, out_desc), (Out, Lse, Q, K, V), (q_lengths, kv_lengths), (cu_seqlens_q, cu_seqlens_kv),
        (sm_scale, softcap), (batch_size, num_heads, num_kv_heads, q_len, kv_len, head_size),
        (
            (q_stride_b, q_stride_h, q_stride_s),
            (k_stride_b, k_stride_h, k_stride_s),
            (v_stride_b, v_stride_h, v_stride_s),
            (out_stride_b, out_stride_h, out_stride_s),
        ),
        (window_left, window_right, bottom_right), ragged, (),
        BLOCK_D, BLOCK_N, CONSUMERS, STAGES, V_STAGES, CAUSAL, TWO_HEADS, LONGEST_FIRST, GENERAL, RAGGED, CAPPED,
        PING_PONG, Q_SLOTS, CONSUMER_REGISTERS, PRODUCER_REGISTERS, TWO_PARTS, LAZY, SERIAL, PRODUCER_FIRST,
        LENGTHS, APART=APART, THREES=THREES, HANDED_ON=HANDED_ON, SECTIONS=SECTIONS,
        EARLY=EARLY, EVEN=EVEN, BRIEF=BRIEF, HALVED=HALVED, DIRECT=DIRECT, LEVELS=LEVELS,
        FINDER=FINDER, PAIRED=PAIRED,
    )  # fmt: skip
