"""What ``pyfmha verify --functions`` computes: the functions that come along on their examples, by the kernel under the
interpreter; and what the command says of functions that nobody gave."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import some_of

from pyfmha.attention.biased import ARGUMENTS, KERNEL, KERNEL_FILE, POINTERS, Biased
from pyfmha.attention.forward import kernel_path
from pyfmha.errors import KernelSourceError, SpecError
from pyfmha.functions.evaluate import packed_inputs
from pyfmha.functions.family import ATTRIBUTES, SHIPPED, Declared, file_of
from pyfmha.interpreter.kernel import FunctionOf, Null, Tensor, run_interpreted
from pyfmha.verify.function_cases import FunctionCase, examples_in, function_cases

EXAMPLES = {function.name: (function, example) for name in SHIPPED for function, example in examples_in(file_of(name))}


def run(case: FunctionCase, without: str = "") -> str:
    """What is wrong with the kernel's result, by the case; or that of a kernel without a function."""
    args: dict[str, Any] = {
        name: Null(kind[1:].replace("T", case.dtype)) for name, kind in ARGUMENTS if name in POINTERS
    }
    out = case.blank("Out")
    args |= {"Out": Tensor(out, case.dtype)} | {name: Tensor(case.inputs[name], case.dtype) for name in "QKV"}
    for name, argument, dtype in (("bias", "Bias", case.dtype), ("mask", "Mask", "u8"), ("sinks", "Sinks", case.dtype)):
        if name in case.tensors:
            args[argument] = Tensor(case.tensors[name], dtype)
    args |= dict(zip([name for name, _ in ARGUMENTS][len(POINTERS) :], case.call().scalars(), strict=True))
    args["inputs"] = packed_inputs(case.function, case.inputs_of)
    spec = Biased(case.dtype, case.head_size).generic()
    constants: dict[str, Any] = {name: value for name, value in spec.constants if name != "inputs"}
    for part in case.function.parts:
        if part != without:
            source = str(case.function.source)
            constants[part] = FunctionOf(source, f"{case.function.name}.{ATTRIBUTES[part]}")
    integers = {name: value for name, value in args.items() if isinstance(value, int)}
    grid = tuple(expression.evaluate(integers) for expression in spec.grid_expressions)
    run_interpreted(kernel_path().with_name(KERNEL_FILE), KERNEL, grid, args, constants)
    return case.judge(out, None)[1]


def named(function: Declared, example: Any, name: str) -> FunctionCase:
    (found,) = [case for case in function_cases(function, example, "fp16", 32) if case.name.endswith(name)]
    return replace(found, batch=1) if found.batch == 1 else found


@pytest.mark.parametrize("name", some_of(EXAMPLES))
def test_those_that_come_along_pass(name: str) -> None:
    assert run(named(*EXAMPLES[name], "alone")) == ""


def test_together_with_everything_else() -> None:
    assert run(named(*EXAMPLES["alibi"], "one key head")) == ""
    assert run(named(*EXAMPLES["documents"], "one key head")) == ""


@pytest.mark.parametrize(("name", "part"), [("alibi", "SCORE"), ("prefix", "SEEN")])
def test_a_function_that_is_ignored_fails(name: str, part: str) -> None:
    assert "relative error" in run(named(*EXAMPLES[name], "soft cap"), part)


def test_bounds_that_hide_what_the_function_shows_fail() -> None:
    function, example = EXAMPLES["documents"]
    case = named(function, example, "alone")
    wrong = replace(case, inputs_of={**case.inputs_of, "ends": np.maximum(case.inputs_of["ends"] - 3, 0)})
    case.__dict__["evaluated"] = case.evaluated
    assert run(case) == ""
    wrong.__dict__["evaluated"] = case.evaluated
    assert "relative error" in run(wrong)


def test_a_function_without_example(tmp_path: Path) -> None:
    path = tmp_path / "f.py"
    path.write_text(
        "import pyfmha\n@pyfmha.mask_function\ndef even(batch, head, query, key):\n    return key % 2 == 0\n"
    )
    with pytest.raises(SpecError, match=r"even of .*f\.py has no example of its inputs.*example="):
        list(examples_in(path))
    path.write_text("1 / 0")
    with pytest.raises(KernelSourceError, match="ZeroDivisionError"):
        list(examples_in(path))


def test_a_file_may_import_what_lies_beside_it(tmp_path: Path) -> None:
    """As a pair does whose functions are of other files."""
    (tmp_path / "first.py").write_text(
        "import pyfmha\n@pyfmha.mask_function(example=lambda *_: {})\ndef even(batch, head, query, key):\n"
        "    return key % 2 == 0\n"
    )
    (tmp_path / "pair.py").write_text(
        "import pyfmha\nfrom first import even\n"
        "@pyfmha.score_function(example=lambda *_: {})\ndef half(score, batch, head, query, key):\n"
        "    return score / 2\nhalf_even = pyfmha.score_and_mask('half_even', half, even)\n"
    )
    assert [function.name for function, _ in examples_in(tmp_path / "pair.py")] == ["half", "half_even"]
