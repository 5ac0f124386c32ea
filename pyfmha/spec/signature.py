"""Signatures in Triton's notation, ``"*fp16:16, fp32, i32, 128"``, read against a kernel's own parameters."""

import keyword
import re
from collections.abc import Mapping, Sequence

from pyfmha.errors import SpecError
from pyfmha.spec.kernel import HINTS_ALLOWED, Argument, Constant


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
    text: str, parameters: Sequence[str], defaults: Mapping[str, Constant], constexprs: frozenset[str]
) -> tuple[tuple[Argument, ...], tuple[tuple[str, Constant], ...]]:
    """Read ``"*fp16:16, fp32, i32, 128"`` against a kernel's parameters.

    Args:
        text: one entry a parameter: a type with an optional hint, or a constant's value (int, float, True, False, None,
            a quoted string). Trailing constants that have a default may be left out.
        parameters: names of the kernel's parameters, in order.
        defaults: their default values, where they have one.
        constexprs: the parameters annotated ``tl.constexpr``.

    Returns:
        The run-time arguments and the constants, each in the kernel's order.

    Raises:
        SpecError: wrong length, unknown type, bad hint, or a type where a constant is needed.
    """
    entries = split_signature(text)
    omitted = parameters[len(entries) :]
    if len(entries) > len(parameters) or any(name not in defaults for name in omitted):
        needed = sum(name not in defaults for name in parameters)
        wanted = str(needed) if needed == len(parameters) else f"{needed} to {len(parameters)}"
        raise SpecError(f"signature has {len(entries)} entries, the kernel takes {wanted}: {', '.join(parameters)}")
    arguments: list[Argument] = []
    constants: list[tuple[str, Constant]] = []
    for name, entry in zip(parameters, entries, strict=False):
        is_constant, value = _constant(entry)
        if is_constant:
            constants.append((name, value))
        elif name in constexprs:
            raise SpecError(f"argument {name} is a tl.constexpr: give its value, not {entry!r} (text goes in quotes)")
        else:
            arguments.append(_argument(name, entry))
    return tuple(arguments), (*constants, *((name, defaults[name]) for name in omitted))


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
