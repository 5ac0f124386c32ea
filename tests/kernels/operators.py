"""Kernels with their descriptions, for the tests of plugins that are not attention."""

import triton
import triton.language as tl

import pyfmha


@triton.jit
def bias_gelu(x, bias, y, n, cols, scale, BLOCK: tl.constexpr):
    """Y = gelu(scale * (X + Bias)) by its sigmoid."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, at < n, 0.0).to(tl.float32) + tl.load(bias + at % cols, at < n, 0.0).to(tl.float32)
    value = value * scale
    tl.store(y + at, (value * tl.sigmoid(1.702 * value)).to(y.dtype.element_ty), at < n)


@triton.jit
def row_sums(x, sums, rows, cols, BLOCK: tl.constexpr):
    """Sums = the sum of each row."""
    row = tl.program_id(0)
    total = 0.0
    for start in range(0, cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x + row * cols + at, at < cols, 0.0))
    tl.store(sums + row, total)


@triton.jit
def centre(x, sums, y, rows, cols, BLOCK: tl.constexpr):
    """Y = X less each row's mean."""
    row = tl.program_id(0)
    mean = tl.load(sums + row) / cols
    for start in range(0, cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(y + row * cols + at, tl.load(x + row * cols + at, at < cols, 0.0) - mean, at < cols)


@triton.jit
def centre_and_tell(x, sums, y, means, rows, cols, BLOCK: tl.constexpr):
    """As ``centre``; Means holds what was subtracted."""
    centre(x, sums, y, rows, cols, BLOCK)
    row = tl.program_id(0)
    tl.store(means + row, tl.load(sums + row) / cols)


@triton.jit
def place(x, index, y, n, cols, first, weight, steps, BLOCK: tl.constexpr):
    """Y[Index[i]] = weight * X[i], from row ``first`` on."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = first + steps * tl.load(index + at // cols, at < n, 0)
    tl.store(y + row * cols + at % cols, weight * tl.load(x + at, at < n, 0.0), at < n)


BIAS_GELU = pyfmha.Operator(
    name="BiasGelu",
    version="3",
    namespace="acme",
    inputs={"X": "T[rows, cols]", "Bias": "T[cols]"},
    outputs={"Y": "T[rows, cols]"},
    types={"T": ("fp16", "fp32")},
    attributes={"scale": pyfmha.Attribute("fp32", 1.0, minimum=0)},
    launches=[
        pyfmha.Launch(
            kernel=bias_gelu,
            arguments={"x": "X", "bias": "Bias", "y": "Y", "n": "rows * cols", "cols": "cols", "scale": "scale"},
            grid="cdiv(n, BLOCK)",
            configs=[pyfmha.Config({"BLOCK": 512}, num_warps=4), pyfmha.Config({"BLOCK": 256}, num_warps=2)],
        )
    ],
)

_SIZES = {"rows": "rows", "cols": "cols"}
_BLOCK = {"BLOCK": 256}

CENTRE = pyfmha.Operator(
    name="Centre",
    namespace="acme",
    inputs={"X": "fp32[rows, cols]"},
    outputs={"Y": "fp32[rows, cols]", "Means": "fp32[rows] when tell == 1"},
    attributes={"tell": pyfmha.Attribute("int32", 0, choices=(0, 1))},
    workspace={"Sums": "4 * rows"},
    launches=[
        pyfmha.Launch({"x": "X", "sums": "Sums", **_SIZES}, kernel=row_sums, grid="rows", constants=_BLOCK),
        pyfmha.Launch(
            {"x": "X", "sums": "Sums", "y": "Y", **_SIZES}, "tell == 0", kernel=centre, grid="rows", constants=_BLOCK
        ),
        pyfmha.Launch(
            {"x": "X", "sums": "Sums", "y": "Y", "means": "Means", **_SIZES},
            "tell == 1",
            kernel=centre_and_tell,
            grid="rows",
            constants=_BLOCK,
        ),
    ],
    summary={"": "centre", "tell == 1": " and tell"},
    shape_summary={"": "{rows} rows of {cols}"},
)

PLACE = pyfmha.Operator(
    name="Place",
    namespace="acme",
    inputs={"X": "fp32[n, cols]", "Index": "int32[n]", "Shape": "shape[2]"},
    outputs={"Y": "fp32[Shape[0], Shape[1] + cols, Shape[1]]"},
    attributes={
        "weights": pyfmha.Attribute("fp32[]", minimum=0),
        "steps": pyfmha.Attribute("int32[]", "[1, 2]"),
        "wide": "int64 = 1",
    },
    checks=[
        pyfmha.Check("len(weights) > 0", "weights are {len(weights)}; give 1 or more"),
        pyfmha.Check("Shape[0] >= n", "{Shape[0]} rows have no place for {n}"),
    ],
    launches=[
        pyfmha.Launch(
            {
                "x": "X",
                "index": "Index",
                "y": "Y",
                "n": "n * cols",
                "cols": "cols",
                "first": "Shape[0] - n",
                "weight": "weights[len(weights) - 1] * wide",
                "steps": "steps[1]",
            },
            kernel=place,
            grid="cdiv(n, BLOCK)",
            constants=_BLOCK,
        )
    ],
)
