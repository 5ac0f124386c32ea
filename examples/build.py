"""Build a TensorRT engine of one attention layer, pyfmha's plugin, and save it with configuration and timing cache.

    pyfmha build                          # once: the library with the kernels, aot_out/libpyfmha.so
    python examples/build.py --num-heads 32 --head-size 64 --max-batch-size 8 --max-seq-len 512 --dtype float16
    python examples/run.py --num-heads 32 --head-size 64 --batch-size 8 --seq-len 512

    python examples/build.py --num-heads 32 --num-kv-heads 8 --head-size 128 --max-kv-seq-len 4096 --align bottom-right
    python examples/run.py --num-heads 32 --head-size 128 --seq-len 1 --kv-seq-len 4096

Needs numpy, cuda-python, the full tensorrt and a GPU. Writes fmha.engine, config.json and the timing cache, each whole
or not at all. Exit code 0: written; 2: an error, said on stderr.
"""

import argparse
import time
from pathlib import Path

from common import DTYPES, Parser, add_dtype, add_log_level, positive, run_program

from pyfmha.attention.operator import LAYOUTS
from pyfmha.trt.attention.engine import EngineConfig, build_engine
from pyfmha.trt.attention.requested import ALIGNMENTS
from pyfmha.trt.attention.saved import ENGINE_FILE, TIMING_CACHE_FILE, save_engine
from pyfmha.trt.engine import VERBOSITIES
from pyfmha.trt.saved import check_writable, read_timing_cache

FEATURES = (
    *("num_kv_heads", "max_kv_seq_len", "align", "window", "softcap", "layout", "return_lse"),
    *("q_lengths", "kv_lengths", "cu_seqlens"),
)
"""Fields of ``EngineConfig`` that only the plugin has."""


def add_features(parser: argparse.ArgumentParser) -> None:
    """The options :data:`FEATURES`, fields of ``EngineConfig``."""
    group = parser.add_argument_group("features", "of the library's functions fmha_fwd_*")
    group.add_argument("--num-kv-heads", type=positive, help="heads of K and V; default: num_heads")
    group.add_argument("--max-kv-seq-len", type=positive, help="keys, 1 up to this; default: max_seq_len")
    group.add_argument("--align", choices=ALIGNMENTS, help="what --causal and --window align; default: top-left")
    group.add_argument(
        "--window",
        type=int,
        nargs=2,
        default=(-1, -1),
        metavar=("LEFT", "RIGHT"),
        help="keys that a query sees beside its own position; -1 for no limit",
    )
    group.add_argument("--softcap", type=float, default=0.0, help="scores become softcap * tanh(score / softcap)")
    group.add_argument("--layout", choices=LAYOUTS, help="default: bhsd; packed: one input QKV")
    group.add_argument("--return-lse", action="store_true", help="an output Lse, the log-sum-exp of the scores")
    group.add_argument("--q-lengths", action="store_true", help="an input q_lengths, INT32 [batch]")
    group.add_argument("--kv-lengths", action="store_true", help="an input kv_lengths, INT32 [batch]")
    group.add_argument("--cu-seqlens", action="store_true", help="sequences behind each other, without padding")


def parse() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-heads", type=positive, default=32)
    parser.add_argument("--head-size", type=positive, default=64)
    parser.add_argument("--max-batch-size", type=positive, default=8, help="the engine serves 1 up to this")
    parser.add_argument("--max-seq-len", type=positive, default=512, help="the engine serves 1 up to this")
    add_dtype(parser)
    parser.add_argument(
        "--causal",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="default: causal, as their example",
    )
    add_features(parser)
    parser.add_argument(
        "--timing-cache",
        type=Path,
        help=f"read if it is there, and written; default: {TIMING_CACHE_FILE} in output_dir",
    )
    parser.add_argument("--profiling-verbosity", choices=VERBOSITIES, default="layer_names_only")
    add_log_level(parser)
    parser.add_argument("--output-dir", type=Path, default=Path("engine"))
    return parser


def main(options: argparse.Namespace) -> int:
    """Build and save."""
    config = EngineConfig(
        options.num_heads,
        options.head_size,
        options.max_batch_size,
        options.max_seq_len,
        DTYPES[options.dtype],
        causal=options.causal,
        **{name: getattr(options, name) for name in FEATURES},
    )
    timing_cache = options.timing_cache or options.output_dir / TIMING_CACHE_FILE
    check_writable(options.output_dir / ENGINE_FILE, timing_cache)
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
