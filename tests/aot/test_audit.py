"""What keeps kernels fast, read from their sm_90 machine code: tensor cores, no spills, room for more than one block.

Speed itself needs a GPU; this notices on any machine when a change, or another Triton, costs it.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import few_of
from machine_code import SHARED_OF_SM, Compiled, disassembled, fits, opcodes
from shared import Shared

from pyfmha.aot.cubin import Compiler, Cubin
from pyfmha.attention import hopper, hopper_settings
from pyfmha.attention.biased import Biased
from pyfmha.attention.biased_hopper import narrow_values
from pyfmha.attention.biased_settings import VALUES_SETTINGS
from pyfmha.attention.decode import Decode
from pyfmha.attention.forward import Forward
from pyfmha.spec.kernel import KernelSpec

pytest.importorskip("triton")


@dataclass(frozen=True)
class Budget:
    """What a kernel may cost.

    Attributes:
        blocks: how many must fit a multiprocessor.
        multiply, count: the instruction that multiplies, and how often it is there at least.
        batches: groups in which wgmma is issued at most; 0 for three to a group.
        spilled: bytes of local memory a thread.
        loop: loads and stores of local memory in the loop, where nothing is masked. Of a portable kernel that spills,
            in any of its two fast loops.
        exponentials: those of a thread in a step of a Hopper kernel.
        beside: how many of them run beside the product of the same consumer: all of a lone one's, else those that
            rescale its two rows.
        loops: over keys, of each consumer.
        halves: multiplications outside them of half a block.
    """

    blocks: int
    multiply: str
    count: int
    batches: int = 0
    spilled: int = 0
    loop: int = 0
    exponentials: int = 0
    beside: int = 0
    loops: int = 1
    halves: int = 0


def forward(dtype: str, head_size: int) -> KernelSpec:
    return Forward(dtype, head_size).specs()[0]


# Bytes spilled and uses of them in the loop, by head size, masks (with the order of tiles, where that has its own) and
# consumers. Around the loop a causal kernel has more to keep (the tile of a pair, where the masks begin, what is loaded
# for others) than ptxas finds registers for, and a general one more than that; 20 uses are 2 % of a capped step's
# instructions, and all of those fit twice into the time of its powers. A ragged one keeps the place of its rows, too.
# At head size 256 the accumulator alone has 128 of 240 registers; most of what is spilled there, the slow rows at the
# end spill.
SPILLED = {
    **{
        (64, "causal", 1): (80, 0),
        (64, "causal longest first", 1): (88, 0),
        (64, "causal", 3): (216, 0),
        (64, "general", 1): (80, 16),
        (64, "capped", 1): (104, 20),
        (64, "causal capped", 1): (88, 1),
        (128, "causal", 2): (128, 12),
    },
    **{
        (256, "full", 2): (184, 0),
        (256, "causal", 2): (192, 0),
        (256, "causal longest first", 2): (208, 0),
        (256, "general", 2): (256, 6),
        (256, "ragged", 2): (304, 4),
        (256, "capped", 2): (264, 8),
        (128, "general", 1): (16, 0),
        (128, "capped", 1): (32, 0),
        (128, "causal capped", 1): (24, 0),
        (128, "full capped", 2): (72, 2),
        (128, "causal in two parts", 2): (56, 0),
        (128, "causal in two parts", 3): (160, 0),
        (256, "full capped", 2): (352, 3),
        (256, "causal capped", 2): (456, 4),
        (256, "full in two parts", 2): (168, 0),
        (256, "causal in two parts", 2): (216, 0),
    },
    **{
        (64, "full lengths", 1): (56, 0),
        (64, "full lengths", 3): (120, 0),
        (64, "causal lengths", 1): (88, 0),
        (64, "causal lengths", 3): (208, 0),
        (128, "full lengths in two parts", 2): (32, 0),
        (256, "full lengths", 2): (240, 2),
        (256, "causal lengths", 2): (304, 3),
        (256, "full lengths in two parts", 2): (240, 1),
        (256, "causal lengths in two parts", 2): (288, 3),
        # Most of it is the producer's, which looks for tiles.
        (64, "full ragged", 1): (192, 0),
        (64, "causal ragged", 1): (216, 0),
        (128, "full ragged", 2): (120, 0),
        (128, "causal ragged", 2): (72, 0),
        (256, "full ragged", 2): (424, 0),
        (256, "causal ragged", 2): (472, 0),
    },
}


def kind_of(setting: hopper_settings.Setting, causal: bool) -> str:
    mask = "causal" if causal else "full"
    if setting.lengths:
        kept = " in two parts" if setting.two_parts else ""
        return f"{mask} ragged" if setting.ragged else f"{mask} lengths{kept}"
    if setting.two_parts:
        return f"{mask} in two parts"
    if setting.capped and not setting.general:
        return f"{mask} capped"
    for kind in ("ragged", "capped", "general"):
        if getattr(setting, kind):
            return kind
    return mask


def hopper_kernels(dtype: str, head_size: int, masks: Sequence[bool]) -> dict[str, tuple[KernelSpec, Budget]]:
    """The Hopper kernels of a head size, with the budgets that follow from their settings.

    A step multiplies 64 rows by 16 columns of Q at a time with K, and by 16 keys with V; outside the loop the first
    product with K and the last with V stand once more. 128 threads take exponentials of 64 rows. Several consumers have
    a loop of their own for blocks that are masked.
    """
    kernels = {}
    for setting in hopper_settings.SETTINGS[head_size]:
        if setting.levels:  # test_audit_capped.py
            continue
        made = hopper.variants(Forward(dtype, head_size).specs()[-1], head_size, (setting,))
        for causal, spec in zip(setting.masks, made, strict=True):
            mask = kind_of(setting, causal)
            order = " in pairs of heads" if setting.two_heads else " longest first" if setting.longest_first else ""
            order = (" paired or evenly" if setting.paired else " evenly") if setting.even else order
            halved = setting.halved * (setting.consumers if setting.consumers > 2 else 1)  # products of half a block
            any_order = SPILLED.get((head_size, mask, setting.consumers), (0, 0))
            spilled, loop = SPILLED.get((head_size, mask + order, setting.consumers), any_order)
            loops = 2 if causal and not setting.general and setting.consumers > 1 else 1
            wide = setting.block_n & (setting.block_n - 1) != 0  # sm90_wide.py
            parts = 2 if setting.two_parts and not wide else 1
            columns = head_size * 3 // 4 if setting.two_parts else head_size
            exponentials = setting.block_n // 2
            held = causal or head_size < 256 or setting.two_parts  # the maxima, until the product is complete
            beside = exponentials if setting.consumers == 1 else held * 2
            budget = Budget(
                blocks=max(setting.programs, 1),
                multiply="HGMMA",
                count=setting.consumers * (1 + loops) * (columns + parts * setting.block_n) // 16,
                halves=halved * columns // 16,
                batches=(setting.consumers * (1 + loops) * 2 + halved) * parts,
                spilled=spilled,
                loop=loop,
                exponentials=exponentials,
                beside=beside,
                loops=loops,
            )
            if causal in masks:
                order += " handed on" if setting.handed else ""
                name = f"hopper {dtype} {head_size} {mask} {setting.consumers}x{setting.block_n}{order}"
                assert name not in kernels
                kernels[name] = spec, budget
    return kernels


# Bytes spilled by those for values of 128 with Q and K of 192, none of it in a loop: by masks and consumers.
VALUES_SPILLED = {(False, 2): 40, (True, 2): 96, (True, 1): 160}


def values_kernels(dtype: str) -> dict[str, tuple[KernelSpec, Budget]]:
    """The Hopper kernels for values of 128 columns with Q and K of 192, as :func:`hopper_kernels`."""
    kernels = {}
    made = iter(narrow_values(Biased(dtype, 256).generic(), 256))
    for setting in VALUES_SETTINGS[256]:
        for causal, spec in zip(setting.masks, made, strict=False):
            loops = 2 if causal else 1
            budget = Budget(
                blocks=setting.programs,
                multiply="HGMMA",
                count=setting.consumers * (1 + loops) * (192 + setting.block_n) // 16,
                batches=setting.consumers * (1 + loops) * 3,
                spilled=VALUES_SPILLED[causal, setting.consumers],
                exponentials=setting.block_n // 2,
                beside=2,
                loops=loops,
            )
            mask = "causal" if causal else "full"
            order = " evenly" if setting.even else ""
            kernels[f"hopper {dtype} values {mask} {setting.consumers}x{setting.block_n}{order}"] = spec, budget
    assert not list(made)
    return kernels


# The portable kernels: 64x64 tiles, two products of 4 steps of 16.
PRODUCTION = {
    "forward fp16 64": (forward("fp16", 64), Budget(3, "HGMMA", 8)),
    "forward bf16 128": (forward("bf16", 128), Budget(2, "HGMMA", 12)),
    # fp32 as three products of fp16, each of which waits for the one before, in each of two loops; and in the safe loop
    # as three of tf32. What is spilled is where the loops begin and end.
    "forward fp32 64": (forward("fp32", 64), Budget(2, "HGMMA", 2 * 24, batches=18)),
    "forward fp32 128 capped": (Forward("fp32", 128).specs()[1], Budget(2, "HGMMA", 2 * 30, batches=18, spilled=32)),
    # The sums alone take 128 registers, a product of 64 columns 32, V 32 while its largest element is looked for.
    "forward fp32 256": (forward("fp32", 256), Budget(1, "HGMMA", 2 * 72, batches=30, spilled=432, loop=111)),
    "split fp16 128": (Decode("fp16", 128).specs()[1], Budget(2, "HMMA", 16)),
    "split bf16 128": (Decode("bf16", 128).specs()[1], Budget(3, "HMMA", 16)),
    "split bf16 128 many": (Decode("bf16", 128).specs()[0], Budget(2, "HMMA", 16)),
    **hopper_kernels("fp16", 64, (False, True)),
    **hopper_kernels("bf16", 128, (False, True)),
    **hopper_kernels("fp16", 256, (False, True)),
    **values_kernels("bf16"),
}
HOPPER = [name for name in PRODUCTION if name.startswith("hopper")]
SERIAL = [name for name in HOPPER if dict(PRODUCTION[name][0].constants)["SERIAL"]]
LAZY = [name for name in HOPPER if dict(PRODUCTION[name][0].constants)["LAZY"]]
# Those that other tests compile as well, and one of each other kind.
QUICK = {
    "forward fp16 64",
    "forward fp32 64",
    "split fp16 128",
    "hopper fp16 64 full 1x128",
    "hopper fp16 64 full capped 1x128",
    "hopper bf16 128 causal 2x128 evenly handed on",
}
assert set(PRODUCTION) >= QUICK


def few(names: Iterable[str]) -> list[Any]:
    """Names of kernels for ``parametrize``, of which ``make test`` compiles few."""
    return few_of(
        names,
        lambda name: name in QUICK or name.startswith(("fp16 64", "fp16 128")),
    )


@pytest.fixture(scope="module")
def cubins(compiler: Compiler, shared: Shared) -> dict[str, Cubin]:
    return Compiled({name: spec for name, (spec, _) in PRODUCTION.items()}, compiler, shared)


@dataclass(frozen=True)
class Step:
    """The loop of one consumer, up to the wait for its scores and from there on, without what masks them, and what
    drops the padding of values."""

    before: str
    after: str


def steps(listing: str, *, capped: bool = False) -> list[Step]:
    """The loops over keys of a Hopper kernel: from the label that is jumped back to, to that jump."""
    found = []
    for wait in re.finditer(r"DEPBAR\.LE gsb0, 0x[12]\b", listing):
        for jump in re.finditer(r"\bBRA\S* .*?(\.L_x_\d+)", listing[wait.end() :]):
            label = listing.find(f"\n{jump[1]}:")
            if label < wait.start():
                after = listing[wait.start() : wait.end() + jump.start()]
                after = without_powers(after) if capped else without_floats(after)
                before = listing[label : wait.start()]
                found.append(Step(without_a_branch(before) if "FENCE" in before else before, without_a_branch(after)))
                break
    return found


def without_powers(code: str) -> str:
    """Without what warps take that found a capped score beyond the bound of its polynomial, which lies behind that."""
    vote = re.search(r"\bVOTE\.ANY\b", code)
    if vote is None:
        return code
    jump = re.compile(r"\n[^\n@]*\bBRA [^\n]*?(\.L_x_\d+)[^\n]*\n\.L_x_\d+:.*?\n\1:", re.DOTALL)
    found = jump.search(code, vote.end())
    assert found is not None, "the way of large scores was not found"
    assert opcodes(found[0])["MUFU"] > 0
    return code[: found.start()] + code[found.end() :]


def without_floats(code: str) -> str:
    """Without what warps take whose rows have had no score above 0, where maxima are of integers."""
    for jump in re.finditer(r"@!?P\d BRA\S* [^\n]*?(\.L_x_\d+)[^\n]*\n", code):
        label = code.find(f"\n{jump[1]}:", jump.end())
        passed_over = code[jump.end() : label]
        if label >= 0 and "VIMNMX3" in passed_over:
            onwards = re.search(r"[^\n]*\bBRA\S* [^\n]*?(\.L_x_\d+)[^\n]*\s*$", passed_over)
            assert onwards is not None, "the way of floats was not found"
            return code[: jump.end() + onwards.start()] + code[code.index(f"\n{onwards[1]}:", label) :]
    return code


def without_a_branch(code: str) -> str:
    """Without the first part that a jump within the code passes over."""
    part = re.search(r"\bBRA\S* [^\n]*?(\.L_x_\d+).*?\n\1:", code, re.DOTALL)
    return code if part is None else code[: part.start()] + code[part.end() :]


@pytest.mark.parametrize("name", few(PRODUCTION))
def test_tensor_cores_are_used_and_little_spills(name: str, cubins: dict[str, Cubin], tmp_path: Path) -> None:
    _, budget = PRODUCTION[name]
    listing = disassembled(cubins[name], tmp_path)
    found = opcodes(listing)

    assert found["EXIT"] >= 1, "the listing was not understood"
    assert found[budget.multiply] >= budget.count + budget.halves
    assert cubins[name].spilled <= budget.spilled
    assert budget.spilled or found["STL"] == found["LDL"] == 0, "registers are spilled to local memory"
    # ptxas ends a batch of wgmma with "gsb0"; where it cannot keep them asynchronous, it ends every one so.
    batches = len(re.findall(r"HGMMA.*gsb0", listing))
    assert batches <= (budget.batches or found["HGMMA"] // 3), "wgmma runs one at a time"


def fast_loops(listing: str) -> list[str]:
    """The innermost loops that multiply fp16 by wgmma: from the label that is jumped back to, to that jump."""
    found = []
    for jump in re.finditer(r"\bBRA\S* .*?(\.L_x_\d+)", listing):
        label = listing.find(f"\n{jump[1]}:", 0, jump.start())
        body = listing[label : jump.end()]
        if label >= 0 and re.search(r"HGMMA\S*\.F32 ", body) and not any(inner in body for inner in found):
            found.append(body)
    return found


@pytest.mark.parametrize("name", few(name for name in PRODUCTION if name.startswith("forward fp32")))
def test_fp32_is_multiplied_as_fp16_in_loops_that_spill_little(
    name: str, cubins: dict[str, Cubin], tmp_path: Path
) -> None:
    _, budget = PRODUCTION[name]
    found = [opcodes(body) for body in fast_loops(disassembled(cubins[name], tmp_path))]

    assert len(found) == 2, "with masks, and without"
    for loop in found:
        assert loop["HGMMA"] == budget.count // 2
        assert loop["LDL"] + loop["STL"] <= budget.loop, "the loop spills"


@pytest.mark.parametrize("name", few(PRODUCTION))
def test_enough_blocks_fit_a_multiprocessor(name: str, cubins: dict[str, Cubin]) -> None:
    _, budget = PRODUCTION[name]
    assert fits(cubins[name], budget.blocks)


@pytest.mark.parametrize("name", few(HOPPER))
def test_the_hopper_kernel_loads_by_tma_and_shares_registers_out(
    name: str, cubins: dict[str, Cubin], tmp_path: Path
) -> None:
    listing = disassembled(cubins[name], tmp_path)
    found, constants = opcodes(listing), dict(PRODUCTION[name][0].constants)

    assert found["UTMALDG"] >= 3, "Q, K and V are loaded by TMA"
    if constants.get("DIRECT"):
        rows = len(re.findall(r"STG\.E\.EF\.128 ", listing))
        assert rows == constants["CONSUMERS"] * constants["BLOCK_D"] // 16, "Out is stored by 16 bytes, once"
        assert found["UTMASTG"] == 0
    else:
        assert found["UTMASTG"] >= 1, "Out is stored by TMA"
    assert found["USETMAXREG"] >= 2, "the producer gives registers to the consumers"


@pytest.mark.parametrize("name", few(name for name in HOPPER if name not in SERIAL))
def test_the_hopper_kernel_does_what_it_can_while_a_product_runs(
    name: str, cubins: dict[str, Cubin], tmp_path: Path
) -> None:
    spec, budget = PRODUCTION[name]
    found = steps(disassembled(cubins[name], tmp_path), capped=bool(dict(spec.constants)["CAPPED"]))

    consumers = dict(spec.constants)["CONSUMERS"]
    assert len(found) == consumers * budget.loops
    for step in found:
        issued = opcodes(step.before)
        assert issued["HGMMA"] == budget.count // consumers // (1 + budget.loops), "both products are issued first"
        block_n = int(dict(spec.constants)["BLOCK_N"])
        if block_n & (block_n - 1):
            assert issued["UIADD3"] >= issued["HGMMA"], "a product reads what the one before has read"
        if consumers > 1:  # which would keep the other consumer waiting
            moved = issued["PRMT"] + issued["F2FP"] + len(re.findall(r"IMAD\.MOV|LOP3", step.before))
            assert moved <= budget.exponentials // 4, "weights are moved between the products"
        assert "FENCE" not in step.before, "values are stored where there is no padding"
        # From the wait for the scores to the wait for the product with V, which was issued before.
        beside, behind = step.after.split("DEPBAR.LE gsb0, 0x0", maxsplit=1)
        assert beside.count("MUFU.EX2") >= budget.beside
        assert budget.exponentials <= (beside + behind).count("MUFU.EX2") <= budget.exponentials + 2
        assert "MUFU.RCP" not in beside + behind, "small scores have a reciprocal"
        if consumers > 1:
            maxima = dict(spec.constants)["BLOCK_N"] // 2
            taken = opcodes(beside)
            found_maxima = 2 * taken["VIMNMX3"] + taken["VIMNMX"] + taken["FMNMX"]
            assert found_maxima >= (maxima if budget.beside else 0), "maxima are taken before"
            assert taken["FMNMX"] < maxima // 2 or not dict(spec.constants).get("THREES"), "of two numbers at a time"
            assert behind.count("F2F") >= maxima // 2, "weights take the registers of those before them"
        local = opcodes(step.before + step.after)
        assert local["STL"] + local["LDL"] <= budget.loop, "the loop spills"


def lazy_loops(listing: str, products: int) -> list[str]:
    """The loops over keys of a kernel that is lazy, from the label that is jumped back to, to that jump.

    Args:
        listing: its machine code.
        products: how many a step has; other code between a label and a jump back to it has more or less, or stores Out.
    """
    found: list[str] = []
    for jump in re.finditer(r"\bBRA\S* .*?(\.L_x_\d+)", listing):
        label = listing.find(f"\n{jump[1]}:", 0, jump.start())
        body = listing[label : jump.end()]
        inside = opcodes(body) if label >= 0 else Counter[str]()
        votes = 1 + ("VIMNMX3" in body)  # and the one of maxima
        if inside["HGMMA"] == products and inside["VOTE"] == votes and not inside["STSM"]:
            found.append(body)
    return found


@pytest.mark.parametrize("name", few(LAZY))
def test_sums_are_rescaled_behind_a_branch(name: str, cubins: dict[str, Cubin], tmp_path: Path) -> None:
    spec, budget = PRODUCTION[name]
    sizes = dict(spec.constants)
    columns = int(sizes["BLOCK_D"]) * (3 if sizes["TWO_PARTS"] else 1)

    products = budget.count // int(sizes["CONSUMERS"]) // (1 + budget.loops)
    found = lazy_loops(disassembled(cubins[name], tmp_path), products)

    assert len(found) == sizes["CONSUMERS"] * budget.loops
    for loop in found:
        jumped = re.findall(r"\n[^\n]*@!P\d BRA `\((\.L_x_\d+)\).*?\n\1:", loop, re.DOTALL)
        over = [re.search(rf"@!P\d BRA `\({label}\)(.*?)\n{label}:", loop, re.DOTALL) for label in jumped]
        passed_over = sum(opcodes(part[1])["FMUL"] for part in over if part)
        assert passed_over == columns // 2 == opcodes(loop)["FMUL"]
        if sizes["BLOCK_D"] == 128:
            assert opcodes(loop)["R2UR"] <= 2, "addresses are each thread's"


@pytest.mark.parametrize("name", few(SERIAL))
def test_one_product_at_a_time_leaves_registers_enough(name: str, cubins: dict[str, Cubin], tmp_path: Path) -> None:
    spec, budget = PRODUCTION[name]
    products = budget.count // int(dict(spec.constants)["CONSUMERS"]) // (1 + budget.loops)

    for loop in lazy_loops(disassembled(cubins[name], tmp_path), products):
        issued = opcodes(loop)
        assert issued["PRMT"] == issued["STL"] == 0
        assert issued["LDL"] == 0 or issued["FSEL"], "the loop without masks spills"
        assert loop.count("MUFU.EX2") >= budget.exponentials


DECODING = {
    f"{dtype} {head_size}": hopper.variants(Forward(dtype, head_size).specs()[-1], head_size)[0]
    for dtype, head_size in (("fp16", 64), ("fp16", 128), ("fp16", 256), ("bf16", 128))
}
RESERVED = 1024  # bytes of shared memory that the system takes of every block


@pytest.fixture(scope="module")
def decoding(compiler: Compiler, shared: Shared) -> dict[str, Cubin]:
    return Compiled(DECODING, compiler, shared)


def static_shared(cubin: Cubin, folder: Path) -> int:
    """Bytes of shared memory that the code itself sets aside, what the system takes included."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    path = folder / "code.cubin"
    path.write_bytes(cubin.code)
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"SHARED:(\d+)", usage)
    return int(found)


@pytest.mark.parametrize("name", few(DECODING))
def test_decoding_multiplies_keys_by_8_queries_and_does_not_spill(
    name: str, decoding: dict[str, Cubin], tmp_path: Path
) -> None:
    sizes = dict(DECODING[name].constants)
    listing = disassembled(decoding[name], tmp_path)
    found = opcodes(listing)

    d, n = int(sizes["BLOCK_D"]), int(sizes["BLOCK_N"])
    assert len(re.findall(r"HGMMA\.64x8x16\.F32", listing)) == found["HGMMA"] == 2 * (n // 64 * d // 16)
    assert len(re.findall(r"HGMMA.*gsb0", listing)) == 2, "wgmma runs one at a time"
    assert decoding[name].spilled == found["STL"] == found["LDL"] == 0


@pytest.mark.parametrize("name", few(DECODING))
def test_decoding_asks_for_the_queries_first_and_for_keys_before_it_waits(
    name: str, decoding: dict[str, Cubin], tmp_path: Path
) -> None:
    sizes = dict(DECODING[name].constants)
    copied = int(sizes["BLOCK_D"]) == hopper.COPIED
    listing = disassembled(decoding[name], tmp_path)
    loads, waits = (
        [found.start() for found in re.finditer(op, listing)]
        for op in ((r"\bLDGSTS", r"\bDEPBAR\.LE SB0") if copied else (r"\bUTMALDG", r"\bSYNCS\.PHASECHK"))
    )

    # Of a block of K and one of V: a box each, or 16 bytes a thread.
    each = int(sizes["BLOCK_N"]) * int(sizes["BLOCK_D"]) * 2 // (16 * 32 * int(sizes["WARPS"])) if copied else 1
    stages = int(sizes["STAGES"])
    assert waits[0] > loads[2 * stages * each - 1]
    assert listing.index("LDG.E.128") < loads[0]
    assert waits[0] > listing.index("UCGABAR_ARV"), "the cluster learns early that a program runs"
    assert listing.index("UCGABAR_WAIT") < listing.index("STAS.64 "), "nothing is put before all programs run"
    if copied:
        assert len(loads) == 2 * (stages + 1) * each, "every copy is of 16 bytes"
        assert len(re.findall(r"LDGSTS\.E\.BYPASS\.128 \S+ \S+, !?P\d", listing)) == len(loads), "or of zeros"
        assert len(waits) == 2


@pytest.mark.parametrize("name", few(DECODING))
def test_what_decoding_shares_fits_and_leaves_the_swizzle_in_place(
    name: str, decoding: dict[str, Cubin], tmp_path: Path
) -> None:
    static = static_shared(decoding[name], tmp_path)

    assert static >= RESERVED + 4 * 8 * int(dict(DECODING[name].constants)["BLOCK_D"])
    assert static % 1024 == 0, "what TMA writes would not begin where its swizzle does"
    assert decoding[name].shared + static <= SHARED_OF_SM
