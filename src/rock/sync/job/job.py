# GENERATED from src/rock/sdk/job/job.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""`Job`: a configuration that runs as trials on a server."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from rock import settings
from rock.errors import InvalidConfig
from rock.jobs import reports, tasks
from rock.jobs.config import BashJobConfig, HarborJobConfig, JobConfig
from rock.jobs.plan import Plan, plan_of
from rock.protocol.jobs import JobDetail, JobInfo, JobTask, TrialInfo
from rock.sync import primitives
from rock.sync.client import Client
from rock.sync.job.agents import agent_of
from rock.sync.job.runner import LEASE, Event, Runner
from rock.sync.sandbox.sandbox import Sandbox

JobStatus = str  # pending, running, completed, failed, cancelled
_POLL = 0.2


@dataclass
class TrialResult:
    """ROCK's result of a trial. score: the reward; None without a valid one. exception_info: None without an error."""

    task_name: str
    trial_name: str
    status: str
    score: float | None = None
    exception_info: dict[str, Any] | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    raw_output: str = ""
    exit_code: int | None = 0
    rewards: dict[str, float] | None = None
    agent_info: dict[str, Any] | None = None
    agent_result: dict[str, Any] | None = None
    verifier_result: dict[str, Any] | None = None
    result: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, trial: TrialInfo) -> Self:
        figures = reports.rock_trial(trial)
        times = {name: None if figures[name] is None else datetime.fromisoformat(figures[name])
                 for name in ("started_at", "finished_at")}  # fmt: skip
        return cls(trial.task, figures["trial_name"], trial.state.value, trial.reward, figures["exception_info"],
                   raw_output=figures["raw_output"], exit_code=figures["exit_code"], rewards=trial.rewards,
                   agent_info=figures["agent_info"], agent_result=figures["agent_result"],
                   verifier_result=figures["verifier_result"], result=trial.result, **times)  # fmt: skip


HarborTrialResult = TrialResult


@dataclass
class JobResult:
    """ROCK's result of a job. score: mean of the valid rewards; None without one."""

    job_id: str
    status: JobStatus
    labels: dict[str, str]
    trial_results: list[TrialResult]
    score: float | None
    exit_code: int
    summary: dict[str, Any]
    raw_output: str = ""


class TrialClient:
    """A trial that runs, as ROCK's integrations read it: `trial`, `sandbox` and `pid`."""

    def __init__(self, runner: Runner, number: int) -> None:
        self._runner = runner
        self.number = number

    @property
    def trial(self) -> Any:
        """The object with the hooks of the trial."""
        return self._runner.trials.get(self.number)

    @property
    def sandbox(self) -> Sandbox | None:
        attempt = self._runner.attempts.get(self.number)
        return attempt.sandbox if attempt is not None and attempt.has_sandbox else None

    @property
    def pid(self) -> int | str | None:
        """The process id of the running program in the sandbox."""
        attempt = self._runner.attempts.get(self.number)
        return None if attempt is None else attempt.pid


class JobClient:
    """The trials of a submitted job in their order."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    @property
    def trials(self) -> list[TrialClient]:
        return [TrialClient(self._runner, number) for number in range(1, self._runner.job.trials + 1)]


class Operator:
    """How a configuration becomes trials. attempts: of each task."""

    attempts = 1


class ScatterOperator(Operator):
    """Run each task `size` times."""

    def __init__(self, size: int = 1) -> None:
        if size < 1:
            raise InvalidConfig(f"ScatterOperator(size={size}) runs nothing", hint="use a size of at least 1")
        self.attempts = size


class Job(primitives.Face):
    """A job of a configuration, or of a plan with tasks.

        result = Job(JobConfig.from_yaml("job.yaml")).run()

    operator: multiplies attempts, as in ROCK. tasks: instead of those of the configuration. concurrency: replaces the
    configured one. folder: local folder of logs and artifacts. base: folder of relative paths of the configuration.
    on_event: receives the events of `rock job run --jsonl`. base_url, api_key: of the server; by default those of the
    configuration.
    """

    def __init__(
        self,
        config: JobConfig | Plan,
        operator: Operator | None = None,
        *,
        tasks: Sequence[JobTask] | None = None,
        concurrency: int | None = None,
        folder: str | os.PathLike[str] | None = None,
        base: str | os.PathLike[str] | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        on_event: Callable[[Event], object] | None = None,
        lease: float = LEASE,
    ) -> None:
        self.config = config if isinstance(config, JobConfig) else None
        self.plan = plan_of(config) if isinstance(config, JobConfig) else config
        self.info: JobInfo | None = None
        attempts = (operator or Operator()).attempts
        self.plan = self.plan.model_copy(update={"attempts": self.plan.attempts * attempts})
        box = self.config.environment if self.config is not None else None
        self._reach = {
            "base_url": base_url or (box.base_url if box is not None else settings.base_url()),
            "api_key": api_key or (box.api_key if box is not None else settings.api_key()),
        }
        self._client = Client(self._reach["base_url"], self._reach["api_key"])
        self._given = tasks
        self._concurrency = concurrency
        self._folder = None if folder is None else Path(folder)
        self._base = None if base is None else Path(base)
        self.on_event = on_event
        self._lease = lease
        self._runner: Runner | None = None
        self._running = primitives.Tasks()

    @classmethod
    def load(
        cls, job_id: str, *, base_url: str | None = None, api_key: str | None = None, **options: Any
    ) -> Self:
        """A stored job, to resume or to wait for. options: as of the class. NotFound."""
        detail = Client(base_url, api_key).jobs.get(job_id)
        job = cls(Plan.model_validate(detail.config), base_url=base_url, api_key=api_key, **options)
        job.info = detail
        return job

    @property
    def job_id(self) -> str:
        """The id of the submitted job."""
        if self.info is None:
            raise InvalidConfig("the job was not submitted", hint="call submit() or run()")
        return self.info.job_id

    @property
    def _job_client(self) -> JobClient:
        """ROCK's integrations read `job._job_client.trials[0].sandbox`."""
        if self._runner is None:
            raise InvalidConfig("the job was not submitted", hint="call submit()")
        return JobClient(self._runner)

    # ---- run

    def create(self) -> JobInfo:
        """Check the configuration and store the job, without running it. InvalidConfig, Unsupported, NotFound."""
        if self.info is None:
            found = primitives.in_thread(self._tasks)
            config = self.plan.model_dump(mode="json")
            labels = {key: value[:1000] for key, value in self.plan.labels.items()}
            self.info = self._client.jobs.create(self.plan.name, found, self.plan.attempts, config, labels)
        return self.info

    def _tasks(self) -> list[JobTask]:
        """The tasks of the job, for each agent."""
        config = self.config
        if self._given is not None:
            found = list(self._given)
        elif isinstance(config, HarborJobConfig):
            found = tasks.harbor_tasks(config, self._base)
        elif isinstance(config, BashJobConfig):
            env = {"ROCK_JOB_NAME": self.plan.name, **config.environment.env}
            name = env.get("TASK") or self.plan.name
            found = [tasks.bash_task(name, config.text(self._base), env, config.reward_file)]
        else:
            raise InvalidConfig("the job has no tasks", hint="pass tasks=[...]")
        if any(task.spec.get("kind") != "bash" for task in found):
            for agent in self.plan.agents:
                agent_of(agent)
        if len(self.plan.agents) == 1:
            return found
        return [JobTask(name=f"{number}-{agent.title}/{task.name}", spec={**task.spec, "agent": number})
                for number, agent in enumerate(self.plan.agents) for task in found]  # fmt: skip

    def submit(self, take_over: bool = False) -> str:
        """Store the job and begin to run it in the background; returns its id. The first trials run, or have ended,
        when it returns. take_over: do not wait for leases of other runners."""
        self.create()
        runner = self._make_runner(take_over)
        self._running.start(self._run)
        while runner.job.trials > len(runner.results) and not runner.closed:
            if any(attempt.pid is not None for attempt in list(runner.attempts.values())) or self._runner is None:
                break
            primitives.sleep(_POLL)
        return self.job_id

    def _make_runner(self, take_over: bool) -> Runner:
        detail = self._client.jobs.get(self.job_id)
        self._runner = Runner(
            self._client.jobs, detail, self.plan, self._reach, config=self.config, concurrency=self._concurrency,
            folder=self._logs(detail), lease=self._lease, take_over=take_over, on_event=self.on_event,
        )  # fmt: skip
        return self._runner

    def _logs(self, detail: JobDetail) -> Path | None:
        folder = self._folder or (Path(self.plan.jobs_dir) if self.plan.jobs_dir else None)
        if folder is None:
            return None
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", detail.name).strip(".-")[:80] or "job"
        return folder / f"{name}-{detail.job_id}"

    def _run(self) -> None:
        assert self._runner is not None
        try:
            self._runner.run()
        finally:
            self._runner.stop()
        self._running.put(None)

    def wait(self, timeout: float | None = None) -> JobResult:
        """The result, when all trials are final. TimeoutError after `timeout` seconds; the job continues. The error of
        the runner, if it cannot continue."""
        if self._runner is None:
            self._poll(timeout)
        else:
            self._running.get(timeout)
            self._running.close()
        return self.result()

    def _poll(self, timeout: float | None) -> None:
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            info = self._client.jobs.get(self.job_id)
            if info.finished_at is not None:
                return
            if end is not None and time.monotonic() >= end:
                raise TimeoutError(f"job {self.job_id} did not end within {timeout:g} seconds")
            primitives.sleep(1.0)

    def run(self, take_over: bool = False) -> JobResult:
        """Run the job to its end in this process. A job that was submitted before, also by another process, is
        continued: its final trials are not repeated."""
        self.create()
        runner = self._make_runner(take_over)
        try:
            runner.run()
        finally:
            runner.stop()
        return self.result()

    def cancel(self) -> JobInfo:
        """Cancel the job: its pending trials now, and its running ones with the next heartbeat of their runners."""
        return self._client.jobs.cancel(self.job_id)

    def result(self) -> JobResult:
        """The result as it is stored now."""
        detail = self._client.jobs.get(self.job_id)
        trials = self._client.jobs.trials(self.job_id)
        figures = reports.summary(detail, trials)
        failed = detail.state.value in ("failed", "cancelled")
        results = [TrialResult.of(trial) for trial in trials]
        return JobResult(self.job_id, detail.state.value, detail.labels, results, detail.mean_reward, int(failed),
                         figures, results[0].raw_output if results else "")  # fmt: skip
