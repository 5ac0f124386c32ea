"""Attention in float64 with numpy: the independent yardstick of every kernel, the formula and nothing more."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

LIMITS = {"fp16": 5e-4, "bf16": 4e-3, "fp32": 1e-5, "tf32": 2e-3}
"""Largest relative Frobenius error against float64 that passes; "tf32" is fp32 multiplied as plain tf32."""

FP8_LIMIT = 0.04
"""The same of Q, K and V in e4m3. Weights are rounded to a fraction of 3 bits, by at most 2**-4 and 0.026 in the mean
square, which is the error of Out where values do not depend on weights; 0.016 to 0.026 was measured."""

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
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    scale: float | None = None,
    causal: bool,
    sm_scale: float | None = None,
) -> ExactAttention:
    """softmax(scale * q k^T) v in float64.

    Args:
        q: [batch, heads, query seq, head size], any type numpy can make float64 (bf16 by
            :func:`pyfmha.bfloat16.float_from_bf16`).
        k: [batch, heads, key seq, head size].
        v: [batch, heads, key seq, head size].
        scale: factor of the scores; any finite number; by default 1 / sqrt(head size).
        causal: query i sees the keys 0..i.
        sm_scale: the scale by its earlier name.

    Raises:
        ValueError: the shapes do not fit together, or there are two scales.
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: expected [batch, heads, seq, head size] of one kind")
    factor = _factor(scale, sm_scale, q.shape[-1])
    rows, columns = q.shape[2], k.shape[2]
    result = ExactAttention(np.empty(q.shape), np.empty(q.shape[:3]), np.empty(q.shape[:3]))
    for head in np.ndindex(q.shape[:2]):
        for start in range(0, rows, _ROWS):
            part = slice(start, min(start + _ROWS, rows))
            scores = factor * (q[head][part] @ k[head].T)
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


Score = Callable[[Floats, int, int, Any, Any], npt.ArrayLike]
"""A score function: of scores [m, n], batch, head, query positions [m, 1], keys [1, n]; gives scores."""

Seen = Callable[[int, int, Any, Any], npt.ArrayLike]
"""A mask function: of batch, head, query positions [m, 1], keys [1, n]; says which are seen."""


def attend(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window_left: int = -1,
    window_right: int = -1,
    bottom_right: bool = False,
    q_lengths: Sequence[int] | None = None,
    kv_lengths: Sequence[int] | None = None,
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_kv: Sequence[int] | None = None,
    bias: npt.ArrayLike | None = None,
    mask: npt.ArrayLike | None = None,
    sinks: npt.ArrayLike | None = None,
    score: Score | None = None,
    seen: Seen | None = None,
    sm_scale: float | None = None,
) -> tuple[Floats, Floats]:
    """Attention with everything that the production kernels serve, in float64 and by its definition.

    Query i of a sequence of q_n queries and kv_n keys sees key j if ``i + d - window_left <= j <= i + d +
    window_right``, where d is ``kv_n - q_n`` with ``bottom_right``, else 0, and a window of -1 has no bound. Its score
    is ``scale * q . k``, or ``softcap * tanh(that / softcap)``, plus the bias, and then what ``score`` makes of it.
    Keys that ``mask`` or ``seen`` deny, and those whose score is minus infinity by bias or ``score``, are not seen
    either.

    Args:
        q: [batch, query heads, query seq, head size]; ragged: [query tokens, query heads, head size].
        k: [batch, key heads, key seq, head size]; ragged: [key tokens, key heads, head size]. Each key head serves
            as many query heads in a row.
        v: as k, but for the head size, which is its own.
        scale: factor of the scores; by default 1 / sqrt(head size).
        q_lengths, kv_lengths: [batch], how much of each sequence counts, clamped to the tensor; None for all of it.
        cu_seqlens_q, cu_seqlens_kv: [sequences + 1], makes the batch ragged: where each sequence begins and the last
            ends, clamped to the tensor and made non-decreasing by a running maximum.
        bias: broadcast to [batch, query heads, query seq, key seq]; ragged: [sequences, query heads, longest, longest],
            by the positions in a sequence. Last axes longer than the sequence are cut.
        mask: as bias, true where a key is seen.
        sinks: [query heads]: exp(sink) is part of each row's sum.
        score, seen: functions of blocks; a query's position is its index, plus d, at least 0.
        sm_scale: the scale by its earlier name.

    Returns:
        out, of q's shape with v's head size, and the natural logarithm of the sum of exp(score): [batch, query heads,
        query seq]; ragged [query heads, query tokens]. Queries without keys get zeros and minus infinity, or the sink;
        those that do not count get zeros and minus infinity.

    Raises:
        ValueError: the shapes do not fit together, or there are two scales.
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    ragged = cu_seqlens_q is not None and cu_seqlens_kv is not None
    tokens, heads = (0, 1) if ragged else (2, 1)
    if q.ndim != 4 - ragged or k.shape[:-1] != v.shape[:-1] or k.ndim != q.ndim or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} are no attention, ragged={ragged}")
    if k.shape[heads] == 0 or q.shape[heads] % k.shape[heads] or (not ragged and q.shape[0] != k.shape[0]):
        raise ValueError(f"q {q.shape}, k {k.shape}: batch or heads do not fit")
    factor = _factor(scale, sm_scale, q.shape[-1])
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    lse = np.full((q.shape[1], q.shape[0]) if ragged else q.shape[:3], -np.inf)
    group = q.shape[heads] // k.shape[heads]
    if cu_seqlens_q is not None and cu_seqlens_kv is not None:
        q_ends, kv_ends = _ends(cu_seqlens_q, q.shape[tokens]), _ends(cu_seqlens_kv, k.shape[tokens])
        spans = [(b, q_ends[b], q_ends[b + 1], kv_ends[b], kv_ends[b + 1]) for b in range(len(q_ends) - 1)]
        parts = [
            (b, h, out[i:j, h], lse[h, i:j], q[i:j, h], k[m:n, h // group], v[m:n, h // group])
            for b, i, j, m, n in spans
            for h in range(q.shape[heads])
        ]
    else:
        counts = [_counts(given, x.shape[0], x.shape[tokens]) for given, x in ((q_lengths, q), (kv_lengths, k))]
        parts = [
            (b, h, out[b, h, :m], lse[b, h, :m], q[b, h, :m], k[b, h // group, :n], v[b, h // group, :n])
            for b, (m, n) in enumerate(zip(*counts, strict=True))
            for h in range(q.shape[heads])
        ]
    wide_bias, wide_mask = (None if x is None else np.asarray(x) for x in (bias, mask))
    for b, h, *rows in parts:
        change = _Change(
            _of_head(wide_bias, b, h), _of_head(wide_mask, b, h), None if sinks is None else float(np.ravel(sinks)[h]),
            None if score is None else partial(_score_of, score, b, h), None if seen is None else partial(seen, b, h),
        )  # fmt: skip
        head_out, head_lse, head_q, head_k, head_v = rows
        window = window_left, window_right, bottom_right
        _attend_one(head_out, head_lse, head_q, head_k, head_v, factor, softcap, window, change)
    return out, lse


def _factor(scale: float | None, earlier: float | None, head_size: int) -> float:
    """The scale, by whichever name."""
    if scale is not None and earlier is not None:
        raise ValueError(f"scale is {scale} and sm_scale, its earlier name, {earlier}; give one of them")
    given = earlier if scale is None else scale
    return head_size**-0.5 if given is None else given


def _of_head(tensor: Any, batch: int, head: int) -> Any:
    """What of a bias or a mask is for one head of one sequence, [queries or 1, keys or 1]."""
    if tensor is None:
        return None
    full = tensor.reshape((1,) * (4 - tensor.ndim) + tensor.shape)
    return full[batch if full.shape[0] > 1 else 0, head if full.shape[1] > 1 else 0]


def _score_of(score: Score, batch: int, head: int, scores: Floats, query: Any, key: Any) -> npt.ArrayLike:
    return score(scores, batch, head, query, key)


@dataclass(frozen=True, eq=False)
class _Change:
    """What one head's scores go through besides: parts of bias and mask, the sink, the functions."""

    bias: Any
    mask: Any
    sink: float | None
    score: Callable[[Floats, Any, Any], npt.ArrayLike] | None
    seen: Callable[[Any, Any], npt.ArrayLike] | None

    def apply(self, scores: Floats, i: int, position: int, keys: slice) -> Floats:
        """Scores of query i for some keys, minus infinity where they are not seen."""
        query, key = np.array([[position]]), np.arange(keys.start, keys.stop)[None, :]
        if self.bias is not None:
            bias = _row(self.bias, i, keys).astype(np.float64)
            scores = np.where(np.isneginf(bias), -np.inf, scores + bias)  # even where the score is NaN
        if self.score is not None:
            scores = np.broadcast_to(self.score(scores[None, :], query, key), (1, scores.size))[0]
        if self.mask is not None:
            scores = np.where(_row(self.mask, i, keys), scores, -np.inf)
        if self.seen is not None:
            scores = np.where(np.broadcast_to(self.seen(query, key), (1, scores.size))[0], scores, -np.inf)
        return scores


def _row(tensor: Any, i: int, keys: slice) -> Any:
    row = tensor[i if tensor.shape[0] > 1 else 0]
    return row[keys] if row.size > 1 else row


def _ends(cu_seqlens: Sequence[int], total: int) -> list[int]:
    clamped = [min(max(int(end), 0), total) for end in cu_seqlens]
    return [max(clamped[: i + 1]) for i in range(len(clamped))]


def _counts(lengths: Sequence[int] | None, batch: int, seq: int) -> list[int]:
    return [seq] * batch if lengths is None else [min(max(int(length), 0), seq) for length in lengths]


def _attend_one(
    out: Floats, lse: Floats, q: Floats, k: Floats, v: Floats,
    sm_scale: float, softcap: float, window: tuple[int, int, bool], change: _Change,
) -> None:  # fmt: skip
    """One head of one sequence: ``out`` [m, head size] and ``lse`` [m] are filled in, q by q."""
    window_left, window_right, bottom_right = window
    offset = len(k) - len(q) if bottom_right else 0
    for i in range(len(q)):
        first = max(i + offset - window_left, 0) if window_left >= 0 else 0
        last = min(i + offset + window_right, len(k) - 1) if window_right >= 0 else len(k) - 1
        keys = slice(first, max(last + 1, first))
        scores = sm_scale * (k[keys] @ q[i])
        if softcap > 0:
            scores = softcap * np.tanh(scores / softcap)
        scores = change.apply(scores, i, max(i + offset, 0), keys)
        seen = scores != -np.inf
        scores, values = scores[seen], v[keys][seen]
        sink = -np.inf if change.sink is None else change.sink
        largest = max(scores.max(initial=-np.inf), sink)
        if largest > -np.inf:
            weights = np.exp(scores - largest)
            total = weights.sum() + np.exp(sink - largest)
            out[i] = weights @ values / total
            lse[i] = largest + np.log(total)


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
