"""The recordings of sandboxes, in SQLite and in PostgreSQL: a row for each sandbox, and one for each entry.

An entry is written before its request is forwarded, and completed before its response is sent. After a crash it has
either a whole response or none.
"""

from __future__ import annotations

import sqlite3
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, Protocol

from rock import faults
from rock.protocol.recordings import MOST_BYTES, MOST_ENTRIES, RecordedEntry
from rock.protocol.sandbox import SandboxConfig
from rock.store.snapshots import Snapshots

_HEAD = "entries, bytes, source, repeats, repeated, diverged_at"
_ENTRY = ("number, at, finished_at, route, method, target, request, request_type, request_bytes, status, response, "
          "response_type, response_bytes, snapshot, exact, memory")  # fmt: skip
_MARKS = ", ".join("?" * 18)


class Head(NamedTuple):
    """A recording as a whole: as of RecordingInfo."""

    entries: int = 0
    bytes: int = 0
    source: str | None = None
    repeats: str | None = None
    repeated: int = 0
    diverged_at: int | None = None

    @property
    def full(self) -> bool:
        return self.entries >= MOST_ENTRIES or self.bytes >= MOST_BYTES

    @property
    def repeating(self) -> bool:
        return self.repeats is not None and self.diverged_at is None


class Recordings(Protocol):
    """Each method raises Unavailable or StorageFull when the database fails."""

    async def head(self, sandbox_id: str) -> Head | None: ...

    async def open(self, sandbox_id: str, head: Head) -> None:
        """Create or replace the row of a recording; its entries stay."""
        ...

    async def begin(self, sandbox_id: str, entry: RecordedEntry, key: str | None) -> int | None:
        """Add an entry; returns its number, or None if the recording is full."""
        ...

    async def admit(self, sandbox_id: str, entry: RecordedEntry, key: str | None,
                    find: bool) -> int | RecordedEntry | Head | None:
        """In one transaction: the entry with this key, if `find` is set; else the head of a recording that repeats
        another one; else `begin`."""
        ...

    async def finish(self, sandbox_id: str, entry: RecordedEntry) -> None:
        """Complete an entry with its response."""
        ...

    async def known(self, sandbox_id: str, key: str) -> RecordedEntry | None:
        """The entry of an idempotency key."""
        ...

    async def list(self, sandbox_id: str, after: int, limit: int) -> Sequence[RecordedEntry]:
        """Entries in order, those with a number above `after`."""
        ...

    async def unfinished(self, sandbox_id: str, since: float) -> int:
        """The number of entries without a response that began at that time or later."""
        ...

    async def advance(self, sandbox_id: str, repeated: int, diverged_at: int | None) -> None:
        """Set how many entries were repeated to a client."""
        ...

    async def remove(self, sandbox_id: str) -> None:
        """Idempotent."""
        ...

    async def prune(self) -> None:
        """Remove the recordings of sandboxes without a record."""
        ...


def _row(sandbox_id: str, entry: RecordedEntry, key: str | None) -> tuple[Any, ...]:
    request = None if entry.request is None else b64decode(entry.request)
    response = None if entry.response is None else b64decode(entry.response)
    return (sandbox_id, key, entry.number, entry.at, entry.finished_at, entry.route, entry.method, entry.target,
            request, entry.request_type, entry.request_bytes, entry.status, response, entry.response_type,
            entry.response_bytes, entry.snapshot, int(entry.exact), entry.memory)  # fmt: skip


def _loaded(row: Any) -> RecordedEntry:
    (number, at, finished_at, route, method, target, request, request_type, request_bytes, status, response,
     response_type, response_bytes, snapshot, exact, memory) = row  # fmt: skip
    return RecordedEntry(
        number=number, at=at, finished_at=finished_at, route=route, method=method, target=target,
        request=None if request is None else b64encode(request).decode(), request_type=request_type,
        request_bytes=request_bytes, status=status, response=None if response is None else b64encode(response).decode(),
        response_type=response_type, response_bytes=response_bytes, snapshot=snapshot, exact=bool(exact), memory=memory,
    )  # fmt: skip


def _sizes(entry: RecordedEntry) -> tuple[int, int]:
    """Stored bytes of request and response."""
    return (entry.request_bytes if entry.request is not None else 0,
            entry.response_bytes if entry.response is not None else 0)


def _changes(sandbox_id: str, entry: RecordedEntry) -> tuple[Any, ...]:
    """The values of `finish`, in the order of its statement."""
    row = _row(sandbox_id, entry, None)
    return (entry.request_bytes, *row[11:], entry.finished_at, sandbox_id, entry.number)


class SqliteRecordings:
    """do: runs a function on the open database in a transaction of its own, and converts errors. aside: the same in a
    thread, for reads."""

    def __init__(self, do: Callable[[Callable[[sqlite3.Connection], Any]], Any],
                 aside: Callable[[Callable[[sqlite3.Connection], Any]], Awaitable[Any]]) -> None:
        self._do = do
        self._aside = aside

    async def head(self, sandbox_id: str) -> Head | None:
        row = self._do(lambda db: db.execute(f"SELECT {_HEAD} FROM recording WHERE sandbox = ?",
                                             (sandbox_id,)).fetchone())  # fmt: skip
        return None if row is None else Head(*row)

    async def open(self, sandbox_id: str, head: Head) -> None:
        self._do(lambda db: db.execute(f"INSERT OR REPLACE INTO recording (sandbox, {_HEAD}) "
                                       "VALUES (?, ?, ?, ?, ?, ?, ?)", (sandbox_id, *head)))  # fmt: skip

    async def begin(self, sandbox_id: str, entry: RecordedEntry, key: str | None) -> int | None:
        await faults.point("store.recorded.begin")
        number: int | None = self._do(lambda db: self._begin(db, self._head(db, sandbox_id), sandbox_id, entry, key))
        return number

    async def admit(self, sandbox_id: str, entry: RecordedEntry, key: str | None,
                    find: bool) -> int | RecordedEntry | Head | None:
        def work(db: sqlite3.Connection) -> int | RecordedEntry | Head | None:
            if find and key is not None:
                row = db.execute(f"SELECT {_ENTRY} FROM recorded WHERE sandbox = ? AND key = ?",
                                 (sandbox_id, key)).fetchone()  # fmt: skip
                if row is not None:
                    return _loaded(row)
            head = self._head(db, sandbox_id)
            if head is not None and head.repeating:
                return head
            return self._begin(db, head, sandbox_id, entry, key)

        await faults.point("store.recorded.begin")
        found: int | RecordedEntry | Head | None = self._do(work)
        return found

    @staticmethod
    def _head(db: sqlite3.Connection, sandbox_id: str) -> Head | None:
        row = db.execute(f"SELECT {_HEAD} FROM recording WHERE sandbox = ?", (sandbox_id,)).fetchone()
        return None if row is None else Head(*row)

    @staticmethod
    def _begin(db: sqlite3.Connection, head: Head | None, sandbox_id: str, entry: RecordedEntry,
               key: str | None) -> int | None:
        if head is None or head.full:
            return None
        number = head.entries + 1
        added = entry.model_copy(update={"number": number})
        db.execute(f"INSERT INTO recorded (sandbox, key, {_ENTRY}) VALUES ({_MARKS})", _row(sandbox_id, added, key))
        db.execute("UPDATE recording SET entries = ?, bytes = bytes + ? WHERE sandbox = ?",
                   (number, sum(_sizes(added)), sandbox_id))  # fmt: skip
        return number

    async def finish(self, sandbox_id: str, entry: RecordedEntry) -> None:
        def work(db: sqlite3.Connection) -> None:
            db.execute("UPDATE recorded SET request_bytes = ?, status = ?, response = ?, response_type = ?, "
                       "response_bytes = ?, snapshot = ?, exact = ?, memory = ?, finished_at = ? "
                       "WHERE sandbox = ? AND number = ?", _changes(sandbox_id, entry))  # fmt: skip
            db.execute("UPDATE recording SET bytes = bytes + ? WHERE sandbox = ?", (_sizes(entry)[1], sandbox_id))

        await faults.point("store.recorded.finish")
        self._do(work)

    async def known(self, sandbox_id: str, key: str) -> RecordedEntry | None:
        row = self._do(lambda db: db.execute(f"SELECT {_ENTRY} FROM recorded WHERE sandbox = ? AND key = ?",
                                             (sandbox_id, key)).fetchone())  # fmt: skip
        return None if row is None else _loaded(row)

    async def list(self, sandbox_id: str, after: int, limit: int) -> Sequence[RecordedEntry]:
        rows: Sequence[Any] = await self._aside(lambda db: db.execute(
            f"SELECT {_ENTRY} FROM recorded WHERE sandbox = ? AND number > ? ORDER BY number LIMIT ?",
            (sandbox_id, after, limit)).fetchall())  # fmt: skip
        return [_loaded(row) for row in rows]

    async def unfinished(self, sandbox_id: str, since: float) -> int:
        text = "SELECT count(*) FROM recorded WHERE sandbox = ? AND finished_at IS NULL AND at >= ?"
        return int(self._do(lambda db: db.execute(text, (sandbox_id, since)).fetchone()[0]))

    async def advance(self, sandbox_id: str, repeated: int, diverged_at: int | None) -> None:
        self._do(lambda db: db.execute("UPDATE recording SET repeated = ?, diverged_at = ? WHERE sandbox = ?",
                                       (repeated, diverged_at, sandbox_id)))  # fmt: skip

    async def remove(self, sandbox_id: str) -> None:
        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM recorded WHERE sandbox = ?", (sandbox_id,))
            db.execute("DELETE FROM recording WHERE sandbox = ?", (sandbox_id,))

        self._do(work)

    async def prune(self) -> None:
        def work(db: sqlite3.Connection) -> None:
            gone = "sandbox IN (SELECT sandbox FROM recording WHERE sandbox NOT IN (SELECT id FROM sandbox))"
            db.execute(f"DELETE FROM recorded WHERE {gone}")
            db.execute(f"DELETE FROM recording WHERE {gone}")

        self._do(work)


class PostgresRecordings:
    """transaction: a connection in a transaction. encode: makes a text one that the database can store."""

    def __init__(self, transaction: Callable[[], AbstractAsyncContextManager[Any]],
                 encode: Callable[[str], str]) -> None:
        self._transaction = transaction
        self._encode = encode

    async def head(self, sandbox_id: str) -> Head | None:
        async with self._transaction() as db:
            row = await db.fetchrow(f"SELECT {_HEAD} FROM recording WHERE sandbox = $1", self._encode(sandbox_id))
        return None if row is None else Head(*row)

    async def open(self, sandbox_id: str, head: Head) -> None:
        async with self._transaction() as db:
            await db.execute(
                f"INSERT INTO recording (sandbox, {_HEAD}) VALUES ($1, $2, $3, $4, $5, $6, $7) "
                "ON CONFLICT (sandbox) DO UPDATE SET entries = excluded.entries, bytes = excluded.bytes, "
                "source = excluded.source, repeats = excluded.repeats, "
                "repeated = excluded.repeated, diverged_at = excluded.diverged_at", self._encode(sandbox_id), *head)

    async def begin(self, sandbox_id: str, entry: RecordedEntry, key: str | None) -> int | None:
        async with self._transaction() as db:
            return await self._begin(db, await self._head(db, sandbox_id), sandbox_id, entry, key)

    async def admit(self, sandbox_id: str, entry: RecordedEntry, key: str | None,
                    find: bool) -> int | RecordedEntry | Head | None:
        async with self._transaction() as db:
            if find and key is not None:
                row = await db.fetchrow(f"SELECT {_ENTRY} FROM recorded WHERE sandbox = $1 AND key = $2", sandbox_id,
                                        self._encode(key))  # fmt: skip
                if row is not None:
                    return _loaded(row)
            head = await self._head(db, sandbox_id)
            if head is not None and head.repeating:
                return head
            return await self._begin(db, head, sandbox_id, entry, key)

    @staticmethod
    async def _head(db: Any, sandbox_id: str) -> Head | None:
        row = await db.fetchrow(f"SELECT {_HEAD} FROM recording WHERE sandbox = $1 FOR UPDATE", sandbox_id)
        return None if row is None else Head(*row)

    async def _begin(self, db: Any, head: Head | None, sandbox_id: str, entry: RecordedEntry,
                     key: str | None) -> int | None:
        if head is None or head.full:
            return None
        number = head.entries + 1
        added = entry.model_copy(update={"number": number, "target": self._encode(entry.target),
                                         "request_type": self._encode(entry.request_type)})  # fmt: skip
        values = _row(sandbox_id, added, None if key is None else self._encode(key))
        marks = ", ".join(f"${place + 1}" for place in range(len(values)))
        await db.execute(f"INSERT INTO recorded (sandbox, key, {_ENTRY}) VALUES ({marks})", *values)
        await db.execute("UPDATE recording SET entries = $2, bytes = bytes + $3 WHERE sandbox = $1", sandbox_id,
                         number, sum(_sizes(added)))  # fmt: skip
        return number

    async def finish(self, sandbox_id: str, entry: RecordedEntry) -> None:
        async with self._transaction() as db:
            await db.execute(
                "UPDATE recorded SET request_bytes = $1, status = $2, response = $3, response_type = $4, "
                "response_bytes = $5, snapshot = $6, exact = $7, memory = $8, finished_at = $9 "
                "WHERE sandbox = $10 AND number = $11", *_changes(sandbox_id, entry))
            await db.execute("UPDATE recording SET bytes = bytes + $2 WHERE sandbox = $1", sandbox_id, _sizes(entry)[1])

    async def known(self, sandbox_id: str, key: str) -> RecordedEntry | None:
        async with self._transaction() as db:
            row = await db.fetchrow(f"SELECT {_ENTRY} FROM recorded WHERE sandbox = $1 AND key = $2", sandbox_id,
                                    self._encode(key))  # fmt: skip
        return None if row is None else _loaded(row)

    async def list(self, sandbox_id: str, after: int, limit: int) -> Sequence[RecordedEntry]:
        async with self._transaction() as db:
            rows = await db.fetch(f"SELECT {_ENTRY} FROM recorded WHERE sandbox = $1 AND number > $2 "
                                  "ORDER BY number LIMIT $3", sandbox_id, after, limit)  # fmt: skip
        return [_loaded(row) for row in rows]

    async def unfinished(self, sandbox_id: str, since: float) -> int:
        async with self._transaction() as db:
            return int(await db.fetchval("SELECT count(*) FROM recorded WHERE sandbox = $1 AND finished_at IS NULL AND "
                                         "at >= $2", sandbox_id, since))  # fmt: skip

    async def advance(self, sandbox_id: str, repeated: int, diverged_at: int | None) -> None:
        async with self._transaction() as db:
            await db.execute("UPDATE recording SET repeated = $2, diverged_at = $3 WHERE sandbox = $1", sandbox_id,
                             repeated, diverged_at)  # fmt: skip

    async def remove(self, sandbox_id: str) -> None:
        async with self._transaction() as db:
            await db.execute("DELETE FROM recorded WHERE sandbox = $1", sandbox_id)
            await db.execute("DELETE FROM recording WHERE sandbox = $1", sandbox_id)

    async def prune(self) -> None:
        gone = "sandbox IN (SELECT sandbox FROM recording WHERE sandbox NOT IN (SELECT id FROM sandbox))"
        async with self._transaction() as db:
            await db.execute(f"DELETE FROM recorded WHERE {gone}")
            await db.execute(f"DELETE FROM recording WHERE {gone}")


class _Recorded(Protocol):
    """A record of a sandbox."""

    @property
    def id(self) -> str: ...

    @property
    def config(self) -> SandboxConfig: ...


class _Store(Protocol):
    @property
    def recordings(self) -> Recordings: ...

    @property
    def snapshots(self) -> Snapshots: ...


async def opened(store: _Store, record: _Recorded) -> Head:
    """The row of the recording of a sandbox, which is created with the first use."""
    found = await store.recordings.head(record.id)
    if found is None:
        source = None
        if record.config.snapshot is not None:
            row = await store.snapshots.find(None, record.config.snapshot)
            source = row.sandbox_id if row is not None else None
        found = Head(source=source)
        await store.recordings.open(record.id, found)
    return found
