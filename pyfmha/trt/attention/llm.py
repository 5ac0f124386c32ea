"""The plugin as a layer of TensorRT-LLM's graph API.

That API (``functional``, ``Module``, ``default_trtnet``, ``net_guard``, ``Session``) is in the releases of TensorRT-LLM
from 0.10, the first on TensorRT 10, up to 1.3.0rc20; later ones removed it. Nothing is imported from TensorRT-LLM until
asked.
"""

import importlib
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, cast

from pyfmha.errors import EngineError, GraphApiError, PluginError
from pyfmha.spec.words import dtype_name
from pyfmha.trt.attention.config import EngineConfig
from pyfmha.trt.attention.graph_api import graph_api
from pyfmha.trt.attention.network import add_attention, add_attention_packed
from pyfmha.trt.attention.problem import DTYPE_OF, INPUTS
from pyfmha.trt.attention.words import Causal, Dtype
from pyfmha.trt.modules import find_module

__all__ = ["DTYPES", "GraphApiError", "flash_attention_op", "graph_api"]

DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
"""Types as TensorRT-LLM names them, and as this package does."""

AXES = {
    "batch": "batch_size",
    "batch + 1": "num_ends",
    "heads": "num_heads",
    "kv heads": "num_kv_heads",
    "heads + 2 * kv heads": "num_all_heads",
    "seq": "seq_len",
    "Sq": "seq_len",
    "Skv": "seq_len",
    "tokens": "num_tokens",
    "Q tokens": "num_tokens",
    "KV tokens": "num_kv_tokens",
    "head size": "head_size",
    "head size of V": "head_size",  # the layer has one for all
}
"""How axes are named in ``dim_range``; TensorRT-LLM takes axes of one name to have one size."""


def flash_attention_op(
    num_heads: int,
    head_size: int,
    softmax_scale: float,
    inputs: Sequence[Any],
    *,
    causal: Causal = True,
    num_kv_heads: int | None = None,
    name: str | None = None,
    **options: Any,
) -> Any:
    """Add softmax(softmax_scale * Q K^T) V to the network that is being built (``net_guard``).

    Args:
        num_heads, head_size: of Q.
        softmax_scale: usually 1 / sqrt(head_size).
        inputs: Q, K and V, as TensorRT-LLM's ``Tensor`` or TensorRT's ``ITensor``: [batch, heads, seq, head size], or
            as ``layout`` says, of one type: HALF, BF16 or FLOAT; or all of them in one, as
            :func:`pyfmha.trt.add_attention_packed` takes it.
        causal: whether a query sees only keys at its own position and before; or ``"bottom-right"``.
        num_kv_heads: heads of K and V; by default those that K has, or of a packed input as many as of Q.
        name: of the layer; by default the one that TensorRT-LLM gives it.
        options: the other keywords of :func:`pyfmha.trt.add_attention`: ``window``, ``align``, ``softcap``,
            ``layout``, ``q_lengths``, ``kv_lengths``, ``cu_seqlens_q``, ``cu_seqlens_kv``, ``return_lse``,
            ``namespace``, ``library``. Lengths are ``Tensor`` or ``ITensor``, as the inputs.

    Returns:
        Out, a ``Tensor`` of the shape and type of Q; with ``return_lse`` a pair of it and Lse.

    Raises:
        GraphApiError: TensorRT-LLM is missing or has no graph API.
        PluginError: the values or tensors are not served.
        LibraryError: the library is missing or cannot be used.
    """
    api = graph_api()
    if len(inputs) not in (1, len(INPUTS)):
        raise PluginError(f"{len(inputs)} inputs; it takes {', '.join(INPUTS)}, or one that holds all of them")
    tensors = [_tensor(tensor) for tensor in inputs]
    # TensorRT-LLM always runs on the full library, whatever else is installed.
    settings = {"causal": causal, "scale": softmax_scale, "name": name, "trt_module": find_module(_tensorrt())}
    settings |= {key: _tensor(value) for key, value in options.items()}
    network = api.default_trtnet()
    if len(tensors) == 1:
        _check_sizes(tensors, {"QKV": (None, head_size)}, -2)
        made = add_attention_packed(network, tensors[0], num_heads, num_kv_heads, **settings)
    else:
        by_row = settings.get("layout") == "bshd" or settings.get("cu_seqlens_q") is not None
        wanted = {"Q": (num_heads, head_size), "K": (num_kv_heads, None)}
        _check_sizes(tensors, wanted, -2 if by_row else -3)
        q, k, v = tensors
        made = add_attention(network, q, k, v, **settings)
    layer = network.get_layer(network.num_layers - 1)
    outputs = [api.create_tensor(output, layer) for output in (made if isinstance(made, tuple) else (made,))]
    # Making a Tensor names the layer, and its outputs after it, whatever its name was.
    layer.name = name if name is not None else _plain_name(network, layer.name)
    for index, output in enumerate(outputs):
        output.trt_tensor.name = f"{layer.name}_output_{index}"
    return tuple(outputs) if isinstance(made, tuple) else outputs[0]


def _plain_name(network: Any, name: str) -> str:
    """A name of TensorRT-LLM's without the lines of source and the comprehensions that it was made in.

    It writes down the functions on the stack, ``FmhaLayer/flash_attention_op_L127/<listcomp>_L127/PLUGIN_V3_0``: such a
    name, by which engines and profiles are compared, changes with every edit of a file.
    """
    parts = (re.sub(r"_L\d+$", "", part) for part in re.split(r"[/.]", name))
    plain = "/".join(part for part in parts if part and not part.startswith("<"))
    taken = {network.get_layer(index).name for index in range(network.num_layers - 1)}
    stem, number = re.fullmatch(r"(.*?)(?:_(\d+))?", plain, re.DOTALL).groups()  # type: ignore[union-attr]
    count = int(number or 0)
    while plain in taken:  # what lines of source told apart is numbered
        count += 1
        plain = f"{stem}_{count}"
    return plain


def _tensor(value: Any) -> Any:
    """TensorRT's tensor behind one of TensorRT-LLM's; anything else as it is."""
    return getattr(value, "trt_tensor", value)


def _check_sizes(tensors: Sequence[Any], wanted: Mapping[str, tuple[int | None, int | None]], heads_axis: int) -> None:
    """Compare heads and head size, as far as they are asked for and known; the rest is add_attention's.

    Raises:
        PluginError: they differ.
    """
    for tensor, (name, sizes) in zip(tensors, wanted.items(), strict=False):
        shape = tuple(tensor.shape)
        if len(shape) < -heads_axis:
            continue
        for what, axis, size in zip(("heads", "head size"), (heads_axis, -1), sizes, strict=True):
            if size is not None and shape[axis] >= 1 and shape[axis] != size:
                raise PluginError(f"{name} {list(shape)} has {what} {shape[axis]}, {size} was asked for")


def _tensorrt() -> Any:
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise PluginError(f"TensorRT cannot be imported ({error}): pip install 'tensorrt<11'") from None


@cache
def _layer_class() -> Any:
    api = graph_api()

    class FmhaLayer(api.Module):  # type: ignore[name-defined,misc]
        """Attention as a ``Module``; its output, ``out``, is the network's, and with ``return_lse`` so is ``lse``.

        Args:
            num_heads, head_size: of Q, and of K and V unless the settings say otherwise.
            softmax_scale: usually 1 / sqrt(head_size).
            dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``.
            causal: whether a query sees only keys at its own position and before; or ``"bottom-right"``.
            settings: the fields of :class:`pyfmha.EngineConfig` from ``num_kv_heads`` on, but for ``max_kv_seq_len``.
                They say which inputs there are: Q, K and V, or QKV, then those of the lengths.

        Raises:
            EngineError: the values are not served.
        """

        def __init__(
            self,
            num_heads: int,
            head_size: int,
            softmax_scale: float,
            dtype: Dtype,
            causal: Causal = True,
            **settings: Any,
        ) -> None:
            super().__init__()
            if dtype_name(dtype) not in DTYPES.values():
                raise EngineError(f"dtype is {dtype!r}; allowed are {', '.join(DTYPES)}")
            self.num_heads = num_heads
            self.head_size = head_size
            self.softmax_scale = softmax_scale
            self.dtype = api.str_dtype_to_trt(next(word for word, name in DTYPES.items() if name == dtype_name(dtype)))
            self.causal = causal
            self.settings = settings
            self.engine_config(1, 1)

        def engine_config(self, max_batch_size: int, max_len: int, max_kv_len: int | None = None) -> EngineConfig:
            """What it serves up to these sizes."""
            dtype = cast("Dtype", DTYPE_OF[int(self.dtype)])
            plain = EngineConfig(
                self.num_heads,
                self.head_size,
                max_batch_size,
                max_len,
                dtype,
                self.softmax_scale,
                causal=self.causal,
            )
            config = replace(plain, max_kv_seq_len=max_kv_len, **self.settings)
            if config.score or config.mask_function:
                raise EngineError(
                    "score and mask functions are not served in TensorRT-LLM; pyfmha.add_attention has them"
                )
            return config

        def forward(self, q: Any, k: Any = None, v: Any = None, *lengths: Any) -> Any:
            """Out, or Out and Lse, marked as the network's outputs; takes what :meth:`prepare_inputs` makes."""
            config = self.engine_config(1, 1)
            given = [tensor for tensor in (q, k, v, *lengths) if tensor is not None]
            names = list(config.axes())
            if len(given) != len(names):
                raise PluginError(f"{len(given)} inputs; it takes {', '.join(names)}")
            tensors = dict(zip(names, given, strict=True))
            parts = [tensors.pop(name) for name in (*INPUTS, "QKV") if name in tensors]
            options = {name: getattr(config, name) for name in ("align", "window", "softcap", "return_lse")}
            options |= {"num_kv_heads": config.num_kv_heads, **tensors}
            if config.layout != "packed":
                options["layout"] = config.layout
            made = flash_attention_op(
                self.num_heads, self.head_size, self.softmax_scale, parts, causal=self.causal, **options
            )
            out, *lse = made if config.return_lse else (made,)
            out.mark_output("out", self.dtype)
            for tensor in lse:
                tensor.mark_output("lse", api.str_dtype_to_trt("float32"))
            return made

        def prepare_inputs(self, max_batch_size: int, max_len: int, max_kv_len: int | None = None) -> list[Any]:
            """Its inputs: ``Tensor`` of batch 1 to ``max_batch_size``, seq 1 to ``max_len``, keys to ``max_kv_len``."""
            config = self.engine_config(max_batch_size, max_len, max_kv_len)
            ranges = config.ranges()
            names = AXES | ({} if max_kv_len is None else {"Skv": "kv_seq_len"})
            types, made = config.types(), []
            for name, axes in config.axes().items():
                smallest, _, largest = ranges[name]
                bounds = OrderedDict(
                    (names.get(axis, f"{name} {i}"), [most] if size is not None else [[least, (most + 1) // 2, most]])
                    for i, ((axis, size), least, most) in enumerate(zip(axes, smallest, largest, strict=True))
                )
                dtype = getattr(find_module(_tensorrt()).DataType, types[name])
                shape = [-1 if size is None else size for _, size in axes]
                made.append(api.Tensor(name=name, dtype=dtype, shape=shape, dim_range=bounds))
            return made

    return FmhaLayer


def __getattr__(name: str) -> Any:
    # The class needs TensorRT-LLM's Module as its base, so it cannot be made before it is asked for.
    if name == "FmhaLayer":
        return _layer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
