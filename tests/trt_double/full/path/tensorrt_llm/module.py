from tensorrt_llm._common import default_net


class Module:
    def __init__(self):
        self._modules = {}

    def __call__(self, *args, **kwargs):
        assert hasattr(self, "_modules"), "Module.__init__ was not called"
        net = default_net()
        earlier, net.module = net.module, type(self).__name__
        try:
            return self.forward(*args, **kwargs)
        finally:
            net.module = earlier
