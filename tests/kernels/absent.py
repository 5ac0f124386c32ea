"""Kernels that ask by ``is None`` whether a tensor is there, themselves or in a function; one under an autotuner."""

import triton
import triton.language as tl

import pyfmha
from pyfmha import Attribute, Launch, Operator


@triton.jit
def added(value, bias, at, inside):
    if bias is not None:
        value += tl.load(bias + at, inside, 0.0)
    return value


@triton.jit
def scaled(x, bias, scale, y, sums, n, BLOCK: tl.constexpr):
    """Y = (X + Bias) * Scale, and of each block its sum, as far as they are there."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = added(tl.load(x + at, inside, 0.0), bias, at, inside)
    if scale is None:
        value *= 2
    else:
        value *= tl.load(scale)
    tl.store(y + at, value, inside)
    if sums is not None:
        tl.store(sums + tl.program_id(0), tl.sum(tl.where(inside, value, 0.0), 0))


SCALED = Operator(
    "Scaled",
    {"X": "fp32[n]", "Bias": "fp32[n] when mode != 'plain'", "Scale": "fp32[1] when mode == 'both'"},
    {"Y": "fp32[n]", "Sums": "fp32[cdiv(n, 64)] when tell"},
    [
        Launch(
            kernel=scaled,
            arguments={"x": "X", "bias": "Bias", "scale": "Scale", "y": "Y", "sums": "Sums", "n": "n"},
            constants={"BLOCK": 64},
            grid="size(Y, 0) // BLOCK + (n % BLOCK + BLOCK - 1) // BLOCK",
        )
    ],
    attributes={
        "mode": Attribute("string", "plain", choices=("plain", "bias", "both")),
        "tell": Attribute("int32", 0, choices=(0, 1)),
    },
)


@triton.autotune(
    [triton.Config({"BLOCK": 64}, num_warps=2), triton.Config({"BLOCK": 128}, num_warps=8, num_stages=2)], key=["n"]
)
@triton.heuristics({"DOUBLE": lambda given: given["BLOCK"] > 64})
@triton.jit
def tuned(x, y, n, BLOCK: tl.constexpr, DOUBLE: tl.constexpr):
    """Y = X; a block of the larger ones in halves."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if DOUBLE:
        tl.store(y + at, tl.load(x + at, at < n, 0.0), (at < n) & (at % 2 == 0))
        tl.store(y + at, tl.load(x + at, at < n, 0.0), (at < n) & (at % 2 == 1))
    else:
        tl.store(y + at, tl.load(x + at, at < n, 0.0), at < n)


TUNED = pyfmha.Operator(
    "Tuned",
    {"X": "fp32[n]"},
    {"Y": "fp32[n]"},
    [Launch(kernel=tuned, arguments={"x": "X", "y": "Y", "n": "n"}, grid="cdiv(n, BLOCK)")],
)
