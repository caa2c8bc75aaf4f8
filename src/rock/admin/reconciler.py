"""The reconciler: the background loop of the leader that handles deadlines, ended sandboxes, lost workers and
crashes."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
import logging
import time
from collections.abc import AsyncIterator, Mapping, Set
from dataclasses import dataclass, replace

from rock.admin.evacuations import Evacuations
from rock.admin.machines import Machines
from rock.admin.sandboxes.lifecycle import Effect, Event, deadline_of, life_began
from rock.admin.sandboxes.service import Service
from rock.admin.workers.client import Worker
from rock.admin.workers.registry import WorkerRegistry
from rock.errors import Conflict, NotFound, RockError, Unavailable
from rock.kubernetes.pods import PodReservations
from rock.protocol.node import NodeEvent, NodeSandbox
from rock.protocol.sandbox import Cause, State
from rock.store.base import Query, Record

# ---- lost workers ----
#
# The leader declares silent workers lost and records the end of each of their sandboxes. A crash between the two steps
# is safe: the registry stores that the worker is lost, and the next leader records the remaining ends.

log = logging.getLogger("rock.workers")

_LOOK = 0.5
_RARELY = 30.0
_ALIVE = (State.PENDING, State.RUNNING, State.STOPPING)


async def mark_lost(service: Service, worker: str) -> int:
    """Record the end of each sandbox of a lost worker; returns their number."""
    buried = 0
    while records := await service.store.list(Query(states=_ALIVE, fields={"worker": worker})):
        # The check follows the list: while the worker is lost in the registry, all listed records are of an ended
        # epoch. If it has joined again, the reconciler compares the remaining ones.
        if not await _is_lost(service, worker):
            break
        before = buried
        for record in records:
            try:
                await _bury_one(service, record, worker)
                buried += 1
            except RockError as error:
                log.error("burying %s: %s", record.id, error)
        if buried == before:
            break  # the caller retries
    return buried


async def _is_lost(service: Service, worker: str) -> bool:
    try:
        return (await service.workers.info(worker)).is_lost
    except NotFound:
        return not service.workers.is_known(worker)


async def _bury_one(service: Service, record: Record, worker: str) -> None:
    restored = record.state is State.PENDING and record.info.archive is not None
    event = Event.RESTORE_FAILED if restored else Event.ENDED
    reason = f"its worker {worker} was lost"
    await service.records.apply(record.id, event, known=record, cause=Cause.LOST, reason=reason)


class LostWorkers:
    """The loop of the leader over lost workers."""

    def __init__(self, service: Service, worker_registry: WorkerRegistry) -> None:
        self._service = service
        self._worker_registry = worker_registry
        # time of the next check of a worker, and the pause before it
        self._next: dict[tuple[str, int], tuple[float, float]] = {}

    async def run(self) -> None:
        """Run until it is canceled."""
        while True:
            try:
                await self.look()
            except Exception as error:
                log.warning("looking for lost workers: %r; trying again", error)
            await asyncio.sleep(_LOOK)

    async def look(self) -> None:
        """Check all workers once."""
        for info in self._worker_registry.silent():
            if await self._worker_registry.lose(info):
                log.warning(
                    "worker %s was not heard of for %g s: it is lost", info.name, self._worker_registry.lease.lost
                )
            await self._worker_registry.refresh()
        lost, now = self._worker_registry.lost_epochs(), time.monotonic()
        self._next = {key: later for key, later in self._next.items() if lost.get(key[0]) == key[1]}
        for key in lost.items():
            due, pause = self._next.get(key, (now, _LOOK))
            if due > now:
                continue
            buried = await mark_lost(self._service, key[0])
            if buried:
                log.warning("worker %s was lost with %d sandboxes", key[0], buried)
            # A lost worker may stay in the registry for weeks: the pause grows while a check finds no sandboxes.
            self._next[key] = (now + pause, min(2 * pause, _RARELY)) if not buried else (now, _LOOK)


# ---- reconciliation ----


reconciler_log = logging.getLogger("rock.reconciler")

TOMBSTONES = 24 * 3600.0  # seconds for which the record of a stopped sandbox is retained
_POLL = 30.0
_RETRY = 1.0
_LONGEST_RETRY = 5.0  # so a worker that returns is followed again within this time
_LIST = 30.0  # timeout in seconds for the list of a worker's sandboxes
_ANOTHERS = 10.0  # seconds after which an unfinished step of another admin is continued
_UNSETTLED = (State.PENDING, State.RUNNING, State.STOPPING, State.ARCHIVING, State.ARCHIVED)


@dataclass(frozen=True)
class _Here:
    """Ids on a worker: of running sandboxes, and of all, including stopped ones."""

    alive: Set[str] = frozenset()
    all: Set[str] = frozenset()


class _Outage:
    """Attempts that fail: one log line at the first and one at the end, with growing pauses between."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._began: float | None = None
        self._pause = _RETRY

    async def failed(self, error: object) -> None:
        """Wait before the next attempt."""
        if self._began is None:
            self._began = time.monotonic()
            reconciler_log.warning("%s: %s; trying again", self._what, error)
        await asyncio.sleep(self._pause)
        self._pause = min(2 * self._pause, _LONGEST_RETRY)

    def over(self) -> None:
        if self._began is not None:
            reconciler_log.info("%s: available again after %.0f s", self._what, time.monotonic() - self._began)
        self._began, self._pause = None, _RETRY


class Reconciler:
    """Brings the workers and the records into agreement. Started once per admin; owns all its tasks."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._due: list[tuple[float, str]] = []  # (time of the next check, id)
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._checks: set[asyncio.Task[None]] = set()
        self._next: dict[str, float] = {}  # the time in `_due`, by id
        self._unfinished: set[str] = set()  # ids of which a step was not completed, or not known to be saved
        self._followers: dict[str, asyncio.Task[None]] = {}  # by worker
        self._boots: dict[str, str] = {}  # by worker, the run whose sandboxes were settled
        self._context = contextvars.copy_context()  # with the fencing token of the lease of this admin

    async def start(self) -> None:
        """Settle the unfinished operations of an earlier run, then continue in the background."""
        self.service.records.on_effect[Effect.SCHEDULE].append(self.schedule)
        self.service.records.on_unfinished.append(self._again)
        if self.service.store.shared:
            # the watch starts before the records are settled
            self._tasks = [asyncio.create_task(self._watch(), name="watch")]
        workers = self.service.workers
        workers.on_change.append(self._worker_changed)
        await self._settle()
        self._tasks += [
            asyncio.create_task(self._deadlines(), name="deadlines"),
            asyncio.create_task(self._prune(), name="prune"),
            asyncio.create_task(self.service.snapshots.run(), name="retention of snapshots"),
            asyncio.create_task(self.service.pools.run(), name="pools"),
            asyncio.create_task(LostWorkers(self.service, workers).run(), name="losses"),
            asyncio.create_task(Evacuations(self.service).run(), name="evacuations"),
        ]
        if isinstance(self.service.placer.reservations, PodReservations):
            machines = Machines(self.service, self.service.placer.reservations)
            self._tasks.append(asyncio.create_task(machines.run(), name="machines"))
        for worker in workers.values():
            if worker.name not in self._followers:
                self._followers[worker.name] = asyncio.create_task(self._follow(worker), name=f"events-{worker.name}")

    def _worker_changed(self, name: str) -> None:
        """A worker joined, joined again, or left."""
        follower = self._followers.pop(name, None)
        if follower is not None:
            follower.cancel()
            self._track(follower)
        worker = self.service.workers.get(name)
        if worker is not None:
            self._followers[name] = asyncio.create_task(
                self._welcome(worker), name=f"events-{name}", context=self._context
            )

    async def _welcome(self, worker: Worker) -> None:
        """Settle the sandboxes of a worker that joined, then follow its events."""
        outage = _Outage(f"settling worker {worker.name}")
        while True:
            try:
                here = await self._here(worker)
                if here is not None:
                    known = {record.id async for record in self._settled({worker.name: here}, worker.name)}
                    await self._remove_strays(worker, here, known)
                    await self.service.volumes.settle(worker)
                    await self.service.snapshots.settle(worker)
                    break
                failed: object = "its list of sandboxes is not available"
            except Exception as error:
                failed = error
            await outage.failed(failed)
        outage.over()
        await self._follow(worker)

    def _track(self, task: asyncio.Task[None]) -> None:
        self._checks.add(task)
        task.add_done_callback(self._checks.discard)

    @property
    def _has_pods(self) -> bool:
        return isinstance(self.service.placer.reservations, PodReservations)

    def _again(self, sandbox_id: str) -> None:
        self._unfinished.add(sandbox_id)
        self._push(time.time() + _RETRY, sandbox_id)

    async def close(self) -> None:
        records = self.service.records
        if self.schedule in records.on_effect[Effect.SCHEDULE]:
            records.on_effect[Effect.SCHEDULE].remove(self.schedule)
        if self._again in records.on_unfinished:
            records.on_unfinished.remove(self._again)
        if self._worker_changed in self.service.workers.on_change:
            self.service.workers.on_change.remove(self._worker_changed)
        tasks = [*self._tasks, *self._checks, *self._followers.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._followers.clear()

    # ---- after a crash ----

    async def _settle(self) -> None:
        workers = list(self.service.workers.values())
        found = await asyncio.gather(*(self._here(worker) for worker in workers))
        here = {worker.name: one for worker, one in zip(workers, found, strict=True) if one is not None}
        known = {record.id async for record in self._settled(here)}
        for worker in workers:
            if worker.name in here:
                await self._remove_strays(worker, here[worker.name], known)
                await self.service.volumes.settle(worker)
                await self.service.snapshots.settle(worker)

    async def _here(self, worker: Worker) -> _Here | None:
        """The ids on a worker; None when it does not respond."""
        try:
            async with asyncio.timeout(_LIST):
                # First the run of the worker that the list belongs to: a restart after the list is a change of it.
                boot = (await worker.events(0, 0.0)).boot
                inventory = await worker.list()
                self._boots[worker.name] = boot
        except (Unavailable, TimeoutError) as error:
            reconciler_log.warning("worker %s: %r; its sandboxes are looked at when it is back", worker.name, error)
            return None
        return _Here({found.sandbox_id for found in inventory.sandboxes if found.alive},
                     {found.sandbox_id for found in inventory.sandboxes} | set(inventory.kept))  # fmt: skip

    async def _settled(self, here: Mapping[str, _Here], worker: str | None = None) -> AsyncIterator[Record]:
        """Settle all unfinished records, of all workers or of one."""
        fields = {} if worker is None else {"worker": worker}
        over = (State.STOPPED, State.DELETED)
        gangs: set[tuple[str, str]] = set()
        for query in (Query(states=_UNSETTLED, fields=fields), Query(states=over, left=True, fields=fields)):
            async for found in self._all(query):
                record = await self.service.commits.settle(found)
                if record.info.gang and record.state in (State.PENDING, State.RUNNING):
                    gangs.add((record.tenant, record.info.group or ""))
                name = record.info.worker or ""
                if name in here or not self._may_come_back(name):
                    await self._settle_one(record, here.get(name, _Here()))
                else:
                    self._push(time.time() + _POLL, record.id)
                yield record
        await self.service.groups.settle(gangs)

    def _may_come_back(self, worker: str) -> bool:
        """Whether to wait for a worker that does not respond. One that joined stays in the registry until its sandboxes
        have ended; another admin may know more workers of ROCK_WORKERS than this one."""
        return self.service.workers.is_known(worker) or self.service.store.shared

    async def _remove_strays(self, worker: Worker, here: _Here, known: Set[str]) -> None:
        for stray in here.all - known:
            now = await self.service.store.get(stray)
            over = now is not None and now.state in (State.STOPPED, State.DELETED) and not now.info.kept
            if now is not None and not over:
                continue  # another admin has made it since
            reconciler_log.warning("destroying sandbox %s: it %s", stray, "is over" if over else "has no record")
            await worker.destroy(stray)

    async def _all(self, query: Query) -> AsyncIterator[Record]:
        """All records of a query, page by page."""
        while True:
            page = await self.service.store.list(query)
            for record in page:
                yield record
            if len(page) < query.limit:
                return
            query = replace(query, after=(page[-1].info.created_at, page[-1].id))

    async def _settle_one(self, record: Record, here: _Here) -> None:
        alive = record.id in here.alive
        try:
            if record.state is State.PENDING:
                # create is idempotent: an existing sandbox is returned, not made again
                self.service.start_tasks.begin(record)
            elif record.state is State.STOPPING and self._has_pods:
                self._again(record.id)  # the start of this server does not wait for the cluster
            elif record.state is State.STOPPING:
                await self.service.finish_stop(record)
            elif record.state is State.ARCHIVING:
                await self.service.records.apply(record.id, Event.ARCHIVE)
            elif record.state in (State.STOPPED, State.ARCHIVED, State.DELETED):
                await self._settle_kept(record, here)
            elif alive or await self._has(record):
                self.schedule(record)
            elif not self.service.store.shared:
                await self.service.records.apply(
                    record.id, Event.ENDED, cause=Cause.LOST, reason="it was gone when the server came back"
                )
        except RockError as error:
            reconciler_log.error("settling %s: %s; trying again in %g s", record.id, error, _POLL)
            self._unfinished.add(record.id)
            self._push(time.time() + _POLL, record.id)

    async def _has(self, record: Record) -> bool:
        """Whether its worker has it now: it may have been made after the worker sent its list."""
        if self.service.store.shared:
            return await self._find(record) is not None
        worker = self.service.workers.get(record.info.worker or "")
        try:
            return worker is not None and (await worker.get(record.id)).alive
        except NotFound:
            return False

    async def _settle_kept(self, record: Record, here: _Here) -> None:
        """Settle a stopped sandbox whose files should be on its worker."""
        if record.state is State.DELETED:
            await self.service.kept.finish_delete(record)
        elif record.state is State.ARCHIVED:
            if record.id in here.all:
                self.service.cleanup.begin(record)
            self.schedule(record)
        elif record.id in here.all or self.service.store.shared:
            self.service.cleanup.begin(record)  # no effect on a sandbox that is stopped already
            self.schedule(record)
        else:
            await self.service.kept.lost(record)

    # ---- steps of other admins ----

    async def _watch(self) -> None:
        """Follow the records that other admins change: their deadlines, and steps that an admin did not finish before
        its end."""
        while True:
            try:
                async with contextlib.aclosing(self.service.store.watch()) as changes:
                    async for sandbox_id in changes:
                        await self._changed(sandbox_id)
            except RockError as error:
                reconciler_log.warning("watching the store: %s", error)
            await asyncio.sleep(_RETRY)

    async def _changed(self, sandbox_id: str) -> None:
        if sandbox_id:
            record = await self.service.store.get(sandbox_id)
            if record is not None:
                self._expect(record)
            return
        async for record in self._all(Query(states=_UNSETTLED)):  # some changes were missed
            self._expect(record)

    def _expect(self, record: Record) -> None:
        if record.state in (State.PENDING, State.STOPPING):
            self._push(time.time() + _ANOTHERS, record.id)
        else:
            self.schedule(record)

    # ---- deadlines ----

    def schedule(self, record: Record) -> None:
        """Schedule a check of a sandbox at the time of its first deadline."""
        if record.state is not State.RUNNING:
            due = [at for at in (record.info.auto_archive_at, record.info.auto_delete_at) if at is not None]
            if due:
                self._push(min(due), record.id)
            return
        config, now = record.config, time.time()
        times = [now + config.auto_clear_seconds] if config.auto_clear_seconds else []
        if (deadline := deadline_of(record)) is not None:
            times.append(deadline)
        if times:
            self._push(min(times), record.id)

    def _push(self, when: float, sandbox_id: str) -> None:
        known = self._next.get(sandbox_id)
        if known is not None and known <= when:
            return  # that check finds the next deadline
        self._next[sandbox_id] = when
        heapq.heappush(self._due, (when, sandbox_id))
        if self._due[0] == (when, sandbox_id):
            self._wake.set()

    async def _deadlines(self) -> None:
        while True:
            self._wake.clear()
            delay = self._due[0][0] - time.time() if self._due else None
            if delay is None or delay > 0:
                try:
                    async with asyncio.timeout(delay if delay is None else min(delay, _POLL)):
                        await self._wake.wait()
                except TimeoutError:
                    pass
                continue
            when, sandbox_id = heapq.heappop(self._due)
            if self._next.get(sandbox_id) != when:
                continue  # an earlier check replaced it
            del self._next[sandbox_id]
            self._track(asyncio.create_task(self._look(sandbox_id)))

    async def _look(self, sandbox_id: str) -> None:
        try:
            record = await self.service.records.load(sandbox_id)
            if record.state is State.PENDING:
                self.service.start_tasks.begin(record)
            elif record.state is State.STOPPING:
                await self.service.finish_stop(record)
            if record.state is not State.RUNNING:
                if sandbox_id in self._unfinished and record.state in (State.STOPPED, State.ARCHIVED):
                    self.service.cleanup.begin(record)  # which does nothing to what is at rest already
                await self._look_at_kept(record)
                self._unfinished.discard(sandbox_id)
                return
            self._unfinished.discard(sandbox_id)
            config, now = record.config, time.time()
            deadline = deadline_of(record)
            if deadline is not None and now >= deadline:
                if config.on_timeout == "pause":
                    await self._pause(record)
                    return
                lived = deadline - (record.info.started_at or deadline)
                await self.service.stop(sandbox_id, Cause.DEADLINE, f"its time of {lived:.6g} s was over")
                return
            found = await self._find(record)
            if found is None:
                return
            left = config.auto_clear_seconds - found.idle_seconds if config.auto_clear_seconds else float("inf")
            if left <= 0:
                await self.service.stop(sandbox_id, Cause.IDLE, f"it was idle for {config.auto_clear_seconds} s")
                return
            if deadline is not None:
                left = min(left, deadline - now)
            if left != float("inf"):
                self._push(now + left, sandbox_id)
        except NotFound:
            self._unfinished.discard(sandbox_id)  # deleted meanwhile
        except RockError as error:
            reconciler_log.warning("deadline of %s: %s; looking again", sandbox_id, error)
            self._push(time.time() + _RETRY, sandbox_id)
        except Exception:
            # Continue after any error: without further checks the sandbox would run forever.
            reconciler_log.exception("deadline of %s; looking again", sandbox_id)
            self._push(time.time() + _POLL, sandbox_id)

    async def _pause(self, record: Record) -> None:
        """Pause a sandbox at its deadline, and try again while requests are in progress."""
        try:
            await self.service.pause(record.id)
            await self.service.set_deadline(record.id, 0.0, {})
        except Conflict as error:
            reconciler_log.info("pause of %s at its deadline: %s", record.id, error.message)
            self._push(time.time() + _RETRY, record.id)

    async def _look_at_kept(self, record: Record) -> None:
        info, now = record.info, time.time()
        if record.state is State.DELETED:
            await self.service.kept.finish_delete(record)
        elif info.auto_delete_at is not None and info.auto_delete_at <= now and record.state is not State.ARCHIVING:
            await self.service.kept.expire(record.id)
        elif record.state is State.ARCHIVING:
            await self.service.records.apply(record.id, Event.ARCHIVE)  # this continues or restarts the archiving
        elif info.auto_archive_at is not None and info.auto_archive_at <= now:
            await self.service.archive.archive(record.id)
        else:
            self.schedule(record)

    async def _find(self, record: Record) -> NodeSandbox | None:
        """The sandbox on its worker; None when it no longer exists there, which is then recorded."""
        try:
            worker = self.service.workers.get(record.info.worker or "")
            if worker is None:
                raise Unavailable(f"worker {record.info.worker} is not connected",
                                  hint="start the worker again; `rock worker ls` shows the state of the workers")
            return await worker.get(record.id)
        except NotFound:
            reason = "its worker does not have it"
            await self.service.records.apply(record.id, Event.ENDED, cause=Cause.LOST, reason=reason)
            return None

    # ---- ends reported by workers ----

    async def _follow(self, worker: Worker) -> None:
        after, boot = 0, self._boots.pop(worker.name, "none")
        outage = _Outage(f"events of worker {worker.name}")
        while True:
            try:
                news = await worker.events(after, _POLL, boot)
                outage.over()
                if news.boot != boot:
                    # the worker restarted, perhaps twice: events of a run between may be lost, with its sandboxes
                    await self._compare(worker)
                    boot, after = news.boot, 0
                    continue
                for event in news.events:
                    with contextlib.suppress(NotFound):
                        await self._ended(event, worker.name)
                    after = max(after, event.number)  # only after the end is recorded
            except Exception as error:
                await outage.failed(error)

    async def _compare(self, worker: Worker) -> None:
        """Check the sandboxes that should run on a restarted worker."""
        found = {sandbox.sandbox_id for sandbox in (await worker.list()).sandboxes if sandbox.alive}
        async for record in self._all(Query(states=(State.RUNNING,), fields={"worker": worker.name})):
            if record.id not in found:
                await self._find(record)

    async def _ended(self, told: NodeEvent, worker: str) -> None:
        record = await self.service.records.load(told.sandbox_id)
        if record.info.worker != worker:
            return  # it ends its own sandboxes only
        if told.at < life_began(record.info):
            # From before a restart, or by a clock that is behind ours: only a lookup can determine it.
            if record.state is State.RUNNING:
                await self._find(record)
            return
        if record.state is State.RUNNING and await self._is_alive(record):
            return  # from before the restart: clocks of two machines cannot be compared
        restored = record.state is State.PENDING and record.info.archive is not None
        event = Event.RESTORE_FAILED if restored else Event.ENDED
        await self.service.records.apply(record.id, event, known=record, cause=told.cause, reason=told.reason)

    async def _is_alive(self, record: Record) -> bool:
        worker = self.service.workers.get(record.info.worker or "")
        if worker is None:
            return False
        try:
            return (await worker.get(record.id)).alive
        except RockError:
            return False

    async def _prune(self) -> None:
        while True:
            try:
                await self.service.store.prune(time.time() - TOMBSTONES)
                await self.service.store.recordings.prune()
                await self.service.placer.sweep(self.service.store)
            except Exception as error:
                reconciler_log.warning("pruning: %s", error)
            await asyncio.sleep(600.0)
