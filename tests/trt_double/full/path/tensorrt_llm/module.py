class Module:
    def __init__(self):
        self._modules = {}

    def __call__(self, *args, **kwargs):
        assert hasattr(self, "_modules"), "Module.__init__ was not called"
        return self.forward(*args, **kwargs)
