"""The creators of plugins, their classes for one TensorRT module, and their registration."""

import functools
import re
import threading
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pyfmha.attention.operator import OPERATOR
from pyfmha.errors import LibraryError, PluginError
from pyfmha.operators.description import Operator
from pyfmha.operators.instance import Instance
from pyfmha.operators.program import Program, program_of
from pyfmha.runtime.library import Library
from pyfmha.spec.advice import build_command
from pyfmha.trt.failures import LOGGER, plugin_error, report
from pyfmha.trt.fields import FIELD_TYPES, Stored, read_fields
from pyfmha.trt.modules import find_module
from pyfmha.trt.origin import Origin
from pyfmha.trt.plugin import PluginBehaviour
from pyfmha.trt.protocols import Kind, TensorRT


class CreatorBehaviour:
    """All that a creator does; joined to a module's ``IPluginCreatorV3One`` by :func:`plugin_classes`.

    Attributes:
        operator: what its plugins are.
        library: the library whose kernels they launch.
    """

    trt: ClassVar[Any]
    trt_bases: ClassVar[tuple[Any, ...]]
    plugin_class: ClassVar[type[PluginBehaviour]]
    name: str
    plugin_version: str
    plugin_namespace: str
    field_names: Any

    def __init__(self, operator: Operator, library: Library, namespace: str = "") -> None:
        for base in self.trt_bases:
            base.__init__(self)
        self.operator = operator
        self.library = library
        self.name = operator.name
        self.plugin_version = operator.version
        self.plugin_namespace = namespace
        # Names and types without data. The binding copies pointers only: what they point to must live here.
        empty = {
            "INT32": np.empty(0, np.int32),
            "INT64": np.empty(0, np.int64),
            "FLOAT32": np.empty(0, np.float32),
            "CHAR": np.empty(0, np.int8),
        }
        kinds = {name: FIELD_TYPES[kind.type.removesuffix("[]")] for name, kind in operator.attributes}
        self._fields = [
            self.trt.PluginField(name, empty[kind], getattr(self.trt.PluginFieldType, kind))
            for name, kind in kinds.items()
        ]
        self._field_data = empty
        self._field_names = self.trt.PluginFieldCollection(self._fields)
        self.field_names = self._field_names

    @functools.cached_property
    def _program(self) -> Program:  # read when it is needed: a library may have many operators
        return program_of(self.operator)

    def create_plugin(self, name: str, fields: Any, phase: Any) -> PluginBehaviour:
        """A plugin from its fields.

        Args:
            name: of the layer.
            fields: a ``PluginFieldCollection``: the operator's attributes in the build phase, and what the engine
                stores besides in the runtime phase.
            phase: a ``TensorRTPhase``.

        Raises:
            PluginError: a field is wrong, or the library does not serve it.
        """
        try:
            runtime = phase == self.trt.TensorRTPhase.RUNTIME
            given, stored = read_fields(self.trt, self._program, fields, stored=runtime)
            return self.plugin_class(self._origin(name or self.name, Instance(self._program, given), stored))
        except Exception as error:
            raise report("create_plugin", f"{self.name} layer '{name}'", error) from error

    def _origin(self, layer: str, instance: Instance, stored: Stored | None) -> Origin:
        functions = [self.library[name].manifest for name in self._held(instance)]
        numbers = {option.name: option.number for option, _ in self._program.options}
        held = {name: number for name, number in numbers.items() if self._has_option(instance, name)}
        if stored is None:
            stored = Stored.of(functions, held)
        stored.check(functions)
        kept = dict(stored.options)
        for name, number in numbers.items():
            if (kept.get(name) == number) != (name in held):
                missing = "the library here has" if name in held else "the engine has, the library here lacks"
                LOGGER.info("%s layer '%s' does without %s: only %s what it takes", self.name, layer, name, missing)
        options = {name: name in held and kept.get(name) == number for name, number in numbers.items()}
        return Origin(instance.with_options(options), self.library, stored, layer, self.plugin_namespace)

    def _held(self, instance: Instance) -> tuple[str, ...]:
        """The functions whose algorithms are tactics; the library must hold them, as the operator calls them."""
        names = instance.main_functions()
        for name in names:
            if name not in self.library or not instance.active[0].fits(self.library[name].manifest.arguments):
                command = build_command(self.library.path, *instance.build_options().split())
                raise PluginError(
                    f"{self.library.path} does not hold {name}, which serves {instance}; it holds"
                    f" {', '.join(self.library)}. Add it: {command}"
                )
        return names

    def _has_option(self, instance: Instance, name: str) -> bool:
        """Whether the library holds all functions of an option as the operator calls them."""
        launches = [launch for launch in self._program.launches if launch.launch.option == name]
        for option, functions in instance.options_wanted():
            if option.name == name:
                return all(
                    function in self.library and launch.fits(self.library[function].manifest.arguments)
                    for launch, function in zip(launches, functions, strict=True)
                )
        return False


@dataclass(frozen=True)
class PluginClasses:
    """The classes of one TensorRT module."""

    plugin: type[PluginBehaviour]
    creator: type[CreatorBehaviour]


_lock = threading.RLock()
_classes: dict[Any, PluginClasses] = {}
_creators: dict[tuple[Any, str, str, str], CreatorBehaviour] = {}
_loaded: dict[tuple[Any, str, str, str], Library] = {}
"""The libraries that a module's registry has loaded, by their plugins."""

_WITH_FUNCTION = f"{OPERATOR.name}_"
"""How the names of those operators begin that are the default one with a user's function."""
KINDS = ("python", "library")
"""What :func:`register` registers."""


def plugin_classes(trt: Any) -> PluginClasses:
    """The plugin's and the creator's class for a TensorRT module, made once."""
    with _lock:
        if trt not in _classes:
            plugin_bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)
            plugin = _joined("PyfmhaPlugin", PluginBehaviour, plugin_bases, {"trt": trt})
            creator_bases = (trt.IPluginCreatorV3One,)
            creator = _joined("PyfmhaCreator", CreatorBehaviour, creator_bases, {"trt": trt, "plugin_class": plugin})
            _classes[trt] = PluginClasses(plugin, creator)
        return _classes[trt]


def _joined(name: str, behaviour: type, bases: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
    # new_class finds the binding's metaclass. The behaviour comes first, because the binding's classes have methods of
    # the same names, for documentation only.
    content = {**attributes, "trt_bases": bases, "__module__": behaviour.__module__, "__doc__": behaviour.__doc__}
    return types.new_class(name, (behaviour, *bases), {}, lambda namespace: namespace.update(content))


def find_library(library: Library | Path | str | None = None) -> Library:
    """The library given; else as :class:`pyfmha.Library` finds one.

    Raises:
        LibraryError: there is none, or it cannot be used.
    """
    return library if isinstance(library, Library) else Library(library)


def library_in_use(trt: Any, namespace: str, library: Library | Path | str | None) -> Library:
    """The library given; else that of the default plugin, where it is registered; else as :func:`find_library`."""
    known = _creators.get((trt, OPERATOR.name, OPERATOR.version, namespace))
    return known.library if library is None and known is not None else find_library(library)


def make_creator(trt: Any, library: Library, namespace: str = "", operator: Operator = OPERATOR) -> Any:
    """A creator of a module's class; not registered."""
    return plugin_classes(trt).creator(operator, library, namespace)


def operator_named(library: Library, name: str) -> Operator:
    """An operator that a library holds, by name.

    Raises:
        PluginError: it holds none of that name.
    """
    held = {operator.name: operator for operator in (OPERATOR, *library.operators)}
    if name not in held:
        raise PluginError(f"{library.path} holds no operator {name!r}; it holds {', '.join(held)}")
    return held[name]


def register(
    trt_module: TensorRT | None = None,
    *,
    namespace: str | None = None,
    library: Library | Path | str | None = None,
    operator: Operator | str = OPERATOR,
    kind: Kind = "python",
) -> Any:
    """Make TensorRT know a plugin: before a network with it is built, and before an engine with it is loaded.

    With the default operator come the library's plugins of it with users' functions. Doing it again changes nothing.
    There are two plugins that do the same, and either runs an engine that was built with the other:

    - ``"python"`` is this package's. What fails in it is raised again where TensorRT was called (:class:`Session`,
      :func:`build_engine`, ...) and logged by ``logging``, and its namespace can be chosen; every enqueue takes the GIL
      and some microseconds of host time.
    - ``"library"`` is the one in C inside the library, which TensorRT loads (``IPluginRegistry::loadLibrary``): no
      Python runs in an enqueue, and threads do not wait for one another. What fails in it goes to TensorRT's logger, as
      text. All operators of the library are registered at once, each in its own namespace.

    Args:
        trt_module: the module that will build or run the engine; by default the first installed of ``tensorrt``,
            ``tensorrt_lean`` and ``tensorrt_dispatch``.
        namespace: of the plugin; by default its operator's. An engine remembers it.
        library: the built library, or its path; see :func:`find_library`.
        operator: what the plugin is, or its name in the library; attention by default.
        kind: ``"python"`` or ``"library"``.

    Returns:
        The creator, an ``IPluginCreatorV3One``.

    Raises:
        PluginError: TensorRT is missing or too old, or the name is taken: by another plugin, by this one with another
            library or of the other kind; or the library does not hold the plugin.
        LibraryError: the library is missing or cannot be used.
    """
    if kind not in KINDS:
        raise PluginError(f"kind is {kind!r}; allowed are {', '.join(KINDS)}")
    trt = find_module(trt_module)
    if kind == "library":
        with _lock:
            return _load(trt, find_library(library), operator, namespace)
    with _lock:
        found = None if isinstance(operator, Operator) else find_library(library)
        if not isinstance(operator, Operator):
            assert found is not None
            operator = operator_named(found, operator)
        space = operator.namespace if namespace is None else namespace
        key = (trt, operator.name, operator.version, space)
        known = _creators.get(key)
        if known is not None:
            return _same_library(known, library)
        if key in _loaded:
            raise _other_kind(trt, operator, space, "library", _loaded[key].path)
        creator = _register(trt, found or find_library(library), space, operator)
        for other in function_operators(creator.library) if operator is OPERATOR else ():
            if (trt, other.name, other.version, space) not in _creators:
                _register(trt, creator.library, space, other)
        return creator


def _register(trt: Any, library: Library, space: str, operator: Operator) -> Any:
    creator = make_creator(trt, library, space, operator)
    registry = trt.get_plugin_registry()
    taken = registry is None or registry.get_creator(operator.name, operator.version, space) is not None
    if taken or not registry.register_creator(creator, space):
        raise _taken(trt, operator, space)
    _creators[trt, operator.name, operator.version, space] = creator
    return creator


def function_operators(library: Library) -> list[Operator]:
    """The operators of a library that are the default one with a user's function."""
    return [operator for operator in library.operators if operator.name.startswith(_WITH_FUNCTION)]


def _load(trt: Any, library: Library, asked: Operator | str, namespace: str | None) -> Any:
    """The creator of a library's own plugin, which TensorRT loads once for each module and path."""
    name = asked if isinstance(asked, str) else asked.name
    held = {operator.name: operator for operator in library.operators}
    if name not in held:
        listed = ", ".join(held) or "none"
        raise PluginError(
            f"{library.path} has no plugin {name} of its own, but {listed}; build it again with this pyfmha, or"
            ' register(kind="python")'
        )
    space = held[name].namespace
    if namespace not in (None, space):
        raise PluginError(
            f"the plugin {name} of {library.path} is in namespace {space!r}, not {namespace!r}; only"
            ' register(kind="python") chooses one'
        )
    registry = trt.get_plugin_registry()
    places = {(trt, operator.name, operator.version, operator.namespace): operator for operator in held.values()}
    known = next((_loaded[place] for place in places if place in _loaded and _loaded[place].path == library.path), None)
    if known is not None and known.manifest.build_id != library.manifest.build_id:
        raise PluginError(
            f"{trt.__name__} has loaded {library.path} of an earlier build ({known.manifest.build_id[:12]}, now"
            f" {library.manifest.build_id[:12]}); start another process"
        )
    if known is None:
        for (_, other, version, own), operator in places.items():
            python = _creators.get((trt, other, version, own))
            if python is not None:
                raise _other_kind(trt, operator, own, "python", python.library.path)
            if registry is None or registry.get_creator(other, version, own) is not None:
                raise _taken(trt, operator, own)
        if registry.load_library(str(library.path)) is None:
            why = plugin_error(library.path) or "pyfmha plugin-check says more"
            raise PluginError(f"{trt.__name__} refused to load {library.path}: {why}")
    creator = registry.get_creator(name, held[name].version, space)
    if creator is None:
        why = plugin_error(library.path) or "pyfmha plugin-check says more"
        raise PluginError(f"{trt.__name__} loaded {library.path} without {name}: {why}")
    _loaded.update(dict.fromkeys(places, library))
    return creator


def _other_kind(trt: Any, operator: Operator, space: str, kind: str, path: Path) -> PluginError:
    return PluginError(
        f"{trt.__name__} has {operator.name} version {operator.version} in namespace {space!r} of the kind {kind!r}"
        f" already, with {path}; go on with that one, or start another process"
    )


def _taken(trt: Any, operator: Operator, space: str) -> PluginError:
    return PluginError(
        f"{trt.__name__} refused to register {operator.name} version {operator.version} in namespace {space!r}:"
        " a plugin of that name is registered already; give another namespace"
    )


def unregistered(trt: Any, said: Iterable[str]) -> str:
    """What to do where TensorRT's errors say that an engine holds this plugin in a namespace not registered here.

    Returns:
        A hint for the message; empty where they are about something else.
    """
    for text in said:
        found = re.search(r"find plugin\W*(\w+).*namespace:?\s*(\w(?:[^\s,;()]*[^\s,;().])?)", text, re.IGNORECASE)
        if found and found[1] in _known_names() and not _is_registered(trt, found[1], found[2]):
            which = "" if found[1] == OPERATOR.name else f"operator={found[1]!r}, "
            call = f"pyfmha.register({which}namespace={found[2]!r})"
            return f"it was built with the plugin in that namespace; before: {call}"
        missing = re.search(rf"find plugin\W*{_WITH_FUNCTION}(\w+)", text, re.IGNORECASE)
        if missing:
            return _without_function(trt, missing[1])
    return ""


def _without_function(trt: Any, function: str) -> str:
    """What to do where an engine has a function of a user's that the library lacks; empty where it has it."""
    try:
        library = library_in_use(trt, "", None)
    except LibraryError as error:
        return f"it was built with the function {function}, and {error}"
    names = [one.name.removeprefix(_WITH_FUNCTION) for one in function_operators(library)]
    if function in names:
        return ""
    held = ", ".join(names) or "none"
    command = build_command(library.path, "--functions", f"{function}.py")
    return (
        f"it was built with the function {function}, which {library.path} has not (it has: {held}); build it from the"
        f" function's file: {command}"
    )


def _is_registered(trt: Any, name: str, namespace: str) -> bool:
    return any((module, known, space) == (trt, name, namespace) for module, known, _, space in _creators)


def _known_names() -> set[str]:
    """The operators that this process knows of."""
    names = {OPERATOR.name} | {name for _, name, _, _ in _creators}
    try:
        return names | {operator.name for operator in find_library().operators}
    except LibraryError:
        return names


def _same_library(known: CreatorBehaviour, library: Library | Path | str | None) -> CreatorBehaviour:
    if library is not None:
        asked = find_library(library)
        if (asked.path, asked.manifest.build_id) != (known.library.path, known.library.manifest.build_id):
            raise PluginError(
                f"{known.name} is registered in namespace {known.plugin_namespace!r} with {known.library.path}; to use"
                f" {asked.path} as well, register it in another namespace"
            )
    return known
