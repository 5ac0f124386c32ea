"""Which variant serves a launch, by the manifest: the dispatcher's choice without the library and without a device."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from pyfmha.spec.conditions import Condition, parse_condition
from pyfmha.spec.manifest import Function, Variant


def serving(manifest: Function, algorithm: int, arch: str, values: Sequence[int | float]) -> tuple[Variant, ...]:
    """The variants that may serve a launch; one, unless tensor descriptors have a say.

    Args:
        manifest: of the function.
        algorithm: which.
        arch: whose code the device runs.
        values: of the arguments, pointers as integers.
    """
    named = dict(zip((name for name, _ in manifest.arguments), values, strict=True))
    found = []
    for variant in manifest.algorithms[algorithm]:
        if _serves(variant, arch, manifest, named):
            found.append(variant)
            if not variant.tensors:  # whether a descriptor can be made of them, the driver decides
                break
    return tuple(found)


def _serves(variant: Variant, arch: str, manifest: Function, named: Mapping[str, int | float]) -> bool:
    if variant.archs and arch not in variant.archs:
        return False
    for name, hint in variant.hints.items():
        if (named[name] != 1) if hint == 1 else (named[name] % hint != 0):
            return False
    return all(_condition(text, manifest.arguments).holds(named) for text in variant.requires)


@lru_cache(maxsize=4096)
def _condition(text: str, arguments: tuple[tuple[str, str], ...]) -> Condition:
    return parse_condition(text, dict(arguments))
