"""Fused multi-head attention for TensorRT, in pure Python.

Importing it does nothing but define these names; what needs Triton or CUDA is imported when it is used.

- :class:`Library`, :class:`Function`: load a built library and launch from it.
- :class:`KernelSpec`, :class:`Argument`: describe a kernel to compile; :mod:`pyfmha.aot` compiles and links.
- :class:`Attention`, :func:`family`: the attention kernels.
- :class:`PyfmhaError`: the base of every error.
"""

from pyfmha.attention import Attention, family
from pyfmha.errors import PyfmhaError
from pyfmha.manifest import Manifest
from pyfmha.runtime.library import Function, Library
from pyfmha.spec import Argument, KernelSpec

__version__ = "0.1.0"
__all__ = ["Argument", "Attention", "Function", "KernelSpec", "Library", "Manifest", "PyfmhaError", "family"]
