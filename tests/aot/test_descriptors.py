"""Tensor descriptors, conditions and architectures of one function's variants, on the fake driver.

The library holds one function, ``copy``, whose algorithm 0 tries a Gluon kernel with descriptors, a plain Triton one
with descriptors, and a kernel with pointers that serves everything; algorithm 1 has a kernel with descriptors alone.
"""

import shutil
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_cuda as fake
import pytest
from fake_cuda import FakeCuda, Launch, TensorMap
from helpers import (
    INVALID_HANDLE,
    INVALID_VALUE,
    KERNELS,
    MISALIGNED_ADDRESS,
    NO_BINARY_FOR_GPU,
    NOT_INITIALIZED,
    STRICT,
    SUCCESS,
    SYMBOL_NOT_FOUND,
    CLibrary,
    gcc,
)

from pyfmha.aot import Compiler, build
from pyfmha.aot.descriptors import described_tensors
from pyfmha.errors import SpecError
from pyfmha.operators.tactics import tactics_of
from pyfmha.spec.arch import parse_archs
from pyfmha.spec.descriptors import Descriptor, parse_descriptor
from pyfmha.spec.kernel import Argument, KernelSpec, Tuning

ARGUMENTS = tuple(
    Argument(name, kind)
    for name, kind in (
        *(("X", "*fp16"), ("Y", "*fp16")),
        *((name, "i32") for name in ("batch", "heads", "rows", "width")),
        *((f"stride_{axis}", "i64") for axis in "bhs"),
        ("scale", "fp32"),
    )
)
X, Y = 0x7000_0000, 0x7100_0000
# batch, heads, rows, width, three strides in elements, scale: [2, 3, 200, 64], contiguous.
SIZES = (2, 3, 200, 64, 38400, 12800, 64, 0.0)
CALL = (X, Y, *SIZES)


def tensor(name: str, base: str) -> Descriptor:
    strides = ("stride_b", "stride_h", "stride_s", 1)
    return Descriptor(name, base, ("batch", "heads", "rows", "width"), strides, (1, 1, "ROWS", 64))


def copy_spec(kernel: str, **changes: object) -> KernelSpec:
    spec = KernelSpec(
        source=KERNELS / "copies.py",
        kernel=kernel,
        name="copy",
        arguments=ARGUMENTS,
        constants=(("ROWS", 64),),
        grid="cdiv(rows, ROWS), heads, batch",
        algorithm_name="default",
        nullable=("X", "Y"),
    )
    if kernel != "copy_pointers":
        spec = replace(spec, descriptors=(tensor("source", "X"), tensor("target", "Y")), archs=("sm_90",))
    return replace(spec, **changes)


GLUON = copy_spec(
    "copy_gluon",
    requires=("rows >= 128", "scale == 0", "width % 8 == 0"),
    maxnreg=96,
    grid="min(num_sms, cdiv(rows, ROWS)), heads, batch",
)
BLOCKS = copy_spec("copy_blocks", requires=("width == 64",))
POINTERS = copy_spec("copy_pointers")
ALONE = replace(BLOCKS, algorithm_name="alone")
SPECS = (GLUON, BLOCKS, POINTERS, ALONE)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the library, for sm_80 and sm_90."""
    folder = tmp_path_factory.mktemp("copies")
    build(SPECS, parse_archs(["sm_80", "sm_90"]), folder, jobs=1)
    return folder


@pytest.fixture
def library(built: Path, tmp_path: Path) -> CLibrary:
    return CLibrary(Path(shutil.copy(built / "libpyfmha.so", tmp_path / "copies.so")))


@pytest.fixture
def loaded(library: CLibrary, fake_cuda: FakeCuda) -> CLibrary:
    fake_cuda.use_context()
    assert library.load("copy") == SUCCESS, library.error()
    return library


def launched(library: CLibrary, fake_cuda: FakeCuda, *arguments: float, algo_id: int = 0) -> Launch:
    """The launch that a call makes, which must be of the variant that the library names."""
    before = fake_cuda.launch_count()
    assert library.launch("copy", *arguments, algo_id=algo_id) == SUCCESS, library.error()
    assert fake_cuda.launch_count() == before + 1
    launch = fake_cuda.launches()[-1]
    status, name = library.variant("copy", *arguments, algo_id=algo_id)
    assert status == SUCCESS
    assert name is not None
    images = {i.sha256 for _, _, v in library.manifest.variants() if v.name == name for i in v.images}
    assert launch.image_sha256 in images
    return launch


def with_size(name: str, value: float) -> tuple[float, ...]:
    names = [argument.name for argument in ARGUMENTS]
    call: list[float] = list(CALL)
    call[names.index(name)] = value
    return tuple(call)


def kernel_for(library: CLibrary, fake_cuda: FakeCuda, **changes: float) -> str:
    """The kernel that a call runs, CALL but for some arguments."""
    names = [argument.name for argument in ARGUMENTS]
    call = [changes.get(name, value) for name, value in zip(names, CALL, strict=True)]
    return launched(library, fake_cuda, *call).kernel


class TestParameters:
    """What the kernel gets, byte for byte."""

    @pytest.mark.parametrize(("scale", "kernel"), [(0.0, "copy_gluon"), (2.0, "copy_blocks")])
    def test_maps_sizes_and_strides_come_before_the_arguments(
        self, loaded: CLibrary, fake_cuda: FakeCuda, scale: float, kernel: str
    ) -> None:
        launch = launched(loaded, fake_cuda, *with_size("scale", scale))

        assert launch.kernel == kernel
        one, other = launch.params[:9], launch.params[9:18]
        for params in (one, other):
            assert [len(param) for param in params] == [128, 4, 4, 4, 4, 8, 8, 8, 8]
            assert [struct.unpack("<i", p)[0] for p in params[1:5]] == [2, 3, 200, 64]
            assert [struct.unpack("<q", p)[0] for p in params[5:]] == [38400, 12800, 64, 1]
        assert launch.params[18:28] == tuple(
            struct.pack(code, value) for code, value in zip("QQiiiiqqqf", (X, Y, *SIZES[:-1], scale), strict=True)
        )
        assert set(launch.params[28:]) <= {bytes(8)}  # Triton's scratch pointers

    def test_the_map_is_made_of_the_tensor_in_the_drivers_order(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        launch = launched(loaded, fake_cuda, *CALL)

        maps = [TensorMap.read(launch.params[i]) for i in (0, 9)]
        assert [made.address for made in maps] == [X, Y]
        for made in maps:
            assert made.sizes == (64, 200, 3, 2)
            assert made.strides == (128, 25600, 76800)  # bytes
            assert made.box == (64, 64, 1, 1)
            # CU_TENSOR_MAP_DATA_TYPE_FLOAT16, _SWIZZLE_128B, _INTERLEAVE_NONE, _L2_PROMOTION_L2_256B, zeros outside
            assert (made.data_type, made.swizzle, made.interleave, made.l2_promotion, made.fill) == (6, 3, 0, 3, 0)

    @pytest.mark.parametrize(
        ("version", "rows", "small"), [(13000, 200, False), (13000, 130, True), (13020, 130, False)]
    )
    def test_maps_of_small_tensors_are_corrected_for_drivers_that_need_it(
        self, library: CLibrary, fake_cuda: FakeCuda, version: int, rows: int, small: bool
    ) -> None:
        fake_cuda.set_driver_version(version)
        fake_cuda.use_context()
        assert library.load("copy") == SUCCESS

        launch = launched(library, fake_cuda, X, Y, 2, 3, rows, 64, 3 * rows * 64, rows * 64, 64, 0.0)

        assert TensorMap.read(launch.params[0]).small is small  # 2 * 3 * rows * 64 * 2 bytes: below 128 KiB or not

    def test_registers_are_confined(self, library: CLibrary) -> None:
        (function,) = library.manifest.functions
        images = {v.name: v.images[0] for v in function.algorithms[0]}

        assert images[GLUON.variant].maxnreg == 96
        assert images[POINTERS.variant].maxnreg is None


class TestEncoding:
    """Maps are made once for each set of pointers, sizes and strides."""

    def encodes(self, fake_cuda: FakeCuda) -> int:
        return fake_cuda.calls("cuTensorMapEncodeTiled")

    def test_an_unchanged_launch_encodes_nothing(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        first = launched(loaded, fake_cuda, *CALL)
        assert self.encodes(fake_cuda) == 2

        again = [launched(loaded, fake_cuda, *CALL) for _ in range(5)]

        assert self.encodes(fake_cuda) == 2
        assert again == [first] * 5

    @pytest.mark.parametrize("name", ["X", "Y", "batch", "heads", "rows", "stride_b", "stride_h", "stride_s"])
    def test_whatever_changes_is_encoded_anew(self, loaded: CLibrary, fake_cuda: FakeCuda, name: str) -> None:
        launched(loaded, fake_cuda, *CALL)
        call = with_size(name, CALL[[a.name for a in ARGUMENTS].index(name)] + 16)

        launch = launched(loaded, fake_cuda, *call)

        assert self.encodes(fake_cuda) == 4
        made = TensorMap.read(launch.params[0]), TensorMap.read(launch.params[9])
        assert [m.address for m in made] == list(call[:2])
        assert made[0].sizes == tuple(reversed(call[2:6]))
        assert made[0].strides == tuple(2 * stride for stride in reversed(call[6:9]))

    def test_layers_that_take_turns_keep_their_maps(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        layers = [(X + 0x1000 * i, Y, *SIZES) for i in range(32)]
        for layer in layers:
            launched(loaded, fake_cuda, *layer)
        made = self.encodes(fake_cuda)

        launches = [launched(loaded, fake_cuda, *layer) for layer in layers * 2]

        assert self.encodes(fake_cuda) == made == 64
        assert [TensorMap.read(launch.params[0]).address for launch in launches] == [layer[0] for layer in layers] * 2

    def test_more_layers_than_are_kept_are_right_all_the_same(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        layers = [(X + 0x1000 * i, Y, *SIZES) for i in range(40)]

        launches = [launched(loaded, fake_cuda, *layer) for layer in layers * 2]

        assert [TensorMap.read(launch.params[0]).address for launch in launches] == [layer[0] for layer in layers] * 2

    def test_variants_do_not_take_each_others_maps(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        first = launched(loaded, fake_cuda, *CALL)
        second = launched(loaded, fake_cuda, *CALL, algo_id=1)

        assert self.encodes(fake_cuda) == 4
        assert (first.kernel, second.kernel) == ("copy_gluon", "copy_blocks")

    def test_a_failing_encode_is_reported_and_not_kept(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.fail("cuTensorMapEncodeTiled", 999, after=1, times=1)

        assert loaded.launch("copy", *CALL) == 999
        assert "cuTensorMapEncodeTiled" in loaded.error()
        assert "tensor target of copy_" in loaded.error()
        assert fake_cuda.launch_count() == 0
        assert TensorMap.read(launched(loaded, fake_cuda, *CALL).params[9]).address == Y

    def test_nothing_that_a_stream_capture_forbids_happens(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.begin_capture()

        assert loaded.launch("copy", *CALL) == SUCCESS

        assert fake_cuda.violations() == (0, "")

    def test_a_driver_without_tensor_maps_runs_what_needs_none(
        self, library: CLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = FakeCuda(fake.build(tmp_path / "libcuda_11.so", "-DFAKE_WITHOUT_TENSOR_MAPS"))
        old.reset()
        old.use_context()
        monkeypatch.setenv("PYFMHA_LIBCUDA", str(old.path))

        assert library.load("copy") == SUCCESS, library.error()
        assert old.modules_loaded() == 1
        assert kernel_for(library, old) == "copy_pointers"
        assert library.launch("copy", *CALL, algo_id=1) == NO_BINARY_FOR_GPU
        assert "that serve these arguments are for other devices or later drivers" in library.error()

    def test_a_function_of_tensor_maps_alone_is_refused_by_such_a_driver(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build([ALONE], parse_archs(["sm_90"]), tmp_path, jobs=1)
        library = CLibrary(tmp_path / "libpyfmha.so")
        old = FakeCuda(fake.build(tmp_path / "libcuda_11.so", "-DFAKE_WITHOUT_TENSOR_MAPS"))
        old.reset()
        old.use_context()
        monkeypatch.setenv("PYFMHA_LIBCUDA", str(old.path))

        assert library.load("copy") == SYMBOL_NOT_FOUND
        assert f"{ALONE.variant} makes tensor maps, which needs cuTensorMapEncodeTiled; this" in library.error()
        assert old.modules_loaded() == 0


class TestWhatTmaCannotTake:
    """It goes to the kernel with pointers."""

    @pytest.mark.parametrize(
        "changes",
        [
            *({name: base + offset} for name, base in (("X", X), ("Y", Y)) for offset in (2, 4, 8)),
            *({name: 0} for name in "XY"),
            *({f"stride_{axis}": stride} for axis in "bhs" for stride in (0, -64, 65, 68, 4, 1 << 39, -(1 << 62))),
        ],
        ids=str,
    )
    def test_it_runs_with_pointers(self, loaded: CLibrary, fake_cuda: FakeCuda, changes: dict[str, int]) -> None:
        assert kernel_for(loaded, fake_cuda, **changes) == "copy_pointers"
        assert fake_cuda.calls("cuTensorMapEncodeTiled") == 0

    def test_strides_just_below_the_limit_are_taken(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        assert kernel_for(loaded, fake_cuda, stride_b=(1 << 39) - 8) == "copy_gluon"

    @pytest.mark.parametrize("stride", [0, 1, 7, -5, 1 << 50])
    @pytest.mark.parametrize(("size", "name"), [("batch", "stride_b"), ("heads", "stride_h")])
    def test_the_stride_of_a_single_element_may_be_anything(
        self, loaded: CLibrary, fake_cuda: FakeCuda, size: str, name: str, stride: int
    ) -> None:
        assert kernel_for(loaded, fake_cuda, **{size: 1, name: stride}) == "copy_gluon"

    @pytest.mark.parametrize("name", ["batch", "heads", "rows"])
    def test_empty_tensors_launch_nothing(self, loaded: CLibrary, fake_cuda: FakeCuda, name: str) -> None:
        assert loaded.launch("copy", *with_size(name, 0)) == SUCCESS
        assert fake_cuda.launch_count() == fake_cuda.calls("cuTensorMapEncodeTiled") == 0

    @pytest.mark.parametrize(
        ("name", "value", "status", "said"),
        [
            ("X", X + 8, MISALIGNED_ADDRESS, f"the base of tensor source is {X + 8:#x}; it must be a multiple of 16"),
            ("Y", 0, MISALIGNED_ADDRESS, "the base of tensor target is 0x0"),
            ("X", X + 1, MISALIGNED_ADDRESS, f"X is {X + 1:#x}, not a multiple of 2 bytes"),
            ("heads", 0, INVALID_VALUE, "dimension 1 of tensor source has 0 elements"),
            ("heads", -3, INVALID_VALUE, "dimension 1 of tensor source has -3 elements"),
            ("stride_s", 65, INVALID_VALUE, "dimension 2 of tensor source has a stride of 65 elements of 2 bytes"),
            ("width", 63, INVALID_VALUE, "it needs width == 64, got width = 63"),
        ],
    )
    def test_without_a_next_variant_the_reason_is_said(
        self, loaded: CLibrary, fake_cuda: FakeCuda, name: str, value: int, status: int, said: str
    ) -> None:
        assert loaded.launch("copy", *with_size(name, value), algo_id=1) == status
        assert f"{ALONE.variant}: {said}" in loaded.error()
        assert loaded.variant("copy", *with_size(name, value), algo_id=1) == (status, None)
        assert fake_cuda.launch_count() == 0


class TestConditions:
    @pytest.mark.parametrize(
        ("changes", "kernel"),
        [
            ({}, "copy_gluon"),
            ({"rows": 128}, "copy_gluon"),
            ({"rows": 127}, "copy_blocks"),
            ({"scale": 1e-30}, "copy_blocks"),
            ({"scale": float("nan")}, "copy_blocks"),
            ({"scale": -0.0}, "copy_gluon"),
            ({"width": 56}, "copy_gluon"),
            ({"width": 60}, "copy_pointers"),
            ({"width": 56, "rows": 100}, "copy_pointers"),
        ],
    )
    def test_the_first_variant_whose_conditions_hold_runs(
        self, loaded: CLibrary, fake_cuda: FakeCuda, changes: dict[str, float], kernel: str
    ) -> None:
        assert kernel_for(loaded, fake_cuda, **changes) == kernel

    def test_the_manifest_shows_them(self, library: CLibrary) -> None:
        first, second, third = library.manifest.functions[0].algorithms[0]

        assert first.requires == GLUON.requires
        assert second.requires == ("width == 64",)
        assert (third.requires, third.archs, third.tensors) == ((), (), ())
        assert [v.kernel for v in (first, second, third)] == ["copy_gluon", "copy_blocks", "copy_pointers"]
        assert first.archs == ("sm_90",)
        assert first.tensors[0] == (
            "source: X[batch, heads, rows, width], strides [stride_b, stride_h, stride_s, 1], block [1, 1, 64, 64]"
        )


class TestArchitectures:
    def test_a_grid_reads_the_number_of_multiprocessors(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        few = launched(loaded, fake_cuda, *CALL)
        many = launched(loaded, fake_cuda, *with_size("rows", 64 * 133))

        assert (few.grid, many.grid) == ((4, 3, 2), (132, 3, 2))  # the fake device has 132

    @pytest.fixture
    def ampere(self, library: CLibrary, fake_cuda: FakeCuda) -> CLibrary:
        fake_cuda.set_device(0, 86, 101376)
        fake_cuda.use_context()
        assert library.load("copy") == SUCCESS, library.error()
        return library

    def test_a_device_passes_over_variants_for_others(self, ampere: CLibrary, fake_cuda: FakeCuda) -> None:
        assert fake_cuda.modules_loaded() == 1
        assert kernel_for(ampere, fake_cuda) == "copy_pointers"

    def test_an_algorithm_for_other_devices_is_an_error_that_says_so(
        self, ampere: CLibrary, fake_cuda: FakeCuda
    ) -> None:
        assert ampere.launch("copy", *CALL, algo_id=1) == NO_BINARY_FOR_GPU
        assert "algorithm 1 that serve these arguments are for other devices" in ampere.error()
        assert ampere.variant("copy", *CALL, algo_id=1) == (NO_BINARY_FOR_GPU, None)

    def test_loads_are_counted_all_the_same(self, ampere: CLibrary, fake_cuda: FakeCuda) -> None:
        assert ampere.load("copy") == SUCCESS
        assert [ampere.unload("copy"), ampere.unload("copy")] == [SUCCESS, SUCCESS]
        assert fake_cuda.modules_loaded() == 0
        assert ampere.unload("copy") == INVALID_HANDLE

    def test_each_device_runs_its_own_variant(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.set_device(1, 80, 166912)
        contexts = [fake_cuda.use_context(device) for device in (0, 1)]
        for context in contexts:
            fake_cuda.make_current(context)
            assert library.load("copy") == SUCCESS

        kernels = []
        for context in (*contexts, *contexts):
            fake_cuda.make_current(context)
            kernels.append(kernel_for(library, fake_cuda))

        assert kernels == ["copy_gluon", "copy_pointers"] * 2

    def test_before_loading_a_needed_variant_is_named(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        assert library.variant("copy", *CALL) == (SUCCESS, POINTERS.variant)  # without a driver: the rest is unknown
        fake_cuda.use_context()

        assert library.launch("copy", *CALL) == NOT_INITIALIZED
        assert "load_copy()" in library.error()

    def test_one_context_lookup_serves_a_launch(self, loaded: CLibrary, fake_cuda: FakeCuda) -> None:
        before = [fake_cuda.calls(name) for name in ("cuCtxGetCurrent", "cuCtxGetId")]

        assert loaded.launch("copy", *CALL) == SUCCESS

        assert [fake_cuda.calls(name) for name in ("cuCtxGetCurrent", "cuCtxGetId")] == [n + 1 for n in before]

    def test_a_library_for_other_architectures_leaves_variants_out(self, tmp_path: Path) -> None:
        result = build((GLUON, POINTERS), parse_archs(["sm_80"]), tmp_path, jobs=1)

        assert [v.name for _, _, v in result.manifest.variants()] == [POINTERS.variant]

    def test_a_library_of_nothing_else_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SpecError, match=r"no spec is for sm_80; build for another architecture: --arch sm_90$"):
            build((GLUON,), parse_archs(["sm_80"]), tmp_path, jobs=1)

    def test_a_function_without_code_for_the_device_cannot_be_loaded(self, tmp_path: Path, fake_cuda: FakeCuda) -> None:
        build((ALONE,), parse_archs(["sm_80", "sm_90"]), tmp_path, jobs=1)
        library = CLibrary(tmp_path / "libpyfmha.so")
        fake_cuda.set_device(0, 80)
        fake_cuda.use_context()

        assert library.load("copy") == NO_BINARY_FOR_GPU
        assert "sm_90, not for device 0, which is sm_80" in library.error()
        assert library.manifest.archs() == ("sm_90",)

    def test_the_library_is_for_the_architectures_that_every_algorithm_has(self, library: CLibrary) -> None:
        default = replace(library.manifest.functions[0], algorithms=library.manifest.functions[0].algorithms[:1])

        assert replace(library.manifest, functions=(default,)).archs() == ("sm_80", "sm_90")
        assert library.manifest.archs() == ("sm_90",)  # algorithm 1 has no code for others

    def test_a_tactic_runs_where_an_algorithm_has_the_code_that_it_needs(self, library: CLibrary) -> None:
        default, alone = tactics_of(library.manifest.functions[0])

        assert [[tactic.runs_on(sm) for sm in (75, 80, 86, 90, 100)] for tactic in (default, alone)] == [
            [False, True, True, True, False],
            [False, False, False, True, False],
        ]


def test_the_generated_c_is_strict(built: Path, tmp_path: Path) -> None:
    more = ["-Wshadow", "-Wstrict-prototypes", "-Wmissing-prototypes", "-Wformat=2", "-Wundef", "-Wpointer-arith"]

    done = gcc(*STRICT, *more, "-O2", "-shared", "-fPIC", *(built / "c").glob("*.c"), "-o", tmp_path / "o.so", "-ldl")

    assert (done.returncode, done.stderr) == (0, "")


class TestCompiling:
    def test_parameters_in_another_order_than_the_kernels_are_refused(self, compiler: Compiler) -> None:
        turned = replace(BLOCKS, descriptors=BLOCKS.descriptors[::-1])

        with pytest.raises(
            SpecError, match=r"takes source, target, X, .* in this order; the spec gives target, source"
        ):
            compiler.compile(turned, *parse_archs(["sm_90"]))

    def test_descriptors_made_on_the_device_are_refused_still(self, compiler: Compiler, tmp_path: Path) -> None:
        file = tmp_path / "device.py"
        file.write_text(
            "import triton\nimport triton.language as tl\n@triton.jit\ndef f(X, n):\n"
            "    made = tl.make_tensor_descriptor(X, [n, 64], [64, 1], [64, 64])\n"
            "    made.store([64, 0], made.load([0, 0]))\n"
        )
        spec = KernelSpec(file, "f", "f", (Argument("X", "*fp16", 16), Argument("n", "i32")), (), "1")

        with pytest.raises(Exception, match=r"bytes of global scratch a block"):
            compiler.compile(spec, *parse_archs(["sm_90"]))


TYPES = {"X": "*fp16", "D": "*fp64", "n": "i32", "s": "i64", "x": "fp32"}
GOOD = Descriptor("d", "X", ("n", 64), ("s", 1), (64, 64))


class TestParsing:
    def parse(self, descriptor: Descriptor) -> object:
        return parse_descriptor(descriptor, TYPES, frozenset({"n", "s"}), {"B": 64, "F": 1.5})

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"shape": ("n * 2", "max(n, 64)")},
            {"block": ("B", "2 * B")},
            {"strides": ("s + 8", "1")},
            {"shape": ("n",), "strides": (1,), "block": (256,)},
            {"shape": ("n",) * 5, "strides": ("s",) * 4 + (1,), "block": (1, 1, 1, 1, 8)},
            {"parts": 3},
        ],
    )
    def test_what_is_allowed(self, changes: dict[str, Any]) -> None:
        self.parse(replace(GOOD, **changes))

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"base": "Z"}, "its base 'Z' is no pointer argument"),
            ({"base": "n"}, "its base 'n' is no pointer argument"),
            ({"base": "D"}, "D points to fp64; allowed are fp16, bf16"),
            ({"shape": ("n",)}, "has 1 sizes, 2 strides and 2 block sizes; give 1 to 5 of each"),
            ({"shape": (), "strides": (), "block": ()}, "has 0 sizes"),
            ({"shape": ("n",) * 6, "strides": (1,) * 6, "block": (8,) * 6}, "has 6 sizes"),
            ({"strides": (1, "s")}, "its last stride is 's'; TMA needs 1 there"),
            ({"block": (64, 4)}, "the last block size 4 is below 16 bytes"),
            ({"block": (48, 64)}, "block size 48 is 48; use powers of two"),
            ({"block": (0, 64)}, "block size 0 is 0; use powers of two"),
            ({"block": ("n", 64)}, "'n' is no integer argument or constant"),
            ({"block": ("F", 64)}, "F is the constant 1.5, not an integer"),
            ({"shape": ("n", "x")}, "'x' is no integer argument"),
            ({"shape": ("n +", 64)}, "'n \\+' is not an expression"),
            ({"shape": ("num_sms", 64)}, "'num_sms' is no integer argument"),
            ({"parts": 5}, r"5 parts of block \[64, 64\]; TMA moves 1 to 256 rows at a time"),
            ({"parts": 0}, "0 parts of block"),
            ({"shape": ("n",), "strides": (1,), "block": (64,), "parts": 2}, "2 parts of block"),
        ],
    )
    def test_what_is_refused(self, changes: dict[str, Any], said: str) -> None:
        with pytest.raises(SpecError, match=f"descriptor d.*{said}"):
            self.parse(replace(GOOD, **changes))


class TestSpecs:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"archs": ()}, "tensor descriptors need sm_90 or later, and archs to say so"),
            ({"archs": ("sm_89", "sm_90")}, "tensor descriptors need sm_90 or later"),
            ({"archs": ("sm_91",)}, "archs names 'sm_91'; use some of sm_80"),
            ({"maxnreg": 256}, "maxnreg is 256; use 8 to 255"),
            ({"maxnreg": True}, "maxnreg is True"),
            ({"requires": ("rows => 1",)}, "copy: condition 'rows => 1' is not an expression"),
            ({"descriptors": (tensor("X", "X"),)}, "argument X is given more than once"),
            ({"descriptors": tuple(tensor(f"d{i}", "X") for i in range(7))}, "has 7 descriptors; at most 6"),
        ],
    )
    def test_what_is_refused(self, changes: dict[str, object], said: str) -> None:
        with pytest.raises(SpecError, match=said):
            replace(GLUON, **changes)

    def test_sizes_cannot_depend_on_what_is_tuned_but_blocks_can(self) -> None:
        tuned = (Tuning("sm_90", (("ROWS", 128),), 8, 2, 64),)
        changed = replace(GLUON, tunings=tuned).resolve("sm_90")

        assert (changed.tensors[0].block, changed.maxnreg) == ((1, 1, 128, 64), 64)
        sized = replace(tensor("source", "X"), shape=("batch", "heads", "rows * ROWS", "width"))
        with pytest.raises(SpecError, match="sizes and strides of descriptor source depend on a constant that"):
            replace(GLUON, descriptors=(sized,), tunings=tuned)

    def test_everything_new_is_part_of_the_name(self) -> None:
        changed = [
            replace(POINTERS, requires=("rows > 1",)),
            replace(POINTERS, requires=("rows > 2",)),
            replace(POINTERS, archs=("sm_90",)),
            replace(POINTERS, maxnreg=64),
            replace(GLUON, descriptors=GLUON.descriptors[:1]),
            *SPECS,
        ]

        assert len({spec.variant for spec in changed}) == len({spec.digest for spec in changed}) == len(changed)
        assert [spec.unconditional for spec in SPECS] == [False, False, True, False]
        assert "_tma_" in GLUON.variant
        assert "_special_" in changed[0].variant


@pytest.mark.parametrize(("parts", "box"), [(1, [1, 1, 32, 64]), (3, [1, 1, 96, 64])])
def test_a_copy_moves_all_parts_of_a_box(parts: int, box: list[int]) -> None:
    meta = {"block_size": [1, 1, 32, 64], "elem_size": 2, "elem_type": 6, "swizzle": 3}
    asked = {"name": "k_desc", "item_size": 2, "block": [1, 1, 32, 64], "parts": parts}

    (found,) = described_tensors(SimpleNamespace(tensordesc_meta=[meta]), [asked])

    assert found == {"swizzle": 3, "data_type": 6, "box": box}
    assert meta["block_size"] == [1, 1, 32, 64], "Triton's own is left as it is"
