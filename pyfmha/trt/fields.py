"""The plugin's fields: what it is created with, and what an engine stores of it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyfmha.attention import Attention
from pyfmha.errors import PluginError, SpecError
from pyfmha.manifest import SCHEMA, Function

ATTRIBUTES = {
    "num_heads": "INT32",
    "head_size": "INT32",
    "type_id": "INT32",
    "softmax_scale": "FLOAT32",
    "causal": "INT32",
}
"""Creation attributes and their types, as ``creator.field_names`` lists them: all that TensorRT's ONNX parser reads."""

STORED = {"pyfmha_schema": "INT32", "pyfmha_prototype": "CHAR", "pyfmha_algorithms": "CHAR"}
"""What an engine stores besides, to know a library that it cannot use."""

OPTIONAL = {"causal": 1}
DATA_TYPES = {0: "fp32", 1: "fp16", 7: "bf16"}
"""``int(trt.DataType)`` of FLOAT, HALF and BF16 (NvInferRuntimeBase.h, enum DataType)."""

TYPE_NAMES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
ITEM_SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
_TYPE_IDS = {dtype: number for number, dtype in DATA_TYPES.items()}
_NUMPY = {"INT32": np.int32, "FLOAT32": np.float32}


@dataclass(frozen=True)
class Problem:
    """The attention that one plugin serves.

    Attributes:
        num_heads: heads of Q, K and V.
        head_size: elements of one head.
        dtype: ``"fp16"``, ``"bf16"`` or ``"fp32"``.
        softmax_scale: factor of Q K^T.
        causal: whether a query sees only keys at its own position and before.

    Raises:
        PluginError: on creation, for values that no kernel serves.
    """

    num_heads: int
    head_size: int
    dtype: str
    softmax_scale: float
    causal: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.num_heads < 1 << 31:
            raise PluginError(f"num_heads is {self.num_heads}; give 1 or more")
        # The kernel would serve 0 as well, but there it is nearly always a float64 read as float32.
        if not math.isfinite(self.softmax_scale) or self.softmax_scale == 0:
            raise PluginError(
                f"softmax_scale is {self.softmax_scale}; give a finite float32 other than 0, usually 1/sqrt(head_size)"
                " (float64 data in a FLOAT32 field is misread)"
            )
        try:
            Attention(self.dtype, self.head_size, self.causal)
        except SpecError as error:
            raise PluginError(str(error)) from None

    @property
    def member(self) -> Attention:
        """The member of the family that serves it."""
        return Attention(self.dtype, self.head_size, self.causal)

    @property
    def type_id(self) -> int:
        """``int(trt.DataType)`` of its tensors."""
        return _TYPE_IDS[self.dtype]

    def attributes(self) -> dict[str, int | float]:
        """The creation attributes by name."""
        return {
            "num_heads": self.num_heads,
            "head_size": self.head_size,
            "type_id": self.type_id,
            "softmax_scale": self.softmax_scale,
            "causal": int(self.causal),
        }

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        return f"{self.dtype}, {self.num_heads} heads of size {self.head_size}, {kind}, scale {self.softmax_scale:g}"


@dataclass(frozen=True)
class Stored:
    """What an engine stores of the library that it was built with.

    Attributes:
        schema: the manifest's schema version.
        prototype: the C function with its arguments.
        algorithms: the names of its algorithms, see :class:`pyfmha.trt.tactics.Tactic`.
    """

    schema: int
    prototype: str
    algorithms: tuple[str, ...]

    @classmethod
    def of(cls, function: Function) -> "Stored":
        """The entry for a function of the library in use."""
        algorithms = tuple("+".join(variant.name for variant in algorithm) for algorithm in function.algorithms)
        return cls(SCHEMA, prototype(function), algorithms)

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
    return _problem({**OPTIONAL, **values}), _stored(values) if stored else None


def _listed(fields: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind}{', optional' if name in OPTIONAL else ''})" for name, kind in fields.items())


def _value(trt: Any, field: Any, kind: str) -> Any:
    if field.type != getattr(trt.PluginFieldType, kind):
        raise PluginError(f"field {field.name} is of type {field.type}; it must be {kind}")
    if kind == "CHAR":
        return np.asarray(field.data).tobytes().rstrip(b"\0").decode(errors="replace")
    if field.size != 1:
        raise PluginError(f"field {field.name} has {field.size} values; it must have one {kind}")
    return np.asarray(field.data).reshape(-1)[0].item()


def _problem(values: dict[str, Any]) -> Problem:
    if values["type_id"] not in DATA_TYPES:
        known = ", ".join(f"{number} ({TYPE_NAMES[dtype]})" for number, dtype in sorted(DATA_TYPES.items()))
        raise PluginError(f"type_id is {values['type_id']}; allowed is int(trt.DataType): {known}")
    if values["causal"] not in (0, 1):
        raise PluginError(
            f"causal is {values['causal']}; allowed are 1 (a query sees no later key) and 0 (it sees all)"
        )
    return Problem(
        values["num_heads"],
        values["head_size"],
        DATA_TYPES[values["type_id"]],
        values["softmax_scale"],
        bool(values["causal"]),
    )


def _stored(values: dict[str, Any]) -> Stored:
    algorithms = tuple(name for name in values["pyfmha_algorithms"].split(";") if name)
    return Stored(values["pyfmha_schema"], values["pyfmha_prototype"], algorithms)


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
    return FieldCollection(trt, dict(problem.attributes()))


def stored_fields(trt: Any, problem: Problem, stored: Stored) -> FieldCollection:
    """The fields that an engine stores."""
    extra: dict[str, int | float | str] = {
        "pyfmha_schema": stored.schema,
        "pyfmha_prototype": stored.prototype,
        "pyfmha_algorithms": ";".join(stored.algorithms),
    }
    return FieldCollection(trt, {**problem.attributes(), **extra})
