"""What the plugin serves of what models ask for: the one table, and the plugin's attributes for one attention."""

from pyfmha.errors import PluginError
from pyfmha.onnx.calls import Call, Extra, LeftAloneError
from pyfmha.trt.attention.problem import Features, Problem

SERVED: dict[str, str] = {
    "mask": "the plugin has no input for a mask yet",
    "bias": "the plugin has no input for a bias yet",
    "sinks": "the plugin has no attention sinks yet",
    "head size of V": "the plugin takes K and V of one head size",
}
"""Why a feature is not served. One that the plugin learns leaves this table, and gets its keyword in ``problem_of``."""


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
    if v_size != size:
        raise LeftAloneError(f"V has head size {v_size}, Q and K have {size}: {SERVED['head size of V']}")
    for extra in call.extras:
        raise LeftAloneError(_refusal(extra))
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
        )
        return Problem(heads, size, dtype, call.scale, visible.causal, features)
    except PluginError as error:
        raise LeftAloneError(f"the plugin does not serve it: {error}") from None


def _refusal(extra: Extra) -> str:
    return f"{extra.what}; {SERVED[extra.feature]}"
