"""The contract of a built library, called from outside through plain C functions, on the fake driver."""

import ctypes
import re
import shutil
import struct
import subprocess
import threading
from pathlib import Path

import fake_cuda as fake
import pytest
from fake_cuda import FakeCuda, Launch
from helpers import (
    HANGS,
    INVALID_CONTEXT,
    INVALID_HANDLE,
    INVALID_IMAGE,
    INVALID_VALUE,
    KERNELS,
    LAUNCH_FAILED,
    LIBRARY_NOT_FOUND,
    MISALIGNED_ADDRESS,
    NO_BINARY_FOR_GPU,
    NO_DEVICE,
    NOT_FOUND,
    NOT_INITIALIZED,
    SUCCESS,
    SYMBOL_NOT_FOUND,
    TESTS,
    CLibrary,
    gcc,
    manifest_source,
)

from pyfmha.aot import Compiler, compile_kernel, link, make_spec
from pyfmha.spec.arch import ARCHS, arch_for, parse_archs

X, Y, Z = 0x7000_0000, 0x7000_1000, 0x7000_2000  # aligned addresses; the fake driver never follows them
ADD = (X, Y, Z, 1024)  # with the hints' alignment


def pointer(value: int) -> bytes:
    return struct.pack("<Q", value)


def i32(value: int) -> bytes:
    return struct.pack("<i", value)


def only(launches: list[Launch]) -> Launch:
    (launch,) = launches
    return launch


@pytest.fixture
def loaded(library: CLibrary, fake_cuda: FakeCuda) -> CLibrary:
    """The small library with every function loaded on device 0, whose context is current."""
    fake_cuda.use_context()
    for function in library.manifest.functions:
        assert library.load(function.name) == SUCCESS, library.error()
    return library


@pytest.fixture(scope="module")
def ampere_library_path(compiler: Compiler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with code for sm_86, sm_87 and sm_89, and a function for sm_87 only."""
    spec = make_spec(compiler, KERNELS / "elementwise.py", "add", "*fp32, *fp32, *fp32, i32, 128", "cdiv(n, BLOCK)")
    folder = tmp_path_factory.mktemp("ampere")
    headers = compile_kernel(compiler, spec, parse_archs(["sm_86", "sm_87", "sm_89"]), folder / "add")
    tegra = make_spec(compiler, KERNELS / "elementwise.py", "volume", "*i64, i64, i64, i64", "a, b, c")
    link([*headers, *compile_kernel(compiler, tegra, parse_archs(["sm_87"]), folder / "volume")], folder / "ampere")
    return folder / "ampere.so"


class TestSymbols:
    def test_it_imports_nothing_that_ends_the_process_or_prints(self, small_library_path: Path) -> None:
        imported = symbols(small_library_path, "--undefined-only")

        assert not imported & {"exit", "_exit", "abort", "_Exit", "quick_exit", "raise", "__assert_fail"}
        assert not {
            name for name in imported if re.search(r"(^|_)(v?f?printf|puts|putchar|fputs|fwrite|perror)(_chk)?$", name)
        }

    def test_it_exports_the_documented_functions_and_no_others(
        self, library: CLibrary, small_library_path: Path
    ) -> None:
        patterns = ("load_{}", "unload_{}", "{}", "{}_default", "{}_packed", "{}_get_num_algos", "{}_variant")
        names = [function.name for function in library.manifest.functions]

        exported = symbols(small_library_path, "--defined-only")

        assert exported == {p.format(n) for p in patterns for n in names} | {
            "pyfmha_last_error",
            "pyfmha_error_text",
            "pyfmha_manifest",
        }

    def test_it_needs_no_library_beyond_the_c_library(self, small_library_path: Path) -> None:
        dynamic = subprocess.run(
            ["readelf", "-d", small_library_path], capture_output=True, text=True, check=True
        ).stdout

        needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))

        beyond = {name for name in needed if not re.match(r"(libc|libdl|libpthread|ld-linux.*)\.so", name)}
        assert not beyond

    def test_the_manifest_can_be_read_without_a_driver(
        self, small_library_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PYFMHA_LIBCUDA", str(tmp_path / "nothing"))

        library = CLibrary(Path(shutil.copy(small_library_path, tmp_path)))

        assert library.manifest.archs() == ("sm_80", "sm_90")
        assert library.algorithms("add") == 2
        assert library.variant("add", *ADD) == (SUCCESS, library.variants("add")[True])


def symbols(library: Path, which: str) -> set[str]:
    listing = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].partition("@")[0] for line in listing.splitlines()}


class TestDriver:
    def test_without_a_driver_loading_fails_and_names_the_file_looked_for(
        self, library: CLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        missing = tmp_path / "libcuda.so.1"
        monkeypatch.setenv("PYFMHA_LIBCUDA", str(missing))

        assert library.load("add") == LIBRARY_NOT_FOUND
        assert "no CUDA driver" in library.error()
        assert str(missing) in library.error()

    def test_a_library_that_is_no_driver_is_refused_by_name(
        self, library: CLibrary, small_library_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PYFMHA_LIBCUDA", str(small_library_path))

        assert library.load("add") == SYMBOL_NOT_FOUND
        assert "cuInit" in library.error()
        assert str(small_library_path) in library.error()

    def test_a_failing_driver_start_is_reported_with_the_drivers_own_words(
        self, library: CLibrary, fake_cuda: FakeCuda
    ) -> None:
        fake_cuda.set_device_count(0)

        assert library.load("add") == NO_DEVICE
        assert "cuInit" in library.error()
        assert "no CUDA-capable device is detected" in library.error()

    def test_an_error_the_driver_has_no_words_for_is_reported_by_number(
        self, library: CLibrary, fake_cuda: FakeCuda
    ) -> None:
        fake_cuda.fail("cuInit", 803)

        assert library.load("add") == 803
        assert "803" in library.error()

    def test_a_driver_that_failed_to_start_is_tried_again(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.use_context()
        fake_cuda.fail("cuInit", NO_DEVICE, times=1)

        assert library.load("add") == NO_DEVICE
        assert library.load("add") == SUCCESS

    def test_loading_without_a_current_context_says_so(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        assert library.load("add") == INVALID_CONTEXT
        assert "no current CUDA context" in library.error()
        assert fake_cuda.modules_loaded() == 0

    def test_launching_without_a_current_context_says_so(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.make_current(None)

        assert loaded.launch("add", *ADD) == INVALID_CONTEXT
        assert "no current CUDA context" in loaded.error()

    @pytest.mark.parametrize("function", ["cuCtxGetCurrent", "cuCtxGetId", "cuCtxGetDevice"])
    def test_a_failing_context_query_fails_the_load(
        self, library: CLibrary, fake_cuda: FakeCuda, function: str
    ) -> None:
        fake_cuda.use_context()
        fake_cuda.fail(function, 999)

        assert library.load("add") == 999
        assert function in library.error()
        assert fake_cuda.modules_loaded() == 0

    def test_a_driver_without_context_ids_serves(
        self, library: CLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = FakeCuda(fake.build(tmp_path / "libcuda_11.so", "-DFAKE_WITHOUT_CONTEXT_IDS"))
        old.reset()
        old.use_context()
        monkeypatch.setenv("PYFMHA_LIBCUDA", str(old.path))

        assert library.load("add") == SUCCESS
        assert library.launch("add", *ADD) == SUCCESS
        assert old.launch_count() == 1


class TestLoading:
    def test_it_loads_every_variant_of_that_function_and_no_other(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.use_context()

        assert library.load("add") == SUCCESS
        assert fake_cuda.modules_loaded() == 4  # two algorithms, each hinted and generic
        assert library.launch("subtract", *ADD) == NOT_INITIALIZED

    @pytest.mark.parametrize(
        ("capability", "advice"),
        [
            (100, "a kernel of your own: pyfmha compile with -t sm_100 too,"),
            (100, "add it: pyfmha build --arch sm_100 (for an operator with --operators and its file too,"),
            (70, "pyfmha has no code for that"),
            (75, "pyfmha has no code for that"),
        ],
    )
    def test_a_device_without_code_is_refused_with_what_there_is_and_the_command_that_adds_it(
        self, library: CLibrary, fake_cuda: FakeCuda, capability: int, advice: str
    ) -> None:
        fake_cuda.set_device(1, capability)
        fake_cuda.use_context(1)

        assert library.load("add") == NO_BINARY_FOR_GPU
        message = library.error()
        assert "sm_80, sm_90" in message
        assert f"device 1, which is sm_{capability}" in message
        assert advice in message
        assert ("pyfmha build" in message) == (arch_for(f"sm_{capability}", ARCHS) is not None)
        assert fake_cuda.modules_loaded() == 0

    @pytest.mark.parametrize(("capability", "arch"), [(80, "sm_80"), (86, "sm_80"), (89, "sm_80"), (90, "sm_90")])
    def test_the_device_gets_its_own_code_or_that_of_an_earlier_minor_revision(
        self, library: CLibrary, fake_cuda: FakeCuda, capability: int, arch: str
    ) -> None:
        fake_cuda.set_device(0, capability)
        fake_cuda.use_context()

        assert library.load("add") == SUCCESS
        assert library.launch("add", *ADD) == SUCCESS
        assert only(fake_cuda.launches()).image_sha256 == library.image(library.variants("add")[True], arch)

    @pytest.mark.parametrize(
        ("capability", "arch"), [(86, "sm_86"), (87, "sm_87"), (88, "sm_86"), (89, "sm_89"), (80, None), (90, None)]
    )
    def test_among_several_the_latest_that_runs_is_taken(
        self, ampere_library_path: Path, tmp_path: Path, fake_cuda: FakeCuda, capability: int, arch: str | None
    ) -> None:
        library = CLibrary(Path(shutil.copy(ampere_library_path, tmp_path)))
        fake_cuda.set_device(0, capability)
        fake_cuda.use_context()

        status = library.load("add")

        assert status == (SUCCESS if arch else NO_BINARY_FOR_GPU)
        if arch:
            assert library.launch("add", *ADD) == SUCCESS
            name = library.variants("add")[False]
            assert only(fake_cuda.launches()).image_sha256 == library.image(name, arch)

    @pytest.mark.parametrize(("capability", "served"), [(86, 86), (87, None), (88, 86), (89, 89)])
    def test_code_of_tegra_runs_on_no_other_device(
        self, ampere_library_path: Path, tmp_path: Path, fake_cuda: FakeCuda, capability: int, served: int | None
    ) -> None:
        library = CLibrary(Path(shutil.copy(ampere_library_path, tmp_path)))
        fake_cuda.set_device(0, capability)
        fake_cuda.use_context()

        assert library.load("volume") == (NO_BINARY_FOR_GPU if served else SUCCESS)
        if served:
            assert f"holds code for sm_87, not for device 0, which is sm_{capability}" in library.error()
            assert f"add it: pyfmha build --arch sm_{served} (for an operator" in library.error()

    @pytest.mark.parametrize("after", range(4))
    @pytest.mark.parametrize("function", ["cuModuleLoadData", "cuModuleGetFunction"])
    def test_it_loads_all_or_nothing(self, library: CLibrary, fake_cuda: FakeCuda, function: str, after: int) -> None:
        fake_cuda.use_context()
        fake_cuda.fail(function, INVALID_IMAGE, after=after)

        assert library.load("add") == INVALID_IMAGE
        assert function in library.error()
        assert fake_cuda.modules_loaded() == 0
        assert library.launch("add", *ADD) == NOT_INITIALIZED
        assert library.unload("add") == INVALID_HANDLE
        fake_cuda.heal(function)
        assert library.load("add") == SUCCESS
        assert library.launch("add", *ADD) == SUCCESS

    @pytest.mark.parametrize("after", range(12))
    def test_a_failing_device_query_leaves_nothing_loaded(
        self, library: CLibrary, fake_cuda: FakeCuda, after: int
    ) -> None:
        fake_cuda.use_context()
        fake_cuda.fail("cuDeviceGetAttribute", 999, after=after)

        assert library.load("add") == 999
        assert fake_cuda.modules_loaded() == 0

    def test_the_message_keeps_the_cause_when_undoing_fails_too(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.use_context()
        fake_cuda.fail("cuModuleGetFunction", NOT_FOUND, after=1)
        fake_cuda.fail("cuModuleUnload", 999)

        assert library.load("add") == NOT_FOUND
        assert "cuModuleGetFunction" in library.error()

    def test_loading_again_is_counted_and_loads_nothing(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.use_context()
        assert library.load("add") == SUCCESS
        loads = fake_cuda.calls("cuModuleLoadData")

        assert library.load("add") == SUCCESS

        assert fake_cuda.calls("cuModuleLoadData") == loads

    def test_unloading_is_counted_and_once_too_often_is_an_error(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.use_context()
        assert [library.load("add"), library.load("add")] == [SUCCESS, SUCCESS]

        assert library.unload("add") == SUCCESS
        assert library.launch("add", *ADD) == SUCCESS  # one load is left
        assert library.unload("add") == SUCCESS
        assert fake_cuda.modules_loaded() == 0
        assert library.launch("add", *ADD) == NOT_INITIALIZED
        assert library.unload("add") == INVALID_HANDLE
        assert "unload_add" in library.error()
        assert "not loaded" in library.error()

    def test_unloading_before_any_load_is_an_error(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        assert library.unload("add") == INVALID_HANDLE
        assert "unload_add" in library.error()

    def test_a_failing_unload_is_reported_and_the_others_are_unloaded(
        self, library: CLibrary, fake_cuda: FakeCuda
    ) -> None:
        fake_cuda.use_context()
        assert library.load("add") == SUCCESS
        fake_cuda.fail("cuModuleUnload", 999, times=1)

        assert library.unload("add") == 999
        assert "cuModuleUnload" in library.error()
        assert fake_cuda.modules_loaded() == 1  # the driver's own: it refused to give it up

    def test_nothing_leaks_over_many_loads_and_unloads(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.use_context()

        for _ in range(20):
            assert library.load("add") == SUCCESS
            assert library.unload("add") == SUCCESS

        assert fake_cuda.modules_loaded() == 0


class TestSharedMemory:
    """`product` needs more than the 48 KB that a block gets without asking."""

    def shared(self, library: CLibrary) -> int:
        (function,) = (f for f in library.manifest.functions if f.name == "product")
        (image,) = (i for i in function.algorithms[0][0].images if i.arch == "sm_90")
        assert image.shared > 48 * 1024
        return image.shared

    def test_it_is_asked_for_at_load_and_given_at_launch(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.use_context()
        assert library.load("product") == SUCCESS
        asked = fake_cuda.calls("cuFuncSetAttribute")
        assert asked

        assert library.launch("product", X, Y, Z, 256, 256) == SUCCESS

        launch = only(fake_cuda.launches())
        assert launch.shared == self.shared(library)
        assert (launch.grid, launch.block) == ((2, 4, 1), (128, 1, 1))
        assert fake_cuda.calls("cuFuncSetAttribute") == asked

    def test_a_kernel_that_needs_little_asks_for_none(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.use_context()

        assert library.load("add") == SUCCESS
        assert fake_cuda.calls("cuFuncSetAttribute") == 0

    def test_a_device_that_has_less_is_refused_with_both_numbers(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        needed = self.shared(library)
        fake_cuda.set_device(0, 90, shared_optin=needed - 1)
        fake_cuda.use_context()

        assert library.load("product") == INVALID_VALUE
        assert f"{needed} bytes" in library.error()
        assert f"allows {needed - 1}" in library.error()
        assert fake_cuda.modules_loaded() == 0

    def test_a_device_that_has_just_enough_serves(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.set_device(0, 90, shared_optin=self.shared(library))
        fake_cuda.use_context()

        assert library.load("product") == SUCCESS
        assert library.launch("product", X, Y, Z, 256, 256) == SUCCESS

    def test_a_device_that_will_not_favour_shared_memory_serves_all_the_same(
        self, library: CLibrary, fake_cuda: FakeCuda
    ) -> None:
        fake_cuda.use_context()
        fake_cuda.fail("cuFuncSetAttribute", INVALID_VALUE, after=1)

        assert library.load("product") == SUCCESS
        assert fake_cuda.calls("cuFuncSetAttribute") == 2
        assert library.launch("product", X, Y, Z, 256, 256) == SUCCESS

    def test_a_failing_opt_in_leaves_nothing_loaded(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.use_context()
        fake_cuda.fail("cuFuncSetAttribute", INVALID_VALUE)

        assert library.load("product") == INVALID_VALUE
        assert "shared memory" in library.error()
        assert fake_cuda.modules_loaded() == 0


class TestDamagedCode:
    """The machine code inside a library is wrong: its C source is changed, and compiled by hand."""

    def library(self, headers: list[Path], folder: Path, old: str, new: str) -> CLibrary:
        link([header for header in headers if header.name.startswith("add.")], folder / "linked")
        for header in headers:
            for file in (header, header.with_suffix(".c")) if header.name.startswith("add.") else ():
                shutil.copy(file, folder)
        changed = 0
        for file in folder.glob("add.*.c"):
            text = file.read_text()
            changed += text.count(old)
            file.write_text(text.replace(old, new))
        assert changed
        (folder / "manifest.c").write_text(manifest_source((folder / "linked.json").read_text()))
        done = gcc("-std=c11", "-shared", "-fPIC", *folder.glob("*.c"), "-o", folder / "damaged.so", "-ldl")
        assert done.returncode == 0, done.stderr
        return CLibrary(folder / "damaged.so")

    def test_code_that_is_no_elf_image_is_refused(
        self, small_library_headers: list[Path], tmp_path: Path, fake_cuda: FakeCuda
    ) -> None:
        library = self.library(small_library_headers, tmp_path, '"\\177ELF', '"\\000ELF')
        fake_cuda.use_context()

        assert library.load("add") == INVALID_IMAGE
        assert "device kernel image is invalid" in library.error()
        assert library.variants("add")[True] in library.error()

    def test_code_of_another_architecture_than_promised_is_refused(
        self, small_library_headers: list[Path], tmp_path: Path, fake_cuda: FakeCuda
    ) -> None:
        library = self.library(small_library_headers, tmp_path, ".code = code_sm_90", ".code = code_sm_80")
        fake_cuda.use_context()

        assert library.load("add") == NO_BINARY_FOR_GPU
        assert "cuModuleLoadData" in library.error()

    def test_code_without_the_kernel_is_refused(
        self, small_library_headers: list[Path], tmp_path: Path, fake_cuda: FakeCuda
    ) -> None:
        library = self.library(small_library_headers, tmp_path, '.symbol = "add"', '.symbol = "adder"')
        fake_cuda.use_context()

        assert library.load("add") == NOT_FOUND
        assert "named symbol not found" in library.error()
        assert fake_cuda.modules_loaded() == 0


class TestLaunch:
    def test_the_kernel_gets_its_grid_its_block_its_stream_and_its_arguments(
        self, loaded: CLibrary, fake_cuda: FakeCuda
    ) -> None:
        assert loaded.launch("add", X, Y, Z, 1040, stream=0xABC0) == SUCCESS

        launch = only(fake_cuda.launches())
        assert launch.kernel == "add"
        assert launch.image_sha256 == loaded.image(loaded.variants("add")[True], "sm_90")
        assert (launch.grid, launch.block, launch.shared) == ((2, 1, 1), (128, 1, 1), 0)
        assert (launch.stream, launch.device) == (0xABC0, 0)
        assert launch.params[:4] == (pointer(X), pointer(Y), pointer(Z), i32(1040))
        assert set(launch.params[4:]) <= {pointer(0)}  # Triton's scratch pointers

    def test_before_loading_it_is_an_error_that_says_what_to_call(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.use_context()

        assert library.launch("add", *ADD) == NOT_INITIALIZED
        assert "load_add()" in library.error()
        assert fake_cuda.calls("cuModuleLoadData") == 0

    def test_a_failing_launch_is_reported(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.fail("cuLaunchKernel", LAUNCH_FAILED)

        assert loaded.launch("add", *ADD) == LAUNCH_FAILED
        assert "cuLaunchKernel" in loaded.error()
        assert "719" in loaded.error()

    def test_nothing_that_a_stream_capture_forbids_happens(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.begin_capture()

        statuses = [
            loaded.launch("add", *ADD),
            loaded.launch("add", X + 4, Y, Z, 1),
            loaded.launch("product", X, Y, Z, 128, 64),
        ]

        assert statuses == [SUCCESS] * 3
        assert fake_cuda.violations() == (0, "")
        loaded.load("volume")
        loaded.unload("volume")
        assert fake_cuda.violations()[0] == 0  # counted only
        loaded.unload("volume")
        assert fake_cuda.violations() == (1, "cuModuleUnload")  # the fake does notice

    def test_the_default_is_algorithm_zero(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        assert loaded.launch_default("add", *ADD, stream=7) == SUCCESS
        assert loaded.launch("add", *ADD, stream=7, algo_id=0) == SUCCESS

        first, second = fake_cuda.launches()
        assert first == second

    def test_each_algorithm_is_its_own_code(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        assert loaded.algorithms("add") == 2

        assert loaded.launch("add", *ADD, algo_id=1) == SUCCESS

        launch = only(fake_cuda.launches())
        assert launch.grid == (2, 1, 1)  # blocks of 512, not of 1024
        _, name = loaded.variant("add", *ADD, algo_id=1)
        assert name is not None
        assert launch.image_sha256 == loaded.image(name, "sm_90")

    @pytest.mark.parametrize("algo_id", [-1, 2, 2**31 - 1])
    def test_an_algorithm_that_is_not_there_is_an_error(
        self, loaded: CLibrary, fake_cuda: FakeCuda, algo_id: int
    ) -> None:
        assert loaded.launch("add", *ADD, algo_id=algo_id) == INVALID_VALUE
        assert f"algo_id is {algo_id}, allowed is 0 to 1" in loaded.error()
        assert loaded.variant("add", *ADD, algo_id=algo_id) == (INVALID_VALUE, None)
        assert fake_cuda.launch_count() == 0

    def test_thirteen_arguments_arrive_in_order(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        pointers = [X + 0x100 * i for i in range(11)]

        assert loaded.launch("many", *pointers, 160, 7) == SUCCESS

        launch = only(fake_cuda.launches())
        assert launch.params[:13] == (*map(pointer, pointers), i32(160), i32(7))
        assert launch.image_sha256 == loaded.image(loaded.variants("many")[True], "sm_90")

    @pytest.mark.parametrize("position", [0, 1, 10, 11])
    def test_hints_whose_positions_collide_when_glued_are_each_heeded(self, loaded: CLibrary, position: int) -> None:
        arguments = [X + 0x100 * i for i in range(11)] + [160, 7]
        arguments[position] += 4

        assert loaded.variant("many", *arguments) == (SUCCESS, loaded.variants("many")[False])

    def test_arguments_named_like_words_of_c_arrive_in_order(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        assert loaded.launch("words", X, 1, 2, 3, 4, 5, 6, 7, 8.0, 9, 10, 11) == SUCCESS

        launch = only(fake_cuda.launches())
        assert launch.params[:12] == (
            pointer(X),
            *map(i32, range(1, 8)),
            struct.pack("<e", 8.0),
            *map(i32, range(9, 12)),
        )

    def test_each_scalar_type_arrives_as_the_kernel_reads_it(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        values = (1.1, -2.3, 3.7, -4.9, 1, -128, -32768, -(2**63), 255, 65535, 2**64 - 1, 3)
        packed = zip("efdbhqBHQi", (values[0], *values[2:3], values[3], *values[5:]), strict=True)
        bfloat = struct.pack("<f", struct.unpack("<f", struct.pack("<I", 0xC0130000))[0])[2:]  # -2.3 in bf16: -2.296875

        assert loaded.launch("scalars", X, *values) == SUCCESS

        half, single, double, *integers = (struct.pack(f"<{code}", value) for code, value in packed)
        assert only(fake_cuda.launches()).params[:13] == (pointer(X), half, bfloat, single, double, b"\1", *integers)

    def test_a_launch_asks_the_driver_for_the_context_and_launches(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        """The first launch and the hundredth; what that takes is measured by ``tests/host_times.py``."""
        before = fake_cuda.all_calls()
        for _ in range(100):
            assert loaded.launch("add", *ADD) == SUCCESS

        assert fake_cuda.all_calls() - before == {"cuCtxGetCurrent": 100, "cuCtxGetId": 100, "cuLaunchKernel": 100}


class TestDispatch:
    """Which variant runs is read off the machine code that reached the driver."""

    def variant_run(self, library: CLibrary, fake_cuda: FakeCuda, name: str) -> bool:
        """Whether the hinted one ran."""
        digest = fake_cuda.launches()[-1].image_sha256
        (hinted,) = (h for h, variant in library.variants(name).items() if library.image(variant, "sm_90") == digest)
        return hinted

    def test_aligned_pointers_run_the_hinted_variant(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        assert loaded.launch("add", X + 16, Y + 32, Z + 48, 16) == SUCCESS
        assert self.variant_run(loaded, fake_cuda, "add")

    @pytest.mark.parametrize("offset", [4, 8, 12])
    @pytest.mark.parametrize("which", range(3))
    def test_a_misaligned_pointer_runs_the_generic_variant(
        self, loaded: CLibrary, fake_cuda: FakeCuda, which: int, offset: int
    ) -> None:
        arguments = [X, Y, Z, 16]
        arguments[which] += offset

        assert loaded.launch("add", *arguments) == SUCCESS

        assert not self.variant_run(loaded, fake_cuda, "add")
        assert loaded.variant("add", *arguments) == (SUCCESS, loaded.variants("add")[False])
        assert fake_cuda.launches()[-1].params[which] == pointer(arguments[which])

    @pytest.mark.parametrize("offset", [1, 2, 3, 5, 15])
    @pytest.mark.parametrize(("which", "name"), list(enumerate("XYZ")))
    def test_a_pointer_not_aligned_to_its_elements_is_refused_by_name(
        self, loaded: CLibrary, fake_cuda: FakeCuda, which: int, name: str, offset: int
    ) -> None:
        arguments = [X, Y, Z, 16]
        arguments[which] += offset

        assert loaded.launch("add", *arguments) == MISALIGNED_ADDRESS

        assert f"{name} is {arguments[which]:#x}, not a multiple of 4 bytes" in loaded.error()
        assert fake_cuda.launch_count() == 0
        assert loaded.variant("add", *arguments) == (MISALIGNED_ADDRESS, None)

    def test_a_null_pointer_is_refused_by_name_unless_nothing_is_launched(
        self, loaded: CLibrary, fake_cuda: FakeCuda
    ) -> None:
        for index, name in enumerate("XYZ"):
            pointers = [0 if i == index else X for i in range(3)]
            assert loaded.launch("add", *pointers, 16) == INVALID_VALUE
            assert f": {name} is null; give its address" in loaded.error()
        assert fake_cuda.launch_count() == 0
        assert loaded.launch("add", 0, 0, 0, 0) == SUCCESS
        assert fake_cuda.launch_count() == 0

    @pytest.mark.parametrize(
        ("stride", "step", "hinted"),
        [(16, 1, True), (0, 1, True), (-32, 1, True), (17, 1, False), (16, 2, False), (8, 1, False), (16, 0, False)],
    )
    def test_integers_must_keep_their_hints_promise(
        self, loaded: CLibrary, fake_cuda: FakeCuda, stride: int, step: int, hinted: bool
    ) -> None:
        assert loaded.launch("hints", X, 100, stride, step) == SUCCESS

        assert self.variant_run(loaded, fake_cuda, "hints") is hinted
        passed = (pointer(X), i32(100), i32(stride)) + (
            () if hinted else (i32(step),)
        )  # an argument of :1 is compiled in
        scratch = only(fake_cuda.launches()).params[len(passed) :]
        assert only(fake_cuda.launches()).params[: len(passed)] == passed
        assert set(scratch) <= {pointer(0)}

    def test_naming_a_variant_launches_nothing(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        loaded.variant("add", *ADD)

        assert fake_cuda.launch_count() == 0


class TestGrid:
    def test_three_dimensions_arrive(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        assert loaded.launch("volume", X, 5, 6, 7) == SUCCESS
        assert only(fake_cuda.launches()).grid == (5, 6, 7)

    @pytest.mark.parametrize("grid", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 0), (2**31 - 1, 65535, 0), (0, 65536, 1)])
    def test_an_empty_grid_succeeds_and_launches_nothing(
        self, loaded: CLibrary, fake_cuda: FakeCuda, grid: tuple[int, int, int]
    ) -> None:
        assert loaded.launch("volume", X, *grid) == SUCCESS
        assert fake_cuda.calls("cuLaunchKernel") == 0

    def test_no_elements_make_an_empty_grid(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        assert loaded.launch("add", X, Y, Z, 0) == SUCCESS
        assert fake_cuda.calls("cuLaunchKernel") == 0

    @pytest.mark.parametrize("grid", [(2**31 - 1, 1, 1), (1, 65535, 1), (1, 1, 65535)])
    def test_the_largest_grid_of_the_hardware_launches(
        self, loaded: CLibrary, fake_cuda: FakeCuda, grid: tuple[int, int, int]
    ) -> None:
        assert loaded.launch("volume", X, *grid) == SUCCESS
        assert only(fake_cuda.launches()).grid == grid

    @pytest.mark.parametrize(
        ("grid", "axis", "value", "limit"),
        [
            ((2**31, 1, 1), "x", 2**31, 2**31 - 1),
            ((2**63 - 1, 1, 1), "x", 2**63 - 1, 2**31 - 1),
            ((1, 65536, 1), "y", 65536, 65535),
            ((1, 1, 2**32 + 1), "z", 2**32 + 1, 65535),  # would be 1 if it were cut to 32 bits
        ],
    )
    def test_a_grid_over_the_hardwares_limits_is_an_error(
        self, loaded: CLibrary, fake_cuda: FakeCuda, grid: tuple[int, int, int], axis: str, value: int, limit: int
    ) -> None:
        assert loaded.launch("volume", X, *grid) == INVALID_VALUE
        assert f"grid {axis} is {value}, allowed is 0 to {limit}" in loaded.error()
        assert fake_cuda.launch_count() == 0

    @pytest.mark.parametrize("which", range(3))
    @pytest.mark.parametrize("value", [-1, -(2**63)])
    def test_a_negative_size_is_an_error_that_names_it(
        self, loaded: CLibrary, fake_cuda: FakeCuda, which: int, value: int
    ) -> None:
        sizes = [1, 1, 1]
        sizes[which] = value

        assert loaded.launch("volume", X, *sizes) == INVALID_VALUE
        assert f"{'abc'[which]} is {value}" in loaded.error()
        assert fake_cuda.launch_count() == 0

    @pytest.mark.parametrize("sizes", [(2**62, 2, 1), (2**63 - 1, 2**63 - 1, 1), (1, 1, 0)])
    def test_a_grid_that_overflows_or_divides_by_zero_is_an_error(
        self, loaded: CLibrary, fake_cuda: FakeCuda, sizes: tuple[int, int, int]
    ) -> None:
        assert loaded.launch("surface", X, *sizes) == INVALID_VALUE
        assert "overflows 64 bits or divides by zero" in loaded.error()
        assert fake_cuda.launch_count() == 0


class TestContexts:
    def test_two_devices_of_different_architectures_each_run_their_own_code(
        self, library: CLibrary, fake_cuda: FakeCuda
    ) -> None:
        fake_cuda.set_device(1, 80, 166912)
        contexts = [fake_cuda.use_context(device) for device in (0, 1)]

        for context in contexts:
            fake_cuda.make_current(context)
            assert library.load("add") == SUCCESS
        for context in contexts:
            fake_cuda.make_current(context)
            assert library.launch("add", *ADD) == SUCCESS

        hinted = library.variants("add")[True]
        assert [(launch.device, launch.image_sha256) for launch in fake_cuda.launches()] == [
            (0, library.image(hinted, "sm_90")),
            (1, library.image(hinted, "sm_80")),
        ]

    def test_a_second_context_of_one_device_is_loaded_and_unloaded_on_its_own(
        self, library: CLibrary, fake_cuda: FakeCuda
    ) -> None:
        first = fake_cuda.use_context()
        assert library.load("add") == SUCCESS
        second = fake_cuda.use_context()
        assert library.launch("add", *ADD) == NOT_INITIALIZED
        assert "in the current CUDA context" in library.error()
        assert library.unload("add") == INVALID_HANDLE
        assert library.load("add") == SUCCESS

        fake_cuda.make_current(first)
        assert library.unload("add") == SUCCESS
        assert library.launch("add", *ADD) == NOT_INITIALIZED
        fake_cuda.make_current(second)
        assert library.launch("add", *ADD) == SUCCESS

    def test_a_context_made_at_the_address_of_a_dead_one_is_known_as_another(
        self, library: CLibrary, fake_cuda: FakeCuda
    ) -> None:
        context = fake_cuda.use_context()
        assert library.load("add") == SUCCESS
        fake_cuda.recreate(context)

        assert library.launch("add", *ADD) == NOT_INITIALIZED
        assert fake_cuda.calls("cuLaunchKernel") == 0
        assert library.load("add") == SUCCESS
        assert library.launch("add", *ADD) == SUCCESS

    def test_a_destroyed_context_is_an_error(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        context = fake_cuda.use_context()
        fake_cuda.destroy(context)

        assert loaded.launch("add", *ADD) != SUCCESS
        assert loaded.error()


def run_threads(count: int, work) -> None:  # type: ignore[no-untyped-def]
    """Run work(index) on many threads that start together, and raise what any of them raised."""
    barrier, failures = threading.Barrier(count), []

    def guarded(index: int) -> None:
        try:
            barrier.wait(timeout=HANGS)
            work(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=HANGS)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if failures:
        raise failures[0]


class TestThreads:
    THREADS = 8
    ROUNDS = 200

    def test_eight_threads_load_and_launch_at_once(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        context = fake_cuda.use_context()

        def work(index: int) -> None:
            fake_cuda.make_current(context)
            assert library.load("add") == SUCCESS
            for round_ in range(self.ROUNDS):
                assert library.launch("add", X, Y, Z, 1000 * index + round_, stream=index) == SUCCESS

        run_threads(self.THREADS, work)

        assert fake_cuda.calls("cuModuleLoadData") == fake_cuda.modules_loaded() == 4
        expected = {(i, i32(1000 * i + r)) for i in range(self.THREADS) for r in range(self.ROUNDS)} - {(0, i32(0))}
        assert {(launch.stream, launch.params[3]) for launch in fake_cuda.launches()} == expected
        for _ in range(self.THREADS):
            assert library.unload("add") == SUCCESS
        assert fake_cuda.modules_loaded() == 0

    def test_unloading_under_way_elsewhere_never_breaks_a_launch(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        context = fake_cuda.use_context()

        def work(index: int) -> None:
            fake_cuda.make_current(context)
            for _ in range(self.ROUNDS):
                assert library.load("add") == SUCCESS
                assert library.launch("add", *ADD) == SUCCESS  # this thread's load holds it
                assert library.unload("add") == SUCCESS
                assert library.launch("add", *ADD) in (SUCCESS, NOT_INITIALIZED)  # never a stale handle

        run_threads(self.THREADS, work)

        assert fake_cuda.modules_loaded() == 0
        assert library.unload("add") == INVALID_HANDLE

    def test_threads_on_two_devices_do_not_mix(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.set_device(1, 80, 166912)
        contexts = [fake_cuda.use_context(device) for device in (0, 1)]

        def work(index: int) -> None:
            fake_cuda.make_current(contexts[index % 2])
            assert library.load("add") == SUCCESS
            for _ in range(self.ROUNDS):
                assert library.launch("add", *ADD, stream=index) == SUCCESS

        run_threads(self.THREADS, work)

        assert {(launch.stream % 2, launch.device) for launch in fake_cuda.launches()} == {(0, 0), (1, 1)}
        assert fake_cuda.modules_loaded() == 8

    def test_the_text_of_a_failure_belongs_to_its_thread(self, loaded: CLibrary) -> None:
        assert loaded.launch("add", *ADD, algo_id=9) == INVALID_VALUE
        elsewhere = []

        def work(index: int) -> None:
            elsewhere.append(loaded.error())
            loaded.launch("add", *ADD, algo_id=77)
            elsewhere.append(loaded.error())

        run_threads(1, work)

        assert elsewhere[0] == ""
        assert "algo_id is 77" in elsewhere[1]
        assert "algo_id is 9" in loaded.error()


def test_a_launch_allocates_no_memory_and_contexts_leave_none_behind(
    small_library_path: Path, fake_driver: FakeCuda, tmp_path: Path
) -> None:
    """A C program whose own malloc, calloc and realloc count their calls links the library as a user would."""
    program = tmp_path / "launch_many"
    source = TESTS / "fake_cuda" / "launch_many.c"
    library = shutil.copy(small_library_path, tmp_path / "libsmall.so")
    headers = small_library_path.parent
    done = gcc("-std=c11", "-Wall", "-Wextra", "-Werror", "-I", headers, source, library, "-ldl", "-o", program)
    assert done.returncode == 0, done.stderr

    ran = subprocess.run(
        [program, fake_driver.path],
        capture_output=True,
        text=True,
        check=False,
        env={"LD_LIBRARY_PATH": str(tmp_path), "PYFMHA_LIBCUDA": str(fake_driver.path)},
    )

    assert ran.returncode == 0, ran.stderr
    assert re.fullmatch(
        r"allocations while loading: [1-9]\d*, in 1000 launches: 0, held after 1000 more contexts: 0\n", ran.stdout
    )


def test_ctypes_integers_are_as_wide_as_the_prototypes(library: CLibrary) -> None:
    types = {kind for function in library.manifest.functions for _, kind in function.arguments}

    assert {"i32", "i64", "u64", "i1", "fp16", "bf16", "*fp32"} <= types
    assert ctypes.sizeof(ctypes.c_int) == 4  # CUresult and algo_id
