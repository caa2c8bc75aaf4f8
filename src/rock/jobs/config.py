"""Configurations of jobs: ROCK's Bash and Harbor YAML, Harbor's own YAML, and the plan that runners execute.

    YAML ─► BashJobConfig | HarborJobConfig ─► plan.Plan

A field that the runner cannot honor is rejected by its name before the start; nothing is ignored silently.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from rock.errors import InvalidConfig, Unsupported
from rock.protocol.sandbox import SandboxConfig
from rock.protocol.wire import Wire, explain

LARGEST_FILE = 8 << 20  # bytes of a YAML file
DEFAULT_TIMEOUT = 7200.0


class OssMirrorConfig(Wire):
    """ROCK's mirror of artifacts in a bucket. Only `enabled: false` is accepted; results are stored by the server."""

    enabled: bool = False
    oss_bucket: str | None = None
    namespace: str | None = None
    experiment_id: str | None = None
    oss_access_key_id: str | None = Field(default=None, repr=False)
    oss_access_key_secret: str | None = Field(default=None, repr=False)
    oss_region: str | None = None
    oss_endpoint: str | None = None


class ProxyConfig(Wire):
    """ROCK's proxy of model calls. The gateway replaces it: recording is always on, and `replay_file` is a source."""

    enabled: bool = False
    recording_file: str | None = None
    replay_file: str | None = None
    host: str = "0.0.0.0"
    port: int = 28080
    model_service_package: str = "rl-rock[model-service]"


class TrackingConfig(Wire):
    """ROCK's experiment tracking. Accepted and unused: it names a service outside of ROCK."""

    enabled: bool = True
    api_key: str | None = Field(default=None, repr=False)
    params: dict[str, Any] = Field(default_factory=dict)


class EnvironmentConfig(SandboxConfig):
    """The sandbox of a trial. uploads: pairs (local path, path in the sandbox), copied before the trial begins.

    The fields of Harbor's environment (`type` to `suppress_override_warnings`) are accepted with these meanings: the
    `override_` fields replace the values of tasks, `force_build` builds images again, `delete: false` keeps sandboxes.
    """

    uploads: list[tuple[str, str]] = Field(default_factory=list)
    oss_mirror: OssMirrorConfig | None = None
    proxy: ProxyConfig | None = None
    tracking: TrackingConfig | None = None
    type: str | None = None
    import_path: str | None = None
    force_build: bool = False
    delete: bool = True
    override_cpus: float | None = Field(default=None, gt=0)
    override_memory_mb: int | None = Field(default=None, gt=0)
    override_storage_mb: int | None = Field(default=None, gt=0)
    override_gpus: int | None = None
    mounts_json: list[dict[str, Any]] | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)
    suppress_override_warnings: bool = False

    @field_validator("env", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        """Harbor also writes a list of NAME=VALUE. Numbers and booleans of YAML become texts."""
        if isinstance(value, list):
            value = dict(str(pair).partition("=")[::2] for pair in value)
        if isinstance(value, dict):
            return {name: text if isinstance(text, str) else _text(text) for name, text in value.items()}
        return value


class JobConfig(Wire):
    """A job in ROCK's format. timeout: seconds of one trial. labels: of the job and of its sandboxes."""

    environment: EnvironmentConfig = Field(default_factory=EnvironmentConfig)
    job_name: str | None = Field(default=None, max_length=200)
    namespace: str | None = None
    experiment_id: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    timeout: float = Field(default=DEFAULT_TIMEOUT, gt=0, allow_inf_nan=False)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> JobConfig:
        """Read a YAML file: ROCK's Harbor or Bash job, or Harbor's own job. InvalidConfig, Unsupported, each with the
        field. FileNotFoundError."""
        return parse(read_yaml(path), str(path))

    @classmethod
    def from_dict(cls, fields: dict[str, Any], source: str = "the configuration") -> JobConfig:
        """`from_yaml` of a parsed document."""
        return parse(fields, source)


class RetryConfig(Wire):
    """Harbor's retries. max_retries: of trials that failed with other errors than those of the infrastructure, which
    are retried anyway. include_exceptions, exclude_exceptions: names of error types."""

    max_retries: int = Field(default=0, ge=0, le=100)
    include_exceptions: list[str] | None = None
    exclude_exceptions: list[str] | None = None
    wait_multiplier: float = Field(default=1.0, ge=0, le=1000)
    min_wait_sec: float = Field(default=1.0, ge=0, le=86400)
    max_wait_sec: float = Field(default=60.0, ge=0, le=86400)


class BashJobConfig(JobConfig):
    """A script in a sandbox. Exactly one of `script` and `script_path`.

    Beyond ROCK: attempts and concurrency of trials, retry, and reward_file, a file of the sandbox with a number or a
    JSON object, as Harbor's reward.txt and reward.json. Without it a trial has no reward.
    """

    script: str | None = None
    script_path: str | None = None
    attempts: int = Field(default=1, ge=1, le=1000)
    concurrency: int = Field(default=1, ge=1, le=1000)
    retry: RetryConfig = Field(default_factory=RetryConfig)
    reward_file: str | None = None

    @model_validator(mode="after")
    def _one_script(self) -> Self:
        if self.script is not None and self.script_path is not None:
            raise ValueError("script: give either script or script_path")
        return self

    def text(self, base: Path | None = None) -> str:
        """The script. InvalidConfig: there is none, or its file cannot be read."""
        if self.script is not None:
            return self.script
        if self.script_path is None:
            raise InvalidConfig("the job has no script", hint="set script or script_path")
        path = Path(self.script_path)
        path = path if path.is_absolute() or base is None else base / path
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidConfig(f"script_path {path} cannot be read: {error}", hint="correct the path") from None


class OrchestratorConfig(Wire):
    type: Literal["local"] = "local"
    n_concurrent_trials: int = Field(default=4, ge=1, le=1000)
    quiet: bool = False
    plain_output: bool | None = None
    retry: RetryConfig = Field(default_factory=RetryConfig)
    kwargs: dict[str, Any] = Field(default_factory=dict)


class AgentConfig(Wire):
    """The agent of a trial. name: "oracle", "nop", "bash" (kwargs.command), or the name of an agent recipe."""

    name: str | None = None
    import_path: str | None = None
    model_name: str | None = None
    override_timeout_sec: float | None = Field(default=None, gt=0)
    override_setup_timeout_sec: float | None = Field(default=None, gt=0)
    max_timeout_sec: float | None = Field(default=None, gt=0)
    kwargs: dict[str, Any] = Field(default_factory=dict)
    env: dict[str, str] = Field(default_factory=dict)


class VerifierConfig(Wire):
    override_timeout_sec: float | None = Field(default=None, gt=0)
    max_timeout_sec: float | None = Field(default=None, gt=0)
    env: dict[str, str] = Field(default_factory=dict)
    disable: bool = False


class RegistryConfig(Wire):
    """Where a named data set is. A local registry (`path`) and ROCK's bucket layout (`oss_bucket`) are accepted."""

    split: str | None = None
    revision: str | None = None
    name: str | None = None
    url: str | None = None
    path: str | None = None
    oss_bucket: str | None = None
    oss_dataset_path: str | None = None
    oss_endpoint: str | None = None
    oss_region: str | None = None
    oss_access_key_id: str | None = Field(default=None, repr=False)
    oss_access_key_secret: str | None = Field(default=None, repr=False)


class DatasetConfig(Wire):
    path: str | None = None
    name: str | None = None
    version: str | None = None
    ref: str | None = None
    registry: RegistryConfig | None = None
    overwrite: bool = False
    download_dir: str | None = None
    task_names: list[str] | None = None
    exclude_task_names: list[str] | None = None
    n_tasks: int | None = Field(default=None, ge=1)


class TaskConfig(Wire):
    path: str | None = None
    git_url: str | None = None
    git_commit_id: str | None = None
    name: str | None = None
    ref: str | None = None
    overwrite: bool = False
    download_dir: str | None = None
    source: str | None = None


class MetricConfig(Wire):
    type: Literal["mean"] = "mean"
    kwargs: dict[str, Any] = Field(default_factory=dict)


class HarborJobConfig(JobConfig):
    """Harbor's tasks, run natively: Harbor is not installed in a sandbox. The multipliers scale the times of tasks."""

    jobs_dir: str = "/data/logs/user-defined/jobs"
    n_attempts: int = Field(default=1, ge=1, le=1000)
    timeout_multiplier: float = Field(default=1.0, gt=0)
    agent_timeout_multiplier: float | None = Field(default=None, gt=0)
    verifier_timeout_multiplier: float | None = Field(default=None, gt=0)
    agent_setup_timeout_multiplier: float | None = Field(default=None, gt=0)
    environment_build_timeout_multiplier: float | None = Field(default=None, gt=0)
    debug: bool = False
    orchestrator: OrchestratorConfig = Field(default_factory=OrchestratorConfig)
    n_concurrent_trials: int | None = Field(default=None, ge=1, le=1000)
    quiet: bool = False
    retry: RetryConfig | None = None
    verifier: VerifierConfig = Field(default_factory=VerifierConfig)
    metrics: list[MetricConfig] = Field(default_factory=list)
    agents: list[AgentConfig] = Field(default_factory=lambda: [AgentConfig()], min_length=1)
    datasets: list[DatasetConfig] = Field(default_factory=list)
    tasks: list[TaskConfig] = Field(default_factory=list)
    artifacts: list[str | dict[str, Any]] = Field(default_factory=list)

    @property
    def effective_timeout(self) -> float:
        """Seconds of one trial, as ROCK computes them."""
        limits = [agent.override_timeout_sec or agent.max_timeout_sec for agent in self.agents]
        times = [limit for limit in limits if limit]
        return max(times) * self.timeout_multiplier + 600 if times else DEFAULT_TIMEOUT * self.timeout_multiplier

    def to_harbor_yaml(self) -> str:
        """The fields of Harbor as YAML."""
        own = {"namespace", "experiment_id", "labels", "timeout", "environment"}
        fields = self.model_dump(mode="json", exclude=own, exclude_unset=True)
        text: str = _yaml().safe_dump(fields, sort_keys=False)
        return text


_HARBOR = frozenset(HarborJobConfig.model_fields) - frozenset(BashJobConfig.model_fields)


def parse(fields: Any, source: str) -> JobConfig:
    """A configuration of a parsed document: Harbor's if it has a field of Harbor, else a Bash job."""
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise InvalidConfig(f"{source} is not a mapping of fields", hint="docs/guides/jobs.md has examples")
    kind: type[JobConfig] = HarborJobConfig if _HARBOR & set(fields) else BashJobConfig
    try:
        made = kind.model_validate(fields)
    except ValidationError as error:
        found = explain(error, kind)
        raise InvalidConfig(f"{source} is no job: {found.message}", hint=found.hint, details=found.details) from None
    check_supported(made)
    return made


def check_supported(config: JobConfig) -> None:
    """Unsupported, with the name of the field and the reason."""
    box = config.environment
    if box.oss_mirror is not None and box.oss_mirror.enabled:
        raise _refused("environment.oss_mirror.enabled", "results are stored by the server; download them with "
                       "`rock job show JOB --format harbor --out FOLDER`")  # fmt: skip
    if box.proxy is not None and box.proxy.enabled:
        raise _refused("environment.proxy.enabled", "the gateway records model calls; use `model` of the job plan")
    if not isinstance(config, HarborJobConfig):
        return
    for name, value in (("import_path", box.import_path), ("mounts_json", box.mounts_json), ("kwargs", box.kwargs),
                        ("override_gpus", box.override_gpus)):  # fmt: skip
        if value:
            raise _refused(f"environment.{name}", "sandboxes of ROCK run the tasks; use the fields of the sandbox")
    if box.type not in (None, "docker", "rock"):
        raise _refused(f"environment.type: {box.type}", "sandboxes of ROCK run the tasks; remove it")
    if config.orchestrator.kwargs:
        raise _refused("orchestrator.kwargs", "it has no effect here; remove it")
    for agent in config.agents:
        if agent.import_path is not None:
            raise _refused("agents.import_path", "Python classes of Harbor are not loaded; use an agent recipe by name")
    for task in config.tasks:
        if task.path is None or task.git_url is not None:
            raise _refused("tasks.git_url", "tasks are local folders: clone the repository, and set tasks.path")
    for dataset in config.datasets:
        registry = dataset.registry
        if dataset.path is None and (registry is None or registry.url is not None):
            raise _refused("datasets.registry", "data sets are not downloaded from Harbor's registry or a hub: set "
                           "datasets.path, a local registry, or a bucket")  # fmt: skip
    if not config.tasks and not config.datasets:
        raise InvalidConfig("the job has no tasks", hint="set tasks or datasets")


def _refused(field: str, why: str) -> Unsupported:
    return Unsupported(f"{field} is not supported", hint=why, details={"field": field})


def _text(value: Any) -> str:
    return {True: "true", False: "false", None: ""}.get(value, str(value)) if not isinstance(value, str) else value


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The document of a YAML file. InvalidConfig; FileNotFoundError."""
    place = Path(path)
    if place.stat().st_size > LARGEST_FILE:
        raise InvalidConfig(f"{place} has more than {LARGEST_FILE} bytes", hint="put tasks into a data set")
    yaml = _yaml()
    try:
        return yaml.safe_load(place.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidConfig(f"{place} is not YAML: {error}", hint="correct the file") from None


def _yaml() -> Any:
    try:
        import yaml
    except ModuleNotFoundError:
        raise Unsupported("YAML files need the package pyyaml", hint="pip install 'rock-sandbox[rock-conf]'") from None
    return yaml
