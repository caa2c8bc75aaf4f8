"""The volumes table, in SQLite and in PostgreSQL.

A row exists before the files of its volume, and until they are removed: files without a row are left over.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, Protocol

from rock import faults
from rock.errors import Conflict, NotFound, QuotaExceeded
from rock.protocol.node import VolumeInfo

VolumeState = Literal["creating", "ready", "deleting"]
MOST_OF_TENANT = 1000
_COLUMNS = "id, tenant, name, worker, size, state, created_at"


class Volumes(Protocol):
    """The volumes of all tenants. Each method raises Unavailable or StorageFull when the database fails."""

    async def add(self, info: VolumeInfo, key: str | None = None) -> VolumeInfo:
        """Add a volume; returns the volume that the tenant created with this idempotency key, if there is one. Conflict
        when the name is taken, QuotaExceeded."""
        ...

    async def find(self, tenant: str, name: str) -> VolumeInfo | None: ...

    async def list(self, tenant: str | None = None, worker: str | None = None) -> Sequence[VolumeInfo]:
        """The volumes of a tenant and of a worker, oldest first; None is all."""
        ...

    async def mark(self, volume_id: str, state: VolumeState) -> None:
        """Change the state; no effect on a removed volume."""
        ...

    async def remove(self, volume_id: str) -> None: ...


def name_taken(name: str) -> Conflict:
    return Conflict(f"there is a volume {name} already", hint="choose another name, or delete that volume")


def unknown(name: str) -> NotFound:
    return NotFound(f"there is no volume {name}", hint="create it first: POST /v1/volumes, or Client.create_volume")


def _too_many() -> QuotaExceeded:
    return QuotaExceeded(f"there are {MOST_OF_TENANT} volumes: a tenant has at most so many", hint="delete some")


def _row(info: VolumeInfo, key: str | None) -> tuple[Any, ...]:
    return (info.volume_id, info.tenant, info.name, info.worker, info.size, info.state, info.created_at, key)


def _loaded(row: Any) -> VolumeInfo:
    volume_id, tenant, name, worker, size, state, created_at = row
    return VolumeInfo(volume_id=volume_id, tenant=tenant, name=name, worker=worker, size=size, state=state,
                      created_at=created_at)  # fmt: skip


class SqliteVolumes:
    """do: runs a function on the open database in a transaction of its own, and converts errors."""

    def __init__(self, do: Callable[[Callable[[sqlite3.Connection], Any]], Any]) -> None:
        self._do = do

    async def add(self, info: VolumeInfo, key: str | None = None) -> VolumeInfo:
        def work(db: sqlite3.Connection) -> VolumeInfo:
            if key is not None:
                known = _one(db, "tenant = ? AND idempotency_key = ?", info.tenant, key)
                if known is not None:
                    return known
            if _one(db, "tenant = ? AND name = ?", info.tenant, info.name) is not None:
                raise name_taken(info.name)
            if db.execute("SELECT count(*) FROM volume WHERE tenant = ?", (info.tenant,)).fetchone()[0] >= \
                    MOST_OF_TENANT:  # fmt: skip
                raise _too_many()
            db.execute(f"INSERT INTO volume ({_COLUMNS}, idempotency_key) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                       _row(info, key))  # fmt: skip
            return info

        await faults.point("store.volume.add")
        made: VolumeInfo = self._do(work)
        return made

    async def find(self, tenant: str, name: str) -> VolumeInfo | None:
        found: VolumeInfo | None = self._do(lambda db: _one(db, "tenant = ? AND name = ?", tenant, name))
        return found

    async def list(self, tenant: str | None = None, worker: str | None = None) -> Sequence[VolumeInfo]:
        text = (f"SELECT {_COLUMNS} FROM volume WHERE (:tenant IS NULL OR tenant = :tenant) AND "
                "(:worker IS NULL OR worker = :worker) ORDER BY created_at, id")  # fmt: skip
        rows: Sequence[Any] = self._do(lambda db: db.execute(text, {"tenant": tenant, "worker": worker}).fetchall())
        return [_loaded(row) for row in rows]

    async def mark(self, volume_id: str, state: VolumeState) -> None:
        self._do(lambda db: db.execute("UPDATE volume SET state = ? WHERE id = ?", (state, volume_id)))

    async def remove(self, volume_id: str) -> None:
        self._do(lambda db: db.execute("DELETE FROM volume WHERE id = ?", (volume_id,)))


def _one(db: sqlite3.Connection, where: str, *values: str) -> VolumeInfo | None:
    row = db.execute(f"SELECT {_COLUMNS} FROM volume WHERE {where}", values).fetchone()
    return None if row is None else _loaded(row)


_LOCK = 0x524F434D  # advisory lock of new volumes, in the database


class PostgresVolumes:
    """transaction: opens a connection in a transaction of its own. encode: makes a text one that the database can
    store."""

    def __init__(self, transaction: Callable[[], AbstractAsyncContextManager[Any]],
                 encode: Callable[[str], str]) -> None:
        self._transaction = transaction
        self._encode = encode

    async def add(self, info: VolumeInfo, key: str | None = None) -> VolumeInfo:
        stored = None if key is None else self._encode(key)
        async with self._transaction() as db:
            # Other creates of the tenant wait for this transaction.
            await db.execute("SELECT pg_advisory_xact_lock($1, hashtext($2))", _LOCK, info.tenant)
            if stored is not None:
                row = await db.fetchrow(
                    f"SELECT {_COLUMNS} FROM volume WHERE tenant = $1 AND idempotency_key = $2", info.tenant, stored
                )
                if row is not None:
                    return _loaded(row)
            taken = await db.fetchval("SELECT id FROM volume WHERE tenant = $1 AND name = $2", info.tenant, info.name)
            if taken is not None:
                raise name_taken(info.name)
            if await db.fetchval("SELECT count(*) FROM volume WHERE tenant = $1", info.tenant) >= MOST_OF_TENANT:
                raise _too_many()
            await db.execute(
                f"INSERT INTO volume ({_COLUMNS}, idempotency_key) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
                *_row(info, stored),
            )
            return info

    async def find(self, tenant: str, name: str) -> VolumeInfo | None:
        text = f"SELECT {_COLUMNS} FROM volume WHERE tenant = $1 AND name = $2"
        async with self._transaction() as db:
            row = await db.fetchrow(text, tenant, self._encode(name))
        return None if row is None else _loaded(row)

    async def list(self, tenant: str | None = None, worker: str | None = None) -> Sequence[VolumeInfo]:
        text = (f"SELECT {_COLUMNS} FROM volume WHERE ($1::text IS NULL OR tenant = $1) "
                "AND ($2::text IS NULL OR worker = $2) ORDER BY created_at, id")  # fmt: skip
        async with self._transaction() as db:
            return [_loaded(row) for row in await db.fetch(text, tenant, worker)]

    async def mark(self, volume_id: str, state: VolumeState) -> None:
        async with self._transaction() as db:
            await db.execute("UPDATE volume SET state = $1 WHERE id = $2", state, volume_id)

    async def remove(self, volume_id: str) -> None:
        async with self._transaction() as db:
            await db.execute("DELETE FROM volume WHERE id = $1", volume_id)
