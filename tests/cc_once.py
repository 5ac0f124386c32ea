"""``cc`` for the builds of a run of the tests: what it has made of a file once, it does not make again.

Of the C files of a library some are the same in all of one kind, and take most of the compiler's time. The run's folder
has a `cc` that starts this, before the compiler's own on the PATH.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

_INCLUDED = re.compile(rb'^#include "([^"]+)"', re.MULTILINE)


def install(folder: Path, compiler: str) -> Path:
    """A folder for the PATH, whose `cc` is this over a compiler; what was made is kept beside it."""
    place = folder / "bin"
    place.mkdir(parents=True, exist_ok=True)
    (folder / "objects").mkdir(exist_ok=True)
    own = folder / f"cc.{os.getpid()}"
    started = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import cc_once; cc_once.main()"
    command = shlex.join([sys.executable, "-ISs", "-c", started, compiler, str(folder / "objects")])
    own.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    own.chmod(0o755)
    own.replace(place / "cc")
    return place


def main() -> None:
    """Compile as the compiler would, which does it all where a call is no build's."""
    compiler, kept, *arguments = sys.argv[1:]
    sources = [one for one in arguments if one.endswith(".c")]
    whole, objects_alone = "-shared" in arguments, "-c" in arguments and "-o" not in arguments
    if whole == objects_alone or not sources or any("/" in one for one in sources):
        os.execv(compiler, [compiler, *arguments])
    flags, rest = arguments[: arguments.index(sources[0])], arguments[arguments.index(sources[-1]) + 1 :]
    flags = [flag for flag in flags if flag != "-c"]
    objects = {source: Path(kept, f"{_key([compiler, *flags], source)}.o") for source in sources}
    missing = [source for source, made in objects.items() if not made.exists()]
    if missing and subprocess.run([compiler, *flags, "-c", *missing], capture_output=True, check=False).returncode:
        os.execv(compiler, [compiler, *arguments])  # which says what is wrong
    for source in missing:
        os.replace(Path(source).with_suffix(".o"), objects[source])
    if whole:
        os.execv(compiler, [compiler, *flags, *map(str, objects.values()), *rest])
    for source, made in objects.items():
        shutil.copyfile(made, Path(source).with_suffix(".o"))


def _key(command: list[str], source: str) -> str:
    """Of a file, those in its folder that it includes, and the command."""
    digest = hashlib.sha256("\0".join(command).encode())
    files = [source]
    for file in files:
        content = Path(file).read_bytes() if Path(file).exists() else b""
        digest.update(file.encode() + b"\0" + content)
        files += [name for name in (one.decode() for one in _INCLUDED.findall(content)) if name not in files]
    return digest.hexdigest()
