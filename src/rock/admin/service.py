"""Create, stop, delete, list: load, decide, save if unchanged, command the worker.

Every change of a record goes through `_apply`: the pure lifecycle decides, the store saves over the version that was
read, and only then the effects are carried out. A crash in between is finished by the reconciler.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping
from typing import Any

from rock.admin.lifecycle import Effect, Event, step
from rock.admin.worker import Worker
from rock.envhub import registry
from rock.errors import InternalServerRockError, NotFound, RockError, SandboxError, from_wire
from rock.protocol.env import OpenEnv
from rock.protocol.node import NodeSandbox, NodeStatus, SandboxList
from rock.protocol.sandbox import Cause, SandboxConfig, SandboxInfo, State
from rock.scheduler.base import Scheduler
from rock.store.base import Query, Record, Store, VersionConflict

log = logging.getLogger("rock.admin")

ENV_LABEL = "rock.env"
_STATUS_AGE = 1.0  # seconds
_RETRY = 5.0
_MOST_RECENT = 10_000
_ALIVE = (State.PENDING, State.RUNNING, State.STOPPING)


class Service:
    """The control plane over a store, a scheduler and workers. `scheduled` is told of each sandbox that runs."""

    def __init__(self, store: Store, scheduler: Scheduler, workers: Mapping[str, Worker]) -> None:
        self.store = store
        self.scheduler = scheduler
        self.workers = workers
        self._launches: dict[str, asyncio.Task[Record]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._env_lock = asyncio.Lock()
        self.on_schedule: list[Any] = []
        self.on_unfinished: list[Any] = []
        self._status: Mapping[str, NodeStatus] = {}
        self._asked_at = float("-inf")
        self._recent: dict[str, Record] = {}  # as they were saved last, by us

    async def close(self) -> None:
        """Cancel what is under way; its records stay as they are for the next start."""
        tasks = [*self._launches.values(), *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- create ----

    async def create(self, config: SandboxConfig, key: str | None = None, wait: float = 0.0) -> SandboxInfo:
        """Make a sandbox, or, for a key that was seen, answer with the one that was made.

        Waits up to `wait` seconds for the start; a start that fails meanwhile raises its reason.
        """
        try:
            record = await self._insert(config, key)
        except RockError:
            known = await self.store.by_key(key) if key else None  # what was made then may no longer fit now
            if known is None:
                raise
            record = known
        return await self._waited(record, wait)

    async def _insert(self, config: SandboxConfig, key: str | None = None) -> Record:
        worker = await self._place(config)
        await worker.check(config)
        sandbox_id = config.sandbox_id or uuid.uuid4().hex
        record = await self.store.insert(
            Record(_new_info(sandbox_id, config, worker.name, self._status[worker.name]), config, key)
        )
        if record.state is State.PENDING:
            self.launch(record)
        return record

    async def _place(self, config: SandboxConfig) -> Worker:
        return self.workers[self.scheduler.place(config, await self._statuses())]

    async def _statuses(self) -> Mapping[str, NodeStatus]:
        """What the workers report, at most a second old: a worker refuses by itself what it has no room for."""
        if time.monotonic() - self._asked_at > _STATUS_AGE:
            self._status = {name: await worker.status() for name, worker in self.workers.items()}
            self._asked_at = time.monotonic()
        return self._status

    def launch(self, record: Record) -> asyncio.Task[Record]:
        """Start a pending sandbox in the background; one task a sandbox."""
        task = self._launches.get(record.id)
        if task is None:
            task = asyncio.create_task(self._launch(record), name=f"launch-{record.id}")
            self._launches[record.id] = task
            task.add_done_callback(lambda done: self._launched(record.id, done))
        return task

    def _launched(self, sandbox_id: str, task: asyncio.Task[Record]) -> None:
        self._launches.pop(sandbox_id, None)
        if not task.cancelled() and task.exception() is not None:
            log.error("launch of %s: %r", sandbox_id, task.exception())
            self._unfinished(sandbox_id)

    def _unfinished(self, sandbox_id: str) -> None:
        """A step could not be completed: somebody has to come back to it."""
        for listener in self.on_unfinished:
            listener(sandbox_id)

    async def _launch(self, record: Record) -> Record:
        worker = self.workers[record.info.worker or ""]
        try:
            async with asyncio.timeout(record.config.startup_timeout):
                made = await worker.create(record.id, record.config)
        except TimeoutError:
            error: RockError = SandboxError(
                f"sandbox {record.id} did not start within {record.config.startup_timeout:g} s", sandbox_id=record.id
            )
        except RockError as raised:
            error = raised
        except Exception as raised:
            log.exception("launch of %s", record.id)
            error = InternalServerRockError(f"{type(raised).__name__}: {raised}", sandbox_id=record.id)
        else:
            return await self.apply(record.id, Event.LAUNCHED, known=record, **_running(made))
        wire = error.to_wire()
        wire["error"]["sandbox_id"] = record.id
        return await self.apply(
            record.id, Event.LAUNCH_FAILED, cause=Cause.START_FAILED, reason=error.message, error=wire
        )

    async def _waited(self, record: Record, wait: float) -> SandboxInfo:
        """What became of a start after at most `wait` seconds; one that failed raises its reason."""
        record = await self._launch_ended(record, wait)
        if record.info.cause is Cause.START_FAILED and record.info.error:
            raise from_wire(record.info.error)
        return record.info

    async def _launch_ended(self, record: Record, wait: float) -> Record:
        """The record once it is no longer being launched, or after `wait` seconds as it was."""
        launch = self._launches.get(record.id)
        if launch is not None and wait > 0:
            try:
                async with asyncio.timeout(wait):
                    return await asyncio.shield(launch)
            except TimeoutError:
                pass
        return record

    # ---- read ----

    async def load(self, sandbox_id: str) -> Record:
        record = await self.store.get(sandbox_id)
        if record is None:
            raise NotFound(f"Sandbox {sandbox_id} not found", sandbox_id=sandbox_id)
        return record

    async def get(self, sandbox_id: str, *, wait: float = 0.0, touch: bool = False, usage: bool = False) -> SandboxInfo:
        """Status, with what its worker says of it now. `wait`: seconds, as long as it is pending."""
        record = await self.load(sandbox_id)
        if record.state is State.PENDING:
            record = await self._launch_ended(record, wait)
        if record.state is not State.RUNNING:
            return record.info
        try:
            found = await self.workers[record.info.worker or ""].get(sandbox_id, touch=touch, usage=usage)
        except RockError as error:
            log.info("worker of %s: %s", sandbox_id, error)
            return record.info.model_copy(update={"is_alive": False})
        return _seen(record, found)

    async def list(self, query: Query) -> SandboxList:
        records = await self.store.list(query)
        last = records[-1].info if len(records) == query.limit else None
        return SandboxList(
            items=[r.info for r in records], next=f"{last.created_at!r}:{last.sandbox_id}" if last else None
        )

    # ---- stop and delete ----

    async def stop(
        self, sandbox_id: str, cause: Cause = Cause.USER, reason: str = "stopped by its user"
    ) -> SandboxInfo:
        """Stop it and wait until nothing of it is left; a stopped one stays as it is."""
        record = await self.apply(sandbox_id, Event.STOP, cause=cause, reason=reason)
        if record.state is State.STOPPING:
            try:
                record = await self.finish_stop(record)
            except BaseException:
                self._unfinished(sandbox_id)
                raise
        return record.info

    async def finish_stop(self, record: Record) -> Record:
        worker = self.workers.get(record.info.worker or "")
        if worker is not None:
            await worker.destroy(record.id)
        return await self.apply(record.id, Event.DESTROYED, known=record)

    async def delete(self, sandbox_id: str, force: bool = False) -> SandboxInfo:
        """Forget a stopped one; with `force` it is stopped first."""
        if force:
            await self.stop(sandbox_id)
        record = await self.load(sandbox_id)
        state, _ = step(record.state, Event.DELETE, sandbox_id)
        await self.store.delete(sandbox_id)
        return record.info.model_copy(update={"state": state})

    # ---- changes ----

    async def apply(self, sandbox_id: str, event: Event, known: Record | None = None, **fields: object) -> Record:
        """One step of the lifecycle, saved; then its effects. What a tombstone says first stays.

        known: the record as it was read last; when it has changed since, it is read again.
        """
        guess = known or self._recent.pop(sandbox_id, None)
        while True:
            record = guess or await self.load(sandbox_id)
            try:
                state, effects = step(record.state, event, sandbox_id)
            except RockError:
                if guess is None:
                    raise
                guess = None
                continue
            if state is record.state and event is not Event.LAUNCHED:
                if guess is not None:  # only what is saved tells whether that is so
                    guess = None
                    continue
                new = record
                break
            guess = None
            if record.info.cause is not None:
                fields = {k: v for k, v in fields.items() if k not in ("cause", "reason", "error")}
            stamp: dict[str, object] = {"state": state, "is_alive": state is State.RUNNING}
            if state is State.STOPPED:
                stamp["stopped_at"] = time.time()
            try:
                new = await self.store.put(record.changed(**{**fields, **stamp}))
                break
            except VersionConflict:
                continue
        self._keep(new)
        if Effect.DESTROY in effects and state is State.STOPPED:
            self._background(self._destroy(new))
        if Effect.SCHEDULE in effects:
            for listener in self.on_schedule:
                listener(new)
        return new

    def _keep(self, record: Record) -> None:
        """Remember a record for its next step: `put` tells when somebody else changed it meanwhile."""
        if record.state is not State.STOPPED:
            self._recent[record.id] = record
            while len(self._recent) > _MOST_RECENT:
                del self._recent[next(iter(self._recent))]

    def _background(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _destroy(self, record: Record) -> None:
        worker = self.workers.get(record.info.worker or "")
        if worker is not None:
            while True:
                try:
                    await worker.destroy(record.id)
                    return
                except RockError as error:
                    log.warning("destroy of %s: %s; trying again", record.id, error)
                    await asyncio.sleep(_RETRY)

    # ---- environments ----

    async def open_env(self, wish: OpenEnv, wait: float, key: str | None = None) -> SandboxInfo:
        """A sandbox that can host the environment: a running one of its package set, else a new one."""
        image = registry.image_for(wish)
        known = await self.store.by_key(key) if key else None
        if known is not None:
            return await self._waited(known, wait)
        async with self._env_lock:  # two first wishes must not make two hosts
            found = (
                []
                if wish.exclusive
                else await self.store.list(
                    Query(states=(State.RUNNING, State.PENDING), labels={ENV_LABEL: image}, limit=1)
                )
            )
            record = found[0] if found else await self._create_env_host(image, wish, key)
        return await self._waited(record, wait)

    async def _create_env_host(self, image: str, wish: OpenEnv, key: str | None) -> Record:
        config = wish.config or SandboxConfig(image="host", memory="4g", cpus=1.0, auto_clear_seconds=600)
        config = config.model_copy(
            update={
                "image": image,
                "labels": config.labels if wish.exclusive else {**config.labels, ENV_LABEL: image},
                # The first start installs the packages.
                "startup_timeout": max(config.startup_timeout, 1200.0),
            }
        )
        return await self._insert(config, key)


def _new_info(sandbox_id: str, config: SandboxConfig, worker: str, status: NodeStatus) -> SandboxInfo:
    return SandboxInfo(
        sandbox_id=sandbox_id,
        state=State.PENDING,
        image=config.image,
        memory=config.memory,
        cpus=config.cpus,
        network=config.network,
        user_id=config.user_id,
        experiment_id=config.experiment_id,
        cluster=config.cluster,
        namespace=config.namespace,
        labels=config.labels,
        worker=worker,
        created_at=time.time(),
        host_name=status.host_name,
        host_ip=status.host_ip,
    )


def _running(made: NodeSandbox) -> dict[str, object]:
    return {
        "isolation": made.isolation,
        "enforced": made.enforced,
        "runtime": made.runtime,
        "phases": made.phases,
        "started_at": time.time(),
    }


def _seen(record: Record, found: NodeSandbox) -> SandboxInfo:
    last = time.time() - found.idle_seconds
    idle = record.config.auto_clear_seconds
    deadlines = [last + idle] if idle else []
    if record.config.timeout is not None and record.info.started_at is not None:
        deadlines.append(record.info.started_at + record.config.timeout)
    return record.info.model_copy(
        update={
            "is_alive": found.alive,
            "last_activity_at": last,
            "auto_stop_at": min(deadlines, default=None),
            "usage": found.usage,
        }
    )
