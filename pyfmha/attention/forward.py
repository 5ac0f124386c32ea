"""The production function of attention: ``fmha_fwd_d64_fp16`` and its kin, one for each padded head size and dtype.

Every feature is an argument: grouped heads, lengths of queries and keys that differ, strides, padding, ragged batches,
windows, soft caps. What a function does is told in ``kernels/fmha_fwd.py``. This module knows which variants a function
is made of, and how a problem becomes the arguments of a launch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pyfmha.attention import first
from pyfmha.attention.first import DTYPES
from pyfmha.attention.hopper import variants as hopper_variants
from pyfmha.attention.tiles import TUNED_ARCHS, Tile, forward_generic_tile, forward_precision, forward_tile
from pyfmha.errors import SpecError
from pyfmha.spec.kernel import Argument, KernelSpec, Tuning
from pyfmha.spec.words import dtype_name, one_of

HEAD_SIZES = (32, 64, 128, 256)
"""Padded head sizes: a function serves every head size up to its own."""

KERNEL = "fused_attention_forward"
KERNEL_FILE = "fmha_fwd.py"

# What each of the kernel's ways with a soft cap asks of a call.
_REQUIRES: dict[str, tuple[str, ...]] = {"never": ("softcap == 0",), "always": ("softcap > 0",), "any": ()}

_AXES = ("b", "h", "s")
ARGUMENTS: tuple[tuple[str, str], ...] = (
    *((name, "*fp32" if name == "Lse" else "*T") for name in ("Out", "Lse", "Q", "K", "V")),
    *((name, "*i32") for name in ("q_lengths", "kv_lengths", "cu_seqlens_q", "cu_seqlens_kv")),
    *((name, "fp32") for name in ("sm_scale", "softcap")),
    *((name, "i32") for name in ("batch_size", "num_heads", "num_kv_heads", "q_len", "kv_len", "head_size")),
    *((f"{tensor}_stride_{axis}", "i64") for tensor in ("q", "k", "v", "out") for axis in _AXES),
    *((name, "i32") for name in ("window_left", "window_right", "bottom_right", "ragged")),
)
"""Name and type of each argument, in order; ``*T`` is a pointer to the function's dtype."""

NULLABLE = (
    *("Lse", "q_lengths", "kv_lengths"),
    *(f"{name} if ragged == 0" for name in ("cu_seqlens_q", "cu_seqlens_kv")),
    *("Out if q_len == 0", "Q if q_len == 0", "K if kv_len == 0", "V if kv_len == 0"),
)
"""The pointers that may be 0: what was not asked for or not given, and tensors without elements."""

_HEADS = "num_heads * (batch_size - ragged * (batch_size - 1))"
GRID = f"cdiv(q_len, BLOCK_M) + ragged * (batch_size + 1), min({_HEADS}, 65535), cdiv({_HEADS}, 65535)"
"""The launch grid. In a ragged batch each sequence, and the rows before the first and after the last, have tiles of
their own. The heads that exceed the limit of the grid's y go to its z; the kernel skips those past the last."""

Strides = tuple[int, int, int]


def kernel_path() -> Path:
    """The file of the kernel: inside the installed package, or beside it in a checkout.

    Raises:
        KernelSourceError: it is in neither place.
    """
    return first.kernel_path().with_name(KERNEL_FILE)


@dataclass(frozen=True)
class Forward:
    """One function of the family.

    Attributes:
        dtype: of Q, K, V and Out: ``"fp16"``, ``"bf16"`` or ``"fp32"``.
        head_size: 1 to 256. The function is the one for the next padded size.

    Raises:
        SpecError: on creation, for a function that does not exist.
    """

    dtype: str
    head_size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.dtype not in DTYPES:
            raise SpecError(f"dtype {self.dtype!r} is not served: {one_of(DTYPES, self.dtype)}")
        check_range("head size", self.head_size, 1, HEAD_SIZES[-1])

    @property
    def padded(self) -> int:
        """The head size that blocks are cut for: 32, 64, 128 or 256."""
        return next(size for size in HEAD_SIZES if size >= self.head_size)

    @property
    def name(self) -> str:
        """The C function: ``fmha_fwd_d64_fp16``."""
        return f"fmha_fwd_d{self.padded}_{self.dtype}"

    def specs(self, *, hopper: bool = False) -> tuple[KernelSpec, ...]:
        """What to compile, in the order in which the launcher tries them; the last serves everything.

        All but the last want pointers at multiples of 16 bytes, strides and head size at multiples of 8 elements; one
        is for no soft cap, another for one. In fp32, where models have none, the latter is for those architectures
        only where it gains most: those that multiply it as three products of fp16 (pyfmha.attention.tiles).

        Args:
            hopper: puts the variants of :mod:`pyfmha.attention.hopper`, which only sm_90 runs, before them.
        """
        generic = self._spec(forward_generic_tile(self.dtype, self.padded), "any", hinted=False)
        return (
            *(hopper_variants(generic, self.padded) if hopper else ()),
            self._tuned("never", list(TUNED_ARCHS)),
            *self._capped(),
            generic,
        )

    def _capped(self) -> tuple[KernelSpec, ...]:
        """The variant for soft caps, if there is one."""
        if self.dtype != "fp32":
            return (self._tuned("always", list(TUNED_ARCHS)),)
        archs = [arch for arch in TUNED_ARCHS if forward_precision("fp32", self.padded, arch) == "fp16x3"]
        return (replace(self._tuned("always", archs), archs=tuple(archs)),) if archs else ()

    def _tuned(self, softcap: str, archs: list[str]) -> KernelSpec:
        """A variant with the settings of some architectures: the first one's, and tunings for those that differ."""
        settings = {
            arch: (forward_tile(self.dtype, self.padded, arch), forward_precision(self.dtype, self.padded, arch))
            for arch in archs
        }
        (_, (first, precision)), *others = settings.items()
        tunings = []
        for arch, (tile, other) in others:
            constants: tuple[tuple[str, int | str], ...] = (("BLOCK_M", tile.block_m), ("BLOCK_N", tile.block_n))
            if other != precision:
                constants = (*constants, ("PRECISION", other))
            if (tile, other) != (first, precision):
                tunings.append(Tuning(arch, constants, tile.num_warps, tile.num_stages))
        return self._spec(first, softcap, hinted=True, tunings=tuple(tunings), precision=precision)

    def _spec(
        self,
        tile: Tile,
        softcap: str,
        *,
        hinted: bool,
        tunings: tuple[Tuning, ...] = (),
        precision: str = "tf32x3",
    ) -> KernelSpec:
        constants = (
            ("BLOCK_M", tile.block_m),
            ("BLOCK_D", self.padded),
            ("BLOCK_N", tile.block_n),
            ("SOFTCAP", softcap),
            ("PRECISION", precision),
            ("SEGMENTS", 128),
        )
        return KernelSpec(
            source=kernel_path(),
            kernel=KERNEL,
            name=self.name,
            arguments=self._arguments(hinted=hinted),
            constants=constants,
            grid=GRID,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            tunings=tunings,
            algorithm_name="default",
            requires=_REQUIRES[softcap],
            nullable=NULLABLE,
        )

    def _arguments(self, *, hinted: bool) -> tuple[Argument, ...]:
        return tuple(
            Argument(name, kind.replace("T", self.dtype), hint(name, kind) if hinted else None)
            for name, kind in ARGUMENTS
        )


def hint(name: str, kind: str) -> int | None:
    """What the fast variants want: loads of 16 bytes, which the rows of Q, K, V and Out allow."""
    if kind == "*T":
        return 16
    return 8 if "_stride_" in name or name == "head_size" else None


def forward_family(dtypes: Sequence[str] = DTYPES, head_sizes: Sequence[int] = HEAD_SIZES) -> list[Forward]:
    """The functions that serve some dtypes and head sizes, each once.

    Raises:
        SpecError: a dtype or head size is not served.
    """
    found = {}
    for dtype in dtypes:
        for head_size in head_sizes:
            function = Forward(dtype, Forward(dtype, head_size).padded)
            found[function.name] = function
    return list(found.values())


@dataclass(frozen=True)
class Call:
    """A launch, but for its pointers.

    Attributes:
        batch_size: sequences.
        num_heads, num_kv_heads: of Q and of K and V; the former a multiple of the latter.
        q_len, kv_len: of the tensors: the longest sequence, or of a ragged batch all tokens. 0 is legal.
        head_size: 1 to 256.
        sm_scale: factor of the scores.
        softcap: the scores become softcap * tanh(score / softcap); 0 for none.
        q_strides, k_strides, v_strides, out_strides: (batch, head, sequence), in elements; see :func:`strides`. A
            ragged batch has no use for the first.
        window_left, window_right: keys before and after its own position that a query sees; -1 for all. Causal
            attention has window_right 0.
        bottom_right: the last query's position is that of the last key; otherwise the first's that of the first.
        ragged: sequences lie one after the other, as cu_seqlens say.

    Raises:
        SpecError: on creation, saying which part is wrong and what is allowed.
    """

    batch_size: int
    num_heads: int
    num_kv_heads: int
    q_len: int
    kv_len: int
    head_size: int
    sm_scale: float
    softcap: float = 0.0
    q_strides: Strides = (0, 0, 0)
    k_strides: Strides = (0, 0, 0)
    v_strides: Strides = (0, 0, 0)
    out_strides: Strides = (0, 0, 0)
    window_left: int = -1
    window_right: int = -1
    bottom_right: bool = False
    ragged: bool = False

    def __post_init__(self) -> None:
        largest = 2**31 - 1
        for name, lowest in (("batch_size", 0), ("num_heads", 1), ("num_kv_heads", 1), ("q_len", 0), ("kv_len", 0)):
            check_range(name, getattr(self, name), lowest, largest)
        check_range("head_size", self.head_size, 1, HEAD_SIZES[-1])
        for name in ("window_left", "window_right"):
            check_range(name, getattr(self, name), -1, largest)
        if self.num_heads % self.num_kv_heads:
            raise SpecError(
                f"{self.num_heads} query heads and {self.num_kv_heads} key heads: use a multiple of the key heads"
            )
        for name in ("q_strides", "k_strides", "v_strides", "out_strides"):
            value = getattr(self, name)
            if len(value) != len(_AXES):
                raise SpecError(f"{name} is {value!r}: give three, of batch, head and sequence, in elements")
            for stride in value:
                check_range(name, stride, -(2**63), 2**63 - 1)
        for name, lowest_float in (("sm_scale", -_FLOAT_MAX), ("softcap", 0.0)):
            if not lowest_float <= getattr(self, name) <= _FLOAT_MAX:
                raise SpecError(f"{name} is {getattr(self, name)}: use a finite float32 of at least {lowest_float}")

    def scalars(self) -> tuple[int | float, ...]:
        """Everything that follows the nine pointers, in the order of :data:`ARGUMENTS`."""
        return (
            *(self.sm_scale, self.softcap),
            *(self.batch_size, self.num_heads, self.num_kv_heads, self.q_len, self.kv_len, self.head_size),
            *(*self.q_strides, *self.k_strides, *self.v_strides, *self.out_strides),
            *(self.window_left, self.window_right, int(self.bottom_right), int(self.ragged)),
        )

    def named(self) -> dict[str, int | float]:
        """The same by the arguments' names, for a call such as ``function(stream, **pointers, **call.named())``."""
        return dict(zip(self._names(), self.scalars(), strict=True))

    @staticmethod
    def _names() -> tuple[str, ...]:
        return tuple(name for name, kind in ARGUMENTS if not kind.startswith("*"))


_FLOAT_MAX = 3.4028234663852886e38


def check_range(name: str, value: int, lowest: int, largest: int) -> None:
    """Refuse what is no integer of a range.

    Raises:
        SpecError: it is none.
    """
    if type(value) is not int or not lowest <= value <= largest:
        raise SpecError(f"{name} is {value!r}: use an integer from {lowest} to {largest}")


def strides(layout: str, batch: int, heads: int, seq: int, head_size: int) -> Strides:
    """Strides (batch, head, sequence), in elements, of a contiguous tensor.

    Args:
        layout: ``"bhsd"`` for [batch, heads, seq, head size], ``"bshd"`` for [batch, seq, heads, head size], which is
            also that of a ragged batch, [tokens, heads, head size].

    Raises:
        SpecError: the layout is another.
    """
    del batch
    if layout == "bhsd":
        return heads * seq * head_size, seq * head_size, head_size
    if layout == "bshd":
        return seq * heads * head_size, head_size, heads * head_size
    raise SpecError(f"layout {layout!r} is unknown: use bhsd or bshd")
