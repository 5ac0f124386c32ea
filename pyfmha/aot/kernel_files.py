"""The files that kernels are in."""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from pyfmha.errors import KernelSourceError


def check_source(path: Path) -> Path:
    """The absolute path of a kernel file.

    Raises:
        KernelSourceError: there is no such file, or it is something else; the message says what.
    """
    wrong = ""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            wrong = "is a folder" if stat.S_ISDIR(mode) else "is a device, a pipe or a socket, not a file"
    except (OSError, ValueError) as error:
        wrong = _why_not_there(path, error)
    if wrong:
        raise KernelSourceError(f"kernel file {path} {wrong}; give the Python file that holds the @triton.jit function")
    return path.resolve()


def _why_not_there(path: Path, error: OSError | ValueError) -> str:
    if not isinstance(error, OSError):
        return f"cannot be a path ({error})"
    if error.errno == errno.ELOOP:
        return "is a link that leads back to itself"
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
        return f"cannot be read ({error.strerror})"
    with suppress(OSError):
        return f"is a link to {os.readlink(path)}, which does not exist"
    return "does not exist"
