"""Runs the Hopper kernel of e4m3 in the emulator and holds it against float64."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gluon_emulator import Machine, launch
from gluon_language import load_kernel
from gluon_values import DTYPES, E4M3, FP32, INT32, Descriptor, Pointer
from sm90_runs import rows_of_grid

from pyfmha.attention.reference import attend, relative_error
from pyfmha.e4m3 import e4m3_from_float, float_from_e4m3

KERNEL = Path(__file__).parents[1] / "kernels" / "fmha_fp8_sm90.py"
NAN = 0x7F

TOLERANCE = 0.035
"""Of the relative error: weights are rounded by 2**-5 on average, which the sum over many keys mostly evens out."""


def make(rng: np.random.Generator, shape: tuple[int, ...], layout: str, scale: float = 1.0) -> tuple[Any, Any]:
    """A [batch, heads, seq, head size] array of e4m3 bits, laid out as asked for, within guards of NaN."""
    batch, heads, seq, size = shape
    stored = (batch, heads, seq, size) if layout == "bhsd" else (batch, seq, heads, size)
    memory = np.full(int(np.prod(stored)) + 32, NAN, np.uint8)
    view = memory[16:-16].reshape(stored)
    view = view if layout == "bhsd" else view.transpose(0, 2, 1, 3)
    view[...] = e4m3_from_float(rng.standard_normal(shape) * scale)
    return memory, view


def run(
    *,
    source: Path = KERNEL,
    seed: int = 0,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    q_len: int = 64,
    kv_len: int | None = None,
    head_size: int = 64,
    block_d: int = 64,
    block_n: int = 64,
    consumers: int = 2,
    stages: int = 2,
    raw: int = 2,
    v_stages: int = 2,
    q_slots: int = 2,
    ping_pong: bool = True,
    causal: bool = False,
    bottom_right: bool = False,
    longest_first: bool = False,
    ahead: bool = False,
    lazy: bool = False,
    producer_first: bool = False,
    threes: bool = False,
    by_warps: bool = False,
    even: int = 0,
    aligned: bool = False,
    halved: bool = False,
    general: bool = False,
    q_lengths: Sequence[int] | None = None,
    kv_lengths: Sequence[int] | None = None,
    cu_q: Sequence[int] | None = None,
    cu_kv: Sequence[int] | None = None,
    descales: Sequence[Any] = (None, None, None),
    dtype: str = "bf16",
    layout: str = "bhsd",
    programs: int = 1,
    sm_scale: float = 0.125,
    scale: float = 1.0,
    change: Callable[[Any, Any, Any], None] = lambda q, k, v: None,
) -> tuple[Any, Any, Any, Any]:
    """Run the kernel; returns Out, Lse and what they should be. `change` may write other bits to Q, K and V; what lies
    behind their lengths is NaN. `descales` are arrays [batch or 1, key heads or 1]."""
    ragged = cu_q is not None
    rng = np.random.default_rng(seed)
    kv_heads, kv_len = kv_heads or heads, kv_len or q_len
    (q_memory, q), (k_memory, k), (v_memory, v) = (
        make(rng, (batch, h, s, head_size), layout, scale)
        for h, s in ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    )
    change(q, k, v)
    for tensors, lengths in (((q,), q_lengths), ((k, v), kv_lengths)):
        for b, length in enumerate(lengths or ()):
            for padded in tensors:
                padded[b, :, max(length, 0) :] = NAN
    out_memory = np.full(batch * heads * q_len * head_size + 32, np.nan, np.float32)
    stored = (batch, heads, q_len, head_size) if layout == "bhsd" else (batch, q_len, heads, head_size)
    out = out_memory[16:-16].reshape(stored)
    out = out if layout == "bhsd" else out.transpose(0, 2, 1, 3)
    lse_memory = np.full(batch * heads * q_len, 7.0, np.float32)
    machine = Machine(seed)
    unit = block_n & -block_n  # of blocks that are no power of two, a copy has several
    factors = [None if given is None else np.ascontiguousarray(given, np.float32) for given in descales]
    wide = [
        np.ones((batch, kv_heads)) if given is None else np.broadcast_to(given, (batch, kv_heads)) for given in factors
    ]

    def strides(array: Any) -> list[Any]:
        return [np.int64(stride // array.itemsize) for stride in array.strides[:3]]

    def factor_strides(given: Any) -> list[Any]:
        steps = (0, 0) if given is None else np.broadcast_to(given, (batch, kv_heads)).strides
        return [np.int64(step // 4) for step in steps]

    launch(
        machine,
        load_kernel(source, machine)["fmha_fp8_sm90"],
        programs,
        Descriptor(q, E4M3, 64, block_d),
        *(Descriptor(x, E4M3, block_n, block_d if unit == block_n else min(block_d, 128)) for x in (k, v)),
        Pointer(out_memory, DTYPES[dtype], 16),
        Pointer(lse_memory, FP32),
        *(Pointer(memory, E4M3, 16) for memory in (q_memory, k_memory, v_memory)),
        *(Pointer(given if given is None else given.reshape(-1), FP32) for given in factors),
        *(
            Pointer(None if lengths is None else np.array(lengths, np.int32), INT32)
            for lengths in (q_lengths, kv_lengths, cu_q, cu_kv)
        ),
        sm_scale,
        0.0,
        batch if cu_q is None else len(cu_q) - 1,
        heads,
        kv_heads,
        q_len,
        kv_len,
        head_size,
        *(stride for array in (q, k, v, out) for stride in strides(array)),
        *(stride for given in factors for stride in factor_strides(given)),
        -1,
        0 if causal else -1,
        int(bottom_right),
        int(ragged),
        rows=rows_of_grid(-(-q_len // (64 * consumers)), programs) if longest_first else 1,
        BLOCK_D=block_d,
        BLOCK_N=block_n,
        CONSUMERS=consumers,
        STAGES=stages,
        V_STAGES=v_stages,
        RAW=raw,
        CAUSAL=causal or general,
        LONGEST_FIRST=longest_first,
        GENERAL=general,
        RAGGED=ragged,
        PING_PONG=ping_pong,
        Q_SLOTS=q_slots,
        CONSUMER_REGISTERS=232,
        PRODUCER_REGISTERS=40,
        AHEAD=ahead,
        LAZY=lazy,
        PRODUCER_FIRST=producer_first,
        THREES=threes,
        BY_WARPS=by_warps,
        EVEN=even,
        ALIGNED=aligned,
        HALVED=halved,
    )
    assert np.isnan(out_memory[:16]).all()
    assert np.isnan(out_memory[-16:]).all()
    group = heads // kv_heads
    exact_q, exact_k, exact_v = (
        float_from_e4m3(x) * np.repeat(wide[i], x.shape[1] // kv_heads, 1)[:, :, None, None]
        for i, x in enumerate((q, k, v))
    )
    assert exact_q.shape[1] == group * exact_k.shape[1]
    mask: dict[str, Any] = {"window_right": 0 if causal else -1, "bottom_right": bottom_right}
    if ragged:
        tokens = (x[0].transpose(1, 0, 2) for x in (exact_q, exact_k, exact_v))
        wanted, wanted_lse = attend(*tokens, sm_scale=sm_scale, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv, **mask)
        wanted, wanted_lse = wanted.transpose(1, 0, 2)[None], wanted_lse[None]
    else:
        wanted, wanted_lse = attend(
            exact_q, exact_k, exact_v, sm_scale=sm_scale, q_lengths=q_lengths, kv_lengths=kv_lengths, **mask
        )
    return out, lse_memory.reshape(batch, heads, q_len), wanted, wanted_lse


def check(limit: float = 1.0, **problem: Any) -> None:
    """Run, and hold it against float64; `limit` is a factor of the errors that pass."""
    out, lse, wanted, wanted_lse = run(**problem)
    assert (out[np.isneginf(wanted_lse)] == 0).all()
    assert np.isfinite(out).all()
    assert relative_error(out, wanted) < limit * TOLERANCE
    np.testing.assert_allclose(lse, wanted_lse, rtol=limit * 1e-4, atol=limit * 1e-4)
