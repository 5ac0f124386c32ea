"""Every variant of the default build has a case of ``pyfmha verify``, by its conditions: what no case serves is a
failure on a GPU, and is told here without one."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from sanitize_gpu import Addresses

from pyfmha.attention import decode, forward
from pyfmha.attention.decode import Decode
from pyfmha.attention.forward import Forward
from pyfmha.attention.hopper import DTYPES, HEAD_SIZES
from pyfmha.spec.conditions import parse_condition
from pyfmha.spec.kernel import KernelSpec
from pyfmha.verify.cases import Case
from pyfmha.verify.forward_cases import decode_cases, forward_cases
from pyfmha.verify.variants import _arguments


def without_a_case(
    specs: Sequence[KernelSpec], cases: Sequence[Case], arguments: Sequence[tuple[str, str]]
) -> set[int]:
    """Which of a function's variants, in their order, are the first for no case."""
    types = {name: kind.split(":")[0] for name, kind in arguments}
    conditions = [[parse_condition(text, types) for text in spec.requires] for spec in specs]
    asked: Any = SimpleNamespace(name=specs[0].name, manifest=SimpleNamespace(arguments=arguments))
    found = set()
    for case in cases:
        if not case.shift and not case.gap:  # what only a variant for any tensors takes has cases of its own
            values = dict(zip(types, _arguments([asked], case, Addresses(case)), strict=True))
            served = (
                i
                for i, own in enumerate(conditions)
                if all(one.holds(values) for one in own)
                and not (specs[i].descriptors and case.head_size % 8)  # rows that TMA does not take
            )
            found.add(next(served))
    return set(range(len(specs) - 1)) - found  # the last is for any tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", HEAD_SIZES)
def test_every_variant_of_the_default_build_has_a_case(padded: int, dtype: str) -> None:
    specs, cases = Forward(dtype, padded).specs(hopper=True), forward_cases(dtype, padded)
    assert without_a_case(specs, cases, forward.ARGUMENTS) == set()
    *splits, _ = Decode(dtype, padded).specs()
    assert without_a_case(splits, decode_cases(dtype, padded), decode.ARGUMENTS) == set()


def test_a_variant_without_a_case_is_found() -> None:
    specs, cases = Forward("bf16", 128).specs(hopper=True), forward_cases("bf16", 128)
    long = [n for n, spec in enumerate(specs) if {"q_len >= 8192", "q_len > 8192"} & set(spec.requires)]
    assert long
    assert without_a_case(specs, [case for case in cases if case.q_len < 8192], forward.ARGUMENTS) == set(long)
