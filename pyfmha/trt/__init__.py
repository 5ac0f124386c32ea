"""The plugin for TensorRT: registering it, putting it in a network, running it. Imports TensorRT only when asked to."""

from pyfmha.errors import PluginError
from pyfmha.trt.attention.direct import DirectSession
from pyfmha.trt.attention.network import add_attention, add_attention_packed
from pyfmha.trt.attention.problem import Features
from pyfmha.trt.creator import find_library, register
from pyfmha.trt.failures import Failure, collect_failures, last_failure
from pyfmha.trt.network import add_operator
from pyfmha.trt.protocols import IHostMemory, INetworkDefinition, ITensor, TensorRT

__all__ = [
    "DirectSession",
    "Failure",
    "Features",
    "IHostMemory",
    "INetworkDefinition",
    "ITensor",
    "PluginError",
    "TensorRT",
    "add_attention",
    "add_attention_packed",
    "add_operator",
    "collect_failures",
    "find_library",
    "last_failure",
    "register",
]
