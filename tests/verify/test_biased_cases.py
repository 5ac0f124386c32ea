"""What ``pyfmha verify`` computes with biases and masks: run by the kernel under the interpreter, and judged."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import few_of, some_of
from sanitize_gpu import Addresses

from pyfmha.attention import biased_decode
from pyfmha.attention.biased import ARGUMENTS, KERNEL, KERNEL_FILE, POINTERS, Biased
from pyfmha.attention.forward import kernel_path
from pyfmha.functions.family import file_of, function_specs
from pyfmha.interpreter.kernel import Null, Tensor, run_interpreted
from pyfmha.spec.kernel import KernelSpec
from pyfmha.verify.biased_cases import BiasedCase, biased_cases, biased_decode_cases
from pyfmha.verify.function_cases import examples_in, function_cases
from pyfmha.verify.variants import _arguments, _plans


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


@pytest.mark.parametrize("name", some_of(CHOSEN))
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


class _Recorded:
    """Stands for the memory of a case on the device: every array has an address of its own."""

    def __init__(self, case: BiasedCase) -> None:
        self.contents: dict[int, np.ndarray] = {}
        self.out = self.add(case.blank("Out"))
        self.inputs = [self.add(case.inputs[name]).pointer for name in "QKV"]
        self.lse = self.add(np.zeros(4, np.uint8)) if case.lse else None

    def add(self, content: np.ndarray, shift: int = 0) -> SimpleNamespace:
        address = 4096 * (1 + len(self.contents)) + shift
        self.contents[address] = content
        return SimpleNamespace(pointer=address)

    def integers(self, values: object) -> int:
        return 0 if values is None else self.add(np.array(values, np.int32)).pointer


LAUNCHED = ("bias, mask, sinks, window", "bias in fp32", "ragged, mask, bottom right", "sinks, rows without keys")


@pytest.mark.parametrize("name", LAUNCHED)
def test_arguments_of_a_launch(name: str) -> None:
    case = NAMED[name]
    recorded = _Recorded(case)
    function = SimpleNamespace(manifest=SimpleNamespace(arguments=ARGUMENTS))
    values = dict(zip([n for n, _ in ARGUMENTS], _arguments([function], case, recorded), strict=True))

    held = {argument: recorded.contents[values[argument]] for argument in POINTERS if values[argument]}
    wide = {"bias": "BiasFp32" if case.bias_dtype == "fp32" else "Bias", "mask": "Mask",
            "sinks": "SinksFp32" if case.sinks == "fp32" else "Sinks"}  # fmt: skip
    assert {n for n in held if n in ("Bias", "BiasFp32", "Mask", "Sinks", "SinksFp32")} == {
        wide[n] for n in case.tensors
    }
    for tensor, content in case.tensors.items():
        assert held[wide[tensor]] is content
    assert (values["q_len"], values["kv_len"], values["ragged"]) == (case.q_len, case.kv_len, int(case.ragged))
    assert ("cu_seqlens_q" in held) == case.ragged


DECODED = {case.name: case for case in biased_decode_cases("fp16", 64)}


@pytest.mark.parametrize(
    "name", few_of(DECODED, lambda name: name.endswith(("NaN in what is masked", "values of half")))
)
def test_decoding_passes(name: str) -> None:
    """With the arguments of the launches, run by both kernels under the interpreter."""
    case = DECODED[name]
    recorded = _Recorded(case)
    lse = np.full(case.shape("Out")[:3], np.nan, np.float32)
    if case.lse:
        recorded.lse = recorded.add(lse.reshape(-1))
    names = [name for name, _ in biased_decode.ARGUMENTS]
    pair = biased_decode.BiasedDecode("fp16", 64)
    functions = [SimpleNamespace(name=pair.split_name, manifest=SimpleNamespace(arguments=biased_decode.ARGUMENTS))]
    args = dict(zip(names, _arguments(functions, case, recorded), strict=True))
    for argument, kind in biased_decode.ARGUMENTS[: len(biased_decode.POINTERS)]:
        dtype = kind[1:].replace("T", "fp16")
        content = recorded.contents.get(args[argument], np.zeros(0, np.uint8))
        content = content.view(np.float32) if dtype == "fp32" else content
        args[argument] = Tensor(content, dtype) if args[argument] else Null(dtype)
    integers = {name: value for name, value in args.items() if isinstance(value, int)}
    split, _, combine = pair.specs()
    for spec in (split, combine):
        grid = tuple(expression.evaluate(integers) for expression in spec.grid_expressions)
        run_interpreted(spec.source, spec.kernel, grid, args, dict(spec.constants))
    assert case.judge(recorded.contents[recorded.out.pointer], lse if case.lse else None)[1] == ""


def test_inputs_of_a_function_follow() -> None:
    ((function, example),) = examples_in(file_of("alibi"))
    case = function_cases(function, example, "fp16", 32)[0]
    recorded = _Recorded(case)
    names = [*(n for n, _ in ARGUMENTS), "slopes"]
    values = _arguments([SimpleNamespace(manifest=SimpleNamespace(arguments=[(n, "") for n in names]))], case, recorded)

    assert len(values) == len(names)
    np.testing.assert_array_equal(recorded.contents[values[-1]], np.float32([2**-4, 2**-8]))


def test_the_families_of_a_library_are_in_its_plans() -> None:
    """Without a GPU: which functions are verified, with which cases."""
    functions = {spec.name for spec in [*Biased("fp16", 32).specs()]} | {"fmha_with_alibi_d32_fp16"}
    manifest = SimpleNamespace(arguments=(*ARGUMENTS, ("slopes", "*fp32")), algorithms=[()])

    class Held(dict):
        path = Path("lib.so")

    library = Held({name: SimpleNamespace(name=name, manifest=manifest) for name in functions})
    plans = {held[0].name: cases for held, cases in _plans(library, ["fp16"], 0, list(examples_in(file_of("alibi"))))}

    assert set(plans) == functions
    assert [case.name for case in plans["fmha_biased_d32_fp16"]] == list(NAMED)
    assert len(plans["fmha_with_alibi_d32_fp16"]) == 11


def tma_takes(spec: KernelSpec, given: dict[str, float], item: int) -> bool:
    """Whether the strides of what comes by TMA are whole 16 bytes."""
    names = (
        (stride, 1 if one.base == "Mask" else item)
        for one in spec.descriptors
        for stride in one.strides
        if isinstance(stride, str)
    )
    return all(given[stride] * size % 16 == 0 for stride, size in names)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("padded", [64, 128, 256])
def test_each_variant_for_hopper_has_a_case(dtype: str, padded: int) -> None:
    """By the conditions of their specs and what TMA takes, in the order in which they are tried."""
    specs = [spec for spec in Biased(dtype, padded).specs() if "sm_90" in (spec.archs or ())]
    names = [argument.name for argument in specs[0].arguments]
    function = SimpleNamespace(manifest=SimpleNamespace(arguments=[(name, "") for name in names]))
    reached = set()
    for case in biased_cases(dtype, padded):
        given = dict(zip(names, _arguments([function], case, Addresses(case)), strict=True))
        if case.shift or case.tensor_shift:
            continue
        kept = (
            i
            for i, spec in enumerate(specs)
            if all(eval(one, {}, given) for one in spec.requires) and tma_takes(spec, given, 2)
        )
        reached |= {next(kept, None)}
    assert reached >= set(range(len(specs))), [specs[i].requires for i in range(len(specs)) if i not in reached]


@pytest.mark.parametrize("name", ["alibi", "prefix", "groups"])
@pytest.mark.parametrize("padded", [64, 128])
def test_each_variant_with_a_function_has_a_case(name: str, padded: int) -> None:
    """Portable ones, too, and those that make lists: by the conditions and hints of their specs, as they are tried."""
    ((declared, example),) = examples_in(file_of(name))
    families: dict[str, list[KernelSpec]] = {}
    for spec in function_specs([declared], ["bf16"], [padded]):
        families.setdefault(spec.name, []).append(spec)
    for specs in families.values():
        names = [argument.name for argument in specs[0].arguments]
        function = SimpleNamespace(manifest=SimpleNamespace(arguments=[(one, "") for one in names]))
        reached = set()
        for case in function_cases(declared, example, "bf16", padded):
            given = dict(zip(names, _arguments([function], case, Addresses(case)), strict=True))
            reached |= {next(i for i, spec in enumerate(specs) if serves(spec, given))}
        assert reached == set(range(len(specs))), [specs[i].variant for i in range(len(specs)) if i not in reached]


def serves(spec: KernelSpec, given: dict[str, float]) -> bool:
    """Whether a variant takes a call with these arguments on Hopper."""
    hints = {argument.name: argument.hint for argument in spec.arguments if argument.hint}
    return (
        all(eval(one, {}, given) for one in spec.requires)
        and all(given[name] % hint == 0 if hint > 1 else given[name] == 1 for name, hint in hints.items())
        and all(given[one.base] % 16 == 0 for one in spec.descriptors)
        and tma_takes(spec, given, 2)
    )
