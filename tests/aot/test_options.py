"""Options of the compiler that are part of a variant, and what is said where Triton or the disk is the matter."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fake_cuda import FakeCuda
from helpers import INVALID_VALUE, SUCCESS, CLibrary, run_python

from pyfmha.aot import Compiler, compile_kernel, link, make_spec
from pyfmha.aot.cubin import check_source
from pyfmha.aot.reasons import full_disk, reasons
from pyfmha.errors import CompileError, KernelSourceError, OutputError, SpecError
from pyfmha.spec.arch import ARCHS
from pyfmha.spec.kernel import KernelSpec
from pyfmha.spec.manifest import read_manifest

SM_90 = ARCHS["sm_90"]
KERNEL = """
import triton
import triton.language as tl

{GLOBAL}
@triton.jit{DEBUG}
def scale(X, Y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < n)
    tl.device_assert(x > 0, "positive numbers only")
    tl.store(Y + i, x * x + {VALUE}, mask=i < n)
"""
ASSERT = b"positive numbers only"


def write(folder: Path, decorator: str = "", constant: str = "", value: str = "x") -> Path:
    file = folder / "scale.py"
    file.write_text(KERNEL.replace("{DEBUG}", decorator).replace("{GLOBAL}", constant).replace("{VALUE}", value))
    return file


def make(compiler: Compiler, file: Path, **options: object) -> KernelSpec:
    return make_spec(compiler, file, "scale", "*fp32, *fp32, i32, 128", "cdiv(n, BLOCK)", **options)  # type: ignore[arg-type]


class TestOptions:
    @pytest.mark.parametrize(
        ("decorator", "asked", "held"),
        [("", None, False), ("", True, True), ("(debug=True)", None, True), ("(debug=True)", False, False)],
    )
    def test_device_asserts(
        self, compiler: Compiler, tmp_path: Path, decorator: str, asked: bool | None, held: bool
    ) -> None:
        file = write(tmp_path, decorator)
        spec = make(compiler, file, debug=asked)
        plain = make(compiler, file, debug=None).variant if decorator else make(compiler, file).variant

        compile_kernel(compiler, spec, [SM_90], tmp_path / "scale")
        manifest = link([tmp_path / f"scale.{spec.variant}.h"], tmp_path / "lib", library=False)

        assert (ASSERT in compiler.compile(spec, SM_90).code) == held
        assert manifest.functions[0].algorithms[0][0].images[0].debug == held
        assert (spec.variant != plain) == (asked is not None)
        assert read_manifest(tmp_path / "lib.json") == manifest

    def test_a_spec_that_says_nothing_follows_the_decorator(self, compiler: Compiler, tmp_path: Path) -> None:
        file = write(tmp_path, "(debug=True)")
        spec = replace(make(compiler, file), debug=None)

        assert ASSERT in compiler.compile(spec, SM_90).code

    def test_fusion_and_registers(self, compiler: Compiler, tmp_path: Path) -> None:
        file = write(tmp_path)
        specs = [make(compiler, file, **options) for options in ({}, {"enable_fp_fusion": False}, {"maxnreg": 24})]
        fused, apart, confined = (compiler.compile(spec, SM_90) for spec in specs)

        assert len({spec.variant for spec in specs}) == 3
        assert len({cubin.code for cubin in (fused, apart, confined)}) == 3
        assert confined.registers <= 24

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"debug": 1}, "debug is 1"),
            ({"enable_fp_fusion": None}, "enable_fp_fusion is None"),
            ({"maxnreg": 7}, "8 to 255"),
        ],
    )
    def test_impossible_ones_are_refused(
        self, compiler: Compiler, tmp_path: Path, options: dict[str, object], message: str
    ) -> None:
        with pytest.raises(SpecError, match=message):
            make(compiler, write(tmp_path), **options)


@pytest.fixture(scope="module")
def library_path(compiler: Compiler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nullable")
    headers = []
    for name, nullable in (("strict", ()), ("never", ("X", "Y")), ("sometimes", ("X if n <= 2", "Y if X == 0"))):
        spec = make(compiler, write(folder), name=name, nullable=nullable)
        headers += compile_kernel(compiler, spec, [SM_90], folder / name)
    link(headers, folder / "lib")
    return folder / "lib.so"


class TestNullable:
    @pytest.mark.parametrize(
        ("function", "x", "y", "n", "missing"),
        [
            ("strict", 0, 64, 1, "X"),
            ("strict", 64, 0, 1, "Y"),
            ("strict", 0, 0, 1, "X"),
            ("strict", 0, 0, 0, ""),
            ("never", 0, 0, 1, ""),
            ("sometimes", 0, 64, 2, ""),
            ("sometimes", 0, 64, 3, "X"),
            ("sometimes", 0, 0, 2, ""),
            ("sometimes", 64, 0, 2, "Y"),
        ],
    )
    def test_null_is_refused_where_the_spec_does_not_allow_it(
        self,
        library_path: Path,
        tmp_path: Path,
        fake_cuda: FakeCuda,
        function: str,
        x: int,
        y: int,
        n: int,
        missing: str,
    ) -> None:
        library = CLibrary(Path(shutil.copy(library_path, tmp_path)))  # one that has no driver open yet
        fake_cuda.use_context()
        assert library.load(function) == SUCCESS

        status = library.launch(function, x, y, n)

        assert status == (INVALID_VALUE if missing else SUCCESS)
        assert not missing or f": {missing} is null; give its address" in library.error()
        assert fake_cuda.launch_count() == (1 if not missing and n else 0)

    @pytest.mark.parametrize(
        ("nullable", "message"),
        [
            ("n", "'n' is no pointer; use"),
            ("Z", "with one of X, Y"),
            ("X if m == 0", "'m' is no argument"),
            ("X if", "'X if'"),
        ],
    )
    def test_what_cannot_be_null_is_refused(
        self, compiler: Compiler, tmp_path: Path, nullable: str, message: str
    ) -> None:
        with pytest.raises(SpecError, match=message):
            make(compiler, write(tmp_path), nullable=(nullable,))

    def test_it_changes_no_name(self, compiler: Compiler, tmp_path: Path) -> None:
        file = write(tmp_path)

        assert make(compiler, file, nullable=("X",)).variant == make(compiler, file).variant


class TestAdvice:
    def test_variables_that_the_compiler_process_has_not_are_said_to_change_nothing(
        self, compiler: Compiler, tmp_path: Path
    ) -> None:
        """Triton says to set TRITON_ALLOW_NON_CONSTEXPR_GLOBALS."""
        spec = make(compiler, write(tmp_path, constant="FACTOR = 2.0", value="FACTOR"))

        with pytest.raises(CompileError, match="Cannot access global variable FACTOR") as caught:
            compiler.compile(spec, SM_90)

        assert "setting TRITON_ALLOW_NON_CONSTEXPR_GLOBALS changes nothing here" in str(caught.value)

    def test_other_reasons_stay_as_they_are(self) -> None:
        assert reasons(ValueError("TRITON is a kernel compiler")) == "ValueError: TRITON is a kernel compiler"


class TestKernelFile:
    @pytest.mark.parametrize(
        ("make_it", "message"),
        [
            (lambda path: None, "does not exist"),
            (lambda path: path.mkdir(), "is a folder"),
            (os.mkfifo, "is a device, a pipe or a socket, not a file"),
            (lambda path: path.symlink_to(path), "is a link that leads back to itself"),
            (lambda path: path.symlink_to("/nowhere/k.py"), "is a link to /nowhere/k.py, which does not exist"),
        ],
        ids=["nothing", "folder", "pipe", "loop", "dangling"],
    )
    def test_what_is_no_file_is_named(
        self, compiler: Compiler, tmp_path: Path, make_it: Callable[[Path], object], message: str
    ) -> None:
        path = tmp_path / "k.py"
        make_it(path)

        with pytest.raises(KernelSourceError, match=f"kernel file .*k.py {message}; give the Python file"):
            make(compiler, path)

    def test_a_device_and_an_impossible_path(self) -> None:
        with pytest.raises(KernelSourceError, match="/dev/null is a device"):
            check_source(Path("/dev/null"))
        with pytest.raises(KernelSourceError, match="cannot be a path"):
            check_source(Path("a\0b"))
        with pytest.raises(KernelSourceError, match=r"cannot be read .File name too long"):
            check_source(Path("k" * 300))


class TestFullDisk:
    def test_no_temporary_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Python looks for a folder in which it can write a file, and finds none where all disks are full."""

        def none_left(*_: object, **__: object) -> str:
            raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

        monkeypatch.setattr(tempfile, "gettempdir", none_left)
        monkeypatch.setenv("TMPDIR", "/full")

        with (
            pytest.raises(OutputError, match=r"temporary file in /full: No usable .*; .*TMPDIR names another"),
            Compiler(1),
        ):
            pass

    def test_a_disk_that_fills_while_compiling(self, tmp_path: Path) -> None:
        """The worker's files may not grow, as on a full disk; the parent's may."""
        code = """
import resource, sys
from pathlib import Path
from pyfmha.aot import Compiler, make_spec
from pyfmha.errors import PyfmhaError
from pyfmha.spec.arch import ARCHS
with Compiler(1) as compiler:
    spec = make_spec(compiler, Path(sys.argv[1]), "scale", "*fp32, *fp32, i32, 128", "n")
    resource.prlimit(compiler._all[0].process.pid, resource.RLIMIT_FSIZE, (100, 100))
    try: compiler.compile(spec, ARCHS["sm_90"])
    except PyfmhaError as error: print(type(error).__name__, error)
"""
        done = run_python(code, str(write(tmp_path)))

        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"OutputError cannot write a temporary file in {tempfile.gettempdir()}: ")
        assert "TMPDIR names another folder" in done.stdout

    def test_only_a_full_disk_counts_as_one(self) -> None:
        failure = RuntimeError("ptxas failed")
        failure.__cause__ = OSError(28, os.strerror(28))

        assert full_disk(failure).startswith("cannot write a temporary file in ")
        assert full_disk(OSError(13, os.strerror(13))) == ""
        assert full_disk(RuntimeError("ptxas fatal: No space left on device")) != ""
