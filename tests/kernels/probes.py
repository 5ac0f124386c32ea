"""A kernel that takes arguments of many types, which descriptions of tests launch: nobody runs it."""

import triton
import triton.language as tl


@triton.jit
def probe(a, b, c, i, j, k, f, g, BLOCK: tl.constexpr):
    """Everything is read, so that everything is passed."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = i + j + k + f + g.to(tl.float32)
    tl.store(c + at, (tl.load(a + at) + tl.load(b + at) + total).to(c.dtype.element_ty))
