"""Commits of sandboxes to images: at most one per sandbox, in the background; the sandbox's record stores the progress.

A crash of this process ends a commit. The next read of its status records that (`PROCESS_LOST`); the worker stores no
partial results. The login is only in the memory of the task.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from rock.admin.sandboxes.records import Records
from rock.admin.workers.registry import WorkerRegistry
from rock.errors import (
    Conflict,
    Lost,
    NotFound,
    NotHere,
    RockError,
    ServerError,
    Unavailable,
    unexpected,
)
from rock.protocol.node import NodeCommit
from rock.protocol.sandbox import CommitError, CommitPhase, CommitRequest, CommitStatus, State
from rock.store.base import Record

log = logging.getLogger("rock.admin")

_ANOTHERS = 3600.0  # seconds after which the commit of another admin is considered abandoned
_BY_STAGE = {"login": CommitError.LOGIN_FAILED, "commit": CommitError.COMMIT_FAILED, "push": CommitError.PUSH_FAILED}


class Commits:
    """The commits in progress. limit: maximum bytes of files that one sandbox may have written."""

    def __init__(self, records: Records, workers: WorkerRegistry, limit: int) -> None:
        self._records = records
        self._workers = workers
        self._limit = limit
        self._running: dict[str, CommitStatus] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Cancel the commits in progress."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def commit(
        self, sandbox_id: str, spec: CommitRequest, wait: float = 0.0, tenant: str = ""
    ) -> CommitStatus:
        """Start a commit, and wait up to `wait` seconds for its end. A repetition with the same tag joins the one in
        progress. tenant: of the request, which cannot replace images of others; "" is the server's owner.

        Conflict while another commit of the sandbox is in progress, and when there are no files to commit.
        """
        record = await self._records.load(sandbox_id)
        running = self._running.get(sandbox_id)
        if running is None:
            _refuse_without_files(record)
            await self._begin(record, spec, tenant)
        elif running.image_tag != spec.image_tag:
            raise Conflict(f"sandbox {sandbox_id} is being committed to {running.image_tag}", sandbox_id=sandbox_id,
                           hint="wait until that is done")  # fmt: skip
        return await self.status(sandbox_id, wait)

    async def _begin(self, record: Record, spec: CommitRequest, tenant: str) -> None:
        status = CommitStatus(sandbox_id=record.id, image_tag=spec.image_tag, push=spec.push, started_at=time.time(),
                              phase=CommitPhase.RUNNING)  # fmt: skip
        self._running[record.id] = status  # from here on no other commit can start
        try:
            await self._records.amend(record.id, commit=status)
        except BaseException:
            del self._running[record.id]
            raise
        task = asyncio.create_task(self._commit(record, spec, status, tenant), name=f"commit-{record.id}")
        self._tasks[record.id] = task
        task.add_done_callback(lambda done: self._done(record.id, done))

    def _done(self, sandbox_id: str, task: asyncio.Task[None]) -> None:
        del self._tasks[sandbox_id], self._running[sandbox_id]
        if not task.cancelled() and task.exception() is not None:
            log.error("commit of %s: %r", sandbox_id, task.exception())

    async def _commit(self, record: Record, spec: CommitRequest, status: CommitStatus, tenant: str) -> None:
        try:
            worker = self._workers.get(record.info.worker or "")
            if worker is None:
                raise ServerError(f"worker {record.info.worker} is not known here")
            made = await worker.commit(record.id, NodeCommit(**spec.model_dump(), limit=self._limit, tenant=tenant))
            fields: dict[str, Any] = {
                "phase": CommitPhase.SUCCEEDED, "image_digest": made.digest, "pushed_digest": made.pushed}  # fmt: skip
        except Exception as raised:
            log.warning("commit of %s to %s: %r", record.id, spec.image_tag, raised)
            error = raised if isinstance(raised, RockError) else unexpected(raised)
            error.sandbox_id = record.id
            stage = error.details.get("stage")
            fields = {"phase": CommitPhase.FAILED, "failed_stage": stage or "dispatch", "error": error.to_wire(),
                      "error_code": _code(error, stage, worker is not None)}  # fmt: skip
        ended = status.model_copy(update={**fields, "completed_at": time.time()})
        try:
            await self._records.amend(record.id, commit=ended)
        except NotFound:
            log.info("sandbox %s was deleted while it was committed", record.id)

    async def status(self, sandbox_id: str, wait: float = 0.0) -> CommitStatus:
        """The status of the last commit, after at most `wait` seconds while it is in progress. NotFound when there was
        none."""
        task = self._tasks.get(sandbox_id)
        if task is not None and wait > 0:
            await asyncio.wait({task}, timeout=wait)
        record = await self.settle(await self._records.load(sandbox_id))
        if record.info.commit is None:
            raise NotFound(f"sandbox {sandbox_id} has no commit", sandbox_id=sandbox_id,
                           details={"commit": CommitError.STATUS_NOT_FOUND},
                           hint="start one first with `rock commit`, or POST .../commit")
        return record.info.commit

    async def settle(self, record: Record) -> Record:
        """The record, after an unfinished commit of an earlier process was marked as lost."""
        found = record.info.commit
        if found is None or found.phase is not CommitPhase.RUNNING or record.id in self._running:
            return record
        if self._records.store.shared and time.time() - found.started_at < _ANOTHERS:
            return record  # it may be another admin's
        error = ServerError(f"the server ended while it made {found.image_tag}", sandbox_id=record.id,
                            hint="commit again")  # fmt: skip
        fields = {"phase": CommitPhase.FAILED, "completed_at": time.time(), "error": error.to_wire(),
                  "error_code": CommitError.PROCESS_LOST}  # fmt: skip
        return await self._records.amend(record.id, commit=found.model_copy(update=fields))


def _refuse_without_files(record: Record) -> None:
    if record.state is State.RUNNING or (record.state is State.STOPPED and record.info.kept):
        return
    hint = {State.ARCHIVED: "restart it first", State.PENDING: "wait until it runs"}.get(record.state)
    raise Conflict(f"sandbox {record.id} is {record.state.value}: it has no files here to make an image of",
                   sandbox_id=record.id, hint=hint)  # fmt: skip


def _code(error: RockError, stage: str | None, known: bool) -> CommitError:
    if not known:
        return CommitError.WORKER_NOT_FOUND
    if isinstance(error, (NotHere, Lost)):
        return CommitError.SANDBOX_CONTAINER_NOT_FOUND
    if stage in _BY_STAGE:
        return _BY_STAGE[stage]
    return CommitError.WORKER_UNREACHABLE if isinstance(error, Unavailable) else CommitError.DISPATCH_FAILED
