"""A model run by ONNX Runtime with the plugin's nodes left out of it: in stages, with those computed between them.

ONNX Runtime does not know the plugin's node. An operator of its own would need a library in C++, and the node written
out in ONNX's operators would be a second formula, of whoever wrote the rewriting: it could share its faults. So the
graph is cut at these nodes. Everything else is run by ONNX Runtime as it is, and the nodes by the float64 reference
that every kernel of the project is checked against, from the attributes that the plugin's creator would read.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from pyfmha.errors import OnnxError
from pyfmha.onnx.bodies import subgraphs
from pyfmha.onnx.emit import DOMAIN
from pyfmha.onnx.plugin_node import computed

Arrays = dict[str, Any]
Change = Callable[[Any], Any]


def session_of(model: ir.Model, folder: Path | None) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        model: without nodes of ours.
        folder: of external weights.

    Raises:
        OnnxError: ONNX Runtime cannot run it.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # The same rest of the graph on both sides: what fuses around attention would differ.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    proto = ir.serde.serialize_model(model).SerializeToString()
    try:
        return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
        raise OnnxError(f"ONNX Runtime does not take the model: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """An error of ONNX Runtime, without its traces."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Runner:
    """A model without nodes of ours, run by ONNX Runtime, or where that fails by ONNX's own reference implementation.

    ONNX Runtime refuses some models that ONNX defines, such as RotaryEmbedding of opset 23 with more than one sequence.

    Args:
        model: without nodes of ours.
        folder: of external weights.

    Attributes:
        by: who ran it last.
    """

    def __init__(self, model: ir.Model, folder: Path | None = None) -> None:
        self._model = model
        self._names = [output.name or "" for output in model.graph.outputs]
        self._session: Any = None
        self._refused = ""
        self.by = "ONNX Runtime"
        try:
            self._session = session_of(model, folder)
        except OnnxError as error:
            self._refused = str(error)

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        """The outputs by name.

        Raises:
            OnnxError: both fail.
        """
        if self._session is not None:
            try:
                return dict(zip(self._names, self._session.run(self._names, dict(inputs)), strict=True))
            except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
                self._refused = f"ONNX Runtime fails: {first_line(error)}"
        from onnx.reference import ReferenceEvaluator

        try:
            evaluator = ReferenceEvaluator(ir.serde.serialize_model(self._model))
            outputs = evaluator.run(None, dict(inputs))
        except Exception as error:  # whatever an operator raises
            raise OnnxError(f"{self._refused}; ONNX's reference implementation: {first_line(error)}") from None
        self.by = "ONNX's reference implementation"
        return dict(zip(self._names, outputs, strict=True))


class Staged:
    """A model with nodes of ours.

    Args:
        model: the rewritten model; its graph is not changed.
        folder: of external weights.
        outer: what runs the graph around, of a branch or body within the model.
        graph: that branch or body.
    """

    def __init__(
        self,
        model: ir.Model,
        folder: Path | None = None,
        *,
        outer: "Staged | None" = None,
        graph: ir.Graph | None = None,
    ) -> None:
        self._model, self._folder = model, folder
        self._graph = model.graph if graph is None else graph
        self._weights: dict[str, ir.Value] = {**({} if outer is None else outer._weights), **self._graph.initializers}
        self._inner: dict[int, Staged] = {}
        self._level = _levels(self._graph)
        self._stages = [
            [node for node in self._graph if not has_ours(node) and self._level[node] == level]
            for level in range(max(self._level.values(), default=0) + 1)
        ]
        self._runners: dict[int, tuple[Runner, list[str]]] = {}

    def run(self, inputs: Mapping[str, Any], change: Change | None = None) -> Arrays:
        """The outputs by name.

        Args:
            inputs: by name.
            change: what is done to each result of attention before it is rounded to its type.

        Raises:
            OnnxError: ONNX Runtime fails.
            PluginError: a node of ours gets what the plugin does not take.
        """
        known: Arrays = dict(inputs)
        for level, stage in enumerate(self._stages):
            if stage:
                known |= self._run_stage(level, stage, known)
            for node in self._graph:
                if has_ours(node) and self._level[node] == level:
                    act = self._attention if is_ours(node) else self._controlled
                    known |= act(node, known, change)
        return {name: self._value(name, known) for name in (value.name or "" for value in self._graph.outputs)}

    def _value(self, name: str, known: Arrays) -> Any:
        if name not in known:  # an initializer that is an output, or an input of ours
            return self._weights[name].const_value.numpy()  # type: ignore[union-attr]
        return known[name]

    def _controlled(self, node: ir.Node, known: Arrays, change: Change | None) -> Arrays:
        """An If or a Loop in which nodes of ours are."""
        given = [None if value is None else self._value(value.name or "", known) for value in node.inputs]
        bodies = subgraphs(node)
        for body in bodies:
            self._inner.setdefault(id(body), Staged(self._model, self._folder, outer=self, graph=body))
        if node.op_type == "If":
            chosen = node.attributes["then_branch" if bool(given[0]) else "else_branch"].as_graph()
            outputs = self._inner[id(chosen)].run(known, change)
            results = [outputs[value.name or ""] for value in chosen.outputs]
        else:
            results = self._looped(bodies[0], given, known, change)
        return {value.name or "": array for value, array in zip(node.outputs, results, strict=True)}

    def _looped(self, body: ir.Graph, given: Sequence[Any], known: Arrays, change: Change | None) -> list[Any]:
        """The results of a Loop: what went round, and for each further output of the body all that it gave."""
        most, going, *state = given
        names, kept, count = [value.name or "" for value in body.inputs], [], 0
        while (most is None or count < int(most)) and (going is None or bool(going)):
            inputs = [np.asarray(count, np.int64), np.asarray(True), *state]
            outputs = self._inner[id(body)].run(known | dict(zip(names, inputs, strict=True)), change)
            going, *rest = (outputs[value.name or ""] for value in body.outputs)
            state, count = rest[: len(state)], count + 1
            kept.append(rest[len(state) :])
        if not kept and len(body.outputs) > 1 + len(state):
            raise OnnxError("a Loop with results of each time round ran no time; give other sizes: --size NAME=NUMBER")
        return [*state, *(np.stack(each) for each in zip(*kept, strict=True))]

    def _attention(self, node: ir.Node, known: Arrays, change: Change | None) -> Arrays:
        arrays = [self._value(value.name or "", known) for value in node.inputs if value is not None]
        outputs = computed(node, arrays)
        if change is not None:
            outputs[0] = change(outputs[0])
        return {
            value.name or "": array.astype(arrays[0].dtype if index == 0 else "float32")
            for index, (value, array) in enumerate(zip(node.outputs, outputs, strict=False))
        }

    def _run_stage(self, level: int, stage: list[ir.Node], known: Arrays) -> Arrays:
        if level not in self._runners:
            self._runners[level] = self._made(stage, known)
        runner, needs = self._runners[level]
        return runner.run({name: known[name] for name in needs})

    def _made(self, stage: list[ir.Node], known: Arrays) -> tuple[Runner, list[str]]:
        """What runs the nodes of one stage; the types of its inputs are those of the arrays that are there."""
        inside = {value for node in stage for value in node.outputs}
        read = {value for node in stage for value in _read(node)}
        weights = [value for value in self._weights.values() if value in read and value.name not in known]
        needs = sorted({value.name or "" for value in read - inside - set(weights)} & set(known))
        elsewhere = {value for node in self._graph if has_ours(node) or node not in stage for value in _read(node)}
        gives = sorted(value.name or "" for value in inside if value.is_graph_output() or value in elsewhere)
        proto, graph = ir.serde.serialize_model(self._model), ir.serde.serialize_graph(self._graph)
        names = {value.name for node in stage for value in node.outputs}
        kept = [node for node in graph.node if set(filter(None, node.output)) & names]
        initializers = [
            ir.serde.serialize_tensor(value.const_value) for value in weights if value.const_value is not None
        ]
        for field, items in (("node", kept), ("initializer", initializers)):
            proto.graph.ClearField(field)
            getattr(proto.graph, field).extend(items)
        for field in ("input", "output", "value_info"):
            proto.graph.ClearField(field)
        _describe(proto.graph, {name: known[name] for name in needs}, gives)
        return Runner(ir.serde.deserialize_model(proto), self._folder), needs


def _describe(graph: Any, inputs: Arrays, outputs: Iterable[str]) -> None:
    from onnx import helper

    for name, array in inputs.items():
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        graph.input.append(helper.make_tensor_value_info(name, kind, [None] * array.ndim))
    for name in outputs:  # their types are ONNX Runtime's to find
        graph.output.add().name = name


def is_ours(node: ir.Node) -> bool:
    """Whether a node is the plugin's."""
    return node.domain == DOMAIN


def has_ours(node: ir.Node) -> bool:
    """Whether a node is the plugin's, or holds one."""
    return is_ours(node) or any(is_ours(inner) for graph in subgraphs(node) for inner in graph.all_nodes())


def _read(node: ir.Node) -> set[ir.Value]:
    """What a node reads, also from within its subgraphs."""
    found = {value for value in node.inputs if value is not None}
    for graph in subgraphs(node):
        found |= {value for inner in graph.all_nodes() for value in inner.inputs if value is not None}
        found |= set(graph.outputs)
    return found


def _levels(graph: ir.Graph) -> dict[ir.Node, int]:
    """After how many nodes of ours, at the most, a node comes."""
    levels: dict[ir.Node, int] = {}
    for node in graph:
        before = [value.producer() for value in _read(node)]
        levels[node] = max(
            (levels[other] + has_ours(other) for other in before if other is not None and other in levels), default=0
        )
    return levels
