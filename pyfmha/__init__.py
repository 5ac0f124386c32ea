"""Fused multi-head attention for TensorRT, in pure Python.

Importing it does nothing but define names; what needs Triton, CUDA or TensorRT is imported when it is used.

- :func:`register`, :func:`add_attention`, :func:`add_attention_packed`: the plugin in TensorRT;
  :class:`EngineConfig`, :func:`build_engine`, :func:`build_plan`, :func:`save_engine`, :func:`read_engine`: engines;
  :class:`Session`: run any engine; :class:`DirectSession`: run the plugin without an engine.
- :class:`Library`, :class:`Function`: a built library, to launch from.
- :class:`KernelSpec`, :class:`Argument`: describe a kernel to compile; :mod:`pyfmha.aot` compiles and links.
- :class:`Operator`, of :class:`Tensor`, :class:`Types`, :class:`Attribute`, :class:`Check`, :class:`Launch`,
  :class:`Config`, :class:`Part` and :class:`Option`: describe a plugin of one's own; :func:`add_operator` puts it in a
  network.
- :class:`Attention`, :func:`family`: the attention kernels.
- :func:`interpret_attention`, :func:`interpret_operator`: kernels on the CPU, on numpy arrays.
- :mod:`pyfmha.onnx`: attention of an ONNX model replaced by the plugin's node; :mod:`pyfmha.torch`: for PyTorch.
- :class:`PyfmhaError`: the base of every error, all in :mod:`pyfmha.errors`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pyfmha.attention.first import Attention, family
from pyfmha.errors import PyfmhaError
from pyfmha.operators.description import Attribute, Check, Config, Launch, Operator, Option, Part, Tensor, Types
from pyfmha.runtime.library import Function, Library
from pyfmha.spec.kernel import Argument, KernelSpec
from pyfmha.spec.manifest import Manifest

if TYPE_CHECKING:
    from pyfmha.functions import mask_function, score_and_mask, score_function
    from pyfmha.interpreter import interpret_operator
    from pyfmha.trt import DirectSession, add_attention, add_attention_packed, register
    from pyfmha.trt.attention.engine import EngineConfig, build_engine
    from pyfmha.trt.attention.interpreted import interpret_attention
    from pyfmha.trt.attention.saved import read_engine, save_engine
    from pyfmha.trt.engine import build_plan
    from pyfmha.trt.network import add_operator
    from pyfmha.trt.session import Session

__version__ = "0.1.0"
__all__ = [
    "Argument",
    "Attention",
    "Attribute",
    "Check",
    "Config",
    "DirectSession",
    "EngineConfig",
    "Function",
    "KernelSpec",
    "Launch",
    "Library",
    "Manifest",
    "Operator",
    "Option",
    "Part",
    "PyfmhaError",
    "Session",
    "Tensor",
    "Types",
    "add_attention",
    "add_attention_packed",
    "add_operator",
    "build_engine",
    "build_plan",
    "family",
    "interpret_attention",
    "interpret_operator",
    "mask_function",
    "read_engine",
    "register",
    "save_engine",
    "score_and_mask",
    "score_function",
    "soft_cap",
]

# Imported at first use: they need numpy, which building and launching do without.
_LAZY = {
    "DirectSession": "pyfmha.trt",
    "EngineConfig": "pyfmha.trt.attention.engine",
    "Session": "pyfmha.trt.session",
    "add_attention": "pyfmha.trt",
    "add_attention_packed": "pyfmha.trt",
    "add_operator": "pyfmha.trt.network",
    "build_engine": "pyfmha.trt.attention.engine",
    "build_plan": "pyfmha.trt.engine",
    "interpret_attention": "pyfmha.trt.attention.interpreted",
    "interpret_operator": "pyfmha.interpreter",
    "mask_function": "pyfmha.functions",
    "read_engine": "pyfmha.trt.attention.saved",
    "register": "pyfmha.trt",
    "save_engine": "pyfmha.trt.attention.saved",
    "score_and_mask": "pyfmha.functions",
    "score_function": "pyfmha.functions",
    "soft_cap": "pyfmha.functions.arithmetic",
}

# Rooms with names of their own: pyfmha.onnx.replace_attention, pyfmha.torch.attention. They need their extras.
_ROOMS = ("onnx", "torch")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"pyfmha.{name}")
    raise AttributeError(f"module 'pyfmha' has no attribute {name!r}")
