"""What the kernels beside it share."""

import triton


@triton.jit
def shifted(x):
    return x + 2.0
