"""What keeps kernels fast, read from their sm_90 machine code: tensor cores, no spills, room for more than one block.

Speed itself needs a GPU; this notices on any machine when a change, or another Triton, costs it.
"""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyfmha import hopper
from pyfmha.aot.cubin import Compiler, Cubin
from pyfmha.arch import parse_arch
from pyfmha.decode import Decode
from pyfmha.forward import Forward
from pyfmha.spec import KernelSpec

pytest.importorskip("triton")

REGISTERS_OF_SM = 65536
SHARED_OF_SM = 233472  # 228 KiB, of which each block's runtime takes 1 KiB more


@dataclass(frozen=True)
class Budget:
    """How many blocks of a kernel must fit a multiprocessor; which multiply it uses, at least how often."""

    blocks: int
    multiply: str
    count: int


def forward(dtype: str, head_size: int) -> KernelSpec:
    return Forward(dtype, head_size).specs()[0]


def hopper_full(dtype: str, head_size: int, setting: int = 0) -> KernelSpec:
    return hopper.variants(Forward(dtype, head_size).specs()[-1], head_size)[2 * setting]


# 64x64 tiles: two products of 4 steps of 16. A Hopper kernel's loop has 4 + 8 (or 8 + 8) of them, and two more outside.
PRODUCTION = {
    "forward fp16 64": (forward("fp16", 64), Budget(3, "HGMMA", 8)),
    "forward bf16 128": (forward("bf16", 128), Budget(2, "HGMMA", 12)),
    "hopper fp16 64": (hopper_full("fp16", 64), Budget(2, "HGMMA", 24)),
    "hopper bf16 128": (hopper_full("bf16", 128), Budget(1, "HGMMA", 32)),
    "split fp16 128": (Decode("fp16", 128).specs()[0], Budget(2, "HMMA", 16)),
}


@pytest.fixture(scope="module")
def cubins() -> dict[str, Cubin]:
    with Compiler() as compiler:
        specs = [spec for spec, _ in PRODUCTION.values()]
        made = compiler.compile_all([(spec, parse_arch("sm_90")) for spec in specs], lambda *_: None)
    return dict(zip(PRODUCTION, made, strict=True))


def disassembled(cubin: Cubin, folder: Path) -> str:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"
    path = folder / "code.cubin"
    path.write_bytes(cubin.code)
    return subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout


def opcodes(listing: str) -> Counter[str]:
    return Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", listing, re.MULTILINE))


@pytest.mark.parametrize("name", PRODUCTION)
def test_tensor_cores_are_used_and_nothing_spills(name: str, cubins: dict[str, Cubin], tmp_path: Path) -> None:
    _, budget = PRODUCTION[name]
    listing = disassembled(cubins[name], tmp_path)
    found = opcodes(listing)

    assert found["EXIT"] >= 1, "the listing was not understood"
    assert found[budget.multiply] >= budget.count
    assert found["STL"] == found["LDL"] == 0, "registers are spilled to local memory"
    assert cubins[name].spilled == 0
    # ptxas ends a batch of wgmma with "gsb0"; where it cannot keep them asynchronous, it ends every one so.
    assert len(re.findall(r"HGMMA.*gsb0", listing)) <= found["HGMMA"] // 3, "wgmma runs one at a time"


@pytest.mark.parametrize("name", PRODUCTION)
def test_enough_blocks_fit_a_multiprocessor(name: str, cubins: dict[str, Cubin]) -> None:
    _, budget = PRODUCTION[name]
    cubin = cubins[name]

    registers = -(-cubin.registers // 8) * 8 * cubin.threads  # handed out in eights a thread
    assert budget.blocks * registers <= REGISTERS_OF_SM
    assert budget.blocks * (cubin.shared + 1024) <= SHARED_OF_SM


@pytest.mark.parametrize("name", [name for name in PRODUCTION if name.startswith("hopper")])
def test_the_hopper_kernel_loads_by_tma_and_shares_registers_out(
    name: str, cubins: dict[str, Cubin], tmp_path: Path
) -> None:
    found = opcodes(disassembled(cubins[name], tmp_path))

    assert found["UTMALDG"] >= 3, "Q, K and V are loaded by TMA"
    assert found["UTMASTG"] >= 1, "Out is stored by TMA"
    assert found["USETMAXREG"] >= 2, "the producer gives registers to the consumers"


@pytest.mark.parametrize("name", [name for name in PRODUCTION if name.startswith("hopper")])
def test_the_hopper_kernel_takes_exponentials_while_a_product_runs(
    name: str, cubins: dict[str, Cubin], tmp_path: Path
) -> None:
    listing = disassembled(cubins[name], tmp_path)
    # From the wait for the scores to the wait for the product with V, which was issued before.
    beside = re.findall(r"DEPBAR\.LE gsb0, 0x1\b(.*?)DEPBAR\.LE gsb0, 0x0\b", listing, re.DOTALL)

    assert beside
    assert all(part.count("MUFU.EX2") >= 64 for part in beside)  # 64 rows by 128 keys over 128 threads
