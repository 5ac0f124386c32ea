"""The fake driver itself: it must refuse what a real one refuses, or the tests that use it prove nothing."""

import ctypes

import pytest
from fake_cuda import FakeCuda, TensorMap
from helpers import (
    INVALID_CLUSTER_SIZE,
    INVALID_CONTEXT,
    INVALID_HANDLE,
    INVALID_IMAGE,
    INVALID_VALUE,
    KERNELS,
    NO_BINARY_FOR_GPU,
    NO_DEVICE,
    NOT_FOUND,
    NOT_INITIALIZED,
    SUCCESS,
)

from pyfmha.aot import Compiler, make_spec
from pyfmha.spec.arch import ARCHS

MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Driver:
    """Raw driver calls."""

    def __init__(self, fake: FakeCuda) -> None:
        self.c = fake.c

    def load(self, code: bytes) -> tuple[int, ctypes.c_void_p]:
        self.code = ctypes.create_string_buffer(code, len(code))  # the driver reads from it as long as it is loaded
        module = ctypes.c_void_p()
        return self.c.cuModuleLoadData(ctypes.byref(module), self.code), module

    def function(self, module: ctypes.c_void_p, name: str) -> tuple[int, ctypes.c_void_p]:
        function = ctypes.c_void_p()
        return self.c.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), function

    def launch(
        self,
        function: ctypes.c_void_p,
        grid: tuple[int, ...] = (1, 1, 1),
        block: tuple[int, ...] = (128, 1, 1),
        shared: int = 0,
    ) -> int:
        values = (ctypes.c_uint64 * 16)()
        params = (ctypes.c_void_p * 16)(*[ctypes.addressof(values)] * 16)
        sizes = [ctypes.c_uint(size) for size in (*grid, *block, shared)]
        return self.c.cuLaunchKernel(function, *sizes, None, params, None)


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def arch(request: pytest.FixtureRequest) -> str:
    """Two assemblers write two kinds of ELF flags."""
    return request.param


@pytest.fixture
def code(compiler: Compiler, arch: str) -> bytes:
    spec = make_spec(compiler, KERNELS / "elementwise.py", "add", "*fp32, *fp32, *fp32, i32, 128", "n")
    return compiler.compile(spec, ARCHS[arch]).code


@pytest.fixture
def driver(fake_cuda: FakeCuda, arch: str) -> Driver:
    """A driver with a current context on a device of the architecture."""
    fake_cuda.set_device(0, ARCHS[arch].capability, ARCHS[arch].shared_limit)
    assert fake_cuda.c.cuInit(0) == SUCCESS
    fake_cuda.use_context()
    return Driver(fake_cuda)


@pytest.fixture
def function(driver: Driver, code: bytes) -> ctypes.c_void_p:
    status, module = driver.load(code)
    assert status == SUCCESS
    status, found = driver.function(module, "add")
    assert status == SUCCESS
    return found


def test_it_reads_the_kernels_parameters_off_the_machine_code(
    driver: Driver, function: ctypes.c_void_p, fake_cuda: FakeCuda
) -> None:
    assert driver.launch(function) == SUCCESS

    (launch,) = fake_cuda.launches()
    assert [len(value) for value in launch.params] == [8, 8, 8, 4, 8, 8]  # X, Y, Z, n and two scratch pointers


@pytest.mark.parametrize("capability", [75, 100])
def test_code_for_another_architecture_is_refused(
    driver: Driver, code: bytes, fake_cuda: FakeCuda, capability: int
) -> None:
    fake_cuda.set_device(0, capability)

    assert driver.load(code)[0] == NO_BINARY_FOR_GPU


def test_what_is_no_machine_code_is_refused(driver: Driver, code: bytes) -> None:
    assert driver.load(b"\0" + code[1:])[0] == INVALID_IMAGE
    assert driver.load(code[:18] + b"\x3e\0" + code[20:])[0] == INVALID_IMAGE  # an ELF file for x86-64


@pytest.mark.parametrize("name", ["ad", "adder", "", ".text.add"])
def test_a_name_that_is_no_kernel_is_not_found(driver: Driver, code: bytes, name: str) -> None:
    _, module = driver.load(code)

    assert driver.function(module, name)[0] == NOT_FOUND


@pytest.mark.parametrize("grid", [(0, 1, 1), (2**31, 1, 1), (1, 65536, 1), (1, 1, 65536)])
def test_a_grid_outside_the_limits_is_refused(
    driver: Driver, function: ctypes.c_void_p, grid: tuple[int, int, int]
) -> None:
    assert driver.launch(function, grid=grid) == INVALID_VALUE


@pytest.mark.parametrize("block", [(64, 1, 1), (0, 1, 1), (1024, 2, 1)])
def test_a_block_other_than_the_kernel_was_compiled_for_is_refused(
    driver: Driver, function: ctypes.c_void_p, block: tuple[int, int, int]
) -> None:
    assert driver.launch(function, block=block) == INVALID_VALUE


def test_much_shared_memory_must_be_asked_for_first(driver: Driver, function: ctypes.c_void_p, arch: str) -> None:
    limit = ARCHS[arch].shared_limit

    assert driver.launch(function, shared=48 * 1024) == SUCCESS
    assert driver.launch(function, shared=48 * 1024 + 1) == INVALID_VALUE
    assert driver.c.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, limit + 1) == INVALID_VALUE
    assert driver.c.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, limit) == SUCCESS
    assert driver.launch(function, shared=limit) == SUCCESS


def test_a_function_of_another_context_is_refused(
    driver: Driver, function: ctypes.c_void_p, fake_cuda: FakeCuda
) -> None:
    fake_cuda.use_context()

    assert driver.launch(function) == INVALID_CONTEXT


def test_a_function_dies_with_its_module_and_its_context(driver: Driver, code: bytes, fake_cuda: FakeCuda) -> None:
    _, module = driver.load(code)
    _, first = driver.function(module, "add")
    assert driver.c.cuModuleUnload(module) == SUCCESS
    assert driver.launch(first) == INVALID_HANDLE
    assert driver.c.cuModuleUnload(module) == INVALID_HANDLE

    context = fake_cuda.use_context()
    _, second = driver.function(driver.load(code)[1], "add")
    fake_cuda.recreate(context)
    assert driver.launch(second) == INVALID_HANDLE


def test_nothing_works_before_it_is_initialised(fake_cuda: FakeCuda) -> None:
    count = ctypes.c_int()

    assert fake_cuda.c.cuDeviceGetCount(ctypes.byref(count)) == NOT_INITIALIZED
    fake_cuda.set_device_count(0)
    assert fake_cuda.c.cuInit(0) == NO_DEVICE


def test_whoever_has_a_context_has_initialised_the_driver(fake_cuda: FakeCuda) -> None:
    """A library calls cuInit once a process, so a test may not be the first of its process to pass."""
    fake_cuda.use_context()
    count = ctypes.c_int()
    assert fake_cuda.c.cuDeviceGetCount(ctypes.byref(count)) == SUCCESS


def test_a_fault_comes_after_so_many_calls_and_for_so_many(fake_cuda: FakeCuda) -> None:
    fake_cuda.fail("cuInit", 42, after=2, times=1)

    assert [fake_cuda.c.cuInit(0) for _ in range(4)] == [SUCCESS, SUCCESS, 42, SUCCESS]
    assert fake_cuda.calls("cuInit") == 4


def test_a_primary_context_lives_as_long_as_it_is_retained(fake_cuda: FakeCuda) -> None:
    fake_cuda.c.cuInit(0)
    one, two = ctypes.c_void_p(), ctypes.c_void_p()

    assert fake_cuda.c.cuDevicePrimaryCtxRetain(ctypes.byref(one), 1) == SUCCESS
    assert fake_cuda.c.cuDevicePrimaryCtxRetain(ctypes.byref(two), 1) == SUCCESS
    assert one.value == two.value

    statuses = [fake_cuda.c.cuDevicePrimaryCtxRelease_v2(1) for _ in range(3)]
    assert statuses == [SUCCESS, SUCCESS, INVALID_CONTEXT]


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("unused", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


CLUSTER, DEPENDENT = 4, 6  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, .._PROGRAMMATIC_STREAM_SERIALIZATION


class TestLaunchAttributes:
    def launch(
        self, fake_cuda: FakeCuda, function: ctypes.c_void_p, *given: tuple[int, tuple[int, ...]], status: int = SUCCESS
    ) -> None:
        """Launch a grid of 6 x 2 x 4 blocks, which must return a status."""
        values = (ctypes.c_uint64 * 16)()
        params = (ctypes.c_void_p * 16)(*[ctypes.addressof(values)] * 16)
        attributes = (_Attribute * max(len(given), 1))(
            *(_Attribute(which, 0, (ctypes.c_uint * 16)(*value)) for which, value in given)
        )
        config = _Config((6, 2, 4), (128, 1, 1), 0, None, attributes, len(given))
        assert fake_cuda.c.cuLaunchKernelEx(ctypes.byref(config), function, params, None) == status
        assert fake_cuda.launch_count() == (status == SUCCESS)

    def test_they_are_remembered(self, fake_cuda: FakeCuda, function: ctypes.c_void_p, arch: str) -> None:
        able = arch == "sm_90"
        self.launch(
            fake_cuda,
            function,
            *((DEPENDENT, (1,)), (CLUSTER, (3, 1, 2))),
            status=SUCCESS if able else INVALID_VALUE,
        )

        found = [(launch.dependent, launch.cluster, launch.grid) for launch in fake_cuda.launches()]
        assert found == [(True, (3, 1, 2), (6, 2, 4))] * able

    def test_a_launch_may_have_none(self, fake_cuda: FakeCuda, function: ctypes.c_void_p) -> None:
        self.launch(fake_cuda, function)

        (launch,) = fake_cuda.launches()
        assert (launch.dependent, launch.cluster) == (False, None)

    @pytest.mark.parametrize(
        ("which", "value", "status"),
        [
            *((CLUSTER, cluster, INVALID_VALUE) for cluster in ((0, 1, 1), (1, 0, 1), (1, 1, 0), (4, 1, 1), (1, 4, 1))),
            (CLUSTER, (6, 2, 1), INVALID_CLUSTER_SIZE),
            (5, (1, 1, 1), INVALID_VALUE),
        ],
    )
    def test_what_a_driver_refuses_is_refused(
        self, fake_cuda: FakeCuda, function: ctypes.c_void_p, which: int, value: tuple[int, ...], status: int
    ) -> None:
        self.launch(fake_cuda, function, (which, value), status=status)

    @pytest.mark.parametrize("which", [CLUSTER, DEPENDENT])
    def test_an_older_device_has_neither(
        self, fake_cuda: FakeCuda, function: ctypes.c_void_p, arch: str, which: int
    ) -> None:
        self.launch(fake_cuda, function, (which, (1, 1, 1)), status=INVALID_VALUE if arch == "sm_80" else SUCCESS)


GOOD_MAP = {
    "data_type": 6,  # fp16
    "rank": 2,
    "address": 0x1000,
    "sizes": (64, 100),
    "strides": (128,),
    "box": (64, 16),
    "steps": (1, 1),
    "swizzle": 3,
}


class TestTensorMaps:
    def encode(self, fake_cuda: FakeCuda, map_: object, **changes: object) -> int:
        given = {**GOOD_MAP, **changes}

        def array(kind: type, values: object) -> ctypes.Array[ctypes.c_uint64]:
            return (kind * 5)(*values)  # type: ignore[misc, operator, no-any-return]

        return int(
            fake_cuda.c.cuTensorMapEncodeTiled(
                map_,
                given["data_type"],
                ctypes.c_uint32(given["rank"]),
                ctypes.c_void_p(given["address"]),
                *(array(ctypes.c_uint64, given[name]) for name in ("sizes", "strides")),
                *(array(ctypes.c_uint32, given[name]) for name in ("box", "steps")),
                *(0, given["swizzle"], 2, 1),
            )
        )

    @pytest.fixture
    def map_(self) -> ctypes.c_void_p:
        """Memory for one, aligned."""
        self.memory = ctypes.create_string_buffer(256)
        return ctypes.c_void_p(-(-ctypes.addressof(self.memory) // 64) * 64)

    def test_what_it_was_told_can_be_read_back(self, fake_cuda: FakeCuda, map_: ctypes.c_void_p) -> None:
        assert self.encode(fake_cuda, map_) == SUCCESS

        assert TensorMap.read(ctypes.string_at(map_, 128)) == TensorMap(
            0x1000, False, (64, 100), (128,), (64, 16), 6, 3, 0, 2, 1
        )
        assert fake_cuda.calls("cuTensorMapEncodeTiled") == 1

    @pytest.mark.parametrize(
        "changes",
        [
            {"rank": 0},
            {"rank": 6},
            {"address": 0},
            {"address": 0x1008},
            {"sizes": (64, 0)},
            {"sizes": (64, (1 << 32) + 1)},
            {"strides": (0,)},
            {"strides": (136,)},
            {"strides": (1 << 40,)},
            {"box": (64, 0)},
            {"box": (64, 257)},
            {"box": (65, 16)},  # 130 bytes: not a multiple of 16
            {"box": (128, 16)},  # 256 bytes: wider than the swizzle's 128
            {"box": (4, 16)},
            {"steps": (1, 0)},
        ],
        ids=str,
    )
    def test_what_a_driver_refuses_is_refused(
        self, fake_cuda: FakeCuda, map_: ctypes.c_void_p, changes: dict[str, object]
    ) -> None:
        assert self.encode(fake_cuda, map_, **changes) == INVALID_VALUE

    def test_a_map_must_be_aligned(self, fake_cuda: FakeCuda, map_: ctypes.c_void_p) -> None:
        assert self.encode(fake_cuda, ctypes.c_void_p((map_.value or 0) + 32)) == INVALID_VALUE
