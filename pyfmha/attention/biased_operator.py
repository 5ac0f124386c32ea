"""What the attention operator says of biases, masks, sinks and values of another head size: inputs that may be there.

They are read as they are, by strides: 0 for an axis that is broadcast. An axis of a bias or mask is as long as its
counterpart, or 1; leading axes may be missing, as ONNX and numpy broadcast. That is told by the shapes of a call, so
that one engine may get either. The function is ``fmha_biased_*`` only where one of them is asked for.
"""

from pyfmha.attention import biased
from pyfmha.operators.description import Attribute, Check, Tensor

BROADCAST = ("bias", "mask")
"""The inputs that are broadcast; :data:`AXES` says to what."""

AXES = {"b": ("batch", "batch"), "h": ("query heads", "num_heads"), "q": ("queries", "rows"), "k": ("keys", "columns")}
"""Their axes: what each is, and the definition that is its size."""

OWN, FLOAT = 1, 2
"""Values of the attributes ``bias`` and ``sinks``: the input is of Q's type, or FLOAT; 0 is none."""

BIASED = "bias != 0 or mask != 0 or sinks != 0 or v_head_size != head_size"

ATTRIBUTES = {
    **{name: Attribute("int32", 0, stored="biased") for name in ("bias", "mask", "sinks")},
    "v_head_size": Attribute("int32", "head_size", stored="biased"),
}


def _forms(name: str, kind: str) -> list[str]:
    """Of one to four axes, the last ones of batch, query heads, queries and keys."""
    axes = [f"{name}_{axis}" for axis in AXES]
    return [f"{kind}[{', '.join(axes[first:])}]" for first in (3, 2, 1, 0)]


def inputs() -> tuple[Tensor, ...]:
    """Bias, mask and sinks, in this order behind the others."""
    types = {OWN: "T", FLOAT: "fp32"}
    return (
        *(Tensor("bias", _forms("bias", kind), f"features and bias == {which}") for which, kind in types.items()),
        Tensor("mask", _forms("mask", "bool"), "features and mask == 1"),
        *(Tensor("sinks", f"{kind}[num_heads]", f"features and sinks == {which}") for which, kind in types.items()),
    )


def strides() -> dict[str, str]:
    """Definitions of strides by name, those of :func:`pyfmha.attention.biased.broadcast_strides`, and of how many
    queries and keys there are, past which nothing is read: the longest sequence of a ragged batch may be longer."""
    found: dict[str, str] = {}
    for name in BROADCAST:
        found |= {
            f"{name}_stride_b": f"0 if {name}_b <= 1 else {name}_h * {name}_q * {name}_k",
            f"{name}_stride_h": f"0 if {name}_h <= 1 else {name}_q * {name}_k",
            f"{name}_stride_q": f"0 if {name}_q <= 1 else {name}_k",
            f"{name}_stride_k": f"0 if {name}_k == 1 and columns != 1 else 1",
            f"{name}_rows": f"{name}_q",
            f"{name}_columns": f"{name}_k",
        }
    return found


def _broadcasts(name: str) -> list[Check]:
    """Each axis is 1 or its counterpart's; one that is missing has the size 0, and so has what has no elements."""
    wanted = "[batch or 1, query heads or 1, queries or 1, keys or 1], here [{batch}, {num_heads}, {rows}, {columns}]"
    there = f"{name} == 0"
    checks = [
        Check(
            f"{there} or numel({name}) > 0 or batch == 0 or rows == 0 or columns == 0",
            f"{name} has no elements; it is {wanted}, without leading axes of 1 if you like",
        )
    ]
    for axis, (said, size) in AXES.items():
        # Of a ragged batch, queries and keys are as many as the longest sequence has, which the device alone knows.
        free = "cu_seqlens or " if axis in "qk" else ""
        checks.append(
            Check(
                f"{there} or {free}{name}_{axis} <= 1 or {name}_{axis} == {size}",
                f"the axis of {said} of {name} is {{{name}_{axis}}}; allowed are 1 and {{{size}}}: {name} is {wanted},"
                " without leading axes of 1 if you like",
            )
        )
    return checks


def checks() -> tuple[Check, ...]:
    """What must hold of them."""
    return (
        *(
            Check(
                f"{name} == 0 or {name} == {OWN} or {name} == {FLOAT}",
                f"{name} is {{{name}}}; allowed are 0 (none), {OWN} (an input of Q's type) and {FLOAT} (one of FLOAT)",
            )
            for name in ("bias", "sinks")
        ),
        Check("mask == 0 or mask == 1", "mask is {mask}; allowed are 0 and 1"),
        Check(
            "v_head_size >= 1 and v_head_size <= 256", "head size of V is {v_head_size}: use an integer from 1 to 256"
        ),
        Check(
            "layout != 'packed' or v_head_size == head_size",
            "head size of V is {v_head_size}, that of Q and K {head_size}; layout 'packed' has one for all",
        ),
        *(check for name in BROADCAST for check in _broadcasts(name)),
    )


SOURCES = {
    "Bias": f"bias if bias == {OWN} else null",
    "BiasFp32": f"bias if bias == {FLOAT} else null",
    "Mask": "mask",
    "Sinks": f"sinks if sinks == {OWN} else null",
    "SinksFp32": f"sinks if sinks == {FLOAT} else null",
}
"""Where the pointers of :data:`pyfmha.attention.biased.ARGUMENTS` come from."""

LABELS = {
    "v_head_size": "head size of V",
    **{f"{name}_{axis}": f"{said} or 1" for name in BROADCAST for axis, (said, _) in AXES.items()},
}
"""How messages call the axes."""

ARGUMENTS = biased.ARGUMENTS
FUNCTION = "fmha_biased_d{padded}_{T}"

SUMMARY = (
    ("biased and v_head_size != head_size", ", V of size {v_head_size}"),
    *((f"biased and {name} != 0", f", {name}") for name in ("bias", "mask", "sinks")),
)
