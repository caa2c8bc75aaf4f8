"""The store interface of the admin: versioned sandbox records, API keys, leases, quotas and workers.

Each record has a version, so that of two concurrent writers only one succeeds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rock.errors import Conflict, NotFound, QuotaExceeded
from rock.protocol.keys import KeyInfo, Quota
from rock.protocol.node import Beat, JoinWorker, NodeStatus, WorkerInfo, WorkerState
from rock.protocol.sandbox import SandboxConfig, SandboxInfo, State
from rock.store.access import AccessStore
from rock.store.configurations import Configurations
from rock.store.jobs import Jobs
from rock.store.pools import Pools
from rock.store.recordings import Recordings
from rock.store.snapshots import Snapshots
from rock.store.volumes import Volumes

CLOSED = "the server is stopping; try again after its restart"  # a hint of errors

@dataclass(slots=True)
class Record:
    """A stored sandbox; immutable. `key`: the idempotency key of its creation, unique in its tenant where there is one.
    id, tenant, state: of its info."""

    info: SandboxInfo
    config: SandboxConfig
    key: str | None = None
    version: int = 0
    id: str = field(init=False, repr=False, compare=False)
    tenant: str = field(init=False, repr=False, compare=False)
    state: State = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.id, self.tenant, self.state = self.info.sandbox_id, self.info.tenant, self.info.state

    def at(self, version: int) -> Record:
        """The same record with the version under which it is saved."""
        return Record(self.info, self.config, self.key, version)

    def changed(self, **fields: object) -> Record:
        """The same record with other fields of `info`."""
        return Record(self.info.model_copy(update=fields), self.config, self.key, self.version)


def member(group_id: str, number: int) -> str:
    """The id of a sandbox of a group."""
    return f"{group_id}-{number}"


def ordered(records: Sequence[Record], group_id: str) -> Sequence[Record]:
    """The records of the group, in its order. Records of other groups whose ids have the same prefix are filtered
    out."""
    mine = (record for record in records if record.info.group == group_id)
    return sorted(mine, key=lambda record: int(record.id[len(group_id) + 1 :]))


def no_key(key_id: str) -> NotFound:
    return NotFound(f"there is no key {key_id}", hint="`rock key ls` shows the ids of the keys")


def id_taken(sandbox_id: str) -> Conflict:
    return Conflict(
        f"Sandbox {sandbox_id} already exists",
        sandbox_id=sandbox_id,
        hint="choose another sandbox_id, or delete the stopped one",
    )


def name_taken(record: Record) -> Conflict:
    return Conflict(
        f"another sandbox that has not ended has the name {record.info.name}",
        sandbox_id=record.id,
        hint=f"choose another name, or stop that sandbox: rock stop {record.info.name}",
    )


class VersionConflict(Exception):
    """Another writer changed the record since it was read."""


@dataclass(frozen=True)
class Query:
    """A query for records: equality on fields of `info`, and labels that must match; newest first.

    after: the `created_at` and id of the last record of the previous page.
    left: only records whose files are retained on a worker or in the archive.
    tenant: the owner; "" is the server's owner, None is all tenants.
    """

    states: Sequence[State] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    limit: int = 500
    after: tuple[float, str] | None = None
    left: bool = False
    tenant: str | None = None


@dataclass(frozen=True)
class Lease:
    """A lease that one process at a time may hold. token: the fencing token; it grows with each new holder, and workers
    reject a token below one that they have received."""

    name: str
    holder: str
    token: int


class Store(Protocol):
    """The store of records. Every method raises StorageFull or Unavailable when the database fails.

    shared: other servers may use it at the same time. workers: the workers that joined.
    """

    shared: bool

    @property
    def workers(self) -> Workers: ...

    @property
    def volumes(self) -> Volumes: ...

    @property
    def snapshots(self) -> Snapshots: ...

    @property
    def pools(self) -> Pools: ...

    @property
    def recordings(self) -> Recordings: ...

    @property
    def configurations(self) -> Configurations: ...

    @property
    def jobs(self) -> Jobs: ...

    @property
    def access(self) -> AccessStore: ...

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def identity(self) -> str:
        """The identity of this store, chosen at its creation and unique. A copy has that of its original."""
        ...

    def missing(self) -> str | None:
        """The missing part of a store that was not opened yet; None when it is complete, or when that cannot be
        determined."""
        ...

    async def insert(self, record: Record, quota: Quota | None = None) -> Record:
        """Add a record. Conflict when the id or the name is taken; when the key is in use, returns the record that has
        it.

        quota: of its tenant; QuotaExceeded. The check is exact for concurrent requests, here or on other servers.
        """
        ...

    async def insert_group(
        self, records: Sequence[Record], quota: Quota | None = None, whole: bool = True
    ) -> Sequence[Record]:
        """Add equal records of one group and tenant in one transaction: all, or without `whole` as many as the quota
        allows, from the first on. Only the first has an idempotency key; when it is in use, the group that has it is
        returned. Conflict, QuotaExceeded."""
        ...

    async def group(self, group_id: str, tenant: str | None) -> Sequence[Record]:
        """The records of a group, in its order; tenant None is all tenants."""
        ...

    async def get(self, sandbox_id: str) -> Record | None: ...

    async def by_key(self, key: str, tenant: str = "") -> Record | None:
        """The record that a tenant created with this idempotency key."""
        ...

    async def put(self, record: Record, quota: Quota | None = None) -> Record:
        """Save over the version that was read; the config stays unchanged. VersionConflict when a newer version exists,
        Conflict when its name is taken. quota: for a step that starts the sandbox again."""
        ...

    async def delete(self, sandbox_id: str) -> None: ...

    async def list(self, query: Query) -> Sequence[Record]: ...

    async def count(self, tenant: str | None = None) -> dict[str, int]:
        """Number of records by state; of all tenants, or of one."""
        ...

    async def tally(self) -> dict[tuple[str, str], int]:
        """Number of records by tenant and state."""
        ...

    async def prune(self, before: float) -> int:
        """Delete records of stopped and deleted sandboxes that ended before that time, except those with retained
        files.

        Returns their number.
        """
        ...

    def watch(self) -> AsyncGenerator[str]:
        """Ids of records that any server adds, changes or removes, from the first iteration on; "" means that some may
        have been missed."""
        ...

    # ---- API keys ----

    async def add_key(self, digest: str, info: KeyInfo) -> None:
        """Store a key by its digest."""
        ...

    async def key_of(self, digest: str) -> KeyInfo | None:
        """A key by its digest, including revoked keys."""
        ...

    async def keys(self) -> Sequence[KeyInfo]:
        """All keys, oldest first."""
        ...

    async def revoke_key(self, key_id: str, at: float) -> KeyInfo:
        """Revoke it; a revoked key stays unchanged. NotFound."""
        ...

    # ---- leases ----

    async def take_lease(self, name: str, holder: str, seconds: float) -> Lease | None:
        """Acquire or renew a lease: `seconds` from now. None while another process holds it."""
        ...

    async def drop_lease(self, name: str, holder: str) -> None:
        """Release the lease, if this process holds it."""
        ...


class Reserve(Protocol):
    """Reserved disk space; see rock/cli/serve/home.py."""

    released: bool

    def release(self) -> bool:
        """Release the space; returns whether there was any."""
        ...


# ---- quotas ----
#
# The check whether more sandboxes fit a quota. Pure. A store calls it inside the transaction that adds them.

COUNTED = (State.PENDING, State.RUNNING, State.STOPPING)  # states in which a sandbox counts for its tenant's quota
WINDOW = 60.0  # seconds
_SOMETHING_STOPS = 5.0  # seconds of Retry-After when only the end of a sandbox frees capacity


@dataclass(frozen=True)
class Used:
    """The current usage of a tenant. starts: within the window; oldest: seconds since the first of them."""

    sandboxes: int = 0
    cpus: float = 0.0
    memory: int = 0
    starts: int = 0
    oldest: float = 0.0


def cpus_of(config: SandboxConfig) -> float:
    """The CPUs that count for the quota: the hard limit, where there is one."""
    return max(config.cpus, config.limit_cpus or 0.0)


def check(quota: Quota, used: Used, config: SandboxConfig, count: int = 1) -> None:
    """Raise QuotaExceeded when `count` more do not fit."""
    wanted = (
        ("sandboxes", quota.sandboxes, used.sandboxes, count),
        ("cpus", quota.cpus, used.cpus, cpus_of(config) * count),
        ("bytes of memory", quota.memory_bytes, used.memory, config.memory_bytes * count),
    )
    for what, limit, have, more in wanted:
        if limit is not None and have + more > limit * (1 + 1e-9):
            raise QuotaExceeded(
                f"the quota of this key is {limit:g} {what} at once; {have:g} are in use and {more:g} were asked for",
                hint="stop some first",
                details={"quota": what, "limit": limit, "used": have, "retry_after": _SOMETHING_STOPS},
            )
    limit = quota.creates_per_minute
    if limit is not None and used.starts + count > limit:
        wait = max(0.0, WINDOW - used.oldest) if limit else WINDOW
        raise QuotaExceeded(
            f"the quota of this key is {limit} starts a minute",
            hint=f"ask again in {wait:.0f} s",
            details={"quota": "creates_per_minute", "limit": limit, "used": used.starts, "retry_after": wait},
        )


def fitting(quota: Quota, used: Used, config: SandboxConfig, count: int) -> int:
    """The number of `count` that fit. QuotaExceeded when none fits."""
    check(quota, used, config)
    least, most = 1, count
    while least < most:
        middle = (least + most + 1) // 2
        try:
            check(quota, used, config, middle)
        except QuotaExceeded:
            most = middle - 1
        else:
            least = middle
    return least


# ---- workers ----
#
# The workers that joined: one row each. An update requires the epoch and the heartbeat that were read.

COLUMNS = "name, holder, url, epoch, beat, lost, draining, evacuating, version, status"


class Workers(Protocol):
    """The workers that joined. Each method raises Unavailable or StorageFull when the database fails."""

    async def join(self, spec: JoinWorker) -> WorkerInfo:
        """Add a worker, under its current epoch or under a new one. Conflict while another holder of the name is not
        lost."""
        ...

    async def beat(self, name: str, beat: Beat) -> WorkerInfo:
        """Count a heartbeat. Conflict when its epoch is over, or the name has another holder; NotFound."""
        ...

    async def lose(self, name: str, epoch: int, beat: int | None = None) -> bool:
        """Declare it lost: its epoch is over. False when it has another epoch, or sent a heartbeat since `beat`."""
        ...

    async def drain(self, name: str, draining: bool, evacuating: bool = False) -> WorkerInfo:
        """Set whether it accepts no more sandboxes, and whether those that it has are archived. NotFound."""
        ...

    async def remove(self, name: str) -> None:
        """Remove a lost worker. Conflict for one that is not lost; NotFound."""
        ...

    async def list(self) -> Sequence[WorkerInfo]:
        """All workers, by name."""
        ...


def loaded(row: Any) -> WorkerInfo:
    """A worker from a row with COLUMNS, and the seconds since its last heartbeat."""
    name, holder, url, epoch, beat, lost, draining, evacuating, version, status, age = row
    state = WorkerState.LOST if lost else WorkerState.DRAINING if draining else WorkerState.READY
    return WorkerInfo(name=name, holder=holder, url=url, epoch=epoch, beat=beat, state=state, draining=bool(draining),
                      evacuating=bool(evacuating), version=version, status=NodeStatus.model_validate_json(status),
                      age=max(age, 0.0))  # fmt: skip


def next_epoch(known: WorkerInfo | None, spec: JoinWorker) -> int:
    """The epoch under which a worker joins. Conflict."""
    if known is None:
        return spec.epoch + 1  # the row was removed: the new epoch is above all that the worker had
    if known.holder != spec.holder and not known.is_lost:
        raise Conflict(f"another machine is worker {spec.name} ({known.url})",
                       hint="choose another --name, or wait until that one is lost")  # fmt: skip
    same = known.holder == spec.holder and known.epoch == spec.epoch
    goes_on = same and not known.is_lost and not spec.fresh
    return known.epoch if goes_on else max(known.epoch, spec.epoch) + 1


def over(name: str, known: WorkerInfo | None) -> Conflict | NotFound:
    """The error of a rejected heartbeat."""
    if known is None:
        return unknown(name)
    return Conflict(f"the lease of worker {name} is over", hint="join again", details={"epoch": known.epoch})


def unknown(name: str) -> NotFound:
    return NotFound(f"there is no worker {name}", hint="rock worker ls")


def not_lost(name: str) -> Conflict:
    return Conflict(f"worker {name} is there", hint="stop its rocklet first, or give force")


# ---- watchers ----
#
# The watchers of a store in this process.

_MOST = 10_000


class Watchers:
    """Distributes ids to the watchers of the store. A watcher that is too slow receives "", which means that it missed
    some."""

    def __init__(self) -> None:
        self._queues: list[asyncio.Queue[str]] = []

    def tell(self, sandbox_id: str) -> None:
        for queue in self._queues:
            missed = queue.full()
            while missed and not queue.empty():
                queue.get_nowait()
            queue.put_nowait("" if missed else sandbox_id)

    async def watch(self) -> AsyncGenerator[str]:
        queue: asyncio.Queue[str] = asyncio.Queue(_MOST)
        self._queues.append(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._queues.remove(queue)
