"""A function's algorithms as TensorRT tactics.

TensorRT stores the id of the tactic it chose in the engine, and gives it back when the engine is loaded, maybe years
later and to another build of the library. So an id is a digest of the names of the algorithm's variants, which say
what was compiled: it means the same algorithm in every build, or is unknown.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyfmha.errors import PluginError
from pyfmha.spec.arch import ARCHS, arch_for
from pyfmha.spec.manifest import Function, Variant

DEFAULT = 0
"""TensorRT's id of the default tactic (NvInferRuntime.h, IPluginV3OneBuild::getValidTactics): the first algorithm."""


@dataclass(frozen=True)
class Tactic:
    """One algorithm of a function.

    Attributes:
        id: positive, 31 bits.
        algo_id: its number in this build of the library.
        name: the names of its variants, joined by ``+``.
        archs: for each variant that a device needs, the architectures that it has code for. Variants for some
            architectures only are passed over on others: they count together, as one, where there are no others.
    """

    id: int
    algo_id: int
    name: str
    archs: tuple[tuple[str, ...], ...]

    def runs_on(self, capability: int) -> bool:
        """Whether every variant needed has code for a device of that compute capability (major * 10 + minor)."""
        return all(arch_for(f"sm_{capability}", held) is not None for held in self.archs)


def tactic_id(name: str) -> int:
    """The id of an algorithm by its name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") & 0x7FFFFFFF or 1


def _archs(*variants: Variant) -> tuple[str, ...]:
    return tuple(image.arch for variant in variants for image in variant.images if image.arch in ARCHS)


def _needed_archs(algorithm: Sequence[Variant]) -> tuple[tuple[str, ...], ...]:
    needed = [variant for variant in algorithm if not variant.archs]
    return tuple(map(_archs, needed)) if needed else (_archs(*algorithm),)


def tactics_of(function: Function) -> tuple[Tactic, ...]:
    """The tactics of a function, by ``algo_id``.

    Raises:
        PluginError: two algorithms have the same id.
    """
    tactics = []
    for algo_id, algorithm in enumerate(function.algorithms):
        name = "+".join(variant.name for variant in algorithm)
        tactics.append(Tactic(tactic_id(name), algo_id, name, _needed_archs(algorithm)))
    if len({tactic.id for tactic in tactics}) < len(tactics):
        raise PluginError(
            f"two algorithms of {function.name} have the same tactic id; change the tiles of one and build again"
        )
    return tuple(tactics)


def choose(tactics: Sequence[Tactic], chosen: int, recorded: Iterable[str]) -> Tactic:
    """The tactic with an id.

    Args:
        tactics: those that the library holds.
        chosen: the id that TensorRT gives back, or :data:`DEFAULT`.
        recorded: names of the algorithms that the library held when the engine was built, to name one that is gone.

    Raises:
        PluginError: the library holds no such algorithm; the message names it.
    """
    if chosen == DEFAULT:
        return tactics[0]
    for tactic in tactics:
        if tactic.id == chosen:
            return tactic
    name = next((f" ({name})" for name in recorded if tactic_id(name) == chosen), "")
    held = ", ".join(f"{tactic.id} ({tactic.name})" for tactic in tactics)
    raise PluginError(
        f"the engine uses tactic {chosen}{name}, which this library does not hold; it holds {held}:"
        " build the engine again, or use the library that the engine was built with"
    )
