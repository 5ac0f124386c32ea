"""Blocks of a mask tensor that show nothing are skipped: no mask of its own, but the lists of one.

For a mask that is a tensor, ``mask=(tensor, blocks)``: what FlexAttention's block masks and block-sparse attention
(Child et al., "Generating Long Sequences with Sparse Transformers", 2019, section 5.5) are for.
"""

import triton.language as tl

from pyfmha.functions import mask_function


def example(batch, heads, q_len, kv_len):
    return {}


@mask_function(blocks=True, example=example)
def blocks(batch, head, query, key):
    """Every key: where the tensor hides a whole block it is neither loaded nor computed, and where it shows one whole,
    attention does not read it again."""
    return tl.maximum(query, key) >= 0
