"""What every command of :mod:`pyfmha.cli.main` rests on: its output, its errors and exit codes, its way of options."""

import errno
import functools
import inspect
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text
from typer.completion import install_callback, show_callback

from pyfmha.attention.first import DTYPES
from pyfmha.errors import PyfmhaError, SpecError
from pyfmha.spec.words import dtype_name, one_of


class _Console(Console):
    """Leaves a reader that went away to :func:`_reporting`; rich would end with 1, which is for failed checks."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


# Piped output has no width of its own: a table cut to 80 columns would lose the names.
WIDE = None if os.isatty(1) else 160
console = _Console(width=WIDE, highlight=False, emoji=False)
errors = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
notes = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
"""Progress and announcements, which -q silences."""

SILENT = Console(quiet=True)
"""For tables that nobody asked for."""

_LOGGER = logging.getLogger("pyfmha")
_to_stderr = logging.Handler()


def _be_usual() -> None:
    """Neither quiet nor verbose, whatever an earlier command in this process was."""
    notes.quiet = False
    _LOGGER.removeHandler(_to_stderr)
    _LOGGER.setLevel(logging.NOTSET)


def _be(*, quiet: bool, verbose: bool) -> None:
    global _to_stderr
    notes.quiet = notes.quiet or quiet
    if verbose:
        _LOGGER.removeHandler(_to_stderr)
        _to_stderr = logging.StreamHandler(sys.stderr)
        _to_stderr.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        _LOGGER.addHandler(_to_stderr)
        _LOGGER.setLevel(logging.INFO)


def print_json(text: str) -> None:
    """On standard output as it is: rich would wrap and pad."""
    sys.stdout.write(text.rstrip("\n") + "\n")


def announce(text: str) -> None:
    """Say on standard error what is about to happen."""
    notes.print(text, markup=False)


def tell(lines: Iterable[str]) -> None:
    """Say on standard output what was done."""
    if not notes.quiet:
        for line in lines:
            console.print(line, markup=False, soft_wrap=True)


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


@contextmanager
def _helping() -> Iterator[None]:
    """Who reads the beginning of a help and goes away has read enough; rich would end with 1."""
    try:
        yield
    except SystemExit:
        raise SystemExit(0) from None


class Command(typer.core.TyperCommand):
    """A command whose help may be left unread."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        with _helping():
            super().format_help(ctx, formatter)


SHELLS = ("bash", "zsh", "fish", "powershell", "pwsh")
"""Those that typer knows."""
_COMPLETION = {"--install-completion": install_callback, "--show-completion": show_callback}


class Group(typer.core.TyperGroup):
    """Reports what fails outside a command: in help or usage. Its options for completion may be given a shell."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        with _helping():
            super().format_help(ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = [word for argument in args[:2] for word in argument.split("=", 1)][:2]
        if len(words) == 2 and words[0] in _COMPLETION and not words[1].startswith("-"):
            if words[1] not in SHELLS:
                raise SpecError(f"there is no completion for the shell {words[1]!r}: {one_of(SHELLS, words[1])}")
            _COMPLETION[words[0]](ctx, None, words[1])  # type: ignore[arg-type]  # what it does not look at; it ends
        return super().parse_args(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):  # paths need not be text in the output's encoding
            sys.stdout.reconfigure(errors="backslashreplace")
        _be_usual()
        with _reporting():
            return super().main(*args, **kwargs)


_OPEN = "pyfmha.open"
"""Where a context keeps the option that takes another value, if one does at the end of a line."""


class Spread(Command):
    """Lets one option take several values: ``--arch sm_80 sm_90`` is ``--arch sm_80 --arch sm_90``."""

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """The words of such an option behind its first, too."""
        for option in self.params:
            if ctx.meta.get(_OPEN) in option.opts and not incomplete.startswith("-"):
                return option.shell_complete(ctx, incomplete)
        return super().shell_complete(ctx, incomplete)

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
        ctx.meta[_OPEN] = name if name in several else None
        return super().parse_args(ctx, spread)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


_Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Neither progress nor announcements: results and errors only.")
]
_Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="A line for each step, and what is logged.")]


def reported() -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command's errors are reported, a polite kill cleans up as Ctrl-C does, and it takes -q and -v."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(*arguments: Any, quiet: bool = False, verbose: bool = False, **options: Any) -> None:
            signal.signal(signal.SIGTERM, _interrupt)
            _be(quiet=quiet, verbose=verbose)
            with _reporting():
                function(*arguments, **options)

        more = {"quiet": _Quiet, "verbose": _Verbose}
        parameters = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
            for name, annotation in more.items()
        ]
        own = inspect.signature(function)
        command.__signature__ = own.replace(parameters=[*own.parameters.values(), *parameters])  # type: ignore[attr-defined]
        command.__annotations__ = {**function.__annotations__, **more}
        return command

    return decorate


def beginning(words: Iterable[str]) -> Any:
    """A shell's completion of a word, for an option's ``autocompletion``."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def dtypes_of(given: Sequence[str] | None) -> list[str]:
    """What --dtype asks for, each once; all where it is not given.

    Raises:
        SpecError: one is not served.
    """
    names = list(dict.fromkeys(map(dtype_name, given or DTYPES)))
    for name in names:
        if name not in DTYPES:
            raise SpecError(f"dtype {name!r} is not served: {one_of(DTYPES, name)}")
    return names


Dtypes = Annotated[
    list[str] | None,
    typer.Option(
        "--dtype",
        help=f"Of Q, K, V and Out, one or several: {', '.join(DTYPES)} (or float16 and so on). Default: all.",
        autocompletion=beginning(DTYPES),
    ),
]
