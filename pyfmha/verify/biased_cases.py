"""What ``pyfmha verify`` computes with ``fmha_biased_*``: biases, masks, sinks and values of another head size, with
every broadcast, NaN and infinity in what is masked, rows that see nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from pyfmha.attention.biased import ABSENT, BiasedCall, BroadcastStrides
from pyfmha.attention.biased_hopper import HEAD_SIZES
from pyfmha.attention.run import to_float, to_storage
from pyfmha.bfloat16 import STORAGE
from pyfmha.verify.cases import Case

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class BiasedCase(Case):
    """One problem.

    Attributes:
        v_head_size: of V and Out; 0 for that of Q and K.
        bias, mask: [batch, heads, queries, keys], of which any may be 1; None for none.
        bias_dtype, sinks: ``"own"`` for Q's dtype, or ``"fp32"``; no sinks are ``""``.
        tensor_gap, tensor_shift: as gap and shift, of bias and mask.
        masked_by: ``"mask"`` or ``"bias"``: what says that keys are not seen; where no query sees a key, K and V of a
            dense batch are NaN. Some rows see nothing.
    """

    v_head_size: int = 0
    bias: Shape | None = None
    mask: Shape | None = None
    bias_dtype: str = "own"
    sinks: str = ""
    tensor_gap: int = 0
    tensor_shift: int = 0
    masked_by: str = "mask"

    def shape(self, tensor: str) -> Shape:
        """As of :class:`Case`, with V's own head size."""
        *outer, size = super().shape(tensor)
        size = (self.v_head_size or size) if tensor in ("V", "Out") else size
        return outer[0], outer[1], outer[2], size

    def call(self) -> BiasedCall:
        """The launch, but for its pointers."""
        usual = vars(super().call())
        return BiasedCall(
            **usual, v_head_size=self.v_head_size, bias_strides=self._told("bias"), mask_strides=self._told("mask"),
            **{f"{name}_counts": shape[2:] for name in ("bias", "mask") if (shape := getattr(self, name)) is not None},
        )  # fmt: skip

    def _told(self, name: str) -> BroadcastStrides:
        shape = getattr(self, name)
        if shape is None:
            return ABSENT
        b, h, q, k = (0 if n == 1 else step for n, step in zip(shape, self._steps(name), strict=True))
        return b, h, q, k

    def _steps(self, name: str) -> Shape:
        _, h, q, k = getattr(self, name)
        row = k + self.tensor_gap
        return h * q * row, q * row, row, 1

    def dtype_of(self, kind: str) -> str:
        """The dtype that ``"own"`` or ``"fp32"`` means."""
        return self.dtype if kind == "own" else kind

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """Flat memory of bias, mask and sinks, of those that there are."""
        made = {}
        for name, dtype in (("bias", self.dtype_of(self.bias_dtype)), ("mask", "u8")):
            shape = getattr(self, name)
            if shape is None:
                continue
            values = self._biases(shape) if name == "bias" else ~self._hidden(shape)
            steps = self._steps(name)
            storage = np.uint8 if dtype == "u8" else STORAGE[dtype]
            store = np.zeros(sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) + 1, storage)
            view = np.lib.stride_tricks.as_strided(store, shape, [store.itemsize * step for step in steps])
            view[...] = values if dtype == "u8" else to_storage(values.astype(np.float32), dtype)
            made[name] = store
        if self.sinks:
            values = np.random.default_rng(3).standard_normal(self.heads).astype(np.float32)
            made["sinks"] = to_storage(values, self.dtype_of(self.sinks))
        return made

    def _biases(self, shape: Shape) -> Any:
        """Some numbers; where the mask hides a key, NaN, and without a mask minus infinity."""
        values = 2 * np.random.default_rng([5, *shape]).standard_normal(shape)
        if self.masked_by == "bias":
            return np.where(self._hidden(shape), -np.inf, values)
        return np.where(self._hidden(shape), np.nan, values) if self.mask == shape else values

    def _hidden(self, shape: Shape) -> Any:
        hidden = np.random.default_rng([4, *shape]).random(shape) < 0.3
        hidden[..., :1, :] |= shape[2] > 1  # a row that sees nothing
        hidden[..., shape[3] // 2 :][..., :9] = True  # keys that nobody sees
        return hidden

    def view_of(self, name: str) -> Any:
        """Bias or mask as stored, [batch, heads, queries, keys]."""
        store = self.tensors[name]
        return np.lib.stride_tricks.as_strided(
            store, getattr(self, name), [store.itemsize * step for step in self._steps(name)]
        )

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """As of :class:`Case`, with NaN in K and V where no query sees a key."""
        made = super().inputs
        shape = getattr(self, self.masked_by)
        if shape is not None and shape[3] > 1 and not (self.largest or self.ragged):
            unseen = self._hidden(shape).all(axis=(0, 1, 2))
            for name in "KV":
                self.view(name, made[name])[:, :, unseen] = to_storage(np.full(1, np.nan, np.float32), self.dtype)
        return made

    @cached_property
    def _channels(self) -> Any:
        """Channels do not differ here."""
        return np.float32(1)

    def options(self) -> dict[str, Any]:
        """As of :class:`Case`, with the tensors."""
        made: dict[str, Any] = super().options()
        if self.bias is not None:
            made["bias"] = to_float(self.view_of("bias"), self.dtype_of(self.bias_dtype))
        if self.mask is not None:
            made["mask"] = self.view_of("mask") != 0
        if self.sinks:
            made["sinks"] = to_float(self.tensors["sinks"], self.dtype_of(self.sinks))
        return made


def biased_cases(dtype: str, padded: int) -> list[BiasedCase]:
    """For one ``fmha_biased_*``: each tensor alone and with everything else, aligned and not."""
    plain = BiasedCase("", dtype, padded, q_len=72, kv_len=136, heads=2, kv_heads=2)
    full, keys, pair = (2, 2, 72, 136), (2, 1, 1, 136), (1, 1, 72, 136)
    causal: dict[str, Any] = {"right": 0, "bottom_right": True}
    ragged: dict[str, Any] = {
        "q_len": 80, "kv_len": 120, "batch": 1, "cu_q": (3, 20, 20, 75), "cu_kv": (0, 40, 41, 118),
    }  # fmt: skip
    features: list[tuple[str, dict[str, Any]]] = [
        ("bias", {"bias": full}),
        ("bias, causal, heads 6/2", {"bias": (1, 6, 72, 136), "heads": 6, **causal}),
        ("bias of pairs, window", {"bias": pair, "left": 40, "right": 9, "layout": "bshd"}),
        ("bias of keys", {"bias": keys, "sinks": "own"}),
        ("bias of -inf", {"bias": full, "masked_by": "bias"}),
        ("bias of -inf, keys", {"bias": keys, "masked_by": "bias", "right": 0}),
        ("bias in fp32", {"bias": full, "bias_dtype": "fp32"}),
        ("bias of queries", {"bias": (1, 2, 72, 1)}),
        ("one bias for all", {"bias": (1, 1, 1, 1)}),
        ("bias, soft cap", {"bias": full, "softcap": 2.0}),
        ("mask", {"mask": full}),
        ("mask, rows of whole 16 bytes", {"kv_len": 144, "mask": (2, 2, 72, 144)}),
        ("mask of all heads, several tiles", {"q_len": 200, "kv_len": 272, "mask": (2, 1, 200, 272), "left": 150}),
        ("bias of all batches, several tiles", {"q_len": 200, "kv_len": 328, "bias": (1, 2, 200, 328), **causal}),
        ("mask, rows of whole 16 bytes, causal", {"kv_len": 144, "mask": (1, 2, 72, 144), **causal}),
        ("mask of keys", {"mask": keys, "sinks": "fp32"}),
        ("mask of keys, causal", {"mask": keys, "right": 0}),
        ("mask of keys, window", {"mask": keys, "left": 40}),
        ("bias of keys, Sq 600", {"batch": 1, "q_len": 600, "bias": (1, 1, 1, 136)}),
        ("mask of keys, Sq 600", {"batch": 1, "q_len": 600, "mask": (1, 1, 1, 136)}),
        ("bias of keys, lengths", {"bias": keys, "q_lengths": (40, 0), "kv_lengths": (136, 60)}),
        ("mask of pairs, causal", {"mask": pair, **causal}),
        ("mask, lengths", {"mask": full, "q_lengths": (40, 0), "kv_lengths": (136, 60)}),
        ("mask, soft cap", {"mask": pair, "softcap": 5.0}),
        ("bias and mask, NaN in what is masked", {"bias": full, "mask": full}),
        ("bias, mask, sinks, window", {"bias": pair, "mask": keys, "sinks": "own", "left": 50, "right": 0}),
        ("sinks, causal", {"sinks": "own", **causal}),
        ("sinks, window", {"sinks": "own", "left": 40, "right": 9}),
        ("sinks, rows without keys", {"sinks": "fp32", "q_len": 150, "kv_len": 33, **causal}),
        ("values of 8", {"v_head_size": 8, "right": 0}),
        ("values of half", {"v_head_size": padded // 2, "bias": full}),
        ("values of another size", {"head_size": padded // 2, "v_head_size": padded, "mask": full, **causal}),
        *_narrow_values(padded),
        *_sinks_alone(padded),
        ("ragged, bias", {**ragged, "bias": (1, 2, 80, 120)}),
        ("ragged, mask, bottom right", {**ragged, "mask": (3, 1, 80, 120), **causal}),
        ("ragged, sinks", {**ragged, "sinks": "own", "right": 0}),
        ("one query", {"q_len": 1, "bias": (2, 2, 1, 136), "mask": (2, 1, 1, 136)}),
        ("without log-sum-exp", {"bias": full, "lse": False}),
        ("largest inputs", {"largest": True, "bias": full}),
        ("largest inputs, mask", {"largest": True, "mask": full}),
    ]
    aligned = [replace(plain, name=name, **changes) for name, changes in features]
    picked: Sequence[str] = ("bias", "mask", "bias, mask, sinks, window", "ragged, bias", "one query", "sinks, causal")
    return [
        *aligned,
        *(replace(case, name=f"{case.name}, misaligned", shift=1) for case in aligned if case.name in picked),
        *(
            replace(case, name=f"{case.name}, odd rows of it", tensor_gap=1, tensor_shift=1)
            for case in aligned
            if case.name in picked
        ),
        replace(plain, name="bias, odd head size", head_size=padded - 3, v_head_size=padded - 5, bias=full),
    ]


def _sinks_alone(padded: int) -> list[tuple[str, dict[str, Any]]]:
    """Sinks and nothing else, of as many queries as choose the variants that Hopper has for them."""
    if padded not in HEAD_SIZES:
        return []
    tall: dict[str, Any] = {"batch": 1, "sinks": "own", "kv_len": 90}
    return [
        ("sinks, Sq 72", {"sinks": "fp32"}),
        ("sinks, Sq 400, causal", {**tall, "q_len": 400, "kv_len": 500, "right": 0}),
        ("sinks, Sq 600", {**tall, "q_len": 600}),
        ("sinks, Sq 1030, causal", {**tall, "q_len": 1030, "right": 0}),
        ("sinks, Sq 2100, causal", {**tall, "q_len": 2100, "heads": 32, "right": 0}),
        ("sinks, Sq 4200, causal", {**tall, "q_len": 4200, "right": 0, "bottom_right": True}),
        ("sinks, Sq 8200", {**tall, "q_len": 8200}),
    ]


def _narrow_values(padded: int) -> list[tuple[str, dict[str, Any]]]:
    """Values of up to two thirds of the head size, with nothing else: Hopper has variants for some of them, which are
    chosen by how many queries there are."""
    both = {"head_size": padded * 3 // 4, "v_head_size": padded // 2}
    several: dict[str, Any] = {"q_len": 300, "kv_len": 517, "heads": 6, "layout": "bshd"}
    tall: dict[str, Any] = {**both, "batch": 1, "kv_heads": 1, "right": 0}
    return [
        ("values of two thirds", both),
        ("values of two thirds, causal", {**both, **several, "right": 0}),
        ("values of two thirds, bottom right", {**both, "right": 0, "bottom_right": True}),
        ("values of a third", {**several, "head_size": both["head_size"] - 8, "v_head_size": padded // 4}),
        ("values of 8, smaller head size", {**both, "v_head_size": 8, "lse": False}),
        ("values of two thirds, sinks", {**both, "sinks": "own"}),
        ("values of two thirds, misaligned", {**both, "shift": 1}),
        ("values of two thirds, largest inputs", {**both, "largest": True}),
        ("values of two thirds, Sq 1030", {**tall, "q_len": 1030, "kv_len": 300}),
        ("values of two thirds, Sq 4200", {**tall, "q_len": 4200, "kv_len": 90, "bottom_right": True}),
    ]


def biased_decode_cases(dtype: str, padded: int) -> list[BiasedCase]:
    """For one pair of ``fmha_biased_split_*`` and ``fmha_biased_combine_*``."""
    plain = BiasedCase("", dtype, padded, heads=8, kv_heads=2, q_len=1, kv_len=600, splits=5)
    full, keys = (2, 8, 1, 600), (2, 1, 1, 600)
    few: dict[str, Any] = {"q_len": 3, "kv_len": 70, "right": 0, "bottom_right": True}
    features: list[tuple[str, dict[str, Any]]] = [
        ("bias", {"bias": full}),
        ("bias of keys, sinks", {"bias": keys, "sinks": "own"}),
        ("bias of -inf", {**few, "bias": (2, 8, 3, 70), "masked_by": "bias"}),
        ("bias in fp32", {"bias": full, "bias_dtype": "fp32"}),
        ("mask", {"mask": full}),
        ("mask of keys, sinks", {"mask": keys, "sinks": "fp32"}),
        ("bias and mask, NaN in what is masked", {**few, "bias": (2, 8, 3, 70), "mask": (2, 8, 3, 70)}),
        ("sinks, lengths", {**few, "sinks": "own", "q_lengths": (3, 2), "kv_lengths": (0, 37)}),
        ("sinks, soft cap, one split", {"sinks": "own", "softcap": 2.0, "splits": 1}),
        ("values of half", {**few, "v_head_size": padded // 2, "sinks": "own"}),
        ("values of another size", {**few, "head_size": padded // 2, "v_head_size": padded, "mask": (2, 1, 3, 70)}),
        ("largest inputs", {**few, "largest": True, "bias": (2, 8, 3, 70)}),
        ("odd head size", {**few, "head_size": padded - 3, "v_head_size": padded - 5, "mask": (2, 1, 1, 70)}),
        ("odd rows of it", {"bias": full, "mask": keys, "tensor_gap": 1, "tensor_shift": 1}),
    ]
    cases = [replace(plain, name=f"decoding, {name}", **changes) for name, changes in features]
    return [*cases, *(replace(case, name=f"{case.name}, misaligned", shift=1) for case in cases[:6])]
