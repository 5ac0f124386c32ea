"""Which tiles a program of fmha_sm90.py takes, and which keys a tile sees."""

from typing import NamedTuple

from sm90_asm import uniform
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROWS: gl.constexpr = gl.constexpr(64)  # of one consumer: the M of wgmma
# A window without a bound: further than any two places of sequences of at most 2**28.
UNBOUNDED: gl.constexpr = gl.constexpr(2**29)
# How tiles are dealt out: one by one; in pairs of one head; in pairs of two heads, by which programs read half as many
# heads at a time, and long and short tiles run side by side.
SINGLES: gl.constexpr = gl.constexpr(0)
PAIRS_OF_A_HEAD: gl.constexpr = gl.constexpr(1)
PAIRS_OF_TWO_HEADS: gl.constexpr = gl.constexpr(2)
# From the longest, section by section, and those of the last section one a program: see `tile_of`.
LONGEST_FIRST: gl.constexpr = gl.constexpr(3)
# Pairs of the tiles of several heads, sorted by length, every other section from its last pair: see `tile_of`.
PAIRS_OF_SECTIONS: gl.constexpr = gl.constexpr(4)
PAIRS_OF_SMALL_SECTIONS: gl.constexpr = gl.constexpr(5)
HEADS_OF_SECTION: gl.constexpr = gl.constexpr(4)  # for PAIRS_OF_SECTIONS; of small ones half as many
# From the longest, section by section, each from another program on: see `even_place`.
EVENLY: gl.constexpr = gl.constexpr(6)
# As EVENLY, but in pairs of one head where these are as many for each program: see `next_place`.
EVENLY_OR_PAIRED: gl.constexpr = gl.constexpr(7)
# Tiles of a section for each program: an even number, of which long and short ones make up for each other, and so few
# that K and V of a section, at most 34 MB on 132 multiprocessors, stay in the L2 cache. The grid has twice as many rows
# more, for the last section, of up to two.
SECTION_ROUNDS: gl.constexpr = gl.constexpr(2)


class Shape(NamedTuple):
    """How the kernel is cut: constants of one variant, which its functions hand on as SHAPE.

    Those that are not explained at `fmha_fwd_sm90`: ORDER, how tiles are dealt out; and LATE, whether weights are
    converted to 16 bits beside the next product, as a lone consumer does, which has registers for them as float32; and
    APART, whether Out is stored from a buffer that the consumers share, not from the slot of its rows: those of the
    next tile may then come as soon as the last scores are there.
    """

    BLOCK_D: gl.constexpr
    BLOCK_N: gl.constexpr
    CONSUMERS: gl.constexpr
    STAGES: gl.constexpr
    CAUSAL: gl.constexpr
    PING_PONG: gl.constexpr
    Q_SLOTS: gl.constexpr
    LATE: gl.constexpr
    V_STAGES: gl.constexpr
    ORDER: gl.constexpr
    GENERAL: gl.constexpr
    RAGGED: gl.constexpr
    CAPPED: gl.constexpr
    TWO_PARTS: gl.constexpr = gl.constexpr(False)
    SINKS: gl.constexpr = gl.constexpr(False)
    APART: gl.constexpr = gl.constexpr(False)
    LAZY: gl.constexpr = gl.constexpr(False)
    SERIAL: gl.constexpr = gl.constexpr(False)
    LENGTHS: gl.constexpr = gl.constexpr(False)
    THREES: gl.constexpr = gl.constexpr(False)
    HANDED: gl.constexpr = gl.constexpr(False)
    EARLY: gl.constexpr = gl.constexpr(False)
    BRIEF: gl.constexpr = gl.constexpr(False)
    HALVED: gl.constexpr = gl.constexpr(False)
    DIRECT: gl.constexpr = gl.constexpr(False)
    LEVELS: gl.constexpr = gl.constexpr(False)
    BY_WARPS: gl.constexpr = gl.constexpr(False)
    FINDER: gl.constexpr = gl.constexpr(False)
    ALIGNED: gl.constexpr = gl.constexpr(False)


@gluon.constexpr_function
def order_of(causal, two_heads, longest_first, sections, evenly, paired):
    """How the tiles of a kernel compiled so are dealt out."""
    if evenly:
        return EVENLY_OR_PAIRED.value if paired else EVENLY.value
    if longest_first:
        return LONGEST_FIRST.value
    if sections:
        return PAIRS_OF_SMALL_SECTIONS.value if sections == 2 else PAIRS_OF_SECTIONS.value
    return (PAIRS_OF_TWO_HEADS.value if two_heads else PAIRS_OF_A_HEAD.value) if causal else SINGLES.value


@gluon.constexpr_function
def is_even(order):
    """Whether places follow from one another, as `next_place` has it."""
    return order in (EVENLY.value, EVENLY_OR_PAIRED.value)


@gluon.jit
def section_heads(row_tiles, heads, ROUNDS: gl.constexpr = SECTION_ROUNDS):
    """Heads of a section, if LONGEST_FIRST: so many that their tiles are SECTION_ROUNDS for each program, or just
    fewer; at least one, whose tiles may be more."""
    return gl.minimum(gl.maximum(ROUNDS * gl.num_programs(0) // row_tiles, 1), heads)


@gluon.jit
def _share(count):
    """How many of a number of units, dealt out one by one, this program gets."""
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    return count // programs + (program < count % programs).to(gl.int32)


@gluon.jit
def _last_heads(heads, section):
    """The first head of the last section, which has what is left over of whole ones besides: so many tiles that short
    ones make up for long ones there, too."""
    return gl.maximum(heads // section - 1, 0) * section


@gluon.jit
def _forth_and_back(tiles):
    """How many of a section's tiles this program gets, dealt out from the first program to the last, then back."""
    programs = gl.num_programs(0)
    rounds = tiles // programs
    place = gl.where(rounds % 2 == 0, gl.program_id(0), programs - 1 - gl.program_id(0))
    return rounds + (place < tiles % programs).to(gl.int32)


@gluon.jit
def tile_count(row_tiles, heads, section, ORDER: gl.constexpr):
    """How many of all tiles this program takes. `section` is what `section_heads` gives."""
    tiles = row_tiles * heads
    if ORDER == LONGEST_FIRST:
        first = _last_heads(heads, section)
        if gl.program_id(1) == 0:
            count = first // section * _forth_and_back(row_tiles * section)
        else:
            count = (_last_place() < (heads - first) * row_tiles).to(gl.int32)
        return count
    if ORDER == EVENLY:
        return _even_count(row_tiles, heads, section)
    if ORDER == EVENLY_OR_PAIRED:
        if section == 0:
            count = tile_count(row_tiles, heads, section, PAIRS_OF_A_HEAD)
        else:
            count = _even_count(row_tiles, heads, section)
        return count
    count = _share(tiles)
    if ORDER == PAIRS_OF_SECTIONS or ORDER == PAIRS_OF_SMALL_SECTIONS:
        count = _paired(tiles)
    if ORDER == PAIRS_OF_A_HEAD:
        if tiles > gl.num_programs(0):
            units = tiles - tiles // 2
            count = 2 * _share(units)
            # The last unit may be a single tile.
            count -= ((tiles % 2 != 0) & (gl.program_id(0) == (units - 1) % gl.num_programs(0))).to(gl.int32)
    if ORDER == PAIRS_OF_TWO_HEADS:
        if tiles > gl.num_programs(0):
            count = _share(heads // 2 * row_tiles) + _share((heads - heads // 2) * row_tiles)
        else:
            count = (gl.program_id(0) < tiles).to(gl.int32)
    return count


@gluon.jit
def _even_sections(row_tiles, heads, section):
    """Of EVENLY, sections before the last, rounds of each, and how many programs lack a tile in the last of these."""
    programs = gl.num_programs(0)
    tiles = row_tiles * section
    rounds = (tiles + programs - 1) // programs
    return gl.maximum(heads // section - 1, 0), rounds, rounds * programs - tiles


@gluon.jit
def _even_count(row_tiles, heads, section):
    """How many tiles this program gets of EVENLY."""
    programs = gl.num_programs(0)
    before, rounds, lacking = _even_sections(row_tiles, heads, section)
    first = gl.where(rounds % 2 == 0, gl.program_id(0), (gl.program_id(0) + lacking) % programs)
    lacked = gl.maximum(before * lacking - first + programs - 1, 0) // programs
    tiles = (heads - before * section) * row_tiles
    place = (gl.program_id(0) + before * (programs - lacking)) % programs
    place = gl.where(tiles // programs % 2 == 0, place, programs - 1 - place)
    return before * rounds - lacked + tiles // programs + (place < tiles % programs).to(gl.int32)


@gluon.jit
def even_begin():
    """Of EVENLY, where a program begins: its section, round, and place among programs there."""
    return gl.program_id(0) * 0, gl.program_id(0) * 0, gl.program_id(0)


@gluon.jit
def even_place(state, row_tiles, heads, section):
    """Of EVENLY, a tile, its head of batch * heads, and the state of the next one of this program.

    Tiles of a section, sorted by length, are dealt out to the programs forth and back, from the longest. The last round
    may have less of them than programs; those that lack one, which have had the longest before, are other ones in each
    section, whose first program is as many further on. So every program gets as much to do.
    """
    programs = gl.num_programs(0)
    index, lap, place = state
    before, rounds, lacking = _even_sections(row_tiles, heads, section)
    side_by_side = gl.where(index < before, section, heads - before * section)
    tile = lap * programs + gl.where(lap % 2 == 0, place, programs - 1 - place)
    lap += 1
    following = lap * programs + gl.where(lap % 2 == 0, place, programs - 1 - place)
    if (index < before) & (following >= row_tiles * section):
        index += 1
        lap = lap * 0
        place -= lacking
        place = gl.where(place < 0, place + programs, place)
    # the head of the section that the tile was of
    first_head = gl.where(lap == 0, index - 1, index) * section
    return row_tiles - 1 - tile // side_by_side, first_head + tile % side_by_side, (index, lap, place)


@gluon.jit
def section_or_pairs(row_tiles, heads, ROUNDS: gl.constexpr):
    """What `section_heads` gives, for EVENLY_OR_PAIRED; 0, where tiles go in pairs.

    Pairs read K and V of half as many heads at a time, but the last round of them leaves programs idle where they are
    no multiple of the programs: by more than an eighth, an even order is faster (kernels/NOTES.md).
    """
    programs = gl.num_programs(0)
    tiles = row_tiles * heads
    pairs = tiles - tiles // 2
    room = (pairs + programs - 1) // programs * programs
    paired = (tiles <= programs) | (room - pairs <= room // 8)
    return gl.where(paired, 0, section_heads(row_tiles, heads, ROUNDS))


@gluon.jit
def next_place(turn, state, row_tiles, heads, section, ORDER: gl.constexpr):
    """Of EVENLY and EVENLY_OR_PAIRED, the turn-th tile of this program and its head, and the state of the next one."""
    if ORDER == EVENLY_OR_PAIRED:
        if section == 0:
            row_tile, head = tile_of(turn, row_tiles, heads, section, PAIRS_OF_A_HEAD)
        else:
            row_tile, head, state = even_place(state, row_tiles, heads, section)
        return row_tile, head, state
    return even_place(state, row_tiles, heads, section)


@gluon.jit
def _last_units(tiles):
    """Of PAIRS_OF_SECTIONS, units in whole rounds for each program, units that are left, and whether the tiles of those
    go to a program each."""
    programs = gl.num_programs(0)
    units = tiles - tiles // 2
    rounds = units // programs
    return rounds, units - rounds * programs, tiles - 2 * rounds * programs <= programs


@gluon.jit
def _paired(tiles):
    """How many tiles this program gets of PAIRS_OF_SECTIONS."""
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    rounds, left, singly = _last_units(tiles)
    odd = tiles % 2  # then the last unit is a single tile
    alone = (program < left).to(gl.int32) + (programs - 1 - program < left - odd).to(gl.int32)
    units = rounds + (program < left).to(gl.int32)
    both = 2 * units - odd * (program == (tiles - tiles // 2 - 1) % programs).to(gl.int32)
    return gl.where(singly & (left > 0), 2 * rounds + alone, both)


@gluon.jit
def _of_sections(turn, row_tiles, heads, MOST: gl.constexpr):
    """`tile_of` of PAIRS_OF_SECTIONS, of so many heads each."""
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    rounds, left, singly = _last_units(row_tiles * heads)
    second = turn % 2
    lap = turn // 2
    place = program
    if singly & (lap >= rounds):
        second = (program >= left).to(gl.int32)
        place = gl.where(program < left, program, programs - 1 - program)
    unit = lap * programs + place
    each = MOST // 2 * row_tiles  # units of a whole section
    section = unit // each
    first_head = section * MOST
    heads_here = gl.maximum(gl.minimum(heads - first_head, MOST), 1)  # 1, where there is no such turn
    index = unit % each
    if (section % 2 != 0) & (heads_here == MOST):
        index = each - 1 - index
    if second != 0:
        index = row_tiles * heads_here - 1 - index
    return row_tiles - 1 - index // heads_here, first_head + index % heads_here


@gluon.jit
def _last_place():
    """Which tile of the last section this program takes, where its row of the grid is not the first."""
    return (gl.program_id(1) - 1) * gl.num_programs(0) + gl.program_id(0)


@gluon.jit
def tile_of(turn, row_tiles, heads, section, ORDER: gl.constexpr):
    """The turn-th tile of this program: its place among the tiles of rows, and its head of batch * heads.

    Pairs, where there are more tiles than programs, are units of two tiles that together are as long as every other
    unit: a long one and a short one. Of the same head; an odd number of tiles a head leaves one in the middle,
    which goes with that of the next head. Or of two heads side by side; of an odd number of heads the last one's
    tiles come last, one by one.

    PAIRS_OF_SECTIONS: as pairs of a head, but of HEADS_OF_SECTION heads at a time (of small ones two), whose tiles are
    sorted together, and
    every other section from its last pair: of lengths that do not fall evenly, the first pairs are the longest. Where
    what is left at the end is no more tiles than programs, these are a program each.

    LONGEST_FIRST: tiles of a section, sorted by length, are dealt out to the programs of the grid's first row forth and
    back, and programs go from section to section. The other rows of the grid hold a program for each tile of the last
    section: the GPU starts them, in order, where a multiprocessor has become free. So what the first ones lack of being
    equally long, and multiprocessors of being equally fast, is evened out without memory that launches would share.
    """
    programs = gl.num_programs(0)
    if ORDER == LONGEST_FIRST:
        each = gl.maximum(_forth_and_back(row_tiles * section), 1)
        first_head = turn // each * section
        side_by_side = section
        lap = turn % each
        place = lap * programs + gl.where(lap % 2 == 0, gl.program_id(0), programs - 1 - gl.program_id(0))
        if gl.program_id(1) != 0:
            first_head = _last_heads(heads, section)
            side_by_side = heads - first_head
            place = _last_place()
        return row_tiles - 1 - place // side_by_side, first_head + place % side_by_side
    if ORDER == PAIRS_OF_SECTIONS:
        return _of_sections(turn, row_tiles, heads, HEADS_OF_SECTION)
    if ORDER == PAIRS_OF_SMALL_SECTIONS:
        return _of_sections(turn, row_tiles, heads, HEADS_OF_SECTION // 2)
    unit = turn * programs + gl.program_id(0)
    head = unit // row_tiles
    row_tile = unit % row_tiles
    if ORDER == PAIRS_OF_A_HEAD:
        if row_tiles * heads > programs:
            unit = turn // 2 * programs + gl.program_id(0)
            odd = row_tiles % 2  # then two heads share their units
            units = row_tiles * (1 + odd) // 2
            first_head = unit // units * (1 + odd)
            shared = odd * (first_head + 1 < heads).to(gl.int32)
            index = unit % units  # from the longest
            if turn % 2 != 0:
                index = (row_tiles << shared) - 1 - index
            row_tile = row_tiles - 1 - (index >> shared)
            head = first_head + (index & shared)
    if ORDER == PAIRS_OF_TWO_HEADS:
        pairs = heads // 2
        program = gl.program_id(0)
        few = row_tiles * heads <= programs  # then one tile a program
        singles = gl.maximum(turn - 2 * _share(pairs * row_tiles), 0)
        unit = (turn + singles) // 2 * programs + program
        unit = gl.where(few, gl.maximum(program // 2, program - pairs * row_tiles), unit)
        other = gl.where(few, program, turn) % 2
        pair = unit // row_tiles
        row_tile = row_tiles - 1 - unit % row_tiles
        head = 2 * pair
        if (pair < pairs) & (other != 0):
            head += 1
            row_tile = row_tiles - 1 - row_tile
    return row_tile, head


@gluon.jit
def sequence_of(sizes, head, SHAPE: gl.constexpr):
    """The sequence of a head: its queries and keys, and which keys query i sees where there are masks: those up to
    i + newest and, if GENERAL, from i + oldest on."""
    num_heads, group, q_len, kv_len, row_tiles, heads, section, bounds = sizes
    bottom_right, q_lengths, kv_lengths, window_left, window_right = bounds
    if SHAPE.GENERAL or SHAPE.LENGTHS:
        batch = head // num_heads
        if q_lengths.to(gl.int64) != 0:
            q_len = gl.minimum(gl.maximum(gl.load(q_lengths + batch), 0), q_len)
        if kv_lengths.to(gl.int64) != 0:
            kv_len = gl.minimum(gl.maximum(gl.load(kv_lengths + batch), 0), kv_len)
    if SHAPE.LENGTHS:
        q_len = uniform(q_len)
        kv_len = uniform(kv_len)
    return seen_from(q_len, kv_len, bottom_right, window_left, window_right, SHAPE)


@gluon.jit
def seen_from(q_len, kv_len, bottom_right, window_left, window_right, SHAPE: gl.constexpr):
    """A sequence of so many queries and keys, as `sequence_of` has it."""
    GENERAL: gl.constexpr = SHAPE.GENERAL
    offset = (bottom_right != 0).to(gl.int32) * (kv_len - q_len)
    oldest = offset
    newest = offset
    if GENERAL:
        oldest -= gl.minimum(gl.where(window_left < 0, UNBOUNDED, window_left), UNBOUNDED)
        newest += gl.minimum(gl.where(window_right < 0, UNBOUNDED, window_right), UNBOUNDED)
    return q_len, kv_len, oldest, newest


@gluon.jit
def end_block_of(end_row, sequence, SHAPE: gl.constexpr):
    """The block past the last one that rows below end_row see; at least 1: a first block may count for nothing."""
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    CAUSAL: gl.constexpr = SHAPE.CAUSAL
    q_len, kv_len, oldest, newest = sequence
    end = kv_len
    if CAUSAL:
        end = gl.minimum(kv_len, gl.minimum(end_row, q_len) + newest)
    return gl.maximum((end + (BLOCK_N - 1)) // BLOCK_N, 1)


@gluon.jit
def tile_blocks(row_tile, sequence, SHAPE: gl.constexpr):
    """Key blocks that some row of a tile sees, as their first and the one past the last: those that are loaded for it.
    One, where all rows are padding."""
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    GENERAL: gl.constexpr = SHAPE.GENERAL
    q_len, kv_len, oldest, newest = sequence
    first_row = row_tile * (ROWS * SHAPE.CONSUMERS)
    first = 0
    end = end_block_of(first_row + ROWS * SHAPE.CONSUMERS, sequence, SHAPE)
    if GENERAL or SHAPE.LENGTHS:
        end = gl.where(first_row < q_len, end, 1)
    if GENERAL:
        first = gl.minimum(gl.maximum(first_row + oldest, 0) // BLOCK_N, end - 1)
    return first, end


@gluon.jit
def first_key(block, sequence, SHAPE: gl.constexpr):
    """The first key of a block. If LENGTHS, the last block of a sequence ends where that does, so that no padding is
    ever read: its first keys are those of the block before once more, which mask them here, or lie before the first,
    where TMA reads zeros."""
    key = block * SHAPE.BLOCK_N
    if SHAPE.LENGTHS:
        key = gl.minimum(key, sequence[1] - SHAPE.BLOCK_N)
    return key
