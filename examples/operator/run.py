"""Put an operator of one's own into a network, build the engine, run it, and compare with float64.

    pyfmha build --operators examples/operator/bias_gelu.py --arch sm_90 -o acme_out
    python examples/operator/run.py --library acme_out/libpyfmha.so

Needs numpy, cuda-python, the full tensorrt and a GPU; neither Triton nor the kernel's file. ``--interpret`` runs the
kernel under Triton's interpreter instead, anywhere. Exit code 0: right; 1: wrong; 2: an error, said on stderr.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pyfmha
from pyfmha.errors import PyfmhaError

KERNEL_FILE = Path(__file__).with_name("bias_gelu.py")
LIMIT = 2e-3
"""Of the relative error in float16, whose roundings are 2^-11 each."""


def exact(x: NDArray[Any], bias: NDArray[Any], scale: float) -> NDArray[np.float64]:
    """The same in float64."""
    value = scale * (x.astype(np.float64) + bias.astype(np.float64))
    erf = np.vectorize(math.erf)
    result: NDArray[np.float64] = 0.5 * value * (1 + erf(value / math.sqrt(2)))
    return result


def interpreted(x: NDArray[Any], bias: NDArray[Any], scale: float) -> NDArray[Any]:
    """The operator as it is described, under Triton's interpreter."""
    from bias_gelu import BIAS_GELU

    return pyfmha.interpret_operator(BIAS_GELU, {"X": x, "Bias": bias}, source=KERNEL_FILE, scale=scale)["Y"]


def through_tensorrt(x: NDArray[Any], bias: NDArray[Any], scale: float, library: Path) -> NDArray[Any]:
    """An engine with the operator, built, saved and run."""
    from pyfmha.trt.engine import build_plan
    from pyfmha.trt.modules import find_module

    trt = find_module()

    def define(network: Any) -> None:
        tensors = [
            network.add_input("X", trt.DataType.HALF, (-1, x.shape[1])),
            network.add_input("Bias", trt.DataType.HALF, bias.shape),
        ]
        (out,) = pyfmha.add_operator(network, "BiasGelu", *tensors, scale=scale, library=library)
        out.name = "Y"
        network.mark_output(out)

    ranges = {"X": ((1, x.shape[1]), x.shape, x.shape)}
    built = build_plan(trt, define, ranges)
    library.with_name("bias_gelu.engine").write_bytes(built.plan)
    with pyfmha.Session(built.plan) as session:
        return session.run({"X": x, "Bias": bias})["Y"]


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=Path("acme_out/libpyfmha.so"))
    parser.add_argument("--rows", type=int, default=37)
    parser.add_argument("--cols", type=int, default=96)
    parser.add_argument("--interpret", action="store_true", help="run the kernel under Triton's interpreter")
    options = parser.parse_args()
    chance = np.random.default_rng(0)
    x, bias = (
        chance.standard_normal(shape).astype(np.float16) for shape in ((options.rows, options.cols), (options.cols,))
    )
    scale = 0.5
    try:
        got = interpreted(x, bias, scale) if options.interpret else through_tensorrt(x, bias, scale, options.library)
    except PyfmhaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    wanted = exact(x, bias, scale)
    error = np.linalg.norm(got.astype(np.float64) - wanted) / np.linalg.norm(wanted)
    print(f"BiasGelu [{options.rows}, {options.cols}]: relative error {error:.1e}, limit {LIMIT:.0e}")
    return 0 if error < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
