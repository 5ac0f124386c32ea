"""The C compiler: from C files to a shared library."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pyfmha.aot.handover import Handover
from pyfmha.aot.staging import Staging
from pyfmha.errors import ToolchainError

CFLAGS = ("-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", "-pthread")
LDFLAGS = ("-shared", "-s", "-Wl,--build-id=none", "-Wl,-z,relro,-z,now", "-ldl")
_SHARE = 4 << 20
"""Bytes of C for which one process more pays: a second of its time."""


def find_compiler() -> list[str]:
    """The C compiler as a command: ``CC`` if set, else the first of cc, gcc, clang.

    Raises:
        ToolchainError: there is none.
    """
    try:
        asked = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise ToolchainError(f"CC is {os.environ['CC']!r}, which is not a command ({error}); set it right") from None
    if asked and "/" in asked[0]:
        asked[0] = os.path.abspath(asked[0])  # the compiler runs in a folder of its own
    for command in [asked] if asked else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    wanted = f"CC is {asked[0]!r}, which is not on the PATH" if asked else "none of cc, gcc, clang is on the PATH"
    raise ToolchainError(f"no C compiler: {wanted}; install one (Debian: apt-get install gcc libc6-dev) or set CC")


def build_shared(
    stage: Staging, sources: dict[str, str], variants: Sequence[Handover], name: str, jobs: int | None = None
) -> None:
    """Compile C sources and variants' C files into ``name`` in the staging folder.

    The compiler works in a folder of its own on plain file names, so that no path gets into the library and the same
    inputs give the same bytes, whatever the number of processes.

    Raises:
        ToolchainError: there is no C compiler, or it failed; the message holds its log.
    """
    compiler = find_compiler()
    work = stage.path / "cc"
    work.mkdir()
    for source, content in sources.items():
        (work / source).write_text(content, encoding="utf-8")
    for file in (f for variant in variants for f in (variant.c_file, variant.header)):
        shutil.copy(file, work / file.name)
    names = sorted(file.name for file in work.glob("*.c"))
    shares = _shared_out({name: (work / name).stat().st_size for name in names}, jobs or len(os.sched_getaffinity(0)))
    if len(shares) > 1:
        with ThreadPoolExecutor(len(shares)) as pool:
            list(pool.map(lambda share: _run([*compiler, *CFLAGS, "-c", *share], work), shares))
        names = [f"{name.removesuffix('.c')}.o" for name in names]
    _run([*compiler, *CFLAGS, *names, "-o", "out.so", *LDFLAGS], work, "out.so")
    os.replace(work / "out.so", stage.path / name)


def _shared_out(sizes: dict[str, int], jobs: int) -> list[list[str]]:
    """Files for each of some processes, no more than pay, about as many bytes for each."""
    count = max(1, min(jobs, len(sizes), sum(sizes.values()) // _SHARE))
    shares: list[list[str]] = [[] for _ in range(count)]
    bytes_of = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = bytes_of.index(min(bytes_of))
        shares[least].append(name)
        bytes_of[least] += sizes[name]
    return shares


def _run(command: Sequence[str], work: Path, made: str = ".") -> None:
    """Run the compiler, which must then have made something."""
    try:
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise ToolchainError(f"{command[0]} does not run: {error}") from None
    if done.returncode or not (work / made).exists():
        log = (done.stderr or done.stdout).strip()[-4000:] or "it said nothing"
        raise ToolchainError(f"{command[0]} failed with exit code {done.returncode}:\n{log}")
