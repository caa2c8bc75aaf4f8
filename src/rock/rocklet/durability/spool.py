"""Spool files: the output of running commands on disk, where it outlives the rocklet process.

    SpoolFile      one file per stream: output of a program moves from its pipe to the file by one system call (splice),
                   so that kill -9 leaves each byte in exactly one of the two
    SpoolFolder    the spool files of one sandbox, with its journal (journal.py)

Files are written to the page cache and not synced: sandboxes do not outlive the machine either. See
docs/decisions/0018-spool.md.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from rock.rocklet.commands.output import Capped
from rock.rocklet.durability import checksums
from rock.rocklet.durability.checksums import Checksums, Slot

log = logging.getLogger("rock.node")

_PORTION = 64 << 10
_HEAD = struct.Struct("<qqqq")  # token, bytes of the head, bytes dropped after it, total bytes
_SLACK = 1 << 20
_IDLE = 1 << 20  # bytes of a spool file above which it restarts for the next command
_OF_PROGRAM = "x"  # prefix of the names of programs' spool files; those of sessions are hexadecimal
_FREE = 8  # unused spool files of a sandbox that stay open for reuse
_JOURNAL = "journal"
_MARKS = "marks"


class SpoolFile:
    """The output of one stream: of the running command and of some earlier ones.

    The file has a head with its command, once it had to be shortened, and the amount that was dropped. The checksum of
    the running command's output is among the marks of the folder.
    """

    def __init__(self, path: Path, marks_: Checksums, found: Slot | None = None, aside: Path | None = None) -> None:
        """found: the mark of an earlier rocklet process. aside: the folder that damaged files are copied to."""
        self.path = path
        self._marks = marks_
        self._name = checksums.digest(path.name)
        self._found = found
        self._aside = aside
        self._checksum = 0
        self._lost = 0  # bytes of the running command that could not be stored
        self.broken = False  # the disk is full: further output is not stored
        self._splices = True
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._closed = False
        self.end = max(_HEAD.size, os.fstat(self._fd).st_size)
        self.start = self.end
        self._short = any(os.pread(self._fd, _HEAD.size, 0))

    @property
    def is_open(self) -> bool:
        """Whether it is used still, even if `rest` closed its descriptor."""
        return not self._closed

    def _open(self) -> int:
        """The descriptor, opened again after `rest`. OSError."""
        if self._fd < 0:
            if self._closed:
                raise OSError(errno.EBADF, "the spool file is closed")
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return self._fd

    def rest(self) -> None:
        """Close the descriptor until the next use."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def full(self) -> bool:
        """Whether the next command restarts the file."""
        return self.end > _IDLE or self._short

    def begin(self, held: bytes = b"") -> int:
        """A command begins, with the output that precedes it; returns its offset."""
        if self.full:
            os.ftruncate(self._open(), 0)
            self._short = False
            self.end = _HEAD.size
            self._marks.drop(self._name)
        elif self._lost:
            self._marks.drop(self._name)
        self.broken = False
        self.start = self.end
        self._checksum = self._lost = 0
        if held:
            self._add(held)
        return self.start

    def _mark(self) -> None:
        """Mark the current position. A shortened file is marked from its first byte."""
        start = 0 if self._short else self.start
        self._marks.slot(self._name, Slot(start, self.end, self._lost, self._checksum))

    def take(self, fd: int, limit: int) -> bytes:
        """Move available bytes of a descriptor to the file and return them: os.read with a stored copy."""
        if not self.broken:
            try:
                own = self._open()
            except OSError as error:
                self.broken = True
                log.warning("output is not kept for a restart: %s", error)
        if self.broken:
            data = os.read(fd, min(limit, _PORTION))
            self._lose(len(data))
            return data
        if self._splices:
            try:
                count = os.splice(fd, own, min(limit, _PORTION), offset_dst=self.end)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EIO):
                    raise
                # The descriptor is no pipe, the file system does not support splice, or the disk is full. No bytes were
                # moved.
                self._splices = error.errno in (errno.ENOSPC, errno.EDQUOT)
            else:
                data = os.pread(own, count, self.end)
                if count:
                    self.end += count
                    self._checksum = zlib.crc32(data, self._checksum)
                    self._mark()
                return data
        data = os.read(fd, min(limit, _PORTION))
        self._add(data)
        return data

    def _add(self, data: bytes) -> None:
        try:
            done = os.pwrite(self._open(), data, self.end)
        except OSError as error:
            done = -1
            log.warning("output is not kept for a restart: %s", error)
        if done != len(data):
            self.broken = True
            self._lose(len(data))
        else:
            self.end += len(data)
            self._checksum = zlib.crc32(data, self._checksum)
            if data:
                self._mark()

    def _lose(self, count: int) -> None:
        if count:
            self._lost += count
            self._mark()

    def keep_short(self, token: int, kept: Capped) -> None:
        """Limit the size of the file to that of the retained part of a longer output."""
        if self.size > kept.limit * 2 + _SLACK and not self.broken:
            self.shorten(token, kept)

    def shorten(self, token: int, kept: Capped) -> None:
        """Replace a long output by its retained part, atomically."""
        head, tail = kept.parts()
        beside = self.path.with_name(f".new-{self.path.name}")
        fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        checksum = 0
        try:
            for part in (_HEAD.pack(token, len(head), kept.total - len(head) - len(tail), kept.total), head, tail):
                if part and os.write(fd, part) != len(part):
                    raise OSError(errno.ENOSPC, "no space left")
                checksum = zlib.crc32(part, checksum)
            self._marks.drop(self._name)  # a kill between the two names leaves a file without a mark
            os.rename(beside, self.path)
        except OSError as error:
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(beside)
            self.broken = True
            log.warning("output is not kept for a restart: %s", error)
            return
        self.rest()
        self._fd, self.start, self._short = fd, _HEAD.size, True
        self.end = _HEAD.size + len(head) + len(tail)
        self._checksum = checksum
        self._mark()

    @property
    def size(self) -> int:
        """Size in bytes of the output of the running command."""
        return self.end - self.start

    def load(self, token: int, start: int, into: Capped) -> int | None:
        """Load the stored output of a command to `into`; its further output follows after that.

        Returns the number of stored bytes that are damaged or missing, of which none is loaded; None when there are
        none.
        """
        head = os.pread(self._open(), _HEAD.size, 0)
        short = self._short and _HEAD.unpack(head)[0] == token
        missing, whole = self._verify(start, short)
        if not whole:
            return missing
        if short:
            _, first, dropped, _ = _HEAD.unpack(head)
            self.start = _HEAD.size
            data = self.read()
            into.resume(data[:first], dropped, data[first:])
        else:
            into.add(self.read())
        return missing

    def has_later(self, start: int) -> bool:
        """Whether an earlier rocklet process marked output of a command that began after the one with this start."""
        return self._found is not None and self._found.start > start

    def _verify(self, start: int, short: bool) -> tuple[int | None, bool]:
        """(see `load`, whether the content is correct). Continues from there; a damaged file is set aside."""
        found, missing, whole = self._found, None, True
        self.start = start
        if found is not None and found.start not in (0, start):
            found = None  # the mark of an earlier command, which left no data here
        at = found.start if found is not None else 0 if short else start
        size = max(_HEAD.size, os.fstat(self._open()).st_size)
        data = b"".join(_portions(self._open(), at, size))
        marked = 0 if found is None else found.end - at
        if found is not None and found.lost:
            missing = found.lost
        if (size < start and not short) or len(data) < marked or (
            found is not None and zlib.crc32(data[:marked]) != found.checksum
        ):
            missing, whole = (missing or 0) + max(len(data), marked), False
            self._set_aside()
            os.ftruncate(self._open(), start)
            self._short, self.end, self._checksum = False, start, 0
        else:
            self.end, self._checksum = max(size, at), zlib.crc32(data)
        self._lost = missing or 0
        self._mark()
        return missing, whole

    def _set_aside(self) -> None:
        """Retain a copy of a damaged file for inspection."""
        _copy_aside(self.path, self._aside)

    def read(self) -> bytes:
        """The stored output of the running command."""
        return b"".join(_portions(self._open(), self.start, self.end))

    def close(self) -> None:
        """Close it for the next rocklet process."""
        self.rest()
        self._closed = True

    def remove(self) -> None:
        self.close()
        self._marks.drop(self._name)
        with contextlib.suppress(OSError):
            self.path.unlink()

    def empty(self) -> None:
        """Reset the file for another owner. OSError."""
        os.ftruncate(self._open(), 0)
        self.end = self.start = _HEAD.size
        self._checksum = self._lost = 0
        self._short = self.broken = False


def told_missing(missing: int | None) -> str:
    """The error text for stored output that is damaged. missing: number of bytes; None when the output is complete."""
    if missing is None:
        return ""
    size = f"{missing} bytes" if missing else "an unknown number of bytes"
    return (f"{size} of its output from before the server was started again are lost: "
            "the server's file of them is damaged or missing")  # fmt: skip


def _copy_aside(path: Path, aside: Path | None) -> None:
    """Copy a damaged file to the folder `aside`, where one is set, under the name of its folder and its own."""
    if aside is None or not path.exists():
        return
    with contextlib.suppress(OSError):
        aside.mkdir(parents=True, exist_ok=True, mode=0o700)
        shutil.copyfile(path, aside / f"{path.parent.name}-{path.name}")


def _portions(fd: int, at: int, end: int) -> Iterator[bytes]:
    while at < end and (part := os.pread(fd, min(_PORTION << 4, end - at), at)):
        yield part
        at += len(part)


class SpoolFolder:
    """The spool files and the journal of one sandbox, in a folder that is created with the first of them.

    Files stay for the next session, program or sandbox, because creating and removing a file costs more than most uses
    of it. `rest` closes the descriptors of all of them; a file is opened again when it is used.
    """

    def __init__(self, path: Path, aside: Path | None = None) -> None:
        """aside: the folder that damaged files are copied to."""
        self.path = path
        self.aside = aside
        self.marks = Checksums(path / _MARKS)
        self.found: dict[int, Slot] = {}  # marks of an earlier rocklet process
        self._free: dict[str, SpoolFile] = {}
        self._used: set[SpoolFile] = set()
        self._journal = -1
        self._closed = False

    def file(self, name: str) -> SpoolFile:
        """Open the spool file of that name. OSError."""
        found = self._free.pop(name, None)
        if found is None:
            self._make()
            found = SpoolFile(self.path / name, self.marks, self.found.pop(checksums.digest(name), None), self.aside)
        self._used.add(found)
        return found

    def rest(self) -> None:
        """Close all descriptors until the next use."""
        self._used = {spool for spool in self._used if spool.is_open}
        for spool in (*self._used, *self._free.values()):
            spool.rest()
        self._close_journal()
        self.marks.close()

    def borrow(self) -> SpoolFile:
        """An unused spool file. OSError."""
        name = next((name for name in self._free if name.startswith(_OF_PROGRAM)), None)
        return self.file(name or f"{_OF_PROGRAM}{os.urandom(6).hex()}")

    def give_back(self, spool: SpoolFile) -> None:
        """Return a spool file that is no longer used."""
        self._used.discard(spool)
        if len(self._free) < _FREE and not spool.broken and not self._closed:
            self._free[spool.path.name] = spool
            return
        spool.remove()

    def journal(self) -> int:
        """The descriptor of the journal, for appending. OSError."""
        if self._journal < 0:
            self._make()
            self._journal = os.open(self.path / _JOURNAL, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return self._journal

    def make(self) -> None:
        """Create the folder with its marks, so that a later missing folder means that it was removed. OSError."""
        self._make()
        self.marks.begin()

    def read_marks(self) -> checksums.StoredChecksums:
        """Read the marks of an earlier rocklet process; later marks follow them. OSError."""
        found = checksums.read(self.path / _MARKS)
        self.marks.go_on(found)
        self.found = dict(found.slots)
        return found

    def read_journal(self) -> bytes:
        """Read the journal. OSError."""
        return (self.path / _JOURNAL).read_bytes()

    def set_aside(self, *names: str) -> None:
        """Copy damaged files to the folder for inspection."""
        for name in names:
            _copy_aside(self.path / name, self.aside)

    def replace_journal(self, data: bytes) -> None:
        """Replace the journal atomically. OSError."""
        beside = self.path / f".new-{_JOURNAL}"
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(data)
        os.rename(beside, self.path / _JOURNAL)
        self._close_journal()

    def sweep(self, used: set[str]) -> None:
        """Remove the spool files of programs of an earlier rocklet process, except those in `used`."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self.path):
                if name.startswith((_OF_PROGRAM, ".new-")) and name not in used and name not in self._free:
                    (self.path / name).unlink()
                    self.marks.drop(checksums.digest(name))

    def clear(self) -> bool:
        """Empty the folder for another sandbox; False when that fails."""
        try:
            for spool in self._free.values():
                spool.empty()
            self.marks.empty()
            self.found.clear()
            try:
                names = os.listdir(self.path)
            except FileNotFoundError:
                names = []
            for name in names:
                if name == _JOURNAL:
                    os.truncate(f"{self.path}/{name}", 0)
                elif name not in self._free and name != _MARKS:
                    (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s is not used again: %s", self.path, error)
            return False
        return not self._closed

    def close(self) -> None:
        """Close the files without change, for the next rocklet process."""
        self._closed = True
        for spool in self._free.values():
            spool.close()
        self._free.clear()
        self._used.clear()
        self._close_journal()
        self.marks.close()

    def remove(self) -> None:
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def _make(self) -> None:
        if self._closed:
            raise OSError(errno.EBADF, "the spool is closed")
        self.path.mkdir(parents=True, exist_ok=True)

    def _close_journal(self) -> None:
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1
