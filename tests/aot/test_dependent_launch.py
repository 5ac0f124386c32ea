"""Programmatic dependent launch: how such kernels are launched, and what decoding's machine code makes of it."""

import importlib.util
import re
import shutil
import struct
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import fake_cuda as fake
import pytest
from fake_cuda import FakeCuda, Launch
from helpers import KERNELS, LAUNCH_FAILED, STRICT, SUCCESS, CLibrary, gcc

from pyfmha.aot import Compiler, compile_kernel, link
from pyfmha.aot.cubin import Cubin
from pyfmha.aot.emit_c import TEMPLATES
from pyfmha.attention.decode import Decode
from pyfmha.errors import CompileError, SpecError
from pyfmha.spec.arch import ARCHS, parse_archs
from pyfmha.spec.kernel import Argument, KernelSpec, Tuning

pytest.importorskip("triton")

FOLLOW = KernelSpec(
    source=KERNELS / "dependent.py",
    kernel="follow",
    name="follow",
    arguments=(Argument("X", "*fp32"), Argument("Y", "*fp32"), Argument("n", "i32")),
    constants=(("BLOCK", 128), ("PDL", False)),
    grid="cdiv(n, BLOCK), 2, 3",
    tunings=(Tuning("sm_90", (("PDL", True),), 2, 1),),
    programmatic_dependent_launch=True,
)
PLAIN = replace(FOLLOW, name="plain", programmatic_dependent_launch=False)
X, Y, STREAM = 0x7000_0000, 0x7000_1000, 0xABC0
REGISTERS_OF_SM = 65536
SHARED_OF_SM = 233472


@pytest.fixture(scope="module")
def library_path(compiler: Compiler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both functions, for an architecture that has dependent launch and one that does not."""
    folder = tmp_path_factory.mktemp("dependent")
    archs = parse_archs(["sm_80", "sm_90"])
    headers = [h for spec in (FOLLOW, PLAIN) for h in compile_kernel(compiler, spec, archs, folder / spec.name)]
    link(headers, folder / "libdependent")
    return folder / "libdependent.so"


@pytest.fixture
def library(library_path: Path, tmp_path: Path) -> CLibrary:
    return CLibrary(Path(shutil.copy(library_path, tmp_path / "libfresh.so")))


def launched(library: CLibrary, cuda: FakeCuda, name: str = "follow") -> Launch:
    """The launch of a function on a fresh device 0."""
    cuda.use_context()
    assert library.load(name) == SUCCESS, library.error()
    assert library.launch(name, X, Y, 300, stream=STREAM) == SUCCESS, library.error()
    (launch,) = cuda.launches()
    assert cuda.calls("cuLaunchKernelEx") == launch.dependent
    return launch


class TestLaunch:
    def test_the_kernel_gets_all_that_it_does_otherwise(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        launch = launched(library, fake_cuda)

        assert launch.dependent
        assert (launch.kernel, launch.grid, launch.block) == ("follow", (3, 2, 3), (64, 1, 1))
        assert (launch.shared, launch.stream, launch.device) == (0, STREAM, 0)
        assert launch.params[:3] == (struct.pack("<Q", X), struct.pack("<Q", Y), struct.pack("<i", 300))

    def test_others_are_launched_as_ever(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        assert not launched(library, fake_cuda, "plain").dependent
        assert fake_cuda.calls("cuFuncSetAttribute") == 0

    def test_an_older_device_launches_it_as_ever(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.set_device(0, 80, 166912)

        launch = launched(library, fake_cuda)

        assert not launch.dependent
        assert (launch.grid, launch.block) == ((3, 2, 3), (128, 1, 1))

    def test_an_sm_need_not_change_over_between_it_and_what_it_follows(
        self, library: CLibrary, fake_cuda: FakeCuda
    ) -> None:
        launched(library, fake_cuda)

        assert fake_cuda.calls("cuFuncSetAttribute") == 1  # the carve-out of shared memory

    def test_a_stream_may_be_captured(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.use_context()
        assert library.load("follow") == SUCCESS
        fake_cuda.begin_capture()

        assert library.launch("follow", X, Y, 300, stream=STREAM) == SUCCESS

        assert fake_cuda.violations() == (0, "")
        assert [launch.dependent for launch in fake_cuda.launches()] == [True]

    def test_a_failure_is_reported(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.use_context()
        assert library.load("follow") == SUCCESS
        fake_cuda.fail("cuLaunchKernelEx", LAUNCH_FAILED)

        assert library.launch("follow", X, Y, 300) == LAUNCH_FAILED
        assert "cuLaunchKernelEx failed for follow_generic_" in library.error()

    def test_an_empty_grid_launches_nothing(self, library: CLibrary, fake_cuda: FakeCuda) -> None:
        fake_cuda.use_context()
        assert library.load("follow") == SUCCESS

        assert library.launch("follow", X, Y, 0) == SUCCESS
        assert fake_cuda.launch_count() == 0


class TestWithout:
    """Where it is not to be had or not wanted, the kernel is launched as ever."""

    def test_a_driver_that_has_no_launch_attributes(
        self, library: CLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = FakeCuda(fake.build(tmp_path / "libcuda_11.so", "-DFAKE_WITHOUT_LAUNCH_ATTRIBUTES"))
        old.reset()
        monkeypatch.setenv("PYFMHA_LIBCUDA", str(old.path))

        assert not launched(library, old).dependent

    @pytest.mark.parametrize(("version", "dependent"), [(12020, False), (12030, True)])
    def test_a_driver_that_could_not_capture_it(
        self, library: CLibrary, fake_cuda: FakeCuda, version: int, dependent: bool
    ) -> None:
        fake_cuda.set_driver_version(version)

        assert launched(library, fake_cuda).dependent == dependent

    def test_a_driver_that_refuses_it(self, library: CLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        other = FakeCuda(fake.build(tmp_path / "libcuda_other.so", "-DFAKE_REFUSES_DEPENDENT_LAUNCH"))
        other.reset()
        other.use_context()
        monkeypatch.setenv("PYFMHA_LIBCUDA", str(other.path))
        assert library.load("follow") == SUCCESS

        assert library.launch("follow", X, Y, 300) == SUCCESS, library.error()

        assert [(launch.dependent, launch.grid) for launch in other.launches()] == [(False, (3, 2, 3))]

    @pytest.mark.parametrize(("wish", "dependent"), [("0", False), ("1", True), ("", True)])
    def test_the_user_may_forgo_it(
        self, library: CLibrary, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, wish: str, dependent: bool
    ) -> None:
        monkeypatch.setenv("PYFMHA_PDL", wish)

        assert launched(library, fake_cuda).dependent == dependent


class TestSpec:
    def test_the_manifest_says_which_images_are_launched_so(self, library: CLibrary) -> None:
        found = {
            (function.name, image.arch): image.dependent
            for function, _, variant in library.manifest.variants()
            for image in variant.images
        }

        assert found == {
            ("follow", "sm_80"): False,
            ("follow", "sm_90"): True,
            ("plain", "sm_80"): False,
            ("plain", "sm_90"): False,
        }

    def test_it_is_part_of_the_variants_name(self) -> None:
        assert FOLLOW.variant != replace(FOLLOW, programmatic_dependent_launch=False).variant
        assert FOLLOW.generic().programmatic_dependent_launch

    def test_it_is_true_or_false(self) -> None:
        with pytest.raises(SpecError, match="programmatic_dependent_launch is 1; use True or False"):
            replace(FOLLOW, programmatic_dependent_launch=1)

    def test_architectures_before_sm_90_do_not_have_it(self) -> None:
        assert [arch for arch in ARCHS if FOLLOW.is_dependent_on(arch)] == [
            "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121"
        ]  # fmt: skip
        assert not any(PLAIN.is_dependent_on(arch) for arch in ARCHS)

    def test_a_kernel_that_never_waits_is_refused(self, compiler: Compiler) -> None:
        hasty = replace(FOLLOW, tunings=())

        with pytest.raises(CompileError, match=r"follow_\S+ for sm_90: .*never waits.*gdc_wait\(\)"):
            compiler.compile(hasty, ARCHS["sm_90"])
        assert compiler.compile(hasty, ARCHS["sm_80"]).code


FIELDS = ("grid", "block", "shared", "stream", "attributes", "attribute_count")
CUDA_FIELDS = ("gridDimX", "blockDimX", "sharedMemBytes", "hStream", "attrs", "numAttrs")


@pytest.mark.parametrize("other", ["cuda.h", "fake_cuda.h"])
def test_the_launchers_structures_are_those_of_the_driver(tmp_path: Path, other: str) -> None:
    real = other == "cuda.h"
    attribute, config = (
        ("CUlaunchAttribute", "CUlaunchConfig") if real else ("fake_launch_attribute", "fake_launch_config")
    )
    serialization = "programmaticStreamSerializationAllowed" if real else "serialization"
    axes = [f"clusterDim.{axis}" for axis in "xyz"] if real else [f"cluster[{i}]" for i in range(3)]
    ours_theirs = [("serialization", serialization), *zip((f"cluster[{i}]" for i in range(3)), axes, strict=True)]
    pairs = [("launch_attribute", "id", attribute, "id")]
    pairs += [("launch_attribute", f"value.{ours}", attribute, f"value.{theirs}") for ours, theirs in ours_theirs]
    pairs += [
        ("launch_config", ours, config, theirs)
        for ours, theirs in zip(FIELDS, CUDA_FIELDS if real else FIELDS, strict=True)
    ]
    checks = [f"sizeof(launch_attribute) == sizeof({attribute})", f"sizeof(launch_config) == sizeof({config})"]
    checks += [f"offsetof({a}, {b}) == offsetof({c}, {d})" for a, b, c, d in pairs]
    if real:
        checks += ["STREAM_SERIALIZATION == (int)CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"]
        checks += ["CLUSTER_DIMENSION == (int)CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION"]
        checks += ["NOT_SUPPORTED == (int)CUDA_ERROR_NOT_SUPPORTED"]
    source = tmp_path / "layout.c"
    lines = [f'#include "{other}"', f'#include "{TEMPLATES}/pyfmha_runtime.c"']
    source.write_text("\n".join(lines + [f'_Static_assert({check}, "layout");' for check in checks]) + "\n")
    (package,) = importlib.util.find_spec("triton").submodule_search_locations or ()
    cuda = Path(package) / "backends" / "nvidia" / "include"

    done = gcc(*STRICT, "-D_GNU_SOURCE", "-isystem", cuda, "-I", fake.SOURCE.parent, "-fsyntax-only", source)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def cubins(compiler: Compiler) -> dict[str, Cubin]:
    """Decoding's two kernels."""
    *_, split, _, combine = Decode("fp16", 128).specs()
    pair = {"split": split, "combine": combine}
    return {f"{name} {arch}": compiler.compile(pair[name], ARCHS[arch]) for name in pair for arch in ("sm_80", "sm_90")}


@pytest.fixture(scope="module")
def code(cubins: dict[str, Cubin], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Their opcodes, in order: ACQBULK waits, PREEXIT lets the next kernel start, CCTL prefetches."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"
    folder = tmp_path_factory.mktemp("code")
    found = {}
    for name, cubin in cubins.items():
        path = folder / name
        path.write_bytes(cubin.code)
        text = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout
        found[name] = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", text, re.MULTILINE)
    return found


class TestDecoding:
    """The machine code of the pair that is launched so."""

    def test_older_architectures_have_none_of_it(self, code: dict[str, list[str]]) -> None:
        for name in ("split sm_80", "combine sm_80"):
            assert "EXIT" in code[name], "the listing was not understood"
            assert not {"ACQBULK", "PREEXIT"} & set(code[name])

    def test_the_first_lets_the_second_start_before_it_does_anything(self, code: dict[str, list[str]]) -> None:
        listing = code["split sm_90"]

        assert listing.count("PREEXIT") == 1
        assert "ACQBULK" not in listing
        for before in ("EXIT", "LDG", "CCTL", "LDGSTS", "BAR"):
            assert listing.index("PREEXIT") < listing.index(before)

    def test_the_first_asks_for_keys_before_it_waits_for_queries(self, code: dict[str, list[str]]) -> None:
        listing = code["split sm_90"]

        assert max(i for i, word in enumerate(listing) if word == "CCTL") < listing.index("LDGSTS")
        assert max(i for i, word in enumerate(listing) if word == "CCTL") < listing.index("STS")

    def test_the_second_waits_before_it_touches_memory(self, code: dict[str, list[str]]) -> None:
        listing = code["combine sm_90"]

        assert listing.count("ACQBULK") == 1
        assert "PREEXIT" not in listing
        assert listing.index("ACQBULK") < min(listing.index(word) for word in ("LDG", "STG"))

    def test_the_turn_that_fetches_the_code_runs_the_same_code(self, code: dict[str, list[str]]) -> None:
        count = Counter(code["combine sm_90"])

        assert count["STG"] == 2  # of Out and Lse
        assert count["BRA"] >= 3  # the loops over turns and parts, and the trap at the end
        assert count["LDG"] <= 3 * 32 + 1  # a part is its maximum, sum and values

    def test_the_second_fits_beside_the_first(self, cubins: dict[str, Cubin]) -> None:
        resident = [cubins["split sm_90"]] * 2 + [cubins["combine sm_90"]]

        assert sum(-(-cubin.registers // 8) * 8 * cubin.threads for cubin in resident) <= REGISTERS_OF_SM
        assert sum(cubin.shared + 1024 for cubin in resident) <= SHARED_OF_SM
