"""Kernels as other people have them: under decorators, with names and constants that C and JSON lack."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import KERNELS, CLibrary, python_environment

from pyfmha.aot import Compiler, compile_configs, compile_kernel, link, make_spec, make_specs
from pyfmha.errors import CompileError, KernelSourceError, SharedMemoryError, SpecError
from pyfmha.spec.arch import ARCHS
from pyfmha.spec.constants import Dtype, FunctionName
from pyfmha.spec.kernel import KernelSpec
from pyfmha.spec.manifest import parse_manifest

pytest.importorskip("triton")

DECORATED = KERNELS / "decorated.py"
SM_90 = ARCHS["sm_90"]
GRID = "cdiv(n, BLOCK)"
VECTOR = "*fp32:16, *fp32:16, i32"

# Compiles each kernel as a launch in Python would, for sm_90, and prints the digests of the machine code.
RUN_TIME = """
import hashlib, json, os, sys
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
sys.path.insert(0, sys.argv[1])
import triton, triton.language as tl
from triton.runtime.jit import MockTensor
from pyfmha.aot.target import TargetDriver
from pyfmha.spec.arch import ARCHS
driver = TargetDriver()
driver.arch = ARCHS["sm_90"]
triton.runtime.driver.set_active(driver)
import decorated
class Typed(MockTensor):
    def element_size(self):
        return 4
single, half = Typed("float32"), Typed("float16")
digests = {}
for name, (kernel, arguments, constants) in {
    "nested": (decorated.nested.fn, (single, single, 1000, None), {}),
    "computed": (decorated.computed, (single, single, 1000, None), {}),
    "transpose": (decorated.transpose, (single, single, 1000, 600), {}),
    "defaults": (decorated.typed, (single, single, 1000, 128), {}),
    "typed": (decorated.typed, (single, single, 1000, 128, tl.bfloat16, (4, 5), decorated.negate, 7), {}),
    "strided": (decorated.strided, (single, single, (1000, (999,)), (16, 1), 1000, 128), {}),
    "gather": (decorated.gather, ((single, half), single, 1000, 128), {}),
    "described": (decorated.described, (half, half, 1000, 128, 64, 64), {}),
}.items():
    compiled = kernel.warmup(*arguments, grid=(1,), enable_fp_fusion=True, **constants)
    compiled = compiled if isinstance(compiled, list) else [compiled]
    digests[name] = [hashlib.sha256(one.asm["cubin"]).hexdigest() for one in compiled]
print(json.dumps(digests))
"""


@pytest.fixture(scope="module")
def at_run_time(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Digests of what Triton's run-time compiler makes of the kernels."""
    environment = {name: value for name, value in python_environment().items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run(
        [sys.executable, "-c", RUN_TIME, str(KERNELS)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    digests: dict[str, list[str]] = json.loads(done.stdout)
    return digests


def digest(compiler: Compiler, spec: KernelSpec) -> str:
    return hashlib.sha256(compiler.compile(spec, SM_90).code).hexdigest()


class TestTheCodeIsThatOfTheRunTimeCompiler:
    def test_of_every_configuration(self, compiler: Compiler, at_run_time: dict[str, list[str]]) -> None:
        specs = make_specs(
            compiler, DECORATED, "nested", f"{VECTOR}, None, EVEN=False", GRID, configs=[0, 1], archs=[SM_90]
        )

        assert [digest(compiler, spec) for spec in specs] == at_run_time["nested"][:2]
        assert len(set(at_run_time["nested"])) > 1

    def test_of_several_blocks_a_program(self, compiler: Compiler, at_run_time: dict[str, list[str]]) -> None:
        specs = make_specs(
            compiler, DECORATED, "transpose", f"{VECTOR}, i32", "cdiv(m, M), cdiv(n, N)", configs=None, archs=[SM_90]
        )

        assert [spec.num_ctas for spec in specs] == [2, 1]
        assert [digest(compiler, spec) for spec in specs] == at_run_time["transpose"]

    @pytest.mark.parametrize(
        ("which", "kernel", "signature", "settings"),
        [
            ("computed", "computed", f"{VECTOR}, None", {}),
            ("defaults", "typed", f"{VECTOR}, 128", {}),
            ("typed", "typed", f"{VECTOR}, 128, tl.bfloat16, (4, 5), negate, 7", {}),
            ("typed", "typed", f"{VECTOR}, _, EXTRA=7, APPLY=negate, SHAPE=(4, 5,), DTYPE=bf16, BLOCK=128", {}),
            ("strided", "strided", "*fp32:16, *fp32:16, (i32, (i32,)), (i32:16, i32:1), i32, 128", {}),
            ("strided", "strided", "*fp32:16, *fp32:16, (i32, (i32,)), (i32:16, 1), i32, 128", {}),
            ("gather", "gather", "(*fp32:16, *fp16:16), *fp32:16, i32, 128", {}),
            ("described", "described", "*fp16:16, *fp16:16, i32, i32:16, 64, 64", {"workspace": True}),
        ],
    )
    def test_of_constants_and_tuples(
        self,
        compiler: Compiler,
        at_run_time: dict[str, list[str]],
        which: str,
        kernel: str,
        signature: str,
        settings: dict[str, bool],
    ) -> None:
        spec = make_spec(compiler, DECORATED, kernel, signature, "1", **settings)

        assert [digest(compiler, spec)] == at_run_time[which]


class TestConfigurations:
    def test_one_sets_constants_warps_stages_and_registers(self, compiler: Compiler) -> None:
        spec = make_spec(compiler, DECORATED, "tuned", f"{VECTOR}, *fp32, HAS_BIAS=True, EVEN=False", GRID, config=1)

        assert spec.constants == (("BLOCK", 256), ("HAS_BIAS", True), ("EVEN", False))
        assert (spec.num_warps, spec.num_stages, spec.num_ctas, spec.maxnreg) == (8, 3, 1, 64)

    def test_all_are_algorithms_in_their_order(self, compiler: Compiler, tmp_path: Path) -> None:
        signature = f"{VECTOR}, *fp32, HAS_BIAS=True, EVEN=False"
        specs = make_specs(compiler, DECORATED, "tuned", signature, GRID, configs=None)
        compile_configs(compiler, specs, [SM_90], tmp_path / "tuned")

        manifest = link(sorted(tmp_path.glob("tuned*.h")), tmp_path / "library", library=False)

        (function,) = manifest.functions
        images = [algorithm[0].images[0] for algorithm in function.algorithms]
        settings = [(i.constants["BLOCK"], i.num_warps, i.num_stages, i.maxnreg) for i in images]
        assert settings == [(128, 4, 2, None), (256, 8, 3, 64), (256, 8, 3, None)]
        assert [len(algorithm) for algorithm in function.algorithms] == [2, 2, 2]

    def test_without_one_its_constants_must_be_given(self, compiler: Compiler) -> None:
        signature = f"{VECTOR}, None, HAS_BIAS=False, EVEN=False"
        with pytest.raises(
            SpecError, match=r"autotuner gives BLOCK; choose with --config.*\n  0: BLOCK=128, num_warps=4"
        ):
            make_spec(compiler, DECORATED, "tuned", signature, GRID)

        spec = make_spec(compiler, DECORATED, "tuned", f"{signature}, BLOCK=64", GRID, num_warps=2)
        assert (dict(spec.constants)["BLOCK"], spec.num_warps) == (64, 2)

    def test_what_it_sets_is_not_given_twice(self, compiler: Compiler) -> None:
        signature = f"{VECTOR}, None, 128, False, False"
        with pytest.raises(SpecError, match="configuration 0 sets BLOCK, and so does the signature; write _ there"):
            make_spec(compiler, DECORATED, "tuned", signature, GRID, config=0)
        with pytest.raises(SpecError, match="num_warps=4 is set by configuration 0; leave out --num-warps"):
            make_spec(compiler, DECORATED, "tuned", signature.replace("128", "_"), GRID, config=0, num_warps=8)

    def test_one_that_is_not_there_is_refused_with_those_that_are(self, compiler: Compiler) -> None:
        with pytest.raises(SpecError, match=r"no configuration 3; it has\n  0: BLOCK=128.*\n  1: .*\n  2: "):
            make_spec(compiler, DECORATED, "tuned", f"{VECTOR}, None, _, False, False", GRID, config=3)

    @pytest.mark.parametrize("configs", [[0], None])
    def test_a_kernel_without_an_autotuner_has_none(self, compiler: Compiler, configs: list[int | None] | None) -> None:
        with pytest.raises(SpecError, match=r"has no @triton.autotune.*leave out --config"):
            make_specs(compiler, DECORATED, "plain", f"{VECTOR}, None, 128, False, False", GRID, configs=configs)

    def test_a_pre_hook_is_told_of(self, compiler: Compiler) -> None:
        notes: list[str] = []
        signature = f"{VECTOR}, None, _, False, False"
        for config in (0, 2):
            make_spec(compiler, DECORATED, "tuned", signature, GRID, config=config, note=notes.append)

        assert [note.partition(",")[0] for note in notes] == ["configuration 2 has a pre_hook"]

    @pytest.mark.parametrize(("bias", "told"), [("*fp32", True), ("None", False)])
    def test_a_null_pointer_that_is_compared_with_none_is_told_of(
        self, compiler: Compiler, bias: str, told: bool
    ) -> None:
        notes: list[str] = []
        signature = f"*fp32, {bias}, *fp32, *fp32, *fp32, i32, 64"
        nullable = ["bias"] if told else []
        make_spec(compiler, KERNELS / "absent.py", "scaled", signature, GRID, nullable=nullable, note=notes.append)

        assert [note.partition(",")[0] for note in notes] == ["kernel scaled compares bias with None"] * told

    def test_what_it_sets_beyond_the_kernel_is_refused(self, compiler: Compiler) -> None:
        with pytest.raises(SpecError, match="configuration 0 sets waves_per_eu, which is no parameter"):
            make_spec(compiler, DECORATED, "unknown_option", f"{VECTOR}, None, _, False, False", GRID, config=0)

    @pytest.mark.long
    def test_one_that_needs_too_much_shared_memory_is_left_out(self, compiler: Compiler, tmp_path: Path) -> None:
        signature = "*fp16:16, *fp16:16, *fp16:16, i32, i32"
        specs = make_specs(compiler, DECORATED, "product", signature, "1", configs=None)
        notes: list[str] = []

        headers = compile_configs(compiler, specs, [ARCHS["sm_86"]], tmp_path / "p", generic=False, note=notes.append)

        assert [dict(spec.constants)["BLOCK_K"] for spec in specs] == [32, 512]
        assert [header.name.split(".")[1] for header in headers] == ["0"]
        assert [note.startswith(f"left out: {specs[1].variant}") for note in notes] == [True]
        with pytest.raises(SharedMemoryError):
            compile_configs(compiler, specs[1:], [ARCHS["sm_86"]], tmp_path / "q", generic=False)


class TestHeuristics:
    def test_they_are_computed_from_what_is_given(self, compiler: Compiler) -> None:
        spec = make_spec(compiler, DECORATED, "computed", f"{VECTOR}, *fp32", GRID)

        assert spec.constants == (("BLOCK", 256), ("HAS_BIAS", True), ("EVEN", True))
        assert spec.num_warps == 8

    def test_those_that_read_arguments_must_be_given(self, compiler: Compiler) -> None:
        signature = f"{VECTOR}, None, BLOCK=128"
        with pytest.raises(SpecError, match=r"give EVEN \(EVEN: it reads n, which .*\); end .*: EVEN=\.\.\."):
            make_spec(compiler, DECORATED, "guessed", signature, GRID)

        spec = make_spec(compiler, DECORATED, "guessed", f"{signature}, EVEN=True", GRID)
        assert spec.constants == (("bias", None), ("BLOCK", 128), ("HAS_BIAS", False), ("EVEN", True))

    def test_those_that_read_a_constant_without_a_value_say_so(self, compiler: Compiler) -> None:
        with pytest.raises(SpecError, match="EVEN: it reads BLOCK, which has no value yet"):
            make_spec(compiler, DECORATED, "guessed", "*fp32, *fp32, i32:1, None", GRID)

    def test_the_number_of_warps_is_not_given_twice(self, compiler: Compiler) -> None:
        with pytest.raises(SpecError, match="num_warps=8 is set by a heuristic; leave out --num-warps"):
            make_spec(compiler, DECORATED, "computed", f"{VECTOR}, None", GRID, num_warps=4)


class TestConstants:
    def test_defaults_are_of_any_kind(self, compiler: Compiler) -> None:
        spec = make_spec(compiler, DECORATED, "typed", f"{VECTOR}, 128", GRID)

        assert spec.constants[1:] == (
            ("DTYPE", Dtype("fp16")), ("SHAPE", (2, 3)), ("APPLY", FunctionName("double")), ("EXTRA", None)
        )  # fmt: skip

    def test_a_dtype_is_not_its_name(self, compiler: Compiler) -> None:
        word, dtype = (
            make_spec(compiler, DECORATED, "typed", f"{VECTOR}, 128, {entry}", GRID) for entry in ("'fp16'", "fp16")
        )

        assert dict(word.constants)["DTYPE"] == "fp16"
        assert word.digest != dtype.digest

    def test_an_unknown_function_is_refused_with_those_known(self, compiler: Compiler) -> None:
        with pytest.raises(SpecError, match=r"APPLY is a tl.constexpr: .* not 'twice'.*functions here: .*double, "):
            make_spec(compiler, DECORATED, "typed", f"{VECTOR}, 128, APPLY=twice", GRID)
        with pytest.raises(SpecError, match=r"tl\.nowhere is no @triton\.jit function"):
            make_spec(compiler, DECORATED, "typed", f"{VECTOR}, 128, APPLY=tl.nowhere", GRID)

    def test_they_stand_in_manifests(self, compiler: Compiler, tmp_path: Path) -> None:
        spec = make_spec(compiler, DECORATED, "typed", f"{VECTOR}, 128", GRID)
        manifest = link(compile_kernel(compiler, spec, [SM_90], tmp_path / "typed"), tmp_path / "library")

        assert parse_manifest(manifest.to_json(), "here") == manifest
        (image,) = manifest.functions[0].algorithms[0][0].images
        constants = {"DTYPE": {"dtype": "fp16"}, "SHAPE": [2, 3], "APPLY": {"function": "double"}, "EXTRA": None}
        assert json.loads(json.dumps(image.constants)) == {"BLOCK": 128, **constants}
        assert CLibrary(tmp_path / "library.so").manifest == manifest


class TestTuples:
    SIGNATURE = "*fp32:16, *fp32:16, (i32, (i32,)), (i32:16, 1), i32, 128"

    def test_each_element_is_an_argument_in_c(self, compiler: Compiler, tmp_path: Path) -> None:
        spec = make_spec(compiler, DECORATED, "strided", self.SIGNATURE, "cdiv(sizes_1_0, BLOCK)")
        link(compile_kernel(compiler, spec, [SM_90], tmp_path / "strided"), tmp_path / "library")

        library = CLibrary(tmp_path / "library.so")
        names = [name for name, _ in library.manifest.functions[0].arguments]
        assert names == ["X", "Y", "sizes_0", "sizes_1_0", "strides_0", "n"]
        hinted, generic = library.variants("strided")[True], library.variants("strided")[False]
        assert library.variant("strided", 0x100, 0x100, 5, 5, 32, 5) == (0, hinted)
        assert library.variant("strided", 0x100, 0x100, 5, 5, 33, 5) == (0, generic)

    def test_names_that_clash_are_refused(self, compiler: Compiler, tmp_path: Path) -> None:
        file = tmp_path / "clash.py"
        file.write_text(
            "import triton\nimport triton.language as tl\n\n\n@triton.jit\ndef f(X, s, s_0):\n"
            "    tl.store(X, s[0] + s_0)\n"
        )
        with pytest.raises(SpecError, match="argument s_0 is given more than once"):
            make_spec(compiler, file, "f", "*i32, (i32, i32), i32", "1")


class TestNames:
    @pytest.mark.parametrize(
        ("kernel", "name"),
        [
            ("_private", "private_kernel"),
            ("exp", "exp_kernel"),
            ("register", "register_kernel"),
            ("pyfmha_mine", "kernel_pyfmha_mine"),
        ],
    )
    def test_a_name_that_c_cannot_have_gives_one_that_it_can(
        self, compiler: Compiler, tmp_path: Path, kernel: str, name: str
    ) -> None:
        spec = make_spec(compiler, DECORATED, kernel, "*fp32", "1")
        link(compile_kernel(compiler, spec, [SM_90], tmp_path / "x"), tmp_path / "library")

        (function,) = CLibrary(tmp_path / "library.so").manifest.functions
        assert (function.name, function.kernel) == (name, kernel)

    @pytest.mark.parametrize("name", ["_private", "exp", "register", "pyfmha_mine", "1st"])
    def test_who_asks_for_such_a_name_is_told_of_the_option(self, compiler: Compiler, name: str) -> None:
        with pytest.raises(SpecError, match="--out-name"):
            make_spec(compiler, DECORATED, "exp", "*fp32", "1", name=name)


class TestUnwrapping:
    def test_what_holds_no_kernel_is_none(self, compiler: Compiler, tmp_path: Path) -> None:
        file = tmp_path / "odd.py"
        file.write_text(
            "import triton\n\n\nclass Endless:\n    @property\n    def fn(self):\n        return Endless()\n\n\n"
            "class Rude:\n    @property\n    def fn(self):\n        raise RuntimeError\n\n\n"
            "endless, rude = Endless(), Rude()\n\n\n@triton.jit\ndef f(X):\n    pass\n"
        )
        for name in ("endless", "rude"):
            with pytest.raises(KernelSourceError, match=f"'{name}' is not a @triton.jit function .* it holds: f$"):
                compiler.describe(file, name)

    def test_blocks_that_share_a_program_need_hopper(self, compiler: Compiler) -> None:
        spec = make_spec(compiler, DECORATED, "transpose", f"{VECTOR}, i32", "cdiv(m, M), cdiv(n, N)", config=0)

        with pytest.raises(CompileError, match="num_ctas > 1 requires NVIDIA SM90"):
            compiler.compile(spec, ARCHS["sm_80"])
