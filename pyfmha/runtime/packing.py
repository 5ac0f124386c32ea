"""Arguments as the bytes of the C struct that a library's functions take."""

import functools
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


def pointers_among(formats: tuple[str, ...], arguments: Sequence[Any], pointers: tuple[int, ...]) -> Head:
    """Of the stream and pointers among other arguments."""
    size, make = _among(formats, pointers)
    return Head(size, *make(tuple(arguments[: len(formats)])))


@functools.lru_cache(maxsize=256)
def _among(
    formats: tuple[str, ...], pointers: tuple[int, ...]
) -> tuple[int, Callable[[Any], tuple[Callable[..., bytes], Callable[..., None]]]]:
    """The bytes, and what makes the two functions of :class:`Head` for some arguments.

    Written as text, as ``dataclasses`` does, so that a call has no more to do than one with leading pointers."""
    head = struct.Struct(aligned(["Q", *formats]))
    names = {index: f"p{number}" for number, index in enumerate(pointers)}
    terms = ", ".join(names.get(index, f"c{index}") for index in range(len(formats)))
    given = ", ".join(names.values())
    constants = ", ".join(f"c{index}" if index not in names else "_" for index in range(len(formats)))
    pack = f"lambda stream, {given}: pack(stream, {terms})"
    pack_into = f"lambda buffer, offset, stream, {given}: pack_into(buffer, offset, stream, {terms})"
    scope: dict[str, Any] = {"pack": head.pack, "pack_into": head.pack_into}
    exec(f"def make(arguments):\n    [{constants}] = arguments\n    return {pack}, {pack_into}", scope)
    return head.size, scope["make"]
