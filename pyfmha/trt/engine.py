"""Building engines.

Written for ``tensorrt`` 10.x, where strong typing is a flag of the network, and 11.x, where every network is strongly
typed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyfmha.attention import DTYPES
from pyfmha.bfloat16 import bf16_from_float
from pyfmha.errors import EngineError
from pyfmha.runtime.device import Device
from pyfmha.runtime.library import Library
from pyfmha.trt.failures import collect_failures
from pyfmha.trt.messages import collect_errors, failure_of, logger_of
from pyfmha.trt.modules import find_module
from pyfmha.trt.network import add_attention

LAYERS = ("plugin", "tensorrt")
"""Whose attention an engine has: this package's plugin, or TensorRT's own layer (from 10.14), to compare with."""

VERBOSITIES = ("layer_names_only", "detailed", "none")
_TYPES = {"fp16": "HALF", "bf16": "BF16", "fp32": "FLOAT"}

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, optimum and largest shape of an input."""


@dataclass(frozen=True)
class EngineConfig:
    """What an engine with one attention layer serves. Its inputs are Q, K, V, its output Out.

    Attributes:
        num_heads, head_size: fixed in the engine.
        max_batch_size, max_seq_len: both may be from 1 up to these; TensorRT times tactics at the largest.
        dtype: ``"fp16"``, ``"bf16"`` or ``"fp32"``.
        causal: whether a query sees only keys at its own position and before.
        softmax_scale: factor of Q K^T; None is 1 / sqrt(head size).
        layer: one of :data:`LAYERS`.

    Raises:
        EngineError: on creation, for values out of range.
    """

    num_heads: int
    head_size: int
    max_batch_size: int
    max_seq_len: int
    dtype: str = "fp16"
    causal: bool = True
    softmax_scale: float | None = None
    layer: str = "plugin"

    def __post_init__(self) -> None:
        for name in ("num_heads", "head_size", "max_batch_size", "max_seq_len"):
            if not 1 <= getattr(self, name) < 1 << 31:
                raise EngineError(f"{name} is {getattr(self, name)}; give 1 or more")
        for name, allowed in (("dtype", DTYPES), ("layer", LAYERS)):
            if getattr(self, name) not in allowed:
                raise EngineError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}")

    @property
    def scale(self) -> float:
        """The factor of Q K^T."""
        return 1 / math.sqrt(self.head_size) if self.softmax_scale is None else self.softmax_scale

    def range(self) -> Range:
        """The shapes that Q, K and V may have."""
        largest = (self.max_batch_size, self.num_heads, self.max_seq_len, self.head_size)
        return (1, self.num_heads, 1, self.head_size), largest, largest


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
        ranges: of every input with a dynamic dimension.
        timing_cache: an earlier :attr:`Built.timing_cache`; empty begins a new one.
        profiling_verbosity: one of :data:`VERBOSITIES`.
        version_compatible: whether ``tensorrt_lean`` and later versions of TensorRT may run it.
        device: the GPU on which to build and to time; None leaves the choice to TensorRT.

    Raises:
        EngineError: TensorRT has no builder, or refused.
        PluginError: a plugin failed; the text names its layer.
        DriverError: there is no such GPU.
    """
    if not hasattr(trt, "Builder"):
        raise EngineError(f"{trt.__name__} {trt.__version__} only runs engines; to build one: pip install tensorrt")
    if profiling_verbosity not in VERBOSITIES:
        raise EngineError(f"profiling_verbosity is {profiling_verbosity!r}; allowed are {', '.join(VERBOSITIES)}")
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
        builder = trt.Builder(logger_of(trt))
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
    for name, (smallest, optimum, largest) in ranges.items():
        profile.set_shape(name, smallest, optimum, largest)
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
        shape = (-1, config.num_heads, -1, config.head_size)
        kind = getattr(trt.DataType, _TYPES[config.dtype])
        q, k, v = (network.add_input(name, kind, shape) for name in ("Q", "K", "V"))
        kept = None
        if config.layer == "plugin":
            out = add_attention(
                network, q, k, v, causal=config.causal, scale=config.scale, library=library, trt_module=trt
            )
        else:
            out, kept = _add_tensorrt_attention(trt, network, q, k, v, config)
        out.name = "Out"
        network.mark_output(out)
        return kept

    return build_plan(
        trt,
        define,
        dict.fromkeys(("Q", "K", "V"), config.range()),
        timing_cache=timing_cache,
        profiling_verbosity=profiling_verbosity,
        version_compatible=version_compatible,
        device=device,
    )


def _add_tensorrt_attention(trt: Any, network: Any, q: Any, k: Any, v: Any, config: EngineConfig) -> tuple[Any, Any]:
    """TensorRT's own layer: its output, and the memory that must live until the engine is built.

    It has no factor for the scores, so Q is scaled before it. It may be split into several kernels: without that
    permission TensorRT refuses what none of its fused kernels serves.
    """
    if not hasattr(network, "add_attention"):
        raise EngineError(f"{trt.__name__} {trt.__version__} has no attention layer of its own; 10.14 and newer have")
    value = np.array([config.scale], np.float32)
    data = bf16_from_float(value) if config.dtype == "bf16" else value.astype({"fp16": np.float16}.get(config.dtype))
    weights = trt.Weights(q.dtype, data.ctypes.data, 1)
    factor = network.add_constant((1, 1, 1, 1), weights).get_output(0)
    scaled = network.add_elementwise(q, factor, trt.ElementWiseOperation.PROD).get_output(0)
    softmax = trt.AttentionNormalizationOp.SOFTMAX
    if hasattr(network, "add_attention_v2"):
        kind = trt.CausalMaskKind.UPPER_LEFT if config.causal else trt.CausalMaskKind.NONE
        layer = network.add_attention_v2(scaled, k, v, softmax, kind)
    else:
        layer = network.add_attention(scaled, k, v, softmax, config.causal)
    if layer is None:
        raise EngineError(f"{trt.__name__} {trt.__version__} refused its own attention layer for {config}")
    layer.decomposable = True
    layer.name = "attention"
    return layer.get_output(0), (data, weights)
