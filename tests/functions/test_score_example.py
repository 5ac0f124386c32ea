"""The example of a score function, as a user runs it."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import FakeCuda
from helpers import LONG, TESTS
from shared import Shared
from trt_double.full.fixtures import example_environment
from typer.testing import CliRunner

import pyfmha
from pyfmha.aot import Compiler, build
from pyfmha.attention.reference import LIMITS, attend, relative_error
from pyfmha.cli.main import app
from pyfmha.errors import InterpreterError, KernelSourceError, PluginError, SpecError
from pyfmha.functions.alibi import alibi
from pyfmha.functions.documents import documents
from pyfmha.functions.evaluate import evaluate
from pyfmha.functions.family import Declared, declared_in, function_specs
from pyfmha.functions.natten import natten
from pyfmha.functions.prefix import prefix
from pyfmha.interpreter.kernel import _load_kernel, run_interpreted
from pyfmha.spec.arch import parse_archs
from pyfmha.verify.function_cases import examples_in

EXAMPLE = TESTS.parent / "examples" / "score_function"


def run(*arguments: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_it_is_right_under_the_interpreter() -> None:
    done = run("--interpret", "--seq-len", "40", environment=example_environment(None, None))

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("kerple [1, 4, 40, 64] fp16: relative error ")


def test_it_has_what_verify_asks_for() -> None:
    ((function, example),) = examples_in(EXAMPLE / "kerple.py")
    inputs = example(1, 2, 5, 7)
    scores = np.random.default_rng(0).standard_normal((1, 2, 5, 7))
    found, _ = evaluate(function, scores, inputs, run=run_interpreted)
    distance = np.abs(np.arange(5)[:, None] - np.arange(7))
    penalty = [r1 * np.log(1 + r2 * distance) for r1, r2 in zip(inputs["r1"], inputs["r2"], strict=True)]
    np.testing.assert_allclose(found[0], scores[0] - np.array(penalty), rtol=1e-6, atol=1e-6)


def test_without_a_library_it_says_how_one_is_built(tmp_path: Path) -> None:
    done = run(environment=example_environment(None, tmp_path / "none.so"))

    assert (done.returncode, done.stdout) == (2, "")
    command = done.stderr.strip().partition("this program's function: pyfmha ")[2]
    again = CliRunner().invoke(app, [*command.split(), "--arch", "sm_80", "-o", str(tmp_path), "--dry-run"])
    assert again.exit_code == 0, again.output
    assert "Would compile fmha_with_kerple_d64_fp16" in again.output


@LONG
def test_the_librarys_function_is_launched(compiler: Compiler, shared: Shared, fake_driver: FakeCuda) -> None:
    """On the double of a GPU, for which a function changes nothing."""
    declared = declared_in(EXAMPLE / "kerple.py", compiler.collect)
    specs = [spec for spec in function_specs(declared, ("fp16",), (64,)) if not spec.archs]
    archs = parse_archs(["sm_90"])
    library = shared.once("kerple", lambda folder: build(specs, archs, folder, jobs=1).library)
    environment = example_environment(fake_driver.path, library)

    plain = run("--strength", "0", environment=environment)
    other = run("--strength", "1", environment=environment)

    assert plain.returncode == 0, plain.stdout + plain.stderr
    assert other.returncode == 1, other.stderr


def test_a_function_in_the_interpreter_is_checked() -> None:
    q = np.ones((1, 2, 3, 64), np.float16)
    slopes = np.ones(2, np.float32)
    for wrong, error, message in (
        ({"score": alibi}, PluginError, "alibi takes slopes; 0 are given"),
        ({"score": alibi, "score_inputs": {"slope": slopes}}, SpecError, "alibi takes slopes; given: slope"),
        ({"score": alibi, "score_inputs": [slopes.astype(np.float16)]}, SpecError, r"slopes is \*fp32; given: \*fp16"),
        ({"score": "alibi"}, SpecError, "function is 'alibi'; give what"),
        ({"score": 3}, PluginError, "score is of type int"),
        ({"mask": alibi, "mask_inputs": [slopes]}, PluginError, "alibi is a score function; give it as score=alibi"),
        ({"score": alibi, "score_inputs": [slopes], "mask": prefix}, PluginError, "pyfmha.score_and_mask"),
        ({"score_inputs": [slopes]}, PluginError, "score_inputs are given, and no score function"),
        ({"score": alibi, "score_inputs": [slopes[:1]]}, PluginError, r"alibi_slopes \[1\]; they must be"),
        ({"mask": natten, "mask_inputs": [4, 4, 2]}, PluginError, "natten requires window % 2 == 1; here window is 2"),
    ):
        with pytest.raises(error, match=message):
            pyfmha.interpret_attention(q, q, q, causal=True, **wrong)


def test_numbers_that_shapes_tell_may_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a network; a tensor that is too small is refused, not read past its end."""
    monkeypatch.setattr("pyfmha.interpreter.operators.run_in_subprocess", run_interpreted)
    q = np.random.default_rng(3).standard_normal((1, 1, 6, 64)).astype(np.float16)
    begins, ends = np.int32([[0, 0, 0, 3, 3, 3]]), np.int32([[3, 3, 3, 6, 6, 6]])
    found = [
        pyfmha.interpret_attention(q, q, q, causal=False, mask=documents, mask_inputs=inputs)
        for inputs in ([begins, ends], [begins, ends, 6], {"begins": begins, "ends": ends})
    ]
    alike = np.arange(6) // 3
    exact, _ = attend(q, q, q, mask=alike[:, None] == alike)
    assert relative_error(found[0], exact) < LIMITS["fp16"]
    assert all((one == found[0]).all() for one in found)
    with pytest.raises(PluginError, match="documents requires tokens >= queries; here tokens is 4, queries is 6"):
        pyfmha.interpret_attention(q, q, q, causal=False, mask=documents, mask_inputs=[begins[:, :4], ends[:, :4]])


def test_a_mask_function_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyfmha.interpreter.operators.run_in_subprocess", run_interpreted)
    q, k, v = np.random.default_rng(3).standard_normal((3, 1, 1, 12, 64)).astype(np.float16)
    lengths = np.array([5], np.int32)
    out = pyfmha.interpret_attention(q, k, v, causal=False, mask=prefix, mask_inputs={"lengths": lengths})

    query, key = np.arange(12)[:, None], np.arange(12)
    exact, _ = attend(q, k, v, mask=(key <= query) | (key < 5))
    assert relative_error(out, exact) < LIMITS["fp16"]


def test_a_function_that_fails_in_the_interpreter_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With what went wrong itself, not what Triton wraps around it."""
    path = tmp_path / "own.py"
    path.write_text(
        "import pyfmha\n\n@pyfmha.score_function\ndef lost(score, batch, head, query, key):\n    score + 1\n"
    )
    monkeypatch.setattr("pyfmha.interpreter.operators.run_in_subprocess", run_interpreted)
    q = np.ones((1, 1, 3, 64), np.float16)
    with pytest.raises(
        InterpreterError, match=r"with lost\.score of own\.py failed under the interpreter: TypeError: "
    ):
        pyfmha.interpret_attention(q, q, q, causal=True, score=_load_kernel(path, "lost"))


def test_a_function_must_be_one_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "import pyfmha\n\ndef made():\n    @pyfmha.score_function\n"
        "    def half(score, batch, head, query, key):\n        return score / 2\n    return half\n"
    )
    half = _load_kernel(path, "made")()
    scores = np.zeros((1, 1, 2, 2))
    with pytest.raises(KernelSourceError, match=r"own\.py has no variable half; a function must be one of its file"):
        evaluate(Declared.of(half), scores, {}, run=run_interpreted)
    path.unlink()
    with pytest.raises(KernelSourceError, match=r"half is of .*own\.py, which is no file; write it to one"):
        evaluate(Declared.of(half), scores, {}, run=run_interpreted)


@pytest.mark.long
def test_a_file_that_runs_attention_when_it_is_imported(tmp_path: Path) -> None:
    """It would start a process that imports it, and so on."""
    path = tmp_path / "script.py"
    path.write_text(
        "import numpy as np\nimport pyfmha\n\n@pyfmha.score_function\ndef half(score, batch, head, query, key):\n"
        "    return score / 2\n\nq = np.ones((1, 1, 2, 32), np.float16)\n"
        "pyfmha.interpret_attention(q, q, q, causal=True, score=half)\n"
    )
    found = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False, timeout=60)
    assert 'run it below `if __name__ == "__main__":`, or from another file' in found.stderr
