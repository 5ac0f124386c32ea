"""Decomposed relative positions of SAM's and ViTDet's image encoders: one number by row and one by column of the key.

Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (2022), and `add_decomposed_rel_pos` of
Segment Anything: score + by_row[query, row of key] + by_column[query, column of key]. Both are products of Q with
tables of the model, [tokens, height] and [tokens, width] a head; their sum [tokens, tokens], of 4096 tokens and 12
heads 384 MB, is never made.
"""

import numpy as np
import triton.language as tl

from pyfmha.functions import score_function


def example(batch, heads, q_len, kv_len):
    width = 8
    height = -(-max(q_len, kv_len) // width)
    shape, rng = (batch, heads, height * width), np.random.default_rng(0)
    by_row, by_column = (rng.standard_normal((*shape, size)).astype(np.float32) for size in (height, width))
    return {"by_row": by_row, "by_column": by_column, "heads": heads, "height": height, "width": width}


@score_function(
    example=example,
    inputs={
        "by_row": "*fp32[batch, heads, height * width, height]",
        "by_column": "*fp32[batch, heads, height * width, width]",
    },
    requires=(
        "height * width >= queries",
        "height * width >= keys",
        "batch * heads * height * width * height <= 2147483647",  # offsets are int32
        "batch * heads * height * width * width <= 2147483647",
    ),
)
def relative_positions(score, batch, head, query, key, by_row, by_column, heads, height, width):
    """by_row, by_column: of each query, for the rows and for the columns of keys; height, width: of the image."""
    row = (batch * heads + head) * height * width + query
    return score + tl.load(by_row + row * height + key // width) + tl.load(by_column + row * width + key % width)
