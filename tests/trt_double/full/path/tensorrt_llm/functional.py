from collections import OrderedDict

from tensorrt_llm._common import default_net, default_trtnet


class Tensor:
    def __init__(self, name=None, dtype=None, shape=None, dim_range=None, is_network_input=True):
        self.trt_tensor = None
        self.producer = None
        if is_network_input:
            assert isinstance(dim_range, OrderedDict)
            self.trt_tensor = default_trtnet().add_input(name, dtype, tuple(shape))
            bounds = [[size] * 3 if isinstance(size, int) else size for (size,) in dim_range.values()]
            default_net().inputs[name] = [list(which) for which in zip(*bounds, strict=True)]

    @property
    def dtype(self):
        return self.trt_tensor.dtype

    def mark_output(self, name=None, dtype=None):
        assert dtype is None or dtype == self.dtype
        self.trt_tensor.name = name
        default_trtnet().mark_output(self.trt_tensor)


def _create_tensor(trt_tensor, producer):
    default_net().name_layer(producer)  # at every call, as the real one does
    assert len(trt_tensor.shape) >= 0, "tensor has undefined shape"
    tensor = Tensor(is_network_input=False)
    tensor.trt_tensor, tensor.producer = trt_tensor, producer
    return tensor
