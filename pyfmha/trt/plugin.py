"""The plugin: an operator as a TensorRT ``IPluginV3``.

TensorRT's classes are local to a module (``tensorrt``, ``tensorrt_lean``, ...), so the plugin's behaviour stands here
as a plain class, and :func:`pyfmha.trt.creator.plugin_classes` joins it to the classes of one module. What it is and
does follows from its operator's description; the plugin in C inside the library does the same (``pyfmha_plugin.c``).

What the binding does with an override decides its form: every return value but those of the build-time questions is
ignored and only an exception is a failure; an exception in ``get_workspace_size`` is taken for 0 bytes; an exception in
``supports_format_combination`` for False.
"""

import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pyfmha.errors import PluginError, PyfmhaError
from pyfmha.operators.forms import Shape
from pyfmha.operators.instance import NOTHING, Instance
from pyfmha.operators.plan import Plan
from pyfmha.operators.scopes import ShapeScope
from pyfmha.operators.tactics import Tactic, choose
from pyfmha.runtime.library import Function
from pyfmha.spec.advice import code_for
from pyfmha.trt.current import current_capability, current_context, current_figure
from pyfmha.trt.failures import LOGGER, guarded, report
from pyfmha.trt.fields import FieldCollection, stored_fields
from pyfmha.trt.launch import Binder, Enqueue, Hold
from pyfmha.trt.origin import Origin
from pyfmha.trt.plans import checked, held, serves
from pyfmha.trt.shapes import Symbols, check_expressions, check_types, largest, least_sizes, sizes

IMPOSSIBLE_BYTES = 1 << 62
"""A workspace that nobody has: the answer of a failed ``get_workspace_size``, for which TensorRT drops the layer."""

MOST_PLANS = 16
"""Shapes whose launches a plugin keeps, so that shapes which alternate are planned once."""


class PluginBehaviour:
    """All that the plugin does; see the module.

    Attributes:
        tactic: the algorithm to launch; the first, until TensorRT chooses. It is one of the operator's first launch;
            what else is launched has no choice, because TensorRT measures tactics at one shape of a profile.
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
        self._instance: Instance | None = origin.instance
        self._stored_fields: FieldCollection | None = None
        self._tactic = 0
        self._workspace_failure: PyfmhaError | None = None
        self._shapes: list[Shape] | None = None
        self._plans: OrderedDict[tuple[Shape, ...], Plan] = OrderedDict()
        self._plan: Plan | None = None
        self._launch: Enqueue | None = None
        self._binder = Binder(weakref.WeakMethod(self._enqueue_failed))
        self._hold: Hold | None = None
        self._held: Instance | None = None  # whose code that is
        operator = origin.instance.program.operator
        self.plugin_name = operator.name
        self.plugin_version = operator.version
        self.plugin_namespace = origin.namespace
        self.num_outputs = len(self.instance.forms().outputs)
        self.timing_cache_id = origin.timing_cache_id()

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
    def instance(self) -> Instance:
        """What it serves, with the types of its tensors once they are known.

        Raises:
            PluginError: it was destroyed.
        """
        if self._instance is None:
            raise PluginError("the plugin was destroyed")
        return self._instance

    def describe(self) -> str:
        """Who it is, for messages: name, layer, what it serves, and the shape last prepared."""
        if self._origin is None:
            return f"{self.plugin_name} (destroyed)"
        shape = "" if self._plan is None else f", {self._plan.sizes}"
        return f"{self.plugin_name} layer '{self.origin.layer}' ({self.instance}{shape})"

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
        copy._instance = self._instance
        copy._tactic = self._tactic
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
        self._origin = self._instance = self._held = self._stored_fields = self._plan = self._shapes = None
        self._workspace_failure = None
        self._plans.clear()

    # ------------------------------------------------------------------ build

    @guarded
    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        """The types of the outputs, which those of the inputs tell where attributes do not."""
        forms = self.instance.forms()
        forms.check_count(input_types)
        kinds = [int(kind) for kind in input_types]
        self._take_types(kinds[: len(forms.inputs)])
        for form, kind in zip(self.instance.forms().inputs, kinds, strict=False):
            if form.type_id != kind:
                raise PluginError(self.instance.type_error(form, kind, self.instance.types))
        return [self.trt.DataType(form.type_id) for form in self.instance.forms().outputs]

    @guarded
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], expr_builder: Any) -> list[Any]:
        """The shapes of the outputs, of the inputs' own sizes."""
        forms = self.instance.forms([len(dims) for dims in inputs])
        forms.check_count([*inputs, *shape_inputs])
        if (len(inputs), len(shape_inputs)) != (len(forms.inputs), len(forms.shapes)):
            wanted = f"it has {len(forms.inputs)} and {len(forms.shapes)}"
            raise PluginError(f"{len(inputs)} inputs and {len(shape_inputs)} shape inputs; {wanted}")
        check_expressions(forms, inputs)
        found = Symbols(self.trt, self.instance, expr_builder).outputs(forms, inputs, shape_inputs)
        return [self.trt.DimsExprs(dims) for dims in found]

    @guarded
    def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        """Whether a tensor's type and format will do: the type of its form, linear."""
        forms = self.instance.forms()
        forms.check_count(in_out[:num_inputs], in_out[num_inputs:])
        asked = in_out[pos].desc
        if asked.format != self.trt.TensorFormat.LINEAR:
            return False
        count = len(forms.inputs)
        if count <= pos < num_inputs:  # an input whose values are read
            return bool(asked.type in (self.trt.DataType.INT32, self.trt.DataType.INT64))
        descs = [in_out[index].desc for index in (*range(count), *range(num_inputs, len(in_out)))]
        index = pos if pos < num_inputs else pos - num_inputs + count
        form = forms.all[index]
        if form.variable not in self.instance.program.types:
            return int(asked.type) == form.type_id
        # What TensorRT chose earlier for the same name decides; types that were configured before do not.
        try:
            self.instance.types_for([int(desc.type) for desc in descs[: index + 1]], self.instance.settled_types)
        except PluginError:
            return False
        return True

    @guarded
    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Take the types, and check the largest shapes that are asked for."""
        _, scope = self._largest(inputs, outputs)
        self.instance.profile_bytes(scope)

    @guarded
    def get_valid_tactics(self) -> list[int]:
        """The tactics with code for the current device."""
        capability = current_capability()
        function = self._main_function()
        served = [tactic.id for tactic in function.tactics if tactic.runs_on(capability)]
        if not served:
            there = ", ".join(function.manifest.archs())
            raise PluginError(
                f"{self.origin.library.path.name} has no {function.name} for this device, which is"
                f" sm_{capability}; it is built for {there}: {code_for(f'sm_{capability}', self.origin.library.path)}"
            )
        return served

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        """Bytes of workspace that the largest shape needs, and every other of the profile.

        An exception here would be taken for 0 bytes, and the kernel would write into somebody else's memory. So a
        failure is answered with more than there is, remembered, and raised where exceptions count.
        """
        try:
            plan, scope = self._largest(inputs, outputs)
            return max(plan.workspace_bytes, self.instance.profile_bytes(scope))
        except Exception as error:
            self._workspace_failure = report("get_workspace_size", self.describe(), error)
            return IMPOSSIBLE_BYTES

    # ------------------------------------------------------------------ run

    @guarded
    def get_fields_to_serialize(self) -> Any:
        """What the engine stores; the memory behind it lives as long as this object."""
        if self._stored_fields is None:
            program, attributes = self.instance.program, self.instance.stored_attributes()
            self._stored_fields = stored_fields(self.trt, program, attributes, self.origin.stored)
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
        chosen = self._chosen(tactic)
        self._tactic = tactic
        self._plans.clear()  # what is launched may hang on it
        LOGGER.debug("%s: tactic %d is %s", self.describe(), tactic, chosen.name, extra={"tactic": chosen.name})
        if self._launch is not None and self._shapes is not None:
            self._plan = self._kept_plan(self._shapes)
            self._arm(self.bound(self._plan))

    @property
    def tactic(self) -> Tactic:
        """The algorithm to launch."""
        return self._chosen(self._tactic)

    def _chosen(self, tactic: int) -> Tactic:
        """The algorithm of an id. Where types are not known yet, TensorRT may mean that of any of them."""
        functions = [self.origin.library[name] for name in self.instance.main_functions()]
        tactics = [found for function in functions for found in function.tactics]
        return choose(tactics, tactic, self.origin.stored.algorithms)

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
        forms = self.instance.forms()
        forms.check_count(inputs, outputs)
        descs = [*inputs[: len(forms.inputs)], *outputs]
        self._take_types([int(desc.type) for desc in descs])
        check_types(self.instance, self.instance.forms().all, descs)
        shapes = [sizes(desc.dims) for desc in descs]
        if plan is None or shapes != earlier:
            plan, prepared = self._kept_plan(shapes), None
        self._plan, self._shapes = plan, shapes
        try:
            self._hold_code()
            self._arm(prepared or self.bound(plan))
        except PyfmhaError:  # no code, or an argument does not fit: there is no plan, as messages say
            self._plan = self._shapes = None
            raise

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
        place on the object, where the binding looks at every call: see :class:`pyfmha.trt.launch.Binder`.

        Args:
            input_desc, output_desc: not looked at: ``on_shape_change`` has seen them.
            inputs, outputs: addresses, in the order of :meth:`pyfmha.operators.instance.Instance.forms`.
            workspace: address of :attr:`pyfmha.operators.instance.Plan.workspace_bytes` bytes.
            stream: the ``CUstream`` as an integer.
        """
        error = PluginError("no shape is prepared: on_shape_change was not called on this object, or failed")
        raise self._enqueue_failed(error) from error

    def _enqueue_failed(self, error: Exception) -> PyfmhaError:
        return report("enqueue", self.describe(), error)

    # ------------------------------------------------------------------ helpers

    def _hold_code(self) -> None:
        # What is launched follows from types, which may not be known before on_shape_change.
        if self._hold is not None and self._held is self._instance and self._hold.context.is_current():
            return
        hold = Hold(self._functions())
        self._held = self._instance
        earlier, self._hold = self._hold, hold
        hold.release_with(self)
        if earlier is not None:
            earlier.release()

    def _functions(self) -> list[Function]:
        """All that it may launch, as far as types tell."""
        names = self.instance.launched_functions()
        return [self.origin.library[name] for name in names if name in self.origin.library]

    def _main_function(self) -> Function:
        return self.origin.library[self.instance.main_functions()[0]]

    def _take_types(self, kinds: Sequence[int]) -> None:
        """Learn from the types of tensors what those in the description stand for."""
        if set(self.instance.program.types) != self.instance.program.fixed_types:
            types = self.instance.types_for(kinds, self.instance.settled_types)
            if types != self.instance.types:
                self._instance = self.instance.with_types(types)
                self._plans.clear()
                self._shapes = None

    def bound(self, plan: Plan) -> Enqueue:
        """The ``enqueue`` of some launches, which works as long as this object lives and holds their code.

        Raises:
            PluginError: an argument does not fit its C type.
        """
        library, algo_id = self.origin.library, self.tactic.algo_id
        return self._binder([(library[step.function], algo_id if step.tuned else 0) for step in plan.steps], plan)

    def _arm(self, launch: Enqueue | None) -> None:
        self._launch = launch
        if launch is None:
            self.__dict__.pop("enqueue", None)
        else:
            self.__dict__["enqueue"] = launch

    def _kept_plan(self, shapes: Sequence[Shape]) -> Plan:
        """The launches for the shapes of all tensors."""
        key = tuple(shapes)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self.planned(shapes)
            if len(self._plans) > MOST_PLANS:
                self._plans.popitem(last=False)
        return plan

    def planned(self, shapes: Sequence[Shape], given: Mapping[str, int] = NOTHING) -> Plan:
        """The launches for some shapes; nothing is prepared.

        Args:
            shapes: of all tensors, inputs first.
            given: as :meth:`pyfmha.operators.instance.Instance.planned`.

        Raises:
            PluginError: the shapes do not fit, or the library lacks what serves them.
        """
        count = len(self.instance.forms().inputs)
        plan = self.instance.planned(shapes[:count], shapes[count:], self._serves, given, current_figure)
        return held(plan, self.origin.library)

    def _serves(self, function: str, kernel: str, arguments: Sequence[float]) -> bool:
        algo_id = self.tactic.algo_id if function == self.instance.main_functions()[0] else 0
        return serves(self.origin.library, algo_id, function, kernel, arguments)

    def _largest(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> tuple[Plan, ShapeScope]:
        """The launches for the largest shapes that are asked for, and what is known of the profile."""
        forms = self.instance.forms()
        forms.check_count(inputs, outputs)
        self._take_types([int(desc.desc.type) for desc in inputs[: len(forms.inputs)]])
        count = len(forms.inputs)
        shapes = [largest(desc) for desc in (*inputs[:count], *outputs)]
        forms = self.instance.forms([len(shape) for shape in shapes[:count]])
        scope = self.instance.measure(
            shapes[:count], shapes[count:], least=least_sizes(forms, inputs), serves=self._serves, device=current_figure
        )
        return checked(self.instance.plan(scope), self.origin.library), scope
