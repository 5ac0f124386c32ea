"""Attention in float64 with numpy: the independent yardstick of every kernel, the formula and nothing more."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Queries at a time: scores of 256 x 2048 float64 take 4 MiB a head.
_ROWS = 256


@dataclass(frozen=True, eq=False)
class ExactAttention:
    """What attention gives.

    Attributes:
        out: float64 [batch, heads, seq, head size].
        row_max: float64 [batch, heads, seq], the largest scaled score of each query.
        row_sum: float64 [batch, heads, seq], the sum of exp(score - row_max).
    """

    out: Floats
    row_max: Floats
    row_sum: Floats


def attention_float64(
    q: npt.ArrayLike, k: npt.ArrayLike, v: npt.ArrayLike, *, sm_scale: float, causal: bool
) -> ExactAttention:
    """softmax(sm_scale * q k^T) v in float64.

    Args:
        q: [batch, heads, query seq, head size], any type numpy can make float64 (bf16 by
            :func:`pyfmha.bfloat16.float_from_bf16`).
        k: [batch, heads, key seq, head size].
        v: [batch, heads, key seq, head size].
        sm_scale: factor of the scores; any finite number.
        causal: query i sees the keys 0..i.

    Raises:
        ValueError: the shapes do not fit together.
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: expected [batch, heads, seq, head size] of one kind")
    rows, columns = q.shape[2], k.shape[2]
    result = ExactAttention(np.empty(q.shape), np.empty(q.shape[:3]), np.empty(q.shape[:3]))
    for head in np.ndindex(q.shape[:2]):
        for start in range(0, rows, _ROWS):
            part = slice(start, min(start + _ROWS, rows))
            scores = sm_scale * (q[head][part] @ k[head].T)
            if causal:
                query, key = np.arange(part.start, part.stop)[:, None], np.arange(columns)[None, :]
                scores = np.where(key <= query, scores, -np.inf)
            largest = scores.max(axis=1)
            weights = np.exp(scores - largest[:, None])
            total = weights.sum(axis=1)
            result.out[head][part] = (weights @ v[head]) / total[:, None]
            result.row_max[head][part] = largest
            result.row_sum[head][part] = total
    return result


def relative_error(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """Frobenius norm of the difference over that of ``expected``, in float64; NaN if ``actual`` has one.

    0 where both are zero, infinite where only ``expected`` is.
    """
    exact = np.asarray(expected, dtype=np.float64)
    # Scaled by a power of two near the largest value, so that squares of huge or tiny values survive.
    exponent = np.frexp(np.abs(exact).max(initial=0.0))[1]
    exact = np.ldexp(exact, -exponent)
    difference = np.linalg.norm(np.ldexp(np.asarray(actual, dtype=np.float64), -exponent) - exact)
    size = np.linalg.norm(exact)
    if size == 0:
        return 0.0 if difference == 0 else float(difference * np.inf)
    return float(difference / size)
