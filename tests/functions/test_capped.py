"""Soft caps in score functions: the arithmetic, which functions are nothing else, and what kernels are told."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.random import default_rng
from test_functions import BASE, OWN, check, declared

from pyfmha.aot.cubin import Compiler
from pyfmha.attention import biased_hopper
from pyfmha.functions.evaluate import evaluate
from pyfmha.functions.family import WithFunction, declared_in, file_of
from pyfmha.interpreter.kernel import _load_kernel, run_interpreted

HEAD = """import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.libdevice import tanh
import pyfmha
from pyfmha import soft_cap
CAP = tl.constexpr(30.0)

@pyfmha.score_function(inputs={"caps": "*fp32"})
"""


def in_file(folder: Path, body: str) -> Path:
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    file = folder / "of_user.py"
    file.write_text(f"{HEAD}def f(score, batch, head, query, key, caps):\n{lines}")
    return file


@pytest.mark.parametrize(
    "body",
    [
        "return pyfmha.soft_cap(score, tl.load(caps + head))",
        '"""A cap of each head."""\ncap = tl.load(caps + head)\nreturn soft_cap(score, cap)',
        "first: tl.constexpr = 2\nother = tl.load(caps + batch) * first\nreturn soft_cap(score, cap=other + CAP)",
        "return soft_cap(score, CAP)",
        "found = soft_cap(score, CAP)\nreturn found",
        "cap = tl.load(caps + head)\nreturn cap * libdevice.tanh(score / cap)",
        "cap = tl.load(caps + head)\nx = score * (1.0 / cap)\nx = tl.extra.cuda.libdevice.tanh(x)\nreturn x * cap",
        "return tanh(score / 30.0) * 30.0",
        "return 30.0 * tanh((1 / 30.0) * score)",
        "cap = tl.load(caps + head)\nreturn (2 * tl.sigmoid(2 * score / cap) - 1) * cap",
        "e = tl.exp(2.0 * score / tl.load(caps + head))\nreturn tl.load(caps + head) * ((e - 1.0) / (e + 1.0))",
        "e = tl.exp(score / (0.5 * CAP))\nreturn CAP * (e - 1) / (1 + e)",
    ],
)
def test_a_function_that_is_a_soft_cap_and_nothing_else(body: str, tmp_path: Path) -> None:
    file = in_file(tmp_path, body)
    found = _load_kernel(file, "f")
    assert found.__pyfmha__()["capped"]
    scores = default_rng(0).standard_normal((1, 2, 3, 4)) * 40
    caps = np.float32([30.0, 30.0])
    made, _ = evaluate(declared(file, "f"), scores, {"caps": caps}, run=run_interpreted)
    told = inspect.getsource(found.cap.fn).partition("return ")[2]  # to Hopper's kernel
    (tmp_path / "told").mkdir()
    file = in_file(tmp_path / "told", f"return score * 0 + {told}")
    cap, _ = evaluate(declared(file, "f"), scores, {"caps": caps}, run=run_interpreted)
    assert set(cap.flat) == {90.0 if "other" in body else 30.0}
    np.testing.assert_allclose(made, cap * np.tanh(scores / cap), rtol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        "return soft_cap(score, tl.load(caps + key))",
        "cap = tl.load(caps + head) + query\nreturn soft_cap(score, cap)",
        "score = score * 2\nreturn soft_cap(score, CAP)",
        "return soft_cap(score * 2, CAP)",
        "return soft_cap(score, CAP) + 1",
        "cap = CAP\nfor i in range(2):\n    cap += tl.load(caps + i)\nreturn soft_cap(score, cap)",
        "return tl.maximum(score, CAP)",
        "return 30.0 * tanh(score / 20.0)",
        "return 30.0 * tanh(score * score / 30.0)",
        "return 30.0 * tl.exp(score / 30.0)",
        "return 30.0 * tanh(2 * score / 30.0)",
        "return 30.0 * (2 * tl.sigmoid(score / 30.0) - 1)",
        "return 30.0 * (3 * tl.sigmoid(2 * score / 30.0) - 1)",
        "return 30.0 / tanh(score / 30.0)",
        "return key * tanh(score / key)",
        "return tanh(score)",
        "e = tl.exp(2 * score / CAP)\nreturn CAP * (e - 1) / (e + 2)",
        "e = tl.exp(2 * score / CAP)\nreturn CAP * (e - 1) / (tl.exp(score) + 1)",
        "if head > 0:\n    score = score * 2\nreturn soft_cap(score, CAP)",
        "return score.to(tl.float32)",
    ],
)
def test_others_are_asked_for_each_score(body: str, tmp_path: Path) -> None:
    assert not _load_kernel(in_file(tmp_path, body), "f").__pyfmha__()["capped"]


def test_a_function_of_that_name_is_not_the_helper(tmp_path: Path) -> None:
    file = in_file(tmp_path, "return soft_cap(score, CAP)")
    file.write_text(
        file.read_text().replace("from pyfmha import soft_cap", "def soft_cap(score, cap):\n    return cap")
    )
    assert not _load_kernel(file, "f").__pyfmha__()["capped"]


def test_the_kernel_under_the_interpreter() -> None:
    caps = np.float32([2.0, 5.0])
    shipped = declared(file_of("soft_caps"), "soft_caps")
    check(shipped, {"caps": caps}, BASE, lambda s, b, h, i, j: caps[h] * np.tanh(s / caps[h]))


def test_of_float64_it_is_exact_and_of_float32_nearly() -> None:
    """2**-22 of the result, of the smallest scores, too."""
    scores = np.geomspace(1e-7, 300, 64).reshape(1, 1, 1, 64) * default_rng(0).choice([-1, 1], 64)
    cap = np.float32([7.0])
    wanted = np.float64(cap[0]) * np.tanh(scores / cap[0])
    found, _ = evaluate(declared(OWN, "soft_cap"), scores, {"caps": cap}, run=run_interpreted)
    # In float64 small scores lose as many digits as they are below 1: the reference's own rounding is absolute.
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-14)
    narrow = _load_kernel(OWN, "narrow_cap")
    assert narrow is not None
    rounded, _ = evaluate(declared(OWN, "narrow_cap"), scores, {"caps": cap}, run=run_interpreted)
    exact = np.float64(cap[0]) * np.tanh(scores.astype(np.float32).astype(np.float64) / cap[0])
    np.testing.assert_allclose(rounded, exact, rtol=2**-22)


def test_only_the_hopper_kernel_is_told(compiler: Compiler) -> None:
    (function,) = declared_in(file_of("soft_caps"), compiler.collect)
    specs = WithFunction("fp16", 64, function=function).specs()
    told: dict[bool, set[Any]] = {True: set(), False: set()}
    for spec in specs:
        told[spec.kernel == biased_hopper.KERNEL].add(tuple(f.parameter for f in spec.functions))
    assert told == {True: {("SCORE", "CAP")}, False: {("SCORE",)}}
