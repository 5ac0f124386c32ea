"""An engine of a rewritten model: NVIDIA's parser reads it, the plugin's creator answers for our nodes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyfmha.errors import EngineError, OnnxError, PluginError
from pyfmha.onnx.files import read_model
from pyfmha.onnx.inputs import inputs_of, shape_of
from pyfmha.runtime.library import Library
from pyfmha.trt.creator import register
from pyfmha.trt.engine import Built, build_plan
from pyfmha.trt.failures import collect_failures
from pyfmha.trt.messages import logger_of
from pyfmha.trt.modules import find_module

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, best and largest shape of an input."""


def parsed_range(values: tuple[str, str, str]) -> Range:
    """Three shapes, as ``1x1 8x128 8x512``.

    Raises:
        OnnxError: one is no shape, or they have not as many axes, or do not grow.
    """
    shapes = []
    for text in values:
        parts = text.lower().split("x")
        if not all(part.isdigit() for part in parts):
            raise OnnxError(f"{text!r} is no shape; give sizes joined by x, such as 8x128")
        shapes.append(tuple(map(int, parts)))
    smallest, best, largest = shapes
    if len({len(shape) for shape in shapes}) > 1:
        raise OnnxError(f"{' '.join(values)} have not as many axes")
    if any(not a <= b <= c for a, b, c in zip(smallest, best, largest, strict=True)):
        raise OnnxError(f"{' '.join(values)} must grow: the smallest, the best and the largest shape")
    return smallest, best, largest


def check_ranges(path: Path, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """Hold ranges against a model's inputs; those without free axes need none.

    Raises:
        OnnxError: an input with free axes has no range, one is named that is not there, or a shape does not fit.
    """
    shapes = {value.name or "": shape_of(value) for value in inputs_of(read_model(path).graph)}
    unknown = sorted(set(ranges) - set(shapes))
    if unknown:
        raise OnnxError(f"{path} has no input {', '.join(unknown)}; it has {', '.join(shapes)}")
    complete: dict[str, Range] = {}
    for name, sizes in shapes.items():
        free = [str(size) for size in sizes if size.number is None]
        if name not in ranges:
            if free:
                raise OnnxError(f"the input {name} has free axes {', '.join(free)}; give --range {name} MIN BEST MAX")
            continue
        for shape in ranges[name]:
            fits = len(shape) == len(sizes) and all(
                size.number in (None, number) for size, number in zip(sizes, shape, strict=True)
            )
            if not fits:
                wanted = "x".join(map(str, sizes))
                raise OnnxError(f"the range of {name} has {'x'.join(map(str, shape))}; the model has {wanted}")
        complete[name] = ranges[name]
    return complete


def build_onnx_engine(
    path: Path,
    ranges: Mapping[str, Range],
    *,
    library: Library | Path | str | None = None,
    trt_module: Any = None,
    **settings: Any,
) -> Built:
    """Build an engine of a model with nodes of ours.

    Args:
        path: as ``pyfmha onnx`` wrote it.
        ranges: smallest, best and largest shape of each input with free axes.
        library, trt_module: as :func:`pyfmha.trt.register`.
        settings: as :func:`pyfmha.trt.engine.build_plan`.

    Raises:
        OnnxError: the model, or a range, cannot be used, or TensorRT's parser refuses the model.
        PluginError: TensorRT is missing, or a node of ours is not served.
        LibraryError, EngineError, DriverError: as :func:`pyfmha.trt.engine.build_plan`.
    """
    trt = find_module(trt_module)
    if not hasattr(trt, "OnnxParser"):
        raise PluginError(f"{trt.__name__} {trt.__version__} has no ONNX parser; install tensorrt")
    complete = check_ranges(path, ranges)
    register(trt, library=library)

    def define(network: Any) -> Any:
        parser = trt.OnnxParser(network, logger_of(trt))
        with collect_failures() as failures:
            done = parser.parse_from_file(str(path))
        if done:
            return parser  # it holds the weights, and must live until the engine is built
        if failures:
            raise failures[-1].error
        said = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise EngineError(f"TensorRT's parser refuses {path}: {said or 'without a word'}")

    return build_plan(trt, define, complete, **settings)
