"""Decoding with a bias, a mask, sinks or values of another head size: ``fmha_biased_split_d128_fp16`` and
``fmha_biased_combine_d128_fp16``, see ``kernels/fmha_biased_decode.py``.

They are to ``fmha_biased_*`` what those of :mod:`pyfmha.attention.decode` are to ``fmha_fwd_*``, and run where those
would and the keys are split :data:`LEAST_PARTS` times. Both take the same arguments.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pyfmha.attention import biased, forward
from pyfmha.attention.biased import BiasedCall
from pyfmha.attention.decode import (
    ALIGNMENT,
    COMBINE_NULLABLE,
    PARTS_AT_A_TIME,
    ROWS,
    WORKSPACE,
    Decode,
    Decoding,
    splits_of,
)
from pyfmha.attention.first import DTYPES
from pyfmha.attention.forward import HEAD_SIZES
from pyfmha.attention.tiles import Tile
from pyfmha.spec.abi import ELEMENT_SIZES
from pyfmha.spec.kernel import Argument, KernelSpec

KERNEL_FILE = "fmha_biased_decode.py"
SPLIT_KERNEL = "fused_attention_biased_split"
COMBINE_KERNEL = "fused_attention_biased_combine"

ARGUMENTS: tuple[tuple[str, str], ...] = tuple(
    (WORKSPACE.get(name, "splits" if name == "ragged" else name), "*fp32" if name in WORKSPACE else kind)
    for name, kind in biased.ARGUMENTS
)
"""Those of :data:`pyfmha.attention.biased.ARGUMENTS`, with the workspace for the ragged batch's arrays and ``splits``
last."""

POINTERS = tuple(name for name, kind in ARGUMENTS if kind.startswith("*"))
"""The arguments that are pointers: they come first."""

_TENSORS = ("Bias", "BiasFp32", "Mask", "Sinks", "SinksFp32")
SPLIT_NULLABLE = ("Out", "Lse", "q_lengths", "kv_lengths", *_TENSORS, "K if kv_len == 0", "V if kv_len == 0")
"""The pointers that may be 0."""

LEAST_PARTS = 8
"""Fewer parts of the keys are computed faster in one launch: on an H200, of 4096 and 32768 keys, 32 heads, 32 or 8 key
heads and 1 to 64 sequences, the pair took 0.2 to 1.05 of one launch's time with 8 parts and more, and 0.98 to 2.7 with
one or two (kernels/NOTES.md)."""

_BLOCK_BYTES = 8 * 1024


@dataclass(frozen=True)
class BiasedDecode(Decode):
    """One pair of functions of the family; head_size is the larger of Q's and V's, else as
    :class:`pyfmha.attention.decode.Decode`."""

    @property
    def split_name(self) -> str:
        """The C function that is launched first."""
        return f"fmha_biased_split_d{self.padded}_{self.dtype}"

    @property
    def combine_name(self) -> str:
        """The C function that is launched second."""
        return f"fmha_biased_combine_d{self.padded}_{self.dtype}"

    def tile(self) -> Tile:
        """How the first launch is cut: half as many keys as without, whose biases take registers, or some spill."""
        keys = max(_BLOCK_BYTES // (self.padded * ELEMENT_SIZES[self.dtype]), 16)
        return Tile(ROWS, keys, 8 if self.dtype == "fp32" else 4, 3)

    def specs(self) -> tuple[KernelSpec, ...]:
        """What to compile: the split for rows of Q, K and V that are read 16 bytes at a time and for any, and what
        combines. Rows of bias and mask are of any alignment: they are few bytes beside those of K and V."""
        combine = KernelSpec(
            source=forward.kernel_path().with_name(KERNEL_FILE),
            kernel=COMBINE_KERNEL,
            name=self.combine_name,
            arguments=self._arguments(hinted=False),
            constants=(("BLOCK_D", self.padded), ("SPLITS", PARTS_AT_A_TIME)),
            grid="batch_size * num_heads * q_len",
            num_warps=4,
            num_stages=1,
            algorithm_name="default",
            nullable=(*COMBINE_NULLABLE, *_TENSORS),
        )
        return (
            self._split_of(self.tile(), hinted=True),
            self._split_of(Tile(ROWS, 16, self.tile().num_warps, 1), hinted=False),
            combine,
        )

    def _split_of(self, tile: Tile, *, hinted: bool) -> KernelSpec:
        heads = "batch_size * num_kv_heads"
        return KernelSpec(
            source=forward.kernel_path().with_name(KERNEL_FILE),
            kernel=SPLIT_KERNEL,
            name=self.split_name,
            arguments=self._arguments(hinted=hinted),
            constants=(
                ("BLOCK_M", tile.block_m),
                ("BLOCK_D", self.padded),
                ("BLOCK_N", tile.block_n),
                ("PRECISION", "tf32x3"),
            ),
            grid=f"splits * cdiv(q_len * (num_heads / num_kv_heads), BLOCK_M), min({heads}, 65535),"
            f" cdiv({heads}, 65535)",
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            algorithm_name="default",
            nullable=SPLIT_NULLABLE,
        )

    def _arguments(self, *, hinted: bool) -> tuple[Argument, ...]:
        return tuple(
            Argument(name, kind.replace("T", self.dtype), _hint(name, kind) if hinted else None)
            for name, kind in ARGUMENTS
        )


def _hint(name: str, kind: str) -> int | None:
    """What makes rows of Q, K and V readable 16 bytes at a time."""
    if name in _TENSORS or name.startswith(("bias_", "mask_")):
        return None
    if name == "Partial":
        return ALIGNMENT
    return 8 if name == "v_head_size" else forward.hint(name, kind)


def biased_decode_family(dtypes: Sequence[str] = DTYPES, head_sizes: Sequence[int] = HEAD_SIZES) -> list[BiasedDecode]:
    """The pairs that serve some dtypes and head sizes, each once.

    Raises:
        SpecError: a dtype or head size is not served.
    """
    found = {}
    for dtype in dtypes:
        for head_size in head_sizes:
            pair = BiasedDecode(dtype, BiasedDecode(dtype, head_size).padded)
            found[pair.split_name] = pair
    return list(found.values())


def biased_decoding_for(call: BiasedCall) -> Decoding | None:
    """How to split a problem; None where ``fmha_biased_*`` serves better.

    Raises:
        SpecError: a head size is not served.
    """
    splits = splits_of(call)
    if splits is None or splits < LEAST_PARTS:
        return None
    return Decoding(call, BiasedDecode("fp16", max(call.head_size, call.v_head_size)).padded, splits)
