"""The plugin as a layer of TensorRT-LLM's graph API.

That API (``functional``, ``Module``, ``default_trtnet``, ``net_guard``, ``Session``) is in the releases of TensorRT-LLM
up to 1.3.0rc20, which all use TensorRT 10; later ones removed it. Nothing is imported from TensorRT-LLM until asked.
"""

import importlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

from pyfmha.errors import GraphApiError, PluginError
from pyfmha.trt.creator import register
from pyfmha.trt.modules import find_module
from pyfmha.trt.network import add_layer
from pyfmha.trt.problem import DATA_TYPES, Problem
from pyfmha.trt.shapes import INPUTS

LAST_RELEASE = "1.3.0rc20"
INSTALL = f"pip install 'tensorrt-llm<={LAST_RELEASE}'"


@cache
def graph_api() -> Any:
    """What this module uses of the graph API.

    Raises:
        GraphApiError: TensorRT-LLM is not installed, or its release has no graph API.
    """
    try:
        package = importlib.import_module("tensorrt_llm")
    except ImportError as error:
        raise GraphApiError(f"TensorRT-LLM cannot be imported ({error}): {INSTALL}") from None
    try:
        common, utils, functional, module = (
            importlib.import_module(f"tensorrt_llm.{name}") for name in ("_common", "_utils", "functional", "module")
        )
        return SimpleNamespace(
            default_trtnet=common.default_trtnet,
            str_dtype_to_trt=utils.str_dtype_to_trt,
            Tensor=functional.Tensor,
            create_tensor=functional._create_tensor,
            Module=module.Module,
        )
    except (ImportError, AttributeError) as error:
        version = getattr(package, "__version__", "of unknown version")
        raise GraphApiError(
            f"TensorRT-LLM {version} has no graph API ({error}): it was removed after {LAST_RELEASE}. Releases up to"
            f" that one, on TensorRT 10, have it: {INSTALL}; or use TensorRT itself: pyfmha.add_attention"
        ) from None


def flash_attention_op(
    num_heads: int, head_size: int, softmax_scale: float, inputs: Sequence[Any], *, causal: bool = True
) -> Any:
    """Add softmax(softmax_scale * Q K^T) V to the network that is being built (``net_guard``).

    Args:
        num_heads, head_size: of Q, K and V.
        softmax_scale: usually 1 / sqrt(head_size).
        inputs: Q, K and V, as TensorRT-LLM's ``Tensor`` or TensorRT's ``ITensor``: [batch, heads, seq, head size],
            of one type: HALF, BF16 or FLOAT.
        causal: whether a query sees only keys at its own position and before.

    Returns:
        Out, a ``Tensor`` of the shape and type of Q.

    Raises:
        GraphApiError: TensorRT-LLM is missing or has no graph API.
        PluginError: the values or tensors are not served.
        LibraryError: the library is missing or cannot be used.
    """
    api = graph_api()
    if len(inputs) != len(INPUTS):
        raise PluginError(f"{len(inputs)} inputs; it takes {', '.join(INPUTS)}")
    tensors = [getattr(tensor, "trt_tensor", tensor) for tensor in inputs]
    kind = int(tensors[0].dtype)
    if kind not in DATA_TYPES:
        raise PluginError(f"Q is of type {tensors[0].dtype}; it must be HALF, BF16 or FLOAT")
    # TensorRT-LLM always runs on the full library, whatever else is installed.
    trt = find_module(_tensorrt())
    creator = register(trt)
    problem = Problem(num_heads, head_size, DATA_TYPES[kind], softmax_scale, causal)
    layer, outputs = add_layer(trt, api.default_trtnet(), creator, problem, dict(zip(INPUTS, tensors, strict=True)))
    return api.create_tensor(outputs[0], layer)


def _tensorrt() -> Any:
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise PluginError(f"TensorRT cannot be imported ({error}): pip install 'tensorrt<11'") from None


@cache
def _layer_class() -> Any:
    api = graph_api()

    class FmhaLayer(api.Module):  # type: ignore[name-defined,misc]
        """Attention as a ``Module``; its inputs are Q, K and V, and its output, ``out``, is the network's.

        Args:
            num_heads, head_size: of Q, K and V.
            softmax_scale: usually 1 / sqrt(head_size).
            dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``.
            causal: whether a query sees only keys at its own position and before.
        """

        def __init__(
            self, num_heads: int, head_size: int, softmax_scale: float, dtype: str, causal: bool = True
        ) -> None:
            super().__init__()
            self.num_heads = num_heads
            self.head_size = head_size
            self.softmax_scale = softmax_scale
            self.dtype = api.str_dtype_to_trt(dtype)
            self.causal = causal

        def forward(self, q: Any, k: Any, v: Any) -> Any:
            """Out, marked as the network's output ``out``."""
            out = flash_attention_op(self.num_heads, self.head_size, self.softmax_scale, [q, k, v], causal=self.causal)
            out.mark_output("out", self.dtype)
            return out

        def prepare_inputs(self, max_batch_size: int, max_len: int) -> list[Any]:
            """Q, K and V: ``Tensor`` of batch 1 to ``max_batch_size`` and seq 1 to ``max_len``."""
            ranges = OrderedDict(
                batch_size=[[1, (max_batch_size + 1) // 2, max_batch_size]],
                num_heads=[self.num_heads],
                seq_len=[[1, (max_len + 1) // 2, max_len]],
                head_size=[self.head_size],
            )
            shape = [-1, self.num_heads, -1, self.head_size]
            return [api.Tensor(name=name, dtype=self.dtype, shape=shape, dim_range=ranges) for name in INPUTS]

    return FmhaLayer


def __getattr__(name: str) -> Any:
    # The class needs TensorRT-LLM's Module as its base, so it cannot be made before it is asked for.
    if name == "FmhaLayer":
        return _layer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
