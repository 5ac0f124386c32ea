"""PyTorch's CPU memory in the place of a GPU's, for ``pyfmha.torch`` on the fake driver: no kernel runs."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from pyfmha.runtime.library import Library
from pyfmha.torch import direct, functional, functions, launch, operator, plain, with_functions

STREAM = 0x5EED
"""PyTorch's current stream."""

_library = torch.library.Library("pyfmha_fake_gpu", "DEF")
_NOTHING = torch.empty(0), torch.empty(0)
for _name, _schema in (("", operator.SCHEMA), (".full", operator.FULL_SCHEMA)):
    _library.define(f"attention{_name}{_schema}")
    _library.define(f"empty{_name}{_schema}")
    _library.impl(f"empty{_name}", lambda *arguments: _NOTHING, "CPU")
    torch.library.register_fake(f"pyfmha_fake_gpu::attention{_name}", operator.fake, lib=_library)
_library.impl("attention", operator._plain_on_gpu, "CPU")
_library.impl("attention.full", operator._on_gpu, "CPU")
attention_op, plain_op = torch.ops.pyfmha_fake_gpu.attention.full, torch.ops.pyfmha_fake_gpu.attention.default
"""The operator, in which the dispatcher finds the code for the GPU."""
DISPATCHED = {"default": plain_op._op, "full": attention_op._op}
"""Its overloads where the dispatcher sees every call."""
direct.launch_at_once(torch.ops.pyfmha_fake_gpu.attention, operator._recent, operator.KEYWORDS)

_library.define("attention_with" + with_functions.SCHEMA)
_library.impl("attention_with", with_functions._on_gpu, "CPU")
attention_with_op = torch.ops.pyfmha_fake_gpu.attention_with.default

empty_op, plain_empty_op = torch.ops.pyfmha_fake_gpu.empty.full, torch.ops.pyfmha_fake_gpu.empty.default
"""An operator of the same arguments that does nothing."""


def forget() -> None:
    """Nothing is prepared."""
    launch._attached.cache_clear()
    operator._ready.clear()
    functions._held.clear()
    for cached in (functions._names, functions._inputs_of, functions._library_inputs):
        cached.cache_clear()
    for recent in (operator._recent, functional._recent, functional._recent_drop_in):
        recent.clear()


@contextmanager
def torch_gpu(library: Library) -> Iterator[None]:
    """PyTorch's current device is that of the fake driver's current context."""
    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "library", lambda: library)
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(launch, "_current_device", lambda: -1)  # that of tensors of the CPU
        patch.setattr(launch, "_stream_of", lambda device: STREAM)
        patch.setattr(launch, "empty", torch._C._dynamo.guards._empty_strided_cpu)
        patch.setattr(plain, "_is_on_gpu", lambda tensor: True)
        patch.setattr(functions, "is_on_gpu", lambda tensor: True)
        patch.setattr(functional, "attention_with_op", attention_with_op)
        patch.setattr(functional, "why_not", lambda *_, **__: None)  # it sees that they are not on a GPU
        yield
    forget()
