"""Torch-TensorRT: converters that put the plugin into the engines it builds. Importing this module registers them.

``torch.ops.pyfmha.attention``, ``attention_with`` (score and mask functions) and, before Torch-TensorRT's own
converter, ``aten.scaled_dot_product_attention`` become the plugin's layer where they are served and the library holds
the function; others are left to Torch-TensorRT, and the logger ``pyfmha.torch.tensorrt`` says why (level INFO).

Written after the sources of Torch-TensorRT 2.13 and 2.14 (``dynamo/conversion/_ConverterRegistry.py``, whose registry
finds these); not yet run with it, as it needs the full TensorRT. With its setting ``decompose_attention=True`` (by
default False) there is no ``aten.scaled_dot_product_attention`` left to convert.

Raises:
    PluginError: on import, without torch_tensorrt.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pyfmha.attention.forward import HEAD_SIZES
from pyfmha.errors import PluginError, PyfmhaError
from pyfmha.operators.description import DATA_TYPES
from pyfmha.torch.functions import Own, extended
from pyfmha.torch.launch import library
from pyfmha.torch.left_to_pytorch import beside_of_mask, why_not_mask, why_not_shapes
from pyfmha.torch.operator import attention_op, plain_op
from pyfmha.torch.settings import Settings, problem_of
from pyfmha.torch.with_functions import attention_with_op
from pyfmha.trt.attention.beside import BESIDE
from pyfmha.trt.attention.functions import FunctionInputs, operator_for
from pyfmha.trt.attention.network import add_attention

try:
    from torch_tensorrt.dynamo.conversion._ConverterRegistry import ConverterPriority, dynamo_tensorrt_converter
    from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor
except Exception as error:  # it raises its own where libnvinfer is missing
    raise PluginError(
        f"torch_tensorrt cannot be imported ({error}); its converters need it: pip install torch-tensorrt"
    ) from error

LOGGER = logging.getLogger(__name__)
OURS = (attention_op, plain_op, attention_with_op)
LENGTHS = ("q_lengths", "kv_lengths", "cu_seqlens_q", "cu_seqlens_kv")


def _names(target: Any) -> list[Any]:
    return list(target._schema.arguments)


def _arguments(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """By name, with the schema's defaults."""
    names = _names(target)
    given = {argument.name: value for argument, value in zip(names, args, strict=False)} | dict(kwargs)
    return {argument.name: given.get(argument.name, argument.default_value) for argument in names}


def _served(node: Any, settings: Any = None) -> bool:
    """Whether a node becomes the plugin's: a ``capability_validator``."""
    given = _arguments(node.target, node.args, node.kwargs)
    try:
        why = _why_not(given, node.target in OURS)
    except PyfmhaError as error:
        why = str(error)
    if why is not None:
        LOGGER.info("%s is left alone: %s", node.name, why)
    return why is None


def _why_not(given: Mapping[str, Any], ours: bool) -> str | None:
    names = ("q", "k", "v") if ours else ("query", "key", "value")
    tensors = [given[name].meta.get("val") for name in names]
    if any(tensor is None for tensor in tensors):
        return "the shapes of its inputs are not known"
    q, k, v = tensors
    lengths = {name: given[name] for name in LENGTHS if given.get(name) is not None}
    for name, length in lengths.items():
        if length.meta["val"].dtype != torch.int32:
            return f"{name} is {length.meta['val'].dtype}; TensorRT's plugin takes int32"
    nodes = {name: given[name] for name in (*BESIDE, "attn_mask") if given.get(name) is not None}
    beside = {name: node.meta.get("val") for name, node in nodes.items()}
    unknown = [name for name, tensor in beside.items() if tensor is None]
    if unknown:
        return f"the shape of {unknown[0]} is not known"
    if not ours:
        mask = beside.get("attn_mask")
        why = _why_not_native(given, (q, k, v), mask)
        if why is not None:
            return why
        beside = beside_of_mask(mask)
    heads = 1 if q.ndim == 3 or given.get("layout", "bhsd") == "bhsd" else 2
    if not all(isinstance(size, int) for x in tensors for size in (x.shape[heads], x.shape[-1])):
        return "heads or head size are dynamic"
    settings = _settings(given, q.shape[-1])
    problem = problem_of(q, k, v, settings, frozenset(lengths), given.get("return_lse", False), beside)
    if "inputs" in given:
        values = [one.meta.get("val") if isinstance(one, torch.fx.Node) else one for one in given["inputs"]]
        if any(value is None for value in values):
            return "the shape of a function's input is not known"
        problem = extended(problem, _own(given, values), q, of_library=True)
    if problem.function_name not in library():
        return f"{library().path} does not hold {problem.function_name}"
    return None


def _why_not_native(given: Mapping[str, Any], tensors: Sequence[Any], mask: Any) -> str | None:
    q, k, v = tensors
    if given["dropout_p"]:
        return "a dropout"
    if mask is not None and given["is_causal"]:
        return "a mask and is_causal"
    why = why_not_shapes(q, k, v, given["enable_gqa"])
    return why if why is not None or mask is None else why_not_mask(q, k, mask)


def _settings(given: Mapping[str, Any], size: int) -> Settings:
    return Settings(
        given["scale"] if given["scale"] is not None else size**-0.5,
        bool(given.get("causal", given.get("is_causal"))),
        given.get("bottom_right", False),
        given.get("window_left", -1),
        given.get("window_right", -1),
        given.get("softcap", 0.0),
        given.get("layout", "bhsd"),
    )


def _own(given: Mapping[str, Any], tensors: Sequence[Any]) -> Own:
    return Own(given["score_function"], given["mask_function"], tuple(tensors), tuple(given["numbers"]))


@dynamo_tensorrt_converter(plain_op, capability_validator=_served, supports_dynamic_shapes=True)  # type: ignore[untyped-decorator]
@dynamo_tensorrt_converter(attention_op, capability_validator=_served, supports_dynamic_shapes=True)  # type: ignore[untyped-decorator]
@dynamo_tensorrt_converter(attention_with_op, capability_validator=_served, supports_dynamic_shapes=True)  # type: ignore[untyped-decorator]
def convert_attention(
    ctx: Any, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str
) -> tuple[Any, ...]:
    """``torch.ops.pyfmha.attention`` and ``attention_with`` as the plugin's layer.

    Returns:
        Out, and the log-sum-exp where it is asked for: ``ITensor``.

    Raises:
        PluginError: TensorRT refused the layer.
        LibraryError: the library has not the functions.
    """
    given = _arguments(target, args, kwargs)
    q, k, v = (get_trt_tensor(ctx, given[part], f"{name}_{part}") for part in ("q", "k", "v"))
    settings = _settings(given, q.shape[-1])
    more = {
        part: get_trt_tensor(ctx, given[part], f"{name}_{part}")
        for part in (*LENGTHS, *BESIDE)
        if given.get(part) is not None
    }
    if target is attention_with_op:
        more |= _functions(ctx, given, (q, v), name, more.get("mask"))
    return_lse = given.get("return_lse", False)
    layout: Any = settings.layout
    out = add_attention(
        ctx.net, q, k, v, causal=settings.causal, scale=settings.scale, window=settings.window,
        align="bottom-right" if settings.bottom_right else "top-left", softcap=settings.softcap,
        layout=layout, return_lse=return_lse, name=name, **more,
    )  # fmt: skip
    return tuple(out) if return_lse else (out,)


def _functions(ctx: Any, given: Mapping[str, Any], sized: Sequence[Any], name: str, mask: Any) -> dict[str, Any]:
    """The keywords that the functions are: they, by name and digest, and what they are given, by name."""
    own = _own(given, [])
    dtype = next(kind for kind, number in DATA_TYPES.items() if number == int(sized[0].dtype))
    size = next(size for size in HEAD_SIZES if max(tensor.shape[-1] for tensor in sized) <= size)
    inputs = FunctionInputs(operator_for(own.asked, library(), dtype, size))
    values: dict[str, Any] = dict(zip(inputs.numbers, own.numbers, strict=True))
    for input_name, value in zip(inputs.tensors, given["inputs"], strict=True):
        values[input_name] = get_trt_tensor(ctx, value, f"{name}_{input_name}")
    shown = tuple(one for one in (mask, own.asked.mask) if one is not None)
    keywords = {"score": own.asked.score, "mask": shown or None}
    return {**keywords, "score_inputs" if own.score else "mask_inputs": values}


@dynamo_tensorrt_converter(  # type: ignore[untyped-decorator]
    torch.ops.aten.scaled_dot_product_attention.default,
    capability_validator=_served,
    supports_dynamic_shapes=True,
    priority=ConverterPriority.HIGH,
)
def convert_scaled_dot_product_attention(
    ctx: Any, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str
) -> Any:
    """``aten.scaled_dot_product_attention`` as the plugin's layer.

    Returns:
        Its output, an ``ITensor``.

    Raises:
        PluginError: TensorRT refused the layer.
    """
    given = _arguments(target, args, kwargs)
    q, k, v = (get_trt_tensor(ctx, given[part], f"{name}_{part}") for part in ("query", "key", "value"))
    settings = _settings(given, q.shape[-1])
    beside = {}
    if given["attn_mask"] is not None:
        mask = get_trt_tensor(ctx, given["attn_mask"], f"{name}_attn_mask")
        beside["mask" if int(mask.dtype) == DATA_TYPES["bool"] else "bias"] = mask
    return add_attention(
        ctx.net, q, k, v, causal=settings.causal, scale=settings.scale, align="top-left", layout="bhsd", name=name,
        **beside,
    )  # fmt: skip
