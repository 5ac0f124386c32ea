"""Shared memory is checked when a kernel is built, and the message says what to use instead."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import KERNELS, snapshot

from pyfmha.aot import Compiler, compile_kernel, make_spec
from pyfmha.aot.limits import check_shared_memory
from pyfmha.errors import CompileError, SharedMemoryError
from pyfmha.spec.arch import ARCHS
from pyfmha.spec.kernel import KernelSpec

SM_86 = ARCHS["sm_86"]


@pytest.fixture(scope="module")
def greedy(compiler: Compiler) -> KernelSpec:
    """Eight stages of 64 x 64 tiles of fp16: more than the 99 KiB of sm_86."""
    signature = "*fp16:16, *fp16:16, *fp32:16, i32:16, i32:16, 64, 64, 64"
    return make_spec(compiler, KERNELS / "matrix.py", "product", signature, "n / BLOCK_M, n / BLOCK_N", num_stages=8)


def test_too_much_is_refused_with_variant_bytes_limit_and_what_fits(
    compiler: Compiler, greedy: KernelSpec, tmp_path: Path
) -> None:
    (tmp_path / "earlier").write_text("stays")

    with pytest.raises(SharedMemoryError) as caught:
        compile_kernel(compiler, greedy, [SM_86], tmp_path / "product")

    message = str(caught.value)
    needed = compiler.compile(greedy, SM_86).shared
    assert needed > SM_86.shared_limit
    assert f"{greedy.variant} needs {needed} bytes of shared memory a block, sm_86 allows 101376; " in message
    assert "these fit, with a grid to match: " in message
    assert snapshot(tmp_path) == {"earlier": b"stays"}


def test_what_is_said_to_fit_does_fit(compiler: Compiler, greedy: KernelSpec) -> None:
    cubin = compiler.compile(greedy, SM_86)
    with pytest.raises(SharedMemoryError) as caught:
        check_shared_memory(compiler, greedy, cubin)

    offers = re.findall(
        r"BLOCK_M=(\d+), BLOCK_N=(\d+), BLOCK_K=(\d+), num_stages=(\d+) \((\d+) bytes\)", str(caught.value)
    )

    assert 1 <= len(offers) <= 3
    for *blocks, stages, said in offers:
        constants = tuple(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), map(int, blocks), strict=True))
        offered = compiler.compile(replace(greedy, constants=constants, num_stages=int(stages)), SM_86)
        assert offered.shared == int(said) <= SM_86.shared_limit


def test_the_same_kernel_is_fine_where_there_is_more(compiler: Compiler, greedy: KernelSpec, tmp_path: Path) -> None:
    headers = compile_kernel(compiler, greedy, [ARCHS["sm_90"]], tmp_path / "product", generic=False)

    assert headers[0].is_file()


def test_just_the_limit_is_allowed_and_one_byte_more_is_not(compiler: Compiler, greedy: KernelSpec) -> None:
    cubin = compiler.compile(greedy, SM_86)

    check_shared_memory(compiler, greedy, replace(cubin, shared=SM_86.shared_limit))
    with pytest.raises(SharedMemoryError):
        check_shared_memory(compiler, greedy, replace(cubin, shared=SM_86.shared_limit + 1))


def test_where_nothing_fits_the_message_says_so(compiler: Compiler) -> None:
    spec = make_spec(compiler, KERNELS / "elementwise.py", "add", "*fp32, *fp32, *fp32, i32, 128", "1", num_stages=1)
    cubin = replace(compiler.compile(spec, SM_86), shared=200_000)

    with pytest.raises(SharedMemoryError, match="no smaller block was found that fits"):
        check_shared_memory(compiler, spec, cubin)


def test_it_is_a_kind_of_compile_error() -> None:
    assert issubclass(SharedMemoryError, CompileError)
