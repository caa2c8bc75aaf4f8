"""Sessions of the web page and the audit log, in SQLite and in PostgreSQL.

A session is stored by the SHA-256 of its cookie, with the SHA-256 of the API key that opened it: a session has no
rights of its own. A one-time link is a session row of kind "link", which its first use removes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from rock.protocol.keys import AuditEntry

Kind = Literal["session", "link"]
_COLUMNS = "at, tenant, key_id, action, target, status, request_id, address"
_FILTERS = ("tenant", "key_id", "action", "target")


@dataclass(frozen=True, slots=True)
class Session:
    """key: SHA-256 of the API key in hex; "" on a server without keys. until: seconds since the epoch."""

    digest: str
    kind: Kind
    key: str
    until: float


@dataclass(frozen=True)
class AuditQuery:
    """Entries of the audit log, newest first. fields: equality on columns. before: the `next` of the previous page;
    since, until: seconds since the epoch."""

    fields: dict[str, str] = field(default_factory=dict)
    since: float | None = None
    until: float | None = None
    before: int | None = None
    limit: int = 500


class AccessStore(Protocol):
    """Each method raises Unavailable or StorageFull when the database fails."""

    async def add_session(self, session: Session, now: float) -> None:
        """Store a session, and remove expired ones."""
        ...

    async def session(self, digest: str, kind: Kind, now: float) -> Session | None:
        """A session that has not expired."""
        ...

    async def take_session(self, digest: str, kind: Kind) -> Session | None:
        """Remove a session and return it; of concurrent calls only one receives it."""
        ...

    async def add_entries(self, entries: Sequence[AuditEntry]) -> None:
        """Append to the audit log, in one transaction."""
        ...

    async def entries(self, query: AuditQuery) -> Sequence[AuditEntry]: ...

    async def prune_entries(self, before: float) -> int:
        """Delete entries older than that time; returns their number."""
        ...


def _row(entry: AuditEntry) -> tuple[Any, ...]:
    return (entry.at, entry.tenant, entry.key_id, entry.action, entry.target, entry.status, entry.request_id,
            entry.address)  # fmt: skip


def _entry(row: Any) -> AuditEntry:
    number, at, tenant, key_id, action, target, status, request_id, address = row
    return AuditEntry(number=number, at=at, tenant=tenant, key_id=key_id, action=action, target=target, status=status,
                      request_id=request_id, address=address)  # fmt: skip


def _conditions(query: AuditQuery, mark: Callable[[int], str]) -> tuple[str, list[Any]]:
    """The WHERE clause and its values. mark: the placeholder of value N, from 1."""
    parts, values = ["1 = 1"], []
    wanted: list[tuple[str, Any]] = []
    for name, value in query.fields.items():
        if name not in _FILTERS:
            raise ValueError(f"cannot filter the audit log by {name!r}")
        wanted.append((f"{name} =", value))
    for text, limit in (("at >=", query.since), ("at <", query.until), ("number <", query.before)):
        if limit is not None:
            wanted.append((text, limit))
    for text, value in wanted:
        values.append(value)
        parts.append(f"{text} {mark(len(values))}")
    values.append(query.limit)
    return f"{' AND '.join(parts)} ORDER BY number DESC LIMIT {mark(len(values))}", values


class SqliteAccess:
    """do: runs a function on the open database in a transaction of its own, and converts errors. aside: the same for
    reads, in a thread."""

    def __init__(self, do: Callable[[Callable[[sqlite3.Connection], Any]], Any],
                 aside: Callable[[Callable[[sqlite3.Connection], Any]], Any]) -> None:
        self._do = do
        self._aside = aside

    async def add_session(self, session: Session, now: float) -> None:
        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM page_session WHERE until < ?", (now,))
            db.execute("INSERT INTO page_session (digest, kind, key, until) VALUES (?, ?, ?, ?)",
                       (session.digest, session.kind, session.key, session.until))

        self._do(work)

    async def session(self, digest: str, kind: Kind, now: float) -> Session | None:
        text = "SELECT digest, kind, key, until FROM page_session WHERE digest = ? AND kind = ? AND until >= ?"
        row = self._do(lambda db: db.execute(text, (digest, kind, now)).fetchone())
        return None if row is None else Session(*row)

    async def take_session(self, digest: str, kind: Kind) -> Session | None:
        text = "DELETE FROM page_session WHERE digest = ? AND kind = ? RETURNING digest, kind, key, until"
        row = self._do(lambda db: db.execute(text, (digest, kind)).fetchone())
        return None if row is None else Session(*row)

    async def add_entries(self, entries: Sequence[AuditEntry]) -> None:
        text = f"INSERT INTO audit ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        self._do(lambda db: db.executemany(text, [_row(entry) for entry in entries]))

    async def entries(self, query: AuditQuery) -> Sequence[AuditEntry]:
        where, values = _conditions(query, lambda _: "?")
        text = f"SELECT number, {_COLUMNS} FROM audit WHERE {where}"
        return [_entry(row) for row in await self._aside(lambda db: db.execute(text, values).fetchall())]

    async def prune_entries(self, before: float) -> int:
        removed: int = self._do(lambda db: db.execute("DELETE FROM audit WHERE at < ?", (before,)).rowcount)
        return removed


class PostgresAccess:
    """transaction: opens a connection in a transaction of its own. encode: makes a text one that the database can
    store."""

    def __init__(self, transaction: Callable[[], AbstractAsyncContextManager[Any]],
                 encode: Callable[[str], str]) -> None:
        self._transaction = transaction
        self._encode = encode

    async def add_session(self, session: Session, now: float) -> None:
        async with self._transaction() as db:
            await db.execute("DELETE FROM page_session WHERE until < $1", now)
            await db.execute("INSERT INTO page_session (digest, kind, key, until) VALUES ($1, $2, $3, $4)",
                             session.digest, session.kind, session.key, session.until)

    async def session(self, digest: str, kind: Kind, now: float) -> Session | None:
        text = "SELECT digest, kind, key, until FROM page_session WHERE digest = $1 AND kind = $2 AND until >= $3"
        async with self._transaction() as db:
            row = await db.fetchrow(text, digest, kind, now)
        return None if row is None else Session(*row)

    async def take_session(self, digest: str, kind: Kind) -> Session | None:
        text = "DELETE FROM page_session WHERE digest = $1 AND kind = $2 RETURNING digest, kind, key, until"
        async with self._transaction() as db:
            row = await db.fetchrow(text, digest, kind)
        return None if row is None else Session(*row)

    async def add_entries(self, entries: Sequence[AuditEntry]) -> None:
        text = f"INSERT INTO audit ({_COLUMNS}) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)"
        rows = [tuple(self._encode(value) if isinstance(value, str) else value for value in _row(entry))
                for entry in entries]  # fmt: skip
        async with self._transaction() as db:
            await db.executemany(text, rows)

    async def entries(self, query: AuditQuery) -> Sequence[AuditEntry]:
        where, values = _conditions(query, lambda number: f"${number}")
        async with self._transaction() as db:
            rows = await db.fetch(f"SELECT number, {_COLUMNS} FROM audit WHERE {where}", *values)
        return [_entry(row) for row in rows]

    async def prune_entries(self, before: float) -> int:
        async with self._transaction() as db:
            done = await db.execute("DELETE FROM audit WHERE at < $1", before)
        return int(done.rpartition(" ")[2])
