"""Thread-block clusters: how kernels that ask for them are launched, and where others take their place."""

import shutil
import struct
from dataclasses import replace
from pathlib import Path

import fake_cuda as fake
import pytest
from fake_cuda import FakeCuda, Launch
from helpers import (
    INVALID_VALUE,
    KERNELS,
    LAUNCH_FAILED,
    NO_BINARY_FOR_GPU,
    NOT_SUPPORTED,
    SUCCESS,
    SYMBOL_NOT_FOUND,
    CLibrary,
)

from pyfmha.aot import Compiler, compile_kernel, link
from pyfmha.aot.handover import read_handover
from pyfmha.errors import SpecError
from pyfmha.spec.arch import parse_archs
from pyfmha.spec.kernel import Argument, KernelSpec

pytest.importorskip("triton")

ALONE = KernelSpec(
    source=KERNELS / "dependent.py",
    kernel="follow",
    name="alone",
    arguments=(Argument("X", "*fp32"), Argument("Y", "*fp32"), Argument("n", "i32")),
    constants=(("BLOCK", 128), ("PDL", False)),
    grid="cdiv(n, BLOCK), 2, 3",
    archs=("sm_90",),
    cluster=True,
    algorithm_name="default",
)
GROUP = replace(
    ALONE, name="group", constants=(("BLOCK", 128), ("PDL", True)), programmatic_dependent_launch=True, num_warps=2
)
PORTABLE = replace(ALONE, name="group", archs=(), cluster=False)
X, Y, STREAM = 0x7000_0000, 0x7000_1000, 0xABC0


@pytest.fixture(scope="module")
def headers(compiler: Compiler, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Those of ``group``, in clusters or not, and of ``alone``, which has nothing but clusters."""
    folder, archs = tmp_path_factory.mktemp("cluster"), parse_archs(["sm_80", "sm_90"])
    specs = (GROUP, PORTABLE, ALONE)
    return [h for spec in specs for h in compile_kernel(compiler, spec, archs, folder / spec.name)]


@pytest.fixture(scope="module")
def library_path(headers: list[Path]) -> Path:
    """Both functions, for an architecture that has clusters and one that does not."""
    path = headers[0].with_name("libcluster")
    link(headers, path)
    return path.with_suffix(".so")


@pytest.fixture
def library(library_path: Path, tmp_path: Path) -> CLibrary:
    return CLibrary(Path(shutil.copy(library_path, tmp_path / "libfresh.so")))


@pytest.fixture
def loaded(library: CLibrary, fake_cuda: FakeCuda) -> CLibrary:
    fake_cuda.use_context()
    assert [library.load(name) for name in ("group", "alone")] == [SUCCESS, SUCCESS], library.error()
    return library


def driver_with(flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Another driver, whose device 0 has a current context."""
    other = FakeCuda(fake.build(tmp_path / "libcuda_other.so", flag))
    other.reset()
    other.use_context()
    monkeypatch.setenv("PYFMHA_LIBCUDA", str(other.path))
    return other


def launched(library: CLibrary, cuda: FakeCuda, name: str = "group", n: int = 300) -> Launch:
    """The only launch of a function that is loaded."""
    assert library.launch(name, X, Y, n, stream=STREAM) == SUCCESS, library.error()
    (launch,) = cuda.launches()
    return launch


class TestLaunch:
    @pytest.mark.parametrize(("n", "blocks"), [(1, 1), (129, 2), (300, 3), (1000, 8), (1024, 8)])
    def test_the_blocks_along_x_are_a_cluster(self, loaded: CLibrary, fake_cuda: FakeCuda, n: int, blocks: int) -> None:
        launch = launched(loaded, fake_cuda, "alone", n)

        assert (launch.cluster, launch.grid, launch.dependent) == ((blocks, 1, 1), (blocks, 2, 3), False)
        assert (launch.kernel, launch.block, launch.shared) == ("follow", (128, 1, 1), 0)
        assert (launch.stream, launch.device) == (STREAM, 0)
        assert launch.params[:3] == (struct.pack("<Q", X), struct.pack("<Q", Y), struct.pack("<i", n))
        assert (fake_cuda.calls("cuLaunchKernelEx"), fake_cuda.calls("cuLaunchKernel")) == (1, 0)

    def test_it_may_start_before_the_kernel_before_it_has_ended(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        launch = launched(loaded, fake_cuda)

        assert (launch.cluster, launch.dependent, launch.block) == ((3, 1, 1), True, (64, 1, 1))
        assert fake_cuda.calls("cuLaunchKernelEx") == 1

    def test_who_forgoes_that_keeps_the_cluster(
        self, library: CLibrary, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PYFMHA_PDL", "0")
        fake_cuda.use_context()
        assert library.load("group") == SUCCESS

        launch = launched(library, fake_cuda)

        assert (launch.cluster, launch.dependent, launch.block) == ((3, 1, 1), False, (64, 1, 1))

    def test_a_driver_that_could_not_capture_that_takes_the_cluster(
        self, library: CLibrary, fake_cuda: FakeCuda
    ) -> None:
        fake_cuda.set_driver_version(12020)
        fake_cuda.use_context()
        assert library.load("group") == SUCCESS

        launch = launched(library, fake_cuda)

        assert (launch.cluster, launch.dependent) == ((3, 1, 1), False)

    def test_a_stream_may_be_captured(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.begin_capture()

        launch = launched(loaded, fake_cuda)

        assert fake_cuda.violations() == (0, "")
        assert (launch.cluster, launch.dependent) == ((3, 1, 1), True)

    def test_an_empty_grid_launches_nothing(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        assert loaded.launch("group", X, Y, 0) == SUCCESS
        assert fake_cuda.launch_count() == 0

    @pytest.mark.parametrize(("n", "blocks"), [(1025, 9), (2**31 - 1, 1 << 24)])
    def test_more_blocks_than_a_cluster_takes_are_an_error(
        self, loaded: CLibrary, fake_cuda: FakeCuda, n: int, blocks: int
    ) -> None:
        assert loaded.launch("group", X, Y, n) == INVALID_VALUE
        assert f"grid x is {blocks}, allowed is 0 to 8, the blocks of a cluster" in loaded.error()
        assert fake_cuda.calls("cuLaunchKernelEx") == 0

    @pytest.mark.parametrize("status", [LAUNCH_FAILED, NOT_SUPPORTED])
    def test_a_failure_is_reported(self, loaded: CLibrary, fake_cuda: FakeCuda, status: int) -> None:
        fake_cuda.fail("cuLaunchKernelEx", status)

        assert loaded.launch("alone", X, Y, 300) == status
        assert (
            f"cuLaunchKernelEx failed for alone_128_w4s3_special_{ALONE.digest}: CUDA error {status}" in loaded.error()
        )
        assert fake_cuda.calls("cuLaunchKernelEx") == 1


class TestRefusedDependentLaunch:
    """It is a wish: a kernel that the driver does not launch so is launched without."""

    def test_the_cluster_stays(self, library: CLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        driver = driver_with("-DFAKE_REFUSES_DEPENDENT_LAUNCH", tmp_path, monkeypatch)
        assert library.load("group") == SUCCESS

        launch = launched(library, driver)

        assert (launch.cluster, launch.dependent, launch.grid) == ((3, 1, 1), False, (3, 2, 3))
        assert launch.params[:3] == (struct.pack("<Q", X), struct.pack("<Q", Y), struct.pack("<i", 300))
        assert driver.calls("cuLaunchKernelEx") == 2

    def test_what_fails_without_it_too_is_reported(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.fail("cuLaunchKernelEx", NOT_SUPPORTED)

        assert loaded.launch("group", X, Y, 300) == NOT_SUPPORTED
        assert f"cuLaunchKernelEx failed for {GROUP.variant}: CUDA error 801" in loaded.error()
        assert (fake_cuda.calls("cuLaunchKernelEx"), fake_cuda.launch_count()) == (2, 0)

    def test_other_failures_are_not_tried_again(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.fail("cuLaunchKernelEx", LAUNCH_FAILED, times=1)

        assert loaded.launch("group", X, Y, 300) == LAUNCH_FAILED
        assert fake_cuda.calls("cuLaunchKernelEx") == 1


class TestWithout:
    """Where there are no clusters, the algorithm's next variant runs."""

    def test_another_device(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.set_device(0, 80, 166912)
        fake_cuda.use_context()
        assert library.load("group") == SUCCESS

        launch = launched(library, fake_cuda, n=5000)

        assert (launch.cluster, launch.grid, launch.block) == (None, (40, 2, 3), (128, 1, 1))
        assert library.load("alone") == NO_BINARY_FOR_GPU
        assert "holds code for sm_90, not for device 0, which is sm_80" in library.error()

    def test_a_driver_without_launch_attributes(
        self, library: CLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = driver_with("-DFAKE_WITHOUT_LAUNCH_ATTRIBUTES", tmp_path, monkeypatch)
        assert [library.load("group"), library.load("group")] == [SUCCESS, SUCCESS], library.error()

        launch = launched(library, old, n=5000)

        assert (launch.cluster, launch.grid, launch.block) == (None, (40, 2, 3), (128, 1, 1))
        assert launch.image_sha256 == library.image(PORTABLE.variant, "sm_90")
        assert library.variant("group", X, Y, 5000) == (SUCCESS, PORTABLE.variant)
        assert [library.unload("group"), library.unload("group")] == [SUCCESS, SUCCESS]
        assert old.modules_loaded() == 0

    def test_a_function_that_such_a_driver_can_run_nothing_of(
        self, library: CLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = driver_with("-DFAKE_WITHOUT_LAUNCH_ATTRIBUTES", tmp_path, monkeypatch)

        assert library.load("alone") == SYMBOL_NOT_FOUND
        assert f"{ALONE.variant} is launched in clusters, which needs cuLaunchKernelEx; this" in library.error()
        assert "(version 13000) has no such function: install one of CUDA 12 or later" in library.error()
        assert old.modules_loaded() == 0

    def test_what_fails_to_load_is_not_passed_over(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.use_context()
        fake_cuda.fail("cuModuleLoadData", NO_BINARY_FOR_GPU, times=1)

        assert library.load("group") == NO_BINARY_FOR_GPU
        assert f"cuModuleLoadData failed for {GROUP.variant}" in library.error()
        assert fake_cuda.modules_loaded() == 0


class TestSpec:
    def test_the_manifest_says_which_images_are_launched_so(self, library: CLibrary) -> None:
        found = {
            (variant.name, image.arch): (image.cluster, image.dependent)
            for _, _, variant in library.manifest.variants()
            for image in variant.images
        }

        assert found == {
            (GROUP.variant, "sm_90"): (True, True),
            (PORTABLE.variant, "sm_80"): (False, False),
            (PORTABLE.variant, "sm_90"): (False, False),
            (ALONE.variant, "sm_90"): (True, False),
        }

    def test_it_is_handed_over_to_the_linker(self, headers: list[Path]) -> None:
        read = [read_handover(header).spec for header in headers]

        assert read == [replace(spec, source=Path("dependent.py")) for spec in (GROUP, PORTABLE, ALONE)]

    def test_it_is_part_of_the_variants_name(self) -> None:
        assert ALONE.variant != replace(ALONE, cluster=False).variant
        assert GROUP.variant != replace(GROUP, cluster=False).variant
        assert ALONE.generic().cluster

    @pytest.mark.parametrize("value", [1, 8, "yes", None])
    def test_it_is_true_or_false(self, value: object) -> None:
        with pytest.raises(SpecError, match=f"alone: cluster is {value!r}; use True or False"):
            replace(ALONE, cluster=value)

    @pytest.mark.parametrize("archs", [(), ("sm_80",), ("sm_90", "sm_89")])
    def test_it_is_for_architectures_that_have_clusters(self, archs: tuple[str, ...]) -> None:
        with pytest.raises(SpecError, match="alone: clusters need sm_90 or later, and archs to say so"):
            replace(ALONE, archs=archs)

    def test_later_architectures_have_them(self) -> None:
        assert replace(ALONE, archs=("sm_90", "sm_100", "sm_120")).cluster
