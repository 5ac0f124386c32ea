"""Any kernel on numpy arrays under Triton's interpreter, in this process and in another."""

import importlib
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward_runs import Problem, fill, launch, place
from numpy.random import default_rng

from pyfmha.bfloat16 import bf16_from_float, float_from_bf16
from pyfmha.errors import InterpreterError, KernelSourceError, OutputError
from pyfmha.interpreter.kernel import Null, Tensor, run_interpreted
from pyfmha.interpreter.process import Interpreter, run_in_subprocess

KERNELS = """
    import triton
    import triton.language as tl

    @triton.jit
    def scale(X, Y, factor, n, BLOCK: tl.constexpr, TWICE: tl.constexpr = False):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(X + offsets, mask=offsets < n, other=0)
        y = x * factor
        if TWICE:
            y = y * 2
        tl.store(Y + offsets, y.to(Y.dtype.element_ty), mask=offsets < n)

    @triton.jit
    def product(A, B, C, N: tl.constexpr):
        i = tl.arange(0, N)
        at = i[:, None] * N + i[None, :]
        tl.store(C + at, tl.dot(tl.load(A + at), tl.load(B + at)))

    @triton.jit
    def largest(X, Y, N: tl.constexpr):
        x = tl.load(X + tl.arange(0, N))
        tl.store(Y, tl.max(x, 0).to(Y.dtype.element_ty))
        tl.store(Y + 1, tl.sum(tl.where(x < 0, -x, x).to(tl.float32), 0).to(Y.dtype.element_ty))

    @triton.jit
    def grid(X):
        at = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
        tl.store(X + at, at)

    @triton.jit
    def wide(X, a):
        tl.store(X, a * 2)

    @triton.jit
    def maybe(X, Y):
        tl.store(Y, tl.load(X, mask=tl.cast(X, tl.int64) != 0, other=5))

    @triton.jit
    def broken(X):
        tl.store(X, tl.arange(0, 3))
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / "small.py"
    path.write_text(textwrap.dedent(KERNELS))
    return path


@pytest.mark.parametrize("run", [run_interpreted, run_in_subprocess])
def test_arrays_change_in_place_and_guards_stay(kernels: Path, run) -> None:
    x = np.arange(10, dtype=np.float32)
    store = np.full(16, 7, np.float16)
    run(kernels, "scale", (3,), {"X": x, "Y": Tensor(store, "fp16", offset=3), "factor": 0.5, "n": 10},
        {"BLOCK": 4, "TWICE": True})  # fmt: skip
    np.testing.assert_array_equal(store, [7] * 3 + list(range(10)) + [7] * 3)


@pytest.mark.parametrize("run", [run_interpreted, run_in_subprocess])
def test_the_same_array_twice_stays_one(kernels: Path, run) -> None:
    x = np.arange(8, dtype=np.float32)
    args = {"X": Tensor(x, "fp32"), "Y": Tensor(x, "fp32", 4), "factor": 2.0, "n": 4}
    run(kernels, "scale", (1,), args, {"BLOCK": 4})
    np.testing.assert_array_equal(x, [0, 1, 2, 3, 0, 2, 4, 6])


@pytest.mark.parametrize("run", [run_interpreted, run_in_subprocess])
def test_a_kernel_can_tell_a_null_pointer(kernels: Path, run) -> None:
    y = np.zeros(1, np.int32)
    run(kernels, "maybe", (1,), {"X": np.array([3], np.int32), "Y": y})
    assert y.tolist() == [3]
    run(kernels, "maybe", (1,), {"X": Null("i32"), "Y": y})
    assert y.tolist() == [5]
    with pytest.raises(InterpreterError, match="unknown dtype 'int'"):
        Null("int")


def test_the_whole_grid_runs(kernels: Path) -> None:
    x = np.full(2 * 3 * 4, -1, np.int32)
    run_interpreted(kernels, "grid", (2, 3, 4), {"X": x})
    np.testing.assert_array_equal(x, np.arange(24))


def test_floats_are_float32_and_large_integers_64_bits(kernels: Path) -> None:
    y = np.zeros(1, np.float64)
    run_interpreted(kernels, "scale", (1,), {"X": np.ones(1, np.float32), "Y": y, "factor": 0.1, "n": 1}, {"BLOCK": 1})
    assert y[0] == np.float32(0.1)
    x = np.zeros(1, np.int64)
    run_interpreted(kernels, "wide", (1,), {"X": x, "a": 2**40})
    assert x[0] == 2**41


def test_bfloat16_rounds_like_the_gpu(kernels: Path) -> None:
    values = (default_rng(0).standard_normal(256) * np.exp2(default_rng(1).integers(-20, 20, 256))).astype(np.float32)
    values[:3] = 1.9999, 255.9, 3.9999  # their mantissas carry into the exponent
    bits = np.zeros(256, np.uint16)
    run_interpreted(kernels, "scale", (1,), {"X": values, "Y": Tensor(bits, "bf16"), "factor": 1.0, "n": 256},
                    {"BLOCK": 256})  # fmt: skip
    np.testing.assert_array_equal(bits, bf16_from_float(values))


def test_bfloat16_arithmetic(kernels: Path) -> None:
    a, b = (bf16_from_float(default_rng(seed).standard_normal((16, 16))) for seed in (0, 1))
    c = np.zeros((16, 16), np.float32)
    run_interpreted(kernels, "product", (1,), {"A": Tensor(a, "bf16"), "B": Tensor(b, "bf16"), "C": c}, {"N": 16})
    np.testing.assert_allclose(c, float_from_bf16(a) @ float_from_bf16(b), rtol=1e-5, atol=1e-6)
    x, y = bf16_from_float([-8.0, 3.0, -0.5, 2.0]), np.zeros(2, np.float32)
    run_interpreted(kernels, "largest", (1,), {"X": Tensor(x, "bf16"), "Y": y}, {"N": 4})
    np.testing.assert_array_equal(y, [3.0, 13.5])


def test_triton_is_left_as_it_was(kernels: Path) -> None:
    from triton.runtime.interpreter import interpreter_builder

    before = set(vars(interpreter_builder))
    run_interpreted(kernels, "grid", (1,), {"X": np.zeros(1, np.int32)})
    with pytest.raises(InterpreterError):
        run_interpreted(kernels, "broken", (1,), {"X": np.zeros(4, np.int32)})
    assert {name for name in set(vars(interpreter_builder)) - before if not name.startswith("grid")} == set()


@pytest.mark.parametrize("run", [run_interpreted, run_in_subprocess])
def test_errors_are_clear(kernels: Path, run, tmp_path: Path) -> None:
    x = np.zeros(4, np.int32)
    with pytest.raises(InterpreterError, match="broken failed"):
        run(kernels, "broken", (1,), {"X": x})
    with pytest.raises(KernelSourceError, match="no kernel 'missing'"):
        run(kernels, "missing", (1,), {"X": x})
    with pytest.raises(InterpreterError, match="no parameter Z: it takes X"):
        run(kernels, "grid", (1,), {"X": x, "Z": 1})
    with pytest.raises(KernelSourceError, match="cannot read"):
        run(tmp_path / "none.py", "grid", (1,), {"X": x})
    (tmp_path / "raises.py").write_text("raise RuntimeError('on purpose')")
    with pytest.raises(KernelSourceError, match="on purpose"):
        run(tmp_path / "raises.py", "grid", (1,), {"X": x})


def test_unfit_tensors_are_refused() -> None:
    with pytest.raises(InterpreterError, match="bf16 is stored as uint16"):
        Tensor(np.zeros(4, np.float32), "bf16")
    with pytest.raises(InterpreterError, match="unknown dtype"):
        Tensor(np.zeros(4, np.float32), "float")
    with pytest.raises(InterpreterError, match="C-contiguous"):
        Tensor(np.zeros((4, 4), np.float32).T, "fp32")
    with pytest.raises(InterpreterError, match="outside"):
        Tensor(np.zeros(4, np.float32), "fp32", offset=5)


def test_arguments_of_other_types_are_refused(kernels: Path) -> None:
    with pytest.raises(InterpreterError, match="complex64"):
        run_interpreted(kernels, "grid", (1,), {"X": np.zeros(1, np.complex64)})
    with pytest.raises(InterpreterError, match="argument X is a str"):
        run_interpreted(kernels, "grid", (1,), {"X": "text"})


@pytest.mark.parametrize("first", ["pass", "import triton"])
def test_a_process_that_compiles_is_refused_and_has_the_other_way(kernels: Path, first: str) -> None:
    program = f"""
        import os
        os.environ.pop("TRITON_INTERPRET", None)
        {first}
        import numpy as np
        from pyfmha.errors import InterpreterError
        from pyfmha.interpreter.kernel import run_interpreted
        from pyfmha.interpreter.process import Interpreter, run_in_subprocess
        x = np.zeros(2, np.int32)
        for setting in (None, "1"):
            if setting and {first!r} != "pass":
                os.environ["TRITON_INTERPRET"] = setting  # too late
            try:
                run_interpreted({str(kernels)!r}, "grid", (2,), {{"X": x}})
            except InterpreterError as error:
                assert "TRITON_INTERPRET=1" in str(error), error
            else:
                raise SystemExit("it ran")
        run_in_subprocess({str(kernels)!r}, "grid", (2,), {{"X": x}})
        assert x.tolist() == [0, 1]
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).resolve().parents[2])  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.parametrize("run", [run_interpreted, run_in_subprocess])
@pytest.mark.parametrize("leave", ["import sys; sys.exit(0)", "raise SystemExit('enough')", "raise BaseException"])
def test_a_file_that_ends_its_process_is_an_error(tmp_path: Path, run, leave: str) -> None:
    (tmp_path / "leaves.py").write_text(leave)
    with pytest.raises(KernelSourceError, match=r"leaves.py cannot be imported: (SystemExit|BaseException)"):
        run(tmp_path / "leaves.py", "grid", (1,), {"X": np.zeros(1, np.int32)})


def test_one_process_interprets_kernel_after_kernel(kernels: Path, tmp_path: Path) -> None:
    """Whatever their files print, read or raise; after an error it is another."""
    (tmp_path / "which.py").write_text(
        "import os, sys, triton\nimport triton.language as tl\n"
        "assert sys.stdin.read() == ''\nprint('no end of line', end='')\nPID = tl.constexpr(os.getpid())\n"
        "@triton.jit\ndef which(X):\n    tl.store(X, PID)\n"
    )
    found = []
    with Interpreter() as interpreter:
        for kernel in (None, None, "broken", None):
            x = np.zeros(4, np.int32)
            if kernel:
                with pytest.raises(InterpreterError, match="broken failed under the interpreter"):
                    interpreter.run(kernels, kernel, (1,), {"X": x})
            else:
                interpreter.run(tmp_path / "which.py", "which", (1,), {"X": x})
                found.append(x[0])
        process = interpreter._process
        assert process is not None
    assert found[0] == found[1] != found[2] == process.pid
    assert process.returncode is not None  # it ended with the block


def test_a_process_that_ends_without_a_word_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "vanishes.py").write_text("import os; os._exit(0)")
    with pytest.raises(InterpreterError, match="ended with 0, without a result"):
        run_in_subprocess(tmp_path / "vanishes.py", "grid", (1,), {"X": np.zeros(1, np.int32)})
    with pytest.raises(InterpreterError, match="no-such-python does not start: No such file"):
        run_in_subprocess(tmp_path / "vanishes.py", "grid", (1,), {}, python="no-such-python")


def kernel_beside(folder: Path, value: int) -> Path:
    """A kernel file that imports a constant from the file beside it, and has a dataclass."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "beside.py").write_text(f"import triton.language as tl\nVALUE = tl.constexpr({value})\n")
    (folder / "uses.py").write_text(
        textwrap.dedent("""
        from __future__ import annotations
        from dataclasses import dataclass
        import triton
        import triton.language as tl
        from beside import VALUE

        @dataclass
        class Settings:
            size: int = 1

        @triton.jit
        def put(X):
            tl.store(X, VALUE)
    """)
    )
    return folder / "uses.py"


@pytest.mark.parametrize("run", [run_interpreted, run_in_subprocess])
def test_a_kernel_may_import_what_lies_beside_it(tmp_path: Path, run) -> None:
    x = np.zeros(1, np.int32)
    path, modules = list(sys.path), set(sys.modules)
    for folder, value in (("one", 7), ("two", 8), ("one", 7), ("one", 1234)):
        run(kernel_beside(tmp_path / folder, value), "put", (1,), {"X": x})
        assert x[0] == value
    assert sys.path == path
    assert {name for name in set(sys.modules) - modules if "beside" in name} == set()


@pytest.mark.parametrize("line", ["from .beside import VALUE", "from model.beside import VALUE", "from . import VALUE"])
@pytest.mark.parametrize("init", ["VALUE = 7", "VALUE = 7\nimport nothing_of_the_kind"])
def test_a_kernel_may_be_of_a_package(tmp_path: Path, line: str, init: str) -> None:
    """As a build takes it; of a package that fails there is its folder."""
    kept = dict(sys.modules)
    for folder, value in (("one", 7), ("two", 8)):
        path = kernel_beside(tmp_path / folder / "model", value)
        path.write_text(path.read_text().replace("from beside import VALUE", line))
        (path.parent / "__init__.py").write_text(
            "import triton.language as tl\n" + init.replace("7", f"tl.constexpr({value})")
        )
        x = np.zeros(1, np.int32)
        if line.endswith(". import VALUE") and "nothing" in init:
            with pytest.raises(KernelSourceError, match="cannot import name 'VALUE'"):
                run_interpreted(path, "put", (1,), {"X": x})
            continue
        run_interpreted(path, "put", (1,), {"X": x})
        assert x[0] == value
    assert {name for name in set(sys.modules) - set(kept) if "model" in name} == set()


def test_a_package_may_have_a_name_that_is_taken(tmp_path: Path) -> None:
    path = kernel_beside(tmp_path / "json", 9)
    path.write_text(path.read_text().replace("from beside", "from .beside"))
    x = np.zeros(1, np.int32)
    run_interpreted(path, "put", (1,), {"X": x})
    assert x[0] == 9


def test_what_interprets_starts_no_other_process(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that runs a kernel of its own when it is imported would go on for ever."""
    monkeypatch.setenv("PYFMHA_INTERPRETING", "1")
    with pytest.raises(InterpreterError, match="run it below `if __name__"):
        run_in_subprocess(kernels, "grid", (2,), {"X": np.zeros(2, np.int32)})


def test_files_in_the_current_folder_are_not_imported(
    kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("random", "json", "numpy", "triton"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    x = np.zeros(2, np.int32)
    run_in_subprocess(kernels, "grid", (2,), {"X": x})
    assert x.tolist() == [0, 1]


def test_what_another_process_cannot_be_given_is_refused(kernels: Path) -> None:
    x = np.zeros(2, np.int32)
    with pytest.raises(InterpreterError, match="argument X is a object: pass an array, a Tensor or a number"):
        run_in_subprocess(kernels, "grid", (1,), {"X": object()})  # type: ignore[dict-item]
    with pytest.raises(InterpreterError, match="constant BLOCK is a complex: pass a number, a text or None"):
        run_in_subprocess(kernels, "scale", (1,), {"X": x}, {"BLOCK": 1j})  # type: ignore[dict-item]
    with pytest.raises(InterpreterError, match="grid is"):
        run_in_subprocess(kernels, "grid", (1.5,), {"X": x})  # type: ignore[arg-type]
    run_in_subprocess(kernels, "grid", (np.int64(2),), {"X": x})
    assert x.tolist() == [0, 1]


def test_a_full_temporary_folder_is_an_error(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OutputError, match=r"temporary folder: .*No space left on device.* TMPDIR"):
        run_in_subprocess(kernels, "grid", (1,), {"X": np.zeros(1, np.int32)})


def test_a_result_that_finds_no_room_is_an_error(tmp_path: Path) -> None:
    # The limit on file sizes stands for a disk that is full by the time the result is written.
    (tmp_path / "fills.py").write_text(
        "import resource, triton\nresource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))\n"
        "@triton.jit\ndef nothing(X):\n    pass\n"
    )
    with pytest.raises(OutputError, match=r"temporary folder: .*File too large"):
        run_in_subprocess(tmp_path / "fills.py", "nothing", (1,), {"X": np.zeros(1000, np.int32)})


def test_no_room_even_for_the_error_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "fills.py").write_text(
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\nraise ValueError('on purpose')\n"
    )
    with pytest.raises(InterpreterError, match="on purpose"):
        run_in_subprocess(tmp_path / "fills.py", "nothing", (1,), {"X": np.zeros(1000, np.int32)})


def test_the_language_is_replaced_once_a_run_and_for_each_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter does it at each call of a device function, of which a run has hundreds."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    real, files = interpreter._patch_lang, []

    def counted(function: Any) -> Any:
        files.append(function.__globals__["__name__"])
        return real(function)

    monkeypatch.setattr(interpreter, "_patch_lang", counted)
    problem = Problem(heads=2, kv_heads=2, right=0, softcap=2.0)
    made = place(problem)
    fill(problem, made)
    fast = launch(problem, made)
    assert 1 <= len(files) == len(set(files)) < 10

    monkeypatch.setattr("pyfmha.interpreter.kernel.less_work", lambda _: nullcontext())
    files.clear()
    usual = launch(problem, made)
    assert len(files) > 100
    for one, other in zip(fast, usual, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("TWO * x", [2.0, 6.0]),
        ("TWO - x", [1.0, -1.0]),
        ("TWO / x", [2.0, 2 / 3]),
        ("TWO + TWO * x", [4.0, 8.0]),
        ("tl.where(TWO < x, 1.0, 0.0)", [0.0, 1.0]),
    ],
)
def test_constants_of_a_file_on_the_left_of_tensors(expression: str, wanted: list[float], tmp_path: Path) -> None:
    (tmp_path / "constant.py").write_text(
        "import triton\nimport triton.language as tl\nTWO = tl.constexpr(2.0)\n\n@triton.jit\ndef of(X):\n"
        f"    x = tl.load(X + tl.arange(0, 2))\n    tl.store(X + tl.arange(0, 2), {expression})\n"
    )
    x = np.float32([1, 3])
    run_interpreted(tmp_path / "constant.py", "of", (1,), {"X": x})
    np.testing.assert_allclose(x, wanted, rtol=1e-6)
