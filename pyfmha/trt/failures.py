"""Failures inside the calls that TensorRT makes, kept so that they reach the user.

TensorRT calls a plugin from C++. The binding prints what such a call raises to stderr, and then TensorRT itself only
knows that something failed. So each failure is also logged (logger ``pyfmha``) and remembered here, with the layer,
what it serves and what to do; whoever drives TensorRT raises it again with :func:`collect_failures`.
"""

import ctypes
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from pyfmha.errors import DriverError, PluginError, PyfmhaError
from pyfmha.operators.arithmetic import EvaluationError

LOGGER = logging.getLogger("pyfmha")
_Override = TypeVar("_Override", bound=Callable[..., Any])


@dataclass(frozen=True)
class Failure:
    """One failed call.

    What was raised is made anew whenever it is asked for. An exception that was raised once holds in its traceback
    every object that the call had to do with: the last failure would keep plugin, network, builder and cache alive.

    Attributes:
        call: the override's name, such as ``"enqueue"``.
        kind: the class of what was raised.
        text: its text, which names the layer.
        code: of a :class:`pyfmha.errors.DriverError`.
        thread: identifier of the thread on which TensorRT called.
    """

    call: str
    kind: type[PyfmhaError]
    text: str
    code: int | None
    thread: int

    @property
    def error(self) -> PyfmhaError:
        """What was raised, to be raised again: a new object."""
        return self.kind(self.text) if self.code is None else self.kind(self.text, self.code)


_lock = threading.Lock()
_last: Failure | None = None
_collectors: list[list[Failure]] = []


def report(call: str, where: str, error: Exception) -> PyfmhaError:
    """Log and remember a failure.

    Args:
        call: the override that failed.
        where: the layer and what it serves.
        error: what went wrong.

    Returns:
        The error to raise in its place: the same class for a driver's error, with its code, else :class:`PluginError`.
    """
    expected = isinstance(error, PyfmhaError | EvaluationError)
    text = str(error) if expected else f"{type(error).__name__}: {error}"
    text = f"{where}: {call}: {text}"
    kind, code = (type(error), error.code) if isinstance(error, DriverError) else (PluginError, None)
    # A failure that is no PyfmhaError is a fault of the plugin's own: its traceback is worth having.
    LOGGER.error("%s", text, exc_info=None if expected else error)
    failure = Failure(call, kind, text, code, threading.get_ident())
    global _last
    with _lock:
        _last = failure
        for collected in _collectors:
            collected.append(failure)
    return failure.error


def guarded(override: _Override) -> _Override:
    """An override whose exceptions are reported. Its object says with ``describe()`` who it is."""

    @functools.wraps(override)
    def call(self: Any, *arguments: Any) -> Any:
        try:
            return override(self, *arguments)
        except Exception as error:
            raise report(override.__name__, self.describe(), error) from error

    return cast(_Override, call)


def last_failure() -> Failure | None:
    """The latest failure in any of this process's plugins, or None."""
    return _last


def plugin_error(library: Path) -> str:
    """Why a library that is loaded hands no plugins to the TensorRT that has it; empty where it does."""
    asked = getattr(ctypes.CDLL(str(library)), "pyfmha_plugin_error", None)  # libraries before it have no such function
    if asked is None:
        return ""
    asked.restype = ctypes.c_char_p
    return (asked() or b"").decode(errors="replace")


@contextmanager
def collect_failures() -> Iterator[list[Failure]]:
    """A list to which every failure during the block is added, whichever thread it happens on."""
    collected: list[Failure] = []
    with _lock:
        _collectors.append(collected)
    try:
        yield collected
    finally:
        with _lock:  # by identity: two empty lists are equal
            _collectors[:] = [other for other in _collectors if other is not collected]
