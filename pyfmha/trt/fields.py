"""A plugin's fields: what it is created with, and what an engine stores of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyfmha.errors import PluginError
from pyfmha.operators.description import MOST_ELEMENTS
from pyfmha.operators.program import Program
from pyfmha.spec.manifest import INTERFACE, Function
from pyfmha.trt.field_data import read_data

FIELD_TYPES = {"int32": "INT32", "int64": "INT64", "fp32": "FLOAT32", "string": "CHAR"}
"""TensorRT's type of an attribute's field, a list's too."""

SCHEMA_FIELD, PROTOTYPE_FIELD, ALGORITHMS_FIELD = "pyfmha_schema", "pyfmha_prototype", "pyfmha_algorithms"
STORED = {SCHEMA_FIELD: "int32", PROTOTYPE_FIELD: "string", ALGORITHMS_FIELD: "string"}
"""What an engine stores besides attributes, to know a library that it cannot use; and of each option ``pyfmha_`` and
its name, where the library had it: an engine without is one that earlier versions of this package still load."""

_NUMPY = {"int32": np.int32, "int64": np.int64, "fp32": np.float32, "string": np.int8}


@dataclass(frozen=True)
class Stored:
    """What an engine stores of the library that it was built with.

    Attributes:
        schema: the version of how its functions are called, :data:`pyfmha.spec.manifest.INTERFACE`.
        prototype: the C functions whose algorithms are tactics, with their arguments.
        algorithms: the names of their algorithms, see :class:`pyfmha.operators.tactics.Tactic`.
        options: of each option that the library had then, its number. Without, TensorRT was not asked for its
            workspace, whose address belongs to somebody else: only what is stored tells whether it may be written to.
    """

    schema: int
    prototype: str
    algorithms: tuple[str, ...]
    options: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, functions: Sequence[Function], options: Mapping[str, int] | None = None) -> "Stored":
        """The entry for functions of the library in use."""
        algorithms = [algorithm for function in functions for algorithm in function.algorithms]
        names = tuple("+".join(variant.name for variant in algorithm) for algorithm in algorithms)
        prototypes = "; ".join(function.prototype for function in functions)
        return cls(INTERFACE, prototypes, names, tuple((options or {}).items()))

    def check(self, functions: Sequence[Function]) -> None:
        """Compare with the library in use.

        Raises:
            PluginError: the engine was built with a library that is called in another way.
        """
        here = Stored.of(functions)
        if (self.schema, self.prototype) != (here.schema, here.prototype):
            raise PluginError(
                f"the engine was built with {self.prototype}, schema {self.schema}; the library here has"
                f" {here.prototype}, schema {here.schema}: build the engine again, or use the library of that time"
            )

    def values(self) -> dict[str, int | str]:
        """The fields by name."""
        return {
            SCHEMA_FIELD: self.schema,
            PROTOTYPE_FIELD: self.prototype,
            ALGORITHMS_FIELD: ";".join(self.algorithms),
            **{f"pyfmha_{name}": number for name, number in self.options},
        }


def attribute_types(program: Program) -> dict[str, str]:
    """The attributes of an operator by name, with their types."""
    return {name: kind.type for name, kind in program.operator.attributes}


def stored_types(program: Program) -> dict[str, str]:
    """What an engine stores besides, with types."""
    return STORED | {f"pyfmha_{option.name}": "int32" for option, _ in program.options}


def read_fields(
    trt: Any, program: Program, collection: Iterable[Any] | None, *, stored: bool
) -> tuple[dict[str, Any], Stored | None]:
    """Read what ``create_plugin`` receives; every value is copied.

    Args:
        trt: the TensorRT module that the fields are of.
        program: of the operator.
        collection: its ``PluginField`` objects.
        stored: whether they come from an engine, so that :data:`STORED` must be among them, or from a user.

    Returns:
        The attributes that are given, by name, and what the engine stored.

    Raises:
        PluginError: a field is missing, unknown, repeated, or of the wrong type or length.
    """
    attributes = attribute_types(program)
    allowed = {**attributes, **stored_types(program)} if stored else attributes
    optional = {name for name, default in program.attributes.items() if default is not None}
    optional |= {f"pyfmha_{option.name}" for option, _ in program.options}
    listed = ", ".join(
        f"{name} ({_said(kind)}{', optional' if name in optional else ''})" for name, kind in allowed.items()
    )
    again = ": build the engine again, or use the library that it was built with" if stored else ""
    values: dict[str, Any] = {}
    for field in collection or ():
        if field.name in values:
            raise PluginError(f"field {field.name} is given more than once")
        if field.name not in allowed:
            raise PluginError(f"unknown field '{field.name}'; allowed are {listed}{again}")
        values[field.name] = _value(trt, field, allowed[field.name])
    missing = [name for name in allowed if name not in values and name not in optional]
    if missing:
        foreign = "; the engine was not built by pyfmha" if stored and set(missing) <= set(STORED) else ""
        raise PluginError(f"missing field {', '.join(missing)}{foreign}; needed are {listed}{again}")
    given = {name: value for name, value in values.items() if name in attributes}
    return given, _stored(program, values) if stored else None


def _said(kind: str) -> str:
    return FIELD_TYPES[kind.removesuffix("[]")] + (" list" if kind.endswith("[]") else "")


def _value(trt: Any, field: Any, kind: str) -> Any:
    element = kind.removesuffix("[]")
    wanted = FIELD_TYPES[element]
    # The ONNX parser gives integers of 32 bits for those of 64.
    narrow = wanted == "INT64" and field.type == trt.PluginFieldType.INT32
    if field.type != getattr(trt.PluginFieldType, wanted) and not narrow:
        raise PluginError(f"field {field.name} is of type {_type_word(field.type)}; it must be {wanted}")
    found = "INT32" if narrow else wanted
    if kind == "string":
        text = read_data(trt, field, found).tobytes().split(b"\0")[0]
        try:
            return text.decode()
        except ValueError:
            raise PluginError(f"field {field.name} is no text in UTF-8") from None
    if kind.endswith("[]"):
        if field.size > MOST_ELEMENTS:
            raise PluginError(f"field {field.name} has {field.size} values; at most {MOST_ELEMENTS} are allowed")
        return tuple(read_data(trt, field, found).tolist()) if field.size else ()
    if field.size != 1:
        raise PluginError(f"field {field.name} has {field.size} values; it must have one {wanted}")
    return read_data(trt, field, found)[0].item()


def _type_word(kind: Any) -> str:
    return str(getattr(kind, "name", kind))


def _stored(program: Program, values: Mapping[str, Any]) -> Stored:
    algorithms = tuple(name for name in values[ALGORITHMS_FIELD].split(";") if name)
    names = [option.name for option, _ in program.options if values.get(f"pyfmha_{option.name}")]
    options = tuple((name, values[f"pyfmha_{name}"]) for name in names)
    return Stored(values[SCHEMA_FIELD], values[PROTOTYPE_FIELD], algorithms, options)


class FieldCollection:
    """Fields in TensorRT's form, together with the memory that they point to.

    The binding copies only a pointer out of a collection, and a field holds only a pointer to its data: whoever hands
    ``collection`` to TensorRT keeps this object for as long as TensorRT may read it.
    """

    def __init__(self, trt: Any, values: Mapping[str, Any], types: Mapping[str, str]) -> None:
        self._arrays = {name: _array(types[name], value) for name, value in values.items()}
        self._fields = [
            trt.PluginField(name, array, getattr(trt.PluginFieldType, FIELD_TYPES[types[name].removesuffix("[]")]))
            for name, array in self._arrays.items()
        ]
        self._vector = trt.PluginFieldCollection(self._fields)
        # The binding converts a PluginFieldCollection, which is a vector, to this type, but only in calls that come
        # from inside one of its own functions. On a thread of TensorRT's own there is none, so it is converted here.
        convert = getattr(trt, "PluginFieldCollection_", None)
        self.collection = self._vector if convert is None else convert(self._vector)


def _array(kind: str, value: Any) -> Any:
    if kind == "string":  # with a NUL at the end, as TensorRT's own parser writes strings
        return np.frombuffer(value.encode() + b"\0", np.int8)
    if kind.endswith("[]"):
        return np.array(value, _NUMPY[kind.removesuffix("[]")])
    return np.array([value], _NUMPY[kind])


def creation_fields(trt: Any, program: Program, attributes: Mapping[str, Any]) -> FieldCollection:
    """The fields with which a user creates a plugin."""
    return FieldCollection(trt, attributes, attribute_types(program))


def stored_fields(trt: Any, program: Program, attributes: Mapping[str, Any], stored: Stored) -> FieldCollection:
    """The fields that an engine stores."""
    types = {**attribute_types(program), **stored_types(program)}
    return FieldCollection(trt, {**attributes, **stored.values()}, types)
