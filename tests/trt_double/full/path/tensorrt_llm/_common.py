import contextlib
import os

if os.environ.get("TRTLLM_DOUBLE") == "removed":
    raise ModuleNotFoundError(f"No module named {__name__!r}", name=__name__)
if os.environ.get("TRTLLM_DOUBLE") == "cuda":
    raise ImportError("libcuda.so.1: cannot open shared object file", name="tensorrt_llm.bindings")

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
