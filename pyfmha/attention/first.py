"""The attention family: which kernels pyfmha builds, under which names, and how a problem becomes a launch.

This is the one module between the general machinery (:mod:`pyfmha.aot`, :mod:`pyfmha.runtime`), which knows nothing of
attention, and attention itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyfmha.attention.tiles import TUNED_ARCHS, Tile, generic_tile, tile_for
from pyfmha.errors import KernelSourceError, SpecError
from pyfmha.spec.kernel import Argument, KernelSpec, Tuning
from pyfmha.spec.words import dtype_name, one_of

DTYPES = ("fp16", "bf16", "fp32")
HEAD_SIZES = (32, 64, 128, 256)
PRECISIONS = ("tf32x3", "tf32")
"""How fp32 operands are multiplied: three tf32 products, which keep float32's accuracy, or a single one."""

KERNEL = "fused_attention_kernel"
KERNEL_FILE = "fmha_triton.py"


def kernel_path() -> Path:
    """The file of the attention kernel: inside the installed package, or beside it in a checkout.

    Raises:
        KernelSourceError: it is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / KERNEL_FILE).is_file():
            return folder / KERNEL_FILE
    raise KernelSourceError(
        f"{KERNEL_FILE} is neither in {package / 'kernels'} nor in {package.parent / 'kernels'}; reinstall pyfmha"
    )


@dataclass(frozen=True)
class Attention:
    """One member of the family.

    Attributes:
        dtype: of Q, K, V and Out: ``"fp16"``, ``"bf16"`` or ``"fp32"``; ``"float16"`` and so on are these, too.
        head_size: 32, 64, 128 or 256.
        causal: whether a query sees only keys at its own position and before.
        precision: for fp32, ``"tf32x3"`` or ``"tf32"``; the other dtypes have ``"tf32x3"``, unused.

    Raises:
        SpecError: on creation, for a member that does not exist.
    """

    dtype: str
    head_size: int
    causal: bool = True
    precision: str = "tf32x3"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        for name, value, allowed in (
            ("dtype", self.dtype, DTYPES),
            ("head size", self.head_size, HEAD_SIZES),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in allowed:
                raise SpecError(f"{name} {value!r} is not served: {one_of(map(str, allowed), str(value))}")
        if self.precision != "tf32x3" and self.dtype != "fp32":
            raise SpecError(f"precision {self.precision!r} is a choice for fp32 only, not {self.dtype}")

    @property
    def name(self) -> str:
        """The C function: ``fmha_d64_fp16``, ``fmha_d64_fp32_tf32``, ``fmha_d64_fp16_full``."""
        precision = "" if self.precision == "tf32x3" else f"_{self.precision}"
        return f"fmha_d{self.head_size}_{self.dtype}{precision}{'' if self.causal else '_full'}"

    def specs(self) -> tuple[KernelSpec, KernelSpec]:
        """What to compile: the variant for pointers aligned to 16 bytes, and the generic one."""
        tiles = {arch: tile_for(self.dtype, self.head_size, arch, self.causal, self.precision) for arch in TUNED_ARCHS}
        first, *others = tiles.items()
        tunings = tuple(
            Tuning(arch, (("BLOCK_M", tile.block_m), ("BLOCK_N", tile.block_n)), tile.num_warps, tile.num_stages)
            for arch, tile in others
            if tile != first[1]
        )
        return self._spec(first[1], tunings), self._spec(generic_tile(self.head_size), ()).generic()

    def _spec(self, tile: Tile, tunings: tuple[Tuning, ...]) -> KernelSpec:
        constants = (
            ("BLOCK_M", tile.block_m),
            ("BLOCK_DMODEL", self.head_size),
            ("BLOCK_N", tile.block_n),
            ("CAUSAL", self.causal),
            ("PRECISION", self.precision),
        )
        return KernelSpec(
            source=kernel_path(),
            kernel=KERNEL,
            name=self.name,
            arguments=_arguments(self.dtype),
            constants=constants,
            # The heads that exceed the limit of the grid's y go to its z; the kernel skips those past the last.
            grid="cdiv(seq_len, BLOCK_M), min(batch_size * num_heads, 65535), cdiv(batch_size * num_heads, 65535)",
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            tunings=tunings,
            algorithm_name="default",
        )


def _arguments(dtype: str) -> tuple[Argument, ...]:
    tensor, statistic = f"*{dtype}", "*fp32"
    pointers = {"Out": tensor, "L": statistic, "M": statistic, "Q": tensor, "K": tensor, "V": tensor}
    return (
        *(Argument(name, kind, 16) for name, kind in pointers.items()),
        Argument("sm_scale", "fp32"),
        *(Argument(name, "i32") for name in ("batch_size", "num_heads", "seq_len")),
    )


def family(dtypes: Sequence[str] = DTYPES, head_sizes: Sequence[int] = HEAD_SIZES) -> list[Attention]:
    """Every member for some dtypes and head sizes: causal and full, and for fp32 both precisions.

    Raises:
        SpecError: a dtype or head size is not served.
    """
    return [
        Attention(dtype, head_size, causal, precision)
        for dtype in dict.fromkeys(map(dtype_name, dtypes))
        for head_size in dict.fromkeys(head_sizes)
        for precision in (PRECISIONS if dtype == "fp32" else PRECISIONS[:1])
        for causal in (True, False)
    ]


def family_specs(members: Sequence[Attention]) -> list[KernelSpec]:
    """The specs of some members, in order."""
    return [spec for member in members for spec in member.specs()]
