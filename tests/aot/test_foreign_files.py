"""Kernel files wherever they lie, whatever they are called, and whatever they ask for when they are imported."""

import shutil
from pathlib import Path

import pytest
from helpers import KERNELS, some_of

from pyfmha.aot import Compiler, compile_kernel, link, make_spec, make_specs
from pyfmha.errors import KernelSourceError, SpecError
from pyfmha.spec.arch import ARCHS

pytest.importorskip("triton")

SM_80, SM_90 = ARCHS["sm_80"], ARCHS["sm_90"]
FILL = """
import triton
import triton.language as tl


@triton.jit
def fill(X, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(X + i, {value}, mask=i < n)
"""


def filling(folder: Path, name: str, before: str = "", value: str = "1.0") -> Path:
    """A kernel file of that name, with lines of its own before the kernel."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(before + FILL.format(value=value))
    return file


def code(compiler: Compiler, file: Path) -> bytes:
    return compiler.compile(make_spec(compiler, file, "fill", "*fp32, i32, 128", "1"), SM_90).code


class TestPackages:
    def test_a_file_imports_from_its_packages(self, compiler: Compiler, tmp_path: Path) -> None:
        file = KERNELS / "packaged" / "ops" / "kernel.py"
        spec = make_spec(compiler, file, "scale", "*fp32:16, i32, 128", "cdiv(n, BLOCK)")
        cubin = compiler.compile(spec, SM_90)

        assert sorted(cubin.dependencies) == ["../__init__.py", "../scale.py", "__init__.py", "shift.py"]
        link(compile_kernel(compiler, spec, [SM_90], tmp_path / "scale"), tmp_path / "library", library=False)

    def test_a_package_that_can_be_imported_is_imported_as_python_does(
        self, compiler: Compiler, tmp_path: Path
    ) -> None:
        folder = tmp_path / "whole"
        file = filling(folder / "inner", "kernel.py", "from .. import VALUE\nfrom ..late import LATE\n", "VALUE + LATE")
        (folder / "__init__.py").write_text(
            "import triton.language as tl\nfrom . import inner\nVALUE = tl.constexpr(1.5)\n"
        )
        (folder / "inner" / "__init__.py").write_text("")
        (folder / "late.py").write_text("import triton.language as tl\nLATE = tl.constexpr(2.0)\n")

        assert code(compiler, file) == code(compiler, filling(tmp_path, "plain.py", value="1.5 + 2.0"))

    def test_an_edited_file_of_the_package_counts(self, tmp_path: Path) -> None:
        shutil.copytree(KERNELS / "packaged", tmp_path / "packaged")
        file = tmp_path / "packaged" / "ops" / "kernel.py"
        shift = file.with_name("shift.py")
        with Compiler(1) as compiler:
            spec = make_spec(compiler, file, "scale", "*fp32:16, i32, 128", "cdiv(n, BLOCK)")
            before = compiler.compile(spec, SM_90)
            shift.write_text(shift.read_text().replace("2.0", "7.0"))
            after = compiler.compile(spec, SM_90)

        assert after.code != before.code
        assert after.dependencies != before.dependencies

    def test_a_folder_without_an_init_is_a_package_to_relative_imports(
        self, compiler: Compiler, tmp_path: Path
    ) -> None:
        (tmp_path / "shared.py").write_text("import triton.language as tl\nVALUE = tl.constexpr(4.0)\n")
        file = filling(tmp_path / "kernels", "kernel.py", "from ..shared import VALUE\n", "VALUE")

        assert code(compiler, file) == code(compiler, filling(tmp_path, "plain.py", value="4.0"))

    def test_a_package_that_fails_in_the_kernels_own_file_is_told_so(self, compiler: Compiler, tmp_path: Path) -> None:
        file = filling(tmp_path / "broken", "kernel.py", "from .nothing import VALUE\n")
        (tmp_path / "broken" / "__init__.py").write_text("")

        with pytest.raises(KernelSourceError, match=r"No module named 'broken\.nothing' \(line 1\)"):
            compiler.describe(file, "fill")

    def test_a_failure_in_another_file_names_it(self, compiler: Compiler, tmp_path: Path) -> None:
        file = filling(tmp_path / "pack", "kernel.py", "from .helper import VALUE\n")
        (tmp_path / "pack" / "helper.py").write_text("\n1 / 0\n")

        with pytest.raises(KernelSourceError, match=r"kernel\.py cannot be imported: ZeroDivisionError: .*\(line 1\)"):
            compiler.describe(file, "fill")

    def test_a_package_that_fails_is_told_of_where_the_file_needs_it(self, compiler: Compiler, tmp_path: Path) -> None:
        file = filling(tmp_path / "pack", "kernel.py", "from . import VALUE\n")
        (tmp_path / "pack" / "__init__.py").write_text("import not_there\nVALUE = 1\n")

        with pytest.raises(KernelSourceError, match=r"cannot import name 'VALUE'.* its package fails: .*not_there"):
            compiler.describe(file, "fill")

    def test_a_package_that_fails_counts_as_far_as_it_came(self, compiler: Compiler, tmp_path: Path) -> None:
        file = filling(tmp_path / "half", "kernel.py", "from half import VALUE\n", "VALUE")
        init = "import triton.language as tl\nVALUE = tl.constexpr(2.5)\nimport not_there\n"
        (tmp_path / "half" / "__init__.py").write_text(init)

        assert code(compiler, file) == code(compiler, filling(tmp_path, "plain.py", value="2.5"))

    @pytest.mark.parametrize("name", ["triton", "numpy", "json"])
    def test_a_package_called_as_another_is_not_taken_for_it(
        self, compiler: Compiler, tmp_path: Path, name: str
    ) -> None:
        file = filling(tmp_path / name, "kernel.py", "import json\nfrom .helper import VALUE\njson.dumps(1)\n", "VALUE")
        (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / name / "helper.py").write_text("import triton.language as tl\nVALUE = tl.constexpr(5.0)\n")

        assert code(compiler, file) == code(compiler, filling(tmp_path, "plain.py", value="5.0"))


class TestNames:
    @pytest.mark.parametrize(
        "name", some_of(["triton.py", "inspect.py", "numpy.py", "torch.py", "ast.py", "jinja2.py"])
    )
    def test_a_file_may_be_called_as_a_module(self, tmp_path: Path, name: str) -> None:
        import_too = "import inspect, numpy\ninspect.signature(print), numpy.float32(1)\n"
        for before in ("", import_too):
            with Compiler(1) as compiler:
                expected = code(compiler, filling(tmp_path / "other", "kernel.py"))
                assert code(compiler, filling(tmp_path, name, before)) == expected
                assert code(compiler, filling(tmp_path, "kernel.py", before)) == expected  # beside it

    def test_a_helper_comes_before_an_installed_package_of_its_name(self, compiler: Compiler, tmp_path: Path) -> None:
        (tmp_path / "pytest.py").write_text("import triton.language as tl\nVALUE = tl.constexpr(6.0)\n")
        file = filling(tmp_path, "kernel.py", "from pytest import VALUE\n", "VALUE")

        assert code(compiler, file) == code(compiler, filling(tmp_path, "plain.py", value="6.0"))


class TestAskingForTheGpu:
    FILE = KERNELS / "asks_gpu.py"

    @pytest.mark.parametrize(("arch", "blocks"), [("sm_80", [128]), ("sm_90", [256, 512]), ("sm_120", [128, 256])])
    def test_the_target_answers(self, compiler: Compiler, arch: str, blocks: list[int]) -> None:
        specs = make_specs(
            compiler, self.FILE, "fill", "*fp32, i32", "cdiv(n, BLOCK)", configs=None, archs=[ARCHS[arch]]
        )

        assert [dict(spec.constants)["BLOCK"] for spec in specs] == blocks

    def test_architectures_that_differ_are_compiled_one_at_a_time(self, compiler: Compiler) -> None:
        with pytest.raises(SpecError, match="for sm_80 than for others of sm_80, sm_90; compile it for one at a time"):
            make_specs(compiler, self.FILE, "fill", "*fp32, i32", "1", configs=None, archs=[SM_80, SM_90])

    @pytest.mark.parametrize(
        ("asks", "said"),
        [
            (
                'active.utils.get_device_properties(0)["multiprocessor_count"]',
                "asks for the GPU's multiprocessor_count",
            ),
            ("active.get_active_torch_device()", "asks Triton's driver for get_active_torch_device"),
            ("active.utils.load_binary", "asks Triton's driver for utils.load_binary"),
        ],
    )
    def test_what_the_architecture_does_not_say_is_to_be_guarded(
        self, compiler: Compiler, tmp_path: Path, asks: str, said: str
    ) -> None:
        file = filling(tmp_path, "kernel.py", f"import triton\ntriton.runtime.driver.{asks}\n")

        with pytest.raises(KernelSourceError, match=rf"{said}.*\(line 2\).*guard it.*get_current_target\(\)"):
            compiler.describe(file, "fill")

    @pytest.fixture
    def torch(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A torch without a GPU."""
        cuda = tmp_path / "site" / "torch" / "cuda"
        cuda.mkdir(parents=True)
        (cuda.parent / "__init__.py").write_text("from . import cuda\n")
        fails = "def {}(device=None):\n    raise RuntimeError('Found no NVIDIA driver on your system')\n\n\n"
        names = ("get_device_capability", "get_device_name", "get_device_properties", "memory_allocated")
        (cuda / "__init__.py").write_text("".join(map(fails.format, names)))
        monkeypatch.setenv("PYTHONPATH", str(cuda.parents[1]))

    @pytest.mark.usefixtures("torch")
    @pytest.mark.parametrize("arch", ["sm_86", "sm_90", "sm_103"])
    def test_torch_answers_for_the_target(self, tmp_path: Path, arch: str) -> None:
        asks = (
            "import torch\nimport triton.language as tl\nmajor, minor = torch.cuda.get_device_capability()\n"
            "properties = torch.cuda.get_device_properties(0)\n"
            "assert (properties.major, properties.minor) == (major, minor)\n"
            "assert torch.cuda.get_device_name(0).startswith('NVIDIA')\nVALUE = tl.constexpr(10.0 * major + minor)\n"
        )
        capability = ARCHS[arch].capability
        with Compiler(1) as compiler:
            codes = [
                compiler.compile(make_spec(compiler, file, "fill", "*fp32, i32, 128", "1"), ARCHS[arch]).code
                for file in (
                    filling(tmp_path, "kernel.py", asks, "VALUE"),
                    filling(tmp_path, "plain.py", value=f"{capability}.0"),
                )
            ]

        assert codes[0] == codes[1]

    @pytest.mark.usefixtures("torch")
    @pytest.mark.parametrize("asks", ["memory_allocated()", "get_device_properties(0).multi_processor_count"])
    def test_what_else_torch_is_asked_for_is_to_be_guarded(self, tmp_path: Path, asks: str) -> None:
        file = filling(tmp_path, "kernel.py", f"import torch\ntorch.cuda.{asks}\n")

        with Compiler(1) as compiler, pytest.raises(KernelSourceError, match=r"\(line 2\); that asks for.*guard it"):
            compiler.describe(file, "fill")
