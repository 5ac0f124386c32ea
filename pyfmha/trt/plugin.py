"""The plugin: attention as a TensorRT ``IPluginV3``.

TensorRT's classes are local to a module (``tensorrt``, ``tensorrt_lean``, ...), so the plugin's behaviour stands here
as a plain class, and :func:`pyfmha.trt.creator.plugin_classes` joins it to the classes of one module.

What the binding does with an override decides its form: every return value but those of the build-time questions is
ignored and only an exception is a failure; an exception in ``get_workspace_size`` is taken for 0 bytes; an exception in
``supports_format_combination`` for False.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pyfmha.attention.hopper import decodes
from pyfmha.errors import PluginError, PyfmhaError
from pyfmha.runtime.library import Function, Library
from pyfmha.spec.advice import code_for
from pyfmha.spec.arch import arch_for
from pyfmha.trt.current import current_capability, current_context
from pyfmha.trt.failures import LOGGER, guarded, report
from pyfmha.trt.fields import FieldCollection, Stored, stored_fields
from pyfmha.trt.launch import Enqueue, Hold, bind
from pyfmha.trt.plan import Plan, plan_of, split_workspace_bytes
from pyfmha.trt.problem import Problem
from pyfmha.trt.shapes import (
    Forms,
    Shape,
    check_expressions,
    check_type,
    check_types,
    forms_of,
    largest,
    output_expressions,
    sizes,
    smallest,
)
from pyfmha.trt.tactics import Tactic, choose

NAME = "TritonFlashAttention"
VERSION = "1"
IMPOSSIBLE_BYTES = 1 << 62
"""A workspace that nobody has: the answer of a failed ``get_workspace_size``, for which TensorRT drops the layer."""


@dataclass(frozen=True)
class Origin:
    """What a plugin object is made of, and its clones after it.

    Attributes:
        problem: what it serves.
        library: with which code.
        stored: what its engine stores: of this library where it was built, of an earlier one where it was loaded.
        tactics: the function's algorithms.
        pair: names of the functions that decode: in the library, and with room in the engine; or none.
        layer: the name that TensorRT gave it.
        namespace: that of its creator.
    """

    problem: Problem
    library: Library
    stored: Stored
    tactics: tuple[Tactic, ...]
    pair: tuple[str, ...]
    layer: str
    namespace: str


class PluginBehaviour:
    """All that the plugin does; see the module.

    Attributes:
        tactic: the algorithm to launch; the first, until TensorRT chooses. Shapes that are decoded run the same pair of
            functions whatever it is: TensorRT measures tactics at one shape of a profile, and how to split the keys
            follows from the shape at hand, without a choice.
    """

    trt: ClassVar[Any]
    trt_bases: ClassVar[tuple[Any, ...]]
    plugin_name: str
    plugin_version: str
    plugin_namespace: str
    num_outputs: int
    timing_cache_id: str

    def __init__(self, origin: Origin) -> None:
        # Each base has a C++ object of its own: left out, the binding refuses the whole object.
        for base in self.trt_bases:
            base.__init__(self)
        self._origin: Origin | None = origin
        names = (origin.problem.function_name, *origin.pair)
        self._functions = [origin.library[name] for name in names]
        self._stored_fields: FieldCollection | None = None
        self.tactic: Tactic = origin.tactics[0]
        self._workspace_failure: PyfmhaError | None = None
        self._forms = forms_of(origin.problem)
        self._shapes: list[Shape] | None = None
        self._plan: Plan | None = None
        self._launch: Enqueue | None = None
        self._hold: Hold | None = None
        self.plugin_name = NAME
        self.plugin_version = VERSION
        self.plugin_namespace = origin.namespace
        self.num_outputs = len(self._forms.outputs)
        self.timing_cache_id = self._timing_cache_id()

    def _timing_cache_id(self) -> str:
        attributes = self.origin.problem.attributes().items()
        listed = " ".join(f"{name}={v.hex() if isinstance(v, float) else v}" for name, v in attributes)
        decode = f" decode={self.origin.stored.decode}" if self.origin.pair else ""
        return f"{NAME} {VERSION} {listed} build={self.origin.library.manifest.build_id}{decode}"

    @property
    def origin(self) -> Origin:
        """What it is made of.

        Raises:
            PluginError: it was destroyed.
        """
        if self._origin is None:
            raise PluginError("the plugin was destroyed")
        return self._origin

    @property
    def _function(self) -> Function:
        return self._functions[0]

    @property
    def _pair(self) -> list[Function]:
        return self._functions[1:]

    def describe(self) -> str:
        """Who it is, for messages: name, layer, what it serves, and the shape last prepared."""
        if self._origin is None:
            return f"{NAME} (destroyed)"
        shape = "" if self._plan is None else f", {self._plan.sizes}"
        return f"{NAME} layer {self.origin.layer!r} ({self.origin.problem}{shape})"

    # ------------------------------------------------------------------ the object

    def get_capability_interface(self, kind: Any) -> "PluginBehaviour":
        """Itself: one object has all three interfaces."""
        return self

    @guarded
    def clone(self) -> "PluginBehaviour":
        """A copy with the same state, except what belongs to one execution context: launch, shape and loaded code."""
        return self._copy()

    def _copy(self) -> "PluginBehaviour":
        copy = type(self)(self.origin)
        copy.tactic = self.tactic
        copy._workspace_failure = self._workspace_failure
        return copy

    def destroy(self) -> None:
        """Give the loaded code back, and all that it holds; harmless when repeated, and raises nothing.

        The binding keeps the Python object of every plugin that C++ has had in its hands until the process ends, so
        that an object that is destroyed must be an empty one.
        """
        self._arm(None)
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.release()
        self._origin = self._stored_fields = self._plan = self._shapes = self._workspace_failure = None
        self._functions = []

    # ------------------------------------------------------------------ build

    @guarded
    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        """The types of the outputs: of Out that of Q, K and V, which must be the plugin's, of Lse FLOAT."""
        self._forms.check_count(input_types)
        for form, kind in zip(self._forms.inputs, input_types, strict=True):
            check_type(self.origin.problem, form, kind)
        lse = [self.trt.DataType.FLOAT] if len(self._forms.outputs) > 1 else []
        return [input_types[0], *lse]

    @guarded
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], expr_builder: Any) -> list[Any]:
        """The shapes of the outputs, of the inputs' own sizes."""
        self._forms.check_count([*inputs, *shape_inputs])
        forms = self._forms_for(inputs)
        check_expressions(forms, inputs)
        if self.origin.problem.features is None:
            return [inputs[0]]
        return [self.trt.DimsExprs(dims) for dims in output_expressions(forms, inputs, expr_builder.constant)]

    @guarded
    def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        """Whether a tensor's type and format will do: the type of its form, linear."""
        self._forms.check_count(in_out[:num_inputs], in_out[num_inputs:])
        desc = in_out[pos].desc
        return int(desc.type) == self._forms.all[pos].type_id and bool(desc.format == self.trt.TensorFormat.LINEAR)

    @guarded
    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Check the largest shapes that are asked for."""
        self._largest(inputs, outputs)

    @guarded
    def get_valid_tactics(self) -> list[int]:
        """The tactics with code for the current device."""
        capability = current_capability()
        served = [tactic.id for tactic in self.origin.tactics if tactic.runs_on(capability)]
        if not served:
            held = ", ".join(self._function.manifest.archs())
            raise PluginError(
                f"{self.origin.library.path.name} has no {self._function.name} for this device, which is"
                f" sm_{capability}; it is built for {held}: {code_for(f'sm_{capability}', self.origin.library.path)}"
            )
        return served

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        """Bytes of workspace for the largest shape, and for every other of the profile that is decoded.

        An exception here would be taken for 0 bytes, and the kernel would write into somebody else's memory. So a
        failure is answered with more than there is, remembered, and raised where exceptions count.
        """
        try:
            needed = self._largest(inputs, outputs).workspace_bytes
            return max(needed, self._split_bytes([*inputs, *outputs])) if self._pair else needed
        except Exception as error:
            self._workspace_failure = report("get_workspace_size", self.describe(), error)
            return IMPOSSIBLE_BYTES

    # ------------------------------------------------------------------ run

    @guarded
    def get_fields_to_serialize(self) -> Any:
        """What the engine stores; the memory behind it lives as long as this object."""
        if self._stored_fields is None:
            self._stored_fields = stored_fields(self.trt, self.origin.problem, self.origin.stored)
        return self._stored_fields.collection

    @guarded
    def attach_to_context(self, context: Any) -> "PluginBehaviour":
        """A clone for an execution context, with its code loaded if the device is known already."""
        attached = self._copy()
        if current_context() is not None:
            attached._hold_code()
        return attached

    @guarded
    def set_tactic(self, tactic: int) -> None:
        """Choose the algorithm by its tactic id; 0 is the first."""
        self.tactic = choose(self.origin.tactics, tactic, self.origin.stored.algorithms)
        name = self.tactic.name
        LOGGER.debug("%s: tactic %d is %s", self.describe(), tactic, name, extra={"tactic": name})
        if self._launch is not None:
            self._prepare()

    @guarded
    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Prepare everything for a shape in the current CUDA context, so that ``enqueue`` only passes pointers.

        TensorRT also calls it when only an address has changed, in the midst of inference: nothing is prepared anew.
        """
        prepared, plan, earlier = self._launch, self._plan, self._shapes
        self._arm(None)  # what was prepared before must not run if this fails
        self._plan = self._shapes = None
        if self._workspace_failure is not None:
            raise PluginError(f"its workspace is unknown, because of an earlier failure: {self._workspace_failure}")
        self._forms.check_count(inputs, outputs)
        descs = [*inputs, *outputs]
        check_types(self.origin.problem, self._forms.all, descs)
        shapes = [sizes(desc.dims) for desc in descs]
        if plan is None or shapes != earlier:
            plan, prepared = self._planned(shapes), None
        self._plan, self._shapes = plan, shapes
        self._hold_code()
        if prepared is not None:
            self._arm(prepared)
        else:
            self._prepare()

    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Launch on a stream. Loads, allocates and waits for nothing, so that it can be captured in a CUDA graph.

        This is what an object answers that has no shape prepared. ``on_shape_change`` puts the launch itself in its
        place on the object, where the binding looks at every call: see :func:`pyfmha.trt.launch.bind`.

        Args:
            input_desc, output_desc: not looked at: ``on_shape_change`` has seen them.
            inputs: addresses, in the order of :func:`pyfmha.trt.shapes.forms_of`.
            outputs: address of Out, and of Lse where it is asked for.
            workspace: address of :attr:`pyfmha.trt.plan.Plan.workspace_bytes` bytes.
            stream: the ``CUstream`` as an integer.
        """
        error = PluginError("no shape is prepared: on_shape_change was not called on this object, or failed")
        raise self._enqueue_failed(error) from error

    def _enqueue_failed(self, error: Exception) -> PyfmhaError:
        return report("enqueue", self.describe(), error)

    # ------------------------------------------------------------------ helpers

    def _hold_code(self) -> None:
        if self._hold is not None and self._hold.context.is_current():
            return
        hold = Hold([self._function, *self._pair])
        earlier, self._hold = self._hold, hold
        hold.release_with(self)
        if earlier is not None:
            earlier.release()

    def _prepare(self) -> None:
        assert self._plan is not None
        steps = [(self._function, self.tactic.algo_id)]
        if self._plan.split:
            steps = [(function, 0) for function in self._pair]
        self._arm(bind(steps, self._plan, weakref.WeakMethod(self._enqueue_failed)))

    def _arm(self, launch: Enqueue | None) -> None:
        self._launch = launch
        if launch is None:
            self.__dict__.pop("enqueue", None)
        else:
            self.__dict__["enqueue"] = launch

    def _forms_for(self, first: Sequence[Any]) -> Forms:
        """The forms for what is given: the number of dimensions of the first input tells the packed ones apart."""
        features = self.origin.problem.features
        if features is None or features.layout != "packed" or not first:
            return self._forms
        return forms_of(self.origin.problem, len(first[0]))

    def _planned(self, shapes: Sequence[Shape]) -> Plan:
        """The launch for the shapes of all tensors."""
        count = len(self._forms.inputs)
        forms = self._forms_for(shapes)
        inputs, outputs = shapes[:count], shapes[count:]
        may_split = bool(self._pair)
        return plan_of(self.origin.problem, forms, inputs, outputs, may_split=may_split, in_one=self._decodes_in_one)

    def _decodes_in_one(self, values: Sequence[float]) -> bool:
        """Whether the function decodes in one launch on the current device; no where there is none, as in a build."""
        if current_context() is None:
            return False
        held = self._function.manifest.archs()
        arch = arch_for(f"sm_{current_capability()}", held)
        return arch is not None and decodes(self._function.manifest, self.tactic.algo_id, arch, values)

    def _split_bytes(self, descs: Sequence[Any]) -> int:
        """What the shapes of a profile that are decoded need at the most."""
        bounds = list(map(smallest, descs)), list(map(largest, descs))
        return split_workspace_bytes(self.origin.problem, self._forms, *bounds, len(self._forms.inputs))

    def _largest(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Plan:
        """The launch for the largest shapes that are asked for."""
        self._forms.check_count(inputs, outputs)
        return self._planned(list(map(largest, [*inputs, *outputs])))
