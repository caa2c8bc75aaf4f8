"""The plan of a job: what a runner needs, as plain data that the server stores; and the rules of retries."""

from __future__ import annotations

import time
from typing import Any

from pydantic import Field

from rock import errors
from rock.jobs.config import BashJobConfig, HarborJobConfig, JobConfig
from rock.protocol.jobs import ErrorClass, TrialError
from rock.protocol.wire import Wire

INFRASTRUCTURE_TRIES = 4  # of one trial, with errors of the infrastructure
_SECRET = {"base_url", "api_key", "registry_password", "oss_mirror", "proxy", "tracking"}
_HARBOR_ONLY = {"uploads", "type", "import_path", "force_build", "delete", "override_cpus", "override_memory_mb",
                "override_storage_mb", "override_gpus", "mounts_json", "kwargs",
                "suppress_override_warnings"}  # fmt: skip


class Retry(Wire):
    """tries: tries of a trial by class of its error; a class without an entry is not retried. types: if set, only
    errors of these types are retried, other than those of the infrastructure. never: types that are not retried."""

    tries: dict[ErrorClass, int] = {"infrastructure": INFRASTRUCTURE_TRIES}
    types: list[str] | None = None
    never: list[str] = Field(default_factory=list)
    first: float = 1.0
    factor: float = 2.0
    longest: float = 60.0

    def delay(self, error: TrialError, tries: int) -> float | None:
        """Seconds until the next try of a trial that has had `tries`; None: no further try."""
        allowed = self.tries.get(error.kind, 1)
        if error.type in self.never or tries >= allowed:
            return None
        if self.types is not None and error.kind != "infrastructure" and error.type not in self.types:
            return None
        return float(min(self.longest, self.first * self.factor ** max(0, tries - 1)))


class AgentPlan(Wire):
    """An agent. name: "oracle", "nop", "bash" or a recipe. command: of "bash". timeout: replaces that of tasks."""

    name: str = "oracle"
    command: str | None = None
    model: str | None = None
    env: dict[str, str] = Field(default_factory=dict)
    timeout: float | None = None
    longest: float | None = None
    setup_timeout: float = 360.0
    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def title(self) -> str:
        return self.name if self.model is None else f"{self.name}+{self.model}"


class Plan(Wire):
    """A job as runners see it. environment: fields of SandboxConfig that were set. model: of a gateway run for each
    trial: `upstream` or `replay`, and `budget`, `sampling`, `prices`; None is no run. jobs_dir: local folder for logs
    and artifacts of trials; None is none. verify: False leaves out the tests, and so the reward."""

    name: str
    kind: str = "harbor"
    environment: dict[str, Any] = Field(default_factory=dict)
    uploads: list[tuple[str, str]] = Field(default_factory=list)
    agents: list[AgentPlan] = Field(default_factory=lambda: [AgentPlan()], min_length=1)
    attempts: int = 1
    concurrency: int = Field(default=4, ge=1, le=1000)
    timeout: float = 7200.0
    agent_factor: float = 1.0
    verifier_factor: float = 1.0
    verifier_timeout: float | None = None
    verifier_longest: float | None = None
    verifier_env: dict[str, str] = Field(default_factory=dict)
    verify: bool = True
    retry: Retry = Field(default_factory=Retry)
    artifacts: list[str] = Field(default_factory=list)
    jobs_dir: str | None = None
    keep_sandboxes: bool = False
    force_build: bool = False
    memory: str | None = None
    cpus: float | None = None
    disk: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    model: dict[str, Any] | None = None
    dataset: str = ""
    split: str = ""


def plan_of(config: JobConfig) -> Plan:
    """The plan of a configuration."""
    box = config.environment
    set_fields = box.model_dump(mode="json", exclude_unset=True, exclude=_SECRET | _HARBOR_ONLY)
    for name in ("extra_headers", "reconnect_timeout", "xrl_authorization", "sandbox_id", "name"):
        set_fields.pop(name, None)
    if config.namespace is not None:
        set_fields.setdefault("namespace", config.namespace)
    if config.experiment_id is not None:
        set_fields.setdefault("experiment_id", config.experiment_id)
    common: dict[str, Any] = {
        "name": config.job_name or time.strftime("%Y%m%dT%H%M%S", time.gmtime()), "environment": set_fields,
        "uploads": box.uploads, "labels": config.labels,
    }  # fmt: skip
    if isinstance(config, BashJobConfig):
        return Plan(kind="bash", agents=[AgentPlan(name="bash")], attempts=config.attempts, timeout=config.timeout,
                    concurrency=config.concurrency, retry=_retry(config.retry.model_dump()), **common)  # fmt: skip
    assert isinstance(config, HarborJobConfig)
    factor = config.timeout_multiplier
    retry = (config.retry or config.orchestrator.retry).model_dump()
    memory = None if box.override_memory_mb is None else f"{box.override_memory_mb}m"
    return Plan(
        kind="harbor", attempts=config.n_attempts, timeout=config.effective_timeout, retry=_retry(retry),
        agents=[
            AgentPlan(name=agent.name or "oracle", command=agent.kwargs.get("command"), model=agent.model_name,
                      env=agent.env, timeout=agent.override_timeout_sec, longest=agent.max_timeout_sec,
                      setup_timeout=agent.override_setup_timeout_sec or 360.0,
                      options={name: value for name, value in agent.kwargs.items() if name != "command"})
            for agent in config.agents
        ],
        concurrency=config.n_concurrent_trials or config.orchestrator.n_concurrent_trials,
        agent_factor=config.agent_timeout_multiplier or factor,
        verifier_factor=config.verifier_timeout_multiplier or factor,
        verifier_timeout=config.verifier.override_timeout_sec, verifier_longest=config.verifier.max_timeout_sec,
        verifier_env=config.verifier.env, verify=not config.verifier.disable,
        artifacts=[one if isinstance(one, str) else str(one.get("source")) for one in config.artifacts],
        jobs_dir=config.jobs_dir if "jobs_dir" in config.model_fields_set else None,
        keep_sandboxes=not box.delete, force_build=box.force_build, memory=memory, cpus=box.override_cpus,
        disk=None if box.override_storage_mb is None else f"{box.override_storage_mb}m", **common,
    )  # fmt: skip


def _retry(given: dict[str, Any]) -> Retry:
    others = 1 + int(given["max_retries"])
    tries: dict[ErrorClass, int] = {
        "infrastructure": max(INFRASTRUCTURE_TRIES, others), "timeout": others, "environment": others,
        "agent": others, "verifier": others,
    }  # fmt: skip
    return Retry(tries=tries, types=given["include_exceptions"], never=given["exclude_exceptions"] or [],
                 first=given["min_wait_sec"], factor=max(1.0, given["wait_multiplier"] * 2),
                 longest=given["max_wait_sec"])  # fmt: skip


def error_of(error: BaseException) -> TrialError:
    """The error of a try, with its class."""
    message = error.message if isinstance(error, errors.RockError) else str(error)
    details = getattr(error, "details", None) or {}
    return TrialError(kind=class_of(error), type=type(error).__name__[:200], message=_clean(message)[:10_000],
                      traceback=_clean(str(details.get("traceback", "")))[-20_000:], at=time.time())  # fmt: skip


def _clean(text: str) -> str:
    """A text that JSON and UTF-8 can represent: what a sandbox printed may be anything."""
    return text.encode("utf-8", "replace").decode()


def class_of(error: BaseException) -> ErrorClass:
    """infrastructure: the sandbox, its start, or the server failed: the agent could not do anything about it."""
    if isinstance(error, TrialFailed):
        return error.kind
    if isinstance(error, errors.CommandTimeout):
        return "timeout"
    if isinstance(error, errors.ActionError | errors.Exited | errors.OutOfMemory | errors.DiskFull):
        return "environment"
    if isinstance(error, errors.NotFound | errors.Conflict | errors.QuotaExceeded):
        return "infrastructure"  # the sandbox or a program of it is gone
    if isinstance(error, errors.ClientError | errors.ImageError):
        return "request"
    return "infrastructure"


class TrialFailed(errors.RockError):
    """A try ended without a reward. kind: its class."""

    def __init__(self, message: str, kind: ErrorClass, **more: Any) -> None:
        super().__init__(message, **more)
        self.kind = kind


class VerifierTimeout(TrialFailed):
    def __init__(self, message: str, **more: Any) -> None:
        super().__init__(message, "verifier", **more)


class NoReward(TrialFailed):
    def __init__(self, message: str, **more: Any) -> None:
        super().__init__(message, "verifier", **more)
