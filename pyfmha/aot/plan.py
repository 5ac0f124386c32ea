"""What a build makes: what is asked for, and with it what the folder holds already."""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

from pyfmha.aot.held import Held, HeldVariant
from pyfmha.aot.link_so import rank, served
from pyfmha.errors import KernelSourceError, ManifestError, SpecError
from pyfmha.spec.arch import ARCHS, Arch
from pyfmha.spec.kernel import KernelSpec


@dataclass(frozen=True)
class Plan:
    """What a build makes.

    Attributes:
        pieces: every spec with its architectures: function by function, in an order that does not depend on which was
            asked for first; of each the variants as they are to be tried.
        asked: the variants asked for.
        kept: functions that the folder holds, and nobody asked for.
        replaced: variants that the folder holds, in whose place others of the same kernel come.
        dropped: what the folder holds and a fresh start leaves out: functions, or ``"X for sm_80"``.
    """

    pieces: tuple[tuple[KernelSpec, tuple[Arch, ...]], ...]
    asked: frozenset[str]
    kept: tuple[str, ...]
    replaced: tuple[str, ...]
    dropped: tuple[str, ...]

    def without(self, variants: Collection[str]) -> "Plan":
        """The same without some variants, in whose place others serve."""
        return replace(self, pieces=tuple(piece for piece in self.pieces if piece[0].variant not in variants))


def plan(held: Held, asked: Sequence[KernelSpec], archs: Sequence[Arch], folder: Path, *, fresh: bool) -> Plan:
    """Join what is asked for and what is held.

    A variant that is held stays for its architectures and gets those asked for. One that is not asked for gives way
    where its function is asked for with a variant for the same calls, or from the same kernel file with other settings:
    then the function is built as it is described now, for the architectures that it was held for, too.

    Args:
        held: what the folder holds.
        asked: what to build, each variant once.
        archs: for which architectures.
        folder: where the library is.
        fresh: whether to leave out what is not asked for.

    Raises:
        SpecError: nothing asked for is for these architectures.
        ManifestError: of something held it is not known what it was built from.
        KernelSourceError: the kernel file of something held is gone.
    """
    wanted = {spec.variant: {arch.name for arch in archs if spec.is_for(arch.name)} for spec in asked}
    if not any(wanted.values()):
        others = [name for name in ARCHS if any(spec.is_for(name) for spec in asked)]
        raise SpecError(
            f"no spec is for {', '.join(arch.name for arch in archs)}; build for another architecture: --arch"
            f" {' '.join(others)}"
        )
    current = {spec.variant: spec for spec in asked}
    replaced: list[str] = []
    if not fresh:
        _refuse_lost(held, asked, folder)
        for one in held.variants:
            heirs = _heirs(one.spec, asked)
            if one.spec.variant in current:
                wanted[one.spec.variant] |= set(one.archs)
                continue
            for heir in heirs:
                wanted[heir.variant] |= {arch for arch in one.archs if heir.is_for(arch)}
            left = {arch for arch in one.archs if not any(heir.is_for(arch) for heir in heirs)}
            if left:
                current[one.spec.variant] = _located(one, asked, folder)
                wanted[one.spec.variant] = left
            else:
                replaced.append(one.spec.variant)
    used = {variant: spec for variant, spec in current.items() if wanted[variant]}
    ordered = _in_order(used, [spec.variant for spec in asked], [one.spec.variant for one in held.variants])
    functions = {spec.name for spec in asked}
    return Plan(
        tuple((used[v], tuple(sorted(ARCHS[arch] for arch in wanted[v]))) for v in ordered),
        frozenset(spec.variant for spec in asked),
        tuple(dict.fromkeys(used[v].name for v in ordered if used[v].name not in functions)),
        tuple(replaced),
        _dropped(held, used, wanted) if fresh else (),
    )


def _refuse_lost(held: Held, asked: Sequence[KernelSpec], folder: Path) -> None:
    known = {name for spec in asked for name in (spec.name, spec.variant)}
    lost = [name for name in held.lost if name not in known]
    if lost:
        raise ManifestError(
            f"{folder} holds {', '.join(lost)}, and what that was built from is not known any more: build.json and"
            f" c/*.json are missing, damaged, or of another version. To drop it: pyfmha build --fresh -o {folder}"
        )


def _heirs(held: KernelSpec, asked: Sequence[KernelSpec]) -> list[KernelSpec]:
    """The variants asked for in whose favour a held one gives way."""
    function = [spec for spec in asked if spec.name == held.name]
    twins = [spec for spec in function if spec.algorithm == held.algorithm and served(spec) == served(held)]
    if twins or any(spec.generic().variant == held.generic().variant for spec in function):
        return twins
    return [spec for spec in function if spec.source.name == held.source.name]


def _located(one: HeldVariant, asked: Sequence[KernelSpec], folder: Path) -> KernelSpec:
    """The spec with the paths of its kernel file and of its functions' files."""
    functions = tuple(
        replace(function, source=_found(one, function.source, "file of functions", asked, folder))
        for function in one.spec.functions
    )
    return replace(one.spec, source=_found(one, one.spec.source, "kernel file", asked, folder), functions=functions)


def _found(one: HeldVariant, source: Path, what: str, asked: Sequence[KernelSpec], folder: Path) -> Path:
    """A file of something held: where it was, else beside those of what is asked for."""
    beside = [file.parent for spec in asked for file in (spec.source, *(f.source for f in spec.functions))]
    for place in dict.fromkeys([folder, *beside]):
        path = place / (source if place == folder else source.name)
        if path.is_file():
            return path.resolve()
    raise KernelSourceError(
        f"{folder} holds {one.spec.name}, and its {what} {source} is not there any more; put it back. To drop what"
        f" {folder} holds: pyfmha build --fresh -o {folder}"
    )


def _in_order(used: dict[str, KernelSpec], asked: Sequence[str], held: Sequence[str]) -> list[str]:
    """Functions by name; of each the variants in the order asked for and held, else by what they are."""
    ordered: list[str] = []
    for name in sorted({spec.name for spec in used.values()}, key=_natural):
        mine = {variant: spec for variant, spec in used.items() if spec.name == name}
        orders = [[v for v in order if v in mine] for order in (asked, held)]
        try:
            ordered += _joined(mine, orders)
        except CycleError:  # what is asked for now counts
            ordered += _joined(mine, orders[:1])
    return ordered


def _joined(specs: dict[str, KernelSpec], orders: Iterable[Sequence[str]]) -> list[str]:
    sorter = TopologicalSorter({variant: set[str]() for variant in specs})
    for order in orders:
        for before, after in pairwise(order):
            sorter.add(after, before)
    sorter.prepare()
    joined: list[str] = []
    ready: list[str] = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=lambda v: (rank(specs[v]), v))
        joined.append(ready.pop(0))
        sorter.done(joined[-1])
    return joined


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts d64 before d128."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _dropped(held: Held, used: dict[str, KernelSpec], wanted: dict[str, set[str]]) -> tuple[str, ...]:
    archs: dict[str, set[str]] = {}
    for variant, spec in used.items():
        archs.setdefault(spec.name, set()).update(wanted[variant])
    dropped = [name for name in held.lost if name not in archs and name not in used]
    for one in held.variants:
        if one.spec.name not in archs:
            dropped.append(one.spec.name)
        else:
            dropped += [f"{one.spec.name} for {arch}" for arch in one.archs if arch not in archs[one.spec.name]]
    return tuple(dict.fromkeys(dropped))
