"""Create, stop, list: load, decide, save if unchanged, command the worker. What comes after a stop is in `kept.py`.

Every change of a record goes through `_apply`: the pure lifecycle decides, the store saves over the version that was
read, and only then the effects are carried out. A crash in between is finished by the reconciler.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from rock import faults
from rock.admin import infos
from rock.admin.archiving import Archive
from rock.admin.commits import Commits
from rock.admin.counts import CREATES, ENDS, STARTS
from rock.admin.fleet import Fleet
from rock.admin.groups import Groups
from rock.admin.kept import Kept
from rock.admin.lifecycle import Effect, Event, step
from rock.admin.placing import Placing
from rock.admin.worker import Worker
from rock.envhub import registry
from rock.errors import InternalServerRockError, Lost, NotFound, RockError, SandboxError, Unavailable, from_wire
from rock.protocol.env import OpenEnv
from rock.protocol.keys import Caller, Quota
from rock.protocol.network import ConnectionList
from rock.protocol.node import NodeSandbox, SandboxList
from rock.protocol.sandbox import Cause, SandboxConfig, SandboxInfo, State
from rock.scheduler.base import Reservations, Scheduler
from rock.store.base import Query, Record, Store, VersionConflict
from rock.store.blobs import Blobs
from rock.telemetry import tracing
from rock.wire.waits import settled

log = logging.getLogger("rock.admin")

ENV_LABEL = "rock.env"
_RETRY = 5.0  # seconds
_ELSEWHERE = 0.2  # seconds from one look at what another server starts to the next
_ENDS = (Event.LAUNCH_FAILED, Event.STOP, Event.ENDED, Event.DESTROYED)
_MOST_RECENT = 10_000
_PUT_AWAY = 10.0  # seconds to wait for the end of a former life


class Service:
    """The control plane over a store, a scheduler and workers. `scheduled` is told of each sandbox that runs."""

    def __init__(
        self,
        store: Store,
        scheduler: Scheduler,
        workers: Fleet,
        blobs: Blobs | None = None,
        archive_limit: int = 64 << 30,
        reservations: Reservations | None = None,
    ) -> None:
        self.store = store
        self.workers = workers
        self.placing = Placing(scheduler, workers, reservations)
        self._launches: dict[str, asyncio.Task[Record]] = {}
        self._releases: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.kept = Kept(self)
        self.archive = Archive(self, blobs, archive_limit)
        self.commits = Commits(self, archive_limit)
        self.groups = Groups(self)
        self._env_lock = asyncio.Lock()
        self.on_schedule: list[Any] = []
        self.on_unfinished: list[Any] = []
        self._recent: dict[str, Record] = {}  # as they were saved last, by us

    async def close(self) -> None:
        """Cancel what is under way; its records stay as they are for the next start."""
        tasks = [*self._launches.values(), *self._releases.values(), *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.groups.close()
        await self.placing.close()
        await self.archive.close()
        await self.commits.close()

    # ---- create ----

    async def create(self, config: SandboxConfig, key: str | None, wait: float, caller: Caller) -> SandboxInfo:
        """Make a sandbox, or, for a key that was seen from this tenant, answer with the one that was made.

        Waits up to `wait` seconds for the start; a start that fails meanwhile raises its reason.
        """
        try:
            record = await self._insert(config, key, caller)
        except RockError as error:
            # What was made then may no longer fit now.
            known = await self.store.by_key(key, caller.owner) if key else None
            if known is None:
                CREATES.of("refused", error.code).add()
                raise
            record = known
            if record.state is State.PENDING:  # it may have been saved just now, by a store that then failed
                self.launch(record)
        return await self.waited(record, wait)

    async def _insert(self, config: SandboxConfig, key: str | None, caller: Caller) -> Record:
        self.archive.check(config)
        sandbox_id = config.sandbox_id or uuid.uuid4().hex
        record: Record | None = None
        try:
            worker, status = None, None
            if self.placing.reservations is not None:
                await self.placing.check(config)
            else:
                worker = await self.placing.place(sandbox_id, config)
                status = self.placing.status(worker.name)
                await worker.check(config)
            info = infos.new_info(sandbox_id, config, worker.name if worker else None, status, caller.owner)
            record = await self.store.insert(Record(info, config, key), caller.quota)
            await faults.point("create.saved")
            if record.state is State.PENDING:
                self.launch(record)
            return record
        finally:
            if record is None or sandbox_id not in self._launches:
                self.placing.landed(sandbox_id)

    def _reached(self, name: str | None) -> Worker:
        """A worker. Unavailable when it is lost, or not known here yet."""
        worker = self.workers.get(name or "")
        if worker is None:
            raise Unavailable(f"worker {name} is not there now", hint="retry when it is back: rock worker ls")
        return worker

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
        self.placing.landed(sandbox_id)
        if not task.cancelled() and task.exception() is not None:
            log.error("launch of %s: %r", sandbox_id, task.exception())
            self.unfinished(sandbox_id)

    def unfinished(self, sandbox_id: str) -> None:
        """A step could not be completed: somebody has to come back to it."""
        for listener in self.on_unfinished:
            listener(sandbox_id)

    async def _launch(self, record: Record) -> Record:
        restored, began = record.info.archive is not None, time.monotonic()
        try:
            with tracing.span("start sandbox", {"rock.sandbox_id": record.id, "rock.image": record.config.image}):
                async with asyncio.timeout(record.config.startup_timeout):
                    worker = await self._worker_for(record)
                    await faults.point("launch.begun")
                    made = await self._start(worker, record)
                    await faults.point("launch.made")
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
            CREATES.of("running", "").add()
            STARTS.of("running").observe(time.monotonic() - began)
            new = await self.apply(record.id, Event.LAUNCHED, known=record, **infos.running(made))
            if restored and new.info.archive is None:
                await self.archive.forget(record.id)
            return new
        CREATES.of("failed", error.code).add()
        STARTS.of("failed").observe(time.monotonic() - began)
        wire = error.to_wire()
        wire["error"]["sandbox_id"] = record.id
        if restored:
            return await self.apply(record.id, Event.RESTORE_FAILED, reason=error.message, error=wire)
        lost: dict[str, Any] = {"kept": False} if isinstance(error, Lost) else {}
        new = await self.apply(
            record.id, Event.LAUNCH_FAILED, cause=Cause.START_FAILED, reason=error.message, error=wire, **lost
        )
        self.groups.launch_failed(new)
        return new

    async def _worker_for(self, record: Record) -> Worker:
        """Its own, or for one from the archive any that fits; where a cluster decides, that which it names."""
        if self.placing.reservations is not None:
            worker = await self.placing.reserve(record)
        elif record.info.archive is None:
            return self._reached(record.info.worker)
        else:
            worker = await self.placing.place(record.id, record.config)
        if worker.name != record.info.worker:
            status = self.placing.status(worker.name) or await worker.status()
            await self.amend(record.id, worker=worker.name, host_name=status.host_name, host_ip=status.host_ip)
        return worker

    async def _start(self, worker: Worker, record: Record) -> NodeSandbox:
        """For the first time, or over what it left."""
        if record.info.archive is not None:
            return await self.archive.restore(worker, record)
        if record.info.kept:
            return await worker.wake(record.id, record.config)
        return await worker.create(record.id, record.config)

    async def waited(self, record: Record, wait: float) -> SandboxInfo:
        """What became of a start after at most `wait` seconds; one that failed raises its reason."""
        record = await self._launch_ended(record, wait)
        failed = record.info.cause is Cause.START_FAILED or record.state is State.ARCHIVED
        if failed and record.info.error:
            raise from_wire(record.info.error)
        return record.info

    async def _launch_ended(self, record: Record, wait: float) -> Record:
        """The record once it is no longer being launched, or after `wait` seconds as it was."""
        launch = self._launches.get(record.id)
        if launch is not None and wait > 0:
            await settled(launch, wait)
            if launch.cancelled():  # it was stopped meanwhile
                return await self.load(record.id)
            if launch.done():
                return launch.result()
        return record

    def launching(self, records: Iterable[Record]) -> list[asyncio.Task[Record]]:
        """The starts of these that are under way here."""
        return [task for record in records if (task := self._launches.get(record.id)) is not None]

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
            if record.state is State.PENDING and wait > 0 and record.id not in self._launches:
                record = await self._started_elsewhere(record, wait)
        if record.state is not State.RUNNING:
            return record.info
        try:
            found = await self._reached(record.info.worker).get(sandbox_id, touch=touch, usage=usage)
        except RockError as error:
            log.info("worker of %s: %s", sandbox_id, error)
            return record.info.model_copy(update={"is_alive": False})
        return infos.seen(record, found)

    async def _started_elsewhere(self, record: Record, wait: float) -> Record:
        """The record once another server has started it, or after `wait` seconds."""
        end = time.monotonic() + wait
        while record.state is State.PENDING and (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(_ELSEWHERE, left))
            record = await self.load(record.id)
        return record

    async def connections(self, sandbox_id: str) -> ConnectionList:
        """What it connected to, as its worker remembers it. Unavailable when that is not there."""
        record = await self.load(sandbox_id)
        worker = self.workers.get(record.info.worker or "")
        return await worker.connections(sandbox_id) if worker is not None else ConnectionList()

    async def list(self, query: Query, history: bool = False) -> SandboxList:
        """A page. `history`: with the steps of each life, which are most of what a record has to say."""
        records = await self.store.list(query)
        last = records[-1].info if len(records) == query.limit else None
        items = [r.info if history else r.info.model_copy(update={"state_history": []}) for r in records]
        return SandboxList(
            items=items, next=f"{last.created_at!r}:{last.sandbox_id}" if last else None
        )

    # ---- stop ----

    async def stop(
        self, sandbox_id: str, cause: Cause = Cause.USER, reason: str = "stopped by its user"
    ) -> SandboxInfo:
        """Stop it and wait until nothing of it is left but what is to be kept; a stopped one stays as it is."""
        record = await self.apply(sandbox_id, Event.STOP, cause=cause, reason=reason)
        if record.state is State.STOPPING:
            try:
                record = await self.finish_stop(record)
            except BaseException:
                self.unfinished(sandbox_id)
                raise
        return record.info

    async def finish_stop(self, record: Record) -> Record:
        if record.info.archive is not None:
            return await self._give_up_restore(record)
        await faults.point("stop.saved")
        gone = await self._release(record)
        await faults.point("stop.released")
        record = await self.apply(record.id, Event.DESTROYED, known=record)
        return await self.amend(record.id, **gone) if gone else record

    async def _give_up_restore(self, record: Record) -> Record:
        """A stop while it was coming from the archive: it is still there."""
        launch = self._launches.get(record.id)
        if launch is not None:
            launch.cancel()
            await asyncio.wait({launch})
        record = await self.load(record.id)
        if record.state is not State.STOPPING:
            return record
        worker = await self.there(record.info.worker)
        if worker is not None:
            await worker.destroy(record.id)
        await faults.point("restore.given_up")
        return await self.apply(record.id, Event.RESTORE_FAILED, known=record)

    async def there(self, name: str | None) -> Worker | None:
        """A worker; None for one that is lost or was forgotten, by the registry as it is now. Unavailable."""
        if name and name not in self.workers and name not in self.workers.lost():
            await self.workers.refresh()
        return self.workers.get(name or "")

    async def _release(self, record: Record) -> dict[str, Any]:
        """End what there is of it on its worker, and keep or remove its files: what has to be said when they are lost.

        Whether they are kept was decided by the step that ended it."""
        worker, lost = await self.there(record.info.worker), False
        try:
            if worker is not None and not record.info.kept:
                await worker.destroy(record.id)
            elif worker is not None:
                lost = not (await worker.rest(record.id)).kept
        except Unavailable:
            if worker is not None and self.workers.get(worker.name) is worker:
                raise
            # It was lost meanwhile: it stops by itself, or is told when it is back
        if self.placing.reservations is not None:
            await self.placing.reservations.release(record.id)
        return infos.files_lost(record) if lost else {}

    def release(self, record: Record) -> None:
        """Do that in the background, again and again until it is done."""
        before = self._releases.get(record.id)
        task = asyncio.create_task(self._release_surely(record, before), name=f"release-{record.id}")
        self._releases[record.id] = task
        task.add_done_callback(lambda done: self._released(record.id, done))

    def _released(self, sandbox_id: str, task: asyncio.Task[None]) -> None:
        if self._releases.get(sandbox_id) is task:
            del self._releases[sandbox_id]

    async def _release_surely(self, record: Record, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait({before})
        while True:
            try:
                await faults.point("release.begun")
                gone = await self._release(record)
                if gone:
                    await self.amend(record.id, **gone)
                return
            except NotFound:
                return
            except RockError as error:
                log.warning("release of %s: %s; trying again", record.id, error)
                await asyncio.sleep(_RETRY)

    async def settled(self, sandbox_id: str) -> None:
        """Wait until its former life is put away. Unavailable when that takes long."""
        task = self._releases.get(sandbox_id)
        if task is not None:
            done, _ = await asyncio.wait({task}, timeout=_PUT_AWAY)
            if not done:
                raise Unavailable(
                    f"sandbox {sandbox_id}: what is left of its last run is being put away",
                    sandbox_id=sandbox_id,
                    hint="retry",
                )

    # ---- changes ----

    async def amend(self, sandbox_id: str, **fields: Any) -> Record:
        """Change what the record says, in whatever state it is."""
        while True:
            record = await self.load(sandbox_id)
            try:
                new = await self.store.put(record.changed(**fields))
            except VersionConflict:
                continue
            self._recent.pop(sandbox_id, None)
            return new

    async def apply(
        self,
        sandbox_id: str,
        event: Event,
        known: Record | None = None,
        *,
        key: str | None = None,
        check: Callable[[Record], None] | None = None,
        quota: Quota | None = None,
        **fields: Any,
    ) -> Record:
        """One step of the lifecycle, saved; then its effects. What a tombstone says first stays.

        known: the record as it was read last; when it has changed since, it is read again. key: of the request that
        asks for it. check: raises where the record, in its state, does not allow this. quota: of its tenant, for a step
        that starts it again.
        """
        guess = known or self._recent.pop(sandbox_id, None)
        while True:
            record = guess or await self.load(sandbox_id)
            try:
                state, effects = step(record.state, event, sandbox_id)
                if check is not None:
                    check(record)
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
            said = fields
            if record.info.cause is not None and event in _ENDS:
                said = {k: v for k, v in fields.items() if k not in ("cause", "reason", "error")}
            try:
                new = await self.store.put(infos.stamped(record, event, state, key, said), quota)
                break
            except VersionConflict:
                continue
        if state is not record.state:
            about = {"sandbox_id": sandbox_id}
            log.info("sandbox %s is %s (%s)", sandbox_id, state.value, event.value, extra=about)
            if new.info.cause is not None and record.info.cause is None:
                ENDS.of(new.info.cause.value).add()
        self._keep(new)
        if Effect.RELEASE in effects and state is not State.STOPPING:
            self.release(new)
        if Effect.SCHEDULE in effects:
            for listener in self.on_schedule:
                listener(new)
        if Effect.LAUNCH in effects:
            self.launch(new)
        if Effect.ARCHIVE in effects:
            self.archive.begin(new)
        return new

    def _keep(self, record: Record) -> None:
        """Remember a record for its next step: `put` tells when somebody else changed it meanwhile."""
        self._recent.pop(record.id, None)  # of an ended one nothing: ten thousand of them would be 80 MB
        if record.state is not State.STOPPED:
            self._recent[record.id] = record
            while len(self._recent) > _MOST_RECENT:
                del self._recent[next(iter(self._recent))]

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- environments ----

    async def open_env(self, wish: OpenEnv, wait: float, key: str | None, caller: Caller) -> SandboxInfo:
        """A sandbox that can host the environment: a running one of its package set and this tenant, else a new one."""
        image = registry.image_for(wish)
        known = await self.store.by_key(key, caller.owner) if key else None
        if known is not None:
            return await self.waited(known, wait)
        async with self._env_lock:  # two first wishes must not make two hosts
            found = (
                []
                if wish.exclusive
                else await self.store.list(
                    Query((State.RUNNING, State.PENDING), labels={ENV_LABEL: image}, limit=1, tenant=caller.owner)
                )
            )
            record = found[0] if found else await self._create_env_host(image, wish, key, caller)
        return await self.waited(record, wait)

    async def _create_env_host(self, image: str, wish: OpenEnv, key: str | None, caller: Caller) -> Record:
        config = wish.config or env_host()
        config = config.model_copy(
            update={
                "image": image,
                "labels": config.labels if wish.exclusive else {**config.labels, ENV_LABEL: image},
                # The first start installs the packages.
                "startup_timeout": max(config.startup_timeout, 1200.0),
            }
        )
        return await self._insert(config, key, caller)


def env_host() -> SandboxConfig:
    """What hosts environments where nobody says otherwise."""
    return SandboxConfig(image="host", memory="4g", cpus=1.0, auto_clear_seconds=600)
