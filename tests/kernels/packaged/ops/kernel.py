"""A kernel that imports from its package, from the one above it, and by the package's full name."""

import triton
import triton.language as tl

import packaged.ops.shift
from packaged.scale import FACTOR

from ..scale import scaled
from . import NAME
from .shift import shifted

assert packaged.ops.shift.shifted is shifted
assert (NAME, FACTOR.value) == ("ops", 3.0)


@triton.jit
def scale(X, n, BLOCK: tl.constexpr, APPLY: tl.constexpr = shifted):
    """X = APPLY(3 X)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(X + i, APPLY(scaled(tl.load(X + i, mask=i < n))), mask=i < n)
