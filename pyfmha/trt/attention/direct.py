"""The plugin on a GPU without TensorRT's engine: driven as an execution context drives it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyfmha.attention.biased_operator import BROADCAST
from pyfmha.attention.first import HEAD_SIZES
from pyfmha.attention.fp8 import DESCALES
from pyfmha.bfloat16 import STORAGE
from pyfmha.errors import PluginError, SpecError
from pyfmha.operators.description import ELEMENTS
from pyfmha.operators.expressions import Scope
from pyfmha.operators.forms import Forms, Shape, TensorForm, measure
from pyfmha.runtime.device import Device, DeviceArray, Stream, device_arrays
from pyfmha.runtime.library import Library
from pyfmha.runtime.tensors import TensorView, host_array, is_tensor, on_device, view
from pyfmha.trt import standin
from pyfmha.trt.attention.causal import says_causal
from pyfmha.trt.attention.functions import Asked, check_held, extended_by
from pyfmha.trt.attention.problem import Features, Problem
from pyfmha.trt.attention.requested import default_scale
from pyfmha.trt.attention.words import Dtype
from pyfmha.trt.creator import find_library, make_creator
from pyfmha.trt.fields import creation_fields
from pyfmha.trt.modules import find_module
from pyfmha.trt.protocols import TensorRT

Array = NDArray[Any]


class DirectSession:
    """Attention on one GPU through the plugin object, in the order in which TensorRT calls it.

    Created in the build phase, serialised, created again from those fields in the runtime phase, attached to a
    context, then ``set_tactic``, ``on_shape_change`` and ``enqueue`` on a stream. Return values are ignored;
    exceptions are raised.

    Args:
        num_heads: heads of Q, and of K and V.
        head_size: elements of one head.
        causal: whether a query sees only keys at its own position and before; it has no default. What they are aligned
            at is said by ``features``.
        dtype: ``"fp16"``, ``"bf16"`` or ``"fp32"``, of Out, and of Q, K and V unless ``features`` says fp8.
        scale: of Q K^T; by default 1 / sqrt(head size).
        features: what the first kernel does not do, Skv other than Sq included; None for the first kernel.
        score, mask: functions, or their names in the library, as of :func:`pyfmha.add_attention`; their tensors are
            inputs of :meth:`run`, ``"alibi_slopes"``. A mask that is a tensor is said by ``features``.
        numbers: the functions' numbers by name, without those that shapes tell.
        library: as :func:`pyfmha.trt.register`.
        trt_module: whose classes to use; by default the first installed, or :mod:`pyfmha.trt.standin` where none is.
        device: number of the GPU.
        tactic: which algorithm: one of :attr:`tactics`, or 0 for the first.

    Attributes:
        forms: names, types and axes of the inputs and outputs.
        tactics: ids of the algorithms with code for the GPU.
        workspace_bytes: bytes of workspace for the shape last prepared.

    Raises:
        PluginError, SpecError: it is not served.
        LibraryError: the library is missing or cannot be used.
        DriverError: there is no GPU, or no code for it.
    """

    @says_causal("DirectSession", PluginError)
    def __init__(
        self,
        *,
        num_heads: int,
        head_size: int,
        causal: bool,
        dtype: Dtype = "fp16",
        scale: float | None = None,
        features: Features | None = None,
        score: Any = None,
        mask: Any = None,
        numbers: Mapping[str, Any] | None = None,
        library: Library | Path | str | None = None,
        trt_module: TensorRT | None = None,
        device: int = 0,
        tactic: int = 0,
    ) -> None:
        if causal not in (True, False):
            raise PluginError(
                f"causal is {causal!r}; allowed are True and False (for 'bottom-right': True, and"
                " features=Features(..., bottom_right=True))"
            )
        self._trt: Any = trt_module if trt_module is not None else _installed_or_standin()
        if features is None and 1 <= head_size <= 256 and head_size not in HEAD_SIZES:
            features = Features(num_heads)
        scale = default_scale(scale, head_size)
        found = find_library(library)
        if score is not None or mask is not None:
            features = features or Features(num_heads)
        self.problem = Problem(num_heads, head_size, dtype, scale, bool(causal), features)
        extension = extended_by(score, mask, numbers or {}, found, self.problem.dtype, self.problem.padded_size)
        if extension is not None:
            self.problem = replace(self.problem, extension=extension)
            check_held(Asked(score, mask), self.problem, found)
        self.forms = self.problem.forms()
        creator = make_creator(self._trt, found, operator=self.problem.program.operator)
        phases = self._trt.TensorRTPhase
        fields = creation_fields(self._trt, self.problem.program, self.problem.attributes())
        built = creator.create_plugin("DirectSession", fields.collection, phases.BUILD)
        loaded = creator.create_plugin("DirectSession", built.get_fields_to_serialize(), phases.RUNTIME)
        self._workspace: DeviceArray | None = None
        self._prepared: list[Shape] | None = None
        self.workspace_bytes = 0
        self._ordinal = device
        self._device: Device | None = Device(device)
        try:
            self.tactics: list[int] = loaded.get_valid_tactics()
            self.plugin = loaded.attach_to_context(None)
            self.plugin.set_tactic(tactic)
            self._stream = Stream()
        except BaseException:
            self._device.close()
            raise

    @property
    def algorithm(self) -> str:
        """The names of the variants that may run, one for aligned pointers and the generic one.

        Shapes that are decoded run others, see :class:`pyfmha.trt.plugin.PluginBehaviour`.
        """
        return str(self.plugin.tactic.name)

    def set_tactic(self, tactic: int) -> None:
        """Change the algorithm: one of :attr:`tactics`, or 0 for the first."""
        self.plugin.set_tactic(tactic)

    def prepare(self, batch_size: int, seq_len: int, kv_len: int | None = None) -> None:
        """Get ready for a shape: workspace and launch. :meth:`run` does it by itself.

        Args:
            batch_size: sequences.
            seq_len: rows of Q: Sq, or with cu_seqlens all tokens.
            kv_len: rows of K and V, by default as many. A bias, mask or factor is taken to be whole, broadcast along no
                axis.
        """
        known = {"batch": batch_size, **dict.fromkeys(("seq", "Sq", "tokens", "Q_tokens"), seq_len)}
        known |= dict.fromkeys(("Skv", "KV_tokens"), seq_len if kv_len is None else kv_len)
        whole = {"b": batch_size, "h": self.problem.num_heads, "q": seq_len, "k": known["Skv"]}
        known |= {f"{name}_{axis}": size for name in BROADCAST for axis, size in whole.items()}
        for name in DESCALES:  # of a ragged batch, sequences share factors
            ragged = self.problem.features is not None and self.problem.features.cu_seqlens
            known |= {f"{name}_b": 1 if ragged else batch_size, f"{name}_h": self.problem.kv_heads}
        unknown = [form for form in self.forms.all for axis in form.axes if not set(axis.unknown) <= set(known)]
        if unknown:
            raise SpecError(f"the shape of {unknown[0].name} is not told by batch and lengths; run() prepares for it")
        self._prepare(self.forms, [_shape_of(form, known) for form in self.forms.all])

    def _prepare(self, forms: Forms, shapes: list[Shape]) -> None:
        self._open().make_current()
        dynamic = [self._dynamic_desc(form, shape) for form, shape in zip(forms.all, shapes, strict=True)]
        count = len(forms.inputs)
        needed = self.plugin.get_workspace_size(dynamic[:count], dynamic[count:])
        descs = [desc.desc for desc in dynamic]
        self._prepared = None
        self.plugin.on_shape_change(descs[:count], descs[count:])
        if self._workspace is None or self._workspace.nbytes < needed:
            if self._workspace is not None:
                self._open().synchronize()  # a launch on any stream may still be writing to it
                self._workspace.free()
                self._workspace = None  # not to be used, should there be no memory for the next
            self._workspace = DeviceArray((needed,), np.uint8)
        self.workspace_bytes = needed
        self._prepared = shapes

    def enqueue(self, pointers: Mapping[str, int], stream: int) -> None:
        """Launch for the shape prepared, and return at once; the session's context must be current.

        Args:
            pointers: device addresses by the names in :attr:`forms`, ``"Q"``, ``"K"``, ``"V"`` and ``"Out"`` for the
                first kernel, each of the prepared shape.
            stream: a ``CUstream`` as an integer. Launches share the session's workspace, so they must not overlap.
        """
        inputs, outputs = ([pointers[form.name] for form in forms] for forms in (self.forms.inputs, self.forms.outputs))
        workspace = 0 if self._workspace is None else self._workspace.pointer
        self.plugin.enqueue([], [], inputs, outputs, workspace, stream)

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Attention on host arrays, and on other packages' tensors.

        Args:
            inputs: those of :attr:`forms` by name; for the first kernel ``"Q"``, ``"K"`` and ``"V"``, each [batch,
                heads, seq, head size]. Floating-point ones are float16, float32, or bits: bfloat16 as uint16, FP8
                (e4m3) as uint8. Each is a numpy array, or a tensor with DLPack or ``__cuda_array_interface__``
                (PyTorch's, CuPy's). Those on the GPU are used where they are, once what their producers queued is
                done. ``"bias"`` and ``"mask"`` (bool) have one to four axes, each as long as its counterpart or 1.
            outputs: contiguous tensors on the GPU by name, which are written where they are.

        Returns:
            The outputs by name, complete: those given, and numpy arrays for the others. ``"Out"`` is of the type of Q,
            or with FP8 of the session's dtype; ``"Lse"``, where it is asked for, is float32.

        Raises:
            SpecError: names, shapes or types do not fit.
            TensorError: a tensor is on another GPU, has gaps, is read-only and would be written, or cannot be read.
            PyfmhaError: the plugin or the driver failed.
        """
        device, given = self._open(), dict(outputs or {})
        device.make_current()
        operands = {name: self._operand(name, value) for name, value in inputs.items()}
        forms, shapes = self._check(operands)
        if self._prepared != shapes:
            self._prepare(forms, shapes)
        found = self._check_outputs(forms, shapes[len(forms.inputs) :], given)
        arrays = {name: DeviceArray.of(held) for name, held in operands.items() if not isinstance(held, TensorView)}
        copied = bool(arrays)
        for form, shape in zip(forms.outputs, shapes[len(forms.inputs) :], strict=True):
            if form.name not in given:
                arrays[form.name] = DeviceArray(shape, self._storage(form))
        with device_arrays(*arrays.values()):
            if copied:
                # A copy from pageable memory may still be under way, and the stream would not wait for it.
                device.synchronize()
            pointers = {name: held.pointer for name, held in {**operands, **found, **arrays}.items()}
            self.enqueue(pointers, self._stream.handle)
            self._stream.synchronize()
            return {
                form.name: given[form.name] if form.name in given else arrays[form.name].to_host()
                for form in forms.outputs
            }

    def close(self) -> None:
        """Give everything back; harmless when repeated."""
        if self._device is None:
            return
        device, self._device = self._device, None
        device.make_current()
        device.synchronize()
        self.plugin.destroy()
        if self._workspace is not None:
            self._workspace.free()
        self._stream.close()
        device.close()

    def __enter__(self) -> "DirectSession":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> Device:
        if self._device is None:
            raise PluginError("the session is closed")
        return self._device

    def _dynamic_desc(self, form: TensorForm, shape: Shape) -> Any:
        dynamic = self._trt.DynamicPluginTensorDesc()
        desc = self._trt.PluginTensorDesc()
        desc.dims = dynamic.min = dynamic.opt = dynamic.max = self._trt.Dims(shape)
        desc.type = self._trt.DataType(form.type_id)
        dynamic.desc = desc
        return dynamic

    def _storage(self, form: TensorForm) -> np.dtype[Any]:
        return np.dtype(_PLAIN.get(form.type or "") or STORAGE[form.type or self.problem.dtype])

    def _operand(self, name: str, value: Any) -> Any:
        """An input as a numpy array, or as a view of a tensor on the session's GPU."""
        if isinstance(value, np.ndarray):
            return value
        if not is_tensor(value):
            raise SpecError(
                f"{name} is a {type(value).__name__}; give a numpy array, or a tensor with DLPack or"
                " __cuda_array_interface__"
            )
        found = view(name, value, None)
        if found.device is None:
            return host_array(found)
        return on_device(name, value, self._stream.handle, self._ordinal)

    def _check_outputs(self, forms: Forms, shapes: list[Shape], given: Mapping[str, Any]) -> dict[str, TensorView]:
        """Views of the outputs given, which fit."""
        unknown = set(given) - {form.name for form in forms.outputs}
        if unknown:
            listed = ", ".join(form.name for form in forms.outputs)
            raise SpecError(f"outputs are {', '.join(given)}; the outputs are {listed}")
        found = {}
        for form, shape in zip(forms.outputs, shapes, strict=True):
            if form.name not in given:
                continue
            if not is_tensor(given[form.name]) or isinstance(given[form.name], np.ndarray):
                raise SpecError(
                    f"{form.name} is a {type(given[form.name]).__name__}; give a tensor on the GPU, or none"
                )
            held = on_device(form.name, given[form.name], self._stream.handle, self._ordinal, written=True)
            if held.stored != self._storage(form).name or held.shape != tuple(shape):
                raise SpecError(f"{form.name} is {held}; it will be {self._storage(form)} {list(shape)}")
            found[form.name] = held
        return found

    def _check(self, inputs: Mapping[str, Any]) -> tuple[Forms, list[Shape]]:
        """The forms and shapes of all tensors, for inputs that fit."""
        names = [form.name for form in self.forms.inputs]
        if set(inputs) != set(names):
            raise SpecError(f"inputs are {', '.join(inputs) or 'missing'}; give {', '.join(names)}")
        forms = self.problem.forms(*(len(inputs[name].shape) for name in names))
        wanted = ", ".join(f"{form} {self._storage(form)}" for form in forms.inputs)
        known: dict[str, int] = {}
        for count, form in enumerate(forms.inputs, 1):
            array = inputs[form.name]
            try:  # with those before it, so that the first is named that does not fit
                known = measure(Forms(forms.inputs[:count], ()), [inputs[name].shape for name in names[:count]], (), {})
                fits = _stored(array) == self._storage(form).name and not _is_other_fp8(array)
            except PluginError:
                fits = False
            if not fits:
                raise SpecError(
                    f"{form.name} is {array.dtype if _is_other_fp8(array) else _stored(array)} {list(array.shape)};"
                    f" inputs must be {wanted}"
                ) from None
        return forms, [_shape_of(form, known) for form in forms.all]


_PLAIN: dict[str, type] = {
    "int32": np.int32, "int64": np.int64, "int8": np.int8, "uint8": np.uint8, "bool": np.bool_, "fp8": np.uint8,
}  # fmt: skip


def _stored(held: Any) -> str:
    """The name of numpy's type for an array's or a tensor's elements."""
    return held.stored if isinstance(held, TensorView) else str(held.dtype)


def _is_other_fp8(held: Any) -> bool:
    """Whether it is a tensor of 8-bit floats that are not e4m3, whose bits would be misread."""
    return isinstance(held, TensorView) and held.dtype.startswith("fp8") and not held.holds(ELEMENTS["fp8"])


def _shape_of(form: TensorForm, known: Mapping[str, int]) -> Shape:
    scope = Scope(known)
    return tuple(axis.expression.evaluate(scope) if axis.size is None else axis.size for axis in form.axes)


def _installed_or_standin() -> Any:
    try:
        return find_module()
    except PluginError:
        return standin
