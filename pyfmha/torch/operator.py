"""``torch.ops.pyfmha.attention``: tensors in, tensors out, known to PyTorch's compiler and exporter.

It has two overloads, which do the same: ``default`` takes what most calls give, ``full`` every keyword. PyTorch's
dispatcher spends some 40 ns on an argument, given or not. Defined by ``torch.library.Library``, not by ``custom_op``,
whose layers in Python cost 8 us a call on the host.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch

from pyfmha.errors import PluginError
from pyfmha.torch import cpu
from pyfmha.torch.direct import launch_at_once
from pyfmha.torch.functions import Own, extended, on_cpu
from pyfmha.torch.launch import KEPT, Ready, launch, lse_shape, out_strides, prepare
from pyfmha.torch.plain import GIVEN, Recent, as_given
from pyfmha.torch.settings import Settings, check_devices, check_lengths, problem_of
from pyfmha.trt.attention.beside import beside_of

NAME, FULL_NAME = "pyfmha::attention", "pyfmha::attention.full"
SCHEMA = "(Tensor q, Tensor k, Tensor v, float scale, bool causal=False) -> (Tensor, Tensor)"
FULL_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, float scale, bool causal=False, bool bottom_right=False, int window_left=-1,"
    " int window_right=-1, float softcap=0.0, str layout='bhsd', Tensor? q_lengths=None, Tensor? kv_lengths=None,"
    " Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_kv=None, bool return_lse=False, Tensor? bias=None,"
    " Tensor? mask=None, Tensor? sinks=None) -> (Tensor, Tensor)"
)
Lengths = dict[str, torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]

USUAL = (False, -1, -1, 0.0, "bhsd", False)
"""The keywords that are no tensors and that ``default`` has not, where they are not given."""
PLAIN, LAST_KEYWORD, BIAS = 5, 10, 15
"""The arguments of ``default``, in front of lengths, and in front of bias, mask and sinks. PyTorch leaves out defaults
at the end."""

_ready: dict[Any, Ready] = {}
_recent = Recent(pair=True)
_library = torch.library.Library("pyfmha", "DEF")
# The strides of Out follow from those of Q, so the compiler must not choose others than it traced with.
_tags = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
# In this order: where the name alone is called, the first that takes the arguments is.
_library.define("attention" + SCHEMA, tags=_tags)
_library.define("attention.full" + FULL_SCHEMA, tags=_tags)


def ready_for(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False, bottom_right: bool = False,
    window_left: int = -1, window_right: int = -1, softcap: float = 0.0, layout: str = "bhsd",
    q_lengths: torch.Tensor | None = None, kv_lengths: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None, cu_seqlens_kv: torch.Tensor | None = None, return_lse: bool = False,
    bias: torch.Tensor | None = None, mask: torch.Tensor | None = None, sinks: torch.Tensor | None = None,
    own: Own | None = None,
) -> tuple[Ready, list[torch.Tensor]]:  # fmt: skip
    """Attention on the GPU, prepared: arguments as :func:`pyfmha.torch.attention`, results for :func:`launch`."""
    lengths = (q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv)
    given: tuple[Any, ...] | None = None
    if not (q_lengths is kv_lengths is cu_seqlens_q is cu_seqlens_kv is bias is mask is sinks is None):
        given = (
            *(None if length is None else (length.shape, length.dtype) for length in lengths),
            *(None if x is None else (x.shape, x.stride(), x.dtype, x.get_device()) for x in (bias, mask, sinks)),
        )
    key = (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype, q.get_device(),
        k.get_device(), v.get_device(), scale, causal, bottom_right, window_left, window_right, softcap, layout, given,
        return_lse, None if own is None else own.form,
    )  # fmt: skip
    ready = _ready.get(key)
    tensors = [q, k, v]
    if given is not None:
        named = lengths_of(*lengths)
        tensors += [length.to(q.device, torch.int32).contiguous() for length in named.values()]
        # A bias and a mask are read by their strides.
        tensors += beside_of(bias, mask, None if sinks is None else sinks.contiguous()).values()
    if own is not None:
        tensors += [tensor.contiguous() for tensor in own.tensors]
    if ready is None:
        check_lengths(q, lengths_of(*lengths))
        settings = Settings(scale, causal, bottom_right, window_left, window_right, softcap, layout)
        beside = beside_of(bias, mask, sinks)
        ready = _prepared(key, tensors, settings, frozenset(lengths_of(*lengths)), return_lse, beside, own)
    return ready, tensors


def check_given(q: Any, k: Any, v: Any) -> None:
    """Refuse None for a tensor, which PyTorch's dispatcher passes on where another tells it the device.

    Raises:
        PluginError: saying which.
    """
    if q is None or k is None or v is None:
        missing = ", ".join(name for name, tensor in zip("qkv", (q, k, v), strict=True) if tensor is None)
        raise PluginError(f"{missing} is None; q, k and v are tensors of PyTorch")


def differentiated(*tensors: torch.Tensor | None) -> bool:
    """Whether a gradient may be asked for with respect to one of some tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class NoGradient(torch.autograd.Function):  # type: ignore[misc]
    """The operator, which has no gradient, where one may be asked for: then an error says so."""

    @staticmethod
    def forward(context: Any, *arguments: Any) -> Any:
        return attention_op(*arguments)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        raise PluginError("attention has no gradient here; call it under torch.no_grad(), or train with PyTorch's own")


def _refusing(*arguments: Any) -> Pair:
    pair: Pair = NoGradient.apply(*arguments)
    return pair


def _plain_on_gpu(q: Any, k: Any, v: Any, *keywords: Any) -> Pair:
    call = _recent.find(keywords, (q, k, v))
    if call is None:  # else none of them needs a gradient
        check_given(q, k, v)
        if differentiated(q, k, v):
            return _refusing(q, k, v, *keywords)
        ready, _ = ready_for(q, k, v, *keywords)
        call = _recent.keep(keywords, (q, k, v), ready)
    pair: Pair = call(q, k, v, fresh=True)  # what PyTorch does with its own results does not meet another call's
    return pair


def _on_gpu(*arguments: Any) -> Pair:
    q, k, v, *keywords = arguments
    check_given(q, k, v)
    if torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (len(arguments) > BIAS and differentiated(*arguments[BIAS:]))
    ):
        return _refusing(*arguments)
    given = q, k, v
    if len(arguments) > LAST_KEYWORD:  # there may be other tensors
        given += tuple([x for x in keywords if isinstance(x, torch.Tensor)])
        keywords = [GIVEN if isinstance(x, torch.Tensor) else x for x in keywords]
    asked = tuple(keywords)
    call = _recent.find(asked, given)
    if call is None:
        ready, tensors = ready_for(*arguments)
        if not as_given(given, tensors):
            return launched(ready, tensors)
        call = _recent.keep(asked, given, ready)
    pair: Pair = call(*given, fresh=True)
    return pair


def launched(ready: Ready, tensors: Sequence[torch.Tensor]) -> Pair:
    """Of what is prepared, as the operator returns it."""
    pair: Pair = launch(ready, tensors, pair=True)
    return pair


def _prepared(
    key: Any,
    tensors: list[torch.Tensor],
    settings: Settings,
    lengths: frozenset[str],
    return_lse: bool,
    beside: dict[str, torch.Tensor],
    own: Own | None,
) -> Ready:
    q, k, v = tensors[:3]
    problem = problem_of(q, k, v, settings, lengths, return_lse, beside)
    if own is not None:
        problem = extended(problem, own, q)
    check_devices(q, k, v, beside)
    with torch.cuda.device(q.device):
        ready = prepare(problem, tensors, q.get_device())
    if len(_ready) >= KEPT:
        _ready.pop(next(iter(_ready)), None)
    _ready[key] = ready
    return ready


def _on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False, bottom_right: bool = False,
    window_left: int = -1, window_right: int = -1, softcap: float = 0.0, layout: str = "bhsd",
    q_lengths: torch.Tensor | None = None, kv_lengths: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None, cu_seqlens_kv: torch.Tensor | None = None, return_lse: bool = False,
    bias: torch.Tensor | None = None, mask: torch.Tensor | None = None, sinks: torch.Tensor | None = None,
) -> Pair:  # fmt: skip
    keywords = (
        scale, causal, bottom_right, window_left, window_right, softcap, layout, q_lengths, kv_lengths, cu_seqlens_q,
        cu_seqlens_kv, return_lse, bias, mask, sinks,
    )  # fmt: skip
    check_given(q, k, v)
    if differentiated(q, k, v, bias, sinks):
        return _refusing(q, k, v, *keywords)
    return computed(q, k, v, *keywords)


def computed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False, bottom_right: bool = False,
    window_left: int = -1, window_right: int = -1, softcap: float = 0.0, layout: str = "bhsd",
    q_lengths: torch.Tensor | None = None, kv_lengths: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None, cu_seqlens_kv: torch.Tensor | None = None, return_lse: bool = False,
    bias: torch.Tensor | None = None, mask: torch.Tensor | None = None, sinks: torch.Tensor | None = None,
    own: Own | None = None,
) -> Pair:  # fmt: skip
    """Attention on the CPU: arguments as :func:`pyfmha.torch.attention`."""
    settings = Settings(scale, causal, bottom_right, window_left, window_right, softcap, layout)
    lengths = lengths_of(q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv)
    beside = beside_of(bias, mask, sinks)
    # What is refused on a GPU is refused here.
    check_devices(q, k, v, beside)
    check_lengths(q, lengths)
    problem, function = problem_of(q, k, v, settings, frozenset(lengths), return_lse, beside), None
    result, nothing = out_of(q, v)
    if own is not None:
        named = {"Q": q, "K": k, "V": v, **lengths, **beside}
        forms = problem.forms().inputs
        shapes = [tuple(x.shape) for x in (*(named[form.name] for form in forms), *own.tensors, result)]
        shapes += [lse_shape(problem, q)] if return_lse else []
        function = on_cpu(extended(problem, own, q), own, shapes)
    if cu_seqlens_q is not None and cu_seqlens_kv is not None:
        out, lse = cpu.attend_ragged(q, k, v, settings, cu_seqlens_q, cu_seqlens_kv, beside, function)
        return result.copy_(out), lse if return_lse else nothing
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = cpu.attend(q, k, v, settings, q_lengths, kv_lengths, beside, function)
    result.copy_(out.transpose(1, 2) if layout == "bshd" else out)
    return result, lse if return_lse else nothing


def fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False, bottom_right: bool = False,
    window_left: int = -1, window_right: int = -1, softcap: float = 0.0, layout: str = "bhsd",
    q_lengths: torch.Tensor | None = None, kv_lengths: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None, cu_seqlens_kv: torch.Tensor | None = None, return_lse: bool = False,
    bias: torch.Tensor | None = None, mask: torch.Tensor | None = None, sinks: torch.Tensor | None = None,
) -> Pair:  # fmt: skip
    check_devices(q, k, v, beside_of(bias, mask, sinks))
    out, nothing = out_of(q, v)
    if not return_lse:
        return out, nothing
    if cu_seqlens_q is not None:
        return out, q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    rows, heads = (2, 1) if layout == "bhsd" else (1, 2)
    return out, q.new_empty((q.shape[0], q.shape[heads], q.shape[rows]), dtype=torch.float32)


_library.impl("attention", _plain_on_gpu, "CUDA")
_library.impl("attention.full", _on_gpu, "CUDA")
for _name, _called in (("attention", NAME), ("attention.full", FULL_NAME)):
    _library.impl(_name, _on_cpu, "CPU")
    # Both ask for gradients themselves; PyTorch's own way only warns, at a backward pass that then goes on without.
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(_called, fake, lib=_library)
attention_op, plain_op = torch.ops.pyfmha.attention.full, torch.ops.pyfmha.attention.default
"""The operator with every keyword, and with the first alone."""
KEYWORDS = {name: parameter.default for name, parameter in list(signature(fake).parameters.items())[3:]}
"""Those of ``full``, with their defaults."""
launch_at_once(torch.ops.pyfmha.attention, _recent, KEYWORDS)


def operator_for(arguments: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """The overload for the arguments of ``full``, and those that it takes."""
    tensors = (*arguments[LAST_KEYWORD : BIAS - 1], *arguments[BIAS:])
    if all(x is None for x in tensors) and (*arguments[PLAIN:LAST_KEYWORD], arguments[BIAS - 1]) == USUAL:
        return plain_op, arguments[:PLAIN]
    return attention_op, arguments


def out_of(q: torch.Tensor, v: torch.Tensor) -> Pair:
    """Out, not written yet, and what stands for a log-sum-exp that is no result."""
    shape = (*q.shape[:-1], v.shape[-1])
    out = torch.empty_strided(shape, out_strides(q, v.shape[-1]), dtype=q.dtype, device=q.device)
    return out, q.new_empty((0,), dtype=torch.float32)


def lengths_of(
    q_lengths: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_kv: torch.Tensor | None,
) -> Lengths:
    """Those that are given, in the plugin's order."""
    if (cu_seqlens_q is None) != (cu_seqlens_kv is None):
        raise PluginError("give cu_seqlens_q and cu_seqlens_kv, which may be one tensor, or none")
    named = {
        "q_lengths": q_lengths,
        "kv_lengths": kv_lengths,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_kv": cu_seqlens_kv,
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}
