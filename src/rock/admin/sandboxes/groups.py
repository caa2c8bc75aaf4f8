"""Groups: many equal sandboxes created by one request, all of them or as many as fit.

    place all ─► one transaction ─► launch each ─► all run
                                        └ one fails, and it is a gang ─► the others are stopped

The only state of a group is that of its sandboxes: each record has the id of its group. The reconciler can therefore
recover from a crash at any point: it launches pending sandboxes, and stops the rest of a gang whose start failed
(`settle`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from rock.admin.sandboxes import lifecycle
from rock.admin.sandboxes.starts import Starts
from rock.admin.workers.client import Worker
from rock.admin.workers.placement import Placer
from rock.errors import Conflict, InvalidConfig, NotFound, RockError, from_wire
from rock.protocol.action import GroupInfo, GroupRequest
from rock.protocol.keys import Caller
from rock.protocol.sandbox import Cause, SandboxConfig, SandboxInfo, State
from rock.store.base import Record, Store, member

_STOPPED_AT_ONCE = 64
_CHECKED_AT_ONCE = 64
_LONGEST_ID = 128
_ELSEWHERE = 0.2  # seconds between two checks of starts on another server
_BEGUN = (State.PENDING, State.RUNNING)


class Stop(Protocol):
    """Stops a sandbox, see `Service.stop`."""

    def __call__(self, sandbox_id: str, cause: Cause = ..., reason: str = ...) -> Awaitable[SandboxInfo]: ...


class Groups:
    """The group operations of the service. check: raises for a config that this server cannot serve. resolve: adds the
    ids of the volumes of a tenant to a config."""

    def __init__(
        self, store: Store, placer: Placer, start_tasks: Starts, check: Callable[[SandboxConfig], None],
        resolve: Callable[[SandboxConfig, str], Awaitable[SandboxConfig]], stop: Stop,
    ) -> None:  # fmt: skip
        self._store = store
        self._placer = placer
        self._start_tasks = start_tasks
        self._check_config = check
        self._resolve = resolve
        self._stop = stop
        self._undoing: dict[str, asyncio.Task[None]] = {}

    async def close(self) -> None:
        for task in self._undoing.values():
            task.cancel()
        await asyncio.gather(*self._undoing.values(), return_exceptions=True)

    # ---- create ----

    async def create(self, spec: GroupRequest, key: str | None, wait: float, caller: Caller) -> GroupInfo:
        """Create a group, or, for a known key of this tenant, return the existing group.

        Waits up to `wait` seconds for the starts. A gang that cannot start meanwhile raises the reason once all its
        sandboxes are stopped; in best-effort mode the response reports the missing ones.
        """
        first = await self._store.by_key(key, caller.owner) if key else None
        if first is not None:
            records = await self._fresh([_of_group(first)])
        else:
            records = await self._insert(spec, key, wait, caller)
        records, error = await self._started(records, wait)
        if error is not None and spec.mode == "gang":
            raise from_wire(error)
        return _info(records, spec.size - len(records), error)

    async def _insert(self, spec: GroupRequest, key: str | None, wait: float, caller: Caller) -> Sequence[Record]:
        whole = spec.mode == "gang"
        group_id = spec.config.sandbox_id or uuid.uuid4().hex
        config = spec.config.model_copy(update={"sandbox_id": None})
        if config.name is not None:
            raise InvalidConfig(f"name={config.name!r}: a name is for one sandbox, and this group has {spec.size}",
                                hint="use labels for the sandboxes of a group")
        self._check_config(config)
        config = await self._resolve(config, caller.owner)
        ids = [member(group_id, number) for number in range(spec.size)]
        if len(ids[-1]) > _LONGEST_ID:
            raise InvalidConfig(f"sandbox_id {group_id[:20]}... is too long for a group of {spec.size} sandboxes: a "
                                f"member's id has at most {_LONGEST_ID} characters",
                                hint="choose a shorter sandbox_id, or leave it out")
        workers: list[Worker | None] = [None] * spec.size
        if self._placer.reservations is not None:
            await self._placer.check(config)
        else:
            workers = list(await self._placer.place_group(ids, config, spec.placement, whole))
        started: set[str] = set()
        try:
            await self._check(config, workers)
            async with self._start_tasks.queue.group(caller.owner, wait):
                records = self._records(spec, group_id, config, ids, workers, key, caller)
                made = await self._store.insert_group(records, caller.quota, whole)
                _of_group(made[0])
                for record in made:
                    if record.state is State.PENDING:
                        self._start_tasks.begin(record)
                        started.add(record.id)
            return made
        finally:
            for sandbox_id in ids:
                if sandbox_id not in started:
                    self._placer.landed(sandbox_id)

    def _records(
        self, spec: GroupRequest, group_id: str, config: SandboxConfig, ids: Sequence[str],
        workers: Sequence[Worker | None], key: str | None, caller: Caller,
    ) -> list[Record]:  # fmt: skip
        """The records of the sandboxes that have a worker; the first has the key."""
        placer, now, records = self._placer, time.time(), list[Record]()
        for number, (sandbox_id, worker) in enumerate(zip(ids, workers, strict=False)):
            name = worker.name if worker is not None else None
            status = placer.status(name) if name is not None else None
            info = lifecycle.new_info(sandbox_id, config, name, status, caller.owner)
            info.__dict__.update(group=group_id, gang=spec.mode == "gang", created_at=now)
            records.append(Record(info, config, key if number == 0 else None))
        return records

    async def _check(self, config: SandboxConfig, workers: Sequence[Worker | None]) -> None:
        """Raise the errors that a create would raise at once, on any of the workers."""
        gate = asyncio.Semaphore(_CHECKED_AT_ONCE)

        async def one(worker: Worker) -> None:
            async with gate:
                await worker.check(config)

        each = {worker.name: worker for worker in workers if worker is not None}
        await asyncio.gather(*(one(worker) for worker in each.values()))

    async def _started(
        self, records: Sequence[Record], wait: float
    ) -> tuple[Sequence[Record], dict[str, Any] | None]:  # fmt: skip
        """Wait for the starts, up to `wait` seconds: the records, and the error of the first failed start, once a gang
        is stopped."""
        if wait > 0:
            try:
                async with asyncio.timeout(wait):
                    while any(record.state is State.PENDING for record in records):
                        records = await self._ended(records)
                    undoing = self._undoing.get(records[0].info.group or "")
                    if undoing is not None:
                        await asyncio.shield(undoing)
                        records = await self._fresh(records)
            except TimeoutError:
                records = await self._fresh(records)
        failed = (record for record in records if record.info.cause is Cause.START_FAILED)
        return records, next((record.info.error for record in failed if record.info.error is not None), None)

    async def _ended(self, records: Sequence[Record]) -> Sequence[Record]:
        """The records after their starts, as they were saved then: the group is not read again."""
        start_tasks = {record.id: launch for record in records if (launch := self._start_tasks.of(record.id))}
        if not start_tasks:  # another server starts them
            await asyncio.sleep(_ELSEWHERE)
            return await self._fresh(records)
        await asyncio.wait(start_tasks.values())
        if any(launch.cancelled() or launch.exception() is not None for launch in start_tasks.values()):
            return await self._fresh(records)
        return [start_tasks[record.id].result() if record.id in start_tasks else record for record in records]

    async def _fresh(self, records: Sequence[Record]) -> Sequence[Record]:
        first = records[0]
        return await self._store.group(first.info.group or "", first.tenant)

    # ---- failed start of a gang ----

    def launch_failed(self, record: Record) -> None:
        """One sandbox of a gang did not start: the others are stopped. A restart from retained files does not affect
        the group."""
        group_id = record.info.group
        if not record.info.gang or group_id is None or record.info.error is None:
            return  # without an error it was stopped while it started
        if _ran(record) or group_id in self._undoing:
            return
        task = asyncio.create_task(self._undo(record), name=f"undo-{group_id}")
        self._undoing[group_id] = task
        task.add_done_callback(lambda _: self._undoing.pop(group_id, None))

    async def _undo(self, failed: Record) -> None:
        reason = f"sandbox {failed.id} of its group could not start: {failed.info.reason}"
        gate = asyncio.Semaphore(_STOPPED_AT_ONCE)

        async def stop(sandbox_id: str) -> None:
            async with gate:
                with contextlib.suppress(RockError):  # a failed stop is retried later, see Service.stop
                    await self._stop(sandbox_id, Cause.START_FAILED, reason)

        members = await self._store.group(failed.info.group or "", failed.tenant)
        await asyncio.gather(*(stop(one.id) for one in members if one.state in _BEGUN))

    async def settle(self, groups: set[tuple[str, str]]) -> None:
        """After a crash: stop the remaining sandboxes of gangs, by tenant and id, whose start failed."""
        for tenant, group_id in groups:
            members = await self._store.group(group_id, tenant)
            for record in members:
                if record.info.cause is Cause.START_FAILED and record.info.error is not None:
                    self.launch_failed(record)
                    break

    # ---- read and stop ----

    async def get(self, group_id: str, tenant: str | None, wait: float) -> GroupInfo:
        """The current state of a group, after up to `wait` seconds while it starts. NotFound."""
        records = await self._members(group_id, tenant)
        if wait > 0 and any(record.state is State.PENDING for record in records):
            await self._started(records, wait)
            records = await self._members(group_id, tenant)
        return _info(records)

    async def stop(self, group_id: str, tenant: str | None) -> GroupInfo:
        """Stop all of it; stopped ones stay unchanged. NotFound. The first error is raised at the end."""
        gate = asyncio.Semaphore(_STOPPED_AT_ONCE)

        async def stop(record: Record) -> None:
            async with gate:
                with contextlib.suppress(NotFound):  # it was deleted meanwhile
                    await self._stop(record.id)

        records = await self._members(group_id, tenant)
        outcomes = await asyncio.gather(*(stop(record) for record in records), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return _info(await self._members(group_id, tenant))

    async def _members(self, group_id: str, tenant: str | None) -> Sequence[Record]:
        records = await self._store.group(group_id, tenant)
        if not records:
            raise NotFound(f"there is no group {group_id!r}",
                           hint="check the id; it is in the reply that created the group")
        return records


def _of_group(record: Record) -> Record:
    if record.info.group is None:
        raise Conflict("the idempotency key belongs to a sandbox that is not in a group", sandbox_id=record.id,
                       hint="use a new idempotency key for the group")
    return record


def _ran(record: Record) -> bool:
    return any(step.to_state is State.RUNNING for step in record.info.state_history)


def _info(records: Sequence[Record], missing: int = 0, error: dict[str, Any] | None = None) -> GroupInfo:
    infos_of = [record.info.model_copy(update={"state_history": []}) for record in records]
    return GroupInfo(group_id=records[0].info.group or "", sandboxes=infos_of, missing=max(0, missing), error=error)
