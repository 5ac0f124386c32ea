"""Functions of CUDA's libdevice in kernels under the interpreter, against Python's own."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pyfmha.errors import InterpreterError
from pyfmha.interpreter.kernel import run_interpreted
from pyfmha.interpreter.libdevice import CONDITIONS, FLOATS

KERNEL = """import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.libdevice import {name}


@triton.jit
def apply(X, Y, Out, N: tl.constexpr, AS: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Out + i, {call})
"""
X = (-2.5, -0.75, -0.0, 0.3, 0.5, 1.5, 2.5, 60.0)
Y = (2.0, -1.25, 0.5, 3.0, -0.5, 1.0, 7.0, 0.25)


def applied(folder: Path, name: str, call: str, kind: type = np.float64) -> np.ndarray:
    file = folder / "of_user.py"
    file.write_text(KERNEL.format(name=name, call=call))
    x, y = (np.array(values, kind) for values in (X, Y))
    out = np.full(8, np.nan, kind)
    run_interpreted(file, "apply", (1,), {"X": x, "Y": y, "Out": out}, {"N": 8, "AS": None})
    return out


def _each(function: Callable[..., float], *values: float) -> float:
    try:
        return function(*values)
    except (ValueError, OverflowError):
        return math.nan


@pytest.mark.parametrize("kind", [np.float64, np.float32])
@pytest.mark.parametrize("way", ["libdevice.{}", "{}", "tl.extra.cuda.libdevice.{}"])
def test_however_it_is_called(way: str, kind: type, tmp_path: Path) -> None:
    found = applied(tmp_path, "tanh", way.format("tanh") + "(tl.load(X + i))", kind)
    np.testing.assert_allclose(found, [math.tanh(kind(x)) for x in X], rtol=4 * np.finfo(kind).eps)


@pytest.mark.parametrize(
    "name",
    [
        *("sin", "cos", "tan", "sinh", "cosh", "tanh", "asin", "acos", "atan", "asinh", "acosh", "atanh"),
        *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "cbrt", "floor", "ceil", "trunc"),
        *("erf", "erfc"),
    ],
)
def test_of_one_number_as_python_computes_it(name: str, tmp_path: Path) -> None:
    found = applied(tmp_path, name, f"libdevice.{name}(tl.load(X + i))")
    wanted = [_each(getattr(math, name), x) for x in X]
    known = np.isfinite(wanted)
    assert known.any()
    np.testing.assert_allclose(found[known], np.array(wanted)[known], rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        ("rsqrt(tl.load(X + i))", lambda x, _y: 1 / math.sqrt(x) if x > 0 else math.nan),
        ("exp10(tl.load(Y + i))", lambda _x, y: 10**y),
        ("round(tl.load(X + i))", lambda x, _y: math.copysign(math.floor(abs(x) + 0.5), x)),
        ("rint(tl.load(X + i))", lambda x, _y: float(round(x))),
        ("atan2(tl.load(X + i), tl.load(Y + i))", math.atan2),
        ("pow(tl.load(X + i), 2.0)", lambda x, _y: x * x),
        ("fdim(tl.load(X + i), tl.load(Y + i))", lambda x, y: max(x - y, 0.0)),
        ("fma(tl.load(X + i), tl.load(Y + i), 1.0)", lambda x, y: x * y + 1),
        ("copysign(tl.load(X + i), tl.load(Y + i))", math.copysign),
        ("fast_expf(tl.load(Y + i))", lambda _x, y: math.exp(y)),
        ("div_rn(tl.load(X + i), tl.load(Y))", lambda x, _y: x / Y[0]),
        ("isnan(tl.load(X + i) * float('inf'))", lambda x, _y: float(x == 0)),
    ],
)
def test_others(call: str, wanted: Callable[[float, float], float], tmp_path: Path) -> None:
    found = applied(tmp_path, "tanh", f"libdevice.{call}")
    expected = np.array([_each(wanted, x, y) for x, y in zip(X, Y, strict=True)])
    known = ~np.isnan(expected)
    np.testing.assert_allclose(found[known], expected[known], rtol=1e-12)


def test_what_is_not_known_is_named(tmp_path: Path) -> None:
    with pytest.raises(InterpreterError, match=r"libdevice\.cyl_bessel_i0 is not known to .*; it knows abs,"):
        applied(tmp_path, "tanh", "libdevice.cyl_bessel_i0(tl.load(X + i))")


def test_other_types_are_refused_as_the_compiler_does(tmp_path: Path) -> None:
    with pytest.raises(InterpreterError, match=r"takes fp32 and fp64, given: fp16; write x.to\(tl.float32\)"):
        applied(tmp_path, "tanh", "libdevice.tanh(tl.load(X + i).to(tl.float16))")


def test_triton_has_all_of_them() -> None:
    from triton.language.extra import libdevice
    from triton.language.extra.cuda import libdevice as of_cuda

    for name in (*FLOATS, *CONDITIONS):
        assert callable(getattr(libdevice, name))
        assert callable(getattr(of_cuda, name))
    assert libdevice.tanh(1.0) is None  # as Triton has it, when no kernel runs
