"""What of Triton's compiler the kernels here do without."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType


@contextmanager
def fences(module: ModuleType) -> Iterator[None]:
    """Triton looks for places where a kernel needs a fence between proxies, a tenth of the time that the Hopper kernels
    take; those whose file says ALL_FENCES set all themselves, and come out the same without."""
    from triton._C.libtriton import nvidia

    _without_digests()
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


@cache
def _without_digests() -> None:
    """Triton reads all of itself, half a gigabyte, to tell what it keeps from what another Triton has kept: half a
    second of each process. A compiler process has a folder of its own."""
    from triton.runtime import cache as kept

    if hasattr(kept, "triton_key"):
        kept.triton_key = lambda: "this"
