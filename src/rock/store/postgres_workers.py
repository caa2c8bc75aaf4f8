"""Workers in a PostgreSQL database: see workers.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from rock.protocol.workers import Beat, JoinWorker, WorkerInfo
from rock.store.workers import COLUMNS, loaded, next_epoch, not_lost, over, unknown

_NOW = "extract(epoch FROM clock_timestamp())::float8"
_SELECT = f"SELECT {COLUMNS}, {_NOW} - seen_at FROM worker"


class PostgresWorkers:
    """transaction: a connection in a transaction of its own."""

    def __init__(self, transaction: Callable[[], AbstractAsyncContextManager[Any]]) -> None:
        self._transaction = transaction

    async def join(self, wish: JoinWorker) -> WorkerInfo:
        async with self._transaction() as db:
            await db.execute("SELECT pg_advisory_xact_lock($1, hashtext($2))", _LOCK, wish.name)
            epoch = next_epoch(await _get(db, wish.name), wish)
            await db.execute(
                "INSERT INTO worker (name, holder, url, epoch, beat, lost, draining, version, status, seen_at) "
                f"VALUES ($1, $2, $3, $4, 1, false, false, $5, $6, {_NOW}) ON CONFLICT (name) DO UPDATE SET "
                "holder = excluded.holder, url = excluded.url, epoch = excluded.epoch, beat = worker.beat + 1, "
                "lost = false, version = excluded.version, status = excluded.status, seen_at = excluded.seen_at",
                wish.name, wish.holder, wish.url, epoch, wish.version, wish.status.model_dump_json(),
            )  # fmt: skip
            return await _known(db, wish.name)

    async def beat(self, name: str, beat: Beat) -> WorkerInfo:
        async with self._transaction() as db:
            done = await db.fetchval(
                f"UPDATE worker SET beat = beat + 1, status = $1, seen_at = {_NOW} "
                "WHERE name = $2 AND holder = $3 AND epoch = $4 AND NOT lost RETURNING name",
                beat.status.model_dump_json(), name, beat.holder, beat.epoch,
            )  # fmt: skip
            if done is None:
                raise over(name, await _get(db, name))
            return await _known(db, name)

    async def lose(self, name: str, epoch: int, beat: int | None = None) -> bool:
        async with self._transaction() as db:
            done = await db.fetchval(
                "UPDATE worker SET lost = true WHERE name = $1 AND epoch = $2 "
                "AND ($3::bigint IS NULL OR beat = $3) RETURNING name",
                name, epoch, beat,
            )  # fmt: skip
        return done is not None

    async def drain(self, name: str, draining: bool) -> WorkerInfo:
        async with self._transaction() as db:
            await db.execute("UPDATE worker SET draining = $1 WHERE name = $2", draining, name)
            return await _known(db, name)

    async def remove(self, name: str) -> None:
        async with self._transaction() as db:
            if not (await _known(db, name, "FOR UPDATE")).is_lost:
                raise not_lost(name)
            await db.execute("DELETE FROM worker WHERE name = $1", name)

    async def list(self) -> Sequence[WorkerInfo]:
        async with self._transaction() as db:
            return [loaded(row) for row in await db.fetch(f"{_SELECT} ORDER BY name")]


_LOCK = 0x524F434C  # of joins, in the database


async def _get(db: Any, name: str, how: str = "") -> WorkerInfo | None:
    row = await db.fetchrow(f"{_SELECT} WHERE name = $1 {how}", name)
    return None if row is None else loaded(row)


async def _known(db: Any, name: str, how: str = "") -> WorkerInfo:
    found = await _get(db, name, how)
    if found is None:
        raise unknown(name)
    return found
