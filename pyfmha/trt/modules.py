"""Finding the TensorRT module to work with. Nothing is imported until asked."""

import importlib
import sys
from types import ModuleType
from typing import Any

from pyfmha.errors import PluginError

MODULES = ("tensorrt", "tensorrt_lean", "tensorrt_dispatch")
"""The order in which a module is looked for: the full library, then those that only run engines."""

NEEDED = (
    "IPluginV3",
    "IPluginV3OneCore",
    "IPluginV3OneBuild",
    "IPluginV3OneRuntime",
    "IPluginCreatorV3One",
    "PluginField",
    "PluginFieldCollection",
    "TensorRTPhase",
)


def find_module(trt_module: Any = None) -> Any:
    """The module given, or the first of :data:`MODULES` that can be imported.

    Raises:
        PluginError: none is installed, or it is too old for version 3 plugins.
    """
    trt = trt_module if trt_module is not None else _import_first()
    missing = [name for name in NEEDED if not hasattr(trt, name)]
    if missing:
        version = getattr(trt, "__version__", "of unknown version")
        raise PluginError(f"{trt.__name__} {version} has no {', '.join(missing)}; use TensorRT 10.8 or newer")
    return trt


def _import_first() -> ModuleType:
    reasons = []
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                reasons.append(f"{name}: {error}")
        except (ImportError, OSError) as error:  # installed, but its shared libraries do not load
            reasons.append(f"{name}: {error}")
    why = f" ({'; '.join(reasons)})" if reasons else ""
    raise PluginError(
        f"TensorRT is not installed{why}: pip install tensorrt, or tensorrt-lean where engines are only run;"
        " pyfmha.DirectSession runs the plugin without it"
    )


def module_of(network: Any) -> Any:
    """The TensorRT module that a network object comes from: plugins must be of that module's classes.

    Raises:
        PluginError: it is of no TensorRT module that is imported.
    """
    own = type(network).__module__.partition(".")[0].removesuffix("_bindings")
    for name in dict.fromkeys((own, *MODULES, "tensorrt_rtx")):
        definition = getattr(sys.modules.get(name), "INetworkDefinition", None)
        if definition is not None and isinstance(network, definition):
            return sys.modules[name]
    raise PluginError(
        f"{type(network).__module__}.{type(network).__name__} is not a network of an imported TensorRT module"
    )
