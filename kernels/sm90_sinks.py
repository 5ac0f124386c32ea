"""Sinks on Hopper: what adds exp(sink) to the sum of each row of a head, but no value."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2_E: gl.constexpr = gl.constexpr(1.4426950408889634)
LN_2: gl.constexpr = gl.constexpr(0.6931471805599453)
# The maximum of a row that has seen nothing, in units of log2: below all others, and finite, so that differences are
# numbers.
NOTHING: gl.constexpr = gl.constexpr(-1.329227995784916e36)


@gluon.jit
def load_sink(sinks, head):
    """The sink of a head in units of log2, minus infinity where there are none."""
    own, wide = sinks
    sink = gl.to_tensor(float("-inf"))
    if own.to(gl.int64) != 0:
        sink = gl.load(own + head).to(gl.float32) * LOG2_E
    if wide.to(gl.int64) != 0:
        sink = gl.load(wide + head) * LOG2_E
    return gl.minimum(sink, 3.4028234663852886e38)


@gluon.jit
def finished(m, total, sink, shift: gl.constexpr):
    """Of rows with maxima m and sums: the factor of what they summed up of V, 0 of those that see nothing, and their
    log-sum-exp."""
    top = gl.maximum(m, sink + shift)
    alpha = gl.exp2(m - top)
    sees = total != 0  # NaN too
    total = total * alpha + gl.exp2(sink - top)
    some = total != 0
    factor = gl.where(sees, alpha / gl.where(some, total, 1.0), 0.0)
    return factor, gl.where(some, (top - shift + gl.log2(total) + shift) * LN_2, float("-inf"))
