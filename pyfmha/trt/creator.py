"""The plugin's creator, its classes for one TensorRT module, and its registration."""

import os
import re
import threading
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pyfmha.attention.decode import ARGUMENTS, WORKSPACE_RULE
from pyfmha.errors import LibraryError, PluginError
from pyfmha.runtime.library import DEFAULT_LIBRARY, Library
from pyfmha.spec.advice import build_command
from pyfmha.trt.failures import LOGGER, report
from pyfmha.trt.fields import ATTRIBUTES, Stored, read_fields
from pyfmha.trt.modules import find_module
from pyfmha.trt.plan import pair_of
from pyfmha.trt.plugin import NAME, VERSION, Origin, PluginBehaviour
from pyfmha.trt.problem import Problem
from pyfmha.trt.tactics import tactics_of

LIBRARY_VARIABLE = "PYFMHA_LIBRARY"


class CreatorBehaviour:
    """All that the creator does; joined to a module's ``IPluginCreatorV3One`` by :func:`plugin_classes`.

    Attributes:
        library: the library whose kernels its plugins launch.
    """

    trt: ClassVar[Any]
    trt_bases: ClassVar[tuple[Any, ...]]
    plugin_class: ClassVar[type[PluginBehaviour]]
    name: str
    plugin_version: str
    plugin_namespace: str
    field_names: Any

    def __init__(self, library: Library, namespace: str = "") -> None:
        for base in self.trt_bases:
            base.__init__(self)
        self.library = library
        self.name = NAME
        self.plugin_version = VERSION
        self.plugin_namespace = namespace
        # Names and types without data. The binding copies pointers only: what they point to must live here.
        empty = {"INT32": np.empty(0, np.int32), "FLOAT32": np.empty(0, np.float32), "CHAR": np.empty(0, np.int8)}
        self._fields = [
            self.trt.PluginField(name, empty[kind], getattr(self.trt.PluginFieldType, kind))
            for name, kind in ATTRIBUTES.items()
        ]
        self._field_data = empty
        self._field_names = self.trt.PluginFieldCollection(self._fields)
        self.field_names = self._field_names

    def create_plugin(self, name: str, fields: Any, phase: Any) -> PluginBehaviour:
        """A plugin from its fields.

        Args:
            name: of the layer.
            fields: a ``PluginFieldCollection``: :data:`pyfmha.trt.fields.ATTRIBUTES` in the build phase, and what the
                engine stores besides in the runtime phase.
            phase: a ``TensorRTPhase``.

        Raises:
            PluginError: a field is wrong, or the library does not serve it.
        """
        try:
            problem, stored = read_fields(self.trt, fields, stored=phase == self.trt.TensorRTPhase.RUNTIME)
            function = self.library[self._served(problem)].manifest
            pair = self._pair(problem)
            if stored is None:
                stored = Stored.of(function, WORKSPACE_RULE if pair else 0)
            stored.check(function)
            origin = Origin(
                problem=problem,
                library=self.library,
                stored=stored,
                tactics=tactics_of(function),
                pair=pair if stored.decode == WORKSPACE_RULE else (),
                layer=name or NAME,
                namespace=self.plugin_namespace,
            )
            if (stored.decode == WORKSPACE_RULE) != bool(pair):
                missing = "the library here has" if pair else "the engine has, the library here lacks"
                LOGGER.info("%s layer %r does not decode: only %s what it takes", NAME, origin.layer, missing)
            return self.plugin_class(origin)
        except Exception as error:
            raise report("create_plugin", f"{NAME} layer {name!r}", error) from error

    def _pair(self, problem: Problem) -> tuple[str, ...]:
        """The two functions that decode a problem, if the library holds them as this version calls them."""
        pair = pair_of(problem)
        if pair is None:
            return ()
        wanted = [(name, kind.replace("T", problem.dtype)) for name, kind in ARGUMENTS]
        names = (pair.split_name, pair.combine_name)
        held = all(name in self.library and list(self.library[name].manifest.arguments) == wanted for name in names)
        return names if held else ()

    def _served(self, problem: Problem) -> str:
        name = problem.function_name
        if name not in self.library:
            wanted = ("--dtype", problem.dtype, "--head-size", str(problem.padded_size))
            raise PluginError(
                f"{self.library.path} does not hold {name}, which serves {problem}; it holds {', '.join(self.library)}."
                f" Add it: {build_command(self.library.path, *wanted)}"
            )
        return name


@dataclass(frozen=True)
class PluginClasses:
    """The classes of one TensorRT module."""

    plugin: type[PluginBehaviour]
    creator: type[CreatorBehaviour]


_lock = threading.RLock()
_classes: dict[Any, PluginClasses] = {}
_creators: dict[tuple[Any, str], CreatorBehaviour] = {}


def plugin_classes(trt: Any) -> PluginClasses:
    """The plugin's and the creator's class for a TensorRT module, made once."""
    with _lock:
        if trt not in _classes:
            plugin_bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)
            plugin = _joined(NAME, PluginBehaviour, plugin_bases, {"trt": trt})
            creator_bases = (trt.IPluginCreatorV3One,)
            creator = _joined(f"{NAME}Creator", CreatorBehaviour, creator_bases, {"trt": trt, "plugin_class": plugin})
            _classes[trt] = PluginClasses(plugin, creator)
        return _classes[trt]


def _joined(name: str, behaviour: type, bases: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
    # new_class finds the binding's metaclass. The behaviour comes first, because the binding's classes have methods of
    # the same names, for documentation only.
    content = {**attributes, "trt_bases": bases, "__module__": behaviour.__module__, "__doc__": behaviour.__doc__}
    return types.new_class(name, (behaviour, *bases), {}, lambda namespace: namespace.update(content))


def find_library(library: Library | Path | str | None = None) -> Library:
    """The library given; else that of the environment variable ``PYFMHA_LIBRARY``; else ``aot_out/libpyfmha.so`` here.

    Raises:
        LibraryError: there is none, or it cannot be used.
    """
    if isinstance(library, Library):
        return library
    if library is not None:
        return Library(library)
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        if not Path(named).is_file():
            command = build_command(Path(named))
            raise LibraryError(f"{LIBRARY_VARIABLE} is {named}, where there is no file; build the library: {command}")
        return Library(named)
    if not DEFAULT_LIBRARY.is_file():
        raise LibraryError(
            f"no library at {DEFAULT_LIBRARY.resolve()}; build it (pyfmha build), or name another: the argument"
            f" `library`, or the environment variable {LIBRARY_VARIABLE}"
        )
    return Library(DEFAULT_LIBRARY)


def make_creator(trt: Any, library: Library, namespace: str = "") -> Any:
    """A creator of a module's class; not registered."""
    return plugin_classes(trt).creator(library, namespace)


def register(trt_module: Any = None, *, namespace: str = "", library: Library | Path | str | None = None) -> Any:
    """Make TensorRT know the plugin: before a network with it is built, and before an engine with it is loaded.

    Doing it again changes nothing.

    Args:
        trt_module: the module that will build or run the engine; by default the first installed of ``tensorrt``,
            ``tensorrt_lean`` and ``tensorrt_dispatch``.
        namespace: of the plugin; an engine remembers it.
        library: the built library, or its path; see :func:`find_library`.

    Returns:
        The creator, an ``IPluginCreatorV3One``.

    Raises:
        PluginError: TensorRT is missing or too old, or the name is taken: by another plugin, or by this one with
            another library.
        LibraryError: the library is missing or cannot be used.
    """
    trt = find_module(trt_module)
    with _lock:
        known = _creators.get((trt, namespace))
        if known is not None:
            return _same_library(known, library)
        creator = make_creator(trt, find_library(library), namespace)
        registry = trt.get_plugin_registry()
        taken = registry is None or registry.get_creator(NAME, VERSION, namespace) is not None
        if taken or not registry.register_creator(creator, namespace):
            raise PluginError(
                f"{trt.__name__} refused to register {NAME} version {VERSION} in namespace {namespace!r}: a plugin of"
                " that name is registered already; give another namespace"
            )
        _creators[trt, namespace] = creator
        return creator


def unregistered(trt: Any, said: Iterable[str]) -> str:
    """What to do where TensorRT's errors say that an engine holds this plugin in a namespace not registered here.

    Returns:
        A hint for the message; empty where they are about something else.
    """
    for text in said:
        found = re.search(rf"find plugin.*{NAME}.*namespace:?\s*(\w(?:[^\s,;()]*[^\s,;().])?)", text, re.IGNORECASE)
        if found and (trt, found[1]) not in _creators:
            return f"it was built with the plugin in that namespace; before: pyfmha.register(namespace={found[1]!r})"
    return ""


def _same_library(known: CreatorBehaviour, library: Library | Path | str | None) -> CreatorBehaviour:
    if library is not None:
        asked = find_library(library)
        if (asked.path, asked.manifest.build_id) != (known.library.path, known.library.manifest.build_id):
            raise PluginError(
                f"{NAME} is registered in namespace {known.plugin_namespace!r} with {known.library.path}; to use"
                f" {asked.path} as well, register it in another namespace"
            )
    return known
