"""Building an engine with one attention layer."""

from pathlib import Path
from typing import Any

from pyfmha.attention.operator import OPERATOR
from pyfmha.errors import EngineError
from pyfmha.runtime.library import Library
from pyfmha.spec.advice import build_command
from pyfmha.trt.attention.config import EngineConfig
from pyfmha.trt.attention.network import add_attention, add_attention_packed
from pyfmha.trt.attention.own_inputs import NONE, OwnInputs, own_inputs
from pyfmha.trt.attention.own_layer import add_tensorrt_attention
from pyfmha.trt.attention.problem import INPUTS
from pyfmha.trt.creator import find_library, register
from pyfmha.trt.engine import Built, build_plan
from pyfmha.trt.modules import find_module
from pyfmha.trt.protocols import TensorRT, Verbosity

__all__ = ["EngineConfig", "build_engine"]


def build_engine(
    config: EngineConfig,
    *,
    trt_module: TensorRT | None = None,
    library: Library | Path | str | None = None,
    timing_cache: bytes = b"",
    profiling_verbosity: Verbosity = "layer_names_only",
    version_compatible: bool = False,
    device: int | None = 0,
    embed_library: bool = False,
) -> Built:
    """Build an engine with one attention layer.

    Args:
        config: what it serves.
        trt_module: as :func:`pyfmha.trt.register`; it needs a builder.
        library: as :func:`pyfmha.trt.register`; not looked at for TensorRT's own layer.
        timing_cache, profiling_verbosity, version_compatible, device: as :func:`build_plan`.
        embed_library: whether the engine carries the library with its plugin in C, so that it runs without files
            beside it and without Python; for that it is ``version_compatible``, and who runs it must trust it.

    Raises:
        EngineError, PluginError, LibraryError, DriverError: as :func:`build_plan` and
            :func:`pyfmha.trt.add_attention`.
    """
    trt = find_module(trt_module)
    embedded = find_library(library) if embed_library else None
    if embedded is not None and OPERATOR.name not in [operator.name for operator in embedded.operators]:
        raise EngineError(
            f"{embedded.path} has no plugin of its own to carry; build it again: {build_command(embedded.path)}"
        )

    own = NONE
    if config.score or config.mask_function:
        own = own_inputs(config, register(trt, library=library).library)

    def define(network: Any) -> Any:
        kept: Any = None
        tensors = _add_inputs(trt, network, config, own)
        if config.layer == "plugin":
            outputs = _add_plugin(trt, network, tensors, config, library, own)
        else:
            out, kept = add_tensorrt_attention(
                trt, network, *tensors.values(), dtype=config.dtype, scale=config.factor, causal=bool(config.causal)
            )
            outputs = (out,)
        for name, output in zip(("Out", "Lse"), outputs, strict=False):
            output.name = name
            network.mark_output(output)
        return kept

    return build_plan(
        trt,
        define,
        {**config.ranges(), **{name: (one.least, one.most, one.most) for name, one in own.tensors.items()}},
        timing_cache=timing_cache,
        profiling_verbosity=profiling_verbosity,
        version_compatible=version_compatible or embed_library,
        device=device,
        embedded=None if embedded is None else embedded.path,
    )


def _add_inputs(trt: Any, network: Any, config: EngineConfig, own: OwnInputs) -> dict[str, Any]:
    tensors = {}
    types = config.types()
    for name, axes in config.axes().items():
        shape = tuple(-1 if size is None else size for _, size in axes)
        tensors[name] = network.add_input(name, getattr(trt.DataType, types[name]), shape)
    for name, one in own.tensors.items():
        shape = tuple(least if least == most else -1 for least, most in zip(one.least, one.most, strict=True))
        tensors[name] = network.add_input(name, getattr(trt.DataType, one.type), shape)
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
    trt: Any,
    network: Any,
    tensors: dict[str, Any],
    config: EngineConfig,
    library: Library | Path | str | None,
    own: OwnInputs,
) -> tuple[Any, ...]:
    if config.max_kv_len != config.max_seq_len:
        _check_other_length(config, register(trt, library=library).library)
    settings: dict[str, Any] = {
        name: getattr(config, name) for name in ("causal", "scale", "align", "window", "softcap", "return_lse")
    }
    settings |= {name: tensor for name, tensor in tensors.items() if name not in (*INPUTS, "QKV", *own.tensors)}
    if config.score or config.mask_function:
        given = {**{name: tensors[source] for name, source in own.names.items()}, **own.numbers}
        settings |= {"score": config.score, ("score_inputs" if config.score else "mask_inputs"): given}
        settings["mask"] = tuple(one for one in (settings.get("mask"), config.mask_function) if one is not None)
    settings |= {"library": library, "trt_module": trt, "out_dtype": config.dtype}
    if config.layout == "packed":
        made = add_attention_packed(network, tensors["QKV"], config.num_heads, config.num_kv_heads, **settings)
    else:
        made = add_attention(network, *(tensors[name] for name in INPUTS), layout=config.layout, **settings)
    return made if config.return_lse else (made,)
