"""What the kernels of this package share."""

import triton
import triton.language as tl

FACTOR: tl.constexpr = tl.constexpr(3.0)


@triton.jit
def scaled(x):
    return x * FACTOR
