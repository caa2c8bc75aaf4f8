"""Tar parser for streams: ustar, GNU long names, pax headers. It writes nothing.

Names stay bytes. Fields of an entry are checked for form only; `writer.py` confines entries to the layer's folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import IO

from rock.errors import ImageError

BLOCK = 512
DAMAGED = "the archive is damaged; fetch or save it again"  # hint of errors
NO_TAR = "give a tar archive, plain or compressed with gzip or zstd; if it is one, fetch or save it again"
_LONGEST_NAME = 1 << 16
_LONGEST_PAX = 1 << 20
_ZERO = bytes(BLOCK)


class Kind(Enum):
    """The type of an entry."""

    FILE = "file"
    FOLDER = "folder"
    SYMLINK = "symlink"
    HARDLINK = "hardlink"
    FIFO = "fifo"
    DEVICE = "device"


@dataclass(slots=True)
class Entry:
    """One entry: `path` as it stands in the archive, `size` in bytes, `mtime` in nanoseconds since the epoch."""

    path: bytes
    kind: Kind
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    size: int = 0
    target: bytes = b""
    xattrs: dict[str, bytes] = field(default_factory=dict)


class ByteStream:
    """Chunks of bytes, read by count."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._buffer = memoryview(b"")

    def _fill(self) -> bool:
        while not self._buffer:
            chunk = next(self._chunks, None)
            if chunk is None:
                return False
            self._buffer = memoryview(chunk)
        return True

    def some(self, limit: int) -> memoryview:
        """Between 1 and `limit` bytes; none at the end."""
        if not self._fill():
            return memoryview(b"")
        part, self._buffer = self._buffer[:limit], self._buffer[limit:]
        return part

    def parts(self, count: int) -> Iterator[memoryview]:
        """Exactly `count` bytes, in pieces. ImageError when the stream ends before."""
        while count:
            part = self.some(count)
            if not part:
                raise _cut_short()
            count -= len(part)
            yield part

    def exactly(self, count: int) -> bytes:
        """`count` bytes; ImageError when the stream ends before."""
        part = self.some(count)
        return bytes(part) if len(part) == count else bytes(part) + b"".join(self.parts(count - len(part)))

    def skip(self, count: int) -> None:
        """Skip `count` bytes. ImageError when the stream ends before."""
        for _ in self.parts(count):
            pass

    def drain(self) -> None:
        """Read to the end, so that digests over the whole are complete."""
        while self._fill():
            self._buffer = memoryview(b"")


class FileStream(ByteStream):
    """A seekable file, in which skipped data is not read."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        super().__init__(iter(lambda: file.read(1 << 16) or None, None))
        self._file = file
        self._size = size

    def skip(self, count: int) -> None:
        ahead = count - len(self._buffer)
        self._buffer = self._buffer[count:]
        if ahead > 0 and self._file.seek(ahead, 1) > self._size:
            raise _cut_short()


def _cut_short() -> ImageError:
    return ImageError("the archive ends in the middle of a file", hint="it is cut short; fetch or save it again")


class TarReader:
    """The entries of a tar stream in order.

    `next()` skips the rest of the previous entry; `data()` returns the content of the current entry.
    """

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._left = 0
        self._padding = 0
        self._global: dict[str, bytes] = {}
        self.offset = 0  # of the current entry's data in the stream

    def data(self) -> Iterator[memoryview]:
        """The current entry's content, in pieces."""
        while self._left:
            part = self._stream.some(self._left)
            if not part:
                raise _cut_short()
            self._left -= len(part)
            self.offset += len(part)
            yield part

    def next(self) -> Entry | None:
        """The next entry; None at the end. ImageError for data that is not a tar archive."""
        pax: dict[str, bytes] = {}
        name = target = b""
        while True:
            header = self._header()
            if header is None:
                return None
            kind = header[156:157]
            size = _number(header[124:136])
            if kind == b"x":
                pax |= _pax(self._payload(size, _LONGEST_PAX))
            elif kind == b"g":
                self._global |= _pax(self._payload(size, _LONGEST_PAX))
            elif kind == b"L":
                name = self._payload(size, _LONGEST_NAME).split(b"\0", 1)[0]
            elif kind == b"K":
                target = self._payload(size, _LONGEST_NAME).split(b"\0", 1)[0]
            else:
                break
        if self._global:
            pax = self._global | pax
        entry = _entry(header, size, name, target)
        if pax:
            _apply(entry, pax)
        if entry.size < 0:
            raise ImageError("a file in the archive has a negative size", hint=DAMAGED)
        self._left = entry.size
        self._padding = -entry.size % BLOCK
        return entry

    def _header(self) -> bytes | None:
        if self._left:
            self._stream.skip(self._left)
            self.offset += self._left
            self._left = 0
        if self._padding:
            self._stream.exactly(self._padding)
            self.offset += self._padding
            self._padding = 0
        first = self._stream.some(1)
        if not first:
            return None  # an archive without its two empty blocks, which tar accepts too
        header = bytes(first) + self._stream.exactly(BLOCK - 1)
        self.offset += BLOCK
        if header == _ZERO:
            return None
        checksum = _number(header[148:156])
        if sum(header) - sum(header[148:156]) + 256 != checksum:
            raise ImageError("a header of the tar archive has a wrong checksum", hint=NO_TAR)
        return header

    def _payload(self, size: int, limit: int) -> bytes:
        if not 0 <= size <= limit:
            raise ImageError(f"a header of the archive has {size} bytes, more than the limit of {limit}", hint=NO_TAR)
        data = self._stream.exactly(size)
        self._stream.exactly(-size % BLOCK)
        self.offset += size + -size % BLOCK
        return data


_KINDS = {
    b"0": Kind.FILE, b"\0": Kind.FILE, b"7": Kind.FILE, b"1": Kind.HARDLINK, b"2": Kind.SYMLINK, b"3": Kind.DEVICE,
    b"4": Kind.DEVICE, b"5": Kind.FOLDER, b"6": Kind.FIFO,
}  # fmt: skip


def _entry(header: bytes, size: int, name: bytes, target: bytes) -> Entry:
    code = header[156:157]
    if code not in _KINDS:
        what = "a GNU sparse file" if code == b"S" else f"an entry of type {code!r}"
        raise ImageError(f"the archive has {what}, which is not supported",
                         hint="make the archive without tar --sparse")
    kind = _KINDS[code]
    if not name:
        name = _text(header[0:100])
        if header[257:263] == b"ustar\0" and header[345]:
            name = _text(header[345:500]) + b"/" + name
    # An old representation of folders, before they had a type. A long name that a pax header replaces may be cut off
    # after a slash, so the name of a file with a type says nothing.
    if code == b"\0" and name.endswith(b"/"):
        kind = Kind.FOLDER
    return Entry(
        path=name, kind=kind, mode=_number(header[100:108]) & 0o7777, uid=_number(header[108:116]),
        gid=_number(header[116:124]), mtime=_number(header[136:148]) * 10**9,
        size=size if kind is Kind.FILE else 0, target=target or _text(header[157:257]),
    )  # fmt: skip


def _text(raw: bytes) -> bytes:
    return raw.split(b"\0", 1)[0]


def _number(raw: bytes) -> int:
    if raw[0] & 0x80:  # base 256, for values beyond octal digits
        value = int.from_bytes(raw, "big", signed=True) if raw[0] == 0xFF else int.from_bytes(b"\0" + raw[1:], "big")
    else:
        digits = raw.split(b"\0", 1)[0].strip()
        try:
            value = int(digits, 8) if digits else 0
        except ValueError:
            raise ImageError(f"a header of the tar archive has {digits[:20]!r} where a number is required",
                             hint=NO_TAR) from None
    return value


def _pax(data: bytes) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    position = 0
    while position < len(data) and data[position]:
        space = data.find(b" ", position, position + 20)
        try:
            length = int(data[position:space])
        except ValueError:
            length = 0
        end = position + length
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if space < 0 or end <= space or end > len(data) or not equals:
            raise ImageError("a pax header of the archive cannot be parsed", hint=DAMAGED)
        found[key.decode("utf-8", "surrogateescape")] = value
        position = end
    return found


def _nanoseconds(value: bytes) -> int:
    """Parse seconds with any number of decimals: a float would lose precision."""
    whole, _, part = value.partition(b".")
    if len(whole) > 20 or (part and not part.isdigit()):
        raise ValueError("not a time")
    seconds, rest = int(whole or b"0"), int(part[:9].ljust(9, b"0"))
    return seconds * 10**9 - rest if value.startswith(b"-") else seconds * 10**9 + rest


def _apply(entry: Entry, pax: dict[str, bytes]) -> None:
    for key, value in pax.items():
        try:
            if key == "path":
                entry.path = value.rstrip(b"/") if entry.kind is Kind.FOLDER else value
            elif key == "linkpath":
                entry.target = value
            elif key == "size":
                if entry.kind is Kind.FILE:
                    entry.size = int(value)
            elif key == "uid":
                entry.uid = int(value)
            elif key == "gid":
                entry.gid = int(value)
            elif key == "mtime":
                entry.mtime = _nanoseconds(value)
            elif key.startswith("GNU.sparse"):
                raise ImageError("the archive has a GNU sparse file, which is not supported",
                                 hint="make the archive without tar --sparse")
            elif key.startswith("SCHILY.xattr."):
                entry.xattrs[key.removeprefix("SCHILY.xattr.")] = value
        except (ValueError, OverflowError):
            raise ImageError(f"a pax header of the archive has an invalid value: {key}={value[:40]!r}",
                             hint=DAMAGED) from None
