"""Whole builds: what they make, when they make it again, and what a failed or interrupted one leaves behind."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fake_cuda import FakeCuda
from helpers import HANGS, SUCCESS, CLibrary, copy_kernel, published, python_environment, run_python, snapshot, some_of

from pyfmha.aot import BuildResult, build
from pyfmha.errors import CompileError, KernelSourceError, OutputError, SpecError, ToolchainError
from pyfmha.spec.arch import parse_archs
from pyfmha.spec.kernel import Argument, KernelSpec
from pyfmha.spec.manifest import read_manifest

SM_80, SM_90 = parse_archs(["sm_80", "sm_90"])


def spec_of(file: Path, kernel: str = "add", name: str | None = None) -> KernelSpec:
    pointers = tuple(Argument(pointer, "*fp32", 16) for pointer in "XYZ")
    return KernelSpec(
        file, kernel, name or kernel, (*pointers, Argument("n", "i32", 16)), (("BLOCK", 1024),), "cdiv(n, BLOCK)"
    )


class Project:
    """Two kernel files with two variants each, and a folder to build in."""

    def __init__(self, folder: Path) -> None:
        self.first = copy_kernel("elementwise.py", folder / "kernels")
        self.second = self.first.with_name("second.py")
        self.second.write_text(self.first.read_text())
        self.output = folder / "out"
        specs = [spec_of(self.first, "add"), spec_of(self.second, "subtract")]
        self.specs = [variant for spec in specs for variant in (spec, spec.generic())]

    def build(self, **changes: object) -> BuildResult:
        settings = {"specs": self.specs, "archs": [SM_90], "folder": self.output, "jobs": 1} | changes
        return build(**settings)  # type: ignore[arg-type]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that has been built. Not to be changed: see `built`."""
    project = Project(tmp_path_factory.mktemp("finished"))
    project.build()
    return project


@pytest.fixture
def built(finished: Project, project: Project) -> Project:
    """A project of the test's own that has been built: the finished one's output, cache included, was copied."""
    project.output.mkdir()
    for name, content in snapshot(finished.output).items():
        (project.output / name).parent.mkdir(exist_ok=True)
        (project.output / name).write_bytes(content)
    return project


class TestOutput:
    def test_it_makes_a_library_its_manifest_and_its_c_sources(self, finished: Project) -> None:
        files = set(published(finished.output))

        assert {"libpyfmha.so", "manifest.json", "c/libpyfmha.c", "c/libpyfmha.h", "c/pyfmha_runtime.c"} <= files
        assert {f"c/{spec.variant}{ending}" for spec in finished.specs for ending in (".c", ".h", ".json")} <= files

    def test_the_library_works(self, built: Project, fake_cuda: FakeCuda) -> None:
        library = CLibrary(built.output / "libpyfmha.so")
        fake_cuda.use_context()

        for name in ("add", "subtract"):
            assert library.load(name) == SUCCESS
            assert library.launch(name, 16, 16, 16, 16) == SUCCESS

        assert library.manifest == read_manifest(built.output / "manifest.json")

    def test_two_folders_get_the_same_bytes(self, finished: Project, tmp_path: Path) -> None:
        other = Project(tmp_path / "elsewhere, with a longer path")
        other.build(jobs=2)

        assert published(other.output) == published(finished.output)

    def test_progress_counts_what_is_compiled(self, project: Project) -> None:
        seen: list[tuple[int, int, str]] = []

        result = project.build(specs=project.specs[:1], archs=[SM_80, SM_90], progress=lambda *step: seen.append(step))

        assert [(done, total) for done, total, _ in seen] == [(1, 2), (2, 2)]
        assert {name for *_, name in seen} == {f"{project.specs[0].variant} {arch}" for arch in ("sm_80", "sm_90")}
        assert (result.compiled, result.up_to_date) == (2, False)
        assert result.library.is_file()

    @pytest.mark.parametrize("nothing", [{"specs": []}, {"archs": []}])
    def test_nothing_to_build_is_refused(self, project: Project, nothing: dict[str, object]) -> None:
        with pytest.raises(SpecError, match="nothing to build"):
            project.build(**nothing)


class TestSecondBuild:
    @pytest.fixture(autouse=True)
    def _count_compiler_starts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from pyfmha.aot import build as module_name  # noqa: F401  (the function shadows the module)

        self.started = 0
        original = sys.modules["pyfmha.aot.build"].Compiler

        def start(*arguments: object) -> object:
            self.started += 1
            return original(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(sys.modules["pyfmha.aot.build"], "Compiler", start)

    def test_nothing_changed_nothing_done(self, built: Project) -> None:
        before = {file: file.stat().st_mtime_ns for file in built.output.rglob("*")}

        result = built.build()

        assert (result.up_to_date, result.compiled, self.started) == (True, 0, 0)
        assert {file: file.stat().st_mtime_ns for file in built.output.rglob("*")} == before
        assert result.manifest == read_manifest(built.output / "manifest.json")

    def test_a_changed_kernel_file_rebuilds_its_variants_only(self, built: Project) -> None:
        text = built.second.read_text()
        built.second.write_text(text.replace("tl.load(X + i, mask=mask) - tl", "2 * tl.load(X + i, mask=mask) - tl"))
        before = CLibrary(built.output / "libpyfmha.so").manifest

        result = built.build()

        assert (result.compiled, result.up_to_date) == (2, False)
        digests = [
            {
                function.name: [i.sha256 for a in function.algorithms for v in a for i in v.images]
                for function in m.functions
            }
            for m in (before, result.manifest)
        ]
        assert digests[0]["add"] == digests[1]["add"]
        assert not set(digests[0]["subtract"]) & set(digests[1]["subtract"])
        assert built.build().up_to_date

    def test_changing_a_kernel_back_gives_the_first_librarys_bytes_without_compiling(self, built: Project) -> None:
        before, text = published(built.output), built.second.read_text()
        built.second.write_text(text + "\n# a remark\n")
        assert built.build().compiled == 2

        built.second.write_text(text)

        assert (built.build().compiled, published(built.output)) == (0, before)

    def test_a_touched_file_rebuilds_nothing(self, built: Project) -> None:
        built.first.touch()

        assert built.build().up_to_date

    def test_a_changed_helper_rebuilds_every_kernel_that_imports_it(self, project: Project) -> None:
        helper = copy_kernel("scaling.py", project.first.parent)
        one = copy_kernel("with_helper.py", project.first.parent)
        two = one.with_name("with_helper_too.py")
        two.write_text(one.read_text())
        arguments = (Argument("X", "*fp32"), Argument("n", "i32"))
        specs = [KernelSpec(file, "scale", file.stem, arguments, (("BLOCK", 128),), "n") for file in (one, two)]
        specs.append(project.specs[0])
        first = project.build(specs=specs)
        assert project.build(specs=specs).up_to_date

        helper.write_text(helper.read_text().replace("3.0", "5.0"))
        second = project.build(specs=specs)

        assert (first.compiled, second.compiled) == (3, 2)
        images = [{f.name: v.images[0].sha256 for f, _, v in result.manifest.variants()} for result in (first, second)]
        assert {name for name, digest in images[0].items() if images[1][name] == digest} == {"add"}
        assert project.build(specs=specs).up_to_date

    def test_another_architecture_compiles_that_one_only(self, built: Project) -> None:
        result = built.build(archs=[SM_80, SM_90])

        assert result.compiled == len(built.specs)
        assert result.manifest.archs() == ("sm_80", "sm_90")

    def test_a_fresh_start_takes_the_sources_of_what_it_drops_away(self, built: Project) -> None:
        kept, dropped = built.specs[:2], built.specs[2:]

        result = built.build(specs=kept, fresh=True)

        assert (result.compiled, result.dropped) == (0, ("subtract",))
        files = published(built.output)
        assert all(f"c/{spec.variant}.c" in files for spec in kept)
        assert not [name for name in files for spec in dropped if spec.variant in name]

    @pytest.mark.parametrize(
        ("name", "damage"),
        some_of(
            ["libpyfmha.so", "manifest.json", "build.json", "c/libpyfmha.c", "c/pyfmha_runtime.h"],
            [Path.unlink, lambda file: file.write_text("{"), lambda file: file.write_bytes(b"\xff\0")],
        ),
    )
    def test_a_lost_or_damaged_result_is_made_again_without_compiling(
        self, built: Project, name: str, damage: Callable[[Path], object]
    ) -> None:
        before = published(built.output)
        damage(built.output / name)

        result = built.build()

        assert (result.compiled, result.up_to_date, self.started) == (0, False, 0)
        assert published(built.output) == before

    @pytest.mark.parametrize(
        "damage", [lambda text: "", lambda text: text[:-50], lambda text: text.replace("f0", "f1", 1)]
    )
    def test_a_damaged_cache_entry_is_compiled_again(self, built: Project, damage: Callable[[str], str]) -> None:
        before = published(built.output)
        entry = sorted((built.output / "cache").glob("*.json"))[0]
        entry.write_text(damage(entry.read_text()))

        result = built.build()

        assert result.compiled == 1
        assert published(built.output) == before
        assert built.build().up_to_date

    def test_another_c_compiler_links_again(self, built: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CC", "gcc -DANOTHER")

        result = built.build()

        assert (result.compiled, result.up_to_date) == (0, False)


class TestFailures:
    """Whatever fails, earlier output stays as it was."""

    def refuse(self, built: Project, error: type[Exception], match: str, **changes: object) -> None:
        before = published(built.output)
        with pytest.raises(error, match=match):
            built.build(**changes)
        assert published(built.output) == before
        assert not [name for name in snapshot(built.output) if ".pyfmha-staging-" in name]

    def test_a_kernel_file_that_raises(self, built: Project) -> None:
        built.second.write_text("raise RuntimeError('no luck')\n")
        self.refuse(built, KernelSourceError, r"second.py cannot be imported: RuntimeError: no luck \(line 1\)")

    def test_a_kernel_file_that_ends_the_process(self, built: Project) -> None:
        built.second.write_text("import os\nos._exit(9)\n")
        self.refuse(built, KernelSourceError, "second.py ended with exit code 9")

    def test_a_kernel_file_that_is_gone(self, built: Project) -> None:
        built.second.unlink()
        self.refuse(built, KernelSourceError, "second.py does not exist")

    def test_a_kernel_that_does_not_compile(self, built: Project) -> None:
        built.second.write_text(built.second.read_text().replace("tl.arange(0, BLOCK)", "tl.arange(0, BLOCK - 1)"))
        self.refuse(built, CompileError, f"{built.specs[2].variant} for sm_90")

    def test_no_compiler(self, built: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CC", "/nonexistent")
        self.refuse(built, ToolchainError, "no C compiler: CC is '/nonexistent'")

    def test_two_kernels_under_one_name(self, built: Project) -> None:
        specs = [built.specs[0], replace(built.specs[2], name="add")]
        self.refuse(built, SpecError, "two different kernels claim the function name 'add'", specs=specs)

    def test_what_had_been_compiled_is_kept_for_the_next_build(self, project: Project) -> None:
        text = project.second.read_text()
        project.second.write_text("raise RuntimeError('no luck')\n")
        with pytest.raises(KernelSourceError):
            project.build()

        project.second.write_text(text)

        assert project.build().compiled == 2  # those of the second file

    @pytest.mark.parametrize("place", ["/proc/pyfmha", "{file}", "{file}/below"])
    def test_a_place_that_cannot_be_written(self, project: Project, tmp_path: Path, place: str) -> None:
        file = tmp_path / "file"
        file.write_text("a file where a folder is needed")

        with pytest.raises(OutputError, match="cannot write to"):
            project.build(folder=Path(place.format(file=file)), specs=project.specs[:1])

        assert file.read_text() == "a file where a folder is needed"

    @pytest.mark.parametrize("limit", [1000, 8000, 20_000])
    def test_a_full_disk(self, built: Project, limit: int) -> None:
        """No file may grow past a limit: Triton's own, the cache's, or the library."""
        before = published(built.output)
        code = (
            "import resource\nfrom pyfmha.errors import PyfmhaError\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
            "try: project.build()\n"
            "except PyfmhaError as error: print(type(error).__name__, error)\n"
        )
        built.second.write_text(built.second.read_text() + "\n# a remark\n")

        done = run_python(IN_PROJECT + code, str(built.output.parent))

        assert (done.returncode, done.stderr) == (0, "")
        assert "too large" in done.stdout or "ToolchainError" in done.stdout
        assert published(built.output) == before


# The same project from another process, whose first argument is its folder.
IN_PROJECT = (
    f"TEST_FOLDER = {str(Path(__file__).parent)!r}\n"
    + """
import sys
from pathlib import Path
sys.path.insert(0, TEST_FOLDER)
import test_build
text = (Path(sys.argv[1]) / "kernels" / "second.py").read_text()
project = test_build.Project(Path(sys.argv[1]))
project.second.write_text(text)
"""
)

# Stops at a certain moment, after printing a line with the process ids of its children. Where there are any, it goes on
# once one of them has ended, because an interrupted build ends them and then waits for its threads.
STOP = """
import os, select, signal, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the tests with & has it ignored
def stop():
    tasks = Path("/proc/self/task").iterdir()
    children = [pid for task in tasks for pid in (task / "children").read_text().split()]
    print(*children, flush=True)
    if children:
        select.select([os.pidfd_open(int(pid)) for pid in children], [], [])
    else:
        threading.Event().wait()
"""
WHILE_COMPILING = "project.build(progress=lambda *step: stop())"
# Just before the last file of a set is moved into place.
WHILE_PUBLISHING = """
replace = os.replace
def stop_before(source, target):
    if str(target).endswith("manifest.json"):
        stop()
    replace(source, target)
os.replace = stop_before
project.build()
"""


MOMENTS = {"compiling": WHILE_COMPILING, "publishing": WHILE_PUBLISHING}


class TestInterruption:
    @pytest.mark.parametrize(
        ("kind", "moment"), some_of([signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ["compiling", "publishing"])
    )
    def test_nothing_half_written_stays_and_the_next_build_works(
        self, finished: Project, project: Project, kind: signal.Signals, moment: str
    ) -> None:
        whole = published(finished.output)
        process = subprocess.Popen(
            [sys.executable, "-c", IN_PROJECT + STOP + MOMENTS[moment], str(project.output.parent)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=python_environment(),
        )
        assert process.stdout is not None
        children = [os.pidfd_open(int(pid)) for pid in process.stdout.readline().split()]

        process.send_signal(kind)

        assert process.wait(timeout=HANGS) != 0
        process.stdout.close()
        assert published(project.output).items() <= whole.items()  # each file that is there is whole
        for child in children:  # the compiler processes end too
            assert select.select([child], [], [], HANGS)[0]
            os.close(child)
        project.build()
        assert published(project.output) == whole
        assert not [name for name in os.listdir(project.output) if name.startswith(".")]

    def test_an_interrupted_rebuild_is_noticed_and_finished(self, built: Project) -> None:
        built.second.write_text(built.second.read_text() + "\n# a remark that changes the stamp, not the code\n")
        process = subprocess.Popen(
            [sys.executable, "-c", IN_PROJECT + STOP + WHILE_PUBLISHING, str(built.output.parent)],
            stdout=subprocess.PIPE,
            text=True,
            env=python_environment(),
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        process.wait()
        process.stdout.close()

        result = built.build()

        assert (result.up_to_date, result.compiled) == (False, 0)
        assert built.build().up_to_date
        assert json.loads((built.output / "manifest.json").read_text())["build_id"] == result.manifest.build_id

    def test_two_builds_at_once_in_one_folder_both_succeed(self, finished: Project, project: Project) -> None:
        results: list[BuildResult] = []
        threads = [threading.Thread(target=lambda: results.append(project.build())) for _ in range(2)]

        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=HANGS)

        assert len(results) == 2
        assert published(project.output) == published(finished.output)
