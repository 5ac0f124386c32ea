"""Building engines.

Written for ``tensorrt`` 10.x, where strong typing is a flag of the network, and 11.x, where every network is strongly
typed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyfmha.errors import EngineError
from pyfmha.runtime.device import Device
from pyfmha.runtime.library import Library
from pyfmha.spec.advice import build_command
from pyfmha.trt.config import EngineConfig, Range, check_range
from pyfmha.trt.creator import register
from pyfmha.trt.failures import collect_failures
from pyfmha.trt.messages import collect_errors, failure_of, make_root
from pyfmha.trt.modules import find_module
from pyfmha.trt.network import add_attention, add_attention_packed
from pyfmha.trt.own_layer import add_tensorrt_attention
from pyfmha.trt.problem import TYPE_NAMES
from pyfmha.trt.shapes import INPUTS

__all__ = ["VERBOSITIES", "Built", "EngineConfig", "build_engine", "build_plan"]

VERBOSITIES = ("layer_names_only", "detailed", "none")


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
    trt: Any,
    define: Callable[[Any], Any],
    ranges: Mapping[str, Range],
    *,
    timing_cache: bytes = b"",
    profiling_verbosity: str = "layer_names_only",
    version_compatible: bool = False,
    device: int | None = 0,
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

    Raises:
        EngineError: TensorRT has no builder, a range is none, or TensorRT refused.
        PluginError: a plugin failed; the text names its layer.
        DriverError: there is no such GPU.
    """
    if not hasattr(trt, "Builder"):
        raise EngineError(f"{trt.__name__} {trt.__version__} only runs engines; to build one: pip install tensorrt")
    if profiling_verbosity not in VERBOSITIES:
        raise EngineError(f"profiling_verbosity is {profiling_verbosity!r}; allowed are {', '.join(VERBOSITIES)}")
    for name, bounds in ranges.items():
        check_range(name, bounds)
    # Before TensorRT looks for a GPU: where there is none it would fail with less to say.
    held = None if device is None else Device(device)
    try:
        return _build(trt, define, ranges, timing_cache, profiling_verbosity, version_compatible)
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


def build_engine(
    config: EngineConfig,
    *,
    trt_module: Any = None,
    library: Library | Path | str | None = None,
    timing_cache: bytes = b"",
    profiling_verbosity: str = "layer_names_only",
    version_compatible: bool = False,
    device: int | None = 0,
) -> Built:
    """Build an engine with one attention layer.

    Args:
        config: what it serves.
        trt_module: as :func:`pyfmha.trt.register`; it needs a builder.
        library: as :func:`pyfmha.trt.register`; not looked at for TensorRT's own layer.
        timing_cache, profiling_verbosity, version_compatible, device: as :func:`build_plan`.

    Raises:
        EngineError, PluginError, LibraryError, DriverError: as :func:`build_plan` and
            :func:`pyfmha.trt.add_attention`.
    """
    trt = find_module(trt_module)

    def define(network: Any) -> Any:
        kept: Any = None
        tensors = _add_inputs(trt, network, config)
        if config.layer == "plugin":
            outputs = _add_plugin(trt, network, tensors, config, library)
        else:
            out, kept = add_tensorrt_attention(
                trt, network, *tensors.values(), dtype=config.dtype, scale=config.scale, causal=bool(config.causal)
            )
            outputs = (out,)
        for name, output in zip(("Out", "Lse"), outputs, strict=False):
            output.name = name
            network.mark_output(output)
        return kept

    return build_plan(
        trt,
        define,
        config.ranges(),
        timing_cache=timing_cache,
        profiling_verbosity=profiling_verbosity,
        version_compatible=version_compatible,
        device=device,
    )


def _add_inputs(trt: Any, network: Any, config: EngineConfig) -> dict[str, Any]:
    tensors = {}
    for name, axes in config.axes().items():
        kind = TYPE_NAMES[config.dtype] if name in (*INPUTS, "QKV") else "INT32"
        shape = tuple(-1 if size is None else size for _, size in axes)
        tensors[name] = network.add_input(name, getattr(trt.DataType, kind), shape)
    return tensors


def _check_other_length(config: EngineConfig, library: Library) -> None:
    """Refuse a library with the first kernel alone: shapes of -1 do not tell add_attention that keys have a length of
    their own."""
    problem = config.problem
    if problem.function_name not in library:
        wanted = ("--dtype", config.dtype, "--head-size", str(problem.padded_size))
        raise EngineError(
            f"{library.path} does not hold {problem.function_name}, which serves max_kv_seq_len {config.max_kv_len}"
            f" beside max_seq_len {config.max_seq_len}. Add it: {build_command(library.path, *wanted)}"
        )


def _add_plugin(
    trt: Any, network: Any, tensors: dict[str, Any], config: EngineConfig, library: Library | Path | str | None
) -> tuple[Any, ...]:
    if config.max_kv_len != config.max_seq_len:
        _check_other_length(config, register(trt, library=library).library)
    settings: dict[str, Any] = {
        name: getattr(config, name) for name in ("causal", "scale", "align", "window", "softcap", "return_lse")
    }
    settings |= {name: tensor for name, tensor in tensors.items() if name not in (*INPUTS, "QKV")}
    settings |= {"library": library, "trt_module": trt}
    if config.layout == "packed":
        made = add_attention_packed(network, tensors["QKV"], config.num_heads, config.num_kv_heads, **settings)
    else:
        made = add_attention(network, *(tensors[name] for name in INPUTS), layout=config.layout, **settings)
    return made if config.return_lse else (made,)
