"""What fmha_biased.py computes of values of a smaller head size, with neither bias, mask, sinks nor functions, for
Hopper (sm_90) in Gluon.

It is the kernel of fmha_sm90.py with Q and K in two parts and V and Out in the first alone (sm90_parts.py): 128 and 192
columns, as DeepSeek's prefill has them. What V lacks of the columns is zeros, which TMA reads and does not write.
"""

from fmha_sm90 import compute
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BY_HAND = ("fences", "barriers", "layouts")  # as fmha_sm90.py


@gluon.jit
def fmha_values_sm90(
    out_desc, q_desc, k_desc, v_desc, Out, Lse, Q, K, V, q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv,
    Bias, BiasFp32, Mask, Sinks, SinksFp32, sm_scale, softcap, batch_size, num_heads, num_kv_heads, q_len, kv_len,
    head_size, v_head_size, q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b,
    v_stride_h, v_stride_s, out_stride_b, out_stride_h, out_stride_s, bias_stride_b, bias_stride_h, bias_stride_q,
    bias_stride_k, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k, bias_rows, bias_columns, mask_rows,
    mask_columns, window_left, window_right, bottom_right, ragged,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    V_STAGES: gl.constexpr, CAUSAL: gl.constexpr, TWO_HEADS: gl.constexpr, LONGEST_FIRST: gl.constexpr,
    GENERAL: gl.constexpr, RAGGED: gl.constexpr, CAPPED: gl.constexpr, PING_PONG: gl.constexpr,
    Q_SLOTS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    TWO_PARTS: gl.constexpr, LAZY: gl.constexpr, SERIAL: gl.constexpr, PRODUCER_FIRST: gl.constexpr,
    LENGTHS: gl.constexpr, APART: gl.constexpr, THREES: gl.constexpr = False, HANDED_ON: gl.constexpr = False,
    EVEN: gl.constexpr = 0, BRIEF: gl.constexpr = False, PAIRED: gl.constexpr = False,
):  # fmt: skip
    """Grid, descriptors and constants: as of fmha_fwd_sm90, TWO_PARTS and not GENERAL, but boxes of V and Out have
    2 * BLOCK_D columns; arguments: as of fmha_biased.py, head_size up to 3 * BLOCK_D, v_head_size up to 2 * BLOCK_D,
    both multiples of 8. APART: Out is stored from a buffer of its own, see Shape; two consumers have to be."""
    compute(
        (q_desc, k_desc, v_desc, out_desc), (Out, Lse, Q, K, V), (q_lengths, kv_lengths), (cu_seqlens_q, cu_seqlens_kv),
        (sm_scale, softcap), (batch_size, num_heads, num_kv_heads, q_len, kv_len, head_size),
        (
            (q_stride_b, q_stride_h, q_stride_s),
            (k_stride_b, k_stride_h, k_stride_s),
            (v_stride_b, v_stride_h, v_stride_s),
            (out_stride_b, out_stride_h, out_stride_s),
        ),
        (window_left, window_right, bottom_right), ragged, (),
        BLOCK_D, BLOCK_N, CONSUMERS, STAGES, V_STAGES, CAUSAL, TWO_HEADS, LONGEST_FIRST, GENERAL, RAGGED, CAPPED,
        PING_PONG, Q_SLOTS, CONSUMER_REGISTERS, PRODUCER_REGISTERS, TWO_PARTS,
        LAZY, SERIAL, PRODUCER_FIRST, LENGTHS, (v_head_size,), APART, THREES, HANDED_ON,
        EVEN=EVEN, BRIEF=BRIEF, PAIRED=PAIRED,
    )  # fmt: skip
