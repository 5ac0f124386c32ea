"""Kernels with functions of a user's in a build: what is kept, what is left out, and what is said of a wrong one."""

from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from pyfmha.aot import Compiler, build, preview
from pyfmha.attention.function_operator import UserFunction
from pyfmha.cli.builds import told
from pyfmha.cli.functions import functions_of
from pyfmha.errors import CompileError, KernelSourceError
from pyfmha.functions.family import declared_in
from pyfmha.interpreter.kernel import _load_kernel
from pyfmha.spec.arch import parse_archs
from pyfmha.spec.constants import JitFunction
from pyfmha.spec.kernel import Argument, KernelSpec

SM90 = parse_archs(["sm_90"])

KERNELS = """
    import triton
    import triton.language as tl
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl

    @gluon.jit
    def fast(x, SCORE: gl.constexpr):
        i = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
        gl.store(x + i, SCORE(gl.load(x + i), 0, 0, 1, 2))

    @triton.jit
    def plain(x, SCORE: tl.constexpr):
        i = tl.arange(0, 32)
        tl.store(x + i, SCORE(tl.load(x + i), 0, 0, 1, 2))
"""

FUNCTIONS = """
    import triton.language as tl
    import pyfmha

    @pyfmha.score_function
    def scaled(score, batch, head, query, key):
        return score * {factor}

    @pyfmha.score_function
    def ranged(score, batch, head, query, key):
        return score * {factor} + tl.sum(tl.arange(0, 16), 0)

    @pyfmha.score_function
    def wrong(score, batch, head, query, key):
        return score + nowhere
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a file of kernels and a file of functions."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "kernels.py").write_text(dedent(KERNELS))
    write(folder, 2)
    return folder


def write(folder: Path, factor: int) -> None:
    (folder / "functions.py").write_text(dedent(FUNCTIONS.format(factor=factor)))


def spec(folder: Path, kernel: str, function: str = "scaled", name: str = "", **options: Any) -> KernelSpec:
    return KernelSpec(
        source=folder / "kernels.py", kernel=kernel, name=name or function, arguments=(Argument("x", "*fp32"),),
        constants=(), grid="1", num_warps=1, num_stages=1, algorithm_name="default",
        functions=(JitFunction("SCORE", folder / "functions.py", f"{function}.score"),), **options,
    )  # fmt: skip


def test_a_function_that_gluon_does_not_take_leaves_the_portable_kernel(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder holds that, compiled again where the file has changed; then the plugin's digest is another, too."""
    out = tmp_path / "out"
    specs = [spec(files, "fast", "ranged", archs=("sm_90",)), spec(files, "plain", "ranged")]
    first = build(specs, SM90, out, jobs=1)
    held = {function.name: [v.kernel for v in function.algorithms[0]] for function in first.manifest.functions}
    assert held == {"ranged": ["plain"]}
    (line,) = first.left_out
    assert line.startswith(
        "ranged has no fast variant for sm_90, where the portable kernel serves: Gluon does not take"
    )
    assert "ranged: GluonSemantic.arange()" in line
    assert f"Note: {line}" in list(told(first))
    assert "\n" not in line

    again = build(specs, SM90, out, jobs=1)
    assert (again.up_to_date, again.compiled, again.left_out) == (True, 0, first.left_out)

    # From any folder, what it holds stays.
    monkeypatch.chdir(tmp_path)
    other = spec(files, "plain", name="other")

    result = build([other], SM90, out, jobs=1)
    assert (result.kept, result.compiled) == (("ranged",), 1)

    before = _load_kernel(files / "functions.py", "ranged").__pyfmha__()["score"]
    write(files, 3)
    found = functions_of([], ["fp16"], [64], out, fresh=False)
    assert not found.specs
    after = [str(dict(operator.attributes)["score_function"].default) for operator in found.operators]
    assert [text.partition(":")[0] for text in after] == ["ranged", "scaled"]
    assert before not in after
    assert len(preview([other], SM90, out).missing) == 2
    assert functions_of([], ["fp16"], [64], out, fresh=True).operators == []
    (files / "functions.py").write_text("import nothing_of_the_kind")
    with pytest.raises(KernelSourceError, match=r"nothing_of_the_kind.*\n.* holds functions of that file; mend it, or"):
        functions_of([], ["fp16"], [64], out, fresh=False)
    (files / "functions.py").unlink()
    with pytest.raises(KernelSourceError, match=r"holds ranged, and its file of functions .*functions.py is not there"):
        preview([replace(other, functions=())], SM90, out)


def test_a_function_that_triton_does_not_take_is_named_with_its_line(files: Path, compiler: Compiler) -> None:
    assert compiler.compile(spec(files, "fast", archs=("sm_90",)), SM90[0]).code
    for one in (spec(files, "plain", "wrong"), spec(files, "fast", "wrong", archs=("sm_90",))):
        with pytest.raises(CompileError) as caught:
            compiler.compile(one, SM90[0])
        assert f"wrong.score of {files / 'functions.py'} does not compile: CompilationError" in str(caught.value)
        assert "return score + nowhere" in str(caught.value)
        assert "tl.store" not in str(caught.value), "the kernel's own lines are no help"


def test_the_digest_goes_by_what_a_function_does(tmp_path: Path, compiler: Compiler) -> None:
    """Not by comments, docstrings, layout, or what else the file holds; by helpers and the values that it reads."""
    text = '''
        import triton
        import triton.language as tl
        import pyfmha

        REACH = tl.constexpr(5)
        OTHER = 1

        @triton.jit
        def helper(x):
            return x * 2

        @pyfmha.mask_function(bounds=lambda first_query, last_query: (first_query - REACH, last_query + 1))
        def near(batch, head, query, key):
            """Keys that are near."""
            return (query - key < helper(REACH)) & (key <= query)
    '''
    changes = {
        "same": ("", ""), "comment": ("    return (query", "    # near\n            return (query"),
        "docstring": ("Keys that are near.", "Others."), "other": ("OTHER = 1", "OTHER = 2"),
        "layout": ("(query - key < helper(REACH)) &", "(query - key\n < helper(REACH)) &"),
        "value": ("constexpr(5)", "constexpr(6)"), "helper": ("x * 2", "x * 3"), "bounds": ("_query + 1", "_query + 2"),
        "body": ("key <= query", "key < query"), "shape": ("mask_function(", "mask_function(requires=('heads > 1',), "),
    }  # fmt: skip
    found = {}
    for number, (name, (old, new)) in enumerate(changes.items()):
        path = tmp_path / f"masks{number}.py"
        path.write_text(
            dedent(text).replace(dedent(old), dedent(new)) if name != "comment" else dedent(text.replace(old, new))
        )
        (function,) = declared_in(path, compiler.collect)
        assert isinstance(function.function, UserFunction)
        found[name] = function.function.mask
    same = {name for name, digest in found.items() if digest == found["same"]}
    assert same == {"same", "comment", "docstring", "other", "layout"}
    assert len(set(found.values())) == len(changes) - len(same) + 1
