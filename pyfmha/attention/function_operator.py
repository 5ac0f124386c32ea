"""Attention with a function that a user wrote, as an operator: ``TritonFlashAttention_alibi``, one for each function.

It is attention's operator (:mod:`pyfmha.attention.operator`) with one launch, of ``fmha_with_alibi_*``, and with the
function's inputs behind the others: tensors, and attributes for the numbers that no shape tells. Everything of the
function's bears its name: ``alibi_slopes``. Two attributes hold what the function was when the library was made; an
engine keeps them, so that a library of another version of the function refuses it.
"""

import ast
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from pyfmha.attention import biased_operator, key_blocks
from pyfmha.attention.decode_operator import DECODING
from pyfmha.attention.key_blocks import KeyBlocks
from pyfmha.attention.operator import NAME, OPERATOR, sources
from pyfmha.errors import SpecError
from pyfmha.operators.description import DATA_TYPES, ELEMENTS, Attribute, Check, Launch, Operator, Tensor
from pyfmha.operators.program import program_of
from pyfmha.spec.abi import ctype

KINDS = {"score": "score_function", "mask": "mask_function"}
"""The attributes that hold what a function was: its name and a digest."""

_TYPES = {ELEMENTS[kind]: kind for kind in DATA_TYPES}
_KNOWN = {"batch": "batch", "heads": "num_heads", "queries": "rows", "keys": "columns"}
"""What attention knows of itself, with the operator's names."""
_OF_SEQUENCE = ("queries", "keys")
_MOST_AXES = 4
"""Of a tensor without a shape: its axes change nothing, but each form has names for them."""
_HALF = Check("fp8 == 0", "Q, K and V are FP8, which go with no function; give them in HALF, BF16 or FLOAT")


@dataclass(frozen=True)
class FunctionInput:
    """One input of a user's function.

    Attributes:
        name: the function's name for it.
        kind: ``"*fp32"``, ``"i32"``.
        axes: of a pointer with a shape; None: there is none.
    """

    name: str
    kind: str
    axes: tuple[str, ...] | None = None

    @property
    def is_tensor(self) -> bool:
        """Whether it is an input of the plugin; else a number."""
        return self.kind.startswith("*")


@dataclass(frozen=True)
class UserFunction:
    """What attention's operator must know of a user's function, or of a pair of one for scores and one for a mask.

    Attributes:
        name: of the library's functions and of the operator.
        file: what ``pyfmha build --functions`` is told: a path, or the name of one that comes along.
        inputs: in the order of the kernel's arguments.
        requires: conditions of sizes and numbers.
        score, mask: name and digest of each part that it has, see :mod:`pyfmha.functions.digest`; empty for none.
        blocks: of lists of the blocks to visit; None: there are none.
    """

    name: str
    file: str
    inputs: tuple[FunctionInput, ...]
    requires: tuple[str, ...]
    score: str
    mask: str
    blocks: KeyBlocks | None = None

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> "UserFunction":
        """From what :meth:`pyfmha.functions.declare.AttentionFunction.__pyfmha__` says."""
        shapes = described["shapes"]
        inputs = tuple(
            FunctionInput(name, kind, tuple(shapes[name]) if name in shapes else None)
            for name, kind in described["inputs"]
        )
        requires = tuple(described["requires"])
        score, mask, blocks = (described[name] for name in ("score", "mask", "blocks"))
        listed = KeyBlocks(**blocks) if blocks else None
        return cls(described["name"], described["file"], inputs, requires, score or "", mask or "", listed)

    @property
    def file_name(self) -> str:
        """The file without its folder, which is no business of a library's."""
        return PurePath(self.file).name

    @property
    def identities(self) -> dict[str, str]:
        """What each part was, by the attribute that holds it."""
        return {KINDS[kind]: text for kind, text in (("score", self.score), ("mask", self.mask)) if text}

    def told(self) -> dict[str, str]:
        """The numbers that shapes tell, and those that are attention's own, with the operator's expression for each."""
        known = {*self._axes(), *_KNOWN}
        return {one.name: self._value(one.name) for one in self.inputs if not one.is_tensor and one.name in known}

    def _axes(self) -> set[str]:
        """The axes of all its shapes."""
        return {axis for one in self.inputs for axis in one.axes or ()}

    def given(self) -> tuple[FunctionInput, ...]:
        """The inputs that a user gives: all but the numbers that shapes tell."""
        told = self.told()
        return tuple(one for one in self.inputs if one.name not in told)

    def own(self, name: str) -> str:
        """How the operator calls what is the function's."""
        return f"{self.name}_{name}"

    def _value(self, name: str) -> str:
        # Of a ragged batch, what stands in a shape is the longest sequence's, and rows and columns are of all.
        shaped = name in _OF_SEQUENCE and any(name in _names(axis) for axis in self._axes())
        return self.own(name) if shaped or name not in _KNOWN else _KNOWN[name]

    def _axis(self, text: str) -> str:
        """An axis as forms have it; those of queries and keys are names of their own, which a check compares."""
        return _renamed(
            text, lambda name: self.own(name) if name in _OF_SEQUENCE else _KNOWN.get(name) or self.own(name)
        )

    def unserved(self) -> str:
        """Which input TensorRT cannot give; empty where there is none."""
        for one in self.inputs:
            if one.is_tensor and _element(one) not in _TYPES:
                served = ", ".join(f"*{kind}" for kind in _TYPES)
                return f"input {one.name} is {one.kind}, a type that TensorRT has not; it has {served}"
            if not one.is_tensor and ctype(one.kind).kind == "float" and ctype(one.kind).size > 4:
                return f"input {one.name} is {one.kind}; attributes are integers and float32"
        return ""

    def operator_inputs(self) -> tuple[Tensor, ...]:
        """Its tensors."""
        found = []
        for one in self.inputs:
            if not one.is_tensor:
                continue
            kind, name = _TYPES[_element(one)], self.own(one.name)
            if one.axes is None:
                axes = [f"{name}_{index}" for index in range(_MOST_AXES)]
                forms = [f"{kind}[{', '.join(axes[:count])}]" for count in range(1, _MOST_AXES + 1)]
            else:
                forms = [f"{kind}[{', '.join(map(self._axis, one.axes))}]"]
            found.append(Tensor(name, forms))
        return tuple(found)

    def attributes(self) -> dict[str, Attribute]:
        """What it was, and its numbers that no shape tells."""
        numbers = [one for one in self.given() if not one.is_tensor]
        kept = {name: Attribute("string", text) for name, text in self.identities.items()}
        return {**kept, **{self.own(one.name): _attribute(one) for one in numbers}}

    def same(self) -> tuple[Check, ...]:
        """That the library's function is the one that is asked for."""
        return tuple(_same(name, text, self.file_name) for name, text in self.identities.items())

    def checks(self) -> tuple[Check, ...]:
        """What the function requires of its tensors and numbers."""
        found = []
        for name in _OF_SEQUENCE:
            if any(name in _names(axis) for axis in self._axes()):
                own, size = self.own(name), _KNOWN[name]
                wanted = f"the axis {name} of inputs of {self.name} is {{{own}}}; there are {{{size}}} {name}"
                # Of a ragged batch it is the longest sequence's, which the device alone knows.
                found.append(Check(f"cu_seqlens or {own} == {size}", wanted))
        for text in self.requires:
            names = dict.fromkeys(_names(text))
            condition = _renamed(text, self._value)
            free = "cu_seqlens or " if {"queries", "keys"} & set(names) else ""
            here = ", ".join(f"{name} is {{{self._value(name)}}}" for name in names)
            found.append(Check(f"{free}({condition})", f"{self.name} requires {_plain(text)}; here {here}"))
        return tuple(found)

    def sources(self) -> dict[str, str]:
        """Where the function's arguments come from."""
        told = self.told()
        return {one.name: told.get(one.name) or self.own(one.name) for one in self.inputs}

    def labels(self) -> dict[str, str]:
        """How messages call its axes."""
        found = {self._axis(axis): axis for axis in sorted(self._axes())}
        unshaped = [self.own(one.name) for one in self.inputs if one.is_tensor and one.axes is None]
        return found | {f"{name}_{index}": "any" for name in unshaped for index in range(_MOST_AXES)}


def own_arguments(operator: Operator) -> tuple[tuple[str, str], ...]:
    """The function's arguments, and where they come from."""
    lists = dict(key_blocks.ARGUMENTS)
    own = operator.launches[-1].arguments[len(biased_operator.ARGUMENTS) :]
    return tuple((name, source) for name, source in own if name not in lists)


def function_operator(function: UserFunction) -> Operator:
    """The operator of a user's function.

    Raises:
        SpecError: an input is of a type that TensorRT has not, or what the function says of its inputs is wrong.
    """
    if why := function.unserved():
        raise SpecError(f"{function.name} can be no plugin of TensorRT's: {why}")
    operator = _derived(function)
    program_of(operator)
    return operator


def _derived(function: UserFunction) -> Operator:
    kept = [(name, text) for name, text in OPERATOR.define if name not in DECODING]
    arguments = {**sources(biased_operator.ARGUMENTS), **function.sources()}
    launches = [Launch(arguments, "", f"fmha_with_{function.name}_d{{padded}}_{{T}}")]
    define = [(name, "0 == 0" if name == "features" else text) for name, text in kept]
    if function.blocks is not None:
        define += function.blocks.definitions().items()
        arguments |= {name: name for name, _ in key_blocks.ARGUMENTS}
        # The first of an operator's launches is the one of whose algorithms TensorRT chooses; all have one.
        launches = [
            Launch(arguments, "", f"fmha_{what}_{function.name}_d{{padded}}_{{T}}")
            for what in (*key_blocks.LISTING, "with")
        ]
    return replace(
        OPERATOR,
        name=f"{NAME}_{function.name}",
        inputs=(*_of_features(OPERATOR.inputs), *function.operator_inputs()),
        outputs=_of_features(OPERATOR.outputs),
        attributes=(*OPERATOR.attributes, *function.attributes().items()),
        define=define,
        checks=(*function.same(), _HALF, *OPERATOR.checks, *function.checks()),
        launches=launches,
        workspace=() if function.blocks is None else (key_blocks.workspace(),),
        workspace_of_profile="",
        options=(),
        summary=[*(one for one in OPERATOR.summary if one[0] != "features and split"), ("", f", with {function.name}")],
        shape_summary=[one for one in OPERATOR.shape_summary if "split" not in one[0]],
        labels=(*OPERATOR.labels, *function.labels().items()),
        build=f"--functions {_plain(shlex.quote(function.file_name))} --dtype {{T}} --head-size {{padded}}",
    )


def _of_features(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Those of ``fmha_fwd_*`` and its kin, not of the first kernel."""
    return tuple(tensor for tensor in tensors if tensor.when != "not features")


def _same(name: str, text: str, file: str) -> Check:
    said = name.replace("_", " ")
    return Check(
        f"{name} == {text!r}",
        f"this engine or model has the {said} {{{name}}}; the library holds {text}, made of another version of its"
        " source. Build the engine again, or the library from that source:"
        f" pyfmha build --functions {_plain(shlex.quote(file))} "
        "--dtype {T} --head-size {padded}",
    )


def _element(one: FunctionInput) -> str:
    return one.kind.removeprefix("*k").removeprefix("*")


def _attribute(one: FunctionInput) -> Attribute:
    """A number as an attribute."""
    kind = ctype(one.kind)
    if kind.kind == "float":
        return Attribute("fp32")
    assert kind.bounds is not None
    low, high = kind.bounds
    if low >= -(1 << 31) and high < 1 << 31:
        whole = high - low == (1 << 32) - 1
        return Attribute("int32") if whole else Attribute("int32", minimum=low, maximum=high)
    whole = low < 0 and high > 1 << 62
    return Attribute("int64") if whole else Attribute("int64", minimum=low, maximum=min(high, (1 << 63) - 1))


def _read(tree: ast.AST) -> list[ast.Name]:
    """The names of values that an expression reads, in its order, without those of functions."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in called]
    return sorted(found, key=lambda node: node.col_offset)


def _names(text: str) -> list[str]:
    return [node.id for node in _read(ast.parse(text, mode="eval"))]


def _renamed(text: str, renamed: Callable[[str], str]) -> str:
    """An expression with other names."""
    tree = ast.parse(text, mode="eval")
    for node in _read(tree):
        node.id = renamed(node.id)
    return ast.unparse(tree)


def _plain(text: str) -> str:
    """A text as part of a message, whose braces are no holes."""
    return re.sub(r"[{}]", lambda brace: brace[0] * 2, text)
