"""What fmha_biased.py computes, for Hopper (sm_90) in Gluon: bias, mask, sinks, and functions that users write.

The loop is fmha_sm90.py's: a producer that loads through TMA, consumers of 64 queries each, persistent programs.
Lengths and windows of any width are served, causal attention being one; ragged batches and soft caps are not. A bias of
Q's dtype or a mask comes by TMA, a block beside each block of keys and rows, into a ring of each consumer's own, who
loads it into registers while the products run. Of one that is the same for all queries, a block of keys is loaded from
global memory. A bias that batches share is read by all of them at about the same time, from the L2 cache.

Blocks that BOUNDS excludes are neither loaded nor computed. Rows that leave the range of the fast arithmetic, or of
whose sums one is not finite, since what they do not see may be NaN, are noted and computed again when all tiles are
done (sm90_biased_slow.py); so Out must not overlap the inputs.
"""

from fmha_sm90 import FAST_LIMIT, NOTE, NOTE_SMEM, NOTES, ONCE, _load_v, _make_whole, _wait_for_v
from sm90_asm import hold, moved, pass_turn, take_turn, uniform, written
from sm90_biased import (
    LEAST,
    OfV,
    Shape,
    bounded,
    counted,
    is_natural,
    key_of,
    keys_of_tile,
    maxima,
    order_of,
    place_of,
    sequence_at,
    weigh,
)
from sm90_biased_slow import compute_biased_slowly
from sm90_ends import is_broken, scaled
from sm90_places import KEYS_HANDED, hand_on_keys, taken_keys
from sm90_powers import polynomials_of, tanh_factors
from sm90_products import product_factors
from sm90_sinks import NOTHING, finished, load_sink
from sm90_slow import FLOAT_MAX, LOG2_E, SLOW_ROWS, narrow, score_factors, shift_of
from sm90_softmax import pack, partial_sums, unpack, weigh_after
from sm90_terms import (
    OF_KEY,
    WIDTH,
    begins_with_terms,
    has_terms,
    load_keys,
    load_terms,
    of_keys,
    share_diagonals,
    share_keys,
    split_factor,
    split_keys,
    terms_of,
    words_of,
)
from sm90_tiles import ROWS, even_begin, even_place, section_heads, tile_count, tile_of
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LEAST_SCALE: gl.constexpr = gl.constexpr(2.0**-100)


@gluon.constexpr_function
def _of_v(shape):
    return OfV(shape.BLOCK_V, shape.BLOCK_N, shape.CONSUMERS, shape.V_STAGES, shape.GENERAL, False)


@gluon.constexpr_function
def _by_tiles(shape):
    """Whether a bias or mask comes by TMA."""
    return shape.BIAS == "tile" or shape.MASK == "tile"


@gluon.constexpr_function
def _freed_with_keys(shape):
    """Whether a consumer that has no more use for a block of keys has none for its tile of a bias or mask: another
    arrival would be another barrier of all its threads."""
    return shape.X_STAGES == shape.STAGES


@gluon.jit
def _load_tiles(beside, batch, head, first_row, key, step, SHAPE: gl.constexpr):
    """Ask for the bias or mask of a step, of each consumer's rows."""
    x_desc, x_smem, x_ready, x_free, x_of_batch, x_of_head, vectors, sinks, by_head, inputs, terms = beside
    CONSUMERS: gl.constexpr = SHAPE.CONSUMERS
    STAGES: gl.constexpr = SHAPE.X_STAGES
    if not _freed_with_keys(SHAPE):
        for c in gl.static_range(CONSUMERS):
            mbarrier.wait(x_free.index(step % STAGES * CONSUMERS + c), ((step // STAGES) & 1) ^ 1)
    fence_async_shared()  # here rather than in the consumer, where it would wait for its product
    for c in gl.static_range(CONSUMERS):
        stage = step % STAGES * CONSUMERS + c
        mbarrier.expect(x_ready.index(stage), ROWS * SHAPE.BLOCK_N * (2 if SHAPE.BIAS == "tile" else 1))
        place = [batch * x_of_batch, head * x_of_head, first_row + c * ROWS, key]
        tma.async_load(x_desc, place, x_ready.index(stage), x_smem.index(stage))


@gluon.jit
def _load(work, beside, SHAPE: gl.constexpr):
    """The producer, as that of fmha_sm90.py."""
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    CONSUMERS: gl.constexpr = SHAPE.CONSUMERS
    STAGES: gl.constexpr = SHAPE.STAGES
    Q_SLOTS: gl.constexpr = SHAPE.Q_SLOTS
    V_SHAPE: gl.constexpr = _of_v(SHAPE)
    descriptors, shared, barriers, notes, sizes, Lse, factors, zero = work
    q_desc, k_desc, v_desc, out_desc = descriptors
    q_smem, k_smem, v_smem = shared
    v_work = (descriptors, (q_smem, k_smem, (v_smem,)), barriers, notes, sizes, Lse, factors, zero)
    q_ready, q_free, k_ready, k_free, v_ready, v_free, v_whole = barriers
    x_desc, x_smem, x_ready, x_free, x_of_batch, x_of_head, vectors, sinks, by_head, inputs, terms = beside
    num_heads, group, q_len, kv_len, row_tiles, heads, section, bounds = sizes
    step = 0
    v_place = (0, 0, 0)
    if SHAPE.EVEN:
        state = even_begin()
    for turn in range(tile_count(row_tiles, heads, section, order_of(SHAPE))):
        if SHAPE.EVEN:
            row_tile, unit, state = even_place(state, row_tiles, heads, section)
        else:
            row_tile, unit = tile_of(turn, row_tiles, heads, section, order_of(SHAPE))
        batch, head = place_of(unit, sizes, by_head)
        first_block, end_block, whole, sequence, position = keys_of_tile(row_tile, batch, head, sizes, inputs, SHAPE)
        first_row = row_tile * (ROWS * CONSUMERS)
        for block in range(end_block - first_block):
            key = (end_block - 1 - block) * BLOCK_N  # from right to left
            if SHAPE.LIST > 0:
                key = key_of(end_block - 1 - block, whole, SHAPE)
            stage = step % STAGES
            if CONSUMERS == 1:
                if step == 1:
                    mbarrier.wait(q_ready.index(0), 0)
            if SHAPE.IN_PRODUCT:
                kv_n = sequence[1]
                vector = load_keys(vectors, (batch, head), key, kv_n, SHAPE)
            mbarrier.wait(k_free.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(k_ready.index(stage), BLOCK_N * SHAPE.BLOCK_D * 2)
            tma.async_load(k_desc, [batch, head // group, key, 0], k_ready.index(stage), k_smem.index(stage))
            if SHAPE.IN_PRODUCT:
                terms[1].index(stage).store(split_keys(vector, OF_KEY, SHAPE))
                fence_async_shared()
                gl.barrier()
                mbarrier.arrive(k_ready.index(stage), count=1)
            if Q_SLOTS == 1:
                if step > 0:
                    _load_v(v_work, v_place, step - 1, V_SHAPE)
            if block == 0:
                for c in gl.static_range(CONSUMERS):
                    slot = turn % Q_SLOTS * CONSUMERS + c
                    mbarrier.wait(q_free.index(slot), ((turn // Q_SLOTS) & 1) ^ 1)
                    if SHAPE.HANDED:
                        hand_on_keys(notes[1], slot, (row_tile, batch, head), (first_block, end_block), whole)
                    mbarrier.expect(q_ready.index(slot), ROWS * SHAPE.BLOCK_D * 2)
                    place = [batch, head, first_row + c * ROWS, 0]
                    tma.async_load(q_desc, place, q_ready.index(slot), q_smem.index(slot), cache_policy=ONCE)
            if _by_tiles(SHAPE):
                _load_tiles(beside, batch, head, first_row, key, step, SHAPE)
            if Q_SLOTS > 1:
                if step > 0:
                    _load_v(v_work, v_place, step - 1, V_SHAPE)
            v_place = (batch, head // group, key)
            step += 1
    if step > 0:
        _load_v(v_work, v_place, step - 1, V_SHAPE)


@gluon.jit
def _tile(beside, step, row_sum, CONSUMER: gl.constexpr, S_LAYOUT: gl.constexpr, SHAPE: gl.constexpr):
    """The bias or mask of a step's block of keys that comes by TMA, [rows, keys]; else 0."""
    x_desc, x_smem, x_ready, x_free, x_of_batch, x_of_head, vectors, sinks, by_head, inputs, terms = beside
    tile = 0
    if _by_tiles(SHAPE):
        stage = step % SHAPE.X_STAGES * SHAPE.CONSUMERS + CONSUMER
        mbarrier.wait(x_ready.index(stage), (step // SHAPE.X_STAGES) & 1)
        tile = x_smem.index(stage).reshape([ROWS, SHAPE.BLOCK_N]).load(S_LAYOUT)
    return tile


@gluon.jit
def _give_back(beside, k_free, step, CONSUMER: gl.constexpr, SHAPE: gl.constexpr):
    """A step's keys, and what came beside them, have been read."""
    x_free = beside[3]
    if _by_tiles(SHAPE) and not _freed_with_keys(SHAPE):
        mbarrier.arrive(x_free.index(step % SHAPE.X_STAGES * SHAPE.CONSUMERS + CONSUMER), count=1)
    mbarrier.arrive(k_free.index(step % SHAPE.STAGES), count=1)


@gluon.jit
def _with_terms(scores, beside, stage, SHAPE: gl.constexpr):
    """Products in flight, and the terms of the block of keys of a stage, if these are a product, too."""
    if SHAPE.IN_PRODUCT:
        factor, terms = beside[10]
        scores = warpgroup_mma(factor, terms.index(stage).permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def _share_terms(beside, work, step, vector, place, key, queries, kv_n, CONSUMER: gl.constexpr, SHAPE: gl.constexpr):
    """Store a step's terms, of keys from `key` on. vector: what `load_keys` gave of them; returns that of the next
    step, which then has a step to come."""
    factors = work[6]
    first_query, newest, lag, reach = queries
    vectors = beside[6]
    inputs = beside[9]
    own = terms_of(beside[10], step, CONSUMER, SHAPE)
    if of_keys(SHAPE):
        share_keys(own, vector, factors, SHAPE)
        vector = load_keys(vectors, place, key - SHAPE.BLOCK_N, kv_n, SHAPE)
    else:
        share_diagonals(own, factors, place, key, newest, gl.maximum(kv_n - 1, 0), inputs, SHAPE)
    return vector


@gluon.jit
def _step(
    acc, p, m, row_sum, vector, begun, q, work, beside, place, step, shift: gl.constexpr, queries, kv_n, begins, ends,
    key, before_key, masked, values, CONSUMER: gl.constexpr, SHAPE: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scores of block `step` beside the product of block `step - 1`, as in fmha_sm90.py."""
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    BLOCK_V: gl.constexpr = SHAPE.BLOCK_V
    V_SHAPE: gl.constexpr = _of_v(SHAPE)
    PING_PONG: gl.constexpr = SHAPE.PING_PONG
    descriptors, shared, barriers, notes, sizes, Lse, factors, zero = work
    to_log2 = factors[1]
    q_smem, k_smem, v_smem = shared
    BEGUN: gl.constexpr = begins_with_terms(v_smem.dtype, SHAPE)
    q_ready, q_free, k_ready, k_free, v_ready, v_free, v_whole = barriers
    inputs = beside[9]
    terms = beside[10]
    first_query, newest, lag, reach = queries
    last_key = gl.maximum(kv_n - 1, 0)
    stage = step % SHAPE.STAGES
    before = (step - 1) % SHAPE.V_STAGES
    if SHAPE.LIST > 0:
        _make_whole((v_smem,), barriers, step - 1, values - before_key, CONSUMER, V_SHAPE)
    elif SHAPE.GENERAL:
        _make_whole((v_smem,), barriers, step - 1, values - key - BLOCK_N, CONSUMER, V_SHAPE)
    mbarrier.wait(k_ready.index(stage), (step // SHAPE.STAGES) & 1)
    if PING_PONG:
        m = take_turn(m, CONSUMER)
    k_t = k_smem.index(stage).reshape([BLOCK_N, SHAPE.BLOCK_D]).permute((1, 0))
    if BEGUN:
        scores = warpgroup_mma(q, k_t, begun, is_async=True)
    else:
        scores = warpgroup_mma(
            q, k_t, gl.zeros([ROWS, BLOCK_N], gl.float32, layout=S_LAYOUT), use_acc=False, is_async=True
        )
    scores = _with_terms(scores, beside, stage, SHAPE)
    _wait_for_v(barriers, step - 1, CONSUMER, V_SHAPE)
    if SHAPE.LATE:
        p = p.to(v_smem.dtype)
    else:
        p = unpack(p, v_smem.dtype)
    p = gl.convert_layout(p, P_LAYOUT, assert_trivial=True)
    acc = warpgroup_mma(p, v_smem.index(before).reshape([BLOCK_N, BLOCK_V]), acc, is_async=True)
    if PING_PONG:
        m = pass_turn(m, (CONSUMER + 1) % SHAPE.CONSUMERS)
    if has_terms(SHAPE):  # the next block's
        vector = _share_terms(beside, work, step + 1, vector, place, key - BLOCK_N, queries, kv_n, CONSUMER, SHAPE)
    if SHAPE.TILE_AFTER:
        scores = warpgroup_mma_wait(1, deps=(scores,))
        tile = _tile(beside, step, row_sum, CONSUMER, S_LAYOUT, SHAPE)
    else:
        tile = _tile(beside, step, row_sum, CONSUMER, S_LAYOUT, SHAPE)
        scores = warpgroup_mma_wait(1, deps=(scores,))
    _give_back(beside, k_free, step, CONSUMER, SHAPE)
    scores = bounded(scores, m, factors[2], shift, SHAPE)
    term = None
    if has_terms(SHAPE) and not BEGUN:
        term = load_terms(terms_of(terms, step, CONSUMER, SHAPE), lag, S_LAYOUT, SHAPE)
    scores = counted(
        scores, tile, term, factors, place, first_query, last_key, inputs, begins, ends, queries[3], key,
        masked, shift, S_LAYOUT, SHAPE,
    )  # fmt: skip
    if SHAPE.LATE:
        next_p, m, row_sum, alpha = weigh(
            scores, m, row_sum, factors, begins, ends, key, masked, shift, S_LAYOUT, SHAPE
        )
        row_sum = hold(row_sum)
        acc, p, next_p = warpgroup_mma_wait(0, deps=(acc, p, next_p))
        mbarrier.arrive(v_free.index(before), count=1)
    else:
        scores, m, alpha = maxima(scores, m, factors, begins, ends, key, masked, shift, S_LAYOUT, SHAPE)
        alpha = hold(alpha)
        acc, p, scores = warpgroup_mma_wait(0, deps=(acc, p, scores))
        mbarrier.arrive(v_free.index(before), count=1)
        next_p, row_sum = weigh_after(acc, scores, m, row_sum, alpha, to_log2, zero, BLOCK_V, BLOCK_N)
        next_p = pack(next_p, v_smem.dtype)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True)[:, None]
    if BEGUN:
        begun = load_terms(terms_of(terms, step + 1, CONSUMER, SHAPE), lag, S_LAYOUT, SHAPE)
    return acc, next_p, m, row_sum, vector, begun


@gluon.jit
def _steps(
    acc, p, m, row_sum, vector, begun, q, work, beside, place, step, shift: gl.constexpr, queries, kv_n, begins, ends,
    block, count, whole, key, values, MASKED: gl.constexpr, CONSUMER: gl.constexpr, SHAPE: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """So many steps to the left of `block`; if MASKED, with a mask outside of `whole`, the first and the end of
    those that need none. key: the first of `block`, of a list."""
    whole_from = whole[0]
    whole_to = whole[1]
    for _unused in range(count):
        block -= 1
        masked = (block >= whole_to) | (block < whole_from) if MASKED else False
        if SHAPE.LIST > 0:
            before_key = key
            key = key_of(block, whole, SHAPE)
            acc, p, m, row_sum, vector, begun = _step(
                acc, p, m, row_sum, vector, begun, q, work, beside, place, step, shift, queries, kv_n, begins, ends,
                key, before_key, masked, values, CONSUMER, SHAPE, S_LAYOUT, O_LAYOUT, P_LAYOUT,
            )  # fmt: skip
        else:
            acc, p, m, row_sum, vector, begun = _step(
                acc, p, m, row_sum, vector, begun, q, work, beside, place, step, shift, queries, kv_n, begins, ends,
                block * SHAPE.BLOCK_N, None, masked, values, CONSUMER, SHAPE, S_LAYOUT, O_LAYOUT, P_LAYOUT,
            )  # fmt: skip
        step += 1
    return acc, p, m, row_sum, vector, begun, step, block, key


@gluon.constexpr_function
def _may_be_masked(shape):
    """Whether blocks other than the last one of the keys are. One consumer asks in any case, but for a bias by TMA:
    where the loop has no branch, ptxas may put all exponentials before their sums, and loads of terms behind both."""
    return (shape.CONSUMERS == 1 and shape.BIAS != "tile") or shape.CAUSAL or shape.SEEN is not None


@gluon.jit
def _capped(factors, place, inputs, dtype: gl.constexpr, SHAPE: gl.constexpr):
    """Factors with those of the soft cap of a batch and head; that of scores in units of log2 is one of them."""
    CAP: gl.constexpr = SHAPE.CAP
    POLYNOMIALS: gl.constexpr = polynomials_of(True, SHAPE.CONSUMERS)
    shift: gl.constexpr = shift_of(dtype)
    if SHAPE.LIST > 0:
        inputs = inputs[0]
    cap = gl.abs(gl.to_tensor(CAP(place[0], place[1], *inputs)).to(gl.float32))
    given = (factors[0], cap)
    if SHAPE.THREES:
        of_products = product_factors(given, score_factors(given, True), shift, POLYNOMIALS)
    else:
        of_products = tanh_factors(score_factors(given, True), shift, POLYNOMIALS)
    return factors[0], of_products[0], factors[2], factors[3], of_products


@gluon.jit
def _give_rows_back(q_free, turn, CONSUMER: gl.constexpr, SHAPE: gl.constexpr):
    """The slot of the tile before, whose rows have left it by now."""
    if turn > 0:
        tma.store_wait(0)
        mbarrier.arrive(q_free.index((turn - 1) % SHAPE.Q_SLOTS * SHAPE.CONSUMERS + CONSUMER), count=1)


@gluon.jit
def _attend(work, beside, out_smem, CONSUMER: gl.constexpr, SHAPE: gl.constexpr):
    """One consumer: 64 rows of each of the program's tiles."""
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    BLOCK_V: gl.constexpr = SHAPE.BLOCK_V
    CONSUMERS: gl.constexpr = SHAPE.CONSUMERS
    PING_PONG: gl.constexpr = SHAPE.PING_PONG
    Q_SLOTS: gl.constexpr = SHAPE.Q_SLOTS
    LATE: gl.constexpr = SHAPE.LATE
    V_SHAPE: gl.constexpr = _of_v(SHAPE)
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    descriptors, shared, barriers, notes, sizes, Lse, of_all, zero = work
    q_desc, k_desc, v_desc, out_desc = descriptors
    q_smem, k_smem, v_smem = shared
    q_ready, q_free, k_ready, k_free, v_ready, v_free, v_whole = barriers
    num_heads, group, q_len, kv_len, row_tiles, heads, section, bounds = sizes
    x_desc, x_smem, x_ready, x_free, x_of_batch, x_of_head, vectors, sinks, by_head, inputs, terms = beside
    shift: gl.constexpr = shift_of(v_smem.dtype)
    BEGUN: gl.constexpr = begins_with_terms(v_smem.dtype, SHAPE)
    MASKED: gl.constexpr = _may_be_masked(SHAPE)
    SPLIT: gl.constexpr = MASKED and not SHAPE.GENERAL and CONSUMERS > 1
    if PING_PONG:
        if CONSUMER == CONSUMERS - 1:
            pass_turn(gl.zeros([ROWS], gl.float32, layout=ROW_LAYOUT), 0)
    noted = gl.zeros([ROWS], gl.int32, layout=ROW_LAYOUT)
    step = 0
    for turn in range(tile_count(row_tiles, heads, section, order_of(SHAPE))):
        if SHAPE.HANDED:
            slot = turn % Q_SLOTS * CONSUMERS + CONSUMER
            row_tile, batch, head, first_block, end_block, whole = taken_keys(
                notes[1], slot, q_ready.index(slot), (turn // Q_SLOTS) & 1
            )
        else:
            row_tile, unit = tile_of(turn, row_tiles, heads, section, order_of(SHAPE))
            batch, head = place_of(unit, sizes, by_head)
        place = (batch, head)
        factors = of_all
        if SHAPE.CAP is not None:
            factors = _capped(of_all, place, inputs, v_smem.dtype, SHAPE)
        here = (descriptors, shared, barriers, notes, sizes, Lse, factors, zero)
        if SHAPE.HANDED:
            sequence, position = sequence_at(batch, head, sizes, SHAPE)
        else:
            first_block, end_block, whole, sequence, position = keys_of_tile(
                row_tile, batch, head, sizes, inputs, SHAPE
            )
        q_n, kv_n, oldest, newest = sequence
        first_row = row_tile * (ROWS * CONSUMERS) + CONSUMER * ROWS
        rows = gl.arange(0, ROWS, layout=ROW_LAYOUT) + first_row
        ends = rows * 0 + kv_n
        if SHAPE.CAUSAL:
            ends = gl.minimum(rows + (newest + 1), kv_n)
        begins = 0
        if SHAPE.GENERAL:
            ends = gl.where(rows < q_n, ends, 0)
            begins = gl.maximum(rows + oldest, 0)
        first_query = gl.maximum(gl.minimum(rows, q_n - 1) + position, 0)
        last_key = gl.maximum(kv_n - 1, 0)
        newest_query = gl.maximum(gl.minimum(first_row + (ROWS - 1), q_n - 1) + position, 0)
        reach = gl.minimum(first_row + newest + 1, kv_n) if SHAPE.CAUSAL else kv_n
        queries = (first_query, newest_query, newest_query - first_query, reach)
        if SHAPE.FROM_FIRST:
            whole = (0, whole[1])
        whole_from = whole[0]
        whole_to = whole[1]
        slot = turn % Q_SLOTS * CONSUMERS + CONSUMER
        q = q_smem.index(slot).reshape([ROWS, SHAPE.BLOCK_D])
        block = end_block - 1
        values = gl.where(kv_n < kv_len, kv_n, (block + 2) * BLOCK_N)  # rows of V that are no padding
        if SHAPE.LIST > 0:
            values = gl.where(kv_n < kv_len, kv_n, kv_len + 2 * SHAPE.LIST)
        m = gl.full([ROWS], NOTHING, gl.float32, layout=ROW_LAYOUT)
        row_sum = partial_sums(gl.zeros([ROWS, BLOCK_N], gl.float32, layout=S_LAYOUT), BLOCK_N)
        stage = step % SHAPE.STAGES
        mbarrier.wait(q_ready.index(slot), (turn // Q_SLOTS) & 1)
        mbarrier.wait(k_ready.index(stage), (step // SHAPE.STAGES) & 1)
        k_t = k_smem.index(stage).reshape([BLOCK_N, SHAPE.BLOCK_D]).permute((1, 0))
        scores = warpgroup_mma(
            q, k_t, gl.zeros([ROWS, BLOCK_N], gl.float32, layout=S_LAYOUT), use_acc=False, is_async=True
        )
        scores = _with_terms(scores, beside, stage, SHAPE)
        if SHAPE.BRIEF and Q_SLOTS > 1:
            _give_rows_back(q_free, turn, CONSUMER, SHAPE)
        key = block * BLOCK_N
        if SHAPE.LIST > 0:
            key = key_of(block, whole, SHAPE)
        vector = 0
        if of_keys(SHAPE) and not SHAPE.IN_PRODUCT:
            vector = load_keys(vectors, place, key, kv_n, SHAPE)
        if has_terms(SHAPE):
            vector = _share_terms(beside, here, step, vector, place, key, queries, kv_n, CONSUMER, SHAPE)
        tile = _tile(beside, step, row_sum, CONSUMER, S_LAYOUT, SHAPE)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        _give_back(beside, k_free, step, CONSUMER, SHAPE)
        scores = bounded(scores, m, factors[2], shift, SHAPE)
        term = None
        begun = 0
        if has_terms(SHAPE):
            term = load_terms(terms_of(terms, step, CONSUMER, SHAPE), queries[2], S_LAYOUT, SHAPE)
        masked = (block >= whole_to) | (block < whole_from)
        scores = counted(
            scores, tile, term, factors, place, first_query, last_key, inputs, begins, ends, queries[3], key,
            masked, shift, S_LAYOUT, SHAPE,
        )  # fmt: skip
        p, m, row_sum, alpha = weigh(scores, m, row_sum, factors, begins, ends, key, masked, shift, S_LAYOUT, SHAPE)
        if Q_SLOTS > 1 and not SHAPE.BRIEF:
            _give_rows_back(q_free, turn, CONSUMER, SHAPE)
        if not LATE:
            p = pack(p, v_smem.dtype)
        acc = gl.zeros([ROWS, BLOCK_V], gl.float32, layout=O_LAYOUT)
        step = uniform(step + 1)
        if has_terms(SHAPE):
            vector = _share_terms(beside, here, step, vector, place, key - BLOCK_N, queries, kv_n, CONSUMER, SHAPE)
            gl.barrier()
            if BEGUN:
                begun = load_terms(terms_of(terms, step, CONSUMER, SHAPE), queries[2], S_LAYOUT, SHAPE)
        to_left = uniform(block - first_block)
        block = uniform(block)
        if SPLIT:  # loops without masks need no registers for them; what follows on the left only bounds can mask
            for part in range(2 if SHAPE.BOUNDS is not None and not SHAPE.FROM_FIRST else 1):
                to_mask = block - gl.maximum(whole_to, first_block) if part == 0 else to_left
                to_mask = gl.minimum(gl.maximum(to_mask, 0), to_left)
                acc, p, m, row_sum, vector, begun, step, block, key = _steps(
                    acc, p, m, row_sum, vector, begun, q, here, beside, place, step, shift, queries, kv_n, begins, ends,
                    block, to_mask, whole, key, values, True,
                    CONSUMER, SHAPE, S_LAYOUT, O_LAYOUT, P_LAYOUT,
                )  # fmt: skip
                p = moved(p)
                to_left -= to_mask
                to_show = gl.minimum(gl.maximum(block - gl.maximum(whole_from, first_block), 0), to_left)
                acc, p, m, row_sum, vector, begun, step, block, key = _steps(
                    acc, p, m, row_sum, vector, begun, q, here, beside, place, step, shift, queries, kv_n, begins, ends,
                    block, to_show, whole, key, values, False,
                    CONSUMER, SHAPE, S_LAYOUT, O_LAYOUT, P_LAYOUT,
                )  # fmt: skip
                to_left -= to_show
        else:
            acc, p, m, row_sum, vector, begun, step, block, key = _steps(
                acc, p, m, row_sum, vector, begun, q, here, beside, place, step, shift, queries, kv_n, begins, ends,
                block, to_left, whole, key, values, MASKED,
                CONSUMER, SHAPE, S_LAYOUT, O_LAYOUT, P_LAYOUT,
            )  # fmt: skip
        last = (step - 1) % SHAPE.V_STAGES
        if SHAPE.LIST > 0:
            _make_whole((v_smem,), barriers, step - 1, values - key, CONSUMER, V_SHAPE)
        elif SHAPE.GENERAL:
            _make_whole((v_smem,), barriers, step - 1, values - block * BLOCK_N, CONSUMER, V_SHAPE)
        _wait_for_v(barriers, step - 1, CONSUMER, V_SHAPE)
        p = p.to(v_smem.dtype) if LATE else unpack(p, v_smem.dtype)
        p = gl.convert_layout(p, P_LAYOUT, assert_trivial=True)
        acc = warpgroup_mma(p, v_smem.index(last).reshape([BLOCK_N, BLOCK_V]), acc, is_async=True)
        total = gl.convert_layout(gl.sum(row_sum, 1), ROW_LAYOUT, assert_trivial=True)
        sink = load_sink(sinks, head)
        factor, _unused = finished(m, total, sink, shift)
        if Lse.to(gl.int64) != 0:
            _unused, lse = finished(m, total, sink, shift)
            if SHAPE.GENERAL:
                lse = gl.where(rows < q_n, lse, float("-inf"))
            gl.store(Lse + (batch * num_heads + head).to(gl.int64) * q_len + rows, lse, mask=rows < q_len)
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        mbarrier.arrive(v_free.index(last), count=1)
        PLAIN_ENDS: gl.constexpr = SHAPE.RELATIVE and not BEGUN  # ptxas else loads terms of T5 where nothing hides it
        if PLAIN_ENDS:
            broken = gl.convert_layout(gl.sum(acc * 0.0, 1), ROW_LAYOUT, assert_trivial=True) != 0
        else:
            broken = is_broken(acc, ROW_LAYOUT)
        sees = (m != NOTHING) | (total != 0)
        in_range = (total > 0) & (gl.abs(m - shift) < FAST_LIMIT) & (broken == 0)
        leaving = sees & (rows < q_n) & (ends > begins) & (in_range == 0)
        noted = noted | gl.where(leaving, 1 << (turn % NOTES), 0)
        if PLAIN_ENDS:
            factor = gl.convert_layout(factor, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True)
            acc = gl.where((factor != 0)[:, None], acc * factor[:, None], 0.0)
        else:
            acc = scaled(acc, factor)
        out_part = out_smem.index(slot)
        out_part.reshape([ROWS, BLOCK_V]).store(narrow(acc, v_smem.dtype))
        fence_async_shared()
        tma.async_store(out_desc, [batch, head, first_row, 0], out_part, cache_policy=ONCE)
        if Q_SLOTS == 1:
            tma.store_wait(0)
            mbarrier.arrive(q_free.index(slot), count=1)
    tma.store_wait(0)
    if gl.max((noted != 0).to(gl.int32), 0) != 0:
        noted = written(noted)
    notes[0].index(CONSUMER).store(noted)


@gluon.jit
def fmha_biased_sm90(
    out_desc, q_desc, k_desc, v_desc, x_desc, Out, Lse, Q, K, V, q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv,
    Bias, BiasFp32, Mask, Sinks, SinksFp32, sm_scale, softcap, batch_size, num_heads, num_kv_heads, q_len, kv_len,
    head_size, v_head_size, q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b,
    v_stride_h, v_stride_s, out_stride_b, out_stride_h, out_stride_s, bias_stride_b, bias_stride_h, bias_stride_q,
    bias_stride_k, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k, bias_rows, bias_columns, mask_rows,
    mask_columns, window_left, window_right, bottom_right,
    ragged, inputs,
    BLOCK_D: gl.constexpr, BLOCK_V: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, V_STAGES: gl.constexpr, X_STAGES: gl.constexpr, CAUSAL: gl.constexpr, GENERAL: gl.constexpr,
    LATE: gl.constexpr, PING_PONG: gl.constexpr, Q_SLOTS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    BIAS: gl.constexpr, MASK: gl.constexpr, SCORE: gl.constexpr, SEEN: gl.constexpr, BOUNDS: gl.constexpr,
    RELATIVE: gl.constexpr = False,
    Blocks=None, list_batches=None, list_heads=None, LIST: gl.constexpr = 0, IN_PRODUCT: gl.constexpr = False,
    PRODUCER_FIRST: gl.constexpr = False, THREES: gl.constexpr = False, LONGEST_FIRST: gl.constexpr = False,
    TILE_AFTER: gl.constexpr = False, CAP: gl.constexpr = None, HANDED_ON: gl.constexpr = False,

    FROM_FIRST: gl.constexpr = False, EVEN: gl.constexpr = 0, BRIEF: gl.constexpr = False,
):  # fmt: skip
    """Grid: any number of programs up to cdiv(q_len, 64 * CONSUMERS) * num_heads * batch_size.

    GENERAL wants CAUSAL, and serves lengths and windows of any width; else CAUSAL is whether attention is causal, and
    there are neither. LATE: see Shape of sm90_tiles.py.

    Arguments, tensors and functions: as of fmha_biased.py, but for ragged batches and soft caps. sm_scale is above
    0, at most 2**16, q_len and kv_len are 1 to 2**28, head sizes multiples of 8. Descriptors: boxes of [1, 1, 64,
    BLOCK_D] for Q, [1, 1, BLOCK_N, BLOCK_D] for K, [1, 1, BLOCK_N, BLOCK_V] for V, [1, 1, 64, BLOCK_V] for Out.

    BIAS, MASK: "never"; "tile", of [1, 1, 64, BLOCK_N] by x_desc, of which an axis that is broadcast has the size 1; or
    "keys", the same for all queries, keys side by side. One of them is "never". X_STAGES: blocks of such tiles in
    flight. LIST: with lists of LIST queries and keys an entry, see key_blocks.py; it wants GENERAL. IN_PRODUCT: see
    sm90_terms.py; for fp16, keys and several consumers. PRODUCER_FIRST: which partition the first warps are, for two
    consumers. THREES: see sm90_maxima.py. TILE_AFTER, CAP, HANDED_ON, FROM_FIRST, BRIEF: see Shape. LONGEST_FIRST,
    EVEN and the rest: as of fmha_fwd_sm90. Out has shared memory of its own where V is of another width.
    """
    if inputs is None:
        inputs = ()
    if LIST > 0:
        inputs = (inputs, (Blocks, list_batches, list_heads))
    group = num_heads // num_kv_heads
    row_tiles = (q_len + (ROWS * CONSUMERS - 1)) // (ROWS * CONSUMERS)
    all_heads = batch_size * num_heads
    if EVEN:
        section = section_heads(row_tiles, all_heads, EVEN)
    else:
        section = section_heads(row_tiles, all_heads) if LONGEST_FIRST else all_heads
    bounds = (bottom_right, q_lengths, kv_lengths, window_left, window_right)
    sizes = (num_heads, group, q_len, kv_len, row_tiles, all_heads, section, bounds)
    SHAPE: gl.constexpr = Shape(
        BLOCK_D,
        BLOCK_V,
        BLOCK_N,
        CONSUMERS,
        STAGES,
        V_STAGES,
        X_STAGES,
        PING_PONG,
        Q_SLOTS,
        LATE,
        CAUSAL,
        GENERAL,
        BIAS,
        MASK,
        SCORE,
        SEEN,
        BOUNDS,
        RELATIVE,
        LIST,
        IN_PRODUCT,
        THREES,
        LONGEST_FIRST,
        False,
        TILE_AFTER,
        CAP,
        HANDED_ON,
        FROM_FIRST,
        EVEN > 0,
        BRIEF,
    )
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [Q_SLOTS * CONSUMERS, 1, 1, ROWS, BLOCK_D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [V_STAGES, 1, 1, BLOCK_N, BLOCK_V], v_desc.layout)
    out_smem = q_smem
    if BLOCK_V != BLOCK_D:
        out_smem = gl.allocate_shared_memory(dtype, [Q_SLOTS * CONSUMERS, 1, 1, ROWS, BLOCK_V], out_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [Q_SLOTS * CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [Q_SLOTS * CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    v_whole = v_ready  # not used where no consumer waits for another to drop padding
    if GENERAL and CONSUMERS > 1:
        v_whole = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(Q_SLOTS * CONSUMERS):
        mbarrier.init(q_ready.index(c), count=1)
        mbarrier.init(q_free.index(c), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(s), count=2 if IN_PRODUCT else 1)
        mbarrier.init(k_free.index(s), count=CONSUMERS)
    for s in gl.static_range(V_STAGES):
        if GENERAL and CONSUMERS > 1:
            mbarrier.init(v_whole.index(s), count=1)
        mbarrier.init(v_ready.index(s), count=1)
        mbarrier.init(v_free.index(s), count=CONSUMERS)
    x_smem = q_smem  # not used where nothing comes beside the keys
    x_ready = q_ready
    x_free = q_free
    if _by_tiles(SHAPE):
        BLOCKS: gl.constexpr = X_STAGES * CONSUMERS
        x_smem = gl.allocate_shared_memory(x_desc.dtype, [BLOCKS, 1, 1, ROWS, BLOCK_N], x_desc.layout)
        x_ready = gl.allocate_shared_memory(gl.int64, [BLOCKS, 1], mbarrier.MBarrierLayout())
        x_free = x_ready
        for s in gl.static_range(BLOCKS):
            mbarrier.init(x_ready.index(s), count=1)
        if not _freed_with_keys(SHAPE):
            x_free = gl.allocate_shared_memory(gl.int64, [BLOCKS, 1], mbarrier.MBarrierLayout())
            for s in gl.static_range(BLOCKS):
                mbarrier.init(x_free.index(s), count=1)
    notes = (gl.allocate_shared_memory(gl.int32, [CONSUMERS, ROWS], NOTE_SMEM),)
    if HANDED_ON:
        notes = (notes[0], gl.allocate_shared_memory(gl.int32, [KEYS_HANDED * Q_SLOTS * CONSUMERS, 1], NOTE_SMEM))
    begun: gl.constexpr = begins_with_terms(dtype, SHAPE)
    if begun:  # so that terms stay finite: fp16 products count for nothing where it is less
        sm_scale = gl.maximum(sm_scale, LEAST_SCALE)
    undo = gl.minimum(1.0 / sm_scale, FLOAT_MAX)
    floor = FLOAT_MAX
    if has_terms(SHAPE):  # a product and what is added to it may both be as low
        floor = 0.5 * FLOAT_MAX
    to_log2 = sm_scale * LOG2_E
    if is_natural(SHAPE):
        to_log2 = sm_scale * 0.0 + LOG2_E
    factors = (sm_scale, to_log2, gl.maximum(LEAST / sm_scale, -floor), undo)
    work = (
        (q_desc, k_desc, v_desc, out_desc),
        (q_smem, k_smem, v_smem),
        (q_ready, q_free, k_ready, k_free, v_ready, v_free, v_whole),
        notes, sizes, Lse, factors, ragged,
    )  # fmt: skip
    stride_b = mask_stride_b
    stride_h = mask_stride_h
    vectors = (Mask, mask_stride_b, mask_stride_h, mask_columns)
    if BIAS != "never":
        stride_b = bias_stride_b
        stride_h = bias_stride_h
        vectors = (Bias, bias_stride_b, bias_stride_h, bias_columns)
    of_batch = (stride_b != 0).to(gl.int32)
    of_head = (stride_h != 0).to(gl.int32)
    by_head = (of_batch == 0) & (of_head != 0)
    sinks = (Sinks, SinksFp32)
    terms = q_smem  # not used where there are none
    if has_terms(SHAPE):  # of this step and of the next
        terms = gl.allocate_shared_memory(gl.float32, [2 * CONSUMERS, words_of(SHAPE)], NOTE_SMEM)
    if IN_PRODUCT:
        T_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(2 * WIDTH, 16, 2)
        factor = gl.allocate_shared_memory(dtype, [ROWS, WIDTH], T_LAYOUT)
        factor.store(split_factor(undo, OF_KEY))
        fence_async_shared()
        terms = (factor, gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, WIDTH], T_LAYOUT))
    beside = (x_desc, x_smem, x_ready, x_free, of_batch, of_head, vectors, sinks, by_head, inputs, terms)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [(_attend, (work, beside, out_smem, 0, SHAPE)), (_load, (work, beside, SHAPE))],
            [1],
            [PRODUCER_REGISTERS],
        )
    elif CONSUMERS == 2 and PRODUCER_FIRST:
        gl.warp_specialize(
            [
                (_load, (work, beside, SHAPE)),
                (_attend, (work, beside, out_smem, 0, SHAPE)),
                (_attend, (work, beside, out_smem, 1, SHAPE)),
            ],
            [4, 4],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS],
        )
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_attend, (work, beside, out_smem, 0, SHAPE)),
                (_attend, (work, beside, out_smem, 1, SHAPE)),
                (_load, (work, beside, SHAPE)),
            ],
            [4, 4],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (work, beside, out_smem, 0, SHAPE)),
                (_attend, (work, beside, out_smem, 1, SHAPE)),
                (_attend, (work, beside, out_smem, 2, SHAPE)),
                (_load, (work, beside, SHAPE)),
            ],
            [4, 4, 4],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    for part in range(CONSUMERS):
        noted = gl.reduce_or(notes[0].index(part).load(NOTE), 0)
        if noted != 0:
            tensors = (Out, Lse, Q, K, V)
            strides = (
                (q_stride_b, q_stride_h, q_stride_s),
                (k_stride_b, k_stride_h, k_stride_s),
                (v_stride_b, v_stride_h, v_stride_s),
                (out_stride_b, out_stride_h, out_stride_s),
                (bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, bias_rows, bias_columns),
                (mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k, mask_rows, mask_columns),
            )
            if SHAPE.EVEN:
                state = even_begin()
            for turn in range(tile_count(row_tiles, all_heads, section, order_of(SHAPE))):
                if SHAPE.EVEN:
                    even_row_tile, even_unit, state = even_place(state, row_tiles, all_heads, section)
                if ((noted >> (turn % NOTES)) & 1) != 0:
                    if SHAPE.EVEN:
                        row_tile, unit = even_row_tile, even_unit
                    else:
                        row_tile, unit = tile_of(turn, row_tiles, all_heads, section, order_of(SHAPE))
                    place = place_of(unit, sizes, by_head)
                    first_row = (row_tile * CONSUMERS + part) * ROWS
                    for row in range(first_row, first_row + ROWS, SLOW_ROWS):
                        compute_biased_slowly(
                            tensors, strides, sizes, (Bias, Mask, sinks), place, row, (head_size, v_head_size),
                            sm_scale, inputs, SHAPE,
                        )  # fmt: skip
