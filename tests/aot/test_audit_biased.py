"""What keeps the Hopper kernels with masks, biases and sinks fast, read from their code; see ``test_audit.py``."""

import re
from pathlib import Path

import pytest
from machine_code import Compiled, disassembled, fits, opcodes
from shared import Shared

from pyfmha.aot.cubin import Compiler, Cubin
from pyfmha.attention.biased import Biased
from pyfmha.attention.biased_hopper import HEAD_SIZES, KERNEL
from pyfmha.spec.kernel import KernelSpec

pytest.importorskip("triton")
pytestmark = pytest.mark.long

# Bytes spilled with lengths and windows, by head size, and by what is added and what is masked.
SPILLED = {
    (64, "never", "never"): 72, (64, "keys", "never"): 144, (64, "never", "keys"): 144, (64, "tile", "never"): 0,
    (64, "never", "tile"): 0,
    (128, "never", "never"): 24, (128, "keys", "never"): 16, (128, "never", "keys"): 16, (128, "tile", "never"): 8,
    (128, "never", "tile"): 8,
}  # fmt: skip
ROOM = 1.25
"""How much more may spill: another ptxas shares registers out otherwise."""


def key_of(spec: KernelSpec, size: int) -> tuple[int, str, str]:
    constants = dict(spec.constants)
    return size, str(constants["BIAS"]), str(constants["MASK"])


KERNELS = {
    key_of(spec, size): spec
    for size in HEAD_SIZES
    for spec in Biased("fp16", size).specs()
    if spec.kernel == KERNEL and dict(spec.constants)["GENERAL"]
}


@pytest.fixture(scope="module")
def cubins(compiler: Compiler, shared: Shared) -> dict[str, Cubin]:
    return Compiled({str(key): spec for key, spec in KERNELS.items()}, compiler, shared)


def test_every_variant_is_looked_at() -> None:
    assert set(KERNELS) == set(SPILLED)


@pytest.mark.parametrize("key", SPILLED, ids=str)
def test_it_multiplies_without_waiting_loads_by_tma_and_fits_twice(
    key: tuple[int, str, str], cubins: dict[str, Cubin], tmp_path: Path
) -> None:
    cubin, constants = cubins[str(key)], dict(KERNELS[key].constants)
    listing = disassembled(cubin, tmp_path)
    found = opcodes(listing)
    assert constants["CONSUMERS"] == 1
    # In the loop and once outside of it: 64 rows by 16 columns of Q at a time with K, by 16 keys with V.
    assert found["HGMMA"] == 2 * (key[0] + int(constants["BLOCK_N"])) // 16
    assert len(re.findall(r"HGMMA.*gsb0", listing)) == 4, "wgmma runs one at a time"
    assert found["UTMALDG"] >= 3 + ("tile" in key)
    assert found["UTMASTG"] >= 1
    assert found["USETMAXREG"] >= 2
    assert fits(cubin, 2)
    assert cubin.spilled <= ROOM * SPILLED[key]
