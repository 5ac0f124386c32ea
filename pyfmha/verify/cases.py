"""What ``pyfmha verify`` computes with each function of a library: small problems, of which other modules have many.

Pure numpy: a case makes its own random data, always the same, knows the exact result, and judges another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
