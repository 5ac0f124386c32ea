"""Kernels as people have them: under autotuners, heuristics and wrappers, with constants that are no numbers."""

import triton
import triton.language as tl


class Wrapper:
    """What libraries wrap around kernels, with the kernel as ``fn``."""

    def __init__(self, fn):
        self.fn = fn


def zero(arguments):
    """A pre_hook, which nobody calls here."""


CONFIGS = [
    triton.Config({"BLOCK": 128}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK": 256}, num_warps=8, num_stages=3, maxnreg=64),
    triton.Config({"BLOCK": 256}, num_warps=8, num_stages=3, pre_hook=zero),
]


@triton.jit
def double(x):
    return x + x


@triton.jit
def negate(x):
    return -x


@triton.jit
def plain(X, Y, n, bias, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr):
    """Y = X + bias."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EVEN:
        x = tl.load(X + i)
    else:
        x = tl.load(X + i, mask=i < n)
    if HAS_BIAS:
        x += tl.load(bias + i, mask=i < n)
    tl.store(Y + i, x, mask=i < n)


tuned = triton.autotune(configs=CONFIGS, key=["n"])(plain)
guessed = triton.heuristics(
    {
        "HAS_BIAS": lambda args: args["bias"] is not None,
        "EVEN": lambda args: args["n"] % args["BLOCK"] == 0,
    }
)(plain)
nested = Wrapper(triton.autotune(configs=CONFIGS, key=["n"])(guessed))
computed = triton.heuristics(
    {
        "BLOCK": lambda args: 64 * args["X"].element_size(),
        "HAS_BIAS": lambda args: args["bias"] is not None,
        "EVEN": lambda args: args["BLOCK"] == 256,
        "num_warps": lambda args: args["BLOCK"] // 32,
    }
)(plain)
unknown_option = triton.autotune(configs=[triton.Config({"BLOCK": 128, "waves_per_eu": 2})], key=[])(plain)


@triton.autotune(configs=[triton.Config({"M": 64, "N": 64}, num_ctas=2), triton.Config({"M": 64, "N": 64})], key=[])
@triton.jit
def transpose(X, Y, m, n, M: tl.constexpr, N: tl.constexpr):
    """Y = X transposed, [m, n] to [n, m]."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    mask = (rows[:, None] < m) & (columns[None, :] < n)
    x = tl.load(X + rows[:, None] * n + columns[None, :], mask=mask)
    tl.store(Y + columns[:, None] * m + rows[None, :], x.T, mask=mask.T)


@triton.jit
def typed(
    X,
    Y,
    n,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr = tl.float16,
    SHAPE: tl.constexpr = (2, 3),
    APPLY: tl.constexpr = double,
    EXTRA: tl.constexpr = None,
):
    """Y = APPLY(X in DTYPE) + the product of SHAPE + EXTRA."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = APPLY(tl.load(X + i, mask=i < n).to(DTYPE)) + SHAPE[0] * SHAPE[1]
    if EXTRA is not None:
        x += EXTRA
    tl.store(Y + i, x, mask=i < n)


@triton.jit
def strided(X, Y, sizes, strides, n, BLOCK: tl.constexpr):
    """Y[i] = X[i] for i below both sizes, X and Y with strides."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (i < sizes[0]) & (i < sizes[1][0]) & (i < n)
    tl.store(Y + i * strides[1], tl.load(X + i * strides[0], mask=mask), mask=mask)


@triton.jit
def gather(pointers, Y, n, BLOCK: tl.constexpr):
    """Y = the sum of a tuple of tensors."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for index in tl.static_range(len(pointers)):
        total += tl.load(pointers[index] + i, mask=i < n)
    tl.store(Y + i, total, mask=i < n)


@triton.jit
def described(X, Y, m, n, M: tl.constexpr, N: tl.constexpr):
    """Y = X, [m, n], by tensor descriptors that are made on the device."""
    source = tl.make_tensor_descriptor(X, [m, n], [n, 1], [M, N])
    target = tl.make_tensor_descriptor(Y, [m, n], [n, 1], [M, N])
    row, column = tl.program_id(0) * M, tl.program_id(1) * N
    target.store([row, column], source.load([row, column]))


@triton.jit
def _private(X):
    tl.store(X, 1.0)


@triton.jit
def exp(X):
    tl.store(X, 2.0)


@triton.jit
def register(X):
    tl.store(X, 3.0)


@triton.jit
def pyfmha_mine(X):
    tl.store(X, 4.0)


@triton.autotune(
    configs=[triton.Config({"BLOCK_K": 32}, num_stages=2), triton.Config({"BLOCK_K": 512}, num_stages=2)], key=[]
)
@triton.jit
def product(A, B, C, n, k, BLOCK_K: tl.constexpr):
    """C = A @ B, one block of 64 by 64; with a large BLOCK_K it needs more shared memory than most GPUs have."""
    rows, inner = tl.arange(0, 64), tl.arange(0, BLOCK_K)
    total = tl.zeros((64, 64), tl.float32)
    for start in range(0, k, BLOCK_K):
        a = tl.load(A + rows[:, None] * k + (start + inner)[None, :])
        b = tl.load(B + (start + inner)[:, None] * n + rows[None, :])
        total = tl.dot(a, b, total)
    tl.store(C + rows[:, None] * n + rows[None, :], total)
