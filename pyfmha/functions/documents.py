"""Documents one after the other in a sequence, each seeing only itself: "block-diagonal" or "jagged" masks.

As attention-gym's `document_mask` has it; first and end of each token's document are given, so that other documents
are neither loaded nor computed.
"""

import triton.language as tl

from pyfmha.functions import mask_function


@mask_function(
    inputs={"begins": "*i32", "ends": "*i32"},
    bounds=lambda batch, first_query, last_query, kv_len, begins, ends, tokens: (
        tl.load(begins + batch * tokens + first_query),
        tl.load(ends + batch * tokens + last_query),
    ),
)
def documents(batch, head, query, key, begins, ends, tokens):
    """begins, ends: [batch, tokens], where the document of a token begins, and where it ends, in ascending order."""
    begin = tl.load(begins + batch * tokens + query)
    end = tl.load(ends + batch * tokens + query)
    return (key >= begin) & (key < end)
