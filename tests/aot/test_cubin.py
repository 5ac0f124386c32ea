"""Compiling to machine code in processes of its own: results, failures, and unruly kernel files."""

import os
import re
import subprocess
import threading
from pathlib import Path

import pytest
from helpers import HANGS, KERNELS, copy_kernel, run_python

from pyfmha.aot import Compiler, make_spec
from pyfmha.aot.cubin import Cubin
from pyfmha.aot.toolchain import toolchain
from pyfmha.errors import CompileError, KernelSourceError, SpecError, ToolchainError
from pyfmha.spec.arch import ARCHS
from pyfmha.spec.kernel import KernelSpec

SM_80, SM_90 = ARCHS["sm_80"], ARCHS["sm_90"]


def add_spec(compiler: Compiler, source: Path = KERNELS / "elementwise.py") -> KernelSpec:
    return make_spec(compiler, source, "add", "*fp32:16, *fp32:16, *fp32:16, i32:16, 1024", "cdiv(n, BLOCK)")


def kernel_file(folder: Path, body: str, name: str = "kernel.py") -> Path:
    """A kernel file with lines of its own before a kernel `f`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(
        f"{body}\nimport triton\nimport triton.language as tl\n\n"
        "@triton.jit\ndef f(X, n, BLOCK: tl.constexpr = 128):\n    tl.store(X + tl.program_id(0), n)\n"
    )
    return file


class TestDescribe:
    def test_it_reads_names_defaults_and_constants(self, compiler: Compiler) -> None:
        found = compiler.describe(KERNELS / "elementwise.py", "scalars")

        assert found.names[:3] == ("OUT", "half", "brain")
        assert found.defaults == {"WRITE": True}
        assert found.constexprs == {"WRITE"}

    def test_a_missing_file_is_an_error_that_names_it(self, compiler: Compiler, tmp_path: Path) -> None:
        with pytest.raises(KernelSourceError, match=r"kernel file .*absent\.py does not exist"):
            compiler.describe(tmp_path / "absent.py", "f")

    def test_a_folder_is_no_kernel_file(self, compiler: Compiler, tmp_path: Path) -> None:
        with pytest.raises(KernelSourceError, match="is a folder"):
            compiler.describe(tmp_path, "f")

    def test_a_wrong_kernel_name_is_an_error_that_lists_those_there(self, compiler: Compiler) -> None:
        with pytest.raises(
            KernelSourceError, match=r"kernel 'ad' is not there .*; it holds: add, constants, hinted, many"
        ):
            compiler.describe(KERNELS / "elementwise.py", "ad")

    def test_a_plain_function_is_no_kernel(self, compiler: Compiler, tmp_path: Path) -> None:
        file = kernel_file(tmp_path, "def plain(): pass")

        with pytest.raises(KernelSourceError, match=r"kernel 'plain' is not a @triton.jit function .*; it holds: f"):
            compiler.describe(file, "plain")

    def test_a_file_without_kernels_says_so(self, compiler: Compiler, tmp_path: Path) -> None:
        file = tmp_path / "empty.py"
        file.write_text("")

        with pytest.raises(KernelSourceError, match="it holds: no kernel"):
            compiler.describe(file, "f")

    @pytest.mark.parametrize("name", ["kernel", "kernel.txt"])
    def test_a_file_that_is_not_called_py_is_refused(self, compiler: Compiler, tmp_path: Path, name: str) -> None:
        with pytest.raises(KernelSourceError, match="is not a Python file"):
            compiler.describe(kernel_file(tmp_path, "", name), "f")


class TestUnrulyKernelFiles:
    @pytest.mark.parametrize(
        ("body", "said"),
        [
            ("x = 1\nraise RuntimeError('no luck')", r"RuntimeError: no luck \(line 2\)"),
            ("import nowhere_to_be_found", r"ModuleNotFoundError: No module named 'nowhere_to_be_found' \(line 1\)"),
            ("x = (", r"SyntaxError: .* \(line \d+\)"),
            ("import sys\nsys.exit(3)", r"SystemExit: 3 \(line 2\)"),
            ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ],
    )
    def test_a_file_that_raises_is_an_error_that_says_what_and_where(
        self, compiler: Compiler, tmp_path: Path, body: str, said: str
    ) -> None:
        file = kernel_file(tmp_path, body)

        with pytest.raises(KernelSourceError, match=rf"{re.escape(str(file))} cannot be imported: {said}"):
            compiler.describe(file, "f")

    def test_a_file_that_ends_the_process_is_an_error_and_the_next_one_compiles(self, tmp_path: Path) -> None:
        file = kernel_file(tmp_path, "import os, sys\nprint('last words', file=sys.stderr, flush=True)\nos._exit(7)")

        with Compiler(jobs=1) as compiler:
            with pytest.raises(KernelSourceError, match="ended with exit code 7") as caught:
                compiler.describe(file, "f")
            assert "last words" in str(caught.value)
            assert compiler.describe(KERNELS / "elementwise.py", "add").names[0] == "X"

    def test_what_a_file_prints_does_not_disturb(self, tmp_path: Path) -> None:
        file = kernel_file(tmp_path, "import os\nprint('{}')\nprint('x' * 200_000, flush=True)\nos.write(1, b'{}\\n')")

        with Compiler(jobs=1) as compiler:
            assert compiler.describe(file, "f").names == ("X", "n", "BLOCK")

    def test_a_file_that_reads_its_input_finds_none(self, tmp_path: Path) -> None:
        file = kernel_file(tmp_path, "import sys\nanswer = sys.stdin.readline()\nassert answer == '', answer")
        found: list[object] = []

        with Compiler(jobs=1) as compiler:
            asking = threading.Thread(target=lambda: found.append(compiler.describe(file, "f").names), daemon=True)
            asking.start()
            asking.join(timeout=HANGS)
            assert not asking.is_alive(), "the kernel file waits for input that is not its own"
        assert found == [("X", "n", "BLOCK")]

    def test_files_of_the_same_name_in_two_folders_are_two(self, tmp_path: Path) -> None:
        for folder, factor in (("one", "3.0"), ("two", "5.0")):
            copy_kernel("with_helper.py", tmp_path / folder)
            helper = copy_kernel("scaling.py", tmp_path / folder)
            helper.write_text(helper.read_text().replace("3.0", factor))

        with Compiler(jobs=1) as compiler:
            one, two = (
                compiler.compile(
                    make_spec(compiler, tmp_path / folder / "with_helper.py", "scale", "*fp32, i32, 128", "1"), SM_80
                )
                for folder in ("one", "two")
            )

        assert one.code != two.code
        assert one.dependencies != two.dependencies

    def test_a_helper_is_a_dependency_of_every_file_that_imports_it(self, tmp_path: Path) -> None:
        first = copy_kernel("with_helper.py", tmp_path)
        second = first.with_name("second.py")
        second.write_text(first.read_text())
        copy_kernel("scaling.py", tmp_path)

        with Compiler(jobs=1) as compiler:
            cubins = [
                compiler.compile(make_spec(compiler, file, "scale", "*fp32, i32, 128", "1"), SM_80)
                for file in (first, second)
            ]

        assert [list(cubin.dependencies) for cubin in cubins] == [["scaling.py"], ["scaling.py"]]


def test_a_kernel_file_may_print_anything(tmp_path: Path) -> None:
    path = tmp_path / "noisy.py"
    noise = r'import sys; sys.stdout.buffer.write(b"\xff\n" * 200000); sys.stdout.flush()'
    path.write_text(f"{noise}\n{(KERNELS / 'scaling.py').read_text()}")

    with Compiler(1) as compiler:
        assert compiler.describe(path, "scaled").names == ("x",)


FILL = """
import triton
import triton.language as tl

@triton.jit
def fill(X, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(X + i, 1.0, mask=i < n)
"""


class TestEditedKernelFiles:
    def test_an_open_compiler_compiles_what_was_edited(self, tmp_path: Path) -> None:
        path = tmp_path / "kernel.py"
        path.write_text(FILL)
        with Compiler(1) as compiler:
            spec = make_spec(compiler, path, "fill", "*fp32, i32, 128", "cdiv(n, BLOCK)")
            before = compiler.compile(spec, ARCHS["sm_90"])
            path.write_text(FILL.replace("1.0", "2.0"))
            after = compiler.compile(spec, ARCHS["sm_90"])
        with Compiler(1) as fresh:
            expected = fresh.compile(spec, ARCHS["sm_90"])

        assert after.code == expected.code
        assert after.code != before.code


class TestCompile:
    @pytest.mark.parametrize("arch", ARCHS.values(), ids=lambda arch: arch.name)
    def test_it_compiles_for_every_architecture_without_a_gpu(self, compiler: Compiler, arch: object) -> None:
        cubin = compiler.compile(add_spec(compiler), arch)  # type: ignore[arg-type]

        assert cubin.code.startswith(b"\x7fELF")
        assert (cubin.symbol, cubin.threads, cubin.shared, cubin.spilled) == ("add", 128, 0, 0)
        assert 0 < cubin.registers <= 255

    def test_the_code_says_nothing_of_where_it_was_compiled(self, compiler: Compiler) -> None:
        code = compiler.compile(add_spec(compiler), SM_90).code

        assert b"elementwise" not in code
        assert str(KERNELS).encode() not in code

    def test_the_same_kernel_in_another_folder_gives_the_same_code(self, compiler: Compiler, tmp_path: Path) -> None:
        elsewhere = copy_kernel("elementwise.py", tmp_path / "a" / "deep folder")

        codes = {
            compiler.compile(add_spec(compiler, file), SM_90).code for file in (KERNELS / "elementwise.py", elsewhere)
        }

        assert len(codes) == 1

    def test_warps_and_hints_reach_the_code(self, compiler: Compiler) -> None:
        spec = add_spec(compiler)
        eight = make_spec(
            compiler, spec.source, "add", "*fp32:16, *fp32:16, *fp32:16, i32:16, 1024", "1", num_warps=8, num_stages=2
        )

        assert compiler.compile(eight, SM_90).threads == 256
        assert compiler.compile(spec, SM_90).code != compiler.compile(spec.generic(), SM_90).code

    def test_triton_settings_of_the_users_shell_do_not_reach_the_compiler(
        self, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = compiler.compile(add_spec(compiler), SM_90).code
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "0")
        monkeypatch.setenv("TRITON_PTXAS_PATH", "/nowhere")

        with Compiler(jobs=1) as other:
            assert other.compile(add_spec(other), SM_90).code == expected

    def test_what_triton_refuses_is_an_error_that_names_variant_and_architecture(
        self, compiler: Compiler, tmp_path: Path
    ) -> None:
        file = tmp_path / "kernel.py"
        file.write_text(
            "import triton\nimport triton.language as tl\n\n@triton.jit\ndef f(X, n, BLOCK: tl.constexpr):\n"
            "    tl.store(X + tl.arange(0, BLOCK), n)\n"
        )
        spec = make_spec(compiler, file, "f", "*fp32, i32, 100", "1")

        with pytest.raises(CompileError, match=f"{spec.variant} for sm_90: (?s:.*)power of 2") as caught:
            compiler.compile(spec, SM_90)

        assert type(caught.value) is CompileError

    def test_what_is_wrong_in_a_function_that_the_kernel_calls_is_said(
        self, compiler: Compiler, tmp_path: Path
    ) -> None:
        file = tmp_path / "kernel.py"
        file.write_text(
            "import triton\nimport triton.language as tl\n\n@triton.jit\ndef inner(x):\n    return x + nowhere\n\n"
            "@triton.jit\ndef outer(x):\n    return inner(x) * 2\n\n"
            "@triton.jit\ndef f(X, n):\n    tl.store(X, outer(n))\n"
        )
        spec = make_spec(compiler, file, "f", "*fp32, i32", "1")

        with pytest.raises(CompileError, match=r"tl\.store\(X, outer\(n\)\)") as caught:
            compiler.compile(spec, SM_90)

        reasons = str(caught.value).split("\ncaused by ")
        assert len(reasons) == 3
        assert "return inner(x) * 2" in reasons[1]
        assert "return x + nowhere" in reasons[2]
        assert "nowhere is not defined" in reasons[2]

    def test_what_is_wrong_is_said_once(self, compiler: Compiler, tmp_path: Path) -> None:
        file = tmp_path / "kernel.py"
        file.write_text(
            "import triton\nimport triton.language as tl\n\n@triton.jit\ndef f(X, n):\n"
            "    tl.store(X + tl.arange(0, 100), n)\n"
        )

        with pytest.raises(CompileError) as caught:
            compiler.compile(make_spec(compiler, file, "f", "*fp32, i32", "1"), SM_90)

        assert str(caught.value).count("power of 2") == 1

    def test_a_spec_that_does_not_fit_the_kernel_is_refused(self, compiler: Compiler) -> None:
        spec = add_spec(compiler)
        other = KernelSpec(spec.source, "subtract", "x", spec.arguments[:3], spec.constants, "1")

        with pytest.raises(SpecError, match="kernel subtract takes X, Y, Z, n, BLOCK; the spec gives X, Y, Z, BLOCK"):
            compiler.compile(other, SM_90)

    def test_many_come_back_in_the_order_asked(self, compiler: Compiler) -> None:
        wanted = [
            (spec, arch) for spec in (add_spec(compiler), add_spec(compiler).generic()) for arch in (SM_90, SM_80)
        ]
        seen: list[str] = []

        cubins = compiler.compile_all(wanted, lambda spec, cubin: seen.append(f"{spec.variant} {cubin.arch}"))

        assert [cubin.arch for cubin in cubins] == ["sm_90", "sm_80", "sm_90", "sm_80"]
        assert sorted(seen) == sorted(f"{spec.variant} {arch.name}" for spec, arch in wanted)

    def test_the_first_failure_ends_the_whole(self) -> None:
        class Stopped(Exception):
            pass

        def stop(spec: KernelSpec, cubin: Cubin) -> None:
            raise Stopped

        with Compiler(jobs=2) as compiler:
            spec = add_spec(compiler)
            with pytest.raises(Stopped):
                compiler.compile_all([(spec, SM_80)] * 20, stop)

    def test_leaving_the_compiler_leaves_no_process_and_no_file(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

        with Compiler(jobs=1) as compiler:
            add_spec(compiler)
            (process,) = [worker.process for worker in compiler._all]
            assert process.poll() is None

        assert process.poll() is not None
        assert os.listdir(tmp_path) == []

    def test_a_cubin_survives_being_recorded(self, compiler: Compiler) -> None:
        cubin = compiler.compile(add_spec(compiler), SM_80)

        assert Cubin.from_record(cubin.to_record()) == cubin


class TestSurroundings:
    def test_files_in_the_current_folder_do_not_replace_what_the_compiler_needs(self, tmp_path: Path) -> None:
        for name in ("triton.py", "jinja2.py", "pyfmha.py", "base64.py"):
            (tmp_path / name).write_text("raise RuntimeError('the wrong file was imported')")
        code = (
            "import sys; sys.path[:] = [p for p in sys.path if p]\n"
            "from pathlib import Path\nfrom pyfmha.aot import Compiler\n"
            "with Compiler(1) as c: print(c.describe(Path(sys.argv[1]), 'add').names[0])\n"
        )

        done = run_python(code, str(KERNELS / "elementwise.py"), cwd=tmp_path)

        assert (done.returncode, done.stdout) == (0, "X\n"), done.stderr

    def test_without_triton_the_error_says_how_to_install_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pyfmha.aot.toolchain.util.find_spec", lambda name: None)

        with pytest.raises(ToolchainError, match=r"Triton is not installed.*pip install -e '.*\[aot\]'"), Compiler():
            pytest.fail("there is nothing to compile with")
        with pytest.raises(ToolchainError, match="Triton is not installed"):
            toolchain()

    def test_the_toolchain_names_triton_and_its_assemblers(self) -> None:
        versions = toolchain()

        assert re.fullmatch(r"\d+\.\d+\.\d+.*", versions.pop("triton"))
        assert "ptxas" in versions
        assert all("release" in text for text in versions.values())

    def test_asking_for_the_toolchain_does_not_import_triton(self) -> None:
        code = "import sys\nfrom pyfmha.aot.toolchain import toolchain\ntoolchain()\nprint('triton' in sys.modules)"

        assert run_python(code, check=True).stdout == "False\n"


def test_the_worker_speaks_one_line_for_one_line() -> None:
    """The protocol itself: requests that make no sense get an answer too."""
    code = "from pyfmha.aot.worker import main; main()"
    lines = '{"task": "describe"}\nnot json\n{"task": "describe", "source": "/absent.py", "kernel": "f"}\n'

    done = run_python(code, check=True, input=lines)

    answers = done.stdout.splitlines()
    assert len(answers) == 3
    assert all('"error"' in answer for answer in answers)


def test_an_assembler_that_does_not_run_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("not executable")

    monkeypatch.setattr(subprocess, "run", refuse)

    with pytest.raises(ToolchainError, match=r"assembler .*ptxas.* does not run: not executable"):
        toolchain()
