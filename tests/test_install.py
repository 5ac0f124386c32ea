"""The wheels, installed into an environment without Triton, jinja2 and a C compiler, and used there."""

import importlib.metadata
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_cuda import FakeCuda
from helpers import TESTS
from shared import Shared
from trt_double.full.fixtures import PATH

from pyfmha import __version__
from pyfmha.spec.advice import build_command, install_command
from pyfmha.spec.manifest import read_manifest

pytest_plugins = ["trt_double.fixtures"]

ROOT = TESTS.parent
SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"


def build_wheel(folder: Path, library: Path | None) -> Path:
    environment = {name: value for name, value in os.environ.items() if name != "PYFMHA_WHEEL_LIBRARY"}
    if library is not None:
        environment["PYFMHA_WHEEL_LIBRARY"] = str(library)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(attention_library_path: Path, shared: Shared) -> Path:
    """With a small library inside."""
    return shared.once("wheel", lambda folder: build_wheel(folder / "dist", attention_library_path))


@pytest.fixture(scope="module")
def pure_wheel(shared: Shared) -> Path:
    return shared.once("pure_wheel", lambda folder: build_wheel(folder / "dist", None))


def needed(package: str, seen: set[str]) -> Iterator[importlib.metadata.Distribution]:
    """An installed package and all that it needs, as the metadata have it, without extras."""
    if package in seen:
        return
    seen.add(package)
    try:
        found = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:  # for other Pythons or systems
        return
    yield found
    for line in found.requires or ():
        name, _, condition = line.partition(";")
        if "extra ==" not in condition:
            yield from needed(re.match(r"[\w.-]+", name)[0], seen)


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and an empty folder to start programs in."""

    root: Path
    folder: Path

    def run(self, *command: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """A program of its, with nothing else on the PATH: there is no C compiler."""
        environment = {"PATH": str(self.root / "bin"), "HOME": str(self.folder), "COLUMNS": "200", **settings}
        program = [str(self.root / "bin" / command[0]), *command[1:]]
        return subprocess.run(program, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)

    def python(self, code: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return self.run("python", "-c", code, **settings)


Install = Callable[[Path], Environment]


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> Install:
    """Installs a wheel into a new environment, in which the packages that it asks for are those of this one."""

    def installed(wheel: Path) -> Environment:
        root = tmp_path_factory.mktemp("venv")
        venv.create(root, with_pip=False, symlinks=True)
        pip = [sys.executable, "-m", "pip", "--python", str(root / "bin/python")]
        command = [*pip, "install", "--quiet", "--no-deps", "--no-index", "--no-cache-dir", str(wheel)]
        subprocess.run(command, capture_output=True, check=True)
        borrowed = root / "borrowed"
        borrowed.mkdir()
        (metadata,) = (root / SITE).glob("pyfmha-*.dist-info")
        seen = {"pyfmha"}
        for line in importlib.metadata.Distribution.at(metadata).requires or ():
            if "extra ==" in line:
                continue
            for found in needed(re.match(r"[\w.-]+", line)[0], seen):
                for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
                    if not (borrowed / top).is_symlink():
                        (borrowed / top).symlink_to(Path(str(found.locate_file(top))))
        assert not {"triton", "jinja2", "torch"} & seen
        (root / SITE / "borrowed.pth").write_text(f"{borrowed}\n")
        return Environment(root, tmp_path_factory.mktemp("empty"))

    return installed


@pytest.fixture(scope="module")
def installed(install: Install, wheel: Path) -> Environment:
    return install(wheel)


def test_the_wheel_says_where_it_runs(wheel: Path, attention_library_path: Path) -> None:
    needs = subprocess.run(["readelf", "-V", attention_library_path], capture_output=True, text=True, check=True).stdout
    newest = max((int(major), int(minor)) for major, minor in re.findall(r"Name: GLIBC_(\d+)\.(\d+)", needs))
    major, minor = max(newest, (2, 17))

    tag = f"py3-none-manylinux_{major}_{minor}_{os.uname().machine}"
    assert wheel.name == f"pyfmha-{__version__}-{tag}.whl"
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"pyfmha-{__version__}.dist-info/WHEEL").decode()
        assert archive.read("pyfmha/prebuilt/libpyfmha.so") == attention_library_path.read_bytes()
        assert "pyfmha/prebuilt/manifest.json" in archive.namelist()
        assert "pyfmha/prebuilt/c/libpyfmha.h" in archive.namelist()
        assert "pyfmha/kernels/fmha_fwd.py" in archive.namelist()
    assert f"Tag: {tag}\n" in metadata
    assert "Root-Is-Purelib: false\n" in metadata


def test_a_wheel_without_a_library_is_pure(pure_wheel: Path, install: Install) -> None:
    assert pure_wheel.name == f"pyfmha-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(pure_wheel) as archive:
        assert not [name for name in archive.namelist() if "prebuilt" in name]
    done = install(pure_wheel).run("pyfmha", "inspect")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.match(r"error: no library at \S*/aot_out/libpyfmha.so; build it \(pyfmha build\)", done.stderr)


def test_the_readme_installs_the_wheel_that_has_a_library(wheel: Path, pure_wheel: Path) -> None:
    """Both may be in dist: pip refuses two."""
    (pattern,) = set(re.findall(r"dist/(pyfmha-\S+?\.whl)", (ROOT / "README.md").read_text()))
    assert [one for one in (wheel, pure_wheel) if one.match(pattern)] == [wheel]


def test_a_library_that_is_not_there_makes_no_wheel(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        build_wheel(tmp_path / "dist", tmp_path / "libpyfmha.so")
    assert b"libpyfmha.so is not there: use make wheel" in error.value.stderr
    assert not list(tmp_path.rglob("*.whl"))


def test_commands_that_run_and_show_need_no_triton(installed: Environment, attention_library_path: Path) -> None:
    version, helped, inspected = (installed.run("pyfmha", command) for command in ("--version", "--help", "inspect"))

    assert (version.returncode, version.stdout) == (0, f"pyfmha {__version__}\n"), version.stderr
    assert helped.returncode == 0, helped.stderr
    assert inspected.returncode == 0, inspected.stderr
    manifest = read_manifest(attention_library_path.with_name("manifest.json"))
    assert all(variant.name in inspected.stdout for _, _, variant in manifest.variants())
    assert installed.run("pyfmha", "inspect", "--json").stdout
    checked = installed.run("pyfmha", "plugin-check")
    assert (checked.returncode, checked.stdout) == (2, "")
    assert f"{SITE}/pyfmha/prebuilt/libpyfmha.so has no plugins: " in checked.stderr  # as this small library is made
    for command in ("verify", "bench"):
        done = installed.run("pyfmha", command, PYFMHA_LIBCUDA="none")
        assert done.returncode == 2, done.stdout
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr
        assert "triton" not in done.stderr.lower()


@pytest.mark.parametrize(
    "arguments",
    [
        ("build", "--arch", "sm_90"),
        ("demo",),
        ("compile", "kernel.py", "-n", "k", "-s", "i32", "-g", "1", "-t", "sm_90"),
    ],
)
def test_commands_that_compile_say_what_is_missing(arguments: tuple[str, ...], installed: Environment) -> None:
    done = installed.run("pyfmha", *arguments)

    assert (done.returncode, done.stdout) == (2, "")
    pattern = r"error: Triton is not installed; compiling needs it: pip install 'jinja2\S+' 'triton\S+'\n"
    assert re.fullmatch(pattern, done.stderr), done.stderr
    assert not list(installed.folder.iterdir())


def test_rooms_say_what_they_need(installed: Environment) -> None:
    code = """
import importlib, pyfmha
for name in ("onnx", "torch"):
    for load in (lambda: importlib.import_module(f"pyfmha.{name}"), lambda: getattr(pyfmha, name)):
        try:
            load()
        except ModuleNotFoundError as error:
            print(error)
"""
    said = installed.python(code).stdout.splitlines()
    assert said[:2] == [said[0]] * 2
    assert re.fullmatch(r"pyfmha\.onnx needs onnx\w*: pip install 'onnx\S+' .*'onnxscript\S+'", said[0])
    assert said[2:] == ["pyfmha.torch needs PyTorch: pip install torch"] * 2


def test_messages_name_nothing_that_a_wheel_has_not(installed: Environment) -> None:
    functions = installed.run("pyfmha", "verify", "--functions", "alibi", PYFMHA_LIBCUDA="none").stderr
    assert re.search(r"alibi.py needs Triton, which is missing: pip install 'jinja2\S+' 'triton\S+'\n\Z", functions)
    code = "import pyfmha; pyfmha.read_engine('.')"
    assert "build it: pyfmha.build_engine, then pyfmha.save_engine" in installed.python(code).stderr


def test_linking_says_what_is_missing(installed: Environment, small_library_headers: list[Path]) -> None:
    done = installed.run("pyfmha", "link", *map(str, small_library_headers), "-o", "all")

    assert (done.returncode, done.stdout) == (2, "")
    assert re.match(r"error: jinja2 is not installed; writing C needs it: pip install ", done.stderr)
    assert not list(installed.folder.iterdir())


ENGINE = """
import sys, numpy as np, pyfmha
from pyfmha.attention.reference import attention_float64, relative_error
config = pyfmha.EngineConfig(2, 32, 2, 40, "fp16", causal=True)
pyfmha.save_engine(pyfmha.build_engine(config), config, "engine")
q, k, v = np.random.default_rng(0).standard_normal((3, 2, 2, 17, 32)).astype(np.float16)
with pyfmha.Session("engine/fmha.engine") as session:
    out = session.run({"Q": q, "K": k, "V": v})["Out"]
exact = attention_float64(q, k, v, sm_scale=32**-0.5, causal=True).out
print(pyfmha.Library().path, relative_error(out, exact) < 5e-4)
assert not {"triton", "jinja2", "typer", "rich"} & set(sys.modules)
"""


@pytest.mark.long
def test_attention_in_an_engine_with_the_wheels_library(installed: Environment, fake_driver: FakeCuda) -> None:
    doubles = {"PYTHONPATH": f"{PATH}:{TESTS}", "PYFMHA_LIBCUDA": str(fake_driver.path)}
    library = installed.root / SITE / "pyfmha/prebuilt/libpyfmha.so"

    done = installed.python(ENGINE, **doubles)
    verified = installed.run("pyfmha", "verify", "--only", "engine", "--head-size", "32", "--dtype", "fp16", **doubles)

    assert (done.returncode, done.stdout) == (0, f"{library} True\n"), done.stderr
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_the_wheels_library_comes_last(installed: Environment, attention_library_path: Path, tmp_path: Path) -> None:
    code = "import pyfmha, sys; print(pyfmha.Library(*sys.argv[1:]).path)"
    folder = Environment(installed.root, tmp_path)
    (tmp_path / "aot_out").mkdir()
    built, named, given = (tmp_path / "aot_out/libpyfmha.so", tmp_path / "named.so", tmp_path / "given.so")

    for path in (built, named, given):
        path.write_bytes(attention_library_path.read_bytes())
    assert folder.python(code).stdout == f"{built}\n"
    assert folder.python(code, PYFMHA_LIBRARY=str(named)).stdout == f"{named}\n"
    assert folder.run("python", "-c", code, str(given), PYFMHA_LIBRARY=str(named)).stdout == f"{given}\n"


def test_a_build_does_not_go_into_the_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tmp_path / "site-packages/pyfmha/prebuilt/libpyfmha.so"
    assert build_command(own) == f"pyfmha build -o {own.parent}"
    monkeypatch.setattr("pyfmha.spec.advice.PREBUILT", own)
    assert build_command(own, "--arch", "sm_90") == "pyfmha build --arch sm_90"


def test_in_a_clone_the_extra_itself_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert install_command("aot") == "pip install -e '.[aot]'"
    monkeypatch.chdir(tmp_path)
    assert install_command("aot") == f"pip install -e '{ROOT}[aot]'"
