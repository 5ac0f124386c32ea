"""Puts a built library into the wheel, and says in the wheel's name where that runs.

``PYFMHA_WHEEL_LIBRARY`` is the library, beside its manifest and header. Without it the wheel is pure. See `make wheel`.
"""

import os
import platform
import re
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "PYFMHA_WHEEL_LIBRARY"
OLDEST = (2, 17)  # of the tags manylinux_2_*: what pip knows reaches no further back
FILES = ("libpyfmha.so", "manifest.json", "c/libpyfmha.h", "c/pyfmha_runtime.h")


class WheelHook(BuildHookInterface):  # type: ignore[type-arg]
    """Called by hatchling for each wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the library; refuse one that is not there."""
        named = os.environ.get(VARIABLE)
        if not named or version == "editable":
            return
        folder = Path(self.root, named).parent
        for name in FILES:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{VARIABLE} is {named}, and {folder / name} is not there: use make wheel")
            build_data["force_include"][str(folder / name)] = f"pyfmha/prebuilt/{name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag(folder / FILES[0])}"


def platform_tag(library: Path) -> str:
    """The oldest manylinux whose glibc has every symbol that a library names (PEP 600): ``manylinux_2_34_x86_64``.

    The library needs nothing but glibc: it opens libcuda itself.
    """
    versions = re.findall(rb"\0GLIBC_(\d+)\.(\d+)(?=[.\d]*\0)", library.read_bytes())
    major, minor = max([OLDEST, *((int(major), int(minor)) for major, minor in versions)])
    return f"manylinux_{major}_{minor}_{platform.machine()}"
