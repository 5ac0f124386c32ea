"""Versions of what decides the machine code."""

import re
import subprocess
from importlib import metadata, util
from pathlib import Path

from pyfmha.errors import ToolchainError
from pyfmha.spec.advice import install_command


def check_triton() -> Path:
    """The folder of Triton's package, which is not imported.

    Raises:
        ToolchainError: it is not installed.
    """
    spec = util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        raise ToolchainError(f"Triton is not installed; compiling needs it: {install_command('aot')}")
    return Path(spec.submodule_search_locations[0])


def toolchain() -> dict[str, str]:
    """Versions of what decides the machine code: Triton and its assemblers. Does not import Triton.

    Raises:
        ToolchainError: Triton is not installed, or its assembler does not run.
    """
    package = check_triton()
    tools = package / "backends" / "nvidia" / "bin"
    versions = {"triton": _triton_version(package)}
    for tool in sorted(tools.glob("ptxas*")):
        try:
            versions[tool.name] = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise ToolchainError(f"Triton's assembler {tool} does not run: {error}") from None
    return versions


def _triton_version(package: Path) -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:  # a build of another name
        found = re.search(r"""__version__ = ["']([^"']+)""", (package / "__init__.py").read_text(encoding="utf-8"))
        return found.group(1) if found else "unknown"
