"""Attention as exporters decompose it: a product, scales, a soft cap, masks, Softmax, and a product with V."""

from dataclasses import dataclass, field, replace

import onnx_ir as ir

from pyfmha.onnx import masks
from pyfmha.onnx.calls import DTYPES, Call, Extra, Laid, LeftAloneError
from pyfmha.onnx.elements import Elements
from pyfmha.onnx.facts import Facts
from pyfmha.onnx.formulas import as_number, mapped, multiplied, negated_element
from pyfmha.onnx.laid import DEPTH, Operand, alike, is_float, operand, packed, with_heads
from pyfmha.onnx.lifted import Lift, is_joined, lifted
from pyfmha.onnx.masks import BATCH, HEAD, KEY, QUERY, Seen
from pyfmha.onnx.products import PRODUCTS, Product, product_of
from pyfmha.onnx.regrouped import Regrouped, nodes_before, regrouped
from pyfmha.onnx.sizes import Size
from pyfmha.onnx.tensors import STANDARD, Shape, constant
from pyfmha.onnx.weights import softmax_of


@dataclass
class Scores:
    """What is done to Q K^T before Softmax.

    Attributes:
        product: Q K^T.
        scale: factor of the scores before a soft cap, and of everything without one.
        softcap: 0 for none.
        added: values that are added, and what they were multiplied with since.
        hidden: masks by Where: the condition, whether it shows a key, and the number that hides.
        of_rows: what all scores of a query are multiplied with, as Swin v2's of each head are.
        regrouped: where masks were added to scores of another shape.
        lifts: tensors whose heads lie within the batch.
    """

    product: Product
    scale: float = 1.0
    softcap: float = 0.0
    added: list[tuple[ir.Value, float]] = field(default_factory=list)
    hidden: list[tuple[ir.Value, bool, float]] = field(default_factory=list)
    of_rows: list[ir.Value] = field(default_factory=list)
    regrouped: list[Regrouped] = field(default_factory=list)
    lifts: list[Lift] = field(default_factory=list)


def read(facts: Facts, node: ir.Node) -> Call | None:
    """Understand the attention that ends with a node.

    Args:
        facts: of the graph.
        node: any node.

    Returns:
        The attention, or None where the node is not the product of a Softmax and something.

    Raises:
        LeftAloneError: it is, but it is not proven to be attention as the plugin computes it.
    """
    if node.op_type not in PRODUCTS or len(node.inputs) != 2:
        return None
    softmax, swapped = softmax_of(facts, node.inputs[0]), False
    if softmax is None and node.op_type == "Einsum":
        softmax, swapped = softmax_of(facts, node.inputs[1]), True
    if softmax is None:
        return None
    final = product_of(node, facts)
    if final is None:
        raise LeftAloneError("its last product is not known to be one of tensors of three or four axes")
    if swapped:
        final = Product(final.right, final.left, final.right_axes, final.left_axes, final.out_axes)
    scores = scores_of(facts, softmax[0].inputs[0])
    if scores is None:
        raise LeftAloneError("what goes into its Softmax is no product of Q and K with scales and masks")
    before, after = facts.shape(scores.product.result or node.outputs[0]), facts.shape(softmax[0].outputs[0])
    if before is None or before != after:
        raise LeftAloneError("it is not proven that its masks leave the shape of the scores as it is")
    if after is None or len(after) != 4 or (final.left_axes, final.right_axes) != ("bmk", "bkn"):
        return _call(facts, node, final, scores, softmax[1])
    # The weights are joined between Softmax and here.
    values = lifted(facts, final.right, after[1].number or 0, scores.lifts)
    final = replace(final, right=values, left_axes="bhmk", right_axes="bhkn", out_axes="bhmn")
    return replace(_call(facts, node, final, scores, softmax[1]), out_order="Bsd")


def scores_of(facts: Facts, value: ir.Value | None, depth: int = 0) -> Scores | None:
    """Follow scores back to the product; None where they do not come from one.

    Raises:
        LeftAloneError: they do, by a step that is not understood.
    """
    node = None if value is None else value.producer()
    if node is None or depth > 24:
        return None
    product = product_of(node, facts)
    if product is not None:
        constants = [constant(side) is not None for side in (product.left, product.right)]
        return None if any(constants) else Scores(product, scale=product.factor)
    if node.domain not in STANDARD:
        return None
    if node.op_type in ("Cast", "Identity"):
        return scores_of(facts, node.inputs[0], depth + 1) if is_float(node.inputs[0] or node.outputs[0]) else None
    rule = {
        "Mul": _multiplied,
        "Div": _multiplied,
        "Add": _added,
        "Sub": _added,
        "Where": _hidden,
        "Reshape": _back,
    }.get(node.op_type)
    return None if rule is None else rule(facts, node, depth + 1)


def _multiplied(facts: Facts, node: ir.Node, depth: int) -> Scores | None:
    left, right = node.inputs
    for value, factor in ((left, right), (right, left)):
        number = facts.scalar(factor)
        if number is None or (node.op_type == "Div" and (factor is left or not number)):
            continue
        number = 1 / number if node.op_type == "Div" else number
        producer = None if value is None else value.producer()
        if producer is not None and producer.op_type == "Tanh":
            return _capped(facts, producer, number, depth)
        found = scores_of(facts, value, depth)
        if found is None:
            return None
        if found.softcap:
            raise LeftAloneError("its scores are scaled after the soft cap")
        found.scale *= number
        found.added = [(mask, factor * number) for mask, factor in found.added]
        found.hidden = [(condition, shown, hides * number) for condition, shown, hides in found.hidden]
        return found
    return _multiplied_by_row(facts, node, depth) if node.op_type == "Mul" else None


def _multiplied_by_row(facts: Facts, node: ir.Node, depth: int) -> Scores | None:
    """Scores times a tensor that is the same for all keys: so is Q then."""
    left, right = node.inputs
    for value, factor in ((left, right), (right, left)):
        found = scores_of(facts, value, depth)
        if found is None or factor is None:
            continue
        shape, product = facts.shape(factor), found.product
        if shape is None or not shape or shape[-1].number != 1:
            raise LeftAloneError(f"its scores are multiplied with {factor.name}, which is not proven one for all keys")
        if found.softcap or found.added or found.hidden:
            raise LeftAloneError(f"its scores are multiplied with {factor.name} after a soft cap or a mask")
        if product.left_axes[:-1] != product.out_axes[:-1] or product.left.dtype != factor.dtype:
            raise LeftAloneError(f"its scores are multiplied with {factor.name}, which does not fit Q")
        found.of_rows.append(factor)
        return found
    return None


def _capped(facts: Facts, tanh: ir.Node, cap: float, depth: int) -> Scores | None:
    found = scores_of(facts, tanh.inputs[0], depth)
    if found is None:
        return None
    if found.softcap or found.added or found.hidden:
        raise LeftAloneError("its soft cap comes after a mask")
    if cap <= 0:
        raise LeftAloneError(f"its soft cap is {cap:g}")
    # tanh(x * inner) * cap = cap * tanh((x * inner * cap) / cap)
    found.scale, found.softcap = found.scale * cap, cap
    return found


def _added(facts: Facts, node: ir.Node, depth: int) -> Scores | None:
    left, right = node.inputs
    minus = node.op_type == "Sub"
    for value, mask in ((left, right), (right, left))[: 1 if minus else 2]:
        found = scores_of(facts, value, depth)
        if found is not None and mask is not None:
            found.added.append((mask, -1.0 if minus else 1.0))
            return found
    return None


def _back(facts: Facts, node: ir.Node, depth: int) -> Scores | None:
    """A Reshape of scores: of none, as Falcon has it, from heads within the batch, or after something was added."""
    after, before = facts.shape(node.outputs[0]), None if node.inputs[0] is None else facts.shape(node.inputs[0])
    if after is not None and after == before:
        return scores_of(facts, node.inputs[0], depth)
    if is_joined(after, before):
        return _apart(facts, node, depth)
    part = regrouped(facts, node)
    found = None if part is None else scores_of(facts, part.scores, depth)
    if part is None or found is None or found.product.left_axes[0] != found.product.out_axes[0]:
        return None
    found.added += [(made, 1.0) for made, _ in part.added]
    found.regrouped.append(part)
    return found


def _apart(facts: Facts, node: ir.Node, depth: int) -> Scores | None:
    """Scores that get an axis of heads: so have Q, K and masks then."""
    found, shape = scores_of(facts, node.inputs[0], depth), facts.shape(node.outputs[0])
    product = None if found is None else found.product
    if found is None or product is None or shape is None or product.left_axes + product.right_axes != "bmkbkn":
        return None

    def up(value: ir.Value) -> ir.Value:
        return lifted(facts, value, shape[1].number or 0, found.lifts)

    found.product = replace(
        product, left=up(product.left), right=up(product.right), left_axes="bhmk", right_axes="bhkn", out_axes="bhmn",
        result=node.outputs[0],
    )  # fmt: skip
    found.added = [(up(mask), factor) for mask, factor in found.added]
    found.hidden = [(up(condition), shown, hides) for condition, shown, hides in found.hidden]
    found.of_rows = [up(factor) for factor in found.of_rows]
    return found


def _hidden(facts: Facts, node: ir.Node, depth: int) -> Scores | None:
    condition, yes, no = node.inputs
    for value, other, shown in ((yes, no, True), (no, yes, False)):
        number = facts.scalar(other)
        found = None if number is None else scores_of(facts, value, depth)
        if found is not None and condition is not None and number is not None:
            found.hidden.append((condition, shown, number))
            return found
    return None


def _call(facts: Facts, node: ir.Node, final: Product, scores: Scores, guarded: bool) -> Call:
    """As :func:`read`. What multiplies rows of scores multiplies Q, by nodes before the plugin's."""
    q_axes, k_axes, v_axes, out, order = _axes(facts, final, scores.product)
    shapes = [facts.shape(value) for value in (scores.product.left, scores.product.right, final.right)]
    if any(shape is None for shape in shapes):
        raise LeftAloneError("the shapes of Q, K and V are not known")
    named = zip((q_axes, k_axes, v_axes), shapes, strict=True)
    sizes = [{"h": Size.of(1), **dict(zip(axes, shape or (), strict=True))} for axes, shape in named]
    heads = sizes[0]["h"]
    bounds = {BATCH: sizes[0]["b"], HEAD: heads, QUERY: sizes[0]["s"], KEY: sizes[1]["s"], DEPTH: sizes[0]["d"]}
    for name, theirs in zip("KV", sizes[1:], strict=True):
        if theirs["h"] != heads and theirs["h"].number != 1:
            raise LeftAloneError(f"Q has {heads} heads, {name} has {theirs['h']}")
    values = (scores.product.left, scores.product.right, final.right)
    q, k, v = (
        operand(facts, value, axes, heads, row, bounds)
        for value, axes, row in zip(values, (q_axes, k_axes, v_axes), (QUERY, KEY, KEY), strict=True)
    )
    q, (k, v) = with_heads(q, heads), alike(k, v)
    made = scores.product.left
    if scores.of_rows:
        made = ir.Value(name=f"{made.name}_scaled", type=made.type)
        q = Operand(Laid(made, q_axes, (sizes[0]["b"], heads, sizes[0]["s"], sizes[0]["d"])))
    if v.scale != 1:
        sizes_of_v = sizes[2]["b"], sizes[2]["h"], sizes[2]["s"], sizes[2]["d"]
        v = Operand(Laid(final.right, v_axes, sizes_of_v))
    if final.factor != 1:
        raise LeftAloneError("its result is scaled within its second product")
    call = Call(
        node.name or node.outputs[0].name or "",
        q.laid, k.laid, v.laid,
        scale=scores.scale * q.scale * k.scale,
        softcap=scores.softcap,
        out_order=out,
        packed=packed(q, k, v, facts, scores.scale),
        before=nodes_before(facts, scores.product.left, (made, scores.of_rows), scores.regrouped, scores.lifts),
    )  # fmt: skip
    return _masked(facts, call, scores, order, bounds, guarded)


def _axes(facts: Facts, final: Product, first: Product) -> tuple[str, str, str, str, str]:
    """The axes of Q, K, V and the result by ``b h s d``, and those of the scores by ``b h s k``.

    Raises:
        LeftAloneError: the two products do not go together as attention.
    """
    shared = [letter for letter in first.left_axes if letter in first.right_axes]
    summed = [letter for letter in shared if letter not in first.out_axes]
    outer = [letter for letter in shared if letter in first.out_axes]
    rows = [letter for letter in first.left_axes if letter not in shared]
    columns = [letter for letter in first.right_axes if letter not in shared]
    if len(summed) != 1 or len(rows) != 1 or len(columns) != 1 or len(outer) not in (1, 2):
        raise LeftAloneError("its products are not those of attention")
    # The letters of the second product, by where they stand in the scores.
    if len(first.out_axes) != len(final.left_axes):
        raise LeftAloneError("its products are not those of attention")
    names = dict(zip(first.out_axes, final.left_axes, strict=True))
    if first.out_axes[-1] != columns[0] and final.left_axes:
        raise LeftAloneError("its Softmax is not over the keys")
    key, query = names[columns[0]], names[rows[0]]
    depth = [letter for letter in final.right_axes if letter not in final.left_axes]
    if key in final.out_axes or key not in final.right_axes or query in final.right_axes or len(depth) != 1:
        raise LeftAloneError("its second product does not sum over the keys")
    if any(names[letter] not in final.right_axes or names[letter] not in final.out_axes for letter in outer):
        raise LeftAloneError("its second product does not keep batch and heads")
    # The heads are the outer axis whose size is a number, the last one where both are.
    shape = dict(zip(first.left_axes, facts.shape(first.left) or (), strict=False))
    ordered = sorted(outer, key=lambda letter: letter in shape and shape[letter].number is not None)
    mine = dict(zip([*ordered, rows[0], columns[0], summed[0]], [*"bh"[: len(outer)], "s", "s", "d"], strict=True))
    theirs = {names[letter]: name for letter, name in mine.items() if letter in names} | {depth[0]: "d"}
    return (
        "".join(mine[letter] for letter in first.left_axes),
        "".join(mine[letter] for letter in first.right_axes),
        "".join(theirs[letter] for letter in final.right_axes),
        "".join(theirs[letter] for letter in final.out_axes),
        "".join("k" if letter == columns[0] else mine[letter] for letter in first.out_axes),
    )


def _masked(facts: Facts, call: Call, scores: Scores, order: str, bounds: dict[str, Size], guarded: bool) -> Call:
    """With what the masks say, each as a rule, or as a tensor that only the run knows."""
    found = _as_rules(facts, call, scores, order, bounds, guarded, data=False)
    return found or _as_rules(facts, call, scores, order, bounds, guarded, data=True) or call


def _as_rules(
    facts: Facts, call: Call, scores: Scores, order: str, bounds: dict[str, Size], guarded: bool, *, data: bool
) -> Call | None:
    """As :func:`_masked`; with `data` every mask as a tensor. None where a rule that hides by a finite number stands
    beside a tensor: together they are right as tensors alone. So is a rule for which the plugin has no words, unless a
    query may see no key, of which the model makes something else than zeros."""
    elements, seen, extras = Elements(facts, bounds), masks.NOTHING_HIDDEN, []
    kind = scores.product.left.dtype
    dtype = DTYPES.get(kind, "fp32") if kind is not None else "fp32"
    symbols = {"b": BATCH, "h": HEAD, "s": QUERY, "k": KEY}
    index = tuple(Size.of(symbols[axis]) for axis in order)
    sizes = tuple(bounds[symbols[axis]] for axis in order)
    for value, factor in scores.added:
        at = _mask_index(facts, value, index, sizes)
        try:
            _check_rule(data)
            element = as_number(elements.at(value, at))
            element = element if factor == 1 else mapped(multiplied, element, factor)
            seen = masks.joined(seen, masks.of_number(element, dtype))
        except LeftAloneError as why:
            axes = order[len(order) - len(at) :]
            extras.append(Extra("bias", value, str(why), factor=factor, order=axes))
    for condition, shown, hides in scores.hidden:
        hidden = masks.of_number(hides, dtype)
        if hidden.condition is not False:
            raise LeftAloneError("its mask writes 0 in the place of scores, which hides no key")
        at = _mask_index(facts, condition, index, sizes)
        try:
            _check_rule(data)
            element = elements.at(condition, at)
            found = masks.of_condition(element if shown else negated_element(element))
            seen = masks.joined(seen, Seen(found.condition, hidden.finite, hidden.infinite))
        except LeftAloneError as why:
            finite, axes = hidden.finite and not guarded, order[len(order) - len(at) :]
            extras.append(Extra("mask", condition, str(why), shows=shown, finite=finite, order=axes))
    rows, columns = bounds[QUERY], bounds[KEY]
    if extras and not data and seen.condition is not True and (seen.finite or any(extra.finite for extra in extras)):
        return None
    try:
        visible = masks.visible(seen, elements, rows, columns, guarded=guarded)
    except masks.NoWordsError:
        if seen.infinite and not (guarded or masks.every_row_sees(seen, elements, rows, columns)):
            raise
        return None
    return replace(call, visible=visible, extras=extras)


def _check_rule(data: bool) -> None:
    if data:
        raise LeftAloneError("its mask is read as a tensor")


def _mask_index(facts: Facts, value: ir.Value, index: Shape, sizes: Shape) -> Shape:
    """The index into a mask that is broadcast to the scores.

    Raises:
        LeftAloneError: its shape is not known, or not proven to fit.
    """
    shape = facts.shape(value)
    if shape is None or len(shape) > len(index):
        raise LeftAloneError(f"the shape of its mask {value.name} is not known")
    found = []
    for at, size, own in zip(index[len(index) - len(shape) :], sizes[len(index) - len(shape) :], shape, strict=True):
        if own.number != 1 and own != size:
            raise LeftAloneError(f"its mask {value.name} has an axis of size {own} where the scores have {size}")
        found.append(at if own == size else Size())
    return tuple(found)
