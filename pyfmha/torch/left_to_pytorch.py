"""What the drop-in for ``scaled_dot_product_attention`` leaves to PyTorch, and why."""

from typing import Any

import torch

from pyfmha.attention.forward import HEAD_SIZES
from pyfmha.errors import PluginError
from pyfmha.torch.launch import lacking
from pyfmha.torch.operator import differentiated
from pyfmha.torch.settings import DTYPES
from pyfmha.trt.attention.beside import check_broadcast


def beside_of_mask(mask: Any) -> dict[str, Any]:
    """PyTorch's ``attn_mask``, or what stands for it with a ``dtype``, as our keyword: a mask of bool, else a bias."""
    return {} if mask is None else {"mask" if mask.dtype == torch.bool else "bias": mask}


def why_not(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    *,
    exporting: bool = False,
) -> str | None:
    """Why a call is left to PyTorch; None where it is not. An export to ONNX has no GPU and no gradient."""
    if dropout_p:
        return "a dropout"
    if not (isinstance(query, torch.Tensor) and isinstance(key, torch.Tensor) and isinstance(value, torch.Tensor)):
        return "what is no tensor"
    if not exporting:
        if differentiated(query, key, value, attn_mask):
            return "a gradient is asked for"
        if query.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
            return "autocast computes it in another type"
        if not query.is_cuda:
            return "the tensors are not on a GPU"
    why = why_not_shapes(query, key, value, enable_gqa, not exporting)
    if attn_mask is None or why is not None:
        return why
    return why_not_mask(query, key, attn_mask) or (None if exporting else _lacking(query, value))


def why_not_mask(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> str | None:
    """Why a mask is left to PyTorch, beside tensors that are served; None where it is not."""
    if mask.dtype not in (torch.bool, query.dtype, torch.float32):
        return f"a mask of {mask.dtype}"
    if mask.device != query.device:
        return "a mask on another device"
    try:
        check_broadcast("attn_mask", tuple(mask.shape), (*query.shape[:3], key.shape[2]))
    except PluginError:
        return "a mask of a shape that PyTorch refuses, or broadcasts otherwise"
    return None


def _lacking(query: torch.Tensor, value: torch.Tensor) -> str | None:
    widest = max(query.shape[3], value.shape[3])
    # Compared, not passed on: while PyTorch compiles, it may be a symbol.
    return lacking(DTYPES[query.dtype], next(size for size in HEAD_SIZES if widest <= size))


def why_not_shapes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool, look: bool = False
) -> str | None:
    """Why tensors are left to PyTorch by their shapes and types; None where they are not.

    Args:
        query, key, value, enable_gqa: as PyTorch's.
        look: whether the library must hold what values of another head size need, which is not in every one.
    """
    shape, keys = query.shape, key.shape
    if len(shape) != 4 or len(keys) != 4 or value.ndim != 4:
        return "tensors of other than four axes"
    if query.dtype not in DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        return f"types {query.dtype}, {key.dtype}, {value.dtype}"
    other = keys != value.shape
    if (other and keys[:3] != value.shape[:3]) or shape[3] != keys[3] or shape[0] != keys[0]:
        return "shapes that PyTorch broadcasts"
    if shape[3] == 0 or value.shape[3] == 0 or keys[1] == 0:
        return "no heads, or heads without elements"
    if shape[3] > 256 or (other and value.shape[3] > 256):
        return "a head size above 256"
    if other and look and (why := _lacking(query, value)) is not None:
        return why
    heads, kv_heads = shape[1], keys[1]
    if heads != kv_heads and (not enable_gqa or heads % kv_heads):
        return "heads that PyTorch broadcasts"
    return None
