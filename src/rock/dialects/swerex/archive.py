"""The folder of an upload: a zip of the client as a tar stream for the sandbox.

The zip is hostile. Its directory is read before the module `zipfile` parses it, because that holds all entries in
memory; the tar has at most the sizes that the directory states, within limits.
"""

from __future__ import annotations

import asyncio
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import IO

from rock.errors import InvalidConfig

LARGEST = 4 << 30  # bytes of a zip
UNPACKED = 32 << 30  # bytes of all files
ENTRIES = 200_000
_DIRECTORY = 64 << 20  # bytes of the directory of a zip
_TAIL = 22 + 0xFFFF  # bytes in which the end record is
_CHUNK = 1 << 20
_HINT = "send a zip as shutil.make_archive writes it"


def entries_of(file: IO[bytes]) -> list[zipfile.ZipInfo]:
    """The entries of a zip, after a check of the limits. InvalidConfig."""
    count, size = _end_record(file)
    if count > ENTRIES or size > _DIRECTORY:
        raise InvalidConfig(f"the zip has {count} entries in a directory of {size} bytes, and the limits are {ENTRIES} "
                            f"and {_DIRECTORY}", hint="upload it in parts")
    try:
        with zipfile.ZipFile(file) as opened:
            found = opened.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise InvalidConfig(f"the file is not a valid zip: {error}", hint=_HINT) from None
    total = sum(entry.file_size for entry in found)
    if len(found) > ENTRIES or total > UNPACKED:
        raise InvalidConfig(f"the zip has {len(found)} entries with {total} bytes, and the limits are {ENTRIES} and "
                            f"{UNPACKED}", hint="upload it in parts")
    if any(entry.flag_bits & 1 for entry in found):
        raise InvalidConfig("the zip is encrypted", hint=_HINT)
    return found


def _end_record(file: IO[bytes]) -> tuple[int, int]:
    """(entries, bytes) of the directory, from the end of the file. InvalidConfig."""
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - _TAIL))
    tail = file.read(_TAIL)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < 22:
        raise InvalidConfig("the file is not a zip: it has no end record", hint=_HINT)
    count, size = struct.unpack_from("<HI", tail, at + 10)
    if count != 0xFFFF and size != 0xFFFFFFFF:
        return count, size
    locator = tail.rfind(b"PK\6\7", 0, at)
    if locator < 0:
        return count, size
    (where,) = struct.unpack_from("<Q", tail, locator + 8)
    if not 0 <= where <= length - 56:
        raise InvalidConfig("the file is not a zip: its end record is wrong", hint=_HINT)
    file.seek(where)
    found: tuple[int, int] = struct.unpack_from("<QQ", file.read(56), 32)
    return found


async def tar_of(file: IO[bytes], entries: list[zipfile.ZipInfo]) -> AsyncIterator[bytes]:
    """The entries as a tar. InvalidConfig for damaged data, after a part of the tar."""
    chunks = _tar(file, entries)
    while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
        yield chunk


def _tar(file: IO[bytes], entries: list[zipfile.ZipInfo]) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(file) as opened:
            for entry in entries:
                head = tarfile.TarInfo(entry.filename.rstrip("/") or ".")
                mode = entry.external_attr >> 16
                if entry.is_dir():
                    head.type, head.mode = tarfile.DIRTYPE, 0o755
                    yield head.tobuf()
                    continue
                if stat.S_ISLNK(mode):
                    continue  # its content would be a path outside; the client follows links when it packs
                head.size, head.mode = entry.file_size, stat.S_IMODE(mode) & 0o777 or 0o644
                yield head.tobuf()
                yield from _content(opened, entry)
                yield b"\0" * (-entry.file_size % 512)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, OSError, RuntimeError) as error:
        raise InvalidConfig(f"the zip is damaged: {error}", hint=_HINT) from None
    yield b"\0" * 1024


def _content(opened: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    left = entry.file_size
    with opened.open(entry) as source:
        while left and (part := source.read(min(_CHUNK, left))):
            left -= len(part)
            yield part
    if left:
        raise EOFError(f"{entry.filename[:100]} ends early")
