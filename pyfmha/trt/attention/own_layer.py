"""TensorRT's own attention layer (from 10.14), to compare with."""

from typing import Any

import numpy as np

from pyfmha.bfloat16 import bf16_from_float
from pyfmha.errors import EngineError


def add_tensorrt_attention(
    trt: Any, network: Any, q: Any, k: Any, v: Any, *, dtype: str, scale: float, causal: bool
) -> tuple[Any, Any]:
    """TensorRT's own layer: its output, and the memory that must live until the engine is built.

    It has no factor for the scores, so Q is scaled before it. It may be split into several kernels: without that
    permission TensorRT refuses what none of its fused kernels serves.

    Args:
        trt: a TensorRT module, from 10.14.
        network: one of its ``INetworkDefinition``.
        q, k, v: ``ITensor`` [batch, heads, seq, head size] of one type.
        dtype: of them: ``"fp16"``, ``"bf16"`` or ``"fp32"``.
        scale: factor of Q K^T.
        causal: whether a query sees only keys at its own position and before.

    Raises:
        EngineError: TensorRT has no such layer, or refused it.
    """
    if not hasattr(network, "add_attention"):
        raise EngineError(f"{trt.__name__} {trt.__version__} has no attention layer of its own; 10.14 and newer have")
    value = np.array([scale], np.float32)
    data = bf16_from_float(value) if dtype == "bf16" else value.astype({"fp16": np.float16}.get(dtype))
    weights = trt.Weights(q.dtype, data.ctypes.data, 1)
    factor = network.add_constant((1, 1, 1, 1), weights).get_output(0)
    scaled = network.add_elementwise(q, factor, trt.ElementWiseOperation.PROD).get_output(0)
    softmax = trt.AttentionNormalizationOp.SOFTMAX
    if hasattr(network, "add_attention_v2"):
        kind = trt.CausalMaskKind.UPPER_LEFT if causal else trt.CausalMaskKind.NONE
        layer = network.add_attention_v2(scaled, k, v, softmax, kind)
    else:
        layer = network.add_attention(scaled, k, v, softmax, causal)
    if layer is None:
        mask = "causal" if causal else "full"
        raise EngineError(
            f"{trt.__name__} {trt.__version__} refused its own attention layer for {dtype} {list(q.shape)}, {mask}"
        )
    layer.decomposable = True
    layer.name = "attention"
    return layer.get_output(0), (data, weights)
