"""Attention of a model replaced by the plugin's node, where that is proven to be the same."""

from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from pyfmha.attention.operator import OPERATOR
from pyfmha.errors import OnnxError
from pyfmha.onnx import contrib, contrib_group, decomposed, standard
from pyfmha.onnx.bodies import followed, is_followed, subgraphs
from pyfmha.onnx.calls import Call, LeftAloneError
from pyfmha.onnx.emit import DOMAIN, emitted, prepared, written
from pyfmha.onnx.facts import Facts
from pyfmha.onnx.report import Found, Report
from pyfmha.onnx.rotary import is_refused, written_out
from pyfmha.onnx.sharing import share
from pyfmha.onnx.tensors import STANDARD, attribute

OLDEST = 11
"""The first opset that is read: Slice and Split of earlier ones are others, and their exporters are long gone."""

_OPERATORS: dict[tuple[str, str], Callable[[Facts, ir.Node], Call]] = {
    ("", "Attention"): standard.read,
    (contrib.DOMAIN, "Attention"): contrib.read_attention,
    (contrib.DOMAIN, "MultiHeadAttention"): contrib.read_multi_head,
    (contrib.DOMAIN, "GroupQueryAttention"): contrib_group.read,
}
_MOST_OUTPUTS = 4
_ROUNDS = 8
"""How often ONNX's shape inference is run again behind operators that it does not know."""
_PRODUCTS = (("", "MatMul"), ("", "Einsum"), (contrib.DOMAIN, "FusedMatMul"))


def replace_attention(model: Any) -> tuple[Any, Report]:
    """Put the plugin's node in the place of every attention of a model that is proven to be the same.

    A node is replaced only where shapes and constants prove that it computes the same for every input. What is left
    alone stands in the report with its reason.

    Args:
        model: an ``onnx.ModelProto`` or an ``onnx_ir.Model``, which stays as it is.

    Returns:
        A new model of the same kind, and the report. Its new nodes are ``TritonFlashAttention`` of domain ``pyfmha``.

    Raises:
        OnnxError: the opset is too old.
    """
    if not isinstance(model, ir.Model):
        result, report = replaced(ir.serde.deserialize_model(model))
        return ir.serde.serialize_model(result), report
    return replaced(model.clone())


def replaced(model: ir.Model) -> tuple[ir.Model, Report]:
    """As :func:`replace_attention`, on the model itself.

    Raises:
        OnnxError: the opset is too old.
    """
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", OLDEST))
    if version < OLDEST:
        raise OnnxError(f"the model is of opset {version}; export it with opset {OLDEST} or later, best 17 or later")
    if model.functions:
        ir.passes.common.InlinePass()(model)
    report = Report()
    state = _State(model, _facts(model), report)
    operators = [_Operator(state, *key, outputs) for key in _OPERATORS for outputs in range(1, _MOST_OUTPUTS + 1)]
    kinds: list[_Rule] = [*operators, *(_Decomposed(state, *key) for key in _PRODUCTS)]
    rules = [
        pattern.RewriteRule(kind.pattern, kind.rewrite, kind.check, name=kind.op_type, remove_nodes=False)
        for kind in kinds
    ]
    count = pattern.RewriteRuleSet(rules).apply_to_model(model)
    for graph in state.graphs:
        report.found += [*_not_read(graph), *_in_subgraphs(graph)]
    if count:
        turning = [_Rotary(state, domain, "RotaryEmbedding") for domain in ("", contrib.DOMAIN)]
        made = [pattern.RewriteRule(one.pattern, one.rewrite, one.check, remove_nodes=False) for one in turning]
        pattern.RewriteRuleSet(made).apply_to_model(model)
        model.opset_imports[DOMAIN] = 1
        for graph in state.graphs:
            _join_transposes(graph)
            share(graph)
        ir.passes.common.RemoveUnusedNodesPass()(model)
    return model, report


def _facts(model: ir.Model) -> Facts:
    """What is known of a model: what ONNX infers, and again behind the operators that only we follow."""
    for _ in range(_ROUNDS):
        _infer_shapes(model)
        facts = Facts(model.graph)
        if not _declared_more(model.graph, facts):
            break
    return facts


def _declared_more(graph: ir.Graph, facts: Facts) -> bool:
    """Write down the shapes of results of operators that are none of ONNX's, and whether there were any."""
    more = False
    for node in (node for inner in followed(graph) for node in inner):
        for value in node.outputs if node.domain not in STANDARD else ():
            shape = facts.shape(value)
            if value.shape is None and shape is not None:
                value.shape, more = ir.Shape([written(size) for size in shape]), True
    return more


def _infer_shapes(model: ir.Model) -> None:
    """What ONNX infers of the operators that are not followed here. It answers nothing for a broken model."""
    ir.passes.common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)


class _State:
    """What the rules of one run share."""

    def __init__(self, model: ir.Model, facts: Facts, report: Report) -> None:
        self.model, self.facts, self.report = model, facts, report
        self.graphs = list(followed(model.graph))
        self.pending: Call | None = None

    def understood(self, read: Callable[[Facts, ir.Node], Call | None], node: ir.Node, kind: str) -> bool:
        """Whether a node is attention that can be replaced; what it is, or why not, is kept."""
        self.pending = None
        name = node.name or node.outputs[0].name or ""
        try:
            call = read(self.facts, node)
            if call is None:
                return False
            self.problem = prepared(call)
        except LeftAloneError as why:
            self.report.found.append(Found(name, kind, reason=str(why)))
            return False
        self.pending = call
        self.report.found.append(Found(name, kind, problem=self.problem))
        return True

    def replacement(self, op: Any, node: ir.Node, count: int) -> list[ir.Value]:
        """The new nodes for what was understood last."""
        assert self.pending is not None
        values = emitted(op, self.pending, self.problem)
        # An output that nobody reads needs a value all the same, for the rewriter counts.
        values += [op.Identity(values[0]) for _ in range(count - len(values))]
        for new, old in zip(values, node.outputs, strict=False):
            self.facts.adopt(new, old)
        return values


class _Rule(pattern.RewriteRuleClassBase):
    """One kind of node, whatever its inputs."""

    def __init__(self, state: _State, domain: str, op_type: str, outputs: int = 1) -> None:
        super().__init__(remove_nodes=False)
        self.state, self.domain, self.op_type, self.outputs = state, domain, op_type, outputs

    def pattern(self, op: Any, first: Any) -> Any:
        """The node, by its operator alone."""
        kind = getattr(op, self.op_type)
        return kind(first, _domain=self.domain, _outputs=self.outputs, _allow_other_inputs=True)

    def read(self, node: ir.Node) -> bool:
        """Whether the node can be replaced."""
        raise NotImplementedError

    def check(self, op: Any, *_: Any, **__: Any) -> Any:
        """Whether the node can be replaced; the reason, if not, is in the report."""
        node = op.root
        result = pattern.MatchResult()
        outside = not any(op.graph_or_function is graph for graph in self.state.graphs)
        if outside or len(node.outputs) != self.outputs or not self.read(node):
            result.fail("left alone")
        self.node = node
        return result

    def rewrite(self, op: Any, *_: Any, **__: Any) -> Any:
        """The plugin's node with what is around it."""
        return self.state.replacement(op, self.node, self.outputs)


class _Operator(_Rule):
    """An operator that is attention by its name."""

    def read(self, node: ir.Node) -> bool:
        kind = f"{self.domain}.{self.op_type}" if self.domain else self.op_type
        return self.state.understood(_OPERATORS[self.domain, self.op_type], node, kind)


class _Decomposed(_Rule):
    """The last product of attention in single steps."""

    def read(self, node: ir.Node) -> bool:
        return self.state.understood(decomposed.read, node, "decomposed")


class _Rotary(_Rule):
    """Rotated positions that TensorRT's parser refuses."""

    def read(self, node: ir.Node) -> bool:
        return is_refused(self.state.facts, node)

    def rewrite(self, op: Any, *_: Any, **__: Any) -> Any:
        """The same in elementwise operators."""
        return written_out(op, self.state.facts, self.node)


def _not_read(graph: ir.Graph) -> Iterator[Found]:
    """Operators that are attention by their names and are none of those that are read here."""
    for node in graph:
        if (
            node.domain == contrib.DOMAIN
            and "Attention" in node.op_type
            and (node.domain, node.op_type) not in _OPERATORS
        ):
            kind = f"{node.domain}.{node.op_type}"
            reason = (
                f"{node.op_type} is not read here; export the model with MultiHeadAttention or without fused operators"
            )
            yield Found(node.name or node.outputs[0].name or "", kind, reason=reason)


def _in_subgraphs(graph: ir.Graph) -> Iterator[Found]:
    """Attention in the bodies of other nodes, where shapes are not followed."""
    for node in graph:
        for inner in [] if is_followed(node) else subgraphs(node):
            for each in inner.all_nodes():
                domain = "" if each.domain in STANDARD else each.domain
                if (domain, each.op_type) in _OPERATORS or each.op_type == "Softmax":
                    name = each.name or each.outputs[0].name or ""
                    reason = f"it lies in a subgraph of {node.op_type} {node.name}, which is not followed"
                    yield Found(name, each.op_type, reason=reason)


def _join_transposes(graph: ir.Graph) -> None:
    """Leave out two transposes behind a node of ours that undo each other."""
    for node in list(graph):
        if node.domain != DOMAIN or node.op_type != OPERATOR.name:
            continue
        for first in _transposes(node.outputs[0]):
            for second in _transposes(first.outputs[0]):
                orders = attribute(first, "perm", None), attribute(second, "perm", None)
                whole = None in orders or [orders[0][axis] for axis in orders[1]] != sorted(orders[0])
                if not whole and not second.outputs[0].is_graph_output():
                    second.outputs[0].replace_all_uses_with(node.outputs[0])


def _transposes(value: ir.Value) -> list[ir.Node]:
    return [user for user, _ in value.uses() if user.op_type == "Transpose" and user.domain in STANDARD]
