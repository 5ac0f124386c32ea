"""Bits of a mask: the producer makes them of the bytes that TMA brings, so that consumers test predicates, of which one
instruction sets seven, and load a word a row where they would load 32 pairs of bytes."""

from sm90_tiles import ROWS
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

WORDS: gl.constexpr = gl.constexpr(8)
"""Of a row of 128 keys: of each half two for each of four threads, of which either has the 16 bits of two threads."""


@gluon.jit
def pack_mask(tile, bits):
    """Bytes of a block [64, 128] become bits, [64, 8].

    A thread of a consumer has columns 8 j + 2 t + e of a row, where t is its place among the four that share it. Bit
    j % 8 of byte 2 (t % 2) + e of word 4 (j // 8) + t says whether that byte is not 0.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [16, 2], [4, 1], [1, 0])
    of_words: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    words = tile.reinterpret(gl.int32, [ROWS, 32], of_words).load(LAYOUT)
    ones = ((((words & 0x7F7F7F7F) + 0x7F7F7F7F) | words) >> 7) & 0x01010101
    j = gl.arange(0, 32, layout=gl.SliceLayout(0, LAYOUT)) // 2 % 8
    found = gl.sum((ones << j[None, :]).reshape([ROWS, 2, 8, 2]), 2)
    bits.store(gl.join(found, found).reshape([ROWS, WORDS]))


@gluon.jit
def load_bits(bits, LAYOUT: gl.constexpr):
    """A word for each row that a thread has, [64, 4]: byte 2 (j // 8) + e has bit j % 8 of column 8 j + 2 t + e."""
    near = bits.slice(0, WORDS // 2, dim=1).load(LAYOUT)
    far = bits.slice(WORDS // 2, WORDS // 2, dim=1).load(LAYOUT)
    half = (gl.arange(0, WORDS // 2, layout=gl.SliceLayout(0, LAYOUT)) % 2 * 16)[None, :]
    return ((near >> half) & 0xFFFF) | ((far >> half) << 16)


@gluon.constexpr_function
def _shown_asm(outputs, inputs):
    """Bit by bit of a word, so that ptxas sets many predicates at once. A thread has pairs of columns of its two rows
    in turns."""
    words, scores = inputs
    (found,) = outputs
    text = "{ .reg .pred p; .reg .b32 one; "
    for row in range(2):
        for bit in range(32):
            i = 4 * (bit // 16 * 8 + bit % 8) + 2 * row + bit // 8 % 2
            text += f"and.b32 one, {words[row]}, {1 << bit}; setp.ne.u32 p, one, 0; "
            text += f"selp.f32 {found[i]}, {scores[i]}, 0fFF800000, p; "
    return text + "}"


@gluon.jit
def shown_by_bits(scores, word, S_LAYOUT: gl.constexpr):
    """Scores, and minus infinity where a bit of what `load_bits` gave is 0."""
    found: gl.constexpr = gl.distributed_type(gl.float32, [ROWS, 128], S_LAYOUT)
    return gl.inline_asm(_shown_asm, ("=&f", "r", "f"), [word, scores], found)
