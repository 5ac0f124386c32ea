"""The plugin on PyTorch's tensors: prepared once for each problem and form of tensors, then only launched."""

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from pyfmha.attention.biased import Biased
from pyfmha.attention.biased_operator import AXES, BROADCAST
from pyfmha.operators.forms import Shape
from pyfmha.runtime.library import Library
from pyfmha.trt import standin
from pyfmha.trt.attention.problem import Problem
from pyfmha.trt.creator import find_library, make_creator
from pyfmha.trt.fields import creation_fields
from pyfmha.trt.launch import Enqueue
from pyfmha.trt.plugin import PluginBehaviour

LAYER = "torch.ops.pyfmha.attention"
"""The name that errors give."""

KEPT = 256
"""Problems that are kept prepared. One costs a plugin object, some KiB."""

Call = Callable[..., Any]
"""Of Q, K and V, and the other inputs, to what :func:`launch` returns. What stands for a log-sum-exp that is no result
may be the one of an earlier call, if not ``fresh=True``."""

_lock = threading.Lock()


@functools.lru_cache(maxsize=1)
def library() -> Library:
    """The library, found once: ``PYFMHA_LIBRARY``, else ``aot_out/libpyfmha.so``.

    Raises:
        LibraryError: there is none, or it cannot be used.
    """
    return find_library()


def lacking(dtype: str, head_size: int) -> str | None:
    """Why bias, mask and values of another head size are not served, which are not in the default build; else None.

    Args:
        dtype: of Q.
        head_size: the larger of Q's and V's.

    Raises:
        LibraryError: there is no library.
    """
    held, name = library(), _biased_name(dtype, head_size)
    return None if name in held else f"{held.path} does not hold {name}"


# As torch.compiler.assume_constant_result does, which would import the compiler with its seconds.
lacking._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=KEPT)
def _biased_name(dtype: str, head_size: int) -> str:
    return Biased(dtype, head_size).name


@functools.lru_cache(maxsize=KEPT)
def _attached(problem: Problem, device: int) -> PluginBehaviour:
    """A plugin on a device, whose context is current, with its code loaded."""
    program = problem.program
    fields = creation_fields(standin, program, problem.attributes())
    phase = standin.TensorRTPhase.BUILD
    made = make_creator(standin, library(), operator=program.operator).create_plugin(LAYER, fields.collection, phase)
    plugin: PluginBehaviour = made.attach_to_context(None)
    plugin.set_tactic(0)
    return plugin


class Ready(NamedTuple):
    """A launch that is prepared.

    Attributes:
        enqueue: the launch, as TensorRT calls a plugin's.
        copied: whether Q, K or V must be copied first.
        out_shape: Out's: Q's with the head size of V.
        out_strides: those of Out, which lies in memory as Q does: by heads or by rows.
        dtype: Out's.
        device: the GPU's number.
        lse_shape: the log-sum-exp's; None where it is no result.
        lse_strides: its strides.
        workspace_bytes: of workspace.
        plugin: what ``enqueue`` lives by.
    """

    enqueue: Enqueue
    copied: bool
    out_shape: Shape
    out_strides: tuple[int, ...]
    dtype: torch.dtype
    device: int
    lse_shape: tuple[int, ...] | None
    lse_strides: tuple[int, ...]
    workspace_bytes: int
    plugin: PluginBehaviour


def prepare(problem: Problem, tensors: Sequence[torch.Tensor], device: int) -> Ready:
    """Get ready for tensors of some shapes and strides. It loads code where none is loaded yet.

    Args:
        problem: what is asked for.
        tensors: in the order of :meth:`pyfmha.trt.attention.problem.Problem.forms`; only their forms are looked at.
        device: whose context is current.

    Raises:
        PyfmhaError: the library lacks it, or the shapes do not fit.
    """
    q = tensors[0]
    out_shape = (*q.shape[:-1], problem.v_size)
    shapes = [*(tuple(tensor.shape) for tensor in tensors), out_shape]
    forms = problem.forms(*map(len, shapes[:-1]))
    of_lse = lse_shape(problem, q) if len(forms.outputs) > 1 else None
    if of_lse is not None:
        shapes.append(of_lse)
    _, k, v, *more = tensors
    copied = _needs_copy(q) or _needs_copy(k) or _needs_copy(v)
    out = out_strides(q, problem.v_size)
    laid = laid_as if copied else torch.Tensor.stride
    values = _strides(problem, [*shapes[:3], out_shape], [laid(q), laid(k), laid(v), out])
    for form, tensor in zip(forms.inputs[3:], more, strict=True):
        if form.name in BROADCAST:
            values |= _broadcast_strides(form.name, tensor)
    with _lock:
        plugin = _attached(problem, device)
        plan = plugin.planned(shapes, values)
        enqueue = plugin.bound(plan)
    of_out = out_shape, out, q.dtype, device
    return Ready(enqueue, copied, *of_out, of_lse, dense(of_lse or ()), plan.workspace_bytes, plugin)


_STRIDE_NAMES = {
    order: [[f"{name}_stride_{axis}" for axis in order] for name in ("q", "k", "v", "out")]
    for order in ("sh", "bhs", "bsh")
}


def _strides(problem: Problem, shapes: Sequence[Shape], strided: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """The arguments of the kernels that are strides, as far as they are any: an axis of one element has none."""
    features = problem.features
    assert features is not None
    order = "sh" if features.cu_seqlens else "bhs" if features.layout == "bhsd" else "bsh"
    return {
        name: stride
        for names, shape, strides in zip(_STRIDE_NAMES[order], shapes, strided, strict=True)
        for name, size, stride in zip(names, shape, strides, strict=False)
        if size > 1
    }


def _broadcast_strides(name: str, tensor: torch.Tensor) -> dict[str, int]:
    """Those of a bias or mask, which is read as it lies, expanded ones too: of an axis of 1 the plugin knows better."""
    axes = list(AXES)[len(AXES) - tensor.ndim :]
    return {
        f"{name}_stride_{axis}": stride
        for axis, size, stride in zip(axes, tensor.shape, tensor.stride(), strict=True)
        if size > 1
    }


def _needs_copy(tensor: torch.Tensor) -> bool:
    """Whether its rows have gaps inside, or elements lie on each other, as those that were expanded."""
    strides = tensor.stride()
    if strides[-1] == 1 and 0 not in strides:
        return False
    *outer, last = zip(tensor.shape, strides, strict=True)
    return (last[0] > 1 and last[1] != 1) or any(size > 1 and stride == 0 for size, stride in outer)


def laid_as(q: Any, last: Any = None) -> tuple[Any, ...]:
    """The strides of a dense tensor of a tensor's shape, whose axes 1 and 2 lie in memory in the same order.

    Args:
        q: [batch, heads, seq, head size] or [batch, seq, heads, head size], in which ``transpose(1, 2)`` may have been
            the last word; or of three axes, then the strides are those of a contiguous tensor.
        last: the head size, where it is not the tensor's own.
    """
    shape = q.shape if last is None else (*q.shape[:-1], last)
    if q.ndim == 4 and q.stride(1) < q.stride(2):
        return shape[1] * shape[2] * shape[3], shape[3], shape[1] * shape[3], 1
    return dense(shape)


def dense(shape: Any) -> tuple[Any, ...]:
    """The strides of a contiguous tensor."""
    found: list[Any] = []
    stride = 1
    for size in reversed(shape):
        found.append(stride)
        stride = stride * size
    return tuple(reversed(found))


out_strides = laid_as


def densely(tensor: torch.Tensor) -> torch.Tensor:
    """A dense copy that lies as :func:`laid_as` says."""
    return torch.empty_strided(tensor.shape, laid_as(tensor), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _empty_by_name(shape: Shape, strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


# PyTorch's own compiler asks by these, which make no objects and need no dispatcher: up to a microsecond less each.
empty: Callable[[Shape, tuple[int, ...], torch.dtype], torch.Tensor] = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", _empty_by_name
)
_stream_of: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream
)
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def launch(ready: Ready, tensors: Sequence[torch.Tensor], pair: bool = False) -> Any:
    """Attention on the GPU that the tensors are on, on PyTorch's current stream.

    It can be captured in a CUDA graph. The results and the workspace come from PyTorch's allocator.

    Args:
        ready: of :func:`prepare`, for such tensors.
        tensors: those.
        pair: whether the log-sum-exp is a tensor even where it is no result, then an empty one.

    Returns:
        Out and the log-sum-exp; Out alone where that is no tensor.

    Raises:
        LaunchError: it failed.
    """
    with nullcontext() if _current_device() == ready.device else torch.cuda.device(ready.device):
        if ready.copied:
            tensors = [*map(densely, tensors[:3]), *tensors[3:]]
        return _launcher(ready, len(tensors), pair)(*tensors, fresh=True)


def caller(ready: Ready, count: int, pair: bool) -> Call:
    """:func:`launch` for a number of tensors, without its questions where none is copied."""
    if ready.copied:
        return lambda *tensors, fresh=True: launch(ready, tensors, pair)
    return _launcher(ready, count, pair)


def _launcher(ready: Ready, count: int, pair: bool) -> Call:
    """Launches for so many tensors, none of which must be copied."""
    made = _maker(count, pair, ready.lse_shape is not None, ready.workspace_bytes > 0)
    call: Call = made(ready, ready.lse_shape, ready.lse_strides, (ready.workspace_bytes,))
    return call


@functools.cache
def _maker(count: int, pair: bool, lse: bool, workspace: bool) -> Callable[..., Call]:
    """Makes what launches, for one pattern of tensors.

    Written as text, as for :mod:`pyfmha.trt.launch`: what is neither given nor asked for costs nothing then."""
    given = [f"t{number}" for number in range(count)]
    lines = ["out = empty(shape, strides, dtype)"]
    if lse:
        lines.append("lse = empty(lse_shape, lse_strides, float32)")
    elif pair:
        lines += [
            "lse = nothing",
            "if fresh: lse = empty((0,), (1,), float32)",
            # Who was given it may have resized it, written to it or asked for its gradient.
            "elif lse is None or lse._version or lse.requires_grad: lse = nothing = _nothing()",
        ]
    if workspace:
        lines.append("workspace = empty(workspace_shape, (1,), uint8)")
    addresses = _tuple(f"{name}.data_ptr()" for name in given)
    results = _tuple(f"{name}.data_ptr()" for name in ["out", "lse"][: 1 + lse])
    address = "workspace.data_ptr()" if workspace else "0"
    lines.append(f"enqueue((), (), {addresses}, {results}, {address}, _stream_of(device))")
    lines.append(f"return out{', lse' * (lse or pair)}")
    text = _TEXT.format(tensors=_tuple(given), given=", ".join(given), pair=pair, lines="\n        ".join(lines))
    made: dict[str, Any] = {}
    exec(compile(text, "<launch>", "exec"), globals(), made)
    make: Callable[..., Call] = made["make"]
    return make


_TEXT = """
def make(ready, lse_shape, lse_strides, workspace_shape):
    enqueue, _, shape, strides, dtype, device, *_ = ready
    float32, uint8 = torch.float32, torch.uint8
    nothing = None

    def call({given}, fresh=False):
        nonlocal nothing
        if _current_device() != device:
            return launch(ready, {tensors}, {pair})
        {lines}

    return call
"""


def _nothing() -> torch.Tensor:
    """What stands for a log-sum-exp that is no result, on the current device: for calls in any mode."""
    with torch.inference_mode(False):
        return empty((0,), (1,), torch.float32)


def _tuple(terms: Iterable[str]) -> str:
    return f"({', '.join(terms)},)"


def lse_shape(problem: Problem, q: torch.Tensor) -> tuple[int, ...]:
    """The shape of the log-sum-exp: [batch, heads, seq], or of ragged batches [heads, tokens]."""
    features = problem.features
    assert features is not None
    if features.cu_seqlens:
        return q.shape[1], q.shape[0]
    return (*q.shape[:1], problem.num_heads, q.shape[2 if features.layout == "bhsd" else 1])
