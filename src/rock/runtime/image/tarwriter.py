"""Writing a tar stream: ustar headers, and pax headers for what does not fit. Names stay bytes. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable

from rock.runtime.image.tarstream import BLOCK, Entry, Kind

_TYPES = {Kind.FILE: b"0", Kind.HARDLINK: b"1", Kind.SYMLINK: b"2", Kind.FOLDER: b"5", Kind.FIFO: b"6"}
_MOST_OCTAL = 1 << 33
_MOST_ID = 1 << 21
_RECORD = 20 * BLOCK


class TarWriter:
    """Entries one after the other; after the header of a file its content, of exactly `entry.size` bytes, by `data`."""

    def __init__(self, put: Callable[[bytes], None]) -> None:
        self._put = put
        self._left = 0
        self._written = 0

    def _write(self, data: bytes) -> None:
        self._put(data)
        self._written += len(data)

    def header(self, entry: Entry) -> None:
        """Begin an entry. Devices have no place in a layer of ours: ValueError."""
        assert self._left == 0
        path = entry.path + b"/" if entry.kind is Kind.FOLDER else entry.path
        pax: list[tuple[bytes, bytes]] = []
        if len(path) > 100 or not path.isascii():
            pax.append((b"path", path))
        if len(entry.target) > 100 or not entry.target.isascii():
            pax.append((b"linkpath", entry.target))
        seconds, rest = divmod(entry.mtime, 10**9)
        if rest or not 0 <= seconds < _MOST_OCTAL:
            whole, part = divmod(abs(entry.mtime), 10**9)
            pax.append((b"mtime", b"%s%d.%09d" % (b"-" if entry.mtime < 0 else b"", whole, part)))
        for name, value, most in ((b"size", entry.size, _MOST_OCTAL), (b"uid", entry.uid, _MOST_ID),
                                  (b"gid", entry.gid, _MOST_ID)):
            if value >= most:
                pax.append((name, b"%d" % value))
        for attribute, content in sorted(entry.xattrs.items()):
            pax.append((b"SCHILY.xattr." + attribute.encode("utf-8", "surrogateescape"), content))
        if pax:
            body = b"".join(_record(key, value) for key, value in pax)
            self._write(_header(b"PaxHeaders/" + path[-80:], b"x", 0o644, 0, 0, len(body), 0, b""))
            self._write(body + bytes(-len(body) % BLOCK))
        self._write(_header(
            path[:100], _TYPES[entry.kind], entry.mode, entry.uid if entry.uid < _MOST_ID else 0,
            entry.gid if entry.gid < _MOST_ID else 0, entry.size if entry.size < _MOST_OCTAL else 0,
            seconds if 0 <= seconds < _MOST_OCTAL else 0, entry.target[:100]))
        self._left = entry.size

    def data(self, part: bytes) -> None:
        """The next bytes of the file whose header was written last."""
        assert len(part) <= self._left
        self._write(part)
        self._left -= len(part)
        if self._left == 0:
            self._write(bytes(-self._written % BLOCK))

    def finish(self) -> None:
        """The end of the archive."""
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self._written % _RECORD))


def _record(key: bytes, value: bytes) -> bytes:
    """`LENGTH KEY=VALUE\\n`, where the length counts itself."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(b"%d" % length) + len(rest) != length:
        length = len(b"%d" % length) + len(rest)
    return b"%d" % length + rest


def _header(name: bytes, kind: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, target: bytes) -> bytes:
    fields = b"".join((
        name.ljust(100, b"\0"), b"%07o\0" % mode, b"%07o\0" % uid, b"%07o\0" % gid, b"%011o\0" % size,
        b"%011o\0" % mtime, b" " * 8, kind, target.ljust(100, b"\0"), b"ustar\x0000", bytes(64), b"%07o\0" % 0,
        b"%07o\0" % 0, bytes(155), bytes(12),
    ))  # fmt: skip
    return fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]
