"""Soft caps: scores that level off at a cap of each head's own, cap * tanh(score / cap).

Gemma 2 has one cap, 50, of all heads (Gemma Team, "Gemma 2: Improving Open Language Models at a Practical Size", 2024,
section 2): that is `softcap` of attention itself.
"""

import numpy as np
import triton.language as tl

import pyfmha
from pyfmha.functions import score_function


def example(batch, heads, q_len, kv_len):
    return {"caps": np.linspace(0.5, 30, heads, dtype=np.float32)}


@score_function(example=example, inputs={"caps": "*fp32[heads]"})
def soft_caps(score, batch, head, query, key, caps):
    return pyfmha.soft_cap(score, tl.load(caps + head))
