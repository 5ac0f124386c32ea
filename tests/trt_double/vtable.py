"""The calls of TensorRT's C++ code on a real binding's objects.

A pybind11 object that inherits several C++ classes holds a pointer to one C++ object for each, in the order of the
bases. Those objects' virtual functions are called here through their tables, so that the binding's own C++ code runs:
it takes the GIL, looks the override up, converts, and turns exceptions into what TensorRT sees. Order of the
functions: NvInferRuntime*.h of TensorRT 11.1; each interface begins with getAPILanguage, getInterfaceInfo and the two
destructors of the Itanium C++ ABI.
"""

import ctypes
import functools
import gc
import weakref
from collections.abc import Sequence
from typing import Any

from pyfmha.trt.plugin import PluginBehaviour
from pyfmha.trt.tables import POINTER, TableCalls, create_through, virtual
from trt_double import Field

_made: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
"""The plugins that there are, by the address of their IPluginV3."""


def _remember(start: Any) -> Any:
    @functools.wraps(start)
    def remembered(self: Any, *arguments: Any) -> None:
        start(self, *arguments)
        if type(type(self)).__name__ == "pybind11_type":  # and not of a double, which has no C++ objects
            _made[pointers(self, 4)[0]] = self

    return remembered


PluginBehaviour.__init__ = _remember(PluginBehaviour.__init__)  # type: ignore[method-assign]


def pointers(instance: Any, count: int) -> list[int]:
    """The C++ objects of an instance, one for each C++ base."""
    start = id(instance) + 2 * ctypes.sizeof(POINTER)  # after the object's header
    first = ctypes.cast(start, ctypes.POINTER(POINTER))
    if count == 1:  # pybind11's simple layout: value and holder in place
        return [int(first[0])]
    table = ctypes.cast(first[0], ctypes.POINTER(POINTER))
    return [int(table[2 * index]) for index in range(count)]  # value, holder, value, holder, ...


class RealCalls(TableCalls):
    """See :class:`trt_double.Calls`."""

    def __init__(self, trt: Any) -> None:
        self.trt = trt

    def _function(self, plugin: Any, part: int, slot: int, result: Any, *types: Any) -> Any:
        return virtual(pointers(plugin, 4)[part], slot, result, *types)

    def _object(self, address: int | None) -> Any | None:
        if not address:
            return None
        # Those made by the plugin's own __init__ first: gc.get_objects() shows half-made tuples of other threads, and
        # Python fails to finish a tuple that somebody else holds (SystemError in tupleobject.c).
        known = _made.get(address)
        if known is not None and self._is_plugin(known):
            return known
        found = [o for o in gc.get_objects() if self._is_plugin(o) and pointers(o, 4)[0] == address]
        assert len(found) == 1, "the C++ object has no Python object"
        return found[0]

    def _is_plugin(self, candidate: Any) -> bool:
        # by type(), because isinstance also asks an object's __class__, which some compute
        return issubclass(type(candidate), self.trt.IPluginV3)

    def create(self, creator: Any, name: str, fields: Sequence[Field], phase: int) -> Any | None:
        (this,) = pointers(creator, 1)
        return self._object(create_through(this, name, fields, phase))
