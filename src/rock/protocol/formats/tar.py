"""Entries of a tar: folders travel as uncompressed tars, whose names are relative to the folder.

A tar of many small files is mostly headers, so this writes the plain ustar header itself, in a tenth of the time of
`tarfile`. What does not fit into one (long names, names that are not ASCII, large numbers) becomes a pax header.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)  # of an archive
FILE, FOLDER, LINK = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE

_FIELD = 100  # bytes of a name and of the target of a link
_SMALL, _LARGE = 8**7, 8**11  # what the fields of 8 and of 12 bytes can hold
_REST = bytes(32 + 32 + 8 + 8 + 155 + 12)  # no names of owners, no device, no prefix


def header(
    name: str, kind: bytes, mode: int, mtime: float, size: int = 0, target: str = "", uid: int = 0, gid: int = 0
) -> bytes:
    """The header of an entry. size: of the content of a FILE in bytes, which follows with `padding`. target: of a
    LINK. mtime: seconds since the epoch, of which the fraction is dropped."""
    if kind == FOLDER and not name.endswith("/"):
        name += "/"
    fits = 0 <= mtime < _LARGE and 0 <= size < _LARGE and 0 <= uid < _SMALL and 0 <= gid < _SMALL
    if fits and name.isascii() and target.isascii() and 0 < len(name) < _FIELD and len(target) < _FIELD:
        numbers = b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (mode & 0o7777, uid, gid, size, int(mtime))
        front = b"%s%s" % (name.encode().ljust(_FIELD, b"\0"), numbers)
        back = b"%s%sustar\00000%s" % (kind, target.encode().ljust(_FIELD, b"\0"), _REST)
        return b"%s%06o\0 %s" % (front, sum(front) + sum(back) + 8 * 32, back)
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.mtime = kind, target, mode & 0o7777, int(mtime)
    info.size, info.uid, info.gid = size, uid, gid
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def padding(size: int) -> bytes:
    """The zeros after a content of `size` bytes."""
    return bytes(-size % BLOCK)


def inside(name: str) -> str | None:
    """The name of an entry without empty parts and `.`, so "" for the root; None for a name that leads out of it."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return None if name.startswith("/") or ".." in parts or "\0" in name else "/".join(parts)


def portions(parts: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in fewer portions: of at most `size`, or one larger part."""
    joined: list[bytes] = []
    length = 0
    for part in parts:
        if joined and length + len(part) > size:
            yield b"".join(joined)
            joined, length = [], 0
        joined.append(part)
        length += len(part)
    yield b"".join(joined)
