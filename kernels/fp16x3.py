"""float32 matrix products by three products of fp16, for tensor cores whose fp16 is faster than their tf32.

x is scaled by a power of two, so that the largest element of its block is just below 2**15, and then written as high +
low, the nearest fp16 to x and to what is left: 22 bits, as tf32x3 has (Ootomo and Yokota, "Recovering single precision
accuracy from Tensor Cores while exceeding the FP32 theoretical peak performance", 2022). a . b is then low . high +
high . low + high . high; low . low is below what float32 holds.

fp16 ends at 2**-24, so an element is off by 2**-23 of itself or by 2**-39 of the largest in its block, whichever is
more. The latter shows where elements that matter are 2**16 times smaller than one that does not, as when a channel is
large in K and small in Q. Scores that could suffer become NaN (scaled_scores), rows of the result are told by
precise_rows; the caller computes them in another way. So the error of a row, relative to its norm, is float32's, but
where nearly all of n keys have weights of less than some 2**-30 of the largest, whose value is 2**-15 of theirs: up to
n * 2**-24. That of a single element of a row may be 2**-39 of the largest value seen besides.

An exponent here is the biased one of float32, of the largest element of a block: e stands for elements below
2**(e - 126), which 2**(141 - e) brings below 2**15. 255 is that of a block with NaN or infinity.
"""

import triton
import triton.language as tl

# The exponent of blocks of zeros, and of all that is so small. The inverse of its scale is the least power of two.
LEAST_EXPONENT: tl.constexpr = tl.constexpr(15)
# Weights are at most 2**14: they need no scale.
SHIFT: tl.constexpr = tl.constexpr(-14.0)
# The exponent of what one unit of a product of scaled blocks may be worth in the score, in units of log2. Two elements
# have a product of at most 2**30 units; at the limit that is a score of 2**17. One is off by at most 2**-25, which is
# multiplied by up to 2**15 of the other: at worst 2**-23 of a score for each channel; some 2**-20 for all together.
LARGEST_UNIT: tl.constexpr = tl.constexpr(127 + 17 - 30)
# 2**60: a soft cap beyond it does what this one does to the scores that the fast loop accepts.
LARGEST_CAP: tl.constexpr = tl.constexpr(1.152921504606847e18)


@triton.jit
def magnitude(x):
    """The bits of x without its sign: ordered as the floats are, NaN and infinity above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def exponent_of(blocks):
    """The exponent of the largest element of a tuple of blocks of one shape, at least LEAST_EXPONENT."""
    largest = magnitude(blocks[0])
    for i in tl.static_range(1, len(blocks)):
        largest = tl.maximum(largest, magnitude(blocks[i]))
    return tl.maximum(tl.max(largest) >> 23, LEAST_EXPONENT)


@triton.jit
def power(field):
    """2**(field - 127), for 1 to 254; 0 for 0."""
    return (field << 23).to(tl.float32, bitcast=True)


@triton.jit
def parts(x):
    """x, below 2**15 in size, as the sum of two fp16. NaN and infinity give NaN."""
    high = x.to(tl.float16)
    low = (x - high.to(tl.float32)).to(tl.float16)
    return high, low


@triton.jit
def scaled_parts(x, exponent):
    """The parts of x * 2**(141 - exponent)."""
    return parts(x * power(268 - exponent))


@triton.jit
def multiply(a_high, a_low, b_high, b_low):
    """a . b, the least products first."""
    product = tl.dot(a_low, b_high)
    product = tl.dot(a_high, b_low, product)
    return tl.dot(a_high, b_high, product)


@triton.jit
def exponent_field(x):
    """The biased exponent of x, not negative."""
    return x.to(tl.int32, bitcast=True) >> 23


@triton.jit
def significand(x):
    """x, positive and normal, divided by 2**(x's exponent - 127): 1 to 2."""
    return ((x.to(tl.int32, bitcast=True) & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def prepare(q, scale, bend):
    """The parts of q, and what the loop takes for unit, largest_unit, scale and bend.

    A score in units of log2 is scale * q . k, or scale * tanh(bend * q . k) where bend > 0. Of what multiplies q . k
    only the significand stays; its exponent goes into the unit, so that no product of powers leaves float32.
    """
    capped = bend > 0
    if capped:  # a larger cap would make much of products whose units are too small to be told apart
        bend *= tl.where(scale > LARGEST_CAP, scale / LARGEST_CAP, 1.0)
        scale = tl.minimum(scale, LARGEST_CAP)
    q_exponent = exponent_of((q,))
    factor_exponent = exponent_field(tl.where(capped, bend, scale))
    # A factor without exponent, 0 or nearly, and queries that are not finite are left to the safe loop.
    largest_unit = tl.where((factor_exponent > 0) & (q_exponent < 255), LARGEST_UNIT, -1024)
    # The error of a product counts as much as what it becomes in the score.
    largest_unit -= tl.where(capped, exponent_field(scale) - 127, 0)
    fast_scale = tl.where(capped, scale, significand(scale))
    fast_bend = tl.where(capped, significand(bend), 0.0)
    return scaled_parts(q, q_exponent), q_exponent + factor_exponent - 282, largest_unit, fast_scale, fast_bend


@triton.jit
def scaled_scores(q_high, q_low, k, unit, largest_unit):
    """q . k.T in scaled numbers, and their unit: a power of two, NaN where it is beyond largest_unit or k not finite.

    unit and largest_unit are biased exponents; of the former only k's is still missing.
    """
    exponent = exponent_of((k,))
    high, low = scaled_parts(k, exponent)
    product = multiply(q_high, q_low, tl.trans(high), tl.trans(low))
    unit += exponent
    precise = (unit <= largest_unit) & (exponent < 255)
    # The least power of two instead of a lesser one: both make scores of less than 2**-88, or with a cap of 2**-28.
    return product, tl.where(precise, power(tl.maximum(unit, 1)), float("nan"))


@triton.jit
def add_weighted(acc, alpha, p, v, exponent):
    """acc * alpha + p . v, where acc is in units of 2**(exponent - 141); also the exponent afterwards, never less.

    acc and v are tuples, of columns side by side.
    """
    larger = tl.maximum(exponent, exponent_of(v))
    p_high, p_low = parts(p)
    factor = alpha * power(tl.maximum(127 + exponent - larger, 0))
    sums = ()
    for part in tl.static_range(len(v)):
        v_high, v_low = scaled_parts(v[part], larger)
        # Not by tl.dot into acc: tensor cores cut sums off instead of rounding them, which over 8192 keys is 3e-5.
        sums += (acc[part] * factor[:, None] + multiply(p_high, p_low, v_high, v_low),)
    return sums, larger


@triton.jit
def precise_rows(acc, row_sum, exponent, head_size):
    """Rows of finite sums whose mean element is at least one unit of v, 2**-15 of the largest that v can have there.

    v is off by at most 2**-25 of a unit, weights by 2**-39 of the largest: 2**-24 of a unit for each key of little
    weight. Where v is so small that its scale has no bits to lose, all rows will do.
    """
    total = tl.sum(tl.abs(acc[0]), 1)
    for part in tl.static_range(1, len(acc)):
        total += tl.sum(tl.abs(acc[part]), 1)
    return (total >= row_sum * head_size) | (exponent == LEAST_EXPONENT)
