"""The plugin's fields: what it is created with, and what an engine stores of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyfmha.attention.first import HEAD_SIZES
from pyfmha.errors import PluginError
from pyfmha.spec.manifest import INTERFACE, Function
from pyfmha.trt.field_data import read_data
from pyfmha.trt.problem import DATA_TYPES, TYPE_NAMES, Features, Problem

EARLIER = {
    "num_heads": "INT32",
    "head_size": "INT32",
    "type_id": "INT32",
    "softmax_scale": "FLOAT32",
    "causal": "INT32",
}
"""The first five attributes and their types. A plugin created with no others launches the first kernel."""

NEWER = {
    "num_kv_heads": "INT32",
    "layout": "CHAR",
    "bottom_right": "INT32",
    "window_left": "INT32",
    "window_right": "INT32",
    "softcap": "FLOAT32",
    "return_lse": "INT32",
    "q_lengths": "INT32",
    "kv_lengths": "INT32",
    "cu_seqlens": "INT32",
}
"""Those of :class:`pyfmha.trt.problem.Features`, all optional; one of them is enough for the kernel that has them."""

ATTRIBUTES = {**EARLIER, **NEWER}
"""Creation attributes and their types, as ``creator.field_names`` lists them: all that TensorRT's ONNX parser reads."""

STORED = {
    "pyfmha_schema": "INT32",
    "pyfmha_prototype": "CHAR",
    "pyfmha_algorithms": "CHAR",
    "pyfmha_decode": "INT32",
}
"""What an engine stores besides, to know a library that it cannot use. The last is missing in an engine without room
for decoding, so that earlier versions of this package still load it, and this one loads theirs."""

OPTIONAL = {"causal", *NEWER, "pyfmha_decode"}
_FLAGS = ("bottom_right", "return_lse", "q_lengths", "kv_lengths", "cu_seqlens")
_NUMPY = {"INT32": np.int32, "FLOAT32": np.float32, "CHAR": np.int8}


@dataclass(frozen=True)
class Stored:
    """What an engine stores of the library that it was built with.

    Attributes:
        schema: the version of how its functions are called, :data:`pyfmha.spec.manifest.INTERFACE`.
        prototype: the C function with its arguments.
        algorithms: the names of its algorithms, see :class:`pyfmha.trt.tactics.Tactic`.
        decode: :data:`pyfmha.attention.decode.WORKSPACE_RULE` of then, if it had the functions of decoding, so that
            TensorRT was asked for their workspace; else 0. Without, the workspace's address belongs to somebody else,
            and need not be null: only what is stored tells whether it may be written to.
    """

    schema: int
    prototype: str
    algorithms: tuple[str, ...]
    decode: int = 0

    @classmethod
    def of(cls, function: Function, decode: int = 0) -> "Stored":
        """The entry for a function of the library in use."""
        algorithms = tuple("+".join(variant.name for variant in algorithm) for algorithm in function.algorithms)
        return cls(INTERFACE, prototype(function), algorithms, decode)

    def check(self, function: Function) -> None:
        """Compare with the library in use.

        Raises:
            PluginError: the engine was built with a library that is called in another way.
        """
        here = Stored.of(function)
        if (self.schema, self.prototype) != (here.schema, here.prototype):
            raise PluginError(
                f"the engine was built with {self.prototype}, schema {self.schema}; the library here has"
                f" {here.prototype}, schema {here.schema}: build the engine again, or use the library of that time"
            )


def prototype(function: Function) -> str:
    """A C function with the names and types of its arguments."""
    return f"{function.name}({', '.join(f'{kind} {name}' for name, kind in function.arguments)})"


def read_fields(trt: Any, collection: Iterable[Any] | None, *, stored: bool) -> tuple[Problem, Stored | None]:
    """Read what ``create_plugin`` receives; every value is copied.

    Args:
        trt: the TensorRT module that the fields are of.
        collection: its ``PluginField`` objects.
        stored: whether they come from an engine, so that :data:`STORED` must be among them, or from a user.

    Raises:
        PluginError: a field is missing, unknown, repeated, of the wrong type or length, or its value is not served.
    """
    allowed = {**ATTRIBUTES, **STORED} if stored else ATTRIBUTES
    values: dict[str, Any] = {}
    for field in collection or ():
        if field.name not in allowed:
            raise PluginError(f"unknown field {field.name!r}; allowed are {_listed(allowed)}")
        if field.name in values:
            raise PluginError(f"field {field.name} is given more than once")
        values[field.name] = _value(trt, field, allowed[field.name])
    missing = [name for name in allowed if name not in values and name not in OPTIONAL]
    if missing:
        foreign = "; the engine was not built by pyfmha" if stored and set(missing) <= set(STORED) else ""
        raise PluginError(f"missing field {', '.join(missing)}{foreign}; needed are {_listed(allowed)}")
    return _problem(values), _stored(values) if stored else None


def _listed(fields: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind}{', optional' if name in OPTIONAL else ''})" for name, kind in fields.items())


def _value(trt: Any, field: Any, kind: str) -> Any:
    if field.type != getattr(trt.PluginFieldType, kind):
        raise PluginError(f"field {field.name} is of type {field.type}; it must be {kind}")
    if kind == "CHAR":
        return read_data(trt, field, kind).tobytes().rstrip(b"\0").decode(errors="replace")
    if field.size != 1:
        raise PluginError(f"field {field.name} has {field.size} values; it must have one {kind}")
    return read_data(trt, field, kind)[0].item()


def _problem(values: dict[str, Any]) -> Problem:
    if values["type_id"] not in DATA_TYPES:
        known = ", ".join(f"{number} ({TYPE_NAMES[dtype]})" for number, dtype in sorted(DATA_TYPES.items()))
        raise PluginError(f"type_id is {values['type_id']}; allowed is int(trt.DataType): {known}")
    causal = values.get("causal", 1)
    if causal not in (0, 1, 2):
        raise PluginError(
            f"causal is {causal}; allowed are 1 (a query sees no later key), 2 (so, aligned to the last query and key)"
            " and 0 (it sees all)"
        )
    newer = any(name in values for name in NEWER) or causal == 2 or values["head_size"] not in HEAD_SIZES
    return Problem(
        values["num_heads"],
        values["head_size"],
        DATA_TYPES[values["type_id"]],
        values["softmax_scale"],
        causal != 0,
        _features(values, causal) if newer else None,
    )


def _features(values: dict[str, Any], causal: int) -> Features:
    for name in _FLAGS:
        if values.get(name, 0) not in (0, 1):
            raise PluginError(f"{name} is {values[name]}; allowed are 0 and 1")
    ragged = bool(values.get("cu_seqlens", 0))
    if causal == 2 and values.get("bottom_right", 1) == 0:
        raise PluginError("causal is 2, which is aligned bottom right, and bottom_right is 0; leave one of them out")
    return Features(
        num_kv_heads=values.get("num_kv_heads", values["num_heads"]),
        layout=values.get("layout", "bshd" if ragged else "bhsd"),
        bottom_right=causal == 2 or bool(values.get("bottom_right", 0)),
        window=(values.get("window_left", -1), values.get("window_right", -1)),
        softcap=values.get("softcap", 0.0),
        return_lse=bool(values.get("return_lse", 0)),
        q_lengths=bool(values.get("q_lengths", 0)),
        kv_lengths=bool(values.get("kv_lengths", 0)),
        cu_seqlens=ragged,
    )


def _stored(values: dict[str, Any]) -> Stored:
    algorithms = tuple(name for name in values["pyfmha_algorithms"].split(";") if name)
    return Stored(values["pyfmha_schema"], values["pyfmha_prototype"], algorithms, values.get("pyfmha_decode", 0))


class FieldCollection:
    """Fields in TensorRT's form, together with the memory that they point to.

    The binding copies only a pointer out of a collection, and a field holds only a pointer to its data: whoever hands
    ``collection`` to TensorRT keeps this object for as long as TensorRT may read it.
    """

    def __init__(self, trt: Any, values: dict[str, int | float | str]) -> None:
        kinds = {**ATTRIBUTES, **STORED}
        self._arrays = {name: _array(kinds[name], value) for name, value in values.items()}
        self._fields = [
            trt.PluginField(name, array, getattr(trt.PluginFieldType, kinds[name]))
            for name, array in self._arrays.items()
        ]
        self._vector = trt.PluginFieldCollection(self._fields)
        # The binding converts a PluginFieldCollection, which is a vector, to this type, but only in calls that come
        # from inside one of its own functions. On a thread of TensorRT's own there is none, so it is converted here.
        convert = getattr(trt, "PluginFieldCollection_", None)
        self.collection = self._vector if convert is None else convert(self._vector)


def _array(kind: str, value: int | float | str) -> Any:
    if isinstance(value, str):  # with a NUL at the end, as TensorRT's own parser writes strings
        return np.frombuffer(value.encode() + b"\0", np.int8)
    return np.array([value], _NUMPY[kind])


def creation_fields(trt: Any, problem: Problem) -> FieldCollection:
    """The fields with which a user creates the plugin."""
    return FieldCollection(trt, problem.attributes())


def stored_fields(trt: Any, problem: Problem, stored: Stored) -> FieldCollection:
    """The fields that an engine stores."""
    extra: dict[str, int | float | str] = {
        "pyfmha_schema": stored.schema,
        "pyfmha_prototype": stored.prototype,
        "pyfmha_algorithms": ";".join(stored.algorithms),
    }
    if stored.decode:
        extra["pyfmha_decode"] = stored.decode
    return FieldCollection(trt, {**problem.attributes(), **extra})
