"""The tile table is complete, and within what the architectures and the kernel allow as far as arithmetic can tell."""

import itertools

import pytest

from pyfmha.attention.first import DTYPES, HEAD_SIZES, PRECISIONS
from pyfmha.attention.tiles import Tile, tile_for
from pyfmha.errors import SpecError
from pyfmha.spec.arch import ARCHS

COMBINATIONS = list(itertools.product(DTYPES, HEAD_SIZES, ARCHS, (True, False), PRECISIONS))


@pytest.mark.parametrize(("dtype", "head_size", "arch", "causal", "precision"), COMBINATIONS)
def test_every_kernel_has_a_tile(dtype: str, head_size: int, arch: str, causal: bool, precision: str) -> None:
    tile = tile_for(dtype, head_size, arch, causal, precision)
    for block in (tile.block_m, tile.block_n):
        assert block in (16, 32, 64, 128)  # powers of two, and no smaller than tl.dot takes
    assert tile.num_warps in (4, 8)
    assert tile.num_stages in (1, 2, 3)
    # K and V alone, all stages of them, fit in shared memory; what the compiler adds is checked at build.
    bytes_per_element = 4 if dtype == "fp32" else 2
    assert 2 * max(1, tile.num_stages - 1) * tile.block_n * head_size * bytes_per_element <= ARCHS[arch].shared_limit
    # The accumulator, float32, leaves registers for the rest: at most 128 of a thread's 255.
    assert tile.block_m * head_size <= 128 * 32 * tile.num_warps


def test_both_16_bit_types_share_tiles() -> None:
    for head_size, arch in itertools.product(HEAD_SIZES, ARCHS):
        assert tile_for("fp16", head_size, arch, True) == tile_for("bf16", head_size, arch, True)


def test_the_measured_tile_is_the_one_in_use() -> None:
    assert tile_for("fp16", 64, "sm_90", True) == Tile(block_m=64, block_n=64, num_warps=4, num_stages=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fp8", 64, "sm_90", True), "dtype 'fp8'"),
        (("fp16", 80, "sm_90", True), "head size 80"),
        (("fp16", 64, "sm_70", True), "architecture 'sm_70' is not served"),
        (("fp32", 64, "sm_90", True, "ieee"), "ieee"),
    ],
)
def test_what_has_no_tile_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        tile_for(*arguments)
