"""From a file of functions to a library: what is built, what it says of itself, and what goes wrong."""

import json
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from pyfmha.aot import Compiler, build
from pyfmha.aot.cache import Cache
from pyfmha.aot.toolchain import toolchain
from pyfmha.attention import biased_hopper
from pyfmha.attention.biased import ARGUMENTS
from pyfmha.cli.main import app
from pyfmha.errors import CompileError, KernelSourceError, LibraryError, SpecError
from pyfmha.functions.evaluate import evaluate
from pyfmha.functions.family import SHIPPED, Declared, WithFunction, declared_in, file_of, find, function_specs
from pyfmha.runtime.library import Library
from pyfmha.spec.arch import parse_archs
from pyfmha.spec.constants import JitFunction
from pyfmha.spec.kernel import Argument, KernelSpec
from pyfmha.spec.record import spec_from_data, spec_to_data

NEAR = """
    import triton.language as tl
    import pyfmha

    REACH = tl.constexpr({reach})

    @pyfmha.mask_function(bounds=lambda first_query, last_query, more: (first_query - REACH - more, last_query + 1))
    def near(batch, head, query, key, more):
        return (query - key <= REACH + more) & (key <= query)

    @pyfmha.score_function
    def bent(score, batch, head, query, key, slopes):
        return score + tl.load(slopes + head) * (key - query)

    both = pyfmha.score_and_mask("both", bent, near)
"""
SM90 = parse_archs(["sm_90"])


def written(folder: Path, reach: int = 5, name: str = "my_masks.py") -> Path:
    path = folder / name
    path.write_text(dedent(NEAR.format(reach=reach)))
    return path


def declared(path: Path) -> dict[str, Declared]:
    with Compiler(1) as compiler:
        return {function.name: function for function in declared_in(path, compiler.collect)}


def command(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["build", *map(str, arguments)])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The file, and a library of its three functions without the rest."""
    folder = tmp_path_factory.mktemp("functions")
    source = written(folder)
    specs = [spec for spec in function_specs(list(declared(source).values()), ["fp16"], [32]) if not spec.unconditional]
    return source, build(specs[:1] + specs[2:3], SM90, folder / "out", jobs=1).library


def test_windows_walk_narrow_blocks(tmp_path: Path) -> None:
    """A mask function alone, whose bounds do not tell what is seen whole."""
    blocks = {}
    for name, one in declared(written(tmp_path)).items():
        specs = WithFunction("fp16", 64, function=one).specs()
        plain = [s for s in specs if s.kernel == biased_hopper.KERNEL and not dict(s.constants)["GENERAL"]]
        blocks[name] = [(dict(s.constants)["BLOCK_N"], "num_sms * 3" in s.grid) for s in plain]
    wide = [(128, False), (128, False)]
    assert blocks == {"near": [(64, True), (64, False)], "bent": wide, "both": wide}


def test_functions_of_a_library_say_what_they_take(built: tuple[Path, Path]) -> None:
    source, path = built
    library = Library(path)

    both = find(library, declared(source)["both"], "fp16", 20)
    assert both.name == "fmha_with_both_d32_fp16"
    assert both.manifest.arguments[len(ARGUMENTS) :] == (("slopes", "*fp32"), ("more", "i32"))
    (image,) = both.manifest.algorithms[0][0].images
    assert {k: image.constants[k] for k in ("SCORE", "SEEN", "BOUNDS")} == {
        "SCORE": "both.score", "SEEN": "both.seen", "BOUNDS": "both.bounds",
    }  # fmt: skip


def test_a_function_that_is_missing_says_the_command(built: tuple[Path, Path]) -> None:
    source, path = built
    near = declared(source)["near"]
    with pytest.raises(
        LibraryError,
        match=rf"no fmha_with_near_d64_fp16, .*--functions {source} --dtype fp16 --head-size 64 -o {path.parent}",
    ):
        find(Library(path), near, "fp16", 40)


def test_a_function_that_takes_something_else_now(built: tuple[Path, Path]) -> None:
    source, path = built
    other = Declared(source, "both", (("slopes", "*fp16"),), ("SCORE",))
    with pytest.raises(LibraryError, match=r"takes slopes: \*fp32, more: i32, both of .* takes slopes: \*fp16; build"):
        find(Library(path), other, "fp16", 32)


def test_the_build_goes_by_what_functions_are(built: tuple[Path, Path], tmp_path: Path) -> None:
    """Another constant in the file is other machine code, and the same file is the same."""
    source, path = built
    cache = Cache.open(path.parent / "cache", toolchain())

    def spec_of(file: Path) -> KernelSpec:
        return WithFunction("fp16", 32, function=declared(file)["both"]).specs()[0]

    assert cache.key(spec_of(source), SM90[0]) == cache.key(spec_of(written(tmp_path)), SM90[0])
    assert cache.key(spec_of(source), SM90[0]) != cache.key(spec_of(written(tmp_path, 6)), SM90[0])
    specs = [spec for spec in function_specs(list(declared(source).values()), ["fp16"], [32]) if not spec.unconditional]
    assert build(specs[:1] + specs[2:3], SM90, path.parent, jobs=1).up_to_date


def test_the_command_builds_what_a_file_declares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[KernelSpec] = []

    def record(specs: list[KernelSpec], *_: Any, **__: Any) -> None:
        asked.extend(specs)
        raise SpecError("enough")

    monkeypatch.setattr("pyfmha.cli.main.build", record)
    command("--arch", "sm_90", "--functions", written(tmp_path), "alibi", "--dtype", "fp16", "--head-size", 64)

    names = {spec.name for spec in asked}
    assert {"fmha_fwd_d64_fp16", "fmha_d64_fp16"} < names, "the kernels, too"
    ours = {"bent", "near", "both", "alibi"}
    assert {name for name in names if "with" in name} == {f"fmha_with_{name}_d64_fp16" for name in ours}
    for name in ours:
        assert [spec for spec in asked if spec.name == f"fmha_with_{name}_d64_fp16"][-1].unconditional


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_the_kind", "nothing_of_the_kind"),
        ("x = 1", "declares no function; decorate one with @pyfmha.score_function"),
        (
            "import pyfmha\n@pyfmha.score_function\ndef wrong(score, query, key): return score",
            r"score function wrong takes \(score, query, key\)",
        ),
        (
            "import pyfmha\n@pyfmha.mask_function\ndef a(batch, head, query, key): return key > 1\nb = a",
            "a is assigned to b",
        ),
    ],
)  # fmt: skip
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "f.py").write_text(text)
    with pytest.raises((KernelSourceError, SpecError), match=message):
        declared(tmp_path / "f.py")


def test_a_function_that_does_not_compile_is_named(tmp_path: Path) -> None:
    path = tmp_path / "f.py"
    path.write_text(
        "import pyfmha\n@pyfmha.score_function\ndef wrong(score, batch, head, query, key):\n return score + nowhere\n"
    )
    spec = WithFunction("fp16", 32, function=declared(path)["wrong"]).specs()[0]
    with Compiler(1) as compiler, pytest.raises(CompileError, match="fmha_with_wrong_d32_fp16") as caught:
        compiler.compile(spec, SM90[0])
    assert "nowhere" in str(caught.value)


def test_no_such_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyfmha.cli.base.errors", Console(width=300, stderr=True))
    with pytest.raises(KernelSourceError, match=f"nowhere.py is no file of functions; .*{', '.join(SHIPPED)}"):
        file_of("nowhere.py")


def test_names_of_the_kernels_own_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.py"
    path.write_text(
        "import pyfmha\n@pyfmha.score_function\ndef f(score, batch, head, query, key, q_len): return score\n"
    )
    with pytest.raises(SpecError, match="argument q_len is given more than once"):
        function_specs(list(declared(path).values()), ["fp16"], [32])


def test_float64_in_a_process_of_its_own(tmp_path: Path) -> None:
    both = declared(written(tmp_path))["both"]
    scores = np.random.default_rng(0).standard_normal((1, 2, 20, 20))
    found, seen = evaluate(both, scores, {"slopes": np.float32([0.5, 0.25]), "more": 2})

    i, j = np.arange(20)[:, None], np.arange(20)[None, :]
    np.testing.assert_allclose(found, scores + np.array([0.5, 0.25])[:, None, None] * (j - i), rtol=1e-12)
    assert (seen == ((i - j <= 7) & (j <= i))).all()


def spec(**options: Any) -> KernelSpec:
    arguments = (Argument("x", "*fp32"), Argument("n", "i32"))
    return KernelSpec(Path("k.py"), "k", "k", arguments, (("BLOCK", 16),), "n", **options)


def test_functions_of_a_spec() -> None:
    function = JitFunction("F", Path("f.py"), "f")
    variants = {
        spec().variant, spec(functions=(function,)).variant,
        spec(functions=(JitFunction("F", Path("f.py"), "g"),)).variant,
    }  # fmt: skip
    assert len(variants) == 3
    assert spec(functions=(function,)).variant == spec(functions=(JitFunction("F", Path("other.py"), "f"),)).variant
    with pytest.raises(SpecError, match="argument n is given more than once"):
        spec(functions=(JitFunction("n", Path("f.py"), "f"),))


def test_a_spec_with_functions_survives_a_file() -> None:
    function = JitFunction("F", Path("f.py"), "f.score")
    whole = spec(functions=(function,), tuples=(("inputs", ("n",)),))
    assert spec_from_data(json.loads(json.dumps(spec_to_data(whole)))) == whole
    old = {name: value for name, value in spec_to_data(spec()).items() if name != "functions"}
    assert spec_from_data(old) == spec()


def test_null_inputs_are_refused() -> None:
    near = Declared(Path("f.py"), "near", (("slopes", "*fp32"),), ("SCORE",))
    for one in WithFunction("fp16", 32, function=near).specs():
        assert "slopes" in {argument.name for argument, condition in one.needed_pointers() if condition is None}
