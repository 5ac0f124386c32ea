"""TensorRT's calls on the plugins that a library itself exports, through their tables of functions."""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trt_double import Field
from trt_double.vtable import RealCalls, create_through, virtual

_POINTER = ctypes.c_void_p
_DELETE = 3  # the destructor that also frees


class LibraryPlugin:
    """One plugin in C; deleted with this object, unless TensorRT's ``delete`` came first."""

    def __init__(self, address: int) -> None:
        self.address = address
        capability = virtual(address, 4, _POINTER, ctypes.c_int32)
        self.parts = [address, *(int(capability(kind)) for kind in range(3))]

    @property
    def num_outputs(self) -> int:
        return int(virtual(self.parts[2], 8, ctypes.c_int32)())

    def delete(self) -> None:
        address, self.address = self.address, 0
        if address:
            virtual(address, _DELETE, None)()

    def __del__(self) -> None:
        self.delete()


class Logger:
    """An ILoggerFinder with a logger that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []
        log = ctypes.CFUNCTYPE(None, _POINTER, ctypes.c_int32, ctypes.c_char_p)(self._log)
        find = ctypes.CFUNCTYPE(_POINTER, _POINTER)(lambda this: ctypes.addressof(self._logger))
        self._kept = [log, find]
        tables = [(_POINTER * 5)(None, None, None, None, ctypes.cast(entry, _POINTER)) for entry in (log, find)]
        self._kept += tables
        self._logger, self.finder = ((_POINTER * 1)(ctypes.addressof(table)) for table in tables)

    def _log(self, this: int, severity: int, text: bytes) -> None:
        self.lines.append((severity, text.decode()))


class LibraryCalls(RealCalls):
    """See :class:`trt_double.Calls`; for the creators of a library."""

    def __init__(self, library: Path) -> None:
        self.c = ctypes.CDLL(str(library))
        self.logger = Logger()
        self.c.setLoggerFinder(_POINTER(ctypes.addressof(self.logger.finder)))
        self.c.getCreators.restype = ctypes.POINTER(_POINTER)
        self.c.pyfmha_last_error.restype = ctypes.c_char_p
        count = ctypes.c_int32()
        creators = self.c.getCreators(ctypes.byref(count))
        self.creators = [int(creators[index] or 0) for index in range(count.value)]

    def error(self) -> str:
        """The text of the last failure on this thread."""
        return str(self.c.pyfmha_last_error().decode())

    def named(self, name: str) -> int:
        """A creator by the name of its operator."""
        (found,) = (creator for creator in self.creators if virtual(creator, 6, ctypes.c_char_p)() == name.encode())
        return found

    def _function(self, plugin: Any, part: int, slot: int, result: Any, *types: Any) -> Callable[..., Any]:
        return virtual(plugin.parts[part], slot, result, *types)  # type: ignore[no-any-return]

    def _object(self, address: int | None) -> LibraryPlugin | None:
        return LibraryPlugin(address) if address else None

    def create(self, creator: Any, name: str, fields: Sequence[Field], phase: int) -> LibraryPlugin | None:
        return self._object(create_through(creator, name, fields, phase))

    def field_names(self, creator: int) -> list[tuple[str, int]]:
        """Names and types of a creator's fields."""
        return [(field.name, field.type) for field in self.fields_at(virtual(creator, 5, _POINTER)())]
