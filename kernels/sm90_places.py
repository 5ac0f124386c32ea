"""Tiles of fmha_sm90.py that the producer finds, and whose places it hands on to the consumers: those of ragged batches
that are cut as plain attention is, from a table of the sequences; and others, if HANDED."""

from sm90_asm import uniform
from sm90_ragged import _at_most, _larger, _sum
from sm90_tiles import EVENLY, ROWS, even_begin, even_place, seen_from, tile_count, tile_of
from sm90_wide import is_wide, panel_of, parts_of_block, unit_keys
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

# Segments of a table: sequences, and the rows before and after them. Each warp holds a whole row of it, four a thread.
SEGMENTS: gl.constexpr = gl.constexpr(128)
FEW_SEGMENTS: gl.constexpr = gl.constexpr(32)  # one a thread, where a batch has no more
SMEM: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
# What is handed on of a tile: its place among those of its sequence, where its queries begin, how many there are, keys.
HANDED: gl.constexpr = gl.constexpr(4)
KEYS_HANDED: gl.constexpr = gl.constexpr(8)  # words of what `hand_on_keys` writes
FOUND: gl.constexpr = gl.constexpr(2)  # places that may wait for the producer
FOUND_WORDS: gl.constexpr = gl.constexpr(8)
HEIGHT: gl.constexpr = gl.constexpr(16)
# A word has a tile's place, below 2**28 / 64, and its head, both of which the functions' limits bound.
HEAD_BITS: gl.constexpr = gl.constexpr(10)
MOST_HEADS: gl.constexpr = gl.constexpr(2**10)
MOST_TILES: gl.constexpr = gl.constexpr(2**22 - 1)


@gluon.jit
def write_table(
    table, cu_seqlens_q, cu_seqlens_kv, batch_size, q_len, kv_len, TILE: gl.constexpr, BLOCK_N: gl.constexpr
):  # fmt: skip
    """Write what a program must know of the sequences; returns how many tiles there are, and the most blocks of one.

    As find_tile of sm90_ragged.py has it: sequence s is segment s + 1; segments 0 and batch_size + 1 are the rows
    before and after all sequences, which have no keys. Rows of the table: queries; keys, of the first segment the
    number of those before all sequences, less than 0.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    segment = gl.arange(0, SEGMENTS, layout=LAYOUT)
    given = segment <= batch_size
    begin_given = (segment > 0) & (segment <= batch_size + 1)
    begin = _at_most(cu_seqlens_q, segment - 1, begin_given, gl.where(segment > 0, q_len, 0), q_len)
    end = _at_most(cu_seqlens_q, segment, given, q_len, q_len)
    kv_begin = _at_most(cu_seqlens_kv, segment - 1, begin_given, 0, kv_len)
    kv_end = _at_most(cu_seqlens_kv, segment, given, 0, kv_len)
    # Whatever they hold, nothing begins before what came earlier, of which there is at least 0.
    begin = gl.maximum(gl.associative_scan(begin, 0, _larger), 0)
    kv_begin = gl.maximum(gl.associative_scan(kv_begin, 0, _larger), 0)
    q_n = gl.maximum(end, begin) - begin
    kv_n = gl.where(segment <= batch_size, gl.maximum(kv_end, kv_begin) - kv_begin, 0)
    table.index(0).store(q_n)
    table.index(1).store(gl.where(segment == 0, -kv_n, kv_n))
    gl.barrier()
    tiles = (q_n + (TILE - 1)) // TILE
    kv_n = gl.where(segment == 0, 0, kv_n)
    blocks = gl.max(gl.where(tiles > 0, (kv_n + (BLOCK_N - 1)) // BLOCK_N, 0), 0)
    return gl.sum(tiles, 0), gl.maximum(blocks, 1)


@gluon.jit
def _as_long(level, tiles, q_n, kv_n, bottom_right, SHAPE: gl.constexpr):
    """Tiles of each segment that have at least `level` blocks of keys: its last ones."""
    TILE: gl.constexpr = ROWS * SHAPE.CONSUMERS
    key = (level - 1) * SHAPE.BLOCK_N  # which the last row of the tile must see
    if SHAPE.CAUSAL:
        row = gl.maximum(key - (bottom_right != 0).to(gl.int32) * (kv_n - q_n), 0)
        count = gl.where((kv_n > key) & (q_n > row), tiles - row // TILE, 0)
    else:
        count = gl.where(kv_n > key, tiles, 0)
    return gl.where(level <= 1, tiles, count)


@gluon.jit
def _find_among(sizes, rank, COUNT: gl.constexpr, SHAPE: gl.constexpr):
    """As `find_ranked`, where so many segments of the table are all there are."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([COUNT // 32], [32], [gl.num_warps()], [0])
    num_heads, group, q_len, kv_len, row_tiles, heads, section, bounds = sizes
    bottom_right, shared, most, window_left, window_right = bounds
    table, places, few = shared
    q_n = table.index(0).slice(0, COUNT).load(LAYOUT)
    keys = table.index(1).slice(0, COUNT).load(LAYOUT)
    kv_n = gl.maximum(keys, 0)
    tiles = (q_n + (ROWS * SHAPE.CONSUMERS - 1)) // (ROWS * SHAPE.CONSUMERS)
    level = rank * 0 + 1  # of the tile: at least this, and below `beyond`
    beyond = most + 1
    while beyond - level > 1:
        middle = (level + beyond) // 2
        if gl.sum(_as_long(middle, tiles, q_n, kv_n, bottom_right, SHAPE), 0) > rank:
            level = middle
        else:
            beyond = middle
    as_long = _as_long(level, tiles, q_n, kv_n, bottom_right, SHAPE)
    longer = _as_long(level + 1, tiles, q_n, kv_n, bottom_right, SHAPE)
    end = gl.associative_scan(as_long - longer, 0, _sum)
    index = rank - gl.sum(longer, 0) - (end - (as_long - longer))  # among those of the segment
    hit = (index >= 0) & (index < as_long - longer)
    row_tile = gl.sum(gl.where(hit, tiles - as_long + index, 0), 0)
    found = gl.sum(gl.where(hit, gl.arange(0, COUNT, layout=LAYOUT), 0), 0)
    before = gl.arange(0, COUNT, layout=LAYOUT) < found
    q_start = gl.sum(gl.where(before, q_n, 0), 0)
    kv_start = gl.sum(gl.where(before, gl.abs(keys), 0), 0)
    q_own = gl.sum(gl.where(hit, q_n, 0), 0)
    kv_own = gl.sum(gl.where(hit, kv_n, 0), 0)
    return row_tile, q_start, kv_start, q_own, kv_own


@gluon.jit
def find_ranked(sizes, rank, SHAPE: gl.constexpr):
    """The tile of a rank among those of a head, from the one with most keys to the one with fewest: as find_tile."""
    bottom_right, shared, most, window_left, window_right = sizes[7]
    if shared[2]:  # a quarter of the instructions
        row_tile, q_start, kv_start, q_own, kv_own = _find_among(sizes, rank, FEW_SEGMENTS, SHAPE)
    else:
        row_tile, q_start, kv_start, q_own, kv_own = _find_among(sizes, rank, SEGMENTS, SHAPE)
    sequence = seen_from(uniform(q_own), uniform(kv_own), bottom_right, window_left, window_right, SHAPE)
    return uniform(row_tile), uniform(q_start), uniform(kv_start), sequence


@gluon.jit
def place_of_turn(turn, state, sizes, SHAPE: gl.constexpr):
    """Of the turn-th tile of this program its head, what find_ranked gives, and where EVENLY goes on; anything, if
    there is none."""
    num_heads, group, q_len, kv_len, row_tiles, heads, section, bounds = sizes
    if SHAPE.ORDER == EVENLY:
        row_tile, head, state = even_place(state, gl.maximum(row_tiles, 1), heads, section)
    else:
        row_tile, head = tile_of(turn, gl.maximum(row_tiles, 1), heads, section, SHAPE.ORDER)
    row_tile, q_start, kv_start, sequence = find_ranked(sizes, row_tiles - 1 - row_tile, SHAPE)
    return (head, row_tile, q_start, kv_start, sequence), state


@gluon.constexpr_function
def _first_stores_asm(_outputs, inputs):
    (places,), (thread,), *values = inputs
    stored = f"st.shared.v{len(values)}.b32 [{places}], {{{', '.join(value for (value,) in values)}}}"
    return f"{{ .reg .pred first; setp.eq.u32 first, {thread}, 0; @first {stored}; }}"


@gluon.jit
def _threads():
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.arange(0, 32 * gl.num_warps(), layout=LAYOUT)


@gluon.jit
def _of_each(value):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.full([32 * gl.num_warps()], value, gl.int32, layout=LAYOUT)


@gluon.jit
def hand_on(sizes, slot, row_tile, head, q_start, sequence, SHAPE: gl.constexpr):
    """Write a tile's place where the consumer finds it when its queries have come, which must not be asked for
    before; if EVENLY, with its head, which consumers of other orders know.

    The thread writes it that then arrives with the bytes to expect, which orders what it stored itself. Where all
    threads store and meet before that, racecheck of 2026 reports what the last one stored.
    """
    places = sizes[7][1][1]
    if SHAPE.ORDER == EVENLY:
        row_tile = row_tile * MOST_HEADS + head
    gl.inline_asm(
        _first_stores_asm,
        ("r", "r", "r", "r", "r", "r"),
        [
            places.index(slot * HANDED), _threads(),
            _of_each(row_tile), _of_each(q_start), _of_each(sequence[0]), _of_each(sequence[1]),
        ],
    )  # fmt: skip


@gluon.jit
def hand_on_tile(places, slot, row_tile, head):
    """As `hand_on`, of a tile without a table."""
    operands = [places.index(slot * 2), _threads(), _of_each(row_tile), _of_each(head)]
    gl.inline_asm(_first_stores_asm, ("r", "r", "r", "r"), operands)


@gluon.jit
def hand_on_keys(places, slot, place, blocks, whole):
    """As `hand_on_tile`, with what a bounds function said of a tile: the blocks of keys that are loaded, and those that
    are seen whole."""
    row_tile, batch, head = place
    operands = [
        places.index(slot * KEYS_HANDED), _threads(), _of_each(row_tile), _of_each(batch), _of_each(head),
        _of_each(blocks[0]),
    ]  # fmt: skip
    gl.inline_asm(_first_stores_asm, ("r", "r", "r", "r", "r", "r"), operands)
    operands = [
        places.index(slot * KEYS_HANDED + 4), _threads(), _of_each(blocks[1]), _of_each(whole[0]), _of_each(whole[1]),
        _of_each(whole[1]),
    ]  # fmt: skip
    gl.inline_asm(_first_stores_asm, ("r", "r", "r", "r", "r", "r"), operands)


@gluon.jit
def _take_one(places, index):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return uniform(gl.max(places.index(index).load(LAYOUT), 0))


@gluon.jit
def taken(sizes, slot, head, ready, phase, SHAPE: gl.constexpr):
    """What was handed on, once the queries are there: the tile's place among those of its sequence, its head, where
    the queries of that begin, the sequence."""
    mbarrier.wait(ready, phase)
    bottom_right, shared, most, window_left, window_right = sizes[7]
    places = shared[1]
    row_tile = _take_one(places, slot * HANDED)
    if SHAPE.ORDER == EVENLY:
        head = row_tile & (MOST_HEADS - 1)
        row_tile = (row_tile >> HEAD_BITS) & MOST_TILES
    q_start = _take_one(places, slot * HANDED + 1)
    q_n = _take_one(places, slot * HANDED + 2)
    kv_n = _take_one(places, slot * HANDED + 3)
    return row_tile, head, q_start, seen_from(q_n, kv_n, bottom_right, window_left, window_right, SHAPE)


@gluon.jit
def taken_tile(places, slot, ready, phase):
    """What `hand_on_tile` was given, once the queries are there."""
    mbarrier.wait(ready, phase)
    return given_tile(places, slot)


@gluon.jit
def given_tile(places, slot):
    """As `taken_tile`, of queries that have been waited for."""
    return _take_one(places, slot * 2), _take_one(places, slot * 2 + 1)


@gluon.jit
def find_places(found, sizes, SHAPE: gl.constexpr):
    """The places of all tiles of this program, ahead of the producer by up to as many as `found` has room for: the
    blocks of keys that it asks for then need not wait for a search."""
    ring, ready, free = found
    num_heads, group, q_len, kv_len, row_tiles, heads, section, bounds = sizes
    state = even_begin() if SHAPE.ORDER == EVENLY else ()
    for turn in range(tile_count(row_tiles, heads, section, SHAPE.ORDER)):
        place, state = place_of_turn(turn, state, sizes, SHAPE)
        head, row_tile, q_start, kv_start, sequence = place
        slot = turn % FOUND
        mbarrier.wait(free.index(slot), ((turn // FOUND) & 1) ^ 1)
        operands = [
            ring.index(slot * FOUND_WORDS), _threads(), _of_each(head), _of_each(row_tile), _of_each(q_start),
            _of_each(kv_start),
        ]  # fmt: skip
        gl.inline_asm(_first_stores_asm, ("r", "r", "r", "r", "r", "r"), operands)
        operands = [
            ring.index(slot * FOUND_WORDS + 4), _threads(), _of_each(sequence[0]), _of_each(sequence[1]),
        ]  # fmt: skip
        gl.inline_asm(_first_stores_asm, ("r", "r", "r", "r"), operands)
        mbarrier.arrive(ready.index(slot), count=1)


@gluon.jit
def found_place(found, turn, sizes, SHAPE: gl.constexpr):
    """What `find_places` found for the turn-th tile: as `place_of_turn`."""
    ring, ready, free = found
    bottom_right, shared, most, window_left, window_right = sizes[7]
    slot = turn % FOUND
    mbarrier.wait(ready.index(slot), (turn // FOUND) & 1)
    at = slot * FOUND_WORDS
    head = _take_one(ring, at)
    row_tile = _take_one(ring, at + 1)
    q_start = _take_one(ring, at + 2)
    kv_start = _take_one(ring, at + 3)
    q_n = _take_one(ring, at + 4)
    kv_n = _take_one(ring, at + 5)
    sequence = seen_from(q_n, kv_n, bottom_right, window_left, window_right, SHAPE)
    mbarrier.arrive(free.index(slot), count=1)
    return head, row_tile, q_start, kv_start, sequence


@gluon.jit
def _without(part, first, count, HEIGHT: gl.constexpr, WIDTH: gl.constexpr, MEET: gl.constexpr):
    """Set to zero rows before the count-th of a block, of HEIGHT in shared memory that begin with the first-th. MEET:
    with a barrier between these and those before, which Triton does not know to be others."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    if count > first:
        rows = gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, LAYOUT))
        if MEET:
            gl.barrier()
        kept = gl.where((rows < count - first)[:, None], 0.0, part.load(LAYOUT))
        gl.barrier()
        part.store(kept)


@gluon.jit
def taken_keys(places, slot, ready, phase):
    """What `hand_on_keys` was given, once the queries are there: place of the tile, batch, head, first and end of the
    blocks, and of those seen whole."""
    mbarrier.wait(ready, phase)
    at = slot * KEYS_HANDED
    row_tile = _take_one(places, at)
    batch = _take_one(places, at + 1)
    head = _take_one(places, at + 2)
    first_block = _take_one(places, at + 3)
    end_block = _take_one(places, at + 4)
    return row_tile, batch, head, first_block, end_block, (_take_one(places, at + 5), _take_one(places, at + 6))


@gluon.jit
def drop_rows(v_smem, stage, count, whole, phase, CONSUMER: gl.constexpr, SHAPE: gl.constexpr):
    """Set to zero the first `count` rows of a block of V, which are of other sequences: they may be NaN, which a weight
    of 0 does not undo. The last consumer does; all of them meet behind it."""
    BLOCK_D: gl.constexpr = SHAPE.BLOCK_D
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    if CONSUMER == SHAPE.CONSUMERS - 1:
        if is_wide(BLOCK_N):
            UNIT: gl.constexpr = unit_keys(BLOCK_N)
            PANEL: gl.constexpr = panel_of(BLOCK_D)
            PARTS: gl.constexpr = parts_of_block(BLOCK_D, BLOCK_N, SHAPE.TWO_PARTS)
            for part in gl.static_range(PARTS):  # those of a panel follow each other
                rows = v_smem[0].index(stage * PARTS + part).reshape([UNIT, PANEL])
                _without(rows, part % (BLOCK_N // UNIT) * UNIT, count, UNIT, PANEL, part > 0)
        else:
            v = v_smem[0].index(stage).reshape([BLOCK_N, BLOCK_D])
            for first in gl.static_range(0, BLOCK_N, HEIGHT):
                _without(v.slice(first, HEIGHT), first, count, HEIGHT, BLOCK_D, False)
        fence_async_shared()
        gl.barrier()
    mbarrier.arrive(whole, count=1)
    gl.barrier()
    mbarrier.wait(whole, phase)
