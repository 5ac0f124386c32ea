"""What ``with_helper.py`` imports."""

import triton


@triton.jit
def scaled(x):
    """Three times x."""
    return x * 3.0
