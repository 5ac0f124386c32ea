"""Run the engine of trtllm_build.py with TensorRT-LLM's ``Session``, and check its output against float64.

    python examples/trtllm_run.py --num-heads 32 --head-size 64 --batch-size 8 --seq-len 512

Memory and streams are cuda-python's, through pyfmha. Exit code 0: the output is right; 1: it is not; 2: an error.
"""

import argparse
import json
import math
from pathlib import Path

from common import DTYPES, Parser, add_log_level, positive, run_program
from trtllm_build import engine_name

from pyfmha.attention.reference import LIMITS, attention_float64, relative_error
from pyfmha.attention.run import random_inputs, to_float
from pyfmha.errors import EngineError
from pyfmha.runtime.device import Device, DeviceArray, Stream, device_arrays
from pyfmha.trt import register
from pyfmha.trt.attention.graph_api import graph_api, told
from pyfmha.trt.saved import read_plan


def parse() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--seq-len", type=positive, default=512)
    parser.add_argument("--num-heads", type=positive, default=32)
    parser.add_argument("--head-size", type=positive, default=64)
    parser.add_argument("--engine-dir", type=Path, default=Path("engine_trtllm"), help="trtllm_build.py's output_dir")
    add_log_level(parser)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def read_config(folder: Path) -> dict[str, object]:
    """What trtllm_build.py gave the builder.

    Raises:
        EngineError: the configuration is missing or damaged.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())["builder_config"]
        if config["precision"] not in DTYPES:
            raise ValueError(config["precision"])
        return {name: config[name] for name in ("precision", "num_heads", "head_size", "causal")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"no usable configuration at {path} ({error}); build it: examples/trtllm_build.py") from None


def main(options: argparse.Namespace) -> int:
    """Run and check."""
    graph_api()
    with told("the session cannot be imported"):
        from tensorrt_llm.runtime.session import Session, TensorInfo

    config = read_config(options.engine_dir)
    if (config["num_heads"], config["head_size"]) != (options.num_heads, options.head_size):
        raise EngineError(f"the engine was built for {config['num_heads']} heads of size {config['head_size']}")
    precision = str(config["precision"])
    dtype, kind = DTYPES[precision], graph_api().str_dtype_to_trt(precision)
    plan = read_plan(options.engine_dir / engine_name(options.head_size, precision))
    shape = (options.batch_size, options.num_heads, options.seq_len, options.head_size)
    q, k, v = random_inputs(dtype, shape, options.seed)
    with Device():
        register()  # before the engine is loaded: its plugin cannot travel in it
        with told("the engine cannot be loaded or run here"):
            session = Session.from_serialized_engine(plan)
            if session.context is None:  # the earlier releases do not look
                raise RuntimeError("no execution context")
        with told(f"the engine's profile does not allow {list(shape)}"):
            infos = session.infer_shapes([TensorInfo(name, kind, shape) for name in ("Q", "K", "V")])
        found = tuple(infos[0].shape)
        if found != shape:  # what the earlier releases answer instead of raising
            raise EngineError(f"the engine's profile does not allow {list(shape)}: its output would be {list(found)}")
        arrays = [*map(DeviceArray.of, (q, k, v)), DeviceArray(shape, q.dtype)]
        with device_arrays(*arrays):
            stream = Stream()
            inputs = {name: array.pointer for name, array in zip(("Q", "K", "V"), arrays, strict=False)}
            with told("the engine did not run"):
                done = session.run(inputs=inputs, outputs={"out": arrays[3].pointer}, stream=stream.handle)
                if not done:
                    raise RuntimeError("enqueue failed")
            stream.synchronize()
            out = arrays[3].to_host()
            stream.close()
        del session
    exact = attention_float64(
        *(to_float(x, dtype) for x in (q, k, v)),
        scale=1 / math.sqrt(options.head_size),
        causal=bool(config["causal"]),
    ).out
    error = relative_error(to_float(out, dtype), exact)
    passed = error <= LIMITS[dtype]
    verdict = "passed" if passed else "FAILED"
    print(f"{list(shape)} {dtype}: relative error {error:.1e} against float64, limit {LIMITS[dtype]:.0e}: {verdict}")
    return 0 if passed else 1


if __name__ == "__main__":
    run_program(main, parse())
