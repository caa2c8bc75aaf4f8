"""The snapshots table, in SQLite and in PostgreSQL.

A row exists before the files of its snapshot, and until they are removed: files without a row are left over.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from pydantic import ValidationError

from rock import faults
from rock.errors import Conflict, NotFound, QuotaExceeded
from rock.protocol.snapshots import SnapshotInfo

MOST_OF_TENANT = 10_000
_COLUMNS = "id, tenant, name, worker, sandbox, state, used_at, ttl, info"
_ORDER = "ORDER BY created_at, id"


class Snapshots(Protocol):
    """The snapshots of all tenants. Each method raises Unavailable or StorageFull when the database fails."""

    async def add(self, info: SnapshotInfo, key: str | None = None) -> SnapshotInfo:
        """Add a snapshot; returns the one that the tenant created with this idempotency key, if there is one. Conflict
        when the name is taken, QuotaExceeded."""
        ...

    async def find(self, tenant: str | None, name: str) -> SnapshotInfo | None:
        """By id or name; None is all tenants, by id alone."""
        ...

    async def list(self, tenant: str | None = None, worker: str | None = None,
                   sandbox: str | None = None) -> Sequence[SnapshotInfo]:
        """The snapshots of a tenant, a worker and a sandbox, oldest first; None is all."""
        ...

    async def save(self, info: SnapshotInfo) -> None:
        """Replace state, times and report; no effect on a removed snapshot."""
        ...

    async def use(self, snapshot_id: str, now: float) -> None:
        """Note a use."""
        ...

    async def expired(self, now: float) -> Sequence[SnapshotInfo]:
        """Complete snapshots whose retention has ended, unless they are in use."""
        ...

    async def remove(self, snapshot_id: str) -> None: ...


def name_taken(name: str) -> Conflict:
    return Conflict(f"there is a snapshot {name} already", hint="choose another name, or delete that snapshot")


def unknown(name: str) -> NotFound:
    return NotFound(f"there is no snapshot {name}", hint="its retention may have ended; `rock snapshot ls` lists them")


def _too_many() -> QuotaExceeded:
    return QuotaExceeded(f"there are {MOST_OF_TENANT} snapshots: a tenant has at most so many",
                         hint="delete some, or give them a shorter ttl_seconds")


def _row(info: SnapshotInfo) -> tuple[Any, ...]:
    return (info.snapshot_id, info.tenant, info.name, info.worker, info.sandbox_id, info.state, info.used_at,
            info.ttl_seconds, info.model_dump_json())  # fmt: skip


def _loaded(row: Any) -> SnapshotInfo:
    _, _, _, _, _, state, used_at, _, text = row
    try:
        info = SnapshotInfo.model_validate_json(text)
    except ValidationError:  # before schema 9, PostgreSQL's rows had each backslash twice
        info = SnapshotInfo.model_validate_json(text.replace("\\\\", "\\"))
    return info.model_copy(update={"state": state, "used_at": used_at})


class SqliteSnapshots:
    """do: runs a function on the open database in a transaction of its own, and converts errors."""

    def __init__(self, do: Callable[[Callable[[sqlite3.Connection], Any]], Any]) -> None:
        self._do = do

    async def add(self, info: SnapshotInfo, key: str | None = None) -> SnapshotInfo:
        def work(db: sqlite3.Connection) -> SnapshotInfo:
            known = _one(db, "tenant = ? AND idempotency_key = ?", info.tenant, key) if key is not None else None
            if known is not None:
                return known
            if info.name is not None and _one(db, "tenant = ? AND name = ?", info.tenant, info.name) is not None:
                raise name_taken(info.name)
            count = db.execute("SELECT count(*) FROM snapshot WHERE tenant = ?", (info.tenant,)).fetchone()[0]
            if count >= MOST_OF_TENANT:
                raise _too_many()
            db.execute(f"INSERT INTO snapshot ({_COLUMNS}, created_at, idempotency_key) "
                       "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*_row(info), info.created_at, key))  # fmt: skip
            return info

        await faults.point("store.snapshot.add")
        made: SnapshotInfo = self._do(work)
        return made

    async def find(self, tenant: str | None, name: str) -> SnapshotInfo | None:
        def work(db: sqlite3.Connection) -> SnapshotInfo | None:
            if tenant is None:
                return _one(db, "id = ?", name)
            return _one(db, "tenant = ? AND id = ?", tenant, name) or _one(db, "tenant = ? AND name = ?", tenant, name)

        found: SnapshotInfo | None = self._do(work)
        return found

    async def list(self, tenant: str | None = None, worker: str | None = None,
                   sandbox: str | None = None) -> Sequence[SnapshotInfo]:
        text = (f"SELECT {_COLUMNS} FROM snapshot WHERE (:tenant IS NULL OR tenant = :tenant) AND "
                f"(:worker IS NULL OR worker = :worker) AND (:sandbox IS NULL OR sandbox = :sandbox) {_ORDER}")
        values = {"tenant": tenant, "worker": worker, "sandbox": sandbox}
        rows: Sequence[Any] = self._do(lambda db: db.execute(text, values).fetchall())
        return [_loaded(row) for row in rows]

    async def save(self, info: SnapshotInfo) -> None:
        values = (info.state, info.used_at, info.ttl_seconds, info.model_dump_json(), info.snapshot_id)
        text = "UPDATE snapshot SET state = ?, used_at = ?, ttl = ?, info = ? WHERE id = ?"
        self._do(lambda db: db.execute(text, values))

    async def use(self, snapshot_id: str, now: float) -> None:
        text = "UPDATE snapshot SET used_at = ? WHERE id = ? AND used_at < ?"
        self._do(lambda db: db.execute(text, (now, snapshot_id, now)))

    async def expired(self, now: float) -> Sequence[SnapshotInfo]:
        text = f"SELECT {_COLUMNS} FROM snapshot WHERE state = 'ready' AND used_at + ttl < ? {_ORDER} LIMIT 1000"
        rows: Sequence[Any] = self._do(lambda db: db.execute(text, (now,)).fetchall())
        return [_loaded(row) for row in rows]

    async def remove(self, snapshot_id: str) -> None:
        self._do(lambda db: db.execute("DELETE FROM snapshot WHERE id = ?", (snapshot_id,)))


def _one(db: sqlite3.Connection, where: str, *values: str) -> SnapshotInfo | None:
    row = db.execute(f"SELECT {_COLUMNS} FROM snapshot WHERE {where}", values).fetchone()
    return None if row is None else _loaded(row)


_LOCK = 0x534E4150  # advisory lock of new snapshots, in the database


class PostgresSnapshots:
    """transaction: opens a connection in a transaction of its own. encode: makes a text one that the database can
    store."""

    def __init__(self, transaction: Callable[[], AbstractAsyncContextManager[Any]],
                 encode: Callable[[str], str]) -> None:
        self._transaction = transaction
        self._encode = encode

    async def add(self, info: SnapshotInfo, key: str | None = None) -> SnapshotInfo:
        stored = None if key is None else self._encode(key)
        async with self._transaction() as db:
            # Other checkpoints of the tenant wait for this transaction.
            await db.execute("SELECT pg_advisory_xact_lock($1, hashtext($2))", _LOCK, info.tenant)
            if stored is not None:
                row = await db.fetchrow(
                    f"SELECT {_COLUMNS} FROM snapshot WHERE tenant = $1 AND idempotency_key = $2", info.tenant, stored
                )
                if row is not None:
                    return _loaded(row)
            if info.name is not None and await db.fetchval(
                "SELECT id FROM snapshot WHERE tenant = $1 AND name = $2", info.tenant, info.name
            ):
                raise name_taken(info.name)
            if await db.fetchval("SELECT count(*) FROM snapshot WHERE tenant = $1", info.tenant) >= MOST_OF_TENANT:
                raise _too_many()
            await db.execute(
                f"INSERT INTO snapshot ({_COLUMNS}, created_at, idempotency_key) "
                "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
                *_row(info), info.created_at, stored,
            )  # fmt: skip
            return info

    async def find(self, tenant: str | None, name: str) -> SnapshotInfo | None:
        text = (f"SELECT {_COLUMNS} FROM snapshot WHERE CASE WHEN $1::text IS NULL THEN id = $2 "
                "ELSE tenant = $1 AND (id = $2 OR name = $2) END ORDER BY id = $2 DESC LIMIT 1")  # fmt: skip
        async with self._transaction() as db:
            row = await db.fetchrow(text, tenant, self._encode(name))
        return None if row is None else _loaded(row)

    async def list(self, tenant: str | None = None, worker: str | None = None,
                   sandbox: str | None = None) -> Sequence[SnapshotInfo]:
        text = (f"SELECT {_COLUMNS} FROM snapshot WHERE ($1::text IS NULL OR tenant = $1) AND "
                f"($2::text IS NULL OR worker = $2) AND ($3::text IS NULL OR sandbox = $3) {_ORDER}")  # fmt: skip
        wanted = None if sandbox is None else self._encode(sandbox)
        async with self._transaction() as db:
            return [_loaded(row) for row in await db.fetch(text, tenant, worker, wanted)]

    async def save(self, info: SnapshotInfo) -> None:
        row = _row(info)
        async with self._transaction() as db:
            await db.execute("UPDATE snapshot SET state = $2, used_at = $3, ttl = $4, info = $5 WHERE id = $1",
                             row[0], *row[5:])  # fmt: skip

    async def use(self, snapshot_id: str, now: float) -> None:
        async with self._transaction() as db:
            await db.execute("UPDATE snapshot SET used_at = $2 WHERE id = $1 AND used_at < $2", snapshot_id, now)

    async def expired(self, now: float) -> Sequence[SnapshotInfo]:
        text = f"SELECT {_COLUMNS} FROM snapshot WHERE state = 'ready' AND used_at + ttl < $1 {_ORDER} LIMIT 1000"
        async with self._transaction() as db:
            return [_loaded(row) for row in await db.fetch(text, now)]

    async def remove(self, snapshot_id: str) -> None:
        async with self._transaction() as db:
            await db.execute("DELETE FROM snapshot WHERE id = $1", snapshot_id)
