"""A build keeps what the library in its folder holds, and adds to it; a fresh start says what it drops."""

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fake_cuda import FakeCuda
from helpers import HANGS, LONG, SUCCESS, CLibrary, copy_kernel, published
from shared import Shared

from pyfmha.aot import BuildResult, build
from pyfmha.aot.held import read_held
from pyfmha.aot.plan import plan
from pyfmha.attention.families import library_specs
from pyfmha.errors import CompileError, KernelSourceError, ManifestError, PyfmhaError, SpecError
from pyfmha.spec.arch import parse_archs
from pyfmha.spec.kernel import Argument, KernelSpec
from pyfmha.spec.record import spec_from_data, spec_to_data

SM_80, SM_90 = parse_archs(["sm_80", "sm_90"])


class Project:
    """A kernel file with two kernels, and a folder to build in.

    Args:
        folder: where to.
        shared: whose machine code to use; None, where a test counts what is compiled, or needs it to take its time.
    """

    def __init__(self, folder: Path, shared: Shared | None = None) -> None:
        self.file = copy_kernel("elementwise.py", folder / "kernels")
        self.output = folder / "out"
        if shared:
            shared.lend(self.output)
        self.add, self.subtract = self.spec("add"), self.spec("subtract")

    def spec(self, kernel: str, block: int = 128, hint: int | None = None, **changes: object) -> KernelSpec:
        arguments = (*(Argument(name, "*fp32", hint) for name in "XYZ"), Argument("n", "i32"))
        made = KernelSpec(self.file, kernel, kernel, arguments, (("BLOCK", block),), "cdiv(n, BLOCK)")
        return replace(made, **changes)  # type: ignore[arg-type]

    def build(self, *specs: KernelSpec, arch: str = "sm_90", fresh: bool = False) -> BuildResult:
        return build(specs, parse_archs(arch.split()), self.output, jobs=1, fresh=fresh)


def held(result: BuildResult) -> dict[str, tuple[str, ...]]:
    """Of each function of a library, the architectures of its code."""
    return {f.name: tuple(i.arch for i in v.images) for f, _, v in result.manifest.variants()}


def codes(result: BuildResult) -> dict[str, str]:
    return {v.name: v.images[0].sha256 for _, _, v in result.manifest.variants()}


@pytest.fixture
def project(tmp_path: Path, shared: Shared) -> Project:
    return Project(tmp_path, shared)


class TestAdding:
    def test_functions_and_architectures_add_up(self, tmp_path: Path, fake_cuda: FakeCuda) -> None:
        project = Project(tmp_path)
        project.build(project.add, arch="sm_80")
        second = project.build(project.subtract)
        assert held(second) == {"add": ("sm_80",), "subtract": ("sm_90",)}
        assert second.manifest.archs_in_words() == "in part sm_80, sm_90"
        assert (second.kept, second.pieces, second.compiled) == (("add",), 2, 1)

        third = project.build(project.add)

        assert held(third) == {"add": ("sm_80", "sm_90"), "subtract": ("sm_90",)}
        assert third.manifest.archs_in_words() == "sm_90; in part sm_80"
        assert project.build(project.subtract).up_to_date
        library = CLibrary(third.library)
        fake_cuda.use_context()
        for name in ("add", "subtract"):
            assert library.load(name) == SUCCESS
            assert library.launch(name, 64, 64, 64, 100) == SUCCESS

    @LONG
    def test_the_order_of_builds_does_not_matter(self, tmp_path: Path, shared: Shared) -> None:
        """In bytes: one after the other, the other way round, and all at once."""
        orders: list[list[Callable[[Project], BuildResult]]] = [
            [lambda p: p.build(p.subtract), lambda p: p.build(p.add)],
            [lambda p: p.build(p.add), lambda p: p.build(p.subtract)],
            [lambda p: p.build(p.subtract, p.add)],
        ]
        results = []
        for number, steps in enumerate(orders):
            project = Project(tmp_path / str(number), shared)
            for step in steps:
                step(project)
            results.append(published(project.output))

        assert all(result == results[0] for result in results[1:])

    @LONG
    def test_variants_of_one_function_add_up_in_either_order(self, tmp_path: Path, shared: Shared) -> None:
        libraries = []
        for number in range(2):
            project = Project(tmp_path / str(number), shared)
            hinted = project.spec("add", hint=16)
            specs = [hinted, hinted.generic()]
            for spec in specs if number else reversed(specs):
                result = project.build(spec)
            (function,) = result.manifest.functions
            assert [bool(v.hints) for v in function.algorithms[0]] == [True, False]
            libraries.append(published(project.output))

        assert libraries[0] == libraries[1]

    def test_two_builds_of_different_things_at_once_both_stay(self, tmp_path: Path) -> None:
        project = Project(tmp_path)
        specs = [project.add, project.subtract]
        threads = [threading.Thread(target=project.build, args=(spec,)) for spec in specs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=HANGS)

        assert project.build(project.add).up_to_date
        assert set(held(project.build(project.add))) == {"add", "subtract"}

    def test_attention_of_one_family_after_another(self, tmp_path: Path) -> None:
        """The plan alone: the fast variants go before those that were there, as in one build of both."""
        from pyfmha.aot.held import Held, HeldVariant

        def pieces(kernels: list[str], before: tuple[HeldVariant, ...] = ()) -> list[str]:
            specs = library_specs(kernels, ["fp16"], [64])
            made = plan(Held(before), specs, [SM_90], tmp_path, fresh=False)
            assert not made.replaced
            return [spec.variant for spec, _ in made.pieces]

        forward = tuple(HeldVariant(spec, ("sm_90",)) for spec in library_specs(["forward"], ["fp16"], [64]))
        hopper = tuple(HeldVariant(spec, ("sm_90",)) for spec in library_specs(["hopper"], ["fp16"], [64]))
        assert pieces(["hopper"], forward) == pieces(["forward"], hopper) == pieces(["forward", "hopper"])


class TestReplacing:
    def test_other_settings_take_the_place_of_those_before_on_every_architecture(self, project: Project) -> None:
        project.build(project.add, project.subtract, arch="sm_80")

        result = project.build(project.spec("add", block=256))

        assert held(result) == {"add": ("sm_80", "sm_90"), "subtract": ("sm_80",)}
        assert result.replaced == (project.add.variant,)
        assert [f.name for f in result.manifest.functions if len(f.algorithms) > 1] == []
        assert not list(project.output.glob(f"c/{project.add.variant}.*"))

    def test_what_is_kept_is_compiled_again_from_a_changed_source(self, tmp_path: Path) -> None:
        project = Project(tmp_path)
        before = codes(project.build(project.add))
        text = project.file.read_text()
        project.file.write_text(text.replace("tl.load(X + i, mask=mask) + tl", "2 * tl.load(X + i, mask=mask) + tl"))

        result = project.build(project.subtract)

        assert (result.compiled, result.kept) == (2, ("add",))
        assert codes(result)[project.add.variant] != before[project.add.variant]

    @pytest.mark.parametrize("lose", ["source", "kernel"])
    def test_what_cannot_be_built_again_is_an_error_and_stays(self, project: Project, lose: str) -> None:
        project.build(project.add)
        other = Project(project.output.parent / "other")
        other.output = project.output
        if lose == "source":
            project.file.rename(project.file.with_name("moved.py"))
            other.subtract = replace(other.subtract, source=other.file.rename(other.file.with_name("other.py")))
        else:
            text = project.file.read_text()
            project.file.write_text(text.replace("def add(X, Y, Z, n,", "def add(X, Y, Z, count,"))
        before = published(project.output)

        with pytest.raises(PyfmhaError) as caught:
            other.build(other.subtract)

        assert isinstance(caught.value, KernelSourceError if lose == "source" else (SpecError, CompileError))
        assert f"{project.output} holds" in str(caught.value)
        assert f"pyfmha build --fresh -o {project.output}" in str(caught.value)
        assert "add" in str(caught.value)
        assert published(project.output) == before
        assert other.build(other.subtract, fresh=True).dropped == ("add",)

    def test_a_moved_project_finds_its_kernels(self, project: Project, tmp_path: Path) -> None:
        project.build(project.add)
        moved = Project(tmp_path / "moved")
        shutil.copytree(project.output, moved.output, symlinks=True)
        project.file.unlink()

        result = moved.build(moved.subtract)

        assert set(held(result)) == {"add", "subtract"}


class TestFresh:
    def test_it_says_what_it_drops(self, project: Project) -> None:
        project.build(project.add, project.subtract, arch="sm_80 sm_90")

        result = project.build(project.add, fresh=True)

        assert result.dropped == ("add for sm_80", "subtract")
        assert held(result) == {"add": ("sm_90",)}
        assert result.kept == ()

    def test_it_gives_the_bytes_of_a_new_folder(self, project: Project, shared: Shared, tmp_path: Path) -> None:
        project.build(project.subtract)
        project.build(project.add, fresh=True)
        other = Project(tmp_path / "new", shared)
        other.build(other.add)

        assert published(project.output) == published(other.output)


class TestRecord:
    @pytest.mark.parametrize("record", ["gone", "damaged", "edited"])
    def test_without_its_record_a_folder_is_read_from_its_sources(self, project: Project, record: str) -> None:
        project.build(project.add, arch="sm_80")
        file = project.output / "build.json"
        if record == "gone":
            file.unlink()
        else:
            file.write_text("{" if record == "damaged" else file.read_text().replace("sm_80", "sm_90"))

        assert held(project.build(project.subtract)) == {"add": ("sm_80",), "subtract": ("sm_90",)}

    def test_the_folder_of_an_earlier_version_is_kept_too(self, project: Project) -> None:
        """Schema 4 had no list of variants in build.json, and fewer settings in a spec."""
        project.build(project.add)
        (project.output / "build.json").write_text(json.dumps({"stamp": "0", "library": "1"}))
        (description,) = project.output.glob("c/add_*.json")
        record = json.loads(description.read_text())
        record["schema"] = 4
        del record["cubins"], record["spec"]["debug"], record["spec"]["enable_fp_fusion"], record["spec"]["nullable"]
        description.write_text(json.dumps(record))
        manifest = project.output / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"schema": 5', '"schema": 4'))

        assert set(held(project.build(project.subtract))) == {"add", "subtract"}

    @pytest.mark.parametrize("left", ["manifest.json", "libpyfmha.so", "c"])
    def test_what_nobody_knows_the_making_of_is_not_overwritten(self, project: Project, left: str) -> None:
        project.build(project.add)
        for file in project.output.iterdir():
            if file.name not in (left, "cache"):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        for description in project.output.glob("c/*.json"):
            description.write_text("{")
        before = published(project.output)

        with pytest.raises(ManifestError, match=r"is not known any more.*pyfmha build --fresh -o") as caught:
            project.build(project.subtract)

        assert {"manifest.json": "holds add,", "libpyfmha.so": "libpyfmha.so", "c": project.add.variant}[left] in str(
            caught.value
        )
        assert published(project.output) == before
        assert set(held(project.build(project.subtract, fresh=True))) == {"subtract"}

    def test_files_of_the_users_own_stay(self, project: Project) -> None:
        own = {project.output / "c" / name: text for name, text in (("own.c", "int x;"), ("own.json", "{}"))}
        own[project.output / "c" / "own.h"] = "/* mine */"
        (project.output / "c").mkdir(parents=True)
        for file, text in own.items():
            file.write_text(text)

        project.build(project.add)
        project.build(project.subtract, fresh=True)

        assert {file: file.read_text() for file in own} == own

    @pytest.mark.parametrize("kernels", ["basic", "forward", "decode", "hopper"])
    def test_every_spec_is_read_back_as_it_was(self, kernels: str) -> None:
        for spec in library_specs([kernels]):
            again = spec_from_data(json.loads(json.dumps(spec_to_data(spec))))
            assert replace(again, source=spec.source) == spec

    def test_nothing_is_held_by_no_folder(self, tmp_path: Path) -> None:
        assert read_held(tmp_path / "none").variants == ()
