"""The shape of an operator's outputs from the shapes, and for some the contents, of its inputs."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from pyfmha.onnx.sizes import Size, product
from pyfmha.onnx.tensors import Shape, attribute, broadcast, objects

if TYPE_CHECKING:
    from pyfmha.onnx.facts import Facts

SAME_SHAPE = frozenset(
    word
    for line in (
        "Cast CastLike Identity Relu Sqrt Neg Exp Tanh Softmax LogSoftmax LayerNormalization RMSNormalization Erf",
        "Gelu Sigmoid Dropout Not IsNaN CumSum Trilu Clip Reciprocal SimplifiedLayerNormalization",
        "SkipLayerNormalization SkipSimplifiedLayerNormalization BiasGelu FastGelu QuickGelu Cos Sin",
        "RotaryEmbedding Abs Log Floor Ceil ScatterND ScatterElements",
    )
    for word in line.split()
)
BROADCAST = frozenset(
    word
    for line in ("Add Sub Mul Div Pow Where And Or Xor Equal Less LessOrEqual Greater GreaterOrEqual Min Max Mod",)
    for word in line.split()
)
"""Operators whose first output is of the first input's shape, and elementwise ones of several inputs."""

ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Min", "Max"})
TYPED_OTHERWISE = frozenset({"Cast", "CastLike", "Not", "IsNaN", "ConstantOfShape"})
"""Elementwise operators whose result is of the first input's type, and those of the others whose result is not."""


def axes_of(facts: "Facts", node: ir.Node, rank: int) -> list[int] | None:
    """The axes of Squeeze or Unsqueeze, an attribute before opset 13, as indices of a tensor of that rank."""
    axes = attribute(node, "axes", None)
    if axes is None and len(node.inputs) > 1:
        axes = facts.numbers(node.inputs[1])
    return None if axes is None else sorted(axis % rank for axis in axes)


def _transpose(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    shape = facts.input_shape(node, 0)
    if shape is None:
        return None
    order = attribute(node, "perm", None) or range(len(shape))[::-1]
    return tuple(shape[axis] for axis in order)


def _reshape(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    source, target = facts.input_shape(node, 0), facts.content(node.inputs[1])
    if target is None or any(not isinstance(element, Size) for element in target.flat):
        return None
    wanted: list[Size] = list(target.flat)
    if not attribute(node, "allowzero", 0):
        if source is None and any(size.number == 0 for size in wanted):
            return None
        wanted = [source[axis] if source and size.number == 0 else size for axis, size in enumerate(wanted)]
    free = [axis for axis, size in enumerate(wanted) if size.number == -1]
    if free:
        whole = None if source is None else _left_over(source, [size for size in wanted if size.number != -1])
        wanted[free[0]] = Size.of(f"<{node.outputs[0].name}.{free[0]}>") if whole is None else whole
    return tuple(wanted)


def _flatten(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    shape = facts.input_shape(node, 0)
    if shape is None:
        return None
    axis = attribute(node, "axis", 1)
    axis += len(shape) if axis < 0 else 0
    return product(shape[:axis]), product(shape[axis:])


def _reduced(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    shape = facts.input_shape(node, 0)
    if shape is None:
        return None
    axes = axes_of(facts, node, len(shape))
    if axes is None:
        if attribute(node, "noop_with_empty_axes", 0) or (len(node.inputs) > 1 and node.inputs[1] is not None):
            return None
        axes = list(range(len(shape)))
    if attribute(node, "keepdims", 1):
        return tuple(Size.of(1) if axis in axes else size for axis, size in enumerate(shape))
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _left_over(source: Shape, wanted: list[Size]) -> Size | None:
    """The one size that is not given; sizes that are on both sides cancel first, for a sum divides by itself only."""
    mine = list(source)
    for size in list(wanted):
        if size in mine:
            mine.remove(size)
            wanted.remove(size)
    return product(mine).over(product(wanted))


def _unsqueeze(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    shape = facts.input_shape(node, 0)
    raw = attribute(node, "axes", None) or facts.numbers(node.inputs[1] if len(node.inputs) > 1 else None)
    if shape is None or raw is None:
        return None
    rank = len(shape) + len(raw)
    axes, rest = {axis % rank for axis in raw}, iter(shape)
    return tuple(Size.of(1) if axis in axes else next(rest) for axis in range(rank))


def _squeeze(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    shape = facts.input_shape(node, 0)
    axes = None if shape is None else axes_of(facts, node, len(shape))
    if shape is None or axes is None:
        return None
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _expand(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    shape, target = facts.input_shape(node, 0), facts.content(node.inputs[1])
    if shape is None or target is None:
        return None
    return broadcast([shape, tuple(target.flat)], node.outputs[0].name or "")


def _tile(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    shape, repeats = facts.input_shape(node, 0), facts.content(node.inputs[1])
    if shape is None or repeats is None:
        return None
    return tuple(size * times for size, times in zip(shape, repeats.flat, strict=True))


def _concat(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    shapes = [facts.shape(value) for value in node.inputs if value is not None]
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes) or len({len(shape) for shape in known}) != 1:
        return None
    axis = attribute(node, "axis", 0) % len(known[0])
    result = list(known[0])
    for at in range(len(result)):
        sizes = [shape[at] for shape in known]
        if at == axis:
            result[at] = sum(sizes[1:], sizes[0])
        else:
            result[at] = next((size for size in sizes if size.number is not None), sizes[0])
    return tuple(result)


def splits(facts: "Facts", node: ir.Node) -> tuple[int, list[Size]] | None:
    """The axis of a Split and the size of each part."""
    shape = facts.input_shape(node, 0)
    if shape is None:
        return None
    axis = attribute(node, "axis", 0) % len(shape)
    parts = attribute(node, "split", None)
    if parts is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        parts = facts.numbers(node.inputs[1])
        if parts is None:
            return None
    if parts is None:
        even = shape[axis].over(len(node.outputs))
        return None if even is None else (axis, [even] * len(node.outputs))
    return axis, [Size.of(part) for part in parts]


def _split(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    found, shape = splits(facts, node), facts.input_shape(node, 0)
    if found is None or shape is None:
        return None
    axis, parts = found
    return (*shape[:axis], parts[index], *shape[axis + 1 :])


def slices(facts: "Facts", node: ir.Node) -> dict[int, tuple[Size, Size, int]] | None:
    """What a Slice takes of each axis it names: first element, number of elements, step."""
    shape = facts.input_shape(node, 0)
    if shape is None:
        return None
    starts, ends = (facts.content(node.inputs[i]) if len(node.inputs) > i else None for i in (1, 2))
    if len(node.inputs) == 1:  # before opset 10
        starts, ends = (objects([Size.of(x) for x in attribute(node, n, [])], [-1]) for n in ("starts", "ends"))
    if starts is None or ends is None:
        return None
    axes = _optional(facts, node, 3, attribute(node, "axes", list(range(starts.size))))
    steps = _optional(facts, node, 4, [1] * starts.size)
    if axes is None or steps is None:
        return None
    result = {}
    for axis, start, end, step in zip(axes, starts.flat, ends.flat, steps, strict=True):
        size = shape[axis % len(shape)]
        if step < 0 and None not in (numbers := [x.number for x in (start, end, size)]):
            taken = range(*slice(numbers[0], numbers[1], step).indices(numbers[2] or 0))
            result[axis % len(shape)] = (Size.of(taken.start), Size.of(len(taken)), step)
            continue
        first, last = _clamped(start, size), _clamped(end, size)
        if first is None or step < 1:
            return None
        # Where it ends, only its shape depends on: an unknown size, which the model may declare.
        count = Size.of(f"<{node.outputs[0].name}.{axis}>") if last is None else last - first
        if step > 1:
            if count.number is None:
                return None
            count = Size.of(math.ceil(count.number / step))
        if any(factor < 0 for factor in count.terms.values()) and count.number is not None:
            return None
        result[axis % len(shape)] = (first, count, step)
    return result


def _optional(facts: "Facts", node: ir.Node, index: int, default: list[int]) -> list[int] | None:
    return facts.numbers(node.inputs[index]) if len(node.inputs) > index and node.inputs[index] is not None else default


def _clamped(at: Any, size: Size) -> Size | None:
    """A bound of a Slice within the axis, where it can be told that it lies there."""
    if not isinstance(at, Size):
        return None
    if at.number is None:
        # A symbolic bound is one an exporter computed from the sizes: inside if the rest is no negative number.
        inside = at.at_least_0({}) and ((size - at).at_least_0({}) or size.number is not None)
        return at if inside else None
    if at.number < 0:
        return size + at if size.number is None or size.number + at.number >= 0 else Size()
    if size.number is None:
        return size if at.number >= 1 << 31 else at if (size - at).at_least_0({}) or at.number == 0 else None
    return Size.of(min(at.number, size.number))


def _slice(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    found, shape = slices(facts, node), facts.input_shape(node, 0)
    if found is None or shape is None:
        return None
    return tuple(found[axis][1] if axis in found else size for axis, size in enumerate(shape))


def _gather(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    shape, indices = facts.input_shape(node, 0), facts.input_shape(node, 1)
    if shape is None or indices is None:
        return None
    axis = attribute(node, "axis", 0) % len(shape)
    return (*shape[:axis], *indices, *shape[axis + 1 :])


def _gather_elements(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    return facts.input_shape(node, 1)


def matmul(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    left, right = facts.input_shape(node, 0), facts.input_shape(node, 1)
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return None
    outer = broadcast([left[:-2], right[:-2]], node.outputs[0].name or "")
    # ONNX Runtime's FusedMatMul may swap the last two axes of either.
    row, column = (attribute(node, "transA", 0), attribute(node, "transB", 0))
    return (*outer, left[-1 if row else -2], right[-2 if column else -1])


def _einsum(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    left, arrow, out = attribute(node, "equation", "").replace(" ", "").partition("->")
    sizes: dict[str, Size] = {}
    for letters, value in zip(left.split(","), node.inputs, strict=False):
        shape = None if value is None else facts.shape(value)
        if shape is None or len(shape) != len(letters) or not arrow:
            return None
        for letter, size in zip(letters, shape, strict=True):
            sizes[letter] = sizes[letter] if letter in sizes and sizes[letter].number not in (None, 1) else size
    return tuple(sizes[letter] for letter in out)


def _gemm(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    left, right = facts.input_shape(node, 0), facts.input_shape(node, 1)
    if left is None or right is None:
        return None
    return left[attribute(node, "transA", 0)], right[1 - attribute(node, "transB", 0)]


def _of_content(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    content = facts.content(node.inputs[0])
    return None if content is None else tuple(content.flat)


def _range(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    start, limit, delta = (facts.content(value) for value in node.inputs)
    if start is None or limit is None or facts.scalar(node.inputs[2]) != 1 or delta is None:
        return None
    (first,), (last,) = start.flat, limit.flat
    return (last - first,) if isinstance(first, Size) and isinstance(last, Size) else None


def _pad(facts: "Facts", node: ir.Node, index: int) -> Shape | None:
    shape, given = facts.input_shape(node, 0), facts.content(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = node.inputs[3] if len(node.inputs) > 3 else None
    if shape is None or given is None:
        return None
    at = list(range(len(shape))) if axes is None else facts.numbers(axes)
    pads = list(given.flat)
    if at is None or len(pads) != 2 * len(at) or not all(isinstance(pad, Size) for pad in pads):
        return None
    result = list(shape)
    for axis, first, last in zip(at, pads[: len(at)], pads[len(at) :], strict=True):
        result[axis] = result[axis] + first + last
    return tuple(result)


SHAPES: dict[str, Callable[["Facts", ir.Node, int], Shape | None]] = {
    "Transpose": _transpose, "Reshape": _reshape, "Unsqueeze": _unsqueeze, "Squeeze": _squeeze, "Expand": _expand,
    "Tile": _tile, "Concat": _concat, "Split": _split, "Slice": _slice, "Gather": _gather, "MatMul": matmul,
    "Flatten": _flatten, "Einsum": _einsum, "Gemm": _gemm, "ConstantOfShape": _of_content,
    "Range": _range, "GatherElements": _gather_elements, "Pad": _pad,
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"), _reduced),
}  # fmt: skip
