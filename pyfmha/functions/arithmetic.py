"""What score functions may call besides Triton's language, so that kernels know what it is.

@pyfmha.score_function
def soft(score, batch, head, query, key, caps):
    return pyfmha.soft_cap(score, tl.load(caps + head))
"""

import triton
import triton.language as tl

SMALL: tl.constexpr = tl.constexpr(0.55)
"""Up to there a polynomial is nearer to tanh than a quotient of powers."""


@triton.jit
def soft_cap(score, cap):
    """cap * tanh(score / cap), off by some 2**-23 of itself; in float64 if score is.

    A function that returns it of its score, with a cap that reads neither score nor query nor key, has the speed of
    attention's own soft cap on Hopper.

    Args:
        score: of any shape.
        cap: a number above 0.
    """
    x = score * (1.0 / tl.cast(cap, score.dtype))
    size = tl.abs(x)
    power = tl.exp2(size * -2.8853900817779268)
    found = (1.0 - power) / (1.0 + power)
    found = tl.where(x < 0, -found, found)
    if score.dtype != tl.float64:
        square = x * x
        inner = ((-0.00625959 * square + 0.02106191) * square - 0.05385009) * square + 0.13332567
        inner = inner * square - 0.33333317
        found = tl.where(size < SMALL, x + x * square * inner, found)
    return cap * found
