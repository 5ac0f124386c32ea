"""GPU architectures: names, limits, and which machine code runs on which device."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pyfmha.errors import SpecError
from pyfmha.spec.words import one_of


@dataclass(frozen=True, order=True)
class Arch:
    """One architecture.

    Attributes:
        capability: compute capability as major * 10 + minor, 90 for sm_90.
        shared_limit: bytes of shared memory one block may ask for by opt-in (CUDA C++ Programming Guide, table
            "Memory Information per Compute Capability": an SM's, less the 1 KiB the system keeps).
        like: the architecture whose tunings serve it where a spec has none for it.
    """

    capability: int
    shared_limit: int
    like: str = ""

    @property
    def name(self) -> str:
        """The name as users write it: ``"sm_90"``."""
        return f"sm_{self.capability}"

    @property
    def exact(self) -> bool:
        """Whether its code runs on that very capability only.

        Triton assembles capability 9.0 and later for the architecture-specific target (``sm_90a``), which no other
        capability can run. Older code also runs on later minor revisions of the same major one, but that of 8.7, which
        is Tegra's, not on others (CUDA Programming Guide, "Binary Compatibility"); they have less shared memory, too.
        """
        return self.capability >= 90 or self.capability == 87


# Shared memory of a block is 163 KiB on 8.0 and 8.7, 99 KiB on 8.6, 8.9 and 12.x, 227 KiB on 9.0, 10.x and 11.0: CUDA
# Programming Guide 13, "Memory Information per Compute Capability"; so has NVIDIA's cccl, cuda/__device/arch_traits.h.
ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch(80, 166912),
        Arch(86, 101376),
        Arch(87, 166912),
        Arch(89, 101376),
        Arch(90, 232448),
        Arch(100, 232448),
        Arch(103, 232448, "sm_100"),
        Arch(110, 232448, "sm_100"),
        Arch(120, 101376),
        Arch(121, 101376, "sm_120"),
    )
}

# Capabilities that there are or were (CUDA's documentation, "CUDA GPU Compute Capability") without code here.
_NOT_SERVED = {
    **{f"sm_{old}": "Triton compiles for sm_80 and later" for old in (50, 52, 53, 60, 61, 62, 70, 72, 75)},
    "sm_88": "it runs the code of sm_86 and sm_80: give one of those",
    "sm_101": "CUDA 13 calls it sm_110: give that",
}


def parse_arch(text: str) -> Arch:
    """The architecture named ``sm_90``, ``sm90``, ``90`` or, as triton.tools.compile writes it, ``cuda:90:32``.

    Raises:
        SpecError: it is none of :data:`ARCHS`.
    """
    match = re.fullmatch(r"(?:cuda:(\d+)(?::32)?|(?:sm_?)?(\d+)a?)", text.strip())
    name = f"sm_{match.group(1) or match.group(2)}" if match else text
    if name not in ARCHS:
        why = f"architecture {text!r} is not served ({_NOT_SERVED[name]})" if name in _NOT_SERVED else ""
        raise SpecError(f"{why or f'unknown architecture {text!r}'}: {one_of(ARCHS, name)}; cuda:90:32 is sm_90, too")
    return ARCHS[name]


def parse_archs(texts: Iterable[str]) -> tuple[Arch, ...]:
    """Several architectures, each once, in ascending order."""
    return tuple(sorted({parse_arch(text) for text in texts}))


def arch_for(gpu: str, held: Iterable[str]) -> str | None:
    """The architecture, of those held, whose code a GPU of architecture ``gpu`` runs; None where there is none.

    Its own, else the newest before it of the same major capability, unless that is exact: sm_87 runs code for sm_86.
    """

    def capability(arch: str) -> int:
        return int(arch.removeprefix("sm_"))

    def runs(arch: str) -> bool:
        older = capability(arch) // 10 == capability(gpu) // 10 and capability(arch) <= capability(gpu)
        return arch == gpu or (older and arch in ARCHS and not ARCHS[arch].exact)

    return max(filter(runs, held), key=capability, default=None)
