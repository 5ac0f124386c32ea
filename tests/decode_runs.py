"""The Hopper kernels of decoding in the emulator, the one that TMA fetches K and V for and the one that copies them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gluon_cluster import ClusterMachine
from gluon_language import load_kernel
from gluon_values import DTYPES, FP32, INT32, Descriptor, Pointer
from sm90_runs import check_values, largest, loud, make

from pyfmha.attention.hopper import COPIED_KERNEL_FILE, DECODE_KERNEL, DECODE_KERNEL_FILE
from pyfmha.attention.reference import attend

FETCHED, COPIED = (Path(__file__).parents[1] / "kernels" / name for name in (DECODE_KERNEL_FILE, COPIED_KERNEL_FILE))


def run(
    *,
    source: Path = FETCHED,
    seed: int = 0,
    ranks: int = 2,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    kv_len: int = 100,
    kv_lengths: Sequence[int] | None = None,
    head_size: int | None = None,
    window: tuple[int, int] = (-1, -1),
    bottom_right: bool = True,
    dtype: str = "fp16",
    layout: str = "bhsd",
    block_d: int = 64,
    block_n: int = 16,
    stages: int = 2,
    sm_scale: float = 0.125,
    scale: float = 1.0,
    lse: bool = True,
    change: Callable[[Any, Any, Any], None] = lambda q, k, v: None,
) -> tuple[Any, Any, Any, Any]:
    """Run the kernel; returns Out, Lse and what they should be, without the axis of queries. `change` may write other
    values to Q, K and V. Keys beyond their lengths are NaN."""
    rng = np.random.default_rng(seed)
    head_size = head_size or block_d
    (q_memory, q), (k_memory, k), (v_memory, v), (out_memory, out) = (
        make(rng, (batch, h, s, head_size), dtype, layout, scale)
        for h, s in ((heads, 1), (kv_heads, kv_len), (kv_heads, kv_len), (heads, 1))
    )
    change(q, k, v)
    for b, length in enumerate(kv_lengths or ()):
        k[b, :, max(length, 0) :] = v[b, :, max(length, 0) :] = np.nan
    out_memory[...] = np.nan
    lse_memory = np.full(batch * heads + 32, 7.0, np.float32)
    lengths = None if kv_lengths is None else np.array(kv_lengths, np.int32)
    element, machine = DTYPES[dtype], ClusterMachine(seed)
    machine.launch(
        load_kernel(source, machine)[DECODE_KERNEL],
        (ranks, kv_heads * -(-heads // kv_heads // 8), batch),
        *([Descriptor(x, element, block_n, block_d) for x in (k, v)] if source.name == FETCHED.name else ()),
        Pointer(out_memory, element, 16),
        Pointer(lse_memory if lse else None, FP32, 16),
        *(Pointer(memory, element, 16) for memory in (q_memory, k_memory, v_memory)),
        *(Pointer(array, INT32) for array in (None, lengths, None, None)),
        sm_scale,
        0.0,
        *(batch, heads, kv_heads, 1, kv_len, head_size),
        *(np.int64(stride // 4) for array in (q, k, v, out) for stride in array.strides[:3]),
        *(*window, int(bottom_right), 0),
        BLOCK_D=block_d,
        BLOCK_N=block_n,
        WARPS=4,
        STAGES=stages,
    )
    for memory, guard in ((out_memory, np.nan), (lse_memory, 7.0)):
        np.testing.assert_array_equal(memory[:16], guard)
        np.testing.assert_array_equal(memory[-16:], guard)
    left, right = window
    wanted, wanted_lse = attend(
        *(q, k, v),
        **{"sm_scale": sm_scale, "kv_lengths": kv_lengths, "bottom_right": bottom_right},
        **{"window_left": left, "window_right": right},
    )
    return out[:, :, 0], lse_memory[16:-16].reshape(batch, heads), wanted[:, :, 0], wanted_lse[:, :, 0]


def check(dtype: str = "fp16", limit: float = 1.0, **problem: Any) -> None:
    check_values(*run(dtype=dtype, **problem), dtype, limit)


def loud_start(_q: Any, k: Any, _v: Any) -> None:
    k[:, :, :8] *= 1000


LONG: dict[str, Any] = {"kv_len": 150}
RANGE = {"dtype": "bf16", "sm_scale": 2.0**-20, "change": loud, "head_size": 32}
EVEN = {"change": largest}
PADDED = {"kv_lengths": [37]}
EIGHT = {"ranks": 8, "heads": 8, "kv_len": 300}
PARTS = {"heads": 18, "kv_heads": 2}
WINDOW = {"window": (30, 0), "kv_lengths": [70]}
