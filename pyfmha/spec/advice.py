"""Commands for messages to print: right when they are run as they stand."""

import importlib.metadata
import re
import shlex
from pathlib import Path

from pyfmha.spec.arch import ARCHS, arch_for

LIBRARY_STEM = "libpyfmha"
LIBRARY_NAME = f"{LIBRARY_STEM}.so"
MANIFEST_NAME = "manifest.json"
"""What ``pyfmha build`` calls its library, and the manifest beside it."""

DEFAULT_FOLDER = Path("aot_out")
"""Where ``pyfmha build`` puts them."""


PREBUILT = Path(__file__).resolve().parents[1] / "prebuilt" / LIBRARY_NAME
"""The library that a wheel of ``make wheel`` carries."""


def build_command(library: Path, *options: str) -> str:
    """The command that builds a library, or adds to it.

    Args:
        library: its path, or that of its manifest. One of another name is not built by that command, nor is a wheel's
            own: it then makes the one in its default folder.
        options: of the command.
    """
    folder = library.parent
    others = (DEFAULT_FOLDER.resolve(), PREBUILT.parent)
    elsewhere = library.name in (LIBRARY_NAME, MANIFEST_NAME) and folder.resolve() not in others
    return " ".join(["pyfmha build", *options, *(["-o", shlex.quote(str(folder))] if elsewhere else [])])


def install_command(extra: str) -> str:
    """The command that installs what an extra of this package brings.

    From a clone it is the extra itself, into the environment that runs this; elsewhere, in a wheel's installation, the
    packages that the extra names, since no index has this package.

    Args:
        extra: its name in pyproject.toml, ``"aot"``.
    """
    root = Path(__file__).resolve().parents[2]
    if (root / "pyproject.toml").is_file():
        place = "." if root == Path.cwd() else str(root)
        return f"pip install -e {shlex.quote(f'{place}[{extra}]')}"
    return f"pip install {' '.join(map(shlex.quote, _requirements(extra)))}"


def engine_advice() -> str:
    """What makes an engine: from a clone its program, in a wheel's installation, which has none, the functions."""
    if (Path(__file__).resolve().parents[2] / "examples" / "build.py").is_file():
        return "python examples/build.py"
    return "pyfmha.build_engine, then pyfmha.save_engine"


def _requirements(extra: str) -> list[str]:
    """What the installed package's metadata says that an extra needs."""
    found = []
    for line in importlib.metadata.requires("pyfmha") or ():
        package, _, condition = line.partition(";")
        if re.search(rf"""extra == ['"]{extra}['"]""", condition):
            other = re.match(r"pyfmha\[([\w-]+)\]", package)
            found += _requirements(other[1]) if other else [package.strip()]
    return found


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
