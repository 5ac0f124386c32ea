"""``pyfmha build --operators``: a kernel of one's own with its description becomes functions and plugins."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import LONG, TESTS, python_environment
from shared import Shared
from trt_double.library_calls import LibraryCalls

from pyfmha.aot import Compiler, build
from pyfmha.aot.operator_specs import load_operators, operator_specs
from pyfmha.attention.operator import NAME, OPERATOR
from pyfmha.errors import KernelSourceError, SpecError
from pyfmha.operators.description import Operator
from pyfmha.runtime.library import Library
from pyfmha.spec.arch import parse_archs

EXAMPLE = TESTS.parent / "examples" / "operator"


def pyfmha(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyfmha", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=python_environment(),
    )


@LONG
def test_the_example_is_built_and_kept(tmp_path: Path, compiler: Compiler, shared: Shared) -> None:
    shared.lend(tmp_path)
    done = pyfmha("build", "--operators", EXAMPLE / "bias_gelu.py", "--arch", "sm_90", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    library = Library(tmp_path / "libpyfmha.so")
    assert list(library) == [f"acme_biasgelu_{kind}" for kind in ("bf16", "fp16", "fp32")]
    assert [len(library[name].manifest.algorithms) for name in library] == [2, 2, 2]
    assert [operator.name for operator in library.operators] == ["BiasGelu"]

    calls = LibraryCalls(library.path)
    assert calls.field_names(calls.named("BiasGelu")) == [("scale", 1)]

    # Another build in the folder keeps the operator and its plugin.
    more = operator_specs(compiler, load_operators(compiler, EXAMPLE / "bias_gelu.py")[0])[:2]
    result = build(more, parse_archs(["sm_80"]), tmp_path, operators=[OPERATOR])
    assert [operator["name"] for operator in result.manifest.operators] == [NAME, "BiasGelu"]
    fresh = build(more, parse_archs(["sm_80"]), tmp_path, fresh=True)
    assert fresh.manifest.operators == ()


def test_the_example_is_right() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLE / "run.py", "--interpret", "--rows", "5", "--cols", "33"],
        capture_output=True,
        text=True,
        check=False,
        env=python_environment(),
    )
    assert done.returncode == 0, done.stderr
    assert "BiasGelu [5, 33]: relative error" in done.stdout


HEAD = """
import triton
import triton.language as tl
import pyfmha

@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < n, 0.0), at < n)

def given(**changes):
    return {"x": "X", "y": "Y", "n": "length", **changes}

def launch(**changes):
    usual = {"arguments": given(), "constants": {"BLOCK": 64}, "grid": "cdiv(n, BLOCK)"}
    return pyfmha.Launch(kernel=copy, **{**usual, **changes})

def operator(**changes):
    given = {"inputs": {"X": "fp32[length]"}, "outputs": {"Y": "fp32[length]"}, "launches": [launch()]}
    return pyfmha.Operator(name="Copy", **{**given, **changes})

"""


def described(compiler: Compiler, folder: Path, text: str) -> list[Operator]:
    """What a file describes behind :data:`HEAD`."""
    file = folder / "described.py"
    file.write_text(f"{HEAD}{text}\n")
    return load_operators(compiler, file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("O = operator(launches=[launch(arguments={'x': 'X', 'y': 'Y'})])", "argument n of the kernel has no source"),
        ("O = operator(launches=[launch(arguments={'x': 'X', 'y': 'Y', 'n': 'rows'})])", "'rows' is not known"),
        ("O = operator(launches=[launch(constants={})])", "constant BLOCK has no value"),
        ("O = operator(launches=[launch(constants={'BLOCK': 64, 'C': 1})])", "the kernel has no parameter C"),
        ("O = operator(launches=[launch(configs=[pyfmha.Config({'C': 1})])])", "no parameter C; it has x"),
        ("O = operator(checks=['length > 0'])", r"checks is \('length > 0',\); give a list of Check\(\.\.\.\)"),
        ("O = operator(launches=[launch(grid='')])", "there is no grid"),
        ("O = operator(launches=[launch(grid='cdiv(m, 4)')])", "^Copy: launch of copy: grid .*'m' is no integer"),
        ("O = operator(launches=[launch(scalars={'n': 'i77'})])", "^Copy: launch of copy: unknown type 'i77'"),
        ("O = operator(launches=[launch(arguments=given(y='X'))])", "^Copy: output Y is given to no launch"),
        ("O = operator(namespace='n' * 65)", "^Copy: its namespace has 65 characters; at most 64 are allowed"),
        ("O = operator(launches=[launch()] * 17)", "^Copy has 17 launches; the plugin in C has room for 16"),
        ("O = operator(launches=[launch(arguments=given(x='1'), scalars={'x': '*fp32'})])", "pointer"),
        ("O = operator(launches=[launch(arguments=given(n='0.5 * length'), scalars={'n': 'i32'})])", "float"),
        (
            "O = operator(launches=[launch(scalars={'x': '*fp16'})])",
            r"argument x: the kernel is compiled for \*fp16, and X is of fp32; allowed are \*fp32, \*i32, \*u32, \*i8",
        ),
        ("O = operator(outputs={'X': 'fp32[length]'})", "X is an input and an output: nothing is computed in place"),
        ("O = operator(outputs={'Y': 'fp32[other]'})", "'other' is not known"),
        ("O = operator(define={'a': 'b + 1', 'b': 'a + 1'})", "a cycle, or an order to change"),
        ("O = operator(inputs={'X': 'fp12[size]'})", "'fp12' is no type"),
        ("O = 1", "describes no operator"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_or_its_kernel_is_refused(
    compiler: Compiler, tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises((SpecError, KernelSourceError), match=message):
        _ = [operator_specs(compiler, operator) for operator in described(compiler, tmp_path, text)]


def test_too_many_operators_are_refused_before_anything_is_compiled(compiler: Compiler, tmp_path: Path) -> None:
    (operator,) = described(compiler, tmp_path, "O = operator()")
    many = [replace(operator, name=f"Copy{number}") for number in range(65)]
    compiled: list[str] = []
    with pytest.raises(SpecError, match="65 operators for one library; it has room for 64: build a second"):
        build(
            operator_specs(compiler, operator),
            parse_archs(["sm_90"]),
            tmp_path / "out",
            operators=many,
            progress=lambda done, count, name: compiled.append(name),
        )
    assert compiled == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A, B = operator(), operator(launches=[launch(grid='7')])", "^Copy, version 1 is described twice"),
        (
            "A, B = operator(namespace='a.b'), operator(namespace='a_b')",
            "^a.b::Copy, version 1 and a_b::Copy, version 1 would both compile a_b_copy: of names, functions have",
        ),
        ("A = operator()\nB = replace(A, name='COPY')", "would both compile copy"),
    ],
)  # fmt: skip
def test_operators_whose_functions_have_one_name_are_refused(
    compiler: Compiler, tmp_path: Path, text: str, message: str
) -> None:
    """Else one would launch the kernels of the other."""
    operators = described(compiler, tmp_path, f"from dataclasses import replace\n{text}")
    specs = [spec for operator in operators for spec in operator_specs(compiler, operator)]
    with pytest.raises(SpecError, match=message):
        build(specs, parse_archs(["sm_90"]), tmp_path / "out", operators=operators)


@pytest.mark.long
def test_two_versions_have_functions_of_their_own(compiler: Compiler, tmp_path: Path) -> None:
    text = "A, B = operator(), operator(version='2', launches=[launch(constants={'BLOCK': 128})])"
    operators = described(compiler, tmp_path, text)
    for operator in operators:  # one build adds to the other
        built = build(
            operator_specs(compiler, operator), parse_archs(["sm_90"]), tmp_path / "out", operators=[operator]
        )
    assert [(f.name, len(f.algorithms)) for f in built.manifest.functions] == [("copy", 1), ("copy_v2", 1)]


def test_a_grid_may_ask_what_expressions_ask(compiler: Compiler, tmp_path: Path) -> None:
    """Each question is an argument that the grid alone reads; its answer may be of 64 bits."""
    text = (
        "attributes={'sizes': 'int32[] = [2]'}, launches=[launch(grid='cdiv(numel(Y), BLOCK), sizes[0] + numel(Y)')])"
    )
    (operator,) = described(compiler, tmp_path, f"O = operator({text}")
    (launch,) = operator.launches
    assert dict(launch.arguments) == {"x": "X", "y": "Y", "n": "length", "numel_Y": "numel(Y)", "sizes_0": "sizes[0]"}
    spec = operator_specs(compiler, operator)[0]
    assert spec.grid == "cdiv(numel_Y, BLOCK), sizes_0 + numel_Y"
    assert spec.grid_arguments == ("numel_Y", "sizes_0")
    assert [argument.type for argument in spec.arguments] == ["*fp32", "*fp32", "i32", "i64", "i64"]


def test_pointers_of_what_may_be_missing_may_be_null(compiler: Compiler, tmp_path: Path) -> None:
    text = (
        "O = operator(inputs={'X': 'fp32[length]', 'W': 'fp32[length] when weighted'},"
        " attributes={'weighted': 'int32 = 0'}, launches=[launch(arguments=given(x='W if weighted else X'))])"
    )
    (operator,) = described(compiler, tmp_path, text)
    assert {spec.nullable for spec in operator_specs(compiler, operator)} == {("x",)}
