"""A zip archive whose bytes are told by its members alone, whichever Python and zlib it is written with.

Members of another archive go in as they lie there; new ones are not compressed.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipInfo

# The version that is needed to extract a member: 2.0, for deflated ones and directories.
_VERSION = 20
_UNIX = 3 << 8
_UTF8 = 0x800


@dataclass(frozen=True)
class Member:
    """A member under its name, with another's time and mode, and the bytes that lie in the archive."""

    name: str
    like: ZipInfo
    packed: bytes
    method: int
    crc: int
    size: int


def stored(name: str, like: ZipInfo, data: bytes) -> Member:
    """A new member."""
    return Member(name, like, data, ZIP_STORED, zlib.crc32(data), len(data))


def copied(name: str, member: ZipInfo, source: BinaryIO) -> Member:
    """A member of the archive that `source` is, under a name of its own.

    Raises:
        BadZipFile: it is not there.
    """
    source.seek(member.header_offset)
    header = source.read(30)
    if len(header) != 30:
        raise BadZipFile(f"no header of {member.filename}")
    source.seek(sum(struct.unpack("<26xHH", header)), 1)
    packed = source.read(member.compress_size)
    return Member(name, member, packed, member.compress_type, member.CRC, member.file_size)


def write(target: BinaryIO, members: Iterable[Member]) -> None:
    """Write an archive."""
    directory, count, offset = b"", 0, 0
    for count, member in enumerate(members, 1):  # noqa: B007
        name = member.name.encode()
        year, month, day, hour, minute, second = member.like.date_time
        common = struct.pack(
            "<5H3L2H",
            *(_VERSION, 0 if name.isascii() else _UTF8, member.method),
            *(hour << 11 | minute << 5 | second // 2, (year - 1980) << 9 | month << 5 | day),
            *(member.crc, len(member.packed), member.size, len(name), 0),
        )
        target.write(b"PK\3\4" + common + name + member.packed)
        made_by, mode = struct.pack("<H", _UNIX | _VERSION), member.like.external_attr
        directory += b"PK\1\2" + made_by + common + struct.pack("<3H2L", 0, 0, 0, mode, offset) + name
        offset += 30 + len(name) + len(member.packed)
    target.write(directory)
    target.write(b"PK\5\6" + struct.pack("<4H2LH", 0, 0, count, count, len(directory), offset, 0))
