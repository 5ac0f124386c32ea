"""ONNX Runtime's ``GroupQueryAttention``: a cache that is written at each sequence's own place, and rotated positions.

Its meaning is that of ONNX Runtime's documentation (docs/ContribOperators.md) and of its CPU implementation. Each
sequence of a batch has ``seqlens_k + 1`` keys after the step; the new ones follow its own earlier ones, or begin where
``total_sequence_length`` is the number of queries, which says that this is the first step. What ONNX Runtime leaves
open is open here, too: the rows of a first step with a cache that lie behind the end of their sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from pyfmha.onnx.calls import Call, Extra, Laid, LeftAloneError, Visible
from pyfmha.onnx.contrib import check_attributes, name_of, parts_of, refuse, scale_of
from pyfmha.onnx.contrib_beside import Real, Step, attention_bias, chained, counted, sinks, stand_in
from pyfmha.onnx.elements import Elements
from pyfmha.onnx.emit import constant, laid_as, length
from pyfmha.onnx.facts import Facts
from pyfmha.onnx.masks import BATCH
from pyfmha.onnx.rotary import turned
from pyfmha.onnx.sizes import Size
from pyfmha.onnx.standard import check_past, heads_of, optional, past_of, used
from pyfmha.onnx.tensors import attribute

_ALLOWED: dict[str, Any] = {
    **dict.fromkeys(("num_heads", "kv_num_heads", "scale", "softcap", "local_window_size", "do_rotary", "causal")),
    **dict.fromkeys(("rotary_interleaved", "smooth_softmax", "qk_norm_epsilon", "q_norm_epsilon", "k_norm_epsilon")),
    **{"qk_output": 0, "k_quant_type": "NONE", "v_quant_type": "NONE", "sliding_window_cache": 0},
    "kv_cache_bit_width": 0,
}
_OTHERS = {12: "k_scale", 13: "v_scale", 14: "q_norm_weight", 15: "k_norm_weight", 16: "query_seqlens"}


@dataclass(frozen=True)
class _Steps:
    """Where the keys of this step belong.

    Attributes:
        node: the operator.
        query: whose second axis is the number of queries.
        past: the keys and values of earlier steps, or none.
        even: whether it is proven that every sequence has as many keys, and that they follow all earlier ones.
    """

    node: ir.Node
    query: ir.Value
    past: tuple[ir.Value, ir.Value] | None
    even: bool

    def rows(self, op: Any) -> Any:
        """The number of queries, INT64 [1]."""
        return length(op, self.query, 1)

    def totals(self, op: Any) -> Any:
        """The number of keys of each sequence after the step, INT64 [batch]."""
        return op.Add(op.Cast(self.node.inputs[5], to=int(ir.DataType.INT64)), constant(op, [1]))

    def total(self, op: Any) -> Any:
        """``total_sequence_length``, INT64 [1]."""
        return op.Reshape(op.Cast(self.node.inputs[6], to=int(ir.DataType.INT64)), constant(op, [1]))

    def is_first(self, op: Any) -> Any:
        """Whether this is the first step, BOOL [1]."""
        return op.Equal(self.total(op), self.rows(op))

    def earlier(self, op: Any) -> Any:
        """The number of keys of each sequence before the step, INT64 [batch, 1], or [1, 1] for all."""
        if self.past is None:
            return constant_of(op, [[0]])
        if self.even:
            return op.Reshape(length(op, self.past[0], 2), constant(op, [1, 1]))
        before = op.Where(self.is_first(op), constant(op, [0]), op.Sub(self.totals(op), self.rows(op)))
        return op.Reshape(before, constant(op, [-1, 1]))


def constant_of(op: Any, numbers: Sequence[Any]) -> Any:
    """A constant INT64 tensor."""
    return op.Constant(value=ir.tensor(np.asarray(numbers, np.int64)))


def read(facts: Facts, node: ir.Node) -> Call:
    """Understand a ``GroupQueryAttention``.

    Raises:
        LeftAloneError: it does something that is not proven to be what the plugin computes.
    """
    check_attributes(node, _ALLOWED)
    refuse(node, range(12), _OTHERS, {3: "output_qk"})
    heads, kv_heads = attribute(node, "num_heads", 0), attribute(node, "kv_num_heads", 0)
    q, k, v, packed = _heads(facts, node, heads, kv_heads)
    if k.sizes[2] != q.sizes[2]:
        raise LeftAloneError(f"its {k.sizes[2]} new keys are not proven to be as many as its {q.sizes[2]} queries")
    past = past_of(node, 3)
    if past is not None:
        check_past(facts, past, k)
    steps = _Steps(node, q.value, past, _even(facts, node, q, past))
    window, causal = attribute(node, "local_window_size", -1), bool(attribute(node, "causal", 1))
    extras, more = sinks(facts, node, 11, heads)
    call = Call(
        name_of(node), q, k, v, scale_of(node, q.sizes[3]),
        softcap=attribute(node, "softcap", 0.0), out_order="bsH", packed=packed,
        visible=Visible(causal, past is not None, (window - 1 if window > 0 else -1, -1)),
        extras=[*extras, *attention_bias(facts, node, 10)], past=past, present=used(node, 1) or used(node, 2),
    )  # fmt: skip
    if attribute(node, "do_rotary", 0):
        call, rotating = _rotated(facts, node, call, steps)
        more = [*more, *rotating]
    if not steps.even:
        call, placing = _placed(node, call, steps)
        more = [*more, *placing]
    return replace(call, before=chained(more))


def _heads(
    facts: Facts, node: ir.Node, heads: int, kv_heads: int
) -> tuple[Laid, Laid, Laid, tuple[ir.Value, float] | None]:
    """Q, K and V, and the tensor that they are parts of."""
    query, key, value = (optional(node, index) for index in range(3))
    if query is None or key is not None or value is not None:
        q = heads_of(facts, query, heads, "Q")
        return q, heads_of(facts, key, kv_heads, "K"), heads_of(facts, value, kv_heads, "V"), None
    shape = facts.shape(query)
    if shape is None or len(shape) != 3:
        raise LeftAloneError("the shape of its packed input is not known")
    size = shape[2].over(heads + 2 * kv_heads) or shape[2]
    q, k, v = parts_of(query, shape, (heads, kv_heads, kv_heads), [size * heads, size * kv_heads, size * kv_heads])
    return q, k, v, (query, scale_of(node, q.sizes[3]))


def _even(facts: Facts, node: ir.Node, q: Laid, past: tuple[ir.Value, ir.Value] | None) -> bool:
    """Whether each sequence is proven to have the keys of all earlier steps and all new ones."""
    lengths = optional(node, 5)
    if lengths is None or optional(node, 6) is None:
        raise LeftAloneError("it has no seqlens_k and total_sequence_length")
    everything = q.sizes[2] if past is None else q.sizes[2] + (facts.shape(past[0]) or ())[2]
    content = facts.content(optional(node, 6))
    total = None if content is None or content.size != 1 else next(iter(content.flat))
    last = Elements(facts, {BATCH: q.sizes[0]}).at(lengths, (Size.of(BATCH),))
    return (past is None or total == everything) and isinstance(last, Size) and last + 1 == everything


# ---------------------------------------------------------------------- rotated positions


def _rotated(facts: Facts, node: ir.Node, call: Call, steps: _Steps) -> tuple[Call, list[Step]]:
    """Q and K turned by their positions, as [batch, seq, heads, head size]."""
    cosines, sines = optional(node, 7), optional(node, 8)
    shape = None if cosines is None else facts.shape(cosines)
    if cosines is None or sines is None or shape is None or len(shape) != 2 or not shape[1].number:
        raise LeftAloneError("the shape of its cos_cache is not known")
    half, paired = shape[1].number, bool(attribute(node, "rotary_interleaved", 0))
    made = {name: stand_in(f"{name_of(node)}_rotated_{name}", call.q.value.dtype) for name in "qk"}

    def step(op: Any, real: Real) -> Real:
        at = _positions(op, optional(node, 9), steps)
        angles = [op.Reshape(op.Gather(table, at, axis=0), constant(op, [0, 0, 1, half])) for table in (cosines, sines)]
        return {
            made[name]: turned(
                op, laid_as(op, laid, "bshd"), (angles[0], angles[1]), half, laid.sizes[3].number, paired
            )
            for name, laid in (("q", call.q), ("k", call.k))
        }

    q, k = (Laid(made[name], "bshd", laid.sizes) for name, laid in (("q", call.q), ("k", call.k)))
    return replace(call, q=q, k=k, packed=None), [step]


def _positions(op: Any, given: ir.Value | None, steps: _Steps) -> Any:
    """Of each query, INT64 [batch or 1, seq]."""
    count = op.Reshape(counted(op, steps.rows(op)), constant(op, [1, -1]))
    if given is None:
        return op.Add(steps.earlier(op), count)
    at = op.Cast(given, to=int(ir.DataType.INT64))
    first = op.Add(op.Slice(op.Reshape(at, constant(op, [-1])), *(constant(op, [x]) for x in (0, 1, 0))), count)
    return first if steps.past is None else op.Where(steps.is_first(op), first, at)


# ---------------------------------------------------------------------- the cache


def _placed(node: ir.Node, call: Call, steps: _Steps) -> tuple[Call, list[Step]]:
    """Keys and values where each sequence has them, and how many count."""
    lengths = stand_in(f"{name_of(node)}_lengths", ir.DataType.INT32)
    causal = call.visible.causal
    visible = replace(call.visible, kv_lengths=lengths, bottom_right=causal and steps.past is not None)
    if steps.past is None:
        return replace(call, visible=visible), [lambda op, _: {lengths: _int32(op, steps.totals(op))}]
    made = [stand_in(f"{name_of(node)}_all_{name}", call.q.value.dtype) for name in "kv"]
    keys = Size.of(f"<{name_of(node)}.keys>")
    all_k, all_v = (
        Laid(value, "bhsd", (*laid.sizes[:2], keys, laid.sizes[3]))
        for value, laid in zip(made, (call.k, call.v), strict=True)
    )
    extras = [replace(extra, value=_wider(extra, node)) if extra.feature == "bias" else extra for extra in call.extras]

    def step(op: Any, real: Real) -> Real:
        before, rows = steps.earlier(op), steps.rows(op)
        room = length(op, steps.past[0], 2) if steps.past is not None else rows
        total = steps.total(op)
        all_keys = op.Where(op.Greater(room, total), room, total)
        at = op.Reshape(counted(op, all_keys), constant(op, [1, -1]))
        end = op.Add(before, rows)
        # Behind the cache lie the new rows, and behind those one of zeros.
        new = op.Where(op.Less(at, end), op.Add(op.Sub(at, before), room), op.Add(room, rows))
        index = op.Where(op.Less(at, before), at, new)
        found: Real = {
            stand: _gathered(op, past, replace(laid, value=real.get(laid.value, laid.value)), index)
            for stand, past, laid in zip(made, steps.past or (), (call.k, call.v), strict=True)
        }
        found[lengths] = _int32(op, op.Reshape(end, constant(op, [-1])) if causal else steps.totals(op))
        for old, wide in zip(call.extras, extras, strict=True):
            if old.feature == "bias":
                found[wide.value] = _padded(op, old.value, all_keys)
        return found

    return replace(call, k=all_k, v=all_v, past=None, packed=None, visible=visible, extras=extras), [step]


def _wider(extra: Extra, node: ir.Node) -> ir.Value:
    return stand_in(f"{name_of(node)}_{extra.value.name}_wide", extra.value.dtype)


def _int32(op: Any, value: Any) -> Any:
    return op.Cast(value, to=int(ir.DataType.INT32))


def _padded(op: Any, bias: ir.Value, keys: Any) -> Any:
    """A bias with a column for each place of the cache; what is added there does not count."""
    missing = op.Sub(keys, length(op, bias, 3))
    return op.Pad(bias, op.Concat(constant(op, [0] * 7), missing, axis=0))


def _gathered(op: Any, past: ir.Value, new: Laid, index: Any) -> Any:
    """The cache [batch, heads, keys, head size]; ``index`` [batch, keys] says which row of past, new and zeros."""
    heads, size = new.sizes[1].number or 0, new.sizes[3].number or 0
    fresh = laid_as(op, new, "bhsd")
    batch = length(op, past, 0)
    nothing = op.Constant(value=ir.tensor(np.zeros((1, 1, 1, 1), past.dtype.numpy() if past.dtype else np.float32)))
    zeros = op.Expand(nothing, op.Concat(batch, constant(op, [heads, 1, size]), axis=0))
    rows = op.Concat(past, fresh, zeros, axis=2)
    each = op.Slice(op.Shape(rows), *(constant(op, [number]) for number in (2, 3, 0)))
    first = op.Mul(counted(op, op.Mul(batch, constant(op, [heads]))), each)
    place = op.Add(op.Reshape(first, constant(op, [-1, heads, 1])), op.Reshape(index, _three(op, index)))
    return op.Gather(op.Reshape(rows, constant(op, [-1, size])), place, axis=0)


def _three(op: Any, index: Any) -> Any:
    """The shape of an index with an axis of size 1 in the middle."""
    sizes = op.Shape(index)
    ends = [op.Slice(sizes, *(constant(op, [number]) for number in (at, at + 1, 0))) for at in (0, 1)]
    return op.Concat(ends[0], constant(op, [1]), ends[1], axis=0)
