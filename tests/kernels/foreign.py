"""Kernels in the forms that public collections give them, written anew, with what they are as operators.

A fused attention as PluginGen's example has it: L and M are scratch memory. A normalisation (RMS) of rows by their
strides, whose grid is rows that it is not told of. A gated activation (SiLU) whose number of columns is a constant. A
rotary embedding of the first dimensions of each head, by four strides.
"""

import triton
import triton.language as tl

import pyfmha


@triton.jit
def attention(Q, K, V, sm_scale, L, M, Out, batch, heads, seq, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Causal attention, [batch, heads, seq, SIZE]; L and M take each row's sum and maximum."""
    start, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, columns, dims = start * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, SIZE)
    base = head * seq * SIZE
    q = tl.load(Q + base + rows[:, None] * SIZE + dims[None], rows[:, None] < seq, 0.0)
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    found = tl.zeros((BLOCK, SIZE), tl.float32)
    for first in range(0, (start + 1) * BLOCK, BLOCK):
        at = first + columns
        k = tl.load(K + base + at[None] * SIZE + dims[:, None], at[None] < seq, 0.0)
        v = tl.load(V + base + at[:, None] * SIZE + dims[None], at[:, None] < seq, 0.0)
        scores = tl.where(at[None] <= rows[:, None], tl.dot(q, k) * sm_scale, float("-inf"))
        larger = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - larger[:, None])
        kept = tl.exp(most - larger)
        total = total * kept + tl.sum(weights, 1)
        found = found * kept[:, None] + tl.dot(weights.to(v.dtype), v)
        most = larger
    tl.store(L + head * seq + rows, total, rows < seq)
    tl.store(M + head * seq + rows, most, rows < seq)
    out = (found / total[:, None]).to(Out.dtype.element_ty)
    tl.store(Out + base + rows[:, None] * SIZE + dims[None], out, rows[:, None] < seq)


@triton.jit
def rms_norm(Y, Y_row_stride, X, X_row_stride, W, RSTD, n_cols, eps, offset, BLOCK_SIZE: tl.constexpr):
    """Y = X / rms(X) * (offset + W), row by row; RSTD = 1 / rms."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_SIZE)
    inside = columns < n_cols
    x = tl.load(X + row * X_row_stride + columns, inside, 0.0).to(tl.float32)
    w = tl.load(W + columns, inside, 0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x) / n_cols + eps)
    if RSTD is not None:
        tl.store(RSTD + row, rstd)
    tl.store(Y + row * Y_row_stride + columns, (x * rstd * (offset + w)).to(Y.dtype.element_ty), inside)


@triton.jit
def swiglu(a, b, c, stride, n_cols: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """C = A * sigmoid(A) * B, row by row."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_SIZE)
    inside = columns < n_cols
    x = tl.load(a + row * stride + columns, inside, 0.0).to(tl.float32)
    y = tl.load(b + row * stride + columns, inside, 0.0).to(tl.float32)
    tl.store(c + row * stride + columns, (x * tl.sigmoid(x) * y).to(c.dtype.element_ty), inside)


@triton.jit
def rotary(
    OUT,
    X,
    COS,
    SIN,
    OFFSETS,
    seqlen,
    nheads,
    seqlen_ro,
    stride_batch,
    stride_seqlen,
    stride_nheads,
    stride_headdim,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The first ROTARY_DIM of each head turned by the angle of its position, the halves against each other."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = rows
    if OFFSETS is not None:
        at += tl.load(OFFSETS + batch)
    half, dims = tl.arange(0, HALF), tl.arange(0, HEAD_DIM)
    known = (at[:, None] >= 0) & (at[:, None] < seqlen_ro)
    cos = tl.load(COS + at[:, None] * HALF + half[None], known, 1.0).to(tl.float32)
    sin = tl.load(SIN + at[:, None] * HALF + half[None], known, 0.0).to(tl.float32)
    base = batch * stride_batch + rows[:, None] * stride_seqlen + head * stride_nheads
    inside = rows[:, None] < tl.where(head < nheads, seqlen, 0)
    one = base + half[None] * stride_headdim
    x0 = tl.load(X + one, inside, 0.0).to(tl.float32)
    x1 = tl.load(X + one + HALF * stride_headdim, inside, 0.0).to(tl.float32)
    kept = base + dims[None] * stride_headdim
    rest = inside & (dims[None] >= ROTARY_DIM)
    tl.store(OUT + kept, tl.load(X + kept, rest, 0.0), rest)
    tl.store(OUT + one, (x0 * cos - x1 * sin).to(OUT.dtype.element_ty), inside)
    tl.store(OUT + one + HALF * stride_headdim, (x0 * sin + x1 * cos).to(OUT.dtype.element_ty), inside)


_SHAPE = "T[batch, heads, seq, 64]"

ATTENTION = pyfmha.Operator(
    "FusedAttention",
    {"Q": _SHAPE, "K": _SHAPE, "V": _SHAPE},
    {"Out": _SHAPE},
    [
        pyfmha.Launch(
            kernel=attention,
            arguments={name: name for name in ("Q", "K", "V", "sm_scale", "L", "M", "Out", "batch", "heads", "seq")},
            constants={"SIZE": 64},
            configs=[pyfmha.Config({"BLOCK": 64}, num_warps=4)],  # each more takes a second to compile
            grid="cdiv(seq, BLOCK), batch * heads",
        )
    ],
    namespace="foreign",
    types={"T": ("fp16",)},
    attributes={"sm_scale": "fp32 = 0.125"},
    workspace={"L": "4 * batch * heads * seq", "M": "4 * batch * heads * seq"},
)

WIDTHS = (64, 1024)
"""The norm's blocks: rows up to each."""

RMS_NORM = pyfmha.Operator(
    "RmsNorm",
    {"X": "T[batch, seq, hidden]", "W": "P[hidden]"},
    {"Y": "T[batch, seq, hidden]", "Rstd": "fp32[batch * seq] when tell"},
    [
        pyfmha.Launch(
            kernel=rms_norm,
            arguments={
                "Y": "Y",
                "Y_row_stride": "stride(Y, 1)",
                "X": "X",
                "X_row_stride": "stride(X, 1)",
                "W": "W",
                "RSTD": "Rstd",
                "n_cols": "hidden",
                "eps": "eps",
                "offset": "offset",
            },
            when=f"hidden > {smaller} and hidden <= {width}",
            constants={"BLOCK_SIZE": width},
            grid="batch * seq",  # of which the kernel is not told
        )
        for smaller, width in zip((0, *WIDTHS), WIDTHS, strict=False)
    ],
    namespace="foreign",
    types={"T": ("fp16",), "P": ("fp32",)},
    attributes={
        "eps": pyfmha.Attribute("fp32", 1e-6, minimum=0),
        "offset": "fp32 = 0.0",
        "tell": pyfmha.Attribute("int32", 0, choices=(0, 1)),
    },
    checks=[pyfmha.Check(f"hidden <= {WIDTHS[-1]}", f"hidden is {{hidden}}; at most {WIDTHS[-1]} are served")],
)

COLUMNS = (48, 96)
"""Of a gated activation: one function each."""

SWIGLU = pyfmha.Operator(
    "SwiGlu",
    {"Gate": "T[rows, cols]", "Up": "T[rows, cols]"},
    {"Y": "T[rows, cols]"},
    [
        pyfmha.Launch(
            kernel=swiglu,
            arguments={"a": "Gate", "b": "Up", "c": "Y", "stride": "stride(Y, 0)"},
            when=f"cols == {cols}",
            constants={"n_cols": cols, "BLOCK_SIZE": 128},
            grid="rows",
        )
        for cols in COLUMNS
    ],
    namespace="foreign",
    types={"T": ("fp16",)},
    checks=[
        pyfmha.Check(
            " or ".join(f"cols == {cols}" for cols in COLUMNS),
            f"cols is {{cols}}; served are {', '.join(map(str, COLUMNS))}",
        )
    ],
)

ROTARY = pyfmha.Operator(
    "Rotary",
    {
        "X": "T[batch, seq, heads, 64]",
        "Cos": "fp32[positions, 16]",
        "Sin": "fp32[positions, 16]",
        "Offsets": "int32[batch] when offsets",
    },
    {"Y": "T[batch, seq, heads, 64]"},
    [
        pyfmha.Launch(
            kernel=rotary,
            arguments={
                "OUT": "Y",
                "X": "X",
                "COS": "Cos",
                "SIN": "Sin",
                "OFFSETS": "Offsets",
                "seqlen": "seq",
                "nheads": "heads",
                "seqlen_ro": "positions",
                **{f"stride_{n}": f"stride(X, {i})" for i, n in enumerate(("batch", "seqlen", "nheads", "headdim"))},
            },
            constants={"HEAD_DIM": 64, "ROTARY_DIM": 32, "BLOCK_M": 16},
            grid="cdiv(seqlen, BLOCK_M), nheads, batch",
        )
    ],
    namespace="foreign",
    types={"T": ("fp16",)},
    attributes={"offsets": pyfmha.Attribute("int32", 0, choices=(0, 1))},
)
