"""A kernel of one's own as a TensorRT plugin: the kernel, and beside it what it is.

    pyfmha build --operators examples/operator/bias_gelu.py --arch sm_90 -o acme_out
    python examples/operator/run.py --library acme_out/libpyfmha.so
    trtexec --loadEngine=acme_out/bias_gelu.engine --dynamicPlugins=acme_out/libpyfmha.so   # no Python in the process

From this description come the plugin in Python, the plugin in C inside the library, the creator's fields and the ONNX
node ``acme::BiasGelu``.
"""

import triton
import triton.language as tl

import pyfmha


@triton.jit
def bias_gelu_kernel(x, bias, y, n, cols, scale, BLOCK: tl.constexpr):
    """Y = gelu(scale * (X + Bias)), by erf: Hendrycks and Gimpel, https://arxiv.org/abs/1606.08415."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + at, inside, 0.0).to(tl.float32) + tl.load(bias + at % cols, inside, 0.0).to(tl.float32)
    value = value * scale
    result = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    tl.store(y + at, result.to(y.dtype.element_ty), inside)


BIAS_GELU = pyfmha.Operator(
    name="BiasGelu",
    version="1",
    namespace="acme",
    inputs={"X": "T[rows, cols]", "Bias": "T[cols]"},
    outputs={"Y": "T[rows, cols]"},
    types={"T": ("fp16", "bf16", "fp32")},  # one type for all three tensors
    attributes={"scale": "fp32 = 1.0"},
    launches=[
        pyfmha.Launch(
            kernel=bias_gelu_kernel,
            arguments={
                "x": "X",
                "bias": "Bias",
                "y": "Y",
                "n": "rows * cols",
                "cols": "cols",
                "scale": "scale",
            },
            scalars={"n": "i64"},
            grid="cdiv(n, BLOCK)",
            # Two algorithms, which TensorRT times as tactics.
            configs=[
                pyfmha.Config(constants={"BLOCK": 1024}, num_warps=4),
                pyfmha.Config(constants={"BLOCK": 2048}, num_warps=8),
            ],
        )
    ],
)
