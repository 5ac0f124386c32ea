"""What ``pyfmha verify`` computes with biases and masks: run by the kernel under the interpreter, and judged."""

import numpy as np
import pytest

from pyfmha.attention.biased import ARGUMENTS, KERNEL, KERNEL_FILE, POINTERS, Biased
from pyfmha.attention.forward import kernel_path
from pyfmha.interpreter.kernel import Null, Tensor, run_interpreted
from pyfmha.verify.biased_cases import BiasedCase, biased_cases


def run(case: BiasedCase, fault: str = "") -> str:
    """What is wrong with the kernel's result, by the case."""
    args: dict[str, object] = {
        name: Null(kind[1:].replace("T", case.dtype)) for name, kind in ARGUMENTS if name in POINTERS
    }
    out = case.blank("Out")
    args |= {"Out": Tensor(out, case.dtype)} | {name: Tensor(case.inputs[name], case.dtype) for name in "QKV"}
    batch, heads, seq, _ = case.shape("Out")
    lse = np.full(batch * heads * seq, np.nan, np.float32)
    if case.lse:
        args["Lse"] = Tensor(lse, "fp32")
    for name, values in (("q_lengths", case.q_lengths), ("kv_lengths", case.kv_lengths), ("cu_seqlens_q", case.cu_q),
                         ("cu_seqlens_kv", case.cu_kv)):  # fmt: skip
        if values is not None:
            args[name] = np.array(values, np.int32)
    for name, kind in (("bias", case.bias_dtype), ("mask", "own"), ("sinks", case.sinks)):
        if name in case.tensors and name != fault:
            dtype = "u8" if name == "mask" else case.dtype_of(kind)
            args[name.capitalize() + "Fp32" * (dtype not in ("u8", case.dtype))] = Tensor(case.tensors[name], dtype)
    args |= dict(zip([name for name, _ in ARGUMENTS][len(POINTERS) :], case.call().scalars(), strict=True))
    spec = Biased(case.dtype, max(case.shape("Q")[3], case.shape("V")[3])).generic()
    integers = {name: value for name, value in args.items() if isinstance(value, int)}
    grid = tuple(expression.evaluate(integers) for expression in spec.grid_expressions)
    run_interpreted(kernel_path().with_name(KERNEL_FILE), KERNEL, grid, args, dict(spec.constants))
    return case.judge(out, lse.reshape(batch, heads, seq) if case.lse else None)[1]


NAMED = {case.name: case for case in biased_cases("fp16", 32)}
CHOSEN = (
    "bias of pairs, window", "bias of -inf, keys", "bias of queries", "mask, lengths", "bias, mask, sinks, window",
    "bias and mask, NaN in what is masked", "sinks, rows without keys", "values of another size",
    "ragged, mask, bottom right", "one query", "largest inputs, mask", "one query, odd rows of it",
)  # fmt: skip


@pytest.mark.parametrize("name", CHOSEN)
def test_the_kernel_passes(name: str) -> None:
    assert run(NAMED[name]) == ""


@pytest.mark.parametrize(
    ("fault", "name"),
    [("bias", "one query"), ("mask", "one query"), ("sinks", "ragged, sinks"), ("bias", "bias of keys")],
)
def test_a_tensor_that_is_ignored_fails(fault: str, name: str) -> None:
    assert run(NAMED[name], fault) != ""


def test_cases_hold_what_they_are_for() -> None:
    poisoned = NAMED["bias and mask, NaN in what is masked"]
    assert np.isnan(poisoned.view("K", poisoned.inputs["K"])).any()
    assert np.isnan(poisoned.view_of("bias")).any()
    assert np.isneginf(NAMED["bias of -inf"].view_of("bias")).any()
    assert np.isfinite(NAMED["mask of keys"].exact[0]).all()
    assert np.isneginf(NAMED["mask"].exact[1]).any()
