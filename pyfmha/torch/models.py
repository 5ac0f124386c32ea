"""Whole models: PyTorch's function replaced for a while, or in one module for good."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from pyfmha.torch import functional

Module = TypeVar("Module", bound=torch.nn.Module)
REGISTERED = "pyfmha"
"""The name of the attention in transformers' registry."""


@contextmanager
def patched() -> Iterator[None]:
    """``torch.nn.functional.scaled_dot_product_attention`` is ours during the block, in all threads."""
    before = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = functional.scaled_dot_product_attention
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = before


def replace_attention(module: Module) -> Module:
    """Make a module use our attention wherever it calls PyTorch's, or by transformers' registry if it is of those.

    Args:
        module: it is changed, and returned.
    """
    if hasattr(module, "set_attn_implementation"):
        _register()
        module.set_attn_implementation(REGISTERED)
        return module
    forward = module.forward

    @functools.wraps(forward)
    def with_ours(*arguments: Any, **keywords: Any) -> Any:
        with patched():
            return forward(*arguments, **keywords)

    module.forward = with_ours
    return module


def _register() -> None:
    """Tell transformers of our attention: its own for PyTorch's function, which calls ours."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def forward(*arguments: Any, **keywords: Any) -> Any:
        with patched():
            return sdpa_attention_forward(*arguments, **keywords)

    AttentionInterface.register(REGISTERED, forward)
    AttentionMaskInterface.register(REGISTERED, sdpa_mask)
