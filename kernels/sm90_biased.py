"""What fmha_biased_sm90.py does beside fmha_sm90.py: which keys its tiles see, and what becomes of their scores."""

from typing import NamedTuple

from sm90_lowest import limited
from sm90_maxima import largest
from sm90_powers import polynomials_of
from sm90_softmax import maxima as maxima_of_capped
from sm90_softmax import partial_sums
from sm90_terms import has_terms
from sm90_tiles import EVENLY, LONGEST_FIRST, PAIRS_OF_A_HEAD, ROWS, SINGLES, sequence_of
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# -2**100: below every score in the range of the fast arithmetic, and what one counts as that has merely overflowed.
LEAST: gl.constexpr = gl.constexpr(-1.2676506002282294e30)


class Shape(NamedTuple):
    """How the kernel is cut, as Shape of sm90_tiles.py, and besides BLOCK_V, the width of V; X_STAGES, blocks of bias
    or mask in flight; and what `fused_attention_biased` of fmha_biased.py explains, BIAS and MASK being "never",
    "tile" (by TMA) or "keys" (one for all queries). LIST: keys of an entry of the lists of key_blocks.py, 0 for none;
    with lists `inputs` are two tuples, the function's and (Blocks, list_batches, list_heads). IN_PRODUCT: whether what
    is the same for all queries is added by a product of its own, see sm90_terms.py. THREES: see
    sm90_maxima.py. LONGEST_FIRST: see sm90_tiles.py. TILE_AFTER: whether a bias or mask by TMA is loaded when the
    products are there, rather than while they run, so that it takes few registers at a time. CAP:
    of a SCORE that is a soft cap and nothing else a function (batch, head, *inputs) of the cap; SCORE is not asked.
    HANDED: whether the producer hands on the places of tiles, with what bounds say of them (sm90_places.py), neither
    for lists nor if GENERAL. FROM_FIRST: whether BOUNDS say that what is seen, and what is seen whole, begin with the
    first key. EVEN: whether tiles are dealt out evenly, see `even_place` of sm90_tiles.py, and HANDED. BRIEF: whether
    the slot of the rows before is given back beside a tile's first product."""

    BLOCK_D: gl.constexpr
    BLOCK_V: gl.constexpr
    BLOCK_N: gl.constexpr
    CONSUMERS: gl.constexpr
    STAGES: gl.constexpr
    V_STAGES: gl.constexpr
    X_STAGES: gl.constexpr
    PING_PONG: gl.constexpr
    Q_SLOTS: gl.constexpr
    LATE: gl.constexpr
    CAUSAL: gl.constexpr
    GENERAL: gl.constexpr
    BIAS: gl.constexpr
    MASK: gl.constexpr
    SCORE: gl.constexpr
    SEEN: gl.constexpr
    BOUNDS: gl.constexpr
    RELATIVE: gl.constexpr
    LIST: gl.constexpr = gl.constexpr(0)
    IN_PRODUCT: gl.constexpr = gl.constexpr(False)
    THREES: gl.constexpr = gl.constexpr(False)
    LONGEST_FIRST: gl.constexpr = gl.constexpr(False)
    LENGTHS: gl.constexpr = gl.constexpr(False)
    TILE_AFTER: gl.constexpr = gl.constexpr(False)
    CAP: gl.constexpr = gl.constexpr(None)
    HANDED: gl.constexpr = gl.constexpr(False)
    FROM_FIRST: gl.constexpr = gl.constexpr(False)
    EVEN: gl.constexpr = gl.constexpr(False)
    BRIEF: gl.constexpr = gl.constexpr(False)


class OfV(NamedTuple):
    """Of a Shape, what the functions of fmha_sm90.py ask of that of V."""

    BLOCK_D: gl.constexpr
    BLOCK_N: gl.constexpr
    CONSUMERS: gl.constexpr
    V_STAGES: gl.constexpr
    GENERAL: gl.constexpr
    TWO_PARTS: gl.constexpr


@gluon.constexpr_function
def order_of(shape):
    """How tiles are dealt out: tiles of 192 queries that are all as long as each other one by one, since a pair more is
    a larger part of a program's time the fewer of them it has."""
    if shape.EVEN:
        return EVENLY.value
    if shape.LONGEST_FIRST:
        return LONGEST_FIRST.value
    alike = not (shape.CAUSAL or shape.GENERAL) and shape.BOUNDS is None
    return SINGLES.value if alike and shape.CONSUMERS == 3 else PAIRS_OF_A_HEAD.value


@gluon.jit
def place_of(unit, sizes, by_head):
    """Batch and head of a unit of batch * heads: with by_head the batches of one head come one after the other, which
    then read its bias from the L2 cache together."""
    num_heads, group, q_len, kv_len, row_tiles, heads, section, bounds = sizes
    batches = heads // num_heads
    batch = gl.where(by_head, unit % batches, unit // num_heads)
    head = gl.where(by_head, unit // batches, unit % num_heads)
    return batch, head


@gluon.jit
def _on_list(batch, head, first_row, q_n, q_len, kv_len, lists, SHAPE: gl.constexpr):
    """Of a tile with a list: how many blocks are on it, at least one; and of `keys_of_tile` what is whole, with what
    `key_of` asks."""
    TILE: gl.constexpr = ROWS * SHAPE.CONSUMERS
    PIECES: gl.constexpr = SHAPE.LIST // SHAPE.BLOCK_N
    Blocks, list_batches, list_heads = lists
    capacity = (kv_len + (SHAPE.LIST - 1)) // SHAPE.LIST
    owner = gl.minimum(batch, list_batches - 1) * list_heads + gl.minimum(head, list_heads - 1)
    place = owner.to(gl.int64) * ((q_len + (SHAPE.LIST - 1)) // SHAPE.LIST) + first_row // SHAPE.LIST
    entries = Blocks + place * (capacity + 2)
    partly = gl.load(entries)
    wholly = gl.load(entries + 1)
    count = gl.where(first_row < q_n, partly + wholly, 0)
    clear = gl.where(first_row + TILE <= q_n, wholly * PIECES, 0)
    return gl.maximum(count * PIECES, 1), (0, clear, entries + 2, count, wholly, capacity)


@gluon.jit
def sequence_at(batch, head, sizes, SHAPE: gl.constexpr):
    """The sequence of a batch and head, and the position of its first query."""
    num_heads, group, q_len, kv_len, row_tiles, heads, section, bounds = sizes
    sequence = sequence_of(sizes, batch * num_heads + head, SHAPE)
    q_n, kv_n, oldest, newest = sequence
    return sequence, (bounds[0] != 0).to(gl.int32) * (kv_n - q_n)


@gluon.jit
def keys_of_tile(row_tile, batch, head, sizes, inputs, SHAPE: gl.constexpr):
    """The blocks of keys that a tile loads, their first and the one past the last, at least one; those of which its
    rows see every key, likewise, of which there may be none; the sequence, and the position of its first query.

    With lists, blocks are numbered by their places on the tile's, those of whole entries first; `key_of` tells the key.
    """
    TILE: gl.constexpr = ROWS * SHAPE.CONSUMERS
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    BOUNDS: gl.constexpr = SHAPE.BOUNDS
    SEEN: gl.constexpr = SHAPE.SEEN
    num_heads, group, q_len, kv_len, row_tiles, heads, section, bounds = sizes
    sequence, position = sequence_at(batch, head, sizes, SHAPE)
    q_n, kv_n, oldest, newest = sequence
    first_row = row_tile * TILE
    if SHAPE.LIST > 0:
        first_block = first_row * 0
        end_block, whole = _on_list(batch, head, first_row, q_n, q_len, kv_len, inputs[1], SHAPE)
    else:
        begin = 0
        end = kv_n
        whole_begin = 0
        whole_end = kv_n
        if SHAPE.CAUSAL:
            end = gl.minimum(kv_n, gl.minimum(first_row + TILE, q_n) + newest)
            whole_end = gl.minimum(first_row + newest + 1, kv_n)
        if SHAPE.GENERAL:
            begin = gl.maximum(first_row + oldest, 0)
            whole_begin = gl.maximum(first_row + (TILE - 1) + oldest, 0)
        if BOUNDS is not None:
            first_query = gl.maximum(gl.minimum(first_row, q_n - 1) + position, 0)
            last_query = gl.maximum(gl.minimum(first_row + TILE, q_n) - 1 + position, 0)
            shown = BOUNDS(batch, head, first_query, last_query, kv_n, *inputs)
            begin = gl.maximum(begin, gl.to_tensor(shown[0]).to(gl.int32))
            end = gl.minimum(end, gl.to_tensor(shown[1]).to(gl.int32))
            if len(shown) == 4:
                whole_begin = gl.maximum(whole_begin, gl.to_tensor(shown[2]).to(gl.int32))
                whole_end = gl.minimum(whole_end, gl.to_tensor(shown[3]).to(gl.int32))
            else:
                whole_end = 0
        elif SEEN is not None:
            whole_end = 0
        end = gl.where(first_row < q_n, end, 0)
        whole_end = gl.maximum(whole_end, 0)
        if SHAPE.GENERAL:  # rows that are padding see nothing
            whole_end = gl.where(first_row + TILE <= q_n, whole_end, 0)
        end_block = gl.maximum((end + (BLOCK_N - 1)) // BLOCK_N, 1)
        first_block = gl.minimum(begin // BLOCK_N, end_block - 1)
        whole = (whole_begin + (BLOCK_N - 1)) // BLOCK_N, whole_end // BLOCK_N
    return first_block, end_block, whole, sequence, position


@gluon.jit
def key_of(block, whole, SHAPE: gl.constexpr):
    """The first key of a block, by what `keys_of_tile` says of the tile's lists."""
    PIECES: gl.constexpr = SHAPE.LIST // SHAPE.BLOCK_N
    from_block, to_block, numbers, count, wholly, capacity = whole
    entry = block // PIECES
    at = gl.where(entry < wholly, capacity - 1 - entry, entry - wholly)
    number = gl.load(numbers + at, mask=count > 0, other=0)  # of a tile that sees nothing, any block
    return number * SHAPE.LIST + block % PIECES * SHAPE.BLOCK_N


@gluon.jit
def _hidden(scores, seen):
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def shown(scores, mask):
    """Scores, and minus infinity where a byte of the mask is 0: tested where the two of a pair are loaded, since to
    take them apart first costs an instruction more for each."""
    asm: gl.constexpr = """
    {
        .reg .pred p;
        .reg .b32 both, one;
        cvt.u32.u16 both, $2;
        and.b32 one, both, 0x00FF;
        setp.ne.u32 p, one, 0;
        selp.f32 $0, $3, 0fFF800000, p;
        and.b32 one, both, 0xFF00;
        setp.ne.u32 p, one, 0;
        selp.f32 $1, $4, 0fFF800000, p;
    }"""
    return gl.inline_asm_elementwise(asm, "=&f,=f,h,f,f", [mask, scores], dtype=gl.float32, is_pure=True, pack=2)


@gluon.jit
def by_functions(scores, place, queries, keys, inputs, masked, SCORED: gl.constexpr, SHAPE: gl.constexpr):
    """Scores by SCORE, and minus infinity where SEEN says so; without masked, it is known to see all.

    Args:
        place: batch and head.
        queries, keys: [rows, 1] and [1, keys], positions within the sequence.
        SCORED: whether SCORE is asked.
    """
    SCORE: gl.constexpr = SHAPE.SCORE
    SEEN: gl.constexpr = SHAPE.SEEN
    batch, head = place
    if SHAPE.LIST > 0:
        inputs = inputs[0]
    if SCORED and SCORE is not None:
        scores = SCORE(scores, batch, head, queries, keys, *inputs).to(gl.float32)
    if SEEN is not None:
        if masked:
            scores = _hidden(scores, SEEN(batch, head, queries, keys, *inputs))
    return scores


@gluon.constexpr_function
def is_asked(shape):
    """Whether SCORE is asked for each score."""
    return shape.SCORE is not None and not shape.RELATIVE and shape.CAP is None


@gluon.constexpr_function
def _is_seen_alone(shape):
    """Whether most blocks that SEEN is asked for need no other mask, and none of their keys is past the last one."""
    return shape.SEEN is not None and not (shape.GENERAL or is_asked(shape)) and shape.CAP is None


@gluon.constexpr_function
def is_natural(shape):
    """Whether scores are in natural units, rather than products."""
    return shape.BIAS == "tile" or is_asked(shape)


@gluon.jit
def bounded(products, m, limit, shift: gl.constexpr, SHAPE: gl.constexpr):
    """Products, those of bf16 that may have overflowed as low as their limit. m: of the blocks before."""
    if shift > 0 and SHAPE.CAP is None:
        products = limited(products, None if is_natural(SHAPE) or has_terms(SHAPE) else m, limit)
    return products


@gluon.jit
def _keys_from(key, columns, BLOCK_N: gl.constexpr):
    """`columns` from `key` on, by one sum for each, of what is a thread's own and a constant."""
    blocks = columns.reshape([BLOCK_N // 8, 8])
    LAYOUT: gl.constexpr = blocks.type.layout
    near = gl.arange(0, 8, layout=gl.SliceLayout(0, LAYOUT)) + key
    far = 8 * gl.arange(0, BLOCK_N // 8, layout=gl.SliceLayout(1, LAYOUT))
    keys = (near[None, :] + far[:, None]).reshape([BLOCK_N])
    return gl.convert_layout(keys, columns.type.layout, assert_trivial=True)


@gluon.jit
def counted(products, tile, term, factors, place, first_query, last_key, inputs, begins, ends, reach, key, masked,
            shift: gl.constexpr, S_LAYOUT: gl.constexpr, SHAPE: gl.constexpr):  # fmt: skip
    """Scores of one block of keys that count, from `key` on; minus infinity where a key is not seen.

    Args:
        products: of Q and K, `bounded`.
        tile: of a bias or mask, [rows, keys]; of no account where none comes by TMA.
        term: what is added to products, [rows, keys]; None where they began with it, or there is none.
        factors: what makes a product a score, a score one in units of log2, the limit of products, and the first one's
            inverse.
        place: batch and head.
        first_query: positions of the queries, [rows].
        last_key: of the sequence, at least 0.
        begins, ends: the keys that rows see if masked.
        reach: the least of the ends.
    """
    SEEN: gl.constexpr = SHAPE.SEEN
    ASKED: gl.constexpr = is_asked(SHAPE)
    columns = gl.arange(0, SHAPE.BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
    sm_scale, to_log2, limit, undo = factors[:4]
    scores = products
    if is_natural(SHAPE):
        scores = scores * sm_scale
    if SHAPE.BIAS == "tile":
        scores += tile.to(gl.float32)
    if term is not None:
        scores += term
    if _is_seen_alone(SHAPE):
        if masked:
            keys = _keys_from(key, columns, SHAPE.BLOCK_N)
            if key + SHAPE.BLOCK_N <= reach:
                scores = by_functions(scores, place, first_query[:, None], keys[None, :], inputs, True, False, SHAPE)
            else:
                keys = gl.minimum(keys, last_key)
                scores = by_functions(scores, place, first_query[:, None], keys[None, :], inputs, True, False, SHAPE)
                scores = _hidden(scores, columns[None, :] < (ends - key)[:, None])
    elif SEEN is not None or ASKED:
        keys = columns + key
        if masked:  # of other blocks all keys are there
            keys = gl.minimum(keys, last_key)
        scores = by_functions(scores, place, first_query[:, None], keys[None, :], inputs, masked, ASKED, SHAPE)
    if SHAPE.MASK == "tile":
        scores = shown(scores, tile)
    if SHAPE.CAP is None and not _is_seen_alone(SHAPE):  # with a soft cap `maxima` does
        if masked:
            seen = columns[None, :] < (ends - key)[:, None]
            if SHAPE.GENERAL:
                seen = seen & (columns[None, :] >= (begins - key)[:, None])
            scores = _hidden(scores, seen)
    return scores


@gluon.constexpr_function
def may_be_least(shape, shift):
    """Whether finite scores may be so low that they were infinite in units of log2: a function's, a bias of bf16."""
    return is_natural(shape) and (shape.SCORE is not None or shift > 0)


@gluon.jit
def maxima(scores, m, factors, begins, ends, key, masked, shift: gl.constexpr, S_LAYOUT: gl.constexpr,
           SHAPE: gl.constexpr):  # fmt: skip
    """Scores, the running maximum with them, in units of log2, plus shift, and the factor of what was summed up. Scores
    are as they were, but of products with a soft cap what plain attention makes of them."""
    if SHAPE.CAP is not None:
        scores, m_new, alpha, _to_log2 = maxima_of_capped(
            scores, m, factors[4], shift, begins, ends, key, masked, S_LAYOUT, SHAPE.BLOCK_N, SHAPE.GENERAL,
            polynomials_of(True, SHAPE.CONSUMERS), SHAPE.THREES,
        )  # fmt: skip
    else:
        top = largest(scores, m, shift) if SHAPE.THREES else gl.max(scores, 1)
        if may_be_least(SHAPE, shift):
            top = gl.where((top < LEAST) & (top != float("-inf")), LEAST, top)
        m_new = gl.maximum(m, top * factors[1] + shift)
        alpha = gl.exp2(m - m_new)
    return scores, m_new, alpha


@gluon.jit
def weigh(scores, m, row_sum, factors, begins, ends, key, masked, shift: gl.constexpr, S_LAYOUT: gl.constexpr,
          SHAPE: gl.constexpr):  # fmt: skip
    """Weights of one block of keys, and the running maximum and sums with it."""
    scores, m_new, alpha = maxima(scores, m, factors, begins, ends, key, masked, shift, S_LAYOUT, SHAPE)
    weights = gl.exp2(scores * factors[1] - m_new[:, None])
    parts = partial_sums(weights, SHAPE.BLOCK_N)
    factor = gl.convert_layout(alpha, gl.SliceLayout(1, parts.type.layout), assert_trivial=True)
    return weights, m_new, row_sum * factor[:, None] + parts, alpha
