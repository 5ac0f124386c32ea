"""What the plugin serves of what models ask for: the plugin's attributes for one attention."""

from collections.abc import Sequence

from pyfmha.errors import PluginError
from pyfmha.onnx.calls import DTYPES, Call, Extra, LeftAloneError
from pyfmha.trt.attention.problem import Features, Problem


def problem_of(call: Call, layout: str) -> Problem:
    """What the plugin is created with.

    Args:
        call: the attention.
        layout: of the plugin's tensors.

    Raises:
        LeftAloneError: the plugin does not serve it, or its sizes are not proven to fit.
    """
    dtype = call.dtype
    call.check_sizes()
    sizes = (call.q.sizes[1].number, call.k.sizes[1].number, call.q.sizes[3].number, call.v.sizes[3].number)
    heads, kv_heads, size, v_size = (number or 0 for number in sizes)
    visible = call.visible
    try:
        features = Features(
            num_kv_heads=kv_heads,
            layout=layout,
            bottom_right=visible.bottom_right,
            window=visible.window,
            softcap=call.softcap,
            return_lse=call.lse,
            kv_lengths=visible.kv_lengths is not None,
            bias=_bias(call, dtype),
            mask=any(extra.feature == "mask" and not extra.is_bias for extra in call.extras),
            sinks=_sinks(call, dtype),
            v_head_size=0 if v_size == size else v_size,
        )
        return Problem(heads, size, dtype, call.scale, visible.causal, features)
    except PluginError as error:
        raise LeftAloneError(f"the plugin does not serve it: {error}") from None


def is_plain(extras: Sequence[Extra]) -> bool:
    """Whether biases are one tensor that is added as it is. Else they are put together in float32."""
    return [(extra.feature, extra.factor) for extra in extras if extra.is_bias] == [("bias", 1.0)]


def _bias(call: Call, own: str) -> str:
    """The dtype of the plugin's bias; empty where there is none."""
    found = [extra for extra in call.extras if extra.is_bias]
    for extra in found:
        if extra.feature == "bias":
            _dtype_of(extra, own)
    if is_plain(call.extras):
        return DTYPES[found[0].value.dtype]  # type: ignore[index]
    return "fp32" if found else ""


def _sinks(call: Call, own: str) -> str:
    """The dtype of the plugin's sinks; empty where there are none."""
    return next((_dtype_of(extra, own) for extra in call.extras if extra.feature == "sinks"), "")


def _dtype_of(extra: Extra, own: str) -> str:
    kind = extra.value.dtype
    if kind is None or DTYPES.get(kind) not in (own, "fp32"):
        said = "unknown" if kind is None else kind.name
        name = f"{extra.feature} {extra.value.name}"
        raise LeftAloneError(f"its {name} is of type {said}; the plugin takes that of Q, or FLOAT")
    return DTYPES[kind]
