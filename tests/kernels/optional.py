"""Operators whose tensors, types and axes are there for some attributes only, and numbers that float32 rounds."""

import triton
import triton.language as tl

import pyfmha


@triton.jit
def add(x, bias, y, n, cols, BLOCK: tl.constexpr):
    """Y = X + Bias, where there is one."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, at < n, 0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + at % cols, at < n, 0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), at < n)


@triton.jit
def scaled(x, y, n, scale, shift, BLOCK: tl.constexpr):
    """Y = scale * X + shift."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < n, 0.0) * scale + shift, at < n)


_LAUNCH = pyfmha.Launch(
    kernel=add,
    arguments={"x": "X", "bias": "Bias", "y": "Y", "n": "numel(Y)", "cols": "size(Y, 1)"},
    constants={"BLOCK": 128},
    grid="cdiv(n, BLOCK)",
)
_T = ("fp16", "fp32")

OPTIONAL = pyfmha.Operator(
    "Optional",
    {"X": "T[rows, cols]", "Bias": "U[cols] when biased"},
    {"Y": "T[rows, cols]"},
    [_LAUNCH],
    types={"T": _T, "U": ("fp32", "bf16")},
    attributes={"biased": pyfmha.Attribute("int32", 0, choices=(0, 1))},
)

# Nobody tries 12 while these are read: what is not told then, the plugin finds.
_LEVEL = {"level": pyfmha.Attribute("int32", 0, minimum=0, maximum=20)}

UNTOLD_TYPE = pyfmha.Operator(
    "UntoldType",
    {"X": "T[rows, cols]", "Bias": "U[cols] when level * level != 144"},
    {"Y": "U[rows, cols]"},
    [_LAUNCH],
    types={"T": _T, "U": ("fp32", "bf16")},
    attributes=_LEVEL,
)

UNTOLD_AXIS = pyfmha.Operator(
    "UntoldAxis",
    {"X": "T[rows]", "Bias": "T[cols] when level * level != 144"},
    {"Y": "T[rows, cols]"},
    [_LAUNCH],
    types={"T": _T},
    attributes=_LEVEL,
)

ROUNDED = pyfmha.Operator(
    "Rounded",
    {"X": "fp32[n]"},
    {"Y": "fp32[n]"},
    [
        pyfmha.Launch(
            kernel=scaled,
            arguments={"x": "X", "y": "Y", "n": "n", "scale": "one", "shift": "product * 3 + weights[0] * far"},
            constants={"BLOCK": 128},
            grid="cdiv(n, BLOCK)",
        )
    ],
    attributes={
        "one": pyfmha.Attribute("fp32", 0.1, choices=(0.1, 0.3)),
        "other": pyfmha.Attribute("fp32", 0.7, minimum=0.1, maximum=0.7),
        "factor": pyfmha.Attribute("int32", 3, minimum=0, maximum=400_000_000),
        "product": "int32 = 7 * factor",
        "weights": pyfmha.Attribute("fp32[]", "[0.1, 0.2]", minimum=0.1),
    },
    define={"far": "other * 10000000.0"},
)
