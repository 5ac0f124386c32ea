"""A bias by TMA that is one more product: (1 / scale) times the ideal, [64, 64], times the tile, [64, keys].

Minus infinity in a tile would be NaN in all other rows, since 0 times it is. The producer, which has four warps and
little to do, looks at tiles that have come; where it finds minus infinity it writes minus zero for it, and zero for minus
zero, and says so in a bit of the step's word. Consumers then look for minus zero, and hide such scores. Infinity and NaN
stay, and have their rows computed again, and all that are beside them.
"""

from sm90_tiles import ROWS
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

HEIGHT: gl.constexpr = gl.constexpr(16)  # rows that the producer has registers for
WORD: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def ideal(undo, layout: gl.constexpr):
    """1 / scale on the diagonal, [64, 64]."""
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))[:, None]
    columns = gl.arange(0, ROWS, layout=gl.SliceLayout(0, layout))[None, :]
    return gl.where(rows == columns, undo, 0.0).to(gl.float16)


@gluon.jit
def _least_of(a, b):
    """The lesser of two halves, of which one may be NaN."""
    return gl.inline_asm_elementwise("min.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def _marked(values):
    """Minus zero for minus infinity, zero for minus zero."""
    asm: gl.constexpr = """
    {
        .reg .pred p;
        .reg .b16 low, high;
        mov.b32 {low, high}, $1;
        setp.eq.u16 p, low, 0x8000;
        selp.b16 low, 0, low, p;
        setp.eq.u16 p, low, 0xFC00;
        selp.b16 low, 0x8000, low, p;
        setp.eq.u16 p, high, 0x8000;
        selp.b16 high, 0, high, p;
        setp.eq.u16 p, high, 0xFC00;
        selp.b16 high, 0x8000, high, p;
        mov.b32 $0, {low, high};
    }"""
    return gl.inline_asm_elementwise(asm, "=r,r", [values], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def _has_least(tile, LAYOUT: gl.constexpr):
    """Of 16 rows, whether one of four rows has minus infinity."""
    least = tile.slice(0, HEIGHT).load(LAYOUT)
    for first in gl.static_range(16, ROWS, 16):
        least = _least_of(least, tile.slice(first, HEIGHT).load(LAYOUT))
    return (gl.max(-least.to(gl.float32), 1) == float("inf")).to(gl.int32)


@gluon.jit
def clean_tiles(x_smem, x_ready, x_clean, words, step, SHAPE: gl.constexpr):
    """Wait for a step's tiles, look at them, and hand them on."""
    BLOCK_N: gl.constexpr = SHAPE.BLOCK_N
    CONSUMERS: gl.constexpr = SHAPE.CONSUMERS
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    stage = step % SHAPE.X_STAGES
    bits = gl.zeros([HEIGHT], gl.int32, layout=gl.SliceLayout(1, LAYOUT))
    for c in gl.static_range(CONSUMERS):
        mbarrier.wait(x_ready.index(stage * CONSUMERS + c), (step // SHAPE.X_STAGES) & 1)
        bits = bits | (_has_least(x_smem.index(stage * CONSUMERS + c).reshape([ROWS, BLOCK_N]), LAYOUT) << c)
    word = gl.reduce_or(bits, 0)
    if word != 0:
        for c in gl.static_range(CONSUMERS):
            if (word >> c) & 1 != 0:
                tile = x_smem.index(stage * CONSUMERS + c).reshape([ROWS, BLOCK_N])
                for first in gl.static_range(0, ROWS, 16):
                    part = tile.slice(first, HEIGHT)
                    part.store(_marked(part.load(LAYOUT)))
        fence_async_shared()
    words.index(stage).store(gl.full([1], word, gl.int32, layout=gl.BlockedLayout([1], [32], [4], [0])))
    gl.barrier()
    for c in gl.static_range(CONSUMERS):
        mbarrier.arrive(x_clean.index(stage * CONSUMERS + c), count=1)


@gluon.jit
def hide_marked(scores, tile):
    """Scores, and minus infinity where a tile that was cleaned has minus zero."""
    asm: gl.constexpr = """
    {
        .reg .pred p;
        .reg .b16 low, high;
        mov.b32 {low, high}, $2;
        setp.eq.u16 p, low, 0x8000;
        selp.f32 $0, 0fFF800000, $3, p;
        setp.eq.u16 p, high, 0x8000;
        selp.f32 $1, 0fFF800000, $4, p;
    }"""
    return gl.inline_asm_elementwise(asm, "=&f,=&f,r,f,f", [tile, scores], dtype=gl.float32, is_pure=True, pack=2)
