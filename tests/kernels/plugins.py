"""Three operators that are not attention, with small kernels: what they compute matters less than what they take."""

import triton
import triton.language as tl

import pyfmha


@triton.jit
def bias_gelu(X, Bias, Y, rows, cols, scale, BLOCK: tl.constexpr):
    """Y = gelu(scale * (X + Bias)), by its quick approximation."""
    row, i = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (i < cols) & (row < rows)
    at = row.to(tl.int64) * cols + i
    x = scale * (tl.load(X + at, mask=mask).to(tl.float32) + tl.load(Bias + i, mask=mask).to(tl.float32))
    tl.store(Y + at, (x * tl.sigmoid(1.702 * x)).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def weigh(X, Mask, Parts, n, weight, step, BLOCK: tl.constexpr):
    """Parts = weight * X, where there is no mask or it is not 0."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(X + i, mask=mask).to(tl.float32) * weight + step
    if Mask is not None:
        x = tl.where(tl.load(Mask + i, mask=mask, other=0) != 0, x, 0.0)
    tl.store(Parts + i, x, mask=mask)


@triton.jit
def collect(Y, Parts, Total, rows, cols, scale, BLOCK: tl.constexpr):
    """Y = scale * Parts, and its sum."""
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    mask = (i < cols) & (row < rows)
    x = scale * tl.load(Parts + row * cols + i, mask=mask, other=0.0)
    tl.store(Y + row * cols + i, x, mask=mask)
    if Total is not None:
        tl.store(Total + row, tl.sum(x))


@triton.jit
def spread(n, level, Index, X, first, Y, Z, BLOCK: tl.constexpr):
    """Integers in front of pointers and between them, of 64 and of 32 bits."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    at = tl.load(Index + i % 8, mask=mask, other=0)
    x = tl.load(X + at, mask=mask)
    tl.store(Y + i, x + level.to(tl.float32).to(tl.float16), mask=mask)
    tl.store(Z + i, at + first, mask=mask)


BIAS_GELU = pyfmha.Operator(
    name="BiasGelu",
    namespace="acme",
    inputs={"X": "T[rows, cols]", "Bias": "T[cols]"},
    outputs={"Y": "T[rows, cols]"},
    types={"T": ("fp16", "bf16", "fp32")},
    attributes={"scale": "fp32 = 1.0"},
    launches=[
        pyfmha.Launch(
            kernel=bias_gelu,
            arguments={"X": "X", "Bias": "Bias", "Y": "Y", "rows": "rows", "cols": "cols", "scale": "scale"},
            constants={"BLOCK": 128},
            grid="rows, cdiv(cols, BLOCK)",
        )
    ],
)

BLEND = pyfmha.Operator(
    name="Blend",
    version="2",
    inputs=[
        pyfmha.Tensor("X", ("T[batch, cols]", "T[batch, 1, cols]")),
        pyfmha.Tensor("Mask", "int32[batch, cols]", when="masked"),
    ],
    outputs=[pyfmha.Tensor("Y", "fp32[batch, cols]"), pyfmha.Tensor("Total", "fp32[batch]", when="outputs > 1")],
    types={"T": pyfmha.Types(("fp16", "fp32"))},
    attributes={
        "weights": "fp32[]",
        "steps": "int32[] = [1, 2]",
        "mode": pyfmha.Attribute("string", "mean", choices=("mean", "sum", "it's")),
        "name": pyfmha.Attribute("string", "=mode"),
        "masked": pyfmha.Attribute("int32", 0, choices=(0, 1)),
        "outputs": pyfmha.Attribute("int32", 1, minimum=1, maximum=2),
        "most": pyfmha.Attribute("int64", 1 << 40, minimum=1),
        "spare": pyfmha.Attribute("fp32", "0.5 * outputs", minimum=0.0),
    },
    define={"how": "mode", "factor": "1.0 if how == 'sum' else weights[0]", "elements": "batch * cols"},
    checks=[
        pyfmha.Check("len(weights) > 0", "weights is empty; give one or more"),
        pyfmha.Check("len(steps) <= 4 and steps[0] >= 0", "steps are {len(steps)}, the first {steps[0]}; give up to 4"),
        pyfmha.Check("elements <= most", "{elements} elements, {how:r} serves {most}"),
    ],
    launches=[
        pyfmha.Launch(
            kernel=weigh,
            arguments={
                "X": "X",
                "Mask": "Mask if masked else null",
                "Parts": "parts",
                "n": "elements",
                "weight": "weights[0]",
                "step": "steps[0]",
            },
            configs=[pyfmha.Config({"BLOCK": 128}), pyfmha.Config({"BLOCK": 256}, num_warps=8)],
            grid="cdiv(n, BLOCK)",
        ),
        pyfmha.Launch(
            kernel=collect,
            arguments={
                "Y": "Y",
                "Parts": "parts",
                "Total": "Total if outputs > 1 else spare_parts + 4 * batch",
                "rows": "batch",
                "cols": "cols",
                "scale": "factor / cols if how == 'mean' else factor",
            },
            constants={"BLOCK": 64},
            grid="rows",
            when='elements > 0 and how != "it\'s"',
        ),
    ],
    workspace=[
        pyfmha.Part("parts", "4 * batch * cols"),
        pyfmha.Part("spare_parts", "8 * batch", when="outputs == 1"),
    ],
    workspace_of_profile="4 * batch * cols + 4 * least(batch)",
)

SPREAD = pyfmha.Operator(
    name="Spread",
    namespace="acme.more",
    inputs={
        "X": "fp16[a, b, c, d, e, 2, f, g]",
        "Index": "int32[a + b]",
        "Twice": "int32[2 * h + 1]",
        "Sizes": "shape[2]",
    },
    outputs={"Y": "fp16[a * b, d // 2, cdiv(e, 3), Sizes[0]]", "Z": "int32[Sizes[1], min(f, g) - 1, h % 4, c / 2]"},
    attributes={"level": pyfmha.Attribute("int64", 7, minimum=-(1 << 62))},
    launches=[
        pyfmha.Launch(
            kernel=spread,
            arguments={
                "n": "numel(Y)",
                "level": "level",
                "Index": "Index",
                "X": "X",
                "first": "stride(X, 0)",
                "Y": "Y",
                "Z": "Z",
            },
            scalars={"n": "i64", "level": "i64"},
            constants={"BLOCK": 128},
            grid="cdiv(n, BLOCK)",
        )
    ],
)
