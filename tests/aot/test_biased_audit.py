"""What keeps the Hopper kernel with biases and masks fast, and its shared memory apart, read from its machine code."""

import re
import subprocess
from pathlib import Path

import pytest
from shared import Shared

from pyfmha.aot.cubin import Compiler
from pyfmha.attention import biased_hopper
from pyfmha.attention.biased import Biased
from pyfmha.spec.arch import parse_arch
from pyfmha.spec.kernel import KernelSpec

pytest.importorskip("triton")

MASK_TILE = biased_hopper.TENSORS[2]


def plain(size: int, beside: biased_hopper.Beside) -> KernelSpec:
    """The variant for full attention."""
    return biased_hopper.plain(Biased("fp16", size).generic(), size, beside)[0]


KERNELS = {
    "bias 64": plain(64, biased_hopper.BIAS_TILE),
    "mask 64": plain(64, MASK_TILE),
    "bias of keys 64": plain(64, biased_hopper.TENSORS[0]),
    "bias 128": plain(128, biased_hopper.BIAS_TILE),
    "bias, lengths": biased_hopper.of_kind(Biased("fp16", 64).generic(), 64, biased_hopper.BIAS_TILE)[0],
}


def data_bytes(spec: KernelSpec) -> int:
    """Of what TMA fills: blocks of Q, K, V, and of a bias or mask."""
    sizes = {name: int(value) for name, value in spec.constants if isinstance(value, int)}
    kinds = dict(spec.constants)
    consumers, keys, head = sizes["CONSUMERS"], sizes["BLOCK_N"], sizes["BLOCK_D"]
    rows = sizes["Q_SLOTS"] * consumers * 64 + (sizes["STAGES"] + sizes["V_STAGES"]) * keys
    width = {"bias": 2, "mask": 1}.get(next((n for n in ("bias", "mask") if kinds[n.upper()] == "tile"), ""), 0)
    return rows * head * 2 + sizes["X_STAGES"] * consumers * 64 * keys * width


@pytest.mark.long
@pytest.mark.parametrize("name", KERNELS)
def test_products_overlap_and_barriers_lie_behind_the_data(
    name: str, compiler: Compiler, shared: Shared, tmp_path: Path
) -> None:
    import triton.backends.nvidia

    spec = KERNELS[name]
    cubin = shared.compile(compiler, spec, parse_arch("sm_90"))
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"
    path = tmp_path / "code.cubin"
    path.write_bytes(cubin.code)
    listing = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout

    consumers = dict(spec.constants)["CONSUMERS"]
    assert len(re.findall(r"HGMMA.*gsb0", listing)) == 4 * consumers, "wgmma runs one at a time"
    assert cubin.spilled <= (0 if consumers == 1 else 136)
    begun = [
        int(place or "0", 16) for place in re.findall(r"SYNCS\.EXCH\.64 URZ, \[UR\d+(?:\+0x([0-9a-f]+))?\]", listing)
    ]
    assert begun, "the listing was not understood"
    assert min(begun) >= data_bytes(spec), "a barrier lies in what TMA fills"
