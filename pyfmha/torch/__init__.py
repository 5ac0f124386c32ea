"""Attention for PyTorch: an operator, a drop-in for PyTorch's function, and whole models with attention replaced.

Needs torch, which is no dependency of the package: ``pip install torch``. On a GPU the built library is launched on
PyTorch's current stream; on the CPU the operator is PyTorch's own arithmetic in float32, for tests and exports.
"""

try:
    from pyfmha.torch.functional import attention, scaled_dot_product_attention
    from pyfmha.torch.models import patched, replace_attention
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError("pyfmha.torch needs PyTorch: pip install torch", name="torch") from None

__all__ = ["attention", "patched", "replace_attention", "scaled_dot_product_attention"]
