"""Nodes that were added for one attention and for the next alike: positions, lengths, places in a cache, constants."""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RULE_NAME_TAG

from pyfmha.onnx.tensors import STANDARD


def share(graph: ir.Graph) -> None:
    """Let nodes that the rewriting added be there once. Those of the model stay as they are.

    Args:
        graph: its nodes in an order in which they can run.
    """
    known: dict[Any, ir.Node] = {}
    for node in list(graph):
        key = _key(node)
        if key is None:
            continue
        first = known.setdefault(key, node)
        if first is not node and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(first.outputs[0])
            graph.remove(node, safe=True)


def _key(node: ir.Node) -> Any:
    """What makes a node the same as another; None for those that are not shared."""
    if RULE_NAME_TAG not in node.metadata_props or node.domain not in STANDARD or len(node.outputs) != 1:
        return None
    settings: list[Any] = []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR:
            array = attribute.as_tensor().numpy()
            settings.append((name, str(array.dtype), array.shape, array.tobytes()))
        else:
            settings.append((name, str(attribute.value)))
    return node.op_type, tuple(node.inputs), tuple(settings)
