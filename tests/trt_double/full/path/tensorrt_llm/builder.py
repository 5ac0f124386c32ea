import json
import os
from types import SimpleNamespace

import tensorrt as trt

from tensorrt_llm.logger import trt_logger
from tensorrt_llm.network import Network


class Builder:
    def __init__(self):
        assert trt.__version__.startswith("10."), "these releases are for TensorRT 10"
        self.trt_builder = trt.Builder(trt_logger)

    def create_network(self):
        return Network(self.trt_builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)))

    def create_builder_config(self, precision, timing_cache=None, profiling_verbosity="layer_names_only", **kwargs):
        config = self.trt_builder.create_builder_config()
        content = b""
        if timing_cache is not None and os.path.exists(timing_cache):
            with open(timing_cache, "rb") as file:
                content = file.read()
        config.set_timing_cache(config.create_timing_cache(content), ignore_mismatch=False)
        return SimpleNamespace(trt_builder_config=config, kept={"precision": precision, **kwargs})

    def build_engine(self, network, builder_config):
        profile = self.trt_builder.create_optimization_profile()
        for name, bounds in network.inputs.items():
            profile.set_shape(name, *bounds)
        builder_config.trt_builder_config.add_optimization_profile(profile)
        engine = self.trt_builder.build_serialized_network(network.trt_network, builder_config.trt_builder_config)
        assert engine is not None, "no engine: see the log"
        return engine

    @staticmethod
    def save_config(builder_config, config_path):
        with open(config_path, "w") as file:
            json.dump({"builder_config": builder_config.kept}, file)

    @staticmethod
    def save_timing_cache(builder_config, out_path):
        with open(out_path, "wb") as file:
            file.write(builder_config.trt_builder_config.get_timing_cache().serialize())
        return True
