"""The plugin's node in the place of an attention, with as few transposes as its layouts allow."""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir

from pyfmha.attention.operator import OPERATOR
from pyfmha.onnx.calls import Call, Extra, Laid, LeftAloneError
from pyfmha.onnx.served import is_plain, problem_of
from pyfmha.onnx.sizes import Size
from pyfmha.trt.attention.problem import Problem

DOMAIN = "pyfmha"
"""The domain of the plugin's nodes."""

PARSER = {"plugin_version": OPERATOR.version, "plugin_namespace": ""}
"""What TensorRT's parser looks the creator up by. Without the second it would take the domain for the namespace, and
the creator is registered without one (:func:`pyfmha.trt.creator.register`)."""

_HEADS_FIRST, _ROWS_FIRST = "bhsd", "bshd"


def layout_of(call: Call) -> str:
    """The plugin's layout that needs the fewest transposes."""
    if call.packed is not None and call.v.sizes[3] == call.q.sizes[3] and call.past is None and not call.present:
        return "packed"
    rows_first = all(laid.order in ("bsH", "bsd", _ROWS_FIRST) for laid in (call.q, call.k, call.v))
    return _ROWS_FIRST if rows_first and call.past is None and not call.present else _HEADS_FIRST


def prepared(call: Call) -> Problem:
    """What the plugin is to be created with for an attention.

    Raises:
        LeftAloneError: the plugin does not serve it.
    """
    layout = layout_of(call)
    if layout == "packed" and call.packed is not None:
        call = replace(call, scale=call.packed[1])
    if call.q.order == "bsH" and call.out_order not in ("bsH", "bsd", *_PERMUTATIONS):
        raise LeftAloneError(f"its result is laid as {call.out_order}")
    return problem_of(call, layout)


def emitted(op: Any, call: Call, problem: Problem) -> list[ir.Value]:
    """Add the nodes.

    Args:
        op: the rewriter's builder.
        call: the attention.
        problem: as :func:`prepared` answered.

    Returns:
        The result, and with :attr:`Call.present` the keys and values of all steps.
    """
    assert problem.features is not None
    call = _with_real_values(op, call)
    q, k, v = call.q, call.k, call.v
    layout, present = problem.features.layout, []
    if layout == "packed":
        assert call.packed is not None
        many = problem.num_heads + 2 * problem.kv_heads
        tensors = {"QKV": _reshaped(op, call.packed[0], [0, 0, many, problem.head_size])}
    else:
        tensors = {name: laid_as(op, laid, layout) for name, laid in zip("QKV", (q, k, v), strict=True)}
        if call.past is not None:
            for name, past in zip("KV", call.past, strict=True):
                tensors[name] = op.Concat(past, tensors[name], axis=2)
        present = [tensors["K"], tensors["V"]] if call.present else []
        if call.stacked and present:
            present = [op.Concat(*(_with_axis(op, value) for value in present), axis=0)]
    tensors |= _beside(op, call)
    if call.visible.kv_lengths is not None:
        tensors["kv_lengths"] = _int32(op, call.visible.kv_lengths)
    out = op.op(
        OPERATOR.name,
        *(tensors[form.name] for form in problem.forms().inputs),
        _domain=DOMAIN, _version=1, _name=f"{call.name}_{OPERATOR.name}",
        **problem.node_attributes(), **PARSER,
    )  # fmt: skip
    own = _HEADS_FIRST if layout == _HEADS_FIRST else _ROWS_FIRST
    out.dtype, out.shape = call.q.value.dtype, _written((*call.q.sizes[:3], call.v.sizes[3]), own)
    # The tensors of all steps get names of their own: they may be inputs of the node as they are.
    return [_laid_out(op, out, own, call.out_order, problem), *(op.Identity(value) for value in present)]


def _with_real_values(op: Any, call: Call) -> Call:
    """The call with the values that its first nodes give in the place of stand-ins."""
    real = {} if call.before is None else call.before(op)

    def of(value: ir.Value) -> ir.Value:
        found = real.get(value, value)
        if found.dtype is None and value.dtype is not None:
            found.dtype = value.dtype
        return found

    lengths = call.visible.kv_lengths
    return replace(
        call,
        q=replace(call.q, value=of(call.q.value)),
        k=replace(call.k, value=of(call.k.value)),
        v=replace(call.v, value=of(call.v.value)),
        visible=call.visible if lengths is None else replace(call.visible, kv_lengths=of(lengths)),
        extras=[replace(extra, value=of(extra.value)) for extra in call.extras],
        past=call.past and (of(call.past[0]), of(call.past[1])),
        packed=call.packed and (of(call.packed[0]), call.packed[1]),
    )


def _with_axis(op: Any, value: ir.Value) -> Any:
    """A tensor with one more axis of size 1 before all others."""
    return op.Reshape(value, op.Concat(constant(op, [1]), op.Shape(value), axis=0))


HIDDEN = -1e38
"""What is added to a score in the place of a model's own finite number: any score is lost in it, and three of them are
no infinity, so that a query whose keys are all hidden averages all values, as the model does."""


def _beside(op: Any, call: Call) -> dict[str, Any]:
    """The plugin's bias and mask, one tensor each, of all that the model adds and hides; and its sinks."""
    sinks = {extra.feature: extra.value for extra in call.extras if extra.feature == "sinks"}
    extras = [replace(extra, value=_broadcast_to_scores(op, extra)) for extra in call.extras]
    added = [extra for extra in extras if extra.is_bias]
    parts = [added[0].value] if is_plain(extras) else [_in_float32(op, extra) for extra in added]
    hidden = [extra for extra in extras if extra.feature == "mask" and not extra.is_bias]
    shown = [extra.value if extra.shows else op.Not(extra.value) for extra in hidden]
    joined = {"bias": (op.Add, parts), "mask": (op.And, shown)}
    return {name: reduce(together, values) for name, (together, values) in joined.items() if values} | sinks


def _broadcast_to_scores(op: Any, extra: Extra) -> Any:
    """A bias or mask with its axes where the plugin's scores have them: batch, heads, queries, keys."""
    if extra.feature == "sinks" or extra.order == "bhsk"[4 - len(extra.order) :]:
        return extra.value
    known = sorted(extra.order, key="bhsk".index)
    value = _transposed(op, extra.value, extra.order, "".join(known))
    sizes, kind = op.Shape(value), extra.value.dtype
    each = iter([op.Slice(sizes, *(constant(op, [at]) for at in (axis, axis + 1, 0))) for axis in range(len(known))])
    whole = [next(each) if axis in known else constant(op, [1]) for axis in "bhsk"["bhsk".index(known[0]) :]]
    made = op.Reshape(value, op.Concat(*whole, axis=0)) if len(whole) > 1 else value
    made.dtype = kind
    return made


def _in_float32(op: Any, extra: Extra) -> Any:
    """What is added to the scores."""
    if extra.feature == "mask":
        nothing, lowest = scalar(op, 0.0), scalar(op, HIDDEN)
        return op.Where(extra.value, *((nothing, lowest) if extra.shows else (lowest, nothing)))
    value = extra.value
    if value.dtype != ir.DataType.FLOAT:
        value = op.Cast(value, to=int(ir.DataType.FLOAT))
    return value if extra.factor == 1 else op.Mul(value, scalar(op, extra.factor))


_PERMUTATIONS = {"bhsd", "bshd", "sbhd", "hbsd", "bhds", "bdhs"}


def laid_as(op: Any, laid: Laid, layout: str) -> Any:
    """A tensor in the plugin's layout, ``bhsd`` or ``bshd``."""
    value, order = laid.value, laid.order
    heads, size = laid.sizes[1].number or 1, laid.sizes[3].number or 1
    if len(order) == 3 and order != "bsH":  # one head, which has no axis
        value, order = _transposed(op, value, order, "bsd"), "bsH"
    if order == "bsH":
        whole = heads * size
        if laid.part:
            value = _part(op, value, laid.first, whole)
        value, order = _reshaped(op, value, [0, 0, heads, size]), _ROWS_FIRST
    return _transposed(op, value, order, layout)


def _laid_out(op: Any, out: ir.Value, order: str, wanted: str, problem: Problem) -> Any:
    """The result as the model has it; ``Bsd`` is with the heads within the batch."""
    if wanted == "Bsd":
        value = _transposed(op, out, order, _HEADS_FIRST)
        sizes = op.Slice(op.Shape(value), *(constant(op, [number]) for number in (2, 4, 0)))
        return op.Reshape(value, op.Concat(constant(op, [-1]), sizes, axis=0))
    if wanted == "bsH" or len(wanted) == 3:
        value = _transposed(op, out, order, _ROWS_FIRST)
        value = _reshaped(op, value, [0, 0, problem.num_heads * problem.v_size])
        return value if wanted == "bsH" else _transposed(op, value, "bsd", wanted)
    return _transposed(op, out, order, wanted)


def _transposed(op: Any, value: ir.Value, order: str, wanted: str) -> Any:
    if order == wanted:
        return value
    return op.Transpose(value, perm=[order.index(axis) for axis in wanted])


def constant(op: Any, numbers: Sequence[int]) -> Any:
    """A constant INT64 vector."""
    return op.Constant(value=ir.tensor(np.asarray(numbers, np.int64)))


def length(op: Any, value: ir.Value, axis: int) -> Any:
    """One size of a tensor, INT64 [1]."""
    return op.Gather(op.Shape(value), constant(op, [axis]), axis=0)


def scalar(op: Any, number: float) -> Any:
    """A constant FLOAT of no axes."""
    return op.Constant(value=ir.tensor(np.float32(number)))


def _reshaped(op: Any, value: ir.Value, shape: Sequence[int]) -> Any:
    """Reshape; 0 keeps a size."""
    return op.Reshape(value, constant(op, shape))


def _part(op: Any, value: ir.Value, first: int, count: int) -> Any:
    return op.Slice(value, *(constant(op, [number]) for number in (first, first + count, 2)))


def _int32(op: Any, value: ir.Value) -> Any:
    return value if value.dtype == ir.DataType.INT32 else op.Cast(value, to=int(ir.DataType.INT32))


def _written(sizes: tuple[Size, Size, Size, Size], order: str) -> ir.Shape:
    """A shape in ONNX's form; what has no number and no name of its own is unknown."""
    by_name = dict(zip("bhsd", sizes, strict=True))
    return ir.Shape([written(by_name[axis]) for axis in order])


def written(size: Size) -> int | str | None:
    """A size as a number, or as an expression of names; None where it has no name."""
    if size.number is not None:
        return size.number
    return None if any(name.startswith(("<", "@")) for name in size.symbols) else str(size)
