"""What keywords and tensors of :func:`pyfmha.add_attention` ask for, as a problem."""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from pyfmha.errors import PluginError
from pyfmha.operators.description import DATA_TYPES, TYPE_NAMES
from pyfmha.runtime.library import FLOAT_MAX
from pyfmha.trt.attention.beside import beside_features
from pyfmha.trt.attention.causal import check_causal
from pyfmha.trt.attention.eight import fp8_features, out_dtype_of
from pyfmha.trt.attention.problem import DTYPE_NAMES, DTYPE_OF, Features, Problem
from pyfmha.trt.attention.words import Dtype
from pyfmha.trt.network import Tensors

ALIGNMENTS = ("top-left", "bottom-right")


def problem_of(
    tensors: Tensors,
    lengths: Tensors,
    beside: Tensors,
    factors: Tensors,
    *,
    causal: bool | str,
    scale: float | None,
    window: tuple[int, int],
    align: str | None,
    softcap: float,
    layout: str | None,
    return_lse: bool,
    out_dtype: Dtype | None = None,
) -> Problem:
    """What :func:`pyfmha.add_attention` is asked for.

    Args:
        tensors, lengths, beside, factors: Q, K and V; those of :func:`lengths_of`; those of
            :func:`pyfmha.trt.attention.beside.beside_of`; those of :func:`pyfmha.trt.attention.eight.factors_of`:
            by name, each with ``shape`` and TensorRT's ``dtype``.
        causal, scale, window, align, softcap, layout, return_lse, out_dtype: as there.

    Raises:
        PluginError: they do not fit.
    """
    ragged = "cu_seqlens_q" in lengths
    axes = layout or ("bshd" if ragged else "bhsd")
    if axes == "packed":
        raise PluginError("layout 'packed' is for Q, K and V in one tensor: use add_attention_packed")
    kind = dtype_of(tensors)
    dtype = out_dtype_of(kind, out_dtype)
    heads, kv_heads, size, v_size = _heads(tensors, axes, ragged)
    sizes = _sizes(tensors["Q"], tensors["K"], axes, lengths)
    features = features_of(kv_heads, axes, causal, align, window, softcap, return_lse, lengths)
    features = replace(
        features,
        **beside_features(dtype, beside, sizes, ragged),
        **fp8_features(kind, factors, (1 if ragged else sizes[0], kv_heads)),
        v_head_size=v_size,
    )
    return Problem(heads, size, dtype, default_scale(scale, size), bool(causal), features)


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
    """The features that keywords of :func:`pyfmha.add_attention` ask for.

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


def default_scale(scale: float | None, head_size: int) -> float:
    """The scale that is given, else that of the head size.

    Raises:
        PluginError: it is no finite float32 other than 0. The plugin says so, too, but of its field.
    """
    if scale is None:
        return 1 / math.sqrt(head_size)
    found = 0.0 if isinstance(scale, str) else float(scale)
    if not 0 < abs(found) <= FLOAT_MAX:
        raise PluginError(f"scale is {scale!r}; give a finite float32 other than 0, usually 1/sqrt(head_size)")
    return found


def _listed(tensors: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items())


def dtype_of(tensors: Tensors) -> str:
    """The one type of Q, K and V, ``"fp16"``, or ``"fp8"``.

    Raises:
        PluginError: they are of several, or of one that is not served.
    """
    kinds = {int(tensor.dtype) for tensor in tensors.values()}
    if len(kinds) > 1:
        raise PluginError(f"Q, K and V must be of one type, got {_listed(tensors)}")
    (kind,) = kinds
    served = DTYPE_OF | {DATA_TYPES["fp8"]: "fp8"}
    if kind not in served:
        allowed = ", ".join((*DTYPE_NAMES.values(), TYPE_NAMES["fp8"]))
        raise PluginError(f"{', '.join(tensors)} must be of type {allowed}, got {_listed(tensors)}")
    return served[kind]


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
