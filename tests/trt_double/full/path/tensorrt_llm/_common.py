import contextlib
import os

if os.environ.get("TRTLLM_DOUBLE") == "removed":
    raise ImportError("cannot import name 'default_trtnet' from 'tensorrt_llm._common'")

net = None


def default_net():
    assert net, "Use builder to create network first, and use `set_network` or `net_guard` to set it to default"
    return net


def default_trtnet():
    return default_net().trt_network


@contextlib.contextmanager
def net_guard(network):
    global net
    earlier, net = net, network
    yield
    net = earlier
