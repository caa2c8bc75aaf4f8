"""Jobs and their trials, in SQLite and in PostgreSQL.

Each operation is a generator that yields SQL statements and receives rows; it contains no I/O. Two small classes at the
end run it in one transaction of their database. Every operation on trials first locks the row of its job, so that
claims, results and cancellations of a job are sequential.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import secrets
import sqlite3
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar

from rock import faults
from rock.errors import Conflict, NotFound, QuotaExceeded
from rock.protocol.jobs import (
    HISTORY,
    BeatenTrials,
    BeatTrials,
    ClaimedTrials,
    ClaimTrials,
    CreateJob,
    FinishTrial,
    JobCounts,
    JobDetail,
    JobInfo,
    JobState,
    TrialError,
    TrialInfo,
    TrialList,
    TrialState,
)

T = TypeVar("T")
Row = Sequence[Any]
Steps = Generator[tuple[str, Sequence[Any]], list[Row], T]

MOST_JOBS = 10_000  # of one tenant
PAGE = 1000  # trials of one response
_JOB = "id, tenant, name, created_at, started_at, finished_at, cancelled, tasks, attempts, labels"
_TRIAL = "number, task, name, attempt, state, tries, token, holder, until, not_before, info"
AT_ONCE = 500  # trials of one transaction of SQLite, for which other requests wait
_CREATING = "creating job "  # rows of `about`: the time at which the creation of a large job began
_ABANDONED = 600.0  # seconds after which another server's creation has ended
_LOCK = 0x524F434A  # advisory lock of new jobs, in PostgreSQL


class Many(list[Sequence[Any]]):
    """Values of a statement that is executed for each of them. It returns no rows."""


_ADD = (f"INSERT INTO trial (job, {_TRIAL}) VALUES ($1, $2, $3, $4, $5, 'pending', 0, 0, '', 0, 0, '{{}}')")


class Jobs(Protocol):
    """The jobs of all tenants. tenant None: of any tenant. Each method raises Unavailable or StorageFull when the
    database fails, and NotFound for an unknown job or trial."""

    async def create(self, spec: CreateJob, tenant: str, key: str | None = None) -> JobInfo:
        """Create a job with its trials, or return the one that the tenant created with this key. QuotaExceeded."""
        ...

    async def list(
        self, tenant: str | None, label: tuple[str, str] | None = None, limit: int = 100
    ) -> Sequence[JobInfo]:
        """Jobs, newest first."""
        ...

    async def get(self, job_id: str, tenant: str | None, tasks: bool = True) -> JobDetail:
        """A job; tasks=False leaves out its configuration and tasks, which can have 16 MiB."""
        ...

    async def trials(self, job_id: str, tenant: str | None, after: int = 0, limit: int = PAGE) -> TrialList: ...

    async def claim(self, job_id: str, tenant: str | None, spec: ClaimTrials) -> ClaimedTrials: ...

    async def beat(self, job_id: str, tenant: str | None, spec: BeatTrials) -> BeatenTrials: ...

    async def finish(self, job_id: str, tenant: str | None, number: int, spec: FinishTrial) -> TrialInfo:
        """The end of a try. Conflict when the token is not the current one. The same result twice is accepted."""
        ...

    async def cancel(self, job_id: str, tenant: str | None) -> JobInfo:
        """Cancel pending trials, and request the cancellation of running ones."""
        ...

    async def delete(self, job_id: str, tenant: str | None) -> JobInfo:
        """Delete a job. Conflict while a runner has a lease of a trial."""
        ...


# ---- operations ----


def _create(
    now: float, spec: CreateJob, tenant: str, key: str | None, lock: bool, written: tuple[str, str] | None = None
) -> Steps[JobInfo]:
    """written: id and JSON of a job whose trials were written before."""
    digest = None if key is None else hashlib.sha256(key.encode()).hexdigest()
    if lock:
        yield f"SELECT pg_advisory_xact_lock({_LOCK}, hashtext($1))", (tenant,)
    if digest is not None:
        known = yield "SELECT id FROM job WHERE tenant = $1 AND idempotency_key = $2", (tenant, digest)
        if known:
            return (yield from _info(known[0][0], tenant))
    count = yield "SELECT count(*) FROM job WHERE tenant = $1", (tenant,)
    if count[0][0] >= MOST_JOBS:
        raise QuotaExceeded(f"there are {MOST_JOBS} jobs: a tenant has at most so many", hint="delete some")
    job_id, text = written or (secrets.token_hex(8), _text_of(spec))
    yield (
        f"INSERT INTO job ({_JOB}, idempotency_key, spec) "
        "VALUES ($1, $2, $3, $4, NULL, NULL, 0, $5, $6, $7, $8, $9)",
        (job_id, tenant, spec.name, now, len(spec.tasks), spec.attempts, json.dumps(spec.labels), digest, text),
    )
    if written is None:
        yield _ADD, Many(_trial_rows(job_id, spec))
    else:
        yield "DELETE FROM about WHERE name = $1", (_CREATING + job_id,)
    return (yield from _info(job_id, tenant))


def _text_of(spec: CreateJob) -> str:
    """The JSON of a job's configuration and tasks."""
    tasks = [{"name": task.name, "spec": task.spec} for task in spec.tasks]
    return json.dumps({"config": spec.config, "tasks": tasks})


def _trial_rows(job_id: str, spec: CreateJob) -> Iterator[tuple[str, int, int, str, int]]:
    trials = itertools.product(range(1, spec.attempts + 1), enumerate(spec.tasks))
    return ((job_id, number, index, task.name, attempt) for number, (attempt, (index, task)) in enumerate(trials, 1))


def _known(tenant: str, key: str | None) -> Steps[JobInfo | None]:
    """The job that the tenant created with this key."""
    if key is None:
        return None
    digest = hashlib.sha256(key.encode()).hexdigest()
    rows = yield "SELECT id FROM job WHERE tenant = $1 AND idempotency_key = $2", (tenant, digest)
    return (yield from _info(rows[0][0], tenant)) if rows else None


def _once(text: str, values: Sequence[Any]) -> Steps[list[Row]]:
    return (yield text, values)


def _load(job_id: str, tenant: str | None, lock: bool = False) -> Steps[Row]:
    rows = yield f"SELECT {_JOB} FROM job WHERE id = $1{' FOR UPDATE' if lock else ''}", (job_id,)
    if not rows or (tenant is not None and rows[0][1] != tenant):
        raise NotFound(f"there is no job {job_id}", hint="rock job ls")
    return rows[0]


def _info(job_id: str, tenant: str | None) -> Steps[JobInfo]:
    job = yield from _load(job_id, tenant)
    counts = yield _COUNT, (job_id,)
    return _job_info(job, counts)


_COUNT = "SELECT state, count(*), count(reward), sum(reward) FROM trial WHERE job = $1 GROUP BY state"


def _job_info(job: Row, counts: Sequence[Row]) -> JobInfo:
    job_id, tenant, name, created, started, finished, cancelled, tasks, attempts, labels = job
    by_state = JobCounts(**{row[0]: row[1] for row in counts})
    valid = sum(row[2] for row in counts)
    total = sum(row[3] or 0.0 for row in counts)
    if by_state.pending + by_state.running:
        state = JobState.PENDING if started is None else JobState.RUNNING
    elif by_state.cancelled:
        state = JobState.CANCELLED
    else:
        state = JobState.FAILED if by_state.failed else JobState.COMPLETED
    return JobInfo(
        job_id=job_id, name=name, state=state, tenant=tenant, labels=json.loads(labels), tasks=tasks, attempts=attempts,
        trials=tasks * attempts, counts=by_state, valid=valid, mean_reward=total / valid if valid else None,
        cancelling=bool(cancelled) and by_state.running > 0, created_at=created, started_at=started,
        finished_at=finished,
    )  # fmt: skip


def _list(tenant: str | None, label: tuple[str, str] | None, limit: int) -> Steps[list[JobInfo]]:
    if tenant is None:
        rows = yield f"SELECT {_JOB} FROM job ORDER BY created_at DESC, id", ()
    else:
        rows = yield f"SELECT {_JOB} FROM job WHERE tenant = $1 ORDER BY created_at DESC, id", (tenant,)
    found: list[JobInfo] = []
    for row in rows:
        if len(found) == limit:
            break
        if label is None or json.loads(row[9]).get(label[0]) == label[1]:
            found.append(_job_info(row, (yield _COUNT, (row[0],))))
    return found


def _get(now: float, job_id: str, tenant: str | None, tasks: bool) -> Steps[JobDetail]:
    job = yield from _load(job_id, tenant)
    if job[6] and job[5] is None:  # cancelled, but not final: its runners may be gone
        yield from _load(job_id, tenant, lock=True)
        yield from _drop(now, job_id, False)
        yield from _end_if_complete(now, job_id)
    info = yield from _info(job_id, tenant)
    if not tasks:
        return JobDetail(**info.model_dump())
    rows = yield "SELECT spec FROM job WHERE id = $1", (job_id,)
    spec = json.loads(rows[0][0])
    return JobDetail(**info.model_dump(), config=spec["config"], task_list=spec["tasks"])


def _trials(job_id: str, tenant: str | None, after: int, limit: int) -> Steps[TrialList]:
    yield from _load(job_id, tenant)
    rows = yield (f"SELECT {_TRIAL} FROM trial WHERE job = $1 AND number > $2 ORDER BY number LIMIT $3",
                  (job_id, after, limit + 1))  # fmt: skip
    items = [_trial(row) for row in rows[:limit]]
    return TrialList(items=items, next=items[-1].number if len(rows) > limit else None)


def _trial(row: Row) -> TrialInfo:
    number, task, name, attempt, state, tries, token, holder, _, not_before, info = row
    return TrialInfo(number=number, task=name, task_index=task, attempt=attempt, state=state, tries=tries,
                     token=token, holder=holder, not_before=not_before, **json.loads(info))  # fmt: skip


def _claim(now: float, job_id: str, tenant: str | None, spec: ClaimTrials) -> Steps[ClaimedTrials]:
    job = yield from _load(job_id, tenant, lock=True)
    cancelling = bool(job[6])
    if cancelling:  # trials of runners that are gone
        yield from _drop(now, job_id, spec.take_over)
    count = 0 if cancelling else spec.count
    rows = yield (
        f"SELECT {_TRIAL} FROM trial WHERE job = $1 AND state = 'running' AND "
        "(until < $2 OR ($3 = 1 AND holder <> $4)) ORDER BY number LIMIT $5",
        (job_id, now, int(spec.take_over), spec.holder, count),
    )
    rows += yield (f"SELECT {_TRIAL} FROM trial WHERE job = $1 AND state = 'pending' AND not_before <= $2 "
                   "ORDER BY number LIMIT $3", (job_id, now, count - len(rows)))  # fmt: skip
    items = []
    for row in rows:
        trial = _trial(row)
        trial = trial.model_copy(update={"state": TrialState.RUNNING, "token": trial.token + 1, "holder": spec.holder,
                                         "not_before": 0.0, "started_at": trial.started_at or now})  # fmt: skip
        yield ("UPDATE trial SET state = 'running', token = $3, holder = $4, until = $5, not_before = 0, info = $6 "
               "WHERE job = $1 AND number = $2",
               (job_id, trial.number, trial.token, spec.holder, now + spec.lease, _kept(trial)))  # fmt: skip
        items.append(trial)
    if items and job[4] is None:
        yield "UPDATE job SET started_at = $2 WHERE id = $1", (job_id, now)
    left = yield ("SELECT count(*) FROM (SELECT 1 FROM trial WHERE job = $1 AND state IN ('pending', 'running') "
                  "LIMIT 2000) AS open", (job_id,))  # fmt: skip
    first = now
    if not items:
        others = yield ("SELECT min(CASE WHEN state = 'pending' THEN not_before ELSE until END) FROM trial "
                        "WHERE job = $1 AND (state = 'pending' OR (state = 'running' AND holder <> $2))",
                        (job_id, spec.holder))  # fmt: skip
        first = others[0][0]
        yield from _end_if_complete(now, job_id)
    return ClaimedTrials(items=items, left=left[0][0], wait=None if first is None else max(0.0, first - now),
                         cancelling=cancelling)  # fmt: skip


def _kept(trial: TrialInfo) -> str:
    fields = {"started_at", "finished_at", "rewards", "error", "result", "history"}
    return trial.model_dump_json(include=fields, exclude_none=True)


def _drop(now: float, job_id: str, all_running: bool) -> Steps[None]:
    """Cancel the trials of a cancelled job that no runner has. A result of a former runner has an old token."""
    yield ("UPDATE trial SET state = 'cancelled', token = token + 1 WHERE job = $1 AND (state = 'pending' OR "
           "(state = 'running' AND (until < $2 OR $3 = 1)))", (job_id, now, int(all_running)))  # fmt: skip


def _end_if_complete(now: float, job_id: str) -> Steps[None]:
    left = yield "SELECT 1 FROM trial WHERE job = $1 AND state IN ('pending', 'running') LIMIT 1", (job_id,)
    if not left:
        yield "UPDATE job SET finished_at = $2 WHERE id = $1 AND finished_at IS NULL", (job_id, now)


def _beat(now: float, job_id: str, tenant: str | None, spec: BeatTrials) -> Steps[BeatenTrials]:
    job = yield from _load(job_id, tenant, lock=True)
    lost = []
    for number, token in spec.trials.items():
        rows = yield ("UPDATE trial SET until = $5 WHERE job = $1 AND number = $2 AND token = $3 AND holder = $4 AND "
                      "state = 'running' RETURNING number",
                      (job_id, number, token, spec.holder, now + spec.lease))  # fmt: skip
        if not rows:
            lost.append(number)
    return BeatenTrials(lost=lost, cancelling=bool(job[6]))


def _finish(now: float, job_id: str, tenant: str | None, number: int, spec: FinishTrial) -> Steps[TrialInfo]:
    job = yield from _load(job_id, tenant, lock=True)
    rows = yield f"SELECT {_TRIAL} FROM trial WHERE job = $1 AND number = $2", (job_id, number)
    if not rows:
        raise NotFound(f"job {job_id} has no trial {number}", hint="trials are numbered from 1")
    trial = _trial(rows[0])
    if trial.token != spec.token:
        raise Conflict(
            f"trial {number} of job {job_id} has token {trial.token}, not {spec.token}: another runner has it",
            hint="stop to run this trial: its lease ended, or another runner took it over",
        )
    if trial.state is not TrialState.RUNNING:
        if trial.state.is_final and trial.state.value == spec.outcome:
            return trial  # a repeated request
        raise Conflict(f"trial {number} of job {job_id} is {trial.state}", hint="a final trial does not change")
    again = spec.outcome in ("retry", "release")
    if again and job[6]:
        spec, again = spec.model_copy(update={"outcome": "cancelled"}), False
    state = TrialState.PENDING if again else TrialState(spec.outcome)
    error = spec.error if spec.error is None or spec.error.at else spec.error.model_copy(update={"at": now})
    history = list(trial.history)
    if again and error is not None:
        history = [*history, error.model_copy(update={"traceback": ""})][-HISTORY:]
    trial = trial.model_copy(update={
        "state": state, "tries": trial.tries + (spec.outcome != "release"), "error": None if again else error,
        "rewards": spec.rewards, "result": spec.result, "history": history, "holder": "" if again else trial.holder,
        "not_before": now + spec.delay if again else 0.0, "finished_at": None if again else now,
        "token": trial.token,
    })  # fmt: skip
    yield ("UPDATE trial SET state = $3, tries = $4, holder = $5, not_before = $6, info = $7, reward = $8 "
           "WHERE job = $1 AND number = $2",
           (job_id, number, state.value, trial.tries, trial.holder, trial.not_before, _kept(trial),
            trial.reward))  # fmt: skip
    if not again:
        yield from _end_if_complete(now, job_id)
    return trial


def _cancel(now: float, job_id: str, tenant: str | None) -> Steps[JobInfo]:
    yield from _load(job_id, tenant, lock=True)
    yield "UPDATE job SET cancelled = 1 WHERE id = $1", (job_id,)
    yield from _drop(now, job_id, False)
    yield from _end_if_complete(now, job_id)
    return (yield from _info(job_id, tenant))


def _delete(now: float, job_id: str, tenant: str | None) -> Steps[JobInfo]:
    yield from _load(job_id, tenant, lock=True)
    info = yield from _info(job_id, tenant)
    held = yield "SELECT count(*) FROM trial WHERE job = $1 AND state = 'running' AND until >= $2", (job_id, now)
    if held[0][0]:
        raise Conflict(f"job {job_id} cannot be deleted: a runner has {held[0][0]} of its trials",
                       hint=f"cancel it first: rock job cancel {job_id}")  # fmt: skip
    yield "DELETE FROM trial WHERE job = $1", (job_id,)
    yield "DELETE FROM job WHERE id = $1", (job_id,)
    return info


def error_of(trial: TrialInfo) -> TrialError | None:
    """The error of a trial, else that of its last try."""
    return trial.error or (trial.history[-1] if trial.history else None)


# ---- databases ----


def remove_incomplete(db: sqlite3.Connection, shared: bool) -> None:
    """Remove the trials of jobs whose creation was interrupted by a crash. shared: other servers may be at work."""
    now = db.execute("SELECT (julianday('now') - 2440587.5) * 86400.0").fetchone()[0]
    for name, began in db.execute("SELECT name, value FROM about WHERE name LIKE ?", (f"{_CREATING}%",)).fetchall():
        if not shared or float(began) < now - _ABANDONED:
            db.execute("DELETE FROM trial WHERE job = ?", (name.removeprefix(_CREATING),))
            db.execute("DELETE FROM about WHERE name = ?", (name,))


class _Operations:
    """`Jobs` over a function that runs an operation in a transaction. advisory: whether the database has advisory
    locks, which it needs for counts."""

    advisory = False

    async def _run(self, operation: Callable[[float], Steps[T]]) -> T:
        raise NotImplementedError

    async def create(self, spec: CreateJob, tenant: str, key: str | None = None) -> JobInfo:
        await faults.point("store.job.create")
        return await self._run(lambda now: _create(now, spec, tenant, key, self.advisory))

    async def list(
        self, tenant: str | None, label: tuple[str, str] | None = None, limit: int = 100
    ) -> Sequence[JobInfo]:
        return await self._run(lambda _: _list(tenant, label, limit))

    async def get(self, job_id: str, tenant: str | None, tasks: bool = True) -> JobDetail:
        return await self._run(lambda now: _get(now, job_id, tenant, tasks))

    async def trials(self, job_id: str, tenant: str | None, after: int = 0, limit: int = PAGE) -> TrialList:
        return await self._run(lambda _: _trials(job_id, tenant, after, limit))

    async def claim(self, job_id: str, tenant: str | None, spec: ClaimTrials) -> ClaimedTrials:
        await faults.point("store.job.claim")
        return await self._run(lambda now: _claim(now, job_id, tenant, spec))

    async def beat(self, job_id: str, tenant: str | None, spec: BeatTrials) -> BeatenTrials:
        return await self._run(lambda now: _beat(now, job_id, tenant, spec))

    async def finish(self, job_id: str, tenant: str | None, number: int, spec: FinishTrial) -> TrialInfo:
        await faults.point("store.job.finish")
        return await self._run(lambda now: _finish(now, job_id, tenant, number, spec))

    async def cancel(self, job_id: str, tenant: str | None) -> JobInfo:
        return await self._run(lambda now: _cancel(now, job_id, tenant))

    async def delete(self, job_id: str, tenant: str | None) -> JobInfo:
        return await self._run(lambda now: _delete(now, job_id, tenant))


class SqliteJobs(_Operations):
    """do: runs a function on the open database in a transaction of its own, and converts errors."""

    def __init__(self, do: Callable[[Callable[[sqlite3.Connection], Any]], Any]) -> None:
        self._do = do

    async def create(self, spec: CreateJob, tenant: str, key: str | None = None) -> JobInfo:
        """The trials of a large job are written in several short transactions, and its row in the last one: without
        the row there is no job. The start of the next process removes the trials of an incomplete creation."""
        count = len(spec.tasks) * spec.attempts
        if count <= AT_ONCE:
            return await super().create(spec, tenant, key)
        await faults.point("store.job.create")
        known = await self._run(lambda now: _known(tenant, key))
        if known is not None:
            return known
        job_id, text = secrets.token_hex(8), await asyncio.to_thread(_text_of, spec)
        rows = _trial_rows(job_id, spec)
        created = False
        await self._run(lambda now: _once("INSERT INTO about (name, value) VALUES ($1, $2)",
                                          (_CREATING + job_id, str(now))))  # fmt: skip
        try:
            while part := Many(itertools.islice(rows, AT_ONCE)):
                await self._run(lambda now, part=part: _once(_ADD, part))  # type: ignore[misc]
                await faults.point("store.job.creating")
                await asyncio.sleep(0)  # lets waiting requests run first
            made = await self._run(lambda now: _create(now, spec, tenant, key, False, (job_id, text)))
            created = made.job_id == job_id  # not when another request created it meanwhile
            return made
        finally:
            if not created:
                await self._forget(job_id, count)

    async def _forget(self, job_id: str, count: int) -> None:
        """Remove the trials of a job that was not created."""
        for number in range(0, count, AT_ONCE):
            await self._run(lambda now, last=number + AT_ONCE: _once(  # type: ignore[misc]
                "DELETE FROM trial WHERE job = $1 AND number <= $2", (job_id, last)))  # fmt: skip
            await asyncio.sleep(0)
        await self._run(lambda now: _once("DELETE FROM about WHERE name = $1", (_CREATING + job_id,)))

    async def _run(self, operation: Callable[[float], Steps[T]]) -> T:
        def work(db: sqlite3.Connection) -> T:
            now = db.execute("SELECT (julianday('now') - 2440587.5) * 86400.0").fetchone()[0]
            steps = operation(now)
            try:
                text, values = next(steps)
                while True:
                    text = text.replace("$", "?").replace(" FOR UPDATE", "")
                    run = db.executemany if isinstance(values, Many) else db.execute
                    text, values = steps.send(run(text, values).fetchall())
            except StopIteration as end:
                done: T = end.value
                return done

        made: T = self._do(work)
        return made


class PostgresJobs(_Operations):
    """transaction: opens a connection in a transaction of its own. All stored texts are JSON or without NUL."""

    advisory = True

    def __init__(self, transaction: Callable[[], AbstractAsyncContextManager[Any]]) -> None:
        self._transaction = transaction

    async def _run(self, operation: Callable[[float], Steps[T]]) -> T:
        async with self._transaction() as db:
            now = await db.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
            steps = operation(now)
            try:
                text, values = next(steps)
                while True:
                    if isinstance(values, Many):
                        await db.executemany(text, values)
                        rows = []
                    else:
                        rows = await db.fetch(text, *values)
                    text, values = steps.send([tuple(row) for row in rows])
            except StopIteration as end:
                done: T = end.value
                return done
