"""Where Q, K and V really lie: transposes, reshapes, splits and repeated heads before a product are looked through."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from pyfmha.onnx.calls import Laid
from pyfmha.onnx.facts import Facts
from pyfmha.onnx.masks import BATCH, HEAD
from pyfmha.onnx.sizes import Size
from pyfmha.onnx.tensors import STANDARD, Shape, attribute, constant
from pyfmha.onnx.views import Bounds, moved

DEPTH = "d"


@dataclass(frozen=True)
class Operand:
    """A factor of a product, found through scales and casts.

    Attributes:
        laid: the deepest tensor that is laid in a way that can be written down and holds nothing else.
        scale: what it was multiplied with on the way.
        part: the deepest tensor of which it is a part, as Q is of packed Q, K and V; or none.
        above: one that is less deep; or none.
    """

    laid: Laid
    scale: float = 1.0
    part: "Operand | None" = None
    above: "Operand | None" = None


def operand(facts: Facts, value: ir.Value, axes: str, heads: Size, row: str, bounds: Bounds) -> Operand:
    """Find the tensor that an operand of a product is taken from.

    Args:
        facts: of the graph.
        value: the operand.
        axes: what its axes are, in order, of ``b h s d``.
        heads: of Q; where the operand has fewer after looking through repeats, each serves as many in a row.
        row: the index symbol of its rows.
        bounds: of the index symbols; more are added.

    Returns:
        Where it really lies.
    """
    given, shape = value, facts.shape(value)
    assert shape is not None
    symbols = {"b": BATCH, "h": HEAD, "s": row, "d": DEPTH}
    sizes = {"h": Size.of(1), **{name: shape[axis] for axis, name in enumerate(axes)}}
    index = tuple(Size() if sizes[name].number == 1 else Size.of(symbols[name]) for name in axes)
    kind, scale, best, part = value.dtype, 1.0, None, None
    while True:
        if value.dtype == kind:
            laid = _laid(facts, value, index, sizes, row, bounds)
            if laid is not None and not laid.part:
                best = Operand(laid, scale, above=best)
            elif laid is not None:
                part = Operand(laid, scale)
        step = _scaled(facts, value)
        if step is not None:
            # What multiplies before a product may be looked through; what it reads must be of the operand's shape.
            value, scale = step[0], scale * step[1]
            continue
        further = moved(facts, value, index, bounds) or _picked_heads(facts, value, index, bounds)
        if further is None:
            break
        value, index = further
    if best is None:
        best = Operand(Laid(given, axes, (sizes["b"], sizes["h"], sizes["s"], sizes["d"])))
    return replace(best, part=part)


def alike(k: Operand, v: Operand) -> tuple[Operand, Operand]:
    """The deepest tensors of K and V that have as many heads."""
    first: Operand | None = k
    while first is not None:
        second: Operand | None = v
        while second is not None:
            if first.laid.sizes[1] == second.laid.sizes[1] and second.scale == 1:
                return replace(first, part=k.part), replace(second, part=v.part)
            second = second.above
        first = first.above
    return k, v


def _scaled(facts: Facts, value: ir.Value) -> tuple[ir.Value, float] | None:
    """The tensor that a value is a multiple of, and the factor."""
    node = value.producer()
    if node is None or node.domain not in STANDARD or node.op_type not in ("Mul", "Div"):
        return None
    inputs = [x for x in node.inputs if x is not None]
    for at, (factor, rest) in enumerate((inputs[::-1], inputs)):
        number = facts.scalar(factor)
        if number is None or facts.shape(rest) != facts.shape(value):
            continue
        if node.op_type == "Mul":
            return rest, number
        if at == 0 and number:
            return rest, 1 / number
    return None


def with_heads(found: Operand, heads: Size) -> Operand:
    """The deepest tensor that has all heads: Q, of which each head is a result, may not be grouped."""
    first: Operand | None = found
    while first is not None:
        if first.laid.sizes[1] == heads:
            return replace(first, part=found.part)
        first = first.above
    return found


def is_float(value: ir.Value) -> bool:
    """Whether a value is of a type of floating point that models are computed in."""
    return value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def _picked_heads(facts: Facts, value: ir.Value, index: Shape, bounds: Bounds) -> tuple[ir.Value, Shape] | None:
    """A Gather that repeats heads: constant indices 0 0 1 1."""
    node = value.producer()
    if node is None or node.op_type != "Gather" or node.domain not in STANDARD or node.inputs[0] is None:
        return None
    from pyfmha.onnx.patterns import element

    indices, shape = constant(node.inputs[1]), facts.shape(node.inputs[0])
    if indices is None or indices.ndim != 1 or shape is None or indices.size < 2:
        return None
    axis = attribute(node, "axis", 0) % len(shape)
    at = element(indices, (index[axis],), bounds, "")
    if not isinstance(at, Size):
        return None
    return node.inputs[0], (*index[:axis], at, *index[axis + 1 :])


def _laid(facts: Facts, value: ir.Value, index: Shape, sizes: dict[str, Size], row: str, bounds: Bounds) -> Laid | None:
    """A tensor as one that is laid in a known way, by the index of its elements."""
    shape = facts.shape(value)
    if shape is None or len(shape) != len(index):
        return None
    head = _heads(index, sizes["h"], bounds)
    if head is None:
        return None
    symbol, heads = head
    symbols = {"b": Size.of(BATCH), "h": Size.of(symbol), "s": Size.of(row), "d": Size.of(DEPTH)}
    symbols = {name: Size() if sizes[name].number == 1 and name != "h" else of for name, of in symbols.items()}
    if heads.number == 1:
        symbols["h"] = Size()
    result = sizes["b"], heads, sizes["s"], sizes["d"]
    if len(index) == 4:
        order = _order(index, shape, symbols, dict(zip("bhsd", result, strict=True)))
        return None if order is None else Laid(value, order, result)
    rows = all(index[axis] == symbols[name] and shape[axis] == sizes[name] for axis, name in enumerate("bs"))
    if len(index) == 3 and rows:
        first = index[2] - symbols["h"] * sizes["d"] - symbols["d"]
        whole = heads * sizes["d"]
        if first.number is not None and shape[2].number is not None and (shape[2] - first - whole).at_least_0({}):
            return Laid(value, "bsH", result, first.number, part=shape[2] != whole)
    return None


def _heads(index: Shape, heads: Size, bounds: Bounds) -> tuple[str, Size] | None:
    """The symbol that counts the heads in an index, and how many there are."""
    used = {name for at in index for name in at.symbols if name.partition("//")[0].partition("%")[0] == HEAD}
    if not used:
        # One head that is broadcast to all, or only one there.
        return HEAD, Size.of(1)
    if len(used) > 1:
        return None
    (name,) = used
    if name == HEAD:
        return name, heads
    return (name, bounds[name]) if name.startswith(f"{HEAD}//") and name.count("/") == 2 and "%" not in name else None


def _order(index: Shape, shape: Shape, symbols: dict[str, Size], sizes: dict[str, Size]) -> str | None:
    """The order of four axes; axes of size 1 may stand anywhere."""
    order: list[str | None] = [None] * 4
    open_names = []
    for name in "bhsd":
        at = [axis for axis in range(4) if index[axis] == symbols[name] and symbols[name] != Size()]
        if len(at) == 1 and shape[at[0]] == sizes[name]:
            order[at[0]] = name
        elif symbols[name] == Size() and sizes[name].number == 1:
            open_names.append(name)
        else:
            return None
    free = [axis for axis in range(4) if order[axis] is None]
    if len(free) != len(open_names) or any(shape[axis].number != 1 or index[axis].number != 0 for axis in free):
        return None
    return _filled(order, free, open_names)


def _filled(order: Sequence[str | None], free: list[int], names: list[str]) -> str:
    """Names for the axes of size 1: those that make a known order, if one does."""
    for known in ("bhsd", "bshd"):
        if all(name in (None, known[axis]) for axis, name in enumerate(order)):
            return known
    result = list(order)
    for axis, name in zip(free, names, strict=True):
        result[axis] = name
    return "".join(name or "" for name in result)


def packed(q: Operand, k: Operand, v: Operand, facts: Facts, scale: float) -> tuple[ir.Value, float] | None:
    """The tensor that Q, K and V are the parts of, in this order and with nothing else in it; and the scale then."""
    parts = [found.part for found in (q, k, v)]
    first, second, third = parts
    if first is None or second is None or third is None or third.scale != 1:
        return None
    # What the plugin is created with follows from Q, K and V as they are laid: the parts must be of the same sizes.
    if any(part is None or part.laid.sizes != found.laid.sizes for part, found in zip(parts, (q, k, v), strict=True)):
        return None
    laids = first.laid, second.laid, third.laid
    heads, kv_heads, size = q.laid.sizes[1].number, k.laid.sizes[1].number, q.laid.sizes[3].number
    shape = facts.shape(laids[0].value)
    if heads is None or kv_heads is None or size is None or shape is None or len({id(x.value) for x in laids}) > 1:
        return None
    firsts, columns = [0, heads * size, (heads + kv_heads) * size], (heads + 2 * kv_heads) * size
    alike = k.laid.sizes == v.laid.sizes and k.laid.sizes[2:] == q.laid.sizes[2:]
    if not alike or shape[2].number != columns or [x.first for x in laids] != firsts:
        return None
    return laids[0].value, scale * first.scale * second.scale
