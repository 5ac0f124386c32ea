"""Kernels whose file says what they do by hand, fences and barriers among it, come out the same where Triton looks for
more, and so does everything on architectures without tensor memory."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pyfmha.aot.cubin import Compiler
from pyfmha.attention.families import library_specs
from pyfmha.spec.arch import ARCHS, Arch
from pyfmha.spec.constants import Constant
from pyfmha.spec.kernel import KernelSpec

SM_90 = ARCHS["sm_90"]
KERNELS = ("fmha_fwd_sm90", "fmha_values_sm90", "fmha_decode_sm90")


def of_default_library() -> list[KernelSpec]:
    return [spec for spec in library_specs() if spec.kernel in KERNELS]


def variant(**constants: Constant) -> KernelSpec:
    """The first one of bfloat16 that is compiled so."""
    return next(
        spec
        for spec in of_default_library()
        if "bf16" in spec.name and constants.items() <= dict(spec.constants).items()
    )


# Between them, all places of barriers but those of rows that are dropped from blocks of no power of two keys.
SHORT = (
    variant(BLOCK_D=64, GENERAL=True),
    variant(BLOCK_D=64, RAGGED=True),
    variant(TWO_PARTS=True, APART=True, HANDED_ON=True, CAUSAL=True),
)
LONG = [spec for index, spec in enumerate(of_default_library()) if index % 6 == 0 or spec in SHORT]


def with_text(spec: KernelSpec, folder: Path, change: tuple[str, str]) -> KernelSpec:
    """The same of files with other text, wherever that is found."""
    folder.mkdir()
    for file in Path(spec.source).parent.glob("*.py"):
        (folder / file.name).write_text(re.sub(*change, file.read_text(), flags=re.MULTILINE))
    return replace(spec, source=folder / Path(spec.source).name)


@pytest.fixture(scope="module")
def other() -> Iterator[Compiler]:
    """One with a cache of its own: Triton takes files for the same that say other things of themselves."""
    with Compiler(jobs=1) as made:
        yield made


def are_all_set(spec: KernelSpec, compiler: Compiler, other: Compiler, folder: Path, arch: Arch = SM_90) -> bool:
    """Whether the cubin is that of files that say nothing."""
    silent = with_text(spec, folder, ("^BY_HAND =", "SAID_BY_NOBODY ="))
    return compiler.compile(spec, arch).code == other.compile(silent, arch).code


@pytest.mark.parametrize(
    "spec",
    [pytest.param(spec, id=spec.variant, marks=() if spec in SHORT else pytest.mark.long) for spec in LONG],
)
def test_what_is_done_by_hand_is_all(spec: KernelSpec, compiler: Compiler, other: Compiler, tmp_path: Path) -> None:
    assert are_all_set(spec, compiler, other, tmp_path / "silent")


PORTABLE = [spec for spec in library_specs() if not spec.archs and "BY_HAND" in Path(spec.source).read_text()]


@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.long), "sm_90"])
@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, id=spec.variant, marks=() if index == 0 else pytest.mark.long)
        for index, spec in enumerate(PORTABLE[5::17])
    ],
)
def test_what_is_simple_needs_no_more(
    spec: KernelSpec, arch: str, compiler: Compiler, other: Compiler, tmp_path: Path
) -> None:
    assert are_all_set(spec, compiler, other, tmp_path / "silent", ARCHS[arch])


GENERAL, RAGGED, HANDED_ON = SHORT
RAGGED_WIDE = variant(RAGGED=True, BLOCK_N=80, CAUSAL=True)
# What follows a barrier, and a variant that has it.
PLACES = {
    "loads": ("tma.async_load(desc, [batch, head, row, 0], ready", RAGGED),
    "loads of a first part": ("tma.async_load(desc, place, ready", HANDED_ON),
    "loads of a second part": ("tma.async_load(desc, [batch, head, row, 2 * BLOCK_D], ready", HANDED_ON),
    "loads of panels": ("tma.async_load(desc, [batch, head, key, panel * PANEL]", HANDED_ON),
    "stores": ("if PARTS == 2:", GENERAL),
    "stores of sequences": ("tma.async_store(out_desc", RAGGED),
    "stores waited for": ("if SHAPE.APART and CONSUMER", GENERAL),
    "padding": ("part.store(kept)", GENERAL),
    "rows of others": ("part.store(kept)", RAGGED),
    "rows of others in panels": ("kept = gl.where((rows < count - first)[:, None], 0.0", RAGGED_WIDE),
    "rows of others dropped": ("mbarrier.wait(whole, phase)", RAGGED),
    "queries of a tile handed on": ("mbarrier.wait(q_ready.index(slot)", HANDED_ON),
    "buffer of two parts": ("mbarrier.wait(plain[1]", HANDED_ON),
    "notes": ("noted = gl.reduce_or(noted, 0)", HANDED_ON),
}


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=() if place == "stores" else pytest.mark.long) for place in PLACES]
)
def test_a_barrier_that_lacks_is_found(place: str, compiler: Compiler, other: Compiler, tmp_path: Path) -> None:
    follows, spec = PLACES[place]
    faulty = with_text(spec, tmp_path / "faulty", (rf"gl\.barrier\(\)(?=\n *{re.escape(follows)})", "pass"))

    assert not are_all_set(faulty, compiler, other, tmp_path / "silent")
