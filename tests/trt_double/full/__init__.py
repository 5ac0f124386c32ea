"""A double of the whole of TensorRT, for examples and sessions: builder, network, runtime, engine, context.

It computes: on the fake GPU of :mod:`trt_double.full.gpu`, with the plugin's own launches. The plugin's side is
:mod:`trt_double.binding`. ``path/`` holds packages ``tensorrt``, ``tensorrt_lean``, ``tensorrt_llm`` and
``cuda.bindings`` for a PYTHONPATH.
"""

import ctypes
import os
import sys
from collections.abc import Sequence
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

from pyfmha.trt.tables import LibraryTables, TablePlugin
from trt_double import Field, Tensor
from trt_double.binding import DoubleCalls, LibraryCreator, TensorFormat, make_binding, version_of
from trt_double.full import builder, network, runtime
from trt_double.full.gpu import gpu

VERSIONS = ("10.13.3", "10.14.1", "11.4.0")


class LoudCalls(DoubleCalls):
    """As the binding: what an override raises goes to stderr."""

    def _desc(self, tensor: Tensor) -> Any:
        """C++ has the formats; the lean module has no name for them."""
        desc = self.trt.PluginTensorDesc()
        desc.dims, desc.type = self.trt.Dims(tensor.shape), self.trt.DataType(tensor.type)
        desc.format = TensorFormat(tensor.format)
        return desc

    def _try(self, plugin: Any, call: str, failed: Any, use: Any, *arguments: Any) -> Any:
        try:
            return use(getattr(plugin, call)(*arguments))
        except Exception as error:
            self.errors.append(f"Exception thrown from {call}() {error}")
            sys.stderr.write(f"[ERROR] {self.errors[-1]}\n")
            return failed


class _Tables(LibraryTables):
    """The calls on a plugin in C: its tables are in the plugin, whichever library it comes from."""

    def __init__(self) -> None:
        pass


class BothCalls:
    """The calls on plugins of either kind: Python's through the binding, a library's through its tables."""

    def __init__(self, trt: Any) -> None:
        self._python, self._c = LoudCalls(trt), _Tables()
        self.errors, self.kept = self._python.errors, self._python.kept

    def create(self, creator: Any, name: str, fields: Sequence[Field], phase: int) -> Any | None:
        if isinstance(creator, LibraryCreator):
            return creator.tables.create(creator.address, name, fields, phase)
        return self._python.create(creator, name, fields, phase)

    def destroy(self, plugin: Any) -> None:
        if isinstance(plugin, TablePlugin):
            plugin.delete()
        else:
            self._python.destroy(plugin)

    def __getattr__(self, call: str) -> Any:
        def made(plugin: Any, *arguments: Any) -> Any:
            return getattr(self._c if isinstance(plugin, TablePlugin) else self._python, call)(plugin, *arguments)

        return made


class Severity(IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class _Flags(IntEnum):
    VERSION_COMPATIBLE, EXCLUDE_LEAN_RUNTIME = range(2)


class _Double(SimpleNamespace):
    """What tests look at: ``calls``, and ``timed``, the tactics that builds measured; and what they set.

    ``old_driver``: the driver is too old for TensorRT's CUDA; for a process of its own, ``TRT_DOUBLE_DRIVER=old``.
    ``refused_profiles``: numbers of optimisation profiles that a context refuses.
    """

    def check_driver(self, logger: Any) -> None:
        """What the binding makes of TensorRT's null pointers; TensorRT logs its reason as a warning."""
        if self.old_driver:
            logger.log(
                Severity.WARNING, "CUDA initialization failure with error: 35. Please check your CUDA installation"
            )
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def use_runtime_context(self) -> bool:
        """As the CUDA runtime does: the current context, else device 0's primary one. False where there is no GPU."""
        cuda = gpu().cuda.c
        context = ctypes.c_void_p()
        if cuda.cuInit(0) != 0:
            return False
        cuda.cuCtxGetCurrent(ctypes.byref(context))
        if not context.value:
            cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
            cuda.cuCtxSetCurrent(context)
        return True


def _bound(name: str, trt: Any, made: type, *first: Any) -> type:
    """A class whose constructor knows its module."""

    def start(self: Any, *arguments: Any, **keywords: Any) -> None:
        made.__init__(self, *first, *arguments, **keywords)

    return type(name, (made,), {"__init__": start, "__module__": trt.__name__})


def make_full(name: str, version: str) -> Any:
    """A double of one version of ``tensorrt``, or of ``tensorrt_lean``, which builds nothing."""
    numbers = version_of(version)
    repeats = numbers < (10, 16) and int(np.__version__.split(".")[0]) >= 2
    trt = make_binding(name, repeats=repeats)
    trt.__version__ = version
    old = os.environ.get("TRT_DOUBLE_DRIVER") == "old"
    trt.double = _Double(calls=BothCalls(trt), timed=[], old_driver=old, refused_profiles=set())
    modern = numbers >= (11, 0)

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

        def __init__(self) -> None:
            self.started = True

        def log(self, severity: Severity, msg: str) -> None:
            raise NotImplementedError

    class IOutputAllocator:
        def __init__(self) -> None:
            self.started = True

    ILogger.Severity = Severity
    trt.ILogger, trt.IOutputAllocator = ILogger, IOutputAllocator
    trt.Runtime = _bound("Runtime", trt, runtime.Runtime, trt)
    trt.TensorIOMode, trt.TensorLocation = runtime.TensorIOMode, runtime.TensorLocation
    trt.ProfilingVerbosity = builder.ProfilingVerbosity
    if "lean" in name:
        del trt.INetworkDefinition, trt.TensorFormat
        return trt
    trt.Builder = _bound("Builder", trt, builder.Builder, trt)
    trt.BuilderFlag = _Flags
    trt.Weights = network.Weights
    trt.ElementWiseOperation = network.ElementWiseOperation
    hidden = [] if modern else ["add_attention_v2"]
    if version.startswith("10.13"):
        hidden.append("add_attention")
    trt.INetworkDefinition = _network_class(trt, hidden)
    trt.AttentionNormalizationOp = network.AttentionNormalizationOp
    if modern:
        trt.CausalMaskKind = network.CausalMaskKind
        trt.NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", [])
    else:
        flags = [("EXPLICIT_BATCH", 0), ("STRONGLY_TYPED", 1)]
        trt.NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", flags)
    return trt


def _network_class(trt: Any, hidden: list[str]) -> type:
    inherited = {"__dict__", "__weakref__", "__doc__", "__module__", *hidden}
    content = {key: value for key, value in vars(network.Network).items() if key not in inherited}
    return type("INetworkDefinition", (), {**content, "__module__": trt.__name__})
