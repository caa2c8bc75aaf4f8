"""Runs the trials of a job: claims, heartbeats, retries and results.

    worker x concurrency:  claim ─► Attempt ─► finish ─► stop its sandboxes
    heartbeat:             renews leases; stops trials that were lost or cancelled

Any number of runners may share a job. Another runner replaces one that died: the server leases its trials again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from rock import errors
from rock.jobs.config import JobConfig
from rock.jobs.plan import Plan, error_of
from rock.jobs.reports import trial_name
from rock.protocol.jobs import LARGEST_RESULT, BeatTrials, ClaimTrials, FinishTrial, JobDetail, TrialInfo
from rock.sdk import primitives
from rock.sdk.job.attempts import Attempt, Stopped
from rock.sdk.job.trials import AbstractTrial, trial_of
from rock.sdk.jobs import Jobs

LEASE = 30.0  # seconds
_PAUSE = 1.0  # seconds between two calls of a server that is away
_WAIT = 5.0  # seconds until a worker without a trial asks again, at most
_TICK = 0.5

Event = dict[str, Any]


class Runner:
    """Runs trials of one job until all are final. reach: base_url and api_key of the server. concurrency: trials at the
    same time. folder: local folder of logs. take_over: do not wait for the leases of other runners. on_event: receives
    the events of `rock job run --jsonl`."""

    def __init__(
        self,
        jobs: Jobs,
        job: JobDetail,
        plan: Plan,
        reach: dict[str, Any],
        *,
        config: JobConfig | None = None,
        concurrency: int | None = None,
        folder: Path | None = None,
        lease: float = LEASE,
        take_over: bool = False,
        on_event: Callable[[Event], object] | None = None,
    ) -> None:
        self.job = job
        self.plan = plan
        self.attempts: dict[int, Attempt] = {}
        self.trials: dict[int, AbstractTrial] = {}
        self.results: dict[int, TrialInfo] = {}
        self.closed = False
        self._jobs = jobs
        self._reach = {name: value for name, value in reach.items() if value is not None}
        self._config = config
        self._concurrency = max(1, min(concurrency or plan.concurrency, job.trials))
        self._folder = folder
        self._lease = lease
        self._take_over = take_over
        self._on_event = on_event
        self._holder = f"runner-{os.urandom(8).hex()}"
        self._built: set[str] = set()
        self._working = 0
        self._error: BaseException | None = None

    # ---- run

    async def run(self) -> None:
        """Run until all trials of the job are final, also those of other runners. RockError: the server refuses."""
        known = await self._jobs.trials(self.job.job_id)
        self.results = {trial.number: trial for trial in known if trial.state.is_final}
        self._tell("run_started", run_id=self.job.job_id, mode="single" if self.job.tasks == 1 else "multi",
                   total=self.job.trials, pending=self.job.trials - len(self.results),
                   resumed=bool(self.results) or any(trial.token for trial in known))  # fmt: skip
        self._working = self._concurrency
        calls: list[Any] = [self._worker] * self._concurrency
        await primitives.gather([*calls, self._beats])
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Claim no more trials. Trials that run are left to another runner."""
        self.closed = True

    async def _worker(self) -> None:
        try:
            while not self.closed:
                trial, wait = await self._claim()
                if trial is not None:
                    await self._one(trial)
                elif wait is None:
                    return
                else:
                    await self._sleep(wait)
        except BaseException as error:
            self._error = self._error or error
            self.closed = True
            raise
        finally:
            self._working -= 1

    async def _claim(self) -> tuple[TrialInfo | None, float | None]:
        """(a leased trial, None), or (None, seconds until it is worth to ask again; None at the end)."""
        spec = ClaimTrials(holder=self._holder, count=1, lease=self._lease, take_over=self._take_over)
        claimed = await self._server(partial(self._jobs.claim, self.job.job_id, spec))
        if claimed.items:
            return claimed.items[0], None
        mine = len(self.attempts)
        if claimed.left <= mine or (claimed.cancelling and not claimed.left):
            return None, None
        return None, min(_WAIT, max(0.05, claimed.wait if claimed.wait is not None else _WAIT))

    async def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.closed and (left := end - time.monotonic()) > 0:
            await primitives.sleep(min(left, _TICK))

    async def _server(self, call: Callable[[], Any]) -> Any:
        """The response of the server; a server that is away is waited for."""
        while True:
            try:
                return await call()
            except errors.Unavailable:
                if self.closed:
                    raise
                await primitives.sleep(_PAUSE)

    async def _beats(self) -> None:
        """Renew leases while workers work."""
        due = time.monotonic() + self._lease / 3
        while self._working:
            await primitives.sleep(min(_TICK, self._lease / 10))
            if time.monotonic() < due or not self.attempts:
                continue
            due = time.monotonic() + self._lease / 3
            held = {number: attempt.trial.token for number, attempt in dict(self.attempts).items()}
            try:
                beaten = await self._jobs.beat(self.job.job_id, BeatTrials(holder=self._holder, trials=held,
                                                                           lease=self._lease))  # fmt: skip
            except errors.NotFound:  # the job was deleted
                for attempt in list(self.attempts.values()):
                    await attempt.halt("lost")
                continue
            except errors.RockError:
                due = time.monotonic() + min(_PAUSE, self._lease / 10)
                continue
            for number in list(self.attempts):
                one = self.attempts.get(number)
                if one is None or held.get(number) != one.trial.token:
                    continue
                if number in beaten.lost:
                    await one.halt("lost")
                elif beaten.cancelling and not one.stopped:
                    await one.halt("cancelled")

    # ---- one trial

    async def _one(self, trial: TrialInfo) -> None:
        folder = None if self._folder is None else self._folder / trial_name(trial)
        attempt = Attempt(self.job, self.plan, trial, self._reach, folder)
        attempt.built = self._built
        self.attempts[trial.number] = attempt
        if trial.token > 1:
            self._tell("job_recovered", task_id=trial.task, job_name=trial_name(trial), tries=trial.tries)
        try:
            kind = trial_of(str(attempt.task.spec.get("kind", "")), self._config)
            self.trials[trial.number] = kind
            self._tell("job_started", task_id=trial.task, job_name=trial_name(trial), index=trial.number,
                       total=self.job.trials, sandbox_id=attempt.sandbox_id())  # fmt: skip
            spec = await self._end_of(attempt, kind)
            if spec is not None:
                await attempt.end_run(spec.rewards)
                await self._finish(attempt, spec)
            if attempt.stopped != "lost":
                await attempt.close()
        finally:
            self.attempts.pop(trial.number, None)

    async def _end_of(self, attempt: Attempt, kind: AbstractTrial) -> FinishTrial | None:
        """Run the trial to the message of its end; None: it belongs to another runner."""
        trial = attempt.trial
        try:
            rewards = await kind.run(attempt)
            attempt.check()
            return FinishTrial(token=trial.token, outcome="completed", rewards=rewards, result=_fitting(attempt.result))
        except Stopped:
            pass
        except Exception as error:
            if not attempt.stopped:
                return self._failed(attempt, error)
        if attempt.stopped == "lost":
            return None
        return FinishTrial(token=trial.token, outcome="cancelled", result=_fitting(attempt.result))

    def _failed(self, attempt: Attempt, error: Exception) -> FinishTrial:
        found = error_of(error)
        if not isinstance(error, errors.RockError | OSError | ValueError):
            found = found.model_copy(update={"kind": "request"})  # a defect of a trial class: a retry repeats it
        waits = isinstance(error, errors.NoCapacity | errors.QuotaExceeded)
        delay = _WAIT if waits else self.plan.retry.delay(found, attempt.trial.tries + 1)
        outcome: Any = "release" if waits else "failed" if delay is None else "retry"
        return FinishTrial(token=attempt.trial.token, outcome=outcome, error=found, delay=delay or 0.0,
                           result=_fitting(attempt.result))  # fmt: skip

    async def _finish(self, attempt: Attempt, spec: FinishTrial) -> None:
        number = attempt.trial.number
        try:
            done = await self._server(partial(self._jobs.finish, self.job.job_id, number, spec))
        except (errors.Conflict, errors.NotFound):
            attempt.stopped = "lost"  # another runner has it, or the job was deleted
            return
        if not done.state.is_final:
            self._tell("job_retried", task_id=done.task, job_name=trial_name(done), tries=done.tries,
                       error=found.message if (found := spec.error) is not None else "", delay=spec.delay)  # fmt: skip
            return
        self.results[number] = done
        attempt.log("result.txt", done.state.value)
        passed = done.reward is not None and done.reward >= 1.0
        self._tell("job_done", task_id=done.task, job_name=trial_name(done), status=done.state.value, score=done.reward,
                   error=None if done.error is None else f"{done.error.type}: {done.error.message}"[:500],
                   passed=passed)  # fmt: skip
        finals = list(self.results.values())
        self._tell("progress", completed=len(finals),
                   passed=sum(one.reward is not None and one.reward >= 1.0 for one in finals),
                   failed=sum(one.state.value == "failed" for one in finals), total=self.job.trials)  # fmt: skip

    def _tell(self, event: str, **fields: Any) -> None:
        if self._on_event is not None:
            self._on_event({"event": event, **fields})


def _fitting(result: dict[str, Any]) -> dict[str, Any]:
    """A result within the limit of the server: long texts are cut."""
    limit = LARGEST_RESULT // 2
    while len(orjson.dumps(result, default=str)) > LARGEST_RESULT - 4096 and limit > 500:
        limit //= 2
        result = {name: _cut(value, limit) for name, value in result.items()}
    return result


def _cut(value: Any, limit: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= limit else value[-limit:]
    if isinstance(value, dict):
        return {name: _cut(one, limit) for name, one in value.items()}
    return [_cut(one, limit) for one in value[: max(10, limit // 100)]] if isinstance(value, list) else value
