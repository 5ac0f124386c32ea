"""What of Triton's compiler the kernels here do without."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

# What a file says of itself, and the pass that it then does without.
_SET_BY_KERNELS = {
    "ALL_FENCES": ("ttnvgpuir", "add_proxy_fence_insertion"),
    "ALL_BARRIERS": ("ttgpuir", "add_membar"),
}


@contextmanager
def fences(module: ModuleType) -> Iterator[None]:
    """Triton looks for places where a kernel needs a fence between proxies, a tenth of the time that the Hopper kernels
    take, and for those where it needs a barrier, an eighth; those whose file says ALL_FENCES and ALL_BARRIERS set all
    themselves, and come out the same without."""
    from triton._C.libtriton import nvidia

    _without_digests()
    left_out = []
    for says, (dialect, name) in _SET_BY_KERNELS.items():
        passes = getattr(nvidia.passes, dialect)
        inserts = getattr(passes, name, None)
        if inserts is not None and getattr(module, says, False):
            left_out.append((passes, name, inserts))
    try:
        for passes, name, _ in left_out:
            setattr(passes, name, lambda *_: None)
        yield
    finally:
        for passes, name, inserts in left_out:
            setattr(passes, name, inserts)


@cache
def _without_digests() -> None:
    """Triton reads all of itself, half a gigabyte, to tell what it keeps from what another Triton has kept: half a
    second of each process. A compiler process has a folder of its own."""
    from triton.runtime import cache as kept

    if hasattr(kept, "triton_key"):
        kept.triton_key = lambda: "this"
