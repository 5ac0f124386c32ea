"""Run the engine that build.py made, check its output against float64, and time it beside what else is installed.

    python examples/run.py --num-heads 32 --head-size 64 --batch-size 8 --seq-len 512 --log-level verbose --benchmark

The engine's configuration says what it computes; the inputs are random, and so are the lengths of an engine that takes
some, up to batch_size and seq_len.

Needs numpy, cuda-python, TensorRT and a GPU; what else --benchmark times needs its own software, and a row whose
software is missing says so. Exit code 0: the output is right; 1: it is not; 2: an error, said on stderr.
"""

import argparse
from pathlib import Path

from benchmark import Problem, run_benchmark
from common import Parser, add_log_level, positive, run_program
from exact import exact_outputs, judge, make_inputs

from pyfmha.errors import EngineError
from pyfmha.trt.attention.saved import Saved, read_engine
from pyfmha.trt.session import Session


def parse() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--seq-len", type=positive, default=512)
    parser.add_argument(
        "--kv-seq-len", type=positive, help="keys, for an engine with --max-kv-seq-len; default: seq_len"
    )
    parser.add_argument("--num-heads", type=positive, default=32)
    parser.add_argument("--head-size", type=positive, default=64)
    parser.add_argument("--engine-dir", type=Path, default=Path("engine"), help="build.py's output_dir")
    add_log_level(parser)
    parser.add_argument(
        "--benchmark", action="store_true", help="print a table; save benchmark.json and benchmark.png in engine_dir"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random input")
    return parser


def check_fits(saved: Saved, options: argparse.Namespace) -> None:
    """Compare what is fixed in the engine with what is asked for.

    Raises:
        EngineError: they differ.
    """
    config, num_heads, head_size = saved.config, options.num_heads, options.head_size
    if (config.num_heads, config.head_size) != (num_heads, head_size):
        raise EngineError(
            f"{saved.path} was built for {config.num_heads} heads of size {config.head_size}, not {num_heads} of"
            f" {head_size}; build another: python examples/build.py --num-heads {num_heads} --head-size {head_size}"
        )
    other_keys = options.kv_seq_len not in (None, options.seq_len)
    if config.layout == "packed" and other_keys:
        raise EngineError(
            f"kv_seq_len is {options.kv_seq_len}, seq_len {options.seq_len}; {saved.path} takes layout 'packed', which"
            " has as many keys as queries: leave --kv-seq-len out"
        )
    if options.benchmark and (config.extras or other_keys):
        asked = [*config.extras, "kv_seq_len"] if other_keys else config.extras
        raise EngineError(
            f"--benchmark compares with what serves no {', '.join(asked)}; leave it out here, and time the library's"
            " kernels with pyfmha bench"
        )


def main(options: argparse.Namespace) -> int:
    """Run, check, and time if asked."""
    saved = read_engine(options.engine_dir)
    config = saved.config
    check_fits(saved, options)
    kv_seq_len = options.kv_seq_len or options.seq_len
    inputs = make_inputs(config, options.batch_size, options.seq_len, kv_seq_len, options.seed)
    with Session(saved.path) as session:
        results = session.run(inputs)
    exact = exact_outputs(config, inputs)
    verdicts = judge(config, results, exact)
    for text, _ in verdicts:
        print(text)
    passed = all(passed for _, passed in verdicts)
    if options.benchmark and passed:
        run_benchmark(Problem(saved, inputs, exact["Out"]), options.engine_dir)
    return 0 if passed else 1


if __name__ == "__main__":
    run_program(main, parse())
