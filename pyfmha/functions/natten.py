"""Neighbourhood attention of an image: a query sees the keys around it, as many at the borders as in the middle.

Hassani et al., "Neighborhood Attention Transformer" (2023); attention-gym's `natten.py` has the same mask. Tokens are
height * width, row by row. Rows out of reach are neither loaded nor computed.
"""

import triton
import triton.language as tl

from pyfmha.functions import mask_function


@triton.jit
def middle(position, size, window):
    """The middle of the neighbourhood of a position: moved inwards at the borders."""
    half = window // 2
    return tl.minimum(tl.maximum(position, half), size - 1 - half)


def example(batch, heads, q_len, kv_len):
    return {"height": -(-max(q_len, kv_len) // 8), "width": 8, "window": 5}


@mask_function(
    example=example,
    requires=("window % 2 == 1", "window <= height", "window <= width"),
    bounds=lambda first_query, last_query, height, width, window: (
        (middle(first_query // width, height, window) - window // 2) * width,
        (middle(last_query // width, height, window) + window // 2 + 1) * width,
    ),
)
def natten(batch, head, query, key, height, width, window):
    """height, width: of the image, in tokens; window: the neighbourhood's width, odd and at most either."""
    rows = tl.abs(middle(query // width, height, window) - key // width)
    columns = tl.abs(middle(query % width, width, window) - key % width)
    return (rows <= window // 2) & (columns <= window // 2)
