"""The default store: one SQLite file.

Single records are read and written on the event loop: 50 microseconds each, since no operation waits for the disk,
which is less than a thread handover costs. Lists and checkpoints run in a thread with a connection of its own; neither
blocks writers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from rock import faults
from rock.errors import Conflict, RockError, StorageFull, Unavailable
from rock.protocol.keys import KeyInfo, Quota
from rock.protocol.node import Beat, JoinWorker, WorkerInfo
from rock.protocol.sandbox import SandboxConfig, SandboxInfo, State, kept
from rock.store import access, base, configurations, jobs, pools, recordings, snapshots, volumes
from rock.store.base import (
    CLOSED,
    COLUMNS,
    Lease,
    Query,
    Record,
    Reserve,
    VersionConflict,
    Watchers,
    id_taken,
    loaded,
    name_taken,
    next_epoch,
    no_key,
    not_lost,
    ordered,
    over,
    unknown,
)  # fmt: skip
from rock.store.batch import Batch
from rock.store.migrations import SQLITE

T = TypeVar("T")
log = logging.getLogger("rock.admin")

_CHECKPOINT_EVERY = 2.0  # seconds
_PRUNED_AT_ONCE = 200
_WRITTEN_AT_ONCE = 100  # records of a group; other tasks run between two portions
_FIELDS = {"user_id", "experiment_id", "namespace", "image", "runtime", "worker", "cluster", "cause", "name"}


class SqliteStore:
    """Records in a file. WAL with synchronous=NORMAL: a commit survives a crash of the process at any point."""

    def __init__(self, path: Path, shared: bool = False) -> None:
        self.path = path
        self.reserve: Reserve | None = None  # space for the writes that end sandboxes
        self.shared = shared  # used by several servers of this machine
        self._file: tuple[int, int] | None = None  # device and inode of the open file
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rock-store")
        self._db: sqlite3.Connection | None = None
        self._side: sqlite3.Connection | None = None  # of the thread
        self._checkpoints: asyncio.Task[None] | None = None
        self._watchers = Watchers()
        self._batch = Batch(lambda: _transaction(self._open_db, "IMMEDIATE"), self._error_of)
        self.workers = SqliteWorkers(self._within)
        self.volumes = volumes.SqliteVolumes(self._within)
        self.snapshots = snapshots.SqliteSnapshots(self._within)
        self.pools = pools.SqlitePools(self._within)
        self.recordings = recordings.SqliteRecordings(self._within, self._beside)
        self.configurations = configurations.SqliteConfigurations(self._within)
        self.jobs = jobs.SqliteJobs(self._within)
        self.access = access.SqliteAccess(self._within, self._beside)

    async def open(self) -> None:
        self._now(self._open)
        await self._aside(self._open_side)
        self._checkpoints = asyncio.create_task(self._checkpoint(), name="store checkpoints")

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # the log beside it gets its mode too; SQLite reports later errors
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        db = sqlite3.connect(self.path, isolation_level=None, timeout=5.0)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("PRAGMA wal_autocheckpoint=0")  # see _checkpoint
        try:
            self._migrate(db)
            with _transaction(db, "IMMEDIATE"):
                jobs.remove_incomplete(db, self.shared)
        except BaseException:
            db.close()
            raise
        self._db = db
        found = os.stat(self.path)
        self._file = found.st_dev, found.st_ino

    def _migrate(self, db: sqlite3.Connection) -> None:
        """Migrate the file to the newest schema in one transaction."""
        with _transaction(db, "EXCLUSIVE"):
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > len(SQLITE):
                raise Unavailable(
                    f"{self.path} was written by a newer version of ROCK (schema {version})",
                    hint="use that version, or another ROCK_HOME",
                )
            for step in SQLITE[version:]:
                for statement in step:
                    db.execute(statement)
            db.execute(f"PRAGMA user_version={len(SQLITE)}")

    def _open_side(self) -> None:
        self._side = sqlite3.connect(self.path, isolation_level=None, timeout=5.0)

    async def _checkpoint(self) -> None:
        """Run a checkpoint periodically. It waits for the disk, so it does not run in a writer."""
        reported = False
        while True:
            await asyncio.sleep(_CHECKPOINT_EVERY)
            try:
                self._check_file(creating=False)
                reported = False
            except Unavailable as error:
                if not reported:
                    log.error("%s", error)
                reported = True
            with contextlib.suppress(Unavailable, StorageFull):  # the next write reports the error
                await self._aside(lambda: self._open_db_aside.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall())

    def _check_file(self, creating: bool = True) -> None:
        """StorageFull while the disk is full. Unavailable when the open file is no longer the one at its path: writes
        to it would be lost at the next start."""
        if creating and self.reserve is not None and self.reserve.released:
            raise StorageFull("the server's disk is full: no sandbox is created", hint="free some space on the server")
        try:
            found = os.stat(self.path)
            same = (found.st_dev, found.st_ino) == self._file
        except FileNotFoundError:
            same = False
        except OSError:
            return  # the next write reports the error
        if not same:
            raise Unavailable(
                f"the store {self.path} was removed or replaced while the server runs: no sandbox is created, "
                "since its record would be lost at the next start",
                hint="stop the sandboxes that run, or restart the server with a backup: rock admin restore FILE",
            )

    async def identity(self) -> str:
        found = self._now(self._open_db.execute, "SELECT value FROM about WHERE name = 'identity'").fetchone()
        return "" if found is None else str(found[0])

    def missing(self) -> str | None:
        return None if self.path.exists() else f"the store {self.path} does not exist"

    async def close(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.cancel()
            await asyncio.gather(self._checkpoints, return_exceptions=True)
            self._checkpoints = None
        if self._side is not None:
            await self._aside(self._side.close)
            self._side = None
        if self._db is not None:
            self._batch.flush()
            self._now(self._db.close)
            self._db = None
        self._thread.shutdown()

    def _now(self, work: Callable[..., T], *args: Any) -> T:
        try:
            return work(*args)
        except sqlite3.Error as error:
            failure = self._error_of(error)
            if not isinstance(failure, StorageFull) or self.reserve is None or not self.reserve.release():
                raise failure from error
        try:
            return work(*args)
        except sqlite3.Error as error:
            raise self._error_of(error) from error

    def _within(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def whole() -> T:
            with _transaction(self._open_db, "IMMEDIATE"):
                return work(self._open_db)

        return self._now(whole)

    async def _beside(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        return await self._aside(lambda: work(self._open_db_aside))

    async def _aside(self, work: Callable[..., T], *args: Any) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
        except sqlite3.Error as error:
            raise self._error_of(error) from error

    def _error_of(self, error: sqlite3.Error) -> RockError:
        if "full" in str(error) or "disk I/O" in str(error):
            return StorageFull(f"the store {self.path} cannot be written: {error}", hint="free space on the server")
        return Unavailable(f"the store {self.path} does not respond: {error}",
                           hint="check the file and the disk of the server with `rock doctor`, then try again")

    @property
    def _open_db(self) -> sqlite3.Connection:
        if self._db is None:
            raise Unavailable("the store is closed", hint=CLOSED)
        return self._db

    @property
    def _open_db_aside(self) -> sqlite3.Connection:
        if self._side is None:
            raise Unavailable("the store is closed", hint=CLOSED)
        return self._side

    # ---- records ----

    async def insert(self, record: Record, quota: Quota | None = None) -> Record:
        await faults.point("store.insert")
        self._check_file()
        new = await self._saved(lambda: self._insert(record.at(1), quota), quota)
        self._watchers.tell(new.id)
        await faults.point("store.inserted")
        return new

    async def _saved(self, write: Callable[[], Record], quota: Quota | None) -> Record:
        return await self._batch.do(write) if quota is None else self._now(write)

    def _insert(self, record: Record, quota: Quota | None) -> Record:
        if quota is None:  # the unique index of keys finds a repeated request
            try:
                return self._add(record)
            except Conflict:
                if (known := self._keyed(record)) is None:
                    raise
                return known
        if (known := self._keyed(record)) is not None:
            return known
        with _transaction(self._open_db, "IMMEDIATE"):
            self._take(record, quota)
            return self._add(record)

    async def insert_group(self, records: Sequence[Record], quota: Quota | None = None,
                           whole: bool = True) -> Sequence[Record]:
        self._check_file()
        made: list[Record] = []
        rows: list[tuple[Any, ...]] = []
        for number, record in enumerate(records):
            made.append(record.at(1))
            rows.append(_columns(made[-1]))
            if number % _WRITTEN_AT_ONCE == _WRITTEN_AT_ONCE - 1:
                await asyncio.sleep(0)  # lets waiting tasks run first
        added = self._now(self._insert_group, made, rows, quota, whole)
        for record in added:
            self._watchers.tell(record.id)
        return added

    def _insert_group(
        self, records: Sequence[Record], rows: Sequence[tuple[Any, ...]], quota: Quota | None, whole: bool
    ) -> Sequence[Record]:
        first = records[0]
        with _transaction(self._open_db, "IMMEDIATE"):
            if (known := self._keyed(first)) is not None:
                return self._group(known.info.group, known.tenant) if known.info.group else [known]
            if quota is not None:
                records = records[: self._take(first, quota, len(records), whole)]
            try:
                self._open_db.executemany(_ADD, rows[: len(records)])
            except sqlite3.IntegrityError:
                raise id_taken(first.info.group or first.id) from None
        return records

    async def group(self, group_id: str, tenant: str | None) -> Sequence[Record]:
        return self._now(self._group, group_id, tenant)

    def _group(self, group_id: str, tenant: str | None) -> Sequence[Record]:
        text = f"{_SELECT} WHERE id > :first AND id < :last AND (:tenant IS NULL OR tenant = :tenant)"
        values = {"first": f"{group_id}-", "last": f"{group_id}.", "tenant": tenant}
        rows = self._open_db.execute(text, values).fetchall()
        return ordered([_load(row) for row in rows], group_id)

    def _take(self, record: Record, quota: Quota, count: int = 1, whole: bool = True) -> int:
        """The number that fits the quota; counts their starts."""
        db, now, tenant = self._open_db, time.time(), record.tenant
        db.execute("DELETE FROM start WHERE tenant = ? AND at <= ?", (tenant, now - base.WINDOW))
        starts, first = db.execute("SELECT count(*), min(at) FROM start WHERE tenant = ?", (tenant,)).fetchone()
        sandboxes, cpus, memory = db.execute(
            "SELECT count(*), coalesce(sum(cpus), 0), coalesce(sum(memory), 0) FROM sandbox "
            "WHERE tenant = ? AND state IN (?, ?, ?) AND id != ?",
            (tenant, *base.COUNTED, record.id),
        ).fetchone()
        used = base.Used(sandboxes, cpus, memory, starts, now - first if first is not None else 0.0)
        if whole:
            base.check(quota, used, record.config, count)
        else:
            count = base.fitting(quota, used, record.config, count)
        if quota.creates_per_minute is not None:
            db.executemany("INSERT INTO start (tenant, at) VALUES (?, ?)", [(tenant, now)] * count)
        return count

    def _add(self, record: Record) -> Record:
        try:
            self._open_db.execute(_ADD, _columns(record))
        except sqlite3.IntegrityError as error:
            raise _taken(record, error) from None
        return record

    async def get(self, sandbox_id: str) -> Record | None:
        await faults.point("store.get")
        return self._now(self._get, sandbox_id)

    def _get(self, sandbox_id: str) -> Record | None:
        row = self._open_db.execute(f"{_SELECT} WHERE id = ?", (sandbox_id,)).fetchone()
        return None if row is None else _load(row)

    async def by_key(self, key: str, tenant: str = "") -> Record | None:
        return self._now(self._by_key, key, tenant)

    def _keyed(self, record: Record) -> Record | None:
        return None if record.key is None else self._by_key(record.key, record.tenant)

    def _by_key(self, key: str, tenant: str) -> Record | None:
        row = self._open_db.execute(f"{_SELECT} WHERE tenant = ? AND idempotency_key = ?", (tenant, key)).fetchone()
        return None if row is None else _load(row)

    async def put(self, record: Record, quota: Quota | None = None) -> Record:
        await faults.point("store.put")
        new = await self._saved(lambda: self._put(record) if quota is None else self._put_within(record, quota), quota)
        self._watchers.tell(new.id)
        await faults.point("store.saved")
        return new

    def _put_within(self, record: Record, quota: Quota) -> Record:
        with _transaction(self._open_db, "IMMEDIATE"):
            self._take(record, quota)
            return self._put(record)

    def _put(self, record: Record) -> Record:
        new = record.at(record.version + 1)
        info = new.info
        try:
            done = self._open_db.execute(
                "UPDATE sandbox SET version = ?, state = ?, stopped_at = ?, name = ?, info = ? "
                "WHERE id = ? AND version = ?",
                (new.version, info.state.value, info.stopped_at, info.name, _text(info), record.id, record.version),
            )
        except sqlite3.IntegrityError as error:
            raise _taken(record, error) from None
        if done.rowcount != 1:
            raise VersionConflict(record.id)
        return new

    async def delete(self, sandbox_id: str) -> None:
        await faults.point("store.delete")
        self._now(self._open_db.execute, "DELETE FROM sandbox WHERE id = ?", (sandbox_id,))
        self._watchers.tell(sandbox_id)

    def watch(self) -> AsyncGenerator[str]:
        return self._watchers.watch()

    async def list(self, query: Query) -> Sequence[Record]:
        await faults.point("store.list")
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
        if query.tenant is not None:
            where.append("tenant = ?")
            values.append(query.tenant)
        if query.left:
            where.append(f"({_LEFT})")
        for name, value in query.labels.items():
            where.append("EXISTS (SELECT 1 FROM json_each(info, '$.labels') WHERE key = ? AND value = ?)")
            values += [name, value]
        if query.after is not None:
            where.append("(created_at, id) < (?, ?)")
            values += query.after
        text = f"{_SELECT} WHERE {' AND '.join(where)} ORDER BY created_at DESC, id DESC LIMIT ?"
        return [_load(row) for row in self._open_db_aside.execute(text, (*values, query.limit)).fetchall()]

    async def count(self, tenant: str | None = None) -> dict[str, int]:
        text = "SELECT state, count(*) FROM sandbox WHERE ? IS NULL OR tenant = ? GROUP BY state"
        return dict(await self._aside(lambda: self._open_db_aside.execute(text, (tenant, tenant)).fetchall()))

    async def tally(self) -> dict[tuple[str, str], int]:
        text = "SELECT tenant, state, count(*) FROM sandbox GROUP BY tenant, state"
        rows = await self._aside(lambda: self._open_db_aside.execute(text).fetchall())
        return {(tenant, state): count for tenant, state, count in rows}

    async def prune(self, before: float) -> int:
        removed = 0
        while True:
            text = ("DELETE FROM sandbox WHERE id IN (SELECT id FROM sandbox WHERE state IN (?, ?) AND stopped_at < ? "
                    f"AND coalesce(json_extract(info, '$.deleted_at'), 0) < ? AND NOT ({_LEFT}) LIMIT ?)")
            values = State.STOPPED.value, State.DELETED.value, before, before, _PRUNED_AT_ONCE
            done = self._now(self._open_db.execute, text, values)
            removed += done.rowcount
            if done.rowcount < _PRUNED_AT_ONCE:
                return removed
            await asyncio.sleep(0)  # lets waiting tasks run first

    # ---- API keys ----

    async def add_key(self, digest: str, info: KeyInfo) -> None:
        row = (digest, info.id, info.created_at, info.model_dump_json())
        self._now(self._open_db.execute, "INSERT INTO api_key (digest, id, created_at, info) VALUES (?, ?, ?, ?)", row)

    async def key_of(self, digest: str) -> KeyInfo | None:
        found = self._now(self._open_db.execute, "SELECT info FROM api_key WHERE digest = ?", (digest,)).fetchone()
        return None if found is None else KeyInfo.model_validate_json(found[0])

    async def keys(self) -> Sequence[KeyInfo]:
        rows = await self._aside(
            lambda: self._open_db_aside.execute("SELECT info FROM api_key ORDER BY created_at, id").fetchall()
        )
        return [KeyInfo.model_validate_json(row[0]) for row in rows]

    async def revoke_key(self, key_id: str, at: float) -> KeyInfo:
        return self._now(self._revoke, key_id, at)

    def _revoke(self, key_id: str, at: float) -> KeyInfo:
        with _transaction(self._open_db, "IMMEDIATE"):
            found = self._open_db.execute("SELECT info FROM api_key WHERE id = ?", (key_id,)).fetchone()
            if found is None:
                raise no_key(key_id)
            info = KeyInfo.model_validate_json(found[0])
            if info.revoked_at is None:
                info = info.model_copy(update={"revoked_at": at})
                self._open_db.execute("UPDATE api_key SET info = ? WHERE id = ?", (info.model_dump_json(), key_id))
            return info

    # ---- leases ----

    async def take_lease(self, name: str, holder: str, seconds: float) -> Lease | None:
        now = time.time()
        values = {"name": name, "holder": holder, "until": now + seconds, "now": now}
        row = self._now(lambda: self._open_db.execute(_TAKE_LEASE, values).fetchone())
        return None if row is None else Lease(name, holder, row[0])

    async def drop_lease(self, name: str, holder: str) -> None:
        self._now(self._open_db.execute, "UPDATE lease SET until = 0 WHERE name = ? AND holder = ?", (name, holder))


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection, kind: str) -> Iterator[None]:
    db.execute(f"BEGIN {kind}")
    try:
        yield
    except BaseException:
        if db.in_transaction:  # a full disk may have ended it already
            db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


_LEFT = "coalesce(json_extract(info, '$.kept'), 0) OR json_extract(info, '$.archive') IS NOT NULL"
_TAKE_LEASE = """
INSERT INTO lease (name, holder, token, until) VALUES (:name, :holder, 1, :until) ON CONFLICT (name) DO UPDATE
SET token = lease.token + (lease.holder != :holder), holder = :holder, until = :until
WHERE lease.holder = :holder OR lease.until < :now
RETURNING token
"""
_ADD = (
    "INSERT INTO sandbox (id, version, state, created_at, stopped_at, tenant, idempotency_key, cpus, memory, name, "
    "info, config) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_SELECT = "SELECT version, idempotency_key, info, config FROM sandbox"


def _columns(record: Record) -> tuple[Any, ...]:
    info = record.info
    return (
        record.id,
        record.version,
        info.state.value,
        info.created_at,
        info.stopped_at,
        record.tenant,
        record.key,
        base.cpus_of(record.config),
        record.config.memory_bytes,
        info.name,
        _text(info),
        kept(record.config),
    )


def _taken(record: Record, error: sqlite3.IntegrityError) -> Conflict:
    """The error of a violated unique index; SQLite's message names its columns."""
    return name_taken(record) if "sandbox.name" in str(error) else id_taken(record.id)


def _text(info: SandboxInfo) -> str:
    """JSON without unset fields: rows that fit in one page cost half of those that do not."""
    return info.model_dump_json(exclude_none=True)


def _load(row: tuple[Any, ...]) -> Record:
    version, key, info, config = row
    return Record(SandboxInfo.model_validate_json(info), SandboxConfig.model_validate_json(config), key, version)


# ---- workers: implements `Workers` of base.py ----


class SqliteWorkers:
    """The workers table. do: runs a function on the open database in a transaction of its own, and converts errors."""

    def __init__(self, do: Callable[[Callable[[sqlite3.Connection], T]], T]) -> None:
        self._do: Callable[[Callable[[sqlite3.Connection], Any]], Any] = do

    async def join(self, spec: JoinWorker) -> WorkerInfo:
        def work(db: sqlite3.Connection) -> WorkerInfo:
            epoch = next_epoch(_get(db, spec.name), spec)
            db.execute(
                "INSERT INTO worker (name, holder, url, epoch, beat, lost, draining, version, status, seen_at) "
                "VALUES (?, ?, ?, ?, 1, 0, 0, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, "
                "url = excluded.url, epoch = excluded.epoch, beat = worker.beat + 1, lost = 0, "
                "version = excluded.version, status = excluded.status, seen_at = excluded.seen_at",
                (spec.name, spec.holder, spec.url, epoch, spec.version, spec.status.model_dump_json(), time.time()),
            )
            return _known(db, spec.name)

        return self._in(work)

    async def beat(self, name: str, beat: Beat) -> WorkerInfo:
        def work(db: sqlite3.Connection) -> WorkerInfo:
            done = db.execute(
                "UPDATE worker SET beat = beat + 1, status = ?, seen_at = ? "
                "WHERE name = ? AND holder = ? AND epoch = ? AND NOT lost",
                (beat.status.model_dump_json(), time.time(), name, beat.holder, beat.epoch),
            )
            if done.rowcount != 1:
                raise over(name, _get(db, name))
            return _known(db, name)

        return self._in(work)

    async def lose(self, name: str, epoch: int, beat: int | None = None) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            text = "UPDATE worker SET lost = 1 WHERE name = :name AND epoch = :epoch AND beat = coalesce(:beat, beat)"
            return db.execute(text, {"name": name, "epoch": epoch, "beat": beat}).rowcount == 1

        done: bool = self._do(work)
        return done

    async def drain(self, name: str, draining: bool, evacuating: bool = False) -> WorkerInfo:
        def work(db: sqlite3.Connection) -> WorkerInfo:
            db.execute("UPDATE worker SET draining = ?, evacuating = ? WHERE name = ?", (draining, evacuating, name))
            return _known(db, name)

        return self._in(work)

    async def remove(self, name: str) -> None:
        def work(db: sqlite3.Connection) -> None:
            if not _known(db, name).is_lost:
                raise not_lost(name)
            db.execute("DELETE FROM worker WHERE name = ?", (name,))

        self._do(work)

    async def list(self) -> Sequence[WorkerInfo]:
        def work(db: sqlite3.Connection) -> Sequence[WorkerInfo]:
            rows = db.execute(f"SELECT {COLUMNS}, ? - seen_at FROM worker ORDER BY name", (time.time(),)).fetchall()
            return [loaded(row) for row in rows]

        found: Sequence[WorkerInfo] = self._do(work)
        return found

    def _in(self, work: Callable[[sqlite3.Connection], WorkerInfo]) -> WorkerInfo:
        made: WorkerInfo = self._do(work)
        return made


def _get(db: sqlite3.Connection, name: str) -> WorkerInfo | None:
    row = db.execute(f"SELECT {COLUMNS}, ? - seen_at FROM worker WHERE name = ?", (time.time(), name)).fetchone()
    return None if row is None else loaded(row)


def _known(db: sqlite3.Connection, name: str) -> WorkerInfo:
    found = _get(db, name)
    if found is None:
        raise unknown(name)
    return found
