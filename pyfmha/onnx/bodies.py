"""Graphs within a graph: the branches of If and the bodies of Loop, and what is known of the values that go round.

The body of a Scan is not followed: it takes slices of its inputs, along axes and in directions of its own.
"""

from collections.abc import Iterator

import onnx_ir as ir

from pyfmha.onnx.sizes import Size
from pyfmha.onnx.tensors import STANDARD, Shape

FOLLOWED = ("If", "Loop")


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The graphs that a node holds."""
    graphs: list[ir.Graph] = []
    for value in node.attributes.values():
        if value.type == ir.AttributeType.GRAPH:
            graphs.append(value.as_graph())
        elif value.type == ir.AttributeType.GRAPHS:
            graphs += value.as_graphs()
    return graphs


def is_followed(node: ir.Node) -> bool:
    """Whether the graphs of a node are read as its own graph is."""
    return node.domain in STANDARD and node.op_type in FOLLOWED


def followed(graph: ir.Graph) -> Iterator[ir.Graph]:
    """A graph, and all in it that are read as it is."""
    yield graph
    for node in graph:
        if is_followed(node):
            for inner in subgraphs(node):
                yield from followed(inner)


def carried(node: ir.Node) -> list[tuple[ir.Value | None, ir.Value, ir.Value]]:
    """Of a Loop the values that go round: before the first time, within the body, and after each time."""
    if node.op_type != "Loop":
        return []
    (body,) = subgraphs(node)
    count = len(node.inputs) - 2
    return list(zip(node.inputs[2:], body.inputs[2:], body.outputs[1 : 1 + count], strict=True))


def ways_to(node: ir.Node, index: int) -> list[ir.Value]:
    """The two values that an output of an If is one of, or of a Loop what went in and what goes round; or none."""
    if node.op_type == "If":
        return [graph.outputs[index] for graph in subgraphs(node)]
    rounds = carried(node)
    found = [*rounds[index][:2]] if index < len(rounds) else []
    return [value for value in found if value is not None]


def weakened(first: Shape | None, after: Shape | None, value: ir.Value) -> Shape | None:
    """What holds of a value that is of one shape or another: an axis that differs is a symbol of its own.

    Args:
        first, after: the shapes, of a value that goes round what it is taken for, and what the body then makes of it.
        value: which names the symbols.
    """
    if first is None or after is None or len(first) != len(after):
        return None
    return tuple(
        mine if mine == theirs else Size.of(f"<{value.name}.{axis}>")
        for axis, (mine, theirs) in enumerate(zip(first, after, strict=True))
    )
