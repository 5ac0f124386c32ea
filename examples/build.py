"""Build a TensorRT engine of one attention layer, pyfmha's plugin, and save it with configuration and timing cache.

    pyfmha build                          # once: the library with the kernels, aot_out/libpyfmha.so
    python examples/build.py --num_heads 32 --head_size 64 --max_batch_size 8 --max_seq_len 512 --dtype float16
    python examples/run.py --num_heads 32 --head_size 64 --batch_size 8 --seq_len 512

Needs numpy, cuda-python, the full tensorrt and a GPU. Writes fmha.engine, config.json and the timing cache, each whole
or not at all. Exit code 0: written; 2: an error, said on stderr.
"""

import argparse
import time
from pathlib import Path

from common import DTYPES, add_log_level, positive, run_program

from pyfmha.trt.engine import VERBOSITIES, EngineConfig, build_engine
from pyfmha.trt.saved import TIMING_CACHE_FILE, read_timing_cache, save_engine


def parse() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_heads", type=positive, default=32)
    parser.add_argument("--head_size", type=positive, default=64)
    parser.add_argument("--max_batch_size", type=positive, default=8, help="the engine serves 1 up to this")
    parser.add_argument("--max_seq_len", type=positive, default=512, help="the engine serves 1 up to this")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True, help="default: causal")
    parser.add_argument(
        "--timing_cache",
        type=Path,
        help=f"read if it is there, and written; default: {TIMING_CACHE_FILE} in output_dir",
    )
    parser.add_argument("--profiling_verbosity", choices=VERBOSITIES, default="layer_names_only")
    add_log_level(parser)
    parser.add_argument("--output_dir", type=Path, default=Path("engine"))
    return parser


def main(options: argparse.Namespace) -> int:
    """Build and save."""
    config = EngineConfig(
        options.num_heads,
        options.head_size,
        options.max_batch_size,
        options.max_seq_len,
        DTYPES[options.dtype],
        options.causal,
    )
    timing_cache = options.timing_cache or options.output_dir / TIMING_CACHE_FILE
    begin = time.perf_counter()
    built = build_engine(
        config, timing_cache=read_timing_cache(timing_cache), profiling_verbosity=options.profiling_verbosity
    )
    saved = save_engine(built, config, options.output_dir, timing_cache)
    seconds = time.perf_counter() - begin
    print(f"{saved.path}: {len(built.plan)} bytes, TensorRT {built.tensorrt}, {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    run_program(main, parse())
