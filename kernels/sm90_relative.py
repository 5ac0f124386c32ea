"""Score functions on Hopper that add what depends on a head and on key - query alone.

Of a block of queries and keys there are as many such numbers as it has diagonals, 64 + BLOCK_N - 1, where it has
64 * BLOCK_N elements: threads compute them once a step and share them. In shared memory each lies beside the next one
as a pair, and once more at the end of the pair before, so that two keys side by side are one load wherever they begin.
They are divided by the scale of the products, which then begin with them rather than with zero: to add them takes no
instruction. bf16 products may overflow, which is not to pass for keys that are not seen: there they are added later.
"""

from sm90_slow import shift_of
from sm90_tiles import ROWS
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def words_of(block_n):
    """Floats of shared memory for the terms of a block: two for each place."""
    return 4 * block_n


@gluon.constexpr_function
def begins_with_terms(dtype, relative):
    """Whether products begin with the terms; else these are added to them."""
    return relative and shift_of(dtype) == 0


@gluon.constexpr_function
def _store_asm(outputs, inputs):
    (base,), addresses, values = inputs
    text = "{ .reg .b32 place; "
    for address, value in zip(addresses, values, strict=True):
        text += f"add.s32 place, {base}, {address}; st.shared.f32 [place], {value}; st.shared.f32 [place+4], {value}; "
    return text + "}"


@gluon.constexpr_function
def _load_asm(outputs, inputs):
    """A thread holds pairs of columns 8 apart of two rows in turns; it is given its first pair of each."""
    (base,), addresses = inputs
    (found,) = outputs
    text = f"{{ .reg .b32 near, far; add.s32 near, {base}, {addresses[0]}; add.s32 far, {base}, {addresses[2]}; "
    for i in range(0, len(found), 2):
        row = "far" if i % 4 else "near"
        text += f"ld.shared.v2.f32 {{{found[i]}, {found[i + 1]}}}, [{row}+{i // 4 * 64}]; "
    return text + "}"


@gluon.jit
def terms_of(terms, step, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """The shared memory of a step's terms."""
    return terms.index(step % 2 * CONSUMERS + CONSUMER)


@gluon.jit
def share_terms(shared, factors, place, key, newest, last_key, inputs, SHAPE: gl.constexpr):
    """Store what SCORE adds for a block of keys, from `key` on, and 64 queries up to `newest`, in units of products:
    pair i begins at the distance of key `key` from that query, plus i. All threads of the consumer have to meet before
    it is loaded.

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
    sm_scale, to_log2, limit, undo = factors
    # The last place has no pair to begin. What no element needs, past the diagonals, is of some pair of positions.
    i = gl.minimum(gl.arange(0, PLACES, layout=gl.SliceLayout(0, LAYOUT)), PLACES - 2)[None, :]
    distance = gl.maximum(gl.minimum(i + (key - newest), last_key), -newest)
    nothing = gl.zeros([1, PLACES], gl.float32, layout=LAYOUT)
    term = SCORE(nothing, batch, head, gl.maximum(-distance, 0), gl.maximum(distance, 0), *inputs).to(gl.float32)
    product = term * undo
    product = gl.where((product < limit) & (term != float("-inf")), limit, product)  # NaN stays
    gl.inline_asm(_store_asm, ("r", "r", "f"), [shared, 8 * i + 4, product])


@gluon.jit
def load_terms(shared, lag, S_LAYOUT: gl.constexpr, SHAPE: gl.constexpr):
    """What is added to each element, [rows, keys]; lag: of each row behind the newest, 0 to 63."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    columns = gl.arange(0, 8, layout=gl.SliceLayout(0, LAYOUT))
    lag = gl.convert_layout(lag, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    addresses = 8 * (lag[:, None] + columns[None, :] + 1)
    found: gl.constexpr = gl.distributed_type(gl.float32, [ROWS, SHAPE.BLOCK_N], S_LAYOUT)
    return gl.inline_asm(_load_asm, ("=&f", "r", "r"), [shared, addresses], found)
