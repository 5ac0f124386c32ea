"""What the attention operator says of Q, K and V in FP8: the type of Q, K and V, their factors, what goes with them.

``fp8`` = 1 says that Q, K and V are FP8 (e4m3) and that ``type_id`` is Out's type alone. Each of them may have an input
of factors, FLOAT: one, one a key head, or [batch, key heads]; which of these follows from the shape. The function is
``fmha_fp8_*``, which Hopper alone has, see :mod:`pyfmha.attention.fp8`.
"""

from pyfmha.attention import fp8
from pyfmha.attention.fp8 import DESCALES
from pyfmha.operators.description import DATA_TYPES, Attribute, Check, Tensor

FP8 = "fp8 != 0"
ATTRIBUTES = {name: Attribute("int32", 0, stored="eight") for name in ("fp8", *DESCALES)}
ARGUMENTS = fp8.ARGUMENTS
FUNCTION = "fmha_fp8_d{padded_split}_{T}"
MULTIPLE = 16
"""Head sizes are multiples of it: what TMA asks of a row in bytes."""

AXES = {"b": ("batch", "batch"), "h": ("kv heads", "num_kv_heads")}
"""The axes of factors: what each is, and what is its size where it is not 1."""

LABELS = {f"{name}_{axis}": f"{said} or 1" for name in DESCALES for axis, (said, _) in AXES.items()}
"""How messages call the axes."""

SUMMARY = (("eight", ", Q, K and V in FP8"), *((f"eight and {name} != 0", f", {name}") for name in DESCALES))


def inputs() -> tuple[Tensor, ...]:
    """The factors, in this order behind the other inputs."""
    return tuple(
        Tensor(name, [f"fp32[{name}_h]", f"fp32[{name}_b, {name}_h]"], f"eight and {name} == 1") for name in DESCALES
    )


def strides() -> dict[str, str]:
    """Definitions of strides by name."""
    found: dict[str, str] = {}
    for name in DESCALES:
        found[f"{name}_stride_b"] = f"0 if {name}_b <= 1 else {name}_h"
        found[f"{name}_stride_h"] = f"0 if {name}_h <= 1 else 1"
    return found


def checks() -> tuple[Check, ...]:
    """What must hold of them, and what does not go with them."""
    return (
        *(
            Check(f"{name} == 0 or {name} == 1", f"{name} is {{{name}}}; allowed are 0 and 1")
            for name in ("fp8", *DESCALES)
        ),
        *(
            Check(
                f"fp8 == 1 or {name} == 0",
                f"{name} is 1 and fp8 0: factors are for Q, K and V in FP8, which fp8 = 1 says",
            )
            for name in DESCALES
        ),
        *(
            Check(f"fp8 == 0 or ({condition})", f"{said}, which Q, K and V in FP8 do not serve: {allowed}")
            for condition, said, allowed in _REFUSED
        ),
        *(check for name in DESCALES for check in _sizes(name)),
    )


_REFUSED = (
    (
        f"type_id != {DATA_TYPES['fp32']}",
        "Out is FLOAT",
        f"it must be HALF or BF16 (type_id {DATA_TYPES['fp16']} or {DATA_TYPES['bf16']})",
    ),
    (f"head_size % {MULTIPLE} == 0", "head size is {head_size}", f"use a multiple of {MULTIPLE}"),
    ("softcap == 0", "softcap is {softcap:g}", "leave it at 0"),
    (
        "window_left == -1 and right <= 0",
        "the window is ({window_left}, {window_right})",
        "leave it at -1; what they serve is causal or sees every key",
    ),
    ("softmax_scale > 0", "softmax_scale is {softmax_scale:g}", "use one above 0"),
    *(
        (f"{name} == 0", f"{name} is {{{name}}}", "leave it at 0, or give Q, K and V in HALF or BF16")
        for name in ("bias", "mask", "sinks")
    ),
    (
        "v_head_size == head_size",
        "head size of V is {v_head_size}, that of Q and K {head_size}",
        "one head size for all, or Q, K and V in HALF or BF16",
    ),
)
"""What is not served: the condition that must hold, what is said of it, and what to do."""


def _sizes(name: str) -> tuple[Check, ...]:
    """One factor, one a key head or [batch, key heads]; of a ragged batch, all sequences share them."""
    wanted = f"{name} is [1], [kv heads] or [batch, kv heads], here [1], [{{num_kv_heads}}]"
    return (
        Check(
            f"{name} == 0 or {name}_h == 1 or {name}_h == num_kv_heads",
            f"the axis of kv heads of {name} is {{{name}_h}}; {wanted} or [{{batch}}, {{num_kv_heads}}]",
        ),
        Check(
            f"{name} == 0 or {name}_b <= 1 or ({name}_b == batch and not cu_seqlens)",
            f"the axis of batch of {name} is {{{name}_b}}; {wanted}, or without cu_seqlens [{{batch}},"
            " {num_kv_heads}]",
        ),
        Check(
            f"{name} == 0 or batch == 0 or numel({name}) > 0",
            f"{name} has no elements; {wanted} or [{{batch}}, {{num_kv_heads}}]",
        ),
    )
