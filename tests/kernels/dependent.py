"""A kernel for programmatic dependent launch."""

import triton
import triton.language as tl


@triton.jit
def follow(X, Y, n, BLOCK: tl.constexpr, PDL: tl.constexpr = False):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_wait()
    tl.store(Y + i, tl.load(X + i, mask=i < n) + 1, mask=i < n)
