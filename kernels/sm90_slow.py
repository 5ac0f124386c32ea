"""Rows computed again in arithmetic that stays finite for any finite input; and what such arithmetic shares."""

from sm90_asm import reciprocal
from sm90_sinks import LN_2, LOG2_E, finished, load_sink
from sm90_tiles import sequence_of
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

FLOAT_MAX: gl.constexpr = gl.constexpr(3.4028234663852886e38)
# Below every dot product of the slow arithmetic, yet near enough that the difference is finite: -2**126.
LOWEST: gl.constexpr = gl.constexpr(-8.507059173023462e37)
SLOW_ROWS: gl.constexpr = gl.constexpr(16)  # computed at a time where it is slow: so few that nothing spills


@gluon.constexpr_function
def shift_of(dtype):
    """bf16 values may be as large as float32's: weights of at most 2**-24 keep sums of them finite, at no cost."""
    return 24.0 if dtype == gl.bfloat16 else 0.0


@gluon.jit
def row_powers(q):
    """Powers of two for rows in float32: one that brings the largest normal element to 1 to 4, and its inverse."""
    largest = gl.max(gl.abs(q), 1)
    exponent = gl.minimum(gl.maximum(largest.to(gl.int32, bitcast=True) >> 23, 1), 253)
    return ((254 - exponent) << 23).to(gl.float32, bitcast=True), (exponent << 23).to(gl.float32, bitcast=True)


@gluon.jit
def narrow(out, dtype: gl.constexpr):
    """Rounded to fp16 or bf16, but at most its largest finite value: the mean of V never exceeds what it is made of,
    but the rounded one may, by enough to become infinite. NaN stays NaN."""
    if dtype == gl.float16:
        asm: gl.constexpr = "cvt.rn.satfinite.f16x2.f32 $0, $2, $1;"
        return gl.inline_asm_elementwise(asm, "=r,r,r", [out], dtype=gl.float16, is_pure=True, pack=2)
    else:
        asm: gl.constexpr = "cvt.rn.satfinite.bf16x2.f32 $0, $2, $1;"
        return gl.inline_asm_elementwise(asm, "=r,r,r", [out], dtype=gl.bfloat16, is_pure=True, pack=2)


@gluon.jit
def score_factors(factors, CAPPED: gl.constexpr):
    """The factor of q . k that makes it the score in units of log2; with a soft cap the factor of tanh that does, and
    what `bent` takes for tanh's."""
    if CAPPED:
        sm_scale, softcap = factors
        bend = gl.minimum(sm_scale / softcap * (2 * LOG2_E), FLOAT_MAX)  # in this order: twice the scale may overflow
        return gl.minimum(softcap * LOG2_E, FLOAT_MAX), bend
    else:
        return gl.minimum(factors * LOG2_E, FLOAT_MAX)


@gluon.jit
def bent(x, bend):
    """tanh(x * bend / (2 log2(e))), off by some 2**-22: of a score the cap's share of that, which 16 bits do not see as
    long as the cap is moderate."""
    return 1.0 - 2.0 * reciprocal(gl.exp2(x * bend) + 1.0)


@gluon.jit
def compute_slowly(
    tensors,
    strides,
    sizes,
    place,
    head,
    first_row,
    head_size,
    factors,
    sinks,
    v_head_size,
    SHAPE: gl.constexpr,
):
    """A few rows of one head, key by key, finite for any finite input; writes Out and Lse itself.

    As fmha_triton.py does it: powers of two bring q, row by row, and k and v into range; scores are subtracted before
    they are scaled.

    `place` is where the queries and keys of a sequence begin, and the sequence, if RAGGED; rows count within it.
    `v_head_size` is that of V and Out, where they have the first of two parts alone, else ().
    """
    BLOCK_D: gl.constexpr = 4 * SHAPE.BLOCK_D if SHAPE.TWO_PARTS else SHAPE.BLOCK_D  # all columns
    CAUSAL: gl.constexpr = SHAPE.CAUSAL
    GENERAL: gl.constexpr = SHAPE.GENERAL
    RAGGED: gl.constexpr = SHAPE.RAGGED
    CAPPED: gl.constexpr = SHAPE.CAPPED
    Out, Lse, Q, K, V = tensors
    q_strides, k_strides, v_strides, out_strides = strides
    num_heads, group, q_len, kv_len, row_tiles, heads, section, bounds = sizes
    if RAGGED:
        q_start, kv_start, sequence = place
        Q += q_start.to(gl.int64) * q_strides[2]
        K += kv_start.to(gl.int64) * k_strides[2]
        V += kv_start.to(gl.int64) * v_strides[2]
        Out += q_start.to(gl.int64) * out_strides[2]
    else:
        sequence = sequence_of(sizes, head, SHAPE)
    q_n, kv_n, oldest, newest = sequence
    out_rows = q_n if RAGGED else q_len
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    rows = first_row + gl.arange(0, SLOW_ROWS, layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, LAYOUT))
    inside = (rows < out_rows)[:, None] & (columns < head_size)[None, :]
    V_COLUMNS: gl.constexpr = 2 * SHAPE.BLOCK_D if len(v_head_size) > 0 else BLOCK_D
    v_columns = columns
    v_inside = columns < head_size
    out_inside = inside
    if len(v_head_size) > 0:
        v_columns = gl.arange(0, V_COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
        v_inside = v_columns < v_head_size[0]
        out_inside = (rows < out_rows)[:, None] & v_inside[None, :]
    batch = (head // num_heads).to(gl.int64)
    q_head = (head % num_heads).to(gl.int64)
    kv_head = q_head // group
    q_rows = Q + batch * q_strides[0] + q_head * q_strides[1] + rows.to(gl.int64) * q_strides[2]
    q = gl.load(q_rows[:, None] + columns[None, :], mask=inside, other=0.0).to(gl.float32)
    down, undo = row_powers(q)
    q = q * down[:, None] * (1.0 / 4096.0)
    # 2**13: 2**12 left over from q, and the halved k. Scale comes first, for undo * 2**13 may be infinite.
    if CAPPED:
        scale, bend = score_factors(factors, CAPPED)
        row_bend = gl.minimum(bend * undo * 8192.0, FLOAT_MAX)
        row_scale = undo * 0.0 + scale
    else:
        row_scale = gl.minimum(score_factors(factors, CAPPED) * undo * 8192.0, FLOAT_MAX)
    shift: gl.constexpr = shift_of(V.dtype.element_ty)
    m = gl.full([SLOW_ROWS], LOWEST, gl.float32, layout=gl.SliceLayout(1, LAYOUT))
    row_sum = gl.zeros([SLOW_ROWS], gl.float32, layout=gl.SliceLayout(1, LAYOUT))
    acc = gl.zeros([SLOW_ROWS, V_COLUMNS], gl.float32, layout=LAYOUT)
    begin = 0
    end = kv_n
    if CAUSAL:
        end = gl.minimum(kv_n, gl.minimum(first_row + SLOW_ROWS, q_n) + newest)
    if GENERAL:
        begin = gl.maximum(first_row + oldest, 0)
        end = gl.where(first_row < q_n, end, begin)
    k_row = K + batch * k_strides[0] + kv_head * k_strides[1] + columns
    v_row = V + batch * v_strides[0] + kv_head * v_strides[1] + v_columns
    if GENERAL:
        k_row += begin.to(gl.int64) * k_strides[2]
        v_row += begin.to(gl.int64) * v_strides[2]
    for key in range(begin, end):
        k = gl.load(k_row, mask=columns < head_size, other=0.0).to(gl.float32) * 0.5
        v = gl.load(v_row, mask=v_inside, other=0.0).to(gl.float32) * 0.5
        score = gl.sum(q * k[None, :], 1)
        if CAPPED:
            score = bent(score, row_bend)
        visible = rows < q_n
        if CAUSAL:
            visible = visible & (key <= rows + newest)
        if GENERAL:
            visible = visible & (key >= rows + oldest)
        m_new = gl.maximum(m, gl.where(visible, score, LOWEST))
        p = gl.where(visible, gl.exp2((score - m_new) * row_scale - shift), 0.0)
        alpha = gl.exp2((m - m_new) * row_scale)
        row_sum = row_sum * alpha + p
        acc = acc * alpha[:, None] + gl.where(visible[:, None], p[:, None] * v[None, :], 0.0)
        m = m_new
        k_row += k_strides[2]
        v_row += v_strides[2]
    some = row_sum != 0  # NaN too
    inverse = gl.where(some, 1.0 / row_sum, 0.0)
    if SHAPE.SINKS:
        scaled = gl.minimum(gl.maximum(m * row_scale, -FLOAT_MAX), FLOAT_MAX)
        inverse, sunk = finished(scaled + shift, row_sum, load_sink(sinks, q_head), shift)
    out = narrow(acc * inverse[:, None] * 2.0, Out.dtype.element_ty)
    outs = Out + batch * out_strides[0] + q_head * out_strides[1] + rows.to(gl.int64) * out_strides[2]
    gl.store(outs[:, None] + v_columns[None, :], out, mask=out_inside)
    scaled = gl.minimum(gl.maximum(m * row_scale, -FLOAT_MAX), FLOAT_MAX)
    lse = gl.where(some, (scaled + gl.log2(row_sum) + shift) * LN_2, float("-inf"))
    if SHAPE.SINKS:
        lse = sunk
    if Lse.to(gl.int64) != 0:
        Lse += head.to(gl.int64) * q_len
        if RAGGED:
            Lse += q_start
        gl.store(Lse + rows, lse, mask=rows < out_rows)
