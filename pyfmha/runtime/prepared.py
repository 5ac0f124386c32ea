"""A launch of which all but its stream and pointers is settled."""

import ctypes
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from pyfmha.errors import LaunchError
from pyfmha.runtime.packing import Head

if TYPE_CHECKING:
    from pyfmha.runtime.library import Function


class Prepared:
    """A launch of which only the stream and the leading pointers are still open; see
    :meth:`pyfmha.runtime.library.Function.prepare`.

    A call ``prepared(stream, *pointers)`` launches. It fills in a buffer and hands it to C, so one thread may use it at
    a time. Where every call in Python counts, its two steps can be taken apart::

        prepared.pack(stream, *pointers)
        status = prepared.launch()

    Threads that may meet, and functions that are launched one after the other with the same arguments, have bytes
    instead, which nobody changes, and which cost no more::

        arguments = prepared.head(stream, *pointers) + prepared.tail
        status = prepared.start(arguments)

    Attributes:
        function: what it launches.
        pack: fills in the stream and the leading pointers; raises struct.error for another number of them or what is no
            integer, OverflowError for what does not fit.
        launch: launches with what was filled in last, and returns the ``CUresult``; for its text, ``function.check``.
        head: the bytes of the stream and the leading pointers; raises as ``pack``.
        tail: the bytes of everything else.
        start: launches with such bytes, which it does not check, and returns the ``CUresult``.
    """

    __slots__ = ("_buffer", "function", "head", "launch", "pack", "start", "tail")

    def __init__(self, function: "Function", packed: bytes, head: Head) -> None:
        self.function = function
        self.head: Callable[..., bytes] = head.pack
        self.tail = packed[head.size :]
        self.start = function.start
        self._buffer = ctypes.create_string_buffer(packed, len(packed))
        self.pack: Callable[..., None] = functools.partial(head.pack_into, self._buffer, 0)
        self.launch: Callable[[], int] = functools.partial(self.start, ctypes.byref(self._buffer))

    def __call__(self, stream: int, *pointers: int) -> None:
        """Launch.

        Raises:
            LaunchError: the launch was refused or failed; ``code`` is the ``CUresult``.
            struct.error: a pointer is no integer, or their number is wrong.
            OverflowError: a pointer does not fit in 64 bits.
        """
        self.pack(stream, *pointers)
        status = self.launch()
        if status:
            self.function.check(status, LaunchError)
