"""Rows of fmha_biased_sm90.py computed again: finite for any finite input, and right where what a row does not see is
NaN or infinite."""

from sm90_biased import by_functions
from sm90_sinks import finished, load_sink
from sm90_slow import FLOAT_MAX, LOG2_E, LOWEST, SLOW_ROWS, narrow, row_powers, shift_of
from sm90_tiles import sequence_of
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# 2**125: see biased_safe.py.
BOUND: gl.constexpr = gl.constexpr(4.253529586511731e37)


@gluon.jit
def _bounded(x):
    """x between -BOUND and BOUND; NaN stays."""
    return gl.where(x > BOUND, BOUND, gl.where(x < -BOUND, -BOUND, x))


@gluon.jit
def _row_of(base, strides, batch, head, rows):
    """Where rows of a bias or mask begin, and which it has."""
    has = (strides[2] == 0) | (rows < strides[4])
    return base + batch * strides[0] + head * strides[1] + rows.to(gl.int64) * strides[2], has


@gluon.jit
def score_unit(row_scale, FREE: gl.constexpr):
    """Powers of two: the units in which rows' scores are held, and their inverses. Products fit BOUND, and so do those
    times less than 1, the rest of their factor; of a bias only what such products hide is lost. 1 unless FREE."""
    exponent = gl.minimum(gl.maximum((row_scale.to(gl.int32, bitcast=True) >> 23) + 1, 127), 253)
    if not FREE:
        exponent = exponent * 0 + 127
    return (exponent << 23).to(gl.float32, bitcast=True), ((254 - exponent) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def compute_biased_slowly(
    tensors, strides, sizes, beside, place, first_row, head_sizes, sm_scale, inputs, SHAPE: gl.constexpr
):
    """A few rows of one head, key by key, as compute_slowly of sm90_slow.py; writes Out and Lse itself. Scores that a
    function gets count as BOUND beyond it; others are held in a unit of each row's own, which all products fit."""
    WIDTH: gl.constexpr = SHAPE.BLOCK_D
    V_WIDTH: gl.constexpr = SHAPE.BLOCK_V
    SCORE: gl.constexpr = SHAPE.SCORE
    SEEN: gl.constexpr = SHAPE.SEEN
    Out, Lse, Q, K, V = tensors
    q_strides, k_strides, v_strides, out_strides, bias_strides, mask_strides = strides
    Bias, Mask, sinks = beside
    head_size, v_head_size = head_sizes
    num_heads, group, q_len, kv_len, row_tiles, heads, section, bounds = sizes
    batch, head = place
    q_n, kv_n, oldest, newest = sequence_of(sizes, batch * num_heads + head, SHAPE)
    position = (bounds[0] != 0).to(gl.int32) * (kv_n - q_n)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    rows = first_row + gl.arange(0, SLOW_ROWS, layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    v_columns = gl.arange(0, V_WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    wide_batch = batch.to(gl.int64)
    q_head = head.to(gl.int64)
    kv_head = q_head // group
    q_rows = Q + wide_batch * q_strides[0] + q_head * q_strides[1] + rows.to(gl.int64) * q_strides[2]
    in_q = (rows < q_len)[:, None] & (columns < head_size)[None, :]
    q = gl.load(q_rows[:, None] + columns[None, :], mask=in_q, other=0.0).to(gl.float32)
    down, undo = row_powers(q)
    q = q * down[:, None] * (1.0 / 4096.0)
    row_scale = gl.minimum(sm_scale * undo * 8192.0, FLOAT_MAX)  # 2**13: 2**12 left over from q, and the halved k
    unit, to_unit = score_unit(row_scale, SCORE is None)
    row_scale *= to_unit
    to_log2 = gl.minimum(unit * LOG2_E, FLOAT_MAX)
    shift: gl.constexpr = shift_of(V.dtype.element_ty)
    m = gl.full([SLOW_ROWS], LOWEST, gl.float32, layout=gl.SliceLayout(1, LAYOUT))
    row_sum = gl.zeros([SLOW_ROWS], gl.float32, layout=gl.SliceLayout(1, LAYOUT))
    acc = gl.zeros([SLOW_ROWS, V_WIDTH], gl.float32, layout=LAYOUT)
    begin = 0
    end = kv_n
    if SHAPE.CAUSAL:
        end = gl.minimum(kv_n, gl.minimum(first_row + SLOW_ROWS, q_n) + newest)
    if SHAPE.GENERAL:
        begin = gl.maximum(first_row + oldest, 0)
    end = gl.where(first_row < q_n, end, begin)
    k_base = K + wide_batch * k_strides[0] + kv_head * k_strides[1] + columns
    v_base = V + wide_batch * v_strides[0] + kv_head * v_strides[1] + v_columns
    positions = gl.maximum(gl.minimum(rows, q_n - 1) + position, 0)
    bias_rows, in_bias = _row_of(Bias, bias_strides, wide_batch, q_head, rows)
    mask_rows, in_mask = _row_of(Mask, mask_strides, wide_batch, q_head, rows)
    for key in range(begin, end):
        wide_key = key.to(gl.int64)
        k = gl.load(k_base + wide_key * k_strides[2], mask=columns < head_size, other=0.0).to(gl.float32) * 0.5
        v = gl.load(v_base + wide_key * v_strides[2], mask=v_columns < v_head_size, other=0.0).to(gl.float32) * 0.5
        score = _bounded(gl.sum(q * k[None, :], 1) * row_scale)
        seen = rows < q_n
        if SHAPE.CAUSAL:
            seen = seen & (key <= rows + newest)
        if SHAPE.GENERAL:
            seen = seen & (key >= rows + oldest)
        if SHAPE.BIAS != "never":
            has = (rows < q_n) & in_bias & ((bias_strides[3] == 0) | (key < bias_strides[5]))
            bias = gl.load(bias_rows + wide_key * bias_strides[3], mask=has, other=0.0).to(gl.float32)
            seen = seen & (bias != float("-inf"))
            score += bias * to_unit
        if SCORE is not None or SEEN is not None:
            keys = (gl.arange(0, 1, layout=gl.SliceLayout(0, LAYOUT)) + key)[None, :]
            score = by_functions(score[:, None], (batch, head), positions[:, None], keys, inputs, True, True, SHAPE)
            score = gl.sum(score, 1)  # of one
        if SHAPE.MASK != "never":
            has = (rows < q_n) & in_mask & ((mask_strides[3] == 0) | (key < mask_strides[5]))
            shown = gl.load(mask_rows + wide_key * mask_strides[3], mask=has, other=0)
            seen = seen & (shown != 0)
        seen = seen & (score != float("-inf"))
        score = _bounded(score)
        m_new = gl.maximum(m, gl.where(seen, score, LOWEST))
        p = gl.where(seen, gl.exp2((score - m_new) * to_log2 - shift), 0.0)
        alpha = gl.exp2((m - m_new) * to_log2)
        row_sum = row_sum * alpha + p
        acc = acc * alpha[:, None] + gl.where(seen[:, None], p[:, None] * v[None, :], 0.0)
        m = m_new
    m = gl.minimum(gl.maximum(m * to_log2, -FLOAT_MAX), FLOAT_MAX)
    factor, lse = finished(m + shift, row_sum, load_sink(sinks, head), shift)
    lse = gl.where(rows < q_n, lse, float("-inf"))
    out = gl.where((factor != 0)[:, None], acc * factor[:, None] * 2.0, 0.0)
    outs = Out + wide_batch * out_strides[0] + q_head * out_strides[1] + rows.to(gl.int64) * out_strides[2]
    stored = (rows < q_len)[:, None] & (v_columns < v_head_size)[None, :]
    gl.store(outs[:, None] + v_columns[None, :], narrow(out, Out.dtype.element_ty), mask=stored)
    if Lse.to(gl.int64) != 0:
        gl.store(Lse + (wide_batch * num_heads + head) * q_len + rows, lse, mask=rows < q_len)
