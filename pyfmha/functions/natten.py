"""Neighbourhood attention of an image: a query sees the keys around it, as many at the borders as in the middle.

Hassani et al., "Neighborhood Attention Transformer" (2023); attention-gym's `natten.py` has the same mask. Tokens are
height * width, row by row. Rows out of reach are neither loaded nor computed.
"""

import triton
import triton.language as tl

from pyfmha.functions import mask_function


@triton.jit
def middle(position, size, kernel):
    """The middle of the neighbourhood of a position: moved inwards at the borders."""
    half = kernel // 2
    return tl.minimum(tl.maximum(position, half), size - 1 - half)


@mask_function(
    bounds=lambda first_query, last_query, height, width, kernel: (
        (middle(first_query // width, height, kernel) - kernel // 2) * width,
        (middle(last_query // width, height, kernel) + kernel // 2 + 1) * width,
    )
)
def natten(batch, head, query, key, height, width, kernel):
    """height, width: of the image, in tokens; kernel: the neighbourhood's width, odd and at most either."""
    rows = tl.abs(middle(query // width, height, kernel) - key // width)
    columns = tl.abs(middle(query % width, width, kernel) - key % width)
    return (rows <= kernel // 2) & (columns <= kernel // 2)
