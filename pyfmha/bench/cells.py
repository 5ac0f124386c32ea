"""What is timed: attention problems, called cells, by flags or by preset."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyfmha.attention.first import DTYPES
from pyfmha.attention.forward import Strides, strides
from pyfmha.errors import SpecError
from pyfmha.spec.abi import ELEMENT_SIZES
from pyfmha.spec.words import dtype_name, one_of

MOST_HEAD_SIZE = 256

LAYOUTS = ("bhsd", "bshd")
"""How tensors lie in memory: [batch, heads, sequence, head size], or [batch, sequence, heads, head size]."""

BOUND_BY_MEMORY = 100
"""Queries that share a key below which memory bounds a cell: each makes one operation of a byte of K and V in 16 bits,
of which a GPU of today can do a few hundred while it reads one."""


@dataclass(frozen=True)
class Cell:
    """One attention problem. Tensors are contiguous, in one of :data:`LAYOUTS`.

    Attributes:
        dtype: ``"fp16"``, ``"bf16"`` or ``"fp32"``.
        batch: sequences.
        heads, kv_heads: of Q, and of K and V; the former a multiple of the latter.
        seq, kv_seq: queries, and keys, of a sequence.
        head_size: 1 to 256.
        causal: query i sees the keys 0 to i.
        layout: of all tensors.
        softcap: the scores become softcap * tanh(score / softcap); 0 for none.

    Raises:
        SpecError: on creation, saying which part is wrong.
    """

    dtype: str
    batch: int
    heads: int
    kv_heads: int
    seq: int
    kv_seq: int
    head_size: int
    causal: bool
    layout: str = LAYOUTS[0]
    softcap: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.dtype not in DTYPES:
            raise SpecError(f"dtype {self.dtype!r} is not served: {one_of(DTYPES, self.dtype)}")
        if self.layout not in LAYOUTS:
            raise SpecError(f"layout {self.layout!r} is not timed: {one_of(LAYOUTS, self.layout)}")
        for name in ("batch", "heads", "kv_heads", "seq", "kv_seq", "head_size"):
            value = getattr(self, name)
            most = MOST_HEAD_SIZE if name == "head_size" else 2**31 - 1
            if type(value) is not int or not 1 <= value <= most:
                raise SpecError(f"{name} is {value!r}: use an integer from 1 to {most}")
        if type(self.softcap) not in (int, float) or not 0 <= self.softcap < 2.0**127:
            raise SpecError(f"softcap is {self.softcap!r}: use 0 for none, or a finite number above it")
        if self.heads % self.kv_heads:
            raise SpecError(f"{self.heads} heads and {self.kv_heads} key heads: use a multiple of the key heads")

    @property
    def name(self) -> str:
        """One word for people and for comparisons: ``fp16_b4_h32_s2048_d64_causal``, ``..._bshd`` in that layout."""
        heads = f"h{self.heads}" if self.heads == self.kv_heads else f"h{self.heads}kv{self.kv_heads}"
        seq = f"s{self.seq}" if self.seq == self.kv_seq else f"q{self.seq}kv{self.kv_seq}"
        mask = "causal" if self.causal else "full"
        layout = "" if self.layout == LAYOUTS[0] else f"_{self.layout}"
        cap = f"_cap{self.softcap:g}" if self.softcap else ""
        return f"{self.dtype}_b{self.batch}_{heads}_{seq}_d{self.head_size}_{mask}{cap}{layout}"

    @property
    def sm_scale(self) -> float:
        """The factor of the scores: 1 / sqrt(head size)."""
        return float(self.head_size**-0.5)

    def shape(self, tensor: str) -> tuple[int, int, int, int]:
        """[batch, heads, sequence, head size] of ``"Q"``, ``"K"``, ``"V"`` or ``"Out"``."""
        if tensor in ("Q", "Out"):
            return self.batch, self.heads, self.seq, self.head_size
        return self.batch, self.kv_heads, self.kv_seq, self.head_size

    def strides(self, tensor: str) -> Strides:
        """(batch, head, sequence) of a tensor, in elements; the head size has 1."""
        return strides(self.layout, *self.shape(tensor))

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, of one head of one sequence."""
        if not self.causal:
            return self.seq * self.kv_seq
        triangle = min(self.seq, self.kv_seq)
        return triangle * (triangle + 1) // 2 + max(self.seq - self.kv_seq, 0) * self.kv_seq

    @property
    def flop(self) -> int:
        """Operations of both products, for the pairs that are seen."""
        return 4 * self.batch * self.heads * self.pairs * self.head_size

    @property
    def nbytes(self) -> int:
        """One pass over Q, K, V and Out; keys that no query sees are not counted."""
        seen = min(self.kv_seq, self.seq) if self.causal else self.kv_seq
        rows = 2 * self.heads * self.seq + 2 * self.kv_heads * seen
        return ELEMENT_SIZES[self.dtype] * self.batch * rows * self.head_size

    @property
    def bound_by_memory(self) -> bool:
        """Whether reading K and V takes longer than computing, as in decoding."""
        return self.seq * (self.heads // self.kv_heads) < BOUND_BY_MEMORY


def cells_from(
    dtypes: Sequence[str], batches: Sequence[int], heads: Sequence[int], kv_heads: Sequence[int], seqs: Sequence[int],
    kv_seqs: Sequence[int], head_sizes: Sequence[int], masks: Sequence[bool],
) -> list[Cell]:  # fmt: skip
    """Every combination; no ``kv_heads`` or ``kv_seqs`` are as many as heads, and as seq."""
    return [
        Cell(dtype, batch, h, h if hk is None else hk, s, s if sk is None else sk, size, causal)
        for dtype, size, batch, h, hk, s, sk, causal in itertools.product(
            dtypes, head_sizes, batches, heads, kv_heads or (None,), seqs, kv_seqs or (None,), masks
        )
    ]


_LENGTHS = ((8, 512), (1, 2048), (4, 2048), (2, 8192), (1, 16384))


def _prefill(dtypes: Iterable[str]) -> list[Cell]:
    sizes = [(b, 32, 32, s, d) for d in (64, 128) for b, s in _LENGTHS] + [(4, 32, 8, 2048, 128)]
    return [
        Cell(dtype, b, h, hk, s, s, d, causal)
        for dtype in dtypes
        for b, h, hk, s, d in sizes
        for causal in (False, True)
    ]


def _decode(dtypes: Iterable[str]) -> list[Cell]:
    return [Cell(dtype, b, 32, 8, 1, kv, 128, False) for dtype in dtypes for kv in (4096, 32768) for b in (1, 16)]


def _quick() -> list[Cell]:
    few = [Cell("fp16", b, 32, 32, s, s, d, c) for d in (64, 128) for b, s in _LENGTHS[::2] for c in (False, True)]
    return [*few, Cell("fp16", 16, 32, 8, 1, 4096, 128, False)]


def _flash3() -> list[Cell]:
    few = [(8, 32, 32, 512), (4, 32, 32, 2048), (1, 32, 32, 16384)]
    sizes = [(*size, 64) for size in few]
    sizes += [(*size, 128) for size in (*few[:2], (2, 32, 32, 8192), few[2], (4, 32, 8, 2048))]
    sizes += [(4, 16, 16, 512, 256), (4, 16, 16, 4096, 256), (1, 16, 16, 16384, 256)]
    sizes += [(8, 32, 32, 512, 96), (4, 32, 32, 2048, 96), (2, 32, 32, 8192, 96)]
    sizes += [(8, 16, 16, 512, 192), (4, 16, 16, 2048, 192), (2, 16, 16, 8192, 192)]
    dense = [Cell("bf16", b, h, hk, s, s, d, causal) for causal in (False, True) for b, h, hk, s, d in sizes]
    capped = [
        Cell("bf16", b, h, h, s, s, d, causal, softcap=50.0)
        for causal in (False, True)
        for b, h, s, d in (
            (4, 32, 2048, 64),
            (1, 32, 8192, 64),
            (4, 32, 2048, 128),
            (1, 32, 8192, 128),
            (4, 16, 4096, 256),
        )
    ]
    decoding = [Cell("bf16", b, 32, 8, 1, kv, 128, False) for kv in (4096, 32768) for b in (1, 16, 64)]
    return [*dense, *capped, *decoding]


PRESETS = ("quick", "prefill", "decode", "flash3")


def preset(name: str) -> list[Cell]:
    """The cells of a preset: ``quick``, 13 of fp16; ``prefill``, the table of the aim on Hopper; ``decode``, one
    query; ``flash3``, bf16 beside FlashAttention-3, head sizes 64 to 256, soft caps and decoding.

    Raises:
        SpecError: there is no such preset.
    """
    if name == "quick":
        return _quick()
    if name in ("prefill", "decode"):
        return (_prefill if name == "prefill" else _decode)(("fp16", "bf16"))
    if name == "flash3":
        return _flash3()
    raise SpecError(f"preset {name!r} is unknown: use one of {', '.join(PRESETS)}")
