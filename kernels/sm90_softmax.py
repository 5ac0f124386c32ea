"""The softmax of fmha_sm90.py: scores of one block of keys become weights."""

from sm90_asm import after
from sm90_lazy import kept
from sm90_maxima import largest, largest_of_rows, of_each_row
from sm90_powers import tanh_of
from sm90_products import tanh_and_largest
from sm90_tiles import ROWS
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def partial_sums(weights, BLOCK_N: gl.constexpr):
    """Sums over the columns that a thread holds: [rows, 4], one for each thread of the four that share a row."""
    parts = weights.reshape([ROWS, BLOCK_N // 8, 4, 2])
    return gl.sum(gl.sum(parts, 3), 1)


@gluon.constexpr_function
def _pack_asm(dtype):
    kind = "f16x2" if dtype == gl.float16 else "bf16x2"
    return f"cvt.rn.{kind}.f32 $0, $2, $1;"


@gluon.jit
def pack(weights, dtype: gl.constexpr):
    """Weights in 16 bits, two in an integer each, [rows, BLOCK_N / 2]. As such they go from one round of a loop to the
    next without being taken apart and put together again, as tensors of 16 bits are."""
    even, odd = gl.split(weights.reshape([ROWS, weights.shape[1] // 2, 2]))
    asm: gl.constexpr = _pack_asm(dtype)
    return gl.inline_asm_elementwise(asm, "=r,r,r", [even, odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.constexpr_function
def _twice(dtype):
    return dtype, dtype


@gluon.jit
def unpack(packed, dtype: gl.constexpr):
    """What was packed, [rows, BLOCK_N]."""
    types: gl.constexpr = _twice(dtype)
    even, odd = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed], dtype=types, is_pure=True, pack=1
    )
    return gl.join(even, odd).reshape([ROWS, packed.shape[1] * 2])


@gluon.jit
def maxima(
    scores, m, scale, shift: gl.constexpr, begins, ends, key, masked, S_LAYOUT: gl.constexpr,
    BLOCK_N: gl.constexpr, GENERAL: gl.constexpr, CAPPED: gl.constexpr, THREES: gl.constexpr,
):  # fmt: skip
    """The first half of :func:`weigh`: scores capped and masked, the running maximum with them (in units of log2, plus
    shift), the factor of what was summed up before, and that which brings scores to units of log2. CAPPED: how many
    polynomials tanh has, see `polynomials_of`. THREES: see sm90_maxima.py, and of soft caps sm90_products.py."""
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    most = m
    if CAPPED and THREES:  # NaN of bf16 products that overflowed, with either
        to_log2 = scale[0]
        scores, peaks = tanh_and_largest(scores, scale, m, BLOCK_N // 2, CAPPED, shift)
        most = largest_of_rows(peaks, ROW_LAYOUT)
    elif CAPPED:
        to_log2 = scale[0]
        scores = tanh_of(scores, scale, m, BLOCK_N // 2, CAPPED)
    else:
        to_log2 = scale
    if masked:
        columns = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
        visible = columns[None, :] < (ends - key)[:, None]
        if GENERAL:
            visible = visible & (columns[None, :] >= (begins - key)[:, None])
        scores = gl.where(visible, scores, float("-inf"))
        if CAPPED and THREES:
            most = gl.max(scores, 1)
    if not (CAPPED and THREES):
        most = largest(scores, m, shift) if THREES else gl.max(scores, 1)
    m_new = gl.maximum(m, most * to_log2 + shift)
    return scores, m_new, gl.exp2(m - m_new), to_log2


@gluon.jit
def added(row_sum, alpha, parts):
    """Sums before, times the factors of their rows, and those of a block."""
    factor = gl.convert_layout(alpha, gl.SliceLayout(1, parts.type.layout), assert_trivial=True)
    return row_sum * factor[:, None] + parts


@gluon.jit
def weigh(
    scores, m, row_sum, scale, shift: gl.constexpr, begins, ends, key, masked, S_LAYOUT: gl.constexpr,
    BLOCK_N: gl.constexpr, GENERAL: gl.constexpr, CAPPED: gl.constexpr, THREES: gl.constexpr,
):  # fmt: skip
    """Weights of one block of keys, and the running maximum and sums with it.

    Where masked, a row sees only the keys below its end and, if GENERAL, from its begin on. `scale` is what
    `score_factors` gives.
    """
    scores, m_new, alpha, to_log2 = maxima(
        scores, m, scale, shift, begins, ends, key, masked, S_LAYOUT, BLOCK_N, GENERAL, CAPPED, THREES
    )
    weights = gl.exp2(scores * to_log2 - m_new[:, None])
    return weights, m_new, added(row_sum, alpha, partial_sums(weights, BLOCK_N)), alpha


@gluon.jit
def weigh_lazily(
    scores, m, row_sum, scale, shift: gl.constexpr, begins, ends, key, masked, S_LAYOUT: gl.constexpr,
    BLOCK_N: gl.constexpr, GENERAL: gl.constexpr, CAPPED: gl.constexpr, THREES: gl.constexpr,
):  # fmt: skip
    """As `weigh`, with references of rows that may lag behind, see sm90_lazy.py; and where sums are to be rescaled."""
    scores, m_new, alpha, to_log2 = maxima(
        scores, m, scale, shift, begins, ends, key, masked, S_LAYOUT, BLOCK_N, GENERAL, CAPPED, THREES
    )
    m_new, due = kept(m, m_new)
    alpha = gl.exp2(m - m_new)
    weights = gl.exp2(scores * to_log2 - m_new[:, None])
    return weights, m_new, added(row_sum, alpha, partial_sums(weights, BLOCK_N)), alpha, due


@gluon.jit
def weigh_after(
    product, scores, m, row_sum, alpha, to_log2, zero, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr
):  # fmt: skip
    """The second half of :func:`weigh`, which ptxas does not begin before a product that was waited for is complete.

    Args:
        product: [rows, BLOCK_D], whose tensor core operation also reads the weights of the block before: those of this
            one can then have their registers.
        scores, m, alpha, to_log2: what :func:`maxima` gives.
        row_sum: the sums before.
        zero: 0, which the compiler does not know.
    """
    parts = scores.reshape([ROWS, BLOCK_N // 8, 4, 2])
    BY_THREAD: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, parts.type.layout))
    element = gl.convert_layout(of_each_row(product, BLOCK_D), BY_THREAD, assert_trivial=True)
    m = gl.convert_layout(m, gl.SliceLayout(1, BY_THREAD), assert_trivial=True)
    m = after(m[:, None].broadcast_to([ROWS, 4]), element, zero)
    weights = gl.exp2(parts * to_log2 - m[:, None, :][:, :, :, None])
    sums = gl.sum(gl.sum(weights, 3), 1)
    row_sum = added(gl.convert_layout(row_sum, sums.type.layout, assert_trivial=True), alpha, sums)
    return gl.convert_layout(weights.reshape([ROWS, BLOCK_N]), scores.type.layout, assert_trivial=True), row_sum


@gluon.jit
def weigh_half(
    scores, m, row_sum, scale, shift: gl.constexpr, ends, key, S_LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr,
    CAPPED: gl.constexpr, THREES: gl.constexpr,
):  # fmt: skip
    """As `weigh` of a masked block of which no row sees the second half, whose weights take no arithmetic."""
    HALF: gl.constexpr = BLOCK_N // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    near, far = gl.split(scores.reshape([ROWS, 2, HALF]).permute((0, 2, 1)))
    near = gl.convert_layout(near, LAYOUT, assert_trivial=True)
    zeros = gl.zeros([ROWS, HALF], gl.float32, layout=LAYOUT)
    before = partial_sums(zeros, HALF)
    m = gl.convert_layout(m, ROW_LAYOUT, assert_trivial=True)
    ends = gl.convert_layout(ends, ROW_LAYOUT, assert_trivial=True)
    before = gl.convert_layout(row_sum, before.type.layout, assert_trivial=True)
    near, m, sums, alpha = weigh(near, m, before, scale, shift, 0, ends, key, True, LAYOUT, HALF, False, CAPPED, THREES)
    weights = gl.join(near, zeros).permute((0, 2, 1)).reshape([ROWS, BLOCK_N])
    weights = gl.convert_layout(weights, S_LAYOUT, assert_trivial=True)
    m = gl.convert_layout(m, gl.SliceLayout(1, S_LAYOUT), assert_trivial=True)
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, S_LAYOUT), assert_trivial=True)
    return weights, m, gl.convert_layout(sums, row_sum.type.layout, assert_trivial=True), alpha
