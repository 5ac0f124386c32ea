"""``pyfmha plugin-check``: a library's own plugins, asked all that needs no engine, against their descriptions.

TensorRT itself loads the library where there is one; all else is asked through the tables of functions, as it does.
"""

import importlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyfmha.errors import LibraryError, PluginError
from pyfmha.operators.arithmetic import EvaluationError
from pyfmha.operators.description import DATA_TYPES, Attribute, Operator
from pyfmha.operators.expressions import Scope
from pyfmha.operators.forms import AxisForm, Forms
from pyfmha.operators.instance import Instance
from pyfmha.operators.program import Program, program_of
from pyfmha.operators.trials import constants
from pyfmha.runtime.library import Library
from pyfmha.trt.failures import plugin_error
from pyfmha.trt.tables import Field, LibraryTables, TablePlugin, Tensor, Unknown

MODULES = ("tensorrt", "tensorrt_lean", "tensorrt_rtx")
"""The TensorRT modules that load a library, in the order in which one is looked for."""

SAMPLES = (1, 64, 128, 32, 256, 4, 16, 8, 2, 80, 96, 0)
"""Values to try for an integer that must be given."""
MOST_TRIALS = 20_000
MOST_SHAPED = 200
"""Of attributes that the operator allows, how many are tried for shapes that go with them."""
SIZES = (4, 1, 2, 3, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Sizes to try for every axis: the first that the operator serves is asked for; then those that its checks name."""
_KINDS = {"int32": (5, np.int32), "int64": (10, np.int64), "fp32": (1, np.float32)}


@dataclass(frozen=True)
class Finding:
    """One line of the check.

    Attributes:
        text: what was asked and what came.
        good: whether it is right.
    """

    text: str
    good: bool = True


def check_plugins(path: Path | None = None, module: str | None = None) -> Iterator[Finding]:
    """Load a library as TensorRT does, and ask its plugins.

    Args:
        path: the library; by default as :class:`pyfmha.runtime.library.Library` finds one.
        module: the TensorRT module to load it with; by default the first of :data:`MODULES` that is installed.

    Raises:
        LibraryError: it is no library of pyfmha's, or has no plugins.
        PluginError: the module that is named is not installed.
    """
    library = Library(path)
    operators = library.operators
    if not operators:
        raise LibraryError(f"{library.path} has no plugins: it was linked without operators; run pyfmha build")
    yield from _through_tensorrt(library.path, operators, module)
    tables = LibraryTables(library.path)
    for operator in operators:
        yield from _check_operator(tables, library, operator)


def _through_tensorrt(path: Path, operators: Sequence[Operator], module: str | None) -> Iterator[Finding]:
    trt = _found(module)
    if trt is None:
        yield Finding(f"no TensorRT is installed ({', '.join(MODULES)}): through the tables alone")
        return
    registry = trt.get_plugin_registry()
    said = f"{trt.__name__} {trt.__version__}"
    try:
        handle, why = registry.load_library(str(path)), ""
    except (RuntimeError, AttributeError) as error:
        handle, why = None, f": {error}"
    refused = plugin_error(path)
    if refused:
        yield Finding(f"{said} is given no plugins by {path}: {refused}", False)
        return
    yield Finding(f"{said} loads {path}{why}", handle is not None)
    if handle is None:
        return
    for operator in operators:
        creator = registry.get_creator(operator.name, operator.version, operator.namespace)
        fields = [] if creator is None else [field.name for field in creator.field_names]
        right = fields == [name for name, _ in operator.attributes] and creator is not None
        listed = ", ".join(fields) or "none"
        yield Finding(f"{said} finds {_called(operator)}, fields: {listed}", right)
    registry.deregister_library(handle)


def _found(module: str | None) -> Any:
    for name in MODULES if module is None else (module,):
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:
            if module is not None:
                raise PluginError(f"{name} cannot be imported: {error}") from None
    return None


def _called(operator: Operator) -> str:
    space = f" in namespace {operator.namespace}" if operator.namespace else ""
    return f"{operator.name} version {operator.version}{space}"


def _check_operator(tables: LibraryTables, library: Library, operator: Operator) -> Iterator[Finding]:
    creator = tables.named(operator.name)
    fields = [name for name, _ in tables.field_names(creator)]
    yield Finding(
        f"{operator.name}: creator with the fields {', '.join(fields) or 'none'}",
        fields == [n for n, _ in operator.attributes],
    )
    program = program_of(operator)
    found = sample(program, library)
    if found is None:
        yield Finding(
            f"{operator.name}: no sample of attributes is served by the functions that the library holds", False
        )
        return
    given, instance = found
    said = f"{operator.name} ({', '.join(f'{name} {value}' for name, value in given.items()) or 'no attributes given'})"
    plugin = tables.create(creator, "plugin-check", sample_fields(program, given), 0)
    yield Finding(
        f"{said}: created" if plugin is not None else f"{said}: not created: {tables.error()}", plugin is not None
    )
    if plugin is None:
        return
    for text, good in _questions(tables, plugin, instance):
        yield Finding(f"{operator.name}: {text}" + ("" if good or not tables.error() else f": {tables.error()}"), good)
    stored = tables.stored_fields(plugin)
    kept = [] if stored is None else stored.read()
    loaded = tables.create(creator, "plugin-check", kept, 1)
    yield Finding(
        f"{operator.name}: created again from the {len(kept)} fields that an engine keeps", loaded is not None
    )
    copy = None if loaded is None else tables.clone(loaded)
    same = copy is not None and tables.timing_cache_id(copy) == tables.timing_cache_id(plugin)
    yield Finding(f"{operator.name}: its clone is alike", same)
    unknown = tables.create(creator, "plugin-check", [Field("pyfmha_no_such_field", 5, 1, bytes(4))], 0)
    yield Finding(f"{operator.name}: refuses a field that it does not know", unknown is None)
    for one in (plugin, loaded, copy):
        if one is not None:
            one.delete()


def _questions(tables: LibraryTables, plugin: TablePlugin, instance: Instance) -> Iterator[tuple[str, bool]]:
    typed = _typed(instance)
    forms = typed.forms()
    shapes, values = served_shapes(typed, forms)
    tensors = [Tensor(shape, DATA_TYPES[form.type or ""]) for shape, form in zip(shapes, forms.all, strict=True)]
    count = len(forms.inputs)
    inputs, outputs = tensors[:count], tensors[count:]
    yield f"{plugin.num_outputs} outputs", plugin.num_outputs == len(outputs)
    found = tables.output_types(plugin, [tensor.type for tensor in inputs])
    yield f"types of its outputs {found}", found == [tensor.type for tensor in outputs]
    told = [list(map(Unknown, tensor.shape)) for tensor in inputs]
    read = [list(map(Unknown, values[name])) for name, _ in forms.shapes]
    sized = tables.output_shapes(plugin, told, read)
    yield (
        f"shapes of its outputs {sized} for {[list(t.shape) for t in inputs]}",
        sized == [list(t.shape) for t in outputs],
    )
    fits = [tables.supports(plugin, position, tensors) for position in range(len(tensors))]
    yield "takes its own types, linear", all(fits)
    other = [Tensor(tensors[0].shape, tensors[0].type, format=1), *tensors[1:]]
    yield "takes no other format", not tables.supports(plugin, 0, other)
    yield "configured", tables.configure(plugin, inputs, outputs) == 0
    room = tables.workspace(plugin, inputs, outputs)
    yield f"{room} bytes of workspace", room < 1 << 62
    yield f"timing-cache id {tables.timing_cache_id(plugin)}", bool(tables.timing_cache_id(plugin))


def _typed(instance: Instance) -> Instance:
    """With the first type where several are allowed."""
    types = {name: kinds.names[0] for name, kinds in instance.program.types.items() if name not in instance.types}
    return instance.with_types(types)


Shapes = tuple[list[tuple[int, ...]], dict[str, tuple[int, ...]]]


def served_shapes(instance: Instance, forms: Forms) -> Shapes:
    """Shapes that the checks allow, where one size of every axis is; else the first that are tried."""
    return _allowed_shapes(instance, forms) or sample_shapes(instance, forms, SIZES[0])


def _allowed_shapes(instance: Instance, forms: Forms) -> Shapes | None:
    checks = [condition.node for condition, _ in instance.program.late_checks]
    named = sorted({n.value for node in checks for n in constants(node) if type(n.value) is int and n.value > 0})
    for size in (*SIZES, *named):
        try:
            shapes, values = sample_shapes(instance, forms, size)
            count = len(forms.inputs)
            instance.plan(instance.measure(shapes[:count], shapes[count:]))
        except (PluginError, EvaluationError):
            continue
        return shapes, values
    return None


def sample_shapes(instance: Instance, forms: Forms, size: int) -> Shapes:
    """Shapes of all tensors where every axis has one size, and values of the inputs that are read."""
    values = {name: (size,) * count for name, count in forms.shapes}
    names = {name for form in forms.inputs for axis in form.axes for name in axis.unknown}
    absent = dict.fromkeys(instance.program.axes, 0)  # what no tensor of these attributes has
    scope = Scope({**absent, **instance.scope.values, **dict.fromkeys(names, size), **values})
    definitions = {name: expression for name, expression in instance.program.late}
    for name, expression in definitions.items():
        try:
            scope.values[name] = expression.evaluate(scope)
        except (EvaluationError, KeyError):
            continue
    return [tuple(_size(axis, scope) for axis in form.axes) for form in forms.all], values


def _size(axis: AxisForm, scope: Scope) -> int:
    return axis.size if axis.size is not None else int(axis.expression.evaluate(scope))


def sample(program: Program, library: Library) -> tuple[dict[str, Any], Instance] | None:
    """Attributes that the operator allows, that the library has functions for, and some shapes go with."""
    first: tuple[dict[str, Any], Instance] | None = None
    asked = 0
    kinds = dict(program.operator.attributes)
    typed = {kinds_.attribute: kinds_.names for kinds_ in program.types.values() if kinds_.attribute}
    required = [name for name, default in program.attributes.items() if default is None]
    optional = [name for name, kind in kinds.items() if name not in required and kind.type == "int32"]
    for extra in (None, *optional):  # as little as possible; else with one of the others
        names = required if extra is None else [*required, extra]
        choices = [
            [DATA_TYPES[kind] for kind in typed[name]] if name in typed else _values(kinds[name]) for name in names
        ]
        for values in itertools.islice(itertools.product(*choices), MOST_TRIALS):
            given = dict(zip(names, values, strict=True))
            try:
                instance = Instance(program, given)
            except PluginError:
                continue
            if not all(name in library for name in instance.main_functions()):
                continue
            whole, asked = _typed(instance), asked + 1
            if _allowed_shapes(whole, whole.forms()) is not None:
                return given, instance
            first = first or (given, instance)
            if asked == MOST_SHAPED:
                return first
    return first


def _values(kind: Attribute) -> list[Any]:
    if kind.type.endswith("[]"):
        return [(1,) * length for length in (1, 2, 3, 4)]
    if kind.choices:
        return list(kind.choices)
    if kind.type == "string":
        return [""]
    return [1.0, 0.5] if kind.type == "fp32" else list(SAMPLES)


def sample_fields(program: Program, given: dict[str, Any]) -> list[Field]:
    """Attributes as a creator's fields."""
    kinds, made = dict(program.operator.attributes), []
    for name, value in given.items():
        kind = kinds[name].type
        if kind == "string":
            made.append(Field(name, 6, len(value.encode()) + 1, value.encode() + b"\0"))
            continue
        number, dtype = _KINDS[kind.removesuffix("[]")]
        array = np.array(value if kind.endswith("[]") else [value], dtype)
        made.append(Field(name, number, len(array), array.tobytes()))
    return made
