"""Which functions a library of attention holds: the families of kernels, each with its dtypes and head sizes."""

from collections.abc import Sequence

from pyfmha.attention.biased import biased_family
from pyfmha.attention.biased_decode import biased_decode_family
from pyfmha.attention.decode import decode_family
from pyfmha.attention.first import DTYPES, HEAD_SIZES, family, family_specs
from pyfmha.attention.forward import Forward, forward_family
from pyfmha.attention.fp8 import fp8_family
from pyfmha.errors import SpecError
from pyfmha.spec.kernel import KernelSpec
from pyfmha.spec.words import one_of

KERNELS = {
    "basic": "fmha_d*: equal, contiguous Q, K and V (the first kernel)",
    "forward": "fmha_fwd_d*: every feature",
    "decode": "fmha_split_d*, fmha_combine_d*: few queries, many keys",
    "values": "of fmha_biased_d256_* what serves V of head size up to 128 fast; of the rest the variants for anything",
    "biased": "fmha_biased_*: bias, mask, sinks, values of another head size, and decoding with them",
    "fp8": "fmha_fp8_d*: Q, K and V in e4m3 on sm_90, Out in fp16 or bf16; nothing elsewhere",
    "hopper": "the fast variants of fmha_fwd_d* on sm_90; nothing elsewhere",
}
"""The families by name, with what they are."""

DEFAULT = ("basic", "forward", "decode", "hopper", "values")
"""The families that a library holds if none are named; with ``biased`` the build takes half as long again.
``fp8`` is for Hopper alone, and for those who ask for it."""


def library_specs(
    kernels: Sequence[str] = DEFAULT, dtypes: Sequence[str] = DTYPES, head_sizes: Sequence[int] = HEAD_SIZES
) -> list[KernelSpec]:
    """What to compile for a library.

    Args:
        kernels: names of families, see :data:`KERNELS`; ``hopper`` brings ``forward`` along, ``biased`` has all of
            ``values``.
        dtypes: fp16, bf16, fp32.
        head_sizes: 1 to 256; the basic family has those of :data:`pyfmha.attention.first.HEAD_SIZES` only, and leaves
            the others to the rest, whose functions serve all head sizes up to a padded one.

    Raises:
        SpecError: a family, dtype or head size is not served, or nothing is left to build.
    """
    unknown = [name for name in kernels if name not in KERNELS]
    if unknown:
        raise SpecError(f"kernels {', '.join(unknown)} are unknown: {one_of(KERNELS, unknown[0])}")
    for size in head_sizes:
        Forward(DTYPES[0], size)
    specs: list[KernelSpec] = []
    if "basic" in kernels:
        specs += family_specs(family(dtypes, [size for size in head_sizes if size in HEAD_SIZES]))
    if {"forward", "hopper"} & set(kernels):
        for function in forward_family(dtypes, head_sizes):
            specs += function.specs(hopper="hopper" in kernels)
    if "biased" in kernels:
        for biased in biased_family(dtypes, head_sizes):
            specs += biased.specs()
        for biased_pair in biased_decode_family(dtypes, head_sizes):
            specs += biased_pair.specs()
    elif "values" in kernels:
        for biased in biased_family(dtypes, head_sizes):
            specs += biased.narrow_specs()
    if "fp8" in kernels:
        for eighth in fp8_family(dtypes, head_sizes):
            specs += eighth.specs()
    if "decode" in kernels:
        for pair in decode_family(dtypes, head_sizes):
            specs += pair.specs()
    if not specs:
        raise SpecError(
            f"nothing to build: basic kernels have head sizes {', '.join(map(str, HEAD_SIZES))}; others need forward;"
            " Out of fp8 is fp16 or bf16; values are for fp16 or bf16 and head sizes of Q and K above 128"
        )
    return specs
