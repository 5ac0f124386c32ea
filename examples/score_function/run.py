"""Attention with a score function of one's own, compared with float64.

    pyfmha build --functions examples/score_function/kerple.py --kernels basic --dtype fp16 --head-size 64
    python examples/score_function/run.py

Needs numpy, cuda-python, a GPU and the library; neither Triton nor the function's file. ``--interpret`` runs the kernel
with the function under Triton's interpreter instead, anywhere. Exit code 0: right; 1: wrong; 2: an error, on stderr.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pyfmha
from pyfmha.attention.biased import BiasedCall
from pyfmha.attention.forward import strides
from pyfmha.attention.reference import LIMITS, attend, relative_error
from pyfmha.errors import LibraryError, PyfmhaError
from pyfmha.runtime.device import Device, DeviceArray, Stream, device_arrays

HEADS, SIZE = 4, 64
BUILD = f"pyfmha build --functions {Path(__file__).with_name('kerple.py')} --kernels basic --dtype fp16 --head-size 64"
LIMIT = LIMITS["fp16"]
Array = NDArray[Any]


def exact(q: Array, k: Array, v: Array, r1: Array, r2: Array) -> Array:
    """The same in float64, by its formula."""

    def score(scores: Any, batch: int, head: int, query: Any, key: Any) -> Any:
        return scores - r1[head] * np.log(1 + r2[head] * np.abs(query - key))

    out, _ = attend(q, k, v, window_right=0, score=score)
    return out


def interpreted(q: Array, k: Array, v: Array, r1: Array, r2: Array) -> Array:
    """The kernel with the function, under Triton's interpreter."""
    from kerple import kerple

    found: Array = pyfmha.interpret_attention(q, k, v, causal=True, score=kerple, score_inputs=[r1, r2])
    return found


def on_gpu(q: Array, k: Array, v: Array, r1: Array, r2: Array, library: Path | None) -> Array:
    """The function of the library, launched on a stream."""
    function = pyfmha.Library(library)["fmha_with_kerple_d64_fp16"]
    batch, heads, seq, size = q.shape
    step = strides("bhsd", batch, heads, seq, size)
    call = BiasedCall(
        batch_size=batch, num_heads=heads, num_kv_heads=heads, q_len=seq, kv_len=seq, head_size=size,
        sm_scale=size**-0.5, window_right=0, q_strides=step, k_strides=step, v_strides=step, out_strides=step,
    )  # fmt: skip
    pointers = [name for name, kind in function.manifest.arguments if kind.startswith("*")]
    with Device() as device:
        function.load()
        arrays = {"Out": DeviceArray(q.shape, q.dtype)}
        arrays |= {name: DeviceArray.of(x) for name, x in {"Q": q, "K": k, "V": v, "r1": r1, "r2": r2}.items()}
        with device_arrays(*arrays.values()):
            device.synchronize()
            stream = Stream()
            given = dict.fromkeys(pointers, 0) | {name: array.pointer for name, array in arrays.items()}
            function(stream.handle, **given, **call.named())
            stream.synchronize()
            stream.close()
            out = arrays["Out"].to_host()
        function.unload()
    return out


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, help="default: PYFMHA_LIBRARY, else aot_out/libpyfmha.so")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--strength", type=float, default=1.0, help="factor of r1; 0 is plain attention")
    parser.add_argument("--interpret", action="store_true", help="run the kernel under Triton's interpreter")
    options = parser.parse_args()
    chance = np.random.default_rng(0)
    q, k, v = chance.standard_normal((3, 1, HEADS, options.seq_len, SIZE)).astype(np.float16)
    r1 = (options.strength * np.linspace(0.5, 2, HEADS)).astype(np.float32)
    r2 = np.linspace(1, 0.1, HEADS).astype(np.float32)
    try:
        got = interpreted(q, k, v, r1, r2) if options.interpret else on_gpu(q, k, v, r1, r2, options.library)
    except PyfmhaError as error:
        command = f"; this program's function: {BUILD}" if isinstance(error, LibraryError) else ""
        print(f"error: {error}{command}", file=sys.stderr)
        return 2
    error = relative_error(got, exact(q, k, v, r1, r2))
    print(f"kerple {list(q.shape)} fp16: relative error {error:.1e}, limit {LIMIT:.0e}")
    return 0 if error < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
