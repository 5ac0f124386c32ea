"""Runs the production kernel under the interpreter and holds it against float64; shared by the tests of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.random import default_rng

from pyfmha.attention.forward import ARGUMENTS, KERNEL, Call, Forward, kernel_path
from pyfmha.attention.reference import attend, relative_error
from pyfmha.attention.run import to_float, to_storage
from pyfmha.bfloat16 import STORAGE
from pyfmha.interpreter.kernel import Null, Tensor, run_interpreted

LIMITS = {"fp16": 5e-4, "bf16": 4e-3, "fp32": 1e-5}
LARGEST = {"fp16": 65504.0, "bf16": 3.3895313892515355e38, "fp32": 3.4028234663852886e38}
GUARD = 64


@dataclass(frozen=True)
class Problem:
    """One attention to compute. Sizes are those of the tensors; lengths, if any, say how much of them counts.

    layout: bhsd, bshd, or packed: bshd with Q, K and V in one tensor [batch, seq, Hq + 2 Hkv, head size] if their
    sequences are equally long. Ragged batches are [tokens, heads, head size], and packed likewise.
    """

    dtype: str = "fp16"
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    q_len: int = 33
    kv_len: int = 33
    head_size: int = 32
    scale: float | None = None
    softcap: float = 0.0
    layout: str = "bhsd"
    q_lengths: Sequence[int] | None = None
    kv_lengths: Sequence[int] | None = None
    cu_q: Sequence[int] | None = None
    cu_kv: Sequence[int] | None = None
    left: int = -1
    right: int = -1
    bottom_right: bool = False
    with_lse: bool = True
    seed: int = 0
    blocks: tuple[int, int] = (16, 16)
    softcap_mode: str = "any"
    extra_tiles: int = 0
    segments: int = 4
    precision: str = "tf32x3"  # of fp32

    @property
    def ragged(self) -> bool:
        return self.cu_q is not None

    @property
    def sm_scale(self) -> float:
        return float(np.float32(self.head_size**-0.5 if self.scale is None else self.scale))


@dataclass
class Tensors:
    """Stored arrays, each a view [batch, heads, seq, head size] of a guarded buffer; ragged batches have batch 1."""

    views: dict[str, np.ndarray] = field(default_factory=dict)
    pointers: dict[str, Tensor] = field(default_factory=dict)
    strides: dict[str, tuple[int, int, int]] = field(default_factory=dict)


def place(problem: Problem) -> Tensors:
    """Buffers filled with NaN, guards on both sides, and the views of them that the layout says."""
    p, made = problem, Tensors()
    shapes = {
        "Out": (p.heads, p.q_len),
        "Q": (p.heads, p.q_len),
        "K": (p.kv_heads, p.kv_len),
        "V": (p.kv_heads, p.kv_len),
    }
    batch = 1 if p.ragged else p.batch
    packed = p.layout == "packed" and p.q_len == p.kv_len
    if packed:
        row = (p.heads + 2 * p.kv_heads) * p.head_size
        buffer = nan_buffer(p.dtype, batch * p.q_len * row)
        first = 0
    for name, (heads, seq) in shapes.items():
        if packed and name != "Out":
            strides, offset = (seq * row, p.head_size, row), GUARD + first * p.head_size
            first += heads
            store = buffer
        else:
            store, offset = nan_buffer(p.dtype, batch * heads * seq * p.head_size), GUARD
            d = p.head_size
            strides = (heads * seq * d, seq * d, d) if p.layout == "bhsd" else (seq * heads * d, d, heads * d)
        size = store.itemsize
        made.views[name] = np.lib.stride_tricks.as_strided(
            store[offset:], (batch, heads, seq, p.head_size), (*(s * size for s in strides), size)
        )
        made.pointers[name], made.strides[name] = Tensor(store, p.dtype, offset), strides
    return made


def nan_buffer(dtype: str, size: int) -> np.ndarray:
    array = np.empty(size + 2 * GUARD, STORAGE[dtype])
    array.view(np.uint8)[...] = 0xFF  # a NaN that arithmetic does not produce
    return array


def fill(problem: Problem, made: Tensors, factor: float = 1.0) -> None:
    """Standard normal numbers where a sequence is; padding stays NaN."""
    p = problem
    for name, lengths, cu in (("Q", p.q_lengths, p.cu_q), ("K", p.kv_lengths, p.cu_kv), ("V", p.kv_lengths, p.cu_kv)):
        view = made.views[name]
        values = to_storage(factor * default_rng([p.seed, ord(name)]).standard_normal(view.shape, np.float32), p.dtype)
        if cu is not None:
            ends = np.maximum.accumulate(np.clip(np.array(cu, np.int64), 0, view.shape[2]))
            view[:, :, ends[0] : ends[-1]] = values[:, :, ends[0] : ends[-1]]
        else:
            for b in range(view.shape[0]):
                n = view.shape[2] if lengths is None else min(max(int(lengths[b]), 0), view.shape[2])
                view[b, :, :n] = values[b, :, :n]


def launch(problem: Problem, made: Tensors) -> tuple[np.ndarray, np.ndarray | None]:
    """Run; Out as float64 [batch, heads, seq, head size] and Lse [batch, heads, seq], all guards checked."""
    p = problem
    call = Call(
        p.batch if not p.ragged else len(p.cu_q) - 1, p.heads, p.kv_heads, p.q_len, p.kv_len, p.head_size, p.sm_scale,
        p.softcap, made.strides["Q"], made.strides["K"], made.strides["V"], made.strides["Out"], p.left, p.right,
        p.bottom_right, p.ragged,
    )  # fmt: skip
    batch = 1 if p.ragged else p.batch
    lse = nan_buffer("fp32", batch * p.heads * p.q_len)
    integers = {"q_lengths": p.q_lengths, "kv_lengths": p.kv_lengths, "cu_seqlens_q": p.cu_q, "cu_seqlens_kv": p.cu_kv}
    args = dict(made.pointers)
    args["Lse"] = Tensor(lse, "fp32", GUARD) if p.with_lse else Null("fp32")
    for name, values in integers.items():
        args[name] = Null("i32") if values is None else np.array(values, np.int32)
    names = [name for name, _ in ARGUMENTS]
    args |= dict(zip(names[9:], call.scalars(), strict=True))
    grid_values = {name: value for name, value in args.items() if isinstance(value, int)}
    spec = Forward(p.dtype, p.head_size).specs()[-1]
    constants = dict(spec.constants) | {"BLOCK_M": p.blocks[0], "BLOCK_N": p.blocks[1], "SOFTCAP": p.softcap_mode}
    if p.dtype == "fp32":
        constants["PRECISION"] = p.precision
    constants["SEGMENTS"] = p.segments  # few, so that a handful of sequences takes several looks
    # The grid as the launcher computes it, for tiles of this size.
    x = -(-p.q_len // p.blocks[0]) + int(p.ragged) * (call.batch_size + 1) + p.extra_tiles
    y, z = (e.evaluate(grid_values) for e in spec.grid_expressions[1:])
    if x * y * z:
        run_interpreted(kernel_path(), KERNEL, (x, y, z), args, constants)
    check_guards(p, made, lse)
    out = to_float(made.views["Out"], p.dtype)
    return out, lse[GUARD:-GUARD].reshape(batch, p.heads, p.q_len).astype(np.float64) if p.with_lse else None


def check_guards(problem: Problem, made: Tensors, lse: np.ndarray) -> None:
    """Nothing was written around Out and Lse; what was, was written whole."""
    out = made.pointers["Out"].array
    assert not (out[GUARD:-GUARD].view(np.uint8).reshape(-1, out.itemsize) == 0xFF).all(axis=1).any(), "part unwritten"
    for store in (out, lse):
        raw = store.view(np.uint8).reshape(store.size, -1)
        assert (np.concatenate([raw[:GUARD], raw[-GUARD:]]) == 0xFF).all(), "wrote outside"
    inner = lse[GUARD:-GUARD]
    assert (not np.isnan(inner).any()) if problem.with_lse else np.isnan(inner).all()


def expected(problem: Problem, made: Tensors) -> tuple[np.ndarray, np.ndarray]:
    """Out and Lse in float64."""
    return _exact(problem, *(to_float(made.views[name], problem.dtype) for name in "QKV"))


def _exact(
    problem: Problem, q: np.ndarray, k: np.ndarray, v: np.ndarray, times: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Attention with all scores `times` as large."""
    p = problem
    options = {
        "sm_scale": times * p.sm_scale, "softcap": times * float(np.float32(p.softcap)), "window_left": p.left,
        "window_right": p.right, "bottom_right": p.bottom_right,
    }  # fmt: skip
    if not p.ragged:
        return attend(q, k, v, q_lengths=p.q_lengths, kv_lengths=p.kv_lengths, **options)
    tokens = (x[0].transpose(1, 0, 2) for x in (q, k, v))
    out, lse = attend(*tokens, cu_seqlens_q=p.cu_q, cu_seqlens_kv=p.cu_kv, **options)
    return out.transpose(1, 0, 2)[None], lse[None]


def allowed_error(problem: Problem, made: Tensors, out: np.ndarray, lse: np.ndarray) -> float:
    """Of Out, given exactly, relative to its norm: the dtype's limit, times the problem's condition.

    What rounding leaves is u times the sum of weight * value, each term with a sign of its own: the root of the sum of
    their squares is the size of the error, and of Out as a rule. Where few numbers are added up, Out may be less; and
    of few results one may be off by several times as much as is usual.
    """
    q, k, v = (to_float(made.views[name], problem.dtype) for name in "QKV")
    squares, lse_of_squares = _exact(
        problem, q, k, v**2, times=2.0
    )  # weights squared are those of scores twice as large
    seen = np.isfinite(lse)
    size = np.linalg.norm(out)
    if not size:
        return 0.0
    of_weights = np.exp(lse_of_squares[seen] - 2 * lse[seen])
    terms = np.sqrt((squares[seen] * of_weights[:, None]).sum())
    return LIMITS[problem.dtype] * max(1.0, terms / size) * (1 + 2 / np.sqrt(out[seen].size))


def check_values(problem: Problem, made: Tensors, out: np.ndarray, lse: np.ndarray | None) -> None:
    """What a kernel gave, against float64."""
    exact_out, exact_lse = expected(problem, made)
    assert np.isfinite(out).all()
    assert relative_error(out, exact_out) <= allowed_error(problem, made, exact_out, exact_lse)
    empty = np.isneginf(exact_lse)
    assert (out[empty] == 0).all()
    if lse is not None:
        assert (np.isneginf(lse) == empty).all()
        assert (np.abs(lse[~empty] - exact_lse[~empty]) <= 4e-6 * (1 + np.abs(exact_lse[~empty]))).all()


def check(problem: Problem, factor: float = 1.0) -> np.ndarray:
    """Kernel against float64: out, lse, padding rows, guards. Returns out."""
    made = place(problem)
    fill(problem, made, factor)
    out, lse = launch(problem, made)
    check_values(problem, made, out, lse)
    return out
