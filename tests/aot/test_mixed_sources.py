"""Code of one function must come from one source, whatever was edited, moved or imported in between."""

from dataclasses import replace
from pathlib import Path

import pytest

from pyfmha.aot import Compiler, build, compile_kernel, link, make_spec
from pyfmha.errors import SpecError
from pyfmha.spec.arch import ARCHS
from pyfmha.spec.kernel import KernelSpec

SM_90 = [ARCHS["sm_90"]]
KERNEL = """
import triton
import triton.language as tl

@triton.jit
def add(X, Y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, mask=i < n) + 1.0, mask=i < n)
"""


def make(compiler: Compiler, path: Path, signature: str = "*fp32:16, *fp32:16, i32, 128") -> KernelSpec:
    return make_spec(compiler, path, "add", signature, "cdiv(n, BLOCK)")


def write(path: Path, text: str = KERNEL) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_an_edited_kernel_is_not_linked_with_what_was_compiled_before(tmp_path: Path) -> None:
    path = write(tmp_path / "k.py")
    with Compiler(1) as compiler:
        before = compile_kernel(compiler, make(compiler, path), SM_90, tmp_path / "o/add", generic=False)
        write(path, KERNEL.replace("+ 1.0", "* 3.0"))
        after = compile_kernel(
            compiler, make(compiler, path, "*fp32:16, *fp32, i32, 128"), SM_90, tmp_path / "o/add", generic=False
        )

    with pytest.raises(SpecError, match=r"were compiled from different versions of k\.py"):
        link([*before, *after], tmp_path / "lib")

    assert not (tmp_path / "lib.so").exists()


def test_two_files_with_a_kernel_of_one_name_do_not_share_a_function(tmp_path: Path) -> None:
    with Compiler(1) as compiler:
        one = make(compiler, write(tmp_path / "m1/add.py"))
        other = make(compiler, write(tmp_path / "m2/add.py", KERNEL.replace("1.0", "2.0")))

    with pytest.raises(SpecError, match="both give add_128"):
        build([one, other], SM_90, tmp_path / "out")
    with pytest.raises(SpecError, match=r"different versions of add\.py"):
        build([one, other.generic()], SM_90, tmp_path / "out")


def test_the_same_spec_twice_counts_once(tmp_path: Path) -> None:
    with Compiler(1) as compiler:
        spec = make(compiler, write(tmp_path / "add.py"))

    built = build([spec, replace(spec)], SM_90, tmp_path / "out")

    assert built.compiled == 1


def test_a_helper_elsewhere_is_a_dependency_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = write(tmp_path / "lib/myhelper.py", "VALUE = 1.0\n")
    text = KERNEL.replace("import triton\n", "import triton\nfrom myhelper import VALUE\n", 1)
    path = write(
        tmp_path / "k/k.py",
        text.replace("+ 1.0", "+ V").replace("tl.constexpr)", "tl.constexpr, V: tl.constexpr = VALUE)"),
    )
    monkeypatch.setenv("PYTHONPATH", str(helper.parent))
    with Compiler(1) as compiler:
        cubin = compiler.compile(make(compiler, path), SM_90[0])
        assert set(cubin.dependencies) == {"../lib/myhelper.py"}
        spec = make(compiler, path)
    assert build([spec], SM_90, tmp_path / "out").compiled == 1
    write(helper, "VALUE = 2.0\n# longer\n")

    again = build([spec], SM_90, tmp_path / "out")

    assert (again.compiled, again.up_to_date) == (1, False)
