"""The products of fmha_sm90.py, and what TMA loads for them and stores, with a head size of one part or of two.

wgmma takes any multiple of 8 columns, tensors of Gluon powers of two. So a head size of 3/4 of a power of two, 96 or
192, is a part of two thirds of it and one of a third, each with a buffer and an accumulator of its own, of which `acc`
and buffers are tuples. TMA has one map for both, whose box is as wide as the second part: the first takes two. Values,
and Out with them, may have the first part alone, and a box of its width.
"""

from sm90_tiles import ROWS
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import CachePolicy, FractionalEvictionPolicy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

# Q is read and Out written once: their lines make room first, and those of K and V, which other programs read, stay.
ONCE: gl.constexpr = gl.constexpr(CachePolicy(l2=FractionalEvictionPolicy("evict_first", 1.0)))


@gluon.jit
def allocate(
    desc, count: gl.constexpr, HEIGHT: gl.constexpr, BLOCK_D: gl.constexpr, TWO_PARTS: gl.constexpr,
    FIRST_ALONE: gl.constexpr = False,
):  # fmt: skip
    """Shared memory for so many times so many rows of a head."""
    if TWO_PARTS:
        first = gl.allocate_shared_memory(desc.dtype, [count, 1, 1, HEIGHT, 2 * BLOCK_D], desc.layout)
        if FIRST_ALONE:
            return (first,)
        else:
            return first, gl.allocate_shared_memory(desc.dtype, [count, 1, 1, HEIGHT, BLOCK_D], desc.layout)
    else:
        return (gl.allocate_shared_memory(desc.dtype, [count, 1, 1, HEIGHT, BLOCK_D], desc.layout),)


@gluon.jit
def load_rows(desc, batch, head, row, ready, buffers, index, ROWS_HERE: gl.constexpr, SHAPE: gl.constexpr, policy=None):
    """Have TMA load rows of a head, all columns."""
    BLOCK_D: gl.constexpr = SHAPE.BLOCK_D
    TWO_PARTS: gl.constexpr = len(buffers) == 2
    # Barriers: one thread says what to expect, and one asks for copies, which need not be the same.
    mbarrier.expect(ready, ROWS_HERE * BLOCK_D * (3 if TWO_PARTS else 2 if SHAPE.TWO_PARTS else 1) * 2)
    to = buffers[0].index(index)
    if TWO_PARTS:
        for half in gl.static_range(2):
            place = [batch, head, row, half * BLOCK_D]
            columns = to.slice(half * BLOCK_D, BLOCK_D, dim=3)
            gl.barrier()
            tma.async_load(desc, place, ready, columns, cache_policy=policy)
        others = buffers[1].index(index)
        gl.barrier()
        tma.async_load(desc, [batch, head, row, 2 * BLOCK_D], ready, others, cache_policy=policy)
    else:
        gl.barrier()
        tma.async_load(desc, [batch, head, row, 0], ready, to, cache_policy=policy)


@gluon.jit
def store_tile(desc, batch, head, row, buffers, index, PARTS: gl.constexpr, SHAPE: gl.constexpr):
    """Have TMA store rows of a head, all columns of so many parts, which a consumer has written and fenced."""
    BLOCK_D: gl.constexpr = SHAPE.BLOCK_D
    rows = buffers[0].index(index)
    if PARTS == 1 or not SHAPE.APART:  # else the consumer met when it had written the first part
        gl.barrier()
    if PARTS == 2:
        for half in gl.static_range(2):
            place = [batch, head, row, half * BLOCK_D]
            tma.async_store(desc, place, rows.slice(half * BLOCK_D, BLOCK_D, dim=3), cache_policy=ONCE)
        others = buffers[1].index(index)
        if SHAPE.APART:
            gl.barrier()
        tma.async_store(desc, [batch, head, row, 2 * BLOCK_D], others, cache_policy=ONCE)
    else:
        tma.async_store(desc, [batch, head, row, 0], rows, cache_policy=ONCE)


@gluon.jit
def matrix(buffers, index, part: gl.constexpr, HEIGHT: gl.constexpr, SHAPE: gl.constexpr):
    """A part of the head size of rows in shared memory, [rows, columns]."""
    return buffers[part].index(index).reshape([HEIGHT, (2 if SHAPE.TWO_PARTS and part == 0 else 1) * SHAPE.BLOCK_D])


@gluon.jit
def multiply_keys(q_smem, slot, k_smem, stage, S_LAYOUT: gl.constexpr, SHAPE: gl.constexpr):
    """Issue the product of a consumer's rows and a block of keys."""
    scores = gl.zeros([ROWS, SHAPE.BLOCK_N], gl.float32, layout=S_LAYOUT)
    for part in gl.static_range(len(k_smem)):
        q = matrix(q_smem, slot, part, ROWS, SHAPE)
        k_t = matrix(k_smem, stage, part, SHAPE.BLOCK_N, SHAPE).permute((1, 0))
        scores = warpgroup_mma(q, k_t, scores, use_acc=part > 0, is_async=True)
    return scores


@gluon.jit
def multiply_near_keys(q_smem, slot, k_smem, stage, SHAPE: gl.constexpr):
    """As `multiply_keys`, of the first half of a block."""
    HALF: gl.constexpr = SHAPE.BLOCK_N // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    scores = gl.zeros([ROWS, HALF], gl.float32, layout=LAYOUT)
    for part in gl.static_range(len(k_smem)):
        q = matrix(q_smem, slot, part, ROWS, SHAPE)
        k_t = matrix(k_smem, stage, part, SHAPE.BLOCK_N, SHAPE).slice(0, HALF).permute((1, 0))
        scores = warpgroup_mma(q, k_t, scores, use_acc=part != 0, is_async=True)
    return scores


@gluon.jit
def no_values(PARTS: gl.constexpr, SHAPE: gl.constexpr):
    """The accumulator of Out, zeros, in as many parts as the values have."""
    SECOND: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SHAPE.BLOCK_D, 16])
    if SHAPE.TWO_PARTS:
        FIRST: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * SHAPE.BLOCK_D, 16])
        first = gl.zeros([ROWS, 2 * SHAPE.BLOCK_D], gl.float32, layout=FIRST)
        if PARTS == 2:
            return first, gl.zeros([ROWS, SHAPE.BLOCK_D], gl.float32, layout=SECOND)
        else:
            return (first,)
    else:
        return (gl.zeros([ROWS, SHAPE.BLOCK_D], gl.float32, layout=SECOND),)


@gluon.jit
def multiply_values(p, v_smem, stage, acc, SHAPE: gl.constexpr):
    """Issue the product of weights and a block of values, which is added to `acc`, of which each part has its own."""
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc[0].type.layout, k_width=2)
    p = gl.convert_layout(p, P_LAYOUT, assert_trivial=True)
    first = warpgroup_mma(p, matrix(v_smem, stage, 0, SHAPE.BLOCK_N, SHAPE), acc[0], is_async=True)
    if len(acc) == 2:
        SECOND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc[1].type.layout, k_width=2)
        other_p = gl.convert_layout(p, SECOND, assert_trivial=True)
        second = warpgroup_mma(other_p, matrix(v_smem, stage, 1, SHAPE.BLOCK_N, SHAPE), acc[1], is_async=True)
        return (first, second), p
    else:
        return (first,), p


@gluon.jit
def wait_for_products(acc, p, other):
    """Wait for all products; returns the arguments."""
    if len(acc) == 2:
        first, second, p, other = warpgroup_mma_wait(0, deps=(acc[0], acc[1], p, other))
        return (first, second), p, other
    else:
        first, p, other = warpgroup_mma_wait(0, deps=(acc[0], p, other))
        return (first,), p, other


@gluon.jit
def _times(part, factor):
    return part * gl.convert_layout(factor, gl.SliceLayout(1, part.type.layout), assert_trivial=True)[:, None]


@gluon.jit
def times(acc, factor):
    """Each row times its factor."""
    if len(acc) == 2:
        return _times(acc[0], factor), _times(acc[1], factor)
    else:
        return (_times(acc[0], factor),)
