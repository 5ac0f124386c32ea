"""The cache of machine code: what it hands out is what would be compiled now, or nothing."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import copy_kernel

from pyfmha.aot import Compiler, make_spec
from pyfmha.aot.cache import Cache
from pyfmha.aot.cubin import Cubin
from pyfmha.errors import KernelSourceError, OutputError
from pyfmha.spec.arch import ARCHS
from pyfmha.spec.kernel import Argument, KernelSpec

SM_80, SM_90 = ARCHS["sm_80"], ARCHS["sm_90"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[KernelSpec, Cubin]:
    """A kernel that imports a file beside it."""
    folder = tmp_path_factory.mktemp("kernels")
    copy_kernel("scaling.py", folder)
    with Compiler(jobs=1) as compiler:
        spec = make_spec(
            compiler, copy_kernel("with_helper.py", folder), "scale", "*fp32:16, i32, 128", "cdiv(n, BLOCK)"
        )
        return spec, compiler.compile(spec, SM_80)


@pytest.fixture
def spec(compiled: tuple[KernelSpec, Cubin], tmp_path: Path) -> KernelSpec:
    """The same kernel in files of this test's own."""
    copy_kernel("scaling.py", tmp_path / "kernels")
    return replace(compiled[0], source=copy_kernel("with_helper.py", tmp_path / "kernels"))


@pytest.fixture
def cache(tmp_path: Path, spec: KernelSpec, compiled: tuple[KernelSpec, Cubin]) -> Cache:
    """A cache that holds the kernel for sm_80."""
    made = Cache.open(tmp_path / "cache", {"triton": "3.9.0"})
    made.put(spec, compiled[1])
    return made


def test_what_was_put_in_comes_out(cache: Cache, spec: KernelSpec, compiled: tuple[KernelSpec, Cubin]) -> None:
    assert cache.get(spec, SM_80) == compiled[1]


def test_an_empty_or_absent_folder_holds_nothing(spec: KernelSpec, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    assert Cache.open(tmp_path / "empty", {}).get(spec, SM_80) is None
    assert Cache.open(tmp_path / "absent", {}).get(spec, SM_80) is None


def test_another_architecture_is_another_entry(cache: Cache, spec: KernelSpec) -> None:
    assert cache.get(spec, SM_90) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: replace(spec, num_warps=8),
        lambda spec: replace(spec, num_stages=2),
        lambda spec: replace(spec, constants=(("BLOCK", 256),)),
        lambda spec: replace(spec, arguments=(Argument("X", "*fp32"), Argument("n", "i32"))),
        lambda spec: replace(spec, arguments=(Argument("X", "*fp16", 16), Argument("n", "i32"))),
    ],
)
def test_another_spec_is_another_entry(
    cache: Cache, spec: KernelSpec, change: Callable[[KernelSpec], KernelSpec]
) -> None:
    assert cache.get(change(spec), SM_80) is None


def test_a_changed_kernel_file_is_another_entry(cache: Cache, spec: KernelSpec) -> None:
    spec.source.write_text(spec.source.read_text() + "\n")

    assert cache.get(spec, SM_80) is None


def test_a_touched_kernel_file_is_the_same_entry(cache: Cache, spec: KernelSpec) -> None:
    spec.source.touch()

    assert cache.get(spec, SM_80) is not None


def test_the_kernel_files_place_does_not_matter(cache: Cache, spec: KernelSpec, tmp_path: Path) -> None:
    copy_kernel("scaling.py", tmp_path / "moved")
    moved = replace(spec, source=copy_kernel("with_helper.py", tmp_path / "moved"))

    assert cache.get(moved, SM_80) is not None


@pytest.mark.parametrize("change", [lambda file: file.write_text(file.read_text() + "\n"), lambda file: file.unlink()])
def test_a_changed_helper_makes_the_entry_stale(cache: Cache, spec: KernelSpec, change: Callable[[Path], None]) -> None:
    change(spec.source.with_name("scaling.py"))

    assert cache.get(spec, SM_80) is None


@pytest.mark.parametrize("toolchain", [{}, {"triton": "3.9.1"}, {"triton": "3.9.0", "ptxas": "13"}])
def test_another_toolchain_is_another_entry(cache: Cache, spec: KernelSpec, toolchain: dict[str, str]) -> None:
    assert Cache.open(cache.folder, toolchain).get(spec, SM_80) is None


def test_another_way_of_driving_triton_is_another_entry(cache: Cache, spec: KernelSpec) -> None:
    assert replace(cache, worker="another").get(spec, SM_80) is None


def test_another_schema_is_another_entry(cache: Cache, spec: KernelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyfmha.aot.cache.SCHEMA", 99)

    assert cache.get(spec, SM_80) is None


def test_a_missing_kernel_file_is_an_error(cache: Cache, spec: KernelSpec) -> None:
    spec.source.unlink()

    with pytest.raises(KernelSourceError, match="does not exist"):
        cache.get(spec, SM_80)


def swap_code(text: str) -> str:
    entry = json.loads(text)
    code = entry["cubin"]["code"]
    entry["cubin"]["code"] = code[:100] + ("A" if code[100] != "A" else "B") + code[101:]
    return json.dumps(entry)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"sha256"', '"sha"', 1),
        lambda text: "[]",
        lambda text: "null",
        lambda text: "\0" * len(text),
        lambda text: json.dumps({**json.loads(text), "cubin": {}}),
        swap_code,
    ],
)
def test_a_damaged_entry_is_as_good_as_none(cache: Cache, spec: KernelSpec, damage: Callable[[str], str]) -> None:
    (file,) = cache.folder.glob("*.json")
    file.write_text(damage(file.read_text()))

    assert cache.get(spec, SM_80) is None


def test_an_entry_that_is_not_text_is_as_good_as_none(cache: Cache, spec: KernelSpec) -> None:
    (file,) = cache.folder.glob("*.json")
    file.write_bytes(b"\xff\xfe\x00")

    assert cache.get(spec, SM_80) is None


def test_an_entry_under_anothers_name_is_as_good_as_none(cache: Cache, spec: KernelSpec) -> None:
    (file,) = cache.folder.glob("*.json")
    file.rename(cache.folder / f"{cache.key(spec, SM_90)}.json")

    assert cache.get(spec, SM_90) is None


def test_it_holds_whole_files_only(cache: Cache) -> None:
    assert [file.suffix for file in cache.folder.iterdir()] == [".json"]


def test_a_place_that_cannot_be_written_is_an_error(spec: KernelSpec, compiled: tuple[KernelSpec, Cubin]) -> None:
    with pytest.raises(OutputError, match="cannot write to /proc/pyfmha"):
        Cache.open(Path("/proc/pyfmha"), {}).put(spec, compiled[1])
