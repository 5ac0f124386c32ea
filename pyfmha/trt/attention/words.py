"""The words that attention is asked for with, as types: a type checker refuses ``causal="botom-right"``."""

from pathlib import Path
from typing import Any, Literal, TypedDict

from pyfmha.runtime.library import Library

Align = Literal["top-left", "bottom-right"]
Causal = bool | Literal["bottom-right"]
Dtype = Literal["fp16", "bf16", "fp32", "float16", "bfloat16", "float32"]
Layout = Literal["bhsd", "bshd"]


class PackedOptions(TypedDict, total=False):
    """The keywords of :func:`pyfmha.add_attention_packed` that it may be called without."""

    scale: float | None
    window: tuple[int, int]
    align: Align | None
    softcap: float
    q_lengths: Any
    kv_lengths: Any
    cu_seqlens_q: Any
    cu_seqlens_kv: Any
    bias: Any
    mask: Any
    sinks: Any
    q_descale: Any
    k_descale: Any
    v_descale: Any
    out_dtype: Dtype | None
    name: str | None
    namespace: str
    library: Library | Path | str | None
    trt_module: Any


class Options(PackedOptions, total=False):
    """Those of :func:`pyfmha.add_attention`."""

    layout: Layout | None
