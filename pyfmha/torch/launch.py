"""The plugin on PyTorch's tensors: prepared once for each problem and shape, launched on the current stream."""

import functools
import threading
from collections.abc import Sequence

import torch

from pyfmha.operators.forms import Forms, Shape, measure
from pyfmha.runtime.library import Library
from pyfmha.trt import standin
from pyfmha.trt.attention.problem import PROGRAM, Problem
from pyfmha.trt.creator import find_library, make_creator
from pyfmha.trt.fields import creation_fields
from pyfmha.trt.plugin import PluginBehaviour

LAYER = "torch.ops.pyfmha.attention"
"""The name that errors give."""

KEPT = 256
"""Shapes that are kept prepared. One costs a plugin object, some KiB."""


@functools.lru_cache(maxsize=1)
def library() -> Library:
    """The library, found once: ``PYFMHA_LIBRARY``, else ``aot_out/libpyfmha.so``.

    Raises:
        LibraryError: there is none, or it cannot be used.
    """
    return find_library()


@functools.lru_cache(maxsize=KEPT)
def _plugin(problem: Problem) -> PluginBehaviour:
    fields = creation_fields(standin, PROGRAM, problem.attributes())
    phase = standin.TensorRTPhase.BUILD
    plugin: PluginBehaviour = make_creator(standin, library()).create_plugin(LAYER, fields.collection, phase)
    return plugin


@functools.lru_cache(maxsize=KEPT)
def _prepared(problem: Problem, shapes: tuple[Shape, ...], device: int, thread: int) -> tuple[PluginBehaviour, int]:
    """A plugin that is ready for a shape on a device, whose context is current, and the bytes of its workspace.

    One a thread, as TensorRT has one an execution context: a prepared launch packs its arguments in place.
    """
    forms = problem.forms()
    measure(forms, shapes[: len(forms.inputs)], shapes[len(forms.inputs) :], problem.instance.scope.values)
    plugin: PluginBehaviour = _plugin(problem).attach_to_context(None)
    plugin.set_tactic(0)
    dynamic = [_described(forms, index, shape) for index, shape in enumerate(shapes)]
    count = len(forms.inputs)
    needed = plugin.get_workspace_size(dynamic[:count], dynamic[count:])
    descs = [desc.desc for desc in dynamic]
    plugin.on_shape_change(descs[:count], descs[count:])
    return plugin, needed


def _described(forms: Forms, index: int, shape: Shape) -> standin.DynamicPluginTensorDesc:
    dynamic, desc = standin.DynamicPluginTensorDesc(), standin.PluginTensorDesc()
    desc.dims = dynamic.min = dynamic.opt = dynamic.max = standin.Dims(shape)
    desc.type = standin.DataType(forms.all[index].type_id or 0)
    dynamic.desc = desc
    return dynamic


def launch(problem: Problem, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Attention on the GPU that the tensors are on.

    The first call for a shape loads code; later ones only launch, so that they can be captured in a CUDA graph. The
    results and the workspace come from PyTorch's allocator, on its current stream.

    Args:
        problem: what is asked for.
        inputs: in the order of :meth:`pyfmha.trt.attention.problem.Problem.forms`.

    Raises:
        PyfmhaError: the library lacks it, the shapes do not fit, or the launch failed.
    """
    forms = problem.forms()
    tensors = [tensor.contiguous() for tensor in inputs]
    q = tensors[0]
    outputs = [q.new_empty(q.shape)]
    if len(forms.outputs) > 1:
        outputs.append(q.new_empty(lse_shape(problem, q), dtype=torch.float32))
    shapes = tuple(tuple(tensor.shape) for tensor in (*tensors, *outputs))
    with torch.cuda.device(q.device):
        plugin, needed = _prepared(problem, shapes, q.device.index or 0, threading.get_ident())
        workspace = q.new_empty(needed, dtype=torch.uint8) if needed else None
        pointers = [tensor.data_ptr() for tensor in tensors]
        results = [tensor.data_ptr() for tensor in outputs]
        address = 0 if workspace is None else workspace.data_ptr()
        plugin.enqueue((), (), pointers, results, address, torch.cuda.current_stream().cuda_stream)
    return outputs


def lse_shape(problem: Problem, q: torch.Tensor) -> tuple[int, ...]:
    """The shape of the log-sum-exp: [batch, heads, seq], or of ragged batches [heads, tokens]."""
    features = problem.features
    assert features is not None
    if features.cu_seqlens:
        return q.shape[1], q.shape[0]
    return (*q.shape[:1], problem.num_heads, q.shape[2 if features.layout == "bhsd" else 1])
