"""Tokens that see those of their own group, wherever these are: documents that were shuffled or cut into pieces.

As the clusters of Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers" (2021), section 4.1.
No bounds tell where a group's tokens are: a launch before attention looks, so that blocks of others are not visited.
"""

import numpy as np
import triton.language as tl

from pyfmha.functions import mask_function


def example(batch, heads, q_len, kv_len):
    """Pieces of 21 tokens of three groups in turn."""
    tokens = max(q_len, kv_len)
    numbers = (np.arange(tokens) + 8 * np.arange(batch)[:, None]) // 21 % 3
    return {"numbers": numbers.astype(np.int32), "tokens": tokens}


@mask_function(
    blocks=True,
    example=example,
    inputs={"numbers": "*i32[batch, tokens]"},
    requires=("tokens >= queries", "tokens >= keys"),
)
def groups(batch, head, query, key, numbers, tokens):
    """numbers: of each token's group."""
    return tl.load(numbers + batch * tokens + query) == tl.load(numbers + batch * tokens + key)
