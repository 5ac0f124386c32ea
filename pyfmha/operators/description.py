"""What a plugin is, as data: :class:`Operator`.

From one description follow the plugin in Python, the plugin in C inside the library, the fields of its creator and the
attributes of its ONNX node. Nothing here knows of TensorRT, CUDA or a particular operator. What the parts mean together
is in :mod:`pyfmha.operators.program`, which checks them; :mod:`pyfmha.operators.instance` carries them out.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from pyfmha.errors import SpecError
from pyfmha.operators.kinds import TEXTS, check_operator
from pyfmha.operators.normal import Normal, listed, pairs
from pyfmha.spec.words import dtype_name

DATA_TYPES = {"fp32": 0, "fp16": 1, "int8": 2, "int32": 3, "bool": 4, "uint8": 5, "fp8": 6, "bf16": 7, "int64": 8}
"""``int(trt.DataType)`` by name (NvInferRuntimeBase.h, enum DataType)."""

TYPE_NAMES = {name: name.upper() for name in DATA_TYPES} | {"fp32": "FLOAT", "fp16": "HALF"}
"""How TensorRT calls them."""

ITEM_SIZES = {"fp32": 4, "fp16": 2, "int8": 1, "int32": 4, "bool": 1, "uint8": 1, "fp8": 1, "bf16": 2, "int64": 8}
"""Bytes of an element."""

ELEMENTS = {
    "fp32": "fp32",
    "fp16": "fp16",
    "int8": "i8",
    "int32": "i32",
    "bool": "i1",
    "uint8": "u8",
    "fp8": "fp8e4nv",
    "bf16": "bf16",
    "int64": "i64",
}
"""What a kernel's pointer to them points to, as :mod:`pyfmha.spec.abi` names types."""

ATTRIBUTE_TYPES = ("int32", "int64", "fp32", "string", "int32[]", "int64[]", "fp32[]")
MOST_ELEMENTS = 64
"""Elements of a list attribute."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")

Pairs = tuple[tuple[str, Any], ...]
Named = Mapping[str, Any] | Sequence[tuple[str, Any]]
"""A mapping, or pairs of name and value."""
Texts = tuple[tuple[str, str], ...]


def _strings(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _sources(given: Named) -> Texts:
    return tuple((name, str(source)) for name, source in pairs(given))


def _dtype_names(given: str | Sequence[str]) -> tuple[str, ...]:
    return tuple(map(dtype_name, _strings(given)))


def _kernel_name(given: Any) -> str:
    while hasattr(given, "fn"):  # of a decorator, such as an autotuner
        given = given.fn
    return given if isinstance(given, str) else str(given.__name__)


def _constants(given: Named) -> tuple[tuple[str, Any], ...]:
    return tuple((name, _as_tuple(value)) for name, value in pairs(given))


def _as_tuple(value: Any) -> Any:
    """Lists as tuples, which JSON does not tell apart."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


@dataclass(frozen=True)
class Attribute:
    """One creation attribute, a field of the creator and an attribute of the ONNX node.

    Attributes:
        type: one of :data:`ATTRIBUTE_TYPES`.
        default: its value where it is not given; an expression of other attributes as text, but for a string's, which
            is the string itself unless it begins with ``"="``. None: it must be given.
        minimum, maximum: allowed values of a number, or of each element; of an ``fp32``, as float32 holds them.
        choices: the only ones allowed; likewise.
        stored: under which condition on attributes an engine stores it; empty: always, or, where the description asks
            whether it is ``given``, if it is.
        stores: what is stored in its place, an expression of attributes; empty: itself.
    """

    type: Normal[str, str] = Normal(dtype_name)
    default: Normal[Any, Any] = Normal(_as_tuple, None)
    minimum: int | float | None = None
    maximum: int | float | None = None
    choices: Normal[Sequence[int | float | str], tuple[int | float | str, ...]] = Normal(listed, ())
    stored: str = ""
    stores: str = ""

    def __post_init__(self) -> None:
        if self.type not in ATTRIBUTE_TYPES:
            raise SpecError(f"attribute type {self.type!r} is unknown; there are {', '.join(ATTRIBUTE_TYPES)}")


@dataclass(frozen=True)
class Tensor:
    """One input or output.

    Attributes:
        name: of the tensor; several of one name are alternatives, told apart by ``when``.
        forms: ``"T[batch, rows, 64]"``: a type of :data:`DATA_TYPES` or a name of the operator's ``types``, and the
            axes: names, numbers and expressions of them. More than one: told apart by the number of dimensions, or by
            ``" if "`` and a condition on attributes behind them. ``"shape[2]"`` is an input whose two values are read
            while a network is built, as sizes of outputs: ``X[0]``, ``X[1]``.
        when: under which condition on attributes it is there; empty: always. A type or an axis that it alone has is
            not told where it is not: no other tensor may need it there. For kernels, such a type is the first of its
            names, such an axis 0.
    """

    name: str
    forms: Normal[str | Sequence[str], tuple[str, ...]] = Normal(_strings)
    when: str = ""


@dataclass(frozen=True)
class Types:
    """What a name such as ``T`` may stand for.

    Attributes:
        names: of :data:`DATA_TYPES`.
        attribute: the attribute that holds it as ``int(trt.DataType)``; empty: it follows from the inputs.
    """

    names: Normal[str | Sequence[str], tuple[str, ...]] = Normal(_dtype_names)
    attribute: str = ""

    def __post_init__(self) -> None:
        names = self.names if TEXTS.holds(self.names) else (str(self.names),)
        unknown = [name for name in names if name not in DATA_TYPES]
        if unknown or not names:
            raise SpecError(f"types {', '.join(unknown) or 'are none'}; there are {', '.join(DATA_TYPES)}")


@dataclass(frozen=True)
class Check:
    """What must hold, and what is said where it does not.

    Attributes:
        condition: on attributes, or on sizes too.
        message: a text, see :mod:`pyfmha.operators.text`.
    """

    condition: str
    message: str


@dataclass(frozen=True)
class Config:
    """One way to compile a kernel: an algorithm, which TensorRT may time as a tactic.

    Attributes:
        constants: by name, over those of the launch.
        num_warps, num_stages, maxnreg: as :class:`pyfmha.spec.kernel.KernelSpec`.
    """

    constants: Normal[Named, Pairs] = Normal(_constants, ())
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None


@dataclass(frozen=True)
class Launch:
    """One launch; those of an operator follow one another on the stream.

    Attributes:
        arguments: the kernel's run-time arguments by name, in its order, and where each comes from: a tensor or a part
            of the workspace (``"X"``, ``"X + 4 * rows"`` bytes behind it, ``"null"``, ``"A if condition else B"``), or
            an expression. A tensor that is not there is null; to a kernel that compares it with None, it is None.
        when: on attributes and sizes: whether it is launched; empty: always.
        function: the C function, as a text of attributes and types: ``"norm_{width}_{T}"``. Empty: it is
            compiled from what follows, and named after the operator.
        name: what ``serves(name, kernel)`` calls it.
        option: the optional group of functions that it belongs to, see :class:`Option`.
        kernel: a kernel of the operator's own file, by name or itself.
        grid: as :mod:`pyfmha.spec.grid`, of the kernel's arguments and constants, and of the operator's axes, integer
            attributes and definitions, elements of lists and what expressions ask (``sizes[0]``, ``numel(Y)``). What
            it reads of the operator is given as an argument, which the kernel need not take.
        constants: the kernel's constants by name.
        configs: its algorithms; none: those of the kernel's autotuner, else one with Triton's own settings.
        scalars: types of arguments that are no pointers, where they are not ``"i32"`` for integers, ``"fp32"`` for
            floats.
        hints: integers that a first variant may take to be multiples of 16, as Triton's run-time compiler would.
    """

    arguments: Normal[Named, Texts] = Normal(_sources)
    when: str = ""
    function: str = ""
    name: str = ""
    option: str = ""
    kernel: Normal[Any, str] = Normal(_kernel_name, "")
    grid: str = ""
    constants: Normal[Named, Pairs] = Normal(_constants, ())
    configs: Normal[Sequence[Config], tuple[Config, ...]] = Normal(listed, ())
    scalars: Normal[Named, Texts] = Normal(_sources, ())
    hints: Normal[str | Sequence[str], tuple[str, ...]] = Normal(_strings, ())


@dataclass(frozen=True)
class Part:
    """A part of the workspace.

    Attributes:
        bytes: an expression of attributes and sizes.
        when: whether it is needed; empty: always.
        type: of its elements, for kernels: a type of :data:`DATA_TYPES` or a name of the operator's ``types``.
    """

    name: str
    bytes: str
    when: str = ""
    type: Normal[str, str] = Normal(dtype_name, "fp32")


@dataclass(frozen=True)
class Option:
    """A group of functions that a library may lack, those of the launches that name it: ``has(name)`` asks for it.

    An engine stores ``number`` if its library had them when it was built, under the name ``pyfmha_`` and the option's:
    only then was TensorRT asked for their workspace.

    Attributes:
        number: changes whenever what the functions need of the workspace does.
        when: the attributes for which they are of use; empty: all.
    """

    name: str
    number: int
    when: str = ""


def attribute(name: str, given: Any) -> Attribute:
    """An attribute, from itself or from its type as text."""
    if isinstance(given, Attribute):
        return given
    kind, equals, default = (part.strip() for part in str(given).partition("="))
    try:
        if not equals:
            return Attribute(kind)
        return Attribute(kind, default.strip("'\"") if kind == "string" else default)
    except SpecError as error:
        raise SpecError(f"attribute {name}: {error}") from None


def _attributes(given: Named) -> tuple[tuple[str, Attribute], ...]:
    return tuple((name, attribute(name, kind)) for name, kind in pairs(given))


def _tensor(name: str, form: Any) -> Tensor:
    """``"T[rows]"``, or with a condition under which it is there at all: ``"T[rows] when flag"``."""
    if isinstance(form, Tensor):
        return form
    if not isinstance(form, str):
        return Tensor(name, tuple(form))
    text, _, when = form.partition(" when ")
    return Tensor(name, text.strip(), when.strip())


def _tensors(given: Mapping[str, Any] | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(_tensor(name, form) for name, form in given.items()) if isinstance(given, Mapping) else listed(given)


def _types(given: Named) -> tuple[tuple[str, Types], ...]:
    return tuple((name, _kinds(name, kinds)) for name, kinds in pairs(given))


def _kinds(name: str, given: Any) -> Types:
    try:
        return given if isinstance(given, Types) else Types(given)
    except SpecError as error:
        raise SpecError(f"type {name}: {error}") from None


def _parts(given: Mapping[str, Any] | Sequence[Part]) -> tuple[Part, ...]:
    return tuple(Part(name, str(size)) for name, size in given.items()) if isinstance(given, Mapping) else listed(given)


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        name, version, namespace: under which TensorRT knows it; the name is also the ONNX node's type.
        inputs, outputs: in TensorRT's order. In the place of tensors, a mapping from name to form will do.
        types: what the names of types in forms may stand for; a name that stands twice is one type.
        attributes: by name. In the place of an :class:`Attribute`, its type will do: ``"fp32"``, or with a default,
            ``"fp32 = 1.0"``.
        launches: what it runs.
        define: names for expressions of attributes, sizes and earlier definitions.
        checks: what must hold.
        workspace: its parts, which lie one behind the other.
        workspace_of_profile: bytes that suffice for every shape of a profile, where the largest shape's do not; there,
            ``least(axis)`` is the lower bound of an axis.
        alignment: bytes, of each part of the workspace.
        options: groups of functions that a library may lack.
        summary: what messages say of a plugin, as (condition, text) pairs.
        shape_summary: what they say of a shape.
        labels: how messages call axes, by their text in forms.
        build: what ``pyfmha build`` is told to add missing functions, a text of attributes and types.
        source: the file of the kernels; set where it is loaded.

    Raises:
        SpecError: on creation, for a part that is wrong by itself.
    """

    name: str
    inputs: Normal[Mapping[str, Any] | Sequence[Tensor], tuple[Tensor, ...]] = Normal(_tensors)
    outputs: Normal[Mapping[str, Any] | Sequence[Tensor], tuple[Tensor, ...]] = Normal(_tensors)
    launches: Normal[Sequence[Launch], tuple[Launch, ...]] = Normal(listed)
    version: str = "1"
    namespace: str = ""
    types: Normal[Named, tuple[tuple[str, Types], ...]] = Normal(_types, ())
    attributes: Normal[Named, tuple[tuple[str, Attribute], ...]] = Normal(_attributes, ())
    define: Normal[Named, Texts] = Normal(_sources, ())
    checks: Normal[Sequence[Check], tuple[Check, ...]] = Normal(listed, ())
    workspace: Normal[Mapping[str, Any] | Sequence[Part], tuple[Part, ...]] = Normal(_parts, ())
    workspace_of_profile: str = ""
    alignment: int = 256
    options: Normal[Sequence[Option], tuple[Option, ...]] = Normal(listed, ())
    summary: Normal[Named, Texts] = Normal(_sources, ())
    shape_summary: Normal[Named, Texts] = Normal(_sources, ())
    labels: Normal[Named, Texts] = Normal(_sources, ())
    build: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        check_operator(self)
        if not _NAME.match(self.name):
            raise SpecError(f"operator name {self.name!r} is no name: letters, digits and underscores")
        if not self.launches:
            raise SpecError(f"{self.name} launches nothing")
        for what, tensors in (("input", self.inputs), ("output", self.outputs)):
            if not tensors:
                raise SpecError(f"{self.name} has no {what}")
        for name in ("inputs", "outputs"):
            object.__setattr__(self, name, tuple(self._with_type_names(tensor) for tensor in getattr(self, name)))

    def _with_type_names(self, tensor: Tensor) -> Tensor:
        """A tensor whose forms say ``fp16`` for ``float16``, unless the operator has a type of that name."""
        words = [form.partition("[")[0].strip() for form in tensor.forms]
        named = {word: word if word in dict(self.types) else dtype_name(word) for word in words}
        forms = [form.replace(word, named[word], 1) for word, form in zip(words, tensor.forms, strict=True)]
        return replace(tensor, forms=forms)

    def of(self, source: str) -> "Operator":
        """The same with the file of its kernels."""
        return replace(self, source=source)

    def to_json(self) -> dict[str, Any]:
        """As JSON's own types, for a manifest; without the path of the source."""
        return {name: value for name, value in asdict(replace(self, source="")).items() if value not in ("", (), [])}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Operator":
        """From what :meth:`to_json` made.

        Raises:
            SpecError: it is not that.
        """
        try:
            return _operator_of(json.loads(json.dumps(data)))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise SpecError(f"this describes no operator: {type(error).__name__}: {error}") from None


def _operator_of(data: dict[str, Any]) -> Operator:
    made = dict(data)
    for name in ("inputs", "outputs"):
        made[name] = tuple(Tensor(**tensor) for tensor in data[name])
    made["types"] = tuple((name, Types(**kinds)) for name, kinds in data.get("types", ()))
    made["attributes"] = tuple((name, Attribute(**kinds)) for name, kinds in data.get("attributes", ()))
    launches = []
    for launch in data["launches"]:
        configs = tuple(Config(**config) for config in launch.get("configs", ()))
        launches.append(Launch(**{**launch, "configs": configs}))
    made["launches"] = tuple(launches)
    made["checks"] = tuple(Check(**check) for check in data.get("checks", ()))
    made["workspace"] = tuple(Part(**part) for part in data.get("workspace", ()))
    options = data.get("options", ())
    made["options"] = tuple(Option(**option) for option in options)
    unknown = set(made) - {field.name for field in fields(Operator)}
    if unknown:
        raise SpecError(f"an operator has no {', '.join(sorted(unknown))}; it was described by a later pyfmha")
    return Operator(**made)
