"""TensorRT-LLM's layer under its public name; it lives in :mod:`pyfmha.trt.attention.llm`."""

from typing import Any

from pyfmha.trt.attention import llm
from pyfmha.trt.attention.llm import flash_attention_op

__all__ = ["flash_attention_op"]


def __getattr__(name: str) -> Any:
    return getattr(llm, name)
