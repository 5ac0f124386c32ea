"""Kernels whose file says that they set all fences between proxies come out the same as where Triton looks for more."""

from dataclasses import replace
from pathlib import Path

import pytest

from pyfmha.aot.cubin import Compiler
from pyfmha.attention.families import library_specs
from pyfmha.spec.arch import ARCHS
from pyfmha.spec.kernel import KernelSpec

SM_90 = ARCHS["sm_90"]
KERNELS = ("fmha_fwd_sm90", "fmha_values_sm90", "fmha_decode_sm90")


def of_default_library() -> list[KernelSpec]:
    return [spec for spec in library_specs() if spec.kernel in KERNELS]


def without_saying_so(spec: KernelSpec, folder: Path) -> KernelSpec:
    """The same of files that say nothing."""
    for file in Path(spec.source).parent.glob("*.py"):
        (folder / file.name).write_text(file.read_text().replace("ALL_FENCES = True", "ALL_FENCES = False"))
    return replace(spec, source=folder / Path(spec.source).name)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, id=spec.variant, marks=() if index % 80 == 0 else pytest.mark.long)
        for index, spec in enumerate(of_default_library())
        if index % 8 == 0
    ],
)
def test_all_fences_are_set(spec: KernelSpec, compiler: Compiler, tmp_path: Path) -> None:
    said = compiler.compile(spec, SM_90)

    assert said.code == compiler.compile(without_saying_so(spec, tmp_path), SM_90).code
