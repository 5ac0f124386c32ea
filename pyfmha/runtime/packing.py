"""Arguments as the bytes of the C struct that a library's functions take."""

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


def aligned(formats: Sequence[str]) -> str:
    """A format of struct for a C struct of such members, in order.

    Its padding is spelled out, because only without alignment of its own does struct refuse floats that would become
    infinite.
    """
    parts, end = ["<"], 0
    for code in formats:
        size = struct.calcsize(f"<{code}")
        parts.append("x" * (-end % size) + code)
        end += -end % size + size
    return "".join(parts)


class Head(NamedTuple):
    """How the arguments up to the last pointer that is a placeholder are packed.

    Attributes:
        size: bytes of them.
        pack: bytes of the stream and the pointers, with what stands between.
        pack_into: the same, into a buffer at an offset.
    """

    size: int
    pack: Callable[..., bytes]
    pack_into: Callable[..., None]


def leading_pointers(count: int) -> Head:
    """Of the stream and so many pointers."""
    head = struct.Struct(f"@{1 + count}Q")
    return Head(head.size, head.pack, head.pack_into)


def pointers_among(formats: Sequence[str], arguments: Sequence[Any], pointers: Sequence[int]) -> Head:
    """Of the stream and pointers among other arguments.

    Written as text, as ``dataclasses`` does: the numbers between are constants of the code, so that a call has no
    more to do than one with leading pointers."""
    head = struct.Struct(aligned(["Q", *formats]))
    names = {index: f"p{number}" for number, index in enumerate(pointers)}
    terms = ", ".join(names.get(index, f"c[{index}]") for index in range(len(formats)))
    given = ", ".join(names.values())
    scope = {"pack": head.pack, "pack_into": head.pack_into, "c": tuple(arguments)}
    pack = eval(f"lambda stream, {given}: pack(stream, {terms})", scope)
    pack_into = eval(f"lambda buffer, offset, stream, {given}: pack_into(buffer, offset, stream, {terms})", scope)
    return Head(head.size, pack, pack_into)
