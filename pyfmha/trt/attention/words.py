"""The words that attention is asked for with, as types: a type checker refuses ``causal="botom-right"``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict

from pyfmha.runtime.library import Library
from pyfmha.trt.protocols import ITensor, TensorRT

Align = Literal["top-left", "bottom-right"]
Causal = bool | Literal["bottom-right"]
Dtype = Literal["fp16", "bf16", "fp32", "float16", "bfloat16", "float32"]
Layout = Literal["bhsd", "bshd"]
Layer = Literal["plugin", "tensorrt"]


class Described(Protocol):
    """What :func:`pyfmha.score_function` and its kin make, which needs Triton to be imported."""

    def __pyfmha__(self) -> dict[str, Any]: ...


Function = str | Described
"""A user's function, or its name in the library."""

Mask = ITensor | Function | tuple[ITensor, Function] | None
"""Which keys are seen: a tensor, a function, or both of which must agree."""

Values = Sequence[ITensor | float] | Mapping[str, ITensor | float]
"""Inputs of a function: in its order, without the numbers that shapes tell; or by name."""


class PackedOptions(TypedDict, total=False):
    """The keywords of :func:`pyfmha.add_attention_packed` that it may be called without."""

    scale: float | None
    window: tuple[int, int]
    align: Align | None
    softcap: float
    q_lengths: ITensor | None
    kv_lengths: ITensor | None
    cu_seqlens_q: ITensor | None
    cu_seqlens_kv: ITensor | None
    bias: ITensor | None
    mask: Mask
    sinks: ITensor | None
    q_descale: ITensor | None
    k_descale: ITensor | None
    v_descale: ITensor | None
    out_dtype: Dtype | None
    score: Function | None
    score_inputs: Values
    mask_inputs: Values
    name: str | None
    namespace: str
    library: Library | Path | str | None
    trt_module: TensorRT | None


class Options(PackedOptions, total=False):
    """Those of :func:`pyfmha.add_attention`."""

    layout: Layout | None
