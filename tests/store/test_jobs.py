"""The table of jobs in both databases: leases, fencing tokens, retries, cancellation, tenants, and the migration."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from tests.store.test_store import opened, opens, with_store

from rock.errors import Conflict, NotFound, QuotaExceeded
from rock.protocol.jobs import (
    BeatTrials,
    ClaimTrials,
    CreateJob,
    FinishTrial,
    JobState,
    JobTask,
    TrialError,
    TrialState,
)
from rock.store.migrations import POSTGRES, SQLITE
from rock.store.sqlite import SqliteStore

__all__ = ["opens", "with_store"]
LOST = TrialError(kind="infrastructure", type="Lost", message="gone")


def job(tasks: int = 2, attempts: int = 1, **fields: Any) -> CreateJob:
    names = [f"task {number}" for number in range(tasks)]
    return CreateJob(name="job", tasks=[JobTask(name=name, spec={"n": name, "nul": "\0"}) for name in names],
                     attempts=attempts, **fields)  # fmt: skip


def claim(holder: str = "me", count: int = 10, **fields: Any) -> ClaimTrials:
    return ClaimTrials(holder=holder, count=count, **fields)


def done(token: int, reward: float | None = 1.0) -> FinishTrial:
    return FinishTrial(token=token, outcome="completed", rewards=None if reward is None else {"reward": reward})


def test_a_job_runs_to_its_end(with_store: Any) -> None:
    async def work(store: Any) -> None:
        jobs = store.jobs
        made = await jobs.create(job(2, 2, labels={"a": "b"}, config={"x": [1]}), "t", "key")
        assert made.state is JobState.PENDING and made.trials == 4 and made.started_at is None
        assert await jobs.create(job(1), "t", "key") == made
        assert (await jobs.create(job(1), "u", "key")).job_id != made.job_id
        first = await jobs.claim(made.job_id, "t", claim(count=3))
        assert [(t.number, t.task, t.attempt, t.token) for t in first.items] == [
            (1, "task 0", 1, 1), (2, "task 1", 1, 1), (3, "task 0", 2, 1)]  # fmt: skip
        assert first.left == 4 and first.wait == 0.0
        assert (await jobs.get(made.job_id, "t")).state is JobState.RUNNING
        for number, reward in ((1, 1.0), (2, 0.0), (3, None)):
            await jobs.finish(made.job_id, "t", number, done(1, reward))
        (last,) = (await jobs.claim(made.job_id, "t", claim("other"))).items
        assert last.number == 4
        failed = FinishTrial(token=1, outcome="failed", error=LOST, result={"phases": {}})
        end = await jobs.finish(made.job_id, "t", 4, failed)
        assert end.state is TrialState.FAILED and end.reward is None and end.error is not None and end.error.at > 0
        detail = await jobs.get(made.job_id, None)
        assert detail.state is JobState.FAILED and detail.finished_at is not None and detail.config == {"x": [1]}
        assert (detail.valid, detail.mean_reward) == (2, 0.5)  # the error is not a zero
        assert detail.task_list[1].spec == {"n": "task 1", "nul": "\0"}
        again = await jobs.claim(made.job_id, "t", claim(take_over=True))
        assert again.items == [] and again.left == 0 and again.wait is None
        page = await jobs.trials(made.job_id, "t", 1, 2)
        assert [t.number for t in page.items] == [2, 3] and page.next == 3
        assert [one.job_id for one in await jobs.list("t", ("a", "b"))] == [made.job_id]
        assert await jobs.list("t", ("a", "c")) == []

    with_store(work)


def test_a_lease_that_ended_gives_the_trial_to_another_runner(with_store: Any) -> None:
    async def work(store: Any) -> None:
        jobs = store.jobs
        made = await jobs.create(job(2), "")
        await jobs.claim(made.job_id, None, claim("first", lease=1))
        waiting = await jobs.claim(made.job_id, None, claim("second"))
        assert waiting.items == [] and waiting.left == 2 and 0 < (waiting.wait or 0) <= 1
        beat = await jobs.beat(made.job_id, None, BeatTrials(holder="first", trials={1: 1, 2: 9, 7: 1}, lease=60))
        assert beat.lost == [2, 7] and not beat.cancelling
        await asyncio.sleep(1.1)
        (taken,) = (await jobs.claim(made.job_id, None, claim("second"))).items
        assert (taken.number, taken.token) == (2, 2)  # the lease of trial 1 was renewed
        with pytest.raises(Conflict, match="another runner"):
            await jobs.finish(made.job_id, None, 2, done(1))
        ended = await jobs.finish(made.job_id, None, 2, done(2, 0.25))
        assert await jobs.finish(made.job_id, None, 2, done(2, 0.25)) == ended  # a repeated request
        with pytest.raises(Conflict, match="is completed"):
            await jobs.finish(made.job_id, None, 2, FinishTrial(token=2, outcome="failed", error=LOST))
        (taken,) = (await jobs.claim(made.job_id, None, claim("second", take_over=True))).items
        assert (taken.number, taken.token) == (1, 2)

    with_store(work)


def test_a_retry_waits_and_keeps_the_history(with_store: Any) -> None:
    async def work(store: Any) -> None:
        jobs = store.jobs
        made = await jobs.create(job(1), "")
        for number in range(1, 25):
            (trial,) = (await jobs.claim(made.job_id, None, claim())).items
            assert trial.token == number and trial.tries == number - 1
            retry = FinishTrial(token=number, outcome="retry", error=LOST, delay=0)
            await jobs.finish(made.job_id, None, 1, retry)
        await jobs.claim(made.job_id, None, claim())
        waiting = FinishTrial(token=25, outcome="release", error=LOST, delay=100)
        trial = await jobs.finish(made.job_id, None, 1, waiting)
        assert trial.tries == 24 and len(trial.history) == 20 and trial.error is None and trial.finished_at is None
        found = await jobs.claim(made.job_id, None, claim())
        assert found.items == [] and 90 < (found.wait or 0) <= 100 and found.left == 1

    with_store(work)


def test_a_cancelled_job_ends(with_store: Any) -> None:
    async def work(store: Any) -> None:
        jobs = store.jobs
        made = await jobs.create(job(3), "")
        await jobs.claim(made.job_id, None, claim(count=2, lease=60))
        info = await jobs.cancel(made.job_id, None)
        assert info.cancelling and info.counts.cancelled == 1 and info.state is JobState.RUNNING
        beat = await jobs.beat(made.job_id, None, BeatTrials(holder="me", trials={1: 1, 2: 1}))
        assert beat.cancelling and beat.lost == []
        with pytest.raises(Conflict, match="cannot be deleted"):
            await jobs.delete(made.job_id, None)
        await jobs.finish(made.job_id, None, 1, done(1))  # it was complete before it was stopped
        retry = FinishTrial(token=1, outcome="retry", error=LOST)
        assert (await jobs.finish(made.job_id, None, 2, retry)).state is TrialState.CANCELLED
        detail = await jobs.get(made.job_id, None)
        assert detail.state is JobState.CANCELLED and detail.finished_at is not None and not detail.cancelling
        assert (await jobs.claim(made.job_id, None, claim())).left == 0
        await jobs.delete(made.job_id, None)
        with pytest.raises(NotFound):
            await jobs.get(made.job_id, None)

    with_store(work)


def test_a_cancelled_job_without_a_runner_ends(with_store: Any) -> None:
    async def work(store: Any) -> None:
        made = await store.jobs.create(job(2), "")
        await store.jobs.claim(made.job_id, None, claim(count=1, lease=1))
        assert (await store.jobs.cancel(made.job_id, None)).cancelling
        assert (await store.jobs.get(made.job_id, None)).finished_at is None
        await asyncio.sleep(1.1)
        found = await store.jobs.get(made.job_id, None)
        assert found.state is JobState.CANCELLED and found.finished_at is not None and found.counts.cancelled == 2
        with pytest.raises(Conflict, match="another runner"):  # the runner comes back
            await store.jobs.finish(made.job_id, None, 1, done(1))

    with_store(work)


def test_jobs_belong_to_a_tenant(with_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(store: Any) -> None:
        jobs = store.jobs
        made = await jobs.create(job(1), "mine")
        for call in (jobs.get, jobs.trials, jobs.cancel, jobs.delete):
            with pytest.raises(NotFound, match="no job"):
                await call(made.job_id, "other")
        with pytest.raises(NotFound):
            await jobs.claim(made.job_id, "other", claim())
        with pytest.raises(NotFound):
            await jobs.finish(made.job_id, "other", 1, done(0))
        with pytest.raises(NotFound, match="no trial 9"):
            await jobs.finish(made.job_id, "mine", 9, done(0))
        assert await jobs.list("other") == [] and len(await jobs.list(None)) == 1
        monkeypatch.setattr("rock.store.jobs.MOST_JOBS", 1)
        with pytest.raises(QuotaExceeded):
            await jobs.create(job(1), "mine")
        await jobs.create(job(1), "other")

    with_store(work)


def test_runners_at_once_get_different_trials(opens: Any) -> None:
    async def main() -> None:
        async with opens() as one, opens() as two:
            made = await one.jobs.create(job(40), "")
            found = await asyncio.gather(*(store.jobs.claim(made.job_id, None, claim(f"r{n}", 3))
                                           for n in range(8) for store in (one, two)))  # fmt: skip
            numbers = [trial.number for each in found for trial in each.items]
            assert sorted(numbers) == list(range(1, 41))

    asyncio.run(main())


def test_a_file_without_jobs_is_brought_up_to_date(tmp_path: Path) -> None:
    old = sqlite3.connect(tmp_path / "db", isolation_level=None)
    for step in SQLITE[:7]:
        for statement in step:
            old.execute(statement)
    old.execute("PRAGMA user_version=7")
    old.execute("INSERT INTO volume VALUES ('v', 't', 'data', 'local', 1, 'ready', 1.0, NULL)")
    old.close()

    async def main() -> None:
        for _ in range(2):
            async with opened(lambda: SqliteStore(tmp_path / "db")) as store:
                assert (await store.volumes.find("t", "data")).volume_id == "v"
                made = await store.jobs.create(job(1), "t", "key")
                assert (await store.jobs.get(made.job_id, "t")).task_list[0].name == "task 0"

    asyncio.run(main())
    assert sqlite3.connect(tmp_path / "db").execute("PRAGMA user_version").fetchone() == (len(SQLITE),)


def test_a_database_without_jobs_is_brought_up_to_date(database: Any) -> None:
    from rock.store.postgres import PostgresStore

    asyncpg = pytest.importorskip("asyncpg")
    url = database()

    async def main() -> None:
        old = await asyncpg.connect(url)
        for step in POSTGRES[:5]:
            for statement in step:
                await old.execute(statement)
        await old.execute("CREATE TABLE rock_schema (version int NOT NULL)")
        await old.execute("INSERT INTO rock_schema VALUES (5)")
        await old.close()
        for _ in range(2):
            async with opened(lambda: PostgresStore(url)) as store:
                made = await store.jobs.create(job(1), "t", "key")
                assert (await store.jobs.trials(made.job_id, "t")).items[0].state is TrialState.PENDING

    asyncio.run(main())
