"""What is known of a graph's values before it runs: shapes, and the contents of small tensors, by symbols.

ONNX's own shape inference forgets what a size is made of (it answers "unk__3" for past + seq), and that is the very
thing which proves that a mask is aligned to the last key. So sizes are followed here through the handful of operators
that compute shapes; for all others its answer stands.
"""

from typing import Any

import onnx_ir as ir

from pyfmha.onnx.bodies import carried, is_followed, subgraphs, ways_to, weakened
from pyfmha.onnx.content_rules import CONTENTS
from pyfmha.onnx.contrib_shapes import CONTRIB
from pyfmha.onnx.shape_rules import ARITHMETIC, BROADCAST, SAME_SHAPE, SHAPES, TYPED_OTHERWISE
from pyfmha.onnx.sizes import Size, dimension
from pyfmha.onnx.tensors import STANDARD, Content, Shape, broadcast, constant, objects

SMALL = 64
"""Elements of the largest tensor whose contents are followed: shapes, axes, scales, splits."""


_SUM = {"SkipLayerNormalization": 3, "SkipSimplifiedLayerNormalization": 3}


class Facts:
    """Shapes and contents of the values of a graph, found once from its inputs to its outputs.

    Args:
        graph: its nodes in an order in which they can run.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._shapes: dict[ir.Value, Shape | None] = {}
        self._contents: dict[ir.Value, Content] = {}
        self._round = False
        for value in graph.inputs:
            self._learn_source(value)
        self._learn_graph(graph)

    # ------------------------------------------------------------------ answers

    def shape(self, value: ir.Value) -> Shape | None:
        """A size an axis; None where not even their number is known."""
        if value not in self._shapes:
            self._learn_source(value)
        return self._shapes[value]

    def content(self, value: ir.Value | None) -> Content | None:
        """The elements of a small tensor; None where they are not all known."""
        if value is None:
            return None
        if value not in self._shapes:
            self._learn_source(value)
        return self._contents.get(value)

    def numbers(self, value: ir.Value | None) -> list[int] | None:
        """The whole numbers in a small tensor, in order; None where one is not known."""
        content = self.content(value)
        found = [element.number if isinstance(element, Size) else None for element in _flat(content)]
        return None if content is None or None in found else [number for number in found if number is not None]

    def scalar(self, value: ir.Value | None) -> float | None:
        """The number in a tensor of one element; None for others."""
        content = self.content(value)
        if content is None or content.size != 1:
            return None
        (element,) = content.flat
        return _float(element)

    def adopt(self, value: ir.Value, like: ir.Value) -> None:
        """A value takes another's place: what is known of that holds for it."""
        self._shapes[value] = self._shapes.get(like)

    def learn(self, value: ir.Value, shape: Shape) -> None:
        """A value that no node of the graph gives is of this shape."""
        self._shapes[value] = shape

    # ------------------------------------------------------------------ learning

    def _learn_graph(self, graph: ir.Graph) -> None:
        for node in graph:
            for value in node.inputs:
                if value is not None and value not in self._shapes:
                    self._learn_source(value)
            if is_followed(node):
                self._learn_bodies(node)
            self._learn(node)

    def _learn_bodies(self, node: ir.Node) -> None:
        """The graphs of an If or a Loop. Of a value that goes round holds what is still so after a time round."""
        rounds, outside = carried(node), self._round
        assumed = {within: None if first is None else self.shape(first) for first, within, _ in rounds}
        # What a body declares may be another size each time round: only its numbers are taken.
        self._round = outside or node.op_type == "Loop"
        while True:
            self._shapes.update(assumed)
            for graph in subgraphs(node):
                self._learn_graph(graph)
            kept = {within: weakened(assumed[within], self.shape(after), within) for _, within, after in rounds}
            if kept == assumed:
                break
            assumed = kept
        self._round = outside

    def _learn_source(self, value: ir.Value) -> None:
        """What is known of an input, an initializer or a value of an outer graph."""
        self._shapes[value] = self._declared(value)
        if value.const_value is not None and value.const_value.size > SMALL:
            return  # large weights are not even opened
        array = constant(value)
        if array is not None:
            self._keep(value, array)

    def _learn(self, node: ir.Node) -> None:
        _pass_type(node)
        for index, value in enumerate(node.outputs):
            declared, own = self._declared(value), self._shape_of(node, index)
            self._shapes[value] = _merged(own, declared)
        content = self._content_of(node)
        self._contents.pop(node.outputs[0], None)  # of an earlier time round
        if content is not None and content.size <= SMALL:
            self._contents[node.outputs[0]] = content
            self._shapes[node.outputs[0]] = tuple(map(Size.of, content.shape))

    def _declared(self, value: ir.Value) -> Shape | None:
        shape = _declared(value)
        if shape is None or not self._round:
            return shape
        return tuple(
            size if size.number is not None else Size.of(f"<{value.name}.{axis}>") for axis, size in enumerate(shape)
        )

    def _keep(self, value: ir.Value, array: Any) -> None:
        if array.size > SMALL or array.dtype.kind not in "iufb":
            return
        whole = array.dtype.kind in "iub"
        flat = [Size.of(int(x)) if whole else float(x) for x in array.reshape(-1)]
        self._contents[value] = objects(flat, array.shape)

    def _shape_of(self, node: ir.Node, index: int) -> Shape | None:
        if is_followed(node):
            ways = ways_to(node, index)
            return weakened(self.shape(ways[0]), self.shape(ways[1]), node.outputs[index]) if len(ways) == 2 else None
        if node.op_type in SAME_SHAPE:
            # Of ONNX Runtime's fused normalisations the last output is the sum that is normalised.
            return self.input_shape(node, 0) if index in (0, _SUM.get(node.op_type, 0)) else None
        if node.op_type in BROADCAST:
            return self._broadcast(node)
        rules = CONTRIB if node.domain == "com.microsoft" else SHAPES if node.domain in STANDARD else {}
        rule = rules.get(node.op_type)
        return None if rule is None else rule(self, node, index)

    def _content_of(self, node: ir.Node) -> Content | None:
        if node.domain not in STANDARD:
            return None
        if node.op_type == "Constant":
            array = constant(node.outputs[0])
            if array is not None:
                self._keep(node.outputs[0], array)
            return self._contents.get(node.outputs[0])
        rule = CONTENTS.get(node.op_type)
        return None if rule is None else rule(self, node)

    def input_shape(self, node: ir.Node, index: int) -> Shape | None:
        """The shape of one input of a node; None also where it has no such input."""
        value = node.inputs[index] if index < len(node.inputs) else None
        return None if value is None else self.shape(value)

    def _broadcast(self, node: ir.Node) -> Shape | None:
        shapes = [self.shape(value) for value in node.inputs if value is not None]
        known = [shape for shape in shapes if shape is not None]
        if len(known) < len(shapes) or not known:
            return None
        return broadcast(known, node.outputs[0].name or "")


def _pass_type(node: ir.Node) -> None:
    """Name the type of a result that ONNX does not infer, behind an operator that it does not know."""
    source = node.inputs[0] if node.inputs else None
    kind = None if source is None else source.dtype
    moved = node.op_type in SHAPES or node.op_type in SAME_SHAPE or node.op_type in ARITHMETIC
    if kind is None or not (moved or node.op_type in CONTRIB) or node.op_type in TYPED_OTHERWISE:
        return
    typed = {0, 1, 2} if node.op_type in CONTRIB else {0, _SUM.get(node.op_type, 0)}
    for index in typed & set(range(len(node.outputs))):
        if node.outputs[index].dtype is None:
            node.outputs[index].dtype = kind


def _declared(value: ir.Value) -> Shape | None:
    if value.const_value is not None and value.shape is None:
        return tuple(map(Size.of, value.const_value.shape.numpy()))
    if value.shape is None:
        return None
    return tuple(
        dimension(size if isinstance(size, int) else size.value, f"<{value.name}.{axis}>")
        for axis, size in enumerate(value.shape)
    )


def _merged(own: Shape | None, declared: Shape | None) -> Shape | None:
    """What was found here, but the model's number where it has one, and its symbol where nothing was found."""
    if own is None or declared is None or len(own) != len(declared):
        return declared if own is None else own
    unknown = [any(name.startswith("<") for name in size.symbols) for size in own]
    return tuple(
        theirs if theirs.number is not None or (vague and not any(n.startswith("<") for n in theirs.symbols)) else mine
        for mine, theirs, vague in zip(own, declared, unknown, strict=True)
    )


def _flat(content: Content | None) -> list[Any]:
    return [] if content is None else list(content.flat)


def _float(element: Any) -> float | None:
    if isinstance(element, Size):
        return None if element.number is None else float(element.number)
    return float(element)
