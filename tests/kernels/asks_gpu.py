"""A kernel whose settings depend on the GPU that there is when it is imported."""

import triton
import triton.language as tl

TARGET = triton.runtime.driver.active.get_current_target()
MAJOR, _ = triton.runtime.driver.active.utils.get_device_capability(0)
SHARED = triton.runtime.driver.active.utils.get_device_properties(triton.runtime.driver.active.get_current_device())[
    "max_shared_mem"
]
BLOCK_SIZE = 256 if SHARED > 200_000 else 128
CONFIGS = [triton.Config({"BLOCK": BLOCK_SIZE * scale}) for scale in range(1, 3 if MAJOR >= 9 else 2)]


@triton.autotune(configs=CONFIGS, key=[])
@triton.jit
def fill(X, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(X + i, 1.0, mask=i < n)
