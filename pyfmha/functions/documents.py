"""Documents one after the other in a sequence, each seeing only itself: "block-diagonal" or "jagged" masks.

As attention-gym's `document_mask` has it; first and end of each token's document are given, so that other documents
are neither loaded nor computed.
"""

import numpy as np
import triton.language as tl

from pyfmha.functions import mask_function


def example(batch, heads, q_len, kv_len):
    """Documents of 21 tokens, but for the first and the last of a sequence."""
    tokens = max(q_len, kv_len)
    number = (np.arange(tokens) + 8 * np.arange(batch)[:, None]) // 21
    begins, ends = (
        np.stack([np.searchsorted(row, row, side) for row in number]).astype(np.int32) for side in ("left", "right")
    )
    return {"begins": begins, "ends": ends, "tokens": tokens}


@mask_function(
    example=example,
    inputs={"begins": "*i32[batch, tokens]", "ends": "*i32[batch, tokens]"},
    requires=("tokens >= queries", "tokens >= keys"),
    bounds=lambda batch, first_query, last_query, kv_len, begins, ends, tokens: (
        tl.load(begins + batch * tokens + first_query),
        tl.load(ends + batch * tokens + last_query),
        tl.load(begins + batch * tokens + last_query),
        tl.load(ends + batch * tokens + first_query),
    ),
)
def documents(batch, head, query, key, begins, ends, tokens):
    """begins, ends: where the document of a token begins, and where it ends, in ascending order."""
    begin = tl.load(begins + batch * tokens + query)
    end = tl.load(ends + batch * tokens + query)
    return (key >= begin) & (key < end)
