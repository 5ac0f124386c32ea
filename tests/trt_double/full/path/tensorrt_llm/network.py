import itertools
from types import SimpleNamespace

from tensorrt_llm._common import net_guard

__all__ = ["Network", "net_guard"]


class Network:
    def __init__(self, trt_network):
        self.trt_network = trt_network
        self.inputs = {}
        self.new_name = itertools.count().__next__
        self.plugin_config = SimpleNamespace(to_legacy_setting=lambda: None)
