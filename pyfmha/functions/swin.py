"""Swin's relative bias: one number for each head and offset within a window of width * width tokens.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (2021), equation 4. The table is
the model's own, so that the bias [heads, tokens, tokens] is never made.
"""

import numpy as np
import triton.language as tl

from pyfmha.functions import score_function


def example(batch, heads, q_len, kv_len):
    width = int(np.ceil(max(q_len, kv_len) ** 0.5))
    table = np.random.default_rng(0).standard_normal(((2 * width - 1) ** 2, heads)).astype(np.float32)
    return {"table": table, "heads": heads, "width": width}


@score_function(
    example=example,
    inputs={"table": "*fp32[(2 * width - 1) * (2 * width - 1), heads]"},
    requires=("width * width >= queries", "width * width >= keys"),
)
def swin(score, batch, head, query, key, table, heads, width):
    """table: `relative_position_bias_table`; width: of a window, in tokens."""
    rows = query // width - key // width + width - 1
    columns = query % width - key % width + width - 1
    return score + tl.load(table + (rows * (2 * width - 1) + columns) * heads + head)
