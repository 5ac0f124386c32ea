"""The library from Python: pyfmha.runtime."""

import dataclasses
import functools
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda
from helpers import (
    INVALID_VALUE,
    LIBRARY_NOT_FOUND,
    MISALIGNED_ADDRESS,
    NO_BINARY_FOR_GPU,
    NOT_INITIALIZED,
    entered,
    gcc,
    manifest_source,
    run_python,
)

from pyfmha.errors import DriverError, LaunchError, LibraryError, ManifestError
from pyfmha.runtime import Function, Library, describe
from pyfmha.runtime.arguments import in_order
from pyfmha.spec.manifest import SCHEMA, read_manifest

X, Y, Z = 0x7000_0000, 0x7000_1000, 0x7000_2000


@pytest.fixture
def opened(small_library_path: Path, tmp_path: Path) -> Library:
    """A copy of the small library, so that nothing is loaded yet."""
    return Library(shutil.copy(small_library_path, tmp_path / "small.so"))


@pytest.fixture
def add(opened: Library, fake_cuda: FakeCuda) -> Function:
    """`add`, loaded on a fake device."""
    fake_cuda.use_context()
    opened["add"].load()
    return opened["add"]


def shared_object(folder: Path, source: str, name: str = "other.so") -> Path:
    file = folder / "other.c"
    file.write_text(source)
    done = gcc("-shared", "-fPIC", file, "-o", folder / name)
    assert done.returncode == 0, done.stderr
    return folder / name


class TestOpening:
    def test_it_is_a_mapping_of_functions(self, opened: Library) -> None:
        assert "add" in opened
        assert "ad" not in opened
        assert sorted(opened) == sorted(function.name for function in opened.manifest.functions)
        assert len(opened) == len(list(opened))
        assert opened["add"].name == "add"
        assert [function.name for function in opened.values()] == list(opened)
        assert opened.get("ad") is None
        assert opened != Library(opened.path)
        assert {opened: 1}[opened] == 1

    def test_it_shows_what_it_holds(self, opened: Library) -> None:
        assert "sm_80, sm_90" in repr(opened)
        assert repr(opened["add"]) == "<add(stream, *fp32 X, *fp32 Y, *fp32 Z, i32 n)>"

    def test_an_unknown_function_is_an_error_that_lists_those_there(self, opened: Library) -> None:
        with pytest.raises(LibraryError, match=r"small.so has no function 'ad'; it has: add, subtract"):
            opened["ad"]

    def test_a_missing_file_is_an_error_that_says_what_to_run(self, tmp_path: Path) -> None:
        with pytest.raises(LibraryError, match=r"no library at .*absent\.so; build it: pyfmha build"):
            Library(tmp_path / "absent.so")

    @pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF and then nothing"])
    def test_a_file_that_is_no_library_is_an_error(self, tmp_path: Path, content: bytes) -> None:
        file = tmp_path / "broken.so"
        file.write_bytes(content)

        with pytest.raises(LibraryError, match="cannot be loaded"):
            Library(file)

    def test_somebody_elses_library_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(LibraryError, match="was not built by pyfmha"):
            Library(shared_object(tmp_path, "int x;"))

    def test_a_library_of_another_schema_is_refused_with_both_versions(self, tmp_path: Path) -> None:
        file = shared_object(tmp_path, manifest_source(json.dumps({"schema": SCHEMA + 1})))

        with pytest.raises(ManifestError, match=f"schema version {SCHEMA + 1}, this pyfmha reads {SCHEMA}"):
            Library(file)

    def test_a_library_that_lacks_what_its_manifest_promises_is_an_error(
        self, small_library_path: Path, tmp_path: Path
    ) -> None:
        file = shared_object(tmp_path, manifest_source(small_library_path.with_suffix(".json").read_text()))

        with pytest.raises(LibraryError, match="has no symbol add_packed, which its manifest promises"):
            Library(file)

    @pytest.mark.parametrize("kept", [0.2, 0.5, 0.99])
    def test_a_library_cut_short_is_an_error_and_no_crash(
        self, small_library_path: Path, tmp_path: Path, kept: float
    ) -> None:
        whole = small_library_path.read_bytes()
        (tmp_path / "cut.so").write_bytes(whole[: int(len(whole) * kept)])
        code = (
            "import sys\nfrom pyfmha.errors import LibraryError\nfrom pyfmha.runtime.library import Library\n"
            "try:\n    Library(sys.argv[1])\nexcept LibraryError as error:\n    print(error)"
        )

        done = run_python(code, str(tmp_path / "cut.so"))

        assert done.returncode == 0, done.stderr
        assert "is cut short" in done.stdout

    def test_a_manifest_of_another_build_beside_it_is_an_error(self, opened: Library) -> None:
        other = json.loads(opened.manifest.to_json())
        opened.path.with_suffix(".json").write_text(json.dumps({**other, "build_id": "another"}))

        with pytest.raises(LibraryError, match=r"small.json beside it describes another"):
            Library(opened.path)

    def test_a_damaged_manifest_beside_it_is_an_error(self, opened: Library) -> None:
        opened.path.with_suffix(".json").write_text("{")

        with pytest.raises(ManifestError, match="is not JSON"):
            Library(opened.path)

    def test_describing_reads_a_library_and_a_manifest_alike(self, small_library_path: Path) -> None:
        assert describe(small_library_path) == describe(small_library_path.with_suffix(".json"))
        assert describe(small_library_path) == read_manifest(small_library_path.with_suffix(".json"))

    def test_it_needs_neither_triton_nor_numpy(self, small_library_path: Path) -> None:
        code = (
            "import sys\nfrom pyfmha.runtime.library import Library\nprint(len(Library(sys.argv[1])) > 0,"
            " [m for m in ('triton', 'numpy', 'jinja2', 'cuda') if m in sys.modules])"
        )

        assert run_python(code, str(small_library_path), check=True).stdout == "True []\n"


class TestCalling:
    def test_a_launch_reaches_the_driver(self, add: Function, fake_cuda: FakeCuda) -> None:
        add(5, X, Y, Z, 1024)
        add(6, X, Y, Z, 1024, algo_id=1)

        assert [(launch.stream, launch.grid) for launch in fake_cuda.launches()] == [(5, (1, 1, 1)), (6, (2, 1, 1))]

    def test_arguments_may_come_by_name(self, add: Function, fake_cuda: FakeCuda) -> None:
        add(5, X, Y, Z, 1024)
        add(5, X, n=1024, Z=Z, Y=Y)
        add(n=1024, Z=Z, Y=Y, X=X, stream=5, algo_id=0)
        first, second, third = fake_cuda.launches()

        assert first == second == third
        assert add.variant(X, Y + 4, n=1024, Z=Z) == add.variant(X, Y + 4, Z, 1024)
        assert add.workspace_size(X=X, Y=Y, Z=Z, n=1024) == 0
        add.prepare(n=1024, X=0, Y=0, Z=0)(5, X, Y, Z)
        assert fake_cuda.launches()[-1] == first

    @pytest.mark.parametrize(
        ("arguments", "named", "message"),
        [
            ((0, X), {"Y": Y, "Z": Z}, "add: n is missing; it takes stream, X, Y, Z, n"),
            ((), {"Y": Y}, "add: stream, X, Z, n is missing"),
            ((0, X), {"x": X, "Y": Y, "Z": Z, "n": 1}, r"add has no argument x; .* n \(did you mean X\?\)"),
            ((0, X, Y, Z, 1), {"n": 1}, "add: n is given twice, by position and by name"),
            ((0, X), {"stream": 0, "X": X, "Y": Y, "Z": Z, "n": 1}, "add: stream, X is given twice"),
            ((0, X, Y, Z), {"n": "1"}, "add: n is '1', i32 is an integer"),
        ],
    )
    def test_names_that_do_not_fit_are_errors(
        self, add: Function, fake_cuda: FakeCuda, arguments: tuple[int, ...], named: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(TypeError, match=message):
            add(*arguments, **named)
        assert fake_cuda.launch_count() == 0

    def test_an_argument_called_stream_is_not_the_stream(self, add: Function) -> None:
        function = dataclasses.replace(add.manifest, name="f", arguments=(("x", "*fp32"), ("stream", "i32")))
        assert in_order(function, (7,), {"stream": 2, "x": 1}) == (7, 1, 2)
        assert in_order(function, (), {"stream": 2, "x": 1, "CUstream": 7}) == (7, 1, 2)
        with pytest.raises(TypeError, match="f: CUstream is missing"):
            in_order(function, (), {"stream": 2, "x": 1})

    def test_the_variant_that_would_serve_is_named(self, add: Function) -> None:
        hinted, generic = (variant.name for variant in add.manifest.algorithms[0])

        assert add.variant(X, Y, Z, 1024) == hinted
        assert add.variant(X, Y + 4, Z, 1024) == generic
        assert add.variant(X, Y, Z, 1024, algo_id=1) not in (hinted, generic)

    def test_a_refused_launch_raises_with_code_and_reason(self, add: Function) -> None:
        with pytest.raises(LaunchError, match="X is 0x70000001, not a multiple of 4 bytes") as caught:
            add(0, X + 1, Y, Z, 1024)
        assert caught.value.code == MISALIGNED_ADDRESS

        with pytest.raises(LaunchError, match="algo_id is 2, allowed is 0 to 1") as caught:
            add.variant(X, Y, Z, 1, algo_id=2)
        assert caught.value.code == INVALID_VALUE

    def test_launching_before_loading_raises(self, opened: Library, fake_cuda: FakeCuda) -> None:
        fake_cuda.use_context()

        with pytest.raises(LaunchError, match=r"load_add\(\)") as caught:
            opened["add"](0, X, Y, Z, 1)

        assert caught.value.code == NOT_INITIALIZED

    def test_loading_without_a_driver_raises(self, opened: Library, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYFMHA_LIBCUDA", "/nonexistent/libcuda.so.1")

        with pytest.raises(DriverError, match="no CUDA driver") as caught:
            opened["add"].load()

        assert caught.value.code == LIBRARY_NOT_FOUND

    def test_loading_on_an_unknown_architecture_raises(self, opened: Library, fake_cuda: FakeCuda) -> None:
        fake_cuda.set_device(0, 120)
        fake_cuda.use_context()

        with pytest.raises(DriverError, match="pyfmha build --arch sm_120") as caught:
            opened["add"].load()

        assert caught.value.code == NO_BINARY_FOR_GPU

    def test_unloading_too_often_raises(self, add: Function) -> None:
        add.unload()

        with pytest.raises(DriverError, match="not loaded"):
            add.unload()

    @pytest.mark.parametrize("arguments", [(), (X,), (X, Y, Z), (X, Y, Z, 1, 2)])
    def test_a_wrong_number_of_arguments_is_an_error_that_names_them(
        self, add: Function, arguments: tuple[int, ...]
    ) -> None:
        for call in (lambda: add(0, *arguments), lambda: add.variant(*arguments)):
            with pytest.raises(
                TypeError, match=rf"add takes 4 arguments after the stream \(X, Y, Z, n\), got {len(arguments)}"
            ):
                call()

    @pytest.mark.parametrize("arguments", [(X, Y, Z, 2**31), (X, Y, Z, -(2**31) - 1), (-1, Y, Z, 1), (X, 2**64, Z, 1)])
    def test_an_integer_that_does_not_fit_is_never_cut(
        self, add: Function, fake_cuda: FakeCuda, arguments: tuple[int, ...]
    ) -> None:
        with pytest.raises(OverflowError, match="holds"):
            add(0, *arguments)

        assert fake_cuda.launch_count() == 0

    @pytest.mark.parametrize("arguments", [(X, Y, Z, 1.5), (X, Y, Z, "1"), (None, Y, Z, 1), ("X", Y, Z, 1)])
    def test_an_argument_of_the_wrong_kind_is_an_error(
        self, add: Function, fake_cuda: FakeCuda, arguments: tuple[object, ...]
    ) -> None:
        with pytest.raises(TypeError):
            add(0, *arguments)

        assert fake_cuda.launch_count() == 0

    @pytest.mark.parametrize("algo_id", [2**32, -(2**32), 2**31])
    def test_an_algo_id_that_does_not_fit_is_never_cut(self, add: Function, fake_cuda: FakeCuda, algo_id: int) -> None:
        with pytest.raises((OverflowError, LaunchError), match="algo_id"):
            add(0, X, Y, Z, 1024, algo_id=algo_id)

        assert fake_cuda.launch_count() == 0

    @pytest.mark.parametrize("stream", [1.5, "0", b"0", [0]])
    def test_a_stream_that_is_no_integer_is_an_error(self, add: Function, fake_cuda: FakeCuda, stream: object) -> None:
        with pytest.raises(TypeError):
            add(stream, X, Y, Z, 1024)  # type: ignore[arg-type]

        assert fake_cuda.launch_count() == 0

    def test_truth_values_and_numpy_integers_serve(self, opened: Library, fake_cuda: FakeCuda) -> None:
        numpy = pytest.importorskip("numpy")
        fake_cuda.use_context()
        opened["add"].load()

        opened["add"](0, numpy.uint64(X), Y, Z, numpy.int32(1024))

        assert fake_cuda.launches()[-1].params[0] == X.to_bytes(8, "little")

    def test_a_float_that_would_become_infinite_is_an_error(self, opened: Library, fake_cuda: FakeCuda) -> None:
        function = opened["scalars"]
        fake_cuda.use_context()
        function.load()
        arguments = [X, 1.0, 1.0, 1e39, 1.0, 0, 0, 0, 0, 0, 0, 0, 1]
        assert function.manifest.arguments[3][1] == "fp32"

        with pytest.raises(OverflowError, match=r"fp32 holds up to 3\.4e38"):
            function(0, *arguments)
        function(0, *[value if value != 1e39 else float("inf") for value in arguments])

        assert fake_cuda.launch_count() == 1

    @pytest.mark.parametrize("stream", [-1, 2**64])
    def test_a_stream_that_does_not_fit_is_never_cut(self, add: Function, fake_cuda: FakeCuda, stream: int) -> None:
        with pytest.raises(OverflowError, match="stream is"):
            add(stream, X, Y, Z, 1024)

        assert fake_cuda.launch_count() == 0

    def test_without_even_a_stream_the_arguments_are_named(self, add: Function) -> None:
        with pytest.raises(TypeError, match=r"add takes 4 arguments after the stream \(X, Y, Z, n\), got no stream"):
            add()

    @pytest.mark.parametrize("algo_id", [None, "0", 1.5])
    def test_an_algo_id_that_is_no_integer_is_an_error(
        self, add: Function, fake_cuda: FakeCuda, algo_id: object
    ) -> None:
        with pytest.raises(TypeError, match="algo_id is"):
            add(0, X, Y, Z, 1024, algo_id=algo_id)  # type: ignore[arg-type]

        assert fake_cuda.launch_count() == 0

    @pytest.mark.parametrize("arguments", [4, 13])
    def test_a_call_is_one_function_of_python(self, opened: Library, fake_cuda: FakeCuda, arguments: int) -> None:
        function = opened["add" if arguments == 4 else "many"]
        assert len(function.manifest.arguments) == arguments
        fake_cuda.use_context()
        function.load()
        pointers = [X] * sum(kind.startswith("*") for _, kind in function.manifest.arguments)

        made = entered(functools.partial(function, 0, *pointers, *[1024] * (arguments - len(pointers))))

        assert made == ["__call__"], "what a call takes is measured by tests/host_times.py"
        assert fake_cuda.launch_count() == 1

    @pytest.mark.parametrize("flag", [-1, 2])
    def test_a_flag_is_0_or_1(self, opened: Library, fake_cuda: FakeCuda, flag: int) -> None:
        function = opened["scalars"]
        fake_cuda.use_context()
        function.load()
        arguments = [X, 1.0, 1.0, 1.0, 1.0, flag, 0, 0, 0, 0, 0, 0, 1]

        for call in (lambda: function(0, *arguments), lambda: function.prepare(*arguments)):
            with pytest.raises(OverflowError, match=f"flag is {flag}, i1 holds 0 to 1"):
                call()


class TestPreparing:
    def test_each_launch_has_its_own_stream_and_pointers(self, add: Function, fake_cuda: FakeCuda) -> None:
        prepared = add.prepare(0, 0, 0, 1040, algo_id=1)

        for i in range(3):
            prepared(5 + i, X + 16 * i, Y, Z)
        add(7, X + 32, Y, Z, 1040, algo_id=1)

        launches = fake_cuda.launches()
        assert [launch.stream for launch in launches] == [5, 6, 7, 7]
        assert [launch.params[0] for launch in launches[:3]] == [(X + 16 * i).to_bytes(8, "little") for i in range(3)]
        assert launches[2] == launches[3]

    def test_its_steps_can_be_taken_apart(self, add: Function, fake_cuda: FakeCuda) -> None:
        prepared = add.prepare(0, 0, 0, 1024)

        prepared.pack(9, X, Y, Z)
        assert [prepared.launch(), prepared.launch()] == [0, 0]

        first, second = fake_cuda.launches()
        assert first == second
        assert (first.stream, first.params[1]) == (9, Y.to_bytes(8, "little"))

    def test_two_do_not_disturb_each_other(self, add: Function, fake_cuda: FakeCuda) -> None:
        one, other = add.prepare(0, 0, 0, 1024), add.prepare(0, 0, 0, 2048)
        one.pack(1, X, Y, Z)
        other.pack(2, X, Y, Z)

        assert [one.launch(), other.launch()] == [0, 0]

        assert [(launch.stream, launch.grid[0]) for launch in fake_cuda.launches()] == [(1, 1), (2, 2)]

    def test_every_kind_of_argument_arrives(self, opened: Library, fake_cuda: FakeCuda) -> None:
        function = opened["scalars"]
        fake_cuda.use_context()
        function.load()
        values = (1.5, -2.5, 3.7, -4.9, 1, -128, -32768, -(2**63), 255, 65535, 2**64 - 1, 3)

        function.prepare(0, *values)(4, X)
        function(4, X, *values)

        first, second = fake_cuda.launches()
        assert first == second

    def test_a_refused_launch_raises_with_code_and_reason(self, add: Function) -> None:
        prepared = add.prepare(0, 0, 0, 1024)

        with pytest.raises(LaunchError, match="X is 0x70000001, not a multiple of 4 bytes") as caught:
            prepared(0, X + 1, Y, Z)
        assert caught.value.code == MISALIGNED_ADDRESS

    @pytest.mark.parametrize("pointers", [(X, Y), (X, Y, Z, X), (X, Y, 1.5), (X, Y, None), (X, Y, 1 << 64)])
    def test_what_are_not_its_pointers_is_an_error(
        self, add: Function, fake_cuda: FakeCuda, pointers: tuple[int, ...]
    ) -> None:
        prepared = add.prepare(0, 0, 0, 1024)

        with pytest.raises((struct.error, OverflowError)):
            prepared(0, *pointers)

        assert fake_cuda.launch_count() == 0

    def test_arguments_are_checked_when_it_is_made(self, add: Function) -> None:
        with pytest.raises(OverflowError, match="n is 2147483648"):
            add.prepare(0, 0, 0, 1 << 31)
        with pytest.raises(TypeError, match="got 2"):
            add.prepare(0, 0)

    def test_its_two_steps_run_no_function_of_python(self, add: Function, fake_cuda: FakeCuda) -> None:
        prepared = add.prepare(0, 0, 0, 1024)
        pack, launch = prepared.pack, prepared.launch

        def both() -> None:
            pack(0, X, Y, Z)
            launch()

        assert entered(both) == []
        assert entered(lambda: prepared(0, X, Y, Z)) == ["__call__"]
        assert fake_cuda.launch_count() == 2
