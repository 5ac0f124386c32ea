"""Attention as a layer of a TensorRT network."""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from pyfmha.errors import PluginError
from pyfmha.runtime.library import Library
from pyfmha.trt.attention.added import added
from pyfmha.trt.attention.beside import beside_features, beside_of
from pyfmha.trt.attention.causal import check_causal, says_causal
from pyfmha.trt.attention.functions import Asked, split_mask
from pyfmha.trt.attention.problem import DTYPE_NAMES, DTYPE_OF, INPUTS, Features, Problem
from pyfmha.trt.attention.words import Align, Causal, Function, Layout, Mask, Options, PackedOptions, Values
from pyfmha.trt.network import Tensors, module_with_plugins
from pyfmha.trt.protocols import AnyTensor, INetworkDefinition, TensorRT

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on

ALIGNMENTS = ("top-left", "bottom-right")


@overload
def add_attention(
    network: INetworkDefinition,
    q: AnyTensor,
    k: AnyTensor,
    v: AnyTensor,
    *,
    causal: Causal,
    return_lse: Literal[False] = False,
    **options: "Unpack[Options]",
) -> AnyTensor: ...
@overload
def add_attention(
    network: INetworkDefinition,
    q: AnyTensor,
    k: AnyTensor,
    v: AnyTensor,
    *,
    causal: Causal,
    return_lse: Literal[True],
    **options: "Unpack[Options]",
) -> tuple[AnyTensor, AnyTensor]: ...
@overload
def add_attention(
    network: INetworkDefinition,
    q: AnyTensor,
    k: AnyTensor,
    v: AnyTensor,
    *,
    causal: Causal,
    return_lse: bool,
    **options: "Unpack[Options]",
) -> Any: ...
@says_causal("add_attention", PluginError)
def add_attention(
    network: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: Causal,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    align: Align | None = None,
    softcap: float = 0.0,
    layout: Layout | None = None,
    q_lengths: Any = None,
    kv_lengths: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    bias: Any = None,
    mask: Mask = None,
    sinks: Any = None,
    score: Function | None = None,
    score_inputs: Values = (),
    mask_inputs: Values = (),
    return_lse: bool = False,
    name: str | None = None,
    namespace: str = "",
    library: Library | Path | str | None = None,
    trt_module: TensorRT | None = None,
) -> Any:
    """Add softmax(scale * Q K^T) V to a network. Registers the plugin first, if need be.

    Args:
        network: an ``INetworkDefinition`` of TensorRT 10.x or 11.x.
        q: ``ITensor`` of type HALF, BF16 or FLOAT, [batch, heads, Sq, head size], or as ``layout`` says. Heads and
            head size are known, the other sizes may be -1.
        k, v: of the same type, [batch, kv heads, Skv, head size]; heads is a multiple of kv heads. V may have another
            head size, which is Out's then. Keys beyond ``kv_lengths``, and the other sequences of a ragged batch,
            change nothing, even if they are NaN. Behind ``causal`` or ``window`` that does not hold: NaN or infinity in
            K or V there may reach queries that do not see it, where others of the same tile do, because a weight of 0
            times NaN is NaN; with a bias, a mask, sinks or another head size of V it holds there, too.
        causal: whether a query sees only keys at its own position and before; ``"bottom-right"`` is True with that
            ``align``. It has no default: who leaves it out is told what to say.
        scale: by default 1 / sqrt(head size).
        window: how many keys a query sees to the left and to the right of its position; -1 is no limit.
        align: what is at one position, for ``causal`` and ``window``: the first query and the first key
            (``"top-left"``, the default), or the last ones (``"bottom-right"``).
        softcap: scores become softcap * tanh(score / softcap); 0 leaves them.
        layout: ``"bhsd"``, the default, or ``"bshd"`` for [batch, seq, heads, head size].
        q_lengths, kv_lengths: ``ITensor`` INT32 [batch]: the valid queries or keys of each sequence.
        cu_seqlens_q, cu_seqlens_kv: ``ITensor`` INT32 [batch + 1], both or none: the sequences lie behind each other
            in Q [tokens, heads, head size] and in K and V [tokens, kv heads, head size], and these say where each
            begins and the last one ends. That is layout ``"bshd"``, the default then.
        bias: ``ITensor`` of Q's type or FLOAT, [batch or 1, heads or 1, Sq or 1, Skv or 1], leading axes of 1 left out
            if you like: added to the scores, after a soft cap; minus infinity hides a key. It is read where it is, an
            axis of 1 is not expanded. Of a ragged batch, Sq and Skv are those of the longest sequence, at the least:
            nobody can check that without waiting for the device.
        mask: ``ITensor`` BOOL of the same shapes: True is seen. ``causal``, ``window``, lengths and it must agree. Or a
            function decorated with :func:`pyfmha.mask_function`; or a tuple of both, which must agree, too.
        score: a function decorated with :func:`pyfmha.score_function`, which gives the scores after a soft cap and a
            bias; or one made by :func:`pyfmha.score_and_mask`. The library must hold it: ``pyfmha build --functions``.
            A function may be named by its name in the library, ``"alibi"``.
        score_inputs, mask_inputs: what the functions take of their own, in their order or by name: an ``ITensor`` for a
            pointer, a number else. Numbers that a shape tells are left out.
        sinks: ``ITensor`` [heads] of Q's type or FLOAT: exp(sink) is part of each row's sum, and has no value.
        return_lse: whether to return Lse, too.
        name: of the layer, which also names it in the engine and in messages.
        namespace, library: as :func:`pyfmha.trt.register`.
        trt_module: by default the module that the network is of.

    Returns:
        Out, an ``ITensor`` of the type and shape of Q, with V's head size; with ``return_lse`` a pair of Out and Lse,
        FLOAT [batch, heads, Sq] or [heads, tokens]: the natural logarithm of each query's sum of exp(score). A query
        that sees no key has zeros and minus infinity, or the sink.

    Raises:
        PluginError: the tensors do not fit, or TensorRT refused the layer.
        LibraryError: the library is missing or cannot be used.
    """
    trt = module_with_plugins(network, trt_module)
    lengths = lengths_of(q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv)
    mask, shown = split_mask(mask)
    asked = Asked(score, shown, score_inputs, mask_inputs)
    beside = beside_of(bias, mask, sinks)
    tensors = dict(zip(INPUTS, (q, k, v), strict=True))
    problem = problem_of(
        tensors, lengths, beside, causal=causal, scale=scale, window=window, align=align, softcap=softcap,
        layout=layout, return_lse=return_lse,
    )  # fmt: skip
    layer = {**tensors, **lengths, **beside}
    outputs = added(trt, network, problem, layer, asked, name, namespace, library)
    return tuple(outputs) if return_lse else outputs[0]


@overload
def add_attention_packed(
    network: INetworkDefinition,
    qkv: AnyTensor,
    num_heads: int,
    num_kv_heads: int | None = None,
    *,
    causal: Causal,
    return_lse: Literal[False] = False,
    **options: "Unpack[PackedOptions]",
) -> AnyTensor: ...
@overload
def add_attention_packed(
    network: INetworkDefinition,
    qkv: AnyTensor,
    num_heads: int,
    num_kv_heads: int | None = None,
    *,
    causal: Causal,
    return_lse: Literal[True],
    **options: "Unpack[PackedOptions]",
) -> tuple[AnyTensor, AnyTensor]: ...
@overload
def add_attention_packed(
    network: INetworkDefinition,
    qkv: AnyTensor,
    num_heads: int,
    num_kv_heads: int | None = None,
    *,
    causal: Causal,
    return_lse: bool,
    **options: "Unpack[PackedOptions]",
) -> Any: ...
@says_causal("add_attention_packed", PluginError)
def add_attention_packed(
    network: Any,
    qkv: Any,
    num_heads: int,
    num_kv_heads: int | None = None,
    *,
    causal: Causal,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    align: Align | None = None,
    softcap: float = 0.0,
    q_lengths: Any = None,
    kv_lengths: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    bias: Any = None,
    mask: Mask = None,
    sinks: Any = None,
    score: Function | None = None,
    score_inputs: Values = (),
    mask_inputs: Values = (),
    return_lse: bool = False,
    name: str | None = None,
    namespace: str = "",
    library: Library | Path | str | None = None,
    trt_module: TensorRT | None = None,
) -> Any:
    """As :func:`add_attention`, for Q, K and V in one tensor, which is read where it is.

    Args:
        network: an ``INetworkDefinition``.
        qkv: ``ITensor`` [batch, seq, 3, heads, head size], or [batch, seq, heads + 2 * kv heads, head size] with the
            heads of Q first, then those of K and of V; with ``cu_seqlens_q`` and ``cu_seqlens_kv``, which may be one
            and the same, [tokens, ...] in the place of [batch, seq, ...].
        num_heads, num_kv_heads: heads of Q, and of K and V, by default as many; with an axis of 3 there are as many.
        causal, scale, window, align, softcap, q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv, bias, mask,
            sinks, score, score_inputs, mask_inputs, return_lse, name, namespace, library, trt_module: as there.

    Returns:
        Out [batch, seq, heads, head size], or [tokens, heads, head size]; with ``return_lse`` a pair of it and Lse.

    Raises:
        PluginError, LibraryError: as there.
    """
    trt = module_with_plugins(network, trt_module)
    lengths = lengths_of(q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv)
    dtype = _dtype({"QKV": qkv})
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    features = features_of(kv_heads, "packed", causal, align, window, softcap, return_lse, lengths)
    shape = tuple(qkv.shape)
    size = shape[-1] if shape else -1
    if size < 1:
        raise PluginError(f"QKV is {list(shape)}; its last axis, the head size, must be known")
    mask, shown = split_mask(mask)
    asked = Asked(score, shown, score_inputs, mask_inputs)
    beside, ragged = beside_of(bias, mask, sinks), "cu_seqlens_q" in lengths
    sizes = (-1, num_heads, -1, -1) if ragged else (shape[0], num_heads, shape[1], shape[1])
    features = replace(features, **beside_features(dtype, beside, sizes, ragged))
    problem = Problem(num_heads, size, dtype, _scale(scale, size), bool(causal), features)
    outputs = added(trt, network, problem, {"QKV": qkv, **lengths, **beside}, asked, name, namespace, library)
    return tuple(outputs) if return_lse else outputs[0]


def problem_of(
    tensors: Tensors,
    lengths: Tensors,
    beside: Tensors,
    *,
    causal: bool | str,
    scale: float | None,
    window: tuple[int, int],
    align: str | None,
    softcap: float,
    layout: str | None,
    return_lse: bool,
) -> Problem:
    """What :func:`add_attention` is asked for.

    Args:
        tensors, lengths, beside: Q, K and V; those of :func:`lengths_of`; those of
            :func:`pyfmha.trt.attention.beside.beside_of`: by name, each with ``shape`` and TensorRT's ``dtype``.
        causal, scale, window, align, softcap, layout, return_lse: as there.

    Raises:
        PluginError: they do not fit.
    """
    ragged = "cu_seqlens_q" in lengths
    axes = layout or ("bshd" if ragged else "bhsd")
    if axes == "packed":
        raise PluginError("layout 'packed' is for Q, K and V in one tensor: use add_attention_packed")
    dtype = _dtype(tensors)
    heads, kv_heads, size, v_size = _heads(tensors, axes, ragged)
    sizes = _sizes(tensors["Q"], tensors["K"], axes, lengths)
    features = features_of(kv_heads, axes, causal, align, window, softcap, return_lse, lengths)
    features = replace(features, **beside_features(dtype, beside, sizes, ragged), v_head_size=v_size)
    return Problem(heads, size, dtype, _scale(scale, size), bool(causal), features)


def lengths_of(q_lengths: Any, kv_lengths: Any, cu_seqlens_q: Any, cu_seqlens_kv: Any) -> Tensors:
    """Those that are given."""
    if (cu_seqlens_q is None) != (cu_seqlens_kv is None):
        given, missing = (
            ("cu_seqlens_q", "cu_seqlens_kv") if cu_seqlens_kv is None else ("cu_seqlens_kv", "cu_seqlens_q")
        )
        raise PluginError(f"{given} is given and {missing} is not; give both, which may be one tensor, or none")
    named = {
        "q_lengths": q_lengths,
        "kv_lengths": kv_lengths,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_kv": cu_seqlens_kv,
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def features_of(
    kv_heads: int,
    layout: str,
    causal: bool | str,
    align: str | None,
    window: tuple[int, int],
    softcap: float,
    return_lse: bool,
    lengths: Collection[str],
) -> Features:
    """The features that keywords of :func:`add_attention` ask for.

    Args:
        kv_heads, layout: with their defaults resolved.
        causal, align, window, softcap, return_lse: as there.
        lengths: the names of the lengths that are given.

    Raises:
        PluginError: a value is not allowed, or two do not go together.
    """
    check_causal(causal)
    if align not in (None, *ALIGNMENTS):
        raise PluginError(f"align is {align!r}; allowed are {', '.join(ALIGNMENTS)}")
    if causal == "bottom-right" and align == "top-left":
        raise PluginError("causal is 'bottom-right' and align 'top-left'; leave one of them out")
    if len(window) != 2:
        raise PluginError(f"window is {window}; give (left, right), with -1 for no limit")
    return Features(
        num_kv_heads=kv_heads,
        layout=layout,
        bottom_right="bottom-right" in (causal, align),
        window=(window[0], window[1]),
        softcap=softcap,
        return_lse=return_lse,
        q_lengths="q_lengths" in lengths,
        kv_lengths="kv_lengths" in lengths,
        cu_seqlens="cu_seqlens_q" in lengths,
    )


def _scale(scale: float | None, head_size: int) -> float:
    return 1 / math.sqrt(head_size) if scale is None else scale


def _listed(tensors: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items())


def _dtype(tensors: Tensors) -> str:
    kinds = {int(tensor.dtype) for tensor in tensors.values()}
    if len(kinds) > 1:
        raise PluginError(f"Q, K and V must be of one type, got {_listed(tensors)}")
    (kind,) = kinds
    if kind not in DTYPE_OF:
        raise PluginError(
            f"{', '.join(tensors)} must be of type {', '.join(DTYPE_NAMES.values())}, got {_listed(tensors)}"
        )
    return DTYPE_OF[kind]


def _sizes(q: Any, k: Any, layout: str, lengths: Collection[str]) -> tuple[int, int, int, int]:
    """Batch, query heads, queries and keys as the shapes of Q and K tell them; -1 where they do not."""
    if "cu_seqlens_q" in lengths:
        return -1, q.shape[1], -1, -1
    heads, seq = (1, 2) if layout == "bhsd" else (2, 1)
    return q.shape[0], q.shape[heads], q.shape[seq], k.shape[seq]


def _heads(tensors: Tensors, layout: str, ragged: bool) -> tuple[int, int, int, int]:
    """Heads of Q, heads of K and V, and the head sizes of Q and K, and of V."""
    if layout not in ("bhsd", "bshd"):
        raise PluginError(f"layout is {layout!r}; allowed are bhsd and bshd")
    axes = (
        "[tokens, heads, head size]"
        if ragged
        else f"[batch, {'heads, seq' if layout == 'bhsd' else 'seq, heads'}, head size]"
    )
    rank, at = (3, 1) if ragged else (4, 1 if layout == "bhsd" else 2)
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    if any(len(shape) != rank or shape[at] < 1 or shape[-1] < 1 for shape in shapes):
        raise PluginError(f"Q, K and V must be {axes} with heads and head size known, got {_listed(tensors)}")
    (heads, kv_heads, v_heads), (size, k_size, v_size) = ([shape[axis] for shape in shapes] for axis in (at, -1))
    if kv_heads != v_heads or k_size != size:
        raise PluginError(f"K and V must have as many heads, and Q and K one head size, got {_listed(tensors)}")
    return heads, kv_heads, size, v_size if v_size != size else 0
