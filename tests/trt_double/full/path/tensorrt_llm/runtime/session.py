import os
from dataclasses import dataclass

import tensorrt as trt

from tensorrt_llm.logger import trt_logger


@dataclass
class TensorInfo:
    name: str
    dtype: object
    shape: tuple


class Session:
    @staticmethod
    def from_serialized_engine(engine):
        session = Session()
        session.runtime = trt.Runtime(trt_logger)
        session.engine = session.runtime.deserialize_cuda_engine(engine)
        session.context = session.engine.create_execution_context()
        if os.environ.get("TRTLLM_DOUBLE") != "early":
            assert session.context is not None, "no execution context"
        return session

    def infer_shapes(self, inputs, context=None):
        for info in inputs:
            if self.engine.get_tensor_dtype(info.name) != info.dtype:
                raise ValueError(f"Tensor:{info.name} has wrong dtype")
            done = self.context.set_input_shape(info.name, info.shape)
            if not done and os.environ.get("TRTLLM_DOUBLE") != "early":
                raise RuntimeError(f"{info.name} cannot be of shape {info.shape}")
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        outputs = [name for name in names if self.engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        return [TensorInfo(n, self.engine.get_tensor_dtype(n), self.context.get_tensor_shape(n)) for n in outputs]

    def run(self, inputs, outputs, stream, context=None):
        for name, pointer in {**inputs, **outputs}.items():
            self.context.set_tensor_address(name, pointer)
        return self.context.execute_async_v3(stream)
