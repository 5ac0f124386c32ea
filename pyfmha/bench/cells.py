"""What is timed: attention problems, called cells, by flags or by preset."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pyfmha.attention.first import DTYPES
from pyfmha.attention.forward import Strides, strides
from pyfmha.errors import SpecError
from pyfmha.spec.abi import ELEMENT_SIZES
from pyfmha.spec.words import dtype_name, one_of

MOST_HEAD_SIZE = 256

LAYOUTS = ("bhsd", "bshd")
"""How tensors lie in memory: [batch, heads, sequence, head size], or [batch, sequence, heads, head size]."""

FP8 = "fp8"
"""The dtype of a cell whose Q, K and V are e4m3 and whose Out is bf16."""

BESIDE = (
    *("bias-1hqk", "bias-11qk", "bias-b11k", "mask-b1qk", "mask-b11k", "sinks", "alibi", "documents", "prefix-0"),
    *("prefix-1000", "t5", "groups"),
)
"""What a cell may have beside Q, K and V: a bias or mask with its axes, 1 where it is broadcast, sinks, or a function
that comes with pyfmha; a prefix has its length."""

DOCUMENT = 700
"""Tokens of a document, of cells with documents."""

PIECE, GROUPS = 512, 4
"""Of cells with groups: tokens of a piece, and how many groups own one in turn."""

BOUND_BY_MEMORY = 100
"""Queries that share a key below which memory bounds a cell: each makes one operation of a byte of K and V in 16 bits,
of which a GPU of today can do a few hundred while it reads one."""


@dataclass(frozen=True)
class Cell:
    """One attention problem. Tensors are contiguous, in one of :data:`LAYOUTS`.

    Attributes:
        dtype: ``"fp16"``, ``"bf16"`` or ``"fp32"``, or :data:`FP8`.
        batch: sequences.
        heads, kv_heads: of Q, and of K and V; the former a multiple of the latter.
        seq, kv_seq: queries, and keys, of a sequence.
        head_size: 1 to 256.
        causal: query i sees the keys 0 to i.
        layout: of all tensors.
        softcap: the scores become softcap * tanh(score / softcap); 0 for none.
        kv_lengths: the keys of each sequence that count; empty for all.
        tokens: of a ragged batch, those of each sequence, which lie behind each other; empty for one that is not.
            Its layout is always ``"bshd"``, seq and kv_seq are those of the longest.
        beside: one of :data:`BESIDE`; empty for none.
        v_head_size: of V and Out; 0 for that of Q and K.

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
    kv_lengths: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    beside: str = ""
    v_head_size: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        for name in ("kv_lengths", "tokens"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a list, where it comes from JSON
        if self.tokens:
            object.__setattr__(self, "layout", "bshd")
        if self.dtype not in (*DTYPES, FP8):
            raise SpecError(f"dtype {self.dtype!r} is not served: {one_of((*DTYPES, FP8), self.dtype)}")
        if self.layout not in LAYOUTS:
            raise SpecError(f"layout {self.layout!r} is not timed: {one_of(LAYOUTS, self.layout)}")
        for name in ("batch", "heads", "kv_heads", "seq", "kv_seq", "head_size"):
            value = getattr(self, name)
            most = MOST_HEAD_SIZE if name == "head_size" else 2**31 - 1
            if type(value) is not int or not 1 <= value <= most:
                raise SpecError(f"{name} is {value!r}: use an integer from 1 to {most}")
        if type(self.v_head_size) is not int or not 0 <= self.v_head_size <= MOST_HEAD_SIZE:
            raise SpecError(f"v_head_size is {self.v_head_size!r}: use an integer from 1 to {MOST_HEAD_SIZE}")
        if self.v_head_size == self.head_size:
            object.__setattr__(self, "v_head_size", 0)
        if type(self.softcap) not in (int, float) or not 0 <= self.softcap < 2.0**127:
            raise SpecError(f"softcap is {self.softcap!r}: use 0 for none, or a finite number above it")
        if self.heads % self.kv_heads:
            raise SpecError(f"{self.heads} heads and {self.kv_heads} key heads: use a multiple of the key heads")
        self._check_extras()

    def _check_extras(self) -> None:
        if self.beside and self.beside not in BESIDE:
            raise SpecError(f"beside is {self.beside!r}: {one_of(BESIDE, self.beside)}")
        if self.kv_lengths and (len(self.kv_lengths) != self.batch or not _within(self.kv_lengths, self.kv_seq)):
            raise SpecError(f"kv_lengths are {self.kv_lengths}: give {self.batch}, each from 1 to {self.kv_seq}")
        longest = max(self.tokens, default=0)
        if self.tokens and (
            len(self.tokens) != self.batch or not _within(self.tokens, longest) or {self.seq, self.kv_seq} != {longest}
        ):
            raise SpecError(f"tokens are {self.tokens}: give {self.batch}, of which the largest is seq and kv_seq")
        if sum(map(bool, (self.kv_lengths, self.tokens, self.beside, self.v_head_size, self.dtype == FP8))) > 1:
            raise SpecError(
                f"{self.name} has several of fp8, lengths, a ragged batch, a {self.beside or 'bias'} and another head"
                " size of V: give one"
            )

    @property
    def name(self) -> str:
        """One word for people and for comparisons: ``fp16_b4_h32_s2048_d64_causal``, ``..._bshd`` in that layout."""
        heads = f"h{self.heads}" if self.heads == self.kv_heads else f"h{self.heads}kv{self.kv_heads}"
        seq = f"s{self.seq}" if self.seq == self.kv_seq else f"q{self.seq}kv{self.kv_seq}"
        mask = "causal" if self.causal else "full"
        layout = "" if self.layout == LAYOUTS[0] else f"_{self.layout}"
        cap = f"_cap{self.softcap:g}" if self.softcap else ""
        for word, lengths in (("keys", self.kv_lengths), ("ragged", self.tokens)):
            cap += f"_{word}{min(lengths)}to{max(lengths)}" if lengths else ""
        cap += f"_{self.beside}" if self.beside else ""
        size = f"d{self.head_size}" + (f"v{self.v_head_size}" if self.v_head_size else "")
        return f"{self.dtype}_b{self.batch}_{heads}_{seq}_{size}_{mask}{cap}{layout}"

    @property
    def kind(self) -> str:
        """What it has beside Q, K and V, without axes: ``"bias"``, ``"prefix"``."""
        return self.beside.partition("-")[0]

    @property
    def prefix(self) -> int:
        """Keys that all queries see, where it has a prefix."""
        return int(self.beside.partition("-")[2]) if self.kind == "prefix" else 0

    @property
    def asks(self) -> dict[str, str]:
        """What it asks for that few serve: a word for programs, and one for people."""
        asked = {
            "ragged": ("a ragged batch", self.tokens),
            "kv_lengths": ("key lengths", self.kv_lengths),
            "fp8": ("fp8", self.dtype == FP8),
            "values": ("V of another head size", self.v_head_size),
            self.kind: (self.kind, self.beside),
        }
        return {word: said for word, (said, there) in asked.items() if there}

    def dtype_of(self, tensor: str) -> str:
        """The dtype of ``"Q"``, ``"K"``, ``"V"`` or ``"Out"``."""
        if self.dtype != FP8:
            return self.dtype
        return "bf16" if tensor == "Out" else "e4m3"

    def item_size(self, tensor: str) -> int:
        """Bytes of an element of a tensor."""
        kind = self.dtype_of(tensor)
        return 1 if kind == "e4m3" else ELEMENT_SIZES[kind]

    def queries_of(self, batch: int) -> int:
        """Queries of a sequence."""
        return self.tokens[batch] if self.tokens else self.seq

    def keys_of(self, batch: int) -> int:
        """Keys of a sequence that count."""
        lengths = self.tokens or self.kv_lengths
        return lengths[batch] if lengths else self.kv_seq

    def place(self, batch: int, rows: Sequence[int]) -> tuple[int, list[int]]:
        """Where rows of a sequence lie in the tensors: which batch, and which rows of that."""
        before = sum(self.tokens[:batch])
        return (0, [before + row for row in rows]) if self.tokens else (batch, list(rows))

    @property
    def sm_scale(self) -> float:
        """The factor of the scores: 1 / sqrt(head size)."""
        return float(self.head_size**-0.5)

    def shape(self, tensor: str) -> tuple[int, int, int, int]:
        """[batch, heads, sequence, head size] of ``"Q"``, ``"K"``, ``"V"`` or ``"Out"``."""
        own = tensor in ("Q", "Out")
        batch, seq = (1, sum(self.tokens)) if self.tokens else (self.batch, self.seq if own else self.kv_seq)
        size = self.v_head_size if tensor in ("V", "Out") and self.v_head_size else self.head_size
        return batch, self.heads if own else self.kv_heads, seq, size

    def strides(self, tensor: str) -> Strides:
        """(batch, head, sequence) of a tensor, in elements; the head size has 1."""
        return strides(self.layout, *self.shape(tensor))

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, of one head of all sequences; what a mask hides counts."""
        if self.kind == "documents":
            whole, rest = divmod(self.seq, DOCUMENT)
            one = whole * _pairs(DOCUMENT, DOCUMENT, self.causal) + _pairs(rest, rest, self.causal)
            return self.batch * one
        if self.kind == "groups":
            sizes = [sum(at // PIECE % GROUPS == group for at in range(self.seq)) for group in range(GROUPS)]
            return self.batch * sum(_pairs(size, size, self.causal) for size in sizes)
        if self.kind == "prefix":
            prefix = min(self.prefix, self.kv_seq)
            hidden = _pairs(prefix, prefix, causal=False) - _pairs(prefix, prefix, causal=True)
            return self.batch * (_pairs(self.seq, self.kv_seq, causal=True) + hidden)
        return sum(_pairs(self.queries_of(b), self.keys_of(b), self.causal) for b in range(self.batch))

    @property
    def flop(self) -> int:
        """Operations of both products, for the pairs that are seen."""
        return 2 * self.heads * self.pairs * (self.head_size + (self.v_head_size or self.head_size))

    @property
    def nbytes(self) -> int:
        """One pass over Q, K, V and Out; keys that no query sees are not counted."""
        total = 0
        q, k, v, out = (self.item_size(name) * self.shape(name)[3] for name in ("Q", "K", "V", "Out"))
        for b in range(self.batch):
            queries, keys = self.queries_of(b), self.keys_of(b)
            seen = min(keys, queries) if self.causal else keys
            total += (q + out) * self.heads * queries + (k + v) * self.kv_heads * seen
        return total

    @property
    def bound_by_memory(self) -> bool:
        """Whether reading K and V takes longer than computing, as in decoding."""
        return self.seq * (self.heads // self.kv_heads) < BOUND_BY_MEMORY


def _within(lengths: Sequence[int], most: int) -> bool:
    return all(type(length) is int and 1 <= length <= most for length in lengths)


def _pairs(queries: int, keys: int, causal: bool) -> int:
    """Of one head of one sequence."""
    if not causal:
        return queries * keys
    triangle = min(queries, keys)
    return triangle * (triangle + 1) // 2 + max(queries - keys, 0) * keys


def cells_from(
    dtypes: Sequence[str], batches: Sequence[int], heads: Sequence[int], kv_heads: Sequence[int], seqs: Sequence[int],
    kv_seqs: Sequence[int], head_sizes: Sequence[int], masks: Sequence[bool], v_head_size: int = 0,
) -> list[Cell]:  # fmt: skip
    """Every combination; no ``kv_heads`` or ``kv_seqs`` are as many as heads, and as seq; 0 is V's head size as Q's."""
    return [
        Cell(
            dtype, batch, h, h if hk is None else hk, s, s if sk is None else sk, size, causal, v_head_size=v_head_size
        )
        for dtype, size, batch, h, hk, s, sk, causal in itertools.product(
            dtypes, head_sizes, batches, heads, kv_heads or (None,), seqs, kv_seqs or (None,), masks
        )
    ]
