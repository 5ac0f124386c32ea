"""Causal attention with a prefix that every query sees whole, as of PaliGemma or a prefix language model.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020), section 3.2:
"causal with prefix" masks.
"""

import numpy as np
import triton.language as tl

from pyfmha.functions import mask_function


def example(batch, heads, q_len, kv_len):
    return {"lengths": (np.arange(batch) * 30 % kv_len).astype(np.int32)}


@mask_function(
    example=example,
    inputs={"lengths": "*i32[batch]"},
    bounds=lambda batch, first_query, last_query, kv_len, lengths: (
        0,
        tl.maximum(last_query + 1, tl.load(lengths + batch)),
        0,
        tl.maximum(first_query + 1, tl.load(lengths + batch)),
    ),
)
def prefix(batch, head, query, key, lengths):
    """lengths: of each sequence's prefix."""
    return (key <= query) | (key < tl.load(lengths + batch))
