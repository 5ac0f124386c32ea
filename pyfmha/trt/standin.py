"""The few names of a TensorRT module that the plugin needs, for running it where no TensorRT is installed.

Used by :class:`pyfmha.trt.direct.DirectSession` only. Values of the enumerations are TensorRT's (NvInferRuntime*.h).
"""

from enum import IntEnum
from typing import Any

import numpy as np

__version__ = "stand-in"


class DataType(IntEnum):
    """As ``trt.DataType``, without the types that the plugin does not serve."""

    FLOAT = 0
    HALF = 1
    INT32 = 3
    BOOL = 4
    FP8 = 6
    BF16 = 7


class TensorFormat(IntEnum):
    """As ``trt.TensorFormat``: linear only."""

    LINEAR = 0


class PluginFieldType(IntEnum):
    """As ``trt.PluginFieldType``, without the types that the plugin does not use."""

    FLOAT32 = 1
    INT32 = 5
    CHAR = 6


class TensorRTPhase(IntEnum):
    """As ``trt.TensorRTPhase``."""

    BUILD = 0
    RUNTIME = 1


class PluginCapabilityType(IntEnum):
    """As ``trt.PluginCapabilityType``."""

    CORE = 0
    BUILD = 1
    RUNTIME = 2


class PluginField:
    """As ``trt.PluginField``."""

    def __init__(self, name: str, data: Any, type: PluginFieldType) -> None:
        self.name = name
        self.data = np.asarray(data)
        self.type = type

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(self.data.size)


class PluginFieldCollection(list[PluginField]):
    """As ``trt.PluginFieldCollection``."""


class Dims(tuple[int, ...]):
    """As ``trt.Dims``."""


class PluginTensorDesc:
    """As ``trt.PluginTensorDesc``."""

    def __init__(self) -> None:
        self.dims = Dims()
        self.type = DataType.FLOAT
        self.format = TensorFormat.LINEAR
        self.scale = 0.0


class DynamicPluginTensorDesc:
    """As ``trt.DynamicPluginTensorDesc``."""

    def __init__(self) -> None:
        self.desc = PluginTensorDesc()
        self.min = self.opt = self.max = Dims()


class IPluginV3:
    """As ``trt.IPluginV3``."""


class IPluginV3OneCore:
    """As ``trt.IPluginV3OneCore``."""


class IPluginV3OneBuild:
    """As ``trt.IPluginV3OneBuild``."""


class IPluginV3OneRuntime:
    """As ``trt.IPluginV3OneRuntime``."""


class IPluginCreatorV3One:
    """As ``trt.IPluginCreatorV3One``."""
