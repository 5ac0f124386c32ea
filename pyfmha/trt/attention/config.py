"""What an engine with one attention layer serves, checked before anything is built."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pyfmha.attention.biased_operator import BROADCAST
from pyfmha.attention.first import DTYPES
from pyfmha.attention.fp8 import DESCALES
from pyfmha.errors import EngineError, PluginError
from pyfmha.operators.description import TYPE_NAMES
from pyfmha.spec.words import dtype_name
from pyfmha.trt.attention.causal import check_causal, says_causal
from pyfmha.trt.attention.functions import Asked
from pyfmha.trt.attention.problem import INPUTS, Problem
from pyfmha.trt.attention.requested import default_scale, features_of
from pyfmha.trt.attention.words import Align, Causal, Dtype, Function, Layer, Layout
from pyfmha.trt.engine import Range

LAYERS = ("plugin", "tensorrt")
"""Whose attention an engine has: this package's plugin, or TensorRT's own layer (from 10.14), to compare with."""

Axis = tuple[str, int | None]
"""What an axis is, and its size where that is fixed."""


@dataclass(frozen=True)
class EngineConfig:
    """What an engine with one attention layer serves.

    Its inputs are Q, K and V [batch, heads, seq, head size], or what ``layout`` and the lengths make of them, see
    :meth:`axes`; its outputs are Out and, with ``return_lse``, Lse. What the fields after ``layer`` mean is said at
    :func:`pyfmha.trt.add_attention`; only the plugin has them.

    Attributes:
        num_heads, head_size: fixed in the engine.
        max_batch_size, max_seq_len: both may be from 1 up to these; TensorRT times tactics at the largest.
        dtype: ``"fp16"``, ``"bf16"`` or ``"fp32"``.
        causal: whether a query sees only keys at its own position and before; ``"bottom-right"`` aligns the last
            query with the last key. A keyword without a default.
        scale: factor of Q K^T; None is 1 / sqrt(head size).
        layer: one of :data:`LAYERS`.
        num_kv_heads: heads of K and V; None is as many as of Q.
        max_kv_seq_len: keys, from 1 up to this; None is ``max_seq_len``.
        align, window, softcap, return_lse: as there.
        layout: as there, or ``"packed"`` for one input QKV [batch, seq, heads + 2 * kv heads, head size].
        q_lengths, kv_lengths: whether there is an input of that name, INT32 [batch].
        cu_seqlens: whether there are the inputs cu_seqlens_q and cu_seqlens_kv, INT32 [batch + 1], so that [tokens] is
            in the place of [batch, seq], with up to ``max_batch_size`` times the longest sequence.
        bias, mask: the axes of an input of that name, as letters: b, h, q and k for batch, query heads, queries and
            keys, in this order, or 1 in the place of one; None for no such input. ``"bhqk"`` is [batch, heads, Sq,
            Skv], ``"b11k"`` a padding mask, ``"hqk"`` a bias that all sequences share.
        bias_dtype: of the bias: that of Q, by default, or ``"fp32"``.
        sinks: whether there is an input of that name, FLOAT [heads].
        v_head_size: of V and Out; None is ``head_size``.
        fp8: whether Q, K and V are FP8 (e4m3), on Hopper; ``dtype``, fp16 or bf16, is then that of Out alone.
        q_descale, k_descale, v_descale: the axes of an input FLOAT of that name, the factor of Q, K or V in FP8:
            ``"1"``, ``"h"`` for one a key head or ``"bh"``, or ``"b1"`` for one a sequence; None for no such input.
        score, mask_function: functions of a user's, or their names in the library; kept as name and digest. Their
            tensors are inputs of the engine, ``"alibi_slopes"``.
        function_inputs: by name, what the functions are given but for tensors: numbers, the sizes of axes that are
            numbers of theirs (``{"tokens": 4096}``), and the shapes of tensors of which they say none.

    Raises:
        EngineError: on creation, for values out of range and for what does not go together.
    """

    num_heads: int
    head_size: int
    max_batch_size: int
    max_seq_len: int
    dtype: Dtype = "fp16"
    causal: Causal = field(kw_only=True)
    scale: float | None = None
    layer: Layer = "plugin"
    num_kv_heads: int | None = None
    max_kv_seq_len: int | None = None
    align: Align | None = None
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    layout: Layout | Literal["packed"] | None = None
    return_lse: bool = False
    q_lengths: bool = False
    kv_lengths: bool = False
    cu_seqlens: bool = False
    bias: str | None = None
    mask: str | None = None
    bias_dtype: Dtype | None = None
    sinks: bool = False
    v_head_size: int | None = None
    fp8: bool = False
    q_descale: str | None = None
    k_descale: str | None = None
    v_descale: str | None = None
    score: Function | None = None
    mask_function: Function | None = None
    function_inputs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        self._settle_functions()
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        object.__setattr__(self, "window", tuple(self.window))  # a list, where it comes from JSON
        if self.bias_dtype is not None:
            object.__setattr__(self, "bias_dtype", dtype_name(self.bias_dtype))
        for name in (*BROADCAST, *DESCALES):
            check_axes(name, getattr(self, name))
        shared = [name for name in DESCALES if self.cu_seqlens and "b" in (getattr(self, name) or "")]
        if shared:
            raise EngineError(f"{', '.join(shared)}: sequences of a ragged batch share factors; give '1' or 'h'")
        for name in ("num_heads", "head_size", "max_batch_size", "max_seq_len", "max_kv_seq_len"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 1 << 31:
                raise EngineError(f"{name} is {value}; give 1 or more")
        for name, allowed in (("dtype", DTYPES), ("layer", LAYERS)):
            if getattr(self, name) not in allowed:
                raise EngineError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}")
        if self.layer == "tensorrt" and self.extras:
            raise EngineError(f"layer 'tensorrt' does not serve {', '.join(self.extras)} here; layer 'plugin' does")
        if self.layout == "packed" and self.max_kv_len != self.max_seq_len:
            raise EngineError(
                f"max_kv_seq_len is {self.max_kv_len}, max_seq_len {self.max_seq_len}; layout 'packed' has as many keys"
                " as queries: leave max_kv_seq_len out"
            )
        try:
            check_causal(self.causal)
            if self.layer == "plugin":
                _ = self.problem
        except PluginError as error:
            raise EngineError(str(error)) from None

    def _settle_functions(self) -> None:
        """Functions as texts, which JSON holds, and which another process knows in its library."""
        try:
            names = Asked(self.score, self.mask_function).identities()
        except PluginError as error:
            raise EngineError(str(error).replace("give it as mask=", "give it as mask_function=")) from None
        if not names and self.function_inputs:
            given = ", ".join(self.function_inputs)
            raise EngineError(f"function_inputs are given ({given}), and no function; give score= or mask_function=")
        for name, attribute in (("score", "score_function"), ("mask_function", "mask_function")):
            object.__setattr__(self, name, names.get(attribute))
        settled = {name: tuple(x) if isinstance(x, list) else x for name, x in self.function_inputs.items()}
        object.__setattr__(self, "function_inputs", settled)

    @property
    def factor(self) -> float:
        """The factor of Q K^T: ``scale``, or its default."""
        return 1 / math.sqrt(self.head_size) if self.scale is None else self.scale

    @property
    def kv_heads(self) -> int:
        """Heads of K and V."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def max_kv_len(self) -> int:
        """The longest sequence of keys."""
        return self.max_seq_len if self.max_kv_seq_len is None else self.max_kv_seq_len

    @property
    def extras(self) -> tuple[str, ...]:
        """The names of what it asks for beyond attention over Q, K and V of one shape."""
        asked = {
            "num_kv_heads": self.kv_heads != self.num_heads,
            "max_kv_seq_len": self.max_kv_len != self.max_seq_len,
            "causal 'bottom-right'": isinstance(self.causal, str),
            "align": self.align not in (None, "top-left"),
            "window": self.window != (-1, -1),
            "softcap": self.softcap != 0,
            "layout": self.layout not in (None, "bhsd"),
            **{name: getattr(self, name) for name in ("return_lse", "q_lengths", "kv_lengths", "cu_seqlens")},
            **{name: bool(getattr(self, name)) for name in ("bias", "mask", "sinks", "fp8", *DESCALES)},
            **{name: bool(getattr(self, name)) for name in ("score", "mask_function")},
            "v_head_size": self.v_head_size not in (None, self.head_size),
        }
        return tuple(name for name, used in asked.items() if used)

    @property
    def problem(self) -> Problem:
        """What the plugin is asked for.

        Raises:
            PluginError: it is not served; never once the configuration is made.
        """
        lengths = [name for name in ("q_lengths", "kv_lengths") if getattr(self, name)]
        lengths += ["cu_seqlens_q", "cu_seqlens_kv"] if self.cu_seqlens else []
        layout = self.layout or ("bshd" if self.cu_seqlens else "bhsd")
        features = features_of(
            self.kv_heads, layout, self.causal, self.align, self.window, self.softcap, self.return_lse, lengths
        )
        features = replace(
            features,
            bias=(self.bias_dtype or self.dtype) if self.bias else "",
            mask=bool(self.mask),
            sinks="fp32" if self.sinks else "",
            v_head_size=self.v_head_size or 0,
            fp8=self.fp8,
            q_descale=bool(self.q_descale),
            k_descale=bool(self.k_descale),
            v_descale=bool(self.v_descale),
        )
        return Problem(
            self.num_heads,
            self.head_size,
            self.dtype,
            default_scale(self.scale, self.head_size),
            bool(self.causal),
            features,
        )

    def axes(self) -> dict[str, tuple[Axis, ...]]:
        """The inputs by name: what each axis is, and its size where that is fixed."""
        if self.layer == "plugin":
            named = {
                form.name: tuple((axis.label, axis.size) for axis in form.axes) for form in self.problem.forms().inputs
            }
            kept = {name: getattr(self, name) for name in (*BROADCAST, *DESCALES)}
            return named | {name: self._broadcast(name, letters) for name, letters in kept.items() if letters}
        axes = (("batch", None), ("heads", self.num_heads), ("Sq", None), ("head size", self.head_size))
        return dict.fromkeys(INPUTS, axes)

    def types(self) -> dict[str, str]:
        """The type of each input by name, as TensorRT's ``DataType`` has it."""
        if self.layer == "plugin":
            return {form.name: TYPE_NAMES[form.type or self.dtype] for form in self.problem.forms().inputs}
        return dict.fromkeys(INPUTS, TYPE_NAMES[self.dtype])

    def _broadcast(self, name: str, letters: str) -> tuple[Axis, ...]:
        """The axes of a bias, mask or factor."""
        sized = {
            "b": ("batch", None),
            "h": ("kv heads", self.kv_heads) if name in DESCALES else ("heads", self.num_heads),
            "q": ("Sq", None),
            "k": ("Sq" if self.layout == "packed" else "Skv", None),
            "1": ("1", 1),
        }
        return tuple(sized[letter] for letter in letters)

    def ranges(self) -> dict[str, Range]:
        """The shapes that the inputs may have."""
        batch, rows, keys = self.max_batch_size, self.max_seq_len, self.max_kv_len
        most = {"batch": batch, "batch + 1": batch + 1, "seq": rows, "Sq": rows, "Skv": keys}
        most |= {"tokens": batch * rows, "Q tokens": batch * rows, "KV tokens": batch * keys}
        made = {}
        for name, axes in self.axes().items():
            largest = tuple(most[axis] if size is None else size for axis, size in axes)
            smallest = tuple((2 if axis == "batch + 1" else 1) if size is None else size for axis, size in axes)
            made[name] = (smallest, largest, largest)
        return made


def check_axes(name: str, letters: str | None) -> None:
    """Refuse what does not say the axes of a bias, mask or factor.

    Raises:
        EngineError: saying what is allowed.
    """
    if letters is None:
        return
    if not isinstance(letters, str):
        raise EngineError(f"{name} is {letters!r}; give its axes as letters, such as 'bh', or None for no such input")
    whole = "bh" if name in DESCALES else "bhqk"
    counterparts = whole[-len(letters) :]
    if not 1 <= len(letters) <= len(whole) or any(
        letter not in (want, "1") for letter, want in zip(letters, counterparts, strict=True)
    ):
        if name in DESCALES:
            raise EngineError(
                f"{name} is {letters!r}; give its axes as letters: '1' (one factor), 'h' (one a key head), 'bh' or 'b1'"
            )
        raise EngineError(
            f"{name} is {letters!r}; give its axes as letters: the last ones of 'bhqk' (batch, query heads, queries,"
            " keys), with 1 in the place of each that is broadcast, such as 'bhqk', '1hqk' or 'b11k'"
        )


# A type checker asks for the keyword by the class's own signature; this is for everybody else.
EngineConfig.__init__ = says_causal("EngineConfig", EngineError)(EngineConfig.__init__)  # type: ignore[method-assign]
