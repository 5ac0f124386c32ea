"""Fixtures: the fake CUDA driver, and a small library built once from the kernels in ``tests/kernels``."""

import ctypes
import os

# Before numpy is there. Matrices are small here, and the tests' processes as many as there are processors; and sums are
# then the same on any number of those.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Before anything imports Triton: in this process kernels run under its interpreter. Compiling is not affected: it
# happens in worker processes whose environment is cleared of Triton's variables.
os.environ.setdefault("TRITON_INTERPRET", "1")

import shutil
from collections.abc import Iterator
from pathlib import Path

import cc_once
import fake_cuda as fake
import pytest
from fake_cuda import FakeCuda
from helpers import KERNELS, CLibrary
from hypothesis import settings
from shared import Shared

from pyfmha.aot import Compiler, compile_kernel, link, make_spec
from pyfmha.spec.arch import parse_archs

# Plugins of the tests that some test files import too: whichever comes first.
pytest.register_assert_rewrite("described", "plugin_host", "trt_double", "verify_standins")

settings.register_profile("pyfmha", derandomize=True, deadline=None)
settings.load_profile("pyfmha")


def why_no_gpu() -> str | None:
    """Why GPU tests cannot run here, asked of the driver itself; None where they can."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"no CUDA driver: {error}"
    if status := driver.cuInit(0):
        return f"the CUDA driver does not start: error {status}"
    count = ctypes.c_int()
    if (status := driver.cuDeviceGetCount(ctypes.byref(count))) or count.value == 0:
        return f"the CUDA driver sees no GPU (status {status})"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = why_no_gpu() if marked else None
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """What all processes of the run make once."""
    return Shared.of(tmp_path_factory)


@pytest.fixture(scope="session", autouse=True)
def compiler_on_the_path(shared: Shared) -> Iterator[None]:
    """For builds of the tests, and of processes that they start, `cc` compiles each C file once a run."""
    path, compiler = os.environ.get("PATH", ""), shutil.which("cc")
    if compiler:
        os.environ["PATH"] = os.pathsep.join([str(cc_once.install(shared.folder("cc"), compiler)), path])
    yield
    os.environ["PATH"] = path


@pytest.fixture(scope="session")
def fake_driver(shared: Shared) -> FakeCuda:
    """The fake driver, compiled; tests take ``fake_cuda``, which is reset for each."""
    return FakeCuda(shared.once("fake_cuda", lambda folder: fake.build(folder / "libcuda.so.1")))


@pytest.fixture
def fake_cuda(fake_driver: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Two fake sm_90 devices; no context is current."""
    fake_driver.reset()
    monkeypatch.setenv("PYFMHA_LIBCUDA", str(fake_driver.path))
    yield fake_driver
    fake_driver.reset()


@pytest.fixture(scope="session")
def compiler() -> Iterator[Compiler]:
    """One compiler process for the whole session: it imports Triton once. It also remembers the kernel files it saw, so
    a test that changes a file makes a compiler of its own."""
    with Compiler(jobs=1) as running:
        yield running


# Function, kernel file, kernel, signature, grid. Hints change the code of `add`: it then moves four numbers at a time.
SMALL_LIBRARY = (
    ("add", "elementwise.py", "add", "*fp32:16, *fp32:16, *fp32:16, i32:16, 1024", "cdiv(n, BLOCK)"),
    ("add", "elementwise.py", "add", "*fp32:16, *fp32:16, *fp32:16, i32:16, 512", "cdiv(n, BLOCK)"),
    ("subtract", "elementwise.py", "subtract", "*fp32:16, *fp32:16, *fp32:16, i32:16, 1024", "cdiv(n, BLOCK)"),
    (
        "scalars",
        "elementwise.py",
        "scalars",
        "*fp64:16, fp16, bf16, fp32, fp64, i1, i8, i16, i64, u8, u16, u64, i32",
        "n",
    ),
    (
        "many",
        "elementwise.py",
        "many",
        f"*fp32:16, *fp32:16, {'*fp32, ' * 8}*fp32:16, i32:16, i32, 128",
        "cdiv(n, BLOCK)",
    ),
    ("hints", "elementwise.py", "hinted", "*i32:16, i32, i32:16, i32:1, 128", "cdiv(n, BLOCK)"),
    (
        "words",
        "elementwise.py",
        "words",
        "*fp32:16, i32, i32, i32, i32, i32, i32, i32, fp16, i32, i32, i32, 128",
        "cdiv(stream, BLOCK)",
    ),
    ("volume", "elementwise.py", "volume", "*i64, i64, i64, i64", "a, b, c"),
    ("surface", "elementwise.py", "volume", "*i64, i64, i64, i64", "a * b, b / c"),
    (
        "product",
        "matrix.py",
        "product",
        "*fp16:16, *fp16:16, *fp32:16, i32:16, i32:16, 128, 64, 64",
        "n / 128, n / BLOCK_N",
    ),
)
SMALL_ARCHS = ("sm_80", "sm_90")


@pytest.fixture(scope="session")
def small_library_headers(compiler: Compiler, shared: Shared) -> list[Path]:
    """The headers of every variant of the small library, in order; its C sources lie beside them."""

    def make(folder: Path) -> Path:
        headers = []
        for name, file, kernel, signature, grid in SMALL_LIBRARY:
            spec = make_spec(compiler, KERNELS / file, kernel, signature, grid, name=name)
            headers += compile_kernel(compiler, spec, parse_archs(SMALL_ARCHS), folder / name)
        order = folder / "order.txt"
        order.write_text("\n".join(map(str, headers)))
        return order

    return [Path(line) for line in shared.once("small_library_c", make).read_text().splitlines()]


@pytest.fixture(scope="session")
def small_library_path(small_library_headers: list[Path], shared: Shared) -> Path:
    """The small library; its manifest lies beside it."""

    def make(folder: Path) -> Path:
        link(small_library_headers, folder / "libsmall")
        return folder / "libsmall.so"

    return shared.once("small_library", make)


@pytest.fixture
def library(small_library_path: Path, tmp_path: Path) -> CLibrary:
    """The small library in a fresh state: a copy, so that its driver is not open and nothing is loaded."""
    return CLibrary(Path(shutil.copy(small_library_path, tmp_path / "libfresh.so")))
