"""Linking: what goes together, what does not, and what a missing or failing compiler says."""

import ctypes
import itertools
import json
import os
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from fake_cuda import FakeCuda
from helpers import KERNELS, SUCCESS, CLibrary, gcc, manifest_source, run_python, snapshot

from pyfmha.aot import Compiler, c_compiler, compile_kernel, link, make_spec
from pyfmha.aot.handover import Handover, read_handover
from pyfmha.aot.link_so import group
from pyfmha.attention.families import library_specs
from pyfmha.attention.hopper import DECODE_KERNEL
from pyfmha.errors import ManifestError, OutputError, SpecError, ToolchainError
from pyfmha.spec.arch import parse_archs
from pyfmha.spec.manifest import SCHEMA, Manifest, read_manifest

SIGNATURE = "*fp32:16, *fp32:16, *fp32:16, i32:16, 1024"
ARCHS = parse_archs(["sm_90"])


def compile_add(
    compiler: Compiler, output: Path, *, kernel: str = "add", name: str | None = None, **changes: object
) -> list[Path]:
    """Compile a kernel of elementwise.py for sm_90; returns the headers."""
    settings = {"signature": SIGNATURE, "grid": "cdiv(n, BLOCK)", "name": name} | changes
    spec = make_spec(compiler, KERNELS / "elementwise.py", kernel, **settings)  # type: ignore[arg-type]
    return compile_kernel(compiler, spec, ARCHS, output)


@pytest.fixture(scope="module")
def headers(compiler: Compiler, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of `add`, hinted and generic. Not to be changed: copy them."""
    return compile_add(compiler, tmp_path_factory.mktemp("compiled") / "add")


def copy(headers: list[Path], folder: Path) -> list[Path]:
    """The headers with their companions, to be damaged at will."""
    folder.mkdir(exist_ok=True)
    for header in headers:
        for file in header.parent.iterdir():
            shutil.copy(file, folder)
    return [folder / header.name for header in headers]


class TestOutput:
    def test_it_writes_sources_manifest_and_library(self, headers: list[Path], tmp_path: Path) -> None:
        manifest = link(headers, tmp_path / "out" / "adder")

        assert set(snapshot(tmp_path / "out")) == {
            "adder.c",
            "adder.h",
            "adder.json",
            "adder.so",
            "pyfmha_runtime.c",
            "pyfmha_runtime.h",
        }
        assert read_manifest(tmp_path / "out" / "adder.json") == manifest
        assert CLibrary(tmp_path / "out" / "adder.so").manifest == manifest

    def test_any_number_of_processes_gives_the_same_bytes(
        self, headers: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = tmp_path / "calls"
        counted = tmp_path / "counted-cc"
        counted.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec cc "$@"\n')
        counted.chmod(0o755)
        link(headers, tmp_path / "one" / "adder")
        monkeypatch.setenv("CC", str(counted))
        monkeypatch.setattr(c_compiler, "_SHARE", 1)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
        link(headers, tmp_path / "three" / "adder")

        *parts, whole = sorted(calls.read_text().splitlines(), key=lambda call: "-shared" in call)
        assert [call.count(" -c ") for call in parts] == [1] * 3
        assert sorted(name for call in parts for name in call.split() if name.endswith(".c")) == [
            name.replace(".o", ".c") for name in whole.split() if name.endswith(".o")
        ]
        assert snapshot(tmp_path / "one") == snapshot(tmp_path / "three")

    def test_without_the_library_it_needs_no_compiler(
        self, headers: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CC", "/nonexistent")

        link(headers, tmp_path / "adder", library=False)

        assert "adder.so" not in snapshot(tmp_path)
        assert "adder.c" in snapshot(tmp_path)

    def test_the_same_inputs_give_the_same_bytes_anywhere(self, headers: list[Path], tmp_path: Path) -> None:
        for folder in ("one", "two/with a deeper path"):
            moved = copy(headers, tmp_path / f"compiled {folder.replace('/', ' ')}")
            link(moved, tmp_path / folder / "adder")

        assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two/with a deeper path")

    def test_a_header_named_twice_counts_once(self, headers: list[Path], tmp_path: Path) -> None:
        assert link([*headers, *headers], tmp_path / "adder") == link(headers, tmp_path / "adder")

    def test_the_order_of_a_variants_headers_does_not_matter(self, headers: list[Path], tmp_path: Path) -> None:
        manifest = link(headers[::-1], tmp_path / "adder", library=False)

        (function,) = manifest.functions
        assert [bool(variant.hints) for variant in function.algorithms[0]] == [True, False]

    def test_algorithms_are_numbered_in_the_order_given(
        self, compiler: Compiler, headers: list[Path], tmp_path: Path
    ) -> None:
        other = compile_add(compiler, tmp_path / "wide", signature=SIGNATURE.replace("1024", "512"))

        orders = [link(given, tmp_path / "adder", library=False) for given in ([*headers, *other], [*other, *headers])]

        blocks = [[a[0].images[0].constants["BLOCK"] for a in manifest.functions[0].algorithms] for manifest in orders]
        assert blocks == [[1024, 512], [512, 1024]]


class TestWhatGoesTogether:
    def test_two_different_kernels_are_two_functions(
        self, compiler: Compiler, headers: list[Path], tmp_path: Path, fake_cuda: FakeCuda
    ) -> None:
        other = compile_add(compiler, tmp_path / "subtract", kernel="subtract")
        link([*headers, *other], tmp_path / "both")
        library = CLibrary(tmp_path / "both.so")
        fake_cuda.use_context()

        for name in ("add", "subtract"):
            assert library.load(name) == SUCCESS
            assert library.launch(name, 16, 16, 16, 16) == SUCCESS

        assert [launch.kernel for launch in fake_cuda.launches()] == ["add", "subtract"]

    def test_one_kernel_may_stand_under_two_names(
        self, compiler: Compiler, headers: list[Path], tmp_path: Path, fake_cuda: FakeCuda
    ) -> None:
        other = compile_add(compiler, tmp_path / "plus", name="plus")
        link([*headers, *other], tmp_path / "both")
        library = CLibrary(tmp_path / "both.so")
        fake_cuda.use_context()

        assert [library.load("add"), library.load("plus"), library.unload("add")] == [SUCCESS] * 3
        assert library.launch("plus", 16, 16, 16, 16) == SUCCESS

    def test_two_kernels_cannot_claim_one_name(self, compiler: Compiler, headers: list[Path], tmp_path: Path) -> None:
        other = compile_add(compiler, tmp_path / "subtract", kernel="subtract", name="add")

        with pytest.raises(
            SpecError, match=r"two different kernels claim the function name 'add': add\(.*subtract\(.*--out-name"
        ):
            link([*headers, *other], tmp_path / "both")

    def test_a_multiple_of_eight_is_promised_and_asked_for(self, compiler: Compiler, tmp_path: Path) -> None:
        link(compile_add(compiler, tmp_path / "add", signature=SIGNATURE.replace("i32:16", "i32:8")), tmp_path / "lib")
        library = CLibrary(tmp_path / "lib.so")

        names = library.variants("add")
        assert [library.variant("add", 0, 0, 0, n)[1] for n in (8, 24, 16, 0, 4, 12)] == [
            *[names[True]] * 4,
            *[names[False]] * 2,
        ]

    def test_two_signatures_cannot_claim_one_name(
        self, compiler: Compiler, headers: list[Path], tmp_path: Path
    ) -> None:
        other = compile_add(compiler, tmp_path / "half", signature=SIGNATURE.replace("fp32", "fp16"))

        with pytest.raises(SpecError, match=r"claim the function name 'add'.*\*fp32 X.*\*fp16 X"):
            link([*headers, *other], tmp_path / "both")

    def named(self, header: Path, **changes: object) -> Handover:
        """A variant as if its spec had been another; its source digest too, if that is given."""
        made = read_handover(header)
        digest = changes.pop("source_digest", made.source_digest)
        spec = replace(made.spec, **{"algorithm_name": "one", **changes})
        return replace(made, spec=spec, variant=replace(made.variant, name=spec.variant), source_digest=digest)

    def test_different_kernels_share_a_function_whose_variants_all_say_so(self, headers: list[Path]) -> None:
        hinted, generic = headers
        one = self.named(hinted)
        other = self.named(generic, kernel="plus", source=Path("other.py"), source_digest="another")

        assert group([one, other]) == {"add": [[one, other]]}
        with pytest.raises(SpecError, match="two different kernels claim the function name 'add'"):
            group([one, replace(other, spec=replace(other.spec, algorithm_name=""))])

    def test_one_file_in_two_versions_is_refused(self, headers: list[Path]) -> None:
        hinted, generic = headers

        with pytest.raises(SpecError, match=r"were compiled from different versions of elementwise\.py"):
            group([self.named(hinted), self.named(generic, source_digest="another")])

    def test_variants_are_tried_in_the_order_given_but_those_for_everything_last(self, headers: list[Path]) -> None:
        hinted, generic = headers
        special = [
            self.named(generic, requires=("n >= 4096",)),
            self.named(hinted, requires=("n >= 64",)),
            self.named(hinted),
        ]
        last = self.named(generic)

        for order in itertools.permutations(special):
            for given in ([last, *order], [*order, last], [order[0], last, *order[1:]]):
                assert group(given) == {"add": [[*order, last]]}

    def test_more_hints_are_tried_before_those_that_would_hide_them(self, headers: list[Path]) -> None:
        """In whatever order a glob gives them; others stay in the order given."""
        hinted, generic = headers
        spec = read_handover(hinted).spec

        def with_hints(header: Path, *hints: int | None, **changes: object) -> Handover:
            arguments = (replace(argument, hint=hint) for argument, hint in zip(spec.arguments, hints, strict=True))
            return self.named(header, arguments=tuple(arguments), **changes)

        none = with_hints(generic, None, None, None, None)
        eight, sixteen = (with_hints(hinted, 16, None, None, hint) for hint in (8, 16))
        pointer, other = with_hints(hinted, 16, None, None, None), with_hints(hinted, None, 16, None, 1)
        for order in itertools.permutations([none, pointer, eight, sixteen, other]):
            ((found,),) = group(order).values()
            assert [v for v in found if v is not other] == [sixteen, eight, pointer, none]
        assert group([other, pointer, none]) == {"add": [[other, pointer, none]]}
        assert group([pointer, other, none]) == {"add": [[pointer, other, none]]}
        special = with_hints(hinted, 16, None, None, 16, requires=("n >= 64",))
        assert group([pointer, special, none]) == {"add": [[pointer, special, none]]}

    def test_files_in_any_order_are_tried_in_one_order(self, headers: list[Path]) -> None:
        """What serves all calls of another comes after it, whatever a glob puts first."""
        hinted, generic = headers
        wanted = [
            self.named(generic, archs=("sm_90",), requires=("n >= 64", "n <= 1024")),
            self.named(generic, archs=("sm_90",), requires=("n >= 64",)),
            self.named(generic, archs=("sm_90", "sm_100"), requires=("n >= 64", "n <= 512")),
            self.named(hinted, requires=("n >= 64",)),
            self.named(hinted),
            self.named(generic),
        ]
        other = self.named(hinted, algorithm_name="two")

        for seed in range(40):
            order = random.Random(seed).sample(wanted, len(wanted))
            assert group(order, in_order=False) == {"add": [wanted]}
        assert group([other, *wanted], in_order=False) == {"add": [[other], wanted]}
        assert group([wanted[3], other, *wanted], in_order=False) == {"add": [wanted, [other]]}

    @pytest.mark.parametrize("seed", range(3))
    def test_the_default_librarys_variants_in_any_order(self, headers: list[Path], seed: int) -> None:
        """None comes where another would serve all its calls, and those of sm_90 stay before the portable ones."""
        made, wanted = (
            read_handover(headers[0]),
            [spec for spec in library_specs() if spec.name == "fmha_fwd_d128_fp16"],
        )
        given = [replace(made, spec=spec, variant=replace(made.variant, name=spec.variant)) for spec in wanted]
        shuffled = random.Random(seed).sample(given, len(given))

        (found,) = (v for algorithms in group(shuffled, in_order=False).values() for v in algorithms)

        assert found == group(given, in_order=False)["fmha_fwd_d128_fp16"][0]
        assert [bool(v.spec.archs) for v in found] == [bool(spec.archs) for spec in wanted]
        assert found[0].spec.kernel == DECODE_KERNEL
        # Ragged batches are served by some that serve no call of another: where they come among these does not matter.
        others = [v.spec for v in found if "ragged == 1" not in v.spec.requires]
        ragged = [v.spec for v in found if "ragged == 1" in v.spec.requires]
        assert [len(spec.requires) for spec in ragged] == sorted([len(spec.requires) for spec in ragged], reverse=True)
        assert len(ragged) == 3
        # Those of decoding come first, the one of many key heads before the other: they are cut into clusters.
        decoding = [spec for spec in others if spec.kernel == DECODE_KERNEL]
        others = others[len(decoding) :]
        assert decoding == wanted[:2]
        conditions = [len(spec.requires) for spec in others]
        assert conditions == sorted(conditions, reverse=True)
        for early, late in itertools.combinations(others, 2):  # "early" would serve all calls of "late"
            assert early.archs != late.archs or not set(early.requires) < set(late.requires)
        assert found[-1].spec.unconditional

    def test_linking_files_in_any_order_gives_one_library(
        self, compiler: Compiler, headers: list[Path], tmp_path: Path
    ) -> None:
        spec = make_spec(compiler, KERNELS / "elementwise.py", "add", SIGNATURE, "cdiv(n, BLOCK)")
        some = replace(spec, requires=("n >= 64",))
        few = compile_kernel(compiler, some, ARCHS, tmp_path / "z" / "add", generic=False)

        manifests = [link(given, tmp_path / "lib", library=False) for given in ([*headers, *few], [*few, *headers])]

        assert manifests[0] == manifests[1]
        ((variants,),) = (function.algorithms for function in manifests[0].functions)
        assert [bool(v.requires) for v in variants] == [True, False, False]

    def test_an_algorithm_cannot_end_for_some_devices_only(self, headers: list[Path]) -> None:
        hinted, generic = headers
        some, every = self.named(generic, archs=("sm_90",)), self.named(hinted)

        assert group([some, every]) == {"add": [[some, every]]}
        assert group([some]) == {"add": [[some]]}
        with pytest.raises(
            SpecError, match=rf"{some.spec.variant}, is for sm_90 only, but {every.spec.variant} before"
        ):
            group([every, some])

    @pytest.mark.parametrize("name", ["add_default", "load_add", "unload_add", "add_get_num_algos", "add_variant"])
    def test_names_that_clash_with_another_functions_exports_are_refused(
        self, compiler: Compiler, headers: list[Path], tmp_path: Path, name: str
    ) -> None:
        other = compile_add(compiler, tmp_path / "other", name=name)

        with pytest.raises(SpecError, match=f"functions 'add' and '{name}' would both export {name}.*--out-name"):
            link([*headers, *other], tmp_path / "both")

    def test_two_builds_of_one_variant_are_refused(
        self, compiler: Compiler, headers: list[Path], tmp_path: Path
    ) -> None:
        spec = make_spec(compiler, KERNELS / "elementwise.py", "add", SIGNATURE, "cdiv(n, BLOCK)", nullable=["X"])
        other = compile_kernel(compiler, spec, parse_archs(["sm_80"]), tmp_path / "add")

        with pytest.raises(SpecError, match="same variant of add; name one: their specs differ") as caught:
            link([*headers, *other], tmp_path / "both")

        assert str(other[0]) in str(caught.value)

    def test_nothing_to_link_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SpecError, match="nothing to link"):
            link([], tmp_path / "none")


class TestTwoLinksInOneLibrary:
    def test_their_c_files_compile_together_by_hand(
        self, compiler: Compiler, tmp_path: Path, fake_cuda: FakeCuda
    ) -> None:
        """As TensorRT-LLM's example does: gcc aot/fp16/*.c aot/fp32/*.c aot/*.c."""
        aot = tmp_path / "aot"
        for dtype in ("fp16", "fp32"):
            signature = SIGNATURE.replace("fp32", dtype)
            made = compile_add(compiler, aot / dtype / f"kernel_{dtype}", signature=signature, name=f"add_{dtype}")
            link(made, aot / f"add_{dtype}", library=False)
        files = [file for pattern in ("fp16/*.c", "fp32/*.c", "*.c") for file in sorted(aot.glob(pattern))]
        manifest = aot / "manifest.c"
        manifest.write_text(manifest_source(Manifest("", "", "", ()).to_json()))

        done = gcc("-shared", "-fPIC", "-O2", *files, manifest, "-o", aot / "libtriton.so", "-ldl")

        assert (done.returncode, done.stderr) == (0, "")
        library = CLibrary(aot / "libtriton.so")
        fake_cuda.use_context()
        for dtype in ("fp16", "fp32"):
            function = getattr(library.c, f"add_{dtype}_default")
            function.argtypes = [ctypes.c_void_p, *[ctypes.c_uint64] * 3, ctypes.c_int32]
            assert library.load(f"add_{dtype}") == SUCCESS
            assert function(None, 0x1000, 0x2000, 0x3000, 1024) == SUCCESS, library.error()
        assert len({launch.image_sha256 for launch in fake_cuda.launches()}) == 2


class TestAgain:
    def test_linking_twice_with_a_glob_passes_over_its_own_results(self, headers: list[Path], tmp_path: Path) -> None:
        copy(headers, tmp_path)
        first = link(sorted(tmp_path.glob("add*.h")), tmp_path / "lib")

        second = link(sorted(file for file in tmp_path.glob("*.h") if "runtime" not in file.name), tmp_path / "lib")

        assert second == first

    @pytest.mark.parametrize("stem", ["pyfmha_runtime", "pyfmha_manifest", 'a"b', "."])
    def test_a_path_that_cannot_hold_results_is_refused(
        self, compiler: Compiler, headers: list[Path], tmp_path: Path, stem: str
    ) -> None:
        before = snapshot(tmp_path)

        with pytest.raises(SpecError, match="is no path for results" if stem != "." else "is a folder"):
            link(headers, tmp_path / stem if stem != "." else Path("."))

        assert snapshot(tmp_path) == before

    def test_a_compiler_by_a_relative_path(
        self, headers: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mycc").symlink_to(str(shutil.which("gcc")))
        monkeypatch.setenv("CC", "./mycc")

        link(headers, tmp_path / "lib")

        assert (tmp_path / "lib.so").is_file()


class TestTwoLibrariesInOneProgram:
    def test_the_last_error_is_the_last_of_either(
        self, headers: list[Path], compiler: Compiler, tmp_path: Path
    ) -> None:
        (other,) = compile_add(compiler, tmp_path / "b/sub", name="sub")[:1]
        for name, chosen in (("A", headers), ("B", [other])):
            link(chosen, tmp_path / f"lib{name}")
        (tmp_path / "main.c").write_text(
            '#include <stdio.h>\n#include "libA.h"\n#include "libB.h"\n'
            "int main(void) {\n  unload_add();\n  const int status = (int)unload_sub();\n"
            '  return printf("%d %s", status, pyfmha_last_error()) < 0;\n}\n'
        )
        flags = ["-l:libA.so", "-l:libB.so", f"-L{tmp_path}", f"-Wl,-rpath,{tmp_path}"]
        done = gcc("-std=c11", "-Wall", "-Wextra", "-Werror", tmp_path / "main.c", *flags, "-o", tmp_path / "main")
        assert done.returncode == 0, done.stderr

        said = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout

        assert said == "400 unload_sub: nothing is loaded"


class TestHandover:
    def test_what_compile_wrote_is_read_back(self, headers: list[Path]) -> None:
        hinted, generic = map(read_handover, headers)

        assert hinted.variant.hints == {"X": 16, "Y": 16, "Z": 16, "n": 16}
        assert generic.variant.hints == {}
        assert hinted.spec.name == "add"
        assert hinted.header == headers[0]
        assert hinted.c_file.is_file()

    @pytest.mark.parametrize("ending", [".json", ".c", ".h"])
    def test_a_missing_companion_is_an_error_that_names_it(
        self, headers: list[Path], tmp_path: Path, ending: str
    ) -> None:
        first, *_ = copy(headers, tmp_path)
        missing = first.with_suffix(ending)
        missing.unlink()

        with pytest.raises(ManifestError, match="cannot be read") as caught:
            link([first], tmp_path / "out")

        assert missing.name in str(caught.value)

    @pytest.mark.parametrize("ending", [".c", ".h"])
    def test_a_changed_companion_is_an_error_that_names_it(
        self, headers: list[Path], tmp_path: Path, ending: str
    ) -> None:
        first, *_ = copy(headers, tmp_path)
        changed = first.with_suffix(ending)
        changed.write_text(changed.read_text() + "\n")

        with pytest.raises(ManifestError, match=r"is not the file that .* describes; compile it again") as caught:
            link([first], tmp_path / "out")

        assert changed.name in str(caught.value)

    def test_another_schema_version_is_refused_with_both(self, headers: list[Path], tmp_path: Path) -> None:
        first, *_ = copy(headers, tmp_path)
        record = json.loads(first.with_suffix(".json").read_text())
        first.with_suffix(".json").write_text(json.dumps({**record, "schema": SCHEMA + 1}))

        with pytest.raises(
            ManifestError, match=f"schema version {SCHEMA + 1}, this pyfmha reads {SCHEMA}; compile it again"
        ):
            link([first], tmp_path / "out")

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}"])
    def test_a_foreign_description_is_refused(self, headers: list[Path], tmp_path: Path, text: str) -> None:
        first, *_ = copy(headers, tmp_path)
        first.with_suffix(".json").write_text(text)

        with pytest.raises(ManifestError, match=r"cannot be read|schema version None"):
            link([first], tmp_path / "out")

    @pytest.mark.parametrize("key", ["spec", "variant", "triton", "sha256"])
    @pytest.mark.parametrize("damage", [None, [], [[]], 3])
    def test_a_damaged_description_is_refused(
        self, headers: list[Path], tmp_path: Path, key: str, damage: object
    ) -> None:
        first, *_ = copy(headers, tmp_path)
        record = json.loads(first.with_suffix(".json").read_text())
        first.with_suffix(".json").write_text(json.dumps({**record, key: damage}))

        with pytest.raises(ManifestError, match="is damaged"):
            link([first], tmp_path / "out")

    def test_a_header_of_somebody_else_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "other.h").write_text("int x;")

        with pytest.raises(ManifestError, match=r"other.h: its description other.json cannot be read"):
            link([tmp_path / "other.h"], tmp_path / "out")


class TestFailures:
    """Whatever fails, the library linked before stays as it was."""

    @pytest.fixture
    def linked(self, headers: list[Path], tmp_path: Path) -> Path:
        link(headers, tmp_path / "out" / "adder")
        return tmp_path / "out"

    def refuse(self, headers: list[Path], linked: Path, error: type[Exception], match: str) -> None:
        before = snapshot(linked)
        with pytest.raises(error, match=match):
            link(headers[:1], linked / "adder")
        assert snapshot(linked) == before

    def test_a_compiler_that_is_not_there(
        self, headers: list[Path], linked: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CC", "/nonexistent")
        self.refuse(
            headers, linked, ToolchainError, "no C compiler: CC is '/nonexistent'.*apt-get install gcc.*or set CC"
        )

    @pytest.mark.parametrize("cc", [None, "", "  "])
    def test_no_compiler_at_all(
        self, headers: list[Path], linked: Path, monkeypatch: pytest.MonkeyPatch, cc: str | None
    ) -> None:
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CC", raising=False)
        if cc is not None:
            monkeypatch.setenv("CC", cc)
        self.refuse(headers, linked, ToolchainError, "none of cc, gcc, clang is on the PATH.*apt-get install gcc")

    def test_a_compiler_that_fails_shows_its_log(
        self, headers: list[Path], linked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken = tmp_path / "broken-cc"
        broken.write_text("#!/bin/sh\necho 'the flux compensator is out of order' >&2\nexit 3\n")
        broken.chmod(0o755)
        monkeypatch.setenv("CC", str(broken))
        self.refuse(headers, linked, ToolchainError, r"broken-cc failed with exit code 3:\nthe flux compensator")
        monkeypatch.setattr(c_compiler, "_SHARE", 1)  # one process for each file, of which all fail
        self.refuse(headers, linked, ToolchainError, r"broken-cc failed with exit code 3:\nthe flux compensator")

    def test_a_compiler_that_cannot_be_started(
        self, headers: list[Path], linked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken = tmp_path / "broken-cc"
        broken.write_bytes(b"\x7fELF is not what this is")
        broken.chmod(0o755)
        monkeypatch.setenv("CC", str(broken))
        self.refuse(headers, linked, ToolchainError, "broken-cc does not run")

    def test_a_compiler_that_writes_nothing(
        self, headers: list[Path], linked: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CC", "true")
        self.refuse(headers, linked, ToolchainError, "true failed with exit code 0")

    def test_a_compiler_with_an_unbalanced_quote(
        self, headers: list[Path], linked: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CC", "gcc 'oops")
        self.refuse(headers, linked, ToolchainError, 'CC is "gcc \'oops", which is not a command')

    def test_a_compiler_with_options_is_used_with_them(
        self, headers: list[Path], linked: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CC", "gcc -DNO_SUCH_THING -no-such-option")
        self.refuse(headers, linked, ToolchainError, "gcc failed .*(?s:.*)no-such-option")

    @pytest.mark.parametrize("output", ["/proc/pyfmha/adder", "{file}/adder"])
    def test_a_place_that_cannot_be_written(self, headers: list[Path], tmp_path: Path, output: str) -> None:
        file = tmp_path / "file"
        file.write_text("a file where a folder is needed")

        with pytest.raises(OutputError, match="cannot write to"):
            link(headers, Path(output.format(file=file)))

    def test_a_folder_where_a_file_is_needed(self, headers: list[Path], linked: Path) -> None:
        (linked / "adder.so").unlink()
        (linked / "adder.so").mkdir()

        with pytest.raises(OutputError, match="cannot write to"):
            link(headers, linked / "adder")

    @pytest.mark.parametrize("limit", [100, 4096, 40_000])
    def test_a_full_disk(self, headers: list[Path], linked: Path, limit: int) -> None:
        """No file may grow past a limit: first the sources fail, then the compiler's output."""
        code = (
            "import resource, sys\nfrom pathlib import Path\nfrom pyfmha.aot import link\n"
            "from pyfmha.errors import OutputError, ToolchainError\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
            "try: link([Path(sys.argv[1])], Path(sys.argv[2]))\n"
            "except (OutputError, ToolchainError) as error: print(type(error).__name__, error)\n"
        )
        before = snapshot(linked)

        done = run_python(code, str(headers[0]), str(linked / "adder"))

        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(("OutputError cannot write to", "ToolchainError "))
        assert snapshot(linked) == before
        assert not [name for name in os.listdir(linked) if name.startswith(".")]
