"""The arguments of the operator, and the plugin's problem that they and the tensors describe."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from pyfmha.errors import PluginError
from pyfmha.trt.attention.beside import check_broadcast
from pyfmha.trt.attention.problem import Features, Problem

NONE: Mapping[str, torch.Tensor] = {}
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
"""The types of Q, K and V that are served, and their names here."""

INTEGERS = (torch.int32, torch.int64)
"""Those of lengths; the kernels read int32."""


@dataclass(frozen=True)
class Settings:
    """What attention is asked for, in the operator's own arguments.

    Attributes:
        scale: of Q K^T.
        causal, bottom_right, window_left, window_right, softcap, layout: as :class:`pyfmha.trt.problem.Features`.
    """

    scale: float
    causal: bool
    bottom_right: bool
    window_left: int
    window_right: int
    softcap: float
    layout: str

    @property
    def window(self) -> tuple[int, int]:
        """How many keys a query sees to its left and right."""
        return self.window_left, self.window_right


def problem_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    settings: Settings,
    lengths: frozenset[str],
    return_lse: bool,
    beside: Mapping[str, torch.Tensor] = NONE,
) -> Problem:
    """The plugin's problem.

    Args:
        q, k, v: [batch, heads, seq, head size], or as the layout says; with cumulative lengths [tokens, heads, head
            size]. Float16, bfloat16 or float32, all of one.
        settings: the other arguments.
        lengths: the names of the lengths that are given.
        return_lse: whether the log-sum-exp is a result.
        beside: bias, mask and sinks, as far as they are given.

    Raises:
        PluginError: the tensors do not fit, or it is not served.
    """
    ragged = "cu_seqlens_q" in lengths
    rank, head_axis = (3, 1) if ragged else (4, 1 if settings.layout == "bhsd" else 2)
    if settings.layout not in ("bhsd", "bshd"):
        raise PluginError(f"layout is {settings.layout!r}; allowed are bhsd and bshd")
    if (unfit := _unfit(q, k, v, rank, ragged)) is not None:
        listed = ", ".join(f"{name} {list(x.shape)} {x.dtype}" for name, x in zip("QKV", (q, k, v), strict=True))
        raise PluginError(f"{unfit}, got {listed}")
    more = tuple(_beside(q, k, beside, ragged, head_axis).items()) if beside else ()
    heads, kv_heads, size, v_size = q.shape[head_axis], k.shape[head_axis], q.shape[-1], v.shape[-1]
    return _problem(heads, kv_heads, size, v_size, DTYPES[q.dtype], settings, lengths, return_lse, more)


@lru_cache(maxsize=256)
def _problem(
    heads: int,
    kv_heads: int,
    size: int,
    v_size: int,
    dtype: str,
    settings: Settings,
    lengths: frozenset[str],
    return_lse: bool,
    beside: tuple[tuple[str, Any], ...],
) -> Problem:
    """Of what the lengths of sequences leave open: most calls differ in those alone."""
    features = Features(
        num_kv_heads=kv_heads,
        layout=settings.layout,
        bottom_right=settings.bottom_right,
        window=settings.window,
        softcap=settings.softcap,
        return_lse=return_lse,
        q_lengths="q_lengths" in lengths,
        kv_lengths="kv_lengths" in lengths,
        cu_seqlens="cu_seqlens_q" in lengths,
        **dict(beside),
        v_head_size=0 if v_size == size else v_size,
    )
    return Problem(heads, size, dtype, settings.scale, settings.causal, features)


def check_lengths(q: torch.Tensor, lengths: Mapping[str, torch.Tensor]) -> None:
    """Refuse lengths that are none.

    Args:
        q: Q; of padded batches its first axis is the batch.
        lengths: by name.

    Raises:
        PluginError: they are no integers, or not as many as there are sequences.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in lengths.items()}
    for name, tensor in lengths.items():
        if tensor.dtype not in INTEGERS:
            raise PluginError(f"{name} is of {tensor.dtype}; it must be torch.int32 or torch.int64")
        if name in ("q_lengths", "kv_lengths") and q.ndim and shapes[name] != tuple(q.shape[:1]):
            raise PluginError(f"{name} is {list(tensor.shape)}; it must be [{q.shape[0]}], one for each sequence")
        if name.startswith("cu_") and (tensor.ndim != 1 or not shapes[name][0] or len(set(shapes.values())) > 1):
            listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise PluginError(f"cumulative lengths must both be [sequences + 1], the first of them 0, got {listed}")


def check_devices(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beside: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors on several devices; lengths are fetched from wherever they are.

    Raises:
        PluginError: saying which are where.
    """
    if not q.device == k.device == v.device:
        raise PluginError(f"Q, K and V must be on one device, got {q.device}, {k.device}, {v.device}")
    for name, tensor in beside.items():
        if tensor.device != q.device:
            raise PluginError(f"{name} is on {tensor.device}, Q on {q.device}; give both on one device")


def _unfit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rank: int, ragged: bool) -> str | None:
    """What Q, K and V are not; None where they fit."""
    if q.ndim != rank or k.ndim != rank or v.ndim != rank:
        return f"Q, K and V must have {rank} axes"
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return "Q, K and V must be of one type, float16, bfloat16 or float32"
    shape, keys, values = q.shape, k.shape, v.shape
    if shape[-1] != keys[-1] or (keys != values and keys[:-1] != values[:-1]):
        return "K and V must have as many rows and heads, and Q and K one head size"
    if not ragged and shape[0] != keys[0]:
        return "Q, K and V must have one batch"
    return None


def _beside(
    q: torch.Tensor, k: torch.Tensor, tensors: Mapping[str, torch.Tensor], ragged: bool, head_axis: int
) -> dict[str, Any]:
    """The features that bias, mask and sinks are."""
    rows = 3 - head_axis
    sizes = (-1, q.shape[1], -1, -1) if ragged else (q.shape[0], q.shape[head_axis], q.shape[rows], k.shape[rows])
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        allowed = (torch.bool,) if name == "mask" else (q.dtype, torch.float32)
        if tensor.dtype not in allowed:
            raise PluginError(
                f"{name} is of {tensor.dtype}; it must be {' or '.join(map(str, dict.fromkeys(allowed)))}"
            )
        if name == "sinks" and tuple(tensor.shape) != sizes[1:2]:
            raise PluginError(f"sinks are {list(tensor.shape)}; they must be [{sizes[1]}], one for each query head")
        if name != "sinks":
            check_broadcast(name, tuple(tensor.shape), sizes)
        found[name] = True if name == "mask" else DTYPES[tensor.dtype]
    return found
