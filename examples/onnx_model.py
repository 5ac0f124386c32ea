"""An ONNX model, from any file, to one whose attention is the plugin's node, proven to be the same, and to an engine.

    python examples/onnx_model.py                                  # a small model that it makes itself
    python examples/onnx_model.py model.onnx --output-dir out --range input_ids 1x1 8x128 8x512

Needs pip install '.[onnx]'; for the engine the full tensorrt, a GPU, and a library with the functions that it names.
On the command line: `pyfmha onnx` and `pyfmha onnx-engine`. Exit code 0: done; 1: not the same; 2: an error, on stderr.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pyfmha.errors import PyfmhaError
from pyfmha.onnx.command import rewrite
from pyfmha.onnx.engine import build_onnx_engine, parsed_range
from pyfmha.trt.modules import find_module

HEADS, SIZE = 4, 32
WIDTH = HEADS * SIZE


def small_model() -> onnx.ModelProto:
    """One layer of attention as exporters decompose it: X [batch, seq, 128], a window of 16 tokens, Y of X's shape."""
    chance = np.random.default_rng(0)
    weights = {name: chance.standard_normal((WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5 for name in "qkvo"}
    constants = {
        "heads": np.array([0, 0, HEADS, SIZE]), "whole": np.array([0, 0, WIDTH]), "one": np.array(1),
        "zero": np.array(0), "last": np.array(16), "hidden": np.float32(-np.inf),
        "seen": np.float32(0), "scale": np.float32(SIZE**-0.5), "columns": np.array([1]), "rows": np.array([0]),
    }  # fmt: skip
    nodes = []
    for name in "qkv":
        nodes += [
            helper.make_node("MatMul", ["X", f"w{name}"], [f"{name}0"]),
            helper.make_node("Reshape", [f"{name}0", "heads"], [f"{name}1"]),
            helper.make_node("Transpose", [f"{name}1"], [name], perm=[0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]),
        ]
    nodes += [
        helper.make_node("MatMul", ["q", "k"], ["products"]),
        helper.make_node("Mul", ["products", "scale"], ["scores"]),
        # A query sees the keys at its position and the fifteen before.
        helper.make_node("Shape", ["X"], ["length"], start=1, end=2),
        helper.make_node("Squeeze", ["length", "rows"], ["seq"]),
        helper.make_node("Range", ["zero", "seq", "one"], ["index"]),
        helper.make_node("Unsqueeze", ["index", "columns"], ["query"]),
        helper.make_node("Unsqueeze", ["index", "rows"], ["key"]),
        helper.make_node("Sub", ["query", "key"], ["distance"]),
        helper.make_node("GreaterOrEqual", ["distance", "zero"], ["before"]),
        helper.make_node("Less", ["distance", "last"], ["near"]),
        helper.make_node("And", ["before", "near"], ["visible"]),
        helper.make_node("Where", ["visible", "seen", "hidden"], ["mask"]),
        helper.make_node("Add", ["scores", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["joined"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["joined", "whole"], ["flat"]),
        helper.make_node("MatMul", ["flat", "wo"], ["Y"]),
    ]
    held = {**{f"w{name}": weight for name, weight in weights.items()}, **constants}
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()]
    shape = ["batch", "seq", WIDTH]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "XY"]
    graph = helper.make_graph(nodes, "layer", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="an ONNX model; default: a small one, which is made")
    parser.add_argument("--output-dir", type=Path, default=Path("onnx_out"))
    parser.add_argument(
        "--range", nargs=4, action="append", default=[], metavar=("INPUT", "MIN", "BEST", "MAX"), help="for the engine"
    )
    options = parser.parse_args()
    folder, source, ranges = options.output_dir, options.model, options.range
    folder.mkdir(parents=True, exist_ok=True)
    if source is None:
        source, ranges = folder / "model.onnx", ranges or [("X", "1x1x128", "2x64x128", "8x512x128")]
        onnx.save(small_model(), source)
    target = folder / f"{source.stem}.pyfmha.onnx"
    try:
        done = rewrite(source, target, proof=True)
        for entry in done.report.found:
            print(f"{entry.name}: {entry.problem or entry.reason}")
        for trial in done.trials:
            print(f"{trial.sizes}: {'same' if trial.same else 'DIFFERENT'}, {trial.compared[0]}")
        if not done.same:
            return 1
        try:
            trt = find_module()
            builds = hasattr(trt, "Builder")
        except PyfmhaError:
            builds = False
        if not builds:
            print(f"No engine: the full TensorRT is not installed. The model is {target}.")
            return 0
        built = build_onnx_engine(target, {name: parsed_range((low, best, high)) for name, low, best, high in ranges})
    except PyfmhaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (folder / f"{source.stem}.engine").write_bytes(built.plan)
    print(f"{folder / source.stem}.engine: {len(built.plan)} bytes, by TensorRT {built.tensorrt}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
