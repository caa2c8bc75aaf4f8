"""The default store: one SQLite file.

Single records are read and written on the event loop: 50 microseconds each, since nothing waits for the disk, which is
less than handing them to a thread. Lists, and bringing the log into the file, have a thread with a connection of its
own; neither keeps the other from writing.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rock.errors import Conflict, RockError, StorageFull, Unavailable
from rock.protocol.sandbox import SandboxConfig, SandboxInfo, State
from rock.store.base import Query, Record, VersionConflict

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS sandbox (
    id TEXT PRIMARY KEY,
    version INTEGER NOT NULL,
    state TEXT NOT NULL,
    created_at REAL NOT NULL,
    stopped_at REAL,
    idempotency_key TEXT UNIQUE,
    info TEXT NOT NULL,
    config TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS sandbox_state ON sandbox (state, created_at);
CREATE INDEX IF NOT EXISTS sandbox_created ON sandbox (created_at, id);
"""
_VERSION = 1
_CHECKPOINT_EVERY = 2.0  # seconds
_PRUNED_AT_ONCE = 200
_FIELDS = {"user_id", "experiment_id", "namespace", "image", "runtime", "worker", "cluster", "cause"}


class SqliteStore:
    """Records in a file. WAL with synchronous=NORMAL: a commit survives a crash of the process, at any point."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rock-store")
        self._db: sqlite3.Connection | None = None
        self._side: sqlite3.Connection | None = None  # the thread's
        self._checkpoints: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._now(self._open)
        await self._aside(self._open_side)
        self._checkpoints = asyncio.create_task(self._checkpoint(), name="store checkpoints")

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self.path, isolation_level=None, timeout=5.0)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("PRAGMA wal_autocheckpoint=0")  # see _checkpoint
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > _VERSION:
            db.close()
            raise Unavailable(
                f"{self.path} was written by a newer version of ROCK (schema {version})",
                hint="use that version, or another ROCK_HOME",
            )
        db.executescript(_SCHEMA)
        db.execute(f"PRAGMA user_version={_VERSION}")
        self._db = db

    def _open_side(self) -> None:
        self._side = sqlite3.connect(self.path, isolation_level=None, timeout=5.0)

    async def _checkpoint(self) -> None:
        """Bring the log into the file now and then: it waits for the disk, so not in whoever writes."""
        while True:
            await asyncio.sleep(_CHECKPOINT_EVERY)
            with contextlib.suppress(Unavailable, StorageFull):  # the next write tells
                await self._aside(lambda: self._open_db_aside.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall())

    async def close(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.cancel()
            await asyncio.gather(self._checkpoints, return_exceptions=True)
            self._checkpoints = None
        if self._side is not None:
            await self._aside(self._side.close)
            self._side = None
        if self._db is not None:
            self._now(self._db.close)
            self._db = None
        self._thread.shutdown()

    def _now(self, work: Callable[..., T], *args: Any) -> T:
        try:
            return work(*args)
        except sqlite3.Error as error:
            raise self._told(error) from error

    async def _aside(self, work: Callable[..., T], *args: Any) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
        except sqlite3.Error as error:
            raise self._told(error) from error

    def _told(self, error: sqlite3.Error) -> RockError:
        if "full" in str(error) or "disk I/O" in str(error):
            hint = "free some space on the server"
            return StorageFull(f"the store {self.path} cannot be written: {error}", hint=hint)
        return Unavailable(f"the store {self.path} does not answer: {error}")

    @property
    def _open_db(self) -> sqlite3.Connection:
        if self._db is None:
            raise Unavailable("the store is closed")
        return self._db

    @property
    def _open_db_aside(self) -> sqlite3.Connection:
        if self._side is None:
            raise Unavailable("the store is closed")
        return self._side

    # ---- records ----

    async def insert(self, record: Record) -> Record:
        return self._now(self._insert, replace(record, version=1))

    def _insert(self, record: Record) -> Record:
        if record.key is not None:
            known = self._by_key(record.key)
            if known is not None:
                return known
        try:
            self._open_db.execute(
                "INSERT INTO sandbox (id, version, state, created_at, stopped_at, idempotency_key, info, config) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                _columns(record),
            )
        except sqlite3.IntegrityError:
            raise Conflict(
                f"Sandbox {record.id} already exists",
                sandbox_id=record.id,
                hint="choose another sandbox_id, or delete the stopped one",
            ) from None
        return record

    async def get(self, sandbox_id: str) -> Record | None:
        return self._now(self._get, sandbox_id)

    def _get(self, sandbox_id: str) -> Record | None:
        row = self._open_db.execute(f"{_SELECT} WHERE id = ?", (sandbox_id,)).fetchone()
        return None if row is None else _load(row)

    async def by_key(self, key: str) -> Record | None:
        return self._now(self._by_key, key)

    def _by_key(self, key: str) -> Record | None:
        row = self._open_db.execute(f"{_SELECT} WHERE idempotency_key = ?", (key,)).fetchone()
        return None if row is None else _load(row)

    async def put(self, record: Record) -> Record:
        return self._now(self._put, record)

    def _put(self, record: Record) -> Record:
        new = replace(record, version=record.version + 1)
        _, version, state, _, stopped_at, _, info, config = _columns(new)
        done = self._open_db.execute(
            "UPDATE sandbox SET version = ?, state = ?, stopped_at = ?, info = ?, config = ? "
            "WHERE id = ? AND version = ?",
            (version, state, stopped_at, info, config, record.id, record.version),
        )
        if done.rowcount != 1:
            raise VersionConflict(record.id)
        return new

    async def delete(self, sandbox_id: str) -> None:
        self._now(self._open_db.execute, "DELETE FROM sandbox WHERE id = ?", (sandbox_id,))

    async def list(self, query: Query) -> Sequence[Record]:
        return await self._aside(self._list, query)

    def _list(self, query: Query) -> Sequence[Record]:
        where: Any = ["1"]
        values: Any = []
        if query.states:
            where.append(f"state IN ({', '.join('?' * len(query.states))})")
            values += [state.value for state in query.states]
        for name, value in query.fields.items():
            if name not in _FIELDS:
                raise ValueError(f"cannot list by {name!r}")
            where.append(f"json_extract(info, '$.{name}') = ?")
            values.append(value)
        if query.left:
            where.append(f"({_LEFT})")
        for name, value in query.labels.items():
            where.append("json_extract(info, '$.labels.' || json_quote(?)) = ?")
            values += [name, value]
        if query.after is not None:
            where.append("(created_at, id) < (?, ?)")
            values += query.after
        rows = self._open_db_aside.execute(
            f"{_SELECT} WHERE {' AND '.join(where)} ORDER BY created_at DESC, id DESC LIMIT ?", (*values, query.limit)
        ).fetchall()
        return [_load(row) for row in rows]

    async def count(self) -> dict[str, int]:
        rows = await self._aside(
            lambda: self._open_db_aside.execute("SELECT state, count(*) FROM sandbox GROUP BY state").fetchall()
        )
        return dict(rows)

    async def prune(self, before: float) -> int:
        removed = 0
        while True:
            done = self._now(
                self._open_db.execute,
                "DELETE FROM sandbox WHERE id IN (SELECT id FROM sandbox WHERE state IN (?, ?) AND stopped_at < ? "
                f"AND coalesce(json_extract(info, '$.deleted_at'), 0) < ? AND NOT ({_LEFT}) LIMIT ?)",
                (State.STOPPED.value, State.DELETED.value, before, before, _PRUNED_AT_ONCE),
            )
            removed += done.rowcount
            if done.rowcount < _PRUNED_AT_ONCE:
                return removed
            await asyncio.sleep(0)  # whoever waits goes first


_LEFT = "coalesce(json_extract(info, '$.kept'), 0) OR json_extract(info, '$.archive') IS NOT NULL"
_SELECT = "SELECT version, idempotency_key, info, config FROM sandbox"


def _columns(record: Record) -> tuple[Any, ...]:
    info = record.info
    # The registry password is needed for one pull, never later: it does not go to the disk.
    config = record.config.model_dump_json(exclude={"registry_password"})
    return (
        record.id,
        record.version,
        info.state.value,
        info.created_at,
        info.stopped_at,
        record.key,
        info.model_dump_json(),
        config,
    )


def _load(row: tuple[Any, ...]) -> Record:
    version, key, info, config = row
    return Record(SandboxInfo.model_validate_json(info), SandboxConfig.model_validate_json(config), key, version)
