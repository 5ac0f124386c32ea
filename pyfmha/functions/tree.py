"""Trees of speculative decoding: each drafted token sees what was there before, and its own ancestors.

Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads" (2024), section 2.1.2,
"tree attention". The last `nodes` keys are the drafts; a bit of a node's ancestors stands for each.
"""

import numpy as np
import triton.language as tl

from pyfmha.functions import mask_function


def example(batch, heads, q_len, kv_len):
    """A binary tree: the parent of node j is (j - 1) // 2."""
    nodes = min(q_len, kv_len, 64)
    bits = [1]
    for node in range(1, nodes):
        bits.append(bits[(node - 1) // 2] | 1 << node)
    ancestors = np.array([bits] * batch, np.uint64).view(np.int64)
    return {"ancestors": ancestors, "nodes": nodes, "starts": np.full(batch, kv_len - nodes, np.int32)}


@mask_function(
    inputs={"ancestors": "*i64[batch, nodes]", "starts": "*i32[batch]"}, requires=("nodes <= 64",), example=example
)
def tree(batch, head, query, key, ancestors, nodes, starts):
    """For bottom-right alignment: queries are the last ones. ancestors: bit i of node j says whether j
    is i or a descendant of it; at most 64 nodes. starts: the position of the first node."""
    start = tl.load(starts + batch)
    node = tl.minimum(tl.maximum(query - start, 0), nodes - 1)
    bits = tl.load(ancestors + batch * nodes + node)
    other = tl.minimum(tl.maximum(key - start, 0), 63).to(tl.int64)
    return (key < start) | (((bits >> other) & 1) != 0)
