"""Kernels that copy a tensor, in the ways of one algorithm: by TMA in Gluon, by TMA in plain Triton, by pointers."""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def copy_gluon(
    source, target, X, Y, batch, heads, rows, width, stride_b, stride_h, stride_s, scale, ROWS: gl.constexpr
):
    """Y = X, [batch, heads, rows, width]: one box a program."""
    row = gl.program_id(0) * ROWS
    box = gl.allocate_shared_memory(source.dtype, source.block_type.shape, source.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(arrived, count=1)
    mbarrier.expect(arrived, source.block_type.nbytes)
    tma.async_load(source, [gl.program_id(2), gl.program_id(1), row, 0], arrived, box)
    mbarrier.wait(arrived, 0)
    tma.async_store(target, [gl.program_id(2), gl.program_id(1), row, 0], box)
    tma.store_wait(0)


@triton.jit
def copy_blocks(
    source, target, X, Y, batch, heads, rows, width, stride_b, stride_h, stride_s, scale, ROWS: tl.constexpr
):
    """The same with plain Triton's descriptors."""
    where = [tl.program_id(2), tl.program_id(1), tl.program_id(0) * ROWS, 0]
    target.store(where, source.load(where))


@triton.jit
def copy_pointers(X, Y, batch, heads, rows, width, stride_b, stride_h, stride_s, scale, ROWS: tl.constexpr):
    """The same with pointers, for any stride and alignment."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, 64)
    start = tl.program_id(2) * stride_b + tl.program_id(1) * stride_h
    offsets = start + row[:, None].to(tl.int64) * stride_s + column[None, :]
    mask = (row[:, None] < rows) & (column[None, :] < width)
    tl.store(Y + offsets, tl.load(X + offsets, mask=mask), mask=mask)
