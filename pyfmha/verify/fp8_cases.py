"""What ``pyfmha verify`` computes with ``fmha_fp8_*``: what the family serves, with factors of every kind."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from pyfmha.attention.fp8 import DescaleStrides, Fp8Call
from pyfmha.attention.reference import FP8_LIMIT, Floats
from pyfmha.verify.cases import Case

LIMIT = FP8_LIMIT
"""Largest relative error."""
LSE_LIMIT = 2e-3
"""The tensor cores of Hopper add products of e4m3 with a fraction of some 13 bits, 2**-13 of the largest at a step."""


@dataclass(frozen=True)
class Fp8Case(Case):
    """One problem, of Q, K and V in e4m3; the dtype is Out's.

    Attributes:
        factors: of Q, K and V: "" for none, "one" for one, "heads" for one a key head, "all" for one a sequence and key
            head.
    """

    factors: tuple[str, str, str] = ("", "", "")

    @property
    def input_dtype(self) -> str:
        """Of Q, K and V."""
        return "e4m3"

    @property
    def limit(self) -> float:
        """The largest error that passes."""
        return LIMIT

    @property
    def lse_limit(self) -> float:
        """The largest error of the log-sum-exp that passes, for each 1 + its size."""
        return LSE_LIMIT

    @cached_property
    def descales(self) -> tuple[Any, ...]:
        """The factors of Q, K and V, float32 [sequences or 1, key heads or 1]; None where there are none."""
        batch, heads = (1 if self.ragged else self.batch), self.kv_heads
        shapes = {"one": (1, 1), "heads": (1, heads), "all": (batch, heads)}
        generator = np.random.default_rng(8)
        return tuple(
            generator.uniform(0.3, 2.0, shapes[kind]).astype(np.float32) if kind else None for kind in self.factors
        )

    def numbers(self, name: str) -> Floats:
        """As of :class:`Case`, times the factor."""
        given = self.descales["QKV".index(name)]
        numbers = super().numbers(name)
        if given is None:
            return numbers
        wide = np.broadcast_to(given, (given.shape[0], self.kv_heads)).astype(np.float64)
        return numbers * np.repeat(wide, numbers.shape[1] // self.kv_heads, 1)[:, :, None, None]

    def call(self) -> Fp8Call:
        """The launch, but for its pointers."""
        q, k, v = (self._steps(given) for given in self.descales)
        return Fp8Call(**vars(super().call()), q_descale_strides=q, k_descale_strides=k, v_descale_strides=v)

    @staticmethod
    def _steps(given: Any) -> DescaleStrides:
        if given is None:
            return 0, 0
        batch, heads = given.shape
        return (heads if batch > 1 else 0), (1 if heads > 1 else 0)


def fp8_cases(dtype: str, padded: int) -> list[Fp8Case]:
    """For one ``fmha_fp8_*``: each variant, lengths about the edges of blocks and tiles, every kind of factor."""
    plain = Fp8Case("", dtype, padded)
    grouped = {"heads": 6, "kv_heads": 2}
    long: dict[str, Any] = {
        **{"q_len": 460, "kv_len": 700, "batch": 1, "heads": 4},
        **{"cu_q": (7, 8, 8, 72, 137, 150, 420), "cu_kv": (0, 200, 260, 260, 333, 400, 691)},
    }
    features: list[tuple[str, dict[str, Any]]] = [
        ("seq 1", {"q_len": 1, "kv_len": 1}),
        ("seq 17 causal", {"q_len": 17, "kv_len": 17, "right": 0}),
        ("seq 129", {"q_len": 129, "kv_len": 129, "batch": 1}),
        ("seq 450 causal", {"q_len": 450, "kv_len": 450, "batch": 1, **grouped, "right": 0}),
        ("seq 1030 causal", {"q_len": 1030, "kv_len": 1030, "batch": 1, "right": 0}),
        ("Sq 8200, Skv 300, causal", {"q_len": 8200, "kv_len": 300, "batch": 1, "heads": 2, "kv_heads": 1, "right": 0}),
        ("Sq 12000, Skv 90, causal", {"q_len": 12000, "kv_len": 90, "batch": 1, "heads": 2, "kv_heads": 1, "right": 0}),
        ("Sq 17000, Skv 90, causal", {"q_len": 17000, "kv_len": 90, "batch": 1, "heads": 2, "kv_heads": 1, "right": 0}),
        ("Sq 1100, Skv 1337", {"q_len": 1100, "kv_len": 1337, "batch": 1, "heads": 2, "factors": ("one", "", "one")}),
        ("Sq 2060, Skv 2055", {"q_len": 2060, "kv_len": 2055, "batch": 1, "heads": 1, "kv_heads": 1}),
        ("Sq 150, Skv 33, causal", {"q_len": 150, "kv_len": 33, "right": 0}),
        ("Sq 33, Skv 350, bottom right", {"q_len": 33, "kv_len": 350, "right": 0, "bottom_right": True}),
        ("rows without keys", {"q_len": 150, "kv_len": 33, "right": 0, "bottom_right": True}),
        ("bshd, heads 6/2", {**grouped, "q_len": 200, "kv_len": 300, "layout": "bshd"}),
        ("one factor each", {"factors": ("one", "one", "one"), "kv_len": 300}),
        ("factors of key heads, causal", {**grouped, "factors": ("heads", "heads", "heads"), "right": 0}),
        ("a factor of K", {**grouped, "factors": ("", "all", "")}),
        ("factors of sequences, bshd", {**grouped, "factors": ("all", "one", "all"), "layout": "bshd"}),
        ("lengths", {"q_lengths": (40, 0), "kv_lengths": (70, 3)}),
        (
            "lengths, causal",
            {"q_len": 300, "kv_len": 400, "q_lengths": (300, 140), "kv_lengths": (333, 140), "right": 0},
        ),
        ("lengths beyond", {"q_lengths": (1000, -5), "kv_lengths": (-1, 2**31 - 1), "right": 0}),
        ("lengths, factors", {**grouped, "kv_lengths": (70, 3), "factors": ("all", "all", "all")}),
        ("ragged", {**long}),
        ("ragged, causal, heads 4/2", {**long, "kv_heads": 2, "right": 0, "factors": ("heads", "one", "heads")}),
        (
            "ragged, bottom right",
            {
                **long,
                "right": 0,
                "bottom_right": True,
            },
        ),
        ("without log-sum-exp", {"lse": False, "right": 0}),
        ("largest inputs", {"largest": True}),
        ("largest inputs, causal", {"largest": True, "right": 0}),
        (f"head size {padded - 16}", {"head_size": padded - 16, "right": 0}),
        ("rows with gaps", {"gap": 16, "q_len": 90}),
    ]
    return [replace(plain, name=f"e4m3, {name}", **changes) for name, changes in features]
