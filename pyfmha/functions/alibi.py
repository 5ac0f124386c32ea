"""ALiBi: a penalty that grows with the distance, at a rate of the head's own.

Press, Smith and Lewis, "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation"
(2022): score + slope[head] * (key - query), the heads' slopes being 2**(-8 * (head + 1) / heads).
"""

import numpy as np
import triton.language as tl

from pyfmha.functions import score_function


def example(batch, heads, q_len, kv_len):
    return {"slopes": np.exp2(-8 * (np.arange(heads) + 1) / heads).astype(np.float32)}


@score_function(example=example, inputs={"slopes": "*fp32[heads]"}, relative=True)
def alibi(score, batch, head, query, key, slopes):
    """Positions are exact as float32 up to 2**24, and there a difference costs one instruction."""
    return score + tl.load(slopes + head) * (key.to(tl.float32) - query.to(tl.float32))
