"""Terms: what is added to scores and is the same for all queries of a block, or for all elements of a diagonal.

These are a bias or mask of one row for all queries, and score functions that add what depends on a head and on
key - query alone. Of a block of queries and keys there are BLOCK_N or 64 + BLOCK_N - 1 of them, where it has
64 * BLOCK_N elements: threads get them once a step and share them. They are divided by the scale of the products, which
then begin with them rather than with zero: to add them takes no instruction, and they are loaded beside the
exponentials of the step before. bf16 products may overflow, which is not to pass for keys that are not seen: there
terms are added later.

In shared memory a term of a diagonal lies beside the next one as a pair, and once more at the end of the pair before,
so that those of two keys side by side are one load wherever they begin.

With IN_PRODUCT (fp16), terms of keys are one more product of 16 elements: queries have the parts of 1 / scale there,
keys their term for each. The producer writes them beside a block of K; consumers load nothing. A factor of three parts
has 33 bits, or as many as 2**-24 leaves.
"""

from sm90_slow import shift_of
from sm90_tiles import ROWS
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

WIDTH: gl.constexpr = gl.constexpr(16)  # what wgmma multiplies at a time
# A key a thread, of a producer of four warps.
OF_KEY: gl.constexpr = gl.constexpr(gl.BlockedLayout([1, 16], [32, 1], [4, 1], [1, 0]))
ONE_A_THREAD: gl.constexpr = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.constexpr_function
def of_keys(shape):
    """Whether a bias or mask is the same for all queries."""
    return shape.BIAS == "keys" or shape.MASK == "keys"


@gluon.constexpr_function
def has_terms(shape):
    return shape.RELATIVE or (of_keys(shape) and not shape.IN_PRODUCT)


@gluon.constexpr_function
def begins_with_terms(dtype, shape):
    """Whether products begin with the terms; else these are added to them."""
    return has_terms(shape) and shift_of(dtype) == 0


@gluon.constexpr_function
def words_of(shape):
    """Floats of shared memory for the terms of a block: of diagonals two for each place, a power of two of them; of
    keys two sets, for the two rows that a thread has, since to copy what was loaded takes an instruction for each."""
    return shape.BLOCK_N * (4 if shape.RELATIVE else 2)


@gluon.constexpr_function
def _twice(inputs, apart):
    """Store each value at two places, so many bytes apart."""
    (base,), addresses, values = inputs
    text = "{ .reg .b32 place; "
    for address, value in zip(addresses, values, strict=True):
        text += f"add.s32 place, {base}, {address}; "
        text += f"st.shared.f32 [place], {value}; st.shared.f32 [place+{apart}], {value}; "
    return text + "}"


@gluon.constexpr_function
def _store_pairs_asm(outputs, inputs):
    return _twice(inputs, 4)


@gluon.constexpr_function
def _store_64_asm(outputs, inputs):
    return _twice(inputs, 4 * 64)


@gluon.constexpr_function
def _store_128_asm(outputs, inputs):
    return _twice(inputs, 4 * 128)


@gluon.constexpr_function
def _loads(inputs, outputs, step):
    """A thread holds pairs of columns 8 apart of two rows in turns; it is given its first pair of each."""
    (base,), addresses = inputs
    (found,) = outputs
    text = f"{{ .reg .b32 near, far; add.s32 near, {base}, {addresses[0]}; add.s32 far, {base}, {addresses[2]}; "
    for i in range(0, len(found), 2):
        row = "far" if i % 4 else "near"
        text += f"ld.shared.v2.f32 {{{found[i]}, {found[i + 1]}}}, [{row}+{i // 4 * step}]; "
    return text + "}"


@gluon.constexpr_function
def _load_asm(outputs, inputs):
    return _loads(inputs, outputs, 32)


@gluon.constexpr_function
def _load_pairs_asm(outputs, inputs):
    return _loads(inputs, outputs, 64)


@gluon.jit
def split_factor(undo, layout: gl.constexpr):
    """The factor of terms of keys in a product, [64, 16]: three parts of 11 bits, which 16 bits hold each."""
    columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))[None, :]
    first = undo.to(gl.float16).to(gl.float32)
    second = (undo - first).to(gl.float16).to(gl.float32)
    part = gl.where(columns == 0, first, gl.where(columns == 1, second, undo - first - second))
    part = gl.where(columns < 3, part, 0.0)
    return (part + gl.zeros([ROWS, WIDTH], gl.float32, layout=layout)).to(gl.float16)


@gluon.jit
def split_keys(vector, layout: gl.constexpr, SHAPE: gl.constexpr):
    """What `split_factor` is multiplied with, [keys, 16], of what `load_keys` gave: a bias once for each part of the
    factor, but infinity once, since another part may be 0 or below; of a mask 0 or minus infinity."""
    columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))[None, :]
    if SHAPE.BIAS == "keys":
        value = vector.to(gl.float32)
    else:
        value = _of_mask(vector)
    finite = gl.where(gl.abs(value) < float("inf"), value, 0.0)
    value = gl.convert_layout(value, gl.SliceLayout(1, layout))[:, None]
    finite = gl.convert_layout(finite, gl.SliceLayout(1, layout))[:, None]
    nothing = gl.zeros([SHAPE.BLOCK_N, WIDTH], gl.float32, layout=layout)
    return gl.where(columns == 0, value, gl.where(columns < 3, finite, nothing)).to(gl.float16)


@gluon.jit
def terms_of(terms, step, CONSUMER: gl.constexpr, SHAPE: gl.constexpr):
    """The shared memory of a step's terms: it is stored to while that of the step before may still be loaded from."""
    return terms.index(step % 2 * SHAPE.CONSUMERS + CONSUMER)


@gluon.jit
def in_products(term, factors):
    """A term in units of products; one that is finite stays so, and NaN NaN."""
    sm_scale, to_log2, limit, undo = factors
    product = term * undo
    return gl.where((product < limit) & (term != float("-inf")), limit, product)


@gluon.jit
def load_keys(vectors, place, key, kv_n, SHAPE: gl.constexpr):
    """Of a bias or mask that is the same for all queries, a block of keys from `key` on, one a thread."""
    base, stride_b, stride_h, columns = vectors
    batch, head = place
    keys = gl.arange(0, SHAPE.BLOCK_N, layout=ONE_A_THREAD) + key
    places = base + batch.to(gl.int64) * stride_b + head.to(gl.int64) * stride_h + keys
    return gl.load(places, mask=(keys >= 0) & (keys < gl.minimum(kv_n, columns)), other=0)


@gluon.jit
def _of_mask(vector):
    return gl.where(vector != 0, 0.0, float("-inf"))


@gluon.jit
def share_keys(shared, vector, factors, SHAPE: gl.constexpr):
    """Store the terms of what `load_keys` gave: of a mask 0 or minus infinity. All threads of the consumer have to meet
    before they are loaded."""
    if SHAPE.BIAS == "keys":
        term = in_products(vector.to(gl.float32), factors)
    else:
        term = _of_mask(vector)
    places = 4 * gl.arange(0, SHAPE.BLOCK_N, layout=ONE_A_THREAD)
    if SHAPE.BLOCK_N == 64:
        gl.inline_asm(_store_64_asm, ("r", "r", "f"), [shared, places, term])
    else:
        gl.inline_asm(_store_128_asm, ("r", "r", "f"), [shared, places, term])


@gluon.jit
def share_diagonals(shared, factors, place, key, newest, last_key, inputs, SHAPE: gl.constexpr):
    """Store what SCORE adds for a block of keys, from `key` on, and 64 queries up to `newest`: pair i begins at the
    distance of key `key` from that query, plus i. All threads of the consumer have to meet before they are loaded.

    Args:
        shared: that of the step.
        factors: as `counted` takes them.
        place: batch and head.
        newest, last_key: positions, at least 0.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, 4], [1, 0])
    PLACES: gl.constexpr = 2 * SHAPE.BLOCK_N
    SCORE: gl.constexpr = SHAPE.SCORE
    batch, head = place
    # The last place has no pair to begin. What no element needs, past the diagonals, is of some pair of positions.
    i = gl.minimum(gl.arange(0, PLACES, layout=gl.SliceLayout(0, LAYOUT)), PLACES - 2)[None, :]
    distance = gl.maximum(gl.minimum(i + (key - newest), last_key), -newest)
    nothing = gl.zeros([1, PLACES], gl.float32, layout=LAYOUT)
    term = SCORE(nothing, batch, head, gl.maximum(-distance, 0), gl.maximum(distance, 0), *inputs).to(gl.float32)
    gl.inline_asm(_store_pairs_asm, ("r", "r", "f"), [shared, 8 * i + 4, in_products(term, factors)])


@gluon.jit
def load_terms(shared, lag, S_LAYOUT: gl.constexpr, SHAPE: gl.constexpr):
    """What is added to each element, [rows, keys]; lag: of each row behind the newest, 0 to 63."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    columns = gl.arange(0, 8, layout=gl.SliceLayout(0, LAYOUT))
    lag = gl.convert_layout(lag, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    found: gl.constexpr = gl.distributed_type(gl.float32, [ROWS, SHAPE.BLOCK_N], S_LAYOUT)
    if SHAPE.RELATIVE:
        places = 8 * (lag[:, None] + columns[None, :] + 1)
        terms = gl.inline_asm(_load_pairs_asm, ("=&f", "r", "r"), [shared, places], found)
    else:
        rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
        places = 4 * (rows // 8 % 2 * SHAPE.BLOCK_N)[:, None] + 4 * columns[None, :]
        terms = gl.inline_asm(_load_asm, ("=&f", "r", "r"), [shared, places], found)
    return terms
