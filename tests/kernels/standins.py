"""Kernels with the prototypes of all attention functions, which compile in no time: nobody runs them.

WHICH makes the code of each differ, so that a launch can be told by its machine code.
"""

import triton
import triton.language as tl


@triton.jit
def forward(
    Out, Lse, Q, K, V, q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv, sm_scale, softcap,
    batch_size, num_heads, num_kv_heads, q_len, kv_len, head_size,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    out_stride_b, out_stride_h, out_stride_s, window_left, window_right, bottom_right, ragged,
    BLOCK_M: tl.constexpr, WHICH: tl.constexpr,
):  # fmt: skip
    tl.store(Out + tl.arange(0, BLOCK_M), tl.load(Q + tl.arange(0, BLOCK_M)) * (sm_scale + WHICH))


@triton.jit
def decode(
    Out, Lse, Q, K, V, q_lengths, kv_lengths, Partial, Statistics, sm_scale, softcap,
    batch_size, num_heads, num_kv_heads, q_len, kv_len, head_size,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    out_stride_b, out_stride_h, out_stride_s, window_left, window_right, bottom_right, splits,
    BLOCK_M: tl.constexpr, WHICH: tl.constexpr,
):  # fmt: skip
    tl.extra.cuda.gdc_wait()
    tl.store(Out + tl.arange(0, BLOCK_M), tl.load(Q + tl.arange(0, BLOCK_M)) * (sm_scale + WHICH))


@triton.jit
def first(
    Out, L, M, Q, K, V, sm_scale, batch_size, num_heads, seq_len, BLOCK_M: tl.constexpr, WHICH: tl.constexpr
):  # fmt: skip
    tl.store(Out + tl.arange(0, BLOCK_M), tl.load(Q + tl.arange(0, BLOCK_M)) * (sm_scale + WHICH))
