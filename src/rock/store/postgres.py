"""The shared store of several servers: a PostgreSQL database. See docs/decisions/0017-postgres.md.

`info` and `config` are stored as JSON text; `facts` has the fields that lists filter by, as jsonb. PostgreSQL text
cannot contain NUL, which guests and clients may send: see `_text`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any

import asyncpg
import orjson

from rock import faults
from rock.errors import InvalidConfig, RockError, StorageFull, Unavailable
from rock.protocol.keys import KeyInfo, Quota
from rock.protocol.node import Beat, JoinWorker, WorkerInfo
from rock.protocol.routes import OUTAGE
from rock.protocol.sandbox import SandboxConfig, SandboxInfo, State
from rock.store import base
from rock.store.access import PostgresAccess
from rock.store.base import (
    CLOSED,
    COLUMNS,
    Lease,
    Query,
    Record,
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
)
from rock.store.configurations import PostgresConfigurations
from rock.store.jobs import PostgresJobs
from rock.store.migrations import POSTGRES
from rock.store.pools import PostgresPools
from rock.store.recordings import PostgresRecordings
from rock.store.snapshots import PostgresSnapshots
from rock.store.volumes import PostgresVolumes

log = logging.getLogger("rock.store")

_LOCK = 0x524F434B  # advisory lock of migrations, in the database
_CHANNEL = "rock_sandbox"
_CONNECTIONS = 8
_TIMEOUT = 30.0  # seconds for a statement, and for a connection
_RETRY = 1.0
# InternalClientError: raised by asyncpg when a connection ends during its own protocol steps
_BROKEN = (asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
_FIELDS = {"user_id", "experiment_id", "namespace", "image", "runtime", "worker", "cluster", "cause", "name"}
_NOW = "extract(epoch FROM clock_timestamp())::float8"
_SELECT = "SELECT version, idempotency_key, info, config FROM sandbox"
_ADD = (
    "INSERT INTO sandbox (id, version, state, created_at, stopped_at, tenant, idempotency_key, cpus, memory, name, "
    "facts, info, config) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)"
)
_LEFT = "((facts->>'kept')::boolean OR (facts->>'archived')::boolean)"
_TAKE_LEASE = f"""
INSERT INTO lease (name, holder, token, until) VALUES ($1, $2, 1, {_NOW} + $3::float8) ON CONFLICT (name) DO UPDATE
SET token = lease.token + (lease.holder != $2)::int, holder = $2, until = {_NOW} + $3::float8
WHERE lease.holder = $2 OR lease.until < {_NOW} RETURNING token
"""


def _text(value: str) -> str:
    """Encode a text so that PostgreSQL can store it; the encoding is injective."""
    return value.replace("\\", "\\\\").replace("\0", "\\0") if "\0" in value or "\\" in value else value


class _Known(Exception):
    """The key is in use: this is the record that has it."""

    def __init__(self, record: Record) -> None:
        self.record = record


class PostgresStore:
    """Records in a database that other servers may use too. url: postgresql://USER:PASSWORD@HOST:PORT/DATABASE."""

    shared = True

    def __init__(self, url: str) -> None:
        self._url = url
        self._name = re.sub(r"//[^@/]*@", "//", url).partition("?")[0]  # without the login
        self._pool: Any = None
        self._watchers = Watchers()
        self._listener: asyncio.Task[None] | None = None
        self.workers = PostgresWorkers(self._transaction)
        self.volumes = PostgresVolumes(self._transaction, _text)
        self.snapshots = PostgresSnapshots(self._transaction, _text)
        self.pools = PostgresPools(self._transaction)
        self.recordings = PostgresRecordings(self._transaction, _text)
        self.configurations = PostgresConfigurations(self._transaction)
        self.jobs = PostgresJobs(self._transaction)
        self.access = PostgresAccess(self._transaction, _text)

    async def open(self) -> None:
        try:
            self._pool = await asyncpg.create_pool(
                self._url, min_size=1, max_size=_CONNECTIONS, command_timeout=_TIMEOUT, timeout=_TIMEOUT
            )
        except ValueError as error:
            raise InvalidConfig(f"ROCK_STORE={self._name} is not a valid address: {error}",
                                hint="write it as postgresql://USER:PASSWORD@HOST:5432/DATABASE") from None
        except (asyncpg.PostgresError, *_BROKEN) as error:
            raise Unavailable(f"the database {self._name} does not answer: {error!r}", hint="see ROCK_STORE") from error
        try:
            async with self._transaction() as db:
                await self._migrate(db)
        except BaseException:
            await self.close()
            raise
        self._listener = asyncio.create_task(self._listen(), name="store changes")

    async def _migrate(self, db: Any) -> None:
        """Migrate the schema to the newest version; other servers that start at the same time wait."""
        await db.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
        await db.execute("CREATE TABLE IF NOT EXISTS rock_schema (version int NOT NULL)")
        version = await db.fetchval("SELECT version FROM rock_schema") or 0
        if version > len(POSTGRES):
            raise Unavailable(
                f"{self._name} was written by a newer version of ROCK (schema {version})",
                hint="use that version, or another database",
            )
        for step in POSTGRES[version:]:
            for statement in step:
                await db.execute(statement)
        if version < len(POSTGRES):
            await db.execute("DELETE FROM rock_schema")
            await db.execute("INSERT INTO rock_schema VALUES ($1)", len(POSTGRES))

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
            self._listener = None
        if self._pool is not None:
            pool, self._pool = self._pool, None
            try:
                async with asyncio.timeout(_TIMEOUT):
                    await pool.close()
            except TimeoutError:
                pool.terminate()

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        """A connection; its errors are raised as ROCK errors."""
        if self._pool is None:
            raise Unavailable("the store is closed", hint=CLOSED)
        try:
            async with self._pool.acquire(timeout=_TIMEOUT) as db:
                yield db
        except asyncpg.PostgresError as error:
            raise self._error_of(error) from error
        except _BROKEN as error:
            raise Unavailable(f"the database {self._name} does not answer: {error!r}", hint="retry",
                              details=OUTAGE) from error  # fmt: skip

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[Any]:
        async with self._connected() as db, db.transaction():
            yield db

    def _error_of(self, error: asyncpg.PostgresError) -> RockError:
        if isinstance(error, (asyncpg.DiskFullError, asyncpg.OutOfMemoryError)):
            return StorageFull(f"the database {self._name} is full: {error}", hint="free some space on its server")
        return Unavailable(f"the database {self._name} does not serve: {error}", hint="retry", details=OUTAGE)

    # ---- watch ----

    async def _listen(self) -> None:
        while True:
            try:
                await self._follow()
            except (asyncpg.PostgresError, *_BROKEN) as error:
                log.warning("changes of %s: %s", self._name, error)
            self._watchers.tell("")
            await asyncio.sleep(_RETRY)

    async def _follow(self) -> None:
        """Report changes until the connection ends."""
        db = await asyncpg.connect(self._url, timeout=_TIMEOUT, command_timeout=_TIMEOUT)
        ended = asyncio.Event()
        try:
            db.add_termination_listener(lambda _: ended.set())
            await db.add_listener(_CHANNEL, lambda _db, _pid, _channel, payload: self._watchers.tell(payload))
            self._watchers.tell("")  # earlier changes are not reported
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_TIMEOUT):
                        await ended.wait()
                if not ended.is_set():
                    await db.execute("SELECT 1")  # detects a connection that is dead without an error
        finally:
            db.terminate()

    def watch(self) -> AsyncGenerator[str]:
        return self._watchers.watch()

    # ---- records ----

    async def insert(self, record: Record, quota: Quota | None = None) -> Record:
        await faults.point("store.insert")
        try:
            new = await self._insert(replace(record, version=1), quota)
        except _Known as found:
            return found.record
        await faults.point("store.inserted")
        return new

    async def _insert(self, record: Record, quota: Quota | None) -> Record:
        async with self._transaction() as db:
            if record.key is not None:
                known = await self._by_key(db, record.key, record.tenant)
                if known is not None:
                    return known
            if quota is not None:
                await self._take(db, record, quota)
            # A row with the same id or the same key exists; which of them is checked then. Both waited for its writer.
            row = await db.fetchval(
                f"{_ADD} ON CONFLICT DO NOTHING RETURNING id",
                *_columns(record),
            )
            if row is not None:
                await db.execute("SELECT pg_notify($1, $2)", _CHANNEL, record.id)
                return record
            known = await self._by_key(db, record.key, record.tenant) if record.key is not None else None
            if known is None:
                taken = await db.fetchval("SELECT id FROM sandbox WHERE id = $1", _text(record.id))
                raise name_taken(record) if taken is None and record.info.name is not None else id_taken(record.id)
            raise _Known(known)  # the rollback of the transaction also removes the counted start

    async def insert_group(
        self, records: Sequence[Record], quota: Quota | None = None, whole: bool = True
    ) -> Sequence[Record]:
        made = [replace(record, version=1) for record in records]
        first = made[0]
        rows = await asyncio.to_thread(lambda: [_columns(record) for record in made])
        async with self._connected() as db:
            try:
                async with db.transaction():
                    known = await self._by_key(db, first.key, first.tenant) if first.key is not None else None
                    if known is not None:
                        return await self._group(db, known)
                    if quota is not None:
                        count = await self._take(db, first, quota, len(made), whole)
                        made, rows = made[:count], rows[:count]
                    await db.executemany(_ADD, rows)
                    await db.executemany("SELECT pg_notify($1, $2)", [(_CHANNEL, record.id) for record in made])
                return made
            except asyncpg.UniqueViolationError:  # by an id, or by a key that another request inserted first
                known = await self._by_key(db, first.key, first.tenant) if first.key is not None else None
                if known is None:
                    raise id_taken(first.info.group or first.id) from None
                return await self._group(db, known)

    async def group(self, group_id: str, tenant: str | None) -> Sequence[Record]:
        async with self._connected() as db:
            return await self._members(db, group_id, tenant)

    async def _group(self, db: Any, known: Record) -> Sequence[Record]:
        return await self._members(db, known.info.group, known.tenant) if known.info.group else [known]

    async def _members(self, db: Any, group_id: str, tenant: str | None) -> Sequence[Record]:
        # Ids are compared by bytes, and "." directly follows "-"
        text = f"{_SELECT} WHERE id > $1 AND id < $2 AND ($3::text IS NULL OR tenant = $3)"
        rows = await db.fetch(text, _text(f"{group_id}-"), _text(f"{group_id}."), tenant)
        return ordered([_load(row) for row in rows], group_id)

    async def _take(self, db: Any, record: Record, quota: Quota, count: int = 1, whole: bool = True) -> int:
        """The number that fits the quota; counts their starts. Other inserts of the tenant wait for this
        transaction."""
        await db.execute("SELECT pg_advisory_xact_lock($1, hashtext($2))", _LOCK, record.tenant)
        forget = f"DELETE FROM start WHERE tenant = $1 AND at <= {_NOW} - $2::float8"
        await db.execute(forget, record.tenant, base.WINDOW)
        starts, oldest = await db.fetchrow(
            f"SELECT count(*), coalesce({_NOW} - min(at), 0)::float8 FROM start WHERE tenant = $1", record.tenant
        )
        sandboxes, cpus, memory = await db.fetchrow(
            "SELECT count(*), coalesce(sum(cpus), 0)::float8, coalesce(sum(memory), 0)::bigint FROM sandbox "
            "WHERE tenant = $1 AND state = ANY($2) AND id != $3",
            record.tenant, [state.value for state in base.COUNTED], record.id,
        )  # fmt: skip
        used = base.Used(sandboxes, cpus, memory, starts, oldest)
        if whole:
            base.check(quota, used, record.config, count)
        else:
            count = base.fitting(quota, used, record.config, count)
        if quota.creates_per_minute is not None:
            await db.executemany(f"INSERT INTO start (tenant, at) VALUES ($1, {_NOW})", [(record.tenant,)] * count)
        return count

    async def _again(self, read: Callable[[Any], Awaitable[Any]]) -> Any:
        """The result of a query; repeated once over another connection when its connection ended at once."""
        began = time.monotonic()
        try:
            async with self._connected() as db:
                return await read(db)
        except Unavailable:
            if time.monotonic() - began > _RETRY:
                raise
        async with self._connected() as db:
            return await read(db)

    async def get(self, sandbox_id: str) -> Record | None:
        row = await self._again(lambda db: db.fetchrow(f"{_SELECT} WHERE id = $1", _text(sandbox_id)))
        return None if row is None else _load(row)

    async def by_key(self, key: str, tenant: str = "") -> Record | None:
        found: Record | None = await self._again(lambda db: self._by_key(db, key, tenant))
        return found

    async def _by_key(self, db: Any, key: str, tenant: str) -> Record | None:
        row = await db.fetchrow(f"{_SELECT} WHERE tenant = $1 AND idempotency_key = $2", tenant, _text(key))
        return None if row is None else _load(row)

    async def put(self, record: Record, quota: Quota | None = None) -> Record:
        new = replace(record, version=record.version + 1)
        _, version, state, _, stopped_at, *_, name, facts, info, config = _columns(new)
        await faults.point("store.put")
        async with self._transaction() as db:
            if quota is not None:
                await self._take(db, new, quota)
            try:
                found = await db.fetchval(
                    "UPDATE sandbox SET version = $1, state = $2, stopped_at = $3, name = $4, facts = $5, info = $6, "
                    "config = $7 WHERE id = $8 AND version = $9 RETURNING pg_notify($10, id)::text",
                    version, state, stopped_at, name, facts, info, config, record.id, record.version, _CHANNEL,
                )  # fmt: skip
            except asyncpg.UniqueViolationError:
                raise name_taken(new) from None
            if found is None:
                raise VersionConflict(record.id)
        await faults.point("store.saved")
        return new

    async def delete(self, sandbox_id: str) -> None:
        async with self._connected() as db:
            text = "DELETE FROM sandbox WHERE id = $1 RETURNING pg_notify($2, id)"
            await db.execute(text, _text(sandbox_id), _CHANNEL)

    async def list(self, query: Query) -> Sequence[Record]:
        where, values = ["true"], list[Any]()

        def value(given: Any) -> str:
            values.append(given)
            return f"${len(values)}"

        if query.states:
            where.append(f"state = ANY({value([state.value for state in query.states])}::text[])")
        for name, text in query.fields.items():
            if name not in _FIELDS:
                raise ValueError(f"cannot list by {name!r}")
            where.append(f"facts->>'{name}' = {value(_text(text))}")
        if query.tenant is not None:
            where.append(f"tenant = {value(query.tenant)}")
        if query.left:
            where.append(_LEFT)
        for name, text in query.labels.items():
            where.append(f"facts->'labels'->>{value(_text(name))}::text = {value(_text(text))}")
        if query.after is not None:
            where.append(f"(created_at, id) < ({value(query.after[0])}, {value(_text(query.after[1]))})")
        text = f"{_SELECT} WHERE {' AND '.join(where)} ORDER BY created_at DESC, id DESC LIMIT {value(query.limit)}"
        async with self._connected() as db:
            rows = await db.fetch(text, *values)
        return [_load(row) for row in rows]

    async def count(self, tenant: str | None = None) -> dict[str, int]:
        text = "SELECT state, count(*) FROM sandbox WHERE $1::text IS NULL OR tenant = $1 GROUP BY state"
        async with self._connected() as db:
            return dict(await db.fetch(text, tenant))

    async def tally(self) -> dict[tuple[str, str], int]:
        async with self._connected() as db:
            rows = await db.fetch("SELECT tenant, state, count(*) AS n FROM sandbox GROUP BY tenant, state")
        return {(row["tenant"], row["state"]): row["n"] for row in rows}

    async def prune(self, before: float) -> int:
        async with self._connected() as db:
            done = await db.execute(
                "DELETE FROM sandbox WHERE state = ANY($1) AND stopped_at < $2 "
                f"AND coalesce((facts->>'deleted_at')::float8, 0) < $2 AND NOT {_LEFT}",
                [State.STOPPED.value, State.DELETED.value], before,
            )  # fmt: skip
        return int(done.split()[-1])

    async def identity(self) -> str:
        async with self._connected() as db:
            return str(await db.fetchval("SELECT value FROM about WHERE name = 'identity'"))

    def missing(self) -> str | None:
        return None

    # ---- API keys ----

    async def add_key(self, digest: str, info: KeyInfo) -> None:
        async with self._connected() as db:
            await db.execute(
                "INSERT INTO api_key (digest, id, created_at, info) VALUES ($1, $2, $3, $4)",
                digest, info.id, info.created_at, info.model_dump_json(),
            )  # fmt: skip

    async def key_of(self, digest: str) -> KeyInfo | None:
        async with self._connected() as db:
            found = await db.fetchval("SELECT info FROM api_key WHERE digest = $1", digest)
        return None if found is None else KeyInfo.model_validate_json(found)

    async def keys(self) -> Sequence[KeyInfo]:
        async with self._connected() as db:
            rows = await db.fetch("SELECT info FROM api_key ORDER BY created_at, id")
        return [KeyInfo.model_validate_json(row[0]) for row in rows]

    async def revoke_key(self, key_id: str, at: float) -> KeyInfo:
        async with self._transaction() as db:
            found = await db.fetchval("SELECT info FROM api_key WHERE id = $1 FOR UPDATE", _text(key_id))
            if found is None:
                raise no_key(key_id)
            info = KeyInfo.model_validate_json(found)
            if info.revoked_at is None:
                info = info.model_copy(update={"revoked_at": at})
                await db.execute("UPDATE api_key SET info = $1 WHERE id = $2", info.model_dump_json(), info.id)
            return info

    # ---- leases ----

    async def take_lease(self, name: str, holder: str, seconds: float) -> Lease | None:
        async with self._connected() as db:
            token = await db.fetchval(_TAKE_LEASE, name, holder, seconds)
        return None if token is None else Lease(name, holder, token)

    async def drop_lease(self, name: str, holder: str) -> None:
        async with self._connected() as db:
            await db.execute("UPDATE lease SET until = 0 WHERE name = $1 AND holder = $2", name, holder)


def _columns(record: Record) -> tuple[Any, ...]:
    info = record.info
    facts = {name: _text(value) for name in _FIELDS if (value := getattr(info, name)) is not None} | {
        "labels": {_text(name): _text(value) for name, value in info.labels.items()},
        "kept": info.kept, "archived": info.archive is not None, "deleted_at": info.deleted_at,
    }  # fmt: skip
    return (
        record.id, record.version, info.state.value, info.created_at, info.stopped_at, record.tenant,
        None if record.key is None else _text(record.key), base.cpus_of(record.config), record.config.memory_bytes,
        info.name,
        # The registry password is needed for one pull only: it is not stored.
        orjson.dumps(facts).decode(), info.model_dump_json(),
        record.config.model_dump_json(exclude={"registry_password", *record.config.unchosen}),
    )  # fmt: skip


def _load(row: Any) -> Record:
    version, key, info, config = row
    if key is not None:
        key = re.sub(r"\\(.)", lambda found: "\0" if found[1] == "0" else found[1], key)
    return Record(SandboxInfo.model_validate_json(info), SandboxConfig.model_validate_json(config), key, version)


# ---- workers ----
#
# Implements `Workers` of base.py.

_POSTGRES_WORKERS_SELECT = f"SELECT {COLUMNS}, {_NOW} - seen_at FROM worker"


class PostgresWorkers:
    """The workers table. transaction: opens a connection in a transaction of its own."""

    def __init__(self, transaction: Callable[[], AbstractAsyncContextManager[Any]]) -> None:
        self._transaction = transaction

    async def join(self, spec: JoinWorker) -> WorkerInfo:
        async with self._transaction() as db:
            await db.execute("SELECT pg_advisory_xact_lock($1, hashtext($2))", _POSTGRES_WORKERS_LOCK, spec.name)
            epoch = next_epoch(await _get(db, spec.name), spec)
            await db.execute(
                "INSERT INTO worker (name, holder, url, epoch, beat, lost, draining, version, status, seen_at) "
                f"VALUES ($1, $2, $3, $4, 1, false, false, $5, $6, {_NOW}) ON CONFLICT (name) DO UPDATE SET "
                "holder = excluded.holder, url = excluded.url, epoch = excluded.epoch, beat = worker.beat + 1, "
                "lost = false, version = excluded.version, status = excluded.status, seen_at = excluded.seen_at",
                spec.name, spec.holder, spec.url, epoch, spec.version, spec.status.model_dump_json(),
            )  # fmt: skip
            return await _known(db, spec.name)

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

    async def drain(self, name: str, draining: bool, evacuating: bool = False) -> WorkerInfo:
        async with self._transaction() as db:
            text = "UPDATE worker SET draining = $1, evacuating = $2 WHERE name = $3"
            await db.execute(text, draining, evacuating, name)
            return await _known(db, name)

    async def remove(self, name: str) -> None:
        async with self._transaction() as db:
            if not (await _known(db, name, "FOR UPDATE")).is_lost:
                raise not_lost(name)
            await db.execute("DELETE FROM worker WHERE name = $1", name)

    async def list(self) -> Sequence[WorkerInfo]:
        async with self._transaction() as db:
            return [loaded(row) for row in await db.fetch(f"{_POSTGRES_WORKERS_SELECT} ORDER BY name")]


_POSTGRES_WORKERS_LOCK = 0x524F434C  # advisory lock of joins, in the database


async def _get(db: Any, name: str, how: str = "") -> WorkerInfo | None:
    row = await db.fetchrow(f"{_POSTGRES_WORKERS_SELECT} WHERE name = $1 {how}", name)
    return None if row is None else loaded(row)


async def _known(db: Any, name: str, how: str = "") -> WorkerInfo:
    found = await _get(db, name, how)
    if found is None:
        raise unknown(name)
    return found
