"""Run the engine that build.py made, check its output against float64, and time it beside what else is installed.

    python examples/run.py --num_heads 32 --head_size 64 --batch_size 8 --seq_len 512 --log_level verbose --benchmark

Needs numpy, cuda-python, TensorRT and a GPU; what else --benchmark times needs its own software, and a row whose
software is missing says so. Exit code 0: the output is right; 1: it is not; 2: an error, said on stderr.
"""

import argparse
from pathlib import Path

from benchmark import Problem, run_benchmark
from common import add_log_level, positive, run_program

from pyfmha.errors import EngineError
from pyfmha.reference import LIMITS, attention_float64, relative_error
from pyfmha.run import random_inputs, to_float
from pyfmha.trt.saved import Saved, read_engine
from pyfmha.trt.session import Session


def parse() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=positive, default=8)
    parser.add_argument("--seq_len", type=positive, default=512)
    parser.add_argument("--num_heads", type=positive, default=32)
    parser.add_argument("--head_size", type=positive, default=64)
    parser.add_argument("--engine_dir", type=Path, default=Path("engine"), help="build.py's output_dir")
    add_log_level(parser)
    parser.add_argument(
        "--benchmark", action="store_true", help="print a table; save benchmark.json and benchmark.png in engine_dir"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random input")
    return parser


def check_fits(saved: Saved, num_heads: int, head_size: int) -> None:
    """Compare what is fixed in the engine with what is asked for.

    Raises:
        EngineError: they differ.
    """
    config = saved.config
    if (config.num_heads, config.head_size) != (num_heads, head_size):
        raise EngineError(
            f"{saved.path} was built for {config.num_heads} heads of size {config.head_size}, not {num_heads} of"
            f" {head_size}; build another: python examples/build.py --num_heads {num_heads} --head_size {head_size}"
        )


def main(options: argparse.Namespace) -> int:
    """Run, check, and time if asked."""
    saved = read_engine(options.engine_dir)
    config = saved.config
    check_fits(saved, options.num_heads, options.head_size)
    shape = (options.batch_size, options.num_heads, options.seq_len, options.head_size)
    inputs = dict(zip(("Q", "K", "V"), random_inputs(config.dtype, shape, options.seed), strict=True))
    with Session(saved.path) as session:
        out = session.run(inputs)["Out"]
    exact = attention_float64(
        *(to_float(x, config.dtype) for x in inputs.values()), sm_scale=config.scale, causal=config.causal
    ).out
    error = relative_error(to_float(out, config.dtype), exact)
    passed = error <= LIMITS[config.dtype]
    verdict = f"limit {LIMITS[config.dtype]:.0e}: {'passed' if passed else 'FAILED'}"
    print(f"{list(shape)} {config.dtype}: relative error {error:.1e} against float64, {verdict}")
    if options.benchmark and passed:
        run_benchmark(Problem(saved, inputs, exact), options.engine_dir)
    return 0 if passed else 1


if __name__ == "__main__":
    run_program(main, parse())
