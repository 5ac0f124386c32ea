"""What keeps the Hopper kernel with biases and masks fast, and its shared memory apart, read from its machine code."""

import re
import subprocess
from pathlib import Path

import pytest
from machine_code import disassembled, opcodes
from shared import Shared
from test_audit import steps

from pyfmha.aot.cubin import Compiler
from pyfmha.attention import biased_hopper, biased_settings
from pyfmha.attention.biased import Biased
from pyfmha.functions.family import SHIPPED, WithFunction, declared_in, file_of
from pyfmha.spec.arch import parse_arch
from pyfmha.spec.kernel import KernelSpec

pytest.importorskip("triton")


def plain(size: int, beside: biased_settings.Beside, *, causal: bool = False) -> KernelSpec:
    """The variant for full or for causal attention."""
    return biased_hopper.plain(Biased("fp16", size).generic(), size, beside)[causal]


KERNELS = {
    "bias 64": plain(64, biased_settings.BIAS_TILE),
    "mask 64": plain(64, biased_settings.MASK_TILE),
    "mask 64, causal": plain(64, biased_settings.MASK_TILE, causal=True),
    "bias of keys 64": plain(64, biased_settings.BIAS_KEYS),
    "bias of keys 64, causal": plain(64, biased_settings.BIAS_KEYS, causal=True),
    "bias 128": plain(128, biased_settings.BIAS_TILE),
    "bias, lengths": biased_hopper.of_kind(Biased("fp16", 64).generic(), 64, biased_settings.BIAS_TILE)[0],
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
    batches = 6 if "IN_PRODUCT" in dict(spec.constants) else 4
    assert len(re.findall(r"HGMMA.*gsb0", listing)) == batches * consumers, "wgmma runs one at a time"
    assert cubin.spilled <= {1: 0, 2: 136, 3: 168}[consumers]
    begun = [
        int(place or "0", 16) for place in re.findall(r"SYNCS\.EXCH\.64 URZ, \[UR\d+(?:\+0x([0-9a-f]+))?\]", listing)
    ]
    assert begun, "the listing was not understood"
    assert min(begun) >= data_bytes(spec), "a barrier lies in what TMA fills"


# Instructions of a step where nothing is masked, for 64 queries, 128 keys and a head size of 64: plain attention has
# 424, and to add a number to each score would take 64 more.
MOST = {"bias of keys": 505, "alibi": 530, "t5": 640}


@pytest.mark.long
@pytest.mark.parametrize("name", MOST)
def test_products_begin_with_terms_that_threads_share(
    name: str, compiler: Compiler, shared: Shared, tmp_path: Path
) -> None:
    spec = KERNELS["bias of keys 64, causal"]
    if name in SHIPPED:
        (function,) = [one for one in declared_in(file_of(name), compiler.collect) if one.name == name]
        spec = WithFunction("fp16", 64, function=function).specs()[0]
    listing = disassembled(shared.compile(compiler, spec, parse_arch("sm_90")), tmp_path)
    (step,) = steps(listing)
    code = step.before + step.after
    found = opcodes(code)

    assert sum(found.values()) <= MOST[name]
    assert found["STL"] == found["LDL"] == 0
    pairs = [at.start() for at in re.finditer(r"LDS\.64 ", code)]
    assert len(pairs) == found["LDS"] == 32, "what a thread's 64 elements begin with, and nothing else"
    products = found["FFMA"] + found["FMUL"] + found["FADD"]
    assert products <= 64 + 64 + 32 + (64 if name == "t5" else 20), "each score is multiplied or added to"
    stores = [at.start() for at in re.finditer(r"\bSTS ", code)]
    waits = [at.start() for at in re.finditer(r"\bBAR\.SYNC", code)]
    assert stores[1] < pairs[0], "of the next step, stored before it is loaded"
    assert sum(stores[0] < wait < pairs[0] for wait in waits) == 2, "all threads meet in between"


@pytest.mark.long
def test_consumers_do_little_where_the_producer_prepares(compiler: Compiler, shared: Shared, tmp_path: Path) -> None:
    """Of a product of terms as much as plain attention."""
    cubin = shared.compile(compiler, KERNELS["bias of keys 64"], parse_arch("sm_90"))
    found = steps(disassembled(cubin, tmp_path))
    assert len(found) == 3, "one for each consumer"
    for step in found:
        mix = opcodes(step.before + step.after)
        assert sum(mix.values()) <= 410
        assert mix["STL"] == mix["LDL"] == mix["LDS"] == mix["LDSM"] == 0


OF_TILES = {"bias 64": 535, "mask 64": 570}


@pytest.mark.long
@pytest.mark.parametrize("name", OF_TILES)
def test_consumers_leave_the_fence_to_the_producer(
    name: str, compiler: Compiler, shared: Shared, tmp_path: Path
) -> None:
    """Behind a consumer's, nothing runs until its product is complete."""
    listing = disassembled(shared.compile(compiler, KERNELS[name], parse_arch("sm_90")), tmp_path)
    (step,) = steps(listing)
    mix = opcodes(step.before + step.after)
    assert sum(mix.values()) <= OF_TILES[name]
    assert mix["MEMBAR"] == mix["FENCE"] == mix["STL"] == mix["LDL"] == 0
    assert mix["VIMNMX3"] >= 28, "maxima are taken of two scores"
    assert "MEMBAR" in listing


@pytest.mark.long
@pytest.mark.parametrize("name", [*OF_TILES, "bias 128"])
def test_all_threads_meet_before_one_gives_a_tile_back(
    name: str, compiler: Compiler, shared: Shared, tmp_path: Path
) -> None:
    """Nothing in the kernel's text says so: Gluon has them do it before an arrival."""
    listing = disassembled(shared.compile(compiler, KERNELS[name], parse_arch("sm_90")), tmp_path)
    for step in steps(listing):
        code = step.before + step.after
        loads, meetings, arrivals = (
            [at.start() for at in re.finditer(what, code)] for what in (r"\bLDSM?\b", r"\bBAR\.SYNC", r"SYNCS\.ARRIVE")
        )
        assert len(loads) >= 8
        assert len(arrivals) == 2, "of the keys with the tile, and of values"
        assert any(max(loads) < at < arrivals[0] for at in meetings)


@pytest.mark.long
@pytest.mark.parametrize("beside", [biased_settings.NEITHER, biased_settings.BIAS_TILE])
def test_products_of_bf16_are_compared_where_it_may_matter(
    beside: biased_settings.Beside, compiler: Compiler, shared: Shared, tmp_path: Path
) -> None:
    """With their limit: by warps, in a way of their own of one instruction each, rather than by two for each."""
    (full, _) = biased_hopper.plain(Biased("bf16", 64).generic(), 64, beside)
    cubin = shared.compile(compiler, full, parse_arch("sm_90"))
    listing = disassembled(cubin, tmp_path)
    (step,) = steps(listing)
    limits = len(re.findall(r"FMNMX\.NAN", listing))
    assert 2 * 64 <= limits <= 2 * 64 + 2, "once before the loop, once within, and of sums"
    code = step.before + step.after
    mix = opcodes(code)
    assert mix["FSETP"] <= 8
    assert mix["STL"] == mix["LDL"] == cubin.spilled == 0
