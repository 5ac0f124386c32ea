"""What ``pyfmha verify`` computes with each function of a library: small problems, with every feature and edge.

Pure numpy: a case makes its own random data, always the same, knows the exact result, and judges another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from pyfmha.attention.forward import Call, Strides
from pyfmha.attention.reference import LIMITS, Floats, attend, relative_error
from pyfmha.attention.run import to_float, to_storage
from pyfmha.bfloat16 import STORAGE

LSE_LIMIT = 2e-5
"""Largest error of the log-sum-exp, for each 1 + its size: it is float32, and exp2 on a GPU has 2 units in the last."""

LARGEST = {"e4m3": 448.0, "fp16": 65504.0, "bf16": 3.3895313892515355e38, "fp32": 3.4028234663852886e38}
TENSORS = ("Out", "Q", "K", "V")
NAN_BYTE = 0xFF
"""Fills what is not to count, and outputs before they are written: a NaN that arithmetic does not make."""


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        name: for people.
        dtype, head_size, batch, heads, kv_heads, q_len, kv_len: of the tensors; ragged: all tokens.
        left, right: the window; -1 for unbounded.
        bottom_right, softcap: as :class:`pyfmha.attention.forward.Call`.
        layout: ``"bhsd"`` or ``"bshd"``.
        q_lengths, kv_lengths, cu_q, cu_kv: as :func:`pyfmha.attention.reference.attend`; the latter make it ragged.
        lse: whether the log-sum-exp is asked for.
        shift: by how many elements every tensor begins past a multiple of 16 bytes.
        gap: elements between two rows.
        largest: whether the inputs are the largest finite numbers; only NaN and infinity are errors then.
        spread: channels differ: those of K and V are multiplied, those of Q divided, by powers of two whose exponents
            have this standard deviation. Scores stay what they are.
        splits: of the keys, for decoding.
        limit_of: key of :data:`LIMITS`; by default the dtype.
    """

    name: str
    dtype: str
    head_size: int
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    q_len: int = 70
    kv_len: int = 70
    left: int = -1
    right: int = -1
    bottom_right: bool = False
    softcap: float = 0.0
    layout: str = "bhsd"
    q_lengths: tuple[int, ...] | None = None
    kv_lengths: tuple[int, ...] | None = None
    cu_q: tuple[int, ...] | None = None
    cu_kv: tuple[int, ...] | None = None
    lse: bool = True
    shift: int = 0
    gap: int = 0
    largest: bool = False
    spread: float = 0.0
    splits: int = 1
    limit_of: str = ""

    @property
    def ragged(self) -> bool:
        """Whether the sequences lie one after the other."""
        return self.cu_q is not None

    @property
    def limit(self) -> float:
        """The largest error that passes."""
        return LIMITS[self.limit_of or self.dtype]

    @property
    def lse_limit(self) -> float:
        """The largest error of the log-sum-exp that passes, for each 1 + its size."""
        return LSE_LIMIT

    @property
    def input_dtype(self) -> str:
        """Of Q, K and V."""
        return self.dtype

    @property
    def sequences(self) -> int:
        """How many there are."""
        return self.batch if self.cu_q is None else len(self.cu_q) - 1

    @property
    def scale(self) -> float:
        """The factor of the scores, as float32 has it."""
        return float(np.float32(self.head_size**-0.5))

    def shape(self, tensor: str) -> tuple[int, int, int, int]:
        """[batch, heads, sequence, head size] of a tensor; a ragged batch counts as one sequence."""
        heads, seq = (self.heads, self.q_len) if tensor in ("Out", "Q") else (self.kv_heads, self.kv_len)
        return (1 if self.ragged else self.batch), heads, seq, self.head_size

    def strides(self, tensor: str) -> Strides:
        """Of batch, head and sequence, in elements."""
        _, heads, seq, size = self.shape(tensor)
        if self.layout == "bhsd" and not self.ragged:
            row = size + self.gap
            return heads * seq * row, seq * row, row
        row = heads * size + self.gap
        return seq * row, size, row

    def call(self) -> Call:
        """The launch, but for its pointers."""
        q, k, v, out = (self.strides(tensor) for tensor in ("Q", "K", "V", "Out"))
        return Call(
            self.sequences, self.heads, self.kv_heads, self.q_len, self.kv_len, self.head_size, self.scale,
            self.softcap, q, k, v, out, window_left=self.left, window_right=self.right, bottom_right=self.bottom_right,
            ragged=self.ragged,
        )  # fmt: skip

    def view(self, tensor: str, store: Any) -> Any:
        """A tensor [batch, heads, sequence, head size] inside the flat memory that holds it."""
        steps = (*self.strides(tensor), 1)
        return np.lib.stride_tricks.as_strided(store, self.shape(tensor), [store.itemsize * step for step in steps])

    def blank(self, tensor: str) -> Any:
        """Flat memory of a tensor, filled with NaN."""
        shape, steps = self.shape(tensor), (*self.strides(tensor), 1)
        count = 1 + sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) if all(shape) else 0
        store = np.empty(max(count, 1), STORAGE[self.dtype if tensor == "Out" else self.input_dtype])
        store.view(np.uint8)[...] = NAN_BYTE
        return store

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Flat memory of Q, K and V: NaN where no sequence is."""
        return {name: self._filled(name) for name in "QKV"}

    def _filled(self, name: str) -> Any:
        store = self.blank(name)
        view = self.view(name, store)
        generator = np.random.default_rng([ord(name), self.head_size, self.q_len, self.kv_len])
        if self.largest:
            most = LARGEST[self.input_dtype]
            values = generator.choice([most, -most, most / 2, 1.0, 0.0], view.shape).astype(np.float32)
        else:
            values = generator.standard_normal(view.shape, np.float32)
            values *= self._channels if name in "KV" else 1 / self._channels
        lengths, cu = (self.q_lengths, self.cu_q) if name == "Q" else (self.kv_lengths, self.cu_kv)
        for b in range(view.shape[0]):
            begin, end = _span(lengths, cu, b, view.shape[2])
            view[b, :, begin:end] = to_storage(values[b, :, begin:end], self.input_dtype)
        return store

    @cached_property
    def _channels(self) -> Any:
        """The factor of each channel of K and V, [head size]: a power of two."""
        exponents = np.random.default_rng(self.head_size).standard_normal(self.head_size) * self.spread
        return np.exp2(np.rint(exponents)).astype(np.float32)

    @cached_property
    def exact(self) -> tuple[Floats, Floats]:
        """Out [batch, heads, sequence, head size] and log-sum-exp [batch, heads, sequence], by float64."""
        q, k, v = (self.numbers(name) for name in "QKV")
        options = self.options()
        if not self.ragged:
            return attend(q, k, v, q_lengths=self.q_lengths, kv_lengths=self.kv_lengths, **options)
        tokens = (x[0].transpose(1, 0, 2) for x in (q, k, v))
        out, lse = attend(*tokens, cu_seqlens_q=self.cu_q, cu_seqlens_kv=self.cu_kv, **options)
        return out.transpose(1, 0, 2)[None], lse[None]

    def numbers(self, name: str) -> Floats:
        """Q, K or V as attention has it, [batch, heads, sequence, head size]."""
        return to_float(self.view(name, self.inputs[name]), self.input_dtype)

    def options(self) -> dict[str, Any]:
        """Keywords of :func:`pyfmha.attention.reference.attend`, but for lengths."""
        return {
            "sm_scale": self.scale, "softcap": float(np.float32(self.softcap)), "window_left": self.left,
            "window_right": self.right, "bottom_right": self.bottom_right,
        }  # fmt: skip

    def judge(self, store: Any, lse: Any) -> tuple[float, str]:
        """What is wrong with a result.

        Args:
            store: flat memory of Out, as :meth:`blank` made it before the launch.
            lse: float32 [batch, heads, sequence], or None.

        Returns:
            The relative error of Out, NaN where it has NaN, and a text, empty where all is right.
        """
        out = to_float(self.view("Out", store), self.dtype)
        rest = store.copy()
        self.view("Out", rest).view(np.uint8)[...] = NAN_BYTE
        if not (rest.view(np.uint8) == NAN_BYTE).all():
            return float("nan"), "it wrote between the rows of Out"
        if not np.isfinite(out).all():
            return float("nan"), "Out has NaN or infinity, or was not written whole"
        if lse is not None and np.isnan(lse).any():
            return float("nan"), "the log-sum-exp has NaN, or was not written whole"
        if self.largest:
            return 0.0, ""
        exact, exact_lse = self.exact
        error = relative_error(out, exact)
        empty = np.isneginf(exact_lse)
        if out[empty].any():
            return error, "rows without keys, or of no query, are not zeros"
        if not error <= self.limit:
            return error, f"relative error {error:.1e}, limit {self.limit:.0e}"
        if lse is None:
            return error, ""
        if not (np.isneginf(lse) == empty).all():
            return error, "the log-sum-exp is not minus infinity just where no key is seen"
        worst = lse_error(lse, exact_lse)
        return error, "" if worst <= self.lse_limit else f"log-sum-exp off by {worst:.1e} of 1 + itself"


def lse_error(found: Any, exact: Any) -> float:
    """Error of a log-sum-exp, the largest for each 1 + its size; infinite where -inf is not where it should be."""
    empty = np.isneginf(exact)
    if not np.array_equal(np.isneginf(found), empty):
        return float("inf")
    difference = np.abs(found[~empty] - exact[~empty]) / (1 + np.abs(exact[~empty]))
    return float(difference.max(initial=0.0))


def _span(lengths: Sequence[int] | None, cu: Sequence[int] | None, batch: int, seq: int) -> tuple[int, int]:
    """Where there are numbers: of a ragged batch, in what its sequences cover."""
    if cu is not None:
        clamped = [min(max(end, 0), seq) for end in cu]
        return clamped[0], max(clamped)
    return 0, seq if lengths is None else min(max(lengths[batch], 0), seq)


def forward_cases(dtype: str, padded: int) -> list[Case]:
    """For one ``fmha_fwd_*``: features and edges on aligned tensors, then on such as only the generic variant takes."""
    plain = Case("", dtype, padded)
    grouped = {"heads": 6, "kv_heads": 2}
    ragged: dict[str, Any] = {**grouped, "q_len": 80, "kv_len": 90, "batch": 1}
    # Rows of no sequence, sequences of one query, of no keys, of one tile and a row more.
    long: dict[str, Any] = {
        **{**ragged, "q_len": 460, "kv_len": 700, "heads": 2},
        **{"cu_q": (7, 8, 8, 72, 137, 150, 420), "cu_kv": (0, 200, 260, 260, 333, 400, 691)},
    }
    alone: dict[str, Any] = {"batch": 1, "heads": 1, "kv_heads": 1}
    three_quarters = padded * 3 // 4
    one: dict[str, Any] = {"q_len": 1, "kv_len": 700, "heads": 8, "kv_heads": 2}
    features: list[tuple[str, dict[str, Any]]] = [
        ("seq 1", {"q_len": 1, "kv_len": 1}),
        ("seq 17 causal", {"q_len": 17, "kv_len": 17, "right": 0}),
        ("seq 129", {"q_len": 129, "kv_len": 129, "batch": 1}),
        ("seq 200 causal", {"q_len": 200, "kv_len": 200, "batch": 1, "right": 0}),
        ("seq 450 causal", {"q_len": 450, "kv_len": 450, "batch": 1, "heads": 3, "kv_heads": 1, "right": 0}),
        ("seq 1030 causal", {"q_len": 1030, "kv_len": 1030, "batch": 1, "heads": 1, "kv_heads": 1, "right": 0}),
        ("seq 600", {"q_len": 600, "kv_len": 600, "batch": 1, "heads": 1, "kv_heads": 1}),
        ("Sq 4200, Skv 300, causal", {"q_len": 4200, "kv_len": 300, "batch": 1, "heads": 3, "kv_heads": 1, "right": 0}),
        ("Sq 2070, 32 heads, causal", {**alone, "q_len": 2070, "kv_len": 90, "heads": 32, "right": 0}),
        ("Sq 33, Skv 150", {"q_len": 33, "kv_len": 150}),
        ("Sq 150, Skv 33, causal", {"q_len": 150, "kv_len": 33, "right": 0}),
        ("Sq 33, Skv 150, bottom right", {"q_len": 33, "kv_len": 150, "right": 0, "bottom_right": True}),
        ("rows without keys", {"q_len": 150, "kv_len": 33, "right": 0, "bottom_right": True}),
        ("no keys", {"kv_len": 0}),
        ("heads 6/2, causal", {**grouped, "right": 0}),
        ("heads 4/1, bshd", {"heads": 4, "kv_heads": 1, "layout": "bshd"}),
        ("window 16, 0", {"q_len": 140, "kv_len": 140, "batch": 1, "left": 16, "right": 0}),
        ("window 5, 7", {"left": 5, "right": 7}),
        ("window 0, 0", {"left": 0, "right": 0}),
        ("window past the keys", {"q_len": 120, "kv_len": 20, "left": 3, "right": 3}),
        ("soft cap", {"softcap": 2.0, "right": 0}),
        ("soft cap, window, heads 6/2", {**grouped, "softcap": 30.0, "left": 9, "right": 2}),
        ("soft cap, several tiles", {"q_len": 300, "kv_len": 330, "batch": 1, "softcap": 50.0, "right": 0}),
        ("soft cap, not causal", {"softcap": 20.0, "layout": "bshd"}),
        ("soft cap, Sq 2060", {**alone, "q_len": 2060, "kv_len": 90, "softcap": 10.0, "right": 0}),
        ("soft cap, Sq 1030, not causal", {**alone, "q_len": 1030, "kv_len": 200, "softcap": 50.0}),
        ("small soft cap, Sq 1030, not causal", {**alone, "q_len": 1030, "kv_len": 200, "softcap": 10.0}),
        ("soft cap, Sq 4200, causal", {**alone, "q_len": 4200, "kv_len": 300, "softcap": 50.0, "right": 0}),
        ("soft cap, lengths", {"softcap": 5.0, "q_lengths": (40, 0), "kv_lengths": (70, 3)}),
        ("lengths", {"q_lengths": (40, 0), "kv_lengths": (70, 3)}),
        ("lengths beyond", {"q_lengths": (1000, -5), "kv_lengths": (-1, 2**31 - 1), "right": 0}),
        ("lengths, Sq 600", {"q_len": 600, "kv_len": 300, "kv_lengths": (170, 0)}),
        ("lengths, Sq 1030, causal", {**alone, "q_len": 1030, "kv_len": 300, "kv_lengths": (170,), "right": 0}),
        ("lengths, Sq 4200, causal", {**alone, "q_len": 4200, "kv_len": 300, "kv_lengths": (170,), "right": 0}),
        ("lengths, Sq 8200", {**alone, "q_len": 8200, "kv_len": 300, "kv_lengths": (170,)}),
        ("ragged", {**ragged, "cu_q": (0, 5, 5, 80), "cu_kv": (0, 40, 41, 90), "right": 0}),
        ("ragged, decreasing", {**ragged, "cu_q": (3, 50, 20, 999), "cu_kv": (-4, 60, 10, 85)}),
        ("ragged, 40 sequences", {**ragged, **_sequences(40), "right": 0, "bottom_right": True}),
        ("ragged, several tiles", {**long, "right": 0}),
        ("ragged, window 40, 9", {**long, "left": 40, "right": 9, "heads": 4, "kv_heads": 1}),
        ("ragged, bottom right", {**long, "right": 0, "bottom_right": True, "heads": 2}),
        ("ragged, soft cap", {**long, "right": 0, "softcap": 3.0}),
        (
            "ragged, few long sequences",
            {
                **alone,
                "q_len": 1500,
                "kv_len": 300,
                "heads": 2,
                "cu_q": (0, 650, 1470),
                "cu_kv": (0, 90, 300),
                "right": 0,
            },
        ),
        ("without log-sum-exp", {"lse": False, "right": 0}),
        ("largest inputs", {"largest": True}),
        ("largest inputs, soft cap", {"largest": True, "softcap": 5.0}),
        (f"head size {padded - 8}", {"head_size": padded - 8, "right": 0}),
        (f"head size {three_quarters}", {"head_size": three_quarters, "q_len": 140, "batch": 1, "layout": "bshd"}),
        (f"head size {three_quarters}, causal", {"head_size": three_quarters, "right": 0}),
        (
            f"head size {three_quarters}, Sq 1030, causal",
            {**alone, "head_size": three_quarters, "q_len": 1030, "kv_len": 300, "right": 0},
        ),
        ("Sq 8200", {**alone, "q_len": 8200, "kv_len": 300}),
        (
            f"head size {three_quarters}, Sq 1550, causal",
            {**alone, "head_size": three_quarters, "q_len": 1550, "kv_len": 300, "right": 0, "bottom_right": True},
        ),
        (
            f"head size {three_quarters}, 16 heads, Sq 1540",
            {"head_size": three_quarters, "q_len": 1540, "batch": 1, "heads": 16, "kv_heads": 1},
        ),
        (
            f"head size {three_quarters}, Sq 6150, causal",
            {**alone, "head_size": three_quarters, "q_len": 6150, "kv_len": 90, "right": 0},
        ),
        *(
            (f"head size {three_quarters}, lengths{', causal' * (right == 0)}", {**few, "right": right})
            for few in [{"head_size": three_quarters, "q_len": 140, "kv_lengths": (70, 3)}]
            for right in (-1, 0)
        ),
        ("one query, 2600 keys", {**one, "kv_len": 2600, "batch": 1}),
        ("one query, bshd, heads 18/2", {**one, "heads": 18, "layout": "bshd"}),
        ("one query, lengths", {**one, "kv_lengths": (77, 0), "right": 0, "bottom_right": True}),
        ("one query, window", {**one, "left": 130, "right": 0, "bottom_right": True}),
        ("one query, batch 20", {**one, "kv_len": 90, "batch": 20}),
        ("one query, batch 70", {**one, "kv_len": 90, "batch": 70}),
        ("one query, largest inputs", {**one, "largest": True}),
        *([(f"channels of sizes 2**{s:.0f}", {"spread": s}) for s in (2.0, 8.0)] if dtype == "fp32" else []),
    ]
    aligned = [replace(plain, name=name, **changes) for name, changes in features]
    picked = {
        "seq 1", "seq 200 causal", "Sq 33, Skv 150", "rows without keys", "heads 6/2, causal", "window 5, 7",
        "soft cap, window, heads 6/2", "lengths beyond", "ragged, decreasing", "without log-sum-exp", "largest inputs",
    }  # fmt: skip
    misaligned = [replace(c, name=f"{c.name}, misaligned", shift=1) for c in aligned if c.name in picked]
    return [
        *aligned,
        *misaligned,
        replace(plain, name="odd strides", gap=1, right=0),
        replace(plain, name="odd strides, bshd, soft cap", gap=3, layout="bshd", softcap=5.0),
        replace(plain, name=f"head size {padded - 3}", head_size=padded - 3, right=0),
        # What lies between rows must stay, also where rows begin at multiples of 16 bytes, as TMA wants them.
        replace(plain, name=f"head size {padded - 4} in rows of {padded}", head_size=padded - 4, gap=4, right=0),
    ]


def _sequences(count: int) -> dict[str, tuple[int, ...]]:
    """As many short ones in a row, of which some have no queries, or no keys."""
    return {
        "cu_q": tuple(i // 5 * 8 + 2 * min(i % 5, 4) for i in range(count + 1)),
        "cu_kv": tuple(i // 3 * 6 for i in range(count + 1)),
    }


def decode_cases(dtype: str, padded: int) -> list[Case]:
    """For one pair of ``fmha_split_*`` and ``fmha_combine_*``."""
    plain = Case("", dtype, padded, heads=8, kv_heads=2, q_len=1, kv_len=600, splits=5)
    few: dict[str, Any] = {"kv_len": 60}
    features: list[tuple[str, dict[str, Any]]] = [
        ("one query", {}),
        ("one split", {"splits": 1}),
        ("one split, 400 key heads", {**few, "batch": 200, "splits": 1}),
        ("400 key heads", {**few, "batch": 200, "splits": 2}),
        ("more splits than keys", {"kv_len": 3, "splits": 7}),
        ("5 queries, bottom right", {"q_len": 5, "right": 0, "bottom_right": True, "layout": "bshd"}),
        ("17 queries of 3 heads", {"q_len": 17, "heads": 3, "kv_heads": 1, "kv_len": 130}),
        ("window", {"q_len": 2, "left": 100, "right": 0, "bottom_right": True}),
        ("soft cap", {**few, "softcap": 2.0}),
        ("lengths", {**few, "q_len": 2, "q_lengths": (1, 2), "kv_lengths": (0, 37)}),
        ("no keys", {"kv_len": 0}),
        ("without log-sum-exp", {**few, "lse": False}),
        ("largest inputs", {**few, "largest": True}),
        (f"head size {padded - 8}", {**few, "head_size": padded - 8}),
        (f"head size {padded - 3}", {**few, "head_size": padded - 3}),
        ("odd strides", {**few, "gap": 1}),
    ]
    cases = [replace(plain, name=f"decoding, {name}", **changes) for name, changes in features]
    return [
        *cases,
        *(replace(case, name=f"{case.name}, misaligned", shift=1) for case in cases[:10] if case.batch < 200),
    ]


def first_cases(dtype: str, head_size: int, causal: bool, precision: str) -> list[Case]:
    """For one function of the first kernel, ``fmha_d*``."""
    plain = Case(
        "", dtype, head_size, heads=3, kv_heads=3, right=0 if causal else -1, lse=False,
        limit_of="tf32" if precision == "tf32" else "",
    )  # fmt: skip
    cases = [replace(plain, name=f"seq {seq}", q_len=seq, kv_len=seq) for seq in (1, 17, 128, 129, 200)]
    if precision != "tf32":  # which rounds the largest float32 to infinity
        cases.append(replace(plain, name="largest inputs", largest=True))
    return [*cases, *(replace(case, name=f"{case.name}, misaligned", shift=1) for case in cases)]
