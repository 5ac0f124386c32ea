import collections
import inspect
from types import SimpleNamespace

from tensorrt_llm._common import net_guard

__all__ = ["Network", "net_guard"]


class Network:
    def __init__(self, trt_network):
        self.trt_network = trt_network
        self.inputs = {}
        self.counts = collections.Counter()
        self.module = ""
        self.plugin_config = SimpleNamespace(to_legacy_setting=lambda: None)

    def name_layer(self, layer):
        """After the functions on the stack and the lines that they are at, up to a module's ``forward``."""
        stack, frame = [], inspect.currentframe().f_back.f_back
        while frame is not None and frame.f_code.co_name != "forward" and len(stack) < 10:
            stack.append(f"{frame.f_code.co_name}_L{frame.f_lineno}")
            frame = frame.f_back
        key = "/".join([part for part in (self.module, *reversed(stack)) if part] + ["PLUGIN_V3"])
        layer.name = f"{key}_{self.counts[key]}"
        self.counts[key] += 1
        for index, output in enumerate(layer.outputs):
            output.name = f"{layer.name}_output_{index}"
