"""Attention with tensors beside Q, K and V: ``fmha_biased_d64_fp16`` and its kin, see ``kernels/fmha_biased.py``.

An additive bias, a mask, sinks, values of another head size: all that :mod:`pyfmha.attention.forward` serves and these
besides. Its functions stay as they are, since engines refer to them; these are a family of their own. What a user's
functions make of it is :mod:`pyfmha.functions`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pyfmha.attention import biased_hopper, forward
from pyfmha.attention.first import DTYPES
from pyfmha.attention.forward import HEAD_SIZES, Call, Forward, hint
from pyfmha.attention.tiles import Tile, biased_tile, forward_generic_tile
from pyfmha.errors import SpecError
from pyfmha.spec.arch import ARCHS
from pyfmha.spec.kernel import Argument, KernelSpec, Tuning

KERNEL = "fused_attention_biased"
KERNEL_FILE = "fmha_biased.py"

_TENSORS = (("Bias", "*T"), ("BiasFp32", "*fp32"), ("Mask", "*u8"), ("Sinks", "*T"), ("SinksFp32", "*fp32"))
_STRIDES = tuple((f"{tensor}_stride_{axis}", "i64") for tensor in ("bias", "mask") for axis in "bhqk")
_COUNTS = tuple((f"{tensor}_{axis}", "i32") for tensor in ("bias", "mask") for axis in ("rows", "columns"))
_AFTER = {"cu_seqlens_kv": _TENSORS, "head_size": (("v_head_size", "i32"),), "out_stride_s": (*_STRIDES, *_COUNTS)}
ARGUMENTS: tuple[tuple[str, str], ...] = tuple(
    argument for one in forward.ARGUMENTS for argument in (one, *_AFTER.get(one[0], ()))
)
"""Those of :data:`pyfmha.attention.forward.ARGUMENTS`, with the tensors, V's head size and the strides among them."""

NULLABLE = (*forward.NULLABLE, *(name for name, _ in _TENSORS))
"""The pointers that may be 0, :data:`pyfmha.attention.forward.NULLABLE` and the tensors of this family."""

POINTERS = tuple(name for name, kind in ARGUMENTS if kind.startswith("*"))
"""The arguments that are pointers: they come first."""

BroadcastStrides = tuple[int, int, int, int]

ABSENT: BroadcastStrides = (0, 0, 0, 1)
"""Strides of a bias or mask that is not there: those that the fast variants ask for."""


@dataclass(frozen=True)
class Variant:
    """What one variant knows when it is compiled; see ``kernels/fmha_biased.py``.

    Attributes:
        softcap, bias, mask: its constants SOFTCAP, BIAS and MASK.
        requires: what makes them true.
        aligned: which of the tensors' pointers and strides it wants such that 16 bytes are read at a time.
    """

    softcap: str
    bias: str
    mask: str
    requires: tuple[str, ...] = ()
    aligned: tuple[str, ...] = ()


_NO_CAP = "softcap == 0"
_NO_BIAS = ("Bias == 0", "BiasFp32 == 0")
_NO_MASK = ("Mask == 0",)
PLAIN = Variant("never", "never", "never", (_NO_CAP, *_NO_BIAS, *_NO_MASK))
"""The variant for neither bias nor mask nor soft cap."""
_BIAS = Variant("never", "own", "never", (_NO_CAP, "Bias != 0", "BiasFp32 == 0", *_NO_MASK), ("bias",))
MASKED = Variant("never", "never", "always", (_NO_CAP, *_NO_BIAS, "Mask != 0"), ("mask",))
"""The variant for a mask alone, in rows that are read 16 bytes at a time."""
ANY = Variant("any", "any", "any")
"""The variant that knows nothing, and serves everything."""


@dataclass(frozen=True)
class Biased:
    """One function of the family.

    Attributes:
        dtype: of Q, K, V and Out: ``"fp16"``, ``"bf16"`` or ``"fp32"``.
        head_size: 1 to 256, the larger of Q's and V's. The function is the one for the next padded size.

    Raises:
        SpecError: on creation, for a function that does not exist.
    """

    dtype: str
    head_size: int

    def __post_init__(self) -> None:
        Forward(self.dtype, self.head_size)

    @property
    def padded(self) -> int:
        """The head size that blocks are cut for: 32, 64, 128 or 256."""
        return Forward(self.dtype, self.head_size).padded

    @property
    def name(self) -> str:
        """The C function: ``fmha_biased_d64_fp16``."""
        return f"fmha_biased_d{self.padded}_{self.dtype}"

    def specs(self) -> tuple[KernelSpec, ...]:
        """What to compile, in the order in which the launcher tries them; the last serves everything.

        Without a bias and a mask, with a bias of Q's dtype, with a mask: each has a variant for tensors that are read
        16 bytes at a time and no soft cap. Any of it, in rows of any stride, is another's for Q, K, V and Out that are.
        fp32 has that one only: its products take so long that the rest hardly shows. Before them come those for Hopper,
        see :mod:`pyfmha.attention.biased_hopper`.
        """
        fast = biased_hopper.variants(self.generic(), self.padded)
        known = (PLAIN, _BIAS, MASKED, ANY) if self.dtype != "fp32" else (ANY,)
        narrow = (self._narrow(),) if self.dtype != "fp32" and self.padded == HEAD_SIZES[-1] else ()
        return (*fast, *narrow, *(self.tuned(variant) for variant in known), self.generic())

    def narrow_specs(self) -> tuple[KernelSpec, ...]:
        """Those of :meth:`specs` that are fast for values of at most half the padded head size and nothing beside, and
        those that serve anything; none where Hopper has no variants for such values."""
        fast = biased_hopper.narrow_values(self.generic(), self.padded)
        return (*fast, self._narrow(), self.tuned(ANY), self.generic()) if fast else ()

    def _narrow(self) -> KernelSpec:
        """For values of at most half the head size, such as 128 of 192: their blocks take half the registers."""
        half = self.padded // 2
        plain = replace(PLAIN, requires=(*PLAIN.requires, f"v_head_size <= {half}"))
        return self.tuned(plain, value_size=half)

    def tuned(self, variant: Variant, *, value_size: int | None = None) -> KernelSpec:
        """A variant with the tile of each architecture, for Q, K, V and Out that are read 16 bytes at a time."""
        known = variant.bias != "any"
        tiles = {arch: biased_tile(self.dtype, self.padded, arch, known=known) for arch in ARCHS}
        (_, first), *others = tiles.items()
        tunings = tuple(
            Tuning(arch, (("BLOCK_M", tile.block_m), ("BLOCK_N", tile.block_n)), tile.num_warps, tile.num_stages)
            for arch, tile in others
            if tile != first
        )
        return self._spec(first, variant, value_size or self.padded, hinted=True, tunings=tunings)

    def generic(self) -> KernelSpec:
        """The variant that serves everything."""
        return self._spec(forward_generic_tile(self.dtype, self.padded), ANY, self.padded, hinted=False)

    def _spec(
        self, tile: Tile, variant: Variant, value_size: int, *, hinted: bool, tunings: tuple[Tuning, ...] = ()
    ) -> KernelSpec:
        constants = (
            ("inputs", None),
            ("BLOCK_M", tile.block_m),
            ("BLOCK_D", self.padded),
            ("BLOCK_V", value_size),
            ("BLOCK_N", tile.block_n),
            ("SOFTCAP", variant.softcap),
            ("BIAS", variant.bias),
            ("MASK", variant.mask),
            ("SCORE", None),
            ("SEEN", None),
            ("BOUNDS", None),
            ("PRECISION", "tf32x3"),
            ("SEGMENTS", 128),
        )
        return KernelSpec(
            source=forward.kernel_path().with_name(KERNEL_FILE),
            kernel=KERNEL,
            name=self.name,
            arguments=tuple(
                Argument(name, kind.replace("T", self.dtype), _hint(name, kind, variant.aligned) if hinted else None)
                for name, kind in ARGUMENTS
            ),
            constants=constants,
            grid=forward.GRID,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            tunings=tunings,
            algorithm_name="default",
            requires=variant.requires,
            nullable=NULLABLE,
        )


def _hint(name: str, kind: str, aligned: Sequence[str]) -> int | None:
    """What a variant wants of an argument, so that rows of Q, K, V, Out, and of what is `aligned`, are read fast."""
    tensor, _, axis = name.partition("_stride_")
    if tensor in ("bias", "mask"):
        return (1 if axis == "k" else 8) if tensor in aligned else None
    if kind.startswith("*") and name in dict(_TENSORS):
        return 16 if name.lower() in aligned else None
    return 8 if name == "v_head_size" else hint(name, kind)


def biased_family(dtypes: Sequence[str] = DTYPES, head_sizes: Sequence[int] = HEAD_SIZES) -> list[Biased]:
    """The functions that serve some dtypes and head sizes, each once.

    Raises:
        SpecError: a dtype or head size is not served.
    """
    found = {}
    for dtype in dtypes:
        for head_size in head_sizes:
            function = Biased(dtype, Biased(dtype, head_size).padded)
            found[function.name] = function
    return list(found.values())


@dataclass(frozen=True)
class BiasedCall(Call):
    """A launch, but for its pointers.

    Attributes:
        v_head_size: of V and Out, 1 to 256; 0 for that of Q and K.
        bias_strides, mask_strides: (batch, head, query, key), in elements; 0 for an axis that is broadcast, see
            :func:`broadcast_strides`. Of a ragged batch, the first is of the sequences.
        bias_counts, mask_counts: queries and keys that it has; of no account for an axis that is broadcast. What lies
            past them is not read: 0 of a bias, not seen of a mask. By default those of the problem; of a ragged batch,
            where they may be as few as the longest sequence has, they are to be given.

    Raises:
        SpecError: on creation, saying which part is wrong and what is allowed.
    """

    v_head_size: int = 0
    bias_strides: BroadcastStrides = ABSENT
    mask_strides: BroadcastStrides = ABSENT
    bias_counts: tuple[int, int] | None = None
    mask_counts: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.v_head_size == 0:
            object.__setattr__(self, "v_head_size", self.head_size)
        forward.check_range("v_head_size", self.v_head_size, 1, HEAD_SIZES[-1])
        for name in ("bias_strides", "mask_strides"):
            value = getattr(self, name)
            if len(value) != 4:
                raise SpecError(f"{name} is {value!r}: give four, of batch, head, query and key, in elements")
            for stride in value:
                forward.check_range(name, stride, -(2**63), 2**63 - 1)
        for tensor in ("bias", "mask"):
            self._check_counts(tensor)

    def _check_counts(self, tensor: str) -> None:
        counts, strides = getattr(self, f"{tensor}_counts"), getattr(self, f"{tensor}_strides")
        if counts is None:
            if self.ragged and strides != ABSENT and any(strides[2:]):
                raise SpecError(
                    f"{tensor}_counts is not given; of a ragged batch, give the queries and keys that {tensor} has"
                )
            counts = (self.q_len, self.kv_len)
            object.__setattr__(self, f"{tensor}_counts", counts)
        if len(counts) != 2:
            raise SpecError(f"{tensor}_counts is {counts!r}: give two, of queries and keys")
        for count in counts:
            forward.check_range(f"{tensor}_counts", count, 0, 2**31 - 1)

    @property
    def padded(self) -> int:
        """The padded head size of the function that serves it."""
        return Biased(DTYPES[0], max(self.head_size, self.v_head_size)).padded

    def scalars(self) -> tuple[int | float, ...]:
        """Everything that follows the pointers, in the order of :data:`ARGUMENTS`."""
        usual = dict(zip(_FORWARD_SCALARS, super().scalars(), strict=True))
        strides = zip(_STRIDES, (*self.bias_strides, *self.mask_strides), strict=True)
        assert self.bias_counts is not None
        assert self.mask_counts is not None
        counts = zip(_COUNTS, (*self.bias_counts, *self.mask_counts), strict=True)
        own = {"v_head_size": self.v_head_size, **{name: value for (name, _), value in (*strides, *counts)}}
        return tuple({**usual, **own}[name] for name in self._names())

    @staticmethod
    def _names() -> tuple[str, ...]:
        return tuple(name for name, kind in ARGUMENTS if not kind.startswith("*"))


_FORWARD_SCALARS = tuple(name for name, kind in forward.ARGUMENTS if not kind.startswith("*"))


def broadcast_strides(shape: Sequence[int], wanted: Sequence[int], what: str = "bias") -> BroadcastStrides:
    """Strides of a contiguous tensor that is broadcast, as ONNX and numpy broadcast it.

    Args:
        shape: of the tensor, one to four axes, the last ones of batch, query heads, queries and keys.
        wanted: (batch, query heads, queries, keys), what each axis is, unless it is 1.
        what: what it is, for messages.

    Raises:
        SpecError: it cannot be broadcast to that.
    """
    full = (1,) * (4 - len(shape)) + tuple(shape)
    if not 1 <= len(shape) <= 4 or any(have not in (1, want) for have, want in zip(full, wanted, strict=True)):
        raise SpecError(
            f"{what} is {list(shape)}: use [batch or 1, query heads or 1, queries or 1, keys or 1], here"
            f" {list(wanted)}, without leading axes of 1 if you like"
        )
    steps = [full[axis + 1 :] for axis in range(4)]
    sizes = [1, 1, 1, 1]
    for axis, after in enumerate(steps):
        for size in after:
            sizes[axis] *= size
    b, h, q, k = (0 if have == 1 else step for have, step in zip(full, sizes, strict=True))
    # An axis of one key needs no stride, and 1 is what the fast variants ask for.
    return b, h, q, (1 if wanted[3] == 1 else k)
