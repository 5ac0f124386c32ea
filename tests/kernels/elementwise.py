"""Small kernels for tests, each with one thing that is hard to get right in an ahead-of-time library."""

import triton
import triton.language as tl


@triton.jit
def add(X, Y, Z, n, BLOCK: tl.constexpr):
    """Z = X + Y."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(Z + i, tl.load(X + i, mask=mask) + tl.load(Y + i, mask=mask), mask=mask)


@triton.jit
def subtract(X, Y, Z, n, BLOCK: tl.constexpr):
    """Z = X - Y: the prototype of ``add``, another kernel."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(Z + i, tl.load(X + i, mask=mask) - tl.load(Y + i, mask=mask), mask=mask)


@triton.jit
def scalars(OUT, half, brain, single, double, flag, tiny, small, wide, byte, word, long, n, WRITE: tl.constexpr = True):
    """One scalar of each type."""
    i = tl.program_id(0)
    if i < n:
        total = half.to(tl.float64) + brain.to(tl.float64) + single + double
        total += flag.to(tl.float64) + tiny + small + wide + byte + word + long.to(tl.float64)
        if WRITE:
            tl.store(OUT + i, total)


@triton.jit
def many(A, B, C, D, E, F, G, H, I, J, K, n, m, BLOCK: tl.constexpr):
    """Thirteen arguments: the suffixes of positions 0, 1, 10, 11 and 12 collide when glued together."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (i < n) & (i < m)
    total = (
        tl.load(A + i, mask=mask) + tl.load(B + i, mask=mask) + tl.load(C + i, mask=mask) + tl.load(D + i, mask=mask)
    )
    total += (
        tl.load(E + i, mask=mask) + tl.load(F + i, mask=mask) + tl.load(G + i, mask=mask) + tl.load(H + i, mask=mask)
    )
    total += tl.load(I + i, mask=mask) + tl.load(J + i, mask=mask)
    tl.store(K + i, total, mask=mask)


@triton.jit
def hinted(X, n, stride, step, BLOCK: tl.constexpr):
    """Integers that may carry :16 and :1."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(X + i * stride * step, i, mask=i < n)


@triton.jit
def words(
    register,
    stream,
    int64_t,
    uint16_t,
    scratch,
    refuse,
    images,
    kernels,
    half,
    half_bits,
    pyfmha_fail,
    size_t,
    BLOCK: tl.constexpr,
):
    """Arguments named as words of C, and as names of the generated code."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = (
        int64_t
        + uint16_t
        + scratch
        + refuse
        + images
        + kernels
        + half.to(tl.float32)
        + half_bits
        + pyfmha_fail
        + size_t
    )
    tl.store(register + i, value.to(tl.float32), mask=i < stream)


@triton.jit
def constants(X, n, OFFSET: tl.constexpr, SCALE: tl.constexpr, LABEL: tl.constexpr):
    """Constants that are negative, fractional and text."""
    i = tl.program_id(0)
    if LABEL == "on":
        tl.store(X + i, i * SCALE + OFFSET, mask=i < n)


@triton.jit
def volume(X, a, b, c):
    """A grid of three dimensions, free for any expression of 64-bit integers."""
    tl.store(X, a + b + c)
