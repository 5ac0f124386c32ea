"""Commands for messages to print: right when they are run as they stand."""

import shlex
from pathlib import Path

from pyfmha.spec.arch import ARCHS, arch_for

LIBRARY_STEM = "libpyfmha"
LIBRARY_NAME = f"{LIBRARY_STEM}.so"
MANIFEST_NAME = "manifest.json"
"""What ``pyfmha build`` calls its library, and the manifest beside it."""

DEFAULT_FOLDER = Path("aot_out")
"""Where ``pyfmha build`` puts them."""


def build_command(library: Path, *options: str) -> str:
    """The command that builds a library, or adds to it.

    Args:
        library: its path, or that of its manifest. One of another name is not built by that command, which then makes
            the one in its default folder.
        options: of the command.
    """
    folder = library.parent
    elsewhere = library.name in (LIBRARY_NAME, MANIFEST_NAME) and folder.resolve() != DEFAULT_FOLDER.resolve()
    return " ".join(["pyfmha build", *options, *(["-o", shlex.quote(str(folder))] if elsewhere else [])])


def code_for(gpu: str, library: Path, lead: str = "") -> str:
    """How a library of attention without code for a GPU gets it; or that there is none.

    Args:
        gpu: the GPU's architecture, ``"sm_86"``.
        library: the path of the library.
        lead: what to say before the command.
    """
    served = arch_for(gpu, ARCHS)
    if served is None:
        return f"pyfmha has no code for {gpu}; it serves {', '.join(ARCHS)}"
    return lead + build_command(library, "--arch", served)
