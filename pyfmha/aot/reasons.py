"""Why Triton failed, in words that help here: what an exception and its causes say, less advice that cannot work."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of the operating system that another folder may mend."""

CAUSED = "\ncaused by "
_VARIABLE = re.compile(r"\b(?:TRITON|MLIR|LLVM)_[A-Z0-9_]*[A-Z0-9]")


def reasons(error: BaseException | None) -> str:
    """What an exception says, then what those say that it was raised from, where that is not in it already.

    Triton tells only there what is wrong inside a callee. Where Triton advises to set a variable of its own, it adds
    that the compiler process has none.
    """
    text = CAUSED.join(_chain(error))
    named = ", ".join(dict.fromkeys(_VARIABLE.findall(text)))
    return (
        f"{text}\n(pyfmha compiles without Triton's variables: setting {named} changes nothing here)" if named else text
    )


def _chain(error: BaseException | None) -> Iterator[str]:
    said = None
    while error is not None:
        if not said or not str(error) or str(error) not in said:
            yield f"{type(error).__name__}: {error}"
        said, error = str(error), error.__cause__


def full_disk(error: BaseException | None) -> str:
    """The message where an exception, or one behind it, means that no temporary file can be written; else ""."""
    while error is not None:
        said = str(error)
        for number in FULL:
            if (isinstance(error, OSError) and error.errno == number) or os.strerror(number) in said:
                return no_temporary_file(os.strerror(number))
        error = error.__cause__ or error.__context__
    return ""


def no_temporary_file(reason: str) -> str:
    """The message where a temporary file cannot be written."""
    try:
        folder = tempfile.gettempdir()
    except OSError:  # it tries to write to each of its candidates
        folder = os.environ.get("TMPDIR") or "/tmp"
    return f"cannot write a temporary file in {folder}: {reason}; the environment variable TMPDIR names another folder"
