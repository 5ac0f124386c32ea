"""Operators and attention on the CPU, as they are described, against float64."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from helpers import KERNELS

import pyfmha
from pyfmha.aot import Compiler
from pyfmha.aot.operator_specs import load_operators
from pyfmha.attention.reference import LIMITS, attend, relative_error
from pyfmha.attention.run import to_float, to_storage
from pyfmha.errors import InterpreterError, KernelSourceError, PluginError
from pyfmha.interpreter.kernel import run_interpreted
from pyfmha.operators.description import Operator

FILE = KERNELS / "operators.py"
CHANCE = np.random.default_rng(5)
X = CHANCE.standard_normal((3, 300)).astype(np.float32)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run here, which interprets: that saves the start of a process. The example's test has its own."""
    monkeypatch.setattr("pyfmha.interpreter.operators.run_in_subprocess", run_interpreted)


@pytest.fixture(scope="module")
def operators(compiler: Compiler) -> Mapping[str, Operator]:
    return {operator.name: operator for operator in load_operators(compiler, FILE)}


def test_two_launches_with_a_workspace_and_an_output_that_may_be_there(operators: Mapping[str, Operator]) -> None:
    found = pyfmha.interpret_operator(operators["Centre"], {"X": X}, tell=1)

    assert list(found) == ["Y", "Means"]
    means = X.astype(np.float64).mean(axis=1)
    assert relative_error(found["Means"], means) < 1e-5
    assert relative_error(found["Y"], X - means[:, None]) < 1e-5


def test_an_input_whose_values_are_sizes_and_what_is_not_written(operators: Mapping[str, Operator]) -> None:
    given = {"X": X[:2, :4], "Index": np.array([1, 0], np.int32), "Shape": (5, 4)}
    (out,) = pyfmha.interpret_operator(operators["Place"], given, weights=(1.0, 0.5)).values()

    # Row ``Shape[0] - n + 2 * index`` of the rows of four that Y has.
    rows = out.reshape(-1, 4)
    assert out.shape == (5, 8, 4)
    assert (rows[[5, 3]] == 0.5 * X[:2, :4]).all()
    assert np.isnan(np.delete(rows, [5, 3], axis=0)).all()


def test_an_empty_tensor_launches_nothing(operators: Mapping[str, Operator]) -> None:
    (out,) = pyfmha.interpret_operator(operators["Centre"], {"X": X[:0]}, source="none.py").values()
    assert out.shape == (0, 300)


@pytest.mark.parametrize(
    ("given", "more", "message"),
    [
        ({}, {}, "inputs are missing; give X"),
        ({"X": X, "Z": X}, {}, "inputs are X, Z; give X"),
        ({"X": X[0]}, {}, r"shapes are X \[300\]"),
        ({"X": X.astype(np.float16)}, {}, "X is of type HALF; it must be FLOAT"),
        ({"X": X.tolist()}, {}, r"X is list; give a numpy array of float32, .*\(bf16 is uint16\)"),
        ({"X": X.astype(np.float64)}, {}, "X is float64; give a numpy array of"),
        ({"X": X}, {"tel": 1}, "Centre has no attribute tel; it has: tell"),
        ({"X": X}, {"tell": "yes"}, "tell is 'yes'; it must be int32"),
        ({"X": X}, {"tell": 2}, "tell is 2"),
    ],
)
def test_what_does_not_fit_is_refused(
    operators: Mapping[str, Operator], given: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(PluginError, match=message):
        pyfmha.interpret_operator(operators["Centre"], given, **more)


def test_the_file_of_the_kernels_is_asked_for(operators: Mapping[str, Operator], tmp_path: Any) -> None:
    with pytest.raises(InterpreterError, match=r"in which file the kernels of Centre are; give source='its_file\.py'"):
        pyfmha.interpret_operator(operators["Centre"].of(""), {"X": X})
    with pytest.raises(KernelSourceError, match=r"cannot read .*none\.py"):
        pyfmha.interpret_operator(operators["Centre"], {"X": X}, source=tmp_path / "none.py")


def test_an_operators_name_is_not_enough() -> None:
    with pytest.raises(PluginError, match=r"operator is 'Centre'; give its description, a pyfmha\.Operator"):
        pyfmha.interpret_operator("Centre", {})  # type: ignore[arg-type]


def test_attention_of_another_library_is_no_kernel_here() -> None:
    from pyfmha.attention.operator import OPERATOR

    q = np.ones((1, 1, 4, 64), np.float16)
    with pytest.raises(InterpreterError, match="fmha_d64_fp16 is a function of a library, and no kernel is given"):
        pyfmha.interpret_operator(
            OPERATOR, {"Q": q, "K": q, "V": q}, num_heads=1, head_size=64, type_id=1, softmax_scale=0.125
        )


def qkv(dtype: str, heads: int, kv_heads: int, seq: int, kv_seq: int, size: int) -> list[Any]:
    shapes = [(1, heads, seq, size), (1, kv_heads, kv_seq, size), (1, kv_heads, kv_seq, size)]
    return [to_storage(CHANCE.standard_normal(shape), dtype) for shape in shapes]


def test_attention_with_features() -> None:
    q, k, v = qkv("fp16", 2, 1, 20, 40, 30)
    lengths = np.array([33], np.int32)
    out, lse = pyfmha.interpret_attention(
        q, k, v, causal="bottom-right", window=(9, -1), softcap=4.0, scale=0.3, kv_lengths=lengths, return_lse=True
    )

    exact, exact_lse = attend(
        q, k, v, sm_scale=0.3, softcap=4.0, window_left=9, window_right=0, bottom_right=True, kv_lengths=lengths
    )
    assert (out.dtype, out.shape, lse.dtype, lse.shape) == (np.float16, q.shape, np.float32, (1, 2, 20))
    assert relative_error(out, exact) < LIMITS["fp16"]
    assert np.abs(lse - exact_lse).max() < 1e-4


def test_attention_with_a_mask_in_bfloat16() -> None:
    q, k, v = qkv("bf16", 1, 1, 9, 21, 64)
    mask = CHANCE.random((9, 21)) < 0.6
    out = pyfmha.interpret_attention(q, k, v, causal=False, mask=mask)

    exact, _ = attend(*(to_float(x, "bf16") for x in (q, k, v)), sm_scale=0.125, mask=mask)
    assert out.dtype == np.uint16
    assert relative_error(to_float(out, "bf16"), exact) < LIMITS["bf16"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "interpret_attention is not told whether the attention is causal"),
        ({"causal": "botom-right"}, "causal is 'botom-right'"),
        ({"causal": True, "k": "q8"}, r"Q and K one head size, got Q \[1, 1, 4, 64\] HALF"),
        ({"causal": True, "scale": 0.0}, "^scale is 0.0; give a finite float32 other than 0"),
        ({"causal": True, "scale": "1"}, "^scale is '1'; give"),
        ({"causal": True, "q": [1.0]}, "Q is list; give a numpy array of float16"),
        ({"causal": True, "kv_lengths": np.array([3])}, "kv_lengths is of type INT64; it must be INT32"),
        ({"causal": True, "mask": np.ones((3, 4), bool)}, r"mask is \[3, 4\]"),
    ],
)
def test_attention_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    q = np.ones((1, 1, 4, 64), np.float16)
    given = {"q": q, "k": q, "v": q, **changes}
    if isinstance(given["k"], str):
        given["k"] = q[..., :8]
    with pytest.raises(PluginError, match=message):
        pyfmha.interpret_attention(**given)
