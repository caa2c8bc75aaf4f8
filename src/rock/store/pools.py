"""The table of warm pools, in SQLite and in PostgreSQL."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from rock import faults
from rock.errors import NotFound, QuotaExceeded
from rock.protocol.pools import MOST_OF_TENANT, StoredPool

_ORDER = "ORDER BY tenant, name"


class Pools(Protocol):
    """The pools of all tenants. Each method raises Unavailable or StorageFull when the database fails."""

    async def save(self, pool: StoredPool) -> StoredPool:
        """Add a pool, or replace the definition of the one with its name. QuotaExceeded."""
        ...

    async def find(self, tenant: str, name: str) -> StoredPool | None: ...

    async def list(self, tenant: str | None = None) -> Sequence[StoredPool]:
        """The pools of a tenant by name; None is all tenants."""
        ...

    async def remove(self, tenant: str, name: str) -> None:
        """Idempotent."""
        ...


def unknown(name: str) -> NotFound:
    return NotFound(f"there is no pool {name}", hint="`rock pool ls` lists the pools")


def _too_many() -> QuotaExceeded:
    return QuotaExceeded(f"there are {MOST_OF_TENANT} pools: a tenant has at most so many", hint="delete some")


def _replaced(pool: StoredPool, known: str | None, count: int) -> StoredPool:
    """The pool to store. known: the row with its name. count: of the pools of the tenant."""
    if known is not None:
        return pool.model_copy(update={"created_at": StoredPool.model_validate_json(known).created_at})
    if count >= MOST_OF_TENANT:
        raise _too_many()
    return pool


class SqlitePools:
    """do: runs a function on the open database in a transaction of its own, and converts errors."""

    def __init__(self, do: Callable[[Callable[[sqlite3.Connection], Any]], Any]) -> None:
        self._do = do

    async def save(self, pool: StoredPool) -> StoredPool:
        def work(db: sqlite3.Connection) -> StoredPool:
            row = db.execute("SELECT info FROM pool WHERE tenant = ? AND name = ?", (pool.tenant, pool.name)).fetchone()
            count = db.execute("SELECT count(*) FROM pool WHERE tenant = ?", (pool.tenant,)).fetchone()[0]
            made = _replaced(pool, row[0] if row is not None else None, count)
            db.execute("INSERT OR REPLACE INTO pool (tenant, name, info) VALUES (?, ?, ?)",
                       (pool.tenant, pool.name, made.stored()))  # fmt: skip
            return made

        await faults.point("store.pool.save")
        saved: StoredPool = self._do(work)
        return saved

    async def find(self, tenant: str, name: str) -> StoredPool | None:
        row = self._do(lambda db: db.execute("SELECT info FROM pool WHERE tenant = ? AND name = ?",
                                             (tenant, name)).fetchone())  # fmt: skip
        return None if row is None else StoredPool.model_validate_json(row[0])

    async def list(self, tenant: str | None = None) -> Sequence[StoredPool]:
        text = f"SELECT info FROM pool WHERE (:tenant IS NULL OR tenant = :tenant) {_ORDER}"
        rows: Sequence[Any] = self._do(lambda db: db.execute(text, {"tenant": tenant}).fetchall())
        return [StoredPool.model_validate_json(row[0]) for row in rows]

    async def remove(self, tenant: str, name: str) -> None:
        self._do(lambda db: db.execute("DELETE FROM pool WHERE tenant = ? AND name = ?", (tenant, name)))


class PostgresPools:
    """transaction: a connection in a transaction."""

    def __init__(self, transaction: Callable[[], AbstractAsyncContextManager[Any]]) -> None:
        self._transaction = transaction

    async def save(self, pool: StoredPool) -> StoredPool:
        async with self._transaction() as db:
            await db.execute("LOCK TABLE pool IN EXCLUSIVE MODE")
            known = await db.fetchval("SELECT info FROM pool WHERE tenant = $1 AND name = $2", pool.tenant, pool.name)
            count = await db.fetchval("SELECT count(*) FROM pool WHERE tenant = $1", pool.tenant)
            made = _replaced(pool, known, count)
            await db.execute("INSERT INTO pool (tenant, name, info) VALUES ($1, $2, $3) "
                             "ON CONFLICT (tenant, name) DO UPDATE SET info = excluded.info",
                             pool.tenant, pool.name, made.stored())  # fmt: skip
            return made

    async def find(self, tenant: str, name: str) -> StoredPool | None:
        async with self._transaction() as db:
            row = await db.fetchval("SELECT info FROM pool WHERE tenant = $1 AND name = $2", tenant, name)
        return None if row is None else StoredPool.model_validate_json(row)

    async def list(self, tenant: str | None = None) -> Sequence[StoredPool]:
        text = f"SELECT info FROM pool WHERE ($1::text IS NULL OR tenant = $1) {_ORDER}"
        async with self._transaction() as db:
            return [StoredPool.model_validate_json(row["info"]) for row in await db.fetch(text, tenant)]

    async def remove(self, tenant: str, name: str) -> None:
        async with self._transaction() as db:
            await db.execute("DELETE FROM pool WHERE tenant = $1 AND name = $2", tenant, name)
