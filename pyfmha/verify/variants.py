"""The first half of ``pyfmha verify``: every variant of a library on this GPU against float64.

A script uses it as the command does: :func:`verify_library` yields what each case gave, :func:`summary_of` sums up by
variant.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyfmha.attention import key_blocks
from pyfmha.attention.biased import biased_family
from pyfmha.attention.biased_decode import biased_decode_family
from pyfmha.attention.decode import Decoding, decode_family
from pyfmha.attention.first import DTYPES, family
from pyfmha.attention.forward import forward_family
from pyfmha.attention.fp8 import fp8_family
from pyfmha.bfloat16 import STORAGE
from pyfmha.errors import DriverError, LibraryError, PyfmhaError
from pyfmha.functions.evaluate import packed_inputs
from pyfmha.functions.family import Declared, find
from pyfmha.interpreter.kernel import Tensor
from pyfmha.interpreter.process import Interpreter, run_in_subprocess
from pyfmha.runtime.device import Device, DeviceArray, Stream
from pyfmha.runtime.library import Function, Library
from pyfmha.runtime.serving import serving
from pyfmha.spec.advice import build_command, code_for
from pyfmha.spec.arch import arch_for
from pyfmha.verify.biased_cases import BiasedCase, biased_cases, biased_decode_cases
from pyfmha.verify.cases import NAN_BYTE, Case
from pyfmha.verify.forward_cases import decode_cases, first_cases, forward_cases
from pyfmha.verify.fp8_cases import Fp8Case, fp8_cases
from pyfmha.verify.function_cases import Example, FunctionCase, Run, function_plans
from pyfmha.verify.random_cases import random_cases

GUARD = 4096
"""Bytes before and after each output and workspace that must not change; a multiple of any alignment."""
PATTERN = 0xA5


@dataclass(frozen=True)
class Checked:
    """One case by one algorithm.

    Attributes:
        case: what was computed.
        variants: which variants ran.
        error: relative error of Out; NaN where it could not be had.
        failure: what is wrong; empty where nothing is.
    """

    case: Case
    variants: tuple[str, ...]
    error: float
    failure: str


@dataclass(frozen=True)
class Summary:
    """One variant over all its cases.

    Attributes:
        variant: its name.
        cases: how many it served.
        error: the worst, NaN if any is; None where it served none.
        limit: the largest error that passes.
        failures: how many of the cases failed.
    """

    variant: str
    cases: int
    error: float | None
    limit: float | None
    failures: int

    @property
    def passed(self) -> bool:
        """Whether it served a case, and no case failed."""
        return self.cases > 0 and not self.failures


class Memory:
    """Device memory between two guards, beginning some bytes past a multiple of 16.

    Args:
        content: bytes to begin with.
        shift: how many bytes past.
    """

    def __init__(self, content: Any, shift: int = 0) -> None:
        self._begin, self._size = GUARD + shift, content.nbytes
        whole = np.full(2 * GUARD + shift + content.nbytes, PATTERN, np.uint8)
        whole[self._begin : self._begin + self._size] = content.reshape(-1).view(np.uint8)
        self.array = DeviceArray.of(whole)

    @property
    def pointer(self) -> int:
        """Where the content begins."""
        return self.array.pointer + self._begin

    def read(self, dtype: Any) -> tuple[Any, bool]:
        """The content, flat, and whether the guards are as they were."""
        raw = self.array.to_host()
        end = self._begin + self._size
        intact = bool((raw[: self._begin] == PATTERN).all() and (raw[end:] == PATTERN).all())
        return raw[self._begin : end].copy().view(dtype), intact


class _Launched:
    """The memory of one case on the device."""

    def __init__(self, case: Case) -> None:
        self._made: list[Memory] = []
        shift = case.shift * np.dtype(STORAGE[case.dtype]).itemsize
        self.out = self.add(case.blank("Out"), shift)
        self.inputs = [self.add(case.inputs[name], shift).pointer for name in "QKV"]
        batch, heads, seq, _ = case.shape("Out")
        self.lse = self.add(np.full(batch * heads * seq * 4, NAN_BYTE, np.uint8), 4 * case.shift) if case.lse else None

    def add(self, content: Any, shift: int = 0) -> Memory:
        """More memory, freed with the rest."""
        self._made.append(Memory(content, shift))
        return self._made[-1]

    def integers(self, values: Sequence[int] | None) -> int:
        """Where an array of int32 is; 0 for none."""
        return 0 if values is None else self.add(np.array(values, np.int32)).pointer

    def intact(self) -> bool:
        """Whether all guards are as they were."""
        return all(memory.read(np.uint8)[1] for memory in self._made)

    def close(self) -> None:
        """Free it."""
        for memory in self._made:
            with suppress(DriverError):  # after a fault nothing can be freed, and the fault is what is reported
                memory.array.free()


def verify_library(
    library: Library,
    device: Device,
    dtypes: Sequence[str] = DTYPES,
    random: int = 0,
    examples: Sequence[tuple[Declared, Example]] = (),
) -> Iterator[Checked]:
    """Run every case with every algorithm of the attention functions that a library holds.

    Args:
        library: the library.
        device: the GPU, its context current.
        dtypes: which functions.
        random: problems of :mod:`pyfmha.verify.random_cases` for each ``fmha_fwd_*`` besides.
        examples: users' functions with their examples, as :func:`pyfmha.verify.function_cases.examples_in` has them.

    Raises:
        LibraryError: it has no code for the GPU, or no attention in these dtypes.
    """
    with Interpreter() as interpreter:
        every = list(_plans(library, dtypes, random, examples, interpreter.run))
        if not every:
            again = build_command(library.path)
            raise LibraryError(f"{library.path.name} holds no attention in {', '.join(dtypes)}; build it: {again}")
        plans = [(functions, cases) for functions, cases in every if _arch_of(functions, device.arch)]
        if not plans:
            raise LibraryError(
                f"{library.path} was built for {library.manifest.archs_in_words()}, the GPU here, {device.name}, is"
                f" {device.arch}; {code_for(device.arch, library.path, 'build it for this GPU: ')}"
            )
        yield from _checked(plans, device)


def _checked(plans: Sequence[tuple[list[Function], Sequence[Case]]], device: Device) -> Iterator[Checked]:
    for functions, cases in plans:
        arch = _arch_of(functions, device.arch) or device.arch
        loaded: list[Function] = []
        try:
            for function in functions:
                function.load()
                loaded.append(function)
            for case in cases:
                for algorithm in range(len(functions[0].manifest.algorithms)):
                    checked = check(functions, case, algorithm, arch, device)
                    yield checked
                    if checked.failure and _is_broken(device):
                        return
        finally:
            for function in loaded:
                with suppress(DriverError):  # a context that a kernel broke takes its modules along
                    function.unload()


def _arch_of(functions: Sequence[Function], gpu: str) -> str | None:
    """The architecture whose code of some functions a GPU runs, if it can run them all."""
    return arch_for(gpu, set.intersection(*(set(function.manifest.archs()) for function in functions)))


def without_code(library: Library, gpu: str, dtypes: Sequence[str]) -> list[str]:
    """The attention functions that have no code for a GPU, and are not checked there."""
    return [f.name for functions, _ in _plans(library, dtypes) if not _arch_of(functions, gpu) for f in functions]


def _is_broken(device: Device) -> bool:
    """Whether a kernel left the context unusable: every later call fails with its error."""
    try:
        device.synchronize()
    except DriverError:
        return True
    return False


def _plans(
    library: Library,
    dtypes: Sequence[str],
    random: int = 0,
    examples: Sequence[tuple[Declared, Example]] = (),
    run: Run = run_in_subprocess,
) -> Iterator[tuple[list[Function], Sequence[Case]]]:
    """Functions that are launched one after the other, with their cases; ``run`` interprets those of users."""
    for forward in forward_family(dtypes):
        if forward.name in library:
            cases = forward_cases(forward.dtype, forward.padded)
            yield [library[forward.name]], [*cases, *random_cases(forward.dtype, forward.padded, random)]
    for biased in biased_family(dtypes):
        if biased.name in library:
            yield [library[biased.name]], biased_cases(biased.dtype, biased.padded)
    for few in biased_decode_family(dtypes):
        if few.split_name in library and few.combine_name in library:
            functions = [library[few.split_name], library[few.combine_name]]
            yield functions, biased_decode_cases(few.dtype, few.padded)
    for eighth in fp8_family(dtypes):
        if eighth.name in library:
            yield [library[eighth.name]], fp8_cases(eighth.dtype, eighth.padded)
    for made, of_function in function_plans(examples, dtypes, run):
        if made.name in library:
            listing = [library[name] for name in made.listing_names]
            yield [*listing, find(library, made.function, made.dtype, made.padded)], of_function
    for pair in decode_family(dtypes):
        if pair.split_name in library and pair.combine_name in library:
            functions = [library[pair.split_name], library[pair.combine_name]]
            yield functions, decode_cases(pair.dtype, pair.padded)
    for member in family(dtypes):
        if member.name in library:
            cases = first_cases(member.dtype, member.head_size, member.causal, member.precision)
            yield [library[member.name]], cases


def runs_of(
    library: Library,
    gpu: str,
    dtypes: Sequence[str],
    random: int = 0,
    examples: Sequence[tuple[Declared, Example]] = (),
) -> int:
    """How many results :func:`verify_library` gives."""
    plans = [plan for plan in _plans(library, dtypes, random, examples) if _arch_of(plan[0], gpu)]
    return sum(len(cases) * len(functions[0].manifest.algorithms) for functions, cases in plans)


def check(functions: Sequence[Function], case: Case, algorithm: int, arch: str, device: Device) -> Checked:
    """Run one case and judge it; what goes wrong with it is in the result."""
    ran: list[str] = []
    launched = _Launched(case)
    try:
        arguments = _arguments(functions, case, launched)
        failure = ""
        for function in functions:
            number = _algorithm_of(function, algorithm)
            variant = function.variant(*arguments, algo_id=number)
            ran.append(variant)
            expected = [variant.name for variant in serving(function.manifest, number, arch, arguments)]
            if variant not in expected:
                failure = f"{variant} ran, by the manifest it is {' or '.join(expected) or 'none'}"
        _launch(functions, arguments, algorithm, device)
        store, intact = launched.out.read(STORAGE[case.dtype])
        lse = None if launched.lse is None else launched.lse.read(np.float32)[0].reshape(case.shape("Out")[:3])
        error, wrong = case.judge(store, lse)
        if not (intact and launched.intact()):
            wrong = "it wrote outside its outputs"
        return Checked(case, tuple(ran), error, wrong or failure)
    except PyfmhaError as error:
        return Checked(case, tuple(ran) or tuple(f.name for f in functions), float("nan"), str(error))
    finally:
        launched.close()


def _launch(functions: Sequence[Function], arguments: Sequence[Any], algorithm: int, device: Device) -> None:
    device.synchronize()  # copies from the host are done before another stream reads what they wrote
    stream = Stream()
    try:
        for function in functions:
            function(stream.handle, *arguments, algo_id=_algorithm_of(function, algorithm))
        stream.synchronize()
    finally:
        with suppress(DriverError):
            stream.close()


def _algorithm_of(function: Function, algorithm: int) -> int:
    """The same number, or the last where there are fewer: what combines may have one only."""
    return min(algorithm, len(function.manifest.algorithms) - 1)


def _arguments(functions: Sequence[Function], case: Case, launched: _Launched) -> tuple[Any, ...]:
    """What the functions of a case are called with: both of decoding with the same."""
    out, inputs = launched.out.pointer, launched.inputs
    names = [name for name, _ in functions[0].manifest.arguments]
    if "L" in names:  # the first kernel, whose statistics are between guards only
        rows = np.full(4 * case.batch * case.heads * case.q_len, NAN_BYTE, np.uint8)
        statistics = [launched.add(rows, 4 * case.shift).pointer for _ in "LM"]
        return (out, *statistics, *inputs, case.scale, case.batch, case.heads, case.q_len)
    lse = 0 if launched.lse is None else launched.lse.pointer
    lengths = [launched.integers(values) for values in (case.q_lengths, case.kv_lengths)]
    if "splits" in names:
        padded = int(functions[0].name.split("_d")[1].split("_")[0])
        decoding = Decoding(case.call(), padded, case.splits)
        sizes = decoding.partial_bytes, decoding.statistics_bytes
        workspace = [launched.add(np.full(size, NAN_BYTE, np.uint8)).pointer for size in sizes]
        beside = _tensors(case, launched) if isinstance(case, BiasedCase) else []
        return (out, lse, *inputs, *lengths, *workspace, *beside, *decoding.scalars())
    lengths += [launched.integers(values) for values in (case.cu_q, case.cu_kv)]
    if isinstance(case, Fp8Case):
        descales = [0 if given is None else launched.add(given).pointer for given in case.descales]
        return (out, lse, *inputs, *descales, *lengths, *case.call().scalars())
    if isinstance(case, BiasedCase):
        own = [*_own_inputs(case, launched), *_lists(case, launched)] if isinstance(case, FunctionCase) else []
        return (out, lse, *inputs, *lengths, *_tensors(case, launched), *case.call().scalars(), *own)
    return (out, lse, *inputs, *lengths, *case.call().scalars())


def _own_inputs(case: FunctionCase, launched: _Launched) -> list[Any]:
    """The inputs of a user's function: where they are, or the numbers."""
    values = packed_inputs(case.function, case.inputs_of)
    return [
        launched.add(np.ascontiguousarray(value.array)).pointer if isinstance(value, Tensor) else value
        for value in values
    ]


def _lists(case: FunctionCase, launched: _Launched) -> list[int]:
    """The memory for lists of blocks, and how many lists there are."""
    if case.function.blocks is None:
        return []
    call = case.call()
    lengths = case.q_lengths is not None or case.kv_lengths is not None
    mask, ragged = call.mask_strides[:2], case.cu_q is not None
    batches, heads = case.function.blocks.numbers(case.batch, case.heads, lengths=lengths, mask=mask, ragged=ragged)
    size = key_blocks.bytes_of(batches, heads, case.q_len, case.kv_len)
    return [launched.add(np.full(size, NAN_BYTE, np.uint8)).pointer, batches, heads]


def _tensors(case: BiasedCase, launched: _Launched) -> list[int]:
    """Bias, BiasFp32, Mask, Sinks, SinksFp32: where they are, 0 for those that are not there."""
    own, wide = [], []
    for name, kind in (("bias", case.bias_dtype), ("mask", "own"), ("sinks", case.sinks)):
        content = case.tensors.get(name)
        shift = 0 if content is None else case.tensor_shift * content.itemsize
        pointer = 0 if content is None else launched.add(content, shift).pointer
        is_own = name == "mask" or case.dtype_of(kind) == case.dtype
        own.append(pointer if is_own else 0)
        wide.append(0 if is_own else pointer)
    return [own[0], wide[0], own[1], own[2], wide[2]]


def summary_of(
    library: Library,
    arch: str,
    checked: Sequence[Checked],
    dtypes: Sequence[str],
    examples: Sequence[tuple[Declared, Example]] = (),
) -> list[Summary]:
    """Every variant of the attention functions that has code for the GPU, in the library's order; served or not."""
    wanted = {f.name: _arch_of(held, arch) for held, _ in _plans(library, dtypes, 0, examples) for f in held}
    found: dict[str, Summary] = {}
    for function, _, variant in library.manifest.variants():
        served = wanted.get(function.name)
        if served is None or served not in [image.arch for image in variant.images]:
            continue
        mine = [one for one in checked if variant.name in one.variants]
        errors = [one.error for one in mine]
        found[variant.name] = Summary(
            variant.name,
            len(mine),
            float(np.max(errors)) if errors else None,  # NaN if any is
            max(one.case.limit for one in mine) if mine else None,
            sum(bool(one.failure) for one in mine),
        )
    return list(found.values())
