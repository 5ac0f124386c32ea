"""Which architectures a command compiles for."""

from typing import Annotated

import typer

from pyfmha.cli.base import beginning
from pyfmha.errors import SpecError
from pyfmha.runtime.device import find_gpu
from pyfmha.spec.arch import ARCHS, Arch, arch_for, parse_archs


def _no_code(gpu: str, option: str) -> str:
    return f"the GPU here is {gpu}, which pyfmha has no code for; give {option}, one or several of {', '.join(ARCHS)}"


def archs_of(asked: list[str] | None) -> tuple[Arch, ...]:
    """The architectures asked for, else the one whose code the GPU runs.

    Raises:
        SpecError: none was asked for and there is no GPU, or pyfmha has no code for it.
    """
    if asked:
        return parse_archs(asked)
    device, reason = find_gpu()
    if device is None:
        raise SpecError(
            f"no architecture given and no GPU to take it from ({reason}); give one with -t, such as -t sm_90;"
            f" allowed: {', '.join(ARCHS)}"
        )
    served = arch_for(device.arch, ARCHS)
    if served is None:
        raise SpecError(_no_code(device.arch, "-t"))
    return parse_archs([served])


def default_archs(*, need_gpu_code: bool = True) -> tuple[tuple[Arch, ...], str]:
    """The architecture whose code the GPU runs, or sm_80 and sm_90 where there is no GPU, with the reason in words.

    Args:
        need_gpu_code: whether a GPU that pyfmha has no code for is an error, or like none.

    Raises:
        SpecError: it is one, and it is that.
    """
    device, reason = find_gpu()
    if device is not None:
        served = arch_for(device.arch, ARCHS)
        if served is not None:
            found = f"found here: {device.name}" + (f", which is {device.arch}" if served != device.arch else "")
            return parse_archs([served]), f"for {served}, {found}"
        if need_gpu_code:
            raise SpecError(_no_code(device.arch, "--arch"))
        why = f"pyfmha has no code for the GPU here, {device.name}, which is {device.arch}"
    else:
        why = f"there is no GPU here ({reason})"
    return parse_archs(["sm_80", "sm_90"]), f"for sm_80 and sm_90, since {why}"


Archs = Annotated[
    list[str] | None,
    typer.Option(
        *("--arch", "-t", "--target"),
        help=f"Architecture, one or several: {', '.join(ARCHS)}. Default: the GPU's, else sm_80 and sm_90.",
        autocompletion=beginning(ARCHS),
    ),
]
