"""What keeps soft caps fast whose warps take the same way, read from their machine code; see ``test_audit.py``."""

import re
from pathlib import Path

import pytest
from helpers import few_of
from machine_code import Compiled, disassembled, fits, opcodes
from shared import Shared

from pyfmha.aot.cubin import Compiler, Cubin
from pyfmha.attention import hopper
from pyfmha.attention.forward import Forward
from pyfmha.spec.kernel import KernelSpec

pytest.importorskip("triton")

# Bytes spilled, none of it in a loop, by head size and masks: constants that the first block of a tile wants.
SPILLED = {(128, False): 16, (128, True): 184, (256, False): 176, (256, True): 240}
KERNELS: dict[str, tuple[int, KernelSpec]] = {
    f"{size} {'causal' if dict(spec.constants)['CAUSAL'] else 'full'} {i}": (size, spec)
    for size in hopper.HEAD_SIZES
    for i, spec in enumerate(hopper.variants(Forward("bf16", size).specs()[-1], size))
    if dict(spec.constants).get("LEVELS")
}


@pytest.fixture(scope="module")
def cubins(compiler: Compiler, shared: Shared) -> dict[str, Cubin]:
    return Compiled({name: spec for name, (_, spec) in KERNELS.items()}, compiler, shared)


def loops(listing: str, products: int) -> list[str]:
    """The loops over keys, from the label that is jumped back to, to that jump."""
    found = []
    for jump in re.finditer(r"\bBRA\S* .*?(\.L_x_\d+)", listing):
        label = listing.find(f"\n{jump[1]}:", 0, jump.start())
        body = listing[label : jump.end()]
        if label >= 0 and opcodes(body)["HGMMA"] == products and body.count("ATOMS.OR") == 1 and "STSM" not in body:
            found.append(body)
    return found


@pytest.mark.parametrize("name", few_of(KERNELS, lambda name: name.startswith(("128 causal", "256 full"))))
def test_powers_run_beside_the_polynomials_and_the_product(name: str, cubins: dict[str, Cubin], tmp_path: Path) -> None:
    size, spec = KERNELS[name]
    cut = dict(spec.constants)
    consumers, held, causal = int(cut["CONSUMERS"]), int(cut["BLOCK_N"]) // 2, bool(cut["CAUSAL"])
    products = (size + int(cut["BLOCK_N"])) // 16
    listing = disassembled(cubins[name], tmp_path)
    assert len(re.findall(r"HGMMA.*gsb0", listing)) <= consumers * 2 * (2 + causal), "wgmma runs one at a time"
    assert cubins[name].spilled <= SPILLED[size, causal]
    assert fits(cubins[name], 1)

    found = loops(listing, products)
    assert len(found) == consumers * (1 + causal)
    for loop in found:
        before, after = loop.split("DEPBAR.LE gsb0, 0x1", maxsplit=1)
        beside, behind = after.split("DEPBAR.LE gsb0, 0x0", maxsplit=1)
        # Each of three ways has all weights, and those that rescale; powers have powers and two references besides.
        assert beside.count("MUFU.EX2") == 4 * held + 6 + 2
        assert beside.count("MUFU.RCP") == held // 4 + 2
        assert "MUFU" not in before + behind
        assert "ATOMS.OR" in before, "the level is asked for before it is wanted"
        assert behind.count("F2F") >= held // 6, "weights take the registers of those before them"
        inside = opcodes(loop)
        assert inside["STL"] + inside["LDL"] <= (3 if inside["VIMNMX3"] else 12), "the loop without masks spills"
        assert inside["ATOMS"] == 2, "one lane asks, and one tells"
        if inside["VIMNMX3"]:
            assert inside["VIMNMX3"] >= held // 2 - 4
        # Most powers have a place among the polynomials, not behind them.
        where = [m.start() for m in re.finditer("MUFU.EX2", beside)]
        fives = beside[where[2] : where[held // 2]].count("FFMA")
        assert fives >= held, "polynomials come first, and then all powers"
