"""Build an engine with one attention layer through TensorRT-LLM's graph API; trtllm_run.py runs it.

    python examples/trtllm_build.py --num-heads 32 --head-size 64 --max-batch-size 8 --max-seq-len 512 --dtype float16

Needs TensorRT-LLM 0.10 to 1.3.0rc20, which have that API, and the library with the kernels. That is built in an
environment of its own (pyfmha build), as those releases pin a Triton that is too old for it, and runs in this one.
Exit code 0: written; 2: an error, said on stderr.
"""

import argparse
import math
from pathlib import Path

from common import Parser, add_dtype, add_log_level, positive, run_program

from pyfmha.trt.attention.graph_api import graph_api, told
from pyfmha.trt.engine import VERBOSITIES
from pyfmha.trt.saved import check_writable, write_whole


def engine_name(head_size: int, dtype: str) -> str:
    """The engine's file."""
    return f"fmha_d{head_size}_{dtype}.engine"


def parse() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-heads", type=positive, default=32)
    parser.add_argument("--head-size", type=positive, default=64)
    parser.add_argument("--max-batch-size", type=positive, default=8)
    parser.add_argument("--max-seq-len", type=positive, default=512)
    add_dtype(parser)
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--timing-cache", type=Path, help="read if it is there, and written; default: in output_dir")
    parser.add_argument("--profiling-verbosity", choices=VERBOSITIES, default="layer_names_only")
    add_log_level(parser)
    parser.add_argument("--output-dir", type=Path, default=Path("engine_trtllm"))
    return parser


def main(options: argparse.Namespace) -> int:
    """Build and save."""
    graph_api()  # before anything else of TensorRT-LLM: it says best what is missing
    with told("the builder cannot be imported"):
        from tensorrt_llm.builder import Builder
        from tensorrt_llm.network import net_guard

    from pyfmha.trtllm import FmhaLayer

    cache = options.timing_cache or options.output_dir / "model.cache"
    path = options.output_dir / engine_name(options.head_size, options.dtype)
    check_writable(path, cache)
    layer = FmhaLayer(
        options.num_heads, options.head_size, 1 / math.sqrt(options.head_size), options.dtype, causal=options.causal
    )
    with told("the engine was not built"):
        builder = Builder()
        config = builder.create_builder_config(
            name="pyfmha",
            precision=options.dtype,
            timing_cache=str(cache),
            profiling_verbosity=options.profiling_verbosity,
            num_heads=options.num_heads,
            head_size=options.head_size,
            causal=options.causal,
        )
        network = builder.create_network()
        network.plugin_config.to_legacy_setting()
        with net_guard(network):
            layer(*layer.prepare_inputs(options.max_batch_size, options.max_seq_len))
        plan = builder.build_engine(network, config)
    write_whole(path, bytes(plan))
    cache.parent.mkdir(parents=True, exist_ok=True)
    with told(f"{path} is written, its configuration and timing cache are not"):
        builder.save_config(config, str(options.output_dir / "config.json"))
        builder.save_timing_cache(config, str(cache))
    print(f"{path}: {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    run_program(main, parse())
