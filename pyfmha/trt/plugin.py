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

from pyfmha.errors import PluginError, PyfmhaError
from pyfmha.runtime.library import Library
from pyfmha.trt.current import current_capability, current_context
from pyfmha.trt.failures import LOGGER, guarded, report
from pyfmha.trt.fields import FieldCollection, Problem, Stored, stored_fields
from pyfmha.trt.launch import Enqueue, Hold, bind, release_when_collected, workspace_bytes
from pyfmha.trt.shapes import (
    INPUTS,
    OUTPUTS,
    batch_and_seq,
    check_count,
    check_expressions,
    check_type,
    check_types,
    largest,
    sizes,
)
from pyfmha.trt.tactics import Tactic, choose, tactics_of

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
        layer: the name that TensorRT gave it.
        namespace: that of its creator.
    """

    problem: Problem
    library: Library
    stored: Stored
    layer: str
    namespace: str


class PluginBehaviour:
    """All that the plugin does; see the module.

    Attributes:
        origin: what it is made of.
        tactic: the algorithm to launch; the first, until TensorRT chooses.
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
        self.origin = origin
        self._function = origin.library[origin.problem.member.name]
        self._tactics = tactics_of(self._function.manifest)
        self._stored_fields: FieldCollection | None = None
        self.tactic: Tactic = self._tactics[0]
        self._workspace_failure: PyfmhaError | None = None
        self._shape: tuple[int, int] | None = None
        self._launch: Enqueue | None = None
        self._hold: Hold | None = None
        self.plugin_name = NAME
        self.plugin_version = VERSION
        self.plugin_namespace = origin.namespace
        self.num_outputs = len(OUTPUTS)
        self.timing_cache_id = self._timing_cache_id()

    def _timing_cache_id(self) -> str:
        attributes = {**self.origin.problem.attributes(), "softmax_scale": self.origin.problem.softmax_scale.hex()}
        listed = " ".join(f"{name}={value}" for name, value in attributes.items())
        return f"{NAME} {VERSION} {listed} build={self.origin.library.manifest.build_id}"

    def describe(self) -> str:
        """Who it is, for messages: name, layer, what it serves, and the shape last prepared."""
        shape = "" if self._shape is None else f", [{self._shape[0]}, {self._shape[1]}] batch and seq"
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
        """Give the loaded code back; harmless when repeated, and raises nothing."""
        self._arm(None)
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.release()

    # ------------------------------------------------------------------ build

    @guarded
    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        """The type of Out: that of Q, K and V, which must be the plugin's."""
        check_count(input_types, OUTPUTS)
        for name, kind in zip(INPUTS, input_types, strict=True):
            check_type(self.origin.problem, name, kind)
        return [input_types[0]]

    @guarded
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], expr_builder: Any) -> list[Any]:
        """The shape of Out: that of Q."""
        check_count([*inputs, *shape_inputs], OUTPUTS)
        for name, dims in zip(INPUTS, inputs, strict=True):
            check_expressions(self.origin.problem, name, dims)
        return [inputs[0]]

    @guarded
    def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        """Whether a tensor's type and format will do: the plugin's type, linear."""
        check_count(in_out[:num_inputs], in_out[num_inputs:])
        desc = in_out[pos].desc
        return int(desc.type) == self.origin.problem.type_id and bool(desc.format == self.trt.TensorFormat.LINEAR)

    @guarded
    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Check the largest shapes that are asked for."""
        self._largest(inputs, outputs)

    @guarded
    def get_valid_tactics(self) -> list[int]:
        """The tactics with code for the current device."""
        capability = current_capability()
        served = [tactic.id for tactic in self._tactics if tactic.runs_on(capability)]
        if not served:
            held = ", ".join(self.origin.library.manifest.archs())
            raise PluginError(
                f"{self.origin.library.path.name} has no {self._function.name} for this device, which is"
                f" sm_{capability}; it is built for {held}: pyfmha build --arch sm_{capability}"
            )
        return served

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        """Bytes of workspace for the largest shape.

        An exception here would be taken for 0 bytes, and the kernel would write into somebody else's memory. So a
        failure is answered with more than there is, remembered, and raised where exceptions count.
        """
        try:
            batch, seq = self._largest(inputs, outputs)
            return workspace_bytes(batch * self.origin.problem.num_heads * seq)
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
        self.tactic = choose(self._tactics, tactic, self.origin.stored.algorithms)
        name = self.tactic.name
        LOGGER.debug("%s: tactic %d is %s", self.describe(), tactic, name, extra={"tactic": name})
        if self._launch is not None:
            self._prepare()

    @guarded
    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Prepare everything for a shape in the current CUDA context, so that ``enqueue`` only passes pointers.

        TensorRT also calls it when only an address has changed, in the midst of inference: nothing is prepared anew.
        """
        prepared, shape = self._launch, self._shape
        self._arm(None)  # what was prepared before must not run if this fails
        self._shape = None
        if self._workspace_failure is not None:
            raise PluginError(f"its workspace is unknown, because of an earlier failure: {self._workspace_failure}")
        check_types(self.origin.problem, inputs, outputs)
        self._shape = batch_and_seq(
            self.origin.problem, [sizes(desc.dims) for desc in inputs], [sizes(desc.dims) for desc in outputs]
        )
        self._hold_code()
        if prepared is not None and self._shape == shape:
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
            inputs: addresses of Q, K, V.
            outputs: address of Out.
            workspace: address of :func:`pyfmha.trt.launch.workspace_bytes` bytes.
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
        hold = Hold(self._function)
        earlier, self._hold = self._hold, hold
        release_when_collected(self, hold)
        if earlier is not None:
            earlier.release()

    def _prepare(self) -> None:
        assert self._shape is not None
        problem = self.origin.problem
        batch, seq = self._shape
        settings = (batch, problem.num_heads, seq, problem.softmax_scale, self.tactic.algo_id)
        self._arm(bind(self._function, *settings, weakref.WeakMethod(self._enqueue_failed)))

    def _arm(self, launch: Enqueue | None) -> None:
        self._launch = launch
        if launch is None:
            self.__dict__.pop("enqueue", None)
        else:
            self.__dict__["enqueue"] = launch

    def _largest(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> tuple[int, int]:
        """Batch and seq of the largest shapes that are asked for."""
        return batch_and_seq(self.origin.problem, list(map(largest, inputs)), list(map(largest, outputs)))
