"""What keeps the kernels of eight bits fast, read from their sm_90 machine code; see ``test_audit.py``."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from machine_code import Compiled, disassembled, fits, opcodes, steps_of
from shared import Shared

from pyfmha.aot.cubin import Compiler, Cubin
from pyfmha.attention.fp8 import HEAD_SIZES, Fp8, Setting, settings
from pyfmha.spec.kernel import KernelSpec

pytest.importorskip("triton")
pytestmark = pytest.mark.long

# Bytes spilled, by head size and kind. At 64, three consumers have 160 registers, at 256 the accumulator alone has 128.
SPILLED = {
    **{(64, "full"): 8, (64, "longest first"): 56, (64, "causal"): 56, (64, "lengths"): 168, (64, "ragged"): 184},
    **{(128, "full"): 8, (128, "causal"): 8, (128, "lengths"): 64, (128, "ragged"): 88},
    (128, "full, parts"): 40,
    **{(64, "full, each warp"): 16, (128, "evenly, parts"): 32},
    **{(256, "full, producer first"): 24, (256, "full, each warp"): 48},
    **{(64, "evenly, aligned"): 64, (128, "evenly, aligned, parts"): 40, (256, "evenly, aligned"): 40},
    (256, "longest first, lazy"): 168,
    **{(256, "causal"): 208, (256, "lengths"): 200, (256, "ragged"): 200},
}
ROOM = 1.25
"""How much more may spill: another ptxas shares registers out otherwise."""


@dataclass(frozen=True)
class Kernel:
    """One variant, with its setting."""

    spec: KernelSpec
    setting: Setting
    size: int
    kind: str

    @property
    def loops(self) -> int:
        """Over keys, of each consumer: causal ones have a loop of their own for blocks that are masked. Where scores
        are ahead, what comes before and after the loop is a second step."""
        masked = self.setting.masks == (True,) and not self.parts and not self.setting.aligned
        return 1 + masked + self.setting.ahead

    @property
    def parts(self) -> bool:
        """Whether a block is no power of two keys (kernels/fp8_wide.py)."""
        return parts_of(self.setting) != ""


def parts_of(setting: Setting) -> str:
    return "parts" if setting.block_n & (setting.block_n - 1) else ""


def kind_of(setting: Setting) -> str:
    if setting.ragged or setting.general:
        return "ragged" if setting.ragged else "lengths"
    if setting.even:
        kind = "evenly"
        how = ", ".join(filter(None, ("aligned" if setting.aligned else "", parts_of(setting))))
    elif setting.longest_first:
        kind = "longest first"
        how = parts_of(setting) or ("lazy" if setting.lazy else "")
    else:
        kind = "causal" if setting.masks == (True,) else "full"
        how = parts_of(setting)
        how = how or ("each warp" if setting.by_warps else "producer first" if setting.producer_first else "")
    return f"{kind}, {how}" if how else kind


KERNELS = {
    f"{size} {kind_of(setting)}": Kernel(
        Fp8("bf16", size).spec(setting, setting.masks[0]), setting, size, kind_of(setting)
    )
    for size in HEAD_SIZES
    for setting in settings(size)
}


@pytest.fixture(scope="module")
def cubins(compiler: Compiler, shared: Shared) -> dict[str, Cubin]:
    return Compiled({name: kernel.spec for name, kernel in KERNELS.items()}, compiler, shared)


def test_every_variant_is_looked_at() -> None:
    assert len(KERNELS) == sum(len(settings(size)) for size in HEAD_SIZES)
    assert {(kernel.size, kernel.kind) for kernel in KERNELS.values()} == set(SPILLED)


@pytest.mark.parametrize("name", KERNELS)
def test_tensor_cores_are_used_without_waiting_for_each_product(
    name: str, cubins: dict[str, Cubin], tmp_path: Path
) -> None:
    """A step multiplies 64 rows by 32 columns of Q at a time with K, and by 32 keys with V; before the loops the first
    product with K, after them the last with V."""
    kernel = KERNELS[name]
    listing, consumers = disassembled(cubins[name], tmp_path), kernel.setting.consumers
    found = opcodes(listing)
    near = consumers * kernel.setting.halved  # products with the first 64 keys alone
    columns = consumers * (1 + kernel.loops) * (kernel.size + kernel.setting.block_n) + near * kernel.size
    assert found["QGMMA"] == columns // 32
    assert found["HGMMA"] == 0
    # ptxas ends a batch of wgmma with "gsb0"; where it cannot keep them asynchronous, it ends every one so.
    batches = consumers * (1 + kernel.loops) * 2 + near
    assert len(re.findall(r"QGMMA.*gsb0", listing)) == batches, "wgmma runs one at a time"


@pytest.mark.parametrize("name", KERNELS)
def test_it_loads_by_tma_transposes_by_ldmatrix_and_shares_registers_out(
    name: str, cubins: dict[str, Cubin], tmp_path: Path
) -> None:
    kernel = KERNELS[name]
    found = opcodes(disassembled(cubins[name], tmp_path))
    assert found["UTMALDG"] >= 2 + kernel.setting.consumers, "K, V, and Q for each consumer"
    assert found["USETMAXREG"] >= 2, "the producer gives registers to the consumers"
    assert found["LDSM"] >= kernel.size * kernel.setting.block_n // 4096, (
        "16 bytes a thread of V, transposed on the way"
    )
    assert found["PRMT"] >= 1
    weights = kernel.setting.consumers * (1 + kernel.loops) * kernel.setting.block_n // 2
    assert found["MUFU"] >= weights, "128 threads take the exponentials of 64 rows"


@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if kernel.setting.by_warps])
def test_no_barrier_holds_the_warps_of_a_consumer_together(name: str, cubins: dict[str, Cubin], tmp_path: Path) -> None:
    kernel = KERNELS[name]
    steps = steps_of(disassembled(cubins[name], tmp_path))
    assert len(steps) == kernel.setting.consumers * (kernel.loops - kernel.setting.ahead)
    if kernel.setting.aligned:
        assert not any("FSEL" in step for step in steps), "blocks are masked in the loop"
    for step in steps:
        assert not re.search(r"^BAR\.", step, re.MULTILINE)
        assert len(re.findall(r"^F2FP", step, re.MULTILINE)) == kernel.setting.block_n // 4
        assert len(re.findall(r"^IMAD\.MOV", step, re.MULTILINE)) <= 12, "weights are moved"


@pytest.mark.parametrize("name", KERNELS)
def test_it_fits_and_spills_no_more_than_it_did(name: str, cubins: dict[str, Cubin]) -> None:
    kernel = KERNELS[name]
    assert fits(cubins[name], 1)
    assert cubins[name].spilled <= ROOM * SPILLED[kernel.size, kernel.kind]
