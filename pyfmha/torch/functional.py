"""The functions: attention with every keyword, and the drop-in for PyTorch's own."""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, overload

import torch

from pyfmha.attention.operator import OPERATOR
from pyfmha.errors import PluginError
from pyfmha.torch.functions import Own, extended, named_tensors, node_attributes, own_of
from pyfmha.torch.launch import launch
from pyfmha.torch.left_to_pytorch import beside_of_mask, why_not
from pyfmha.torch.operator import (
    NoGradient,
    attention_op,
    differentiated,
    lengths_of,
    operator_for,
    plain_op,
    ready_for,
)
from pyfmha.torch.plain import (
    Recent,
    as_given,
    dispatch_modes,
    function_modes,
    is_compiling,
    profiler,
    undispatched,
    undisturbed,
)
from pyfmha.torch.settings import Settings, check_lengths, problem_of
from pyfmha.torch.with_functions import attention_with_op
from pyfmha.trt.attention.beside import beside_of
from pyfmha.trt.attention.functions import Asked, split_mask
from pyfmha.trt.attention.words import Align, Causal, Function, Layout

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on

ALIGNMENTS = ("top-left", "bottom-right")
ALIGNED = (None, *ALIGNMENTS)
CAUSAL = (False, True, "bottom-right")
NOTHING: tuple[Any, ...] = ()
_recent, _recent_drop_in = Recent(), Recent()
_calls, _calls_drop_in = _recent.calls, _recent_drop_in.calls
_native = torch.nn.functional.scaled_dot_product_attention


Mask: TypeAlias = torch.Tensor | Function | tuple[torch.Tensor, Function] | None
Values: TypeAlias = Sequence[torch.Tensor | float] | Mapping[str, torch.Tensor | float]


class Options(TypedDict, total=False):
    """The keywords of :func:`attention` but ``return_lse``."""

    causal: Causal
    scale: float | None
    window: tuple[int, int]
    align: Align | None
    softcap: float
    layout: Layout | None
    q_lengths: torch.Tensor | None
    kv_lengths: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_kv: torch.Tensor | None
    bias: torch.Tensor | None
    mask: Mask
    sinks: torch.Tensor | None
    score: Function | None
    score_inputs: Values
    mask_inputs: Values


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: "Unpack[Options]",
) -> torch.Tensor: ...
@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: Literal[True], **options: "Unpack[Options]"
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: bool, **options: "Unpack[Options]"
) -> Any: ...
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: Causal = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    align: Align | None = None,
    softcap: float = 0.0,
    layout: Layout | None = None,
    q_lengths: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_kv: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    mask: Mask = None,
    sinks: torch.Tensor | None = None,
    score: Function | None = None,
    score_inputs: Values = NOTHING,
    mask_inputs: Values = NOTHING,
    return_lse: bool = False,
) -> Any:
    """softmax(scale * Q K^T) V of tensors, on PyTorch's current stream.

    Args:
        q, k, v: [batch, heads, seq, head size], or as ``layout`` says; float16, bfloat16 or float32, all of one.
        causal: as PyTorch's ``is_causal``, False by default; ``"bottom-right"`` is True with that ``align``.
        scale, window, align, softcap, layout, q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv, bias, mask, sinks,
            return_lse: as :func:`pyfmha.trt.add_attention`. A bias and a mask are read by their strides, expanded
            ones too.
        score, score_inputs, mask_inputs: as there, with tensors of PyTorch; ``mask`` may be a function, or a tensor and
            a function. On a GPU the library must hold them: ``pyfmha build --functions``. On a CPU their own source is
            run by Triton's interpreter, which is slow, and needs the functions themselves rather than their names.

    Returns:
        Out, of Q's type, its shape with V's head size; with ``return_lse`` a pair of it and the log-sum-exp, float32.

    Raises:
        PluginError: the tensors do not fit, or it is not served.
        PyfmhaError: on a GPU, the library is missing or lacks it, or the launch failed.
    """
    if type(window) is not tuple:
        window = _window(window)
    asked: tuple[Any, ...] | None = None
    others: Sequence[Any] = NOTHING
    functions = None
    known: Sequence[Any] = NOTHING
    alone = q_lengths is kv_lengths is cu_seqlens_q is cu_seqlens_kv is bias is mask is sinks is score is None
    more = (q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv, bias, mask, sinks)
    if not is_compiling() and score is None and score_inputs is mask_inputs is NOTHING:
        if alone:
            asked = (causal, scale, window, align, softcap, layout, return_lse)
        else:
            others = [tensor for tensor in more if tensor is not None]
            asked = (
                causal, scale, window, align, softcap, layout, return_lse, q_lengths is None, kv_lengths is None,
                cu_seqlens_q is None, cu_seqlens_kv is None, bias is None, mask is None, sinks is None,
            )  # fmt: skip
        try:
            known = _calls.get(asked, NOTHING)
        except TypeError:  # what has no hash is none of our keywords
            asked = None
        for alike, call in known:
            if alike(q, k, v, *others):
                if dispatch_modes() or function_modes() or profiler._is_profiler_enabled:
                    break
                return call(q, k, v, *others)
    if causal not in CAUSAL or align not in ALIGNED:
        raise PluginError(
            f"causal is {causal!r}, align {align!r}; allowed are True, False, 'bottom-right' and {ALIGNMENTS}"
        )
    if causal == "bottom-right" and align == "top-left":
        raise PluginError("causal is 'bottom-right' and align 'top-left'; leave one of them out")
    if not (mask is None or isinstance(mask, torch.Tensor)) or not (
        score is None and score_inputs is NOTHING and mask_inputs is NOTHING
    ):
        asked = None
        mask, functions = _functions_of(score, mask, score_inputs, mask_inputs)
        more = (q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv, bias, mask, sinks)
    for name, tensor in zip("qkv", (q, k, v), strict=True):
        if not isinstance(tensor, torch.Tensor):
            raise PluginError(f"{name} is of {type(tensor).__name__}; q, k and v are tensors of PyTorch")
    laid = layout or ("bhsd" if cu_seqlens_q is None else "bshd")
    factor = _usual_scale(q) if scale is None else _number("scale", scale)
    left, right = _window(window)
    aligned = "bottom-right" in (causal, align)
    keywords = (factor, bool(causal), aligned, left, right, _number("softcap", softcap), laid)
    arguments = (q, k, v, *keywords, *more[:4], return_lse, *more[4:])
    if functions:
        return _with_functions(functions, arguments)
    gradient = differentiated(q, k, v, bias, sinks)
    if not is_compiling() and not gradient and undispatched(q, k, v, more):
        ready, tensors = ready_for(*arguments)
        if asked is not None and as_given((q, k, v, *others), tensors):
            return _recent.keep(asked, tensors, ready)(*tensors)
        return launch(ready, tensors)
    if torch.onnx.is_in_onnx_export():
        return _exported(q, k, v, Settings(*keywords), lengths_of(*more[:4]), return_lse, beside_of(bias, mask, sinks))
    if gradient:
        out, lse = NoGradient.apply(*arguments)
    else:
        overload, taken = operator_for(arguments)
        out, lse = overload(*taken)
    return (out, lse) if return_lse else out


def _functions_of(score: Any, mask: Any, score_inputs: Any, mask_inputs: Any) -> tuple[torch.Tensor | None, Asked]:
    """The tensor that a mask is, and the functions."""
    tensor, shown = split_mask(mask)
    return tensor, Asked(score, shown, score_inputs, mask_inputs)


def _with_functions(asked: Asked, arguments: tuple[Any, ...]) -> Any:
    """The same with functions."""
    q, k, v, *keywords = arguments
    settings, lengths, return_lse = Settings(*keywords[:7]), lengths_of(*keywords[7:11]), keywords[11]
    beside = beside_of(*keywords[12:])
    problem = problem_of(q, k, v, settings, frozenset(lengths), return_lse, beside)
    own = own_of(asked, q, problem.padded_size)
    if torch.onnx.is_in_onnx_export():
        return _exported(q, k, v, settings, lengths, return_lse, beside, own)
    out, lse = attention_with_op(q, k, v, own.score, own.mask, own.tensors, own.numbers, *keywords)
    return (out, lse) if return_lse else out


undisturbed(_functions_of)
undisturbed(_with_functions)


def _window(window: Any) -> tuple[int, int]:
    try:
        left, right = map(operator.index, window)
    except (TypeError, ValueError):
        wanted = "give two integers, how many keys a query sees to its left and right"
        raise PluginError(f"window is {window!r}; {wanted}") from None
    return left, right


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise PluginError(f"{name} is {value!r}; give a number") from None


def _usual_scale(q: torch.Tensor) -> float:
    """That of PyTorch; 1 without elements, which is refused later, with better words than a division by 0."""
    size = q.shape[-1] if q.ndim else 0
    return 1 / math.sqrt(size) if size else 1.0


def _exported(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    settings: Settings,
    lengths: dict[str, torch.Tensor],
    lse: bool,
    beside: dict[str, torch.Tensor],
    own: Own | None = None,
) -> Any:
    """The plugin's node in an ONNX model."""
    check_lengths(q, lengths)
    problem = problem_of(q, k, v, settings, frozenset(lengths), lse, beside)
    if own is not None:
        problem = extended(problem, own, q)
        beside = {**beside, **named_tensors(problem, own)}
    tensors = {"Q": q, "K": k, "V": v, **{name: tensor.to(torch.int32) for name, tensor in lengths.items()}, **beside}
    out_shape = (*q.shape[:-1], v.shape[-1])
    rows, heads = (2, 1) if settings.layout == "bhsd" else (1, 2)
    lse_shape = (q.shape[1], q.shape[0]) if "cu_seqlens_q" in lengths else (q.shape[0], q.shape[heads], q.shape[rows])
    attributes = {**problem.node_attributes(), **node_attributes(problem.extension)}
    outputs = torch.onnx.ops.symbolic_multi_out(
        f"pyfmha::{problem.program.operator.name}",
        [tensors[form.name] for form in problem.forms().inputs],
        attrs={**attributes, "plugin_version": OPERATOR.version, "plugin_namespace": ""},
        dtypes=[q.dtype, torch.float32][: 1 + lse],
        shapes=[out_shape, lse_shape][: 1 + lse],
        version=1,
    )
    return tuple(outputs) if lse else outputs[0]


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """A drop-in for ``torch.nn.functional.scaled_dot_product_attention``, to which it leaves what it does not serve.

    Served are tensors of four axes without dropout, that need no gradient, on a GPU or in an export to ONNX. A mask is
    served without ``is_causal`` where it is of bool, of Q's type or of float32, its axes are whole or 1, and on a GPU
    the library holds ``fmha_biased_*``.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa: as PyTorch's.
    """
    asked: tuple[Any, ...] | None = None
    given: tuple[Any, ...] = NOTHING
    known: Sequence[Any] = NOTHING
    if not is_compiling() and not dropout_p:
        asked = (is_causal, scale, enable_gqa, attn_mask is None)
        given = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
        try:
            known = _calls_drop_in.get(asked, NOTHING)
        except TypeError:  # what has no hash is none of our keywords
            asked = None
        for alike, call in known:
            if alike(*given):
                if dispatch_modes() or function_modes() or profiler._is_profiler_enabled:
                    break
                return call(*given)
    direct = not is_compiling() and undispatched(query, key, value, (attn_mask,))
    exporting = not direct and torch.onnx.is_in_onnx_export()
    if why_not(query, key, value, attn_mask, dropout_p, enable_gqa, exporting=exporting) is None and not (
        attn_mask is not None and is_causal  # some of PyTorch's kernels refuse it, others apply both
    ):
        if exporting:
            return attention(query, key, value, causal=is_causal, scale=scale, **beside_of_mask(attn_mask))
        # Without the layers of `attention`, which check keywords that are not there.
        factor = _usual_scale(query) if scale is None else _number("scale", scale)
        if not direct:
            overload = plain_op if attn_mask is None else attention_op
            return overload(query, key, value, factor, is_causal, **beside_of_mask(attn_mask))[0]
        ready, tensors = ready_for(query, key, value, factor, is_causal, **beside_of_mask(attn_mask))
        if asked is not None and as_given(given, tensors):
            return _recent_drop_in.keep(asked, given, ready)(*given)
        return launch(ready, tensors)
    return _native(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
        enable_gqa=enable_gqa,
    )  # fmt: skip
