"""What one plugin serves: its creation attributes, checked once.

Two kernels stand behind the plugin. The first one serves Q, K, V and Out of one shape; :class:`Features` ask for the
other, ``fmha_fwd_*``, which serves everything else. Which of the two it is follows from the creation attributes alone:
the earlier five name the first kernel, any newer one, even at its default, names the other. So do ``causal`` = 2 and a
head size that the first kernel lacks.
"""

import math
from dataclasses import dataclass

from pyfmha.attention.first import Attention
from pyfmha.attention.forward import Forward
from pyfmha.errors import PluginError, SpecError

DATA_TYPES = {0: "fp32", 1: "fp16", 7: "bf16"}
"""``int(trt.DataType)`` of FLOAT, HALF and BF16 (NvInferRuntimeBase.h, enum DataType)."""

TYPE_NAMES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
LAYOUTS = ("bhsd", "bshd", "packed")
"""Q, K, V as [batch, heads, seq, head size] or [batch, seq, heads, head size], or in one tensor: [batch, seq,
3, heads, head size] or [batch, seq, heads + 2 * kv heads, head size]. With cu_seqlens batch and seq are one axis."""

_TYPE_IDS = {dtype: number for number, dtype in DATA_TYPES.items()}
_INT32_MAX = (1 << 31) - 1
_SMALLEST = 2.0**-126  # the smallest normal float32


@dataclass(frozen=True)
class Features:
    """What the first kernel does not do.

    Attributes:
        num_kv_heads: heads of K and V; each serves num_heads / num_kv_heads heads of Q.
        layout: one of :data:`LAYOUTS`.
        bottom_right: whether the mask and the window are aligned so that the last query sees the last key; else so
            that the first query sees the first key.
        window: how many keys a query sees to its left and to its right; -1 is no limit.
        softcap: scores become softcap * tanh(score / softcap); 0 leaves them.
        return_lse: whether there is a second output, Lse: float32, the natural logarithm of the sum of exp(score).
        q_lengths, kv_lengths: whether there is an input INT32 [batch], the valid queries or keys of each sequence.
        cu_seqlens: whether the sequences lie behind each other without padding, with two inputs INT32 [batch + 1]
            that say where each begins.

    Raises:
        PluginError: on creation, for values out of range and for what does not go together.
    """

    num_kv_heads: int
    layout: str = "bhsd"
    bottom_right: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    return_lse: bool = False
    q_lengths: bool = False
    kv_lengths: bool = False
    cu_seqlens: bool = False

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise PluginError(f"layout is {self.layout!r}; allowed are {', '.join(LAYOUTS)}")
        for name, size in zip(("window_left", "window_right"), self.window, strict=True):
            if not -1 <= size <= _INT32_MAX:
                raise PluginError(f"{name} is {size}; give 0 or more keys, or -1 for no limit")
        # Below, it would be 0 as a float32, or to a kernel that flushes such numbers to 0: no soft cap, without a word.
        if self.softcap != 0 and not _SMALLEST <= self.softcap < math.inf:
            raise PluginError(
                f"softcap is {self.softcap}; give a finite number above 0, or 0 for none (as a float32, so"
                f" {_SMALLEST:.1e} at the least)"
            )
        if self.cu_seqlens and (self.q_lengths or self.kv_lengths):
            raise PluginError(
                "cu_seqlens excludes q_lengths and kv_lengths: cumulative lengths are for sequences without padding,"
                " lengths for padded ones"
            )
        if self.cu_seqlens and self.layout == "bhsd":
            raise PluginError(
                "layout 'bhsd' has no ragged form; with cu_seqlens Q, K and V are [tokens, heads, head size], which is"
                " layout 'bshd', or one tensor, which is layout 'packed'"
            )


@dataclass(frozen=True)
class Problem:
    """The attention that one plugin serves.

    Attributes:
        num_heads: heads of Q, and of K and V unless the features say otherwise.
        head_size: elements of one head: 1 to 256, without features those of :data:`pyfmha.attention.first.HEAD_SIZES`.
        dtype: ``"fp16"``, ``"bf16"`` or ``"fp32"``.
        softmax_scale: factor of Q K^T.
        causal: whether a query sees only keys at its own position and before.
        features: None for the first kernel.

    Raises:
        PluginError: on creation, for values that no kernel serves.
    """

    num_heads: int
    head_size: int
    dtype: str
    softmax_scale: float
    causal: bool = True
    features: Features | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_heads <= _INT32_MAX:
            raise PluginError(f"num_heads is {self.num_heads}; give 1 or more")
        # The kernel would serve 0 as well, but there it is nearly always a float64 read as float32.
        if not math.isfinite(self.softmax_scale) or self.softmax_scale == 0:
            raise PluginError(
                f"softmax_scale is {self.softmax_scale}; give a finite float32 other than 0, usually 1/sqrt(head_size)"
                " (float64 data in a FLOAT32 field is misread)"
            )
        if not 1 <= self.kv_heads <= self.num_heads or self.num_heads % self.kv_heads:
            raise PluginError(
                f"num_heads is {self.num_heads}, num_kv_heads {self.kv_heads}; num_heads must be a multiple of"
                " num_kv_heads, which is 1 or more"
            )
        try:
            _ = self.function_name
        except SpecError as error:
            raise PluginError(str(error)) from None

    @property
    def function_name(self) -> str:
        """The C function that serves it."""
        if self.features is None:
            return Attention(self.dtype, self.head_size, self.causal).name
        return Forward(self.dtype, self.head_size).name

    @property
    def padded_size(self) -> int:
        """The head size that its kernel is compiled for."""
        return self.head_size if self.features is None else Forward(self.dtype, self.head_size).padded

    @property
    def kv_heads(self) -> int:
        """Heads of K and V."""
        return self.num_heads if self.features is None else self.features.num_kv_heads

    @property
    def type_id(self) -> int:
        """``int(trt.DataType)`` of Q, K, V and Out."""
        return _TYPE_IDS[self.dtype]

    def attributes(self) -> dict[str, int | float | str]:
        """The creation attributes by name: the earlier five, and where there are features all others."""
        earlier: dict[str, int | float | str] = {
            "num_heads": self.num_heads,
            "head_size": self.head_size,
            "type_id": self.type_id,
            "softmax_scale": self.softmax_scale,
            "causal": int(self.causal),
        }
        if self.features is None:
            return earlier
        more = self.features
        return earlier | {
            "num_kv_heads": more.num_kv_heads,
            "layout": more.layout,
            "bottom_right": int(more.bottom_right),
            "window_left": more.window[0],
            "window_right": more.window[1],
            "softcap": more.softcap,
            "return_lse": int(more.return_lse),
            "q_lengths": int(more.q_lengths),
            "kv_lengths": int(more.kv_lengths),
            "cu_seqlens": int(more.cu_seqlens),
        }

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        text = f"{self.dtype}, {self.num_heads} heads of size {self.head_size}, {kind}, scale {self.softmax_scale:g}"
        return text if self.features is None else f"{text}{_listed(self.features, self.num_heads)}"


def _listed(features: Features, num_heads: int) -> str:
    """What of the features differs from their defaults, for messages."""
    parts = [f"layout {features.layout}"]
    if features.num_kv_heads != num_heads:
        parts.append(f"{features.num_kv_heads} heads of K and V")
    if features.bottom_right:
        parts.append("aligned bottom right")
    if features.window != (-1, -1):
        parts.append(f"window {features.window}")
    if features.softcap:
        parts.append(f"softcap {features.softcap:g}")
    parts += [name for name in ("q_lengths", "kv_lengths", "cu_seqlens", "return_lse") if getattr(features, name)]
    return "".join(f", {part}" for part in parts)
