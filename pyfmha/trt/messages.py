"""TensorRT's own messages in Python's ``logging``, and kept, so that an error can say what TensorRT said.

They go to the logger ``pyfmha.tensorrt``: TensorRT's errors as ERROR, its warnings as WARNING, INFO as INFO, VERBOSE as
DEBUG. Where logging is not configured, Python prints warnings and errors to stderr.
"""

import logging
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyfmha.errors import EngineError, PyfmhaError
from pyfmha.trt.failures import Failure

LOGGER = logging.getLogger("pyfmha.tensorrt")
_LEVELS = {
    "INTERNAL_ERROR": logging.CRITICAL,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.INFO,
    "VERBOSE": logging.DEBUG,
}


_lock = threading.Lock()
_loggers: dict[Any, Any] = {}
_collectors: list[tuple[int, list[str]]] = []


def _log(severity: Any, text: str) -> None:
    level = _LEVELS.get(severity.name, logging.INFO)
    with _lock:
        for least, collected in _collectors:
            if level >= least:
                collected.append(text)
    LOGGER.log(level, "%s", text)


def logger_of(trt: Any) -> Any:
    """The ``ILogger`` for a TensorRT module: one a process, because TensorRT keeps the first that it is given."""
    with _lock:
        if trt not in _loggers:
            content = {
                "__init__": lambda self: trt.ILogger.__init__(self),
                "log": lambda self, severity, text: _log(severity, text),
            }
            made = types.new_class("PyfmhaLogger", (trt.ILogger,), {}, lambda namespace: namespace.update(content))
            _loggers[trt] = made()
        return _loggers[trt]


@contextmanager
def collect_errors(least: int = logging.ERROR) -> Iterator[list[str]]:
    """A list to which every error that TensorRT logs during the block is added, whichever thread it happens on.

    Args:
        least: from which level of ``logging`` on; warnings, too, where TensorRT gives its reason as one.
    """
    collected: list[str] = []
    with _lock:
        _collectors.append((least, collected))
    try:
        yield collected
    finally:
        with _lock:  # by identity: two empty lists are equal
            _collectors[:] = [other for other in _collectors if other[1] is not collected]


def make_root(trt: Any, name: str) -> Any:
    """TensorRT's ``Builder`` or ``Runtime``, from which everything else is made.

    Raises:
        EngineError: TensorRT gives none, as with a driver that is too old for its CUDA.
    """
    with collect_errors(logging.WARNING) as said:
        try:
            made = getattr(trt, name)(logger_of(trt))
        except TypeError:  # the binding's answer to a null pointer; the reason is logged, as a warning
            made = None
    if made is None:
        hint = "the NVIDIA driver must be as new as its CUDA asks for: compare nvidia-smi"
        raise failure_of(f"{trt.__name__} {trt.__version__} gives no {name} here", [], said, hint)
    return made


def failure_of(what: str, failures: list[Failure], said: list[str], hint: str = "") -> PyfmhaError:
    """The error for a call of TensorRT that failed.

    Args:
        what: the sentence to begin with: what could not be done.
        failures: those of the plugin during the call. Ones on this thread are preferred: with several sessions on
            several threads the others' may be among them.
        said: the errors that TensorRT logged.
        hint: what to do, where TensorRT alone failed.

    Returns:
        The plugin's first failure, which names layer and reason, where there is one: what follows it are
        consequences. Else an :class:`EngineError` with TensorRT's own words.
    """
    here = [failure for failure in failures if failure.thread == threading.get_ident()] or failures
    if here:
        return here[0].error
    words = "; ".join(dict.fromkeys(text.strip() for text in said)) or "it logged no reason"
    return EngineError(f"{what}: TensorRT: {words}{hint and '; ' + hint}")
