"""What of Triton's compiler the kernels here do without: passes that take their time and change nothing.

A pass costs more than it does itself, since everything is verified after each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

TENSOR_MEMORY = (
    "nvidia.add_allocate_tensor_memory",
    "nvidia.add_tmem_barrier_insertion",
    "nvidia.add_tmem_wait_insertion",
    "nvidia.add_check_matmul_two_cta",
    "nvidia.add_optimize_tmem_layouts",
    "nvidia.add_tmem_load_reduce",
    "nvidia.add_interleave_tmem",
)
"""Passes over what there is from sm_100 on: tensor memory, and products of two programs."""
FIRST_TENSOR_MEMORY = 100
BY_HAND = {
    "fences": ("nvidia.add_proxy_fence_insertion",),
    "barriers": ("nvidia_gpu.add_membar",),
    "layouts": (
        *("gluon.add_infer_coalesced_encodings", "gluon.add_resolve_auto_encodings", "nvidia.add_tma_lowering"),
        *("gpu.add_combine_tensor_select_and_if", "common.add_sccp", "common.add_canonicalizer"),
        "triton.add_loop_aware_cse",
        *("nvidia.add_cluster_barrier_mbar_allocator", "nvidia.add_initialize_ws_cluster_barriers"),
        *("gpu.add_allocate_global_scratch_memory", "common.add_symbol_dce"),
    ),
    "simple": (
        *("nvidia.add_proxy_fence_insertion", "nvidia.add_tma_lowering", "nvidia.add_optimize_descriptor_encoding"),
        *("nvidia.add_cluster_barrier_mbar_allocator", "nvidia.add_initialize_ws_cluster_barriers"),
        *("nvidia.add_assign_cga_layouts", "nvidia.add_optimize_cta_locality", "nvidia.add_hoist_mbarrier_lifecycle"),
        *("hopper.add_hopper_warpspec", "gpu.add_fuse_nested_loops", "gpu.add_combine_tensor_select_and_if"),
        *("gpu.add_allocate_global_scratch_memory", "common.add_symbol_dce", "common.add_sccp"),
    ),
}
"""Passes by what a kernel's file says, in ``BY_HAND``, that it does itself: fences between proxies; a partition's
barriers between uses of shared memory; layouts and memory, with nothing left to simplify that Gluon's own passes or
LLVM do not. Or that it is simple: pointers and products, without tensor maps, clusters or specialised warps, nor loops
to be made one; below sm_100, where products have barriers that Triton makes."""
TRITON = "3.9."
"""Of which versions that was compared: others may lower a kernel to what needs more."""


@contextmanager
def passes_left_out(module: ModuleType, capability: int) -> Iterator[None]:
    """Compile the kernels of a file without passes that leave them as they are.

    Args:
        module: the kernel's file, which may say ``BY_HAND``; that counts below sm_100.
        capability: of the architecture: 90 for sm_90.
    """
    import triton

    _once()
    if capability >= FIRST_TENSOR_MEMORY or not triton.__version__.startswith(TRITON):
        yield
        return
    names = [*TENSOR_MEMORY, *(name for word in getattr(module, "BY_HAND", ()) for name in BY_HAND[word])]
    groups = _groups()
    split = [(groups.get(group), add) for group, add in (name.split(".") for name in names)]
    kept = [(group, add, getattr(group, add)) for group, add in split if hasattr(group, add)]
    for group, add, _ in kept:
        setattr(group, add, _nothing)
    try:
        yield
    finally:
        for group, add, was in kept:
            setattr(group, add, was)


def _groups() -> dict[str, Any]:
    """Where Triton has its passes; other versions lack some."""
    from triton._C.libtriton import nvidia, passes

    return {
        "common": passes.common,
        "gpu": passes.ttgpuir,
        "gluon": getattr(passes, "gluon", None),
        "hopper": getattr(nvidia.passes, "hopper", None),
        "nvidia": nvidia.passes.ttnvgpuir,
        "nvidia_gpu": nvidia.passes.ttgpuir,
        "triton": passes.ttir,
    }


def _nothing(*_: object) -> None:
    """In the place of what adds a pass."""


@cache
def _once() -> None:
    """What a compiler process, which has a folder of its own, need not do: Triton reads all of itself, half a gigabyte,
    to tell what it keeps from what another Triton has kept, and parses a function's text wherever that is called."""
    from triton.runtime import cache as kept
    from triton.runtime.jit import JITFunction

    if hasattr(kept, "triton_key"):
        kept.triton_key = lambda: "this"
    parse, parsed = JITFunction.parse, {}

    def parse_once(function: Any) -> Any:
        text = function.src
        if text not in parsed:
            parsed[text] = parse(function)
        return parsed[text]

    JITFunction.parse = parse_once
