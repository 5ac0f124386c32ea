"""Which variant serves a launch, by the manifest: the dispatcher's choice without the library and without a device."""

from collections.abc import Mapping, Sequence

from pyfmha.spec.conditions import parse_condition
from pyfmha.spec.manifest import Function, Variant


def serving(manifest: Function, algorithm: int, arch: str, values: Sequence[int | float]) -> tuple[Variant, ...]:
    """The variants that may serve a launch; one, unless tensor descriptors have a say.

    Args:
        manifest: of the function.
        algorithm: which.
        arch: whose code the device runs.
        values: of the arguments, pointers as integers.
    """
    types = dict(manifest.arguments)
    named = dict(zip(types, values, strict=True))
    found = []
    for variant in manifest.algorithms[algorithm]:
        if _serves(variant, arch, types, named):
            found.append(variant)
            if not variant.tensors:  # whether a descriptor can be made of them, the driver decides
                break
    return tuple(found)


def _serves(variant: Variant, arch: str, types: Mapping[str, str], named: Mapping[str, int | float]) -> bool:
    if variant.archs and arch not in variant.archs:
        return False
    for name, hint in variant.hints.items():
        if (named[name] != 1) if hint == 1 else (named[name] % hint != 0):
            return False
    return all(parse_condition(text, types).holds(named) for text in variant.requires)
