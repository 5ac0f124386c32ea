"""ALiBi: a penalty that grows with the distance, at a rate of the head's own.

Press, Smith and Lewis, "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation"
(2022): score + slope[head] * (key - query), the heads' slopes being 2**(-8 * (head + 1) / heads).
"""

import triton.language as tl

from pyfmha.functions import score_function


@score_function
def alibi(score, batch, head, query, key, slopes):
    """slopes: [heads]."""
    return score + tl.load(slopes + head) * (key - query)
