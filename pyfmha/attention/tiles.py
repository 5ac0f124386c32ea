"""Block sizes, warps and stages of the attention kernel: one table, with what was measured and what was not.

Measured on an H100 80GB SXM (torch 2.11, Triton 3.6.0), microseconds, full / causal, at (batch, heads, seq, head size);
FA2 is torch's FlashAttention-2 backend in the same run, EFF its memory-efficient backend:

=======  ============  ============  =============================  ===========================================
dtype    head size     tile          (8, 32, 512, D)                (4, 32, 2048, D)
=======  ============  ============  =============================  ===========================================
fp16     32            64x64 w4 s3   43.6 / 34.6 (FA2 58.9 / 49.1)  247 / 148 (FA2 336 / 201)
fp16     64            64x64 w4 s3   64.8 / 50.2 (FA2 76.8 / 68.0)  354 / 219 (FA2 468 / 282)
fp16     128           64x64 w4 s3   111 / 83.4 (FA2 125 / 108)     641 / 394 (FA2 793 / 498)
fp16     256, 16 heads 64x32 w4 s2   131 / 103 (FA2 130 / 99.5)     785 / 490 (FA2 866 / 514)
fp32     64            128x64 w8 s2  191 / 147 (EFF 283 / 201)      1322 / 790 (EFF 2045 / 1172), batch 4 and 2
=======  ============  ============  =============================  ===========================================

64 rows and 4 warps win on Hopper because several such blocks share an SM and hide each other's prologue and softmax;
with 8 warps and 64 columns the kernel needs a little over 128 registers, so that only one block fits.

The production kernel's fp32 by fp16x3 (Triton 3.9), at head sizes 32, 64 and 128: 123 / 86, 206 / 146 and 405 / 270 at
(8, 32, 512, D), EFF 470 / 298, 550 / 352 and 813 / 514; 770 / 440, 1340 / 756 and 2769 / 1544 at (4, 32, 2048, D), EFF
3434 / 1882, 3982 / 2203 and 5940 / 3201. At head size 256 the sums are in four parts: 530 / 433 (EFF 847 / 552) and
7145 / 4054 (EFF 13118 / 6983), although a loop loads spilled registers 66 times; tiles that spill half as much take 1.4
times as long.

The other architectures have not been measured. Their tiles are the largest that neither spill much nor pass the
shared memory of a block (pyfmha.spec.arch); without wgmma the queries of a tile stay in registers, which costs what the
larger tiles would gain.
"""

from dataclasses import dataclass

from pyfmha.errors import SpecError
from pyfmha.spec.arch import parse_arch


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut and run.

    Attributes:
        block_m: queries of one program.
        block_n: keys of one step of its loop.
        num_warps: warps of one program.
        num_stages: K and V blocks in flight, the one in use included.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# How operands are multiplied, and the head size: the tile. Both 16-bit types behave alike.
_Table = dict[tuple[str, int], Tile]

_HOPPER: _Table = {
    ("half", 32): Tile(64, 64, 4, 3),
    ("half", 64): Tile(64, 64, 4, 3),
    ("half", 128): Tile(64, 64, 4, 3),
    ("half", 256): Tile(64, 32, 4, 2),
    ("tf32x3", 32): Tile(64, 64, 4, 2),
    ("tf32x3", 64): Tile(128, 64, 8, 2),
    ("tf32x3", 128): Tile(32, 32, 4, 3),
    ("tf32x3", 256): Tile(16, 32, 8, 2),
    ("tf32", 32): Tile(64, 64, 4, 2),
    ("tf32", 64): Tile(128, 32, 8, 3),
    ("tf32", 128): Tile(128, 32, 8, 2),
    ("tf32", 256): Tile(32, 16, 4, 2),
}
# tcgen05, accumulators in tensor memory. Smaller than fits: larger fp32 tiles take ptxas over 5 seconds each.
_BLACKWELL: _Table = {
    **_HOPPER,
    ("tf32x3", 32): Tile(64, 32, 4, 2),
    ("tf32x3", 64): Tile(64, 32, 4, 2),
    ("tf32", 32): Tile(64, 32, 4, 2),
    ("tf32", 64): Tile(64, 32, 4, 2),
    ("tf32", 128): Tile(32, 32, 8, 2),
    ("tf32", 256): Tile(32, 32, 8, 2),
}
# mma.sync, and within the 99 KiB of sm_86, sm_89 and sm_120: the queries of a tile stay in registers, twice in tf32x3.
_MMA_SYNC: _Table = {
    ("half", 32): Tile(64, 64, 4, 3),
    ("half", 64): Tile(64, 64, 4, 3),
    ("half", 128): Tile(64, 32, 4, 3),
    ("half", 256): Tile(64, 32, 8, 2),
    ("tf32x3", 32): Tile(64, 32, 4, 2),
    ("tf32x3", 64): Tile(64, 16, 4, 2),
    ("tf32x3", 128): Tile(32, 32, 8, 2),
    ("tf32x3", 256): Tile(16, 32, 8, 1),
    ("tf32", 32): Tile(64, 32, 4, 2),
    ("tf32", 64): Tile(64, 32, 4, 2),
    ("tf32", 128): Tile(64, 32, 8, 2),
    ("tf32", 256): Tile(16, 32, 4, 2),
}

TUNED_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""Those with tiles of their own. Variants are named by them, so that the list stays as it is; others are like one."""

_TABLES = {"sm_90": _HOPPER, "sm_100": _BLACKWELL}

# Where the production kernel, which holds strides and limits besides, needs other tiles.
_FORWARD: dict[str, _Table] = {
    "sm_90": {
        ("half", 256): Tile(128, 32, 8, 2),
        ("fp16x3", 32): Tile(64, 64, 4, 3),
        ("fp16x3", 64): Tile(64, 64, 4, 3),
        ("fp16x3", 128): Tile(64, 32, 4, 3),
        ("fp16x3", 256): Tile(128, 32, 8, 2),
    },
}
# Where a block of a bias or of the mask is held besides.
_BIASED: dict[str, _Table] = {"sm_90": {("half", 256): Tile(64, 32, 8, 2)}}
# How the production kernel multiplies fp32: where wgmma has fp16 at twice the speed of tf32, and takes it from
# registers or shared memory as it is, three products of fp16 halves are twice as fast as three of tf32 by mma.sync.
_FORWARD_PRECISION = {("sm_90", head_size): "fp16x3" for head_size in (32, 64, 128, 256)}


def _tuned_as(arch: str) -> str:
    found = parse_arch(arch)
    return found.like or found.name


def tile_for(dtype: str, head_size: int, arch: str, causal: bool, precision: str = "tf32x3") -> Tile:
    """The tile the attention kernel is built with.

    Args:
        dtype: fp16, bf16 or fp32.
        head_size: 32, 64, 128 or 256.
        arch: an architecture that is served.
        causal: reserved: so far the same tile was best for causal and full attention.
        precision: for fp32, tf32x3 or tf32.

    Raises:
        SpecError: there is no tile for that combination.
    """
    del causal
    if dtype not in ("fp16", "bf16", "fp32"):
        raise SpecError(f"no tile for dtype {dtype!r}: use fp16, bf16 or fp32")
    table = _TABLES.get(_tuned_as(arch), _MMA_SYNC)
    key = (precision if dtype == "fp32" else "half", head_size)
    if key not in table:
        raise SpecError(
            f"no tile for head size {head_size} in {dtype} {precision}: use 32, 64, 128, 256, and tf32x3 or tf32"
        )
    return table[key]


def generic_tile(head_size: int) -> Tile:
    """The tile of the variant for pointers that are not aligned to 16 bytes, the same for every dtype and architecture.

    Such pointers are read element by element through registers, so one stage is all there is to gain, and small blocks
    keep registers from spilling; they also compile in half the time of the tuned ones.
    """
    return Tile(16, 16, 4, 1) if head_size >= 128 else Tile(32, 32, 4, 1)


def forward_precision(dtype: str, head_size: int, arch: str) -> str:
    """PRECISION of the production kernel: how fp32 is multiplied on an architecture; the other dtypes ignore it.

    Args:
        dtype: fp16, bf16 or fp32.
        head_size: 32, 64, 128 or 256.
        arch: an architecture that is served.
    """
    return _FORWARD_PRECISION.get((_tuned_as(arch), head_size), "tf32x3") if dtype == "fp32" else "tf32x3"


def forward_tile(dtype: str, head_size: int, arch: str) -> Tile:
    """The tile of the production kernel (kernels/fmha_fwd.py): as :func:`tile_for`, except where that would spill much,
    and where fp32 is multiplied in another way (:func:`forward_precision`).

    Those of fp32 on sm_90 were chosen by time on an H100 (kernels/NOTES.md), the others by
    registers, spills and shared memory of the compiled code.

    Args:
        dtype: fp16, bf16 or fp32.
        head_size: padded: 32, 64, 128 or 256.
        arch: an architecture that is served.

    Raises:
        SpecError: there is no tile for that combination.
    """
    key = (forward_precision(dtype, head_size, arch) if dtype == "fp32" else "half", head_size)
    usual = tile_for(dtype, head_size, arch, causal=True)
    return _FORWARD.get(_tuned_as(arch), {}).get(key, usual)


def forward_generic_tile(dtype: str, head_size: int) -> Tile:
    """The tile of the production kernel's generic variant.

    Eight warps, so that a thread reads few elements one by one: half the registers and three quarters of the compile
    time of four. fp32 at 256 spills with any, 864 bytes a thread on sm_90.
    """
    return Tile(32, 32, 8, 1) if dtype != "fp32" and head_size < 128 else Tile(16, 16, 8, 1)


def biased_tile(dtype: str, head_size: int, arch: str, *, known: bool = True) -> Tile:
    """The tile of the kernel with biases and masks (kernels/fmha_biased.py), chosen by registers, spills and shared
    memory of the compiled code; fp32 is three products of tf32 on every architecture.

    Args:
        dtype: fp16, bf16 or fp32.
        head_size: padded: 32, 64, 128 or 256.
        arch: sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120.
        known: whether the variant knows what it is given. One that does not reads bias and mask element by element,
            through many registers: fewer keys at a time and eight warps keep it from spilling.

    Raises:
        SpecError: there is no tile for that combination.
    """
    key = ("tf32x3" if dtype == "fp32" else "half", head_size)
    usual = tile_for(dtype, head_size, arch, causal=True)
    tile = _BIASED.get(parse_arch(arch).name, {}).get(key, usual)
    if known:
        return tile
    warps = tile.num_warps if (dtype, head_size) == ("fp32", 32) else 8
    return Tile(min(tile.block_m, 64), min(tile.block_n, 32), warps, tile.num_stages)
