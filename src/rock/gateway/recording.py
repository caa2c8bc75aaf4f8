"""The recording of a run: an append-only log of checksummed records, in which a body stores what its base lacks.

    folder/runs/ID/run.json   spec, secret-free state and counts; replaced atomically
    folder/runs/ID/calls      magic, then records: length (4 bytes), CRC-32 (4 bytes), JSON

A record is written with one system call, before its effect is visible outside. A crash (kill -9) can leave one torn
record at the end, which the next start moves to calls.torn-N. Records survive a crash of the server. durability.py
syncs them, so that they also survive a crash of the machine.

A request of an agent repeats all earlier messages and the definitions of its tools. `Deltas` stores a body relative to
an earlier one: for each field whether it is equal, or how many leading elements of a list are.
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson

from rock.errors import InvalidConfig, StorageFull, Unavailable
from rock.host.atomic_file import FULL

log = logging.getLogger("rock.gateway")

_MAGIC = b"ROCKRUN1"
_HEAD = struct.Struct(">II")
MAX_RECORD = 256 << 20  # bytes
_READ_AT_ONCE = 1 << 20
_FINGERPRINTS = 64  # bodies of a run that a later one can refer to
_DIGEST = 12  # bytes


class CallLog:
    """The log of one run. `open` returns it with the records of an earlier server process."""

    def __init__(self, path: Path, fd: int, size: int) -> None:
        self._path = path
        self._fd = fd
        self.size = size

    @classmethod
    def open(cls, path: Path) -> tuple[CallLog, list[tuple[int, dict[str, Any]]], bool]:
        """The log, its records with their offsets, and whether a torn or damaged end was set aside. OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size < len(_MAGIC):
                os.ftruncate(fd, 0)
                os.pwrite(fd, _MAGIC, 0)
                return cls(path, fd, len(_MAGIC)), [], size > 0
            records, end = [], len(_MAGIC)
            for offset, record, next_offset in _records(fd, size):
                records.append((offset, record))
                end = next_offset
            torn = end < size
            if torn:
                _set_aside(path, fd, end, size)
            return cls(path, fd, end), records, torn
        except BaseException:
            os.close(fd)
            raise

    def append(self, record: Mapping[str, Any]) -> int:
        """Write a record; returns its offset. StorageFull, Unavailable, InvalidConfig: nothing was written."""
        if self._fd < 0:
            raise Unavailable("the recording of the run is closed", hint="retry once the server has restarted")
        try:
            payload = orjson.dumps(record)
        except TypeError as error:
            raise InvalidConfig(f"a call has no JSON form: {error}", hint="send valid Unicode text") from None
        data = _HEAD.pack(len(payload), zlib.crc32(payload)) + payload
        offset, written = self.size, 0
        try:
            while written < len(data):
                written += os.pwrite(self._fd, data[written:] if written else data, offset + written)
        except OSError as error:
            if written:
                os.ftruncate(self._fd, offset)
            message = f"a call could not be recorded: {os.strerror(error.errno or 0)}"
            if error.errno in FULL:
                raise StorageFull(message, hint="free some space of the server's disk and try again") from None
            raise Unavailable(message, hint="check the disk of the server and try again") from None
        self.size = offset + len(data)
        return offset

    def read(self, offset: int) -> dict[str, Any]:
        """The record at an offset. Unavailable when the disk does not return it."""
        try:
            head = os.pread(self._fd, _HEAD.size, offset)
            length, crc = _HEAD.unpack(head)
            payload = os.pread(self._fd, length, offset + _HEAD.size) if length <= MAX_RECORD else b""
        except (OSError, struct.error) as error:
            raise Unavailable(f"a recorded call cannot be read: {error}", hint="check the server's disk") from None
        if len(payload) != length or zlib.crc32(payload) != crc:
            raise Unavailable("a recorded call is damaged on the server's disk",
                              hint="the other calls of the run are readable; check the disk")
        found = orjson.loads(payload)
        assert isinstance(found, dict)
        return found

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _records(fd: int, size: int) -> Iterator[tuple[int, dict[str, Any], int]]:
    """The valid records from the start on: offset, record, offset of the next one."""
    if os.pread(fd, len(_MAGIC), 0) != _MAGIC:
        return
    buffer, start, at = bytearray(), len(_MAGIC), len(_MAGIC)
    while True:
        while len(buffer) < _HEAD.size or len(buffer) < _HEAD.size + _HEAD.unpack_from(buffer)[0]:
            if len(buffer) >= _HEAD.size and _HEAD.unpack_from(buffer)[0] > min(MAX_RECORD, size):
                return
            more = os.pread(fd, _READ_AT_ONCE, at)
            if not more:
                return
            at += len(more)
            buffer += more
        length, crc = _HEAD.unpack_from(buffer)
        end = _HEAD.size + length
        payload = bytes(buffer[_HEAD.size : end])
        if zlib.crc32(payload) != crc:
            return
        try:
            record = orjson.loads(payload)
        except orjson.JSONDecodeError:
            return
        if not isinstance(record, dict):
            return
        del buffer[:end]
        yield start, record, start + end
        start += end


def damage(path: Path) -> str | None:
    """What is damaged in a log, which is not changed; None: it is intact. OSError."""
    with path.open("rb") as file:
        size, end, count = os.fstat(file.fileno()).st_size, len(_MAGIC), 0
        if not size:
            return None
        for _, _, behind in _records(file.fileno(), size):
            end, count = behind, count + 1
    if end >= size:
        return None
    return f"{size - end} of {size} bytes, after {count} records, are no complete record"


def _set_aside(path: Path, fd: int, end: int, size: int) -> None:
    """Move the invalid end of a log to a file of its own, and truncate the log."""
    number = 1
    while (beside := path.with_name(f"{path.name}.torn-{number}")).exists():
        number += 1
    log.warning("%s: the last %d bytes are no complete record; they are in %s", path, size - end, beside.name)
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        at = end
        while data := os.pread(fd, _READ_AT_ONCE, at):
            file.write(data)
            at += len(data)
    os.ftruncate(fd, end)
    if end < len(_MAGIC):
        os.pwrite(fd, _MAGIC, 0)


# ---- deltas ----

Fingerprint = dict[str, bytes | tuple[bytes, ...]]


def digest(value: object) -> bytes:
    """A short hash of a JSON value; equal values of equal key order have the same."""
    try:
        data = orjson.dumps(value)
    except TypeError as error:
        raise InvalidConfig(f"a call has no JSON form: {error}", hint="send valid Unicode text") from None
    return blake2b(data, digest_size=_DIGEST).digest()


def _fingerprint(body: Mapping[str, Any]) -> Fingerprint:
    return {
        key: tuple(map(digest, value)) if isinstance(value, list) else digest(value) for key, value in body.items()
    }


class Deltas:
    """Packs the bodies of one run, numbered by call, and unpacks them. fetch: the packed body of a number."""

    def __init__(self, fetch: Callable[[int], dict[str, Any]]) -> None:
        self._fetch = fetch
        self._known: OrderedDict[int, Fingerprint] = OrderedDict()

    def pack(self, number: int, body: Mapping[str, Any], parent: int | None = None) -> dict[str, Any]:
        """The body without what its parent has, or without a parent the latest body."""
        mine = _fingerprint(body)
        base = parent if parent in self._known else next(reversed(self._known), None)
        packed = dict(body) if base is None else self._without(base, mine, body)
        self._known[number] = mine
        while len(self._known) > _FINGERPRINTS:
            self._known.popitem(last=False)
        return packed if base is not None else {"set": packed}

    def _without(self, base: int, mine: Fingerprint, body: Mapping[str, Any]) -> dict[str, Any]:
        theirs = self._known[base]
        same: list[str] = []
        heads: dict[str, int] = {}
        new: dict[str, Any] = {}
        for key, value in body.items():
            if theirs.get(key) == mine[key]:
                same.append(key)
                continue
            ours, other = mine[key], theirs.get(key)
            count = _shared(ours, other) if isinstance(ours, tuple) and isinstance(other, tuple) else 0
            if count and isinstance(ours, tuple) and isinstance(other, tuple):
                heads[key] = count
                mine[key] = other[:count] + ours[count:]  # equal hashes are one object in memory
            new[key] = value[count:] if count else value
        return {"base": base, "same": same, "heads": heads, "set": new}

    def note(self, number: int, body: Mapping[str, Any]) -> None:
        """A body that was unpacked after a restart: later ones may refer to it."""
        self._known[number] = _fingerprint(body)

    def forget(self) -> None:
        """Release the memory; bodies are still unpacked."""
        self._known.clear()

    def unpack(self, number: int, cache: dict[int, dict[str, Any]] | None = None) -> dict[str, Any]:
        """The body of a call. cache: bodies that were unpacked before, by number; the result is added."""
        cache = {} if cache is None else cache
        chain: list[tuple[int, dict[str, Any]]] = []
        at: int | None = number
        while at is not None and at not in cache:
            packed = self._fetch(at)
            chain.append((at, packed))
            base = packed.get("base")
            at = int(base) if base is not None else None
        for which, packed in reversed(chain):
            base = packed.get("base")
            below = cache[int(base)] if base is not None else {}
            body = {key: below[key] for key in packed.get("same", ())}
            heads = packed.get("heads", {})
            for key, value in packed["set"].items():
                body[key] = [*below[key][: heads[key]], *value] if key in heads else value
            cache[which] = body
        return cache[number]


def _shared(ours: tuple[bytes, ...], other: tuple[bytes, ...]) -> int:
    count = 0
    for left, right in zip(ours, other, strict=False):
        if left != right:
            break
        count += 1
    return count
