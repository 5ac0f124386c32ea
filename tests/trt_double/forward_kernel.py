"""Kernels with the prototypes of ``fmha_fwd_*``, ``fmha_biased_*``, and those of decoding that compile in no time: what
they compute is not looked at."""

import triton
import triton.language as tl


@triton.jit
def forward(
    Out,
    Lse,
    Q,
    K,
    V,
    q_lengths,
    kv_lengths,
    cu_seqlens_q,
    cu_seqlens_kv,
    sm_scale,
    softcap,
    batch_size,
    num_heads,
    num_kv_heads,
    q_len,
    kv_len,
    head_size,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    out_stride_b,
    out_stride_h,
    out_stride_s,
    window_left,
    window_right,
    bottom_right,
    ragged,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Nobody runs it. Without a mask the code differs with what is promised of the pointers, as the real one does.
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Out + i, tl.load(Q + i) * (sm_scale + HEAD_SIZE))


@triton.jit
def biased(
    Out,
    Lse,
    Q,
    K,
    V,
    q_lengths,
    kv_lengths,
    cu_seqlens_q,
    cu_seqlens_kv,
    Bias,
    BiasFp32,
    Mask,
    Sinks,
    SinksFp32,
    sm_scale,
    softcap,
    batch_size,
    num_heads,
    num_kv_heads,
    q_len,
    kv_len,
    head_size,
    v_head_size,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    out_stride_b,
    out_stride_h,
    out_stride_s,
    bias_stride_b,
    bias_stride_h,
    bias_stride_q,
    bias_stride_k,
    mask_stride_b,
    mask_stride_h,
    mask_stride_q,
    mask_stride_k,
    bias_rows,
    bias_columns,
    mask_rows,
    mask_columns,
    window_left,
    window_right,
    bottom_right,
    ragged,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Out + i, tl.load(Q + i) * (sm_scale + HEAD_SIZE))


@triton.jit
def decode(
    Out,
    Lse,
    Q,
    K,
    V,
    q_lengths,
    kv_lengths,
    Partial,
    Statistics,
    sm_scale,
    softcap,
    batch_size,
    num_heads,
    num_kv_heads,
    q_len,
    kv_len,
    head_size,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    out_stride_b,
    out_stride_h,
    out_stride_s,
    window_left,
    window_right,
    bottom_right,
    splits,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    LAST: tl.constexpr,
):
    if LAST:
        tl.extra.cuda.gdc_wait()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Out + i, tl.load(Q + i) * (sm_scale + HEAD_SIZE + 1000 * (1 + LAST)))


@triton.jit
def biased_decode(
    Out, Lse, Q, K, V, q_lengths, kv_lengths, Partial, Statistics, Bias, BiasFp32, Mask, Sinks, SinksFp32, sm_scale,
    softcap, batch_size, num_heads, num_kv_heads, q_len, kv_len, head_size, v_head_size, q_stride_b, q_stride_h,
    q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s, out_stride_b, out_stride_h,
    out_stride_s, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, mask_stride_b, mask_stride_h,
    mask_stride_q, mask_stride_k, bias_rows, bias_columns, mask_rows, mask_columns, window_left, window_right,
    bottom_right, splits, HEAD_SIZE: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Out + i, tl.load(Q + i) * (sm_scale + HEAD_SIZE + 2000 * (1 + LAST)))


@triton.jit
def fmha_decode_sm90(
    Out,
    Lse,
    Q,
    K,
    V,
    q_lengths,
    kv_lengths,
    cu_seqlens_q,
    cu_seqlens_kv,
    sm_scale,
    softcap,
    batch_size,
    num_heads,
    num_kv_heads,
    q_len,
    kv_len,
    head_size,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    out_stride_b,
    out_stride_h,
    out_stride_s,
    window_left,
    window_right,
    bottom_right,
    ragged,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Out + i, tl.load(Q + i) * (sm_scale - HEAD_SIZE))
