"""What a cell has beside Q, K and V: lengths, a bias, a mask, sinks, or the inputs of a function of pyfmha's.

One formula each for float64 and for FlexAttention: ``xp`` is numpy or torch, the arrays are of that.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pyfmha.attention.key_blocks import KeyBlocks
from pyfmha.attention.run import to_float, to_storage
from pyfmha.bench.cells import DOCUMENT, GROUPS, PIECE, Cell

Arrays = Mapping[str, Any]
T5_BUCKETS, T5_FURTHEST = 32, 128

FUNCTIONS: dict[str, Callable[[Cell], tuple[str | int, ...]]] = {
    "alibi": lambda cell: ("slopes",),
    "documents": lambda cell: ("begins", "ends", cell.seq),
    "groups": lambda cell: ("numbers", cell.seq),
    "prefix": lambda cell: ("lengths",),
    "t5": lambda cell: ("table", cell.heads, T5_BUCKETS, T5_FURTHEST),
}
"""The inputs of each function in its order: arrays by name, and numbers."""

LISTED = {"groups": KeyBlocks(batch=True, head=False)}
"""Those whose blocks are listed by a launch before."""


def arrays_of(cell: Cell) -> dict[str, Any]:
    """The tensors beside Q, K and V by name, in numpy as a device holds them."""
    found: dict[str, Any] = {}
    if cell.tokens:
        found["cu_seqlens"] = np.cumsum([0, *cell.tokens]).astype(np.int32)
    if cell.kv_lengths:
        found["kv_lengths"] = np.array(cell.kv_lengths, np.int32)
        found["seen"] = _seen_keys(cell)
    return found | _beside(cell, np.random.default_rng(5))


def _seen_keys(cell: Cell) -> Any:
    """The same as a mask, for those that have no lengths."""
    keys = np.arange(cell.kv_seq)
    seen = keys < np.array(cell.kv_lengths)[:, None, None, None]
    return seen & (keys <= np.arange(cell.seq)[:, None]) if cell.causal else seen


def _beside(cell: Cell, chance: np.random.Generator) -> dict[str, Any]:
    kind, axes = cell.kind, cell.beside.partition("-")[2]
    sizes = {"b": cell.batch, "h": cell.heads, "q": cell.seq, "k": cell.kv_seq, "1": 1}
    if kind == "bias":
        numbers = chance.standard_normal([sizes[axis] for axis in axes], np.float32)
        return {"bias": to_storage(numbers, cell.dtype)}
    if kind == "mask":
        shown = chance.random([sizes[axis] for axis in axes], np.float32) < 0.8
        shown[..., 0] = True
        return {"mask": shown}
    if kind == "sinks":
        return {"sinks": chance.standard_normal(cell.heads, np.float32)}
    if kind == "alibi":
        return {"slopes": np.exp2(-8 * (np.arange(cell.heads) + 1) / cell.heads).astype(np.float32)}
    if kind == "documents":
        begins = np.arange(cell.seq) // DOCUMENT * DOCUMENT
        both = {"begins": begins, "ends": np.minimum(begins + DOCUMENT, cell.seq)}
        return {name: np.tile(row, (cell.batch, 1)).astype(np.int32) for name, row in both.items()}
    if kind == "groups":
        return {"numbers": np.tile(np.arange(cell.seq) // PIECE % GROUPS, (cell.batch, 1)).astype(np.int32)}
    if kind == "prefix":
        return {"lengths": np.full(cell.batch, cell.prefix, np.int32)}
    return {"table": chance.standard_normal((T5_BUCKETS, cell.heads), np.float32)} if kind == "t5" else {}


def score_of(cell: Cell, arrays: Arrays, xp: Any) -> Callable[..., Any] | None:
    """What becomes of a score of (batch, head, query, key); None where it stays."""
    if cell.kind == "bias":
        bias = arrays["bias"]
        bias = to_float(bias, cell.dtype) if xp is np else bias
        return lambda score, b, h, q, k: score + bias[_place(bias, b, h, q, k)]
    if cell.kind == "alibi":
        slopes = arrays["slopes"]
        return lambda score, b, h, q, k: score + slopes[h] * (k - q)
    if cell.kind == "t5":
        table, half = arrays["table"], T5_BUCKETS // 2

        def t5(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            far = abs(k - q)
            exact = half // 2
            ratio = xp.log2(xp.where(far < 1, 1, far) / exact) / np.log2(T5_FURTHEST / exact)
            large = exact + xp.floor(ratio * (half - exact) + 1e-5)
            bucket = xp.where(k > q, half, 0) + xp.where(far < exact, far, xp.where(large < half, large, half - 1))
            return score + table[bucket.astype(np.int64) if xp is np else bucket.int(), h]

        return t5
    return None


def seen_of(cell: Cell, arrays: Arrays) -> Callable[..., Any] | None:
    """Whether (batch, head, query) sees a key, but for what is causal; None where it does."""
    if cell.kind == "mask":
        mask = arrays["mask"]
        return lambda b, h, q, k: mask[_place(mask, b, h, q, k)]
    if cell.kind == "documents":
        begins, ends = arrays["begins"], arrays["ends"]
        return lambda b, h, q, k: (k >= begins[b, q]) & (k < ends[b, q])
    if cell.kind == "groups":
        numbers = arrays["numbers"]
        return lambda b, h, q, k: numbers[b, q] == numbers[b, k]
    if cell.kind == "prefix":
        lengths = arrays["lengths"]
        return lambda b, h, q, k: (k <= q) | (k < lengths[b])
    return None


def _place(tensor: Any, b: Any, h: Any, q: Any, k: Any) -> tuple[Any, ...]:
    """Where a score's element of a broadcast tensor is."""
    batch, heads, queries, _ = tensor.shape
    return b if batch > 1 else 0, h if heads > 1 else 0, q if queries > 1 else 0, k
