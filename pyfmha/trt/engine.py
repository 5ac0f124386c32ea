"""Building engines of any network.

Written for ``tensorrt`` 10.x, where strong typing is a flag of the network, and 11.x, where every network is strongly
typed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyfmha.errors import EngineError
from pyfmha.runtime.device import Device
from pyfmha.trt.creator import find_library
from pyfmha.trt.failures import collect_failures
from pyfmha.trt.messages import collect_errors, failure_of, make_root
from pyfmha.trt.protocols import TensorRT, Verbosity

VERBOSITIES = ("layer_names_only", "detailed", "none")

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, optimum and largest shape of an input."""

MAX_RANK = 8
"""``trt.Dims.MAX_DIMS``."""


def check_range(name: str, bounds: Range) -> None:
    """Refuse what is no range of an input's shapes.

    Raises:
        EngineError: there are not three shapes of one rank, of at most 8 dimensions, none larger than the next.
    """
    shapes = [tuple(shape) for shape in bounds]
    listed = ", ".join(str(list(shape)) for shape in shapes)
    if len(shapes) != 3 or len(set(map(len, shapes))) != 1:
        raise EngineError(
            f"the range of input {name} is {listed}; give its smallest, optimum and largest shape, of one rank"
        )
    if len(shapes[0]) > MAX_RANK:
        raise EngineError(
            f"the range of input {name} is {listed}, of {len(shapes[0])} dimensions; TensorRT has at most {MAX_RANK}"
        )
    if not all(0 <= low <= middle <= high for low, middle, high in zip(*shapes, strict=True)):
        raise EngineError(
            f"the range of input {name} is {listed}; no size may be negative, or larger than in the shape after it"
        )


@dataclass(frozen=True)
class Built:
    """A serialised engine.

    Attributes:
        plan: the engine, for :class:`pyfmha.trt.session.Session` or ``Runtime.deserialize_cuda_engine``.
        timing_cache: what TensorRT measured while it built, serialised; empty where it gave none.
        tensorrt: version of the module that built it.
    """

    plan: bytes
    timing_cache: bytes
    tensorrt: str


def build_plan(
    trt: TensorRT,
    define: Callable[[Any], Any],
    ranges: Mapping[str, Range],
    *,
    timing_cache: bytes = b"",
    profiling_verbosity: Verbosity = "layer_names_only",
    version_compatible: bool = False,
    device: int | None = 0,
    embedded: Path | None = None,
) -> Built:
    """Build any engine with one optimisation profile.

    Args:
        trt: a TensorRT module with a builder.
        define: adds inputs, layers and outputs to an ``INetworkDefinition``. What it returns is kept until the engine
            is built: TensorRT does not copy the memory behind weights.
        ranges: of every input with a dynamic dimension: its smallest, optimum and largest shape.
        timing_cache: an earlier :attr:`Built.timing_cache`; empty begins a new one.
        profiling_verbosity: one of :data:`VERBOSITIES`.
        version_compatible: whether ``tensorrt_lean`` and later versions of TensorRT may run it.
        device: the GPU on which to build and to time; None leaves the choice to TensorRT.
        embedded: a library with plugins of its own that the plan carries; only a ``version_compatible`` one does.

    Raises:
        EngineError: TensorRT has no builder, a range is none, or TensorRT refused.
        PluginError: a plugin failed; the text names its layer.
        LibraryError: what is to be embedded is no library of pyfmha's.
        DriverError: there is no such GPU.
    """
    if not hasattr(trt, "Builder"):
        raise EngineError(f"{trt.__name__} {trt.__version__} only runs engines; to build one: pip install tensorrt")
    if profiling_verbosity not in VERBOSITIES:
        raise EngineError(f"profiling_verbosity is {profiling_verbosity!r}; allowed are {', '.join(VERBOSITIES)}")
    if embedded is not None and not version_compatible:
        raise EngineError("only a version-compatible engine carries a library; give version_compatible=True too")
    if embedded is not None and not find_library(embedded).operators:
        raise EngineError(f"{embedded} has no plugins for the engine to carry: it was linked without operators")
    for name, bounds in ranges.items():
        check_range(name, bounds)
    # Before TensorRT looks for a GPU: where there is none it would fail with less to say.
    held = None if device is None else Device(device)
    try:
        return _build(trt, define, ranges, timing_cache, profiling_verbosity, version_compatible, embedded)
    finally:  # after every object of TensorRT's is gone
        if held is not None:
            held.close()


def _build(
    trt: Any,
    define: Callable[[Any], Any],
    ranges: Mapping[str, Range],
    timing_cache: bytes,
    verbosity: str,
    version_compatible: bool,
    embedded: Path | None,
) -> Built:
    with collect_failures() as failures, collect_errors() as said:
        builder = make_root(trt, "Builder")
        network = builder.create_network(_network_flags(trt))
        kept = define(network)
        config = builder.create_builder_config()
        config.profiling_verbosity = getattr(trt.ProfilingVerbosity, verbosity.upper())
        if version_compatible:
            # Without the runtime inside, for else loading would mean to run code out of the engine's file.
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
            config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
        if embedded is not None:
            config.plugins_to_serialize = [str(embedded)]
        _add_profile(builder, config, ranges)
        cache = _set_timing_cache(config, timing_cache)
        plan = builder.build_serialized_network(network, config)
        del kept
        if plan is None:
            raise failure_of("the engine was not built", failures, said)
        return Built(bytes(plan), bytes(cache.serialize()), trt.__version__)


def _network_flags(trt: Any) -> int:
    strong = getattr(getattr(trt, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED", None)
    return 0 if strong is None else 1 << int(strong)


def _add_profile(builder: Any, config: Any, ranges: Mapping[str, Range]) -> None:
    if not ranges:
        return
    profile = builder.create_optimization_profile()
    for name, bounds in ranges.items():
        try:
            profile.set_shape(name, *bounds)
        except (RuntimeError, TypeError, ValueError) as error:
            raise EngineError(f"TensorRT refused the range {bounds} of input {name}: {error}") from None
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(f"TensorRT refused the optimisation profile {dict(ranges)}")


def _set_timing_cache(config: Any, content: bytes) -> Any:
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise EngineError(
            "the timing cache is damaged, or of another TensorRT version or GPU; remove the file or name another"
        )
    return cache
