"""What the producer of fmha_sm90.py does ahead of a tile's end for the next tile: see AHEAD of `Shape`."""

from sm90_places import _of_each, _threads
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def asks_early(ahead):
    """Whether queries of the next tile are asked for in the middle of this one."""
    return ahead & 1 != 0


@gluon.constexpr_function
def brings(ahead):
    """Which tensors' first blocks of the next tile are brought to the L2 cache."""
    return ahead & 2 != 0, ahead & 4 != 0, ahead & 8 != 0


@gluon.constexpr_function
def crosses(ahead):
    """Whether consumers issue the first scores of the next tile behind the last product with values."""
    return ahead & 16 != 0


@gluon.constexpr_function
def rotates(ahead):
    """Whether consumers store a tile beside the first product of the next."""
    return ahead & 32 != 0


@gluon.constexpr_function
def sees_half(ahead, consumer, shape):
    """Whether a consumer multiplies half a first block, if its rows see no more."""
    return ahead & 64 != 0 and consumer + 1 < (shape.CONSUMERS if shape.CONSUMERS == 2 else 4)


@gluon.constexpr_function
def _prefetch_asm(param, columns, width, threads_per):
    lines = [
        ".reg .pred first;",
        ".reg .b64 a;",
        "setp.eq.u32 first, $0, 0;",
        f"mov.b64 a, fmha_fwd_sm90_param_{param};",
        "cvta.param.u64 a, a;",
    ]
    for column in range(0, columns, width):
        lines += [f"@first cp.async.bulk.prefetch.tensor.4d.L2.global.tile [a, {{{column}, $1, $2, $3}}];"]
    return "{ " + " ".join(lines) + " }"


@gluon.jit
def bring(PARAM: gl.constexpr, batch, head, row, SHAPE: gl.constexpr):
    """Have TMA bring rows of a head to the L2 cache."""
    WIDTH: gl.constexpr = SHAPE.BLOCK_D if SHAPE.BLOCK_D < 64 else 64
    COLUMNS: gl.constexpr = 3 * SHAPE.BLOCK_D if SHAPE.TWO_PARTS else SHAPE.BLOCK_D
    asm: gl.constexpr = _prefetch_asm(PARAM, COLUMNS, WIDTH, 0)
    gl.inline_asm(asm, "r,r,r,r", [_threads(), _of_each(row), _of_each(head), _of_each(batch)])
