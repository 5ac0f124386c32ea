"""T5's relative bias: one number for each head and bucket of distances, the buckets growing with the distance.

Raffel et al. (2020), section 2.1, and `T5Attention._relative_position_bucket` of Hugging Face's transformers: half of
the buckets of a direction are for single distances, the others logarithmic up to `furthest`.
"""

import numpy as np
import triton
import triton.language as tl

from pyfmha.functions import score_function


@triton.jit
def bucket_of(distance, buckets, furthest):
    """The bucket of a distance that is not negative, of as many."""
    exact = buckets // 2
    ratio = tl.log2(tl.maximum(distance, 1).to(tl.float32) / exact) / tl.log2(furthest.to(tl.float32) / exact)
    # A little more, lest the rounded logarithm of a power fall into the bucket below.
    large = exact + (ratio * (buckets - exact) + 1e-5).to(tl.int32)
    return tl.where(distance < exact, distance, tl.minimum(large, buckets - 1))


def example(batch, heads, q_len, kv_len):
    table = np.random.default_rng(0).standard_normal((32, heads)).astype(np.float32)
    return {"table": table, "heads": heads, "buckets": 32, "furthest": 128}


@score_function(
    example=example,
    inputs={"table": "*fp32[buckets, heads]"},
    relative=True,
    requires=("buckets >= 4", "4 * furthest > buckets"),
)
def t5(score, batch, head, query, key, table, heads, buckets, furthest):
    """An encoder's, of both directions. table: the weight of T5's embedding; buckets: 32 of T5's;
    furthest: 128 of T5's."""
    half = buckets // 2
    bucket = tl.where(key > query, half, 0) + bucket_of(tl.abs(key - query), half, tl.cast(furthest, tl.int32))
    return score + tl.load(table + bucket * heads + head)


@score_function(
    example=example,
    inputs={"table": "*fp32[buckets, heads]"},
    relative=True,
    requires=("buckets >= 2", "2 * furthest > buckets"),
)
def t5_causal(score, batch, head, query, key, table, heads, buckets, furthest):
    """A decoder's, which looks back only; its mask is causal attention's business."""
    bucket = bucket_of(tl.maximum(query - key, 0), buckets, tl.cast(furthest, tl.int32))
    return score + tl.load(table + bucket * heads + head)
