"""ELF files: whether a shared library is whole."""

import struct
from pathlib import Path

from pyfmha.errors import LibraryError
from pyfmha.spec.advice import build_command


def check_whole(path: Path) -> None:
    """Refuse an ELF file that ends before its contents do: the loader would map it, and the process die of SIGBUS.

    Layout: System V ABI, "ELF Header" and "Program Header", 64 bits.

    Raises:
        LibraryError: it is cut short. What is no 64-bit ELF file at all is left to the loader to refuse.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            head = file.read(64)
            if len(head) < 64 or head[:5] != b"\x7fELF\x02":
                return
            segments, sections = struct.unpack_from("<QQ", head, 32)
            segment_size, segment_count, section_size, section_count = struct.unpack_from("<HHHH", head, 54)
            file.seek(segments)
            table = file.read(segment_size * segment_count)
    except OSError as error:
        raise LibraryError(f"{path} cannot be read: {error}") from None
    ends = [sections + section_size * section_count, segments + segment_size * segment_count]
    for start in range(0, len(table) - 55, segment_size or 56):
        offset, _, _, length = struct.unpack_from("<QQQQ", table, start + 8)
        ends.append(offset + length)
    if max(ends) > size:
        again = build_command(path)
        raise LibraryError(f"{path} is cut short: it has {size} of {max(ends)} bytes; build it again: {again}")
