"""Kernels with global scratch, which the caller gives, and with several blocks a program."""

import ctypes
import shutil
import struct
from pathlib import Path

import pytest
from fake_cuda import FakeCuda
from helpers import INVALID_VALUE, KERNELS, MISALIGNED_ADDRESS, NOT_INITIALIZED, STRICT, SUCCESS, CLibrary, gcc

from pyfmha.aot import Compiler, compile_kernel, link, make_spec, make_specs
from pyfmha.errors import CompileError, LaunchError, SpecError
from pyfmha.runtime.library import Library
from pyfmha.spec.arch import parse_archs

pytest.importorskip("triton")

DECORATED = KERNELS / "decorated.py"
GRID = "cdiv(m, M), cdiv(n, N)"
X, Y, SPACE = 0x7000_0000, 0x7100_0000, 0x7200_0000
BYTES = 2 * 128  # a block makes two tensor maps


@pytest.fixture(scope="module")
def built(compiler: Compiler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``described``, which needs scratch on sm_90 and none on sm_80, and ``transpose``, two blocks a program or one."""
    folder = tmp_path_factory.mktemp("workspace")
    signature = "*fp16:16, *fp16:16, i32, i32:16, 64, 64"
    described = make_spec(compiler, DECORATED, "described", signature, GRID, workspace=True)
    headers = compile_kernel(compiler, described, parse_archs(["sm_80", "sm_90"]), folder / "described")
    signature = "*fp32:16, *fp32:16, i64, i32"
    for spec in make_specs(compiler, DECORATED, "transpose", signature, GRID, configs=None):
        headers += compile_kernel(compiler, spec, parse_archs(["sm_90"]), folder / "transpose", generic=False)
    link(headers, folder / "library")
    return folder


@pytest.fixture
def library(built: Path, tmp_path: Path) -> CLibrary:
    opened = CLibrary(Path(shutil.copy(built / "library.so", tmp_path / "fresh.so")))
    pointers, integers = [ctypes.c_uint64] * 2, [ctypes.c_int32] * 2
    opened.c.described_workspace.argtypes = [*pointers, *integers, ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p]
    return opened


def bytes_for(library: CLibrary, m: int, n: int, algo_id: int = 0) -> tuple[int, int]:
    """Status and bytes of ``described_workspace``."""
    size = ctypes.c_uint64(99)
    status = library.c.described_workspace(X, Y, m, n, 0, algo_id, ctypes.byref(size))
    return status, size.value


@pytest.fixture
def loaded(library: CLibrary, fake_cuda: FakeCuda) -> CLibrary:
    fake_cuda.use_context()
    assert [library.load(name) for name in ("described", "transpose")] == [SUCCESS, SUCCESS], library.error()
    return library


class TestWorkspace:
    @pytest.mark.parametrize(("m", "n", "blocks"), [(64, 64, 1), (65, 640, 20), (0, 64, 0), (100_000, 128, 1563 * 2)])
    def test_its_size_follows_from_the_grid(self, loaded: CLibrary, m: int, n: int, blocks: int) -> None:
        assert bytes_for(loaded, m, n) == (SUCCESS, BYTES * blocks), loaded.error()

    def test_it_is_the_kernels_scratch(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        assert loaded.launch("described", X, Y, 65, 640, SPACE, stream=5) == SUCCESS, loaded.error()

        (launch,) = fake_cuda.launches()
        assert launch.grid == (2, 10, 1)
        pointers = [struct.pack("<Q", value) for value in (X, Y, SPACE, 0)]
        assert launch.params == (*pointers[:2], struct.pack("<i", 65), struct.pack("<i", 640), *pointers[2:])

    def test_without_it_nothing_is_launched(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        assert loaded.launch("described", X, Y, 65, 640, 0) == INVALID_VALUE
        assert "the workspace is 0; these arguments need 5120 bytes" in loaded.error()
        assert "described_workspace()" in loaded.error()
        assert loaded.launch("described", X, Y, 65, 640, SPACE + 64) == MISALIGNED_ADDRESS
        assert "is 0x72000040, not a multiple of 128 bytes" in loaded.error()
        assert fake_cuda.launches() == []
        assert loaded.launch("described", X, Y, 0, 640, 0) == SUCCESS  # an empty grid needs none

    def test_where_the_kernel_needs_none_it_may_be_null(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.set_device(0, 86)
        fake_cuda.use_context()
        assert library.load("described") == SUCCESS, library.error()

        assert bytes_for(library, 65, 640) == (SUCCESS, 0)
        assert library.launch("described", X, Y, 65, 640, 0) == SUCCESS, library.error()

    def test_what_cannot_be_launched_has_no_size(self, loaded: CLibrary) -> None:
        assert bytes_for(loaded, 64, 64, algo_id=1) == (INVALID_VALUE, 0)
        assert bytes_for(loaded, -64, 64) == (INVALID_VALUE, 0)
        assert "grid x is -1" in loaded.error()

    def test_it_asks_for_a_function_that_is_loaded(self, library: CLibrary) -> None:
        assert bytes_for(library, 64, 64) == (NOT_INITIALIZED, 0)
        assert "call load_described()" in library.error()

    def test_manifest_and_header_say_the_bytes(self, built: Path) -> None:
        described = CLibrary(built / "library.so").manifest.functions[0]
        images = described.algorithms[0][0].images

        assert [(i.arch, i.workspace, i.workspace_align) for i in images] == [("sm_80", 0, 1), ("sm_90", BYTES, 128)]
        assert described.arguments[-1] == ("workspace", "*i8")
        assert "Bytes a program of the grid: 0 for sm_80, 256 for sm_90." in (built / "library.h").read_text()

    def test_python_asks_for_it_too(self, built: Path, fake_cuda: FakeCuda) -> None:
        fake_cuda.use_context()
        functions = Library(built / "library.so")
        for name in functions:
            functions[name].load()

        assert functions["described"].workspace_size(X, Y, 65, 640, 0) == 20 * BYTES
        assert functions["transpose"].workspace_size(X, Y, 65, 640) == 0
        with pytest.raises(LaunchError, match="grid x is -1"):
            functions["described"].workspace_size(X, Y, -64, 64, 0)

    def test_the_generated_c_is_strict(self, built: Path, tmp_path: Path) -> None:
        for file in built.glob("*.c"):
            done = gcc(*STRICT, "-c", file, "-o", tmp_path / "out.o")
            assert done.returncode == 0, done.stderr

    def test_a_kernel_that_needs_it_says_how(self, compiler: Compiler) -> None:
        spec = make_spec(compiler, DECORATED, "described", "*fp16:16, *fp16:16, i32, i32:16, 64, 64", GRID)

        with pytest.raises(CompileError, match=r"needs 256 bytes of global scratch a block .* with --workspace"):
            compiler.compile(spec, parse_archs(["sm_90"])[0])

    def test_a_parameter_of_that_name_is_refused(self, compiler: Compiler, tmp_path: Path) -> None:
        file = tmp_path / "named.py"
        file.write_text("import triton\n\n\n@triton.jit\ndef f(X, workspace):\n    pass\n")

        with pytest.raises(SpecError, match="workspace is given more than once"):
            make_spec(compiler, file, "f", "*i8, *i8", "1", workspace=True)


class TestSeveralBlocksAProgram:
    def test_they_are_a_cluster_along_x(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        for algo_id in (0, 1):
            assert loaded.launch("transpose", X, Y, 65, 640, algo_id=algo_id) == SUCCESS, loaded.error()

        together, alone = fake_cuda.launches()
        assert (together.cluster, together.grid, together.block) == ((2, 1, 1), (4, 10, 1), (128, 1, 1))
        assert (alone.cluster, alone.grid) == (None, (2, 10, 1))

    def test_a_grid_that_they_make_too_large_is_refused(self, loaded: CLibrary) -> None:
        assert [image.num_ctas for a in loaded.manifest.functions[1].algorithms for image in a[0].images] == [2, 1]
        assert loaded.launch("transpose", X, Y, 64 << 30, 64, algo_id=0) == INVALID_VALUE
        assert "grid x is 1073741824, allowed is 0 to 1073741823" in loaded.error()
        assert loaded.launch("transpose", X, Y, 64 << 30, 64, algo_id=1) == SUCCESS
