"""A matrix product that asks for much shared memory when its blocks are large."""

import triton
import triton.language as tl


@triton.jit
def product(A, B, C, n, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """C = A @ B for square-enough matrices: [n, k] and [k, n]."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        a = tl.load(A + rows[:, None] * k + (start + inner)[None, :])
        b = tl.load(B + (start + inner)[:, None] * n + columns[None, :])
        total = tl.dot(a, b, total)
    tl.store(C + rows[:, None] * n + columns[None, :], total)
