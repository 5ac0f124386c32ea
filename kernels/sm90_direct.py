"""Out of fmha_sm90.py stored from registers, if DIRECT: without a buffer in shared memory, the slot of a tile's queries
is free as soon as its last scores are there, and those of the next tile come beside the last product and the store."""

from sm90_softmax import unpack
from sm90_tiles import ROWS
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _narrow_asm(dtype):
    kind = "f16x2" if dtype == gl.float16 else "bf16x2"
    return f"cvt.rn.satfinite.{kind}.f32 $0, $2, $1;"


@gluon.jit
def _narrow_pairs(x, dtype: gl.constexpr):
    """As `narrow`, two in an integer each, [rows, columns / 2]."""
    even, odd = gl.split(x.reshape([ROWS, x.shape[1] // 2, 2]))
    asm: gl.constexpr = _narrow_asm(dtype)
    return gl.inline_asm_elementwise(asm, "=r,r,r", [even, odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.constexpr_function
def _other_asm(bit):
    return f"shfl.sync.bfly.b32 $0, $1, {bit}, 31, -1;"


@gluon.constexpr_function
def _row_layout(columns):
    """Eight columns beside each other for a thread, 32 for the four threads that share a row."""
    registers = [[0, 1], [0, 2], [0, 4], *([0, 1 << bit] for bit in range(5, columns.bit_length() - 1)), [8, 0]]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, columns])


@gluon.jit
def _exchanged(x, BIT: gl.constexpr):
    """Of [rows, 2 * n, 4], whose last axis are the four threads that share a row, what they hold when a bit of theirs
    and the last of n have changed places: two of [rows, n, 4], which are those of this bit of the thread that had it.
    """
    even, odd = gl.split(x.reshape([ROWS, x.shape[1] // 2, 2, 4]).permute((0, 1, 3, 2)))
    thread = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, even.type.layout)))
    low = ((thread & BIT) == 0)[None, :][:, None, :]
    asm: gl.constexpr = _other_asm(BIT)
    given = gl.where(low, odd, even)
    got = gl.inline_asm_elementwise(asm, "=r,r", [given], dtype=gl.int32, is_pure=True, pack=1)
    return gl.where(low, even, got), gl.where(low, got, odd)


@gluon.jit
def _rows(x, dtype: gl.constexpr):
    """Results of a product, [rows, columns], in 16 bits, of which a thread then has eight beside each other."""
    pairs = _narrow_pairs(x, dtype).reshape([ROWS, x.shape[1] // 8, 4])
    even, odd = _exchanged(pairs, 1)
    first, third = _exchanged(even, 2)
    second, fourth = _exchanged(odd, 2)
    pairs = gl.join(gl.join(first, third), gl.join(second, fourth))
    return unpack(pairs.reshape([ROWS, x.shape[1] // 2]), dtype)


@gluon.jit
def store_direct(out, head, token, count, plain, dtype: gl.constexpr):
    """Store the first `count` of 64 rows, of which `out` has all columns.

    Args:
        out: [64, columns], results of a product.
        head: of all heads of the batch.
        token: the first row.
        count: how many are to be stored; all, where it is 64 or more.
        plain: Out, its strides of batch, head and row, heads of a sequence, the head size: elements go by eights.
    """
    Out, stride_b, stride_h, stride_s, num_heads, head_size = plain
    LAYOUT: gl.constexpr = _row_layout(out.shape[1])
    out = gl.convert_layout(_rows(out, dtype), LAYOUT, assert_trivial=True)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, out.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    Out += (head // num_heads).to(gl.int64) * stride_b + (head % num_heads).to(gl.int64) * stride_h
    Out += token.to(gl.int64) * stride_s
    places = Out + rows.to(gl.int64)[:, None] * stride_s + columns[None, :]
    stored = (rows < count)[:, None] & (columns < head_size)[None, :]
    gl.store(places, out, mask=stored, eviction_policy="evict_first")
