"""A score function of one's own: a penalty that grows with the logarithm of the distance, at two rates of each head.

    pyfmha build --functions examples/score_function/kerple.py --kernels basic --dtype fp16 --head-size 64
    pyfmha verify --only library --functions examples/score_function/kerple.py
    python examples/score_function/run.py

In a network: ``pyfmha.add_attention(network, q, k, v, causal=True, score=kerple, score_inputs=[r1, r2])``.

Chi, Fan, Ramadge and Rudnicky, "KERPLE: Kernelized Relative Positional Embedding for Length Extrapolation" (2022):
score - r1 * log(1 + r2 * |query - key|), r1 and r2 being learned, one of each a head.
"""

import numpy as np
import triton.language as tl

import pyfmha


def example(batch, heads, q_len, kv_len):
    """What ``pyfmha verify`` computes with: the inputs by name, for these sizes."""
    return {"r1": np.linspace(0.5, 2, heads, dtype=np.float32), "r2": np.linspace(1, 0.1, heads, dtype=np.float32)}


@pyfmha.score_function(example=example)
def kerple(score, batch, head, query, key, r1, r2):
    """r1, r2: [heads]."""
    return score - tl.load(r1 + head) * tl.log(1 + tl.load(r2 + head) * tl.abs(query - key))
