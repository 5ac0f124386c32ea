"""Images of one variant from several runs of ``compile``: they belong together, or nothing is overwritten."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fake_cuda import FakeCuda
from helpers import SUCCESS, CLibrary, copy_kernel, gcc, published

from pyfmha.aot import Compiler, compile_kernel, link, make_spec
from pyfmha.aot.handover import read_handover
from pyfmha.errors import SpecError
from pyfmha.spec.arch import parse_archs
from pyfmha.spec.kernel import KernelSpec

SIGNATURE = "*fp32:16, *fp32:16, *fp32:16, i32:16, 1024"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return copy_kernel("elementwise.py", tmp_path / "kernels")


def compile_add(compiler: Compiler, file: Path, output: Path, *archs: str, **changes: object) -> Path:
    """Compile the hinted variant of a kernel; returns its header."""
    spec: KernelSpec = make_spec(compiler, file, "add", SIGNATURE, "cdiv(n, BLOCK)")
    spec = replace(spec, **changes)  # type: ignore[arg-type]
    (header,) = compile_kernel(compiler, spec, parse_archs(archs), output, generic=False)
    return header


def archs_of(header: Path) -> list[str]:
    return [cubin.arch for cubin in read_handover(header).cubins]


class TestOneOutput:
    def test_a_second_run_adds_its_architecture(self, compiler: Compiler, file: Path, tmp_path: Path) -> None:
        """To the bytes of one run for both."""
        for archs in (("sm_90",), ("sm_80",), ("sm_90",)):
            header = compile_add(compiler, file, tmp_path / "add", *archs)
        both = compile_add(compiler, file, tmp_path / "both" / "add", "sm_80", "sm_90")

        assert archs_of(header) == ["sm_80", "sm_90"]
        for ending in (".h", ".c", ".json"):
            assert header.with_suffix(ending).read_bytes() == both.with_suffix(ending).read_bytes()
        manifest = link([header], tmp_path / "lib", library=False)
        assert manifest.archs() == ("sm_80", "sm_90")

    @pytest.mark.parametrize("change", ["source", "spec", "files", "schema", "triton"])
    def test_what_does_not_go_together_is_refused(
        self, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
    ) -> None:
        changes: dict[str, object] = {}
        with Compiler(1) as compiler:
            header = compile_add(compiler, file, tmp_path / "out" / "add", "sm_80")
            description = header.with_suffix(".json")
            reason = "their specs differ"
            if change == "source":
                file.write_text(file.read_text() + "\n# a remark\n")
                reason = "compiled from different versions of elementwise.py"
            elif change == "spec":
                changes = {"nullable": ("X",)}
            elif change == "files":
                header.with_suffix(".c").write_text("int x;")
                reason = "is not the file that"
            elif change == "schema":
                description.write_text(description.read_text().replace('"schema": 5', '"schema": 4'))
                reason = "has schema version 4"
            else:
                record = json.loads(description.read_text())
                description.write_text(json.dumps({**record, "triton": "3.0"}))
                reason = "they were compiled by Triton 3.9.0 and 3.0"
            before = published(tmp_path / "out")

            with pytest.raises(SpecError, match=reason) as caught:
                compile_add(compiler, file, tmp_path / "out" / "add", "sm_90", **changes)

            assert "-t sm_80 -t sm_90" in str(caught.value)
            assert published(tmp_path / "out") == before
            compile_add(compiler, file, tmp_path / "out" / "add", "sm_80", "sm_90", **changes)
        assert archs_of(header) == ["sm_80", "sm_90"]

    def test_a_description_that_says_nothing_is_replaced(self, compiler: Compiler, file: Path, tmp_path: Path) -> None:
        header = compile_add(compiler, file, tmp_path / "add", "sm_80")
        header.with_suffix(".json").write_text("{")

        assert archs_of(compile_add(compiler, file, tmp_path / "add", "sm_90")) == ["sm_90"]


class TestLink:
    def test_runs_in_two_folders_are_put_together(
        self, compiler: Compiler, file: Path, tmp_path: Path, fake_cuda: FakeCuda
    ) -> None:
        headers = [compile_add(compiler, file, tmp_path / arch / "add", arch) for arch in ("sm_90", "sm_80")]

        manifest = link(headers, tmp_path / "out" / "lib")

        assert manifest.archs() == ("sm_80", "sm_90")
        library = CLibrary(tmp_path / "out" / "lib.so")
        for device, capability in ((0, 90), (1, 80)):
            fake_cuda.set_device(device, capability)
            fake_cuda.use_context(device)
            assert library.load("add") == SUCCESS
            assert library.launch("add", 16, 16, 16, 1024) == SUCCESS
        variant = manifest.functions[0].algorithms[0][0].name
        assert read_handover(tmp_path / "out" / f"lib.{variant}.h").variant == manifest.functions[0].algorithms[0][0]

    def test_its_c_sources_make_a_library_too(self, compiler: Compiler, file: Path, tmp_path: Path) -> None:
        headers = [compile_add(compiler, file, tmp_path / arch / "add", arch) for arch in ("sm_90", "sm_80")]
        link(headers, tmp_path / "out" / "lib", library=False)

        sources = sorted((tmp_path / "out").glob("*.c"))
        done = gcc("-std=c11", "-shared", "-fPIC", "-pthread", *sources, "-o", tmp_path / "own.so", "-ldl")

        assert (done.returncode, done.stderr) == (0, "")

    def test_linking_again_with_what_was_put_together_changes_nothing(
        self, compiler: Compiler, file: Path, tmp_path: Path
    ) -> None:
        headers = [compile_add(compiler, file, tmp_path / arch / "add", arch) for arch in ("sm_90", "sm_80")]
        link(headers, tmp_path / "out" / "lib")
        before = published(tmp_path / "out")

        link([*headers, *(tmp_path / "out").glob("lib.*.h")], tmp_path / "out" / "lib")

        assert published(tmp_path / "out") == before

    def test_code_from_different_sources_is_refused(self, file: Path, tmp_path: Path) -> None:
        with Compiler(1) as compiler:
            one = compile_add(compiler, file, tmp_path / "1" / "add", "sm_90")
            file.write_text(file.read_text() + "\n# a remark\n")
            other = compile_add(compiler, file, tmp_path / "2" / "add", "sm_80")

        with pytest.raises(SpecError, match="two builds of the same variant of add; name one: they were compiled from"):
            link([one, other], tmp_path / "out" / "lib")

        assert not (tmp_path / "out" / "lib.so").exists()

    def test_the_library_of_a_build_is_not_overwritten(self, compiler: Compiler, file: Path, tmp_path: Path) -> None:
        header = compile_add(compiler, file, tmp_path / "add", "sm_90")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "manifest.json").write_text("{}")

        with pytest.raises(SpecError, match=r"libpyfmha.so is the library of .*manifest.json; give another -o"):
            link([header], tmp_path / "out" / "libpyfmha")


class TestFolders:
    def test_compile_writes_into_a_folder(self, compiler: Compiler, file: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()

        header = compile_add(compiler, file, tmp_path / "out", "sm_90")

        assert header.parent == tmp_path / "out"
        assert header.name.startswith("add.add_1024")
        assert not list(tmp_path.glob("out.*"))

    def test_link_refuses_a_folder(self, compiler: Compiler, file: Path, tmp_path: Path) -> None:
        header = compile_add(compiler, file, tmp_path / "add", "sm_90")
        (tmp_path / "out").mkdir()

        with pytest.raises(SpecError, match=r"-o .*out is a folder; give the path of the results in it"):
            link([header], tmp_path / "out")

        assert not list(tmp_path.glob("out.*"))
        assert not list((tmp_path / "out").iterdir())
