"""Checksums of the files of a spool folder, by which a restarted rocklet detects damage.

The checksums are in one file beside the files that they describe. It has two parts, both written by single `pwrite`
calls that a kill -9 cannot cut:

    entries   a ring: the size and checksum of the whole journal after each append, and the digest of the request that
              began, so that its key is known when the line itself is damaged
    slots     one for each spool file: which bytes of it belong to the running command, and their checksum

A file is written first and its mark second; a request continues only after both. No request therefore relies on bytes
after the marked ones: a partial line there is ignored. Any other difference from the mark is damage.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger("rock.node")

BEGAN, FORGOTTEN, OTHER = 1, 2, 3  # the kind of an append: a request began, was forgotten, or anything else

_ENTRY = struct.Struct("<IBxxxQQI")  # number, what, size, digest, checksum of the journal; its own checksum follows
_SLOT = struct.Struct("<QqqqI")  # digest of the name, start, end, lost, checksum; its own checksum follows
_OWN = struct.Struct("<I")
_LENGTH = _ENTRY.size + _OWN.size
_SLOT_LENGTH = 64  # a slot never crosses a page
ENTRIES = 256  # number of requests that are known without the journal
_SLOTS_AT = ENTRIES * _LENGTH


def digest(text: str) -> int:
    """A 64-bit digest of a request or a file name."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2s(data, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Slot:
    """The mark of a spool file: bytes [start, end) are the command's and have this checksum; `lost` later bytes were
    dropped."""

    start: int
    end: int
    lost: int
    checksum: int


@dataclass
class StoredChecksums:
    """The marks of an earlier rocklet process. journal: the last (size, checksum); None when no append is known."""

    journal: tuple[int, int] | None = None
    began: set[int] = field(default_factory=set)
    slots: dict[int, Slot] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)  # places of slots, by digest
    exists: bool = False
    number: int = 0
    damaged: int = 0  # number of entries and slots whose own checksum is wrong


def read(path: Path) -> StoredChecksums:
    """Read the marks. OSError, but not for a file that does not exist."""
    found = StoredChecksums()
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return found
    found.exists = bool(data)
    entries = []
    for at in range(0, len(data[:_SLOTS_AT].rstrip(b"\0")), _LENGTH):  # most of the places are empty
        raw = data[at:at + _LENGTH]
        if not any(raw):
            continue
        if len(raw) < _LENGTH or _OWN.unpack(raw[_ENTRY.size:])[0] != zlib.crc32(raw[:_ENTRY.size]):
            found.damaged += 1
            continue
        entries.append(_ENTRY.unpack(raw[:_ENTRY.size]))
    entries.sort()
    for number, what, size, request, checksum in entries:
        found.number, found.journal = number, (size, checksum)
        if what == BEGAN:
            found.began.add(request)
        elif what == FORGOTTEN:
            found.began.discard(request)
    found.damaged = max(found.damaged, _missing([entry[0] for entry in entries]))
    for at in range(_SLOTS_AT, len(data.rstrip(b"\0")), _SLOT_LENGTH):
        raw = data[at:at + _SLOT.size + _OWN.size]
        if not any(raw):
            continue
        if len(raw) < _SLOT.size + _OWN.size or _OWN.unpack(raw[_SLOT.size:])[0] != zlib.crc32(raw[:_SLOT.size]):
            found.damaged += 1
            continue
        name, start, end, lost, checksum = _SLOT.unpack(raw[:_SLOT.size])
        found.slots[name] = Slot(start, end, lost, checksum)
        found.places[name] = (at - _SLOTS_AT) // _SLOT_LENGTH
    return found


def _missing(numbers: list[int]) -> int:
    """The number of missing entries: their place in the ring is empty although later entries exist."""
    if not numbers:
        return 0
    return min(numbers[-1], ENTRIES) - len(numbers)


class Checksums:
    """The file of marks of one spool folder, open for writing. A write error is logged once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        self._number = 0
        self._places: dict[int, int] = {}
        self._told = False

    def go_on(self, found: StoredChecksums) -> None:
        """Continue after the marks of an earlier rocklet process."""
        self._number, self._places = found.number, dict(found.places)

    def _open(self) -> None:
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def begin(self) -> None:
        """Record that there is no journal yet: a file of marks that is empty later was damaged."""
        if not self._number:
            self.entry(OTHER, 0, 0, 0)

    def entry(self, what: int, request: int, size: int, checksum: int) -> None:
        """Record the size and checksum of the journal after an append."""
        self._number += 1
        data = _ENTRY.pack(self._number & 0xFFFFFFFF, what, size, request, checksum)
        self._write(data + _OWN.pack(zlib.crc32(data)), (self._number - 1) % ENTRIES * _LENGTH)

    def slot(self, name: int, slot: Slot) -> None:
        """Record the bytes of a spool file that belong to the running command."""
        place = self._places.get(name)
        if place is None:
            used = set(self._places.values())
            place = self._places[name] = next(n for n in range(len(used) + 1) if n not in used)
        data = _SLOT.pack(name, slot.start, slot.end, slot.lost, slot.checksum)
        self._write(data + _OWN.pack(zlib.crc32(data)), _SLOTS_AT + place * _SLOT_LENGTH)

    def drop(self, name: int) -> None:
        """Drop the slot of a spool file that was removed, or that restarts for another command."""
        place = self._places.pop(name, None)
        if place is not None:
            self._write(bytes(_SLOT.size + _OWN.size), _SLOTS_AT + place * _SLOT_LENGTH)

    def _write(self, data: bytes, at: int) -> None:
        try:
            self._open()
            os.pwrite(self._fd, data, at)
        except OSError as error:
            if not self._told:
                log.warning("%s: %s; damage to the files beside it may not be seen", self.path, error)
            self._told = True

    def empty(self) -> None:
        """Reset the file for another sandbox. OSError."""
        self._number, self._told = 0, False
        self._places.clear()
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)
        else:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the descriptor until the next write."""
        with contextlib.suppress(OSError):
            if self._fd >= 0:
                os.close(self._fd)
        self._fd = -1
