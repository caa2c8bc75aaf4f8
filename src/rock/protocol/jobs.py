"""Messages of jobs: tasks x attempts -> trials with rewards. The server stores and leases trials; runners run them.

    pending ─► running ─► completed | failed | cancelled
       ▲          │
       └─ retry ──┘

Times are seconds since the epoch, durations seconds. `config`, `spec` and `result` belong to the runner; the server
does not interpret them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

import orjson
from pydantic import Field, field_validator, model_validator

from rock.protocol.action import Answer
from rock.protocol.wire import Wire

MOST_TASKS = 20_000
MOST_TRIALS = 50_000
LARGEST_SPEC = 16 << 20  # bytes of the JSON of a job: its configuration and its tasks
LARGEST_RESULT = 256 << 10  # bytes of the JSON of a trial's result
MOST_REWARDS = 100
HISTORY = 20  # errors of earlier tries that a trial keeps
_NAME = r"^[^\x00-\x1f\x7f]+$"  # a bounded repetition costs 5 us for each task
_HOLDER = r"^[A-Za-z0-9_.:@-]{1,128}$"


class TrialState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self not in (TrialState.PENDING, TrialState.RUNNING)


class JobState(StrEnum):
    """pending: no trial was claimed. failed: final, and at least one trial has failed."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


ErrorClass = Literal["infrastructure", "timeout", "environment", "request", "agent", "verifier", "cancelled"]


class TrialError(Wire):
    """Why a try gave no reward. kind: the class by which retries are decided. type: name of the exception."""

    kind: ErrorClass
    type: str = Field(max_length=200)
    message: str = Field(default="", max_length=10_000)
    traceback: str = Field(default="", max_length=20_000)
    at: float = 0.0


class JobTask(Wire):
    """A task of a job. name: unique in the job. spec: what the runner needs to run it."""

    name: str = Field(pattern=_NAME, max_length=200)
    spec: dict[str, Any] = Field(default_factory=dict)


class CreateJob(Wire):
    """A new job: each task is attempted `attempts` times. config: of the runner, without secrets. labels: for lists."""

    name: str = Field(pattern=_NAME, max_length=200)
    tasks: list[JobTask] = Field(min_length=1, max_length=MOST_TASKS)
    attempts: int = Field(default=1, ge=1, le=1000)
    config: dict[str, Any] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict, max_length=64)

    @model_validator(mode="after")
    def _sizes(self) -> CreateJob:
        names = {task.name for task in self.tasks}
        if len(names) != len(self.tasks):
            raise ValueError("tasks: two tasks have the same name")
        if len(self.tasks) * self.attempts > MOST_TRIALS:
            raise ValueError(f"tasks x attempts: a job has at most {MOST_TRIALS} trials")
        if any(len(name) > 200 or len(value) > 1000 or "\0" in name + value for name, value in self.labels.items()):
            raise ValueError("labels: at most 200 characters of a name, 1000 of a value, and no NUL")
        if len(orjson.dumps([self.config, [task.spec for task in self.tasks]])) > LARGEST_SPEC:
            raise ValueError(f"config and tasks: larger than {LARGEST_SPEC} bytes")
        return self


class JobCounts(Answer):
    """Number of trials by state."""

    pending: int = 0
    running: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0


class JobInfo(Answer):
    """A job. mean_reward: over trials with a valid reward; None without one. valid: number of those trials. cancelling:
    a cancellation was requested, and trials still run."""

    job_id: str
    name: str
    state: JobState
    tenant: str = ""
    labels: dict[str, str] = {}
    tasks: int
    attempts: int
    trials: int
    counts: JobCounts
    valid: int = 0
    mean_reward: float | None = None
    cancelling: bool = False
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None


class JobDetail(JobInfo):
    """A job with its configuration and its tasks. A trial refers to a task by its index in `task_list`."""

    config: dict[str, Any] = {}
    task_list: list[JobTask] = []


class JobList(Answer):
    items: list[JobInfo]


class TrialInfo(Answer):
    """A trial. number: from 1; attempt: from 1. tries: number of tries that were begun and ended without a result.
    token: the fencing token, incremented by each claim. not_before: a retry waits until then. rewards: by name; None
    without a valid reward. history: errors of earlier tries, oldest first."""

    number: int
    task: str
    task_index: int
    attempt: int
    state: TrialState
    tries: int = 0
    token: int = 0
    holder: str = ""
    not_before: float = 0.0
    started_at: float | None = None
    finished_at: float | None = None
    rewards: dict[str, float] | None = None
    error: TrialError | None = None
    result: dict[str, Any] = {}
    history: list[TrialError] = []

    @property
    def reward(self) -> float | None:
        """The reward named "reward", else the mean of all; None without a valid reward."""
        if not self.rewards:
            return None
        return self.rewards.get("reward", sum(self.rewards.values()) / len(self.rewards))


class TrialList(Answer):
    """Trials by number. next: pass it as `after` to get the following ones."""

    items: list[TrialInfo]
    next: int | None = None


class ClaimTrials(Wire):
    """Lease trials to a runner. holder: its random name. lease: seconds until a heartbeat is due. take_over: also
    trials whose lease of another runner has not ended."""

    holder: str = Field(pattern=_HOLDER)
    count: int = Field(default=1, ge=0, le=1000)
    lease: float = Field(default=30.0, ge=1, le=3600, allow_inf_nan=False)
    take_over: bool = False


class ClaimedTrials(Answer):
    """items: leased trials. left: trials of the job without a final state, counted up to 2,000. wait: seconds until
    another trial may be leased; None when there is none."""

    items: list[TrialInfo]
    left: int
    wait: float | None = None
    cancelling: bool = False


class BeatTrials(Wire):
    """Renew leases. trials: the token by number."""

    holder: str = Field(pattern=_HOLDER)
    trials: dict[int, int] = Field(max_length=1000)
    lease: float = Field(default=30.0, ge=1, le=3600, allow_inf_nan=False)


class BeatenTrials(Answer):
    """lost: trials that the runner no longer has: it must stop to run them."""

    lost: list[int]
    cancelling: bool = False


class FinishTrial(Wire):
    """The end of a try. outcome "retry": the trial becomes pending again, not before `delay` seconds; "release": the
    same without counting a try. rewards: finite numbers by name, only with "completed"."""

    token: int
    outcome: Literal["completed", "failed", "cancelled", "retry", "release"]
    rewards: dict[str, float] | None = Field(default=None, max_length=MOST_REWARDS)
    error: TrialError | None = None
    result: dict[str, Any] = Field(default_factory=dict)
    delay: float = Field(default=0.0, ge=0, le=86400, allow_inf_nan=False)

    @field_validator("rewards")
    @classmethod
    def _finite(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for name, number in (value or {}).items():
            if len(name) > 200 or not abs(number) < float("inf"):
                raise ValueError("a reward is a finite number with a name of at most 200 characters")
        return value

    @model_validator(mode="after")
    def _fits(self) -> FinishTrial:
        if self.rewards is not None and self.outcome != "completed":
            raise ValueError("rewards: only a completed trial has rewards")
        if self.outcome in ("failed", "retry") and self.error is None:
            raise ValueError(f"error: {self.outcome!r} needs one")
        try:
            size = len(orjson.dumps(self.result))
        except (TypeError, RecursionError) as error:
            raise ValueError(f"result: {error}") from None
        if size > LARGEST_RESULT:
            raise ValueError(f"result: {size} bytes, more than {LARGEST_RESULT}")
        return self
