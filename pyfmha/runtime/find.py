"""Which library is meant where none is named."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyfmha.errors import LibraryError, ManifestError
from pyfmha.spec.advice import DEFAULT_FOLDER, LIBRARY_NAME, PREBUILT, build_command

DEFAULT_LIBRARY = DEFAULT_FOLDER / LIBRARY_NAME
LIBRARY_VARIABLE = "PYFMHA_LIBRARY"


def library_path() -> Path:
    """That of the environment variable ``PYFMHA_LIBRARY``; else ``aot_out/libpyfmha.so`` here; else the wheel's own.

    Raises:
        LibraryError: there is none, or none where the variable says.
    """
    found = built_library()
    if found is None:
        raise LibraryError(
            f"no library at {DEFAULT_LIBRARY.resolve()}; build it (pyfmha build), or name another: the argument"
            f" `library`, or the environment variable {LIBRARY_VARIABLE}"
        )
    return found


@contextmanager
def naming_the_variable(meant: bool) -> Iterator[None]:
    """Errors about a library say that the variable names it, where it does.

    Args:
        meant: whether the library is that of :func:`library_path`.
    """
    try:
        yield
    except (LibraryError, ManifestError) as error:
        if not meant or not os.environ.get(LIBRARY_VARIABLE):
            raise
        raise type(error)(f"{error} ({LIBRARY_VARIABLE} names that library)") from None


def built_library() -> Path | None:
    """The same; None where nothing is built yet.

    Raises:
        LibraryError: there is none where the variable says.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if not named:
        return next((path for path in (DEFAULT_LIBRARY, PREBUILT) if path.is_file()), None)
    if not Path(named).is_file():
        there = Path(named).name == LIBRARY_NAME
        what = "build the library" if there else "name a library's .so, or unset it; to build one"
        command = build_command(Path(named))
        raise LibraryError(f"{LIBRARY_VARIABLE} is {named}, where there is no file; {what}: {command}")
    return Path(named)
