"""From a product with V back to the Softmax that its weights come from."""

import onnx_ir as ir

from pyfmha.onnx.calls import LeftAloneError
from pyfmha.onnx.facts import Facts
from pyfmha.onnx.laid import is_float
from pyfmha.onnx.lifted import is_joined
from pyfmha.onnx.tensors import STANDARD, attribute


def softmax_of(facts: Facts, value: ir.Value | None) -> tuple[ir.Node, bool] | None:
    """The Softmax over the last axis that a factor comes from, through casts, and whether NaN rows become zeros.

    Raises:
        LeftAloneError: something else reads the weights, too: replaced, attention would be computed twice. Or their
            shape is not known.
    """
    guarded, given = False, value
    for _ in range(8):
        node = None if value is None else value.producer()
        if node is None or node.domain not in STANDARD:
            return None
        if node.op_type == "Softmax":
            shape = facts.shape(node.outputs[0])
            if shape is None:
                raise LeftAloneError("the shape of its scores is not known")
            if not _last_axis(node, len(shape)):
                return None
            _check_readers(given, value)
            return node, guarded
        if node.op_type in ("Cast", "Identity") or (node.op_type == "Dropout" and _inference(facts, node)):
            value = node.inputs[0]
            if value is None or not is_float(value):  # whole numbers between: weights that are quantised
                return None
        elif node.op_type == "Reshape" and _comes_from_softmax(node.inputs[0]):
            value = node.inputs[0]
            before, after = None if value is None else facts.shape(value), facts.shape(node.outputs[0])
            if not is_joined(before, after) and (before is None or before != after):
                raise LeftAloneError("its attention weights are reshaped between Softmax and the second product")
        elif node.op_type == "Where" and (kept := _without_nan(facts, node)) is not None:
            value, guarded = kept, True
        else:
            return None
    return None


def _comes_from_softmax(value: ir.Value | None) -> bool:
    """Whether a value is a Softmax's result, cast or dropped out of."""
    for _ in range(4):
        node = None if value is None else value.producer()
        if node is None or node.op_type not in ("Softmax", "Cast", "Identity", "Dropout"):
            return False
        if node.op_type == "Softmax":
            return node.domain in STANDARD
        value = node.inputs[0]
    return False


def _check_readers(value: ir.Value | None, end: ir.Value | None) -> None:
    """From the last product back to Softmax, whether each value has no other reader."""
    allowed = 1
    while value is not None:
        if value.is_graph_output() or len(value.uses()) > allowed:
            raise LeftAloneError(f"its attention weights {value.name} are read by something else, too")
        node = value.producer()
        if value is end or node is None:
            return
        allowed = 2 if node.op_type == "Where" else 1  # the guard against NaN reads twice
        value = node.inputs[2] if node.op_type == "Where" else node.inputs[0]


def _last_axis(node: ir.Node, rank: int) -> bool:
    version = node.version or (node.graph.opset_imports.get("", 13) if node.graph is not None else 13)
    axis = attribute(node, "axis", -1 if version >= 13 else 1)
    return bool(axis % rank == rank - 1)


def _inference(facts: Facts, node: ir.Node) -> bool:
    """Whether a Dropout does nothing: the mode of training is its third input."""
    training = node.inputs[2] if len(node.inputs) > 2 else None
    return training is None or facts.scalar(training) == 0


def _without_nan(facts: Facts, node: ir.Node) -> ir.Value | None:
    """``Where(IsNaN(x), 0, x)``: x."""
    condition, yes, no = node.inputs
    test = None if condition is None else condition.producer()
    if test is None or test.op_type != "IsNaN" or test.inputs[0] is not no or facts.scalar(yes) != 0:
        return None
    return no
