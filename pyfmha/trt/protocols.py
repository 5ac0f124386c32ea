"""TensorRT's objects as types, as far as this package uses them: a type checker refuses what is none.

TensorRT has no types that a checker can read, and there are three modules with classes of their own; so these are
protocols, which the objects of all of them are, ``tensorrt``'s, ``tensorrt_lean``'s and ``tensorrt_rtx``'s. Nothing is
imported or checked while a program runs.
"""

import os
from typing import Any, Literal, Protocol, TypeVar


class TensorRT(Protocol):
    """A TensorRT module of version 10.8 or newer: ``import tensorrt``, or one with the classes of its plugins."""

    @property
    def __name__(self) -> str: ...
    @property
    def __version__(self) -> str: ...
    @property
    def PluginField(self) -> Any: ...
    @property
    def PluginFieldCollection(self) -> Any: ...
    @property
    def TensorRTPhase(self) -> Any: ...


class ITensor(Protocol):
    """A tensor of a network, ``trt.ITensor``: what ``add_input`` and a layer's ``get_output`` return."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def is_network_input(self) -> bool: ...


class INetworkDefinition(Protocol):
    """A network that takes plugins, ``trt.INetworkDefinition``."""

    def add_input(self, name: str, dtype: Any, shape: Any, /) -> Any: ...
    def mark_output(self, tensor: Any, /) -> Any: ...
    def add_plugin_v3(self, inputs: Any, shape_inputs: Any, plugin: Any, /) -> Any: ...


class IHostMemory(Protocol):
    """Memory of TensorRT's, ``trt.IHostMemory``: what ``build_serialized_network`` returns."""

    @property
    def nbytes(self) -> int: ...


AnyTensor = TypeVar("AnyTensor", bound=ITensor)
"""The tensors of one TensorRT module: those that come out are of the class of those that went in."""

Plan = str | os.PathLike[str] | bytes | bytearray | memoryview | IHostMemory
"""A serialised engine, or the path of its file."""

Verbosity = Literal["layer_names_only", "detailed", "none"]
"""How much an engine tells of its layers."""

Kind = Literal["python", "library"]
"""Which of the two plugins."""
