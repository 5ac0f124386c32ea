"""What every command of :mod:`pyfmha.cli.main` rests on: its output, its errors and exit codes, its way of options."""

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from pyfmha.attention.first import DTYPES
from pyfmha.errors import PyfmhaError


class _Console(Console):
    """Leaves a reader that went away to :func:`_reporting`; rich would end with 1, which is for failed checks."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


# Piped output has no width of its own: a table cut to 80 columns would lose the names.
WIDE = None if os.isatty(1) else 160
console = _Console(width=WIDE, highlight=False, emoji=False)
errors = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


@contextmanager
def _reporting() -> Iterator[None]:
    """Turn errors into one message and exit code 2, an interruption into 130, a reader that went away into 141."""
    try:
        yield
    except BrokenPipeError:
        _release_output()
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (PyfmhaError, OSError) as error:
        unwritten = _release_output()
        message = str(error) if isinstance(error, PyfmhaError) else _in_words(error, unwritten)
        with suppress(OSError):
            errors.print(Text.assemble(("error:", "red"), " ", message))
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        with suppress(OSError):
            errors.print("interrupted; earlier output is as it was")
        raise SystemExit(130) from None


def _release_output() -> bool:
    """Point standard output at nothing if it cannot be written: Python would fail at its end to write the rest."""
    if not isinstance(sys.stdout, io.TextIOWrapper):  # closed from the start, or a double
        return False
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
        return True
    return False


def _in_words(error: OSError, unwritten: bool) -> str:
    """An operating system's error that nothing closer to it described."""
    what = error.strerror or str(error)
    if unwritten:
        return f"the output cannot be written: {what}"
    if error.filename is not None:
        what = f"{os.fsdecode(error.filename)}: {what}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        folder = os.environ.get("TMPDIR") or "/tmp"
        what += f" (for the output, or for a temporary file in {folder}; TMPDIR names another folder)"
    return what


class Group(typer.core.TyperGroup):
    """Reports what fails outside a command: in help or usage."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):  # paths need not be text in the output's encoding
            sys.stdout.reconfigure(errors="backslashreplace")
        with _reporting():
            return super().main(*args, **kwargs)


class Spread(typer.core.TyperCommand):
    """Lets one option take several values: ``--arch sm_80 sm_90`` is ``--arch sm_80 --arch sm_90``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        spread: list[str] = []
        name = ""
        for argument in args:
            if argument.startswith("-"):
                name = argument.partition("=")[0]
                spread += [argument]
            else:
                spread += [name, argument] if name in several and spread[-1] != name else [argument]
        return super().parse_args(ctx, spread)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def reported() -> Iterator[None]:
    """A command's errors are reported, and a polite kill cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _interrupt)
    with _reporting():
        yield


Dtypes = Annotated[
    list[str] | None,
    typer.Option("--dtype", help=f"Of Q, K, V and Out, one or several: {', '.join(DTYPES)}. Default: all."),
]
