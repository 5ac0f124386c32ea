"""Kernels of ten kinds that people have, with the descriptions that they would write first.

What each asks of the language stands with its description; what the kernels compute is plain.
"""

import triton
import triton.language as tl

import pyfmha


@triton.jit
def layer_norm(x, weight, bias, y, mean, hidden, eps, BLOCK: tl.constexpr):
    """Rows less their mean, over their deviation; weighted and shifted where there is something to do it with."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < hidden
    value = tl.load(x + row * hidden + at, inside, 0.0).to(tl.float32)
    middle = tl.sum(value) / hidden
    value = tl.where(inside, value - middle, 0.0)
    value = value / tl.sqrt(tl.sum(value * value) / hidden + eps)
    if weight is not None:
        value *= tl.load(weight + at, inside, 0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + at, inside, 0.0).to(tl.float32)
    if mean is not None:
        tl.store(mean + row, middle)
    tl.store(y + row * hidden + at, value.to(y.dtype.element_ty), inside)


LAYER_NORM = pyfmha.Operator(
    "LayerNorm",
    {
        "X": "T[batch, seq, hidden]",
        "Weight": "P[hidden] when affine == 'both' or affine == 'weight'",
        "Bias": "P[hidden] when affine == 'both'",
    },
    {"Y": "T[batch, seq, hidden]", "Mean": "fp32[batch, seq] when tell"},
    [
        pyfmha.Launch(
            kernel=layer_norm,
            arguments={
                "x": "X", "weight": "Weight", "bias": "Bias", "y": "Y", "mean": "Mean", "hidden": "hidden", "eps": "eps"
            },
            when=f"hidden > {low} and hidden <= {high}",
            constants={"BLOCK": high},
            grid="batch * seq",
        )
        for low, high in ((-1, 128), (128, 1024))
    ],
    types={"T": ("fp16",), "P": ("fp32", "fp16")},
    attributes={
        "eps": pyfmha.Attribute("fp32", 1e-5, minimum=0),
        "affine": pyfmha.Attribute("string", "both", choices=("both", "weight", "none")),
        "tell": pyfmha.Attribute("int32", 0, choices=(0, 1)),
    },
    checks=[pyfmha.Check("hidden <= 1024", "hidden is {hidden}; 1 to 1024 are served")],
)  # fmt: skip


@triton.jit
def top_one(x, values, indices, cols, BLOCK: tl.constexpr):
    """Of each row the largest element and its place."""
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    value = tl.load(x + row * cols + at, at < cols, float("-inf"))
    tl.store(values + row, tl.max(value, 0))
    tl.store(indices + row, tl.argmax(value, 0))


TOP_ONE = pyfmha.Operator(
    "TopOne",
    {"X": "T[rows, cols]"},
    {"Values": "T[rows, 1]", "Indices": "int32[rows, 1]"},
    [
        pyfmha.Launch(
            kernel=top_one,
            arguments={"x": "X", "values": "Values", "indices": "Indices", "cols": "cols"},
            constants={"BLOCK": 256},
            grid="rows",
        )
    ],
    types={"T": ("fp32",)},
    checks=[pyfmha.Check("1 <= cols <= 256", "cols is {cols}; 1 to 256 are served")],
)


@triton.jit
def split_product(a, b, parts, m, n, k, each, stride_am, stride_ak, BLOCK: tl.constexpr):
    """Of each split its share of the sum over k."""
    row, col, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at_m, at_n, at_k = row * BLOCK + tl.arange(0, BLOCK), col * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(split * each, min(k, (split + 1) * each), BLOCK):
        of = start + at_k
        left = tl.load(a + at_m[:, None] * stride_am + of[None] * stride_ak, (at_m[:, None] < m) & (of[None] < k), 0.0)
        right = tl.load(b + of[:, None] * n + at_n[None], (of[:, None] < k) & (at_n[None] < n), 0.0)
        total += tl.dot(left, right)
    where = split.to(tl.int64) * m * n + at_m[:, None] * n + at_n[None]
    tl.store(parts + where, total, (at_m[:, None] < m) & (at_n[None] < n))


@triton.jit
def add_parts(parts, c, count, splits, BLOCK: tl.constexpr):
    """The sum of the splits."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        total += tl.load(parts + split.to(tl.int64) * count + at, at < count, 0.0)
    tl.store(c + at, total.to(c.dtype.element_ty), at < count)


SPLIT_K = pyfmha.Operator(
    "SplitK",
    {"A": "T[m, k]", "B": "T[k, n]"},
    {"C": "T[m, n]"},
    [
        pyfmha.Launch(
            kernel=split_product,
            arguments={
                "a": "A", "b": "B", "parts": "Parts", "m": "m", "n": "n", "k": "k", "each": "cdiv(k, splits)",
                "stride_am": "stride(A, 0)", "stride_ak": "stride(A, 1)",
            },
            constants={"BLOCK": 16},
            grid="cdiv(m, BLOCK), cdiv(n, BLOCK), splits",
        ),
        pyfmha.Launch(
            kernel=add_parts,
            arguments={"parts": "Parts", "c": "C", "count": "m * n", "splits": "splits"},
            constants={"BLOCK": 128},
            grid="cdiv(count, BLOCK)",
        ),
    ],
    types={"T": ("fp16",)},
    attributes={"most": pyfmha.Attribute("int32", 8, minimum=1, maximum=64)},
    define={"splits": "max(1, min(most, k // 64))"},
    workspace={"Parts": "itemsize(fp32) * splits * m * n"},
)  # fmt: skip


@triton.jit
def gather(table, indices, y, dim, rows, scale, BLOCK: tl.constexpr):
    """Rows of a table by their numbers; zeros for numbers that it has not."""
    token, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices + token).to(tl.int64)
    known = (index >= 0) & (index < rows) & (at < dim)
    value = tl.load(table + index * dim + at, known, 0.0)
    tl.store(y + token * dim + at, (value * scale).to(y.dtype.element_ty), at < dim)


EMBEDDING = pyfmha.Operator(
    "Embedding",
    {"Table": "T[rows, dim]", "Indices": ("I[tokens]", "I[batch, seq]")},
    [
        pyfmha.Tensor("Flat", "T[tokens, dim]", "flat"),
        pyfmha.Tensor("Y", "T[batch, seq, dim]", "not flat"),
    ],
    [
        pyfmha.Launch(
            kernel=gather,
            arguments={
                "table": "Table", "indices": "Indices", "y": "Flat if flat else Y", "dim": "dim", "rows": "rows",
                "scale": "scale",
            },
            constants={"BLOCK": 128},
            grid="count, cdiv(dim, BLOCK)",
        )
    ],
    types={"T": ("fp16",), "I": ("int32", "int64")},
    attributes={"flat": pyfmha.Attribute("int32", 0, choices=(0, 1)), "scale": "fp32 = 1.0"},
    define={"count": "numel(Indices)"},
)  # fmt: skip


@triton.jit
def quantise(x, q, scale, cols, most, BLOCK: tl.constexpr):
    """Rows as integers of eight bits, and what to multiply them with."""
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    value = tl.load(x + row * cols + at, at < cols, 0.0).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(value)) / most, 1e-12)
    tl.store(scale + row, step)
    tl.store(q + row * cols + at, (value / step).to(tl.int8), at < cols)


QUANTISE = pyfmha.Operator(
    "Quantise",
    {"X": "T[rows, cols]"},
    {"Q": "int8[rows, cols]", "Scale": "fp32[rows, 1]"},
    [
        pyfmha.Launch(
            kernel=quantise,
            arguments={"x": "X", "q": "Q", "scale": "Scale", "cols": "cols", "most": "127.0 if bits == 8 else 7.0"},
            constants={"BLOCK": 512},
            grid="rows",
        )
    ],
    types={"T": ("fp16",)},
    attributes={"bits": pyfmha.Attribute("int32", 8, choices=(4, 8))},
)


@triton.jit
def conv(x, w, y, channels, length, outs, taps, stride, padding, dilation, long, BLOCK: tl.constexpr):
    """One output channel over a stretch of places."""
    batch, out, at = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for channel in range(0, channels):
        for tap in range(0, taps):
            place = at * stride + tap * dilation - padding
            value = tl.load(x + (batch * channels + channel) * length + place, (place >= 0) & (place < length), 0.0)
            total += value.to(tl.float32) * tl.load(w + (out * channels + channel) * taps + tap).to(tl.float32)
    tl.store(y + (batch * outs + out) * long + at, total.to(y.dtype.element_ty), at < long)


CONV = pyfmha.Operator(
    "Conv1d",
    {"X": "T[batch, groups * channels, length]", "W": "T[outs, channels, taps]"},
    {"Y": "T[batch, outs, (length + pads[0] + pads[1] - dilation * (taps - 1) - 1) // stride + 1]"},
    [
        pyfmha.Launch(
            kernel=conv,
            arguments={
                "x": "X", "w": "W", "y": "Y", "channels": "channels", "length": "length", "outs": "outs",
                "taps": "taps", "stride": "stride", "padding": "pads[0]", "dilation": "dilation", "long": "size(Y, 2)",
            },
            constants={"BLOCK": 64},
            grid="batch, outs, cdiv(long, BLOCK)",
        )
    ],
    types={"T": ("fp16",)},
    attributes={
        "stride": pyfmha.Attribute("int32", 1, minimum=1),
        "dilation": pyfmha.Attribute("int32", 1, minimum=1),
        "pads": pyfmha.Attribute("int32[]", "[0, 0]", minimum=0),
        "groups": pyfmha.Attribute("int32", 1, choices=(1,)),
    },
    checks=[pyfmha.Check("len(pads) == 2", "pads are {len(pads)}; give two")],
)  # fmt: skip


@triton.jit
def segment_sum(x, offsets, y, segments, dim, BLOCK: tl.constexpr):
    """Sums of rows from one offset to the next; zeros for segments that there are not."""
    segment, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if segment < segments:
        for row in range(tl.load(offsets + segment), tl.load(offsets + segment + 1)):
            total += tl.load(x + row * dim + at, at < dim, 0.0).to(tl.float32)
    tl.store(y + segment * dim + at, total.to(y.dtype.element_ty), at < dim)


SEGMENT_SUM = pyfmha.Operator(
    "SegmentSum",
    {"Count": "shape[1]", "X": "T[total, dim]", "Offsets": "int32[segments + 1]"},
    {"Y": "T[Count[0], dim]"},
    [
        pyfmha.Launch(
            kernel=segment_sum,
            arguments={"x": "X", "offsets": "Offsets", "y": "Y", "segments": "segments", "dim": "dim"},
            constants={"BLOCK": 64},
            grid="Count[0], cdiv(dim, BLOCK)",
        )
    ],
    types={"T": ("fp16",)},
    checks=[pyfmha.Check("segments <= Count[0]", "{segments} segments have no place in {Count[0]}")],
)


@triton.jit
def dropout(x, y, kept, n, p, seed, offset, BLOCK: tl.constexpr):
    """Elements kept with probability 1 - p, and which they are."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = tl.rand(seed, offset + at) > p
    value = tl.load(x + at, at < n, 0.0)
    tl.store(y + at, tl.where(keep, value / (1 - p), 0.0).to(y.dtype.element_ty), at < n)
    if kept is not None:
        tl.store(kept + at, keep, at < n)


DROPOUT = pyfmha.Operator(
    "Dropout",
    {"X": ("T[a]", "T[a, b]", "T[a, b, c]")},
    [pyfmha.Tensor("Y", "T[a]", "rank == 1"), pyfmha.Tensor("Y", "T[a, b]", "rank == 2"),
     pyfmha.Tensor("Y", "T[a, b, c]", "rank == 3"), pyfmha.Tensor("Kept", "bool[a, b]", "mask and rank == 2")],
    [
        pyfmha.Launch(
            kernel=dropout,
            arguments={"x": "X", "y": "Y", "kept": "Kept", "n": "numel(X)", "p": "p", "seed": "seed", "offset": "0"},
            scalars={"seed": "i64", "n": "i64"},
            constants={"BLOCK": 256},
            grid="cdiv(n, BLOCK)",
        )
    ],
    types={"T": ("fp16",)},
    attributes={
        "p": pyfmha.Attribute("fp32", 0.5, minimum=0.0, maximum=0.99),
        "seed": "int64 = 0",
        "rank": pyfmha.Attribute("int32", 2, choices=(1, 2, 3)),
        "mask": pyfmha.Attribute("int32", 0, choices=(0, 1)),
    },
)  # fmt: skip


@triton.jit
def moe_gate(logits, weights, experts, count, k, normalise, BLOCK: tl.constexpr):
    """The largest k of each row by turns, their softmax."""
    token, at = tl.program_id(0), tl.arange(0, BLOCK)
    value = tl.load(logits + token * count + at, at < count, float("-inf")).to(tl.float32)
    value = tl.exp(value - tl.max(value, 0))
    whole = tl.sum(value) if normalise else 1.0
    for turn in range(0, k):
        best = tl.argmax(value, 0)
        tl.store(weights + token * k + turn, tl.max(value, 0) / whole)
        tl.store(experts + token * k + turn, best)
        value = tl.where(at == best, -1.0, value)


MOE_GATE = pyfmha.Operator(
    "MoeGate",
    {"Logits": "T[tokens, experts]"},
    {"Weights": "fp32[tokens, k]", "Experts": "int32[tokens, k]"},
    [
        pyfmha.Launch(
            kernel=moe_gate,
            arguments={
                "logits": "Logits", "weights": "Weights", "experts": "Experts", "count": "experts", "k": "k",
                "normalise": "normalise",
            },
            constants={"BLOCK": 64},
            grid="tokens",
        )
    ],
    types={"T": ("fp16", "fp32")},
    attributes={"k": pyfmha.Attribute("int32", minimum=1, maximum=16), "normalise": "int32 = 1"},
    checks=[
        pyfmha.Check("k <= experts", "k is {k}, there are {experts} experts"),
        pyfmha.Check("experts <= 64", "{experts} experts; at most 64 are served"),
    ],
)  # fmt: skip
