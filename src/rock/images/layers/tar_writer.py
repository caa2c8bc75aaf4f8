"""Tar writer, and packing of a sandbox's writable layer as one OCI layer and back. Standard library only.

It writes ustar headers, and pax headers for fields that do not fit. Names stay bytes. The packer runs in a process of
its own. Its input tree is untrusted, but no process changes it meanwhile: every folder and file is opened below its
folder's descriptor and never through a link. Whiteouts become `.wh.NAME`, opaque folders get `.wh..wh..opq`. Sockets
are omitted, because they are useless without the listening program. Of the attributes, those in `user.` are included.
Content that a layer cannot represent is rejected: names that begin with `.wh.`, folders deeper than 256, more entries
or bytes than the limits.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from rock.errors import ImageError
from rock.images.layers.tar_reader import BLOCK, ByteStream, Entry, Kind, TarReader
from rock.images.layers.writer import LayerWriter, is_whiteout

_TYPES = {Kind.FILE: b"0", Kind.HARDLINK: b"1", Kind.SYMLINK: b"2", Kind.FOLDER: b"5", Kind.FIFO: b"6"}
_MOST_OCTAL = 1 << 33
_MOST_ID = 1 << 21
_RECORD = 20 * BLOCK


class TarWriter:
    """Entries in order: after the header of a file, `data` writes its content of exactly `entry.size` bytes."""

    def __init__(self, put: Callable[[bytes], None]) -> None:
        self._put = put
        self._left = 0
        self._written = 0

    def _write(self, data: bytes) -> None:
        self._put(data)
        self._written += len(data)

    def header(self, entry: Entry) -> None:
        """Begin an entry. Devices are not allowed in a layer: ValueError."""
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
        """Write the end of the archive."""
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


# ---- packing ----

MOST_ENTRIES = 4_000_000
_MOST_LINK_NAMES = 256 << 20  # maximum total bytes of the names of files with several links
_DEEPEST = 256
_CHUNK = 1 << 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WHITEOUT = b".wh."


@dataclass(frozen=True)
class Part:
    """A folder with written files, and its path inside: "" for /, else without a slash at either end."""

    folder: str
    target: bytes = b""


class Packer:
    """Packs parts into a tar. `overlay`: the prefix of overlay's own attributes; limit: maximum bytes of file
    content."""

    def __init__(self, tar: TarWriter, overlay: str, limit: int) -> None:
        self._tar = tar
        self._opaque = f"{overlay}opaque"
        self._limit = limit
        self._entries = 0
        self._bytes = 0
        self._names: dict[tuple[int, int], bytes] = {}
        self._names_size = 0

    def pack(self, parts: Sequence[Part]) -> None:
        """Write all parts, the one of / first. Its content at another part's place is hidden by that part."""
        covered = {part.target for part in parts if part.target}
        for part in parts:
            self._names.clear()
            self._names_size = 0
            fd = os.open(part.folder, _FOLDER)
            self._folder_entry(fd, part.target or b".")
            self._walk(fd, part.target, covered - {part.target})
        self._tar.finish()

    def _walk(self, top: int, place: bytes, covered: set[bytes]) -> None:
        """Depth first; closes `top`."""
        stack: list[tuple[int, bytes, Iterator[os.DirEntry[str]]]] = [(top, place, _entries(top))]
        try:
            while stack:
                fd, path, entries = stack[-1]
                found = next(entries, None)
                if found is None:
                    stack.pop()
                    os.close(fd)
                    continue
                name = os.fsencode(found.name)
                inner = path + b"/" + name if path else name
                if inner in covered:
                    continue
                info = os.stat(name, dir_fd=fd, follow_symlinks=False)
                self._count(inner, name, info)
                if stat.S_ISDIR(info.st_mode):
                    if len(stack) >= _DEEPEST:
                        raise ImageError(f"a folder is more than {_DEEPEST} deep: {_shown(inner)}", hint="remove it")
                    child = os.open(name, _FOLDER, dir_fd=fd)
                    stack.append((child, inner, _entries(child)))
                    self._folder_entry(child, inner)
                else:
                    self._other(fd, name, inner, info)
        finally:
            for fd, _, _ in stack:
                os.close(fd)

    def _count(self, path: bytes, name: bytes, info: os.stat_result) -> None:
        self._entries += 1
        if self._entries > MOST_ENTRIES:
            raise ImageError(f"there are more than {MOST_ENTRIES} files", hint="remove some")
        if name.startswith(_WHITEOUT):
            raise ImageError(f"a name that begins with .wh. means a deleted file in a layer: {_shown(path)}",
                             hint="rename or remove it")
        if stat.S_ISREG(info.st_mode):
            self._bytes += info.st_size
            if self._bytes > self._limit:
                raise ImageError(
                    f"the files are over the limit of {self._limit} bytes, holes counted ({_shown(path)} has "
                    f"{info.st_size})", hint="remove what is not needed, or raise ROCK_ARCHIVE_LIMIT on the server")

    def _folder_entry(self, fd: int, path: bytes) -> None:
        attributes = _attributes(fd)
        self._tar.header(_entry(path, Kind.FOLDER, os.fstat(fd), _travelling(fd, attributes)))
        if self._opaque in attributes and os.getxattr(fd, self._opaque) == b"y":
            self._tar.header(Entry((b"" if path == b"." else path + b"/") + _WHITEOUT + b".wh..opq", Kind.FILE))

    def _other(self, parent: int, name: bytes, path: bytes, info: os.stat_result) -> None:
        mode = info.st_mode
        if is_whiteout(info):
            above = path[: len(path) - len(name)]
            self._tar.header(Entry(above + _WHITEOUT + name, Kind.FILE))
        elif stat.S_ISLNK(mode):
            entry = _entry(path, Kind.SYMLINK, info)
            entry.target = os.readlink(name, dir_fd=parent)
            self._tar.header(entry)
        elif stat.S_ISFIFO(mode):
            self._tar.header(_entry(path, Kind.FIFO, info))
        elif stat.S_ISREG(mode):
            first = self._first_name(path, info)
            if first is None:
                self._file(parent, name, path)
            else:
                entry = _entry(path, Kind.HARDLINK, info)
                entry.target = first
                self._tar.header(entry)

    def _first_name(self, path: bytes, info: os.stat_result) -> bytes | None:
        """The name under which the same file was packed before."""
        if info.st_nlink < 2:
            return None
        key = info.st_dev, info.st_ino
        first = self._names.get(key)
        if first is None:
            self._names_size += len(path)
            if self._names_size > _MOST_LINK_NAMES:
                raise ImageError("there are too many hard links with long names", hint="remove some")
            self._names[key] = path
        return first

    def _file(self, parent: int, name: bytes, path: bytes) -> None:
        fd = os.open(name, _FILE, dir_fd=parent)
        try:
            info = os.fstat(fd)
            entry = _entry(path, Kind.FILE, info, _travelling(fd, _attributes(fd)))
            entry.size = left = info.st_size
            self._tar.header(entry)
            while left:
                part = os.read(fd, min(_CHUNK, left))
                if not part:
                    raise ImageError(f"{_shown(path)} shrank while it was read", hint="retry")
                self._tar.data(part)
                left -= len(part)
        finally:
            os.close(fd)


def _entries(fd: int) -> Iterator[os.DirEntry[str]]:
    with os.scandir(fd) as found:
        yield from found


def _entry(path: bytes, kind: Kind, info: os.stat_result, xattrs: dict[str, bytes] | None = None) -> Entry:
    return Entry(path, kind, stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid, info.st_mtime_ns, 0, b"",
                 xattrs or {})


def _attributes(fd: int) -> list[str]:
    try:
        return os.listxattr(fd)
    except OSError:
        return []


def _travelling(fd: int, names: Iterable[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name in names:
        if name.startswith("user.") and not name.startswith("user.overlay."):
            with suppress(OSError):
                found[name] = os.getxattr(fd, os.fsencode(name))
    return found


def _shown(path: bytes) -> str:
    """A guest's file name for a message: shortened, without terminal control characters."""
    return ascii(os.fsdecode(path[-120:]))


def unpack(chunks: Iterator[bytes], parts: Sequence[Part], *, one_owner: bool) -> None:
    """Unpack a layer into empty folders, one per part. `one_owner`: there is only one id, which owns everything."""
    writers = [(part.target.split(b"/") if part.target else [], HoledWriter(part.folder)) for part in parts]
    writers.sort(key=lambda pair: -len(pair[0]))
    try:
        tar = TarReader(ByteStream(chunks))
        while (entry := tar.next()) is not None:
            if one_owner:
                entry.uid = entry.gid = 0
            place, writer, entry.path = _placed(writers, entry.path)
            if entry.kind is Kind.HARDLINK:
                target_place, _, entry.target = _placed(writers, entry.target)
                if target_place != place:
                    raise ImageError("the archive has a hard link between two file systems of the sandbox",
                                     hint="copy the file instead of linking it")
            writer.add(entry, tar.data())
        for _, writer in writers:
            writer.finish()
    finally:
        for _, writer in writers:
            writer.__exit__(None, None, None)
    for _ in chunks:  # so that a digest over the whole is complete
        pass


def _placed(writers: Sequence[tuple[list[bytes], LayerWriter]], path: bytes) -> tuple[list[bytes], LayerWriter, bytes]:
    """The part of a path, and its name in that part."""
    names = [name for name in path.split(b"/") if name not in (b"", b".")]
    for place, writer in writers:
        if names[: len(place)] == place:
            return place, writer, b"/".join(names[len(place) :]) or b"."
    raise AssertionError("there is always a part for /")


class HoledWriter(LayerWriter):
    """Writes a sparse file: chunks of zeros become holes."""

    def _file(self, parent: int, name: bytes, entry: Entry, data: Iterable[bytes | memoryview]) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
        try:
            for part in data:
                if not bytes(part).strip(b"\0"):
                    os.lseek(fd, len(part), os.SEEK_CUR)
                    continue
                while part:
                    part = part[os.write(fd, part) :]
            os.ftruncate(fd, entry.size)
            self._dress(fd, entry, entry.mode)
        finally:
            os.close(fd)
        self.size += entry.size
