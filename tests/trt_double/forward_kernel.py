"""Kernels with the prototypes of ``fmha_fwd_*``, ``fmha_biased_*``, ``fmha_fp8_*``, ``fmha_split_*`` and
``fmha_combine_*`` that compile in no time: what they compute is not looked at.

One list of arguments makes all of them. Triton reads a kernel's text, which :mod:`linecache` is told.
"""

import linecache

import triton
import triton.language as tl  # noqa: F401 - the kernels read it

POINTERS = ["Out", "Lse", "Q", "K", "V", "q_lengths", "kv_lengths", "cu_seqlens_q", "cu_seqlens_kv"]
SIZES = ["sm_scale", "softcap", "batch_size", "num_heads", "num_kv_heads", "q_len", "kv_len", "head_size"]
STRIDES = [f"{tensor}_stride_{axis}" for tensor in ("q", "k", "v", "out") for axis in "bhs"]
LAST = ["window_left", "window_right", "bottom_right", "ragged"]
FORWARD = [*POINTERS, *SIZES, *STRIDES, *LAST]
FACTORS = ["q_descale", "k_descale", "v_descale"]


def _after(arguments: list[str], place: str, *more: str) -> list[str]:
    at = arguments.index(place) + 1
    return [*arguments[:at], *more, *arguments[at:]]


def _strides(tensors: list[str], axes: str) -> list[str]:
    return [f"{tensor}_stride_{axis}" for tensor in tensors for axis in axes]


BIASED = _after(FORWARD, "cu_seqlens_kv", "Bias", "BiasFp32", "Mask", "Sinks", "SinksFp32")
COUNTS = [f"{tensor}_{axis}" for tensor in ("bias", "mask") for axis in ("rows", "columns")]
BIASED = _after(BIASED, "head_size", "v_head_size")
BIASED = _after(BIASED, "out_stride_s", *_strides(["bias", "mask"], "bhqk"), *COUNTS)
EIGHT = _after(_after(FORWARD, "V", *FACTORS), "out_stride_s", *_strides(FACTORS, "bh"))
OTHERS = {"cu_seqlens_q": "Partial", "cu_seqlens_kv": "Statistics", "ragged": "splits"}
DECODE = [OTHERS.get(name, name) for name in FORWARD]
BIASED_DECODE = [OTHERS.get(name, name) for name in BIASED]


def _kernel(name: str, arguments: list[str], factor: str, before: str = "", *constants: str) -> triton.JITFunction:
    # Nobody runs it. Without a mask the code differs with what is promised of the pointers, as the real one does.
    parameters = [*arguments, *(f"{constant}: tl.constexpr" for constant in ("HEAD_SIZE", "BLOCK", *constants))]
    text = (
        f"def {name}({', '.join(parameters)}):\n{before}"
        "    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)\n"
        f"    tl.store(Out + i, tl.load(Q + i).to(tl.float32) * ({factor}))\n"
    )
    file = f"{__file__}:{name}"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), globals())
    return triton.jit(globals()[name])


_WAITS = "    if LAST:\n        tl.extra.cuda.gdc_wait()\n"
forward = _kernel("forward", FORWARD, "sm_scale + HEAD_SIZE")
biased = _kernel("biased", BIASED, "sm_scale + HEAD_SIZE")
with_function = _kernel("with_function", [*BIASED, "inputs"], "sm_scale + HEAD_SIZE")
LISTS = ["Blocks", "list_batches", "list_heads"]
listed = _kernel("listed", [*BIASED, "inputs", *LISTS], "sm_scale + HEAD_SIZE")
fp8 = _kernel("fp8", EIGHT, "sm_scale + HEAD_SIZE")
decode = _kernel("decode", DECODE, "sm_scale + HEAD_SIZE + 1000 * (1 + LAST)", _WAITS, "LAST")
biased_decode = _kernel("biased_decode", BIASED_DECODE, "sm_scale + HEAD_SIZE + 2000 * (1 + LAST)", "", "LAST")
fmha_decode_sm90 = _kernel("fmha_decode_sm90", FORWARD, "sm_scale - HEAD_SIZE")
"""Of the name by which a plugin tells the kernel that decodes in one launch."""
