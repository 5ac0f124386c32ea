"""What of Triton's compiler the kernels here do without."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def fences(module: ModuleType) -> Iterator[None]:
    """Triton looks for places where a kernel needs a fence between proxies, a tenth of the time that the Hopper kernels
    take; those whose file says ALL_FENCES set all themselves, and come out the same without."""
    from triton._C.libtriton import nvidia

    passes, name = nvidia.passes.ttnvgpuir, "add_proxy_fence_insertion"
    inserts = getattr(passes, name, None)
    if inserts is None or not getattr(module, "ALL_FENCES", False):
        yield
        return
    setattr(passes, name, lambda *_: None)
    try:
        yield
    finally:
        setattr(passes, name, inserts)
