"""Signatures in Triton's notation, ``"*fp16:16, fp32, i32, 128"``, read against a kernel's own parameters."""

import keyword
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Union

from pyfmha.errors import SpecError
from pyfmha.spec.constants import Constant, FunctionName, parse_dtype
from pyfmha.spec.kernel import HINTS_ALLOWED, Argument, Shape

OPEN = "_"
"""The entry of a parameter whose value comes from elsewhere: a configuration, a heuristic, a default."""


@dataclass(frozen=True)
class Fixed:
    """A parameter, or an element of a tuple, that is a constant."""

    value: Constant


Given = Union[Argument, Fixed, "Elements"]


@dataclass(frozen=True)
class Elements:
    """A parameter that is a tuple with elements known at run time only."""

    name: str
    elements: tuple[Given, ...]


@dataclass(frozen=True)
class Signature:
    """What a signature says of a kernel's parameters.

    Attributes:
        parameters: the kernel's, in order.
        given: what it says of some, by name.
        entries: how many entries it has.
    """

    parameters: tuple[str, ...]
    given: dict[str, Given]
    entries: int

    @property
    def open(self) -> tuple[str, ...]:
        """The parameters that it says nothing of."""
        return tuple(name for name in self.parameters if name not in self.given)

    def filled(self, values: Mapping[str, Constant]) -> "Parsed":
        """The arguments and constants, with values for the open parameters.

        Raises:
            SpecError: some have none.
        """
        missing = [name for name in self.open if name not in values]
        if missing:
            needed = sum(name not in values for name in self.parameters)
            wanted = str(needed) if needed == len(self.parameters) else f"{needed} to {len(self.parameters)}"
            raise SpecError(
                f"signature has {self.entries} entries, the kernel takes {wanted}: {', '.join(self.parameters)}"
                f" (nothing is said of {', '.join(missing)})"
            )
        arguments: list[Argument] = []
        constants: list[tuple[str, Constant]] = []
        tuples: list[tuple[str, Shape]] = []
        for name in self.parameters:
            entry = self.given.get(name) or Fixed(values[name])
            for leaf, one in _leaves(name, entry):
                if isinstance(one, Argument):
                    arguments.append(one)
                else:
                    constants.append((leaf, one.value))
            if isinstance(entry, Elements):
                tuples.append((name, _shape(entry)))
        return Parsed(tuple(arguments), tuple(constants), tuple(tuples))


@dataclass(frozen=True)
class Parsed:
    """A kernel's parameters as a spec has them: the fields of :class:`pyfmha.spec.kernel.KernelSpec` of these names."""

    arguments: tuple[Argument, ...]
    constants: tuple[tuple[str, Constant], ...]
    tuples: tuple[tuple[str, Shape], ...]


def split_signature(text: str) -> list[str]:
    """Split at the commas outside brackets and quotes; an empty entry stays, to be refused with its position."""
    entries, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "[<(") - (character in "]>)")
            if character == "," and depth <= 0:
                entries.append("")
                continue
        entries[-1] += character
    return [entry.strip() for entry in entries]


def parse_signature(
    text: str, parameters: Sequence[str], constexprs: Collection[str], functions: Collection[str] = ()
) -> Signature:
    """Read ``"*fp16:16, fp32, i32, 128, ACTIVATION=gelu"`` against a kernel's parameters.

    Args:
        text: one entry a parameter, in order, then some by name as ``NAME=entry``. An entry is a type with an optional
            hint; a constant's value (int, float, True, False, None, a quoted string); a dtype (``fp16`` or
            ``tl.float16``; with ``tl.`` where the parameter is no ``tl.constexpr``); the name of another function; a
            tuple of entries in parentheses; or ``_``, which says nothing of the parameter, like one left out.
        parameters: names of the kernel's parameters, in order.
        constexprs: the parameters annotated ``tl.constexpr``.
        functions: names of the ``@triton.jit`` functions that can be constants.

    Raises:
        SpecError: too many entries, unknown type, bad hint, or a type where a constant is needed.
    """
    given: dict[str, Given] = {}
    entries = split_signature(text)
    seen: list[str] = []
    for index, entry in enumerate(entries):
        by_name = re.match(r"(\w+)\s*=", entry)
        if not by_name and len(seen) < index:
            raise SpecError(f"signature has {entry!r} after entries by name; those come last")
        if not by_name and index >= len(parameters):
            raise SpecError(
                f"signature has {len(entries)} entries, the kernel takes {len(parameters)}: {', '.join(parameters)}"
            )
        name = by_name.group(1) if by_name else parameters[index]
        if name not in parameters:
            raise SpecError(f"signature names {name!r}, the kernel takes {', '.join(parameters)}")
        if name in given:
            raise SpecError(f"signature gives {name} twice")
        if not by_name:
            seen.append(name)
        entry = entry[by_name.end() :].strip() if by_name else entry
        if entry != OPEN:
            given[name] = _parse(name, entry, name in constexprs, functions)
    return Signature(tuple(parameters), given, len(entries))


def _parse(name: str, entry: str, constexpr: bool, functions: Collection[str]) -> Given:
    if entry.startswith("(") and entry.endswith(")"):
        inner = split_signature(entry[1:-1])
        if inner[-1] == "":
            inner.pop()
        elements = tuple(_parse(f"{name}_{i}", one, constexpr, functions) for i, one in enumerate(inner))
        values = [element.value for element in elements if isinstance(element, Fixed)]
        return Fixed(tuple(values)) if constexpr or not elements else Elements(name, elements)
    is_constant, value = _constant(entry)
    dtype = parse_dtype(entry) if constexpr or entry.startswith("tl.") else None
    if is_constant or dtype:
        return Fixed(value if is_constant else dtype)
    if entry in functions or (constexpr and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", entry)):
        return Fixed(FunctionName(entry))
    if constexpr:
        known = f"; functions here: {', '.join(sorted(functions))}" if entry.isidentifier() and functions else ""
        raise SpecError(
            f"argument {name} is a tl.constexpr: give its value, not {entry!r} (text goes in quotes{known})"
        )
    return _argument(name, entry)


def _leaves(name: str, entry: Given) -> Iterator[tuple[str, Argument | Fixed]]:
    if not isinstance(entry, Elements):
        yield name, entry
        return
    for index, element in enumerate(entry.elements):
        yield from _leaves(f"{name}_{index}", element)


def _shape(entry: Elements) -> Shape:
    return tuple(
        _shape(element) if isinstance(element, Elements) else f"{entry.name}_{index}"
        for index, element in enumerate(entry.elements)
    )


def _constant(entry: str) -> tuple[bool, Constant]:
    words: dict[str, Constant] = {"True": True, "False": False, "None": None}
    if entry in words:
        return True, words[entry]
    if re.fullmatch(r"""'[^']*'|"[^"]*\"""", entry):
        return True, entry[1:-1]
    for convert in (int, float):
        try:
            return True, convert(entry)
        except ValueError:
            continue
    return False, None


def _argument(name: str, entry: str) -> Argument:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise SpecError(f"{name!r} is not an argument name")
    type_name, colon, hint = entry.partition(":")
    if colon and not re.fullmatch(r"\d+", hint.strip()):
        raise SpecError(f"argument {name}: hint {entry!r} is unknown; {HINTS_ALLOWED}")
    try:
        return Argument(name, type_name, int(hint) if colon else None)
    except SpecError as error:
        raise error if str(error).startswith("argument ") else SpecError(f"argument {name}: {error}") from None
